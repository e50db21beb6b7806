"""Kernels that multiply rows of weights with rows of activations: for one token, for many in tensor cores, and for unquantized weights.

Activations become whole numbers of 16 bits with a scale for each 32: x = scale (256 high + low), the largest magnitude 32,512, both bytes
signed. So weights and activations meet as bytes: the sums over 32 are exact, and only scales and sums of groups are floats.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.blocks import FLOATS, GROUPED
from pydsa.backends.cuda.device import MMA_WARP, SIMULATED, WARP, device, dp4a, four_of, mma_s8, nearest, two_words, warp_sum
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.quants import LARGEST

WARPS = 1 if SIMULATED else 4           # of a block
N_TILES = 1 if SIMULATED else 8         # tiles of eight tokens that a warp multiplies with its sixteen rows
STAGE = 2                               # groups of 32 that are in shared memory at a time
MANY_ROWS, MANY_TOKENS = 16 * WARPS, 8 * N_TILES
FLOAT_TOKENS = 4                        # that a warp multiplies with a row of unquantized weights
PITCH = 8 * STAGE + 4                   # words from one row in shared memory to the next: no two lanes of a tile meet in a bank
FACTORS, X_SUMS, SUMS = 4 * STAGE, 2 * STAGE, 4 * N_TILES        # of a stage; sums of a lane


class Rounded(NamedTuple):
    """Rows of activations as bytes: words [N, n/4] of high and of low ones, float32 scales [N, n/32], sums of numbers [N, n/16]."""
    high: object
    low: object
    scales: object
    sums: object


@kernel("u4[:,:], u4[:,:], f4[:,:], f4[:,:], f4[:,:]", 128)
def round_rows(high, low, scales, sums, x):
    """A thread rounds 32 numbers of a row. What is not finite becomes a scale that is not."""
    t, g = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if g >= scales.shape[1]:
        return
    top = np.float32(0)
    for i in range(32 * g, 32 * g + 32):
        magnitude = abs(x[t, i])
        if magnitude > top or magnitude != magnitude:       # NaN stays
            top = magnitude
    factor = np.float32(LARGEST) / top if top > np.float32(1e-30) else np.float32(0)
    scale = top / np.float32(LARGEST)
    scales[t, g] = scale
    for half in range(2):
        total = 0
        for word in range(4 * half, 4 * half + 4):
            i = 32 * g + 4 * word
            a, b, c, e = (nearest(x[t, i], factor), nearest(x[t, i + 1], factor), nearest(x[t, i + 2], factor),
                          nearest(x[t, i + 3], factor))
            high[t, 8 * g + word], low[t, 8 * g + word] = two_words(a, b, c, e)
            total += a + b + c + e
        sums[t, 2 * g + half] = scale * np.float32(total)


def prepared(w, x):
    """Activations, a view of any strides, as rows that meet w: Rounded, in scratch memory, or for unquantized weights as they are."""
    x = x.rows
    if w.type in FLOATS:
        return x
    n_rows, n = x.shape
    r = Rounded(scratch("x high", (n_rows, n // 4), np.uint32), scratch("x low", (n_rows, n // 4), np.uint32),
                scratch("x scales", (n_rows, n // 32), np.float32), scratch("x sums", (n_rows, n // 16), np.float32))
    round_rows((n_rows, blocks_for(n // 32, 128)), *r, x)       # rows can be more than the 65,535 that y allows
    return r


def _make_dot(entry):
    group, halves, offsets = entry.group, entry.halves, entry.offsets

    @device
    def dot(w, row, g, high, low, at, scales, sums, t):
        """The product of the g-th 32 of a row of weights and of the t-th row of activations, whose words begin at `at`."""
        a, b, c, e, f, h, i, j, d, d1, m, m1 = group(w, row, g)
        x0, x1, x2, x3 = four_of(high, at + 8 * g)
        x4, x5, x6, x7 = four_of(high, at + 8 * g + 4)
        first = dp4a(e, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, 0))))
        second = dp4a(j, x7, dp4a(i, x6, dp4a(h, x5, dp4a(f, x4, 0))))
        x0, x1, x2, x3 = four_of(low, at + 8 * g)
        x4, x5, x6, x7 = four_of(low, at + 8 * g + 4)
        first = dp4a(e, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, first << 8))))
        second = dp4a(j, x7, dp4a(i, x6, dp4a(h, x5, dp4a(f, x4, second << 8))))
        if halves:
            total = (d * np.float32(np.int32(first)) + d1 * np.float32(np.int32(second))) * scales[t, g]
        else:
            total = d * np.float32(np.int32(first + second)) * scales[t, g]
        if offsets:
            total -= m * sums[t, 2 * g] + m1 * sums[t, 2 * g + 1]
        return total
    return dot


DOTS = {name: _make_dot(entry) for name, entry in GROUPED.items()}


def _make_one(name):
    dot = DOTS[name]

    def one(out, w, row_bytes, ids, x_div, high, low, scales, sums):
        """out[y] = matrix ids[y] times the y // x_div-th row of activations; a warp makes one number of it."""
        y, lane = cuda.blockIdx.y, cuda.threadIdx.x % WARP
        x_row = y // x_div
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        total = np.float32(0)
        if row < out.shape[1]:
            at = (ids[y] * np.int64(out.shape[1]) + row) * row_bytes
            for g in range(lane, scales.shape[1], WARP):
                total += dot(w, at, g, high, low, 8 * scales.shape[1] * x_row, scales, sums, x_row)
        total = warp_sum(total)
        if row < out.shape[1] and lane == 0:
            out[y, row] = total
    return kernel("f4[:,:], u1[::1], i8, i4[:], i4, u4[::1], u4[::1], f4[:,:], f4[:,:]", WARPS * WARP, f"one_{name.lower()}")(one)


