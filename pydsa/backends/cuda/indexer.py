"""The lightning indexer: scores, scores in portions into top-k, and the mask of what was chosen."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, bits_float, dp4a, word_at
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.rows import CACHED
from pydsa.backends.cuda.top_k import select_rows

TOGETHER = 32           # tokens whose rows of scores exist at a time
KEYS = 8 if SIMULATED else 128          # of a block, one a thread
WIDTH = 128             # numbers of an int8 key that stay in registers
WORDS = WIDTH // 4
HEADS = 4 if SIMULATED else 32          # whose queries are in shared memory at a time
LARGEST = 32512
NOTHING = np.float32(-np.inf)


def _make_scores(storage):
    value_at = CACHED[storage]

    def scores(out, q, w, keys, row_bytes, first, second, positions, start, scale):
        """out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]) for s <= positions[start + t], else -inf; a thread is one key."""
        t, s = cuda.blockIdx.y, cuda.blockIdx.x * KEYS + cuda.threadIdx.x
        token = start + t
        if s >= out.shape[1]:
            return
        total = NOTHING
        if s <= positions[token]:
            total = np.float32(0)
            for h in range(q.shape[1]):
                dot = np.float32(0)
                for i in range(q.shape[2]):
                    dot += q[token, h, i] * value_at(keys, s * np.int64(row_bytes), i, first, second)
                if dot > 0 or dot != dot:
                    total += w[token, h] * dot
            total *= scale
        out[t, s] = total
    scores.__name__ = scores.__qualname__ = f"scores_{storage}"
    return kernel("f4[:,:], f4[:,:,:], f4[:,:], u1[::1], i4, i4, i4, i8[:], i4, f4", KEYS)(scores)


@kernel("u4[:,:,:], u4[:,:,:], f4[:,:], f4[:,:,:], f4[:,:]", KEYS)
def round_queries(high, low, weights, q, w):
    """Each head's query to 16-bit whole numbers, high and low signed bytes; its scale becomes part of the head's weight."""
    t, h = cuda.blockIdx.y, cuda.blockIdx.x * KEYS + cuda.threadIdx.x
    if h >= q.shape[1]:
        return
    top = np.float32(0)
    for i in range(q.shape[2]):
        magnitude = abs(q[t, h, i])
        if magnitude > top or magnitude != magnitude:       # NaN stays
            top = magnitude
    factor = np.float32(LARGEST) / top if top > np.float32(1e-30) else np.float32(0)
    scale = top / np.float32(LARGEST)
    weights[t, h] = w[t, h] * scale
    for word in range(q.shape[2] // 4):
        highs, lows = 0, 0
        for i in range(4):
            whole = int(round(q[t, h, 4 * word + i] * factor)) if scale < np.float32(np.inf) else 0
            highs |= ((whole + 128) >> 8 & 255) << (8 * i)
            lows |= (whole & 255) << (8 * i)
        high[t, h, word], low[t, h, word] = np.uint32(highs), np.uint32(lows)


@kernel("f4[:,:], u4[:,:,:], u4[:,:,:], f4[:,:], u1[::1], i4, i4, i8[:], i4, i4, f4", KEYS)
def scores_of_bytes(out, high, low, weights, keys, row_bytes, n_words, positions, start, n_tokens, scale):
    """The same over int8 keys of at most WIDTH numbers, a multiple of 4: a thread keeps a key in registers for all tokens and heads."""
    thread, s = cuda.threadIdx.x, cuda.blockIdx.x * KEYS + cuda.threadIdx.x
    if cuda.blockIdx.x * KEYS > positions[start + n_tokens - 1]:
        return          # nobody looks at these
    highs = cuda.shared.array((HEADS, WORDS), np.uint32)
    lows = cuda.shared.array((HEADS, WORDS), np.uint32)
    key = cuda.local.array(WORDS, np.uint32)
    row = min(s, out.shape[1] - 1) * np.int64(row_bytes)
    for i in range(WORDS):
        key[i] = word_at(keys, row + 4 * i) if i < n_words else np.uint32(0)
    key_scale = bits_float(word_at(keys, row + 4 * n_words)) * scale
    n_head = weights.shape[1]
    for t in range(n_tokens):
        token, total = start + t, np.float32(0)
        for h0 in range(0, n_head, HEADS):
            cuda.syncthreads()
            for i in range(thread, HEADS * WORDS, KEYS):
                h, word = h0 + i // WORDS, i % WORDS
                there = h < n_head and word < n_words
                highs[i // WORDS, word] = high[token, h, word] if there else np.uint32(0)
                lows[i // WORDS, word] = low[token, h, word] if there else np.uint32(0)
            cuda.syncthreads()
            for h in range(min(HEADS, n_head - h0)):
                upper, lower = 0, 0
                for i in range(WORDS):
                    upper = dp4a(key[i], highs[h, i], upper)
                    lower = dp4a(key[i], lows[h, i], lower)
                total += weights[token, h0 + h] * np.float32(max(256 * upper + lower, 0))
        if s < out.shape[1]:
            out[t, s] = total * key_scale if s <= positions[token] else NOTHING


SCORES = {storage: _make_scores(storage) for storage in CACHED}


def takes_bytes(keys, width):
    """Whether scores_of_bytes can read such keys."""
    return keys.storage == "i8" and width <= WIDTH and width % 4 == 0


def prepare_queries(q, w):
    """What scores_of_bytes takes for queries and weights."""
    n_tokens, n_head, width = q.shape
    high, low = (scratch(f"queries {part}", (n_tokens, n_head, width // 4), np.uint32) for part in ("high", "low"))
    weights = scratch("weights of heads", (n_tokens, n_head), np.float32)
    round_queries((blocks_for(n_head, KEYS), n_tokens), high, low, weights, q, w)
    return high, low, weights


def score(out, q, w, queries, keys, positions, start, n_tokens, scale):
    """Scores of tokens start, ..., start + n_tokens - 1 into rows of `out`; queries: what prepare_queries gave, or None."""
    row_bytes, n_blocks = keys.data.shape[1], blocks_for(out.shape[1], KEYS)
    if queries is not None:
        scores_of_bytes(n_blocks, out, *queries, keys.data.flat, row_bytes, q.shape[2] // 4, positions, start, n_tokens, scale)
    else:
        SCORES[keys.storage]((n_blocks, n_tokens), out, q, w, keys.data.flat, row_bytes, keys.first, keys.second, positions, start, scale)


@kernel("f4[:,:]", 128 if not SIMULATED else 8)
def fill_nothing(out):
    """out = -inf"""
    t, s = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if s < out.shape[1]:
        out[t, s] = NOTHING


@kernel("f4[:,:], i4[:,:], i8[:]", 128 if not SIMULATED else 8)
def clear_chosen(out, indices, positions):
    """out = 0 at the indices that are not in the token's future"""
    t, i = cuda.blockIdx.y, cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < indices.shape[1]:
        s = indices[t, i]
        if 0 <= s <= positions[t]:
            out[t, s] = np.float32(0)


