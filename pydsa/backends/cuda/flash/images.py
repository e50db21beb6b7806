"""Latents, k_b and v_b as images of float16, for wgmma and ldmatrix.

An image holds 64 numbers of each of many rows: 128 bytes a row, of which 16-byte piece i of row r lies at i ^ (r % 8). Rows of n numbers
are n / 64 images, one after the other. Latents are in tiles of TILE rows, with kv_lora / 64 images each; the rotated parts of keys, up to
64 numbers a row and zeros behind them, are one image of all rows.

Numbers are multiplied by powers of two, so that no float16 overflows, and few have lost bits as subnormal ones: one for all latents, one
for all rotated parts, one for each head of k_b and of v_b. The greatest number becomes 2^13 to 2^14. A product of a latent with a row of
weights is then below 2^37 (kv_lora is at most 512), and times GAIN below 2^15.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.blocks.floats import FLOATS
from pydsa.backends.cuda.f32.tiles import UNPACK_FOUR
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits, block_max
from pydsa.backends.cuda.intrinsics.device import bits_float, device, float_bits
from pydsa.backends.cuda.intrinsics.instructions import instruction, quotient, store_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import folds
from pydsa.backends.cuda.rows import get_rows
from pydsa.backends.cuda.runtime.array import scratch, upload
from pydsa.backends.cuda.runtime.current import kept_per_gpu
from pydsa.backends.cuda.runtime.launch import kernel

WIDE = 64                       # numbers of a row in an image
TILE = 128                      # latents of a tile
GAIN = np.float32(2.0 ** -22)   # of a product of latents and weights
THREADS = 256
MAXIMA = 128                    # blocks that look for the greatest numbers, a multiple of 32
INFINITE = np.int32(0x7F800000)
U, ZERO = np.uint32, np.float32(0)

pack_halves = instruction("cvt.rn.f16x2.f32 $0, $1, $2;", "r", "ff")        # pack_halves(upper, lower)
greatest_of_warp, _ = folds(32)


@device
def usable_bits(x):
    """The bits of |x|, which order as |x| does; 0 if x is not finite."""
    bits = abs_bits(x)
    return bits if bits < INFINITE else np.int32(0)


@device
def power_for(x):
    """The power of two that brings |x| to 2^13 or more, below 2^14.

    Below 2^-16 and above 2^40 it is that of these numbers: products of three powers are float32.
    """
    exponent = min(max(np.int32(float_bits(x) >> 23 & 255), np.int32(111)), np.int32(167))
    return bits_float(U((267 - exponent) << 23))


@device
def inverse(power):
    """1 / a power of two."""
    return bits_float(U(0x7F000000) - float_bits(power))


@device
def power_of_part(maxima, part, lane):
    """The power of two of all latents (part 0) or of all rotated parts (1).

    All lanes of a warp must call.
    """
    x = ZERO
    for i in range(0, MAXIMA, 32):
        x = max(x, maxima[part, i + lane])
    return power_for(greatest_of_warp(x))


@device
def keys_of(positions, ints, thread):
    """One more than the greatest position, by all threads of a block."""
    last = np.int32(-1)
    for i in range(thread, positions.shape[0], THREADS):
        last = max(last, np.int32(positions[i]))
    return block_max(last + np.int32(1), ints, thread, THREADS)


def _make_rows(storage):
    four = UNPACK_FOUR[storage]

    @device
    def eight(data, row, piece, kv_lora, n_rot):
        a, b, c, d = four(data, row, 8 * piece, kv_lora, n_rot)
        e, f, g, h = four(data, row, 8 * piece + 4, kv_lora, n_rot)
        return a, b, c, d, e, f, g, h

    def maxima_of_rows(maxima, data, row_bytes, positions, kv_lora, n_rot):
        """The greatest |number| that block b has met: of latents maxima[0, b], of rotated parts maxima[1, b].

        Those that are not finite do not count.
        """
        thread, ints = cuda.threadIdx.x, cuda.shared.array(32, np.int32)
        n, of_latents, of_rotated, pieces = keys_of(positions, ints, thread), np.int32(0), np.int32(0), kv_lora + n_rot >> 3
        for i in range(cuda.blockIdx.x * THREADS + thread, n * pieces, MAXIMA * THREADS):
            row, bits = quotient(i, pieces), np.int32(0)
            piece = i - row * pieces
            for x in eight(data, np.int64(row) * row_bytes, piece, kv_lora, n_rot):
                bits = max(bits, usable_bits(x))
            if 8 * piece < kv_lora:
                of_latents = max(of_latents, bits)
            else:
                of_rotated = max(of_rotated, bits)
        of_latents, of_rotated = block_max(of_latents, ints, thread, THREADS), block_max(of_rotated, ints, thread, THREADS)
        if thread == 0:
            maxima[0, cuda.blockIdx.x], maxima[1, cuda.blockIdx.x] = bits_float(U(of_latents)), bits_float(U(of_rotated))

    def images_of_rows(latents, rotated, data, row_bytes, positions, kv_lora, n_rot, maxima, first):
        """Images of cache rows from the first-th on, times powers of two.

        Rows beyond all positions are zeros.
        """
        thread, ints = cuda.threadIdx.x, cuda.shared.array(32, np.int32)
        n, i, pieces = keys_of(positions, ints, thread), cuda.blockIdx.x * THREADS + thread, kv_lora + WIDE >> 3
        of_latents, of_rotated = power_of_part(maxima, 0, thread & 31), power_of_part(maxima, 1, thread & 31)
        row, w0, w1, w2, w3 = quotient(i, pieces), U(0), U(0), U(0), U(0)
        piece = i - row * pieces
        if first + row < n and 8 * piece < kv_lora + n_rot:
            p = of_latents if 8 * piece < kv_lora else of_rotated
            a, b, c, d, e, f, g, h = eight(data, np.int64(first + row) * row_bytes, piece, kv_lora, n_rot)
            w0, w1, w2, w3 = pack_halves(b * p, a * p), pack_halves(d * p, c * p), pack_halves(f * p, e * p), pack_halves(h * p, g * p)
        place = 16 * ((piece ^ row) & 7)
        if 8 * piece < kv_lora:
            at = np.int64(row // TILE) * (2 * TILE * kv_lora) + (piece >> 3) * (128 * TILE) + row % TILE * 128 + place
            store_sixteen(latents, at, w0, w1, w2, w3)
        else:
            store_sixteen(rotated, np.int64(row) * 128 + place, w0, w1, w2, w3)
    row = "u1[::1], i8, i8[:], i4, i4"
    return (kernel(f"f4[:,:], {row}", THREADS, f"flash_maxima_{storage}")(maxima_of_rows),
            kernel(f"u1[::1], u1[::1], {row}, f4[:,:], i4", THREADS, f"flash_rows_{storage}")(images_of_rows))


def blocks_of_rows(n_tiles, kv_lora):
    """Blocks that make the images of tiles of latents."""
    return n_tiles * TILE * (kv_lora + WIDE) // 8 // THREADS


# storage of a cache -> kernels: the greatest numbers of its rows; their images
ROWS = {storage: _make_rows(storage) for storage in UNPACK_FOUR}


@device
def no_table(thread, n_threads):
    """What floats need before they are read: nothing."""


def _make_unpack(name):
    """unpack(values, data, row, k): 32 weights, and what comes before it."""
    if name in FLOATS:
        value_at = FLOATS[name]

        @device
        def unpack_floats(values, data, row, k):
            for i in range(32):
                values[i] = value_at(data, row, 32 * k + i)
        return unpack_floats, no_table
    group = GROUPED[name].group

    @device
    def unpack(values, data, row, k):
        a, b, c, e, f, h, i, j, d, d1, m, m1 = group(data, row, k)
        quads = (a, b, c, e, f, h, i, j)
        for q in range(8):
            quad, scale, offset = quads[q], d if q < 4 else d1, m if q < 4 else m1
            for byte in range(4):
                value = np.int32(quad >> (8 * byte) & 255)
                values[4 * q + byte] = scale * np.float32(value - ((value & 128) << 1)) - offset
    return unpack, GROUPED[name].prepare


@device
def word_of(values, i, power):
    """Two numbers times a power of two as float16."""
    return pack_halves(values[i + 1] * power, values[i] * power)


def _make_weights(name):
    unpack, prepare = _make_unpack(name)

    def images_of_weights(images, powers, w, row_bytes, n_rows, n_groups):
        """Images of matrix b, by block b, times a power of two, powers[b].

        It has n_rows rows of n_groups times 32 weights.
        """
        thread, head, ints = cuda.threadIdx.x, np.int64(cuda.blockIdx.x), cuda.shared.array(32, np.int32)
        values, bits = cuda.local.array(32, np.float32), np.int32(0)
        prepare(thread, THREADS)
        for i in range(thread, n_rows * n_groups, THREADS):
            unpack(values, w, (head * n_rows + i // n_groups) * row_bytes, i % n_groups)
            for j in range(32):
                bits = max(bits, usable_bits(values[j]))
        power = power_for(bits_float(U(block_max(bits, ints, thread, THREADS))))
        if thread == 0:
            powers[head] = power
        for i in range(thread, n_rows * n_groups, THREADS):
            row, k = i // n_groups, i % n_groups
            unpack(values, w, (head * n_rows + row) * row_bytes, k)
            at = ((head * n_groups + (k & ~1)) * n_rows * 2 + 4 * row) * 32         # 64 bytes of each row are a group
            for j in range(4):
                v = 8 * j
                store_sixteen(images, at + 16 * ((4 * (k & 1) + j) ^ row & 7), word_of(values, v, power), word_of(values, v + 2, power),
                              word_of(values, v + 4, power), word_of(values, v + 6, power))
    return kernel("u1[::1], f4[:], u1[::1], i8, i4, i4", THREADS, f"flash_weights_{name.lower()}")(images_of_weights)


# types that k_b and v_b have in files: those of llama-quantize's usual mixes, and what it takes where rows are no multiple of 256. Others
# become float32 first.
WEIGHTS = {name: _make_weights(name) for name in ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")}
MOST_ROWS = 1 << 15         # that become float32 in a launch


@kept_per_gpu()
def _row_numbers(n):
    return upload(np.arange(n, dtype=np.int32))


def weights_of(w, name):
    """A weight of heads, [n_head, n_rows, n], as images in scratch memory.

    name: of the memory. Returns the images of all heads, and their powers of two.
    """
    n_head, n_rows, n = w.shape
    made = (scratch(f"images of {name}", (2 * n_head * n_rows * n,), np.uint8), scratch(f"powers of {name}", (n_head,), np.float32))
    kind, data, row_bytes = w.type, w.data, w.row_bytes
    if kind not in WEIGHTS:
        floats, rows = scratch("images of floats", (n_head * n_rows, n), np.float32), _row_numbers(n_head * n_rows)
        for first in range(0, n_head * n_rows, MOST_ROWS):
            get_rows(floats[first:first + MOST_ROWS], w, rows[first:first + MOST_ROWS])
        kind, data, row_bytes = "F32", floats.flat.view(np.uint8), 4 * n
    WEIGHTS[kind](n_head, *made, data, row_bytes, n_rows, n // 32)
    return made
