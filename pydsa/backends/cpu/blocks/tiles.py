"""Q4_K, Q5_0 and Q6_K in tiles of sixteen rows, with a lane for each.

int16/tiles.py multiplies them. Four bytes of each row are transposed before they become int16: a quarter as much is moved as when
superblocks are transposed.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.blocks.block import MINS, SCALES
from pydsa.backends.cpu.int16.tiles import FACTORS, ZEROS, q4_k_products, q5_0_products, q6_k_products
from pydsa.backends.cpu.jit import IntpFunction, inline
from pydsa.backends.cpu.vectors.lanes import transpose
from pydsa.backends.cpu.vectors.simd import I8, I16, I32, constant, extend_halves, f32x16, i16x32, i32x16, pointer, store, to_floats


@intrinsic
def columns_of_16_bytes(typingctx, address, stride):
    """Load 16 bytes of each of sixteen rows, and transpose them.

    Returns four i32x16: the first four bytes of all rows, and so on.
    """
    def codegen(context, b, signature, args):
        address, stride = args
        quarter = ir.VectorType(I32, 4)
        rows = [b.load(pointer(b, b.add(address, b.mul(stride, stride.type(r))), quarter), align=1) for r in range(16)]
        groups = []
        for first in range(4):      # rows first, first + 4, ...
            low, high = (b.shuffle_vector(rows[first + i], rows[first + i + 4], constant(range(8))) for i in (0, 8))
            groups.append(b.shuffle_vector(low, high, constant(range(16))))

        def pairs(x, y, n, high):
            """Join n lanes of x, then of y, by turns, of a half of each four."""
            lanes = [lane for part in range(0, 16, 4) for at in range(part + 2 * high, part + 2 * high + 2, n)
                     for source in (0, 16) for lane in range(source + at, source + at + n)]
            return b.shuffle_vector(x, y, constant(lanes))
        columns = []
        for high in (0, 1):
            x, y = (pairs(groups[i], groups[i + 1], 1, high) for i in (0, 2))
            columns += [pairs(x, y, 2, 0), pairs(x, y, 2, 1)]
        return cgutils.pack_array(b, columns)
    return types.UniTuple(i32x16, 4)(types.intp, types.intp), codegen


def _factor(byte, odd):
    """Make a function that repeats a byte of each lane in both its int16.

    As their low bytes, which even elements are multiplied by, or as their high ones.
    """
    @intrinsic
    def factor(typingctx, v):
        def codegen(context, b, signature, args):
            v = b.bitcast(args[0], ir.VectorType(I8, 64))
            lanes = [lane for j in range(0, 64, 4) for lane in [64, j + byte][::1 if odd else -1] * 2]
            return b.bitcast(b.shuffle_vector(v, constant([0] * 64, I8), constant(lanes)), i16x32.ir)
        return i16x32(v), codegen
    return factor


(EVEN_0, EVEN_1, EVEN_2, EVEN_3), (ODD_0, ODD_1, ODD_2, ODD_3) = ([_factor(byte, odd) for byte in range(4)] for odd in (False, True))


@intrinsic
def halves_of_lanes(typingctx, v):
    """Convert the two float16 in each lane of an i32x16 to two f32x16."""
    def codegen(context, b, signature, args):
        parts = args[0], b.lshr(args[0], constant([16] * 16))
        return cgutils.pack_array(b, [extend_halves(b, b.trunc(part, ir.VectorType(I16, 16))) for part in parts])
    return types.UniTuple(f32x16, 2)(v), codegen


@inline
def store_factors(tile, at, v):
    """Store the factors of four sub-blocks, the bytes of each lane."""
    store(tile, at, EVEN_0(v))
    store(tile, at + 64, ODD_0(v))
    store(tile, at + 128, EVEN_1(v))
    store(tile, at + 192, ODD_1(v))
    store(tile, at + 256, EVEN_2(v))
    store(tile, at + 320, ODD_2(v))
    store(tile, at + 384, EVEN_3(v))
    store(tile, at + 448, ODD_3(v))


@inline
def store_scaled_bytes(tile, at, v, d):
    """Store d times the bytes of each lane, in four columns."""
    store(tile, at, to_floats(v & 255) * d)
    store(tile, at + 64, to_floats((v >> 8) & 255) * d)
    store(tile, at + 128, to_floats((v >> 16) & 255) * d)
    store(tile, at + 192, to_floats(v >> 24) * d)


def unpack_tile_q4_k(source, stride, n, tile):
    halves, first, second, third = columns_of_16_bytes(source, stride)
    d, dmin = halves_of_lanes(halves)
    store(tile, 16 * SCALES, d)
    store_factors(tile, FACTORS, first & 0x3F3F3F3F)
    store_factors(tile, FACTORS + 512, (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030))
    store_scaled_bytes(tile, 16 * MINS, second & 0x3F3F3F3F, dmin)
    store_scaled_bytes(tile, 16 * MINS + 256, ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030), dmin)
    transpose(source + 16, stride, tile, 64)
    transpose(source + 80, stride, tile + 1024, 64)


def multiply_tiles_q4_k(tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead):
    q4_k_products(tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead)


@inline
def store_zeros(tile, at, v):
    """Store 32 times the four signed bytes of each lane, in both int16."""
    store(tile, at, times_32(ODD_0(v)))
    store(tile, at + 64, times_32(ODD_1(v)))
    store(tile, at + 128, times_32(ODD_2(v)))
    store(tile, at + 192, times_32(ODD_3(v)))


@intrinsic
def times_32(typingctx, v):
    """Return 32 times the signed high bytes of int16."""
    return i16x32(i16x32), lambda context, builder, signature, args: builder.ashr(args[0], constant([3] * 32, I16))


def unpack_tile_q6_k(source, stride, n, tile):
    transpose(source, stride, tile, 64)
    transpose(source + 64, stride, tile + 1024, 64)
    transpose(source + 128, stride, tile + 2048, 64)
    first, second, third, last = columns_of_16_bytes(source + 192, stride)
    _, _, _, with_d = columns_of_16_bytes(source + 194, stride)
    store_factors(tile, FACTORS, first)
    store_factors(tile, FACTORS + 512, second)
    store_factors(tile, FACTORS + 1024, third)
    store_factors(tile, FACTORS + 1536, last)
    store_zeros(tile, ZEROS, first)
    store_zeros(tile, ZEROS + 256, second)
    store_zeros(tile, ZEROS + 512, third)
    store_zeros(tile, ZEROS + 768, last)
    store(tile, 16 * SCALES, halves_of_lanes(with_d)[1])


def multiply_tiles_q6_k(tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead):
    q6_k_products(tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead)


@inline
def with_fifth_bits(q, bits):
    """Add the lowest four bits of each lane as fifth bits of its bytes."""
    return q | (((bits & 15) * 0x02040810) & 0x10101010)


def unpack_tile_q5_0(source, stride, n, tile):
    for i in range(n // 32):
        first, second, _, _ = columns_of_16_bytes(source + 22 * i, stride)
        a, b, c, e = columns_of_16_bytes(source + 22 * i + 6, stride)
        at, bits = tile + 512 * i, (first >> 16) | (second << 16)
        store(tile, 16 * SCALES + 64 * i, halves_of_lanes(first)[0])
        store(at, 0, with_fifth_bits(a & 0x0F0F0F0F, bits))
        store(at, 64, with_fifth_bits(b & 0x0F0F0F0F, bits >> 4))
        store(at, 128, with_fifth_bits(c & 0x0F0F0F0F, bits >> 8))
        store(at, 192, with_fifth_bits(e & 0x0F0F0F0F, bits >> 12))
        store(at, 256, with_fifth_bits((a >> 4) & 0x0F0F0F0F, bits >> 16))
        store(at, 320, with_fifth_bits((b >> 4) & 0x0F0F0F0F, bits >> 20))
        store(at, 384, with_fifth_bits((c >> 4) & 0x0F0F0F0F, bits >> 24))
        store(at, 448, with_fifth_bits((e >> 4) & 0x0F0F0F0F, bits >> 28))


def multiply_tiles_q5_0(tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead):
    q5_0_products(tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead)


# GGUF type -> unpack_tile, multiply_tiles of its BlockKernels
KERNELS = {"Q4_K": (IntpFunction(unpack_tile_q4_k), IntpFunction(multiply_tiles_q4_k)),
           "Q5_0": (IntpFunction(unpack_tile_q5_0), IntpFunction(multiply_tiles_q5_0)),
           "Q6_K": (IntpFunction(unpack_tile_q6_k), IntpFunction(multiply_tiles_q6_k))}
