"""Flash attention in AMX tiles (amx.py), with bfloat16 pairs.

Keys and queries are split into bfloat16 pairs; tiles of keys pass under an online softmax. Scores are tiles of keys x queries, so that the
softmax of sixteen queries is vectorised without a sum over lanes.
"""
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import LOW_PARTS, STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.bf16x2.gemm import panel_products
from pydsa.backends.cpu.bf16x2.panels import store_bf16x2
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import constant, float_at, floats, i32x16, load_floats, pointer, prefetch, store
from pydsa.backends.cpu.softmax import (MINUS_INFINITY, exp_floats, key_at, mask_scores, max_end, min_end, or_zero, output_row,
                                        rescale_sums, set_bias, set_limits, update_statistics)


TILE = 128      # keys: at V3.2's width of 576, 560 KiB as keys and as values, within a second-level cache
KEY_PANELS, VALUE_STEPS = TILE // 16, TILE // 32
KEYS_AHEAD = 16       # prefetch distance for selected keys, in keys
QUERIES = 256   # heads times tokens that share a tile of keys


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
def pack_queries(q, q_head, width, n, first, n_steps, row, panel):
    """Pack queries first to first + 16 of n as a B panel.

    Queries are the heads of all tokens. The panel is padded by repeating the last query.
    """
    for i in range(16):
        source = q + min(first + i, n - 1) * q_head
        for s in range(width // 32):
            store_bf16x2(panel + STEP * s + 64 * i, load_floats(source, 128 * s), load_floats(source, 128 * s + 64))
        if width % 32:
            for k in range(width // 32 * 32, width):
                store(row, 4 * k, float_at(source, 4 * k))
            s = n_steps - 1
            store_bf16x2(panel + STEP * s + 64 * i, load_floats(row, 128 * s), load_floats(row, 128 * s + 64))
    for s in range(n_steps):
        for part in (0, LOW_PARTS):
            transpose(panel + STEP * s + part, 64, panel + STEP * s + part, 64)


@inner
def pack_keys(rows, row_bytes, dequantize, row_n, indices, first, n, end, width, n_steps, n_v_tiles, row, keys, values):
    """Pack keys first to first + n as A panels, and as B panels for values.

    A panels run over the width; B panels run over 32 keys a step. Keys are padded with zeros to a multiple of 32. Selected keys are
    scattered in memory, so they are prefetched KEYS_AHEAD keys ahead, up to key `end`. `row` is scratch for a row of floats, 0 beyond the
    width.
    """
    for j in range(0, n, 32):
        for i in range(j, j + 32):
            if i < n:
                if indices:
                    upcoming = rows + key_at(indices, min(first + i + KEYS_AHEAD, end - 1)) * row_bytes
                    for line in range(0, row_bytes, 64):
                        prefetch(upcoming, line)
                call_block_function(dequantize, rows + key_at(indices, first + i) * row_bytes, row_n, row)
            elif i == n:
                for k in range(width):
                    store(row, 4 * k, np.float32(0))
            panel = keys + i // 16 * n_steps * STEP + 64 * (i % 16)
            for s in range(n_steps):
                store_bf16x2(panel + STEP * s, load_floats(row, 128 * s), load_floats(row, 128 * s + 64))
        upper, lower = keys + j // 16 * n_steps * STEP, keys + (j // 16 + 1) * n_steps * STEP       # sixteen keys, and the next sixteen
        for s in range((n_v_tiles + 1) // 2):
            tile = values + (2 * s * VALUE_STEPS + j // 32) * STEP
            for at in range(0, STEP, 64):       # high parts of keys, then low ones
                a, b = interleave_int16(upper + s * STEP + at, lower + s * STEP + at)
                store(tile, at, a)
                store(tile, VALUE_STEPS * STEP + at, b)


def attend(out, out_token, out_head, q, q_head, n_tokens, n_head, width, n_v, rows, row_bytes, dequantize, row_n, indices,
           key_start, key_ends, mask, mask_row, scale, partial):
    """Attend to keys key_start to key_ends[t] of each token t.

    out[t, h] = softmax(scale q[t, h] . key + mask) value. With indices, key s is the row indices[s].

    Addresses: out float32 [T, H, n_v] with strides out_token, out_head; q float32 [T, H, width], where q_head is the stride of all T H
    queries; rows of a cache with stride row_bytes; indices int32, or 0 for all keys; key_ends int64 [T]; mask float32 [T, n_kv] with stride
    mask_row, or 0; partial: where each query's row_max, row_sum and sum of values are written instead of out (see partial_bytes), or 0.
    Strides are in bytes. scale: the bits of a float32.
    """
    n, scale = n_tokens * n_head, float_from_bits(np.uint32(scale))
    n_q, n_steps, n_v_tiles = (n + 15) // 16, (width + 31) // 32, (n_v + 31) // 32 * 2
    # queries, keys, values, weights, scores, sums, a row, a mask's tile; for each query row_max, row_sum, rescale, limit
    sizes = (n_q * n_steps * STEP, KEY_PANELS * n_steps * STEP, n_v_tiles * VALUE_STEPS * STEP, n_q * VALUE_STEPS * STEP,
             KEY_PANELS * n_q * TILE_BYTES, n_q * n_v_tiles * TILE_BYTES, 128 * n_steps, 64 * TILE, 64 * n_q, 64 * n_q, 64 * n_q, 64 * n_q)
    queries = thread_scratch(sum(sizes))
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
    limits = rescale + sizes[10]
    for k in range(32 * n_steps):
        store(row, 4 * k, np.float32(0))
    for j in range(n_q):
        pack_queries(q, q_head, width, n, 16 * j, n_steps, row, queries + j * n_steps * STEP)
        store(row_max, 64 * j, floats(MINUS_INFINITY))
        store(row_sum, 64 * j, floats(np.float32(0)))
    end, first_end = max_end(key_ends, n_tokens), min_end(key_ends, n_tokens)
    configure()
    for first in range(key_start, end, TILE):
        n_valid = min(TILE, end - first)
        n_groups = (n_valid + 31) // 32
        pack_keys(rows, row_bytes, dequantize, row_n, indices, first, n_valid, end, width, n_steps, n_v_tiles, row, keys, values)
        panel_products(keys, n_steps * STEP, 2 * n_groups, queries, n_steps * STEP, n_q, n_steps, scores, True, queries)
        for j in range(n_q):
            set_limits(limits + 64 * j, 16 * j, n_head, n_tokens, key_ends, first)
            if mask:
                set_bias(bias, 16 * j, n_head, n_tokens, mask + 4 * first, mask_row, n_valid)
            softmax_tile(scores + j * TILE_BYTES, n_q * TILE_BYTES, 2 * n_groups, first_end - first < 32 * n_groups, limits + 64 * j,
                         bias if mask else 0, scale, row_max + 64 * j, row_sum + 64 * j, rescale + 64 * j,
                         weights + j * VALUE_STEPS * STEP)
            if first > key_start:
                rescale_sums(sums + j * n_v_tiles * TILE_BYTES, n_v_tiles, rescale + 64 * j)
        panel_products(weights, VALUE_STEPS * STEP, n_q, values, VALUE_STEPS * STEP, n_v_tiles, n_groups, sums, first == key_start,
                       values)
    release()
    if key_start >= end:       # no key at all
        for j in range(n_q * n_v_tiles * 16):
            store(sums, 64 * j, floats(np.float32(0)))
    for i in range(n):
        at = sums + i // 16 * n_v_tiles * TILE_BYTES + 64 * (i % 16)
        row, factor = output_row(out + i // n_head * out_token + i % n_head * out_head, partial, i, n_v, row_max, row_sum)
        for k in range(0, n_v - 15, 16):
            store(row, 4 * k, load_floats(at, k // 16 * TILE_BYTES) * factor)
        for k in range(n_v // 16 * 16, n_v):
            store(row, 4 * k, float_at(at, k // 16 * TILE_BYTES + 4 * (k % 16)) * factor)


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
