"""Activations as gemm.py's products take them: one float16 each, in the order of its weights.

A row is a list of stages of 64 numbers, 128 bytes, an even number of them: zeros follow the last number. A row's greatest magnitude becomes
a number from MOST / 2 to MOST, times a power of two, so that numbers of few bits stay exact. What is 2^27 times smaller loses bits.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.block_sums import row_max
from pydsa.backends.cuda.intrinsics.device import bits_float, device, to_half
from pydsa.backends.cuda.intrinsics.instructions import store_sixteen
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import kernel


THREADS = 256
STAGE, STAGE_BYTES = 64, 128        # numbers of a stage and their bytes
MOST_EXPONENT = 13                  # MOST is 2^14
SMALLEST = 16                       # exponents of float32 below are taken for this one: the factor must be a number
ZERO = np.float32(0)


class Rows(NamedTuple):
    """Rows of activations in stages."""
    packed: object      # uint8 [N, STAGE_BYTES n_stages(n)]
    scales: object      # float32 [N]: activation = scale * float16


def n_stages(n):
    """The number of stages of a row of n activations."""
    return 2 * -(-n // (2 * STAGE))


@device
def column_of(piece, i):
    """Which of 64 activations is the i-th of the eight of a piece of 16 bytes.

    It is the one whose weight a lane has there: of a group of 32 it has eight, of each four of them the first and third in a pair, then
    the second and fourth.
    """
    return 32 * (piece >> 2) + 8 * (i >> 1) + 4 * (piece >> 1 & 1) + 2 * (i & 1) + (piece & 1)


@device
def factors_for(bits):
    """The factor of a row, a power of two, and its inverse.

    bits: of the row's greatest magnitude. 0 and NaN if that is not finite.
    """
    exponent = max(bits >> 23, SMALLEST)
    if exponent == 255:
        return ZERO, np.float32(np.nan)
    return bits_float(np.uint32(254 + MOST_EXPONENT - exponent << 23)), bits_float(np.uint32(exponent - MOST_EXPONENT << 23))


@device
def pair_of(x, t, first, factor):
    """Activations `first` and first + 2 of row t, as float16 in a word.

    Zeros beyond the row's end.
    """
    n = x.shape[1]
    a = to_half(x[t, first] * factor) if first < n and factor > ZERO else np.uint32(0)      # infinity times 0 is NaN
    b = to_half(x[t, first + 2] * factor) if first + 2 < n and factor > ZERO else np.uint32(0)
    return np.uint32(a | b << 16)


@kernel("u1[:,::1], f4[:], f4[:,:]", THREADS)
def round_rows_f16(packed, scales, x):
    """Round rows to Rows. One row per block, eight numbers per thread."""
    t, thread = cuda.blockIdx.x, cuda.threadIdx.x
    maxima, row = cuda.shared.array(32, np.int32), t * packed.shape[1]
    factor, scale = factors_for(row_max(x, t, 0, x.shape[1], maxima, thread, THREADS))
    if thread == 0:
        scales[t] = scale
    for piece in range(thread, packed.shape[1] // 16, THREADS):
        first = piece // 8 * STAGE + column_of(piece & 7, 0)
        store_sixteen(packed, row + 16 * piece, pair_of(x, t, first, factor), pair_of(x, t, first + 8, factor),
                      pair_of(x, t, first + 16, factor), pair_of(x, t, first + 24, factor))


def rows_for(n_rows, n):
    """Rows of n activations in scratch memory, for what packs them."""
    return Rows(scratch("x f16 rows", (n_rows, STAGE_BYTES * n_stages(n)), np.uint8), scratch("x f16 scales", (n_rows,), np.float32))


def pack(x):
    """Rows of activations [N, n] of any strides as Rows in scratch memory."""
    made = rows_for(*x.shape)
    round_rows_f16(len(x), *made, x)
    return made
