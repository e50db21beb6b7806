"""A superblock of 256 weights on its way to entries of a grid: its memory, and what is done to all of its groups at once."""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cpu.arrays import address, align, floats_at, ints_at, uints_at
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.simd import float_at, load_floats, max_abs_lanes, reduce_max_abs
from pydsa.quantization.grid_search import BYTES, ROW, TAG, cheapest_signs, entry_sums, half_costs, nearest_entries, rounded_sums

ZERO, ONE = np.float32(0), np.float32(1)
LEAST = np.float32(1e-30)       # superblocks of smaller magnitudes are zeros in each of these types
GREATEST = np.float32(1e37)     # inverse scale, that 0 times it is 0
NO_SIGNS, EVEN_SIGNS, ANY_SIGNS = range(3)
ROWS = 220      # of memory for costs of halves: levels and pairs (up to 40), then 81 for each half


class Grid(NamedTuple):
    """What a type is made of."""
    kind: int               # its number among the types with grids
    group: int              # numbers of an entry: 8, or 4
    sub: int                # numbers with one scale
    shared: int             # numbers with one offset
    bits: int               # of k
    signs: int              # NO_SIGNS, EVEN_SIGNS (in each 8 numbers), ANY_SIGNS
    unit: np.float32        # a scale is d unit (2 k + 1)
    levels: np.ndarray      # float32 [3 or 8]: the numbers in the grid, in order
    offsets: np.ndarray     # float32 [1 or 2]: what may be added to all numbers of an entry
    starts: np.ndarray      # int64: entries by their second half, see grid_search.nearest_entries()
    lows: np.ndarray
    highs: np.ndarray
    entries: np.ndarray     # int64 [128 * 128]: the entry of a code
    factors: np.ndarray     # float32: inverse scales to try without the grid, times the greatest magnitude of a sub-block
    refinements: np.ndarray     # float32: those to try with it, over the best before
    steps: np.ndarray       # int64: what is added to the nearest k, 0 first


class Work(NamedTuple):
    """The memory of a superblock."""
    x: np.ndarray           # float32 [group, n]: numbers over the greatest magnitude, without signs where the type has them
    w: np.ndarray           # float32 [group, n]: weights
    signs: np.ndarray       # int64 [32]: eight bits, 1 where a number is negative
    changed: np.ndarray     # int64 [32]: the bit of the number whose sign is changed so that they are even; it is negative in x
    inverse: np.ndarray     # float32 [1, n]: of the scale of each group
    costs: np.ndarray       # float32 [2, n]: for each offset
    codes: np.ndarray       # uint32 [2 n]: the best entries for each offset, then for the one that is chosen
    sums: np.ndarray        # float32 [4, n]: for each offset, sum of w x g, of w g^2
    offset: np.ndarray      # float32 [1, n]: the one chosen
    kept_codes: np.ndarray  # uint32 [n]: the best so far
    kept_offset: np.ndarray     # float32 [1, n]
    subs: np.ndarray        # float32 [8, n_sub], see below
    k: np.ndarray           # int64 [n_sub]
    kept_k: np.ndarray      # int64 [n_sub]
    tables: int             # address of ROWS costs of halves


PEAK, SCALE, FIRST, GAIN, SQUARES, FIT, FIT_SQUARES = range(7)       # rows of subs: sums of w x g and w g^2 are FIT and FIT_SQUARES


@inner
def work_bytes():
    """Count the bytes of Work, of any type."""
    return 8192 + ROWS * ROW


@inner
def work_at(grid, at):
    """View the Work for a grid at an aligned address."""
    group, n, n_sub = grid.group, 256 // grid.group, 256 // grid.sub
    line = 256      # bytes of n floats, or less
    x, w, signs, changed, at = at, at + 1024, at + 2048, at + 2304, at + 2560
    costs, codes, sums, at = at, at + 2 * line, at + 4 * line, at + 8 * line
    inverse, offset, kept_codes, kept_offset, subs = at, at + line, at + 2 * line, at + 3 * line, at + 4 * line
    k, kept_k, tables = subs + 512, subs + 640, subs + 768
    return Work(floats_at(x, group, n), floats_at(w, group, n), ints_at(signs, 32), ints_at(changed, 32), floats_at(inverse, 1, n),
                floats_at(costs, 2, n), uints_at(codes, 2 * n), floats_at(sums, 4, n), floats_at(offset, 1, n), uints_at(kept_codes, n),
                floats_at(kept_offset, 1, n), floats_at(subs, 8, n_sub), ints_at(k, n_sub), ints_at(kept_k, n_sub), align(tables))


@inner
def greatest_magnitude(x):
    """Return the greatest magnitude of 256 numbers at an address."""
    top = load_floats(x, 0)
    for at in range(BYTES, 4 * 256, BYTES):
        top = max_abs_lanes(top, load_floats(x, at))
    return reduce_max_abs(top, top)


