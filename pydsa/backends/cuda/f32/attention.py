"""Attention in float32, for caches of any type; keys are divided among blocks.

A block has one token, HEADS heads, a part of the keys and COLUMNS columns of the value. It goes through its keys in tiles (tiles.py): their
logits, an online softmax, then the values, which pass through the same shared memory.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.device import SIMULATED, WARP, device, exp, load_four_f32, warp_max, warp_sum, warp_sync
from pydsa.backends.cuda.f32.tiles import (BATCH, DOTS, FOURS, HEADS, KEYS, PRODUCTS, PRODUCTS_OF, STAGE, THREADS, WORK as PRODUCT_WORK,
                                           sum_of_slices)
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.modes import MASKED, SPARSE
from pydsa.backends.cuda.rows import CACHED


WARPS = THREADS // WARP
HEADS_BY = HEADS // 4                       # a thread sums four heads and two times four columns, half of all columns apart
HALF = 4 * THREADS // HEADS_BY
COLUMNS = 2 * HALF
VALUES = 4 if SIMULATED else 16             # keys whose values are in shared memory at a time
VALUE_FOURS = COLUMNS // 4
WORK = max(PRODUCT_WORK, VALUES * COLUMNS)
PITCH = HEADS + 4                           # from one key's weights to the next's: fours stay aligned, few lanes meet in a bank
WEIGHTS = KEYS * PITCH
SUMS = 32
BATCHES = VALUES * VALUE_FOURS // (THREADS * BATCH)
HEADS_BITS, WARP_BITS, FOURS_BITS = (n.bit_length() - 1 for n in (HEADS, WARP, VALUE_FOURS))
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def softmax_tile(weights, row_max, row_sum, rescale, thread):
    """Logits of a tile, [key, head], become weights e^(logit - greatest so far); what is known of each head by then goes on.

    top: greatest logits, total: sums of weights, shrink: what sums made before are to be multiplied by; a warp takes its share of heads.
    """
    warp, lane = thread >> WARP_BITS, thread & WARP - 1
    for i in range(HEADS // WARPS):
        h = i * WARPS + warp
        greatest = MINUS_INFINITY
        for key in range(lane, KEYS, WARP):
            greatest = max(greatest, weights[(key & KEYS - 1) * PITCH + h])
        before = row_max[h]
        greatest = max(before, warp_max(greatest))
        base, added = greatest if greatest > MINUS_INFINITY else ZERO, ZERO
        for key in range(lane, KEYS, WARP):
            weight = exp(weights[(key & KEYS - 1) * PITCH + h] - base)
            weights[(key & KEYS - 1) * PITCH + h] = weight
            added += weight
        added = warp_sum(added)
        warp_sync()         # all lanes have read top[h]
        if lane == 0:
            smaller = exp(before - base)
            row_max[h], row_sum[h], rescale[h] = greatest, row_sum[h] * smaller + added, smaller


@device
def add_value(acc, weights, at, work, column):
    """acc[head, column] += weight times value of one key: four heads' weights at a place, eight columns of the value at another."""
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
        """out[t, h]; if keys are split, not divided by the sum of weights: sums[t, h, split], tops (greatest logits) and totals instead.

        mode: all keys up to positions[t], the same with mask[t, s] added, or keys indices[t] up to the first that is negative.
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
        n = np.int64(indices.shape[1]) if mode == SPARSE else positions[t] + 1
        share = (n + n_splits * KEYS - 1) // (n_splits * KEYS) * KEYS
        for i in range(SUMS):
            acc[i] = ZERO
        if thread < HEADS:
            row_max[thread], row_sum[thread] = MINUS_INFINITY, ZERO
        end = min(n, (split + 1) * share)
        for start in range(split * share, end, KEYS):
            if mode == SPARSE and indices[t, start] < 0:
                break
            if thread < KEYS:
                key, added, i = np.int64(-1), MINUS_INFINITY, start + thread
                if i < n:
                    key, added = np.int64(indices[t, i]) if mode == SPARSE else i, mask[t, i] if mode == MASKED else ZERO
                if added == MINUS_INFINITY or key < 0:
                    key, added = np.int64(-1), MINUS_INFINITY
                key_of[thread], bias[thread] = key, added
            cuda.syncthreads()
            products(work, dots, fours, key_of, q, t, head, data, row_bytes, first, second, thread)
            for i in range(PRODUCTS // THREADS):
                product = i * THREADS + thread
                key, h = product >> HEADS_BITS, product & HEADS - 1
                added = bias[key]
                weights[key * PITCH + h] = sum_of_slices(work, product) * scale + added if added != MINUS_INFINITY else MINUS_INFINITY
            cuda.syncthreads()
            softmax_tile(weights, row_max, row_sum, rescale, thread)
            cuda.syncthreads()
            for h in range(4):
                smaller = rescale[4 * hq + h]
                for c in range(8):
                    acc[8 * h + c] *= smaller
            for chunk in range(0, min(KEYS, end - start), VALUES):
                for i in range(BATCHES):
                    stage(work, COLUMNS, FOURS_BITS, fours, key_of[chunk:], data, row_bytes, column, n_v, first, second,
                          i * BATCH * THREADS + thread)
                cuda.syncthreads()
                for i in range(min(VALUES, end - start - chunk)):
                    add_value(acc, weights, (chunk + i) * PITCH + 4 * hq, work, i * COLUMNS + 4 * cg)
                cuda.syncthreads()
        cuda.syncthreads()
        for h in range(4):
            if head + 4 * hq + h < n_head:
                row, whole = head + 4 * hq + h, row_sum[4 * hq + h]
                for c in range(8):
                    at = column + c // 4 * HALF + 4 * cg + c % 4
                    if at < n_v:
                        if n_splits == 1:
                            out[t, row, at] = acc[8 * h + c] / whole if whole != ZERO else ZERO
                        elif whole != ZERO:
                            sums[t, row, split, at] = acc[8 * h + c]
        if n_splits > 1 and column == 0 and thread < HEADS and head + thread < n_head:
            row_maxes[t, head + thread, split], row_sums[t, head + thread, split] = row_max[thread], row_sum[thread]
    signature = "f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], f4[:,:,:], u1[::1], i8, i4, i4, i8[:], i4[:,:], f4[:,:], i4, i4, f4"
    return kernel(signature, THREADS, f"attend_f32_{storage}")(attend)


ATTEND = {storage: _make_attend(storage) for storage in CACHED}


def attend(out, splits, q, latents, positions, indices, mask, mode, scale):
    """Attention to keys as the mode says; splits: sums, tops, totals [T, n_head, n_splits, ...]."""
    n_tokens, n_head, n_v = out.shape
    n_splits = splits[1].shape[2]
    ATTEND[latents.storage]((n_tokens * n_splits * blocks_for(n_head, HEADS), blocks_for(n_v, COLUMNS)), out, *splits, q,
                            latents.data.flat, latents.data.shape[1], latents.first, latents.second, positions, indices, mask, mode,
                            n_splits, scale)
