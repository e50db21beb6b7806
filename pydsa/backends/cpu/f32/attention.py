"""Flash attention in float32, for cache rows of any type.

Tiles of keys are dequantized, transposed, and pass under an online softmax; scores and values are register-blocked products.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.gemm import COLUMNS, matmul_add
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.jobs import read_attend_job
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import i64_at, store
from pydsa.backends.cpu.softmax import key_at, max_end, softmax_row


TILE = 64       # keys: 144 KiB of floats at V3.2's width of 576, within a second-level cache; a multiple of COLUMNS
WIDTH = 128     # values of keys that are multiplied at a time: 32 KiB, within a first-level cache
QUERIES = 96    # heads times tokens that share a tile of keys


def attend(job_at):
    """Run an AttendJob: attention of all its queries."""
    job = read_attend_job(job_at)
    n, scale = job.n_tokens * job.n_head, float_from_bits(np.uint32(job.scale))
    padded = (job.width + COLUMNS - 1) // COLUMNS * COLUMNS
    n_sums = (job.n_v + COLUMNS - 1) // COLUMNS * COLUMNS
    memory = thread_scratch(job.thread, 4 * (2 * TILE * padded + n * TILE + n * n_sums + 2 * n))
    tile, transposed = floats_at(memory, TILE, padded), floats_at(memory + 4 * TILE * padded, padded, TILE)
    scores, sums = floats_at(memory + 8 * TILE * padded, n, TILE), floats_at(memory + 4 * TILE * (2 * padded + n), n, n_sums)
    sums[:] = 0
    row_max, row_sum = floats_at(memory + 4 * (2 * TILE * padded + n * TILE + n * n_sums), 2, n)
    row_max[:], row_sum[:] = -np.inf, 0
    end = max_end(job.key_ends, job.n_tokens)
    for first in range(job.key_start, end, TILE):
        n_valid = min(TILE, end - first)
        for j in range(n_valid):
            call_block_function(job.dequantize, job.rows + key_at(job.indices, first + j) * job.row_bytes, job.row_n, address(tile[j]))
        for j in range(0, n_valid, 16):
            for k in range(0, job.width, 16):
                transpose(address(tile[j]) + 4 * k, 4 * padded, address(transposed[k]) + 4 * j, 4 * TILE)
        scores[:] = 0
        for k in range(0, job.width, WIDTH):
            block_width = min(WIDTH, job.width - k)
            matmul_add(address(scores), 4 * TILE, n, TILE, job.q + 4 * k, job.q_head, address(transposed[k]), 4 * TILE, block_width)
        for i in range(n):
            t = i // job.n_head
            bias = job.mask + t * job.mask_row + 4 * first if job.mask else 0
            n_visible = min(n_valid, i64_at(job.key_ends, 8 * t) - first)
            rescale = softmax_row(scores[i], n_visible, bias, scale, row_max[i:i + 1], row_sum[i:i + 1])
            if rescale != 1:
                row = sums[i]
                for j in range(n_sums):
                    row[j] *= rescale
        matmul_add(address(sums), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, address(tile), 4 * padded, n_valid)
    for i in range(n):
        source = sums[i]
        if job.partial:
            store(job.partial, 4 * i * (2 + job.n_v), row_max[i])
            store(job.partial, 4 * i * (2 + job.n_v) + 4, row_sum[i])
            row, factor = floats_at(job.partial + 4 * i * (2 + job.n_v) + 8, 1, job.n_v)[0], np.float32(1)
        else:
            row = floats_at(job.out + i // job.n_head * job.out_token + i % job.n_head * job.out_head, 1, job.n_v)[0]
            factor = np.float32(1) / row_sum[i] if row_sum[i] != 0 else np.float32(0)
        for j in range(job.n_v):
            row[j] = source[j] * factor
