"""Flash attention in AMX tiles of int8 over caches of integers.

Cache rows are those of integer_rows.py. Keys are copied to panels; queries and the softmax's weights are rounded to int16 too, split into
high and low bytes; of the four products of bytes the three largest are computed (amx.py). A key has one scale for its compressed values and
one for the rotated ones, so its score is the sum of two products. The first scale also multiplies its values, so it is folded into the
key's weight: divided by the largest such scale of a tile, weights are at most 1.
"""
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.int8x2.gemm import panel_products_int8_a, panel_products_int8_b, panel_products_int8x2
from pydsa.backends.cpu.int8x2.panels import round_query
from pydsa.backends.cpu.integer_rows import parts
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.jobs import read_attend_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.softmax import (MINUS_INFINITY, exp_floats, key_at, mask_scores, max_end, min_end, or_zero, output_row,
                                        rescale_sums, set_bias, set_limits, update_statistics)
from pydsa.backends.cpu.vectors.amx import LOW_PARTS, STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.vectors.lanes import split_int8x2, transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import (I8, constant, f32x16, float_at, floats, i32x16, load_floats, load_int16, nearest, pointer,
                                             prefetch, store)
from pydsa.quants import INT8X2_MAX


TILE = 256              # keys; 64 a step
KEYS_AHEAD = 32         # prefetch distance for selected keys, in keys
VALUE_STEPS = TILE // 64
VALUE_PANEL = VALUE_STEPS * STEP + 64       # and 16 ones, which panel_products_int8x2 takes as the scales of columns


class Plan(NamedTuple):
    """Attend's scratch memory, and the parts of a key.

    Counts, addresses, and strides in bytes.
    """
    n_first: int        # values of a key's first part, with a scale of their own
    n_second: int       # and of its second part; may be 0
    wide: bool          # values have low bytes
    n_steps: int        # steps of a key
    n_q: int            # panels of 16 queries
    n_v_tiles: int      # tiles of 16 values
    key_panel: int      # strides of panels
    query_panel: int
    weight_panel: int
    queries: int        # B panels, with two scales a query behind the steps
    keys: int           # A panels of a tile of keys
    values: int         # B panels of a tile of keys, VALUE_PANEL apart
    weights: int        # A panels of a tile of keys
    scores: int         # tiles of keys x queries
    sums: int           # tiles of queries x values
    buffer: int         # of panel_products_int8x2
    bias: int           # a mask of a tile of keys
    scales: int         # float32 [2, TILE], of the keys' first parts, then of their second ones
    factors: int        # float32 [TILE], of the keys' weights
    row: int            # 64 float32
    sum_scales: int     # 16 equal float32
    row_max: int        # float32 [n_q, 16], as the next two
    row_sum: int
    rescale: int
    limits: int         # int32 [n_q, 16]


@inner
def plan_memory(job):
    """Make the Plan of an AttendJob."""
    n_first, n_second = parts(job.row_n)
    wide = job.row_bytes - (8 if n_second else 4) == 2 * job.width
    n_q, n_steps, n_v_tiles = (job.n_tokens * job.n_head + 15) // 16, steps(n_first) + steps(n_second), 4 * steps(job.n_v)
    key_panel, query_panel, weight_panel = n_steps * STEP + 64, n_steps * STEP + 128, VALUE_STEPS * STEP + 64
    queries = thread_scratch(job.thread, n_q * query_panel + TILE // 16 * key_panel + n_v_tiles * VALUE_PANEL + n_q * weight_panel
                             + TILE // 16 * n_q * TILE_BYTES + n_q * n_v_tiles * TILE_BYTES + 10 * TILE_BYTES + 64 * TILE + 12 * TILE
                             + 64 * (4 * n_q + 8))
    keys = queries + n_q * query_panel
    values = keys + TILE // 16 * key_panel
    weights = values + n_v_tiles * VALUE_PANEL
    scores = weights + n_q * weight_panel
    sums = scores + TILE // 16 * n_q * TILE_BYTES
    buffer = sums + n_q * n_v_tiles * TILE_BYTES
    bias = buffer + 10 * TILE_BYTES
    scales = bias + 64 * TILE
    factors = scales + 8 * TILE
    row = factors + 4 * TILE
    sum_scales = row + 256
    row_max = sum_scales + 64
    row_sum = row_max + 64 * n_q
    rescale = row_sum + 64 * n_q
    return Plan(n_first, n_second, wide, n_steps, n_q, n_v_tiles, key_panel, query_panel, weight_panel, queries, keys, values, weights,
                scores, sums, buffer, bias, scales, factors, row, sum_scales, row_max, row_sum, rescale, rescale + 64 * n_q)


