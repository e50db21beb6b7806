"""The lightning indexer: scores, their top-k, and the mask of selected keys.

Of many tokens a task scores all keys for some and selects at once, so that few rows of scores exist at a time. Of a few tokens tasks divide
the keys, and then the rows of scores, if these are long.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, contiguous, floats_at
from pydsa.backends.cpu.f32.indexer import TILE
from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.jobs import ScoreJob, call_kernel
from pydsa.backends.cpu.scratch import task_scratch
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import by_row, rows_of
from pydsa.backends.cpu.top_k import (count_parts, find_candidates, find_threshold, is_long, long_row_bytes, select,
                                      select_of_parts)
from pydsa.backends.cpu.vectors.scalars import bits_of_float


FEW_TOKENS = 8             # the most tokens whose scores are divided by keys; of more, each task has some tokens
MAX_TASK_KEYS = 1024       # the most keys that a task scores for a few tokens
MIN_TASK_TOKENS, MAX_TASK_TOKENS = 4, 16       # of a task that scores all their keys
GEMM_TOKENS = 3            # tokens from which on keys are packed for tiles


@inner
def score(out, out_token, q, w, keys, t, n_tokens, first, last, scale, thread):
    """Score keys `first` to `last` for tokens from t on.

    Rows of `out`, an address, are padded to a multiple of 16 keys.
    """
    function = keys.score_gemm if n_tokens >= GEMM_TOKENS else keys.score_gemv
    call_kernel(function, ScoreJob(
        thread=thread, out=out, out_token=out_token,
        q=address(q) + t * q.strides[0], q_token=q.strides[0], q_head=q.strides[1], w=address(w) + t * w.strides[0], w_token=w.strides[0],
        n_tokens=n_tokens, n_head=q.shape[1], width=q.shape[2],
        rows=address(keys.data), row_bytes=keys.data.shape[1], dequantize=keys.dequantize, row_n=keys.n,
        first=first, last=last, scale=bits_of_float(np.float32(scale))))


@inner
def row_bytes(n_keys):
    """Count the bytes of a row of scores."""
    return 4 * ((n_keys + 15) // 16 * 16)


@inner
def task_tokens(n_tokens, n_threads):
    """Count the tokens of a task that scores all their keys."""
    return max(min(MIN_TASK_TOKENS, (n_tokens + n_threads - 1) // n_threads), min(MAX_TASK_TOKENS, n_tokens // (4 * n_threads)))


@inner
def task_keys(n_keys, n_threads):
    """Count the keys of a task for a few tokens, a multiple of TILE."""
    share = (n_keys + 2 * n_threads - 1) // (2 * n_threads)
    return min(MAX_TASK_KEYS, (share + TILE - 1) // TILE * TILE)


@inner
def begin_scores(out, q, w, keys, positions, scale, task):
    """Count the tasks of the first stage: of keys for a few tokens, or of tokens."""
    if len(q) <= FEW_TOKENS:
        size = task_keys(positions[-1] + 1, task.n_threads)
        return (positions[-1] + size) // size
    size = task_tokens(len(q), task.n_threads)
    return (len(q) + size - 1) // size


@inner
def begin_finish(out, q, w, keys, positions, scale, task):
    """Count the tasks of the second stage: none if tasks had all keys of their tokens."""
    return len(q) if len(q) <= FEW_TOKENS else 0


@inner
def score_keys(q, w, keys, positions, scale, task):
    """Score the keys of a task for all of a few tokens."""
    n_keys = positions[-1] + 1
    size = task_keys(n_keys, task.n_threads)
    score(task.scratch, row_bytes(n_keys), q, w, keys, 0, len(q), task.index * size, min(n_keys, task.index * size + size), scale,
          task.thread)


@inner
def score_tokens(q, w, keys, positions, scale, task):
    """Score all keys of a task's tokens, the last ones first.

    Returns the first token, the number of tokens, and where the rows of scores are.
    """
    size = task_tokens(len(q), task.n_threads)
    t = ((len(q) + size - 1) // size - 1 - task.index) * size
    n_tokens = min(size, len(q) - t)
    n_keys = positions[t + n_tokens - 1] + 1
    rows = task_scratch(task.thread, n_tokens * row_bytes(n_keys))
    score(rows, row_bytes(n_keys), q, w, keys, t, n_tokens, 0, n_keys, scale, task.thread)
    return t, n_tokens, rows


@inner
def row_of(rows, i, n_padded, n_keys):
    """View the i-th row of scores of up to n_padded keys."""
    return floats_at(rows + i * row_bytes(n_padded), 1, n_keys)[0]


def scratch_rows(q, keys):
    """Count the bytes of the rows of scores of a few tokens."""
    return len(q) * row_bytes(len(keys.data)) if len(q) <= FEW_TOKENS else 0


@inner
def store_scores(out, t, row, thread):
    """Store a token's scores, and -inf for the keys that it does not see."""
    target = contiguous(out[t])
    for s in range(row.size):
        target[s] = row[s]
    for s in range(row.size, target.size):
        target[s] = -np.inf


