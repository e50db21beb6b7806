"""Rotations: rotary position embedding and the Hadamard transform."""
import math

import numpy as np

from pydsa.backends.cpu.arrays import address, contiguous
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import by_row, rows_of
from pydsa.backends.cpu.vectors.lanes import butterflies_of_16
from pydsa.backends.cpu.vectors.simd import load_floats, store


@inner
def rope_table_rows(out, positions, freqs, magnitude, task):
    for t in rows_of(out, task):
        for i in range(freqs.size):     # float64: a float32 angle is off by 0.01 at position 160,000
            angle = positions[t] * freqs[i]
            out[t, 0, i] = math.cos(angle) * magnitude
            out[t, 1, i] = math.sin(angle) * magnitude


@op(Stage(by_row, rope_table_rows, light=True))
def rope_table(out, positions, freqs, magnitude):
    return 0


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
def rope_rows(out, x, table, neox, task):
    for t in rows_of(out, task):
        cos, sin = contiguous(table[t, 0]), contiguous(table[t, 1])
        for h in range(x.shape[1]):
            rotate(contiguous(out[t, h]), contiguous(x[t, h]), cos, sin, neox)


@op(Stage(by_row, rope_rows, light=True))
def rope(out, x, table, neox):
    return 0


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
def hadamard_rows(out, x, task):
    norm = np.float32(1 / np.sqrt(x.shape[2]))
    for t in rows_of(out, task):
        for h in range(x.shape[1]):
            hadamard_row(contiguous(out[t, h]), contiguous(x[t, h]), norm)


@op(Stage(by_row, hadamard_rows, light=True))
def hadamard(out, x):
    return 0
