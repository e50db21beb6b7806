"""Absorbed MLA attention: one key row serves all heads.

The first values of a key row are its value. Here are the ops and the split of their work into tasks; the kernels are in f32/, bf16x2/ and
int8x2/.

A token's sums depend on the other tokens of its step, in their last bits: on whether keys are divided, and on tiles that tokens share. With
`latents.alone` they do not: its keys are divided as if it were the only one, and of many tokens each is one task, of all these splits.

`keys` are what tells which keys a token has: int64 [n_tokens], its position, up to which it has all of them; or int32 [n_tokens, k], the
indices of those that it has, followed by -1.
"""
import numpy as np

from pydsa.backends.cpu import bf16x2, f32
from pydsa.backends.cpu.arrays import LINE, address, contiguous, floats_at
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.jobs import AttendJob, call_kernel
from pydsa.backends.cpu.rows import CacheRows
from pydsa.backends.cpu.scratch import task_scratch
from pydsa.backends.cpu.team.coming import MOST, regions_size
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import TASK_VALUES
from pydsa.backends.cpu.vectors import amx
from pydsa.backends.cpu.vectors.scalars import bits_of_float, exp
from pydsa.backends.cpu.vectors.simd import float_at, store


QUERIES = bf16x2.attention.QUERIES if amx.HERE else f32.attention.QUERIES
NO_MASK = np.empty((1, 0), np.float32)
FEW_TOKENS = 4          # the most tokens whose keys are split among tasks, as in flash-decoding
SPLIT_KEYS, MOST_SPLITS = 64, 32        # the fewest keys of a split, and the most splits of a token, whatever the number of threads
TASK_HEADS = 32         # the fewest heads of a task: each task packs the keys that it reads
FEW_TASK_HEADS = 16 if amx.HERE else 8      # of a token with few heads, whose keys are not divided: sums are the same by eights
KEY_BYTES = 2048        # of what comes next, fetched for each key of a single token: about what memory gives meanwhile
WHOLE_KEYS = 256        # the most keys of a token that are one task, where other conversations' tokens keep threads busy
FEW_HEADS = 32          # the most heads for which a token's scores are computed from keys as they lie, without transposing them


@inner
def count_keys(keys, t):
    """Count a token's keys."""
    if keys.ndim == 1:
        return keys[t] + 1
    low, high = 0, keys.shape[1]
    while low < high:
        middle = (low + high) // 2
        if keys[t, middle] >= 0:
            low = middle + 1
        else:
            high = middle
    return np.int64(low)


@inner
def round_to_splits(n):
    """Round n up to a multiple of SPLIT_KEYS."""
    return (n + SPLIT_KEYS - 1) // SPLIT_KEYS * SPLIT_KEYS


