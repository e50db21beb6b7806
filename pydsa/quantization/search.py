"""Scales of a group of weights: sixteen candidates at a time, one in each lane of a vector.

A group is n float32 weights at an address, with the weights of their errors (the importance of their columns) at another. For each
candidate the codes are those that are nearest; the scale that fits the codes best follows by least squares, and with it the error.
"""
import numpy as np

from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.vectors.simd import float_at, floats, multiply_add
from pydsa.quantization.vectors import best, greatest, lane, lanes, least, looked_up, quotient, rint, where_greater
from pydsa.quants import IQ4_LEVELS

BINS = 512      # of a table of levels: bin i holds what is from i / 2 - 128 on; all thresholds between levels are multiples of 1/2
TINY, EPSILON = np.float32(1e-30), np.float32(1e-5)
NEAR = lanes(np.linspace(-1, 1, 16))        # candidates around one that is known, in units of half the range
NUMBERS = lanes(range(16))


@inline
def clamped(v, low, high):
    """The nearest codes to v in a range."""
    return least(greatest(rint(v), low), high)


@inner
def extremes(x, n):
    """The least and the greatest of n weights."""
    low = high = float_at(x, 0)
    for j in range(1, n):
        value = float_at(x, 4 * j)
        low, high = min(low, value), max(high, value)
    return low, high


@inline
def best_scale(xq, qq):
    """Of sixteen scales x.q / q.q, the one that explains most of x.

    xq, qq: weighted sums for each candidate of codes q. Returns 0 if none explains anything.
    """
    qq = greatest(qq, TINY)
    scales = quotient(xq, qq)
    return lane(scales, best(scales * xq))


@inner
def fit_scale(x, w, n, inverses, low, high):
    """The best scale of x ~ scale * code, codes from low to high.

    inverses: candidates of 1 / scale. Returns 0 if none explains anything.
    """
    xq, qq = floats(np.float32(0)), floats(np.float32(0))
    for j in range(n):
        value, weight = float_at(x, 4 * j), float_at(w, 4 * j)
        q = clamped(inverses * value, low, high)
        weighted = q * weight
        xq = multiply_add(xq, weighted, floats(value))
        qq = multiply_add(qq, weighted, q)
    return best_scale(xq, qq)


@inner
def fit_scale_and_minimum(x, w, n, inverses, minimum, high, most):
    """The best scale and minimum of x ~ scale * code + minimum.

    Codes go from 0 to high. inverses: candidates of 1 / scale, which count from `minimum`. most: the minimum is 0 where it would be more.
    Returns scale, minimum.
    """
    zero = floats(np.float32(0))
    q1, q2, xq, w1, x1 = zero, zero, zero, np.float32(0), np.float32(0)
    for j in range(n):
        value, weight = float_at(x, 4 * j), float_at(w, 4 * j)
        q = clamped(inverses * (value - minimum), np.float32(0), high)
        weighted = q * weight
        q1 = q1 + weighted
        q2 = multiply_add(q2, weighted, q)
        xq = multiply_add(xq, weighted, floats(value))
        w1 += weight
        x1 += weight * value
    product = q2 * w1
    determinant = product - q1 * q1
    one_code = greatest(product * EPSILON, TINY)        # all codes are the same where the determinant is below this
    scales, minima = quotient(xq * w1 - q1 * x1, determinant), quotient(q2 * x1 - q1 * xq, determinant)
    scales = where_greater(determinant, one_code, scales, zero)
    minima = where_greater(determinant, one_code, minima, floats(x1 / w1))
    alone = quotient(xq, greatest(q2, TINY))
    scales, minima = where_greater(minima, floats(most), alone, scales), where_greater(minima, floats(most), zero, minima)
    i = best(scales * xq + minima * x1)
    return lane(scales, i), lane(minima, i)


COARSE, FINE = lanes(np.linspace(-0.9, 1.8, 16)), lanes(np.linspace(-0.45, 0.45, 16))       # codes more than there are


