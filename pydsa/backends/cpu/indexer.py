"""The lightning indexer: scores, scores streamed into top-k, and the mask of what was chosen."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.microkernels import address, n_threads, tile_products
from pydsa.backends.cpu.scratch import floats_at, own_scratch
from pydsa.backends.cpu.top_k import select
from pydsa.jit import call_block_function, call_word_function, inner, kernel
from pydsa.quants.block import bits_of_float, float_from_bits
from pydsa.simd import float_at, store

TILE = 64           # keys unpacked at a time
TOGETHER = 32       # tokens whose rows of scores exist at a time
PORTION = 1024      # keys at most that a thread scores for them at a time
MANY = 3            # tokens from which keys are prepared for tiles


def score_floats(out, out_token, q, q_token, q_head, w, w_token, n_tokens, n_head, width, rows, row_bytes, dequantize, row_n, first, last,
                 scale):
    """out[t][s] = scale sum_h w[t][h] relu(q[t][h] . key s) for first <= s < last.

    Addresses: out float32, q [T, H, width] and w [T, H] float32, of which tokens and heads lie so many bytes apart; rows of a cache, of
    which dequantize takes row_n. scale: a float32's bits.
    """
    memory, factor = own_scratch(4 * TILE * (width + n_head + 1) + 16 * n_head), float_from_bits(np.uint32(scale))
    tile, total, tables = memory, floats_at(memory + 4 * TILE * width, 1, TILE)[0], memory + 4 * TILE * (width + n_head + 1)
    dots = floats_at(memory + 4 * TILE * (width + 1), n_head, TILE)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        for j in range(n):
            call_block_function(dequantize, rows + (start + j) * row_bytes, row_n, tile + 4 * width * j)
        for t in range(n_tokens):
            for h in range(n_head):
                store(tables, 8 * h, q + t * q_token + h * q_head)
                store(tables, 8 * (n_head + h), address(dots) + 4 * TILE * h)
            dots[:] = 0
            tile_products(tile, 4 * width, n, tables, n_head, 0, width, tables + 8 * n_head, 0)
            total[:] = 0
            for h in range(n_head):
                weight = float_at(w, t * w_token + 4 * h)
                for j in range(n):
                    total[j] += weight * max(dots[h, j], np.float32(0))
            for j in range(n):
                store(out, t * out_token + 4 * (start + j), total[j] * factor)


@inner
def score(out, q, w, keys, first, last, scale):
    """Scores of keys from first to last for tokens whose rows of `out` have room for a multiple of 16 keys."""
    function = keys.score_many if len(q) >= MANY else keys.score_few
    call_word_function(function, (
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