@inner
def split_size(n_keys, n_head):
    """Count the keys of each split of n_keys.

    There are at least as many as heads: each split leaves a partial sum for each head.
    """
    return max(round_to_splits(n_head), round_to_splits((n_keys + MOST_SPLITS - 1) // MOST_SPLITS))


@inner
def is_whole(latents, keys, n_threads):
    """Whether a token's keys are one task, as there are enough others.

    Its sums are those of its splits, whose results stay in the task's cache.
    """
    return len(keys) == 1 and latents.beside >= 2 * n_threads and count_keys(keys, 0) <= WHOLE_KEYS


@inner
def count_splits(latents, keys, n_head, n_threads):
    """Count the splits of each token's keys.

    A token with fewer keys than others has empty ones.
    """
    most = 1
    if len(keys) <= FEW_TOKENS and not is_whole(latents, keys, n_threads):
        for t in range(len(keys)):
            n = count_keys(keys, t)
            size = split_size(n, n_head)
            most = max(most, (n + size - 1) // size)
    return most


@inner
def task_size(q, latents, keys, n_splits, n_threads):
    """Return the tokens of a task and its heads.

    Tokens that have all keys up to their positions share tiles of them, unless they are alone.
    """
    n_tokens, n_head, _ = q.shape
    if is_whole(latents, keys, n_threads):
        return 1, n_head
    tokens, heads = 1, n_head
    if not latents.alone and keys.ndim == 1 and n_tokens > FEW_TOKENS and q.strides[0] == n_head * q.strides[1]:
        tokens = max(1, min(QUERIES // n_head, n_tokens // n_threads))
    n = (n_tokens + tokens - 1) // tokens * n_splits
    if n_tokens * n_splits == 1 and n_head <= FEW_HEADS:
        parts = (n_head + FEW_TASK_HEADS - 1) // FEW_TASK_HEADS
        return 1, min(n_head, (parts + n_threads - 1) // n_threads * FEW_TASK_HEADS)
    while tokens == 1 and heads >= 2 * TASK_HEADS and (n_head + heads - 1) // heads * n < 2 * n_threads:
        heads = (heads + 1) // 2
    return tokens, heads


@inner
def begin_attention(out, q, latents, *others):
    """Count the tasks of attend; others: (..., keys, scale, task)."""
    keys, task = others[-3], others[-1]
    n_splits = count_splits(latents, keys, q.shape[1], task.n_threads)
    tokens, heads = task_size(q, latents, keys, n_splits, task.n_threads)
    return (q.shape[0] + tokens - 1) // tokens * ((q.shape[1] + heads - 1) // heads) * n_splits


@inner
def partial_bytes(n_head, n_v):
    """Count the bytes of one split's partial result for one token.

    For each head: row_max, row_sum, and the sum of the weighted values.
    """
    return 4 * n_head * (2 + n_v)


@inner
def coming_bytes(n_keys, n_tasks, task):
    """Count the bytes of what comes next that each of a token's tasks fetches.

    A multiple of a cache line.
    """
    return min(regions_size(task.coming), task.n_threads * MOST, n_keys * KEY_BYTES) // n_tasks // LINE * LINE


@inner
def run_job(out, q, latents, mask, keys, scale, t, n_tokens, h, n_head, first, ends, scaled_end, partial, task):
    """Attend: n_head heads from h on of n_tokens tokens from t on.

    They have the keys from `first` on, up to those at the address `ends`. partial: where partial results go, or 0.
    """
    one_by_one = len(q) <= FEW_TOKENS or keys.ndim == 2 or latents.alone != 0      # whatever the number of threads
    few = 1 if one_by_one and q.shape[1] <= FEW_HEADS else 0
    fetched = coming_bytes(count_keys(keys, 0), begin_attention(out, q, latents, keys, scale, task), task) if (
        len(q) == 1 and latents.beside == 1) else 0
    mask_at = address(mask) + t * mask.strides[0] if mask.size else 0
    indices_at = address(keys) + t * keys.strides[0] if keys.ndim == 2 else 0
    call_kernel(latents.attend, AttendJob(
        thread=task.thread, out=address(out) + t * out.strides[0] + h * out.strides[1], out_token=out.strides[0], out_head=out.strides[1],
        q=address(q) + t * q.strides[0] + h * q.strides[1], q_head=q.strides[1],
        n_tokens=n_tokens, n_head=n_head, width=q.shape[2], n_v=out.shape[2],
        rows=address(latents.data), row_bytes=latents.data.shape[1], dequantize=latents.dequantize, row_n=latents.n,
        indices=indices_at, key_start=first, key_ends=ends, scaled_end=scaled_end,
        mask=mask_at, mask_row=mask.strides[0],
        scale=bits_of_float(np.float32(scale)), partial=partial,
        few=few, coming=task.coming, coming_first=task.index * fetched, coming_bytes=fetched))


@inner
def attend_masked(out, q, latents, mask, keys, scale, task):
    """Attend: some heads of some tokens to some keys.

    The last tokens, which have the most keys, come first.
    """
    n_head = q.shape[1]
    n_splits = count_splits(latents, keys, n_head, task.n_threads)
    tokens, heads = task_size(q, latents, keys, n_splits, task.n_threads)
    groups = (n_head + heads - 1) // heads
    split, h = task.index % n_splits, task.index // n_splits % groups * heads
    t = ((len(q) + tokens - 1) // tokens - 1 - task.index // (n_splits * groups)) * tokens
    heads = min(heads, n_head - h)
    if latents.alone and len(q) > FEW_TOKENS or is_whole(latents, keys, task.n_threads):
        attend_alone(out, q, latents, mask, keys, scale, t, h, heads, task)
        return
    n_tokens, first, partial, scaled_end = min(tokens, len(q) - t), np.int64(0), np.int64(0), np.int64(0)
    ends = task_scratch(task.thread, 8 * n_tokens)
    for i in range(n_tokens):
        store(ends, 8 * i, count_keys(keys, t + i))
    if n_splits > 1:
        n = count_keys(keys, t)
        first = min(n, split * split_size(n, n_head))
        store(ends, 0, min(n, (split + 1) * split_size(n, n_head)))
        partial = task.scratch + (t * n_splits + split) * partial_bytes(n_head, out.shape[2]) + 4 * h * (2 + out.shape[2])
    elif keys.ndim == 1 and len(q) > FEW_TOKENS:       # whatever the tokens of this task are
        scaled_end = count_keys(keys, len(q) - 1)
    run_job(out, q, latents, mask, keys, scale, t, n_tokens, h, heads, first, ends, scaled_end, partial, task)


@inner
def merge_splits(row, n_splits, first, stride):
    """Merge the partial results of the splits into one softmax.

    A split's sums are rescaled by exp(its row_max - the row_max of all splits).
    """
    row_max, row_sum = np.float32(-np.inf), np.float32(0)
    for i in range(n_splits):
        row_max = max(row_max, float_at(first + i * stride, 0))
    for j in range(row.size):
        row[j] = 0
    for i in range(n_splits):
        at = first + i * stride
        if float_at(at, 0) > -np.inf:
            weight, values = exp(float_at(at, 0) - row_max), floats_at(at + 8, 1, row.size)[0]
            row_sum += weight * float_at(at, 4)
            for j in range(row.size):
                row[j] += weight * values[j]
        elif float_at(at, 4) != 0:      # NaN
            row_sum = float_at(at, 4)
    factor = np.float32(1) / row_sum if row_sum != 0 else np.float32(0)
    for j in range(row.size):
        row[j] *= factor


@inner
def attend_alone(out, q, latents, mask, keys, scale, t, h, n_head, task):
    """Attend: some heads of a token, split by split, as in a step of few tokens."""
    n, n_v = count_keys(keys, t), out.shape[2]
    size = split_size(n, q.shape[1])
    n_splits, stride = (n + size - 1) // size, partial_bytes(n_head, n_v)
    ends = task_scratch(task.thread, 64 + (n_splits * stride if n_splits > 1 else 0))
    for i in range(max(1, n_splits)):
        store(ends, 0, min(n, (i + 1) * size))
        partial = ends + 64 + i * stride if n_splits > 1 else 0
        run_job(out, q, latents, mask, keys, scale, t, 1, h, n_head, i * size, ends, 0, partial, task)
    if n_splits > 1:
        for i in range(n_head):
            merge_splits(contiguous(out[t, h + i]), n_splits, ends + 64 + 4 * i * (2 + n_v), stride)


@inner
def attend(out, q, latents, keys, scale, task):
    attend_masked(out, q, latents, NO_MASK, keys, scale, task)


@inner
def merge_size(n_splits, n_v):
    """Count the heads of a task of merge."""
    return max(1, TASK_VALUES // (n_splits * n_v))


@inner
def begin_merging(out, q, latents, *others):
    """Count the tasks of merge."""
    n_splits = count_splits(latents, others[-3], out.shape[1], others[-1].n_threads)
    size = merge_size(n_splits, out.shape[2])
    return 0 if n_splits == 1 else len(out) * ((out.shape[1] + size - 1) // size)


@inner
def merge(out, q, latents, *others):
    """Merge the splits of some heads of a token."""
    n_head, n_v, task = out.shape[1], out.shape[2], others[-1]
    n_splits = count_splits(latents, others[-3], n_head, task.n_threads)
    size = merge_size(n_splits, n_v)
    groups = (n_head + size - 1) // size
    t, h = task.index // groups, task.index % groups * size
    stride = partial_bytes(n_head, n_v)
    for i in range(h, min(h + size, n_head)):
        merge_splits(contiguous(out[t, i]), n_splits, task.scratch + t * n_splits * stride + 4 * i * (2 + n_v), stride)


def partials_bytes(out, most_keys):
    """Count the bytes of all partial results, for up to this many keys."""
    n_splits = min(MOST_SPLITS, -(-most_keys // round_to_splits(out.shape[1])))
    return len(out) * n_splits * partial_bytes(*out.shape[1:]) if len(out) <= FEW_TOKENS else 0


MERGE = Stage(begin_merging, merge)


@op(Stage(begin_attention, attend), MERGE)
def dense_attention(out, q, latents, positions, scale):
    return partials_bytes(out, len(latents.data))


@op(Stage(begin_attention, attend_masked), MERGE)
def masked_attention(out, q, latents, mask, positions, scale):
    return partials_bytes(out, len(latents.data))


@op(Stage(begin_attention, attend), MERGE)
def sparse_attention(out, q, latents, indices, scale):
    return partials_bytes(out, indices.shape[1])


def together(group):
    """The calls of a group, pairs of an op and its arguments.

    Those of attention get caches that know how many calls there are.
    """
    ops = dense_attention, masked_attention, sparse_attention
    n = sum(op in ops for op, _ in group)
    if n < 2:
        return group
    return [(op, tuple(a._replace(beside=n) if isinstance(a, CacheRows) else a for a in args) if op in ops else args) for op, args in group]
