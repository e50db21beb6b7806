"""What the families of block types share: the entry itself, and half-precision numbers, which numba cannot compute with."""
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.jit import BlockFunction, WordFunction, inline, inner
from pydsa.lanes import first_quarter, last_quarter, lower_half, second_quarter, spread, third_quarter, totals, upper_half
from pydsa.simd import (FEATURES, as_bytes, as_words, dot, dot_add, float_at, floats, join, larger_magnitudes, largest, load_floats,
                        load_4_floats, load_words, multiply_add, prefetch, signed_high_bytes, stack_memory, store, to_floats, u16_at)


# A chunk: 256 numbers in words of 16 bits, as a row of weights is unpacked and a row of activations is rounded. Its parts, in bytes:
# the words, each 32 with the even elements before the odd ones; a float32 scale for each 32; what is subtracted for each 32, and for
# each 16 (of a chunk of activations: the sums of its numbers). The product of two chunks, w of weights and x of activations, is
#     sum_j w.scale[j] x.scale[j] (w.words x.words over the j-th 32) - sum_j w.low[j] x.low[j] - sum_i w.low16[i] x.low16[i]
SCALE, LOW, LOW_16, CHUNK = 512, 544, 576, 640
AHEAD = 4096    # bytes that a product asks for ahead of those it reads: more than the hardware's own prefetch does


class BlockType(NamedTuple):
    """A GGUF type: `size` elements are stored as one `dtype`; dequantize(blocks, n, float32 out), quantize the other way (or None).

    Quantized types also have unpack(blocks, n, chunk), at most 256 elements to a chunk; and
    dot(rows, n_rows, n_blocks, x, float32 out), the products of rows with a row of chunks whose 16-byte pieces lie in `order`:
    order[i] is where the i-th piece goes. `lows` is how many numbers of a chunk's low (8), or low16 (16), are in use. The words of a chunk
    have `bits` bits: they are unsigned if there are lows, else signed.
    """
    dtype: np.dtype
    size: int
    dequantize: BlockFunction
    quantize: BlockFunction | None = None
    unpack: WordFunction | None = None
    dot: WordFunction | None = None
    order: np.ndarray | None = None
    lows: int = 0
    bits: int = 0


def entry(dtype, size, dequantize, quantize=None, unpack=None, dot=None, order=None, lows=0, bits=0):
    """A BlockType from plain functions, or from a WordFunction for dequantize or quantize; order as a list of 32 numbers."""
    floats = np.dtype(np.float32)
    if not isinstance(dequantize, WordFunction):
        dequantize = BlockFunction(dequantize, dtype, floats)
    if quantize and not isinstance(quantize, WordFunction):
        quantize = BlockFunction(quantize, floats, dtype)
    return BlockType(dtype, size, dequantize, quantize, unpack and WordFunction(unpack), dot and WordFunction(dot),
                     order and np.array(order, np.uint8), lows, bits)


def places(*pieces):
    """The order in which a dot reads the pieces of a chunk, as the place of each piece: the inverse permutation."""
    return [pieces.index(i) for i in range(len(pieces))]


@intrinsic
def float_from_bits(typingctx, bits):
    """The float32 whose bits these are."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(typingctx, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _extend_half(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
    return types.float32(types.uint16), codegen


@inner
def _half_by_hardware(bits):
    return _extend_half(np.uint16(bits))


@inner
def _half_by_bits(bits):
    """2^112 moves the exponent's bias, and makes subnormal halves normal floats."""
    bits = np.uint32(bits)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    finite = bits_of_float(float_from_bits(magnitude) * np.float32(2.0 ** 112))
    magnitude = finite if magnitude < np.uint32(0x0F800000) else magnitude | np.uint32(0x7F800000)      # else infinite or NaN
    return float_from_bits(magnitude | ((bits & np.uint32(0x8000)) << np.uint32(16)))


# float16 bits, uint16 -> float32, exactly. Without the instruction LLVM would call a function that is not there.
half = _half_by_hardware if "f16c" in FEATURES else _half_by_bits


@inline
def half_at(address, offset):
    """The float16 in memory as float32."""
    return half(u16_at(address, offset))


