"""Absorbed MLA attention: one key row serves all heads.

The first values of a key row are its value. Here are the ops and the split of their work among threads; the kernels are in f32/, bf16x2/
and int8x2/.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu import amx, bf16x2, f32
from pydsa.backends.cpu.arrays import address, contiguous, floats_at
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.jobs import AttendJob, call_kernel
from pydsa.backends.cpu.scalars import bits_of_float, exp
from pydsa.backends.cpu.scratch import caller_scratch
from pydsa.backends.cpu.simd import float_at
from pydsa.backends.cpu.threads import n_threads


QUERIES = bf16x2.attention.QUERIES if amx.HERE else f32.attention.QUERIES
ALL_KEYS = np.empty((1, 0), np.int32)          # indices that mean all keys
NO_MASK = np.empty((1, 0), np.float32)
SPLIT_KEYS = 32       # the keys of a split are a multiple of this


@inner
def tokens_per_task(q, share_tiles):
    """Count the tokens of a task, which share key tiles, with all heads."""
    n_tokens, n_head, _ = q.shape
    if not share_tiles or q.strides[0] != n_head * q.strides[1]:
        return 1
    return max(1, min(QUERIES // n_head, n_tokens // n_threads()))


@inner
def splits_per_token(q):
    """Return how many splits the heads, and the keys, of a token have.

    There is more than one only if there are fewer tokens than threads. Keys are split (as in flash-decoding) where there are fewer than 32
    heads a thread: to pack all keys would cost each thread as much as everything else.
    """
    n = max(1, n_threads() // q.shape[0])
    head_splits = max(1, min(n, q.shape[1] // 32))
    return head_splits, n // head_splits


@inner
def split_ends(q, n_keys):
    """Compute where each split of each token's keys ends, int64 [T, splits]."""
    n_splits = splits_per_token(q)[1]
    ends = np.empty((n_keys.size, n_splits), np.int64)
    for t in range(n_keys.size):
        split_keys = (n_keys[t] + n_splits * SPLIT_KEYS - 1) // (n_splits * SPLIT_KEYS) * SPLIT_KEYS
        for split in range(n_splits):
            ends[t, split] = min(n_keys[t], (split + 1) * split_keys) if n_splits > 1 else n_keys[t]
    return ends


@inner
def count_tasks(q, share_tiles):
    """Count the tasks, rounded up to a multiple of the threads."""
    tokens, (head_splits, key_splits) = tokens_per_task(q, share_tiles), splits_per_token(q)
    n = (q.shape[0] + tokens - 1) // tokens * head_splits * key_splits
    return (n + n_threads() - 1) // n_threads() * n_threads()


@inner
def partial_bytes(out):
    """Count the bytes of one split's partial result for one token.

    For each head: row_max, row_sum, and the sum of the weighted values.
    """
    return 4 * out.shape[1] * (2 + out.shape[2])


@inner
def run_task(out, q, latents, indices, ends, mask, scale, share_tiles, task, n_tasks, scratch):
    """Run one task. Tasks are dealt to threads one by one.

    Later tokens have more keys, so contiguous ranges would be uneven.
    """
    tokens, (head_splits, key_splits) = tokens_per_task(q, share_tiles), splits_per_token(q)
    per_thread, n_head = n_tasks // n_threads(), q.shape[1]
    i = task % per_thread * n_threads() + task // per_thread
    t, split = i // (head_splits * key_splits) * tokens, i % key_splits
    if t >= q.shape[0]:
        return
    end, heads = min(t + tokens, q.shape[0]), (n_head + head_splits - 1) // head_splits
    h = i // key_splits % head_splits * heads
    h_end = min(h + heads, n_head)
    first, partial = 0 if split == 0 else ends[t, split - 1], 0
    if key_splits > 1:
        partial = scratch + (t * key_splits + split) * partial_bytes(out) + 4 * h * (2 + out.shape[2])
    indices_at = address(indices) + t * indices.strides[0] if indices.size else 0
    mask_at = address(mask) + t * mask.strides[0] if mask.size else 0
    call_kernel(latents.attend, AttendJob(
        out=address(out) + t * out.strides[0] + h * out.strides[1], out_token=out.strides[0], out_head=out.strides[1],
        q=address(q) + t * q.strides[0] + h * q.strides[1], q_head=q.strides[1],
        n_tokens=end - t, n_head=h_end - h, width=q.shape[2], n_v=out.shape[2],
        rows=address(latents.data), row_bytes=latents.data.shape[1], dequantize=latents.dequantize, row_n=latents.n,
        indices=indices_at, key_start=first, key_ends=address(ends) + 8 * (t * key_splits + split),
        mask=mask_at, mask_row=mask.strides[0],
        scale=bits_of_float(np.float32(scale)), partial=partial))


@inner
def merge_partials(out, q, scratch):
    """Merge the partial results of the splits into one softmax.

    A split's sums are rescaled by exp(its row_max - the row_max of all splits).
    """
    n_splits, n_v = splits_per_token(q)[1], out.shape[2]
    if n_splits == 1:
        return
    for t in range(out.shape[0]):
        for h in range(out.shape[1]):
            row, row_max, row_sum = contiguous(out[t, h]), np.float32(-np.inf), np.float32(0)
            first = scratch + t * n_splits * partial_bytes(out) + 4 * h * (2 + n_v)
            for i in range(n_splits):
                row_max = max(row_max, float_at(first + i * partial_bytes(out), 0))
            for j in range(n_v):
                row[j] = 0
            for i in range(n_splits):
                at = first + i * partial_bytes(out)
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
def partials_scratch(out, q):
    """Allocate the partial results of all tokens."""
    return caller_scratch(out.shape[0] * splits_per_token(q)[1] * partial_bytes(out))


@kernel(parallel=True)
def dense_attention(out, q, latents, positions, scale):
    n_tasks, scratch, ends = count_tasks(q, True), partials_scratch(out, q), split_ends(q, positions + 1)
    for task in prange(n_tasks):
        run_task(out, q, latents, ALL_KEYS, ends, NO_MASK, scale, True, task, n_tasks, scratch)
    merge_partials(out, q, scratch)


@kernel(parallel=True)
def masked_attention(out, q, latents, mask, positions, scale):
    n_tasks, scratch, ends = count_tasks(q, True), partials_scratch(out, q), split_ends(q, positions + 1)
    for task in prange(n_tasks):
        run_task(out, q, latents, ALL_KEYS, ends, mask, scale, True, task, n_tasks, scratch)
    merge_partials(out, q, scratch)


@kernel(parallel=True)
def sparse_attention(out, q, latents, indices, scale):
    n_tasks, scratch, n_keys = count_tasks(q, False), partials_scratch(out, q), np.zeros(q.shape[0], np.int64)
    for t in range(n_keys.size):
        while n_keys[t] < indices.shape[1] and indices[t, n_keys[t]] >= 0:
            n_keys[t] += 1
    ends = split_ends(q, n_keys)
    for task in prange(n_tasks):
        run_task(out, q, latents, indices, ends, NO_MASK, scale, False, task, n_tasks, scratch)
    merge_partials(out, q, scratch)