def _make_many(name):
    group, halves, offsets = GROUPED[name].group, GROUPED[name].halves, GROUPED[name].offsets

    def many(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, high, low, scales, sums):
        """out[i] = a matrix times the i // x_div-th row of activations, for i = order[first], ... order[end - 1] of each tile.

        A block multiplies 64 rows with at most 64 tokens: a warp sixteen rows with all of them, 32 numbers at a time.
        """
        thread = cuda.threadIdx.x
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        weights = cuda.shared.array((MANY_ROWS, PITCH), np.uint32)
        factors = cuda.shared.array((MANY_ROWS, FACTORS), np.float32)       # a group's two scales, then its two offsets
        highs = cuda.shared.array((MANY_TOKENS, PITCH), np.uint32)
        lows = cuda.shared.array((MANY_TOKENS, PITCH), np.uint32)
        x_scales = cuda.shared.array((MANY_TOKENS, STAGE), np.float32)
        x_sums = cuda.shared.array((MANY_TOKENS, X_SUMS), np.float32)
        acc = cuda.local.array(SUMS, np.float32)
        for i in range(SUMS):
            acc[i] = np.float32(0)
        n_out, n_groups = out.shape[1], scales.shape[1]
        warp, lane = thread // MMA_WARP, thread % MMA_WARP
        upper, column = 16 * warp + lane // 4, lane % 4
        for start in range(0, n_groups, STAGE):
            for task in range(thread, MANY_ROWS * STAGE, WARPS * MMA_WARP):
                r, s = task // STAGE, task % STAGE
                row = min(cuda.blockIdx.x * MANY_ROWS + r, n_out - 1)
                g = min(start + s, n_groups - 1)
                a, b, c, e, f, h, i, j, d, d1, m, m1 = group(w, (chosen * np.int64(n_out) + row) * row_bytes, g)
                weights[r, 8 * s], weights[r, 8 * s + 1], weights[r, 8 * s + 2], weights[r, 8 * s + 3] = a, b, c, e
                weights[r, 8 * s + 4], weights[r, 8 * s + 5], weights[r, 8 * s + 6], weights[r, 8 * s + 7] = f, h, i, j
                factors[r, 4 * s], factors[r, 4 * s + 1], factors[r, 4 * s + 2], factors[r, 4 * s + 3] = d, d1, m, m1
            for task in range(thread, MANY_TOKENS * 8 * STAGE, WARPS * MMA_WARP):
                t, k = task // (8 * STAGE), task % (8 * STAGE)
                x_row = order[min(first + t, end - 1)] // x_div
                at = min(8 * start + k, 8 * n_groups - 1)
                highs[t, k], lows[t, k] = high[x_row, at], low[x_row, at]
            for task in range(thread, MANY_TOKENS * STAGE, WARPS * MMA_WARP):
                t, s = task // STAGE, task % STAGE
                x_row = order[min(first + t, end - 1)] // x_div
                g = min(start + s, n_groups - 1)
                x_scales[t, s], x_sums[t, 2 * s], x_sums[t, 2 * s + 1] = scales[x_row, g], sums[x_row, 2 * g], sums[x_row, 2 * g + 1]
            cuda.syncthreads()
            for s in range(STAGE):
                if start + s < n_groups:
                    k = 8 * s + column
                    a0, a1, a2, a3 = weights[upper, k], weights[upper + 8, k], weights[upper, k + 4], weights[upper + 8, k + 4]
                    for tile in range(N_TILES):
                        t = 8 * tile + lane // 4
                        h0, h1, l0, l1 = highs[t, k], highs[t, k + 4], lows[t, k], lows[t, k + 4]
                        token = 8 * tile + 2 * column
                        x0, x1 = x_scales[token, s], x_scales[token + 1, s]
                        if halves:      # each half of the numbers by itself: the other half of the weights is zero
                            p0, p1, p2, p3 = mma_s8(a0, a1, 0, 0, h0, h1, 0, 0, 0, 0)
                            p0, p1, p2, p3 = mma_s8(a0, a1, 0, 0, l0, l1, p0 << 8, p1 << 8, p2 << 8, p3 << 8)
                            q0, q1, q2, q3 = mma_s8(0, 0, a2, a3, h0, h1, 0, 0, 0, 0)
                            q0, q1, q2, q3 = mma_s8(0, 0, a2, a3, l0, l1, q0 << 8, q1 << 8, q2 << 8, q3 << 8)
                            d, d1 = factors[upper, 4 * s], factors[upper, 4 * s + 1]
                            f, f1 = factors[upper + 8, 4 * s], factors[upper + 8, 4 * s + 1]
                            v0 = d * np.float32(p0) + d1 * np.float32(q0)
                            v1 = d * np.float32(p1) + d1 * np.float32(q1)
                            v2 = f * np.float32(p2) + f1 * np.float32(q2)
                            v3 = f * np.float32(p3) + f1 * np.float32(q3)
                        else:
                            p0, p1, p2, p3 = mma_s8(a0, a1, a2, a3, h0, h1, 0, 0, 0, 0)
                            p0, p1, p2, p3 = mma_s8(a0, a1, a2, a3, l0, l1, p0 << 8, p1 << 8, p2 << 8, p3 << 8)
                            d, f = factors[upper, 4 * s], factors[upper + 8, 4 * s]
                            v0, v1, v2, v3 = d * np.float32(p0), d * np.float32(p1), f * np.float32(p2), f * np.float32(p3)
                        acc[4 * tile] += v0 * x0
                        acc[4 * tile + 1] += v1 * x1
                        acc[4 * tile + 2] += v2 * x0
                        acc[4 * tile + 3] += v3 * x1
                        if offsets:
                            m, m1, o, o1 = (factors[upper, 4 * s + 2], factors[upper, 4 * s + 3], factors[upper + 8, 4 * s + 2],
                                            factors[upper + 8, 4 * s + 3])
                            y0, y1, z0, z1 = (x_sums[token, 2 * s], x_sums[token, 2 * s + 1], x_sums[token + 1, 2 * s],
                                              x_sums[token + 1, 2 * s + 1])
                            acc[4 * tile] -= m * y0 + m1 * y1
                            acc[4 * tile + 1] -= m * z0 + m1 * z1
                            acc[4 * tile + 2] -= o * y0 + o1 * y1
                            acc[4 * tile + 3] -= o * z0 + o1 * z1
            cuda.syncthreads()
        for tile in range(N_TILES):
            for i in range(4):
                t, row = first + 8 * tile + 2 * column + i % 2, cuda.blockIdx.x * MANY_ROWS + upper + 8 * (i // 2)
                if t < end and row < n_out:
                    out[order[t], row] = acc[4 * tile + i]
    signature = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u4[:,:], u4[:,:], f4[:,:], f4[:,:]"
    return kernel(signature, WARPS * MMA_WARP, f"many_{name.lower()}")(many)


def _make_floats(name):
    value_at = FLOATS[name]

    def of_floats(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, x):
        """The same with unquantized weights and activations as they are; a warp multiplies one row with four tokens."""
        lane, row = cuda.threadIdx.x % WARP, cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        at = (chosen * np.int64(out.shape[1]) + min(row, out.shape[1] - 1)) * row_bytes
        for t in range(first, end, FLOAT_TOKENS):
            t0, t1, t2, t3 = (order[t] // x_div, order[min(t + 1, end - 1)] // x_div, order[min(t + 2, end - 1)] // x_div,
                              order[min(t + 3, end - 1)] // x_div)
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(lane, x.shape[1], WARP):
                value = value_at(w, at, i)
                s0 += value * x[t0, i]
                s1 += value * x[t1, i]
                s2 += value * x[t2, i]
                s3 += value * x[t3, i]
            s0, s1, s2, s3 = warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3)
            if lane == 0 and row < out.shape[1]:
                out[order[t], row] = s0
                if t + 1 < end:
                    out[order[t + 1], row] = s1
                if t + 2 < end:
                    out[order[t + 2], row] = s2
                if t + 3 < end:
                    out[order[t + 3], row] = s3
    signature = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, f4[:,:]"
    return kernel(signature, WARPS * WARP, f"floats_{name.lower()}")(of_floats)


ONE = {name: _make_one(name) for name in GROUPED}
MANY = {name: _make_many(name) for name in GROUPED}
OF_FLOATS = {name: _make_floats(name) for name in FLOATS}


class Tiles(NamedTuple):
    """Which rows of activations meet which matrix: int32 arrays of tiles (a matrix or -1, where its rows begin and end in `order`)."""
    matrix: object
    first: object
    end: object
    order: object
    x_div: int      # a row of activations serves so many rows of `order`, one after the other
    single: bool    # each tile has one row, and `order` is 0, 1, 2, ...: one token


def multiply(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of what prepared(w, ...) gave, for all tiles; out is a view of any strides."""
    out = out.rows
    if w.type in FLOATS:
        OF_FLOATS[w.type]((blocks_for(out.shape[1], WARPS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x)
    elif tiles.single:
        ONE[w.type]((blocks_for(out.shape[1], WARPS), tiles.matrix.size), out, w.data, w.row_bytes, tiles.matrix, tiles.x_div,
                    x.high.flat, x.low.flat, x.scales, x.sums)
    else:
        MANY[w.type]((blocks_for(out.shape[1], MANY_ROWS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], *x)
