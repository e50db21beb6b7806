"""The lightning indexer: scores, their top-k, and the mask of selected keys."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.f32.indexer import TILE
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.jobs import ScoreJob, call_kernel
from pydsa.backends.cpu.scalars import bits_of_float
from pydsa.backends.cpu.threads import n_threads
from pydsa.backends.cpu.top_k import select


TOKEN_BATCH = 32       # tokens whose rows of scores exist at a time
MAX_TASK_KEYS = 1024      # the most keys that a task scores for them
GEMM_TOKENS = 3            # tokens from which on keys are packed for tiles


@inner
def score(out, q, w, keys, first, last, scale):
    """Score keys `first` to `last` for all tokens.

    Rows of `out` are padded to a multiple of 16 keys.
    """
    function = keys.score_gemm if len(q) >= GEMM_TOKENS else keys.score_gemv
    call_kernel(function, ScoreJob(
        out=address(out), out_token=out.strides[0], q=address(q), q_token=q.strides[0], q_head=q.strides[1],
        w=address(w), w_token=w.strides[0], n_tokens=q.shape[0], n_head=q.shape[1], width=q.shape[2],
        rows=address(keys.data), row_bytes=keys.data.shape[1], dequantize=keys.dequantize, row_n=keys.n,
        first=first, last=last, scale=bits_of_float(np.float32(scale))))


@inner
def score_rows(rows, q, w, keys, n, scale, task):
    """Score the keys of one task for all tokens.

    A task's range is as large as possible while every thread has one.
    """
    size = keys_per_task(n)
    score(rows, q, w, keys, task * size, min(n, task * size + size), scale)


@inner
def keys_per_task(n):
    """Count the keys of a task, a multiple of TILE."""
    share = (n + n_threads() - 1) // n_threads()
    return min(MAX_TASK_KEYS, (share + TILE - 1) // TILE * TILE)


@kernel(parallel=True)
def indexer_scores(out, q, w, keys, positions, scale):
    n_tokens = q.shape[0]
    out[:] = -np.inf
    rows = np.empty((min(n_tokens, TOKEN_BATCH), (positions[n_tokens - 1] + 16) // 16 * 16), np.float32)
    for first in range(0, n_tokens, TOKEN_BATCH):
        last = min(first + TOKEN_BATCH, n_tokens)
        n = positions[last - 1] + 1
        for task in prange((n + keys_per_task(n) - 1) // keys_per_task(n)):
            score_rows(rows, q[first:last], w[first:last], keys, n, scale, task)
        for t in range(first, last):
            out[t, :positions[t] + 1] = rows[t - first, :positions[t] + 1]


@kernel(parallel=True)
def indexer_select(out, q, w, keys, positions, scale):
    n_tokens = q.shape[0]
    rows = np.empty((min(n_tokens, TOKEN_BATCH), (positions[n_tokens - 1] + 16) // 16 * 16), np.float32)
    for first in range(0, n_tokens, TOKEN_BATCH):
        last = min(first + TOKEN_BATCH, n_tokens)
        n = positions[last - 1] + 1
        for task in prange((n + keys_per_task(n) - 1) // keys_per_task(n)):
            score_rows(rows, q[first:last], w[first:last], keys, n, scale, task)
        for t in prange(last - first):
            select(out[first + t], rows[t, :positions[first + t] + 1])


@kernel
def scatter_mask(out, indices, positions):
    out[:] = -np.inf
    for t in range(out.shape[0]):
        for i in range(indices.shape[1]):
            s = indices[t, i]
            if 0 <= s <= positions[t]:
                out[t, s] = 0
