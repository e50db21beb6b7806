"""Absorbed MLA attention: one key row serves every head, its first values are the value. Keys pass in tiles under an online softmax."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.linear import addresses
from pydsa.backends.cpu.rows import contiguous, unpack
from pydsa.backends.cpu.microkernels import address, exp, n_threads, tile_products
from pydsa.jit import inner, kernel

TILE = 32       # keys: 72 KiB of floats at V3.2's width of 576, within a second-level cache
EVERY = np.empty(0, np.int32)       # indices that stand for all keys
NO_MASK = np.empty(0, np.float32)


@inner
def attend(out, q, latents, indices, n_keys, mask, scale):
    """out[h] = softmax(scale q[h] . key + mask) value over n_keys keys: those at `indices`, or the first ones if it is empty.

    out [H, n_v] and q [H, D] float32, heads of one token; a mask that is not empty has one value a key.
    """
    n_head, width = q.shape
    row_bytes = latents.data.shape[1]
    tile, scores = np.empty((TILE, width), np.float32), np.empty((n_head, TILE), np.float32)
    greatest, total = np.full(n_head, -np.inf, np.float32), np.zeros(n_head, np.float32)
    q_at = addresses(address(q), q.strides[0], n_head)
    scores_at = addresses(address(scores), 4 * TILE, n_head)
    out[:] = 0
    for first in range(0, n_keys, TILE):
        n = min(TILE, n_keys - first)
        for j in range(n):
            s = indices[first + j] if indices.size else first + j
            unpack(latents, address(latents.data) + np.int64(s) * row_bytes, width, address(tile[j]))
        scores[:] = 0
        tile_products(address(tile), 4 * width, n, address(q_at), n_head, 0, width, address(scores_at), 0)
        for h in range(n_head):
            row = scores[h]
            tile_greatest, damaged = np.float32(-np.inf), False
            for j in range(n):
                row[j] = row[j] * scale + (mask[first + j] if mask.size else np.float32(0))
                tile_greatest = max(tile_greatest, row[j])
                damaged |= row[j] != row[j]
            if damaged:         # NaN must not look like a key that is masked
                total[h] = np.nan
            if tile_greatest == -np.inf:
                continue
            new = max(greatest[h], tile_greatest)
            shrink = exp(greatest[h] - new) if greatest[h] > -np.inf else np.float32(0)
            greatest[h] = new
            total[h] *= shrink
            for j in range(n):
                row[j] = exp(row[j] - new) if row[j] > -np.inf else np.float32(0)
                total[h] += row[j]
            accumulate(out[h], shrink, row, tile, n)
    for h in range(n_head):
        if total[h] != 0:
            out[h] /= total[h]


@inner
def accumulate(out, shrink, p, tile, n):
    """out = shrink out + sum_j p[j] tile[j]"""
    acc, n_v = contiguous(out), out.size
    if shrink != 1:
        for i in range(n_v):
            acc[i] *= shrink
    j = 0
    while j + 4 <= n:
        for i in range(n_v):
            acc[i] += p[j] * tile[j, i] + p[j + 1] * tile[j + 1, i] + p[j + 2] * tile[j + 2, i] + p[j + 3] * tile[j + 3, i]
        j += 4
    while j < n:
        for i in range(n_v):
            acc[i] += p[j] * tile[j, i]
        j += 1


@inner
def head_groups(n_tokens, n_head):
    """Into how many parts a token's heads are split so that every thread has work."""
    return min(n_head, max(1, n_threads() // n_tokens))


@kernel(parallel=True)
def dense_attention(out, q, latents, positions, scale):
    n_tokens, n_head = q.shape[:2]
    parts = head_groups(n_tokens, n_head)
    for task in prange(n_tokens * parts):
        t, part = n_tokens - 1 - task // parts, task % parts
        a, b = part * n_head // parts, (part + 1) * n_head // parts
        attend(out[t, a:b], q[t, a:b], latents, EVERY, positions[t] + 1, NO_MASK, scale)


@kernel(parallel=True)
def masked_attention(out, q, latents, mask, positions, scale):
    n_tokens, n_head = q.shape[:2]
    parts = head_groups(n_tokens, n_head)
    for task in prange(n_tokens * parts):
        t, part = task // parts, task % parts
        a, b = part * n_head // parts, (part + 1) * n_head // parts
        attend(out[t, a:b], q[t, a:b], latents, EVERY, positions[t] + 1, mask[t], scale)


@kernel(parallel=True)
def sparse_attention(out, q, latents, indices, scale):
    n_tokens, n_head = q.shape[:2]
    parts = head_groups(n_tokens, n_head)
    for task in prange(n_tokens * parts):
        t, part = task // parts, task % parts
        a, b = part * n_head // parts, (part + 1) * n_head // parts
        n_keys = 0
        while n_keys < indices.shape[1] and indices[t, n_keys] >= 0:
            n_keys += 1
        attend(out[t, a:b], q[t, a:b], latents, indices[t], n_keys, NO_MASK, scale)
