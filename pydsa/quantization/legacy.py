"""Quantize to F32, F16, BF16 and the types with blocks of 32: Q4_0 to Q8_0, IQ4_NL, MXFP4."""
import numpy as np

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.jit import inline, inner, kernel
from pydsa.backends.cpu.vectors.scalars import bits_of_float, float_from_bits, half, to_half
from pydsa.backends.cpu.vectors.simd import floats, load_floats, multiply_add, reduce_max_abs, store
from pydsa.quantization.rows import quantizer
from pydsa.quantization.search import (TINY, clamped, column_weights, extremes, fit_level_scale, fit_line, level_codes, level_table,
                                       refined_scale, scale_by_peak)
from pydsa.quantization.vectors import (greatest, lanes, lanes_from, largest, least, rint, round_away, smallest, store_bytes, total,
                                        where_greater)

LARGEST_HALF = np.float32(65504)


@inner
def nearest_half(value):
    """The nearest finite float16, as bits."""
    return to_half(min(max(value, -LARGEST_HALF), LARGEST_HALF))


@inner
def scale_half(d):
    """A scale as float16 bits, finite and not 0 unless d is.

    Where codes are chosen for the scale, one that is too large is better than none.
    """
    bits = nearest_half(d)
    if bits & np.uint16(0x7FFF) or d == 0:
        return bits
    return np.uint16(bits | np.uint16(1))


@inner
def inverse(d):
    """1 / d, and 0 where that is not finite: weights that small are zeros."""
    return np.float32(1) / d if abs(d) > np.float32(3e-38) else np.float32(0)


