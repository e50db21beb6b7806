"""Absorbed MLA attention: one key row serves every head, its first values are the value. Keys pass in tiles under an online softmax."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.microkernels import COLUMNS, address, combine, exp, n_threads, turn_over
from pydsa.backends.cpu.rows import contiguous, unpack
from pydsa.backends.cpu.scratch import floats_at, own_scratch
from pydsa.jit import inner, kernel

TILE = 64       # keys: 144 KiB of floats at V3.2's width of 576, within a second-level cache; a multiple of COLUMNS
WIDTH = 128     # of the keys' values that are multiplied at a time: 32 KiB, within a first-level cache
QUERIES = 96    # heads times tokens that share a tile
EVERY = np.empty(0, np.int32)           # indices that stand for all keys
NO_MASK = np.empty((1, 0), np.float32)


@inner
def attend(out, q, latents, indices, n_keys, mask, scale):
    """out[t, h] = softmax(scale q[t, h] . key + mask) value over the first n_keys[t] keys, or of those at `indices`.

    out [T, H, n_v] and q [T, H, D] float32, in whose memory one head follows the other at one distance; n_keys int64 [T]; a mask that is
    not empty is [T, n_kv].
    """
    n_tokens, n_head, width = q.shape
    n, n_v, row_bytes = n_tokens * n_head, out.shape[2], latents.data.shape[1]
    padded = (width + COLUMNS - 1) // COLUMNS * COLUMNS
    n_sums = (n_v + COLUMNS - 1) // COLUMNS * COLUMNS
    memory = own_scratch(4 * (2 * TILE * padded + n * TILE + n * n_sums))
    tile, turned = floats_at(memory, TILE, padded), floats_at(memory + 4 * TILE * padded, padded, TILE)
    scores, sums = floats_at(memory + 8 * TILE * padded, n, TILE), floats_at(memory + 4 * TILE * (2 * padded + n), n, n_sums)
    sums[:] = 0
    greatest, total = np.full(n, -np.inf, np.float32), np.zeros(n, np.float32)
    most = n_keys.max()
    for first in range(0, most, TILE):
        there = min(TILE, most - first)
        for j in range(there):
            s = indices[first + j] if indices.size else first + j
            unpack(latents, address(latents.data) + np.int64(s) * row_bytes, width, address(tile[j]))
        for j in range(0, there, 16):
            for k in range(0, width, 16):
                turn_over(address(tile[j]) + 4 * k, 4 * padded, address(turned[k]) + 4 * j, 4 * TILE)
        scores[:] = 0
        for k in range(0, width, WIDTH):
            part = min(WIDTH, width - k)
            combine(address(scores), 4 * TILE, n, TILE, address(q) + 4 * k, q.strides[1], address(turned[k]), 4 * TILE, part)
        for i in range(n):
            t = i // n_head
            bias = mask[t, first:] if mask.size else NO_MASK[0]
            shrink = weigh(scores[i], min(there, n_keys[t] - first), bias, scale, greatest[i:i + 1], total[i:i + 1])
            if shrink != 1:
                row = sums[i]
                for j in range(n_sums):
                    row[j] *= shrink
        combine(address(sums), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, address(tile), 4 * padded, there)
    for i in range(n):
        row, source = contiguous(out[i // n_head, i % n_head]), sums[i]
        factor = np.float32(1) / total[i] if total[i] != 0 else np.float32(0)
        for j in range(n_v):
            row[j] = source[j] * factor


@inner
def weigh(row, visible, mask, scale, greatest, total):
    """Scores of one query -> their weights beside the greatest score so far, 0 where nothing is visible; both sums are brought up to date.

    Returns what the sum of the values so far must be multiplied by.
    """
    new, damaged = greatest[0], False
    for j in range(visible):
        row[j] = row[j] * scale + (mask[j] if mask.size else np.float32(0))
        damaged |= row[j] != row[j]
        new = max(new, row[j])
    row[max(visible, 0):] = 0
    if damaged:         # NaN must not look like a key that is masked
        total[0] = np.nan
    if new == -np.inf:
        row[:] = 0
        return np.float32(1)
    shrink = exp(greatest[0] - new) if greatest[0] > -np.inf else np.float32(0)
    part = np.float32(0)
    for j in range(visible):
        row[j] = exp(row[j] - new) if row[j] > -np.inf else np.float32(0)
        part += row[j]
    greatest[0], total[0] = new, total[0] * shrink + part
    return shrink


@inner
def blocks(q, together):
    """(tokens, heads) of a piece of work: heads of one token where there are few tokens, so that every thread has some."""
    n_tokens, n_head, _ = q.shape
    if n_tokens < n_threads():
        parts = min(n_head, max(1, n_threads() // n_tokens))
        return 1, (n_head + parts - 1) // parts
    if not together or q.strides[0] != n_head * q.strides[1]:
        return 1, n_head
    return max(1, min(QUERIES // n_head, n_tokens // n_threads())), n_head


@inner
def turns(q, together):
    """How many pieces of work there are, rounded up to a multiple of the threads."""
    tokens, heads = blocks(q, together)
    n = (q.shape[0] + tokens - 1) // tokens * ((q.shape[1] + heads - 1) // heads)
    return (n + n_threads() - 1) // n_threads() * n_threads()


@inner
def piece(turn, n_turns, q, together):
    """The tokens and heads, as two ranges, of a turn: dealt out one by one to the threads, since later tokens have more keys."""
    tokens, heads = blocks(q, together)
    each = n_turns // n_threads()
    i = turn % each * n_threads() + turn // each
    parts = (q.shape[1] + heads - 1) // heads
    t, h = min(i // parts * tokens, q.shape[0]), i % parts * heads
    return t, min(t + tokens, q.shape[0]), h, min(h + heads, q.shape[1])


@kernel(parallel=True)
def dense_attention(out, q, latents, positions, scale):
    n_turns = turns(q, True)
    for turn in prange(n_turns):
        t, t_end, h, h_end = piece(turn, n_turns, q, True)
        if t < t_end:
            attend(out[t:t_end, h:h_end], q[t:t_end, h:h_end], latents, EVERY, positions[t:t_end] + 1, NO_MASK, scale)


@kernel(parallel=True)
def masked_attention(out, q, latents, mask, positions, scale):
    n_turns = turns(q, True)
    for turn in prange(n_turns):
        t, t_end, h, h_end = piece(turn, n_turns, q, True)
        if t < t_end:
            attend(out[t:t_end, h:h_end], q[t:t_end, h:h_end], latents, EVERY, positions[t:t_end] + 1, mask[t:t_end], scale)


@kernel(parallel=True)
def sparse_attention(out, q, latents, indices, scale):
    n_turns = turns(q, False)
    for turn in prange(n_turns):
        t, t_end, h, h_end = piece(turn, n_turns, q, False)
        if t < t_end:
            n_keys = np.zeros(1, np.int64)
            while n_keys[0] < indices.shape[1] and indices[t, n_keys[0]] >= 0:
                n_keys[0] += 1
            attend(out[t:t_end, h:h_end], q[t:t_end, h:h_end], latents, indices[t], n_keys, NO_MASK, scale)