@inner
def select_token(out, t, row, thread):
    """Select a token's keys."""
    select(out[t], row, thread)


@inline
def score_and(finish, out, q, w, keys, positions, scale, task):
    """Run a task of the first stage.

    finish(out, t, row, thread) is called for each token of which the task has all scores. As an argument of a function that is not inlined
    it would be an address of this process, with which a kernel is not kept.
    """
    if len(q) <= FEW_TOKENS:
        score_keys(q, w, keys, positions, scale, task)
        return
    first, n_tokens, rows = score_tokens(q, w, keys, positions, scale, task)
    for t in range(first, first + n_tokens):
        finish(out, t, row_of(rows, t - first, positions[first + n_tokens - 1] + 1, positions[t] + 1), task.thread)


@inner
def scores_first(out, q, w, keys, positions, scale, task):
    score_and(store_scores, out, q, w, keys, positions, scale, task)


@inner
def scores_finish(out, q, w, keys, positions, scale, task):
    t = task.index
    store_scores(out, t, row_of(task.scratch, t, positions[-1] + 1, positions[t] + 1), task.thread)


@op(Stage(begin_scores, scores_first), Stage(begin_finish, scores_finish))
def indexer_scores(out, q, w, keys, positions, scale):
    return scratch_rows(q, keys)


@inner
def select_first(out, q, w, keys, positions, scale, task):
    score_and(select_token, out, q, w, keys, positions, scale, task)


@inner
def divides_rows(out, positions):
    """Whether the rows of scores of a few tokens are divided to select."""
    return len(out) <= FEW_TOKENS and is_long(positions[0] + 1, out.shape[1])


@inner
def row_and_shared(t, n_tokens, positions, scratch):
    """View the scores of one of a few tokens.

    Return also where the memory begins that its tasks share.
    """
    n_keys = positions[-1] + 1
    return row_of(scratch, t, n_keys, positions[t] + 1), scratch + n_tokens * row_bytes(n_keys) + t * long_row_bytes(n_keys)


@inner
def select_second(out, q, w, keys, positions, scale, task):
    row, shared = row_and_shared(task.index, len(q), positions, task.scratch)
    if divides_rows(out, positions):
        find_threshold(row, out.shape[1], shared, task.thread)
    else:
        select(out[task.index], row, task.thread)


@inner
def begin_candidates(out, q, w, keys, positions, scale, task):
    return len(q) * count_parts(positions[0] + 1) if divides_rows(out, positions) else 0


@inner
def select_third(out, q, w, keys, positions, scale, task):
    row, shared = row_and_shared(task.index % len(q), len(q), positions, task.scratch)
    part, parts = task.index // len(q), count_parts(positions[0] + 1)
    find_candidates(row, part, shared)
    if part == parts - 1 and count_parts(row.size) > parts:     # a later token has a part more
        find_candidates(row, parts, shared)


@inner
def begin_last(out, q, w, keys, positions, scale, task):
    return len(q) if divides_rows(out, positions) else 0


@inner
def select_last(out, q, w, keys, positions, scale, task):
    row, shared = row_and_shared(task.index, len(q), positions, task.scratch)
    select_of_parts(out[task.index], row, shared, task.thread)


@op(Stage(begin_scores, select_first), Stage(begin_finish, select_second), Stage(begin_candidates, select_third),
    Stage(begin_last, select_last))
def indexer_select(out, q, w, keys, positions, scale):
    n_keys = len(keys.data)
    return scratch_rows(q, keys) + (len(q) * long_row_bytes(n_keys) if len(q) <= FEW_TOKENS and is_long(n_keys, out.shape[1]) else 0)


@inner
def mask_rows(out, indices, positions, task):
    for t in rows_of(out, task):
        row = contiguous(out[t])
        for s in range(row.size):
            row[s] = -np.inf
        for i in range(indices.shape[1]):
            s = indices[t, i]
            if 0 <= s <= positions[t]:
                row[s] = 0


@op(Stage(by_row, mask_rows))
def scatter_mask(out, indices, positions):
    return 0
