"""Prefix sums of whole numbers over the threads of a block."""
from pydsa.backends.cuda.device import WARP, device, sync, warp_prefix


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
