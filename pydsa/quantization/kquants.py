"""Quantize to Q2_K to Q6_K and IQ4_XS: superblocks of 256 weights, in groups whose scales are integers times a scale of all.

First each group gets the scale (and minimum) that is best for it, then all get the scale of the superblock, and last each gets those
integers near its own for which its error, with the codes that follow, is least.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.jit import inline, inner, kernel
from pydsa.backends.cpu.vectors.scalars import half
from pydsa.backends.cpu.vectors.simd import float_at, floats, load_floats, multiply_add, store, u8_at
from pydsa.quantization.legacy import inverse, scale_half, store_nibbles
from pydsa.quantization.rows import quantizer
from pydsa.quantization.search import (NUMBERS, TINY, clamped, column_weights, errors_of_levels, errors_of_minima, errors_of_scales,
                                       extremes, fit_level_scale, fit_line, level_codes, level_table, refined_scale, scale_by_peak)
from pydsa.quantization.vectors import best, greatest, lane, lanes, least, store_bytes, truncate, where_greater
from pydsa.quants import TYPES

ZERO, ONE, FOUR, SIXTEEN = np.float32([0, 1, 4, 16])
BYTES = {name: TYPES[name].n_bytes for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")}
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS = BYTES.values()

# Memory of a superblock, in bytes: scales and minima of up to sixteen groups, the integers that stand for them, and 256 codes
SCALES, MINIMA, SCALE_CODES, MINIMUM_CODES, CODES, MEMORY = 0, 64, 128, 192, 256, 1280


@inner
def fit_minima(x, w, n, top, memory):
    """The best scale and minimum of each group of n weights.

    A minimum is what is subtracted. Returns the greatest scale, the greatest minimum.
    """
    most_scale = most_minimum = ZERO
    for i in range(256 // n):
        at = x + 4 * n * i
        low, high = extremes(at, n)
        scale, minimum = fit_line(at, w + 4 * n * i, n, min(low, ZERO), max(high, ZERO), top, ZERO)
        scale, minimum = max(scale, ZERO), max(-minimum, ZERO)
        store(memory, SCALES + 4 * i, scale)
        store(memory, MINIMA + 4 * i, minimum)
        most_scale, most_minimum = max(most_scale, scale), max(most_minimum, minimum)
    return most_scale, most_minimum


# Codes near those of a scale and a minimum: fifteen pairs, the first twice
NEAR_SCALES, NEAR_MINIMA = lanes([0] * 6 + [-1] * 5 + [1] * 5), lanes([0, *range(-2, 3)] + [*range(-2, 3)] * 2)


@inner
def choose_codes(x, w, n, top, d, dmin, most, memory):
    """For each group the codes of its scale, its minimum and its weights."""
    by_scale, by_minimum = inverse(d), inverse(dmin)
    for i in range(256 // n):
        at = x + 4 * n * i
        scale_code = floats(np.rint(float_at(memory, SCALES + 4 * i) * by_scale))
        minimum_code = floats(np.rint(float_at(memory, MINIMA + 4 * i) * by_minimum))
        if most > np.float32(15):
            scale_codes = least(greatest(scale_code + NEAR_SCALES(), ZERO), most)
            minimum_codes = least(greatest(minimum_code + NEAR_MINIMA(), ZERO), most)
            k = best(errors_of_minima(at, w + 4 * n * i, n, scale_codes * d, minimum_codes * -dmin, top) * -ONE)
            scale, minimum = lane(scale_codes, k), lane(minimum_codes, k)
        else:
            scale = minimum = ZERO
            lowest = np.float32(np.inf)
            for step in range(-1, 2):
                minima = least(greatest(minimum_code + np.float32(step), ZERO), most)
                errors = errors_of_minima(at, w + 4 * n * i, n, NUMBERS() * d, minima * -dmin, top)
                k = best(errors * -ONE)
                if lane(errors, k) < lowest:
                    lowest, scale, minimum = lane(errors, k), lane(NUMBERS(), k), lane(minima, k)
        store(memory, SCALE_CODES + 4 * i, scale)
        store(memory, MINIMUM_CODES + 4 * i, minimum)
        factor, minimum = inverse(d * scale), dmin * minimum
        for j in range(0, 4 * n, 64):
            store(memory, CODES + 4 * n * i + j, clamped((load_floats(at, j) + minimum) * factor, ZERO, top))


@inner
def choose_minima(x, w, n, top, most, memory):
    """Fit a superblock with minima; returns the bits of d and of dmin."""
    most_scale, most_minimum = fit_minima(x, w, n, top, memory)
    d, dmin = scale_half(most_scale / most), scale_half(most_minimum / most)
    choose_codes(x, w, n, top, half(d), half(dmin), most, memory)
    return d, dmin


@inline
def codes_at(memory, i):
    """The codes of sixteen weights from i on."""
    return load_floats(memory, CODES + 4 * i)


@inner
def store_scales_and_minima(target, memory):
    """Pack eight scales and eight minima of six bits into twelve bytes.

    The high two bits of numbers 4 to 7 are above numbers 0 to 3.
    """
    for j in range(4):
        s0, s1 = np.uint8(float_at(memory, SCALE_CODES + 4 * j)), np.uint8(float_at(memory, SCALE_CODES + 4 * j + 16))
        m0, m1 = np.uint8(float_at(memory, MINIMUM_CODES + 4 * j)), np.uint8(float_at(memory, MINIMUM_CODES + 4 * j + 16))
        store(target, j, np.uint8(s0 | ((s1 >> 4) << 6)))
        store(target, 4 + j, np.uint8(m0 | ((m1 >> 4) << 6)))
        store(target, 8 + j, np.uint8((s1 & 15) | ((m1 & 15) << 4)))


@inline
def without_bit(v, bit):
    """Take a power of two from codes that have it as their highest bit."""
    return where_greater(v, floats(bit - np.float32(0.5)), v - bit, v)


@inline
def has_bit(v, bit, value):
    """A value where codes have their highest bit, else 0."""
    return where_greater(v, floats(bit - np.float32(0.5)), floats(value), floats(ZERO))


@inner
def store_pairs(target, memory):
    """Pack 256 codes of two bits, a part of 128 in 32 bytes."""
    for part in range(2):
        for j in range(0, 32, 16):
            q = codes_at(memory, 128 * part + j)
            for k, factor in ((1, np.float32(4)), (2, np.float32(16)), (3, np.float32(64))):
                q = multiply_add(q, codes_at(memory, 128 * part + 32 * k + j), floats(factor))
            store_bytes(target, 32 * part + j, q)


@inner
def begin_block(x, w, high, to, memory):
    """Choose codes from 0 to high for 256 weights, and store the scales.

    So a block of Q4_K and of Q5_K begins.
    """
    d, dmin = choose_minima(x, w, 32, high, np.float32(63), memory)
    store(to, 0, d)
    store(to, 2, dmin)
    store_scales_and_minima(to + 4, memory)


@kernel
def quantize_q4_k(x, importance, blocks):
    source, target, k, scratch = address(x), address(blocks), x.shape[1], np.empty(MEMORY, np.uint8)
    weights = column_weights(importance, k)
    for i in range(x.size // 256):
        memory, to = address(scratch), target + Q4_K * i
        begin_block(source + 1024 * i, address(weights) + 4 * (256 * i % k), np.float32(15), to, memory)
        for j in range(0, 128, 16):
            at = j // 32 * 64 + j % 32
            store_nibbles(to + 16 + j, codes_at(memory, at), codes_at(memory, at + 32))


@kernel
def quantize_q5_k(x, importance, blocks):
    source, target, k, scratch = address(x), address(blocks), x.shape[1], np.empty(MEMORY, np.uint8)
    weights = column_weights(importance, k)
    for i in range(x.size // 256):
        memory, to = address(scratch), target + Q5_K * i
        begin_block(source + 1024 * i, address(weights) + 4 * (256 * i % k), np.float32(31), to, memory)
        for j in range(0, 32, 16):
            fifth = floats(ZERO)
            for b in range(8):
                fifth = fifth + has_bit(codes_at(memory, 32 * b + j), SIXTEEN, np.float32(1 << b))
            store_bytes(to, 16 + j, fifth)
        for j in range(0, 128, 16):
            at = j // 32 * 64 + j % 32
            store_nibbles(to + 48 + j, without_bit(codes_at(memory, at), SIXTEEN), without_bit(codes_at(memory, at + 32), SIXTEEN))


@kernel
def quantize_q2_k(x, importance, blocks):
    source, target, k, scratch = address(x), address(blocks), x.shape[1], np.empty(MEMORY, np.uint8)
    weights = column_weights(importance, k)
    for i in range(x.size // 256):
        memory, to = address(scratch), target + Q2_K * i
        d, dmin = choose_minima(source + 1024 * i, address(weights) + 4 * (256 * i % k), 16, np.float32(3), np.float32(15), memory)
        store_nibbles(to, load_floats(memory, SCALE_CODES), load_floats(memory, MINIMUM_CODES))
        store_pairs(to + 16, memory)
        store(to, 80, d)
        store(to, 82, dmin)


@inner
def signed_peak(memory, n):
    """The scale of largest magnitude of n groups."""
    low, high = extremes(memory + SCALES, n)
    return low if -low > high else high


@inner
def choose_scales(x, w, low, high, steps, width, most, memory):
    """Fit sixteen groups of sixteen weights without minima.

    Returns the bits of d. low, high: the codes; most: the integers of scales are from -most to most - 1.
    """
    for i in range(16):
        at, v = x + 64 * i, w + 64 * i
        scale = refined_scale(at, v, 16, scale_by_peak(at, v, 16, steps, low, high), width, low, high)
        store(memory, SCALES + 4 * i, scale)
    bits = scale_half(signed_peak(memory, 16) / -most)
    d = half(bits)
    factor = inverse(d)
    for i in range(16):
        at = x + 64 * i
        codes = floats(np.rint(float_at(memory, SCALES + 4 * i) * factor) - np.float32(7)) + NUMBERS()
        codes = least(greatest(codes, -most), most - ONE)
        scale = lane(codes, best(errors_of_scales(at, w + 64 * i, 16, codes * d, low, high) * -ONE))
        store(memory, SCALE_CODES + 4 * i, scale)
        store(memory, CODES + 64 * i, clamped(load_floats(at, 0) * inverse(d * scale), low, high) - low)
    return bits


STEPS_3, STEPS_6 = lanes([*np.linspace(-5.2, -3.2, 10), *np.linspace(2.6, 4.0, 6)]), lanes(-32 - np.linspace(-1.2, 1, 16))


@kernel
def quantize_q3_k(x, importance, blocks):
    source, target, k, scratch = address(x), address(blocks), x.shape[1], np.empty(MEMORY, np.uint8)
    weights = column_weights(importance, k)
    for i in range(x.size // 256):
        memory, to, w = address(scratch), target + Q3_K * i, address(weights) + 4 * (256 * i % k)
        d = choose_scales(source + 1024 * i, w, -FOUR, np.float32(3), STEPS_3(), np.float32(0.15), np.float32(32), memory)
        for j in range(0, 32, 16):
            third = floats(ZERO)
            for b in range(8):
                third = third + has_bit(codes_at(memory, 32 * b + j), FOUR, np.float32(1 << b))
            store_bytes(to, j, third)
        for j in range(0, 256, 16):
            store(memory, CODES + 4 * j, without_bit(codes_at(memory, j), FOUR))
        store_pairs(to + 32, memory)
        store_bytes(memory, 0, load_floats(memory, SCALE_CODES) + np.float32(32))
        for j in range(4):
            a, b, c, e = u8_at(memory, j), u8_at(memory, 4 + j), u8_at(memory, 8 + j), u8_at(memory, 12 + j)
            store(to, 96 + j, np.uint8((a & 15) | ((c & 15) << 4)))
            store(to, 100 + j, np.uint8((b & 15) | ((e & 15) << 4)))
            store(to, 104 + j, np.uint8((a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((e >> 4) << 6)))
        store(to, 108, d)


@kernel
def quantize_q6_k(x, importance, blocks):
    source, target, k, scratch = address(x), address(blocks), x.shape[1], np.empty(MEMORY, np.uint8)
    weights = column_weights(importance, k)
    for i in range(x.size // 256):
        memory, to, w = address(scratch), target + Q6_K * i, address(weights) + 4 * (256 * i % k)
        d = choose_scales(source + 1024 * i, w, np.float32(-32), np.float32(31), STEPS_6(), np.float32(0.015), np.float32(128), memory)
        for part in range(2):
            for j in range(0, 32, 16):
                a, b = codes_at(memory, 128 * part + j), codes_at(memory, 128 * part + 32 + j)
                c, e = codes_at(memory, 128 * part + 64 + j), codes_at(memory, 128 * part + 96 + j)
                ha, hb, hc, he = upper(a), upper(b), upper(c), upper(e)
                store_nibbles(to + 64 * part + j, a - ha * SIXTEEN, c - hc * SIXTEEN)
                store_nibbles(to + 64 * part + 32 + j, b - hb * SIXTEEN, e - he * SIXTEEN)
                store_bytes(to, 128 + 32 * part + j, ha + hb * FOUR + hc * SIXTEEN + he * np.float32(64))
        store_bytes(to, 192, load_floats(memory, SCALE_CODES))
        store(to, 208, d)


@inline
def upper(codes):
    """The upper bits of codes of six bits, without the lower four."""
    return truncate(codes * np.float32(1 / 16))


STEPS_IQ4 = lanes([*np.linspace(-136, -112, 11), *np.linspace(106, 124, 5)])


@kernel
def quantize_iq4_xs(x, importance, blocks, table):
    source, target, k, scratch = address(x), address(blocks), x.shape[1], np.empty(MEMORY, np.uint8)
    weights, levels, most = column_weights(importance, k), address(table), np.float32(32)
    for i in range(x.size // 256):
        memory, to, first, w = address(scratch), target + IQ4_XS * i, source + 1024 * i, address(weights) + 4 * (256 * i % k)
        for b in range(8):
            low, high = extremes(first + 128 * b, 32)
            peak, scale = low if -low > high else high, ZERO
            if abs(peak) > TINY:
                scale = fit_level_scale(first + 128 * b, w + 128 * b, 32, STEPS_IQ4() * (ONE / peak), levels)
            store(memory, SCALES + 4 * b, scale)
        bits = scale_half(signed_peak(memory, 8) / -most)
        d, upper_bits = half(bits), np.uint16(0)
        factor = inverse(d)
        for b in range(8):
            at = first + 128 * b
            codes = floats(np.rint(float_at(memory, SCALES + 4 * b) * factor) - np.float32(7)) + NUMBERS()
            codes = least(greatest(codes, -most), most - ONE)
            code = lane(codes, best(errors_of_levels(at, w + 128 * b, 32, codes * d, levels) * -ONE))
            by_code, stored = inverse(d * code), np.uint16(code + most)
            low_codes, high_codes = level_codes(load_floats(at, 0) * by_code, levels), level_codes(load_floats(at, 64) * by_code, levels)
            store_nibbles(to + 8 + 16 * b, low_codes, high_codes)
            upper_bits |= np.uint16((stored >> 4) << (2 * b))
            store(memory, CODES + b, np.uint8(stored & 15))
        store(to, 0, bits)
        store(to, 2, np.uint16(upper_bits))
        for j in range(4):
            store(to, 4 + j, np.uint8(u8_at(memory, CODES + 2 * j) | (u8_at(memory, CODES + 2 * j + 1) << 4)))


QUANTIZERS = {
    "Q2_K": quantizer("Q2_K", quantize_q2_k), "Q3_K": quantizer("Q3_K", quantize_q3_k), "Q4_K": quantizer("Q4_K", quantize_q4_k),
    "Q5_K": quantizer("Q5_K", quantize_q5_k), "Q6_K": quantizer("Q6_K", quantize_q6_k),
    "IQ4_XS": quantizer("IQ4_XS", quantize_iq4_xs, level_table),
}
