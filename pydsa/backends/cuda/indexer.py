"""The lightning indexer: scores, top-k selection, and the mask of chosen keys."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.gemv_scores import gemv_scores
from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import kernel
from pydsa.backends.cuda.top_k import choose
from pydsa.backends.cuda.variants import kernels
from pydsa.backends.devices import tokens_scored_by_gpu


THREADS = 8 if SIMULATED else 256
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@kernel("f4[:,:], i4[:,:], i8[:]", THREADS)
def write_mask(out, indices, positions):
    """out[t] = -inf, but 0 at indices up to the token's position.

    One token per block.
    """
    t = cuda.blockIdx.x
    for s in range(cuda.threadIdx.x, out.shape[1], THREADS):
        out[t, s] = MINUS_INFINITY
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, indices.shape[1], THREADS):
        s = indices[t, i]
        if 0 <= s <= positions[t]:
            out[t, s] = ZERO


def indexer_scores(out, q, w, keys, positions, scale):
    """out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]).

    -inf for s > positions[t].
    """
    pack, score = kernels("indexer", keys, len(q), q.shape[1])
    score(out, pack(q, w), keys, positions, 0, scale, True)


def indexer_select(out, q, w, keys, positions, scale):
    """indexer_scores and top_k in one, as many tokens at a time as fit.

    See devices.tokens_scored_by_gpu.
    """
    pack, score = kernels("indexer", keys, len(q), q.shape[1])
    _select(out, pack(q, w), score, keys, positions, scale)


def select(out, queries, keys, positions, scale):
    """indexer_select of one token with queries that are already packed."""
    _select(out, queries, kernels("indexer", keys, 1, 1).score, keys, positions, scale)


def select_beside(out, queries, keys, positions, scale, product, w, x, tiles):
    """select(), whose scores are in one launch with a product of heads.

    The table of variants must take that. product, w, x, tiles: the arguments of gemv().
    """
    scores = _rows_of_scores(1, len(keys.data))
    gemv_scores(product, w, x, tiles, scores, queries, keys, positions, scale)
    choose(out, scores, positions, 0)


def _rows_of_scores(n_tokens, n_kv):
    """Scratch memory for scores, whose rows begin at multiples of 16 bytes."""
    rows = scratch("rows of scores", (n_tokens, -(-n_kv // 4) * 4), np.float32)
    return rows[:, :n_kv] if n_kv % 4 else rows


def _select(out, queries, score, keys, positions, scale):
    n_tokens, n_kv = len(out), len(keys.data)
    at_once = min(n_tokens, tokens_scored_by_gpu(n_kv))
    rows = _rows_of_scores(at_once, n_kv)
    for start in range(0, n_tokens, at_once):
        batch = rows[:n_tokens - start] if n_tokens - start < at_once else rows
        score(batch, queries, keys, positions, start, scale, False)
        choose(out, batch, positions, start)


def scatter_mask(out, indices, positions):
    """out[t] = -inf, but 0 at indices up to the token's position."""
    write_mask(out.shape[0], out, indices, positions)
