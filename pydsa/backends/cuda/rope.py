"""Rotations: RoPE on pairs, and the Hadamard transform of rows."""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, sync
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


THREADS = 8 if SIMULATED else 128
MAX_WIDTH = 4096       # the widest row of the Hadamard transform, as models/deepseek32.py allows


@kernel("f4[:,:,:], i8[:], f8[:], f8", THREADS)
def rope_angles(out, positions, freqs, magnitude):
    """Cosines and sines of position * frequency, times YaRN's magnitude.

    Angles are float64, since a position can be a million.
    """
    t, i = cuda.blockIdx.y, cuda.grid(1)
    if i < freqs.size:
        angle = positions[t] * freqs[i]
        out[t, 0, i], out[t, 1, i] = np.float32(math.cos(angle) * magnitude), np.float32(math.sin(angle) * magnitude)


@device
def rotate_pair(out, x, table, neox, t, h, i):
    """Rotate pair i of a head: (2i, 2i+1), or for neox (i, i + n_rot/2)."""
    half = x.shape[2] // 2
    first, second = (i, i + half) if neox else (2 * i, 2 * i + 1)
    a, b, cos, sin = x[t, h, first], x[t, h, second], table[t, 0, i], table[t, 1, i]
    out[t, h, first], out[t, h, second] = a * cos - b * sin, a * sin + b * cos


@kernel("f4[:,:,:], f4[:,:,:], f4[:,:,:], b1", THREADS)
def rope_pairs(out, x, table, neox):
    """Rotate all pairs. One pair per thread."""
    t, pair, half = cuda.blockIdx.y, cuda.grid(1), x.shape[2] // 2
    if pair < x.shape[1] * half:
        rotate_pair(out, x, table, neox, t, pair // half, pair % half)


@device
def hadamard_row(out, x, row, values, thread, n_threads):
    """Hadamard transform of a row, by one block in shared memory.

    It takes log2(width) butterfly stages of sums and differences. values: shared memory of the row's width.
    """
    width, step = x.shape[1], 1
    for i in range(thread, width, n_threads):
        values[i] = x[row, i]
    sync()
    while step < width:
        for pair in range(thread, width // 2, n_threads):
            i = pair // step * 2 * step + pair % step
            a, b = values[i], values[i + step]
            values[i], values[i + step] = a + b, a - b
        sync()
        step *= 2
    factor = np.float32(1) / np.float32(math.sqrt(np.float32(width)))
    for i in range(thread, width, n_threads):
        out[row, i] = values[i] * factor


@kernel("f4[:,:], f4[:,:]", THREADS)
def hadamard_rows(out, x):
    """Hadamard transform of rows. One row per block."""
    hadamard_row(out, x, cuda.blockIdx.x, cuda.shared.array(MAX_WIDTH, np.float32), cuda.threadIdx.x, THREADS)


def rope_table(out, positions, freqs, magnitude):
    """Cosines and sines of position * frequency, times YaRN's magnitude."""
    rope_angles((blocks_for(freqs.size, THREADS), out.shape[0]), out, positions, freqs, magnitude)


def rope(out, x, table, neox):
    """Rotate pairs: (2i, 2i+1), "norm", or (i, i + n_rot/2), "neox".

    out may be x itself.
    """
    rope_pairs((blocks_for(x.shape[1] * x.shape[2] // 2, THREADS), x.shape[0]), out, x, table, neox)


def hadamard(out, x):
    """The orthonormal Walsh-Hadamard rotation of the last axis.

    The order is Sylvester's. out may be x itself.
    """
    hadamard_rows(x.rows.shape[0], out.rows, x.rows)
