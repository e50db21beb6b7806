"""Norms, one row per block, and elementwise ops."""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.block_sums import block_sum
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, exp
from pydsa.backends.cuda.intrinsics.division import divide
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


THREADS = 8 if SIMULATED else 256


@device
def rms_norm_row(out, x, w, eps, t, parts, thread, n_threads):
    """Row t of rms_norm, by one block.

    parts: shared memory with one float32 per warp.
    """
    total = np.float32(0)
    for i in range(thread, x.shape[1], n_threads):
        total += x[t, i] * x[t, i]
    total = block_sum(total, parts, thread, n_threads)
    factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(x.shape[1]) + eps))
    for i in range(thread, x.shape[1], n_threads):
        out[t, i] = x[t, i] * factor * w[i]


@device
def layer_norm_row(out, x, w, b, eps, t, parts, thread, n_threads):
    """Row t of layer_norm, by one block, as rms_norm_row."""
    n = np.float32(x.shape[1])
    total = np.float32(0)
    for i in range(thread, x.shape[1], n_threads):
        total += x[t, i]
    mean = block_sum(total, parts, thread, n_threads) / n
    total = np.float32(0)
    for i in range(thread, x.shape[1], n_threads):
        total += (x[t, i] - mean) * (x[t, i] - mean)
    factor = np.float32(1) / np.float32(math.sqrt(block_sum(total, parts, thread, n_threads) / n + eps))
    for i in range(thread, x.shape[1], n_threads):
        out[t, i] = (x[t, i] - mean) * factor * w[i] + b[i]


@kernel("f4[:,:], f4[:,:], f4[:], f4", THREADS)
def rms_norm_rows(out, x, w, eps):
    """out = w x / sqrt(mean(x^2) + eps). One row per block."""
    rms_norm_row(out, x, w, eps, cuda.blockIdx.x, cuda.shared.array(32, np.float32), cuda.threadIdx.x, THREADS)


@kernel("f4[:,:], f4[:,:], f4[:], f4[:], f4", THREADS)
def layer_norm_rows(out, x, w, b, eps):
    """out = w (x - mean) / sqrt(var + eps) + b. One row per block."""
    layer_norm_row(out, x, w, b, eps, cuda.blockIdx.x, cuda.shared.array(32, np.float32), cuda.threadIdx.x, THREADS)


@device
def silu_times(gate, up):
    """SiLU times up: gate sigmoid(gate) up."""
    return divide(gate, np.float32(1) + exp(-gate)) * up


@kernel("f4[:,:], f4[:,:], f4[:,:]", THREADS)
def silu_mul_rows(out, gate, up):
    """out = gate sigmoid(gate) up. One value per thread."""
    t, i = cuda.blockIdx.y, cuda.grid(1)
    if i < out.shape[1]:
        out[t, i] = silu_times(gate[t, i], up[t, i])


@kernel("f4[:,:], f4[:,:], f4[:,:]", THREADS)
def add_rows(out, x, y):
    """out = x + y. One value per thread."""
    t, i = cuda.blockIdx.y, cuda.grid(1)
    if i < out.shape[1]:
        out[t, i] = x[t, i] + y[t, i]


@kernel("f4[:,:,:], f4[:,:,:], f4", THREADS)
def scale_values(out, x, factor):
    """out = factor x. One value per thread."""
    t, i, n = cuda.blockIdx.y, cuda.grid(1), x.shape[2]
    if i < x.shape[1] * n:
        out[t, i // n, i % n] = factor * x[t, i // n, i % n]


@kernel("f4[:,:,:], f4[:,:,:], i4[:,:], f4[:]", THREADS)
def scale_of_experts(out, x, ids, factors):
    """out[t, i] = factors[ids[t, i]] x[t, i]. One value per thread."""
    t, i, n = cuda.blockIdx.y, cuda.grid(1), x.shape[2]
    if i < x.shape[1] * n:
        out[t, i // n, i % n] = factors[ids[t, i // n]] * x[t, i // n, i % n]


def rms_norm(out, x, w, eps):
    """out = w x / sqrt(mean(x^2) + eps)."""
    rms_norm_rows(out.shape[0], out, x, w, eps)


def layer_norm(out, x, w, b, eps):
    """out = w (x - mean) / sqrt(var + eps) + b."""
    layer_norm_rows(out.shape[0], out, x, w, b, eps)


def scale(out, x, factor):
    """out = factor x."""
    scale_values((blocks_for(out.shape[1] * out.shape[2], THREADS), out.shape[0]), out, x, factor)


def expert_scale(out, x, ids, factors):
    """out[t, i] = factors[ids[t, i]] x[t, i]."""
    scale_of_experts((blocks_for(out.shape[1] * out.shape[2], THREADS), out.shape[0]), out, x, ids, factors)


def silu_mul(out, gate, up):
    """out = gate sigmoid(gate) up."""
    silu_mul_rows((blocks_for(out.shape[1], THREADS), out.shape[0]), out, gate, up)


def add(out, x, y):
    """out = x + y."""
    add_rows((blocks_for(out.shape[1], THREADS), out.shape[0]), out, x, y)
