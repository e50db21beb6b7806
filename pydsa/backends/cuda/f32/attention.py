"""Attention in float32 for caches of any storage, with split-K.

A block has one token, HEADS heads, one split of the keys and COLUMNS columns of the value. It walks its keys in tiles (tiles.py): logits,
online softmax, then the values, which are staged in the same shared memory.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.f32.tiles import (BATCH, DOTS, FOURS, HEADS, KEYS, PRODUCTS, PRODUCTS_OF, STAGE, THREADS, WORK as PRODUCT_WORK,
                                           sum_of_slices)
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP, device, exp, load_four_f32, warp_max, warp_sum, warp_sync
from pydsa.backends.cuda.modes import SPARSE, key_and_bias, split_of_keys
from pydsa.backends.cuda.rows import CACHED
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


WARPS = THREADS // WARP
HEADS_BY = HEADS // 4                       # a thread accumulates four heads and two times four columns, HALF columns apart
HALF = 4 * THREADS // HEADS_BY
COLUMNS = 2 * HALF
STAGED_KEYS = 4 if SIMULATED else 16        # keys whose values are staged in shared memory at a time
VALUE_FOURS = COLUMNS // 4
WORK = max(PRODUCT_WORK, STAGED_KEYS * COLUMNS)
PITCH = HEADS + 4                           # from one key's weights to the next: 16-byte aligned, few bank conflicts
WEIGHTS = KEYS * PITCH
SUMS = 32
BATCHES = STAGED_KEYS * VALUE_FOURS // (THREADS * BATCH)
HEADS_BITS, WARP_BITS, FOURS_BITS = (n.bit_length() - 1 for n in (HEADS, WARP, VALUE_FOURS))
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def softmax_tile(weights, row_max, row_sum, rescale, thread):
    """Online softmax of a tile: logits [key, head] become weights e^(logit - row_max).

    row_max: the running maximum of each head's logits. row_sum: the running sum of its weights. rescale: what earlier accumulators are
    multiplied by. The warps share the heads.
    """
    warp, lane = thread >> WARP_BITS, thread & WARP - 1
    for i in range(HEADS // WARPS):
        h = i * WARPS + warp
        new_max = MINUS_INFINITY
        for key in range(lane, KEYS, WARP):
            new_max = max(new_max, weights[(key & KEYS - 1) * PITCH + h])
        old_max = row_max[h]
        new_max = max(old_max, warp_max(new_max))
        base, added = new_max if new_max > MINUS_INFINITY else ZERO, ZERO
        for key in range(lane, KEYS, WARP):
            weight = exp(weights[(key & KEYS - 1) * PITCH + h] - base)
            weights[(key & KEYS - 1) * PITCH + h] = weight
            added += weight
        added = warp_sum(added)
        warp_sync()         # all lanes have read row_max[h]
        if lane == 0:
            factor = exp(old_max - base)
            row_max[h], row_sum[h], rescale[h] = new_max, row_sum[h] * factor + added, factor


@device
def store_logits(weights, work, bias, scale, thread):
    """Logits of a tile from the products in `work`: q . key * scale + bias."""
    for i in range(PRODUCTS // THREADS):
        product = i * THREADS + thread
        key, h = product >> HEADS_BITS, product & HEADS - 1
        added = bias[key]
        weights[key * PITCH + h] = sum_of_slices(work, product) * scale + added if added != MINUS_INFINITY else MINUS_INFINITY


@device
def rescale_sums(acc, rescale, hq):
    """Multiply a thread's accumulators, of four heads, by the heads' rescale."""
    for h in range(4):
        factor = rescale[4 * hq + h]
        for c in range(8):
            acc[8 * h + c] *= factor


@device
def store_sums(out, sums, acc, row_sum, t, head, split, n_splits, column, hq, cg):
    """Store a thread's accumulators: divided by row_sum in out, or as they are in sums.

    The latter if the keys are split.
    """
    n_head, n_v = out.shape[1], out.shape[2]
    for h in range(4):
        if head + 4 * hq + h < n_head:
            row, total = head + 4 * hq + h, row_sum[4 * hq + h]
            for c in range(8):
                at = column + c // 4 * HALF + 4 * cg + c % 4
                if at < n_v:
                    if n_splits == 1:
                        out[t, row, at] = acc[8 * h + c] / total if total != ZERO else ZERO
                    elif total != ZERO:
                        sums[t, row, split, at] = acc[8 * h + c]


@device
def add_value(acc, weights, at, work, column):
    """acc[head, column] += weight[head] value[column] of one key.

    at: where four heads' weights begin. column: where four columns of the value begin in `work`; four more are HALF further.
    """
    w0, w1, w2, w3 = load_four_f32(weights, at)
    a, b, c, d = load_four_f32(work, column)
    e, f, g, j = load_four_f32(work, column + HALF)
    for h in range(4):
        w = w0 if h == 0 else w1 if h == 1 else w2 if h == 2 else w3
        acc[8 * h] += w * a
        acc[8 * h + 1] += w * b
        acc[8 * h + 2] += w * c
        acc[8 * h + 3] += w * d
        acc[8 * h + 4] += w * e
        acc[8 * h + 5] += w * f
        acc[8 * h + 6] += w * g
        acc[8 * h + 7] += w * j


def _make_attend(storage):
    products, stage = PRODUCTS_OF[storage], STAGE[storage]

    def attend(out, sums, row_maxes, row_sums, q, data, row_bytes, first, second, positions, indices, mask, mode, n_splits, scale):
        """out[t, h], or one split of it: sums[t, h, split], row_maxes and row_sums.

        Sums of a split are not yet divided by the row_sum. mode: DENSE, all keys up to positions[t]; MASKED, the same with mask[t, s]
        added; SPARSE, keys indices[t] up to the first negative one.
        """
        work = cuda.shared.array(WORK, np.float32, 16)
        weights = cuda.shared.array(WEIGHTS, np.float32, 16)
        key_of = cuda.shared.array(KEYS, np.int64)
        bias = cuda.shared.array(KEYS, np.float32)
        row_max = cuda.shared.array(HEADS, np.float32)
        row_sum = cuda.shared.array(HEADS, np.float32)
        rescale = cuda.shared.array(HEADS, np.float32)
        dots = cuda.local.array(DOTS, np.float32)
        fours = cuda.local.array(FOURS, np.float32)
        acc = cuda.local.array(SUMS, np.float32)
        thread, block, n_head, n_v = cuda.threadIdx.x & THREADS - 1, cuda.blockIdx.x & 0x7FFFFFFF, out.shape[1], out.shape[2]
        hq, cg = thread & HEADS_BY - 1, thread >> HEADS_BITS - 2
        n_groups = (n_head + HEADS - 1) >> HEADS_BITS
        head, split, t = block % n_groups << HEADS_BITS, block // n_groups % n_splits, block // n_groups // n_splits
        column = (cuda.blockIdx.y & 0xFFFF) * COLUMNS
        n, begin, end = split_of_keys(split, n_splits, KEYS, mode, positions, indices, t)
        for i in range(SUMS):
            acc[i] = ZERO
        if thread < HEADS:
            row_max[thread], row_sum[thread] = MINUS_INFINITY, ZERO
        for start in range(begin, end, KEYS):
            if mode == SPARSE and indices[t, start] < 0:
                break
            if thread < KEYS:
                key_of[thread], bias[thread] = key_and_bias(start + thread, n, mode, indices, mask, t)
            cuda.syncthreads()
            products(work, dots, fours, key_of, q, t, head, data, row_bytes, first, second, thread)
            store_logits(weights, work, bias, scale, thread)
            cuda.syncthreads()
            softmax_tile(weights, row_max, row_sum, rescale, thread)
            cuda.syncthreads()
            rescale_sums(acc, rescale, hq)
            for base in range(0, min(KEYS, end - start), STAGED_KEYS):
                for i in range(BATCHES):
                    stage(work, COLUMNS, FOURS_BITS, fours, key_of[base:], data, row_bytes, column, n_v, first, second,
                          i * BATCH * THREADS + thread)
                cuda.syncthreads()
                for i in range(min(STAGED_KEYS, end - start - base)):
                    add_value(acc, weights, (base + i) * PITCH + 4 * hq, work, i * COLUMNS + 4 * cg)
                cuda.syncthreads()
        cuda.syncthreads()
        store_sums(out, sums, acc, row_sum, t, head, split, n_splits, column, hq, cg)
        if n_splits > 1 and column == 0 and thread < HEADS and head + thread < n_head:
            row_maxes[t, head + thread, split], row_sums[t, head + thread, split] = row_max[thread], row_sum[thread]
    signature = "f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], f4[:,:,:], u1[::1], i8, i4, i4, i8[:], i4[:,:], f4[:,:], i4, i4, f4"
    return kernel(signature, THREADS, f"attend_f32_{storage}")(attend)


ATTEND = {storage: _make_attend(storage) for storage in CACHED}


def attend(out, splits, q, latents, positions, indices, mask, mode, scale):
    """Attention to the keys of a mode.

    splits: sums, row_maxes, row_sums [T, n_head, n_splits, ...].
    """
    n_tokens, n_head, n_v = out.shape
    n_splits = splits[1].shape[2]
    ATTEND[latents.storage]((n_tokens * n_splits * blocks_for(n_head, HEADS), blocks_for(n_v, COLUMNS)), out, *splits, q,
                            latents.data.flat, latents.data.shape[1], latents.first, latents.second, positions, indices, mask, mode,
                            n_splits, scale)
