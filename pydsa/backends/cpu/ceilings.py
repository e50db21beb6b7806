"""Measured limits of this machine: memory bandwidth and peak throughput.

Bytes a second from memory, and operations a second on data in the first-level cache.
"""
import time
from typing import NamedTuple

import numba
import numpy as np
import psutil
from numba import prange

from pydsa.backends.cpu import amx
from pydsa.backends.cpu.amx import STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.bf16x2.gemm import panel_products
from pydsa.backends.cpu.blocks.block import SUPERBLOCK
from pydsa.backends.cpu.f32.gemm import tile_products
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8x2
from pydsa.backends.cpu.int16.gemm import TILE, TILE_ROWS, int16_products
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.linear import GEMV_TOKENS, addresses
from pydsa.backends.cpu.simd import INT16_TOKENS


N_BYTES = 1 << 29       # of the array that is read: beyond most caches, though not all (480 MiB are seen on servers)
BLOCK = 1 << 17         # uint64 that a thread reads at a time
PASSES = 10             # the shortest counts
ROWS, VECTORS, WIDTH = 4, 8, 512        # 24 KiB of floats
PANEL = 8 * STEP        # 16 rows of 256 pairs of bfloat16
REPEATS = 20_000        # of the products of ROWS with VECTORS: 8 ms at 80 GFLOP/s


class Ceilings(NamedTuple):
    """Limits for the number of threads that was set when they were measured."""
    bandwidth: float    # bytes a second
    peaks: dict         # number format, as product_format() names it -> operations a second; a multiply-add is two


