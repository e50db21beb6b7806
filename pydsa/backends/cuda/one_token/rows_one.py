"""One token's activations, made by the blocks that multiply with them.

A block of int8x2/gemv.py makes and rounds its row while its first weights are on their way. It keeps it in scratch memory of its own,
which the first-level cache serves. One of the blocks also stores the row as floats. And a block may round what it has multiplied.

Rows of heads may be what blocks of attention have left (attend_one.py): each block joins those of its head.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.linear import Int8x2, pack_four
from pydsa.backends.cuda.intrinsics.block_sums import block_sum
from pydsa.backends.cuda.intrinsics.device import WARP, device, load_four_f32, store_four_f32, sync, warp_max, warp_sum
from pydsa.backends.cuda.intrinsics.division import divide, inverse_root
from pydsa.backends.cuda.intrinsics.instructions import quotient
from pydsa.backends.cuda.intrinsics.shared_memory import WHOLE_WARP, power_of_two
from pydsa.backends.cuda.norm import silu_times
from pydsa.backends.cuda.runtime.array import scratch


GIVEN, NORMED, GATED, JOINED = range(4)     # how rows are made
MOST = 4096                         # values of a row
AT_ONCE = 4                         # splits of which a thread loads numbers at once
LOADED = 4 * AT_ONCE
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)
SOURCES = f"i4, {'f4[:,::1], ' * 6}f4[::1], f4, i4, i4, i4, i8[:]"      # the arguments of kernels for a Rows
ROUNDED = "b1, u4[:,::1], f4[:,::1], f4[:,::1]"     # and for outputs that are rounded


class Splits(NamedTuple):
    """What attention of one token leaves for each split of its keys.

    sums [n splits * heads, columns] and stats [n splits * heads, 2]: see chosen_rows.py. keys: of a tile. n_chosen: the number of chosen
    keys, or 0: all up to positions[0].
    """
    sums: object
    stats: object
    n: int
    keys: int
    n_chosen: int
    positions: object


class Rows(NamedTuple):
    """How blocks make the rows that they multiply with.

    mode NORMED: out = rms_norm(x), gain and eps; other is not used. GATED: out = silu(x) other, for each row; and single_out of the single
    matrix' row. JOINED: out, a row a head, is joined from splits, whose sums are x and whose stats are other. All are [rows, n].
    """
    mode: int
    out: object
    x: object
    other: object = None
    single_out: object = None
    single_x: object = None
    single_other: object = None
    gain: object = None
    eps: float = 0.0
    splits: object = None       # Splits

    @property
    def arguments(self):
        """What kernels take."""
        mode, out, x, other, *single, gain, eps, splits = self
        other = x if other is None else other
        single = [out, x, other] if single[0] is None else single
        joined = (0, 0, 0, scratch("nothing", (1,), np.int64)) if splits is None else splits[2:]
        return mode, out, x, other, *single, x[0] if gain is None else gain, np.float32(eps), *joined


def no_rows():
    """The arguments of a kernel that gets its rows rounded."""
    nothing = scratch("nothing", (1, 1), np.float32)
    return Rows(GIVEN, nothing, nothing).arguments


def not_rounded():
    """The arguments of a kernel whose outputs are not rounded."""
    nothing = scratch("nothing", (1, 1), np.float32)
    return False, *Int8x2(scratch("nothing", (1, 1), np.uint32), nothing, nothing)


def takes(rows):
    """Whether blocks can make these Rows: short ones, contiguous, aligned."""
    arrays = [a for a in rows[1:-3] if a is not None]
    aligned = all(a.span[0] % 16 == 0 and a.span[1] - a.span[0] == a.nbytes for a in [*arrays, *([] if rows.gain is None else [rows.gain])])
    return aligned and all(a.shape[1] <= MOST and a.shape[1] % 32 == 0 for a in (rows.out, rows.single_out) if a is not None)


@device
def splits_with_keys(n_splits, keys, n_chosen, positions):
    """How many splits of one token have keys: see Splits and modes.py."""
    n, whole = np.int32(n_chosen) if n_chosen > 0 else np.int32(positions[0] + 1), np.int32(n_splits * keys)
    share = np.int32(quotient(np.int32(n + whole - 1), whole) * keys)
    return quotient(np.int32(n + share - 1), share)


@device
def join_four(sums, stats, head, n_head, n_used, i, lane):
    """Four columns of a head's attention, joined from its first n_used splits.

    A split's sums are multiplied by e^(its greatest score - the greatest of all) over the sum of all weights. Scores are times log2(e).
    All lanes of a warp call it; each finds the factors of its own splits.
    """
    top, total = MINUS_INFINITY, ZERO
    for split in range(np.int32(lane), n_used, np.int32(WARP)):
        top = max(top, stats[np.int32(split * n_head + head), 0])
    top = warp_max(top)
    top = top if top > MINUS_INFINITY else ZERO
    for split in range(np.int32(lane), n_used, np.int32(WARP)):
        row = np.int32(split * n_head + head)
        total += power_of_two(stats[row, 0] - top) * stats[row, 1]
    total = warp_sum(total)
    over = divide(np.float32(1), total) if total != ZERO else ZERO
    a, b, c, d = ZERO, ZERO, ZERO, ZERO
    for first in range(np.int32(0), n_used, np.int32(WARP)):
        own = np.int32(first + lane)
        factor = power_of_two(stats[np.int32(own * n_head + head), 0] - top) * over if own < n_used else ZERO
        for begin in range(np.int32(0), np.int32(WARP), np.int32(AT_ONCE)):
            if np.int32(first + begin) < n_used:
                a, b, c, d = add_splits(a, b, c, d, sums, head, n_head, n_used, np.int32(first + begin), begin, factor, i)
    return a, b, c, d


@device
def add_splits(a, b, c, d, sums, head, n_head, n_used, first, lane, factor, i):
    """a to d plus four columns of AT_ONCE splits, times factors.

    These are of lanes from `lane` on; 0 past the last split, which is loaded in place of those that are not there.
    """
    loaded = cuda.local.array(LOADED, np.float32)
    for k in range(AT_ONCE):
        split = min(np.int32(first + k), np.int32(n_used - 1))
        loaded[4 * k], loaded[4 * k + 1], loaded[4 * k + 2], loaded[4 * k + 3] = load_four_f32(sums[np.int32(split * n_head + head)], i)
    for k in range(AT_ONCE):
        f = cuda.shfl_sync(WHOLE_WARP, factor, np.int32(lane + k))
        a, b, c, d = a + f * loaded[4 * k], b + f * loaded[4 * k + 1], c + f * loaded[4 * k + 2], d + f * loaded[4 * k + 3]
    return a, b, c, d


@device
def make_row(mode, out, x, other, gain, eps, n_splits, keys, n_chosen, positions, row, writes, packed, scales, sums, own, parts, thread,
             n_threads):
    """Make a row, round it to row `own` of packed, and store it if `writes`.

    row: of x, other and out. All threads of a block call it. parts: shared memory with one float32 per warp.
    """
    if mode == JOINED:
        join_row(out, x, other, n_splits, keys, n_chosen, positions, row, writes, packed, scales, sums, own, thread, n_threads)
        return
    n, factor, step = np.int32(x.shape[1]), np.float32(1), np.int32(n_threads)
    n_fours = np.int32(n >> 2)
    if mode == NORMED:
        total = ZERO
        for four in range(np.int32(thread), n_fours, step):
            a, b, c, d = load_four_f32(x[row], np.int64(4 * four))
            total += (a * a + b * b) + (c * c + d * d)
        factor = inverse_root(divide(block_sum(total, parts, thread, n_threads), np.float32(n)) + eps)
    for begin in range(np.int32(0), n_fours, step):
        four = np.int32(begin + np.int32(thread))
        valid, i = four < n_fours, np.int64(4 * four)
        a, b, c, d = ZERO, ZERO, ZERO, ZERO
        if valid:
            a, b, c, d = load_four_f32(x[row], i)
            if mode == NORMED:
                e, f, g, h = load_four_f32(gain, i)
                a, b, c, d = a * factor * e, b * factor * f, c * factor * g, d * factor * h
            else:
                e, f, g, h = load_four_f32(other[row], i)
                a, b, c, d = silu_times(a, e), silu_times(b, f), silu_times(c, g), silu_times(d, h)
            if writes:
                store_four_f32(out[row], i, a, b, c, d)
        pack_four(packed, scales, sums, own, four, valid, a, b, c, d)
    sync()


@device
def join_row(out, x, stats, n_splits, keys, n_chosen, positions, row, writes, packed, scales, sums, own, thread, n_threads):
    """make_row() of a head, joined from splits: see Splits. x: their sums."""
    n_used, n_fours = splits_with_keys(n_splits, keys, n_chosen, positions), np.int32(np.int32(x.shape[1]) >> 2)
    for begin in range(np.int32(0), n_fours, np.int32(n_threads)):
        four = np.int32(begin + np.int32(thread))
        valid, i = four < n_fours, np.int64(4 * min(four, np.int32(n_fours - 1)))
        a, b, c, d = join_four(x, stats, np.int32(row), np.int32(out.shape[0]), n_used, i, np.int32(thread & WARP - 1))
        if valid and writes:
            store_four_f32(out[row], i, a, b, c, d)
        pack_four(packed, scales, sums, own, four, valid, a, b, c, d)
    sync()


@device
def round_tile(out, y, begin, packed, scales, sums, thread):
    """Round 32 outputs of a block, from `begin` on, to a row of an Int8x2.

    The row has all rows of `out`, one behind the other. All threads of a block call it.
    """
    sync()
    if thread < WARP:
        i = begin + 4 * thread
        valid, n_out = thread < 8 and i < out.shape[1], out.shape[1]
        a, b, c, d = ZERO, ZERO, ZERO, ZERO
        if valid:
            a, b, c, d = out[y, i], out[y, i + 1], out[y, i + 2], out[y, i + 3]
        pack_four(packed, scales, sums, 0, (y * n_out + i) >> 2, valid, a, b, c, d)
