"""Attention of one head in AMX tiles of int8, with keys from latents.

Keys and values are computed from latents, 256 at a time, and used in place. All operands are int16 split into bytes, as in linear.py:
latents and weights have a scale for 256 values of a row, keys a scale a key, values a scale for each column of 256 keys. All tokens of the
head attend to these keys before the next are computed.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cpu.int8x2.attention import softmax_tile
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8x2
from pydsa.backends.cpu.int8x2.panels import PANEL, SCALED_PANEL, max_abs, pack_int8x2, round_to_panel, scale_to_max, transpose_panel
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.jobs import read_head_job
from pydsa.backends.cpu.mha import LATENT_TILE, clear, copy_floats
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.softmax import MINUS_INFINITY, max_end, rescale_sums, set_limits
from pydsa.backends.cpu.vectors.amx import STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.vectors.lanes import transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import float_at, floats, load_floats, prefetch, store
from pydsa.quants import INT8X2_MAX


TILE = LATENT_TILE         # keys: 256, whose values are a row of a panel
PANELS = TILE // 16
A_BYTES = PANELS * (PANEL + 64)        # 256 values of each of a tile's latents as A panels, and then all scales
B_BYTES = PANELS * SCALED_PANEL           # the same as B panels
GROUP = 8           # panels of 16 queries that share the keys of a tile
AHEAD = 8           # prefetch distance for queries, in tokens: they are far apart in memory
A_SCALE, B_SCALE = np.float32(1 / INT8X2_MAX), np.float32(256 / INT8X2_MAX)      # scale / largest magnitude, of A and of B panels


@inner
def n_superblocks(n):
    """Count the superblocks of 256 values that n values take."""
    return (n + 255) // 256


@inner
def steps(n):
    """Count the steps of 64 values that n values take."""
    return (n + 63) // 64


@inner
def round_up_32(n):
    """Round n up to a multiple of 32."""
    return (n + 31) // 32 * 32


def tile_bytes(kv_lora, n_rot):
    """Count the bytes of a tile of latents packed by pack_latents."""
    return (kv_lora + 255) // 256 * (A_BYTES + B_BYTES) + 4 * TILE * ((n_rot + 63) // 64 * 64 + 1)


@inner
def column_of_key(key):
    """Return the column of values at which a key is stored.

    pack_int8x2 permutes each 64 values; this permutation undoes it.
    """
    pair = key % 64 // 2
    return key // 64 * 64 + 32 * (key % 2) + (2 * pair if pair < 16 else 2 * pair - 31)


def pack_latents(rows, row_bytes, dequantize, row_n, n, kv_lora, n_rot, out, thread):
    """Pack a tile of n latents, rows of a cache at an address.

    The tile is padded by repeating the last latent. Compressed values are packed as A panels, A_BYTES for each 256, and as B panels,
    B_BYTES; rotated ones as floats, in steps of 64 a key, followed by each key's largest magnitude. In the B panels, for values, latents
    that are not finite are 0.
    """
    n_lora, rotated = n_superblocks(kv_lora), out + n_superblocks(kv_lora) * (A_BYTES + B_BYTES)
    lora = thread_scratch(thread, 1024 * n_lora + 4 * (kv_lora + n_rot))
    row = lora + 1024 * n_lora
    clear(lora, 1024 * n_lora)
    clear(rotated, 256 * TILE * steps(n_rot))
    for i in range(TILE):
        if i < n:
            call_block_function(dequantize, rows + i * row_bytes, row_n, row)
            copy_floats(row, kv_lora, lora)
        key_rotated = rotated + 256 * steps(n_rot) * i
        copy_floats(row + 4 * kv_lora, n_rot, key_rotated)
        store(rotated, 256 * TILE * steps(n_rot) + 4 * i, max_abs(key_rotated, 64, 64 * steps(n_rot)))
        column = column_of_key(i)
        for k in range(n_lora):
            a_panels, b_panel = out + k * A_BYTES, out + n_lora * A_BYTES + k * B_BYTES + column // 16 * SCALED_PANEL
            source, width = lora + 1024 * k, round_up_32(min(256, kv_lora - 256 * k))
            top = pack_int8x2(source, 64, width, a_panels + i // 16 * PANEL + 64 * (i % 16))
            store(a_panels, PANELS * PANEL + 4 * i, top * A_SCALE)
            round_to_panel(source, 64, width, scale_to_max(top), b_panel + 64 * (column % 16))
            store(b_panel, PANEL + 4 * (column % 16), top * B_SCALE if top < np.inf else np.float32(0))
    for k in range(n_lora):
        for j in range(PANELS):
            transpose_panel(out + n_lora * A_BYTES + k * B_BYTES + j * SCALED_PANEL, min(256, kv_lora - 256 * k))


@inner
def pack_weights(rows, n_rows, n, n_panels, as_b, panels, scales):
    """Pack n_rows rows of n floats as n_panels panels a superblock.

    Rows are stored as whole superblocks; panels are padded by repeating the last row. as_b: as B panels; the scales of A panels are
    stored in `scales`, 64 bytes for each panel.
    """
    for k in range(n_superblocks(n)):
        width = round_up_32(min(256, n - 256 * k))
        for i in range(16 * n_panels):
            panel, source = panels + (k * n_panels + i // 16) * SCALED_PANEL, rows + 1024 * (min(i, n_rows - 1) * n_superblocks(n) + k)
            top = pack_int8x2(source, 64, width, panel + 64 * (i % 16))
            if as_b:
                store(panel, PANEL + 4 * (i % 16), top * B_SCALE)
            else:
                store(scales, 64 * k * n_panels + 4 * i, top * A_SCALE)
        if as_b:
            for j in range(n_panels):
                transpose_panel(panels + (k * n_panels + j) * SCALED_PANEL, width)


@inner
def pack_key_weights(rows, row_bytes, dequantize, blocks, kv_lora, n_nope, n_panels, panels, scratch):
    """Pack a head's k_b as B panels whose columns are its columns.

    rows: kv_lora rows of n_nope weights.
    """
    stride, depth, row = (4 * n_nope + 63) // 64 * 64, (kv_lora + 15) // 16 * 16, 1024 * n_superblocks(kv_lora)
    transposed = scratch + depth * stride
    clear(scratch + (depth - 16) * stride, 16 * stride)
    if kv_lora % 256:
        clear(transposed, 16 * n_panels * row)
    for i in range(kv_lora):
        call_block_function(dequantize, rows + i * row_bytes, blocks, scratch + i * stride)
    for i in range(0, depth, 16):
        for j in range(0, n_nope, 16):
            transpose(scratch + i * stride + 4 * j, stride, transposed + j * row + 4 * i, row)
    pack_weights(transposed, n_nope, kv_lora, n_panels, True, panels, 0)


@inner
def pack_value_weights(rows, row_bytes, dequantize, blocks, kv_lora, n_v, n_panels, panels, scales, scratch):
    """Pack a head's v_b, n_v rows of kv_lora weights, as A panels."""
    row = 1024 * n_superblocks(kv_lora)
    if kv_lora % 256:
        clear(scratch, n_v * row)
    for i in range(n_v):
        call_block_function(dequantize, rows + i * row_bytes, blocks, scratch + i * row)
    pack_weights(scratch, n_v, kv_lora, n_panels, False, panels, scales)


