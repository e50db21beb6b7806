"""The lightning indexer: scores, top-k selection, and the mask of chosen keys."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED
from pydsa.backends.cuda.launch import kernel
from pydsa.backends.cuda.top_k import choose
from pydsa.backends.cuda.variants import kernels


TOKEN_BATCH = 32           # tokens whose scores are in memory at a time
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
    pack, score = kernels("indexer", keys)
    score(out, pack(q, w), keys, positions, 0, scale, True)


def indexer_select(out, q, w, keys, positions, scale):
    """indexer_scores and top_k in one, TOKEN_BATCH tokens at a time."""
    select(out, kernels("indexer", keys).pack(q, w), keys, positions, scale)


def select(out, queries, keys, positions, scale):
    """indexer_select with queries that are already packed."""
    n_tokens, score = out.shape[0], kernels("indexer", keys).score
    rows = scratch("rows of scores", (min(n_tokens, TOKEN_BATCH), keys.data.shape[0]), np.float32)
    for start in range(0, n_tokens, TOKEN_BATCH):
        batch = rows[:n_tokens - start] if n_tokens - start < TOKEN_BATCH else rows
        score(batch, queries, keys, positions, start, scale, False)
        choose(out, batch, positions, start)


def scatter_mask(out, indices, positions):
    """out[t] = -inf, but 0 at indices up to the token's position."""
    write_mask(out.shape[0], out, indices, positions)