def indexer_scores(out, q, w, keys, positions, scale):
    """out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]) for s <= positions[t], else -inf"""
    fill_nothing((blocks_for(out.shape[1], fill_nothing.threads), out.shape[0]), out)
    there = out[:, :min(out.shape[1], keys.data.shape[0])]
    score(there, q, w, prepare_queries(q, w) if takes_bytes(keys, q.shape[2]) else None, keys, positions, 0, q.shape[0], scale)


def indexer_select(out, q, w, keys, positions, scale):
    """indexer_scores and top_k in one"""
    n_tokens = q.shape[0]
    rows = scratch("rows of scores", (min(n_tokens, TOGETHER), keys.data.shape[0]), np.float32)
    queries = prepare_queries(q, w) if takes_bytes(keys, q.shape[2]) else None
    for start in range(0, n_tokens, TOGETHER):
        n = min(TOGETHER, n_tokens - start)
        score(rows, q, w, queries, keys, positions, start, n, scale)
        select_rows(n, out, rows, positions, start, True)


def scatter_mask(out, indices, positions):
    """-inf everywhere, 0 at the indices that are not in the token's future"""
    fill_nothing((blocks_for(out.shape[1], fill_nothing.threads), out.shape[0]), out)
    clear_chosen((blocks_for(indices.shape[1], clear_chosen.threads), out.shape[0]), out, indices, positions)
