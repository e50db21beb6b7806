"""Absorbed MLA attention: one row a key serves every head, its first numbers are the value. The ops, and how split keys are joined."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, device, exp
from pydsa.backends.cuda.int8x2.linear import pack_four, pack_into
from pydsa.backends.cuda.launch import BLOCKS, blocks_for, kernel
from pydsa.backends.cuda.modes import DENSE, MASKED, SPARSE
from pydsa.backends.cuda.variants import kernels


JOINED = 8 if SIMULATED else 128            # threads, each for four columns
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def joined(sums, row_maxes, row_sums, t, h, c):
    """Columns c to c + 3 of a head: the splits' sums over their totals, each times e^(its greatest logit - the greatest of all)."""
    greatest, last = MINUS_INFINITY, sums.shape[3] - 1
    for split in range(row_maxes.shape[2]):
        greatest = max(greatest, row_maxes[t, h, split])
    a, b, d, e, row_sum = ZERO, ZERO, ZERO, ZERO, ZERO
    for split in range(row_maxes.shape[2]):
        whole = row_sums[t, h, split]
        if whole != ZERO:       # it has keys
            factor = exp(row_maxes[t, h, split] - greatest)
            a += factor * sums[t, h, split, c]
            b += factor * sums[t, h, split, min(c + 1, last)]
            d += factor * sums[t, h, split, min(c + 2, last)]
            e += factor * sums[t, h, split, min(c + 3, last)]
            row_sum += factor * whole
    return (a / row_sum, b / row_sum, d / row_sum, e / row_sum) if row_sum != ZERO else (ZERO, ZERO, ZERO, ZERO)


@kernel("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:]", JOINED)
def join_splits(out, sums, row_maxes, row_sums):
    """out[t, h] of what splits made; a thread has four columns."""
    c, h, t = 4 * (cuda.blockIdx.x * JOINED + cuda.threadIdx.x), cuda.blockIdx.y, cuda.blockIdx.z
    if c < out.shape[2]:
        values = joined(sums, row_maxes, row_sums, t, h, c)
        for i in range(4):
            if c + i < out.shape[2]:
                out[t, h, c + i] = values[i]


@kernel("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], u4[:,:], f4[:,:], f4[:,:]", JOINED)
def join_packed(out, sums, row_maxes, row_sums, packed, scales, x_sums):
    """out[0, h], of a multiple of 32 columns, and its Int8x2 as a row for each head; a thread has four columns."""
    four, h = cuda.blockIdx.x * JOINED + cuda.threadIdx.x, cuda.blockIdx.y
    there, c = four < out.shape[2] // 4, 4 * four
    v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
    if there:
        v0, v1, v2, v3 = joined(sums, row_maxes, row_sums, 0, h, c)
        out[0, h, c], out[0, h, c + 1], out[0, h, c + 2], out[0, h, c + 3] = v0, v1, v2, v3
    pack_four(packed, scales, x_sums, h, four, there, v0, v1, v2, v3)


def splits_for(blocks, n_keys, tile):
    """Into how many parts the keys of each token are divided, tiles at least, so that there are BLOCKS blocks."""
    return max(1, min(BLOCKS // blocks, blocks_for(n_keys, tile)))


def attend(out, q, latents, mode, n_keys, scale, positions=None, indices=None, mask=None, made=None):
    """Attention to at most n_keys keys; what the mode does not look at is None. made: for one token, what becomes the Int8x2 of out."""
    n_tokens, n_head, n_v = out.shape
    others = [scratch("nothing", (1,) * n, dtype) if a is None else a
              for a, n, dtype in ((positions, 1, np.int64), (indices, 2, np.int32), (mask, 2, np.float32))]
    chosen = kernels("attention", latents, n_head, n_v)
    n_splits = splits_for(n_tokens * blocks_for(n_head, chosen.heads) * blocks_for(n_v, chosen.columns), n_keys, chosen.tile)
    rows = (n_tokens, n_head, n_splits) if n_splits > 1 else (1, 1, 1)
    splits = [scratch(f"attention {name}", shape, np.float32) for name, shape in (
        ("sums", (*rows, n_v if n_splits > 1 else 1)), ("tops", rows), ("totals", rows))]
    chosen.attend(out, splits, q, latents, *others, mode, scale)
    if n_splits > 1 and made is not None:
        join_packed((blocks_for(n_v, 4 * JOINED), n_head), out, *splits, *made)
    elif n_splits > 1:
        join_splits((blocks_for(n_v, 4 * JOINED), n_head, n_tokens), out, *splits)
    elif made is not None:
        pack_into(out.rows, made)


def dense_attention(out, q, latents, positions, scale):
    """Absorbed MLA over every key s <= positions[t]; a key's first n_v values are its value"""
    attend(out, q, latents, DENSE, latents.data.shape[0], scale, positions=positions)


def masked_attention(out, q, latents, mask, positions, scale):
    """dense_attention with an additive mask"""
    attend(out, q, latents, MASKED, latents.data.shape[0], scale, positions=positions, mask=mask)


def sparse_attention(out, q, latents, indices, scale):
    """Absorbed MLA over the chosen keys only"""
    attend(out, q, latents, SPARSE, indices.shape[1], scale, indices=indices)
