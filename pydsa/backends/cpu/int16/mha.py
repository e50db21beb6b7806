"""Attention of one head in int16, with keys and values from latents.

Operands are rows and tiles of pairs (gemm.py), each row with one scale. A latent's scale and a weight's are for all of a row, a key's for
both of its parts, a value's for each column of KEYS keys, and those of the softmax's weights for a token and KEYS keys. Keys and values are
computed KEYS at a time, and all tokens of the head attend to them before the next.
"""
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.arrays import align
from pydsa.backends.cpu.int16.gemm import MAX_NORM, PAIR_TOKENS, matmul_pairs, pair_products
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.jobs import read_head_job
from pydsa.backends.cpu.mha import LATENT_TILE, clear, copy_floats
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.softmax import MINUS_INFINITY, exp_below_0, keep_lanes, larger, largest, max_end, sum_of_lanes
from pydsa.backends.cpu.vectors.lanes import transpose
from pydsa.backends.cpu.vectors.scalars import exp, float_from_bits
from pydsa.backends.cpu.vectors.simd import (F32, FAST, I16, INT16_ROWS, broadcast, call_llvm, constant, f32x16, float_at, floats, i32x16,
                                             i64_at, load_floats, max_abs_lanes, nearest, pointer, prefetch, store)

KEYS = 128          # keys that are computed, and attended to, at a time: it divides LATENT_TILE
LANES = 32          # keys that are computed together: a multiple of 16 INT16_ROWS
QUERIES = 4 * PAIR_TOKENS       # tokens that attend to them one after the other; their scores are 16 KiB
AHEAD = 8           # prefetch distance for queries, in tokens: they are far apart in memory


@inner
def round_up(n, multiple):
    """Round n up to a multiple."""
    return (n + multiple - 1) // multiple * multiple


@intrinsic
def to_pairs(typingctx, a, b):
    """Round two vectors of floats to pairs of int16, as i32x16."""
    def codegen(context, builder, signature, args):
        low, high = (nearest(builder, v) for v in args)
        return builder.or_(builder.and_(low, constant([0xFFFF] * 16)), builder.shl(high, constant([16] * 16)))
    return i32x16(f32x16, f32x16), codegen


@intrinsic
def scales_of(typingctx, squares):
    """Return the scales with which rows of these squared norms are rounded.

    The integers' norm becomes MAX_NORM. NaN if a norm is not finite, so that it never looks like a masked score.
    """
    def codegen(context, builder, signature, args):
        norms = call_llvm(builder, "llvm.sqrt.v16f32", f32x16.ir, args)
        scales = builder.fmul(norms, constant([1 / MAX_NORM] * 16, F32), flags=FAST)
        finite = builder.fcmp_ordered("<", norms, constant([float("inf")] * 16, F32))
        return builder.select(finite, scales, constant([float("nan")] * 16, F32))
    return f32x16(f32x16), codegen


@intrinsic
def factors_of(typingctx, scales):
    """Return 1 / scales, or 0 where there is nothing to round."""
    def codegen(context, builder, signature, args):
        inverse = builder.fdiv(constant([1.0] * 16, F32), args[0])
        return builder.select(builder.fcmp_ordered(">", args[0], constant([1e-30] * 16, F32)), inverse, constant([0.0] * 16, F32))
    return f32x16(f32x16), codegen


@intrinsic
def keep_marked(typingctx, scores, marks, bit):
    """Set scores to -inf where a key's mark, uint16, lacks a bit."""
    def codegen(context, builder, signature, args):
        scores, marks, bit = args
        marks = builder.load(pointer(builder, marks, ir.VectorType(I16, 16)), align=1)
        wanted = broadcast(builder, builder.shl(I16(1), builder.trunc(bit, I16)), 16)
        kept = builder.icmp_unsigned("!=", builder.and_(marks, wanted), constant([0] * 16, I16))
        return builder.select(kept, scores, constant([float("-inf")] * 16, F32))
    return f32x16(f32x16, types.intp, types.intp), codegen


@inner
def row_scale(row, n):
    """Return the scale with which a row is rounded.

    n floats, whole groups of 64. NaN if a value is not finite.
    """
    most = np.float32(0)
    for k in range(0, 4 * n, 256):
        a, b, c, d = load_floats(row, k), load_floats(row, k + 64), load_floats(row, k + 128), load_floats(row, k + 192)
        squares = sum_of_lanes(a * a + b * b + c * c + d * d)
        most = most if squares <= most else squares
    norm = np.sqrt(most)
    return norm * np.float32(1 / MAX_NORM) if norm < np.inf else np.float32(np.nan)


