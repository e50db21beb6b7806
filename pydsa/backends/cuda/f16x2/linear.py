"""Products of all weights but float32 ones with many rows of activations, in tensor cores.

Activations become two float16 each, with a scale a row, which together have 22 bits; weights lose nothing: bytes are float16, and so are
bfloat16 but for their exponents. A group of 32 weights meets them in four steps of mma.m16n8k16; its scales are multiplied with the float32
sums, offsets with sums of 16 activations. Tokens are the rows of the instruction, weights its columns. The numbers of a group come in four
chunks, one for each lane that shares a row: chunk i has the numbers 4 i to 4 i + 3 of both halves. In shared memory tokens lie in the order
of the instruction's lanes; which of a weight row's places a chunk takes differs from row to row, so that lanes meet in no bank.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.block_sums import abs_bits, block_max
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.blocks.floats import two_bf16
from pydsa.backends.cuda.device import (MMA_WARP, SIMULATED, bits_float, device, fma, four_u32_at, halves_of_bytes, load_four_u32,
                                        load_two_f32, mma_f16, of_half, store_four_u32, sum_of_four, to_half)
from pydsa.backends.cuda.launch import blocks_for, kernel


ROW_WARPS, TOKEN_WARPS = (1, 2) if SIMULATED else (4, 2)
TOKEN_TILES = 1 if SIMULATED else 4         # of a warp, sixteen tokens each, which meet four tiles of eight rows
WARPS = ROW_WARPS * TOKEN_WARPS
THREADS = MMA_WARP * WARPS
ROWS, TOKENS = 32 * ROW_WARPS, 16 * TOKEN_TILES * TOKEN_WARPS        # of a block; half of its threads unpack a row each
COPY_WARPS = (THREADS - ROWS) // MMA_WARP   # the others copy tokens, a tile of sixteen each warp at a time
COPIES = TOKENS // (16 * COPY_WARPS)
GROUP = 16                                  # words of a group
ROW_WORDS, PLANE = ROWS * GROUP, TOKENS * GROUP     # of a stage: rows; the upper halves of tokens, which the lower ones follow
TOKEN_WORDS = 2 * PLANE
SUMS = 16 * TOKEN_TILES                     # of a lane
F16_MAX = 16384                             # of a row's float16
SPLITTING = 8 if SIMULATED else 256          # threads that round a row
ZERO, ONE = np.float32(0), np.float32(1)
NO_PAIR = (ZERO, ZERO)


class F16x2(NamedTuple):
    """Rows of activations in chunks: words [N, n] of float16, of each group first the upper ones, then what these leave; float32 scales
    [N], sums of 16 numbers in units of the scale [N, n/16].
    """
    packed: object
    scales: object
    sums: object


@device
def split_f16x2(x):
    """float32 as the bits of the nearest float16 and of what is left."""
    upper = to_half(x)
    return upper, to_half(x - of_half(upper))


@kernel("u4[:,:], f4[:], f4[:,:], f4[:,:]", SPLITTING)
def split_rows(packed, scales, sums, x):
    """A block rounds a row, a thread four numbers at a time. What is not finite becomes a scale that is NaN."""
    t, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    tops, bits = cuda.shared.array(32, np.int32), np.int32(0)
    for i in range(thread, n, SPLITTING):
        bits = max(bits, abs_bits(x[t, i]))
    top = bits_float(np.uint32(block_max(bits, tops, thread, SPLITTING)))
    known = top < np.float32(np.inf)
    factor = np.float32(F16_MAX) / top if known and top > np.float32(1e-30) else ZERO
    if thread == 0:
        scales[t] = top / np.float32(F16_MAX) if known else np.float32(np.nan)
    for first in range(0, n // 4, SPLITTING):
        four = first + thread
        there = four < n // 4 and factor > ZERO         # infinity times zero is not zero
        i = 4 * four
        v0, v1, v2, v3 = (x[t, i] * factor, x[t, i + 1] * factor, x[t, i + 2] * factor, x[t, i + 3] * factor) if there else (
            ZERO, ZERO, ZERO, ZERO)
        total = sum_of_four((v0 + v1) + (v2 + v3))
        if four < n // 4:
            a, a1 = split_f16x2(v0)
            b, b1 = split_f16x2(v1)
            c, c1 = split_f16x2(v2)
            e, e1 = split_f16x2(v3)
            at = (four >> 3) * 2 * GROUP + (four & 3) * 4 + (four >> 2 & 1) * 2
            packed[t, at], packed[t, at + 1], packed[t, at + GROUP], packed[t, at + GROUP + 1] = (
                a | b << 16, c | e << 16, a1 | b1 << 16, c1 | e1 << 16)
            if four & 3 == 0:
                sums[t, four >> 2] = total


def pack(x):
    """Activations, rows of any strides, as F16x2 in scratch memory."""
    n_rows, n = x.shape
    made = F16x2(scratch("x halves", (n_rows, n), np.uint32), scratch("x row scales", (n_rows,), np.float32),
                 scratch("x half sums", (n_rows, n // 16), np.float32))
    split_rows(n_rows, *made, x)
    return made


@device
def place(row, quad):
    """Where a chunk of a row begins in a plane of shared memory."""
    return row * GROUP + 4 * (quad ^ row >> 1 & 3)


@device
def store_quad(row_words, at, before, behind):
    """Four bytes of each half of a group."""
    w0, w1 = halves_of_bytes(np.uint32(before))
    w2, w3 = halves_of_bytes(np.uint32(behind))
    store_four_u32(row_words, at, w0, w1, w2, w3)


def _of_bytes(group):
    @device
    def unpack(row_words, row, data, at, k):
        """Group k of a row that begins `at` bytes into the data, as chunks -> two scales, two offsets."""
        w0, w1, w2, w3, w4, w5, w6, w7, d, d1, m, m1 = group(data, at, k)
        store_quad(row_words, place(row, 0), w0, w4)
        store_quad(row_words, place(row, 1), w1, w5)
        store_quad(row_words, place(row, 2), w2, w6)
        store_quad(row_words, place(row, 3), w3, w7)
        return d, d1, m, m1
    return unpack


@device
def unpack_f16(row_words, row, data, at, k):
    """The same of float16, as they are."""
    for i in range(2):
        a, b, c, d = four_u32_at(data, at + 64 * k + 16 * i)
        e, f, g, h = four_u32_at(data, at + 64 * k + 32 + 16 * i)
        store_four_u32(row_words, place(row, 2 * i), a, b, e, f)
        store_four_u32(row_words, place(row, 2 * i + 1), c, d, g, h)
    return ONE, ONE, ZERO, ZERO


@device
def two_as_halves(word, factor):
    """Two bfloat16, times a power of two, as float16."""
    a, b = two_bf16(word)
    return np.uint32(to_half(a * factor) | to_half(b * factor) << 16)


@device
def unpack_bf16(row_words, row, data, at, k):
    """The same of bfloat16: times a power of two they are float16, but for what is less than 2^-29 of the group's greatest."""
    top = 0
    for i in range(4):
        a, b, c, d = four_u32_at(data, at + 64 * k + 16 * i)
        top = max(top, a & 0x7F80, b & 0x7F80, c & 0x7F80, d & 0x7F80)
        top = max(top, a >> 16 & 0x7F80, b >> 16 & 0x7F80, c >> 16 & 0x7F80, d >> 16 & 0x7F80)
    exponent = min(max(top >> 7, 16), 254)          # of the greatest, which becomes 2^14
    factor, scale = bits_float(np.uint32(268 - exponent << 23)), bits_float(np.uint32(exponent - 14 << 23))
    for i in range(2):
        a, b, c, d = four_u32_at(data, at + 64 * k + 16 * i)
        e, f, g, h = four_u32_at(data, at + 64 * k + 32 + 16 * i)
        store_four_u32(row_words, place(row, 2 * i), two_as_halves(a, factor), two_as_halves(b, factor), two_as_halves(e, factor),
                       two_as_halves(f, factor))
        store_four_u32(row_words, place(row, 2 * i + 1), two_as_halves(c, factor), two_as_halves(d, factor), two_as_halves(g, factor),
                       two_as_halves(h, factor))
    return scale, scale, ZERO, ZERO