@inner
def fit_line(x, w, n, low, high, top, most):
    """The best scale and minimum of n weights from low to high.

    There are two rounds of fit_scale_and_minimum().
    """
    scale, minimum, one, step = (high - low) / top, low, floats(np.float32(1)), np.float32(1) / top
    if scale < TINY:
        return np.float32(0), minimum
    scale, minimum = fit_scale_and_minimum(x, w, n, (COARSE() * step + one) * (np.float32(1) / scale), minimum, top, most)
    if scale < TINY:
        return np.float32(0), minimum
    return fit_scale_and_minimum(x, w, n, (FINE() * step + one) * (np.float32(1) / scale), minimum, top, most)


@inner
def errors_of_scales(x, w, n, scales, low, high):
    """The errors with each of sixteen scales: the sums of w (x - scale * code)^2."""
    inverses, sums = safe_inverses(scales), floats(np.float32(0))
    for j in range(n):
        value = float_at(x, 4 * j)
        rest = scales * clamped(inverses * value, low, high) - value
        sums = multiply_add(sums, rest * float_at(w, 4 * j), rest)
    return sums


@inner
def errors_of_minima(x, w, n, scales, minima, high):
    """The errors with each of sixteen scales and minima."""
    inverses, sums = safe_inverses(scales), floats(np.float32(0))
    for j in range(n):
        value = floats(float_at(x, 4 * j)) - minima
        rest = scales * clamped(inverses * value, np.float32(0), high) - value
        sums = multiply_add(sums, rest * float_at(w, 4 * j), rest)
    return sums


@inline
def safe_inverses(scales):
    """1 / scale in each lane, 0 where the scale is 0."""
    return quotient(scales, greatest(scales * scales, TINY))


@inner
def scale_by_peak(x, w, n, steps, low, high):
    """fit_scale() with candidates by the weight of largest magnitude.

    steps: codes, one a lane, to which that weight is mapped.
    """
    least_x, most_x = extremes(x, n)
    peak = least_x if -least_x > most_x else most_x
    if abs(peak) < TINY:
        return np.float32(0)
    return fit_scale(x, w, n, steps * (np.float32(1) / peak), low, high)


@inner
def refined_scale(x, w, n, scale, width, low, high):
    """fit_scale() with candidates around a scale.

    They go from 1 - width to 1 + width of it.
    """
    if abs(scale) < TINY:
        return scale
    return fit_scale(x, w, n, (NEAR() * width + floats(np.float32(1))) * (np.float32(1) / scale), low, high)


@inner
def column_weights(importance, k):
    """The importance of k columns; ones where there is none."""
    return importance if importance.size else np.ones(k, np.float32)


def level_table():
    """Make the table for looked_up(), the only item of a tuple.

    It has the nearest IQ4 level of each of 512 bins of -128 to 128, then the codes of these.
    """
    levels = np.float32(IQ4_LEVELS)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, np.arange(BINS) / 2 - 128, side="right")
    return np.concatenate([levels[codes], np.float32(codes)]),


@inline
def bins(v):
    """The bins of v in a table of levels."""
    return least(greatest(v * np.float32(2) + np.float32(BINS // 2), np.float32(0)), np.float32(BINS - 1))


@inline
def level_codes(v, table):
    """The codes of the IQ4 levels nearest to v."""
    return looked_up(table + 4 * BINS, bins(v))


@inner
def fit_level_scale(x, w, n, inverses, table):
    """The best scale of x ~ scale * level, the levels those of IQ4."""
    xq, qq = floats(np.float32(0)), floats(np.float32(0))
    for j in range(n):
        value, weight = float_at(x, 4 * j), float_at(w, 4 * j)
        q = looked_up(table, bins(inverses * value))
        weighted = q * weight
        xq = multiply_add(xq, weighted, floats(value))
        qq = multiply_add(qq, weighted, q)
    return best_scale(xq, qq)


@inner
def errors_of_levels(x, w, n, scales, table):
    """The errors with each of sixteen scales of IQ4 levels."""
    inverses, sums = safe_inverses(scales), floats(np.float32(0))
    for j in range(n):
        value = float_at(x, 4 * j)
        rest = scales * looked_up(table, bins(inverses * value)) - value
        sums = multiply_add(sums, rest * float_at(w, 4 * j), rest)
    return sums
