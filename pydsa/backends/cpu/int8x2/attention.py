"""Flash attention in AMX tiles of int8 over caches of integers.

Cache rows are those of integer_rows.py. Keys are copied to panels; queries and the softmax's weights are rounded to int16 too, split into
high and low bytes; of the four products of bytes the three largest are computed (amx.py). A key has one scale for its compressed values and
one for the rotated ones, so its score is the sum of two products. The first scale also multiplies its values, so it is folded into the
key's weight: divided by the largest such scale of a tile, weights are at most 1.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import LOW_PARTS, STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8_a, panel_products_int8_b, panel_products_int8x2
from pydsa.backends.cpu.int8x2.panels import round_query
from pydsa.backends.cpu.integer_rows import parts
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.lanes import split_int8x2, transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import (I8, constant, f32x16, float_at, floats, i32x16, load_floats, load_int16, nearest, pointer, prefetch,
                                     store)
from pydsa.backends.cpu.softmax import (MINUS_INFINITY, exp_floats, key_at, mask_scores, max_end, min_end, or_zero, output_row,
                                        rescale_sums, set_bias, set_limits, update_statistics)
from pydsa.quants import INT8X2_MAX


TILE = 256              # keys; 64 a step
KEYS_AHEAD = 32         # prefetch distance for selected keys, in keys
VALUE_STEPS = TILE // 64
VALUE_PANEL = VALUE_STEPS * STEP + 64       # and 16 ones, which panel_products_int8x2 takes as the scales of columns


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
def pack_query(q, n_first, n_second, row, panel, i):
    """Round a query to row i of a B panel, not yet transposed.

    The scales of the first and of the second part follow the steps.
    """
    n_steps = steps(n_first)
    scales = panel + (n_steps + steps(n_second)) * STEP + 4 * i
    store(scales, 0, round_query(q, n_first, row, panel + 64 * i))
    store(scales, 64, round_query(q + 4 * n_first, n_second, row, panel + n_steps * STEP + 64 * i) if n_second else np.float32(0))


@inner
def steps(n):
    """Count the steps of 64 values that n values take."""
    return (n + 63) // 64


@inner
def pack_keys(rows, row_bytes, n_first, n_second, wide, indices, start, n, end, n_v, keys, key_panel, scales, values):
    """Pack n keys as A panels, and their values as B panels.

    Keys from the start-th on are padded with zeros to a multiple of 64; their scales go to `scales`. Selected keys are scattered in memory,
    so they are prefetched KEYS_AHEAD keys ahead, up to key `end`. wide: values have low bytes.
    """
    width = n_first + n_second
    for j in range(0, n, 64):
        for i in range(j, j + 64):
            panel = keys + i // 16 * key_panel + 64 * (i % 16)
            if i >= n:
                for s in range(steps(n_first) + steps(n_second)):
                    store(panel + s * STEP, 0, floats(np.float32(0)))
                    store(panel + s * STEP, LOW_PARTS, floats(np.float32(0)))
                store(scales, 4 * i, np.float32(0))
                store(scales, 4 * (TILE + i), np.float32(0))
                continue
            source = rows + key_at(indices, start + i) * row_bytes
            if indices:
                upcoming = rows + key_at(indices, min(start + i + KEYS_AHEAD, end - 1)) * row_bytes
                for line in range(0, row_bytes, 64):
                    prefetch(upcoming, line)
            for s in range(steps(n_first) + steps(n_second)):
                at = source + 64 * s if s < steps(n_first) else source + n_first + 64 * (s - steps(n_first))
                store(panel + s * STEP, 0, load_int16(at, 0))
                if wide:
                    store(panel + s * STEP, LOW_PARTS, load_int16(at, width))
            row_scales = source + (2 * width if wide else width)
            store(scales, 4 * i, float_at(row_scales, 0))
            store(scales, 4 * (TILE + i), float_at(row_scales, 4) if n_second else np.float32(0))
        for d in range(steps(n_v)):
            for i in range(j, j + 64, 4):
                source = keys + i // 16 * key_panel + d * STEP + 64 * (i % 16)
                target = values + 4 * d * VALUE_PANEL + i // 64 * STEP + i % 64 * 16
                interleave(source, source + 64, source + 128, source + 192, target, VALUE_PANEL)
                if wide:
                    source, target = source + LOW_PARTS, target + LOW_PARTS
                    interleave(source, source + 64, source + 128, source + 192, target, VALUE_PANEL)


@inner
def relative_scales(scales, n, factors):
    """Compute the factors of n keys' weights; return the largest scale.

    A factor is scale / largest scale * INT8X2_MAX. Keys that are not finite make the scores not finite; their factor is 0.
    """
    top = np.float32(0)
    for i in range(n):
        scale = float_at(scales, 4 * i)
        if scale > top and scale < np.float32(np.inf):
            top = scale
    for i in range(n):
        scale = float_at(scales, 4 * i)
        store(factors, 4 * i, scale / top * np.float32(INT8X2_MAX) if scale > 0 and scale <= top else np.float32(0))
    return top


def attend(out, out_token, out_head, q, q_head, n_tokens, n_head, width, n_v, rows, row_bytes, dequantize, row_n, indices,
           key_start, key_ends, mask, mask_row, scale, partial):
    """Attend to keys key_start to key_ends[t] of each token t.

    out[t, h] = softmax(scale q[t, h] . key + mask) value. With indices, key s is the row indices[s].

    Addresses: out float32 [T, H, n_v] with strides out_token, out_head; q float32 [T, H, width], where q_head is the stride of all T H
    queries; rows of a cache with stride row_bytes; indices int32, or 0 for all keys; key_ends int64 [T]; mask float32 [T, n_kv] with stride
    mask_row, or 0; partial: where each query's row_max, row_sum and sum of values are written instead of out (see partial_bytes), or 0.
    Strides are in bytes. scale: the bits of a float32. n_v is at most the length of the rows' first part.
    """
    n, scale = n_tokens * n_head, float_from_bits(np.uint32(scale))
    n_first, n_second = parts(row_n)
    wide = row_bytes - (8 if n_second else 4) == 2 * width        # values have low bytes
    unit = np.float32(256 if wide else 1)       # ratio of the integers' product to what panel_products_int8x2 computes of their bytes
    n_q, n_steps, n_v_tiles = (n + 15) // 16, steps(n_first) + steps(n_second), 4 * steps(n_v)
    key_panel, query_panel, weight_panel = n_steps * STEP + 64, n_steps * STEP + 128, VALUE_STEPS * STEP + 64
    queries = thread_scratch(n_q * query_panel + TILE // 16 * key_panel + n_v_tiles * VALUE_PANEL + n_q * weight_panel
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
    limits = rescale + 64 * n_q
    for i in range(16 * n_q):
        panel = queries + i // 16 * query_panel
        pack_query(q + min(i, n - 1) * q_head, n_first, n_second, row, panel, i % 16)
        if i % 16 == 15:
            for k in (0, 64):
                store(panel, n_steps * STEP + k, load_floats(panel, n_steps * STEP + k) * unit)
            for s in range(n_steps):
                for at in (0, LOW_PARTS):
                    transpose(panel + s * STEP + at, 64, panel + s * STEP + at, 64)
    for j in range(n_q):
        store(row_max, 64 * j, floats(MINUS_INFINITY))
        store(row_sum, 64 * j, floats(np.float32(0)))
    for k in range(0, n_q * n_v_tiles * TILE_BYTES, 64):
        store(sums, k, floats(np.float32(0)))
    for d in range(n_v_tiles):
        store(values, d * VALUE_PANEL + VALUE_STEPS * STEP, floats(np.float32(1)))
    end, first_end = max_end(key_ends, n_tokens), min_end(key_ends, n_tokens)
    configure()
    for start in range(key_start, end, TILE):
        n_valid = min(TILE, end - start)
        n_groups = (n_valid + 63) // 64
        pack_keys(rows, row_bytes, n_first, n_second, wide, indices, start, n_valid, end, n_v, keys, key_panel, scales, values)
        store(sum_scales, 0, floats(relative_scales(scales, 64 * n_groups, factors) / np.float32(INT8X2_MAX) * unit))
        for k in range(0, 4 * n_groups * n_q * TILE_BYTES, 64):
            store(scores, k, floats(np.float32(0)))
        for s in range(0, steps(n_first), 4):
            score_part(wide, keys, key_panel, 4 * n_groups, queries, query_panel, n_q, s, min(4, steps(n_first) - s), n_steps, 0, scores,
                       scales, buffer)
        for s in range(steps(n_first), n_steps, 4):
            score_part(wide, keys, key_panel, 4 * n_groups, queries, query_panel, n_q, s, min(4, n_steps - s), n_steps, 64, scores,
                       scales + 4 * TILE, buffer)
        for j in range(n_q):
            set_limits(limits + 64 * j, 16 * j, n_head, n_tokens, key_ends, start)
            if mask:
                set_bias(bias, 16 * j, n_head, n_tokens, mask + 4 * start, mask_row, n_valid)
            softmax_tile(scores + j * TILE_BYTES, n_q * TILE_BYTES, 4 * n_groups, first_end - start < 64 * n_groups, limits + 64 * j,
                         bias if mask else 0, 0, scale, row_max + 64 * j, row_sum + 64 * j, rescale + 64 * j, factors,
                         weights + j * weight_panel)
            if start > key_start:
                rescale_sums(sums + j * n_v_tiles * TILE_BYTES, n_v_tiles, rescale + 64 * j)
            at, target = weights + j * weight_panel, sums + j * n_v_tiles * TILE_BYTES
            if wide:
                panel_products_int8x2(at, weight_panel, 1, values, VALUE_PANEL, n_v_tiles, n_groups, target, sum_scales, VALUE_STEPS * STEP,
                                      buffer, values, 0, 0, 0)
            else:
                panel_products_int8_b(at, weight_panel, 1, values, VALUE_PANEL, n_v_tiles, n_groups, target, sum_scales, VALUE_STEPS * STEP,
                                      buffer, values, 0, 0, 0)
    release()
    for i in range(n):
        at = sums + i // 16 * n_v_tiles * TILE_BYTES + 64 * (i % 16)
        row, factor = output_row(out + i // n_head * out_token + i % n_head * out_head, partial, i, n_v, row_max, row_sum)
        store_values(at, n_v, factor, row, buffer)


@inner
def score_part(wide, keys, key_panel, n_keys, queries, query_panel, n_q, step, n_steps, n_all, column, scores, scales, buffer):
    """Multiply panels of keys with queries over some steps, and scale.

    The scales of queries are `column` bytes behind all steps.
    """
    a, b, columns = keys + step * STEP, queries + step * STEP, (n_all - step) * STEP + column
    if wide:
        panel_products_int8x2(a, key_panel, n_keys, b, query_panel, n_q, n_steps, scores, scales, columns, buffer, b, 0, 0, 0)
    else:
        panel_products_int8_a(a, key_panel, n_keys, b, query_panel, n_q, n_steps, scores, scales, columns, buffer, b, 0, 0, 0)


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