@inner
def store_pairs(row, n, factor, target):
    """Round a row of n floats times a factor, whole groups of 32, to pairs."""
    for k in range(0, n, 32):
        store(target, 2 * k, to_pairs(load_floats(row, 4 * k) * factor, load_floats(row, 4 * k + 64) * factor))


@inner
def pack_row(row, n, target):
    """Round a row of n floats to pairs; return its scale."""
    scale = row_scale(row, n)
    store_pairs(row, n, np.float32(1) / scale if scale > np.float32(1e-30) else np.float32(0), target)
    return scale


@inner
def store_tile(columns, stride, n, factors, tile):
    """Round sixteen rows to a tile of pairs.

    They are columns of n rows of floats. n: whole groups of 32; factors: f32x16 in memory, of the columns.
    """
    factors = load_floats(factors, 0)
    for k in range(0, n, 32):
        at = columns + k * stride
        for i in range(16):
            store(tile, 64 * (k // 2 + i), to_pairs(load_floats(at, i * stride) * factors, load_floats(at, (i + 16) * stride) * factors))


@inner
def pack_tile(columns, stride, n, group, scales, factors, tile):
    """Do what store_tile does, with the columns' own scales, which are stored.

    Each `group` values of a column are one of a product's groups. factors: scratch.
    """
    most = floats(np.float32(0))
    for first in range(0, n, group):
        squares = floats(np.float32(0))
        for k in range(first, min(first + group, n)):
            v = load_floats(columns, k * stride)
            squares = squares + v * v
        most = max_abs_lanes(most, squares)
    scale = scales_of(most)
    store(scales, 0, scale)
    store(factors, 0, factors_of(scale))
    store_tile(columns, stride, n, factors, tile)


@inner
def transpose_rows(rows, row_bytes, tile):
    """Transpose sixteen rows of pairs to a tile."""
    for k in range(0, row_bytes, 64):
        transpose(rows + k, row_bytes, tile + 16 * k, 64)


def tile_bytes(kv_lora, n_rot):
    """Count the bytes of a tile of latents packed by pack_latents."""
    return LATENT_TILE * (4 * ((kv_lora + 63) // 64 * 64) + 8 + 4 * n_rot)


def pack_latents(rows, row_bytes, dequantize, row_n, n, kv_lora, n_rot, out, thread):
    """Pack a tile of n latents, rows of a cache at an address.

    The rest of LATENT_TILE is zeros. Compressed values are packed as rows, for values, and as tiles, for keys, each followed by their
    scales; then come the rotated ones as floats, transposed, of sixteen latents at a time. Latents that are not finite are 0 as rows, as
    values share scales with those of other keys; scores are NaN then.
    """
    depth = round_up(kv_lora, 64)
    tiles = out + LATENT_TILE * (2 * depth + 4)
    rotated = tiles + LATENT_TILE * (2 * depth + 4)
    row = thread_scratch(thread, 4 * (depth + round_up(kv_lora + n_rot, 16) + 16))
    latent = row + 4 * depth
    clear(row, 4 * depth)
    for i in range(LATENT_TILE):
        scale, turned = np.float32(0), rotated + i // 16 * 64 * n_rot + 4 * (i % 16)
        if i < n:
            call_block_function(dequantize, rows + i * row_bytes, row_n, latent)
            copy_floats(latent, kv_lora, row)
            scale = pack_row(row, depth, out + 2 * i * depth)
        else:
            clear(out + 2 * i * depth, 2 * depth)
        for k in range(n_rot):
            store(turned, 64 * k, float_at(latent, 4 * (kv_lora + k)) if i < n else np.float32(0))
        store(out, LATENT_TILE * 2 * depth + 4 * i, scale if scale == scale else np.float32(0))
        store(tiles, LATENT_TILE * 2 * depth + 4 * i, scale)
    for i in range(0, LATENT_TILE, 16):
        transpose_rows(out + 2 * i * depth, 2 * depth, tiles + 2 * i * depth)


class Plan(NamedTuple):
    """The scratch memory of attend_head: counts, addresses, strides in bytes."""
    depth: int          # values of a latent that are multiplied: kv_lora, rounded up
    width: int          # values of a key, rounded up
    n_k: int            # rows of k_b's transpose, rounded up
    n_v: int            # values of a value, rounded up
    floats: int         # float32: dequantized weights; a query; computed keys
    key_weights: int    # rows of k_b's transpose
    key_weight_scales: int
    value_weights: int  # tiles of v_b
    value_weight_scales: int
    queries: int        # rows
    query_scales: int   # times the scale of scores
    keys: int           # tiles of KEYS keys
    key_scales: int
    computed: int       # float32 [KEYS, n_v], the values of KEYS keys
    values: int         # tiles of the columns of `computed`
    value_scales: int
    scores: int         # float32 [QUERIES, KEYS]
    weights: int        # rows, of the softmax
    weight_scales: int
    factors: int        # for the sums so far
    sums: int           # float32 [n_tokens, n_v]
    row_max: int        # float32 [n_tokens]
    row_sum: int        # float32 [n_tokens]


@inner
def plan_memory(job):
    """Make the Plan of a HeadJob."""
    depth, width, n_tokens = round_up(job.kv_lora, 64), round_up(job.n_nope + job.n_rot, 64), round_up(job.n_tokens, PAIR_TOKENS)
    n_k, n_v = round_up(round_up(job.n_nope, PAIR_TOKENS), 16), round_up(job.n_v, 16 * INT16_ROWS)
    sizes = (4 * max(depth * n_k, 16 * depth + width, LANES * (width + n_k)) + 2 * 16 * depth + 64,
             2 * n_k * depth + 64, 4 * n_k, 2 * n_v * depth, 4 * n_v, 2 * n_tokens * width, 4 * n_tokens, 2 * KEYS * width, 4 * KEYS,
             4 * round_up(KEYS, PAIR_TOKENS) * n_v, 2 * KEYS * n_v, 4 * n_v, 4 * QUERIES * KEYS, 2 * QUERIES * KEYS, 4 * QUERIES,
             4 * QUERIES, 4 * n_tokens * n_v, 4 * n_tokens, 4 * n_tokens)
    total = 0
    for size in sizes:
        total += align(size)
    at = thread_scratch(job.thread, total)
    key_weights = at + align(sizes[0])
    key_weight_scales = key_weights + align(sizes[1])
    value_weights = key_weight_scales + align(sizes[2])
    value_weight_scales = value_weights + align(sizes[3])
    queries = value_weight_scales + align(sizes[4])
    query_scales = queries + align(sizes[5])
    keys = query_scales + align(sizes[6])
    key_scales = keys + align(sizes[7])
    computed = key_scales + align(sizes[8])
    values = computed + align(sizes[9])
    value_scales = values + align(sizes[10])
    scores = value_scales + align(sizes[11])
    weights = scores + align(sizes[12])
    weight_scales = weights + align(sizes[13])
    factors = weight_scales + align(sizes[14])
    sums = factors + align(sizes[15])
    row_max = sums + align(sizes[16])
    return Plan(depth, width, n_k, n_v, at, key_weights, key_weight_scales, value_weights, value_weight_scales, queries, query_scales, keys,
                key_scales, computed, values, value_scales, scores, weights, weight_scales, factors, sums, row_max,
                row_max + align(sizes[17]))


@inner
def pack_key_weights(job, plan):
    """Pack the columns of k_b, [kv_lora, n_nope], as rows."""
    stride, cells = 4 * plan.n_k, plan.floats + 4 * plan.depth * plan.n_k
    clear(plan.floats, 4 * plan.depth * plan.n_k)
    for i in range(job.kv_lora):
        call_block_function(job.k_dequantize, job.k_rows + i * job.k_row_bytes, job.k_blocks, plan.floats + i * stride)
    for d in range(0, plan.n_k, 16):
        pack_tile(plan.floats + 4 * d, stride, plan.depth, 64, plan.key_weight_scales + 4 * d, plan.key_scales, cells)
        for k in range(0, plan.depth // 2, 16):
            transpose(cells + 64 * k, 64, plan.key_weights + 2 * d * plan.depth + 4 * k, 2 * plan.depth)


@inner
def pack_value_weights(job, plan):
    """Pack v_b, n_v rows of kv_lora weights, as tiles."""
    rows = plan.floats + 4 * plan.depth
    clear(plan.floats, 4 * plan.depth)
    for d in range(plan.n_v):
        scale, row = np.float32(0), rows + 2 * (d % 16) * plan.depth
        if d < job.n_v:
            call_block_function(job.v_dequantize, job.v_rows + d * job.v_row_bytes, job.v_blocks, plan.floats)
            scale = pack_row(plan.floats, plan.depth, row)
        else:
            clear(row, 2 * plan.depth)
        store(plan.value_weight_scales, 4 * d, scale)
        if d % 16 == 15:
            transpose_rows(rows, 2 * plan.depth, plan.value_weights + 2 * (d - 15) * plan.depth)


@inner
def pack_queries(job, plan):
    """Pack queries as rows."""
    width, factor = job.n_nope + job.n_rot, float_from_bits(np.uint32(job.scale))
    clear(plan.floats, 4 * plan.width)
    for t in range(round_up(job.n_tokens, PAIR_TOKENS)):
        row, scale = plan.queries + 2 * t * plan.width, np.float32(0)
        if t < job.n_tokens:
            upcoming = job.q + min(t + AHEAD, job.n_tokens - 1) * job.q_token
            for line in range(0, 4 * width, 64):
                prefetch(upcoming, line)
            copy_floats(job.q + t * job.q_token, width, plan.floats)
            scale = pack_row(plan.floats, plan.width, row)
        else:
            clear(row, 2 * plan.width)
        store(plan.query_scales, 4 * t, scale * factor)


@inner
def compute_keys(job, plan, start, n):
    """Compute the keys and the values of n latents from `start` on.

    They are padded to LANES with zeros.
    """
    row, first = 2 * plan.depth, start % LATENT_TILE
    rows = job.packed + start // LATENT_TILE * job.packed_tile
    scales, tiles = rows + LATENT_TILE * row + 4 * first, rows + LATENT_TILE * (row + 4) + first * row
    rotated = rows + 2 * LATENT_TILE * (row + 4) + 4 * first * job.n_rot
    tile_scales, rows, n_groups = rows + LATENT_TILE * (2 * row + 4) + 4 * first, rows + first * row, plan.depth // 64
    for i in range(0, n, LANES):
        matmul_pairs(tiles + i * row, 16 * row, tile_scales + 4 * i, LANES // 16, n_groups, plan.key_weights, row, plan.key_weight_scales,
                     job.n_nope, plan.floats, 4 * LANES)
        clear(plan.floats + 4 * LANES * (job.n_nope + job.n_rot), 4 * LANES * (plan.width - job.n_nope - job.n_rot))
        for j in range(0, LANES, 16):
            for k in range(job.n_rot):
                store(plan.floats, 4 * LANES * (job.n_nope + k) + 4 * j, load_floats(rotated, 4 * (i + j) * job.n_rot + 64 * k))
            pack_tile(plan.floats + 4 * j, 4 * LANES, plan.width, 64, plan.key_scales + 4 * (i + j), plan.scores,
                      plan.keys + 2 * (i + j) * plan.width)
        matmul_pairs(plan.value_weights, 16 * row, plan.value_weight_scales, plan.n_v // 16, n_groups, rows + i * row, row, scales + 4 * i,
                     LANES, plan.computed + 4 * i * plan.n_v, 4 * plan.n_v)
    for d in range(0, plan.n_v, 16):
        pack_tile(plan.computed + 4 * d, 4 * plan.n_v, round_up(n, LANES), KEYS, plan.value_scales + 4 * d, plan.scores,
                  plan.values + 2 * d * KEYS)


@inner
def mask_row(row, n, n_visible, marks, bit):
    """Set scores to -inf that a token does not see, of n in whole vectors."""
    if marks:
        for j in range(0, n, 16):
            store(row, 4 * j, keep_marked(load_floats(row, 4 * j), marks + 2 * j, bit))
    last = n_visible // 16 * 16
    if last < n:
        store(row, 4 * last, keep_lanes(load_floats(row, 4 * last), (1 << (n_visible - last)) - 1))
        for j in range(last + 16, n, 16):
            store(row, 4 * j, floats(MINUS_INFINITY))


@inner
def softmax_pairs(row, n, row_max, row_sum, weights, scale, factor):
    """Turn n scores of a token, whole vectors, into a row of weights.

    row_max, row_sum: addresses of the token's; scale, factor: where those of its weights and of its sums so far are stored.
    """
    top, total = floats(MINUS_INFINITY), floats(np.float32(0))
    for j in range(0, n, 16):
        v = load_floats(row, 4 * j)
        top, total = larger(v, top), total + v
    before, total = float_at(row_max, 0), sum_of_lanes(total)
    new = max(before, largest(top))
    if total != total:      # NaN must not look like a masked key
        store(row_sum, 0, np.float32(np.nan))
    if new == -np.inf:
        clear(weights, 2 * n)
        store(scale, 0, np.float32(0))
        store(factor, 0, np.float32(1))
        return
    rescale = exp(before - new) if before > -np.inf else np.float32(0)
    total, squares = floats(np.float32(0)), floats(np.float32(0))
    for j in range(0, n, 16):
        v = exp_below_0(load_floats(row, 4 * j) - floats(new))
        store(row, 4 * j, v)
        total, squares = total + v, squares + v * v
    norm = np.sqrt(sum_of_lanes(squares))
    store_pairs(row, n, np.float32(MAX_NORM) / norm if norm > np.float32(1e-30) else np.float32(0), weights)
    store(scale, 0, norm * np.float32(1 / MAX_NORM))
    store(factor, 0, rescale)
    store(row_max, 0, new)
    store(row_sum, 0, float_at(row_sum, 0) * rescale + sum_of_lanes(total))


@inner
def attend_block(job, plan, t, first, n):
    """Attend to n keys from `first` on, for QUERIES tokens from t on."""
    stop, score_row, weight_row = min(t + QUERIES, job.n_tokens), 4 * KEYS, 2 * KEYS
    for j in range(0, n, 16 * INT16_ROWS):
        for i in range(t, stop, PAIR_TOKENS):
            if max_end(job.key_ends + 8 * i, min(PAIR_TOKENS, stop - i)) > first + j:
                pair_products(plan.keys + 2 * j * plan.width, 32 * plan.width, plan.key_scales + 4 * j, plan.width // 64, 32,
                              plan.queries + 2 * i * plan.width, 2 * plan.width, plan.query_scales + 4 * i,
                              plan.scores + (i - t) * score_row + 4 * j, score_row, 0)
    for i in range(t, stop, PAIR_TOKENS):
        n_seen = min(n, max_end(job.key_ends + 8 * i, min(PAIR_TOKENS, stop - i)) - first)
        for q in range(i, min(i + PAIR_TOKENS, stop)):
            if n_seen <= 0:
                break
            row, marks = plan.scores + (q - t) * score_row, job.selected + q // 16 * job.selected_row + 2 * first if job.selected else 0
            mask_row(row, round_up(n_seen, 32), max(0, min(n, i64_at(job.key_ends, 8 * q) - first)), marks, q % 16)
            softmax_pairs(row, round_up(n_seen, 32), plan.row_max + 4 * q, plan.row_sum + 4 * q, plan.weights + (q - t) * weight_row,
                          plan.weight_scales + 4 * (q - t), plan.factors + 4 * (q - t))
    for d in range(0, plan.n_v, 16 * INT16_ROWS):
        for i in range(t, stop, PAIR_TOKENS):
            n_seen = min(n, max_end(job.key_ends + 8 * i, min(PAIR_TOKENS, stop - i)) - first)
            if n_seen > 0:
                pair_products(plan.values + 2 * d * KEYS, 32 * KEYS, plan.value_scales + 4 * d, 1, round_up(n_seen, 32) // 2,
                              plan.weights + (i - t) * weight_row, weight_row, plan.weight_scales + 4 * (i - t),
                              plan.sums + 4 * i * plan.n_v + 4 * d, 4 * plan.n_v, plan.factors + 4 * (i - t))


def attend_head(job_at):
    """Run a HeadJob: attention of one head."""
    job = read_head_job(job_at)
    plan = plan_memory(job)
    pack_key_weights(job, plan)
    pack_value_weights(job, plan)
    pack_queries(job, plan)
    clear(plan.sums, 4 * job.n_tokens * plan.n_v)
    for t in range(job.n_tokens):
        store(plan.row_max, 4 * t, MINUS_INFINITY)
        store(plan.row_sum, 4 * t, np.float32(0))
    end = max_end(job.key_ends, job.n_tokens)
    for first in range(0, end, KEYS):
        # of all keys of the step: values share scales, which must not depend on the tokens of this task
        n = min(KEYS, job.n_keys - first)
        compute_keys(job, plan, first, n)
        for t in range(0, job.n_tokens, QUERIES):
            if max_end(job.key_ends + 8 * t, min(QUERIES, job.n_tokens - t)) > first:
                attend_block(job, plan, t, first, n)
    for t in range(job.n_tokens):
        row, source, total = job.out + t * job.out_token, plan.sums + 4 * t * plan.n_v, float_at(plan.row_sum, 4 * t)
        factor = np.float32(1) / total if total != 0 else np.float32(0)
        for k in range(0, job.n_v - 15, 16):
            store(row, 4 * k, load_floats(source, 4 * k) * factor)
        for k in range(job.n_v // 16 * 16, job.n_v):
            store(row, 4 * k, float_at(source, 4 * k) * factor)