@inner
def load(source, importance, grid, work):
    """Bring 256 weights to work, over their greatest magnitude; return that.

    source, importance: addresses, the second 0 where all weights matter alike. Where all are zeros, or too small, returns 0.
    """
    peak = greatest_magnitude(source)
    if peak < LEAST:
        return ZERO
    inverse, shift, signed = ONE / peak, 3 if grid.group == 8 else 2, grid.signs != NO_SIGNS
    x, w, signs, changed = work.x, work.w, work.signs, work.changed
    for eight in range(32):
        bits = 0
        for i in range(8):
            row, lane = i & (grid.group - 1), ((eight << 3) + i) >> shift
            value = float_at(source, (eight << 5) + 4 * i) * inverse
            if signed:
                bits |= np.int64(value < ZERO) << i
                value = abs(value)
            x[row, lane] = value
            w[row, lane] = float_at(importance, (eight << 5) + 4 * i) if importance != 0 else ONE
        signs[eight], changed[eight] = bits, 0
    return peak


@inner
def is_odd(byte):
    """Whether an odd number of eight bits is set."""
    byte ^= byte >> 4
    return (0x6996 >> (byte & 15)) & 1


@inner
def even_signs(grid, work):
    """Where eight numbers have an odd number of minus signs, change one.

    It is the one that costs least at the inverse scales in work.
    """
    x, w, costs, codes, signs, changed = work.x, work.w, work.costs, work.codes, work.signs, work.changed
    x_at, w_at, stride = address(x), address(w), 1024 // grid.group
    for at in range(0, stride, BYTES):
        cheapest_signs(x_at + at, w_at + at, stride, grid.group, address(work.inverse) + at, grid.levels, address(costs) + at,
                       address(codes) + at)
    for eight in range(32):
        changed[eight] = 0
        if is_odd(signs[eight]):
            lane = eight
            if grid.group == 4:
                lane = 2 * eight
                lane += np.int64(costs[0, lane + 1] < costs[0, lane])
            row = np.int64(codes[lane])
            x[row, lane] = -x[row, lane]
            changed[eight] = 1 << (row + (4 * (lane & 1) if grid.group == 4 else 0))


@inner
def spread_inverses(scales, factor, work):
    """Set the inverse scale of each group: factor over its sub-block's scale."""
    inverse, g, per_sub = work.inverse, 0, work.inverse.size // scales.size
    for j in range(scales.size):
        value = min(factor / scales[j], GREATEST) if scales[j] > ZERO else ZERO
        for _ in range(per_sub):
            inverse[0, g] = value
            g += 1


@inner
def search(grid, work):
    """Find the best entries of all groups at their inverse scales."""
    x, w, inverse, costs, codes = address(work.x), address(work.w), address(work.inverse), address(work.costs), address(work.codes)
    low, high, stride, n = work.tables + ROW * 40, work.tables + ROW * 130, 1024 // grid.group, grid.group // 2
    levels, offsets, starts, lows, highs = grid.levels, grid.offsets, grid.starts, grid.lows, grid.highs
    for at in range(0, stride, ROW):
        for v in range(offsets.size):
            for out, skip, mask in ((low, at, TAG), (high, at + n * stride, 0)):
                half_costs(x + skip, w + skip, stride, inverse + at, levels, offsets[v], n, work.tables, out, mask)
            nearest_entries(low, high, starts, lows, highs, costs + v * stride + at, codes + v * stride + at)
    choose_offsets(grid, work)


@inner
def choose_offsets(grid, work):
    """Choose the offset of least cost for all groups that share one.

    Its costs, codes and sums become the first.
    """
    offset, costs, codes, sums, first = work.offset, work.costs, work.codes, work.sums, grid.offsets[0]
    n, n_shared = offset.size, grid.shared // grid.group
    for g in range(n):
        offset[0, g] = first
    if grid.offsets.size == 1:
        return
    for start in range(0, n, n_shared):
        difference = ZERO
        for g in range(start, start + n_shared):
            difference += costs[1, g] - costs[0, g]
        if difference < ZERO:
            for g in range(start, start + n_shared):
                offset[0, g], costs[0, g], codes[g] = -first, costs[1, g], codes[n + g]
                sums[0, g], sums[1, g] = sums[2, g], sums[3, g]


@inner
def fit(grid, work):
    """Sum w x g and w g^2 over each sub-block, for the entries in work."""
    x, w, stride = address(work.x), address(work.w), 1024 // grid.group
    offset, codes, sums = address(work.offset), address(work.codes), address(work.sums)
    for at in range(0, stride, BYTES):
        entry_sums(x + at, w + at, stride, grid.group, codes + at, grid.levels, offset + at, sums + at)
    add_groups(work)


@inner
def fit_rounded(grid, work):
    """Sum w x g and w g^2 over each sub-block, where g are rounded alone."""
    x, w, inverse, sums, costs = address(work.x), address(work.w), address(work.inverse), address(work.sums), address(work.costs)
    levels, offsets, stride = grid.levels, grid.offsets, 1024 // grid.group
    for at in range(0, stride, BYTES):
        for v in range(offsets.size):
            rounded_sums(x + at, w + at, stride, grid.group, inverse + at, levels, offsets[v], sums + 2 * v * stride + at,
                         costs + v * stride + at)
    choose_offsets(grid, work)
    add_groups(work)


@inner
def add_groups(work):
    """Add the sums of groups over each sub-block, to FIT and FIT_SQUARES."""
    sums, subs, g = work.sums, work.subs, 0
    n_sub = subs.shape[1]
    per_sub = work.offset.size // n_sub
    for j in range(n_sub):
        products, squares = ZERO, ZERO
        for _ in range(per_sub):
            products, squares = products + sums[0, g], squares + sums[1, g]
            g += 1
        subs[FIT, j], subs[FIT_SQUARES, j] = products, squares
