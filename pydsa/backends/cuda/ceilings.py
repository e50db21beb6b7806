"""Measured ceilings of the GPU: memory bandwidth and peak arithmetic rates.

Bandwidth is that of a copy in device memory. Rates are those of the products that the ops are made of, from registers.
"""
import functools
import time
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import empty, zeros
from pydsa.backends.cuda.current import gpu
from pydsa.backends.cuda.device import SIMULATED, device, dp4a, mma_f16
from pydsa.backends.cuda.launch import kernel


N_BYTES = 1 << 30       # bytes that are copied, or a quarter of the free memory if that is less
BLOCKS, THREADS = 132 * 8, 256
PASSES = 5


class Ceilings(NamedTuple):
    """The measured ceilings."""
    bandwidth: float    # bytes per second, read and written
    peaks: dict         # number format, as product_format() names it -> operations per second; a multiply-add counts as two


@kernel("u8[::1], u8[::1]", THREADS)
def copy_words(out, x):
    """Copy x to out, eight bytes per thread with a grid stride."""
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        out[i] = x[i]


@device
def four_more(a, b, p, q, r, s):
    """One mma.m16n8k16 into each of four accumulator fragments."""
    p = mma_f16(a, a, a, a, b, b, p[0], p[1], p[2], p[3])
    q = mma_f16(a, a, a, a, b, b, q[0], q[1], q[2], q[3])
    r = mma_f16(a, a, a, a, b, b, r[0], r[1], r[2], r[3])
    s = mma_f16(a, a, a, a, b, b, s[0], s[1], s[2], s[3])
    return p, q, r, s


@kernel("f4[::1], i4", THREADS)
def tile_products(out, repeats):
    """mma.m16n8k16 on float16, four independent accumulators per warp."""
    a, b = np.uint32(cuda.threadIdx.x * 40503) & np.uint32(0x0FFF0FFF), np.uint32(cuda.threadIdx.x * 9973) & np.uint32(0x0FFF0FFF)
    zero = (np.float32(0), np.float32(0), np.float32(0), np.float32(0))
    p, q, r, s = zero, zero, zero, zero
    for _ in range(repeats):
        p, q, r, s = four_more(a, b, p, q, r, s)
    out[cuda.grid(1)] = p[0] + q[1] + r[2] + s[3]


@kernel("i4[::1], i4", THREADS)
def byte_dots(out, repeats):
    """dp4a, four independent accumulators per thread."""
    a, b = np.uint32(cuda.threadIdx.x * 40503), np.uint32(cuda.threadIdx.x * 9973)
    c, e, f, g = np.int32(0), np.int32(1), np.int32(2), np.int32(3)
    for _ in range(repeats):
        c, e, f, g = dp4a(a, b, c), dp4a(a, b, e), dp4a(a, b, f), dp4a(a, b, g)
    out[cuda.grid(1)] = c + e + f + g


@kernel("f4[::1], i4", THREADS)
def float_products(out, repeats):
    """float32 multiply-adds, four independent accumulators per thread."""
    a, b = np.float32(1) + np.float32(cuda.threadIdx.x) / np.float32(65536), np.float32(1) / np.float32(cuda.threadIdx.x + 1)
    c, e, f, g = np.float32(0), np.float32(1), np.float32(2), np.float32(3)
    for _ in range(repeats):
        c, e, f, g = a * c + b, a * e + b, a * f + b, a * g + b
    out[cuda.grid(1)] = c + e + f + g


# number format -> kernel, dtype of its output, repetitions, operations per thread in each.
# Activations are split in two parts and take two products, hence the last division by 2.
PEAKS = {"f16x2": (tile_products, np.float32, 512, 4 * 2 * 16 * 8 * 16 / 32 / 2),
         "int8x2": (byte_dots, np.int32, 4096, 4 * 2 * 4 / 2),
         "f32": (float_products, np.float32, 8192, 4 * 2)}
CACHE_OPS = ("dense_attention", "masked_attention", "sparse_attention", "indexer_scores", "indexer_select")


def product_format(op, quantized, n_tokens):
    """The number format of an op, for n_tokens and quantized weights or not."""
    if not quantized or op in CACHE_OPS:
        return "f32"
    return "f16x2" if n_tokens > 1 else "int8x2"


def measure_ceilings(n_threads):
    """Measure the Ceilings of this GPU, whatever n_threads.

    None in the simulator.
    """
    if SIMULATED:
        return None
    n_words = min(N_BYTES, gpu.memory()[0] // 4) // 8
    source, target = zeros((n_words,), np.uint64), empty((n_words,), np.uint64)
    bandwidth = 2 * source.nbytes / _best_seconds(functools.partial(copy_words, BLOCKS, target, source))
    peaks = {}
    for kind, (function, dtype, repeats, operations) in PEAKS.items():
        sums = zeros((BLOCKS * THREADS,), dtype)
        peaks[kind] = BLOCKS * THREADS * repeats * operations / _best_seconds(functools.partial(function, BLOCKS, sums, repeats))
    return Ceilings(bandwidth, peaks)


def _best_seconds(launch):
    """The shortest time of PASSES launches, after one that compiles."""
    launch()
    gpu.synchronize()
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        launch()
        gpu.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
