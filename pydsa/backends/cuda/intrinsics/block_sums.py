"""Block-level reductions: sums, maxima and prefix sums over a block's threads."""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import WARP, device, float_bits, sync, warp_max_int, warp_prefix, warp_sum

WARP_BITS = WARP.bit_length() - 1


@device
def block_sum(x, parts, thread, n_threads):
    """Block-level sum of float32, in every thread.

    parts: shared memory with one float32 per warp.
    """
    x = warp_sum(x)
    if thread % WARP == 0:
        parts[thread // WARP] = x
    sync()
    total = np.float32(0)
    for i in range(n_threads // WARP):
        total += parts[i]
    sync()
    return total


@device
def abs_bits(x):
    """The bits of |x| as int32. They order as |x| does; NaN is the largest."""
    return np.int32(float_bits(x) & 0x7FFFFFFF)


@device
def block_max(x, parts, thread, n_threads):
    """Block-level maximum of int32, in every thread.

    parts: shared memory with one int32 per warp.
    """
    x = warp_max_int(x)
    if thread % WARP == 0:
        parts[thread // WARP] = x
    sync()
    for i in range(n_threads // WARP):
        x = max(x, parts[i])
    sync()
    return x


@device
def row_max(x, t, start, end, maxima, thread, n_threads):
    """The greatest |x[t, i]| for i from start up to end, in every thread.

    As abs_bits() has it. maxima: shared memory with one int32 per warp.
    """
    bits = np.int32(0)
    for i in range(start + thread, end, n_threads):
        bits = max(bits, abs_bits(x[t, i]))
    return block_max(bits, maxima, thread, n_threads)


@device
def block_prefix(x, totals, ends, thread, n_warps):
    """Block-level exclusive prefix sum of int32, and the total.

    totals, ends: shared memory with one int32 per warp each; n_warps is at most WARP.
    """
    warp, lane = thread >> WARP_BITS, thread & WARP - 1
    inclusive = warp_prefix(x, lane)
    if lane == WARP - 1:
        totals[warp] = inclusive
    sync()
    end = warp_prefix(totals[lane] if lane < n_warps else totals[0], lane)
    if warp == 0 and lane < n_warps:
        ends[lane] = end
    sync()
    return np.int32(inclusive - x + (ends[warp - 1] if warp > 0 else 0)), ends[n_warps - 1]
