"""Flash attention in AMX tiles (amx.py), with bfloat16 pairs.

Keys and queries are split into bfloat16 pairs; tiles of keys pass under an online softmax. Scores are tiles of keys x queries, so that the
softmax of sixteen queries is vectorised without a sum over lanes.
"""
from typing import NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.bf16x2.gemm import panel_products
from pydsa.backends.cpu.bf16x2.panels import store_bf16x2
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.jobs import read_attend_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.softmax import (MINUS_INFINITY, exp_floats, key_at, mask_scores, max_end, min_end, or_zero, output_row,
                                        rescale_sums, set_bias, set_limits, update_statistics)
from pydsa.backends.cpu.vectors.amx import LOW_PARTS, STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.vectors.lanes import transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import constant, float_at, floats, i32x16, load_floats, pointer, prefetch, store


TILE = 128      # keys: at V3.2's width of 576, 560 KiB as keys and as values, within a second-level cache
KEY_PANELS, VALUE_STEPS = TILE // 16, TILE // 32
KEYS_AHEAD = 16       # prefetch distance for selected keys, in keys
QUERIES = 256   # heads times tokens that share a tile of keys


class Plan(NamedTuple):
    """The scratch memory of attend: counts and addresses.

    Counts are of panels, steps and tiles.
    """
    n_q: int            # panels of 16 queries
    n_steps: int        # steps of a query or a key
    n_v_tiles: int      # tiles of 16 values, an even number
    queries: int        # B panels
    keys: int           # A panels of a tile of keys
    values: int         # B panels of a tile of keys
    weights: int        # A panels of a tile of keys
    scores: int         # tiles of keys x queries
    sums: int           # tiles of queries x values
    row: int            # float32 of n_steps, zeros beyond the width
    bias: int           # a mask of a tile of keys
    row_max: int        # float32 [n_q, 16], as the next two
    row_sum: int
    rescale: int
    limits: int         # int32 [n_q, 16]


@inner
def plan_memory(job):
    """Make the Plan of an AttendJob."""
    n_q, n_steps, n_v_tiles = (job.n_tokens * job.n_head + 15) // 16, (job.width + 31) // 32, (job.n_v + 31) // 32 * 2
    sizes = (n_q * n_steps * STEP, KEY_PANELS * n_steps * STEP, n_v_tiles * VALUE_STEPS * STEP, n_q * VALUE_STEPS * STEP,
             KEY_PANELS * n_q * TILE_BYTES, n_q * n_v_tiles * TILE_BYTES, 128 * n_steps, 64 * TILE, 64 * n_q, 64 * n_q, 64 * n_q, 64 * n_q)
    queries = thread_scratch(job.thread, sum(sizes))
    keys = queries + sizes[0]
    values = keys + sizes[1]
    weights = values + sizes[2]
    scores = weights + sizes[3]
    sums = scores + sizes[4]
    row = sums + sizes[5]
    bias = row + sizes[6]
    row_max = bias + sizes[7]
    row_sum = row_max + sizes[8]
    rescale = row_sum + sizes[9]
    return Plan(n_q, n_steps, n_v_tiles, queries, keys, values, weights, scores, sums, row, bias, row_max, row_sum, rescale,
                rescale + sizes[10])


@intrinsic
def interleave_int16(typingctx, a, b):
    """Interleave the int16 pairs at two addresses, i16 [16, 2] each.

    Returns two i32x16: the pairs of first elements, and the pairs of second elements.
    """
    def codegen(context, builder, signature, args):
        a, b = (builder.load(pointer(builder, at, i32x16.ir), align=4) for at in args)
        shift, low_mask, high_mask = constant([16] * 16), constant([0xFFFF] * 16), constant([0xFFFF0000] * 16)
        first = builder.or_(builder.and_(a, low_mask), builder.shl(b, shift))
        second = builder.or_(builder.lshr(a, shift), builder.and_(b, high_mask))
        return cgutils.pack_array(builder, [first, second])
    return types.UniTuple(i32x16, 2)(types.intp, types.intp), codegen


