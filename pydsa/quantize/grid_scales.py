"""The scales of a superblock of 256 weights, and its entries of a grid.

A scale of a sub-block is d unit (2 k + 1), with one d. Scales that suit each sub-block alone come first: of several, that which leaves the
least error after a fit by least squares, first with numbers rounded one by one, then with entries. Then d is chosen, with which the k come
nearest to those scales. Last, entries for that k and its neighbours, and d is fitted to them.
"""
import numpy as np

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.scalars import half, to_half
from pydsa.quantize.grid_search import INFINITE
from pydsa.quantize.grid_work import (EVEN_SIGNS, FIRST, FIT, FIT_SQUARES, GAIN, ONE, PEAK, SCALE, SQUARES, ZERO, even_signs, fit,
                                      fit_rounded, load, search, spread_inverses)

LARGEST_HALF, SMALLEST_NORMAL_HALF = np.float32(65504), np.float32(2.0 ** -14)


@inner
def start_choice(subs):
    """Forget which scales were best."""
    for j in range(subs.shape[1]):
        subs[GAIN, j] = ZERO


@inner
def keep_better(subs):
    """Keep the scales that fit better than those before, by least squares."""
    for j in range(subs.shape[1]):
        products, squares = subs[FIT, j], subs[FIT_SQUARES, j]
        if products > ZERO and squares > ZERO and products * products > subs[GAIN, j] * squares:
            subs[GAIN, j], subs[SCALE, j], subs[SQUARES, j] = products * products / squares, products / squares, squares


@inner
def find_peaks(grid, work):
    """Find the greatest magnitude of each sub-block."""
    x, subs, g = work.x, work.subs, 0
    for j in range(subs.shape[1]):
        peak = ZERO
        for _ in range(grid.sub // grid.group):
            for i in range(grid.group):
                peak = max(peak, abs(x[i, g]))
            g += 1
        subs[PEAK, j], subs[SCALE, j], subs[SQUARES, j] = peak, ZERO, ZERO


@inner
def find_scales(grid, work):
    """Find the scale that suits each sub-block alone."""
    subs, levels, even = work.subs, grid.levels, grid.signs == EVEN_SIGNS
    find_peaks(grid, work)
    if even:
        spread_inverses(subs[PEAK], levels[levels.size - 1], work)
        even_signs(grid, work)
    start_choice(subs)
    for factor in grid.factors:
        spread_inverses(subs[PEAK], factor, work)
        fit_rounded(grid, work)
        keep_better(subs)
    for j in range(subs.shape[1]):
        subs[FIRST, j] = subs[SCALE, j]
    if even:
        spread_inverses(subs[FIRST], ONE, work)
        even_signs(grid, work)
    start_choice(subs)
    for factor in grid.refinements:
        spread_inverses(subs[FIRST], factor, work)
        search(grid, work)
        fit(grid, work)
        keep_better(subs)


@inner
def nearest_k(scale, unit, high):
    """The k up to high with which unit (2 k + 1) is nearest to a scale."""
    k = np.int64((scale / unit) * np.float32(0.5))      # 2 k + 1 is the odd number below the scale over the unit, or next to it
    return min(k, high)


@inner
def choose_d(grid, work, peak):
    """Choose d for the scales in work: float16 bits.

    peak: what the weights were divided by.
    """
    subs, high, top, best, least = work.subs, (1 << grid.bits) - 1, ZERO, np.uint16(0), INFINITE
    for j in range(subs.shape[1]):
        top = max(top, subs[SCALE, j])
    subnormal = top * peak < SMALLEST_NORMAL_HALF * grid.unit * np.float32(2 * high + 1)
    for k in range(high, -1 if subnormal else high // 2, -1):      # a small d has few bits: a larger one and a lower k can come nearer
        bits = to_half(min(top * peak / (grid.unit * np.float32(2 * k + 1)), LARGEST_HALF))
        unit, error = half(bits) * grid.unit / peak, ZERO
        if unit > ZERO:
            for j in range(subs.shape[1]):
                off = subs[SCALE, j] - unit * np.float32(2 * nearest_k(subs[SCALE, j], unit, high) + 1)
                error += off * off * subs[SQUARES, j]
            if error < least:
                best, least = bits, error
    return best


@inner
def keep_cheaper(grid, work, step):
    """Keep k and entries of the sub-blocks that cost less than before."""
    subs, k, codes, offset, costs, high = work.subs, work.k, work.codes, work.offset, work.costs, (1 << grid.bits) - 1
    kept_k, kept_codes, kept_offset = work.kept_k, work.kept_codes, work.kept_offset
    start, per_sub = 0, grid.sub // grid.group
    for j in range(subs.shape[1]):
        cost = ZERO
        for g in range(start, start + per_sub):
            cost += costs[0, g]
        cost *= subs[SCALE, j] * subs[SCALE, j]
        if cost < subs[GAIN, j]:
            subs[GAIN, j], kept_k[j] = cost, min(max(k[j] + step, 0), high)
            for g in range(start, start + per_sub):
                kept_codes[g], kept_offset[0, g] = codes[g], offset[0, g]
        start += per_sub


@inner
def choose_entries(grid, work, unit):
    """Choose k and entries of each sub-block, for scales unit (2 k + 1)."""
    subs, k, high = work.subs, work.k, (1 << grid.bits) - 1
    for j in range(k.size):
        k[j], subs[GAIN, j] = nearest_k(subs[SCALE, j], unit, high), INFINITE
    for step in grid.steps:
        for j in range(k.size):
            subs[SCALE, j] = unit * np.float32(2 * min(max(k[j] + step, 0), high) + 1)
        spread_inverses(subs[SCALE], ONE, work)
        if step == 0 and grid.signs == EVEN_SIGNS:
            even_signs(grid, work)
        search(grid, work)
        keep_cheaper(grid, work, step)
    for j in range(k.size):
        k[j] = work.kept_k[j]
    for g in range(work.offset.size):
        work.codes[g], work.offset[0, g] = work.kept_codes[g], work.kept_offset[0, g]


@inner
def fit_d(grid, work, bits, peak):
    """Fit d to the k and entries that were chosen, by least squares."""
    subs, k, products, squares = work.subs, work.k, ZERO, ZERO
    fit(grid, work)
    for j in range(k.size):
        factor = grid.unit * np.float32(2 * k[j] + 1)
        products, squares = products + subs[FIT, j] * factor, squares + subs[FIT_SQUARES, j] * factor * factor
    return to_half(min(products / squares * peak, LARGEST_HALF)) if products > ZERO else bits


@inner
def choose(source, importance, grid, work):
    """Quantize 256 weights: to k, codes, offset and signs of work, and d.

    source, importance: addresses, the second 0 where there is none. Returns d, float16 bits.
    """
    peak, bits = load(source, importance, grid, work), np.uint16(0)
    if peak > ZERO:
        find_scales(grid, work)
        bits = choose_d(grid, work, peak)
    unit = half(bits) * grid.unit / peak
    if unit > ZERO:
        choose_entries(grid, work, unit)
        return fit_d(grid, work, bits, peak)
    for j in range(work.k.size):
        work.k[j] = 0
    for g in range(work.offset.size):
        work.codes[g], work.offset[0, g] = grid.lows[0] >> 7 | grid.highs[0], grid.offsets[0]
    for eight in range(32):
        work.signs[eight] = work.changed[eight] = 0
    return np.uint16(0)
