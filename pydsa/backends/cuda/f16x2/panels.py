"""Activations as products in wgmma take them: two float16 each, in the order of a type's weights.

A row is a list of stages of 64 numbers, each 128 bytes of high float16 and 128 of low ones: scale (high + low). In front are stages of
sums of 32 or 16 activations, with which offsets of weights are multiplied. Behind the last number a stage has zeros.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.block_sums import row_max
from pydsa.backends.cuda.intrinsics.device import bits_float, device, of_half, to_half
from pydsa.backends.cuda.intrinsics.instructions import store_sixteen
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


THREADS = 256
STAGE_BYTES, PART_BYTES = 256, 128      # of a row
MOST = 1024         # what a row's greatest number becomes: its sums of 32 are float16, too
ZERO = np.float32(0)


class Columns(NamedTuple):
    """Rows of activations in stages."""
    packed: object      # uint8 [N, STAGE_BYTES n_stages(n)]
    scales: object      # float32 [N]


def n_stages(n, summed):
    """The number of stages of a row of n activations.

    summed: of how many there are sums; 0: none.
    """
    return blocks_for(n, 64) + (blocks_for(n, 64 * summed) if summed else 0)


@device
def column_of_q4_k(piece, i):
    """Which of 64 activations is the i-th of the eight of a piece.

    It is the one whose weight a lane has there: a lane takes 8 of 32 bytes, of each four bytes the first and third, then the second and
    fourth; first their lower halves, which are the weights of the first 32.
    """
    return 32 * (piece >> 2) + 8 * (i >> 1) + 4 * (piece >> 1 & 1) + 2 * (i & 1) + (piece & 1)


@device
def pair_of_halves(a, b):
    """Two float32 as the nearest float16 and as what those leave: two words."""
    p, q = to_half(a), to_half(b)
    return np.uint32(p | q << 16), np.uint32(to_half(a - of_half(p)) | to_half(b - of_half(q)) << 16)


@device
def factor_of(x, t, maxima, thread):
    """The factor that makes the greatest of row t MOST, and its inverse.

    0 and NaN if a value is not finite.
    """
    greatest = bits_float(np.uint32(row_max(x, t, 0, x.shape[1], maxima, thread, THREADS)))
    if not greatest < np.float32(np.inf):
        return ZERO, np.float32(np.nan)
    return np.float32(MOST) / greatest if greatest > np.float32(1e-30) else ZERO, greatest / np.float32(MOST)


@device
def scaled(x, t, i, factor):
    """A number of a row times its factor.

    0 where that is 0: infinity times 0 is NaN.
    """
    return x[t, i] * factor if factor > ZERO else ZERO


@device
def sum_of(x, t, first, n, factor):
    """The sum of n activations, as their pairs of float16 stand for them. 0 behind the last one."""
    total = ZERO
    for i in range(first, min(first + n, x.shape[1])):
        v = scaled(x, t, i, factor)
        high = of_half(to_half(v))
        total += high + of_half(to_half(v - high))
    return total


@device
def natural_column(piece, i):
    """The i-th of the eight of a piece is where it is."""
    return 8 * piece + i


def _make_split(name, column_of, summed):
    """A kernel that splits rows into Columns, one row a block. The order of each 64 is column_of's."""
    @device
    def number(x, t, i, factor):
        return scaled(x, t, i, factor) if i < x.shape[1] else ZERO

    def split_rows(packed, scales, x):
        t, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
        maxima, row = cuda.shared.array(32, np.int32), t * packed.shape[1]
        factor, scale = factor_of(x, t, maxima, thread)
        if thread == 0:
            scales[t] = scale
        words = cuda.local.array(8, np.uint32)
        before = packed.shape[1] // STAGE_BYTES - (n + 63) // 64
        for piece in range(thread, 8 * ((n + 63) // 64), THREADS):
            first, p = piece // 8 * 64, piece & 7
            for j in range(4):
                words[j], words[4 + j] = pair_of_halves(number(x, t, first + column_of(p, 2 * j), factor),
                                                        number(x, t, first + column_of(p, 2 * j + 1), factor))
            at = row + STAGE_BYTES * (before + piece // 8) + 16 * p
            store_sixteen(packed, at, words[0], words[1], words[2], words[3])
            store_sixteen(packed, at + PART_BYTES, words[4], words[5], words[6], words[7])
        if summed:
            for piece in range(thread, 8 * before, THREADS):
                for j in range(4):
                    first = summed * (8 * piece + 2 * j)
                    words[j], words[4 + j] = pair_of_halves(sum_of(x, t, first, summed, factor),
                                                            sum_of(x, t, first + summed, summed, factor))
                at = row + STAGE_BYTES * (piece // 8) + 16 * (piece & 7)
                store_sixteen(packed, at, words[0], words[1], words[2], words[3])
                store_sixteen(packed, at + PART_BYTES, words[4], words[5], words[6], words[7])
    return kernel("u1[:,::1], f4[:], f4[:,:]", THREADS, name)(split_rows)


split_columns_q4_k = _make_split("split_columns_q4_k", column_of_q4_k, 32)
split_columns = _make_split("split_columns", natural_column, 0)
split_columns_and_16 = _make_split("split_columns_and_16", natural_column, 16)
split_columns_and_32 = _make_split("split_columns_and_32", natural_column, 32)


def split(x, kernel, summed):
    """Rows of activations [N, n] of any strides as Columns in scratch memory.

    kernel: one of those above, with sums of so many.
    """
    n_rows, n = x.shape
    made = Columns(scratch("x columns", (n_rows, STAGE_BYTES * n_stages(n, summed)), np.uint8),
                   scratch("x column scales", (n_rows,), np.float32))
    kernel(n_rows, *made, x)
    return made
