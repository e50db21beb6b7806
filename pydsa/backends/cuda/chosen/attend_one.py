"""A few tokens' attention: which kernel, and the join of what its blocks make.

Keys are divided among blocks (flash decoding), whose sums of values and statistics of weights the second kernel joins. The kernels of the
first step are in attend_int8x2.py, attend_f16x2.py and attend_f32.py. Those of attention.py take what these do not: other widths of
rows, and many tokens.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen import attend_f16x2, attend_f32, attend_int8x2
from pydsa.backends.cuda.chosen.chosen_rows import LOG2_E, ROTATED, VALUE
from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.intrinsics.device import device, load_four_f32, store_four_f32, warp_max, warp_sum
from pydsa.backends.cuda.intrinsics.division import divide
from pydsa.backends.cuda.intrinsics.shared_memory import power_of_two
from pydsa.backends.cuda.modes import SPARSE, share_of_keys
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, kernel


ATTEND = attend_int8x2.ATTEND | attend_f16x2.ATTEND | attend_f32.ATTEND     # (storage of the cache, tile of a block) -> kernel
THREADS = VALUE // 4                # of a block that joins a head, four columns each
AT_ONCE = 32                        # splits whose sums a thread loads at once
LOADED = 4 * AT_ONCE
MOST_SPLITS = 512
MOST_TOKENS = 32                    # of a step; more have blocks enough without splits
PROCESSORS = BLOCKS // 2            # that blocks are divided among
ENOUGH = 3 * PROCESSORS // 4        # blocks to fill a GPU
THREADS_AT_ONCE = 256               # of narrow tiles, of a processor: each has up to 255 registers
# capability -> KB of shared memory that a block can have; others have SMALL
SHARED, SMALL = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}, 99
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


@device
def weigh_splits(weights, stats, before, head, n_head, n_splits, lane):
    """What each split's sums of a head are multiplied by, by one warp.

    That is e^(its greatest score - the greatest of all) over the sum of all weights; 0 if there is no key, and past the last split. Scores
    are times log2(e).
    """
    top, total = MINUS_INFINITY, ZERO
    for split in range(lane, n_splits, 32):
        top = max(top, stats[2 * ((before + split) * n_head + head)])
    top = warp_max(top)
    top = top if top > MINUS_INFINITY else ZERO
    for split in range(lane, n_splits, 32):
        at = 2 * ((before + split) * n_head + head)
        factor = power_of_two(stats[at] - top)
        weights[split] = factor
        total += factor * stats[at + 1]
    total = warp_sum(total)
    over = divide(np.float32(1), total) if total != ZERO else ZERO
    for split in range(lane, (n_splits + AT_ONCE - 1) // AT_ONCE * AT_ONCE, 32):
        weights[split] = weights[split] * over if split < n_splits else ZERO


@device
def load_sums(loaded, sums, before, first, h, n_head, n_splits, thread):
    """Start to load four columns of AT_ONCE splits of a head, from `first` on.

    before: the splits of tokens before. In place of those past the end the last one is loaded again.
    """
    step, last, begin = np.int32(n_head * VALUE), np.int32(n_splits - 1 - first), ((before + first) * n_head + h) * VALUE + 4 * thread
    for i in range(AT_ONCE):
        at = begin + np.int32(np.int32(min(np.int32(i), last)) * step)
        loaded[4 * i], loaded[4 * i + 1], loaded[4 * i + 2], loaded[4 * i + 3] = load_four_f32(sums, at)


@kernel("f4[:,:,:], f4[::1], f4[::1], i4, i4, i4, i8[:], i4[:,:], b1, u4[:,::1], f4[:,::1], f4[:,::1]", THREADS)
def join_rows(out, sums, stats, n_splits, keys, mode, positions, indices, packs, packed, scales, x_sums):
    """out[t, h], joined from splits; if `packs` its Int8x2, one row per head.

    One head of a token per block. The other parameters are those of chosen_rows.py; keys: of a tile.
    """
    weights = cuda.shared.array(MOST_SPLITS, np.float32)
    loaded = cuda.local.array(LOADED, np.float32)
    h, t, n_head, thread = cuda.blockIdx.x & 0x7FFFFFFF, cuda.blockIdx.y & 0xFFFF, out.shape[1], cuda.threadIdx.x & THREADS - 1
    n, share = share_of_keys(n_splits, keys, mode, positions, indices, t)
    before, used = np.int64(t) * n_splits, np.int32((n + share - 1) // share)       # how many splits have keys
    load_sums(loaded, sums, before, 0, h, n_head, used, thread)
    if thread < 32:
        weigh_splits(weights, stats, before, h, n_head, used, thread)
    cuda.syncthreads()
    a, b, c, d = ZERO, ZERO, ZERO, ZERO
    for first in range(0, used, AT_ONCE):
        if first > 0:
            load_sums(loaded, sums, before, first, h, n_head, used, thread)
        for i in range(AT_ONCE):
            weight = weights[first + i & MOST_SPLITS - 1]
            a, b, c, d = (a + weight * loaded[4 * i], b + weight * loaded[4 * i + 1], c + weight * loaded[4 * i + 2],
                          d + weight * loaded[4 * i + 3])
    store_four_f32(out[t, h], 4 * thread, a, b, c, d)
    if packs:
        pack_four(packed, scales, x_sums, h, thread, True, a, b, c, d)


def room():
    """The bytes of shared memory that a block of the current GPU can have."""
    return 1024 * SHARED.get(current().capability, SMALL)


def fits(storage):
    """The tiles of a cache's storage that have room on the current GPU.

    Wide ones come first. The simulator has none of these kernels.
    """
    return [tile for kept, tile in ATTEND if kept == storage and ATTEND[kept, tile].shared <= room()]


def division(storage, n_tokens, n_head, n_keys, chosen):
    """The tiles, and into how many splits the keys of a token are divided.

    chosen: n_keys are all there; else there may be any number of them up to it. Splits are whole tiles. As many as make enough blocks to
    fill the GPU; of narrow tiles if those of wide ones are too few.
    """
    tiles = fits(storage)
    if not chosen:      # there may be many tiles a block, of which one comes while the other is used
        tiles = sorted(tiles, key=lambda tile: -tile.buffers)
    for tile in tiles:
        groups, most = n_tokens * blocks_for(n_head, tile.heads), blocks_for(n_keys, tile.keys)
        if groups * most >= ENOUGH:
            break
    attention = ATTEND[storage, tile]
    at_a_time = max(1, min(BLOCKS // PROCESSORS, room() // attention.shared, THREADS_AT_ONCE // attention.threads))     # on a processor
    return tile, min(most, max(1, PROCESSORS * at_a_time // groups))


def takes(out, q, latents, mode, n_keys):
    """Whether attend() has kernels for these arguments: see attention.attend."""
    widths = out.shape[2], latents.first, latents.second
    return (len(out) <= MOST_TOKENS and widths == (VALUE, VALUE, ROTATED) and bool(fits(latents.storage))
            and all(a.span[1] - a.span[0] == a.nbytes and a.span[0] % 16 == 0 for a in (out, q)))


def attend(out, q, latents, positions, indices, mask, mode, n_keys, scale, made=None):
    """Attention of tokens to up to n_keys keys: see attention.attend.

    takes() must hold. Negative indices are left out wherever they stand. made: for one token, the Int8x2 that receives out, packed.
    """
    n_tokens, n_head, _ = out.shape
    sums, stats, n_splits, tile = attend_splits(q, latents, positions, indices, mask, mode, n_keys, scale)
    packs = made is not None
    if not packs:
        made = [scratch("nothing", (1, 1), dtype) for dtype in (np.uint32, np.float32, np.float32)]
    join_rows((n_head, n_tokens), out, sums.flat, stats.flat, n_splits, tile.keys, mode, positions, indices, packs, *made)


def divided(q, storage, n_keys, chosen):
    """Splits [n tokens * splits * heads] of attention: what attend_splits() leaves."""
    n_tokens, n_head, _ = q.shape
    tile, n_splits = division(storage, n_tokens, n_head, n_keys, chosen)
    sums = scratch("attention sums", (n_tokens * n_splits * n_head, VALUE), np.float32)
    stats = scratch("attention row_maxes", (n_tokens * n_splits * n_head, 2), np.float32)
    return sums, stats, n_splits, tile


def attend_splits(q, latents, positions, indices, mask, mode, n_keys, scale):
    """attend(), up to the join of its splits -> what divided() returns."""
    n_tokens, n_head, _ = q.shape
    sums, stats, n_splits, tile = divided(q, latents.storage, n_keys, mode == SPARSE)
    ATTEND[latents.storage, tile]((n_splits, blocks_for(n_head, tile.heads), n_tokens), sums.flat, stats.flat, q.flat, latents.data.flat,
                                  latents.data.shape[1], positions, indices, mask, mode, n_head, n_splits, LOG2_E * np.float32(scale))
    return sums, stats, n_splits, tile
