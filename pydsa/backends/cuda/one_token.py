"""Products of quantized weights with the activations of one token.

Activations become whole numbers of 16 bits with a scale for each 32: x = scale (256 high + low), the largest magnitude 32,512, both bytes
signed. So weights and activations meet as bytes in dp4a: the sums over 32 are exact, and only scales and sums of groups are floats.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.device import (SIMULATED, WARP, bits_float, device, dp4a, float_bits, four_of, max_of_eight, nearest, sum_of_four,
                                        two_words, warp_sum)
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.quants import LARGEST

WARPS = 2 if SIMULATED else 4           # of a block
ROWS = 4                                # of weights that a warp multiplies with the same activations
ENOUGH = 8 if SIMULATED else 2112       # warps: sixteen for each of an H100's processors
ROUNDING = 8 if SIMULATED else 256      # threads, each with four numbers
PARTS = WARPS * ROWS
ZERO = np.float32(0)


class Rounded(NamedTuple):
    """Rows of activations as bytes: words [N, n/4] of high and of low ones, float32 scales [N, n/32], sums of numbers [N, n/16]."""
    high: object
    low: object
    scales: object
    sums: object


@device
def round_four(rounded, t, four, there, a, b, c, e):
    """Round numbers 4 * four to 4 * four + 3 of row t, with seven other lanes that have the rest of 32; `there`: whether they count.

    What is not finite becomes a scale that is not.
    """
    high, low, scales, sums = rounded
    top = bits_float(np.uint32(max_of_eight(max(max(magnitude_bits(a), magnitude_bits(b)), max(magnitude_bits(c), magnitude_bits(e))))))
    factor = np.float32(LARGEST) / top if top > np.float32(1e-30) else ZERO
    a, b, c, e = nearest(a, factor), nearest(b, factor), nearest(c, factor), nearest(e, factor)
    total = sum_of_four(np.float32(a + b + c + e))
    if there:
        high[t, four], low[t, four] = two_words(a, b, c, e)
        scale = top / np.float32(LARGEST)
        if four % 4 == 0:
            sums[t, four // 4] = scale * total
        if four % 8 == 0:
            scales[t, four // 8] = scale


@device
def magnitude_bits(x):
    """The bits of |x|, which order as numbers do; NaN's are the greatest."""
    return np.int32(float_bits(x) & 0x7FFFFFFF)


