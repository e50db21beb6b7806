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
def scale_row(out, x, factor):
    for i in range(x.size):
        out[i] = factor * x[i]


@kernel(parallel=True)
def scale(out, x, factor):
    n_head = x.shape[1]
    if len(x) <= SERIAL_ROWS:
        for row in range(len(x) * n_head):
            scale_row(contiguous(out[row // n_head, row % n_head]), contiguous(x[row // n_head, row % n_head]), np.float32(factor))
    else:
        for row in prange(len(x) * n_head):
            scale_row(contiguous(out[row // n_head, row % n_head]), contiguous(x[row // n_head, row % n_head]), np.float32(factor))


@kernel(parallel=True)
def expert_scale(out, x, ids, factors):
    n_used = ids.shape[1]
    if len(x) <= SERIAL_ROWS:
        for pair in range(ids.size):
            t, i = pair // n_used, pair % n_used
            scale_row(contiguous(out[t, i]), contiguous(x[t, i]), factors[ids[t, i]])
    else:
        for pair in prange(ids.size):
            t, i = pair // n_used, pair % n_used
            scale_row(contiguous(out[t, i]), contiguous(x[t, i]), factors[ids[t, i]])


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
