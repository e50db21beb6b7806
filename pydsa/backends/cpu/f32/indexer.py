"""The indexer's scores in float32, for cache rows of any type."""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.gemm import tile_products
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.jobs import read_score_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import float_at, store


TILE = 64           # keys dequantized at a time


def score(job_at):
    """Run a ScoreJob: the indexer's scores."""
    job = read_score_job(job_at)
    memory = thread_scratch(job.thread, 4 * TILE * (job.width + job.n_head + 1) + 16 * job.n_head)
    factor = float_from_bits(np.uint32(job.scale))
    tile, total, tables = memory, floats_at(memory + 4 * TILE * job.width, 1, TILE)[0], memory + 4 * TILE * (job.width + job.n_head + 1)
    dots = floats_at(memory + 4 * TILE * (job.width + 1), job.n_head, TILE)
    for start in range(job.first, job.last, TILE):
        n = min(TILE, job.last - start)
        for j in range(n):
            call_block_function(job.dequantize, job.rows + (start + j) * job.row_bytes, job.row_n, tile + 4 * job.width * j)
        for t in range(job.n_tokens):
            for h in range(job.n_head):
                store(tables, 8 * h, job.q + t * job.q_token + h * job.q_head)
                store(tables, 8 * (job.n_head + h), address(dots) + 4 * TILE * h)
            dots[:] = 0
            tile_products(tile, 4 * job.width, n, tables, job.n_head, 0, job.width, tables + 8 * job.n_head, 0)
            total[:] = 0
            for h in range(job.n_head):
                weight = float_at(job.w, t * job.w_token + 4 * h)
                for j in range(n):
                    total[j] += weight * max(dots[h, j], np.float32(0))
            for j in range(n):
                store(job.out, t * job.out_token + 4 * (start + j), total[j] * factor)
