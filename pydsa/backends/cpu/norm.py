"""Norms and elementwise ops.

A few rows are computed by the calling thread: starting the others takes longer than the work.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu.arrays import contiguous
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.scalars import exp


SERIAL_ROWS = 16      # the most rows that one thread computes alone


@inner
def rms_norm_row(out, x, w, eps):
    squares = np.float32(0)
    for i in range(x.size):
        squares += x[i] * x[i]
    scale = np.float32(1 / np.sqrt(squares / x.size + eps))
    for i in range(x.size):
        out[i] = x[i] * scale * w[i]


@kernel(parallel=True)
def rms_norm(out, x, w, eps):
    if len(x) <= SERIAL_ROWS:
        for t in range(len(x)):
            rms_norm_row(contiguous(out[t]), contiguous(x[t]), w, eps)
    else:
        for t in prange(len(x)):
            rms_norm_row(contiguous(out[t]), contiguous(x[t]), w, eps)


@inner
def layer_norm_row(out, x, w, b, eps):
    mean, squares = np.float32(0), np.float32(0)
    for i in range(x.size):
        mean += x[i]
    mean /= np.float32(x.size)
    for i in range(x.size):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1 / np.sqrt(squares / x.size + eps))
    for i in range(x.size):
        out[i] = (x[i] - mean) * scale * w[i] + b[i]


@kernel
def layer_norm(out, x, w, b, eps):
    for t in range(len(x)):
        layer_norm_row(contiguous(out[t]), contiguous(x[t]), w, b, eps)


@inner
def silu_mul_row(out, gate, up):
    for i in range(gate.size):
        out[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@kernel(parallel=True)
def silu_mul(out, gate, up):
    if len(out) <= SERIAL_ROWS:
        for t in range(len(out)):
            silu_mul_row(contiguous(out[t]), contiguous(gate[t]), contiguous(up[t]))
    else:
        for t in prange(len(out)):
            silu_mul_row(contiguous(out[t]), contiguous(gate[t]), contiguous(up[t]))


@inner
def add_row(out, x, y):
    for i in range(x.size):
        out[i] = x[i] + y[i]


@kernel(parallel=True)
def add(out, x, y):
    if len(out) <= SERIAL_ROWS:
        for t in range(len(out)):
            add_row(contiguous(out[t]), contiguous(x[t]), contiguous(y[t]))
    else:
        for t in prange(len(out)):
            add_row(contiguous(out[t]), contiguous(x[t]), contiguous(y[t]))
