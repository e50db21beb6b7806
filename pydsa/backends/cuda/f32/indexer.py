"""The indexer's scores in float32, for keys of any storage."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.f32.tiles import DOTS, FOURS, HEADS, KEYS, PRODUCTS, PRODUCTS_OF, THREADS, WORK, sum_of_slices
from pydsa.backends.cuda.rows import CACHED
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, kernel


PITCH = HEADS + 1
WEIGHTED = KEYS * PITCH
HEADS_BITS, KEYS_BITS = HEADS.bit_length() - 1, KEYS.bit_length() - 1
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


def _make_scores(storage):
    products = PRODUCTS_OF[storage]

    def scores(out, q, w, data, row_bytes, first, second, positions, start, scale, fill):
        """out[t, s] = scale sum_h w[start + t, h] relu(q[start + t, h] . key s).

        For s up to the token's position; -inf after it if `fill`. One token per block in y; blocks walk the key tiles with a grid stride.
        A tile is multiplied with HEADS heads at a time (tiles.py).
        """
        work = cuda.shared.array(WORK, np.float32, 16)
        weighted = cuda.shared.array(WEIGHTED, np.float32)
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
                            if dot > ZERO or dot != dot:        # NaN stays NaN
                                value = w[token, head + h] * dot
                        weighted[(product >> HEADS_BITS) * PITCH + h] = value
                    cuda.syncthreads()
                    if thread < KEYS:
                        for h in range(HEADS):
                            total += weighted[thread * PITCH + h]
            if thread < KEYS:
                s = base + thread
                if s < n:
                    out[row, s] = total * scale
                elif fill and s < out.shape[1]:
                    out[row, s] = MINUS_INFINITY
    return kernel("f4[:,:], f4[:,:,:], f4[:,:], u1[::1], i8, i4, i4, i8[:], i4, f4, b1", THREADS, f"score_f32_{storage}")(scores)


SCORES = {storage: _make_scores(storage) for storage in CACHED}


def pack(q, w):
    """Queries and head weights unchanged."""
    return q, w


def score(out, queries, keys, positions, start, scale, fill):
    """Scores of tokens start, start + 1, ..., one per row of `out`.

    queries: the result of pack() for all tokens.
    """
    grid = min(blocks_for(out.shape[1], KEYS), blocks_for(BLOCKS, len(out))), len(out)
    SCORES[keys.storage](grid, out, *queries, keys.data.flat, keys.data.shape[1], keys.first, keys.second, positions, start, scale, fill)
