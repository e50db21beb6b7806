"""The scales of a superblock of 256 weights, and its entries of a grid.

A scale of a sub-block is d unit (2 k + 1), with one d. Scales that suit each sub-block alone come first: of several, that which leaves the
least error after a fit by least squares, first with numbers rounded one by one, then with entries. Then d is chosen, with which the k come
nearest to those scales. Last, entries for that k and its neighbours, and d is fitted to them.
"""
import numpy as np

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.scalars import half, to_half
from pydsa.quantization.grid_search import INFINITE
from pydsa.quantization.grid_work import (EVEN_SIGNS, FIRST, FIT, FIT_SQUARES, GAIN, ONE, PEAK, SCALE, SQUARES, ZERO, even_signs, fit,
                                          fit_rounded, load, search, spread_inverses)

LARGEST_HALF = np.float32(65504)


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
def guess_scales(grid, work):
    """Find scales that suit each sub-block alone, by rounding: FIRST."""
    subs, levels = work.subs, grid.levels
    find_peaks(grid, work)
    if grid.signs == EVEN_SIGNS:
        spread_inverses(subs[PEAK], levels[levels.size - 1], work)
        even_signs(grid, work)
    start_choice(subs)
    for factor in grid.factors:
        spread_inverses(subs[PEAK], factor, work)
        fit_rounded(grid, work)
        keep_better(subs)
    for j in range(subs.shape[1]):
        subs[FIRST, j] = subs[SCALE, j]
    start_choice(subs)


@inner
def nearest_k(scale, unit, high):
    """The k up to high with which unit (2 k + 1) is nearest to a scale."""
    return np.int64(min(scale / unit * np.float32(0.5), np.float32(high)))      # rounded down, as 2 k + 1 is halfway from 2 k to 2 k + 2


@inner
def choose_d(grid, work, peak):
    """Choose d for the scales in work: float16 bits.

    peak: what the weights were divided by.
    """
    subs, high, top, best, least = work.subs, (1 << grid.bits) - 1, ZERO, np.uint16(0), INFINITE
    for j in range(subs.shape[1]):
        top = max(top, subs[SCALE, j])
    for k in range(high, -1, -1):       # that of the largest scale; a low one suits a tiny d, which has few bits, and blocks without high k
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
def choose_k(grid, work, unit):
    """Choose the nearest k for the scales in work."""
    subs, k, high = work.subs, work.k, (1 << grid.bits) - 1
    for j in range(k.size):
        k[j], subs[GAIN, j] = nearest_k(subs[SCALE, j], unit, high), INFINITE


@inner
def step_scales(grid, work, unit, step):
    """Set the scales to those of k + step."""
    subs, k, high = work.subs, work.k, (1 << grid.bits) - 1
    for j in range(k.size):
        subs[SCALE, j] = unit * np.float32(2 * min(max(k[j] + step, 0), high) + 1)
    spread_inverses(subs[SCALE], ONE, work)


@inner
def take_kept(work):
    """Bring back the k and entries that were kept."""
    for j in range(work.k.size):
        work.k[j] = work.kept_k[j]
    for g in range(work.offset.size):
        work.codes[g], work.offset[0, g] = work.kept_codes[g], work.kept_offset[0, g]


@inner
def fit_d(grid, work, bits, peak):
    """Fit d to the k and entries that were chosen, by least squares."""
    subs, k, products, squares = work.subs, work.k, ZERO, ZERO
    for j in range(k.size):
        factor = grid.unit * np.float32(2 * k[j] + 1)
        products, squares = products + subs[FIT, j] * factor, squares + subs[FIT_SQUARES, j] * factor * factor
    return to_half(min(products / squares * peak, LARGEST_HALF)) if products > ZERO else bits


@inner
def choose_nothing(grid, work):
    """Put zeros to work, for a d of 0."""
    for j in range(work.k.size):
        work.k[j] = 0
    for g in range(work.offset.size):
        work.codes[g], work.offset[0, g] = grid.lows[0] >> 7 | grid.highs[0], grid.offsets[0]
    for eight in range(32):
        work.signs[eight] = work.changed[eight] = 0


@inner
def choose(source, importance, grid, work):
    """Quantize 256 weights: to k, codes, offset and signs of work, and d.

    source, importance: addresses, the second 0 where there is none. Returns d, float16 bits. There is one loop for what is tried with
    entries, as their search takes long to compile: refinements of the scales, then steps of k, then a fit.
    """
    peak, bits, unit, n, n_steps = load(source, importance, grid, work), np.uint16(0), ZERO, grid.refinements.size, grid.steps.size
    if peak > ZERO:
        guess_scales(grid, work)
    for i in range(n + n_steps + 1):
        if i == n and peak > ZERO:
            bits = choose_d(grid, work, peak)
            unit = half(bits) * grid.unit / peak
            choose_k(grid, work, unit)
        if peak == ZERO or i >= n and unit == ZERO:
            choose_nothing(grid, work)
            return np.uint16(0)
        if i < n:
            spread_inverses(work.subs[FIRST], grid.refinements[i], work)
        elif i < n + n_steps:
            step_scales(grid, work, unit, grid.steps[i - n])
        else:
            take_kept(work)
        if (i == 0 or i == n) and grid.signs == EVEN_SIGNS:
            even_signs(grid, work)
        if i < n + n_steps:
            search(grid, work)
        if n <= i < n + n_steps:
            keep_cheaper(grid, work, grid.steps[i - n])
        else:
            fit(grid, work)
            if i < n:
                keep_better(work.subs)
    return fit_d(grid, work, bits, peak)