@kernel
def quantize_f32(x, importance, blocks):
    source, target = address(x), address(blocks)
    for i in range(0, x.size // 16 * 16, 16):
        store(target, 4 * i, load_floats(source, 4 * i))
    for i in range(x.size // 16 * 16, x.size):
        store(target, 4 * i, x.reshape(-1)[i])


@kernel
def quantize_f16(x, importance, blocks):
    bits, values = blocks.view(np.uint16).reshape(-1), x.reshape(-1)
    for i in range(values.size):
        bits[i] = to_half(values[i])


@kernel
def quantize_bf16(x, importance, blocks):
    out, values = blocks.view(np.uint16).reshape(-1), x.reshape(-1)
    for i in range(values.size):
        bits = bits_of_float(values[i])
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@kernel
def quantize_q8_0(x, importance, blocks):
    """The largest magnitude becomes 127; the same blocks as llama.cpp's."""
    source, target = address(x), address(blocks)
    for i in range(x.size // 32):
        first, second = load_floats(source + 128 * i, 0), load_floats(source + 128 * i, 64)
        d = reduce_max_abs(first, second) / np.float32(127)
        factor, at = inverse(d), target + 34 * i
        store(at, 0, nearest_half(d))
        store_bytes(at, 2, round_away(first * factor))
        store_bytes(at, 18, round_away(second * factor))


@inner
def peak_of(first, second):
    """The weight of largest magnitude, signed."""
    low, high = smallest(least(first, second)), largest(greatest(first, second))
    return low if -low > high else high


@inner
def refitted(first, second, factor, low, high):
    """The scale that fits best the codes of weights times a factor."""
    a, b = clamped(first * factor, low, high), clamped(second * factor, low, high)
    return total(first * a + second * b) / max(total(a * a + b * b), TINY)


@inline
def store_nibbles(target, first, second):
    """Store codes 0 to 15 as the low and the high nibbles of 16 bytes."""
    store_bytes(target, 0, multiply_add(first, second, floats(np.float32(16))))


@inline
def store_codes(target, first, second, five):
    """Store codes 0 to 15, or 0 to 31: 4 bytes of fifth bits, then nibbles."""
    if five:
        store(target, 0, lanes_from(first, np.float32(16)))
        store(target, 2, lanes_from(second, np.float32(16)))
        top, middle = floats(np.float32(15.5)), np.float32(16)
        first, second = where_greater(first, top, first - middle, first), where_greater(second, top, second - middle, second)
        target += 4
    store_nibbles(target, first, second)


@inner
def quantize_signed(x, importance, blocks, half_range, steps, five):
    """Q4_0 and Q5_0: codes from -half_range on, by a search where there is importance, else fitted once."""
    source, target, weights, k = address(x), address(blocks), address(importance), x.shape[1]
    low, high, n_bytes = -half_range, half_range - np.float32(1), 22 if five else 18
    for i in range(x.size // 32):
        at, to = source + 128 * i, target + n_bytes * i
        first, second = load_floats(at, 0), load_floats(at, 64)
        if importance.size > 0:
            w = weights + 4 * (32 * i % k)
            scale = refined_scale(at, w, 32, scale_by_peak(at, w, 32, steps, low, high), np.float32(0.5) / half_range, low, high)
        else:
            scale = peak_of(first, second) / low
            scale = refitted(first, second, inverse(scale), low, high)
        bits = scale_half(scale)
        factor = inverse(half(bits))
        store(to, 0, bits)
        store_codes(to + 2, clamped(first * factor, low, high) + half_range, clamped(second * factor, low, high) + half_range, five)


@inner
def quantize_with_minimum(x, importance, blocks, top, five):
    """Q4_1 and Q5_1: codes from 0 to `top` and a minimum of any sign."""
    source, target, weights, k, n_bytes = address(x), address(blocks), address(importance), x.shape[1], 24 if five else 20
    for i in range(x.size // 32):
        at, to = source + 128 * i, target + n_bytes * i
        first, second = load_floats(at, 0), load_floats(at, 64)
        low, high = smallest(least(first, second)), largest(greatest(first, second))
        if importance.size > 0:
            scale, low = fit_line(at, weights + 4 * (32 * i % k), 32, low, high, top, np.float32(np.inf))
        else:
            scale, low = line_of(first, second, inverse((high - low) / top), low, top)
        bits, minimum = scale_half(scale), nearest_half(low)
        factor, low = inverse(half(bits)), half(minimum)
        store(to, 0, bits)
        store(to, 2, minimum)
        store_codes(to + 4, clamped((first - low) * factor, ZERO, top), clamped((second - low) * factor, ZERO, top), five)


@inner
def line_of(first, second, factor, minimum, top):
    """The scale and the minimum that fit best the codes of 32 weights."""
    a, b = clamped((first - minimum) * factor, ZERO, top), clamped((second - minimum) * factor, ZERO, top)
    q1, q2, x1, xq = total(a + b), total(a * a + b * b), total(first + second), total(first * a + second * b)
    determinant = np.float32(32) * q2 - q1 * q1
    if determinant < np.float32(0.5):       # all codes are the same
        return ZERO, x1 / np.float32(32)
    scale = (np.float32(32) * xq - q1 * x1) / determinant
    return scale, (x1 - scale * q1) / np.float32(32)


ZERO, EIGHT, FIFTEEN, SIXTEEN, THIRTY_ONE = np.float32([0, 8, 15, 16, 31])
STEPS_4, STEPS_5 = lanes(-8 - np.linspace(-1.3, 1, 16)), lanes(-16 - np.linspace(-1.6, 1.2, 16))


@kernel
def quantize_q4_0(x, importance, blocks):
    quantize_signed(x, importance, blocks, EIGHT, STEPS_4(), False)


@kernel
def quantize_q5_0(x, importance, blocks):
    quantize_signed(x, importance, blocks, SIXTEEN, STEPS_5(), True)


@kernel
def quantize_q4_1(x, importance, blocks):
    quantize_with_minimum(x, importance, blocks, FIFTEEN, False)


@kernel
def quantize_q5_1(x, importance, blocks):
    quantize_with_minimum(x, importance, blocks, THIRTY_ONE, True)


@kernel
def quantize_iq4_nl(x, importance, blocks, table):
    source, target, k, levels = address(x), address(blocks), x.shape[1], address(table)
    weights = column_weights(importance, k)
    for i in range(x.size // 32):
        at, to, w = source + 128 * i, target + 18 * i, address(weights) + 4 * (32 * i % k)
        low, high = extremes(at, 32)
        peak = low if -low > high else high
        scale = ZERO
        if abs(peak) > TINY:
            scale = fit_level_scale(at, w, 32, STEPS_IQ4() * (np.float32(1) / peak), levels)
        bits = nearest_half(scale)       # no level is 0
        factor = inverse(half(bits))
        store(to, 0, bits)
        store_nibbles(to + 2, level_codes(load_floats(at, 0) * factor, levels), level_codes(load_floats(at, 64) * factor, levels))


STEPS_IQ4 = lanes([*np.linspace(-136, -112, 11), *np.linspace(106, 124, 5)])


@inner
def mxfp4_level(v):
    """The nearest levels to v, of 0, 1, 2, 3, 4, 6, 8 and 12 with a sign."""
    a = greatest(v, v * np.float32(-1))
    a = where_greater(a, floats(np.float32(8)), least(rint(a * np.float32(0.25)) * np.float32(4), np.float32(12)),
                      where_greater(a, floats(np.float32(4)), rint(a * np.float32(0.5)) * np.float32(2), rint(a)))
    return where_greater(v, floats(ZERO), a, a * np.float32(-1))


@inner
def mxfp4_error(v, w, factor, scale):
    """The weighted squared errors of weights v in each lane."""
    rest = mxfp4_level(v * factor) * scale - v
    return rest * rest * w


@inner
def mxfp4_codes(v):
    """The codes of the nearest levels."""
    level = mxfp4_level(v)
    a = greatest(level, level * np.float32(-1))
    code = where_greater(a, floats(np.float32(9)), floats(np.float32(7)),
                         where_greater(a, floats(np.float32(4)), a * np.float32(0.5) + np.float32(2), a))
    return where_greater(level, floats(np.float32(-0.5)), code, code + EIGHT)


@kernel
def quantize_mxfp4(x, importance, blocks):
    """The best of three powers of two."""
    source, target, k = address(x), address(blocks), x.shape[1]
    weights = column_weights(importance, k)
    for i in range(x.size // 32):
        at, to, w = source + 128 * i, target + 17 * i, address(weights) + 4 * (32 * i % k)
        first, second, w1, w2 = load_floats(at, 0), load_floats(at, 64), load_floats(w, 0), load_floats(w, 64)
        top = reduce_max_abs(first, second)
        exponent = np.int64(bits_of_float(top) >> np.uint32(23))     # of a power of two below the largest weight, plus 127
        found, lowest = np.int64(0), np.float32(np.inf)
        for e in range(max(exponent - 3, 2), min(max(exponent, 3), 254)):
            scale = float_from_bits(np.uint32(e - 1) << np.uint32(23))      # half of 2^(e - 127), as levels are doubled
            factor = np.float32(1) / scale
            error = total(mxfp4_error(first, w1, factor, scale) + mxfp4_error(second, w2, factor, scale))
            if error < lowest:
                found, lowest = e, error
        factor = np.float32(1) / float_from_bits(np.uint32(max(found, 2) - 1) << np.uint32(23))
        store(to, 0, np.uint8(found))
        store_nibbles(to + 1, mxfp4_codes(first * factor), mxfp4_codes(second * factor))


QUANTIZERS = {
    "F32": quantizer("F32", quantize_f32), "F16": quantizer("F16", quantize_f16), "BF16": quantizer("BF16", quantize_bf16),
    "Q8_0": quantizer("Q8_0", quantize_q8_0), "Q4_0": quantizer("Q4_0", quantize_q4_0), "Q4_1": quantizer("Q4_1", quantize_q4_1),
    "Q5_0": quantizer("Q5_0", quantize_q5_0), "Q5_1": quantizer("Q5_1", quantize_q5_1),
    "IQ4_NL": quantizer("IQ4_NL", quantize_iq4_nl, level_table), "MXFP4": quantizer("MXFP4", quantize_mxfp4),
}
