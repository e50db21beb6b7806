"""Products of quantized weights with many rows of activations, in tensor cores.

Activations become float16 with a scale a row, weights stay whole: a byte is a float16 without loss. So only activations are rounded, and
a group of 32 weights meets them in two steps of mma.m16n8k16; its scales are multiplied with the float32 sums, offsets with sums of 16
activations. Tokens are the rows of the instruction, weights its columns. The numbers of a group come in four chunks, one for each lane that
shares a row: chunk i has the numbers 4 i to 4 i + 3 of both halves. In shared memory tokens lie in the order of the instruction's lanes;
which of a weight row's places a chunk takes differs from row to row, so that lanes meet in no bank.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.block_sums import block_max
from pydsa.backends.cuda.device import (MMA_WARP, SIMULATED, device, fma, four_of, halves_of_bytes, mma_f16, of_half, put_words,
                                        sum_of_four, to_half, two_at)
from pydsa.backends.cuda.launch import kernel

ROW_WARPS, TOKEN_WARPS = (1, 2) if SIMULATED else (4, 2)          # one warp for each group of a stage, or more
TOKEN_TILES = 1 if SIMULATED else 4         # of a warp, sixteen tokens each, which meet four tiles of eight rows
WARPS = ROW_WARPS * TOKEN_WARPS
THREADS = MMA_WARP * WARPS
ROWS, TOKENS = 32 * ROW_WARPS, 16 * TOKEN_TILES * TOKEN_WARPS        # of a block
STAGE = 2                                   # groups of 32 that are in shared memory at a time
GROUP = 16                                  # words of a group
ROW_PLANE, TOKEN_PLANE = ROWS * GROUP, TOKENS * GROUP       # words of a stage's first group
ROW_WORDS, TOKEN_WORDS = STAGE * ROW_PLANE, STAGE * TOKEN_PLANE
FACTORS, X_SUMS = STAGE * ROWS, STAGE * TOKENS              # of one kind
GROUPS_AT_ONCE = THREADS // ROWS            # that a block unpacks of each row
TILES_AT_ONCE = WARPS // STAGE              # of tokens, of which a warp copies one group
COPIES = -(-TOKENS // (16 * TILES_AT_ONCE))
SUMS = 16 * TOKEN_TILES                     # of a lane
LARGEST = 16384                             # of a row's float16
ROUNDING = 8 if SIMULATED else 256          # threads that round a row
ZERO = np.float32(0)
NOTHING = (ZERO, ZERO)


class Halves(NamedTuple):
    """Rows of activations as float16 in chunks: words [N, n/2], float32 scales [N], sums [N, n/16] of the float16."""
    words: object
    scales: object
    sums: object


@kernel("u4[:,:], f4[:], f4[:,:], f4[:,:]", ROUNDING)
def halve_rows(words, scales, sums, x):
    """A block rounds a row, a thread four numbers at a time. What is not finite becomes a scale that is NaN."""
    t, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    parts = cuda.shared.array(32, np.float32)
    top, bad = ZERO, ZERO
    for i in range(thread, n, ROUNDING):
        magnitude = abs(x[t, i])
        top = max(top, magnitude)
        if not magnitude < np.float32(np.inf):
            bad = np.float32(1)
    top, bad = block_max(top, parts, thread, ROUNDING), block_max(bad, parts, thread, ROUNDING)
    factor = np.float32(LARGEST) / top if bad == ZERO and top > np.float32(1e-30) else ZERO
    if thread == 0:
        scales[t] = top / np.float32(LARGEST) if bad == ZERO else np.float32(np.nan)
    for first in range(0, n // 4, ROUNDING):
        four = first + thread
        i = 4 * min(four, n // 4 - 1)
        a, b, c, e = to_half(x[t, i] * factor), to_half(x[t, i + 1] * factor), to_half(x[t, i + 2] * factor), to_half(x[t, i + 3] * factor)
        if factor == ZERO:      # infinity times zero is not zero
            a = b = c = e = 0
        total = sum_of_four((of_half(a) + of_half(b)) + (of_half(c) + of_half(e)))
        if four < n // 4:
            at = four // 8 * GROUP + four % 4 * 4 + four // 4 % 2 * 2
            words[t, at], words[t, at + 1] = a | b << 16, c | e << 16
            if four % 4 == 0:
                sums[t, four // 4] = total


def halved(x):
    """Activations, rows of any strides, as Halves in scratch memory."""
    n_rows, n = x.shape
    made = Halves(scratch("x halves", (n_rows, n // 2), np.uint32), scratch("x row scales", (n_rows,), np.float32),
                  scratch("x half sums", (n_rows, n // 16), np.float32))
    halve_rows(n_rows, *made, x)
    return made


@device
def place(row, chunk):
    """Where a chunk of a row begins in a plane of shared memory."""
    return row * GROUP + 4 * (chunk ^ row >> 1 & 3)


@device
def put_chunk(row_words, at, before, behind):
    """Four bytes of each half of a group."""
    w0, w1 = halves_of_bytes(np.uint32(before))
    w2, w3 = halves_of_bytes(np.uint32(behind))
    put_words(row_words, at, w0, w1, w2, w3)


def _make_many(name):
    group, halves, offsets = GROUPED[name].group, GROUPED[name].halves, GROUPED[name].offsets
    kinds = 2 if halves else 1
    n_factors, n_sums = 2 * kinds * FACTORS, 2 * X_SUMS if offsets else 2

    @device
    def scales_of(factors, at):
        """Of two rows: the scales of both halves (of the group, and nothing)."""
        return two_at(factors, at), two_at(factors, FACTORS + at) if halves else NOTHING

    @device
    def add_tile(acc, at, first, second, x, of_rows, factors, of, y, y1):
        """acc += a tile of sixteen tokens and eight rows of weights, whose words these are; y, y1: sums of the tokens g and g + 8."""
        a0, a1, a2, a3 = first
        e0, e1, e2, e3 = second
        b0, b1, b2, b3 = x
        (d, f), (d1, f1) = of_rows
        p0, p1, p2, p3 = mma_f16(a0, a1, a2, a3, b0, b1, ZERO, ZERO, ZERO, ZERO)
        if halves:
            q0, q1, q2, q3 = mma_f16(e0, e1, e2, e3, b2, b3, ZERO, ZERO, ZERO, ZERO)
            acc[at] = fma(d1, q0, fma(d, p0, acc[at]))
            acc[at + 1] = fma(f1, q1, fma(f, p1, acc[at + 1]))
            acc[at + 2] = fma(d1, q2, fma(d, p2, acc[at + 2]))
            acc[at + 3] = fma(f1, q3, fma(f, p3, acc[at + 3]))
        else:
            p0, p1, p2, p3 = mma_f16(e0, e1, e2, e3, b2, b3, p0, p1, p2, p3)
            acc[at] = fma(d, p0, acc[at])
            acc[at + 1] = fma(f, p1, acc[at + 1])
            acc[at + 2] = fma(d, p2, acc[at + 2])
            acc[at + 3] = fma(f, p3, acc[at + 3])
        if offsets:
            m, o = two_at(factors, kinds * FACTORS + of)
            acc[at] = fma(m, y[0], acc[at])
            acc[at + 1] = fma(o, y[0], acc[at + 1])
            acc[at + 2] = fma(m, y1[0], acc[at + 2])
            acc[at + 3] = fma(o, y1[0], acc[at + 3])
        if offsets and halves:
            m1, o1 = two_at(factors, 3 * FACTORS + of)
            acc[at] = fma(m1, y[1], acc[at])
            acc[at + 1] = fma(o1, y[1], acc[at + 1])
            acc[at + 2] = fma(m1, y1[1], acc[at + 2])
            acc[at + 3] = fma(o1, y1[1], acc[at + 3])

    def many(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, words, scales, sums, n_groups):
        """out[i] = a matrix times the i // x_div-th row of activations, for i = order[first], ... order[end - 1] of each tile.

        A block multiplies ROWS rows with at most TOKENS tokens, STAGE groups of 32 at a time. A warp has 32 rows and of the tiles of
        sixteen tokens every second one.
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
        x_at = cuda.shared.array(TOKENS, np.int32)                  # chunks before each token's row of activations
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
            x_at[t], x_scales[t] = row * n_groups * 4, scales[row]
        staged, stage_of = thread % ROWS, thread // ROWS            # the row, and the first group of a stage, that this thread unpacks
        row_at = (chosen * np.int64(n_out) + min(cuda.blockIdx.x * ROWS + staged, n_out - 1)) * row_bytes
        copied, tile_of = warp % STAGE, warp // STAGE               # the group of a stage, and the first tile, that this warp copies
        summed, sums_of = thread % TOKENS, thread // TOKENS         # the token, and its group, whose sums this thread copies
        last_tile = n_tokens + 15 >> 4
        cuda.syncthreads()
        for start in range(np.int32(0), np.int32(n_groups), np.int32(STAGE)):
            for i in range(STAGE // GROUPS_AT_ONCE):
                s = stage_of + i * GROUPS_AT_ONCE
                w0, w1, w2, w3, w4, w5, w6, w7, d, d1, m, m1 = group(w, row_at, min(start + s, n_groups - 1))
                put_chunk(row_words, s * ROW_PLANE + place(staged, 0), w0, w4)
                put_chunk(row_words, s * ROW_PLANE + place(staged, 1), w1, w5)
                put_chunk(row_words, s * ROW_PLANE + place(staged, 2), w2, w6)
                put_chunk(row_words, s * ROW_PLANE + place(staged, 3), w3, w7)
                factors[s * ROWS + staged] = d
                if halves:
                    factors[FACTORS + s * ROWS + staged] = d1
                if offsets:
                    factors[kinds * FACTORS + s * ROWS + staged] = -m
                if offsets and halves:
                    factors[3 * FACTORS + s * ROWS + staged] = -m1
            source = min(start + copied, n_groups - 1) * 4 + c
            for i in range(COPIES):
                tile = tile_of + i * TILES_AT_ONCE
                if tile < last_tile:
                    a0, a1, a2, a3 = four_of(words, 4 * (np.int64(x_at[16 * tile + g]) + source))
                    b0, b1, b2, b3 = four_of(words, 4 * (np.int64(x_at[16 * tile + g + 8]) + source))
                    at = copied * TOKEN_PLANE + tile * 256 + 4 * lane
                    put_words(token_words, at, a0, b0, a1, b1)
                    put_words(token_words, at + 128, a2, b2, a3, b3)
            if offsets and summed >> 4 < last_tile:
                i = (x_at[summed] >> 1) + 2 * min(start + sums_of, n_groups - 1)
                y, y1 = sums[i], sums[i + 1]
                x_sums[2 * thread], x_sums[2 * thread + 1] = y if halves else y + y1, y1
            cuda.syncthreads()
            for s in range(STAGE):
                if start + s < n_groups:
                    at, of = s * ROW_PLANE, s * ROWS + left + 2 * c
                    b0, b1 = four_of(row_words, at + place(left + g, c)), four_of(row_words, at + place(left + 8 + g, c))
                    b2, b3 = four_of(row_words, at + place(left + 16 + g, c)), four_of(row_words, at + place(left + 24 + g, c))
                    d, d1, d2, d3 = (scales_of(factors, of), scales_of(factors, of + 8), scales_of(factors, of + 16),
                                     scales_of(factors, of + 24))
                    for tile in range(TOKEN_TILES):
                        t = 16 * TOKEN_WARPS * tile + beside
                        if t < n_tokens:
                            at = s * TOKEN_PLANE + t * GROUP + 4 * lane
                            x, x1 = four_of(token_words, at), four_of(token_words, at + 128)
                            at = 2 * (s * TOKENS + t + g)
                            y, y1 = (two_at(x_sums, at), two_at(x_sums, at + 16)) if offsets else (NOTHING, NOTHING)
                            add_tile(acc, 16 * tile, x, x1, b0, d, factors, of, y, y1)
                            add_tile(acc, 16 * tile + 4, x, x1, b1, d1, factors, of + 8, y, y1)
                            add_tile(acc, 16 * tile + 8, x, x1, b2, d2, factors, of + 16, y, y1)
                            add_tile(acc, 16 * tile + 12, x, x1, b3, d3, factors, of + 24, y, y1)
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
    return kernel(signature, THREADS, f"many_{name.lower()}", blocks=2)(many)


MANY = {name: _make_many(name) for name in GROUPED}