@kernel("u4[:,:], u4[:,:], f4[:,:], f4[:,:], f4[:,:]", ROUNDING)
def round_rows(high, low, scales, sums, x):
    """A thread rounds four numbers of a row."""
    t, four = cuda.blockIdx.x, cuda.blockIdx.y * ROUNDING + cuda.threadIdx.x
    i = 4 * min(four, x.shape[1] // 4 - 1)
    round_four((high, low, scales, sums), t, four, four < x.shape[1] // 4, x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3])


def rounded(x):
    """Activations, rows of any strides, as Rounded in scratch memory."""
    n_rows, n = x.shape
    made = Rounded(scratch("x high", (n_rows, n // 4), np.uint32), scratch("x low", (n_rows, n // 4), np.uint32),
                   scratch("x scales", (n_rows, n // 32), np.float32), scratch("x sums", (n_rows, n // 16), np.float32))
    round_rows((n_rows, blocks_for(n // 4, ROUNDING)), *made, x)
    return made


def _make_one(name):
    group, halves, offsets = GROUPED[name].group, GROUPED[name].halves, GROUPED[name].offsets

    @device
    def dot(w, row, g, high, high_1, low, low_1, scale, y, y1):
        """The product of the g-th 32 of a row of weights and of activations."""
        a, b, c, e, f, h, i, j, d, d1, m, m1 = group(w, row, g)
        x0, x1, x2, x3 = high
        x4, x5, x6, x7 = high_1
        first = dp4a(e, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, 0))))
        second = dp4a(j, x7, dp4a(i, x6, dp4a(h, x5, dp4a(f, x4, 0))))
        x0, x1, x2, x3 = low
        x4, x5, x6, x7 = low_1
        first = dp4a(e, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, first << 8))))
        second = dp4a(j, x7, dp4a(i, x6, dp4a(h, x5, dp4a(f, x4, second << 8))))
        if halves:
            total = (d * np.float32(np.int32(first)) + d1 * np.float32(np.int32(second))) * scale
        else:
            total = d * np.float32(np.int32(first + second)) * scale
        if offsets:
            total -= m * y + m1 * y1
        return total

    def one(out, w, row_bytes, ids, x_div, splits, high, low, scales, sums):
        """out[y] = matrix ids[y] times the y // x_div-th row of activations; a warp makes ROWS numbers, or `splits` warps of a block do."""
        y, thread, n_out, n_groups = cuda.blockIdx.y, cuda.threadIdx.x & WARPS * WARP - 1, out.shape[1], scales.shape[1]
        warp, lane, x_row = thread // WARP, thread % WARP, cuda.blockIdx.y // x_div
        part, row = warp % splits, (cuda.blockIdx.x * (WARPS // splits) + warp // splits) * ROWS
        parts = cuda.shared.array(PARTS, np.float32)
        base, last = ids[y] * np.int64(n_out), n_out - 1
        r0, r1, r2, r3 = ((base + min(row, last)) * row_bytes, (base + min(row + 1, last)) * row_bytes,
                          (base + min(row + 2, last)) * row_bytes, (base + min(row + 3, last)) * row_bytes)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for g in range(part * WARP + lane, n_groups, splits * WARP):
            at = 8 * (n_groups * x_row + g)
            h, h1, k, k1 = four_of(high, at), four_of(high, at + 4), four_of(low, at), four_of(low, at + 4)
            scale = scales[x_row, g]
            y0, y1 = (sums[x_row, 2 * g], sums[x_row, 2 * g + 1]) if offsets else (ZERO, ZERO)
            s0 += dot(w, r0, g, h, h1, k, k1, scale, y0, y1)
            s1 += dot(w, r1, g, h, h1, k, k1, scale, y0, y1)
            s2 += dot(w, r2, g, h, h1, k, k1, scale, y0, y1)
            s3 += dot(w, r3, g, h, h1, k, k1, scale, y0, y1)
        s0, s1, s2, s3 = warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3)
        if splits > 1:
            if lane == 0:
                parts[4 * warp], parts[4 * warp + 1], parts[4 * warp + 2], parts[4 * warp + 3] = s0, s1, s2, s3
            cuda.syncthreads()
            if part == 0:
                for i in range(1, splits):
                    s0 += parts[4 * (warp + i)]
                    s1 += parts[4 * (warp + i) + 1]
                    s2 += parts[4 * (warp + i) + 2]
                    s3 += parts[4 * (warp + i) + 3]
        if part == 0 and lane < ROWS and row + lane < n_out:
            out[y, row + lane] = s0 if lane == 0 else s1 if lane == 1 else s2 if lane == 2 else s3
    signature = "f4[:,:], u1[::1], i8, i4[:], i4, i4, u4[::1], u4[::1], f4[:,:], f4[:,:]"
    return kernel(signature, WARPS * WARP, f"one_{name.lower()}")(one)


ONE = {name: _make_one(name) for name in GROUPED}


def multiply_one(out, w, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of Rounded activations."""
    n_tiles, n_groups = tiles.matrix.size, x.scales.shape[1]
    splits = 1      # a few rows are better divided among warps than left to a few of them
    while splits < WARPS and splits * WARP < n_groups and blocks_for(out.shape[1], ROWS) * n_tiles * splits < ENOUGH:
        splits *= 2
    ONE[w.type]((blocks_for(out.shape[1], ROWS * (WARPS // splits)), n_tiles), out, w.data, w.row_bytes, tiles.matrix, tiles.x_div, splits,
                x.high.flat, x.low.flat, x.scales, x.sums)
