"""Sums, greatest numbers and prefix sums over the threads of a block."""
import numpy as np

from pydsa.backends.cuda.device import WARP, device, float_bits, sync, warp_max_int, warp_prefix, warp_sum


@device
def block_sum(x, parts, thread, n_threads):
    """The sum of a block's float32, in every thread; `parts` is shared memory with a float32 for each warp."""
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
    """The bits of |x|, int32, which order as numbers do; NaN's are the greatest."""
    return np.int32(float_bits(x) & 0x7FFFFFFF)


@device
def block_max(x, parts, thread, n_threads):
    """The greatest of a block's int32, in every thread; `parts` is shared memory with an int32 for each warp."""
    x = warp_max_int(x)
    if thread % WARP == 0:
        parts[thread // WARP] = x
    sync()
    for i in range(n_threads // WARP):
        x = max(x, parts[i])
    sync()
    return x


@device
def block_prefix(x, totals, ends, thread, n_warps):
    """The sum of the numbers of all threads before this one, and that of all; two arrays of n_warps int32, at most WARP, for the warps."""
    warp, lane = thread // WARP, thread % WARP
    up_to = warp_prefix(x, lane)
    if lane == WARP - 1:
        totals[warp] = up_to
    sync()
    end = warp_prefix(totals[lane] if lane < n_warps else totals[0], lane)
    if warp == 0 and lane < n_warps:
        ends[lane] = end
    sync()
    return up_to - x + (ends[warp - 1] if warp > 0 else 0), ends[n_warps - 1]
