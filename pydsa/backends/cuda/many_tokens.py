"""Products of quantized weights with many rows of activations, in tensor cores.

Activations become float16 with a scale a row, weights stay whole: a byte is a float16 without loss. So only activations are rounded, and
a group of 32 weights meets them in two steps of mma.m16n8k16; its scales are multiplied with the float32 sums, offsets with sums of 16
activations. In shared memory the numbers of a group lie in four chunks, one for each lane that shares a row: chunk i has the numbers
4 i to 4 i + 3 of both halves. Which of its row's places a chunk takes differs from row to row, so that lanes meet in no bank.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.device import (MMA_WARP, SIMULATED, block_max, device, four_at, four_of, halves_of_bytes, mma_f16, of_half,
                                        put_four, put_words, sum_of_four, to_half)
from pydsa.backends.cuda.launch import kernel

ROW_WARPS, TOKEN_WARPS = (1, 1) if SIMULATED else (4, 2)
ROW_TILES, TOKEN_TILES = (2, 1) if SIMULATED else (2, 8)        # of a warp, sixteen rows and eight tokens
WARPS = ROW_WARPS * TOKEN_WARPS
THREADS = MMA_WARP * WARPS
ROWS, TOKENS = 16 * ROW_TILES * ROW_WARPS, 8 * TOKEN_TILES * TOKEN_WARPS        # of a block
STAGE = 2                                   # groups of 32 that are in shared memory at a time
GROUP = 16                                  # words of a group
ROW_PLANE = ROWS * GROUP                    # words of a stage's first group of all rows
TOKEN_PLANE = TOKENS * GROUP + GROUP        # planes of tokens begin in different banks, as they are written at the same time
ROW_WORDS, TOKEN_WORDS, FACTORS, X_SUMS = STAGE * ROW_PLANE, STAGE * TOKEN_PLANE, 4 * STAGE * ROWS, 2 * STAGE * TOKENS
SUMS = 4 * ROW_TILES * TOKEN_TILES          # of a lane
GROUPS_AT_ONCE = max(1, THREADS // ROWS)    # that a block unpacks of each row
CHUNK_BITS = (4 * STAGE).bit_length() - 1   # of a token in a stage
COPIED = THREADS >> CHUNK_BITS              # tokens that a block copies at a time
COPIES = -(-TOKENS // COPIED)
LARGEST = 16384                             # of a row's float16
ROUNDING = 8 if SIMULATED else 256          # threads that round a row
ZERO = np.float32(0)
NO_SUMS = (ZERO, ZERO, ZERO, ZERO)


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

    @device
    def add_tile(acc, at, upper, lower, x, x_sums, of_upper, of_lower):
        """acc += a tile of sixteen rows, whose chunks and factors these are, and eight tokens."""
        a0, a1, a2, a3 = upper
        b0, b1, b2, b3 = lower
        x0, x1, x2, x3 = x
        y0, y1, z0, z1 = x_sums
        d, d1, m, m1 = of_upper
        f, f1, o, o1 = of_lower
        p0, p1, p2, p3 = mma_f16(a0, b0, a1, b1, x0, x1, ZERO, ZERO, ZERO, ZERO)
        if halves:
            q0, q1, q2, q3 = mma_f16(a2, b2, a3, b3, x2, x3, ZERO, ZERO, ZERO, ZERO)
            acc[at] += d * p0 + d1 * q0
            acc[at + 1] += d * p1 + d1 * q1
            acc[at + 2] += f * p2 + f1 * q2
            acc[at + 3] += f * p3 + f1 * q3
        else:
            p0, p1, p2, p3 = mma_f16(a2, b2, a3, b3, x2, x3, p0, p1, p2, p3)
            acc[at] += d * p0
            acc[at + 1] += d * p1
            acc[at + 2] += f * p2
            acc[at + 3] += f * p3
        if offsets:
            if halves:
                acc[at] -= m * y0 + m1 * y1
                acc[at + 1] -= m * z0 + m1 * z1
                acc[at + 2] -= o * y0 + o1 * y1
                acc[at + 3] -= o * z0 + o1 * z1
            else:
                acc[at] -= m * (y0 + y1)
                acc[at + 1] -= m * (z0 + z1)
                acc[at + 2] -= o * (y0 + y1)
                acc[at + 3] -= o * (z0 + z1)

    def many(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, words, scales, sums):
        """out[i] = a matrix times the i // x_div-th row of activations, for i = order[first], ... order[end - 1] of each tile.

        A block multiplies ROWS rows with at most TOKENS tokens, STAGE groups of 32 at a time. A warp has 32 rows and of the tiles of eight
        tokens every second one.
        """
        thread = cuda.threadIdx.x & THREADS - 1
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        row_words = cuda.shared.array(ROW_WORDS, np.uint32, 16)
        token_words = cuda.shared.array(TOKEN_WORDS, np.uint32, 16)
        factors = cuda.shared.array(FACTORS, np.float32, 16)        # a group's two scales, then its two offsets
        x_sums = cuda.shared.array(X_SUMS, np.float32, 16)
        row_of = cuda.shared.array(TOKENS, np.int64)                # of activations, for each token
        acc = cuda.local.array(SUMS, np.float32)
        for i in range(SUMS):
            acc[i] = ZERO
        n_out, n_groups, n_tokens = out.shape[1], sums.shape[1] >> 1, end - first
        g, c, warp = (thread & 31) >> 2, thread & 3, thread >> 5
        upper, beside = warp // TOKEN_WARPS * 16 * ROW_TILES + g, 8 * (warp % TOKEN_WARPS)
        for t in range(thread, TOKENS, THREADS):
            row_of[t] = np.int64(order[first + min(t, n_tokens - 1)] // x_div)
        staged, stage_of = thread % ROWS, thread // ROWS            # the row, and the first group of a stage, that this thread unpacks
        row_at = (chosen * np.int64(n_out) + min(cuda.blockIdx.x * ROWS + staged, n_out - 1)) * row_bytes
        cuda.syncthreads()
        for start in range(0, n_groups, STAGE):
            for s in range(stage_of, STAGE, GROUPS_AT_ONCE):
                w0, w1, w2, w3, w4, w5, w6, w7, d, d1, m, m1 = group(w, row_at, min(start + s, n_groups - 1))
                put_chunk(row_words, s * ROW_PLANE + place(staged, 0), w0, w4)
                put_chunk(row_words, s * ROW_PLANE + place(staged, 1), w1, w5)
                put_chunk(row_words, s * ROW_PLANE + place(staged, 2), w2, w6)
                put_chunk(row_words, s * ROW_PLANE + place(staged, 3), w3, w7)
                put_four(factors, 4 * (s * ROWS + staged), d, d1, m, m1)
            for i in range(COPIES):
                t, s, chunk = (thread >> CHUNK_BITS) + i * COPIED, thread >> 2 & STAGE - 1, thread & 3
                if t & ~7 < n_tokens:
                    w0, w1, w2, w3 = four_of(words, (row_of[t] * n_groups + min(start + s, n_groups - 1)) * GROUP + 4 * chunk)
                    put_words(token_words, s * TOKEN_PLANE + place(t, chunk), w0, w1, w2, w3)
            if offsets:
                for task in range(thread, STAGE * TOKENS, THREADS):
                    t, s = task % TOKENS, task // TOKENS
                    if t & ~7 < n_tokens:
                        i = 2 * min(start + s, n_groups - 1)
                        x_sums[2 * task], x_sums[2 * task + 1] = sums[row_of[t], i], sums[row_of[t], i + 1]
            cuda.syncthreads()
            for s in range(STAGE):
                if start + s < n_groups:
                    at, of = s * ROW_PLANE, 4 * (s * ROWS + upper)
                    a, b = four_of(row_words, at + place(upper, c)), four_of(row_words, at + place(upper + 8, c))
                    e, f = four_of(row_words, at + place(upper + 16, c)), four_of(row_words, at + place(upper + 24, c))
                    of_a, of_b, of_e, of_f = (four_at(factors, of), four_at(factors, of + 32), four_at(factors, of + 64),
                                              four_at(factors, of + 96))
                    for tile in range(TOKEN_TILES):
                        t = 8 * TOKEN_WARPS * tile + beside
                        if t < n_tokens:
                            x = four_of(token_words, s * TOKEN_PLANE + place(t + g, c))
                            y = four_at(x_sums, 2 * (s * TOKENS + t) + 4 * c) if offsets else NO_SUMS
                            add_tile(acc, 8 * tile, a, b, x, y, of_a, of_b)
                            add_tile(acc, 8 * tile + 4, e, f, x, y, of_e, of_f)
            cuda.syncthreads()
        for tile in range(TOKEN_TILES):
            for i in range(2):
                t = 8 * TOKEN_WARPS * tile + beside + 2 * c + i
                if t < n_tokens:
                    x_scale, target = scales[row_of[t]], order[first + t]
                    for j in range(4):
                        row = cuda.blockIdx.x * ROWS + upper + 8 * j
                        if row < n_out:
                            out[target, row] = acc[8 * tile + 2 * j + i] * x_scale
    signature = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u4[::1], f4[:], f4[:,:]"
    return kernel(signature, THREADS, f"many_{name.lower()}")(many)


MANY = {name: _make_many(name) for name in GROUPED}
