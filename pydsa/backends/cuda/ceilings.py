"""Measured ceilings of the GPU: memory bandwidth and peak arithmetic rates.

Bandwidth is that of reads of device memory, 16 bytes at a time, eight under way in a thread: a token's step does little but read. A copy
of the same memory is slower by a tenth, and one of 8 bytes at a time, one under way, by a third (H200). Rates are those of the products
that the ops are made of, from registers. All times are those of events on the GPU, without what a launch costs the host.
"""
import functools
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, dp4a, mma_f16
from pydsa.backends.cuda.intrinsics.instructions import stream_sixteen
from pydsa.backends.cuda.runtime.array import empty, zeros
from pydsa.backends.cuda.runtime.current import gpu, precision
from pydsa.backends.cuda.runtime.launch import kernel
from pydsa.options import EXACT


N_BYTES = 1 << 30       # bytes that are read, or a quarter of the free memory if that is less
READERS, READ_BLOCKS, UNDER_WAY = 512, 264, 8       # threads of a block, blocks, and loads of 16 bytes that a thread has under way
BLOCKS, THREADS = 132 * 8, 256
PASSES = 5


class Ceilings(NamedTuple):
    """The measured ceilings."""
    bandwidth: float    # bytes per second that are read
    peaks: dict         # number format, as product_format() names it -> operations per second; a multiply-add counts as two


@device
def folded(piece):
    """The exclusive or of four words."""
    return piece[0] ^ piece[1] ^ piece[2] ^ piece[3]


@kernel("u4[::1], u1[::1], i4", READERS)
def read_pieces(out, x, rounds):
    """out[thread] = the exclusive or of all words of x that a thread reads.

    In each round all threads read UNDER_WAY pieces of 16 bytes each.
    """
    thread, n_threads, total = cuda.grid(1), cuda.gridsize(1), np.uint32(0)
    for r in range(rounds):
        first = 16 * (np.int64(r) * UNDER_WAY * n_threads + thread)
        a = stream_sixteen(x, first)
        b = stream_sixteen(x, first + 16 * n_threads)
        c = stream_sixteen(x, first + 32 * n_threads)
        d = stream_sixteen(x, first + 48 * n_threads)
        e = stream_sixteen(x, first + 64 * n_threads)
        f = stream_sixteen(x, first + 80 * n_threads)
        g = stream_sixteen(x, first + 96 * n_threads)
        h = stream_sixteen(x, first + 112 * n_threads)
        total ^= folded(a) ^ folded(b) ^ folded(c) ^ folded(d) ^ folded(e) ^ folded(f) ^ folded(g) ^ folded(h)
    out[thread] = total


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
# Activations of two parts take two products, hence the last division by 2.
PEAKS = {"f16": (tile_products, np.float32, 512, 4 * 2 * 16 * 8 * 16 / 32),
         "f16x2": (tile_products, np.float32, 512, 4 * 2 * 16 * 8 * 16 / 32 / 2),
         "int8x2": (byte_dots, np.int32, 4096, 4 * 2 * 4 / 2),
         "f32": (float_products, np.float32, 8192, 4 * 2)}
CACHE_OPS = ("dense_attention", "masked_attention", "sparse_attention", "indexer_scores", "indexer_select")


def product_format(op, quantized, n_tokens):
    """The number format of an op, for n_tokens and quantized weights or not.

    It is that of the thread's precision.
    """
    if not quantized or op in CACHE_OPS:
        return "f32"
    return "int8x2" if n_tokens == 1 else "f16x2" if precision() == EXACT else "f16"


def measure_ceilings(n_threads):
    """Measure the Ceilings of this GPU, whatever n_threads.

    None in the simulator.
    """
    if SIMULATED:
        return None
    bandwidth, peaks = _bandwidth(min(N_BYTES, gpu.memory()[0] // 4)), {}
    for kind, (function, dtype, repeats, operations) in PEAKS.items():
        sums = zeros((BLOCKS * THREADS,), dtype)
        peaks[kind] = BLOCKS * THREADS * repeats * operations / _best_seconds(functools.partial(function, BLOCKS, sums, repeats))
    return Ceilings(bandwidth, peaks)


def _bandwidth(n_bytes):
    """Bytes per second of reads of n_bytes, in whole rounds, at least one."""
    n_threads = READ_BLOCKS * READERS
    rounds = max(1, n_bytes // (16 * UNDER_WAY * n_threads))
    memory, words = zeros((16 * UNDER_WAY * n_threads * rounds,), np.uint8), empty((n_threads,), np.uint32)
    return memory.nbytes / _best_seconds(functools.partial(read_pieces, READ_BLOCKS, words, memory, rounds))


def _best_seconds(launch):
    """The shortest time of PASSES launches, after one that compiles."""
    launch()
    return min(gpu.time_each([launch] * PASSES))
