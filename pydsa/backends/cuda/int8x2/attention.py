"""Attention over int8 and int16 caches in int8 tensor cores.

A block has one token, HEADS heads and up to COLUMNS columns of the value. It walks the token's keys in tiles of SIDE: all keys, or the
chosen ones, gathered row by row. Queries and softmax weights are quantized to int16 and split into int8 pairs (256 high + low). Of the
four products of pairs the three largest are computed, as on the CPU (cpu/int8x2/attention.py).

A cache row (cpu/integer_rows.py) has two parts with a scale each, so a score is the sum of two scaled dot products. The scale of a key's
value, relative to the largest one of the tile, becomes part of the key's softmax weight.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.linear import head_scale, pack_head_four
from pydsa.backends.cuda.intrinsics.device import (MMA_WARP, SIMULATED, WARP, bits_float, device, exp, load_four_u32, mma_s8, nearest,
                                                   pack_int8x2, permuted, store_four_u32, sync, u32_at)
from pydsa.backends.cuda.modes import SPARSE, key_and_bias, split_of_keys
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel
from pydsa.quants import INT8X2_MAX


ROW_TILES, COLUMN_WARPS = (1, 1) if SIMULATED else (4, 2)   # a warp has 16 heads, and 32 keys or 32 columns
WARPS = ROW_TILES * COLUMN_WARPS
THREADS = MMA_WARP * WARPS
HEADS = 16 * ROW_TILES
SIDE = 32 * COLUMN_WARPS                    # keys of a tile; their values, or columns of the value, that are in shared memory at a time
MIN_HEADS = 2 if SIMULATED else 24          # with fewer heads most rows of a tile would be padding
PARTS = 8                                   # accumulators of a block, SIDE columns each
COLUMNS = PARTS * SIDE
SIDE_U32 = SIDE // 4
SIDE_U32_BITS = SIDE_U32.bit_length() - 1
PITCH = SIDE_U32 + 4                        # uint32 from a row to the next: no bank conflicts in fragment loads
COLUMN_PITCH = SIDE + 8
PLANE = SIDE * PITCH                        # of staged high bytes; low bytes follow
STAGE = 2 * max(PLANE, SIDE_U32 * COLUMN_PITCH)
SCORE_PITCH = SIDE + 4
SCORES, WEIGHT_PLANE = HEADS * SCORE_PITCH, HEADS * PITCH
WEIGHTS = 2 * WEIGHT_PLANE
HEAD_THREADS = THREADS // HEADS             # threads that share the softmax of one head
PARTIALS = HEADS * HEAD_THREADS
SUMS = 16                                   # accumulators of a lane: four tiles of 16 heads x 8 keys or columns
SIGNATURE = ("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], u4[::1], f4[:,:,:], u1[::1], i8, i4, i4, i8[:], i4[:,:], f4[:,:], i4, i4, "
             "f4")
ZERO, MINUS_INFINITY, INFINITY = np.float32(0), np.float32(-np.inf), np.float32(np.inf)


def takes(latents, n_head, n_v):
    """Whether this file's kernels can attend, with their tiles well filled."""
    parts = latents.first % 4 == 0 == latents.second % 4 and n_v <= latents.first
    return latents.storage in ATTEND and parts and n_head >= MIN_HEADS