@kernel(parallel=True)
def fill(values):
    """Write each block by the thread that will read it.

    The system places memory near the thread that writes it first.
    """
    for i in prange(values.size // BLOCK):
        values[i * BLOCK:(i + 1) * BLOCK] = i


@kernel(parallel=True)
def read(sums, values):
    """Compute sums[i] = the sum of block i.

    The compiler cannot leave out such a read.
    """
    for i in prange(sums.size):
        sums[i] = block_sum(values[i * BLOCK:(i + 1) * BLOCK])


@inner
def block_sum(block):
    """Sum a slice, in a loop that is vectorised.

    A loop that indexes `values` itself reads a third as fast from the second-level cache.
    """
    total = np.uint64(0)
    for j in range(block.size):
        total += block[j]
    return total


@kernel(parallel=True)
def f32_peak(sums, repeats):
    """Run tile_products `repeats` times on each of sums.size threads.

    Returns the number of operations.
    """
    for i in prange(sums.size):
        rows, x, out = np.ones((ROWS, WIDTH), np.float32), np.ones((VECTORS, WIDTH), np.float32), np.zeros((VECTORS, ROWS), np.float32)
        x_at, out_at = addresses(address(x), 4 * WIDTH, VECTORS), addresses(address(out), 4 * ROWS, VECTORS)
        for _ in range(repeats):
            tile_products(address(rows), 4 * WIDTH, ROWS, address(x_at), VECTORS, 0, WIDTH, address(out_at), 0)
        sums[i] = out.sum() * x[0, 0]       # 1: x must live until here, since only its address is used above
    return sums.size * repeats * 2 * ROWS * VECTORS * WIDTH


@kernel(parallel=True)
def int16_peak(sums, repeats):
    """Run int16_products `repeats` times on each of sums.size threads.

    Returns the number of operations.
    """
    for i in prange(sums.size):
        tiles, x = np.zeros(TILE_ROWS // 16 * TILE + 64, np.uint8), np.zeros((INT16_TOKENS, SUPERBLOCK), np.uint8)
        out, at = np.zeros((INT16_TOKENS, TILE_ROWS), np.float32), (address(tiles) + 63) // 64 * 64
        x_at, out_at = addresses(address(x), SUPERBLOCK, INT16_TOKENS), addresses(address(out), 4 * TILE_ROWS, INT16_TOKENS)
        for _ in range(repeats):
            int16_products(at, 8, 0, 0, address(x_at), 0, 0, address(out_at), 0)
        sums[i] = out.sum() + x[0, 0] + tiles[0]    # they must live until here
    return sums.size * repeats * 2 * 256 * TILE_ROWS * INT16_TOKENS


@kernel(parallel=True)
def bf16x2_peak(sums, repeats):
    """Run panel_products `repeats` times on each of sums.size threads.

    The values use all bits, which costs the most. Returns the number of operations, three AMX products counting as one.
    """
    for i in prange(sums.size):
        panels = np.empty(2 * PANEL // 4 + 16, np.float32)
        for j in range(panels.size):
            panels[j] = np.float32(1) + np.float32(j * 40503 % 65536) / np.float32(65536)
        out = np.zeros(4 * TILE_BYTES // 4, np.float32)
        at = (address(panels) + 63) // 64 * 64
        configure()
        for _ in range(repeats):
            panel_products(at, PANEL, 2, at, PANEL, 2, PANEL // STEP, address(out), True, at)
        release()
        sums[i] = out.sum() + panels[0]     # they must live until here
    return sums.size * repeats * 2 * (2 * 16) * (2 * 16) * 256


@kernel(parallel=True)
def int8x2_peak(sums, repeats):
    """Run panel_products_int8x2 `repeats` times on each of sums.size threads.

    Random bytes, four panels with four. Returns the number of operations, three AMX products counting as one.
    """
    for i in prange(sums.size):
        memory = np.zeros(PANEL + 16 * TILE_BYTES + 10 * TILE_BYTES + 4 * 64 + 640, np.uint8)
        panel = (address(memory) + 63) // 64 * 64
        for j in range(PANEL):
            memory[j] = j * 40503 >> 8 & 255
        out = panel + PANEL
        buffer = out + 16 * TILE_BYTES + 320
        scales = buffer + 10 * TILE_BYTES
        configure()
        for _ in range(repeats):
            panel_products_int8x2(panel, 0, 4, panel, 0, 4, 4, out, scales, scales - panel, buffer, panel, panel, 0, 0)
        release()
        sums[i] = memory.sum()      # it must live until here
    return sums.size * repeats * 2 * (4 * 16) * (4 * 16) * 256


# number format -> kernel(sums, repeats) -> operations; sums has an element for each thread
PEAKS = {"f32": f32_peak, "int16": int16_peak}
if amx.HERE:
    PEAKS |= {"bf16x2": bf16x2_peak, "int8x2": int8x2_peak}


CACHE_OPS = ("dense_attention", "masked_attention", "sparse_attention", "indexer_scores", "indexer_select")


def product_format(op, quantized, n_tokens):
    """Name the number format that an op multiplies in, for n_tokens tokens.

    quantized: whether its weights are. Caches are of 16 bits.
    """
    if amx.HERE:
        if quantized and n_tokens > GEMV_TOKENS:
            return "int8x2"
        if op in CACHE_OPS:
            return "bf16x2"
    return "int16" if quantized else "f32"


def measure_ceilings():
    """Measure the Ceilings of the threads that set_threads() allows.

    It takes a second, and at most half of the free memory.
    """
    n_blocks = max(1, min(N_BYTES, psutil.virtual_memory().available // 2) // (8 * BLOCK))
    values, sums = np.empty(n_blocks * BLOCK, np.uint64), np.empty(n_blocks, np.uint64)
    fill(values)
    bandwidth = values.nbytes / _best_seconds(read, sums, values)
    return Ceilings(bandwidth, {kind: _rate(function) for kind, function in PEAKS.items()})


def _rate(function):
    """Measure the operations a second of a kernel of PEAKS."""
    sums = np.zeros(numba.get_num_threads(), np.float32)
    return function(sums, 1) * REPEATS / _best_seconds(function, sums, REPEATS)


def _best_seconds(function, *args):
    """Time the shortest of PASSES calls, after one that compiles."""
    function(*args)
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        function(*args)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
