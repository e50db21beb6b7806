"""Sampling on the device: the next token from logits, as pydsa.sampling does.

The random number is an argument. Only the token and its logit are copied to the host.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, float_bits
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import kernel
from pydsa.backends.cuda.top_k import choose, ordered


THREADS = 8 if SIMULATED else 256
PARTS = 3 if SIMULATED else 64      # of a row, one per block
PICKS = 64 if SIMULATED else 1024   # the most candidates to sample from
LOW, INFINITY = np.uint64(0xFFFFFFFF), np.float32(np.inf)


@device
def sort_key(x, i):
    """A uint64 that sorts by logit, then lowest index first. NaN is the largest."""
    key = np.uint64(ordered(x)) if x == x else LOW
    return key << np.uint64(32) | LOW - np.uint64(i)


@device
def block_max_u64(mine, keys, thread):
    """Block-level maximum of uint64, in every thread."""
    keys[thread] = mine
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            keys[thread] = max(keys[thread], keys[thread + half])
        cuda.syncthreads()
        half //= 2
    return keys[0]


@kernel("u8[:], f4[:,:]", THREADS)
def max_of_parts(best, logits):
    """best[part] = the largest sort_key() of a part. One part per block."""
    keys = cuda.shared.array(THREADS, np.uint64)
    thread, mine = cuda.threadIdx.x, np.uint64(0)
    for i in range(cuda.grid(1), logits.shape[1], cuda.gridsize(1)):
        mine = max(mine, sort_key(logits[0, i], i))
    maximum = block_max_u64(mine, keys, thread)
    if thread == 0:
        best[cuda.blockIdx.x] = maximum


@device
def rank_candidates(tokens, values, weights, count, chosen, logits, maximum, k, thread):
    """Sort the candidates by logit, highest first, and exponentiate them.

    Of equal logits the first in `chosen` comes first. count[0]: how many candidates there are; the rest of `chosen` is -1.
    """
    for i in range(thread, k, THREADS):
        if chosen[0, i] >= 0:
            x, rank = logits[0, chosen[0, i]], 0
            for j in range(k):
                if chosen[0, j] >= 0:
                    y = logits[0, chosen[0, j]]
                    if y > x or y == x and j < i:
                        rank += 1
            tokens[rank], values[rank] = chosen[0, i], x
            weights[rank] = math.exp(np.float64(x) - np.float64(maximum))
        elif i == 0 or chosen[0, i - 1] >= 0:
            count[0] = i
    if thread == 0 and chosen[0, k - 1] >= 0:
        count[0] = k


@device
def truncate(values, weights, count, maximum, top_p, min_log):
    """How many of the candidates top_p and min_log keep, at least one."""
    total, part, n = np.float64(0), np.float64(0), 0
    for i in range(count):
        total += weights[i]
    while n < count:
        part += weights[n] / total
        n += 1
        if part >= top_p and top_p < 1:
            break
    while n > 1 and values[n - 1] < maximum + min_log:
        n -= 1
    return n


@device
def draw(weights, count, drawn):
    """The index at which the cumulative weight exceeds `drawn` of the total."""
    total, part, n = np.float64(0), np.float64(0), 0
    for i in range(count):
        total += weights[i]
    while n < count - 1:
        part += weights[n]
        if part > drawn * total:
            break
        n += 1
    return n


@kernel("u4[:], i4[:], i8[:], i8, u8[:], f4[:,:], i4[:,:], i4, f8, f4, f8, f8", THREADS)
def draw_token(result, ids, positions, position, best, logits, chosen, k, top_p, min_log, temperature, drawn):
    """Sample a token: result = the token, and the bits of the maximum logit.

    ids and positions are the inputs of the next step. The token is the argmax if k is 0, else one of the k `chosen`: of the likeliest ones
    whose probabilities sum to top_p (nucleus), and whose logits are at most -min_log below the maximum (min_p).
    """
    keys = cuda.shared.array(THREADS, np.uint64)
    tokens = cuda.shared.array(PICKS, np.int32)          # the candidates, highest logit first
    values = cuda.shared.array(PICKS, np.float32)
    weights = cuda.shared.array(PICKS, np.float64)
    count = cuda.shared.array(1, np.int64)              # how many candidates are left
    thread, mine = cuda.threadIdx.x, np.uint64(0)
    for i in range(thread, best.size, THREADS):
        mine = max(mine, best[i])
    token = np.int64(LOW - (block_max_u64(mine, keys, thread) & LOW))
    maximum = logits[0, token]
    if k > 0 and -INFINITY < maximum < INFINITY:
        rank_candidates(tokens, values, weights, count, chosen, logits, maximum, k, thread)
        cuda.syncthreads()
        if thread == 0:
            count[0] = truncate(values, weights, count[0], maximum, top_p, min_log)
        cuda.syncthreads()
        for i in range(thread, count[0], THREADS):
            weights[i] = math.exp((np.float64(values[i]) - np.float64(maximum)) / temperature)
        cuda.syncthreads()
        if thread == 0:
            token = np.int64(tokens[draw(weights, count[0], drawn)])
    if thread == 0:
        result[0], result[1] = token, float_bits(maximum)
        ids[0], positions[0] = token, position


def pick(ids, positions, position, logits, top_k, top_p, min_p, temperature, drawn):
    """Sample the next token from logits [1, n_vocab], as pydsa.sampling does.

    Returns the token, an int, and the maximum logit, which must be finite. top_k: at most PICKS; 0 takes the argmax. drawn: a random number
    from 0 to 1. The token is also stored in ids [1] and `position` in positions [1], the inputs of the next step.
    """
    n_vocab = logits.shape[1]
    best, result = scratch("max of parts", (PARTS,), np.uint64), scratch("token", (2,), np.uint32)
    chosen = scratch("likeliest", (1, max(1, min(top_k, n_vocab))), np.int32)
    max_of_parts(PARTS, best, logits)
    if top_k > 0:
        choose(chosen, logits)
    draw_token(1, result, ids, positions, position, best, logits, chosen, min(top_k, n_vocab), top_p,
               math.log(min_p) if min_p > 0 else -np.inf, temperature, drawn)
    token, bits = result.get()
    return int(token), float(bits.view(np.float32))
