"""Flash attention in float32, for cache rows of any type.

Tiles of keys are dequantized, transposed, and pass under an online softmax; scores and values are register-blocked products. A token of few
heads multiplies keys as they lie instead: to transpose them would take as long as a half of its products.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.gemm import COLUMNS, matmul_add, tile_products
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.jobs import read_attend_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.softmax import key_at, max_end, softmax_row
from pydsa.backends.cpu.team.coming import fetch
from pydsa.backends.cpu.vectors.lanes import transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import i64_at, prefetch, store


TILE = 64       # keys: 144 KiB of floats at V3.2's width of 576, within a second-level cache; a multiple of COLUMNS
WIDTH = 128     # values of keys that are multiplied at a time: 32 KiB, within a first-level cache
QUERIES = 96    # heads times tokens that share a tile of keys
KEYS = 4        # keys that a token of few heads multiplies at a time
KEYS_AHEAD = 8  # prefetch distance in keys: in a step of many conversations all are in memory


@inner
def prefetch_key(job, i, end):
    """Prefetch a key's row, if it is one before `end`.

    Keys that many tokens share are left to the hardware, as they are in caches after the first tile of queries.
    """
    if i < end and (job.few or job.indices):
        row = job.rows + key_at(job.indices, i) * job.row_bytes
        for line in range(0, job.row_bytes, 64):
            prefetch(row, line)


@inner
def dequantize_keys(job, first, n, end, tile, row_bytes):
    """Dequantize n keys, from `first` on, to rows of a tile, an address.

    Those KEYS_AHEAD further are prefetched, up to `end`.
    """
    for i in range(first, first + n):
        prefetch_key(job, i + KEYS_AHEAD, end)
        call_block_function(job.dequantize, job.rows + key_at(job.indices, i) * job.row_bytes, job.row_n, tile + (i - first) * row_bytes)


@inner
def score_by_keys(job, first, n, end, tile, row_bytes, scores, tables):
    """Compute a token's scores of n keys of a tile, some keys at a time.

    Of the last ones there may be too many scores. tables: memory of 16 bytes a query.
    """
    for i in range(job.n_head):
        store(tables, 8 * i, job.q + i * job.q_head)
        store(tables, 8 * (job.n_head + i), scores + 4 * TILE * i)
    for j in range(0, n, KEYS):
        dequantize_keys(job, first + j, min(KEYS, n - j), end, tile + j * row_bytes, row_bytes)
        fetch_some(job, first + j - job.key_start, end - job.key_start)
        tile_products(tile + j * row_bytes, row_bytes, KEYS, tables, job.n_head, 0, job.width, tables + 8 * job.n_head, 4 * j)


@inner
def score_transposed(job, first, n, end, tile, row_bytes, scores, transposed):
    """Compute all queries' scores of n keys of a tile, transposed to memory."""
    for j in range(0, n, KEYS):
        dequantize_keys(job, first + j, min(KEYS, n - j), end, tile + j * row_bytes, row_bytes)
        fetch_some(job, first + j - job.key_start, end - job.key_start)
    for j in range(0, n, 16):
        for k in range(0, job.width, 16):
            transpose(tile + j * row_bytes + 4 * k, row_bytes, transposed + 4 * (k * TILE + j), 4 * TILE)
    for k in range(0, job.width, WIDTH):
        matmul_add(scores, 4 * TILE, job.n_tokens * job.n_head, TILE, job.q + 4 * k, job.q_head, transposed + 4 * TILE * k, 4 * TILE,
                   min(WIDTH, job.width - k))


@inner
def fetch_some(job, key, n_keys):
    """Fetch some of what comes next (coming.py), for KEYS keys of n_keys."""
    if job.coming_bytes:
        start, end = job.coming_bytes * key // n_keys // 64 * 64, job.coming_bytes * min(n_keys, key + KEYS) // n_keys // 64 * 64
        fetch(job.coming, job.coming_first + start, end - start)


def attend(job_at):
    """Run an AttendJob: attention of all its queries."""
    job = read_attend_job(job_at)
    n, scale = job.n_tokens * job.n_head, float_from_bits(np.uint32(job.scale))
    padded = (job.width + COLUMNS - 1) // COLUMNS * COLUMNS
    n_sums = (job.n_v + COLUMNS - 1) // COLUMNS * COLUMNS
    memory = thread_scratch(job.thread, 4 * (2 * TILE * padded + n * TILE + n * n_sums + 2 * n) + 16 * n)
    tile, transposed = memory, memory + 4 * TILE * padded
    scores, sums = floats_at(memory + 8 * TILE * padded, n, TILE), floats_at(memory + 4 * TILE * (2 * padded + n), n, n_sums)
    sums[:] = 0
    statistics = memory + 4 * (2 * TILE * padded + n * TILE + n * n_sums)
    row_max, row_sum = floats_at(statistics, 2, n)
    row_max[:], row_sum[:] = -np.inf, 0
    end = max_end(job.key_ends, job.n_tokens)
    for i in range(KEYS_AHEAD):
        prefetch_key(job, job.key_start + i, end)
    for first in range(job.key_start, end, TILE):
        n_valid = min(TILE, end - first)
        scores[:] = 0
        if job.few:
            score_by_keys(job, first, n_valid, end, tile, 4 * padded, address(scores), statistics + 8 * n)
        else:
            score_transposed(job, first, n_valid, end, tile, 4 * padded, address(scores), transposed)
        for i in range(n):
            t = i // job.n_head
            bias = job.mask + t * job.mask_row + 4 * first if job.mask else 0
            n_visible = min(n_valid, i64_at(job.key_ends, 8 * t) - first)
            rescale = softmax_row(scores[i], n_visible, bias, scale, row_max[i:i + 1], row_sum[i:i + 1])
            if rescale != 1:
                row = sums[i]
                for j in range(n_sums):
                    row[j] *= rescale
        matmul_add(address(sums), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, tile, 4 * padded, n_valid)
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
