"""The lightning indexer: scores, scores in portions into top-k, and the mask of what was chosen."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda import byte_indexer
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.launch import BLOCKS, blocks_for, kernel
from pydsa.backends.cuda.rows import CACHED
from pydsa.backends.cuda.tiles import DOTS, FOURS, HEADS, KEYS, PRODUCTS, PRODUCTS_OF, THREADS, WORK, sum_of_slices
from pydsa.backends.cuda.top_k import choose

TOGETHER = 32           # tokens whose rows of scores exist at a time
PITCH = HEADS + 1
WEIGHED = KEYS * PITCH
HEADS_BITS, KEYS_BITS = HEADS.bit_length() - 1, KEYS.bit_length() - 1
ZERO, NOTHING = np.float32(0), np.float32(-np.inf)


def _make_scores(storage):
    products = PRODUCTS_OF[storage]

    def scores(out, q, w, data, row_bytes, first, second, positions, start, scale, fill):
        """out[t, s] = scale sum_h w[start + t, h] relu(q[start + t, h] . key s) for s <= the token's position; if `fill`, -inf after it.

        A block has one token and every so manieth tile of keys; a tile passes by HEADS heads at a time (tiles.py).
        """
        work = cuda.shared.array(WORK, np.float32, 16)
        weighed = cuda.shared.array(WEIGHED, np.float32)
        key_of = cuda.shared.array(KEYS, np.int64)
        dots = cuda.local.array(DOTS, np.float32)
        fours = cuda.local.array(FOURS, np.float32)
        thread, row = cuda.threadIdx.x & THREADS - 1, cuda.blockIdx.y & 0xFFFF
        token = start + row
        n, n_head = min(positions[token] + 1, out.shape[1]), q.shape[1]
        for tile in range(cuda.blockIdx.x, (out.shape[1] + KEYS - 1 if fill else n + KEYS - 1) >> KEYS_BITS, cuda.gridDim.x):
            base, total = tile << KEYS_BITS, ZERO
            if base < n:
                if thread < KEYS:
                    key_of[thread] = base + thread if base + thread < n else np.int64(-1)
                cuda.syncthreads()
                for head in range(0, n_head, HEADS):
                    products(work, dots, fours, key_of, q, token, head, data, row_bytes, first, second, thread)
                    for i in range(PRODUCTS // THREADS):
                        product = i * THREADS + thread
                        h, value = product & HEADS - 1, ZERO
                        if head + h < n_head:
                            dot = sum_of_slices(work, product)
                            if dot > ZERO or dot != dot:        # NaN stays
                                value = w[token, head + h] * dot
                        weighed[(product >> HEADS_BITS) * PITCH + h] = value
                    cuda.syncthreads()
                    if thread < KEYS:
                        for h in range(HEADS):
                            total += weighed[thread * PITCH + h]
            if thread < KEYS:
                s = base + thread
                if s < n:
                    out[row, s] = total * scale
                elif fill and s < out.shape[1]:
                    out[row, s] = NOTHING
    return kernel("f4[:,:], f4[:,:,:], f4[:,:], u1[::1], i8, i4, i4, i8[:], i4, f4, b1", THREADS, f"scores_{storage}")(scores)


SCORES = {storage: _make_scores(storage) for storage in CACHED}


@kernel("f4[:,:], i4[:,:], i8[:]", THREADS)
def write_mask(out, indices, positions):
    """out[t] = -inf, but 0 at the indices that are not in the token's future; a block is a token."""
    t = cuda.blockIdx.x
    for s in range(cuda.threadIdx.x, out.shape[1], THREADS):
        out[t, s] = NOTHING
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, indices.shape[1], THREADS):
        s = indices[t, i]
        if 0 <= s <= positions[t]:
            out[t, s] = ZERO


def score(out, q, w, queries, keys, positions, start, scale, fill):
    """Scores of tokens start, start + 1, ... into the rows of `out`, one row a token; queries: as bytes, or None."""
    n_tokens, row_bytes = len(out), keys.data.shape[1]
    if queries is not None:
        byte_indexer.score(out, queries, keys, q.shape[2], positions, start, scale, fill)
        return
    n_blocks = min(blocks_for(out.shape[1], KEYS), blocks_for(BLOCKS, n_tokens))
    SCORES[keys.storage]((n_blocks, n_tokens), out, q, w, keys.data.flat, row_bytes, keys.first, keys.second, positions, start, scale, fill)


def indexer_scores(out, q, w, keys, positions, scale):
    """out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]) for s <= positions[t], else -inf"""
    queries = byte_indexer.rounded_queries(q, w) if byte_indexer.takes(keys, q.shape[2]) else None
    score(out, q, w, queries, keys, positions, 0, scale, True)


def indexer_select(out, q, w, keys, positions, scale):
    """indexer_scores and top_k in one, for so many tokens at a time that their scores fit"""
    queries = byte_indexer.rounded_queries(q, w) if byte_indexer.takes(keys, q.shape[2]) else None
    select(out, q, w, queries, keys, positions, scale)


def select(out, q, w, queries, keys, positions, scale):
    """indexer_select with queries as bytes, or None"""
    n_tokens = q.shape[0]
    rows = scratch("rows of scores", (min(n_tokens, TOGETHER), keys.data.shape[0]), np.float32)
    for start in range(0, n_tokens, TOGETHER):
        some = rows[:n_tokens - start] if n_tokens - start < TOGETHER else rows
        score(some, q, w, queries, keys, positions, start, scale, False)
        choose(out, some, positions, start)


def scatter_mask(out, indices, positions):
    """-inf everywhere, 0 at the indices that are not in the token's future"""
    write_mask(out.shape[0], out, indices, positions)