@inner
def pack_queries(job, plan, first, panel):
    """Pack queries `first` to first + 16 as a B panel.

    Queries are the heads of all tokens. The panel is padded by repeating the last query.
    """
    width, row = job.width, plan.row
    for i in range(16):
        source = job.q + min(first + i, job.n_tokens * job.n_head - 1) * job.q_head
        for s in range(width // 32):
            store_bf16x2(panel + STEP * s + 64 * i, load_floats(source, 128 * s), load_floats(source, 128 * s + 64))
        if width % 32:
            for k in range(width // 32 * 32, width):
                store(row, 4 * k, float_at(source, 4 * k))
            s = plan.n_steps - 1
            store_bf16x2(panel + STEP * s + 64 * i, load_floats(row, 128 * s), load_floats(row, 128 * s + 64))
    for s in range(plan.n_steps):
        for part in (0, LOW_PARTS):
            transpose(panel + STEP * s + part, 64, panel + STEP * s + part, 64)


@inner
def pack_keys(job, plan, first, n, end):
    """Pack keys `first` to first + n as A panels, and as B panels for values.

    A panels run over the width; B panels run over 32 keys a step. Keys are padded with zeros to a multiple of 32. Selected keys are
    scattered in memory, so they are prefetched KEYS_AHEAD keys ahead, up to key `end`.
    """
    n_steps, row = plan.n_steps, plan.row
    for j in range(0, n, 32):
        for i in range(j, j + 32):
            if i < n:
                if job.indices:
                    upcoming = job.rows + key_at(job.indices, min(first + i + KEYS_AHEAD, end - 1)) * job.row_bytes
                    for line in range(0, job.row_bytes, 64):
                        prefetch(upcoming, line)
                call_block_function(job.dequantize, job.rows + key_at(job.indices, first + i) * job.row_bytes, job.row_n, row)
            elif i == n:
                for k in range(job.width):
                    store(row, 4 * k, np.float32(0))
            panel = plan.keys + i // 16 * n_steps * STEP + 64 * (i % 16)
            for s in range(n_steps):
                store_bf16x2(panel + STEP * s, load_floats(row, 128 * s), load_floats(row, 128 * s + 64))
        upper, lower = plan.keys + j // 16 * n_steps * STEP, plan.keys + (j // 16 + 1) * n_steps * STEP     # sixteen keys, and the next
        for s in range((plan.n_v_tiles + 1) // 2):
            tile = plan.values + (2 * s * VALUE_STEPS + j // 32) * STEP
            for at in range(0, STEP, 64):       # high parts of keys, then low ones
                a, b = interleave_int16(upper + s * STEP + at, lower + s * STEP + at)
                store(tile, at, a)
                store(tile, VALUE_STEPS * STEP + at, b)


def attend(job_at):
    """Run an AttendJob: attention of all its queries."""
    job = read_attend_job(job_at)
    plan = plan_memory(job)
    for k in range(32 * plan.n_steps):
        store(plan.row, 4 * k, np.float32(0))
    for j in range(plan.n_q):
        pack_queries(job, plan, 16 * j, plan.queries + j * plan.n_steps * STEP)
        store(plan.row_max, 64 * j, floats(MINUS_INFINITY))
        store(plan.row_sum, 64 * j, floats(np.float32(0)))
    end, first_end = max_end(job.key_ends, job.n_tokens), min_end(job.key_ends, job.n_tokens)
    configure()
    for start in range(job.key_start, end, TILE):
        n = min(TILE, end - start)
        pack_keys(job, plan, start, n, end)
        attend_tile(job, plan, start, n, first_end)
    release()
    if job.key_start >= end:       # no key at all
        for j in range(plan.n_q * plan.n_v_tiles * 16):
            store(plan.sums, 64 * j, floats(np.float32(0)))
    for i in range(job.n_tokens * job.n_head):
        sums = plan.sums + i // 16 * plan.n_v_tiles * TILE_BYTES + 64 * (i % 16)
        row, factor = output_row(job.out + i // job.n_head * job.out_token + i % job.n_head * job.out_head, job.partial, i, job.n_v,
                                 plan.row_max, plan.row_sum)
        for k in range(0, job.n_v - 15, 16):
            store(row, 4 * k, load_floats(sums, k // 16 * TILE_BYTES) * factor)
        for k in range(job.n_v // 16 * 16, job.n_v):
            store(row, 4 * k, float_at(sums, k // 16 * TILE_BYTES + 4 * (k % 16)) * factor)


@inner
def attend_tile(job, plan, start, n, first_end):
    """Attend to n packed keys from `start` on, with all queries."""
    n_groups, key_panel, weight_panel, n_q, n_v_tiles = (n + 31) // 32, plan.n_steps * STEP, VALUE_STEPS * STEP, plan.n_q, plan.n_v_tiles
    panel_products(plan.keys, key_panel, 2 * n_groups, plan.queries, key_panel, n_q, plan.n_steps, plan.scores, True, plan.queries)
    for j in range(n_q):
        limits, rescale = plan.limits + 64 * j, plan.rescale + 64 * j
        set_limits(limits, 16 * j, job.n_head, job.n_tokens, job.key_ends, start)
        if job.mask:
            set_bias(plan.bias, 16 * j, job.n_head, job.n_tokens, job.mask + 4 * start, job.mask_row, n)
        softmax_tile(plan.scores + j * TILE_BYTES, n_q * TILE_BYTES, 2 * n_groups, first_end - start < 32 * n_groups, limits,
                     plan.bias if job.mask else 0, float_from_bits(np.uint32(job.scale)), plan.row_max + 64 * j, plan.row_sum + 64 * j,
                     rescale, plan.weights + j * weight_panel)
        if start > job.key_start:
            rescale_sums(plan.sums + j * n_v_tiles * TILE_BYTES, n_v_tiles, rescale)
    panel_products(plan.weights, weight_panel, n_q, plan.values, weight_panel, n_v_tiles, n_groups, plan.sums, start == job.key_start,
                   plan.values)


@inner
def softmax_tile(scores, panel, n_panels, limited, limits, bias, scale, row_max, row_sum, rescale, weights):
    """Turn scores of a tile of keys and sixteen queries into weights.

    The weights are exp(score - row_max), an A panel. row_max and row_sum are updated; `rescale` is the factor for the sums so far. Tiles of
    scores have the stride `panel` in bytes; n_panels is even.
    """
    before = load_floats(row_max, 0)
    new = mask_scores(scores, panel, n_panels, limited, limits, bias, 0, scale, before)
    base = or_zero(new)
    sums = floats(np.float32(0))
    for i in range(0, n_panels, 2):
        for k in range(16):
            a = exp_floats(load_floats(scores + i * panel, 64 * k) - base)
            b = exp_floats(load_floats(scores + (i + 1) * panel, 64 * k) - base)
            sums = sums + (a + b)
            store_bf16x2(weights + i // 2 * STEP + 64 * k, a, b)
        for part in (0, LOW_PARTS):
            transpose(weights + i // 2 * STEP + part, 64, weights + i // 2 * STEP + part, 64)
    update_statistics(new, exp_floats(before - base), sums, row_max, row_sum, rescale)
