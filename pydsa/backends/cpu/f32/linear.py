"""Matrix products with unquantized weights, for any number of tokens.

Rows are dequantized to float32, a tile at a time.
"""
import numpy as np

from pydsa.backends.cpu.arrays import floats_at
from pydsa.backends.cpu.f32.gemm import tile_products
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.jobs import read_matmul_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.simd import i64_at, store


TILE_ROWS, TILE_WIDTH = 4, 256        # a tile, 4 KiB of floats


def pack(x_at, first, n_tokens, n_in, out):
    """Copy tokens `first` to first + 16 of n_tokens to contiguous memory.

    x_at holds the addresses of rows of n_in floats.
    """
    for t in range(first, min(first + 16, n_tokens)):
        row, source = floats_at(out + 4 * n_in * t, 1, n_in)[0], floats_at(i64_at(x_at, 8 * t), 1, n_in)[0]
        for k in range(n_in):
            row[k] = source[k]


def matmul(job_at):
    """Run a MatmulJob: rows of weights times packed tokens."""
    job = read_matmul_job(job_at)
    memory = thread_scratch(job.thread, 4 * TILE_ROWS * TILE_WIDTH + 8 * job.n_tokens)
    tile, x_at = memory, memory + 4 * TILE_ROWS * TILE_WIDTH
    for t in range(job.n_tokens):
        store(x_at, 8 * t, job.x + 4 * job.n_in * (job.first + t))
    for t in range(job.n_tokens):
        for r in range(job.n_rows):
            store(i64_at(job.out_at, 8 * t), 4 * r, np.float32(0))
    for r in range(0, job.n_rows, TILE_ROWS):
        n = min(TILE_ROWS, job.n_rows - r)
        for k in range(0, job.n_in, TILE_WIDTH):
            width = min(TILE_WIDTH, job.n_in - k)
            for i in range(n):
                source = job.rows + (r + i) * job.row_bytes + k // job.block * job.block_bytes
                call_block_function(job.unpack, source, width // job.block, tile + 4 * TILE_WIDTH * i)
            tile_products(tile, 4 * TILE_WIDTH, n, x_at, job.n_tokens, 4 * k, width, job.out_at, 4 * r)
