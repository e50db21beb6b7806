"""Absorbed MLA attention: the ops, and the second kernel of split-K.

All heads share one cache row per key, whose first n_v values are the key's value. Keys may be divided into splits, which different blocks
compute (flash decoding). A second kernel joins the splits. A few tokens' attention is that of attend_one.py, prompts' to chosen rows that
of attend_chosen.py, where they take the rows.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen import attend_one
from pydsa.backends.cuda.int8x2.linear import pack_four, pack_into
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, exp
from pydsa.backends.cuda.modes import DENSE, MASKED, SPARSE
from pydsa.backends.cuda.one_token.rows_one import Splits
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, is_listing, kernel, lists_many
from pydsa.backends.cuda.variants import kernels


JOIN_THREADS = 8 if SIMULATED else 128            # threads of a block of join_splits, four columns each
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def joined(sums, row_maxes, row_sums, t, h, c):
    """Columns c to c + 3 of a head, joined from its splits.

    Sums and row sums are rescaled by e^(the split's row_max - the largest row_max), added up and divided.
    """
    row_max, last = MINUS_INFINITY, sums.shape[3] - 1
    for split in range(row_maxes.shape[2]):
        row_max = max(row_max, row_maxes[t, h, split])
    a, b, d, e, row_sum = ZERO, ZERO, ZERO, ZERO, ZERO
    for split in range(row_maxes.shape[2]):
        split_sum = row_sums[t, h, split]
        if split_sum != ZERO:       # the split has keys
            factor = exp(row_maxes[t, h, split] - row_max)
            a += factor * sums[t, h, split, c]
            b += factor * sums[t, h, split, min(c + 1, last)]
            d += factor * sums[t, h, split, min(c + 2, last)]
            e += factor * sums[t, h, split, min(c + 3, last)]
            row_sum += factor * split_sum
    return (a / row_sum, b / row_sum, d / row_sum, e / row_sum) if row_sum != ZERO else (ZERO, ZERO, ZERO, ZERO)


@kernel("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:]", JOIN_THREADS)
def join_splits(out, sums, row_maxes, row_sums):
    """out[t, h], joined from the splits. Four columns per thread."""
    c, h, t = 4 * (cuda.blockIdx.x * JOIN_THREADS + cuda.threadIdx.x), cuda.blockIdx.y, cuda.blockIdx.z
    if c < out.shape[2]:
        values = joined(sums, row_maxes, row_sums, t, h, c)
        for i in range(4):
            if c + i < out.shape[2]:
                out[t, h, c + i] = values[i]


@kernel("f4[:,:,:], f4[:,:,:,:], f4[:,:,:], f4[:,:,:], u4[:,:], f4[:,:], f4[:,:]", JOIN_THREADS)
def join_packed(out, sums, row_maxes, row_sums, packed, scales, x_sums):
    """out[0, h], joined from the splits, and its Int8x2 with one row per head.

    The number of columns is a multiple of 32. Four columns per thread.
    """
    four, h = cuda.blockIdx.x * JOIN_THREADS + cuda.threadIdx.x, cuda.blockIdx.y
    valid, c = four < out.shape[2] // 4, 4 * four
    v0, v1, v2, v3 = ZERO, ZERO, ZERO, ZERO
    if valid:
        v0, v1, v2, v3 = joined(sums, row_maxes, row_sums, 0, h, c)
        out[0, h, c], out[0, h, c + 1], out[0, h, c + 2], out[0, h, c + 3] = v0, v1, v2, v3
    pack_four(packed, scales, x_sums, h, four, valid, v0, v1, v2, v3)


def splits_for(blocks, n_keys, tile):
    """How many splits the keys of each token are divided into.

    As many as make about BLOCKS blocks in all, but at most one per tile of keys.
    """
    return max(1, min(BLOCKS // blocks, blocks_for(n_keys, tile)))


def attend(out, q, latents, mode, n_keys, scale, positions=None, indices=None, mask=None, made=None):
    """Attention to at most n_keys keys.

    positions, indices and mask are None where the mode does not use them. made: for one token, the Int8x2 that receives out, packed.
    """
    of_few = not lists_many() and kernels("attention of a few", out, q, latents, mode, n_keys)
    if of_few:
        of_few(out, q, latents, *_arrays(positions, indices, mask), mode, n_keys, scale, made)
        return
    n_v = out.shape[2]
    parts = q[..., :n_v], q[..., n_v:]
    of_many = kernels("attention of many", out, *parts, latents, mode)
    if of_many:
        of_many(out, *parts, latents, indices, positions, scale)
    if not of_many or is_listing():
        attend_in_tiles(out, q, latents, mode, n_keys, scale, positions, indices, mask, made)


def splits_of_one(out, q, latents, mode, n_keys, positions):
    """The Splits that one token's attention leaves in splits.

    None if it does not leave them: then it joins them itself.
    """
    if not kernels("attention of a few", out, q, latents, mode, n_keys):
        return None
    sums, stats, n_splits, tile = attend_one.divided(q, latents.storage, n_keys, mode == SPARSE)
    return Splits(sums, stats, n_splits, tile.keys, n_keys if mode == SPARSE else 0, _arrays(positions, None, None)[0])


def attend_in_splits(q, latents, mode, n_keys, scale, positions, indices, mask):
    """attend() of one token, up to the join of splits_of_one()."""
    attend_one.attend_splits(q, latents, *_arrays(positions, indices, mask), mode, n_keys, scale)


def _arrays(positions, indices, mask):
    """What kernels get: an array of the same kind in place of None."""
    return [scratch("nothing", (1,) * n, dtype) if a is None else a
            for a, n, dtype in ((positions, 1, np.int64), (indices, 2, np.int32), (mask, 2, np.float32))]


def attend_in_tiles(out, q, latents, mode, n_keys, scale, positions, indices, mask, made):
    """attend() for any number of tokens, in tiles of keys.

    Its kernels take all that others leave.
    """
    n_tokens, n_head, n_v = out.shape
    variant = kernels("attention", latents, n_head, n_v)
    n_splits = splits_for(n_tokens * blocks_for(n_head, variant.heads) * blocks_for(n_v, variant.columns), n_keys, variant.tile)
    rows = (n_tokens, n_head, n_splits) if n_splits > 1 else (1, 1, 1)
    splits = [scratch(f"attention {name}", shape, np.float32) for name, shape in (
        ("sums", (*rows, n_v if n_splits > 1 else 1)), ("row_maxes", rows), ("row_sums", rows))]
    variant.attend(out, splits, q, latents, *_arrays(positions, indices, mask), mode, scale)
    if n_splits > 1 and made is not None:
        join_packed((blocks_for(n_v, 4 * JOIN_THREADS), n_head), out, *splits, *made)
    elif n_splits > 1:
        join_splits((blocks_for(n_v, 4 * JOIN_THREADS), n_head, n_tokens), out, *splits)
    elif made is not None:
        pack_into(out.rows, made)


def dense_attention(out, q, latents, positions, scale):
    """Absorbed MLA over every key s <= positions[t].

    A key's first n_v values are its value.
    """
    attend(out, q, latents, DENSE, latents.data.shape[0], scale, positions=positions)


def masked_attention(out, q, latents, mask, positions, scale):
    """dense_attention with an additive mask."""
    attend(out, q, latents, MASKED, latents.data.shape[0], scale, positions=positions, mask=mask)


def sparse_attention(out, q, latents, indices, scale):
    """Absorbed MLA over the chosen keys only."""
    attend(out, q, latents, SPARSE, indices.shape[1], scale, indices=indices)
