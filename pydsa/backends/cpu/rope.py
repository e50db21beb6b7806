"""Rotations: rotary position embedding and the Hadamard transform."""
import math

import numpy as np
from numba import prange

from pydsa.backends.cpu.arrays import address, contiguous
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.lanes import butterflies_of_16
from pydsa.backends.cpu.norm import SERIAL_ROWS
from pydsa.backends.cpu.simd import load_floats, store


@kernel
def rope_table(out, positions, freqs, magnitude):
    for t in range(out.shape[0]):
        for i in range(freqs.size):     # float64: a float32 angle is off by 0.01 at position 160,000
            angle = positions[t] * freqs[i]
            out[t, 0, i] = math.cos(angle) * magnitude
            out[t, 1, i] = math.sin(angle) * magnitude


@inner
def rotate(out, x, cos, sin, neox):
    """Rotate one head; out may be x."""
    half = cos.size
    if neox:
        for i in range(half):
            a, b = x[i], x[i + half]
            out[i], out[i + half] = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]
    else:
        for i in range(half):
            a, b = x[2 * i], x[2 * i + 1]
            out[2 * i], out[2 * i + 1] = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]


@inner
def rotate_heads(out, x, table, neox):
    for h in range(len(x)):
        rotate(contiguous(out[h]), contiguous(x[h]), table[0], table[1], neox)


@kernel(parallel=True)
def rope(out, x, table, neox):
    if len(x) <= SERIAL_ROWS:
        for t in range(len(x)):
            rotate_heads(out[t], x[t], table[t], neox)
    else:
        for t in prange(len(x)):
            rotate_heads(out[t], x[t], table[t], neox)


@inner
def hadamard_row(out, x, norm):
    """Transform one head; out may be x.

    Stages 1, 2, 4 and 8 are computed inside vectors.
    """
    if x.size < 16:
        for i in range(x.size):
            out[i] = x[i] * norm
        butterflies(out)
        return
    for i in range(0, x.size, 16):
        store(address(out), 4 * i, butterflies_of_16(load_floats(address(x), 4 * i) * norm))
    step = 16
    while step < x.size:
        for first in range(0, x.size, 2 * step):
            for i in range(4 * first, 4 * (first + step), 64):
                a, b = load_floats(address(out), i), load_floats(address(out), i + 4 * step)
                store(address(out), i, a + b)
                store(address(out), i + 4 * step, a - b)
        step *= 2


@inner
def butterflies(row):
    """Compute the transform in place, not normalised."""
    step = 1
    while step < row.size:
        for first in range(0, row.size, 2 * step):
            for i in range(first, first + step):
                a, b = row[i], row[i + step]
                row[i], row[i + step] = a + b, a - b
        step *= 2


@inner
def hadamard_heads(out, x, norm):
    for h in range(len(x)):
        hadamard_row(contiguous(out[h]), contiguous(x[h]), norm)


@kernel(parallel=True)
def hadamard(out, x):
    norm = np.float32(1 / np.sqrt(x.shape[2]))
    if len(x) <= SERIAL_ROWS:
        for t in range(len(x)):
            hadamard_heads(out[t], x[t], norm)
    else:
        for t in prange(len(x)):
            hadamard_heads(out[t], x[t], norm)
