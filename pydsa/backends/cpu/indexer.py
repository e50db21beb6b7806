"""The lightning indexer: scores, top-k, and the two streamed together."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.linear import addresses
from pydsa.backends.cpu.rows import unpack
from pydsa.backends.cpu.microkernels import address, n_threads, tile_products
from pydsa.jit import inner, kernel
from pydsa.quants.block import bits_of_float

TILE = 64       # keys unpacked at a time
LOWEST = np.uint32(0x007FFFFF)      # ordered(-inf)


@inner
def score_keys(row, q, w, keys, first, last, scale):
    """row[s] = scale sum_h w[h] relu(q[h] . key s) for first <= s < last; q [H, D], w [H]."""
    n_head, width = q.shape
    row_bytes = keys.data.shape[1]
    tile, dots = np.empty((TILE, width), np.float32), np.empty((n_head, TILE), np.float32)
    q_at, dots_at = addresses(address(q), q.strides[0], n_head), addresses(address(dots), 4 * TILE, n_head)
    total = np.empty(TILE, np.float32)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        for j in range(n):
            unpack(keys, address(keys.data) + (start + j) * row_bytes, width, address(tile[j]))
        dots[:] = 0
        tile_products(address(tile), 4 * width, n, address(q_at), n_head, 0, width, address(dots_at), 0)
        total[:] = 0
        for h in range(n_head):
            for j in range(n):
                total[j] += w[h] * max(dots[h, j], np.float32(0))
        for j in range(n):
            row[start + j] = total[j] * scale


@inner
def split(n, parts, i):
    """Where part i of n keys begins, a multiple of TILE."""
    return min(n, (n + TILE - 1) // TILE * i // parts * TILE)


@inner
def ordered(x):
    """A uint32 that sorts as the float does; both zeros are equal; NaN is below -inf."""
    if x != x:
        return np.uint32(0)
    if x == 0:
        return np.uint32(0x80000000)
    bits = bits_of_float(x)
    return ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)


@inner
def select(out, row):
    """The out.size greatest of row, ascending indices, ties to the lowest index; -inf and NaN never; -1 fills the rest. Linear in row.size.

    Radix select: eight bits a pass, from the top, narrow down the key of the last one chosen.
    """
    count = np.empty(256, np.int64)
    wanted, prefix, valid = out.size, np.uint32(0), 0
    for s in range(row.size):
        valid += ordered(row[s]) > LOWEST
    room = 0        # how many that equal the threshold are chosen
    threshold = LOWEST
    if valid > wanted:
        room = wanted
        for shift in (24, 16, 8, 0):
            count[:] = 0
            for s in range(row.size):
                key = ordered(row[s])
                if shift == 24 or (key ^ prefix) >> np.uint32(shift + 8) == 0:
                    count[(key >> np.uint32(shift)) & np.uint32(255)] += 1
            digit = 255
            while count[digit] < room:
                room -= count[digit]
                digit -= 1
            prefix |= np.uint32(digit) << np.uint32(shift)
        threshold = prefix
    n = 0
    for s in range(row.size):
        key = ordered(row[s])
        if key > threshold:
            out[n] = s
            n += 1
        elif room > 0 and key == threshold:
            out[n] = s
            n += 1
            room -= 1
    out[n:] = -1


@kernel(parallel=True)
def indexer_scores(out, q, w, keys, positions, scale):
    n_tokens = q.shape[0]
    parts = max(1, n_threads() // n_tokens)
    out[:] = -np.inf
    for task in prange(n_tokens * parts):
        t, part = task // parts, task % parts
        n = positions[t] + 1
        score_keys(out[t], q[t], w[t], keys, split(n, parts, part), split(n, parts, part + 1), scale)


@kernel(parallel=True)
def top_k(out, scores):
    for t in prange(out.shape[0]):
        select(out[t], scores[t])


@kernel(parallel=True)
def indexer_select(out, q, w, keys, positions, scale):
    n_tokens, threads = q.shape[0], n_threads()
    together = min(n_tokens, threads)       # rows of scores that exist at a time
    parts = max(1, threads // together)
    scores = np.empty((together, positions[n_tokens - 1] + 1), np.float32)
    for first in range(0, n_tokens, together):
        rows = min(together, n_tokens - first)
        for task in prange(rows * parts):
            i, part = task // parts, task % parts
            t = first + i
            n = positions[t] + 1
            score_keys(scores[i], q[t], w[t], keys, split(n, parts, part), split(n, parts, part + 1), scale)
        for i in prange(rows):
            select(out[first + i], scores[i, :positions[first + i] + 1])


@kernel
def scatter_mask(out, indices, positions):
    out[:] = -np.inf
    for t in range(out.shape[0]):
        for i in range(indices.shape[1]):
            s = indices[t, i]
            if 0 <= s <= positions[t]:
                out[t, s] = 0
