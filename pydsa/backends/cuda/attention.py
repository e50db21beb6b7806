"""Absorbed MLA attention in float32: one row a key serves every head, its first numbers are the value; keys are divided among blocks.

A block has one token, HEADS heads, a part of the keys and COLUMNS columns of the value. It goes through its keys in tiles (tiles.py): their
logits, an online softmax, then the values, which pass through the same shared memory. What several blocks made of a head is then joined.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda import byte_attention
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.byte_attention import DENSE, MASKED, SPARSE
from pydsa.backends.cuda.device import SIMULATED, WARP, device, exp, four_at, warp_max, warp_sum, warp_sync
from pydsa.backends.cuda.launch import BLOCKS, blocks_for, kernel
from pydsa.backends.cuda.one_token import round_four, round_into
from pydsa.backends.cuda.rows import CACHED
from pydsa.backends.cuda.tiles import BATCH, DOTS, FOURS, HEADS, KEYS, PRODUCTS, PRODUCTS_OF, STAGE, THREADS, sum_of_slices
from pydsa.backends.cuda.tiles import WORK as PRODUCT_WORK

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
JOINED = 8 if SIMULATED else 128            # threads, each for four columns
ZERO, NOTHING = np.float32(0), np.float32(-np.inf)


@device
def weigh(weights, top, total, shrink, thread):
    """Logits of a tile, [key, head], become weights e^(logit - greatest so far); what is known of each head by then goes on.

    top: greatest logits, total: sums of weights, shrink: what sums made before are to be multiplied by; a warp takes its share of heads.
    """
    warp, lane = thread >> WARP_BITS, thread & WARP - 1
    for i in range(HEADS // WARPS):
        h = i * WARPS + warp
        greatest = NOTHING
        for key in range(lane, KEYS, WARP):
            greatest = max(greatest, weights[(key & KEYS - 1) * PITCH + h])
        before = top[h]
        greatest = max(before, warp_max(greatest))
        base, added = greatest if greatest > NOTHING else ZERO, ZERO
        for key in range(lane, KEYS, WARP):
            weight = exp(weights[(key & KEYS - 1) * PITCH + h] - base)
            weights[(key & KEYS - 1) * PITCH + h] = weight
            added += weight
        added = warp_sum(added)
        warp_sync()         # all lanes have read top[h]
        if lane == 0:
            smaller = exp(before - base)
            top[h], total[h], shrink[h] = greatest, total[h] * smaller + added, smaller


@device
def add_value(acc, weights, at, work, column):
    """acc[head, column] += weight times value of one key: four heads' weights at a place, eight columns of the value at another."""
    w0, w1, w2, w3 = four_at(weights, at)
    a, b, c, d = four_at(work, column)
    e, f, g, j = four_at(work, column + HALF)
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

    def attend(out, sums, tops, totals, q, data, row_bytes, first, second, positions, indices, mask, mode, n_splits, scale):
        """out[t, h]; if keys are split, not divided by the sum of weights: sums[t, h, split], tops (greatest logits) and totals instead.

        mode: all keys up to positions[t], the same with mask[t, s] added, or keys indices[t] up to the first that is negative.
        """
        work = cuda.shared.array(WORK, np.float32, 16)
        weights = cuda.shared.array(WEIGHTS, np.float32, 16)
        key_of = cuda.shared.array(KEYS, np.int64)
        bias = cuda.shared.array(KEYS, np.float32)
        top = cuda.shared.array(HEADS, np.float32)
        total = cuda.shared.array(HEADS, np.float32)
        shrink = cuda.shared.array(HEADS, np.float32)
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
            top[thread], total[thread] = NOTHING, ZERO
        end = min(n, (split + 1) * share)
        for start in range(split * share, end, KEYS):
            if mode == SPARSE and indices[t, start] < 0:
                break
            if thread < KEYS:
                key, added, i = np.int64(-1), NOTHING, start + thread
                if i < n:
                    key, added = np.int64(indices[t, i]) if mode == SPARSE else i, mask[t, i] if mode == MASKED else ZERO
                if added == NOTHING or key < 0:
                    key, added = np.int64(-1), NOTHING
                key_of[thread], bias[thread] = key, added
            cuda.syncthreads()
            products(work, dots, fours, key_of, q, t, head, data, row_bytes, first, second, thread)
            for i in range(PRODUCTS // THREADS):
                product = i * THREADS + thread
                key, h = product >> HEADS_BITS, product & HEADS - 1
                added = bias[key]
                weights[key * PITCH + h] = sum_of_slices(work, product) * scale + added if added != NOTHING else NOTHING
            cuda.syncthreads()
            weigh(weights, top, total, shrink, thread)
            cuda.syncthreads()
            for h in range(4):
                smaller = shrink[4 * hq + h]
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
                row, whole = head + 4 * hq + h, total[4 * hq + h]
                for c in range(8):
                    at = column + c // 4 * HALF + 4 * cg + c % 4
                    if at < n_v:
                        if n_splits == 1:
                            out[t, row, at] = acc[8 * h + c] / whole if whole != ZERO else ZERO
                        elif whole != ZERO:
                            sums[t, row, split, at] = acc[8 * h + c]
        if n_splits > 1 and column == 0 and thread < HEADS and head + thread < n_head:
            tops[t, head + thread, split], totals[t, head + thread, split] = top[thread], total[thread]
    signature = "f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], f4[:,:,:], u1[::1], i8, i4, i4, i8[:], i4[:,:], f4[:,:], i4, i4, f4"
    return kernel(signature, THREADS, f"attend_{storage}")(attend)


ATTEND = {storage: _make_attend(storage) for storage in CACHED}


@device
def joined(sums, tops, totals, t, h, c):
    """Columns c to c + 3 of a head: the splits' sums over their totals, each times e^(its greatest logit - the greatest of all)."""
    greatest, last = NOTHING, sums.shape[3] - 1
    for split in range(tops.shape[2]):
        greatest = max(greatest, tops[t, h, split])
    a, b, d, e, total = ZERO, ZERO, ZERO, ZERO, ZERO
    for split in range(tops.shape[2]):
        whole = totals[t, h, split]
        if whole != ZERO:       # it has keys
            factor = exp(tops[t, h, split] - greatest)
            a += factor * sums[t, h, split, c]
            b += factor * sums[t, h, split, min(c + 1, last)]
            d += factor * sums[t, h, split, min(c + 2, last)]
            e += factor * sums[t, h, split, min(c + 3, last)]
            total += factor * whole
    return (a / total, b / total, d / total, e / total) if total != ZERO else (ZERO, ZERO, ZERO, ZERO)


@kernel("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:]", JOINED)
def join_splits(out, sums, tops, totals):
    """out[t, h] of what splits made; a thread has four columns."""
    c, h, t = 4 * (cuda.blockIdx.x * JOINED + cuda.threadIdx.x), cuda.blockIdx.y, cuda.blockIdx.z
    if c < out.shape[2]:
        values = joined(sums, tops, totals, t, h, c)
        for i in range(4):
            if c + i < out.shape[2]:
                out[t, h, c + i] = values[i]


@kernel("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], u4[:,:], f4[:,:], f4[:,:]", JOINED)
def join_rounded(out, sums, tops, totals, words, scales, x_sums):
    """out[0, h], of a multiple of 32 columns, and its Rounded as a row for each head; a thread has four columns."""
    four, h = cuda.blockIdx.x * JOINED + cuda.threadIdx.x, cuda.blockIdx.y
    there, c = four < out.shape[2] // 4, 4 * four
    v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
    if there:
        v0, v1, v2, v3 = joined(sums, tops, totals, 0, h, c)
        out[0, h, c], out[0, h, c + 1], out[0, h, c + 2], out[0, h, c + 3] = v0, v1, v2, v3
    round_four(words, scales, x_sums, h, four, there, v0, v1, v2, v3)


def splits_for(blocks, n_keys, tile):
    """Into how many parts the keys of each token are divided, tiles at least, so that there are BLOCKS blocks."""
    return max(1, min(BLOCKS // blocks, blocks_for(n_keys, tile)))


def attend(out, q, latents, mode, n_keys, scale, positions=None, indices=None, mask=None, made=None):
    """Attention to at most n_keys keys; what the mode does not look at is None. made: for one token, what becomes the Rounded of out."""
    n_tokens, n_head, n_v = out.shape
    others = [scratch("nothing", (1,) * n, dtype) if a is None else a
              for a, n, dtype in ((positions, 1, np.int64), (indices, 2, np.int32), (mask, 2, np.float32))]
    in_bytes = byte_attention.takes(latents, n_head, n_v)
    heads, columns, tile = (byte_attention.HEADS, byte_attention.COLUMNS, byte_attention.SIDE) if in_bytes else (HEADS, COLUMNS, KEYS)
    n_splits = splits_for(n_tokens * blocks_for(n_head, heads) * blocks_for(n_v, columns), n_keys, tile)
    rows = (n_tokens, n_head, n_splits) if n_splits > 1 else (1, 1, 1)
    splits = [scratch(f"attention {name}", shape, np.float32) for name, shape in (
        ("sums", (*rows, n_v if n_splits > 1 else 1)), ("tops", rows), ("totals", rows))]
    if in_bytes:
        byte_attention.attend(out, splits, q, latents, *others, mode, scale)
    else:
        ATTEND[latents.storage]((n_tokens * n_splits * blocks_for(n_head, HEADS), blocks_for(n_v, COLUMNS)), out, *splits, q,
                                latents.data.flat, latents.data.shape[1], latents.first, latents.second, *others, mode, n_splits, scale)
    if n_splits > 1 and made is not None:
        join_rounded((blocks_for(n_v, 4 * JOINED), n_head), out, *splits, *made)
    elif n_splits > 1:
        join_splits((blocks_for(n_v, 4 * JOINED), n_head, n_tokens), out, *splits)
    elif made is not None:
        round_into(out.rows, made)


def dense_attention(out, q, latents, positions, scale):
    """Absorbed MLA over every key s <= positions[t]; a key's first n_v values are its value"""
    attend(out, q, latents, DENSE, latents.data.shape[0], scale, positions=positions)


def masked_attention(out, q, latents, mask, positions, scale):
    """dense_attention with an additive mask"""
    attend(out, q, latents, MASKED, latents.data.shape[0], scale, positions=positions, mask=mask)


def sparse_attention(out, q, latents, indices, scale):
    """Absorbed MLA over the chosen keys only"""
    attend(out, q, latents, SPARSE, indices.shape[1], scale, indices=indices)
