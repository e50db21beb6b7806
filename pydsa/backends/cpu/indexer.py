"""The lightning indexer: scores, scores streamed into top-k, and the mask of what was chosen."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.f32.indexer import TILE
from pydsa.backends.cpu.jit import call_intp_function, inner, kernel
from pydsa.backends.cpu.scalars import bits_of_float
from pydsa.backends.cpu.threads import n_threads
from pydsa.backends.cpu.top_k import select


TOGETHER = 32       # tokens whose rows of scores exist at a time
PORTION = 1024      # keys at most that a thread scores for them at a time
GEMM_TOKENS = 3            # tokens from which keys are prepared for tiles


@inner
def score(out, q, w, keys, first, last, scale):
    """Scores of keys from first to last for tokens whose rows of `out` have room for a multiple of 16 keys."""
    function = keys.score_gemm if len(q) >= GEMM_TOKENS else keys.score_gemv
    call_intp_function(function, (
        address(out), out.strides[0], address(q), q.strides[0], q.strides[1], address(w), w.strides[0], q.shape[0], q.shape[1], q.shape[2],
        address(keys.data), keys.data.shape[1], keys.dequantize, keys.n, first, last, bits_of_float(np.float32(scale))))


@inner
def score_rows(rows, q, w, keys, n, scale, task):
    """The task-th portion of n keys for all tokens: as large as it can be, if all threads shall have one."""
    size = portion(n)
    score(rows, q, w, keys, task * size, min(n, task * size + size), scale)


@inner
def portion(n):
    """Keys that a thread takes at a time, a multiple of TILE."""
    share = (n + n_threads() - 1) // n_threads()
    return min(PORTION, (share + TILE - 1) // TILE * TILE)


@kernel(parallel=True)
def indexer_scores(out, q, w, keys, positions, scale):
    n_tokens = q.shape[0]
    out[:] = -np.inf
    rows = np.empty((min(n_tokens, TOGETHER), (positions[n_tokens - 1] + 16) // 16 * 16), np.float32)
    for first in range(0, n_tokens, TOGETHER):
        last = min(first + TOGETHER, n_tokens)
        n = positions[last - 1] + 1
        for task in prange((n + portion(n) - 1) // portion(n)):
            score_rows(rows, q[first:last], w[first:last], keys, n, scale, task)
        for t in range(first, last):
            out[t, :positions[t] + 1] = rows[t - first, :positions[t] + 1]


@kernel(parallel=True)
def indexer_select(out, q, w, keys, positions, scale):
    n_tokens = q.shape[0]
    rows = np.empty((min(n_tokens, TOGETHER), (positions[n_tokens - 1] + 16) // 16 * 16), np.float32)
    for first in range(0, n_tokens, TOGETHER):
        last = min(first + TOGETHER, n_tokens)
        n = positions[last - 1] + 1
        for task in prange((n + portion(n) - 1) // portion(n)):
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
