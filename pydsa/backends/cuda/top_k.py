"""Top-k: exact, the greatest first and of equals the lowest index; a block a row, a radix select on the bits of the floats."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, device, float_bits
from pydsa.backends.cuda.launch import kernel

THREADS = 8 if SIMULATED else 1024
PER_THREAD = 8          # scores that a thread takes at a time where indices are written
BINS = 256
NEVER = np.float32(-np.inf)


@device
def ordered(score):
    """A score as an integer that is greater where the score is, the same for both zeros; 0 for what is never chosen: -inf and NaN."""
    if not score > NEVER:
        return np.uint32(0)
    bits = float_bits(score + np.float32(0))        # -0 becomes 0
    return np.uint32(~bits & 0xFFFFFFFF) if bits >> 31 else np.uint32(bits | 0x80000000)


@kernel("i4[:,:], f4[:,:], i8[:], i4, b1", THREADS)
def select_rows(out, scores, positions, first, causal):
    """out[first + t] = the chosen of row t: of all its scores, or if `causal` of those up to positions[first + t].

    Four passes find the k-th greatest, eight bits at a time; a last one writes in order what is greater, and of its equals the first ones.
    """
    thread, t, k = cuda.threadIdx.x, cuda.blockIdx.x, out.shape[1]
    n = positions[first + t] + 1 if causal else np.int64(scores.shape[1])
    counts = cuda.shared.array(BINS, np.int32)
    found = cuda.shared.array(3, np.uint32)         # known bits of the k-th, how many of its equals are wanted, whether all fit
    sums = cuda.shared.array(THREADS, np.int32)
    if thread == 0:
        found[0], found[1], found[2] = 0, k, 0
    for level in range(4):
        shift = 24 - 8 * level
        for i in range(thread, BINS, THREADS):
            counts[i] = 0
        cuda.syncthreads()
        known = found[0]
        for i in range(thread, n, THREADS):
            key = ordered(scores[t, i])
            if key != 0 and (level == 0 or key >> (shift + 8) == known >> (shift + 8)):
                cuda.atomic.add(counts, int(key >> shift) & 255, 1)
        cuda.syncthreads()
        if thread == 0 and found[2] == 0:
            wanted, i = int(found[1]), BINS - 1
            while i >= 0 and counts[i] < wanted:
                wanted -= counts[i]
                i -= 1
            if i < 0:
                found[2] = 1        # there are not so many: all are chosen
            else:
                found[0], found[1] = np.uint32(int(known) | i << shift), np.uint32(wanted)
        cuda.syncthreads()
    least, equals = found[0], int(found[1])
    if found[2] == 1:
        least, equals = np.uint32(0), 0
    greater_before, equal_before = 0, 0
    for start in range(0, n, THREADS * PER_THREAD):
        mine = 0            # how many of this thread's scores are greater, and 2^16 times how many equal
        for i in range(start + thread * PER_THREAD, min(start + (thread + 1) * PER_THREAD, n)):
            key = ordered(scores[t, i])
            if key > least:
                mine += 1
            elif key == least and key != 0:
                mine += 1 << 16
        sums[thread] = mine
        cuda.syncthreads()
        step = 1
        while step < THREADS:       # sums of all threads up to each
            below = sums[thread - step] if thread >= step else 0
            cuda.syncthreads()
            sums[thread] += below
            cuda.syncthreads()
            step *= 2
        before, total = sums[thread] - mine, sums[THREADS - 1]
        greater, equal = greater_before + (before & 0xFFFF), equal_before + (before >> 16)
        for i in range(start + thread * PER_THREAD, min(start + (thread + 1) * PER_THREAD, n)):
            key = ordered(scores[t, i])
            if key > least:
                out[first + t, greater + min(equal, equals)] = i
                greater += 1
            elif key == least and key != 0:
                if equal < equals:
                    out[first + t, greater + equal] = i
                equal += 1
        greater_before += total & 0xFFFF
        equal_before += total >> 16
        cuda.syncthreads()
    for i in range(greater_before + min(equal_before, equals) + thread, k, THREADS):
        out[first + t, i] = -1


def top_k(out, scores):
    """The k greatest scores' indices, ascending; equal scores: the lowest index first; -inf and NaN are never chosen; -1 fills the rest."""
    select_rows(out.shape[0], out, scores, scratch("no positions", (1,), np.int64), 0, False)
