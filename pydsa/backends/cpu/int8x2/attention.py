"""Attention in AMX tiles of bytes over caches of whole numbers (quants/whole_rows.py): keys are moved to where tiles want them.

Queries, and the softmax's weights, become whole numbers of 16 bits too, high and low bytes; of the four products of bytes the three
largest are taken (amx.py). A key has a scale for its compressed values and one for the rotated ones, so its score comes in two sums. What
multiplies its values, the first, becomes part of its weight: beside the largest such scale of a tile, the weights are below 1.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import LOW_PARTS, STEP, SUMS, configure, release
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8_a, panel_products_int8_b, panel_products_int8x2
from pydsa.backends.cpu.int8x2.panels import round_query
from pydsa.backends.cpu.integer_rows import parts
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.lanes import split_int8x2, transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import (I8, constant, f32x16, float_at, floats, i32x16, load_floats, load_int16, nearest, pointer, prefetch,
                                     store)
from pydsa.backends.cpu.softmax import (MINUS_INFINITY, exp_floats, key_at, last_of, least_of, mask_scores, or_zero, output_row,
                                        rescale_sums, set_bias, set_limits, update_statistics)
from pydsa.quants import INT8X2_MAX


TILE = 256              # keys; of 64 a step each
KEYS_AHEAD = 32         # chosen keys that are asked for while one is moved
VALUE_STEPS = TILE // 64
VALUE_PANEL = VALUE_STEPS * STEP + 64       # and 16 ones, which panel_products_int8x2 takes for the scales of columns


@intrinsic
def interleave(typingctx, a, b, c, d, target, panel):
    """64 bytes at each of four addresses -> four rows of right panels that lie so many bytes apart: byte i of a, b, c, d side by side.

    Bytes 16 i + 4 j to 16 i + 4 j + 3 go to lanes 4 i to 4 i + 3 of row j.
    """
    def codegen(context, builder, signature, args):
        *sources, target, panel = args
        kind = ir.VectorType(I8, 64)
        a, b, c, d = (builder.load(pointer(builder, at, kind), align=1) for at in sources)

        def by_turns(x, y, size, upper):
            """Pieces of so many bytes of x and y by turns, from the lower or the upper half of each 16 bytes."""
            order = [half + 16 * lane + 8 * upper + piece * size + byte
                     for lane in range(4) for piece in range(8 // size) for half in (0, 64) for byte in range(size)]
            return builder.shuffle_vector(x, y, constant(order))
        rows = [by_turns(by_turns(a, b, 1, first), by_turns(c, d, 1, first), 2, second) for first in (0, 1) for second in (0, 1)]
        for j, row in enumerate(rows):
            builder.store(row, pointer(builder, builder.add(target, builder.mul(panel, panel.type(j))), kind), align=1)
        return context.get_dummy_value()
    return types.void(*[types.intp] * 6), codegen


@intrinsic
def put_in_order(typingctx, address, panel):
    """The sums of 64 values, as interleave() spread them over four tiles that lie so many bytes apart, in order: four f32x16."""
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
def store_four(typingctx, address, a, b, c, d):
    """The numbers of four keys for sixteen queries, from 0 to INT8X2_MAX: rounded, high bytes to an address, low ones LOW_PARTS on."""
    def codegen(context, builder, signature, args):
        at, *numbers = args
        pairs = [split_int8x2(builder, nearest(builder, v)) for v in numbers]
        for part, offset in ((0, 0), (1, LOW_PARTS)):
            whole = builder.and_(pairs[0][part], constant([255] * 16))
            for j in (1, 2, 3):
                byte = builder.and_(pairs[j][part], constant([255] * 16))
                whole = builder.or_(whole, builder.shl(byte, constant([8 * j] * 16)))
            builder.store(whole, pointer(builder, builder.add(at, at.type(offset)), i32x16.ir), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, f32x16, f32x16, f32x16, f32x16), codegen


@inner
def pack_query(q, first, second, row, panel, i):
    """A query as row i of a right panel, not yet turned over, and its scales behind the steps: of the first and of the second part."""
    n_steps = steps(first)
    scales = panel + (n_steps + steps(second)) * STEP + 4 * i
    store(scales, 0, round_query(q, first, row, panel + 64 * i))
    store(scales, 64, round_query(q + 4 * first, second, row, panel + n_steps * STEP + 64 * i) if second else np.float32(0))


@inner
def steps(n):
    return (n + 63) // 64


@inner
def pack_keys(rows, row_bytes, first, second, wide, indices, start, n, most, n_v, keys, key_panel, scales, values):
    """n keys from the start-th on as left panels, with their scales, and their values as right panels; up to a multiple of 64 they are 0.

    Chosen keys lie apart: those that come soon, up to key `most`, are asked for. wide: numbers have low bytes.
    """
    width = first + second
    for j in range(0, n, 64):
        for i in range(j, j + 64):
            panel = keys + i // 16 * key_panel + 64 * (i % 16)
            if i >= n:
                for s in range(steps(first) + steps(second)):
                    store(panel + s * STEP, 0, floats(np.float32(0)))
                    store(panel + s * STEP, LOW_PARTS, floats(np.float32(0)))
                store(scales, 4 * i, np.float32(0))
                store(scales, 4 * (TILE + i), np.float32(0))
                continue
            source = rows + key_at(indices, start + i) * row_bytes
            if indices:
                soon = rows + key_at(indices, min(start + i + KEYS_AHEAD, most - 1)) * row_bytes
                for line in range(0, row_bytes, 64):
                    prefetch(soon, line)
            for s in range(steps(first) + steps(second)):
                at = source + 64 * s if s < steps(first) else source + first + 64 * (s - steps(first))
                store(panel + s * STEP, 0, load_int16(at, 0))
                if wide:
                    store(panel + s * STEP, LOW_PARTS, load_int16(at, width))
            behind = source + (2 * width if wide else width)
            store(scales, 4 * i, float_at(behind, 0))
            store(scales, 4 * (TILE + i), float_at(behind, 4) if second else np.float32(0))
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
    """What the weights of n keys are multiplied by, INT8X2_MAX for the one whose values have the largest scale -> that scale.

    Keys that are not finite make the scores so, and what they are multiplied by is 0.
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
           first_key, last_key, mask, mask_row, scale, part):
    """out[t, h] = softmax(scale q[t, h] . key + mask) value over the keys from first_key to last_key[t], or those that indices have there.

    Addresses: out float32 [T, H, n_v], of which tokens and heads lie so many bytes apart; q float32 [T, H, width], in whose memory one head
    follows the other at one distance; rows of a cache; indices int32, 0 for all keys; last_key int64 [T]; mask float32 [T, n_kv]
    or 0; part: where each query leaves its greatest score, its sum of weights and of values instead, or 0. scale: a float32's bits. n_v is
    at most the length of the rows' first part.
    """
    n, scale = n_tokens * n_head, float_from_bits(np.uint32(scale))
    first, second = parts(row_n)
    wide = row_bytes - (8 if second else 4) == 2 * width        # numbers have low bytes
    unit = np.float32(256 if wide else 1)       # a product of whole numbers beside what panel_products_int8x2 makes of their bytes
    n_q, n_steps, n_v_tiles = (n + 15) // 16, steps(first) + steps(second), 4 * steps(n_v)
    key_panel, query_panel, weight_panel = n_steps * STEP + 64, n_steps * STEP + 128, VALUE_STEPS * STEP + 64
    queries = own_scratch(n_q * query_panel + TILE // 16 * key_panel + n_v_tiles * VALUE_PANEL + n_q * weight_panel
                          + TILE // 16 * n_q * SUMS + n_q * n_v_tiles * SUMS + 10 * SUMS + 64 * TILE + 12 * TILE + 64 * (4 * n_q + 8))
    keys = queries + n_q * query_panel
    values = keys + TILE // 16 * key_panel
    weights = values + n_v_tiles * VALUE_PANEL
    scores = weights + n_q * weight_panel
    sums = scores + TILE // 16 * n_q * SUMS
    buffer = sums + n_q * n_v_tiles * SUMS
    bias = buffer + 10 * SUMS
    scales = bias + 64 * TILE
    factors = scales + 8 * TILE
    row = factors + 4 * TILE
    of_sums = row + 256
    row_max = of_sums + 64
    row_sum = row_max + 64 * n_q
    rescale = row_sum + 64 * n_q
    limits = rescale + 64 * n_q
    for i in range(16 * n_q):
        panel = queries + i // 16 * query_panel
        pack_query(q + min(i, n - 1) * q_head, first, second, row, panel, i % 16)
        if i % 16 == 15:
            for k in (0, 64):
                store(panel, n_steps * STEP + k, load_floats(panel, n_steps * STEP + k) * unit)
            for s in range(n_steps):
                for at in (0, LOW_PARTS):
                    transpose(panel + s * STEP + at, 64, panel + s * STEP + at, 64)
    for j in range(n_q):
        store(row_max, 64 * j, floats(MINUS_INFINITY))
        store(row_sum, 64 * j, floats(np.float32(0)))
    for k in range(0, n_q * n_v_tiles * SUMS, 64):
        store(sums, k, floats(np.float32(0)))
    for d in range(n_v_tiles):
        store(values, d * VALUE_PANEL + VALUE_STEPS * STEP, floats(np.float32(1)))
    most, least = last_of(last_key, n_tokens), least_of(last_key, n_tokens)
    configure()
    for start in range(first_key, most, TILE):
        there = min(TILE, most - start)
        n_groups = (there + 63) // 64
        pack_keys(rows, row_bytes, first, second, wide, indices, start, there, most, n_v, keys, key_panel, scales, values)
        store(of_sums, 0, floats(relative_scales(scales, 64 * n_groups, factors) / np.float32(INT8X2_MAX) * unit))
        for k in range(0, 4 * n_groups * n_q * SUMS, 64):
            store(scores, k, floats(np.float32(0)))
        for s in range(0, steps(first), 4):
            multiply_part(wide, keys, key_panel, 4 * n_groups, queries, query_panel, n_q, s, min(4, steps(first) - s), n_steps, 0, scores,
                          scales, buffer)
        for s in range(steps(first), n_steps, 4):
            multiply_part(wide, keys, key_panel, 4 * n_groups, queries, query_panel, n_q, s, min(4, n_steps - s), n_steps, 64, scores,
                          scales + 4 * TILE, buffer)
        for j in range(n_q):
            set_limits(limits + 64 * j, 16 * j, n_head, n_tokens, last_key, start)
            if mask:
                set_bias(bias, 16 * j, n_head, n_tokens, mask + 4 * start, mask_row, there)
            softmax_tile(scores + j * SUMS, n_q * SUMS, 4 * n_groups, least - start < 64 * n_groups, limits + 64 * j, bias if mask else 0,
                         0, scale, row_max + 64 * j, row_sum + 64 * j, rescale + 64 * j, factors, weights + j * weight_panel)
            if start > first_key:
                rescale_sums(sums + j * n_v_tiles * SUMS, n_v_tiles, rescale + 64 * j)
            at, target = weights + j * weight_panel, sums + j * n_v_tiles * SUMS
            if wide:
                panel_products_int8x2(at, weight_panel, 1, values, VALUE_PANEL, n_v_tiles, n_groups, target, of_sums, VALUE_STEPS * STEP,
                                      buffer, values, 0, 0, 0)
            else:
                panel_products_int8_b(at, weight_panel, 1, values, VALUE_PANEL, n_v_tiles, n_groups, target, of_sums, VALUE_STEPS * STEP,
                                      buffer, values, 0, 0, 0)
    release()
    for i in range(n):
        at = sums + i // 16 * n_v_tiles * SUMS + 64 * (i % 16)
        row, factor = output_row(out + i // n_head * out_token + i % n_head * out_head, part, i, n_v, row_max, row_sum)
        store_values(at, n_v, factor, row, buffer)


@inner
def multiply_part(wide, keys, key_panel, n_keys, queries, query_panel, n_q, step, n_steps, n_all, column, scores, scales, buffer):
    """Panels of keys times queries over some steps, times the scales of both, which for queries lie `column` bytes behind all steps."""
    a, b, columns = keys + step * STEP, queries + step * STEP, (n_all - step) * STEP + column
    if wide:
        panel_products_int8x2(a, key_panel, n_keys, b, query_panel, n_q, n_steps, scores, scales, columns, buffer, b, 0, 0, 0)
    else:
        panel_products_int8_a(a, key_panel, n_keys, b, query_panel, n_q, n_steps, scores, scales, columns, buffer, b, 0, 0, 0)


@inner
def store_values(at, n_v, factor, row, buffer):
    """n_v sums of one query, 64 of them in four tiles, times a factor, in order."""
    for k in range(0, n_v, 64):
        numbers = put_in_order(at + k // 16 * SUMS, SUMS)
        target = row + 4 * k if k + 64 <= n_v else buffer
        store(target, 0, numbers[0] * factor)
        store(target, 64, numbers[1] * factor)
        store(target, 128, numbers[2] * factor)
        store(target, 192, numbers[3] * factor)
        if k + 64 > n_v:
            for i in range(k, n_v):
                store(row, 4 * i, float_at(buffer, 4 * (i - k)))


@inner
def softmax_tile(scores, panel, n_panels, limited, limits, bias, chosen, scale, row_max, row_sum, rescale, factors, weights):
    """Scores of keys and sixteen queries -> their weights beside the greatest so far, times factors, in whole numbers as a left panel.

    Both sums are brought up to date. Tiles of scores lie `panel` bytes apart; n_panels is a multiple of four. `rescale` is what the sums so
    far must be multiplied by.
    """
    before = load_floats(row_max, 0)
    new = mask_scores(scores, panel, n_panels, limited, limits, bias, chosen, scale, before)
    base = or_zero(new)
    sums = floats(np.float32(0))
    for i in range(n_panels):
        for k in range(0, 16, 4):
            at, of_keys = scores + i * panel + 64 * k, factors + 4 * (16 * i + k)
            a, b = exp_floats(load_floats(at, 0) - base), exp_floats(load_floats(at, 64) - base)
            c, d = exp_floats(load_floats(at, 128) - base), exp_floats(load_floats(at, 192) - base)
            sums = sums + ((a + b) + (c + d))
            store_four(weights + i // 4 * STEP + 64 * (i % 4 * 4 + k // 4), a * float_at(of_keys, 0), b * float_at(of_keys, 4),
                       c * float_at(of_keys, 8), d * float_at(of_keys, 12))
    for s in range(n_panels // 4):
        for part in (0, LOW_PARTS):
            transpose(weights + s * STEP + part, 64, weights + s * STEP + part, 64)
    update_statistics(new, exp_floats(before - base), sums, row_max, row_sum, rescale)
