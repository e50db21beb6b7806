"""Measured limits of this machine: memory bandwidth and peak throughput.

Bytes a second from memory, and operations a second on data in the first-level cache.
"""
import time
from typing import NamedTuple

import numpy as np
import psutil

from pydsa.backends.cpu.arrays import address, words_at
from pydsa.backends.cpu.bf16x2.gemm import panel_products
from pydsa.backends.cpu.blocks.block import SUPERBLOCK
from pydsa.backends.cpu.f32.gemm import tile_products
from pydsa.backends.cpu.int16.gemm import TILE, TILE_ROWS, int16_products
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8x2
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.linear import GEMV_TOKENS, put_addresses
from pydsa.backends.cpu.team.op import Stage, Step, op
from pydsa.backends.cpu.team.threads import set_threads
from pydsa.backends.cpu.vectors import amx
from pydsa.backends.cpu.vectors.amx import STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.vectors.simd import INT16_TOKENS


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


@inner
def for_each(sums, *others):
    """Begin a stage of a task for each element of sums."""
    return sums.size


@inner
def fill_block(sums, values, task):
    values[task.index * BLOCK:(task.index + 1) * BLOCK] = task.index


@op(Stage(for_each, fill_block))
def fill(sums, values):
    """Write block i of values for each sums[i], so that its pages exist."""
    return 0


@inner
def read_block(sums, values, task):
    sums[task.index] = block_sum(words_at(address(values) + 8 * BLOCK * task.index, BLOCK))


@op(Stage(for_each, read_block))
def read(sums, values):
    """Compute sums[i] = the sum of block i of values.

    The compiler cannot leave out such a read.
    """
    return 0


@inner
def block_sum(block):
    """Sum a slice, in a loop that is vectorised.

    A loop that indexes `values` itself reads a third as fast from the second-level cache.
    """
    total = np.uint64(0)
    for j in range(block.size):
        total += block[j]
    return total


@inner
def run_f32(sums, repeats, task):
    rows, x, out = np.ones((ROWS, WIDTH), np.float32), np.ones((VECTORS, WIDTH), np.float32), np.zeros((VECTORS, ROWS), np.float32)
    x_at, out_at = np.empty(VECTORS, np.int64), np.empty(VECTORS, np.int64)
    put_addresses(address(x_at), address(x), 4 * WIDTH, VECTORS)
    put_addresses(address(out_at), address(out), 4 * ROWS, VECTORS)
    for _ in range(repeats):
        tile_products(address(rows), 4 * WIDTH, ROWS, address(x_at), VECTORS, 0, WIDTH, address(out_at), 0)
    sums[task.index] = out.sum() * x[0, 0]       # 1: x must live until here, since only its address is used above


@op(Stage(for_each, run_f32))
def f32_peak(sums, repeats):
    """Run tile_products `repeats` times for each element of sums."""
    return 0


@inner
def run_int16(sums, repeats, task):
    tiles, x = np.zeros(TILE_ROWS // 16 * TILE + 64, np.uint8), np.zeros((INT16_TOKENS, SUPERBLOCK), np.uint8)
    out, at = np.zeros((INT16_TOKENS, TILE_ROWS), np.float32), (address(tiles) + 63) // 64 * 64
    x_at, out_at = np.empty(INT16_TOKENS, np.int64), np.empty(INT16_TOKENS, np.int64)
    put_addresses(address(x_at), address(x), SUPERBLOCK, INT16_TOKENS)
    put_addresses(address(out_at), address(out), 4 * TILE_ROWS, INT16_TOKENS)
    for _ in range(repeats):
        int16_products(at, 8, 0, 0, address(x_at), 0, 0, address(out_at), 0)
    sums[task.index] = out.sum() + x[0, 0] + tiles[0]    # they must live until here


@op(Stage(for_each, run_int16))
def int16_peak(sums, repeats):
    """Run int16_products `repeats` times for each element of sums."""
    return 0


@inner
def run_bf16x2(sums, repeats, task):
    panels = np.empty(2 * PANEL // 4 + 16, np.float32)
    for j in range(panels.size):
        panels[j] = np.float32(1) + np.float32(j * 40503 % 65536) / np.float32(65536)
    out = np.zeros(4 * TILE_BYTES // 4, np.float32)
    at = (address(panels) + 63) // 64 * 64
    configure()
    for _ in range(repeats):
        panel_products(at, PANEL, 2, at, PANEL, 2, PANEL // STEP, address(out), True, at)
    release()
    sums[task.index] = out.sum() + panels[0]     # they must live until here


@op(Stage(for_each, run_bf16x2))
def bf16x2_peak(sums, repeats):
    """Run panel_products `repeats` times for each element of sums.

    The values use all bits, which costs the most. Three AMX products count as one.
    """
    return 0


@inner
def run_int8x2(sums, repeats, task):
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
    sums[task.index] = memory.sum()      # it must live until here


@op(Stage(for_each, run_int8x2))
def int8x2_peak(sums, repeats):
    """Run panel_products_int8x2 `repeats` times for each element of sums.

    Random bytes, four panels with four. Three AMX products count as one.
    """
    return 0


class Peak(NamedTuple):
    """An op that runs products of one format.

    operations: how many are one product; a multiply-add is two.
    """
    op: object
    operations: int


PEAKS = {"f32": Peak(f32_peak, 2 * ROWS * VECTORS * WIDTH), "int16": Peak(int16_peak, 2 * 256 * TILE_ROWS * INT16_TOKENS)}
if amx.HERE:
    PEAKS |= {"bf16x2": Peak(bf16x2_peak, 2 * (2 * 16) * (2 * 16) * 256), "int8x2": Peak(int8x2_peak, 2 * (4 * 16) * (4 * 16) * 256)}


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


def measure_ceilings(n_threads):
    """Measure the Ceilings of n_threads, which the following steps use.

    It takes a second, and at most half of the free memory.
    """
    set_threads(n_threads)
    n_blocks = max(1, min(N_BYTES, psutil.virtual_memory().available // 2) // (8 * BLOCK))
    values, sums = np.empty(n_blocks * BLOCK, np.uint64), np.empty(n_blocks, np.uint64)
    fill(sums, values)
    bandwidth = values.nbytes / _best_seconds(read, sums, values)
    return Ceilings(bandwidth, {kind: _rate(peak, n_threads) for kind, peak in PEAKS.items()})


def _rate(peak, n_threads):
    """Measure the operations a second of a Peak."""
    return n_threads * REPEATS * peak.operations / _best_seconds(peak.op, np.zeros(n_threads, np.float32), REPEATS)


def _best_seconds(op, *args):
    """Time the shortest of PASSES steps of one op, after one that compiles."""
    step = Step([[(op, args)]])
    step.run()
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