@inner
def pack_queries(q, q_token, n_tokens, n_nope, n_rot, n_panels, panels, row):
    """Pack queries as B panels with 64 bytes of scales.

    The steps of the first part come first, then those of the rotated part, then the scales.
    """
    n_steps = steps(n_nope) + steps(n_rot)
    clear(row, 256 * n_steps)
    for i in range(16 * n_panels):
        source, panel = q + min(i, n_tokens - 1) * q_token, panels + i // 16 * (n_steps * STEP + 64)
        upcoming = q + min(i + AHEAD, n_tokens - 1) * q_token
        for line in range(0, 4 * (n_nope + n_rot), 64):
            prefetch(upcoming, line)
        copy_floats(source, n_nope, row)
        copy_floats(source + 4 * n_nope, n_rot, row + 256 * steps(n_nope))
        top = max_abs(row, 64, 64 * n_steps)
        round_to_panel(row, 64, 64 * n_steps, scale_to_max(top), panel + 64 * (i % 16))
        store(panel, n_steps * STEP + 4 * (i % 16), top * B_SCALE)
        if i % 16 == 15:
            transpose_panel(panel, 64 * n_steps)


@inner
def compute_keys(packed, n_panels, kv_lora, n_nope, n_rot, weights, keys, scales, scratch, buffer):
    """Compute n_panels panels of 16 keys as A panels, with a scale a key.

    A key is latent . k_b, then the rotated values.
    """
    n_steps, n_k, rotated = steps(n_nope) + steps(n_rot), 4 * steps(n_nope), packed + n_superblocks(kv_lora) * (A_BYTES + B_BYTES)
    clear(scratch, n_panels * n_k * TILE_BYTES)
    for k in range(n_superblocks(kv_lora)):
        a_panels = packed + k * A_BYTES
        panel_products_int8x2(a_panels, PANEL, n_panels, weights + k * n_k * SCALED_PANEL, SCALED_PANEL, n_k,
                              steps(min(256, kv_lora - 256 * k)), scratch, a_panels + PANELS * PANEL, PANEL, buffer, a_panels, 0, 0, 0)
    for i in range(16 * n_panels):
        source, target = scratch + i // 16 * n_k * TILE_BYTES + 64 * (i % 16), keys + i // 16 * n_steps * STEP + 64 * (i % 16)
        tops = max_abs(source, TILE_BYTES, 16 * n_k), float_at(rotated, 256 * TILE * steps(n_rot) + 4 * i)
        top = tops[1] if tops[0] == tops[0] and not tops[1] <= tops[0] else tops[0]     # NaN if one is
        round_to_panel(source, TILE_BYTES, 16 * n_k, scale_to_max(top), target)
        round_to_panel(rotated + 256 * steps(n_rot) * i, 64, 64 * steps(n_rot), scale_to_max(top), target + steps(n_nope) * STEP)
        store(scales, 4 * i, top * A_SCALE)


