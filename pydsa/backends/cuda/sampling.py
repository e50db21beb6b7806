"""The next token from logits that stay on the device: pydsa.sampling's steps, the drawn number given. Only the token comes to the host."""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, device, float_bits
from pydsa.backends.cuda.launch import kernel
from pydsa.backends.cuda.top_k import choose, ordered


THREADS = 8 if SIMULATED else 256
PARTS = 3 if SIMULATED else 64      # of a row, a block each
PICKS = 64 if SIMULATED else 1024   # the most tokens to draw from
LOW, INFINITY = np.uint64(0xFFFFFFFF), np.float32(np.inf)


@device
def place(x, i):
    """A number that sorts as (x, the lowest index first), NaN being the greatest."""
    key = np.uint64(ordered(x)) if x == x else LOW
    return key << np.uint64(32) | LOW - np.uint64(i)


@device
def greatest_of_block(mine, places, thread):
    """The greatest of a block's uint64, in every thread."""
    places[thread] = mine
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            places[thread] = max(places[thread], places[thread + half])
        cuda.syncthreads()
        half //= 2
    return places[0]


@kernel("u8[:], f4[:,:]", THREADS)
def greatest_of_parts(best, logits):
    """best[part] = the place() of the greatest logit of a part."""
    places = cuda.shared.array(THREADS, np.uint64)
    thread, mine = cuda.threadIdx.x, np.uint64(0)
    for i in range(cuda.grid(1), logits.shape[1], cuda.gridsize(1)):
        mine = max(mine, place(logits[0, i], i))
    greatest = greatest_of_block(mine, places, thread)
    if thread == 0:
        best[cuda.blockIdx.x] = greatest


@kernel("u4[:], i4[:], i8[:], i8, u8[:], f4[:,:], i4[:,:], i4, f8, f4, f8, f8", THREADS)
def draw_token(result, ids, positions, position, best, logits, chosen, k, top_p, least, temperature, drawn):
    """result = a token and the bits of the greatest logit; ids and positions: what the next step works on.

    The token is the likeliest if k is 0, else one of the k that are chosen: of the likeliest that have the probability top_p together, and
    whose logits are at most -least below the greatest.
    """
    places = cuda.shared.array(THREADS, np.uint64)
    names = cuda.shared.array(PICKS, np.int32)          # of the chosen, the greatest first
    values = cuda.shared.array(PICKS, np.float32)
    weights = cuda.shared.array(PICKS, np.float64)
    count = cuda.shared.array(1, np.int64)              # how many of them are left
    thread, mine = cuda.threadIdx.x, np.uint64(0)
    for i in range(thread, best.size, THREADS):
        mine = max(mine, best[i])
    token = np.int64(LOW - (greatest_of_block(mine, places, thread) & LOW))
    greatest = logits[0, token]
    if k > 0 and -INFINITY < greatest < INFINITY:
        for i in range(thread, k, THREADS):
            if chosen[0, i] >= 0:
                x, rank = logits[0, chosen[0, i]], 0
                for j in range(k):
                    if chosen[0, j] >= 0:
                        y = logits[0, chosen[0, j]]
                        if y > x or y == x and j < i:
                            rank += 1
                names[rank], values[rank] = chosen[0, i], x
                weights[rank] = math.exp(np.float64(x) - np.float64(greatest))
            elif i == 0 or chosen[0, i - 1] >= 0:
                count[0] = i                    # the others stand behind
        if thread == 0 and chosen[0, k - 1] >= 0:
            count[0] = k
        cuda.syncthreads()
        if thread == 0:
            total, part, n = np.float64(0), np.float64(0), 0
            for i in range(count[0]):
                total += weights[i]
            while n < count[0]:
                part += weights[n] / total
                n += 1
                if part >= top_p and top_p < 1:
                    break
            while n > 1 and values[n - 1] < greatest + least:
                n -= 1
            count[0] = n
        cuda.syncthreads()
        for i in range(thread, count[0], THREADS):
            weights[i] = math.exp((np.float64(values[i]) - np.float64(greatest)) / temperature)
        cuda.syncthreads()
        if thread == 0:
            total, part, n = np.float64(0), np.float64(0), 0
            for i in range(count[0]):
                total += weights[i]
            while n < count[0] - 1:
                part += weights[n]
                if part > drawn * total:
                    break
                n += 1
            token = np.int64(names[n])
    if thread == 0:
        result[0], result[1] = token, float_bits(greatest)
        ids[0], positions[0] = token, position


def pick(ids, positions, position, logits, top_k, top_p, min_p, temperature, drawn):
    """The next token from logits [1, n_vocab], an int, and the greatest logit, which must be finite for that; see pydsa.sampling.

    top_k, at most PICKS, 0: the likeliest; drawn: a random number from 0 to 1. The token also goes to ids [1] and `position` to
    positions [1], on which the next step works.
    """
    n_vocab = logits.shape[1]
    best, result = scratch("greatest of parts", (PARTS,), np.uint64), scratch("token", (2,), np.uint32)
    chosen = scratch("likeliest", (1, max(1, min(top_k, n_vocab))), np.int32)
    greatest_of_parts(PARTS, best, logits)
    if top_k > 0:
        choose(chosen, logits)
    draw_token(1, result, ids, positions, position, best, logits, chosen, min(top_k, n_vocab), top_p,
               math.log(min_p) if min_p > 0 else -np.inf, temperature, drawn)
    token, bits = result.get()
    return int(token), float(bits.view(np.float32))
