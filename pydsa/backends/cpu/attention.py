"""Absorbed MLA attention: one key row serves every head, its first values are the value. The ops, and how threads share their work."""
import numpy as np
from numba import prange

from pydsa.backends.cpu import amx, bf16x2, f32
from pydsa.backends.cpu.arrays import address, contiguous, floats_at
from pydsa.backends.cpu.jit import call_intp_function, inner, kernel
from pydsa.backends.cpu.scalars import bits_of_float, exp
from pydsa.backends.cpu.scratch import callers_scratch
from pydsa.backends.cpu.simd import float_at
from pydsa.backends.cpu.threads import n_threads


QUERIES = bf16x2.attention.QUERIES if amx.HERE else f32.attention.QUERIES
EVERY = np.empty((1, 0), np.int32)          # indices that stand for all keys
NO_MASK = np.empty((1, 0), np.float32)
PART = 32       # what a thread takes of a token's keys is a multiple of these


@inner
def tokens_per_task(q, together):
    """Tokens that pass over their keys together, with all heads."""
    n_tokens, n_head, _ = q.shape
    if not together or q.strides[0] != n_head * q.strides[1]:
        return 1
    return max(1, min(QUERIES // n_head, n_tokens // n_threads()))


@inner
def parts_per_token(q):
    """Into how many parts the heads, and into how many the keys of each token are divided, where there are fewer tokens than threads.

    Keys of fewer than 32 heads are divided: preparing them would cost each thread as much as all else.
    """
    parts = max(1, n_threads() // q.shape[0])
    of_heads = max(1, min(parts, q.shape[1] // 32))
    return of_heads, parts // of_heads


@inner
def ends_of_parts(q, n_keys):
    """Where each part of each token's keys ends."""
    parts = parts_per_token(q)[1]
    ends = np.empty((n_keys.size, parts), np.int64)
    for t in range(n_keys.size):
        size = (n_keys[t] + parts * PART - 1) // (parts * PART) * PART
        for part in range(parts):
            ends[t, part] = min(n_keys[t], (part + 1) * size) if parts > 1 else n_keys[t]
    return ends


@inner
def tasks(q, together):
    """How many pieces of work there are, rounded up to a multiple of the threads."""
    tokens, (of_heads, of_keys) = tokens_per_task(q, together), parts_per_token(q)
    n = (q.shape[0] + tokens - 1) // tokens * of_heads * of_keys
    return (n + n_threads() - 1) // n_threads() * n_threads()


@inner
def part_bytes(out):
    """What a part leaves for a token: for each head the greatest score, the sum of the weights and that of the weighted values."""
    return 4 * out.shape[1] * (2 + out.shape[2])


@inner
def run_task(out, q, latents, indices, ends, mask, scale, together, task, n_tasks, scratch):
    """One piece of work. They are dealt out one by one to the threads, since later tokens have more keys."""
    tokens, (of_heads, of_keys) = tokens_per_task(q, together), parts_per_token(q)
    each, n_head = n_tasks // n_threads(), q.shape[1]
    i = task % each * n_threads() + task // each
    t, part = i // (of_heads * of_keys) * tokens, i % of_keys
    if t >= q.shape[0]:
        return
    end, heads = min(t + tokens, q.shape[0]), (n_head + of_heads - 1) // of_heads
    h = i // of_keys % of_heads * heads
    h_end = min(h + heads, n_head)
    first, statistics = 0 if part == 0 else ends[t, part - 1], 0
    if of_keys > 1:
        statistics = scratch + (t * of_keys + part) * part_bytes(out) + 4 * h * (2 + out.shape[2])
    call_intp_function(latents.attend, (
        address(out) + t * out.strides[0] + h * out.strides[1], out.strides[0], out.strides[1],
        address(q) + t * q.strides[0] + h * q.strides[1], q.strides[1], end - t, h_end - h, q.shape[2], out.shape[2],
        address(latents.data), latents.data.shape[1], latents.dequantize, latents.n,
        address(indices) + t * indices.strides[0] if indices.size else 0, first, address(ends) + 8 * (t * of_keys + part),
        address(mask) + t * mask.strides[0] if mask.size else 0, mask.strides[0], bits_of_float(np.float32(scale)), statistics))


@inner
def join_parts(out, q, scratch):
    """What the parts left, as one softmax: each part's sums count as much as its greatest score is beside the greatest of all."""
    parts, n_v = parts_per_token(q)[1], out.shape[2]
    if parts == 1:
        return
    for t in range(out.shape[0]):
        for h in range(out.shape[1]):
            row, row_max, row_sum = contiguous(out[t, h]), np.float32(-np.inf), np.float32(0)
            first = scratch + t * parts * part_bytes(out) + 4 * h * (2 + n_v)
            for i in range(parts):
                row_max = max(row_max, float_at(first + i * part_bytes(out), 0))
            for j in range(n_v):
                row[j] = 0
            for i in range(parts):
                at = first + i * part_bytes(out)
                if float_at(at, 0) > -np.inf:
                    weight, values = exp(float_at(at, 0) - row_max), floats_at(at + 8, 1, n_v)[0]
                    row_sum += weight * float_at(at, 4)
                    for j in range(n_v):
                        row[j] += weight * values[j]
                elif float_at(at, 4) != 0:      # NaN
                    row_sum = float_at(at, 4)
            factor = np.float32(1) / row_sum if row_sum != 0 else np.float32(0)
            for j in range(n_v):
                row[j] *= factor


@inner
def parts_scratch(out, q):
    return callers_scratch(out.shape[0] * parts_per_token(q)[1] * part_bytes(out))


@kernel(parallel=True)
def dense_attention(out, q, latents, positions, scale):
    n_tasks, scratch, ends = tasks(q, True), parts_scratch(out, q), ends_of_parts(q, positions + 1)
    for task in prange(n_tasks):
        run_task(out, q, latents, EVERY, ends, NO_MASK, scale, True, task, n_tasks, scratch)
    join_parts(out, q, scratch)


@kernel(parallel=True)
def masked_attention(out, q, latents, mask, positions, scale):
    n_tasks, scratch, ends = tasks(q, True), parts_scratch(out, q), ends_of_parts(q, positions + 1)
    for task in prange(n_tasks):
        run_task(out, q, latents, EVERY, ends, mask, scale, True, task, n_tasks, scratch)
    join_parts(out, q, scratch)


@kernel(parallel=True)
def sparse_attention(out, q, latents, indices, scale):
    n_tasks, scratch, n_keys = tasks(q, False), parts_scratch(out, q), np.zeros(q.shape[0], np.int64)
    for t in range(n_keys.size):
        while n_keys[t] < indices.shape[1] and indices[t, n_keys[t]] >= 0:
            n_keys[t] += 1
    ends = ends_of_parts(q, n_keys)
    for task in prange(n_tasks):
        run_task(out, q, latents, indices, ends, NO_MASK, scale, False, task, n_tasks, scratch)
    join_parts(out, q, scratch)
