"""Absorbed MLA attention: one key row serves every head, its first values are the value. The ops, and how threads share their work."""
import numpy as np
from numba import prange

from pydsa.backends.cpu import amx
from pydsa.backends.cpu.microkernels import n_threads
from pydsa.jit import inner, kernel

if amx.HERE:
    from pydsa.backends.cpu.split_attention import QUERIES, attend
else:
    from pydsa.backends.cpu.float_attention import QUERIES, attend

EVERY = np.empty(0, np.int32)           # indices that stand for all keys
NO_MASK = np.empty((1, 0), np.float32)


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
