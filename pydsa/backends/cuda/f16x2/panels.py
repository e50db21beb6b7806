"""Activations as gemm.py's products take them: two float16 each, in the order of a type's weights.

A row is a list of stages of 64 numbers, each 128 bytes of high float16 and 128 of low ones: scale (high + low). In front are sums, with
which offsets of weights are multiplied: 32 numbers for each block of 256, eight sums of 32 activations in four forms: the nearest float16,
what that leaves, and both again. A stage has four blocks of them.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.block_sums import abs_bits, block_max
from pydsa.backends.cuda.device import bits_float, device, of_half, to_half
from pydsa.backends.cuda.instructions import store_sixteen
from pydsa.backends.cuda.launch import kernel


THREADS = 256
STAGE_BYTES, PART_BYTES = 256, 128      # of a row
BLOCK, SUMMED = 256, 32                 # weights that share a scale, and that share an offset
MOST = 1024         # what a row's greatest number becomes: its sums of 32 are float16, too
ZERO = np.float32(0)


class Columns(NamedTuple):
    """Rows of activations in stages."""
    packed: object      # uint8 [N, STAGE_BYTES n_stages(n)]
    scales: object      # float32 [N]


def n_first(n_blocks):
    """The number of stages of sums, four blocks in each."""
    return (n_blocks + 3) // 4


def n_stages(n):
    """The number of stages of a row of n activations."""
    return n_first(n // BLOCK) + n // 64


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
    bits = np.int32(0)
    for i in range(thread, x.shape[1], THREADS):
        bits = max(bits, abs_bits(x[t, i]))
    greatest = bits_float(np.uint32(block_max(bits, maxima, thread, THREADS)))
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
def sum_of(x, t, first, factor):
    """The sum of SUMMED activations, as their pairs of float16 stand for them."""
    total = ZERO
    for i in range(first, first + SUMMED):
        v = scaled(x, t, i, factor)
        high = of_half(to_half(v))
        total += high + of_half(to_half(v - high))
    return total


@kernel("u1[:,::1], f4[:], f4[:,:]", THREADS)
def split_columns_q4_k(packed, scales, x):
    """Split rows into Columns for Q4_K. One row per block."""
    t, thread, n_blocks = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1] // BLOCK
    maxima, row = cuda.shared.array(32, np.int32), t * packed.shape[1]
    factor, scale = factor_of(x, t, maxima, thread)
    if thread == 0:
        scales[t] = scale
    before = (n_blocks + 3) // 4
    for piece in range(thread, 8 * x.shape[1] // 64, THREADS):
        first, p = piece // 8 * 64, piece & 7
        words = cuda.local.array(8, np.uint32)
        for j in range(4):
            words[j], words[4 + j] = pair_of_halves(scaled(x, t, first + column_of_q4_k(p, 2 * j), factor),
                                                    scaled(x, t, first + column_of_q4_k(p, 2 * j + 1), factor))
        at = row + STAGE_BYTES * (before + piece // 8) + 16 * p
        store_sixteen(packed, at, words[0], words[1], words[2], words[3])
        store_sixteen(packed, at + PART_BYTES, words[4], words[5], words[6], words[7])
    for block in range(thread, 4 * before, THREADS):
        words = cuda.local.array(8, np.uint32)
        for j in range(4):
            first = BLOCK * block + 2 * SUMMED * j
            words[j], words[4 + j] = pair_of_halves(sum_of(x, t, first, factor), sum_of(x, t, first + SUMMED, factor)) if (
                block < n_blocks) else (np.uint32(0), np.uint32(0))
        at = row + 64 * block
        for _ in range(2):
            store_sixteen(packed, at, words[0], words[1], words[2], words[3])
            store_sixteen(packed, at + 16, words[4], words[5], words[6], words[7])
            at += 32


def split(x, kernel):
    """Rows of activations [N, n] of any strides as Columns in scratch memory."""
    n_rows, n = x.shape
    made = Columns(scratch("x columns", (n_rows, STAGE_BYTES * n_stages(n)), np.uint8), scratch("x column scales", (n_rows,), np.float32))
    kernel(n_rows, *made, x)
    return made
