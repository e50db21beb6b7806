"""One token's activations, made by the blocks that multiply with them.

A block of int8x2/gemv.py makes and rounds its row while its first weights are on their way. It keeps it in scratch memory of its own,
which the first-level cache serves. One of the blocks also stores the row as floats. And a block may round what it has multiplied.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.block_sums import block_sum
from pydsa.backends.cuda.device import WARP, device, load_four_f32, store_four_f32, sync
from pydsa.backends.cuda.division import divide, inverse_root
from pydsa.backends.cuda.int8x2.linear import Int8x2, pack_four
from pydsa.backends.cuda.norm import silu_times


GIVEN, NORMED, GATED = range(3)     # how rows are made
MOST = 4096                         # values of a row
ZERO = np.float32(0)
SOURCES = f"i4, {'f4[:,::1], ' * 6}f4[::1], f4"         # the arguments of kernels for a Rows
ROUNDED = "b1, u4[:,::1], f4[:,::1], f4[:,::1]"     # and for outputs that are rounded


class Rows(NamedTuple):
    """How blocks make the rows that they multiply with.

    mode NORMED: out = rms_norm(x), gain and eps; other is not used. GATED: out = silu(x) other, for each row; and single_out of the single
    matrix' row. All are [rows, n].
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

    @property
    def arguments(self):
        """What kernels take."""
        mode, out, x, other, *single, gain, eps = self
        other = x if other is None else other
        single = [out, x, other] if single[0] is None else single
        return mode, out, x, other, *single, x[0] if gain is None else gain, np.float32(eps)


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
    arrays = [a for a in rows[1:-2] if a is not None]
    aligned = all(a.span[0] % 16 == 0 and a.span[1] - a.span[0] == a.nbytes for a in [*arrays, *([] if rows.gain is None else [rows.gain])])
    return aligned and all(a.shape[1] <= MOST and a.shape[1] % 32 == 0 for a in arrays)


@device
def make_row(mode, out, x, other, gain, eps, row, writes, packed, scales, sums, own, parts, thread, n_threads):
    """Make a row, round it to row `own` of packed, and store it if `writes`.

    row: of x, other and out. All threads of a block call it. parts: shared memory with one float32 per warp.
    """
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