@inner
def integer_ratio(plan):
    """Return integer products / what panel_products_int8x2 computes."""
    return np.float32(256 if plan.wide else 1)


@intrinsic
def interleave(typingctx, a, b, c, d, target, panel):
    """Interleave 64 bytes at each of four addresses into four B panel rows.

    `panel`: the stride of the target rows, in bytes. Byte i of a, b, c, d becomes one cell of four bytes; bytes 16 i + 4 j to 16 i + 4 j +
    3 go to lanes 4 i to 4 i + 3 of row j.
    """
    def codegen(context, builder, signature, args):
        *sources, target, panel = args
        kind = ir.VectorType(I8, 64)
        a, b, c, d = (builder.load(pointer(builder, at, kind), align=1) for at in sources)

        def interleaved(x, y, size, upper):
            """Interleave pieces of `size` bytes of x and y, from half of each lane.

            upper: whether from the upper half of each 16 bytes.
            """
            order = [half + 16 * lane + 8 * upper + piece * size + byte
                     for lane in range(4) for piece in range(8 // size) for half in (0, 64) for byte in range(size)]
            return builder.shuffle_vector(x, y, constant(order))
        rows = [interleaved(interleaved(a, b, 1, first), interleaved(c, d, 1, first), 2, second) for first in (0, 1) for second in (0, 1)]
        for j, row in enumerate(rows):
            builder.store(row, pointer(builder, builder.add(target, builder.mul(panel, panel.type(j))), kind), align=1)
        return context.get_dummy_value()
    return types.void(*[types.intp] * 6), codegen


@intrinsic
def load_deinterleaved(typingctx, address, panel):
    """Load the sums of 64 values in order, undoing interleave(): four f32x16.

    They are spread over four tiles, `panel` bytes apart.
    """
    def codegen(context, builder, signature, args):
        a, b, c, d = (builder.load(pointer(builder, builder.add(args[0], builder.mul(args[1], args[1].type(j))), f32x16.ir), align=4)
                      for j in range(4))

        def quarters(x, y, which):
            return builder.shuffle_vector(x, y, constant([4 * q + i for q in which for i in range(4)]))
        pairs = [(quarters(a, b, (2 * k, 4 + 2 * k, 2 * k + 1, 5 + 2 * k)), quarters(c, d, (2 * k, 4 + 2 * k, 2 * k + 1, 5 + 2 * k)))
                 for k in (0, 1)]
        return cgutils.pack_array(builder, [quarters(x, y, which) for x, y in pairs for which in ((0, 1, 4, 5), (2, 3, 6, 7))])
    return types.UniTuple(f32x16, 4)(types.intp, types.intp), codegen


@intrinsic
def store_4_int8x2(typingctx, address, a, b, c, d):
    """Round the weights of four keys for sixteen queries and store the bytes.

    Values are from 0 to INT8X2_MAX. High bytes go to the address, low ones to LOW_PARTS after it.
    """
    def codegen(context, builder, signature, args):
        at, *values = args
        pairs = [split_int8x2(builder, nearest(builder, v)) for v in values]
        for part, offset in ((0, 0), (1, LOW_PARTS)):
            packed = builder.and_(pairs[0][part], constant([255] * 16))
            for j in (1, 2, 3):
                byte = builder.and_(pairs[j][part], constant([255] * 16))
                packed = builder.or_(packed, builder.shl(byte, constant([8 * j] * 16)))
            builder.store(packed, pointer(builder, builder.add(at, at.type(offset)), i32x16.ir), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, f32x16, f32x16, f32x16, f32x16), codegen


@inner
def pack_queries(job, plan):
    """Round all queries to B panels; their scales follow the steps.

    Of each query: the scale of its first part and of its second part. The last panel is padded by repeating the last query.
    """
    unit = integer_ratio(plan)
    for i in range(16 * plan.n_q):
        q, panel = job.q + min(i, job.n_tokens * job.n_head - 1) * job.q_head, plan.queries + i // 16 * plan.query_panel
        scales, row = panel + plan.n_steps * STEP + 4 * (i % 16), panel + 64 * (i % 16)
        store(scales, 0, round_query(q, plan.n_first, plan.row, row))
        second_scale = np.float32(0)
        if plan.n_second:
            second_scale = round_query(q + 4 * plan.n_first, plan.n_second, plan.row, row + steps(plan.n_first) * STEP)
        store(scales, 64, second_scale)
        if i % 16 == 15:
            for k in (0, 64):
                at = plan.n_steps * STEP + k
                store(panel, at, load_floats(panel, at) * unit)
            for s in range(plan.n_steps):
                for at in (0, LOW_PARTS):
                    transpose(panel + s * STEP + at, 64, panel + s * STEP + at, 64)


@inner
def steps(n):
    """Count the steps of 64 values that n values take."""
    return (n + 63) // 64


@inner
def pack_keys(job, plan, start, n, end):
    """Pack n keys as A panels, and their values as B panels.

    Keys from the start-th on are padded with zeros to a multiple of 64. Selected keys are scattered in memory, so they are prefetched
    KEYS_AHEAD keys ahead, up to key `end`.
    """
    for j in range(0, n, 64):
        for i in range(j, j + 64):
            panel = plan.keys + i // 16 * plan.key_panel + 64 * (i % 16)
            if i < n:
                if job.indices:
                    upcoming = job.rows + key_at(job.indices, min(start + i + KEYS_AHEAD, end - 1)) * job.row_bytes
                    for line in range(0, job.row_bytes, 64):
                        prefetch(upcoming, line)
                copy_key(job.rows + key_at(job.indices, start + i) * job.row_bytes, plan, panel, plan.scales + 4 * i)
            else:
                clear_key(plan, panel, plan.scales + 4 * i)
        for d in range(steps(job.n_v)):
            for i in range(j, j + 64, 4):
                source = plan.keys + i // 16 * plan.key_panel + d * STEP + 64 * (i % 16)
                target = plan.values + 4 * d * VALUE_PANEL + i // 64 * STEP + i % 64 * 16
                interleave(source, source + 64, source + 128, source + 192, target, VALUE_PANEL)
                if plan.wide:
                    source, target = source + LOW_PARTS, target + LOW_PARTS
                    interleave(source, source + 64, source + 128, source + 192, target, VALUE_PANEL)


@inner
def copy_key(row, plan, panel, scales):
    """Copy a row of the cache to a row of an A panel, and its scales.

    scales: the key's place in [2, TILE].
    """
    width = plan.n_first + plan.n_second
    for s in range(plan.n_steps):
        at = row + 64 * s if s < steps(plan.n_first) else row + plan.n_first + 64 * (s - steps(plan.n_first))
        store(panel + s * STEP, 0, load_int16(at, 0))
        if plan.wide:
            store(panel + s * STEP, LOW_PARTS, load_int16(at, width))
    row_scales = row + (2 * width if plan.wide else width)
    store(scales, 0, float_at(row_scales, 0))
    store(scales, 4 * TILE, float_at(row_scales, 4) if plan.n_second else np.float32(0))


@inner
def clear_key(plan, panel, scales):
    """Fill a row of an A panel and its scales with zeros."""
    for s in range(plan.n_steps):
        store(panel + s * STEP, 0, floats(np.float32(0)))
        store(panel + s * STEP, LOW_PARTS, floats(np.float32(0)))
    store(scales, 0, np.float32(0))
    store(scales, 4 * TILE, np.float32(0))


@inner
def largest_scale(job, plan, first, end):
    """Return the largest finite scale of the first parts of some keys."""
    at = job.rows + (plan.n_first + plan.n_second) * (2 if plan.wide else 1)
    top = np.float32(0)
    for i in range(first, end):
        scale = float_at(at + i * job.row_bytes, 0)
        if scale > top and scale < np.float32(np.inf):
            top = scale
    return top


@inner
def relative_scales(scales, n, factors, least):
    """Compute the factors of n keys' weights; return the largest scale.

    It is at least `least`. A factor is scale / largest scale * INT8X2_MAX. Keys that are not finite make the scores not finite; their
    factor is 0.
    """
    top = least
    for i in range(n):
        scale = float_at(scales, 4 * i)
        if scale > top and scale < np.float32(np.inf):
            top = scale
    for i in range(n):
        scale = float_at(scales, 4 * i)
        store(factors, 4 * i, scale / top * np.float32(INT8X2_MAX) if scale > 0 and scale <= top else np.float32(0))
    return top


def attend(job_at):
    """Run an AttendJob: attention of all its queries."""
    job = read_attend_job(job_at)
    plan = plan_memory(job)
    pack_queries(job, plan)
    for j in range(plan.n_q):
        store(plan.row_max, 64 * j, floats(MINUS_INFINITY))
        store(plan.row_sum, 64 * j, floats(np.float32(0)))
    for k in range(0, plan.n_q * plan.n_v_tiles * TILE_BYTES, 64):
        store(plan.sums, k, floats(np.float32(0)))
    for d in range(plan.n_v_tiles):
        store(plan.values, d * VALUE_PANEL + VALUE_STEPS * STEP, floats(np.float32(1)))
    end, first_end = max_end(job.key_ends, job.n_tokens), min_end(job.key_ends, job.n_tokens)
    configure()
    for start in range(job.key_start, end, TILE):
        n = min(TILE, end - start)
        pack_keys(job, plan, start, n, end)
        score_keys(plan, (n + 63) // 64, largest_scale(job, plan, start + n, min(start + TILE, job.scaled_end)))
        attend_tile(job, plan, start, n, first_end)
    release()
    for i in range(job.n_tokens * job.n_head):
        sums = plan.sums + i // 16 * plan.n_v_tiles * TILE_BYTES + 64 * (i % 16)
        row, factor = output_row(job.out + i // job.n_head * job.out_token + i % job.n_head * job.out_head, job.partial, i, job.n_v,
                                 plan.row_max, plan.row_sum)
        store_values(sums, job.n_v, factor, row, plan.buffer)


@inner
def score_keys(plan, n_groups, least):
    """Compute the scores of n_groups x 64 keys, and the factors of weights.

    least: the largest scale of keys of the tile that are not among them.
    """
    largest = relative_scales(plan.scales, 64 * n_groups, plan.factors, least)
    store(plan.sum_scales, 0, floats(largest / np.float32(INT8X2_MAX) * integer_ratio(plan)))
    for k in range(0, 4 * n_groups * plan.n_q * TILE_BYTES, 64):
        store(plan.scores, k, floats(np.float32(0)))
    n_first = steps(plan.n_first)
    for s in range(0, n_first, 4):
        score_steps(plan, n_groups, s, min(4, n_first - s), 0)
    for s in range(n_first, plan.n_steps, 4):
        score_steps(plan, n_groups, s, min(4, plan.n_steps - s), 1)


@inner
def score_steps(plan, n_groups, step, n_steps, part):
    """Add products of keys with queries over some steps of a part, scaled."""
    a, b, scales = plan.keys + step * STEP, plan.queries + step * STEP, plan.scales + part * 4 * TILE
    columns = (plan.n_steps - step) * STEP + part * 64      # from b to the queries' scales
    if plan.wide:
        panel_products_int8x2(a, plan.key_panel, 4 * n_groups, b, plan.query_panel, plan.n_q, n_steps, plan.scores, scales, columns,
                              plan.buffer, b, 0, 0, 0)
    else:
        panel_products_int8_a(a, plan.key_panel, 4 * n_groups, b, plan.query_panel, plan.n_q, n_steps, plan.scores, scales, columns,
                              plan.buffer, b, 0, 0, 0)


@inner
def attend_tile(job, plan, start, n, first_end):
    """Turn the scores of n keys from `start` on into weights; add values."""
    for j in range(plan.n_q):
        n_groups, limits = (n + 63) // 64, plan.limits + 64 * j
        weights, sums, rescale = plan.weights + j * plan.weight_panel, plan.sums + j * plan.n_v_tiles * TILE_BYTES, plan.rescale + 64 * j
        set_limits(limits, 16 * j, job.n_head, job.n_tokens, job.key_ends, start)
        if job.mask:
            set_bias(plan.bias, 16 * j, job.n_head, job.n_tokens, job.mask + 4 * start, job.mask_row, n)
        softmax_tile(plan.scores + j * TILE_BYTES, plan.n_q * TILE_BYTES, 4 * n_groups, first_end - start < 64 * n_groups, limits,
                     plan.bias if job.mask else 0, 0, float_from_bits(np.uint32(job.scale)), plan.row_max + 64 * j, plan.row_sum + 64 * j,
                     rescale, plan.factors, weights)
        if start > job.key_start:
            rescale_sums(sums, plan.n_v_tiles, rescale)
        if plan.wide:
            panel_products_int8x2(weights, plan.weight_panel, 1, plan.values, VALUE_PANEL, plan.n_v_tiles, n_groups, sums, plan.sum_scales,
                                  VALUE_STEPS * STEP, plan.buffer, plan.values, 0, 0, 0)
        else:
            panel_products_int8_b(weights, plan.weight_panel, 1, plan.values, VALUE_PANEL, plan.n_v_tiles, n_groups, sums, plan.sum_scales,
                                  VALUE_STEPS * STEP, plan.buffer, plan.values, 0, 0, 0)


@inner
def store_values(at, n_v, factor, row, buffer):
    """Store n_v sums of one query times a factor, in order.

    64 of them are spread over four tiles.
    """
    for k in range(0, n_v, 64):
        values = load_deinterleaved(at + k // 16 * TILE_BYTES, TILE_BYTES)
        target = row + 4 * k if k + 64 <= n_v else buffer
        store(target, 0, values[0] * factor)
        store(target, 64, values[1] * factor)
        store(target, 128, values[2] * factor)
        store(target, 192, values[3] * factor)
        if k + 64 > n_v:
            for i in range(k, n_v):
                store(row, 4 * i, float_at(buffer, 4 * (i - k)))


@inner
def softmax_tile(scores, panel, n_panels, limited, limits, bias, selected, scale, row_max, row_sum, rescale, factors, weights):
    """Turn scores of a tile of keys and sixteen queries into int16 weights.

    The weights are exp(score - row_max) * factor of the key, rounded, an A panel. row_max and row_sum are updated; `rescale` is the factor
    for the sums so far. Tiles of scores have the stride `panel` in bytes; n_panels is a multiple of four.
    """
    before = load_floats(row_max, 0)
    new = mask_scores(scores, panel, n_panels, limited, limits, bias, selected, scale, before)
    base = or_zero(new)
    sums = floats(np.float32(0))
    for i in range(n_panels):
        for k in range(0, 16, 4):
            at, key_factors = scores + i * panel + 64 * k, factors + 4 * (16 * i + k)
            a, b = exp_floats(load_floats(at, 0) - base), exp_floats(load_floats(at, 64) - base)
            c, d = exp_floats(load_floats(at, 128) - base), exp_floats(load_floats(at, 192) - base)
            sums = sums + ((a + b) + (c + d))
            store_4_int8x2(weights + i // 4 * STEP + 64 * (i % 4 * 4 + k // 4), a * float_at(key_factors, 0), b * float_at(key_factors, 4),
                           c * float_at(key_factors, 8), d * float_at(key_factors, 12))
    for s in range(n_panels // 4):
        for part in (0, LOW_PARTS):
            transpose(weights + s * STEP + part, 64, weights + s * STEP + part, 64)
    update_statistics(new, exp_floats(before - base), sums, row_max, row_sum, rescale)
