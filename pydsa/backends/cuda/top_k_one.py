"""Top-k of one row: a block has scores in registers, and reads each once.

As top_k.py: a radix select on the bits of the floats, of equal scores the lowest index first. A digit has twelve bits. Two are mostly
enough, as the keys that share 24 bits with the k-th largest are chosen all. A row of more than MOST scores, or one that takes less time so,
is split into parts. One launch chooses from each, a second one among what they chose. How many parts a row has is known on the GPU only,
where a row may end early: of one part, the first launch makes the whole choice, and the second one returns at once.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.block_sums import block_prefix
from pydsa.backends.cuda.intrinsics.device import (SIMULATED, WARP, bits_float, device, float_bits, load_four_f32, load_four_u32,
                                                   store_four_u32, sync)
from pydsa.backends.cuda.intrinsics.instructions import quotient
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import BLOCKS, kernel


THREADS = 8 if SIMULATED else 1024
WARPS = THREADS // WARP
ROUNDS = 2 if SIMULATED else 5          # groups of four scores that a thread has
HELD = 4 * ROUNDS
GROUP = 4 * THREADS                     # scores of a round
MOST = ROUNDS * GROUP                   # scores of a block
BITS = 5 if SIMULATED else 12           # of a digit
BINS = 1 << BITS                        # four per thread
COPIES = 2                              # of the histogram: fewer atomic conflicts, as scores share their leading bits
PITCH = BINS + 8                        # from one copy to the next, in other banks
COUNTS = COPIES * PITCH
WHOLE = 2 * GROUP                       # a row of so many scores is not split
EQUAL = 1 << 16                         # the unit of the upper of two packed counters
LOWEST, NAN = np.uint32(0x007FFFFF), np.float32(np.nan)     # ordered(-inf)
NON_NEGATIVE = 0x7FFFFFFF               # & NON_NEGATIVE tells the compiler that an index is non-negative
ALL, SIGN, NONE = np.uint32(0xFFFFFFFF), np.uint32(0x80000000), np.uint32(0)


@device
def ordered(x):
    """A uint32 that sorts as the float does. -0 equals 0; NaN is below -inf."""
    bits = float_bits(x + np.float32(0))        # -0 becomes 0
    key = np.uint32(bits ^ (ALL if bits > NON_NEGATIVE else SIGN))
    return key if x == x else NONE


@device
def of_ordered(key):
    """The float of a key that ordered() made; NaN if the key is NONE."""
    return bits_float(np.uint32(key ^ (SIGN if key > NON_NEGATIVE else ALL)))


@device
def load_keys(keys, values, row, first, n, thread):
    """The keys of n scores of a row, four of each round in each thread.

    They are those from `first` on, and NONE past the end; rounds that begin there are left alone. first is a multiple of 4, and row begins
    at a multiple of 16 bytes. All loads are issued before any is used.
    """
    at = (first + 4 * thread) & NON_NEGATIVE
    left = np.int32(n - 4 * thread)     # from this thread's first score on
    for r in range(ROUNDS):
        i, j = r * GROUP, 4 * r
        values[j], values[j + 1], values[j + 2], values[j + 3] = NAN, NAN, NAN, NAN
        if i + 4 <= left:
            values[j], values[j + 1], values[j + 2], values[j + 3] = load_four_f32(row, at + i)
        elif i < left:      # the last scores: what follows may not be written yet, or not be there
            values[j] = row[at + i]
            if i + 1 < left:
                values[j + 1] = row[at + i + 1]
            if i + 2 < left:
                values[j + 2] = row[at + i + 2]
    for r in range(ROUNDS):
        if r * GROUP < n:       # the same in all threads
            for j in range(4):
                keys[4 * r + j] = ordered(values[4 * r + j]) if r * GROUP + j < left else NONE


@device
def count_digits(counts, keys, n, threshold, known_bits, shift, n_bits, thread):
    """Histogram of a digit of all keys whose known_bits are the threshold's.

    The digit is n_bits at `shift`. counts: COPIES of BINS in shared memory. n: the number of keys.
    """
    for copy in range(COPIES):
        store_four_u32(counts, copy * PITCH + 4 * thread, NONE, NONE, NONE, NONE)
    sync()
    mask, copy_at = np.uint32((1 << n_bits) - 1), np.int32((thread & COPIES - 1) * PITCH)
    for r in range(ROUNDS):
        if r * GROUP < n:       # the same in all threads
            for j in range(4):
                key = keys[4 * r + j]
                if key > LOWEST and (key ^ threshold) & known_bits == 0:
                    digit = np.uint32(np.uint32(key >> (shift & 31)) & mask)
                    cuda.atomic.add(counts, (copy_at + digit) & NON_NEGATIVE, 1)
    sync()


@device
def four_bins(counts, thread):
    """The counts of a thread's four bins, highest first.

    Thread 0 has the highest bins.
    """
    a, b, c, d = load_four_u32(counts, BINS - 4 * (thread + 1))
    e, f, g, h = load_four_u32(counts, PITCH + BINS - 4 * (thread + 1))
    return np.int32(d + h), np.int32(c + g), np.int32(b + f), np.int32(a + e)


@device
def find_threshold(counts, totals, ends, found, keys, n, k, thread):
    """Radix select: the threshold, and how many keys equal to it are chosen.

    All larger keys are chosen. found: shared memory, the digit of the k-th largest key, how many keys with this digit are chosen, and how
    many there are.
    """
    threshold, known_bits, remaining, shift = NONE, NONE, np.int32(k), np.int32(32)
    while shift > 0:
        n_bits = np.int32(min(shift, BITS))
        shift = np.int32(shift - n_bits)
        count_digits(counts, keys, n, threshold, known_bits, shift, n_bits, thread)
        c0, c1, c2, c3 = four_bins(counts, thread)
        before, total = block_prefix(np.int32(c0 + c1 + c2 + c3), totals, ends, thread, WARPS)
        left = np.int32(remaining - before)
        if 0 < left <= c0 + c1 + c2 + c3:
            digit = np.int32(BINS - 1 - 4 * thread)
            for count in (c0, c1, c2, c3):
                if left > 0:
                    found[0], found[1], found[2] = digit, left, count
                left = np.int32(left - count)
                digit = np.int32(digit - 1)
        sync()
        whole = total <= remaining       # whether all keys with the known bits are chosen
        if not whole:
            threshold, remaining = np.uint32(threshold | found[0] << (shift & 31)), np.int32(found[1])
            known_bits, whole = np.uint32(ALL << (shift & 31)), found[1] == found[2]
        if whole:
            threshold, remaining = np.uint32(max(np.int64(threshold) - 1, np.int64(LOWEST))), np.int32(0)
            break
    return threshold, remaining


@device
def parts_of(n, k, n_parts):
    """How many parts a row of n scores is split into, at most n_parts.

    One if the row is short, else the number that minimizes the work of both steps, or the least that MOST allows.
    """
    used = np.int32(1)
    if n > WHOLE:
        while used < n_parts and (np.int32(used * (used + 1) * k) < n or np.int32(used * MOST) < n):
            used = np.int32(used + 1)
    return used


@device
def put_chosen(out, best, to, keys, chosen, through, first, k, n, threshold, remaining, totals, ends, thread):
    """out[to:to + k] = the places of chosen keys, ascending, then -1.

    best = their floats, and NaN. Chosen are keys above the threshold, and the first `remaining` that equal it. Places are counted from
    `first`, or are entries of `chosen` if `through`.
    """
    greater_before, equal_before = np.int32(0), np.int32(0)
    for r in range(ROUNDS):
        if r * GROUP < n:       # the same in all threads
            mine = np.int32(0)      # two counters of this thread: how many are greater, plus EQUAL times how many are equal
            for j in range(4):
                key = keys[4 * r + j]
                mine = np.int32(mine + (1 if key > threshold else EQUAL if key == threshold else 0))
            before, total = block_prefix(mine, totals, ends, thread, WARPS)
            greater, equal = np.int32(greater_before + (before & EQUAL - 1)), np.int32(equal_before + (before >> 16))
            for j in range(4):
                key = keys[4 * r + j]
                if key > threshold or key == threshold and equal < remaining:
                    i, at = np.int32(first + r * GROUP + 4 * thread + j), np.int32(to + greater + min(equal, remaining)) & NON_NEGATIVE
                    out[at] = chosen[i & NON_NEGATIVE] if through else i
                    best[at] = of_ordered(key)
                greater = np.int32(greater + (1 if key > threshold else 0))
                equal = np.int32(equal + (1 if key == threshold else 0))
            greater_before, equal_before = np.int32(greater_before + (total & EQUAL - 1)), np.int32(equal_before + (total >> 16))
    for i in range(np.int32(greater_before + min(equal_before, remaining) + thread), k, np.int32(THREADS)):
        out[np.int32(to + i) & NON_NEGATIVE] = -1
        best[np.int32(to + i) & NON_NEGATIVE] = NAN


@kernel("i4[::1], i4, f4[::1], f4[::1], i4[::1], i8[:], i8, b1, i4, i8, b1", THREADS)
def choose_of_row(out, k, scores, best, chosen, positions, place, causal, n_parts, length, second_step):
    """out[:k] = the top-k of a row of scores, of which a block has one part.

    best, chosen: n_parts times k scores and places, of which each part writes k, and among which the second step chooses. causal: the row
    ends with positions[place], else it has `length` scores.
    """
    values = cuda.local.array(HELD, np.float32)
    keys = cuda.local.array(HELD, np.uint32)
    counts = cuda.shared.array(COUNTS, np.uint32, 16)
    totals = cuda.shared.array(WARPS, np.int32)
    ends = cuda.shared.array(WARPS, np.int32)
    found = cuda.shared.array(3, np.int32)
    thread, part, n = np.int32(cuda.threadIdx.x & THREADS - 1), np.int32(cuda.blockIdx.x & NON_NEGATIVE), np.int32(length)
    if causal:
        n = np.int32(min(length, positions[place] + 1))
    used = parts_of(n, k, n_parts)
    if part >= used or second_step and used == 1:
        return
    first, end, to, places = np.int32(0), np.int32(used * k), np.int32(0), out
    if second_step:
        scores = best
    else:
        share = np.int32(4 * quotient(np.int32(n + 4 * used - 1), np.int32(4 * used)))
        first = np.int32(part * share)
        end = min(n, np.int32(first + share))
        if used > 1:
            places, to = chosen, np.int32(part * k)
    mine = max(np.int32(end - first), np.int32(0))
    load_keys(keys, values, scores, first, mine, thread)
    threshold, remaining = find_threshold(counts, totals, ends, found, keys, mine, k, thread)
    put_chosen(places, best, to, keys, chosen, second_step, first, k, mine, threshold, remaining, totals, ends, thread)


def parts_for(n, k):
    """Into how many parts a row of n scores may be split.

    0 if it is too long for this file's kernel.
    """
    n_parts = max(1, min(BLOCKS, round(math.sqrt(n / k)))) if n > WHOLE else 1
    return n_parts if n <= n_parts * MOST and (n_parts == 1 or n_parts * k <= MOST) else 0


def takes(scores, k):
    """Whether choose_one takes scores [rows, n] for k chosen ones."""
    return scores.shape[0] == 1 and scores.span[0] % 16 == 0 and parts_for(scores.shape[1], k) > 0


def choose_one(out, scores, positions=None, start=0):
    """out[start] = the top-k of the one row of scores, float32 [1, n].

    With positions, only of scores up to positions[start]. takes() must hold.
    """
    n, k, causal = scores.shape[1], out.shape[1], positions is not None
    n_parts = parts_for(n, k)
    best, chosen = (scratch("chosen of parts", (n_parts * k,), dtype) for dtype in (np.float32, np.int32))
    if not causal:
        positions = scratch("nothing", (1,), np.int64)
    args = out[start], k, scores[0], best, chosen, positions, start, causal, n_parts, n
    choose_of_row(n_parts, *args, False)
    if n_parts > 1:
        choose_of_row(1, *args, True)
