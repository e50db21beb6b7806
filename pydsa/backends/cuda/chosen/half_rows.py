"""Rows of caches, queries and choices as attend_chosen.py takes them: float16, in the order of its shared memory.

Rows of a cache have one factor for all, a power of two that brings the greatest finite number to 2^14 or more, so that what the cache
holds, however large or small, is normal float16. A query has a factor of its own. Rows beyond the greatest that is chosen are not looked
at.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen.chosen_rows import VALUE, WIDTH
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits, block_max
from pydsa.backends.cuda.intrinsics.device import bits_float, device, float_bits
from pydsa.backends.cuda.intrinsics.instructions import load_eight, load_four, load_sixteen, pack_halves, store_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import folds, load_float, store_word
from pydsa.backends.cuda.runtime.array import scratch, upload
from pydsa.backends.cuda.runtime.current import kept_per_gpu
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, kernel
from pydsa.quants import CACHE_TYPES, INT8X2_MAX

THREADS = 256
HEADS = 64                              # of an image of queries
ROW_BYTES = 2 * WIDTH                   # of a row of float16
PIECES = ROW_BYTES // 16
IMAGE, PART = HEADS * ROW_BYTES, HEADS * 128        # bytes of an image, and of its 64 numbers of all heads
QUERY_WARPS = 4
HELD = 24                               # numbers of a query that a lane has
MOST = np.float32(1 << 14)              # what the greatest number of a query becomes
LAST, WHOLE, ROWS, FACTS = 0, 1, 2, 4   # facts of a token's choice
NOT_FINITE = np.int32(0x7F800000)
U, ZERO = np.uint32, np.float32(0)
greatest_of_warp, _ = folds(32)


@device
def of_both_groups(at, group, row, bits, bits_8, c):
    """The greater of what two groups of four warps know of rows `row` and + 8.

    bits, bits_8: |numbers| as bits, the same in the four lanes of a row, of which c == 0 tells. at: HEADS words in shared memory for each
    group. All threads of a block call it.
    """
    mine, theirs = at + U(4) * (U(HEADS) * group + row), at + U(4) * (U(HEADS) * (U(1) - group) + row)
    if c == U(0):
        store_word(mine, U(bits))
        store_word(mine + U(32), U(bits_8))
    cuda.syncthreads()
    return max(bits, np.int32(float_bits(load_float(theirs)))), max(bits_8, np.int32(float_bits(load_float(theirs + U(32)))))


@kernel("i4[:,::1], i4[:,:]", THREADS)
def look_at_choices(facts, indices):
    """What is to be known of each token's choice [n]. One token per block.

    LAST: how many of its places end with the last row; WHOLE: how many are before the first that has none; ROWS: the greatest row + 1.
    """
    t, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, indices.shape[1]
    maxima = cuda.shared.array(32, np.int32)
    last, missing, rows = np.int32(0), np.int32(n), np.int32(0)
    for i in range(thread, n, THREADS):
        row = indices[t, i]
        if row >= 0:
            last, rows = np.int32(i + 1), max(rows, np.int32(row + 1))
        else:
            missing = min(missing, np.int32(i))
    last = block_max(last, maxima, thread, THREADS)
    missing = -block_max(np.int32(-missing), maxima, thread, THREADS)
    rows = block_max(rows, maxima, thread, THREADS)
    if thread == 0:
        facts[t, LAST], facts[t, WHOLE], facts[t, ROWS] = last, missing, rows


@kernel("i4[:,::1], i8[:]", THREADS)
def look_at_positions(facts, positions):
    """The same of tokens that attend to all rows up to their positions."""
    t = cuda.grid(1)
    if t < positions.shape[0]:
        facts[t, LAST] = facts[t, WHOLE] = facts[t, ROWS] = np.int32(positions[t] + 1)


@device
def greater(greatest, bits):
    """The greater of the bits of two |numbers|.

    The second one counts only if it is finite; its sign does not.
    """
    bits = np.int32(bits & U(0x7FFFFFFF))
    return max(greatest, bits) if bits < NOT_FINITE else greatest


@device
def greatest_of_scaled(data, at, most):
    """The bits of the greatest number of a row of integers: its scales tell."""
    return greater(greater(np.int32(0), float_bits(bits_float(load_four(data, at)) * most)),
                   float_bits(bits_float(load_four(data, at + 4)) * most))


@device
def greatest_of_i16(data, at, piece):
    return greatest_of_scaled(data, at + 2 * WIDTH, np.float32(INT8X2_MAX))


@device
def greatest_of_i8(data, at, piece):
    return greatest_of_scaled(data, at + WIDTH, np.float32(127))


@device
def greatest_of_bf16(data, at, piece):
    a, b, c, d = load_sixteen(data, at + 16 * piece)
    greatest = greater(greater(np.int32(0), a), a << U(16))
    greatest = greater(greater(greatest, b), b << U(16))
    greatest = greater(greater(greatest, c), c << U(16))
    return greater(greater(greatest, d), d << U(16))


@device
def greatest_of_f32(data, at, piece):
    a, b, c, d = load_sixteen(data, at + 32 * piece)
    e, f, g, h = load_sixteen(data, at + 32 * piece + 16)
    greatest = greater(greater(greater(greater(np.int32(0), a), b), c), d)
    return greater(greater(greater(greater(greatest, e), f), g), h)


@device
def byte_of(word, i):
    """Byte i of a word, with its sign, as float32."""
    return np.float32(np.int32(np.int8(word >> U(8 * i))))


@device
def two_bytes_of(high, low, i):
    """256 times byte i of a word plus that of another, as float32."""
    return np.float32(256) * byte_of(high, i) + byte_of(low, i)


@device
def eight_of_i16(data, at, piece, factor):
    d = bits_float(load_four(data, at + 2 * WIDTH + (4 if 8 * piece >= VALUE else 0))) * factor
    high, more = load_eight(data, at + 8 * piece)
    low, least = load_eight(data, at + WIDTH + 8 * piece)
    return (d * two_bytes_of(high, low, 0), d * two_bytes_of(high, low, 1), d * two_bytes_of(high, low, 2), d * two_bytes_of(high, low, 3),
            d * two_bytes_of(more, least, 0), d * two_bytes_of(more, least, 1), d * two_bytes_of(more, least, 2),
            d * two_bytes_of(more, least, 3))


@device
def eight_of_i8(data, at, piece, factor):
    d = bits_float(load_four(data, at + WIDTH + (4 if 8 * piece >= VALUE else 0))) * factor
    q, more = load_eight(data, at + 8 * piece)
    return (d * byte_of(q, 0), d * byte_of(q, 1), d * byte_of(q, 2), d * byte_of(q, 3), d * byte_of(more, 0), d * byte_of(more, 1),
            d * byte_of(more, 2), d * byte_of(more, 3))


@device
def two_of_bf16(word, factor):
    return bits_float(word << U(16)) * factor, bits_float(word & U(0xFFFF0000)) * factor


@device
def eight_of_bf16(data, at, piece, factor):
    words = load_sixteen(data, at + 16 * piece)
    a, b = two_of_bf16(words[0], factor)
    c, d = two_of_bf16(words[1], factor)
    e, f = two_of_bf16(words[2], factor)
    g, h = two_of_bf16(words[3], factor)
    return a, b, c, d, e, f, g, h


@device
def eight_of_f32(data, at, piece, factor):
    a, b, c, d = load_sixteen(data, at + 32 * piece)
    e, f, g, h = load_sixteen(data, at + 32 * piece + 16)
    return (bits_float(a) * factor, bits_float(b) * factor, bits_float(c) * factor, bits_float(d) * factor,
            bits_float(e) * factor, bits_float(f) * factor, bits_float(g) * factor, bits_float(h) * factor)


def _make_measure(storage, greatest_of):
    pieces = 1 if CACHE_TYPES[storage].scaled else PIECES       # of a row, that are looked at apart

    def measure_rows(greatest, facts, data, row_bytes):
        """Set greatest[block] to the greatest |number| of a share of the rows.

        It is the bits of one that is finite. greatest[BLOCKS] = how many rows are chosen from.
        """
        thread, maxima, bits, most = cuda.threadIdx.x, cuda.shared.array(32, np.int32), np.int32(0), np.int32(0)
        for t in range(thread, facts.shape[0], THREADS):
            most = max(most, facts[t, ROWS])
        most = block_max(most, maxima, thread, THREADS)
        for i in range(np.int64(cuda.blockIdx.x) * THREADS + thread, np.int64(most) * pieces, np.int64(BLOCKS) * THREADS):
            row = i // pieces
            bits = max(bits, greatest_of(data, row * row_bytes, i - row * pieces))
        bits = block_max(bits, maxima, thread, THREADS)
        if thread == 0:
            greatest[cuda.blockIdx.x] = bits
            if cuda.blockIdx.x == 0:
                greatest[BLOCKS] = most
    return kernel("i4[::1], i4[:,::1], u1[::1], i8", THREADS, f"measure_rows_{storage}")(measure_rows)


def _make_halve(storage, eight_of):
    def halve_rows(out, inverse, greatest, data, row_bytes):
        """out = rows times a power of two as float16, inverse[0] = 1 over that.

        A thread makes eight numbers at a time. greatest [BLOCKS + 1]: see measure_rows.
        """
        thread, maxima, bits = cuda.threadIdx.x, cuda.shared.array(32, np.int32), np.int32(0)
        for i in range(thread, BLOCKS, THREADS):
            bits = max(bits, greatest[i])
        exponent = max(block_max(bits, maxima, thread, THREADS) >> 23, 15)
        factor = bits_float(U(268 - exponent) << U(23))
        if cuda.blockIdx.x == 0 and thread == 0:
            inverse[0] = bits_float(U(exponent - 14) << U(23))
        n = np.int64(greatest[BLOCKS]) * PIECES
        for i in range(np.int64(cuda.blockIdx.x) * THREADS + thread, n, np.int64(cuda.gridDim.x) * THREADS):
            row = i // PIECES
            a, b, c, d, e, f, g, h = eight_of(data, row * row_bytes, i - row * PIECES, factor)
            store_sixteen(out, 16 * i, pack_halves(b, a), pack_halves(d, c), pack_halves(f, e), pack_halves(h, g))
    return kernel("u1[::1], f4[::1], i4[::1], u1[::1], i8", THREADS, f"halve_rows_{storage}")(halve_rows)


# storage -> the kernels of rows that are not float16 yet
MEASURE = {storage: _make_measure(storage, f) for storage, f in (
    ("i16", greatest_of_i16), ("i8", greatest_of_i8), ("bf16", greatest_of_bf16), ("f32", greatest_of_f32))}
HALVE = {storage: _make_halve(storage, f) for storage, f in (
    ("i16", eight_of_i16), ("i8", eight_of_i8), ("bf16", eight_of_bf16), ("f32", eight_of_f32))}
assert {*HALVE, "f16"} == {*CACHE_TYPES}


@device
def load_piece(values, at, array, offset):
    """values [at:at + 8] = eight numbers of an array from a byte on."""
    a, b, c, d = load_sixteen(array, offset)
    e, f, g, h = load_sixteen(array, offset + 16)
    values[at], values[at + 1], values[at + 2], values[at + 3] = bits_float(a), bits_float(b), bits_float(c), bits_float(d)
    values[at + 4], values[at + 5], values[at + 6], values[at + 7] = bits_float(e), bits_float(f), bits_float(g), bits_float(h)


@device
def store_piece(images, at, row, piece, values, i, factor):
    """Store values [i:i + 8] times a factor as a piece of an image's row.

    Zeros are stored if the factor is 0.
    """
    words = cuda.local.array(4, np.uint32)
    for j in range(4):
        words[j] = pack_halves(values[i + 2 * j + 1] * factor, values[i + 2 * j] * factor) if factor > ZERO else U(0)
    store_sixteen(images, at + PART * (piece >> 3) + 16 * (piece & 7 ^ row & 7), words[0], words[1], words[2], words[3])


@kernel("u1[::1], f4[:,::1], f4[:,:,::1], f4[:,:,::1]", 32 * QUERY_WARPS)
def halve_queries(images, scales, first, second):
    """Queries as images of float16, and what each is to be multiplied by.

    One head per warp, in which a lane has a piece of each 32, and of the last eight. images [T, groups of HEADS, 9, HEADS, 64]: 16-byte
    piece i of 128 is at i ^ (head % 8). Heads past the last are zeros. A query with a number that is not finite becomes zeros, and its
    scale NaN.
    """
    lane, h, t = cuda.threadIdx.x & 31, np.int32(cuda.blockIdx.x * QUERY_WARPS + (cuda.threadIdx.x >> 5)), cuda.blockIdx.y
    n_head, n_groups, bits = first.shape[1], (first.shape[1] + HEADS - 1) // HEADS, np.int32(0)
    values = cuda.local.array(HELD, np.float32)
    for i in range(HELD):
        values[i] = ZERO
    if h < n_head:
        at = np.int64(t) * first.strides[0] + np.int64(h) * first.strides[1] + 32 * lane
        load_piece(values, 0, first, at)
        load_piece(values, 8, first, at + 32 * 32)
        if lane < PIECES - 64:
            load_piece(values, 16, second, np.int64(t) * second.strides[0] + np.int64(h) * second.strides[1] + 32 * lane)
    for i in range(HELD):
        bits = max(bits, abs_bits(values[i]))
    greatest = bits_float(U(greatest_of_warp(bits)))
    finite = greatest < np.float32(np.inf)
    factor = MOST / greatest if finite and greatest > np.float32(1e-30) else ZERO
    if lane == 0 and h < n_head:
        scales[t, h] = greatest / MOST if finite else np.float32(np.nan)
    row = h % HEADS
    at = (np.int64(t) * n_groups + h // HEADS) * IMAGE + 128 * row
    store_piece(images, at, row, lane, values, 0, factor)
    store_piece(images, at, row, lane + 32, values, 8, factor)
    if lane < PIECES - 64:
        store_piece(images, at, row, lane + 64, values, 16, factor)


def are_aligned(*arrays):
    """Whether all rows of arrays begin at multiples of 16 bytes.

    Then they are loaded so many at a time. The numbers of a row are contiguous.
    """
    return all(a.strides[-1] == 4 and not any(n % 16 for n in (a.span[0], *a.strides[:-1])) for a in arrays)


@kept_per_gpu()
def one():
    """The number 1 on the device."""
    return upload(np.ones(1, np.float32))


def facts_of(indices, positions=None):
    """What is to be known of each token's choice, int32 [T, FACTS].

    It is in scratch memory: see look_at_choices. positions: of tokens that attend to all rows up to there; then indices is not looked at.
    """
    n = len(indices if positions is None else positions)
    facts = scratch("facts of choices", (n, FACTS), np.int32)
    if positions is None:
        look_at_choices(n, facts, indices)
    else:
        look_at_positions(blocks_for(n, THREADS), facts, positions)
    return facts


def halved(latents, facts):
    """The rows of a cache that are chosen from, as float16.

    uint8 [n ROW_BYTES], and float32 [1] by which they are to be multiplied. Those of a cache of float16 are its own.
    """
    if latents.storage == "f16":
        return latents.data.flat, one()
    n = len(latents.data)
    rows, inverse = scratch("rows of halves", (n * ROW_BYTES,), np.uint8), scratch("unit of halves", (1,), np.float32)
    greatest = scratch("greatest of rows", (BLOCKS + 1,), np.int32)
    MEASURE[latents.storage](BLOCKS, greatest, facts, latents.data.flat, latents.data.shape[1])
    HALVE[latents.storage](min(8 * BLOCKS, blocks_for(n * PIECES, THREADS)), rows, inverse, greatest, latents.data.flat,
                           latents.data.shape[1])
    return rows, inverse


def halved_queries(first, second):
    """Queries as images, uint8, and their scales, float32 [T, H].

    first [T, H, VALUE] and second [T, H, ROTATED] are such as are_aligned() tells.
    """
    n_tokens, n_head, _ = first.shape
    n_groups = blocks_for(n_head, HEADS)
    images = scratch("packed heads", (n_tokens * n_groups * IMAGE // 4,), np.uint32).view(np.uint8)      # in place of another kernel's
    scales = scratch("scales of queries", (n_tokens, n_head), np.float32)
    halve_queries((n_groups * HEADS // QUERY_WARPS, n_tokens), images, scales, first, second)
    return images, scales
