"""Exact top-k by radix select on the bits of the floats.

Of equal scores the lowest index is chosen first. A long row is split: several blocks each find the top-k of one part, then one block finds
the top-k of those. The candidates are in ascending order of their index, so that ties still go to the lowest index. A single row that fits
is left to top_k_one.py, many rows to top_k_rows.py.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.block_sums import block_prefix
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP, device, load_four_u32, sync
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import BLOCKS, kernel
from pydsa.backends.cuda.top_k_one import ALL, EQUAL, LOWEST, NAN, NON_NEGATIVE, NONE, ordered
from pydsa.backends.cuda.variants import kernels


THREADS = 8 if SIMULATED else 512
WARPS = THREADS // WARP
BITS = 5 if SIMULATED else 11           # of a digit
BINS = 1 << BITS                        # four per thread
COPIES = 2 if SIMULATED else 4          # of the histogram: fewer atomic conflicts, as scores share their leading bits
PITCH = BINS + 8                        # from one copy to the next, in other banks
COUNTS = COPIES * PITCH
ROUNDS = -(-COUNTS // THREADS)
PER_THREAD = 4 if SIMULATED else 8      # scores that a thread loads at once
PER_BLOCK = PER_THREAD * THREADS        # scores that a block loads at once


@device
def load(values, scores, t, first, step, end):
    """Load PER_THREAD scores of row t, `step` apart; NaN past the end.

    first: the index of the first one. All loads are issued before any is used.
    """
    for j in range(PER_THREAD):
        i = first + j * step
        x = scores[t, min(i, end - 1) & NON_NEGATIVE]
        values[j] = x if i < end else NAN


@device
def parts_of(n, k, n_parts):
    """How many parts a row of n scores is split into, at most n_parts.

    One if the row is short, else the number that minimizes the work of both steps.
    """
    used = 1
    if n > 2 * PER_BLOCK:
        while used < n_parts and used * (used + 1) * k < n:
            used += 1
    return used


@device
def count_digits(counts, values, scores, t, first, end, threshold, known_bits, shift, n_bits, thread):
    """Histogram of a digit of all keys whose known_bits are the threshold's.

    The digit is n_bits at `shift`. counts: COPIES of BINS in shared memory.
    """
    for i in range(ROUNDS):
        if i * THREADS + thread < COUNTS:
            counts[i * THREADS + thread] = 0
    sync()
    for base in range(first, end, PER_BLOCK):
        load(values, scores, t, base + thread, THREADS, end)
        for j in range(PER_THREAD):
            key = ordered(values[j])
            if key > LOWEST and (key ^ threshold) & known_bits == 0:
                digit = key >> (shift & 31) & (1 << n_bits) - 1
                cuda.atomic.add(counts, ((thread & COPIES - 1) * PITCH + digit) & NON_NEGATIVE, 1)
    sync()


@device
def four_bins(counts, thread):
    """The counts of a thread's four bins, highest first.

    Thread 0 has the highest bins.
    """
    c0, c1, c2, c3 = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for copy in range(COPIES):
        a, b, c, d = load_four_u32(counts, copy * PITCH + BINS - 4 * (thread + 1))
        c0, c1, c2, c3 = c0 + np.int64(d), c1 + np.int64(c), c2 + np.int64(b), c3 + np.int64(a)
    return c0, c1, c2, c3


@device
def find_threshold(counts, totals, ends, found, values, scores, t, first, end, k, thread):
    """Radix select: the threshold, and how many keys equal to it are chosen.

    All larger keys are chosen. found: shared memory, the digit of the k-th largest key and how many keys with this digit are chosen.
    """
    # threshold: the bits of the k-th largest key, of which all but the lowest unknown_bits are found; known_bits is their mask
    threshold, known_bits, remaining, unknown_bits = NONE, NONE, np.int64(k), np.int64(32)
    if end - first <= k:            # choose all
        threshold, remaining, unknown_bits = LOWEST, np.int64(0), np.int64(0)
    while unknown_bits > 0:
        shift = max(unknown_bits - BITS, 0)
        count_digits(counts, values, scores, t, first, end, threshold, known_bits, shift, unknown_bits - shift, thread)
        c0, c1, c2, c3 = four_bins(counts, thread)
        mine = c0 + c1 + c2 + c3
        before, total = block_prefix(np.int32(mine), totals, ends, thread, WARPS)
        if total <= remaining:           # choose all that are left
            threshold, remaining = np.uint32(max(np.int64(threshold) - 1, np.int64(LOWEST))), np.int64(0)
            break
        if before < remaining <= before + mine:
            left, digit = remaining - before, BINS - 1 - 4 * thread
            for count in (c0, c1, c2, c3):
                if left > 0:
                    found[0], found[1] = digit, left
                left -= count
                digit -= 1
        sync()
        threshold, remaining, unknown_bits = np.uint32(threshold | found[0] << (shift & 31)), found[1], shift
        known_bits = np.uint32(ALL << (shift & 31))
        sync()
    return threshold, remaining


@kernel("i4[:,:], i4, f4[:,:], b1, f4[:,:], i4[:,:], b1, i8[:], i4, b1, i4, i8", THREADS)
def choose_of_rows(out, out_start, best, keep_scores, scores, chosen, second_step, positions, start, causal, n_parts, length):
    """out[out_start + t] = the top-k of each part of row t of scores. One part per block.

    out has k entries per part. keep_scores: also store the chosen scores in `best`. second_step: `scores` are those that the first step
    chose, of all parts, and `chosen` their indices. causal: row t ends with position positions[start + t], else at `length`.
    """
    values = cuda.local.array(PER_THREAD, np.float32)
    counts = cuda.shared.array(COUNTS, np.uint32, 16)
    totals = cuda.shared.array(WARPS, np.int32)
    ends = cuda.shared.array(WARPS, np.int32)
    found = cuda.shared.array(2, np.int64)          # the digit of the k-th largest, and how many keys with this digit are chosen
    thread, block = cuda.threadIdx.x & THREADS - 1, cuda.blockIdx.x & NON_NEGATIVE
    part, t, k = (0, block, out.shape[1]) if second_step else (block % n_parts, block // n_parts, out.shape[1] // n_parts)
    row, n = out_start + t, np.int64(length)
    if causal:
        n = min(n, positions[start + t] + 1)
    used = parts_of(n, k, n_parts)
    if part >= used:
        return
    share = (n + used - 1) // used
    first, end = (0, used * k) if second_step else (min(n, part * share), min(n, (part + 1) * share))
    threshold, remaining = find_threshold(counts, totals, ends, found, values, scores, t, first, end, k, thread)
    greater_before, equal_before = 0, 0
    for base in range(first, end, PER_BLOCK):
        load(values, scores, t, base + PER_THREAD * thread, 1, end)
        mine = 0            # two counters of this thread: how many are greater, plus EQUAL times how many are equal
        for j in range(PER_THREAD):
            key = ordered(values[j])
            mine += 1 if key > threshold else EQUAL if key == threshold else 0
        before, total = block_prefix(np.int32(mine), totals, ends, thread, WARPS)
        greater, equal = greater_before + (before & EQUAL - 1), equal_before + (before >> 16)
        for j in range(PER_THREAD):
            key = ordered(values[j])
            if key > threshold or key == threshold and equal < remaining:
                i, at = base + PER_THREAD * thread + j, part * k + greater + min(equal, remaining)
                out[row, at] = chosen[t, i] if second_step else i
                if keep_scores:
                    best[row, at] = values[j]
            if key > threshold:
                greater += 1
            elif key == threshold:
                equal += 1
        greater_before += total & EQUAL - 1
        equal_before += total >> 16
    for i in range(greater_before + min(equal_before, remaining) + thread, k, THREADS):
        out[row, part * k + i] = -1
        if keep_scores:
            best[row, part * k + i] = NAN


def choose(out, scores, positions=None, start=0):
    """out[start + t] = the top-k of row t of scores.

    With positions, only of scores up to positions[start + t].
    """
    n_rows, n, k = scores.shape[0], scores.shape[1], out.shape[1]
    other = kernels("top_k of one", scores, k) or kernels("top_k of many", scores, k)
    if other:
        other(out, scores, positions, start)
        return
    n_parts, causal = max(1, min(BLOCKS // n_rows, round(math.sqrt(n / k)))), positions is not None
    if not causal:
        positions = scratch("nothing", (1,), np.int64)
    if n_parts == 1 or n <= 2 * PER_BLOCK:
        best, chosen = scratch("nothing", (1, 1), np.float32), scratch("nothing", (1, 1), np.int32)
        choose_of_rows(n_rows, out, start, best, False, scores, chosen, False, positions, start, causal, 1, n)
        return
    best, chosen = (scratch("chosen of parts", (n_rows, n_parts * k), dtype) for dtype in (np.float32, np.int32))
    choose_of_rows(n_rows * n_parts, chosen, 0, best, True, scores, chosen, False, positions, start, causal, n_parts, n)
    choose_of_rows(n_rows, out, start, best, False, best, chosen, True, positions, start, causal, n_parts, n)


def top_k(out, scores):
    """The indices of the k largest scores, ascending.

    Of equal scores the lowest index is chosen first. -inf and NaN are never chosen; -1 fills the rest.
    """
    choose(out, scores)