@kernel("u4[::1], f4[:,:,:], f4[:,:,:], i4, i4", WARP)
def pack_heads(packed, scales, q, first, n_steps):
    """Quantize queries into A fragments of mma.m16n8k32. One part of one head per warp.

    packed: [t, tile, step, plane, lane, 4]. Heads are zero-padded to a multiple of sixteen.
    """
    lane, h, t, part = cuda.threadIdx.x, cuda.blockIdx.x // 2, cuda.blockIdx.y, cuda.blockIdx.x % 2
    start, end = (0, first) if part == 0 else (first, q.shape[2])
    length = end - start
    if h >= q.shape[1]:
        end = start
    factor, scale = head_scale(q, t, h, start, end, lane)
    if lane == 0 and h < q.shape[1]:
        scales[t, h, part] = scale
    n_tiles, before = (q.shape[1] + 15) // 16, (first + 31) // 32 if part == 1 else 0
    base = (np.int64(t) * n_tiles + h // 16) * n_steps
    for four in range(lane, (length + 31) // 32 * 8, WARP):
        i = start + 4 * four
        at = (base + before + four // 8) * 256 + (h % 8 * 4 + four % 4) * 4 + h % 16 // 8 + four % 8 // 4 * 2
        packed[at], packed[at + 128] = pack_head_four(q, t, h, i, factor, i < end)


@device
def transposed(a, b, c, e):
    """Transpose a 4 x 4 tile of bytes, one row per uint32."""
    ab, ce = permuted(a, b, np.uint32(0x5140)), permuted(c, e, np.uint32(0x5140))
    ab_high, ce_high = permuted(a, b, np.uint32(0x7362)), permuted(c, e, np.uint32(0x7362))
    return (permuted(ab, ce, np.uint32(0x5410)), permuted(ab, ce, np.uint32(0x7632)),
            permuted(ab_high, ce_high, np.uint32(0x5410)), permuted(ab_high, ce_high, np.uint32(0x7632)))


@device
def softmax_tile(scores, weights, value_factors, partials, row_max, row_sum, rescale, thread):
    """Online softmax of a tile: scores become int16 weights, split into int8 pairs.

    weights: uint32 of four keys' high bytes, and of their low bytes. value_factors: what each key's weight is multiplied by, at most
    INT8X2_MAX. row_max, row_sum and rescale of each head are updated. HEAD_THREADS threads share the keys of a head.
    """
    h, share = thread // HEAD_THREADS, thread % HEAD_THREADS
    new_max = MINUS_INFINITY
    for four in range(share, SIDE_U32, HEAD_THREADS):
        for i in range(4):
            new_max = max(new_max, scores[h * SCORE_PITCH + 4 * four + i])
    partials[thread] = new_max
    sync()
    old_max = row_max[h]
    new_max = old_max
    for i in range(HEAD_THREADS):
        new_max = max(new_max, partials[h * HEAD_THREADS + i])
    base, added = new_max if new_max > MINUS_INFINITY else ZERO, ZERO
    sync()
    for four in range(share, SIDE_U32, HEAD_THREADS):
        at, key = h * SCORE_PITCH + 4 * four, 4 * four
        w0, w1, w2, w3 = exp(scores[at] - base), exp(scores[at + 1] - base), exp(scores[at + 2] - base), exp(scores[at + 3] - base)
        added += (w0 + w1) + (w2 + w3)
        high, low = pack_int8x2(nearest(w0, value_factors[key]), nearest(w1, value_factors[key + 1]), nearest(w2, value_factors[key + 2]),
                                nearest(w3, value_factors[key + 3]))
        weights[h * PITCH + four], weights[WEIGHT_PLANE + h * PITCH + four] = high, low
    partials[thread] = added
    sync()
    if share == 0:
        factor, added = exp(old_max - base), ZERO
        for i in range(HEAD_THREADS):
            added += partials[h * HEAD_THREADS + i]
        row_max[h], row_sum[h], rescale[h] = new_max, row_sum[h] * factor + added, factor
    sync()


@device
def first_fragment(t, tile, n_head, first, second):
    """The first step of a head tile's fragments in `packed`, see pack_heads."""
    n_tiles, n_steps = (n_head + 15) // 16, (first + 31) // 32 + (second + 31) // 32
    return (np.int64(t) * n_tiles + min(tile, n_tiles - 1)) * n_steps


@device
def load_keys(key_at, bias, first_scale, second_scale, start, n, planes, data, row_bytes, first, second, mode, indices, mask, t, thread):
    """Stage where a tile's keys begin, with their biases and scales.

    A row has `planes` bytes a value, high bytes first, then a float32 scale for each part.
    """
    if thread < SIDE:
        key, added = key_and_bias(start + thread, n, mode, indices, mask, t)
        key_at[thread], bias[thread] = key * row_bytes if key >= 0 else np.int64(-1), added
        scales_at = key * row_bytes + planes * (first + second)
        first_scale[thread] = bits_float(u32_at(data, scales_at)) if key >= 0 else ZERO
        second_scale[thread] = bits_float(u32_at(data, scales_at + 4)) if key >= 0 and second > 0 else ZERO


@device
def set_value_factors(value_factors, first_scale, thread):
    """Set what each key's weight is multiplied by when it is quantized.

    It is INT8X2_MAX times the scale of the key's value over the largest one. Returns the largest finite scale of the tile.
    """
    max_scale = ZERO
    for i in range(SIDE):
        d = first_scale[i]
        if max_scale < d < INFINITY:
            max_scale = d
    if thread < SIDE:
        d = first_scale[thread]
        value_factors[thread] = d / max_scale * np.float32(INT8X2_MAX) if ZERO < d <= max_scale else ZERO
    return max_scale


@device
def add_scores(scores, high, mixed, part, second, factor, factor_8, bias, first_scale, second_scale, row, first_key, c):
    """Scores of a tile: the scaled dot products of both parts, plus the bias.

    high, mixed: a lane's accumulators, 256 high + mixed. factor, factor_8: what those of its two rows are multiplied by.
    """
    for i in range(SUMS):       # each thread its own accumulators, one part after the other: saves registers
        key = first_key + i // 4 * 8 + 2 * c + i % 2
        at = (row + i % 4 // 2 * 8) * SCORE_PITCH + key
        product = (factor if i % 4 < 2 else factor_8) * (np.float32(256) * np.float32(high[i]) + np.float32(mixed[i]))
        if part == 0:
            scores[at] = product * first_scale[key] + bias[key] if bias[key] > MINUS_INFINITY else MINUS_INFINITY
        elif second > 0 and bias[key] > MINUS_INFINITY:
            scores[at] += product * second_scale[key]


@device
def store_columns(out, acc, factor, factor_8, t, head, column, thread):
    """Store SIDE columns of an accumulator, scaled by a factor per row.

    factor and factor_8 are those of a lane's two rows.
    """
    warp, lane = thread >> 5, thread & 31
    row, at = warp % ROW_TILES * 16 + (lane >> 2), column + warp // ROW_TILES * 32 + 2 * (lane & 3)
    for i in range(SUMS):
        h, col = row + i % 4 // 2 * 8, at + i // 4 * 8 + i % 2
        if head + h < out.shape[1] and col < out.shape[2]:
            out[t, head + h, col] = acc[i] * (factor if i % 4 < 2 else factor_8)


@device
def store_all_columns(out, acc, factor, factor_8, t, head, column, thread):
    """store_columns for all accumulators."""
    store_columns(out, acc[0], factor, factor_8, t, head, column, thread)
    store_columns(out, acc[1], factor, factor_8, t, head, column + SIDE, thread)
    store_columns(out, acc[2], factor, factor_8, t, head, column + 2 * SIDE, thread)
    store_columns(out, acc[3], factor, factor_8, t, head, column + 3 * SIDE, thread)
    store_columns(out, acc[4], factor, factor_8, t, head, column + 4 * SIDE, thread)
    store_columns(out, acc[5], factor, factor_8, t, head, column + 5 * SIDE, thread)
    store_columns(out, acc[6], factor, factor_8, t, head, column + 6 * SIDE, thread)
    store_columns(out, acc[7], factor, factor_8, t, head, column + 7 * SIDE, thread)


@device
def clear(acc, row_max, row_sum, thread):
    """Initialize all accumulators and the online softmax."""
    if thread < HEADS:
        row_max[thread], row_sum[thread] = MINUS_INFINITY, ZERO
    for i in range(SUMS):
        acc[0][i] = acc[1][i] = acc[2][i] = acc[3][i] = acc[4][i] = acc[5][i] = acc[6][i] = acc[7][i] = ZERO


@device
def final_factors(row_sum, row, n_splits):
    """What a lane's two rows are multiplied by: 1 / row_sum, or 1 if split."""
    if n_splits > 1:
        return np.float32(1), np.float32(1)
    a, b = row_sum[row], row_sum[row + 8]
    return np.float32(1) / a if a != ZERO else ZERO, np.float32(1) / b if b != ZERO else ZERO


def _make_multiply_part(planes):
    @device
    def multiply_part(high, mixed, stage, packed, fragments_at, key_at, data, part, first, second, first_key, lane, thread):
        """Dot products of queries with one part of a tile's keys.

        high: those of high bytes. mixed: those of high with low bytes. The part is staged in shared memory, SIDE values at a time.
        fragments_at: the first step of the queries' fragments in `packed`.
        """
        begin, length, step = (0, first, 0) if part == 0 else (first, second, (first + 31) // 32)
        for i in range(SUMS):
            high[i], mixed[i] = 0, 0
        for base in range(0, length, SIDE):
            for plane in range(planes):
                for j in range(SIDE * SIDE_U32 // THREADS):
                    task = j * THREADS + thread
                    at, i = key_at[task >> SIDE_U32_BITS], base + 4 * (task & SIDE_U32 - 1)
                    stage[plane * PLANE + (task >> SIDE_U32_BITS) * PITCH + (task & SIDE_U32 - 1)] = (
                        u32_at(data, at + (first + second) * plane + begin + i) if at >= 0 and i < length else np.uint32(0))
            sync()
            for s in range(SIDE // 32):
                if base + 32 * s < length:
                    at = (fragments_at + step + base // 32 + s) * 256 + 4 * lane
                    a0, a1, a2, a3 = load_four_u32(packed, at)
                    l0, l1, l2, l3 = load_four_u32(packed, at + 128)
                    for tile in range(4):
                        at = (first_key + (lane >> 2) + 8 * tile) * PITCH + 8 * s + (lane & 3)
                        b0, b1 = stage[at], stage[at + 4]
                        i = 4 * tile
                        high[i], high[i + 1], high[i + 2], high[i + 3] = mma_s8(
                            a0, a1, a2, a3, b0, b1, high[i], high[i + 1], high[i + 2], high[i + 3])
                        mixed[i], mixed[i + 1], mixed[i + 2], mixed[i + 3] = mma_s8(
                            l0, l1, l2, l3, b0, b1, mixed[i], mixed[i + 1], mixed[i + 2], mixed[i + 3])
                        if planes == 2:
                            b0, b1 = stage[at + PLANE], stage[at + PLANE + 4]
                            mixed[i], mixed[i + 1], mixed[i + 2], mixed[i + 3] = mma_s8(
                                a0, a1, a2, a3, b0, b1, mixed[i], mixed[i + 1], mixed[i + 2], mixed[i + 3])
            sync()
    return multiply_part


def _make_stage_values(planes):
    @device
    def stage_values(stage, key_at, data, first, second, column, thread):
        """Stage SIDE columns of a tile's values, transposed: four keys per uint32."""
        for plane in range(planes):
            for j in range(SIDE_U32 * SIDE_U32 // THREADS):
                task = j * THREADS + thread
                four, group = task & SIDE_U32 - 1, task >> SIDE_U32_BITS      # four columns, of four keys
                at = column + 4 * four + (first + second) * plane
                valid = column + 4 * four < first
                a, b, d, e = key_at[4 * group], key_at[4 * group + 1], key_at[4 * group + 2], key_at[4 * group + 3]
                w0 = u32_at(data, a + at) if valid and a >= 0 else np.uint32(0)
                w1 = u32_at(data, b + at) if valid and b >= 0 else np.uint32(0)
                w2 = u32_at(data, d + at) if valid and d >= 0 else np.uint32(0)
                w3 = u32_at(data, e + at) if valid and e >= 0 else np.uint32(0)
                w0, w1, w2, w3 = transposed(w0, w1, w2, w3)
                store_four_u32(stage, plane * SIDE_U32 * COLUMN_PITCH + group * COLUMN_PITCH + 4 * four, w0, w1, w2, w3)
    return stage_values


def _make_add_values(planes):
    stage_values = _make_stage_values(planes)

    @device
    def add_values(acc, stage, weights, rescale, key_at, data, first, second, column, n_v, unit, thread):
        """acc = rescale acc + weights times SIDE columns of the values."""
        warp, lane = thread >> 5, thread & 31
        row, first_column, c = warp % ROW_TILES * 16 + (lane >> 2), warp // ROW_TILES * 32 + (lane >> 2), lane & 3
        if column >= n_v:
            return
        stage_values(stage, key_at, data, first, second, column, thread)
        sync()
        for tile in range(4):
            p0, p1, p2, p3 = 0, 0, 0, 0
            for plane in range(2):      # high * high first
                for s in range(SIDE // 32):
                    at = row * PITCH + 8 * s + c
                    h0, h1, h2, h3 = weights[at], weights[at + 8 * PITCH], weights[at + 4], weights[at + 8 * PITCH + 4]
                    at += WEIGHT_PLANE
                    l0, l1, l2, l3 = weights[at], weights[at + 8 * PITCH], weights[at + 4], weights[at + 8 * PITCH + 4]
                    at = (8 * s + c) * COLUMN_PITCH + first_column + 8 * tile
                    b0, b1 = stage[at], stage[at + 4 * COLUMN_PITCH]
                    if plane == 0:
                        p0, p1, p2, p3 = mma_s8(h0, h1, h2, h3, b0, b1, p0, p1, p2, p3)
                    else:
                        p0, p1, p2, p3 = mma_s8(l0, l1, l2, l3, b0, b1, p0, p1, p2, p3)
                        if planes == 2:
                            at += SIDE_U32 * COLUMN_PITCH
                            p0, p1, p2, p3 = mma_s8(h0, h1, h2, h3, stage[at], stage[at + 4 * COLUMN_PITCH], p0, p1, p2, p3)
                if plane == 0:
                    p0, p1, p2, p3 = p0 << 8, p1 << 8, p2 << 8, p3 << 8
            factor, factor_8 = rescale[row], rescale[row + 8]
            acc[4 * tile] = acc[4 * tile] * factor + unit * np.float32(np.int32(p0))
            acc[4 * tile + 1] = acc[4 * tile + 1] * factor + unit * np.float32(np.int32(p1))
            acc[4 * tile + 2] = acc[4 * tile + 2] * factor_8 + unit * np.float32(np.int32(p2))
            acc[4 * tile + 3] = acc[4 * tile + 3] * factor_8 + unit * np.float32(np.int32(p3))
        sync()

    @device
    def add_all_values(acc, stage, weights, rescale, key_at, data, first, second, column, n_v, unit, thread):
        """add_values for all accumulators.

        Their indices are constants: with variable ones the accumulators would be in local memory.
        """
        add_values(acc[0], stage, weights, rescale, key_at, data, first, second, column, n_v, unit, thread)
        add_values(acc[1], stage, weights, rescale, key_at, data, first, second, column + SIDE, n_v, unit, thread)
        add_values(acc[2], stage, weights, rescale, key_at, data, first, second, column + 2 * SIDE, n_v, unit, thread)
        add_values(acc[3], stage, weights, rescale, key_at, data, first, second, column + 3 * SIDE, n_v, unit, thread)
        add_values(acc[4], stage, weights, rescale, key_at, data, first, second, column + 4 * SIDE, n_v, unit, thread)
        add_values(acc[5], stage, weights, rescale, key_at, data, first, second, column + 5 * SIDE, n_v, unit, thread)
        add_values(acc[6], stage, weights, rescale, key_at, data, first, second, column + 6 * SIDE, n_v, unit, thread)
        add_values(acc[7], stage, weights, rescale, key_at, data, first, second, column + 7 * SIDE, n_v, unit, thread)
    return add_all_values


def _make_attend(storage):
    planes = 2 if storage == "i16" else 1
    multiply_part, add_all_values = _make_multiply_part(planes), _make_add_values(planes)

    def attend(out, sums, row_maxes, row_sums, packed, scales, data, row_bytes, first, second, positions, indices, mask, mode, n_splits,
               scale):
        """out[t, h] of packed queries, or one split of it: sums, row_maxes and row_sums.

        mode: DENSE, keys up to positions[t]; MASKED, the same with mask[t, s] added; SPARSE, keys indices[t] up to the first negative.
        """
        stage = cuda.shared.array(STAGE, np.uint32, 16)
        scores = cuda.shared.array(SCORES, np.float32)
        weights = cuda.shared.array(WEIGHTS, np.uint32)
        key_at = cuda.shared.array(SIDE, np.int64)          # where a key's row begins, or -1
        bias = cuda.shared.array(SIDE, np.float32)
        first_scale = cuda.shared.array(SIDE, np.float32)
        second_scale = cuda.shared.array(SIDE, np.float32)
        value_factors = cuda.shared.array(SIDE, np.float32)
        partials = cuda.shared.array(PARTIALS, np.float32)
        row_max = cuda.shared.array(HEADS, np.float32)
        row_sum = cuda.shared.array(HEADS, np.float32)
        rescale = cuda.shared.array(HEADS, np.float32)
        acc = (cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32),
               cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32),
               cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32))
        high, mixed = cuda.local.array(SUMS, np.int32), cuda.local.array(SUMS, np.int32)
        thread, block, n_head, n_v = cuda.threadIdx.x & THREADS - 1, cuda.blockIdx.x & 0x7FFFFFFF, out.shape[1], out.shape[2]
        warp, lane = thread >> 5, thread & 31
        n_groups = (n_head + HEADS - 1) // HEADS
        group, split, t = block % n_groups, block // n_groups % n_splits, block // n_groups // n_splits
        head, column = group * HEADS, (cuda.blockIdx.y & 0xFFFF) * COLUMNS
        row, first_key = warp % ROW_TILES * 16 + (lane >> 2), warp // ROW_TILES * 32
        fragments_at = first_fragment(t, group * ROW_TILES + warp % ROW_TILES, n_head, first, second)
        h0, h1, unit = min(head + row, n_head - 1), min(head + row + 8, n_head - 1), np.float32(256 ** (planes - 1))
        n, split_start, split_end = split_of_keys(split, n_splits, SIDE, mode, positions, indices, t)
        clear(acc, row_max, row_sum, thread)
        for start in range(split_start, split_end, SIDE):
            if mode == SPARSE and indices[t, start] < 0:
                break
            load_keys(key_at, bias, first_scale, second_scale, start, n, planes, data, row_bytes, first, second, mode, indices, mask, t,
                      thread)
            cuda.syncthreads()
            max_scale = set_value_factors(value_factors, first_scale, thread)
            for part in range(2):
                multiply_part(high, mixed, stage, packed, fragments_at, key_at, data, part, first, second, first_key, lane, thread)
                add_scores(scores, high, mixed, part, second, scale * unit * scales[t, h0, part], scale * unit * scales[t, h1, part], bias,
                           first_scale, second_scale, row, first_key, lane & 3)
            cuda.syncthreads()
            softmax_tile(scores, weights, value_factors, partials, row_max, row_sum, rescale, thread)
            value_unit = max_scale / np.float32(INT8X2_MAX) * unit
            add_all_values(acc, stage, weights, rescale, key_at, data, first, second, column, n_v, value_unit, thread)
            cuda.syncthreads()
        cuda.syncthreads()
        factor, factor_8 = final_factors(row_sum, row, n_splits)
        if n_splits > 1:
            out = sums[:, :, split]
            if column == 0 and thread < HEADS and head + thread < n_head:
                row_maxes[t, head + thread, split], row_sums[t, head + thread, split] = row_max[thread], row_sum[thread]
        store_all_columns(out, acc, factor, factor_8, t, head, column, thread)
    return kernel(SIGNATURE, THREADS, f"attend_int8x2_{storage}")(attend)


ATTEND = {storage: _make_attend(storage) for storage in ("i8", "i16")}


def attend(out, splits, q, latents, positions, indices, mask, mode, scale):
    """Attention to the keys of a mode, for arguments that takes() accepts.

    splits: sums, row_maxes, row_sums [T, n_head, n_splits, ...].
    """
    n_tokens, n_head, width = q.shape
    n_steps, n_tiles = blocks_for(latents.first, 32) + (blocks_for(latents.second, 32) if latents.second else 0), blocks_for(n_head, 16)
    packed = scratch("packed heads", (n_tokens * n_tiles * n_steps * 256,), np.uint32)
    scales = scratch("scales of heads", (n_tokens, n_head, 2), np.float32)
    n_splits = splits[1].shape[2]
    pack_heads((32 * n_tiles, n_tokens), packed, scales, q, latents.first, n_steps)
    ATTEND[latents.storage]((n_tokens * n_splits * blocks_for(n_head, HEADS), blocks_for(out.shape[2], COLUMNS)), out, *splits, packed,
                            scales, latents.data.flat, latents.data.shape[1], latents.first, latents.second, positions, indices, mask, mode,
                            n_splits, scale)