@inner
def compute_values(latents, n_panels, kv_lora, n_v_panels, weights, scales, values, scratch, buffer):
    """Compute v_b latents^T, the values of n_panels panels of 16 keys.

    As B panels with a scale for each column of them.
    """
    clear(scratch, n_v_panels * n_panels * TILE_BYTES)
    for k in range(n_superblocks(kv_lora)):
        panel_products_int8x2(weights + k * n_v_panels * SCALED_PANEL, SCALED_PANEL, n_v_panels, latents + k * B_BYTES, SCALED_PANEL,
                              n_panels, steps(min(256, kv_lora - 256 * k)), scratch,
                              scales + 64 * k * n_v_panels, PANEL, buffer, latents, 0, 0, 0)
    for p in range(n_v_panels):
        for i in range(16):
            top = pack_int8x2(scratch + p * n_panels * TILE_BYTES + 64 * i, TILE_BYTES, 16 * n_panels, values + p * SCALED_PANEL + 64 * i)
            store(values, p * SCALED_PANEL + PANEL + 4 * i, top * B_SCALE)
        transpose_panel(values + p * SCALED_PANEL, 16 * n_panels)


class Plan(NamedTuple):
    """The scratch memory of attend_head: counts, addresses, strides in bytes."""
    n_q: int            # panels of 16 queries
    n_k: int            # panels of columns of keys, without the rotated values
    n_v_panels: int     # panels of columns of values
    n_steps: int        # steps of a query or a key
    query_panel: int    # stride of a query panel, bytes
    scratch: int        # dequantized weights, a query, tiles of new keys and values, or scores
    key_weights: int    # k_b, B panels
    value_weights: int  # v_b, A panels
    value_scales: int   # and their scales
    queries: int        # B panels
    keys: int           # A panels of a tile of keys
    key_scales: int     # and their scales
    values: int         # B panels of a tile of keys
    weights: int        # A panels of a group of queries
    weight_scales: int  # and their scales, all equal
    sums: int           # tiles of queries x values
    buffer: int         # of panel_products_int8x2
    factors: int        # float32 [TILE], of the keys' weights, all equal
    row_max: int        # float32 [n_q, 16]
    row_sum: int        # float32 [n_q, 16]
    rescale: int        # float32 [16]
    limits: int         # int32 [16]