def _make_gemm(name, unpack, halves=False, offsets=False):
    kinds = 2 if halves else 1
    n_factors, n_sums = 2 * kinds * ROWS, 2 * TOKENS if offsets else 2

    @device
    def scales_of(factors, at):
        """Of two rows: the scales of both halves (of the group, and nothing)."""
        return load_two_f32(factors, at), load_two_f32(factors, ROWS + at) if halves else NO_PAIR

    @device
    def add_tile(acc, at, upper, upper_1, lower, lower_1, x, of_rows, factors, of, y, y1):
        """acc += a tile of sixteen tokens, whose words and sums (y, y1) these are, and eight rows of weights, whose words are x."""
        a0, a1, a2, a3 = lower
        b0, b1, b2, b3 = x
        p0, p1, p2, p3 = mma_f16(a0, a1, a2, a3, b0, b1, ZERO, ZERO, ZERO, ZERO)
        a0, a1, a2, a3 = upper
        p0, p1, p2, p3 = mma_f16(a0, a1, a2, a3, b0, b1, p0, p1, p2, p3)
        (d, f), (d1, f1) = of_rows
        if halves:
            acc[at] = fma(d, p0, acc[at])
            acc[at + 1] = fma(f, p1, acc[at + 1])
            acc[at + 2] = fma(d, p2, acc[at + 2])
            acc[at + 3] = fma(f, p3, acc[at + 3])
            p0, p1, p2, p3 = ZERO, ZERO, ZERO, ZERO
            d, f = d1, f1
        a0, a1, a2, a3 = lower_1
        p0, p1, p2, p3 = mma_f16(a0, a1, a2, a3, b2, b3, p0, p1, p2, p3)
        a0, a1, a2, a3 = upper_1
        p0, p1, p2, p3 = mma_f16(a0, a1, a2, a3, b2, b3, p0, p1, p2, p3)
        acc[at] = fma(d, p0, acc[at])
        acc[at + 1] = fma(f, p1, acc[at + 1])
        acc[at + 2] = fma(d, p2, acc[at + 2])
        acc[at + 3] = fma(f, p3, acc[at + 3])
        if offsets:
            m, o = load_two_f32(factors, kinds * ROWS + of)
            acc[at] = fma(m, y[0], acc[at])
            acc[at + 1] = fma(o, y[0], acc[at + 1])
            acc[at + 2] = fma(m, y1[0], acc[at + 2])
            acc[at + 3] = fma(o, y1[0], acc[at + 3])
        if offsets and halves:
            m1, o1 = load_two_f32(factors, 3 * ROWS + of)
            acc[at] = fma(m1, y[1], acc[at])
            acc[at + 1] = fma(o1, y[1], acc[at + 1])
            acc[at + 2] = fma(m1, y1[1], acc[at + 2])
            acc[at + 3] = fma(o1, y1[1], acc[at + 3])

    def many(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, packed, scales, sums, n_groups):
        """out[i] = a matrix times the i // x_div-th row of activations, for i = order[first], ... order[end - 1] of each tile.

        A block multiplies ROWS rows with at most TOKENS tokens, a group of 32 at a time. A warp has 32 rows and of the tiles of sixteen
        tokens every second one.
        """
        thread = cuda.threadIdx.x & THREADS - 1
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        row_words = cuda.shared.array(ROW_WORDS, np.uint32, 16)
        token_words = cuda.shared.array(TOKEN_WORDS, np.uint32, 16)
        factors = cuda.shared.array(n_factors, np.float32, 16)      # scales of groups, or of their halves; then offsets, negated
        x_sums = cuda.shared.array(n_sums, np.float32, 16)          # of both halves of groups
        x_at = cuda.shared.array(TOKENS, np.int32)                  # groups before each token's row of activations
        x_scales = cuda.shared.array(TOKENS, np.float32)
        acc = cuda.local.array(SUMS, np.float32)
        for i in range(SUMS):
            acc[i] = ZERO
        n_out, n_tokens = out.shape[1], end - first
        lane, c, warp = thread & 31, thread & 3, thread >> 5
        g = lane >> 2
        left, beside = warp // TOKEN_WARPS * 32, 16 * (warp % TOKEN_WARPS)
        for t in range(thread, TOKENS, THREADS):
            row = order[first + min(t, n_tokens - 1)] // x_div
            x_at[t], x_scales[t] = row * n_groups, scales[row]
        unpacks, copier = thread < ROWS, thread & ROWS - 1         # as many threads copy tokens as unpack rows
        row_at = (chosen * np.int64(n_out) + min(cuda.blockIdx.x * ROWS + min(thread, ROWS - 1), n_out - 1)) * row_bytes
        cuda.syncthreads()
        for k in range(np.int32(0), np.int32(n_groups), np.int32(1)):
            if unpacks:
                d, d1, m, m1 = unpack(row_words, thread, w, row_at, k)
                factors[thread] = d
                if halves:
                    factors[ROWS + thread] = d1
                if offsets:
                    factors[kinds * ROWS + thread] = -m
                if offsets and halves:
                    factors[3 * ROWS + thread] = -m1
            else:
                for i in range(COPIES):
                    tile = (copier >> 5) + i * COPY_WARPS
                    if 16 * tile < n_tokens:
                        from_a = (np.int64(x_at[16 * tile + g]) + k) * 2 * GROUP + 4 * c
                        from_b = (np.int64(x_at[16 * tile + g + 8]) + k) * 2 * GROUP + 4 * c
                        for plane in range(2):
                            a0, a1, a2, a3 = load_four_u32(packed, from_a + plane * GROUP)
                            b0, b1, b2, b3 = load_four_u32(packed, from_b + plane * GROUP)
                            at = plane * PLANE + tile * 256 + 4 * lane
                            store_four_u32(token_words, at, a0, b0, a1, b1)
                            store_four_u32(token_words, at + 128, a2, b2, a3, b3)
                if offsets and copier & ~15 < n_tokens:
                    i = 2 * (np.int64(x_at[copier]) + k)
                    y, y1 = sums[i], sums[i + 1]
                    x_sums[2 * copier], x_sums[2 * copier + 1] = y if halves else y + y1, y1
            cuda.syncthreads()
            of = left + 2 * c
            b0, b1 = load_four_u32(row_words, place(left + g, c)), load_four_u32(row_words, place(left + 8 + g, c))
            b2, b3 = load_four_u32(row_words, place(left + 16 + g, c)), load_four_u32(row_words, place(left + 24 + g, c))
            d0, d1, d2, d3 = scales_of(factors, of), scales_of(factors, of + 8), scales_of(factors, of + 16), scales_of(factors, of + 24)
            for tile in range(TOKEN_TILES):
                t = 16 * TOKEN_WARPS * tile + beside
                if t < n_tokens:
                    at, y_at = t * GROUP + 4 * lane, 2 * (t + g)
                    x, x1 = load_four_u32(token_words, at), load_four_u32(token_words, at + 128)
                    z, z1 = load_four_u32(token_words, PLANE + at), load_four_u32(token_words, PLANE + at + 128)
                    y, y1 = (load_two_f32(x_sums, y_at), load_two_f32(x_sums, y_at + 16)) if offsets else (NO_PAIR, NO_PAIR)
                    add_tile(acc, 16 * tile, x, x1, z, z1, b0, d0, factors, of, y, y1)
                    add_tile(acc, 16 * tile + 4, x, x1, z, z1, b1, d1, factors, of + 8, y, y1)
                    add_tile(acc, 16 * tile + 8, x, x1, z, z1, b2, d2, factors, of + 16, y, y1)
                    add_tile(acc, 16 * tile + 12, x, x1, z, z1, b3, d3, factors, of + 24, y, y1)
            cuda.syncthreads()
        for tile in range(TOKEN_TILES):
            for i in range(2):
                t = 16 * TOKEN_WARPS * tile + beside + g + 8 * i
                if t < n_tokens:
                    target, x_scale = order[first + t], x_scales[t]
                    for j in range(8):
                        row = cuda.blockIdx.x * ROWS + left + 8 * (j // 2) + 2 * c + j % 2
                        if row < n_out:
                            out[target, row] = acc[16 * tile + 4 * (j // 2) + 2 * i + j % 2] * x_scale
    signature = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u4[::1], f4[:], f4[::1], i4"
    return kernel(signature, THREADS, f"gemm_{name.lower()}", blocks=2)(many)


GEMM = {name: _make_gemm(name, _of_bytes(entry.group), entry.halves, entry.offsets) for name, entry in GROUPED.items()}
GEMM |= {"F16": _make_gemm("F16", unpack_f16), "BF16": _make_gemm("BF16", unpack_bf16)}


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of F16x2, for all tiles."""
    GEMM[w.type]((blocks_for(out.shape[1], ROWS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x.packed.flat, x.scales,
                 x.sums.flat, x.sums.shape[1] // 2)
