"""The lightning indexer: scores, scores in portions into top-k, and the mask of what was chosen."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED
from pydsa.backends.cuda.launch import kernel
from pydsa.backends.cuda.top_k import choose
from pydsa.backends.cuda.variants import kernels


TOGETHER = 32           # tokens whose rows of scores exist at a time
THREADS = 8 if SIMULATED else 256
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@kernel("f4[:,:], i4[:,:], i8[:]", THREADS)
def write_mask(out, indices, positions):
    """out[t] = -inf, but 0 at the indices that are not in the token's future; a block is a token."""
    t = cuda.blockIdx.x
    for s in range(cuda.threadIdx.x, out.shape[1], THREADS):
        out[t, s] = MINUS_INFINITY
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, indices.shape[1], THREADS):
        s = indices[t, i]
        if 0 <= s <= positions[t]:
            out[t, s] = ZERO


def indexer_scores(out, q, w, keys, positions, scale):
    """out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]) for s <= positions[t], else -inf"""
    pack, score = kernels("indexer", keys)
    score(out, pack(q, w), keys, positions, 0, scale, True)


def indexer_select(out, q, w, keys, positions, scale):
    """indexer_scores and top_k in one, for so many tokens at a time that their scores fit"""
    select(out, kernels("indexer", keys).pack(q, w), keys, positions, scale)


def select(out, queries, keys, positions, scale):
    """indexer_select with queries that are packed"""
    n_tokens, score = out.shape[0], kernels("indexer", keys).score
    rows = scratch("rows of scores", (min(n_tokens, TOGETHER), keys.data.shape[0]), np.float32)
    for start in range(0, n_tokens, TOGETHER):
        some = rows[:n_tokens - start] if n_tokens - start < TOGETHER else rows
        score(some, queries, keys, positions, start, scale, False)
        choose(out, some, positions, start)


def scatter_mask(out, indices, positions):
    """-inf everywhere, 0 at the indices that are not in the token's future"""
    write_mask(out.shape[0], out, indices, positions)