@inner
def to_half(value):
    """float32 -> float16 bits, rounded to nearest even, as numpy's astype(float16); too large becomes infinity."""
    bits = bits_of_float(value)
    sign, magnitude = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if magnitude >= np.uint32(0x47800000):
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):       # subnormal half: adding 0.5 lets the float unit round at 2^-24
        return np.uint16(sign | (bits_of_float(float_from_bits(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)))
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    return np.uint16(sign | ((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)))


@inline
def leave_row(sums, v, r, n_rows, out):
    """out[r] = the sum of v's lanes, written when sixteen rows are there, or the last one: the vectors wait in stack_memory() at `sums`."""
    i = r & 15
    store(sums, 64 * i, v)
    if i == 15:
        store(out, 4 * (r - 15), totals(sums))
    elif r == n_rows - 1:
        store(sums, 0, totals(sums))
        for j in range(i + 1):
            store(out, 4 * (r - i + j), float_at(sums, 4 * j))


@inline
def alone(sums):
    """The total of one vector of sums."""
    return sums


@inline
def dot_rows(add, total, nothing, row_bytes, step, rows, n_rows, n, x, out):
    """A BlockType's dot: out[r] = total(sums) of row r, after sums = add(sums, row, i, n, x) for i = 0, step, ... < n, from `nothing` on.

    Two rows at a time, from either half of all rows: memory is read in two places at once, which is a fifth faster than in one, and
    activations are loaded once for both.
    """
    first, second = stack_memory(), stack_memory()
    half = (n_rows + 1) // 2
    for r in range(half):
        one, other = nothing, nothing
        row, other_row = rows + r * row_bytes, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            one = add(one, row, i, n, x)
            other = add(other, other_row, i, n, x)
        leave_row(first, total(one), r, half, out)
        if r + half < n_rows:
            leave_row(second, total(other), r, n_rows - half, out + 4 * half)


@inner
def largest_magnitude(x, n):
    """Of n floats at an address; NaN if there is one."""
    top = floats(np.float32(0))
    for k in range(0, n - 15, 16):
        top = larger_magnitudes(top, load_floats(x, 4 * k))
    for k in range(n // 16 * 16, n):
        top = larger_magnitudes(top, floats(float_at(x, 4 * k)))
    return largest(top, top)


@inner
def round_to_bytes(source, n, target):
    """n floats -> int8, the largest magnitude becoming 127, halves away from zero as gguf-py's Q8_0 has it -> the scale.

    If a number is not finite, neither is the scale.
    """
    top = np.float32(0)
    for j in range(n):
        magnitude = abs(float_at(source, 4 * j))
        top = magnitude if magnitude > top or magnitude != magnitude else top       # NaN stays
    scale = top / np.float32(127)
    factor = np.float32(1) / scale if scale > np.float32(1e-30) and scale < np.float32(np.inf) else np.float32(0)
    for j in range(n):
        product = float_at(source, 4 * j) * factor
        whole = np.floor(abs(product) + np.float32(0.5))
        store(target, j, np.int8(whole if product > 0 else -whole) if whole < 128 else np.int8(0))
    return scale


@inline
def store_halves(chunk, first, second, v):
    """The halves of a vector of words at two offsets."""
    store(chunk, first, lower_half(v))
    store(chunk, second, upper_half(v))


@inline
def dot_pair(sums, even, odd, x, offset, scales):
    """sums + scales (even, odd) . 64 words of x: the even and the odd elements of the same 32s."""
    return multiply_add(sums, to_floats(dot_add(dot(even, load_words(x, offset)), odd, load_words(x, offset + 64))), scales)


@inline
def four_blocks(row, size, i, n):
    """The addresses of blocks i to i + 3 of a row of n blocks of `size` bytes; the last block stands for those that are not there."""
    last = n - 1
    return row + size * i, row + size * min(i + 1, last), row + size * min(i + 2, last), row + size * min(i + 3, last)


@inline
def next_blocks(row, size, i, n):
    """four_blocks, after asking for those AHEAD of them."""
    at = four_blocks(row, size, i, n)
    prefetch(at[0], AHEAD)
    prefetch(at[0], AHEAD + 64)
    return at


@inline
def joined(addresses, offset):
    """The 16 bytes at an offset of four blocks, side by side."""
    return join((addresses[0] + offset, addresses[1] + offset, addresses[2] + offset, addresses[3] + offset))


@inline
def nibbles(v):
    """Bytes -> their low nibbles, their high nibbles."""
    return v & 15, as_bytes((as_words(v) >> 4) & 0x0F0F)


@inline
def where_in_chunks(x, i):
    """The chunk of the i-th 32, the offset of its words, and that of its float32s from the first of their kind."""
    return x + CHUNK * (i >> 3), 64 * (i & 7), 4 * (i & 7)


# Four blocks of 32 whose bytes have the element j in their low nibble and j + 16 in the high one: low even, low odd, high even, high odd
BY_QUARTERS = places(*[16 * part + 4 * block + i for part in (0, 1) for i in (0, 2, 1, 3) for block in range(4)])
QUARTERS = spread(0, 1, 2, 3)


@inline
def unsigned_quad(low, high):
    """Bytes with the elements j and j + 16 of four blocks, 0 to 255, as four vectors of words: low even, low odd, high even, high odd."""
    low, high = as_words(low), as_words(high)
    return low & 255, low >> 8, high & 255, high >> 8


@inline
def signed_quad(low, high):
    """unsigned_quad of bytes from -128 to 127."""
    low, high = as_words(low), as_words(high)
    return signed_high_bytes(low << 8), signed_high_bytes(low), signed_high_bytes(high << 8), signed_high_bytes(high)


@inline
def dot_quad(sums, w, x, offset, scales):
    """sums + scales w . 128 words of x; w are four vectors in the order of BY_QUARTERS."""
    dots = dot_add(dot(w[0], load_words(x, offset)), w[1], load_words(x, offset + 64))
    dots = dot_add(dot_add(dots, w[2], load_words(x, offset + 128)), w[3], load_words(x, offset + 192))
    return multiply_add(sums, to_floats(dots), QUARTERS(scales))


@inline
def add_quad(sums, w, x, i, d):
    """sums + d w . the i-th to (i + 3)-rd 32 of a row of chunks; w in the order of BY_QUARTERS, d a scale for each 32."""
    xi, words, number = where_in_chunks(x, i)
    return dot_quad(sums, w, xi, words, d * load_4_floats(xi, SCALE + number))


@inline
def store_quarters(chunk, at, v):
    """The quarters of a vector of words to the same place of four 32s."""
    store(chunk, at, first_quarter(v))
    store(chunk, at + 64, second_quarter(v))
    store(chunk, at + 128, third_quarter(v))
    store(chunk, at + 192, last_quarter(v))


@inline
def store_quad(chunk, at, w):
    """Four vectors in the order of BY_QUARTERS to four 32s of a chunk."""
    store_quarters(chunk, at, w[0])
    store_quarters(chunk, at + 32, w[1])
    store_quarters(chunk, at + 16, w[2])
    store_quarters(chunk, at + 48, w[3])