@inner
def plan_memory(job):
    """Make the Plan of a HeadJob."""
    n_lora, n_steps, n_q = n_superblocks(job.kv_lora), steps(job.n_nope) + steps(job.n_rot), (job.n_tokens + 15) // 16
    n_k, n_v_panels = 4 * steps(job.n_nope), (job.n_v + 31) // 32 * 2
    query_panel = n_steps * STEP + 64
    sizes = (max(4 * (job.kv_lora + 15) * (job.n_nope + 15) + 1024 * n_lora * 16 * n_k, 1024 * n_lora * job.n_v, 256 * n_steps,
                 PANELS * max(n_k, n_v_panels, GROUP) * TILE_BYTES) // 64 * 64 + 64,
             n_lora * n_k * SCALED_PANEL, n_lora * n_v_panels * (SCALED_PANEL + 64), n_q * query_panel, PANELS * (n_steps * STEP + 64),
             n_v_panels * SCALED_PANEL, GROUP * (PANEL + 64), n_q * n_v_panels * TILE_BYTES, 10 * TILE_BYTES, 4 * TILE, 128 * n_q, 128)
    scratch = thread_scratch(job.thread, sum(sizes))
    key_weights = scratch + sizes[0]
    value_weights = key_weights + sizes[1]
    queries = value_weights + sizes[2]
    keys = queries + sizes[3]
    values = keys + sizes[4]
    weights = values + sizes[5]
    sums = weights + sizes[6]
    buffer = sums + sizes[7]
    factors = buffer + sizes[8]
    row_max = factors + sizes[9]
    return Plan(n_q, n_k, n_v_panels, n_steps, query_panel, scratch, key_weights, value_weights,
                value_weights + n_lora * n_v_panels * SCALED_PANEL, queries, keys, keys + PANELS * n_steps * STEP, values, weights,
                weights + GROUP * PANEL, sums, buffer, factors, row_max, row_max + 64 * n_q, row_max + 128 * n_q, row_max + 128 * n_q + 64)


