"""The indexer's scores in AMX tiles (amx.py).

Sums over heads are computed as the tiles are read: heads x keys for many tokens, keys x heads for few. The right operand must be
transposed: for many tokens the keys are, once for all tokens; for few tokens the queries are.
"""
import numpy as np

from pydsa.backends.cpu.bf16x2.gemm import panel_products
from pydsa.backends.cpu.bf16x2.panels import store_bf16x2
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.jobs import read_score_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.amx import LOW_PARTS, STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.vectors.lanes import relu, row_sums, transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import float_at, floats, load_floats, multiply_add, prefetch, store


KEYS = 256          # packed at a time: 128 KiB with 128 values each
KEYS_AHEAD = 32     # prefetch distance, in keys
PANELS = 16         # of 16 heads each, of as many tokens as fit: their sums with KEYS keys take 256 KiB


@inner
def pack_row(source, row, width, n_steps, panel):
    """Pack `width` floats as a row of a panel, padded with zeros.

    `row` is scratch for one step of floats.
    """
    for s in range(n_steps):
        at = source + 128 * s
        if 32 * s + 32 > width:
            for k in range(32):
                store(row, 4 * k, float_at(at, 4 * k) if 32 * s + k < width else np.float32(0))
            at = row
        store_bf16x2(panel + STEP * s, load_floats(at, 0), load_floats(at, 64))


def score(job_at):
    """Run a ScoreJob: the indexer's scores."""
    job = read_score_job(job_at)
    factor = float_from_bits(np.uint32(job.scale))
    n_steps, head_panels = (job.width + 31) // 32, (job.n_head + 15) // 16
    batch = max(1, PANELS // head_panels)       # tokens
    panel_bytes = n_steps * STEP
    sums_bytes = batch * head_panels * KEYS // 16 * TILE_BYTES
    queries = thread_scratch(job.thread, (batch * head_panels + KEYS // 16) * panel_bytes + sums_bytes + 4 * job.width + 256)
    keys = queries + batch * head_panels * panel_bytes
    sums = keys + KEYS // 16 * panel_bytes
    row = sums + sums_bytes
    key = row + 128
    configure()
    for start in range(job.first, job.last, KEYS):
        n_panels = (min(KEYS, job.last - start) + 15) // 16
        for i in range(16 * n_panels):
            s = min(start + i, job.last - 1)
            call_block_function(job.dequantize, job.rows + s * job.row_bytes, job.row_n, key)
            pack_row(key, row, job.width, n_steps, keys + i // 16 * panel_bytes + 64 * (i % 16))
        for i in range(n_panels * n_steps):
            for part in (0, LOW_PARTS):
                transpose(keys + i * STEP + part, 64, keys + i * STEP + part, 64)
        for t0 in range(0, job.n_tokens, batch):
            n = min(batch, job.n_tokens - t0)
            for i in range(16 * n * head_panels):
                t, h = t0 + i // (16 * head_panels), min(i % (16 * head_panels), job.n_head - 1)
                pack_row(job.q + t * job.q_token + h * job.q_head, row, job.width, n_steps, queries + i // 16 * panel_bytes + 64 * (i % 16))
            panel_products(queries, panel_bytes, n * head_panels, keys, panel_bytes, n_panels, n_steps, sums, True, keys)
            for t in range(n):
                for j in range(n_panels):
                    total = floats(np.float32(0))
                    for h in range(job.n_head):
                        dots = load_floats(sums, ((t * head_panels + h // 16) * n_panels + j) * TILE_BYTES + 64 * (h % 16))
                        total = multiply_add(total, relu(dots), floats(float_at(job.w, (t0 + t) * job.w_token + 4 * h)))
                    store(job.out, (t0 + t) * job.out_token + 4 * (start + 16 * j), total * factor)
    release()


def score_gemv(job_at):
    """Run a ScoreJob of few tokens.

    Packing keys costs the most here, so keys are only split; the queries are transposed.
    """
    job = read_score_job(job_at)
    factor = float_from_bits(np.uint32(job.scale))
    n_steps, head_panels = (job.width + 31) // 32, (job.n_head + 15) // 16
    panel_bytes = n_steps * STEP
    queries = thread_scratch(
        job.thread, (head_panels + KEYS // 16) * panel_bytes + head_panels * (KEYS // 16 * TILE_BYTES + 64) + 4 * job.width + 256)
    keys = queries + head_panels * panel_bytes
    sums = keys + KEYS // 16 * panel_bytes
    weights = sums + head_panels * KEYS // 16 * TILE_BYTES
    row = weights + 64 * head_panels
    key = row + 128
    configure()
    for t in range(job.n_tokens):
        for h in range(16 * head_panels):
            query = job.q + t * job.q_token + min(h, job.n_head - 1) * job.q_head
            pack_row(query, row, job.width, n_steps, queries + h // 16 * panel_bytes + 64 * (h % 16))
            store(weights, 4 * h, float_at(job.w, t * job.w_token + 4 * h) if h < job.n_head else np.float32(0))
        for i in range(head_panels * n_steps):
            for part in (0, LOW_PARTS):
                transpose(queries + i * STEP + part, 64, queries + i * STEP + part, 64)
        for start in range(job.first, job.last, KEYS):
            n_panels = (min(KEYS, job.last - start) + 15) // 16
            for i in range(16 * n_panels):
                source = job.rows + min(start + i, job.last - 1) * job.row_bytes
                for line in range(0, job.row_bytes, 64):
                    prefetch(source + KEYS_AHEAD * job.row_bytes, line)
                call_block_function(job.dequantize, source, job.row_n, key)
                pack_row(key, row, job.width, n_steps, keys + i // 16 * panel_bytes + 64 * (i % 16))
            panel_products(keys, panel_bytes, n_panels, queries, panel_bytes, head_panels, n_steps, sums, True, keys)
            for i in range(n_panels):
                cell = sums + i * head_panels * TILE_BYTES
                for k in range(16):
                    total = relu(load_floats(cell, 64 * k)) * load_floats(weights, 0)
                    for j in range(1, head_panels):
                        total = multiply_add(total, relu(load_floats(cell, j * TILE_BYTES + 64 * k)), load_floats(weights, 64 * j))
                    store(cell, 64 * k, total)
                store(job.out, t * job.out_token + 4 * (start + 16 * i), row_sums(cell) * factor)
    release()
