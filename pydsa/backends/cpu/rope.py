"""Rotations: rotary position embedding and the Hadamard transform."""
import math

import numpy as np

from numba import prange

from pydsa.backends.cpu.norm import ALONE
from pydsa.backends.cpu.rows import contiguous
from pydsa.jit import inner, kernel


@kernel
def rope_table(out, positions, freqs, magnitude):
    for t in range(out.shape[0]):
        for i in range(freqs.size):     # float64: a float32 angle is off by 0.01 at position 160,000
            angle = positions[t] * freqs[i]
            out[t, 0, i] = math.cos(angle) * magnitude
            out[t, 1, i] = math.sin(angle) * magnitude


@inner
def turn(out, x, cos, sin, neox):
    """One head; out may be x."""
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
def turn_heads(out, x, table, neox):
    for h in range(len(x)):
        turn(contiguous(out[h]), contiguous(x[h]), table[0], table[1], neox)


@kernel(parallel=True)
def rope(out, x, table, neox):
    if len(x) <= ALONE:
        for t in range(len(x)):
            turn_heads(out[t], x[t], table[t], neox)
    else:
        for t in prange(len(x)):
            turn_heads(out[t], x[t], table[t], neox)


@inner
def hadamard_row(row):
    """In place, without the factor."""
    step = 1
    while step < row.size:
        for first in range(0, row.size, 2 * step):
            for i in range(first, first + step):
                a, b = row[i], row[i + step]
                row[i], row[i + step] = a + b, a - b
        step *= 2


@kernel
def hadamard(out, x):
    norm = np.float32(1 / np.sqrt(x.shape[2]))
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            row, source = contiguous(out[t, h]), contiguous(x[t, h])
            for i in range(row.size):
                row[i] = source[i] * norm
            hadamard_row(row)
