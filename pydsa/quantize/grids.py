"""Quantize to IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S.

A group of 8 numbers (IQ3: 4) is stored as an entry of a grid, found by exhaustive search (grid_search.py), and as signs. Numbers of a
sub-block share a scale d unit (2 k + 1):

    IQ1_S    sub-blocks of 32  3-bit k  grid of 2048 times 8 from -1, 0, 1, and one offset of +-1/8 for all 32
    IQ1_M    sub-blocks of 16  3-bit k  the same grid, and an offset for each 8
    IQ2_XXS  sub-blocks of 32  4-bit k  grid of 256 times 8 magnitudes, an even number of minus signs
    IQ2_XS   sub-blocks of 16  4-bit k  grid of 512, an even number of minus signs
    IQ2_S    sub-blocks of 16  4-bit k  grid of 1024, any signs
    IQ3_XXS  sub-blocks of 32  4-bit k  grid of 256 times 4 magnitudes, an even number of minus signs in 8
    IQ3_S    sub-blocks of 32  4-bit k  grid of 512, any signs

What is made least is the sum of importance times squared error: with mean squares of the inputs as importance, the error of a product's
result if inputs are independent. One kernel serves all types, as they differ in tables.
"""
import functools

import numpy as np

from pydsa.backends.cpu.arrays import address, align
from pydsa.backends.cpu.jit import kernel
from pydsa.quantize.grid_blocks import NAMES, store_block
from pydsa.quantize.grid_scales import choose
from pydsa.quantize.grid_search import ROW
from pydsa.quantize.grid_work import ANY_SIGNS, EVEN_SIGNS, NO_SIGNS, Grid, work_at, work_bytes
from pydsa.quantize.rows import quantizer
from pydsa.quants import grid

EIGHTH = np.float32(1 / 8)
# Numbers with one scale, with one offset; bits of k, signs, unit of scales
SHAPES = {
    "IQ1_S": (32, 32, 3, NO_SIGNS, 1), "IQ1_M": (16, 8, 3, NO_SIGNS, 1), "IQ2_XXS": (32, 32, 4, EVEN_SIGNS, 1 / 8),
    "IQ2_XS": (16, 16, 4, EVEN_SIGNS, 1 / 8), "IQ2_S": (16, 16, 4, ANY_SIGNS, 1 / 8), "IQ3_XXS": (32, 32, 4, EVEN_SIGNS, 1 / 4),
    "IQ3_S": (32, 32, 4, ANY_SIGNS, 1),
}
# Of Grid: factors over the top level, refinements, steps of k; for grids with signs, and for those of IQ1. Of a grid of 2048 with two
# offsets each search takes twice as long, and more of them lowered the error by less than half a percent.
SEARCHES = {False: (np.geomspace(0.7, 2.2, 12), (1, 0.9, 1.1), (0, 1, -1)), True: (np.geomspace(0.8, 4, 14), (1,), (0,))}

NEED_IMPORTANCE = ("IQ1_S", "IQ2_XXS", "IQ2_XS")        # of no use without; llama.cpp's library ends the process then


@kernel
def quantize_to_grid(x, importance, blocks, grid):
    """Quantize rows to blocks of the type of a Grid (see rows.py)."""
    memory, size = np.empty(work_bytes(), np.uint8), blocks.shape[1] // (x.shape[1] // 256)
    for row in range(x.shape[0]):
        work = work_at(grid, align(address(memory)))        # in the loop: numba frees an array after its last use
        for i in range(x.shape[1] // 256):
            weights = address(importance) + 1024 * i if importance.size else 0
            d = choose(address(x[row]) + 1024 * i, weights, grid, work)
            store_block(grid, work, d, blocks[row, i * size:(i + 1) * size])


@functools.cache
def by_halves(name):
    """The grid of a type as grid_search.nearest_entries() takes it.

    Returns its levels, float32, and starts, lows, highs and entries of Grid.
    """
    values = grid(name)
    levels = np.unique(values)
    codes, n = np.searchsorted(levels, values), values.shape[1] // 2
    first, second = (half @ len(levels) ** np.arange(n)[::-1] for half in (codes[:, :n], codes[:, n:]))
    lists = [np.flatnonzero(second == high) for high in np.unique(second)]
    lists.sort(key=len)         # loops of equal length one after another, whose ends a CPU foresees
    order = np.concatenate(lists)
    entries = np.zeros(1 << 14, np.int64)
    entries[128 * second + first] = np.arange(len(values))
    starts = np.concatenate([[0], np.cumsum([len(part) for part in lists])])
    return levels.astype(np.float32), starts, ROW * first[order], ROW * second[[part[0] for part in lists]], entries


def tables(name):
    """The Grid of a type, as the only argument after the rows."""
    levels, starts, lows, highs, entries = by_halves("IQ1_S" if name == "IQ1_M" else name)
    sub, shared, bits, signs, unit = SHAPES[name]
    offsets = np.float32([EIGHTH, -EIGHTH] if signs == NO_SIGNS else [0])
    factors, refinements, steps = SEARCHES[signs == NO_SIGNS]
    return (Grid(NAMES.index(name), grid(name).shape[1], sub, shared, bits, signs, np.float32(unit), levels, offsets, starts, lows, highs,
                 entries, np.float32(factors * (levels[-1] + offsets[0])), np.float32(refinements), np.int64(steps)),)


QUANTIZERS = {name: quantizer(name, quantize_to_grid, functools.partial(tables, name), name in NEED_IMPORTANCE) for name in NAMES}
