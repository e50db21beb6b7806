"""Absorbed MLA attention in float32: one key row serves every head, its first values are the value; keys are divided among blocks.

A block has one token, a few heads, a range of the keys and a range of the value's columns. It unpacks a tile of keys into shared memory
once for all of its heads and keeps the sums of an online softmax in registers. What several blocks made of one head is then put together.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, device, exp
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.rows import CACHED

HEADS, KEYS = (2, 4) if SIMULATED else (8, 16)      # of a block; keys of a tile
THREADS = HEADS * KEYS
EACH = 4                                            # columns of the value that a thread sums, THREADS apart
COLUMNS = EACH * THREADS                            # of a block
SUMS = HEADS * EACH
TILE = KEYS * 128 if SIMULATED else 9728            # floats of a tile: sixteen rows of 576 numbers and one more against bank conflicts
BLOCKS = 4 if SIMULATED else 512                    # that are wanted at least, to fill the GPU
NOTHING = np.float32(-np.inf)


@device
def nth_of_all(t, n, indices, mask):
    """The n-th key of a token that attends to all, and what is added to its logit."""
    return n, np.float32(0)


@device
def nth_of_masked(t, n, indices, mask):
    return n, mask[t, n]


@device
def nth_of_chosen(t, n, indices, mask):
    s = np.int64(indices[t, n])
    return (s, np.float32(0)) if s >= 0 else (np.int64(0), NOTHING)


def _make_attend(mode, nth, storage):
    value_at, chosen = CACHED[storage], mode == "sparse"

    def attend(out, parts, q, data, row_bytes, first, second, positions, indices, mask, n_splits, scale):
        """out[t, h], or if there are several splits the unfinished sums to parts[t, h, split]: values, then greatest logit and sum."""
        thread, t = cuda.threadIdx.x, cuda.blockIdx.z
        n_head, width, n_v = q.shape[1], q.shape[2], out.shape[2]
        n_groups, n_columns = (n_head + HEADS - 1) // HEADS, (n_v + COLUMNS - 1) // COLUMNS
        group, column = cuda.blockIdx.x % n_groups * HEADS, cuda.blockIdx.x // n_groups % n_columns * COLUMNS
        split = cuda.blockIdx.x // (n_groups * n_columns)
        n = np.int64(indices.shape[1]) if chosen else positions[t] + 1
        share = (n + n_splits - 1) // n_splits
        begin, end = split * share, min((split + 1) * share, n)
        tile = cuda.shared.array(TILE, np.float32)
        weights = cuda.shared.array((HEADS, KEYS), np.float32)
        shrink = cuda.shared.array(HEADS, np.float32)
        greatest = cuda.shared.array(HEADS, np.float32)
        total = cuda.shared.array(HEADS, np.float32)
        where = cuda.shared.array(KEYS, np.int64)
        bias = cuda.shared.array(KEYS, np.float32)
        acc = cuda.local.array(SUMS, np.float32)
        for i in range(SUMS):
            acc[i] = np.float32(0)
        if thread < HEADS:
            greatest[thread], total[thread] = NOTHING, np.float32(0)
        pitch = width | 1
        n_tile = min(KEYS, TILE // pitch)
        h, j = thread // KEYS, thread % KEYS
        for start in range(begin, end, n_tile):
            cuda.syncthreads()
            if thread < n_tile:
                where[thread], bias[thread] = nth(t, start + thread, indices, mask) if start + thread < end else (np.int64(0), NOTHING)
            cuda.syncthreads()
            for i in range(thread, n_tile * width, THREADS):
                key, at = i // width, i % width
                there = bias[key] != NOTHING
                tile[key * pitch + at] = value_at(data, where[key] * row_bytes, at, first, second) if there else np.float32(0)
            cuda.syncthreads()
            if j < n_tile:
                logit = NOTHING
                if group + h < n_head and bias[j] != NOTHING:
                    dot = np.float32(0)
                    for i in range(width):
                        dot += q[t, group + h, i] * tile[j * pitch + i]
                    logit = dot * scale + bias[j]
                weights[h, j] = logit
            cuda.syncthreads()
            if thread < HEADS:
                before = greatest[thread]
                now = before
                for i in range(n_tile):
                    now = max(now, weights[thread, i])
                shrink[thread] = exp(before - now) if before > NOTHING else np.float32(0)
                greatest[thread], total[thread] = now, total[thread] * shrink[thread]
            cuda.syncthreads()
            if j < n_tile:
                weights[h, j] = exp(weights[h, j] - greatest[h]) if weights[h, j] > NOTHING else np.float32(0)
            cuda.syncthreads()
            if thread < HEADS:
                for i in range(n_tile):
                    total[thread] += weights[thread, i]
            for head in range(HEADS):
                for each in range(EACH):
                    acc[head * EACH + each] *= shrink[head]
            for key in range(n_tile):
                for each in range(EACH):
                    at = column + each * THREADS + thread
                    value = tile[key * pitch + at] if at < n_v else np.float32(0)
                    for head in range(HEADS):
                        acc[head * EACH + each] += weights[head, key] * value
        cuda.syncthreads()
        for head in range(HEADS):
            if group + head < n_head:
                for each in range(EACH):
                    at = column + each * THREADS + thread
                    if at < n_v:
                        value = acc[head * EACH + each]
                        if n_splits == 1:
                            out[t, group + head, at] = value / total[head] if total[head] > 0 else np.float32(0)
                        else:
                            parts[t * n_head + group + head, split, at] = value
                if thread == 0 and column == 0 and n_splits > 1:
                    parts[t * n_head + group + head, split, n_v] = greatest[head]
                    parts[t * n_head + group + head, split, n_v + 1] = total[head]
    attend.__name__ = attend.__qualname__ = f"{mode}_attention_{storage}"
    signature = "f4[:,:,:], f4[:,:,:], f4[:,:,:], u1[::1], i8, i4, i4, i8[:], i4[:,:], f4[:,:], i4, f4"
    return kernel(signature, THREADS)(attend)


@kernel("f4[:,:,:], f4[:,:,:]", THREADS)
def join_splits(out, parts):
    """out[t, h] from the sums over each split of the keys."""
    t, h, n_splits, n_v = cuda.blockIdx.y, cuda.blockIdx.x, parts.shape[1], out.shape[2]
    row = t * out.shape[1] + h
    greatest = NOTHING
    for split in range(n_splits):
        greatest = max(greatest, parts[row, split, n_v])
    for i in range(cuda.threadIdx.x, n_v, THREADS):
        value, total = np.float32(0), np.float32(0)
        for split in range(n_splits):
            if parts[row, split, n_v] > NOTHING:
                factor = exp(parts[row, split, n_v] - greatest)
                value += factor * parts[row, split, i]
                total += factor * parts[row, split, n_v + 1]
        out[t, h, i] = value / total if total > 0 else np.float32(0)


MODES = {"dense": nth_of_all, "masked": nth_of_masked, "sparse": nth_of_chosen}
ATTEND = {(mode, storage): _make_attend(mode, nth, storage) for mode, nth in MODES.items() for storage in CACHED}


def attend(mode, out, q, latents, positions, indices, mask, most, scale):
    """Launch one of ATTEND with as many splits of at most `most` keys as fill the GPU; what the mode does not use may be None."""
    n_tokens, n_head, n_v = out.shape
    assert q.shape[2] < TILE
    positions = scratch("no positions", (1,), np.int64) if positions is None else positions
    indices = scratch("no indices", (1, 1), np.int32) if indices is None else indices
    mask = scratch("no mask", (1, 1), np.float32) if mask is None else mask
    blocks = blocks_for(n_head, HEADS) * blocks_for(n_v, COLUMNS)
    n_splits = max(1, min(BLOCKS // (blocks * n_tokens), blocks_for(most, 2 * KEYS)))
    parts = scratch("parts of attention", (n_tokens * n_head, n_splits, n_v + 2) if n_splits > 1 else (1, 1, 1), np.float32)
    ATTEND[mode, latents.storage]((blocks * n_splits, 1, n_tokens), out, parts, q, latents.data.flat, latents.data.shape[1], latents.first,
                                  latents.second, positions, indices, mask, n_splits, scale)
    if n_splits > 1:
        join_splits((n_head, n_tokens), out, parts)


def dense_attention(out, q, latents, positions, scale):
    """Absorbed MLA over every key s <= positions[t]; a key's first n_v values are its value"""
    attend("dense", out, q, latents, positions, None, None, latents.data.shape[0], scale)


def masked_attention(out, q, latents, mask, positions, scale):
    """dense_attention with an additive mask"""
    attend("masked", out, q, latents, positions, None, mask, latents.data.shape[0], scale)


def sparse_attention(out, q, latents, indices, scale):
    """Absorbed MLA over the chosen keys only"""
    attend("sparse", out, q, latents, None, indices, None, indices.shape[1], scale)