def attend_head(job_at):
    """Run a HeadJob: attention of one head."""
    job = read_head_job(job_at)
    plan = plan_memory(job)
    pack_key_weights(job.k_rows, job.k_row_bytes, job.k_dequantize, job.k_blocks, job.kv_lora, job.n_nope, plan.n_k, plan.key_weights,
                     plan.scratch)
    pack_value_weights(job.v_rows, job.v_row_bytes, job.v_dequantize, job.v_blocks, job.kv_lora, job.n_v, plan.n_v_panels,
                       plan.value_weights, plan.value_scales, plan.scratch)
    pack_queries(job.q, job.q_token, job.n_tokens, job.n_nope, job.n_rot, plan.n_q, plan.queries, plan.scratch)
    for i in range(TILE):
        store(plan.factors, 4 * i, np.float32(INT8X2_MAX))
    for i in range(16 * GROUP):
        store(plan.weight_scales, 4 * i, A_SCALE)
    for j in range(plan.n_q):
        store(plan.row_max, 64 * j, floats(MINUS_INFINITY))
        store(plan.row_sum, 64 * j, floats(np.float32(0)))
    clear(plan.sums, plan.n_q * plan.n_v_panels * TILE_BYTES)
    end = max_end(job.key_ends, job.n_tokens)
    configure()
    for start in range(0, end, TILE):
        # of all keys of the step: a tile's values share scales, which must not depend on the tokens of this task
        latents, n_panels = job.packed + start // TILE * job.packed_tile, (min(TILE, job.n_keys - start) + 63) // 64 * 4
        compute_keys(latents, n_panels, job.kv_lora, job.n_nope, job.n_rot, plan.key_weights, plan.keys, plan.key_scales, plan.scratch,
                     plan.buffer)
        compute_values(latents + n_superblocks(job.kv_lora) * A_BYTES, n_panels, job.kv_lora, plan.n_v_panels, plan.value_weights,
                       plan.value_scales, plan.values, plan.scratch, plan.buffer)
        for j in range(0, plan.n_q, GROUP):
            n_valid = min(TILE, max_end(job.key_ends + 128 * j, min(16 * GROUP, job.n_tokens - 16 * j)) - start)
            if n_valid > 0:
                attend_group(job, plan, j, min(GROUP, plan.n_q - j), start, (n_valid + 63) // 64 * 4)
    release()
    store_heads(job, plan)


@inner
def attend_group(job, plan, first, n_group, start, n_panels):
    """Attend to n_panels panels of keys with a group of queries.

    The group is n_group panels of queries, from `first` on.
    """
    n_steps, n_v_panels, score_row = plan.n_steps, plan.n_v_panels, n_group * TILE_BYTES
    clear(plan.scratch, n_panels * score_row)
    for s in range(0, n_steps, 4):
        queries = plan.queries + first * plan.query_panel + s * STEP
        panel_products_int8x2(plan.keys + s * STEP, n_steps * STEP, n_panels, queries, plan.query_panel, n_group, min(4, n_steps - s),
                              plan.scratch, plan.key_scales, (n_steps - s) * STEP, plan.buffer, queries, 0, 0, 0)
    for i in range(n_group):
        j = first + i
        set_limits(plan.limits, 16 * j, 1, job.n_tokens, job.key_ends, start)
        softmax_tile(plan.scratch + i * TILE_BYTES, score_row, n_panels, True, plan.limits, 0,
                     job.selected + j * job.selected_row + 2 * start if job.selected else 0, float_from_bits(np.uint32(job.scale)),
                     plan.row_max + 64 * j, plan.row_sum + 64 * j, plan.rescale, plan.factors, plan.weights + i * PANEL)
        if start:
            rescale_sums(plan.sums + j * n_v_panels * TILE_BYTES, n_v_panels, plan.rescale)
    panel_products_int8x2(plan.weights, PANEL, n_group, plan.values, SCALED_PANEL, n_v_panels, n_panels // 4,
                          plan.sums + first * n_v_panels * TILE_BYTES, plan.weight_scales, PANEL, plan.buffer, plan.values, 0, 0, 0)


@inner
def store_heads(job, plan):
    """Store the sums of all tokens, divided by row_sum, to out."""
    n_v = job.n_v
    for t in range(job.n_tokens):
        sums, row = plan.sums + t // 16 * plan.n_v_panels * TILE_BYTES + 64 * (t % 16), job.out + t * job.out_token
        total = float_at(plan.row_sum, 4 * t)
        factor = np.float32(1) / total if total != 0 else np.float32(0)
        for k in range(0, n_v - 15, 16):
            store(row, 4 * k, load_floats(sums, k // 16 * TILE_BYTES) * factor)
        for k in range(n_v // 16 * 16, n_v):
            store(row, 4 * k, float_at(sums, k // 16 * TILE_BYTES + 4 * (k % 16)) * factor)
