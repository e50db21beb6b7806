"""Quantize to TQ1_0, TQ2_0, Q1_0 and NVFP4.

Blocks of TQ1_0 and TQ2_0 are 256 numbers from -d, 0, d; of Q1_0, 128 from -d, d. In a block of NVFP4 each 16 of 64 numbers have a scale in
eight bits, an unsigned float with four bits of exponent and three of fraction, and the levels of MXFP4. Scales are those of the least
weighted error. There is no scale above those, so that NVFP4 has few for numbers of magnitudes below 0.1.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.jit import inline, inner, kernel
from pydsa.backends.cpu.vectors.scalars import half
from pydsa.backends.cpu.vectors.simd import floats, load_floats, max_abs_lanes, multiply_add, reduce_max_abs, store
from pydsa.quantization.legacy import inverse, mxfp4_codes, mxfp4_error, nearest_half, scale_half
from pydsa.quantization.rows import quantizer
from pydsa.quantization.search import column_weights
from pydsa.quantization.vectors import greatest, lanes_from, store_bytes, total, truncate, where_greater

ZERO, ONE = np.float32(0), np.float32(1)
VECTOR = 64             # bytes of sixteen floats
START, RATIO, TRIED = np.float32(0.5), np.float32(0.7), 8       # which parts of the greatest magnitude are tried as d / 2
PASSES = 3              # of d / 2 as the threshold, and d as the mean above it
BYTE = np.float32(256 / 243)


@inner
def peak_of(x, n):
    """The greatest magnitude of n vectors of sixteen floats at an address."""
    top = load_floats(x, 0)
    for i in range(1, n):
        top = max_abs_lanes(top, load_floats(x, VECTOR * i))
    return reduce_max_abs(top, top)


@inline
def magnitudes(x, i, factor):
    """Load |x| factor of vector i; the factor is positive."""
    v = load_floats(x, VECTOR * i) * factor
    return greatest(v, v * -ONE)


@inline
def add_above(sums, magnitude, weight, threshold):
    """Add w |x| and w, where |x| is above a threshold, to a pair of sums."""
    weight = where_greater(magnitude, threshold, weight, floats(ZERO))
    return multiply_add(sums[0], magnitude, weight), sums[1] + weight


@inline
def better(sums, gain, d):
    """The gain and d of sums, or those before if they gain more.

    A gain is by how much the sum of squared errors is less than with d = 0.
    """
    products, weights = total(sums[0]), total(sums[1])
    if products * products > gain * weights:
        return products * products / weights, products / weights
    return gain, d


@inner
def fit_ternary(x, w, n):
    """The d with which -d, 0 and d come nearest to n vectors of weights.

    x and w are addresses of n vectors of sixteen floats.
    """
    peak, d, gain, zeros = peak_of(x, n), ZERO, ZERO, (floats(ZERO), floats(ZERO))
    factor, threshold = inverse(peak), START
    for _ in range(TRIED // 4):
        sums_a, sums_b, sums_c, sums_d = zeros, zeros, zeros, zeros
        a, b, c = floats(threshold), floats(threshold * RATIO), floats(threshold * (RATIO * RATIO))
        last = floats(threshold * (RATIO * RATIO * RATIO))
        for i in range(n):
            magnitude, weight = magnitudes(x, i, factor), load_floats(w, VECTOR * i)
            sums_a, sums_b = add_above(sums_a, magnitude, weight, a), add_above(sums_b, magnitude, weight, b)
            sums_c, sums_d = add_above(sums_c, magnitude, weight, c), add_above(sums_d, magnitude, weight, last)
        for sums in (sums_a, sums_b, sums_c, sums_d):
            gain, d = better(sums, gain, d)
        threshold *= RATIO * RATIO * RATIO * RATIO
    for _ in range(PASSES):
        sums, half_d = zeros, floats(START * d)
        for i in range(n):
            sums = add_above(sums, magnitudes(x, i, factor), load_floats(w, VECTOR * i), half_d)
        gain, d = better(sums, gain, d)
    return d * peak


@inline
def digits(x, at, threshold):
    """The digits 0, 1, 2 of sixteen weights, for -d, 0, d."""
    v = load_floats(x, 4 * at)
    up = where_greater(v, floats(threshold), floats(np.float32(2)), floats(ONE))
    return where_greater(floats(-threshold), v, floats(ZERO), up)


@inline
def fraction(value):
    """Five digits to base 3 as a fraction of 256, rounded up."""
    return truncate(multiply_add(floats(np.float32(242.5 / 243)), value, floats(BYTE)))


@kernel
def quantize_tq1_0(x, importance, blocks):
    """Five digits a byte: 32 apart, then 16 apart; the last 16 four a byte."""
    source, target, k = address(x), address(blocks), x.shape[1]
    weights, last = column_weights(importance, k), np.empty(16, np.float32)
    for i in range(x.size // 256):
        at, to = source + 1024 * i, target + 54 * i
        d = scale_half(fit_ternary(at, address(weights) + 4 * (256 * i % k), 16))
        threshold = half(d) * np.float32(0.5)
        for first, step, byte in ((0, 32, 0), (16, 32, 16), (160, 16, 32)):
            value = digits(at, first, threshold)
            for j in range(1, 5):
                value = multiply_add(digits(at, first + step * j, threshold), value, floats(np.float32(3)))
            store_bytes(to, byte, fraction(value))
        store(address(last), 0, digits(at, 240, threshold))
        for j in range(4):
            value = 81 * np.int64(last[j]) + 27 * np.int64(last[4 + j]) + 9 * np.int64(last[8 + j]) + 3 * np.int64(last[12 + j])
            store(to, 48 + j, np.uint8((value * 256 + 242) // 243))
        store(to, 52, d)


@kernel
def quantize_tq2_0(x, importance, blocks):
    """Four digits a byte, 32 apart."""
    source, target, k = address(x), address(blocks), x.shape[1]
    weights = column_weights(importance, k)
    for i in range(x.size // 256):
        at, to = source + 1024 * i, target + 66 * i
        d = scale_half(fit_ternary(at, address(weights) + 4 * (256 * i % k), 16))
        threshold = half(d) * np.float32(0.5)
        for part in range(4):
            first = 128 * (part // 2) + 16 * (part % 2)
            value = digits(at, first + 96, threshold)
            for j in range(2, -1, -1):
                value = multiply_add(digits(at, first + 32 * j, threshold), value, floats(np.float32(4)))
            store_bytes(to, 16 * part, value)
        store(to, 64, d)


@kernel
def quantize_q1_0(x, importance, blocks):
    """A bit for each sign; d is the mean magnitude."""
    source, target, k = address(x), address(blocks), x.shape[1]
    weights = column_weights(importance, k)
    for i in range(x.size // 128):
        at, to, w = source + 512 * i, target + 18 * i, address(weights) + 4 * (128 * i % k)
        peak, sums = peak_of(at, 8), (floats(ZERO), floats(ZERO))
        factor = inverse(peak)
        for j in range(8):
            sums = add_above(sums, magnitudes(at, j, factor), load_floats(w, VECTOR * j), floats(-ONE))
        store(to, 0, nearest_half(total(sums[0]) / total(sums[1]) * peak))
        for j in range(8):
            store(to, 2 + 2 * j, lanes_from(load_floats(at, VECTOR * j), ZERO))


@inner
def best_scale(x, w, scales):
    """The number of the scale that suits sixteen weights best.

    scales: float32 [127], ascending. Those are tried that map the greatest magnitude between the second level from the top and a half
    above the top; where they are few, more.
    """
    v, weight = load_floats(x, 0), load_floats(w, 0)
    peak = reduce_max_abs(v, v)
    low, high = 1, scales.size - 1
    while low < high:       # the first scale of at least a seventeenth of the peak: 17 is about 1.4 times the top level
        middle = (low + high) // 2
        if scales[middle] * np.float32(17) < peak:
            low = middle + 1
        else:
            high = middle
    found, lowest = low, np.float32(np.inf)
    for c in range(low, scales.size):
        factor = ONE / scales[c]
        error = total(mxfp4_error(v, weight, factor, scales[c]))
        if error < lowest:
            found, lowest = c, error
        if scales[c] * np.float32(7.5) > peak and (c >= 8 or scales[c] > peak):
            break
    return found


@kernel
def quantize_nvfp4(x, importance, blocks, scales):
    """Four scales, then nibbles: numbers j and j + 8 of each 16 share a byte."""
    source, target, k = address(x), address(blocks), x.shape[1]
    weights, codes = column_weights(importance, k), np.empty(16, np.float32)
    for i in range(x.size // 16):
        at, to = source + 64 * i, target + 36 * (i // 4)
        scale = best_scale(at, address(weights) + 4 * (16 * i % k), scales)
        store(to, i % 4, np.uint8(scale))
        store(address(codes), 0, mxfp4_codes(load_floats(at, 0) * (ONE / scales[scale])))
        for j in range(8):
            store(to, 4 + 8 * (i % 4) + j, np.uint8(codes[j] + np.float32(16) * codes[j + 8]))


def nvfp4_scales():
    """The scales of the codes 0 to 126, half of what they stand for.

    The levels of MXFP4 are doubled.
    """
    exponent, fraction_ = np.divmod(np.arange(127), 8)
    values = np.where(exponent == 0, fraction_ * 2.0 ** -9, (8 + fraction_) * 2.0 ** (exponent - 10))
    return (values / 2).astype(np.float32),


QUANTIZERS = {"TQ1_0": quantizer("TQ1_0", quantize_tq1_0), "TQ2_0": quantizer("TQ2_0", quantize_tq2_0),
              "Q1_0": quantizer("Q1_0", quantize_q1_0), "NVFP4": quantizer("NVFP4", quantize_nvfp4, nvfp4_scales)}
