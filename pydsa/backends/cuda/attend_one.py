"""One token's attention to chosen rows: which kernel, and the join of what its blocks make.

Rows are divided among blocks (flash decoding), whose sums of values and statistics of weights the second kernel joins. The kernels of the
first step are in attend_int8x2.py and attend_f16x2.py. Those of attention.py take what these do not: other modes, other widths of rows,
rows of float32, several tokens.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda import attend_f16x2, attend_int8x2
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.chosen_rows import HEADS, ROTATED, VALUE
from pydsa.backends.cuda.current import current
from pydsa.backends.cuda.device import SIMULATED, device, load_four_f32, store_four_f32, warp_max, warp_sum
from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.modes import SPARSE
from pydsa.backends.cuda.shared_memory import power_of_two


ATTEND = attend_int8x2.ATTEND | attend_f16x2.ATTEND     # (storage of the cache, rows of a block) -> kernel
THREADS = VALUE // 4                # of a block that joins a head, four columns each
AT_ONCE = 32                        # splits whose sums a thread loads at once
LOADED = 4 * AT_ONCE
MOST_SPLITS = 512
LOG2_E = np.float32(1.4426950408889634)
# capability -> KB of shared memory that a block can have; others have SMALL
SHARED, SMALL = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}, 99
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def weigh_splits(weights, stats, head, n_head, n_splits, lane):
    """What each split's sums of a head are multiplied by, by one warp.

    That is e^(its greatest score - the greatest of all) over the sum of all weights; 0 if there is no key, and past the last split. Scores
    are times log2(e).
    """
    top, total = MINUS_INFINITY, ZERO
    for split in range(lane, n_splits, 32):
        top = max(top, stats[2 * (split * n_head + head)])
    top = warp_max(top)
    top = top if top > MINUS_INFINITY else ZERO
    for split in range(lane, n_splits, 32):
        at = 2 * (split * n_head + head)
        factor = power_of_two(stats[at] - top)
        weights[split] = factor
        total += factor * stats[at + 1]
    total = warp_sum(total)
    over = np.float32(1) / total if total != ZERO else ZERO
    for split in range(lane, (n_splits + AT_ONCE - 1) // AT_ONCE * AT_ONCE, 32):
        weights[split] = weights[split] * over if split < n_splits else ZERO


@device
def load_sums(loaded, sums, first, h, n_head, n_splits, thread):
    """Start to load four columns of AT_ONCE splits of a head, from `first` on.

    In place of those past the end the last one is loaded again.
    """
    step, last, begin = np.int32(n_head * VALUE), np.int32(n_splits - 1 - first), (np.int64(first) * n_head + h) * VALUE + 4 * thread
    for i in range(AT_ONCE):
        at = begin + np.int32(np.int32(min(np.int32(i), last)) * step)
        loaded[4 * i], loaded[4 * i + 1], loaded[4 * i + 2], loaded[4 * i + 3] = load_four_f32(sums, at)


@kernel("f4[:,:], f4[::1], f4[::1], i4, b1, u4[:,::1], f4[:,::1], f4[:,::1]", THREADS)
def join_rows(out, sums, stats, n_splits, packs, packed, scales, x_sums):
    """out[h], joined from splits; if `packs` its Int8x2, one row per head.

    One head per block. sums [splits, n_head, VALUE], stats [splits, n_head, 2], flat.
    """
    weights = cuda.shared.array(MOST_SPLITS, np.float32)
    loaded = cuda.local.array(LOADED, np.float32)
    h, n_head, thread = cuda.blockIdx.x & 0x7FFFFFFF, out.shape[0], cuda.threadIdx.x & THREADS - 1
    load_sums(loaded, sums, 0, h, n_head, n_splits, thread)
    if thread < 32:
        weigh_splits(weights, stats, h, n_head, n_splits, thread)
    cuda.syncthreads()
    a, b, c, d = ZERO, ZERO, ZERO, ZERO
    for first in range(0, n_splits, AT_ONCE):
        if first > 0:
            load_sums(loaded, sums, first, h, n_head, n_splits, thread)
        for i in range(AT_ONCE):
            weight = weights[first + i & MOST_SPLITS - 1]
            a, b, c, d = (a + weight * loaded[4 * i], b + weight * loaded[4 * i + 1], c + weight * loaded[4 * i + 2],
                          d + weight * loaded[4 * i + 3])
    store_four_f32(out[h], 4 * thread, a, b, c, d)
    if packs:
        pack_four(packed, scales, x_sums, h, thread, True, a, b, c, d)


def rows_of_a_block(storage):
    """How many rows a block of the current GPU takes of a cache's storage.

    0: there is no kernel for them that this GPU can run.
    """
    if SIMULATED:
        return 0
    room = 1024 * SHARED.get(current().capability, SMALL)
    return next((n for n in (64, 32) if (storage, n) in ATTEND and ATTEND[storage, n].shared <= room), 0)


def takes(out, q, latents, mode, n_keys):
    """Whether attend() has kernels for these arguments: see attention.attend."""
    widths = out.shape[2], latents.first, latents.second
    return (mode == SPARSE and len(out) == 1 and widths == (VALUE, VALUE, ROTATED)
            and n_keys <= rows_of_a_block(latents.storage) * MOST_SPLITS
            and all(a.span[1] - a.span[0] == a.nbytes and a.span[0] % 16 == 0 for a in (out, q)))


def attend(out, q, latents, indices, scale, made=None):
    """Attention of one token to the rows that indices [1, n_keys] name.

    Up to negative ones or not: those are left out wherever they stand. takes() must hold. made: the Int8x2 that receives out, packed.
    """
    n_head, rows, packs = out.shape[1], rows_of_a_block(latents.storage), made is not None
    n_splits = blocks_for(indices.shape[1], rows)
    sums = scratch("attention sums", (n_splits * n_head * VALUE,), np.float32)
    stats = scratch("attention row_maxes", (n_splits * n_head * 2,), np.float32)
    if not packs:
        made = [scratch("nothing", (1, 1), dtype) for dtype in (np.uint32, np.float32, np.float32)]
    ATTEND[latents.storage, rows]((n_splits, blocks_for(n_head, HEADS)), sums, stats, q.flat, latents.data.flat,
                                  latents.data.shape[1], indices[0], n_head, LOG2_E * np.float32(scale))
    join_rows(n_head, out[0], sums, stats, n_splits, packs, *made)
