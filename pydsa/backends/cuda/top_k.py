"""Top-k: exact, the greatest first and of equals the lowest index, by a radix select on the bits of the floats.

Of long rows each of several blocks first finds the top-k of a part; then one block finds the top-k of these, which stand in ascending
order part by part, so that of equals the lowest index is still the first.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.block_sums import block_prefix
from pydsa.backends.cuda.device import SIMULATED, WARP, device, float_bits, load_four_u32
from pydsa.backends.cuda.launch import BLOCKS, kernel


THREADS = 8 if SIMULATED else 512
WARPS = THREADS // WARP
BITS = 5 if SIMULATED else 11           # of a digit
BINS = 1 << BITS                        # four for each thread
COPIES = 2 if SIMULATED else 4          # of each bin, so that fewer lanes wait for each other: scores share their first bits
PITCH = BINS + 8                        # from a copy to the next, in other banks
COUNTS = COPIES * PITCH
ROUNDS = -(-COUNTS // THREADS)
EACH = 4 if SIMULATED else 8            # scores that a thread takes together
PORTION, ROOM = EACH * THREADS, 1 << 16
LOWEST, NAN = np.uint32(0x007FFFFF), np.float32(np.nan)     # ordered(-inf)
HIGHEST = 0x7FFFFFFF    # & HIGHEST tells the compiler that an index is not negative
ALL, SIGN, NONE = np.uint32(0xFFFFFFFF), np.uint32(0x80000000), np.uint32(0)


@device
def ordered(x):
    """A uint32 that sorts as the float does; both zeros are equal; NaN is below -inf."""
    bits = float_bits(x + np.float32(0))        # -0 becomes 0
    key = np.uint32(bits ^ (ALL if bits > HIGHEST else SIGN))
    return key if x == x else NONE


@device
def load(numbers, scores, t, first, step, end):
    """EACH scores of row t, from the first-th on, `step` apart; NaN from the end on. All are asked for before anything is waited for."""
    for j in range(EACH):
        i = first + j * step
        x = scores[t, min(i, end - 1) & HIGHEST]
        numbers[j] = x if i < end else NAN


@device
def parts_of(n, k, n_parts):
    """Into how many parts a row of n is divided, n_parts at most: one if short, else so many that both steps are shortest."""
    used = 1
    if n > 2 * PORTION:
        while used < n_parts and used * (used + 1) * k < n:
            used += 1
    return used


@kernel("i4[:,:], i4, f4[:,:], b1, f4[:,:], i4[:,:], b1, i8[:], i4, b1, i4, i8", THREADS)
def choose_of_rows(out, out_start, best, keep, scores, chosen, again, positions, start, causal, n_parts, length):
    """out[out_start + t, part] = the k greatest of a part of row t of scores, and if `keep` best = what they are; a block is a part.

    Each part has k places. If `again`, scores are of those chosen already, in all parts. Rows have a length, or end with position
    positions[start + t] if `causal`.
    """
    numbers = cuda.local.array(EACH, np.float32)
    counts = cuda.shared.array(COUNTS, np.uint32, 16)
    totals = cuda.shared.array(WARPS, np.int32)
    ends = cuda.shared.array(WARPS, np.int32)
    found = cuda.shared.array(2, np.int64)          # a digit, and how many of those with this digit are chosen
    thread, block = cuda.threadIdx.x & THREADS - 1, cuda.blockIdx.x & HIGHEST
    part, t, k = (0, block, out.shape[1]) if again else (block % n_parts, block // n_parts, out.shape[1] // n_parts)
    row, n = out_start + t, np.int64(length)
    if causal:
        n = min(n, positions[start + t] + 1)
    used = parts_of(n, k, n_parts)
    if part >= used:
        return
    share = (n + used - 1) // used
    first, end = (0, used * k) if again else (min(n, part * share), min(n, (part + 1) * share))
    # the bits of the k-th, of which all but the last `unknown` are known; `known` masks these
    least, known, room, unknown = NONE, NONE, np.int64(k), np.int64(32)
    if end - first <= k:            # all are chosen
        least, room, unknown = LOWEST, np.int64(0), np.int64(0)
    while unknown > 0:
        shift = max(unknown - BITS, 0)
        for i in range(ROUNDS):
            if i * THREADS + thread < COUNTS:
                counts[i * THREADS + thread] = 0
        cuda.syncthreads()
        for base in range(first, end, PORTION):
            load(numbers, scores, t, base + thread, THREADS, end)
            for j in range(EACH):
                key = ordered(numbers[j])
                if key > LOWEST and (key ^ least) & known == 0:
                    digit = key >> (shift & 31) & (1 << (unknown - shift)) - 1
                    cuda.atomic.add(counts, ((thread & COPIES - 1) * PITCH + digit) & HIGHEST, 1)
        cuda.syncthreads()
        c0, c1, c2, c3 = np.int64(0), np.int64(0), np.int64(0), np.int64(0)      # of four bins, the highest first
        for copy in range(COPIES):
            a, b, c, d = load_four_u32(counts, copy * PITCH + BINS - 4 * (thread + 1))
            c0, c1, c2, c3 = c0 + np.int64(d), c1 + np.int64(c), c2 + np.int64(b), c3 + np.int64(a)
        mine = c0 + c1 + c2 + c3
        before, total = block_prefix(np.int32(mine), totals, ends, thread, WARPS)
        if total <= room:           # all that are left are chosen
            least, room = np.uint32(max(np.int64(least) - 1, np.int64(LOWEST))), np.int64(0)
            break
        if before < room <= before + mine:
            left, digit = room - before, BINS - 1 - 4 * thread
            for here in (c0, c1, c2, c3):
                if left > 0:
                    found[0], found[1] = digit, left
                left -= here
                digit -= 1
        cuda.syncthreads()
        least, room, unknown = np.uint32(least | found[0] << (shift & 31)), found[1], shift
        known = np.uint32(ALL << (shift & 31))
        cuda.syncthreads()
    greater_before, equal_before = 0, 0
    for base in range(first, end, PORTION):
        load(numbers, scores, t, base + EACH * thread, 1, end)
        mine = 0            # how many of this thread's are greater, and ROOM times how many are equal
        for j in range(EACH):
            key = ordered(numbers[j])
            mine += 1 if key > least else ROOM if key == least else 0
        before, total = block_prefix(np.int32(mine), totals, ends, thread, WARPS)
        greater, equal = greater_before + (before & ROOM - 1), equal_before + (before >> 16)
        for j in range(EACH):
            key = ordered(numbers[j])
            if key > least or key == least and equal < room:
                i, at = base + EACH * thread + j, part * k + greater + min(equal, room)
                out[row, at] = chosen[t, i] if again else i
                if keep:
                    best[row, at] = numbers[j]
            if key > least:
                greater += 1
            elif key == least:
                equal += 1
        greater_before += total & ROOM - 1
        equal_before += total >> 16
    for i in range(greater_before + min(equal_before, room) + thread, k, THREADS):
        out[row, part * k + i] = -1
        if keep:
            best[row, part * k + i] = NAN


def choose(out, scores, positions=None, start=0):
    """out[start + t] = the top-k of row t of scores; with positions, of those up to positions[start + t]."""
    n_rows, n, k = scores.shape[0], scores.shape[1], out.shape[1]
    n_parts, causal = max(1, min(BLOCKS // n_rows, round(math.sqrt(n / k)))), positions is not None
    if not causal:
        positions = scratch("nothing", (1,), np.int64)
    if n_parts == 1 or n <= 2 * PORTION:
        best, chosen = scratch("nothing", (1, 1), np.float32), scratch("nothing", (1, 1), np.int32)
        choose_of_rows(n_rows, out, start, best, False, scores, chosen, False, positions, start, causal, 1, n)
        return
    best, chosen = (scratch("chosen of parts", (n_rows, n_parts * k), dtype) for dtype in (np.float32, np.int32))
    choose_of_rows(n_rows * n_parts, chosen, 0, best, True, scores, chosen, False, positions, start, causal, n_parts, n)
    choose_of_rows(n_rows, out, start, best, False, best, chosen, True, positions, start, causal, n_parts, n)


def top_k(out, scores):
    """The k greatest scores' indices, ascending; equal scores: the lowest index first; -inf and NaN are never chosen; -1 fills the rest."""
    choose(out, scores)
