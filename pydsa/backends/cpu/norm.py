"""Norms and the elementwise ops."""
import numpy as np

from pydsa.backends.cpu.microkernels import exp
from pydsa.jit import kernel


@kernel
def rms_norm(out, x, w, eps):
    n = x.shape[1]
    for t in range(x.shape[0]):
        squares = np.float32(0)
        for i in range(n):
            squares += x[t, i] * x[t, i]
        scale = np.float32(1 / np.sqrt(squares / n + eps))
        for i in range(n):
            out[t, i] = x[t, i] * scale * w[i]


@kernel
def layer_norm(out, x, w, b, eps):
    n = x.shape[1]
    for t in range(x.shape[0]):
        mean, squares = np.float32(0), np.float32(0)
        for i in range(n):
            mean += x[t, i]
        mean /= np.float32(n)
        for i in range(n):
            squares += (x[t, i] - mean) * (x[t, i] - mean)
        scale = np.float32(1 / np.sqrt(squares / n + eps))
        for i in range(n):
            out[t, i] = (x[t, i] - mean) * scale * w[i] + b[i]


@kernel
def silu_mul(out, gate, up):
    for t in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[t, i] = gate[t, i] / (np.float32(1) + exp(-gate[t, i])) * up[t, i]


@kernel
def add(out, x, y):
    for t in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[t, i] = x[t, i] + y[t, i]
