"""Quantize float32 rows to IQ1_S to IQ3_S, ternary, one bit and NVFP4.

A group of 8 (IQ1, IQ2) or 4 (IQ3) numbers is stored as the nearest entry of a grid, by exhaustive search, and as signs. Groups of 16 or 32
numbers, a sub-block, share a scale d * unit * (2 k + 1):

    IQ1_S    sub-blocks of 32  3-bit k  grid of 2048 times 8 from -1, 0, 1, and one offset of +-1/8 for all 32
    IQ1_M    sub-blocks of 16  3-bit k  the same grid, and an offset for each 8
    IQ2_XXS  sub-blocks of 32  4-bit k  grid of 256 times 8 magnitudes, an even number of minus signs
    IQ2_XS   sub-blocks of 16  4-bit k  grid of 512, an even number of minus signs
    IQ2_S    sub-blocks of 16  4-bit k  grid of 1024, any signs
    IQ3_XXS  sub-blocks of 32  4-bit k  grid of 256 times 4 magnitudes, an even number of minus signs in 8
    IQ3_S    sub-blocks of 32  4-bit k  grid of 512, any signs

A scale is the best of some that map the greatest magnitude to a level, or clip it, by the error of rounding each number alone. The grids
and the table of signs are gguf-py's, and `gguf.quants.dequantize` reads what is written here.
"""

from functools import cache

import gguf
import numpy as np
from gguf import quants

from pydsa.quants import grid
from tools.kquants import inverse, whole

CLIP = np.float32([1, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52])   # factors of the scale that maps the greatest magnitude to the highest level
SCORES = 1 << 17        # scores of grid entries that are computed at a time: half a megabyte, which stays in a core's cache


@cache
def grid_of(name):
    """The grid of a type, float32 [entries, group]."""
    return grid(name).astype(np.float32)


@cache
def sign_indices():
    """Index of each sign byte in the table of bytes of even parity, [256].

    Bit j of a byte is the sign of number j.
    """
    table = np.frombuffer(quants.IQ2_XXS.ksigns, np.uint8)
    indices = np.zeros(256, np.uint32)
    indices[table] = np.arange(len(table))
    return indices


def nearest(x, grid, offset=0.0):
    """The nearest entries of grid + offset to x [n, group].

    Returns the indices [n], uint32, and the squared distances [n].
    """
    entries = grid + np.float32(offset)
    matrix = np.concatenate([entries.T, -0.5 * (entries * entries).sum(axis=1)[None]])     # |x - g|^2 = |x|^2 - 2 (x g - g^2 / 2)
    index, score = np.empty(len(x), np.intp), np.empty(len(x), np.float32)
    step = SCORES // len(grid)
    rows, scores = np.ones((step, x.shape[1] + 1), np.float32), np.empty((step, len(grid)), np.float32)
    for start in range(0, len(x), step):
        part = x[start:start + step]
        n = len(part)
        rows[:n, :-1] = part
        np.matmul(rows[:n], matrix, out=scores[:n])
        best = scores[:n].argmax(axis=1)
        index[start:start + n], score[start:start + n] = best, scores[np.arange(n), best]
    return index.astype(np.uint32), (x * x).sum(axis=1) - 2 * score


def rounding_error(x, levels):
    """Squared errors of x rounded to levels that are about evenly spaced."""
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    i = whole((x - levels[0]) * (1 / step), 0, len(levels) - 1).astype(np.int8)
    error = x - np.take(levels, i)
    return error * error


def best_scale(x, levels, error):
    """The scales [...] of x [..., m] with the least error.

    error(x / scale) gives the squared error of each row. levels: float32, the magnitudes that a scaled row can have.
    """
    peak = np.abs(x).max(axis=-1)
    best, least = np.zeros_like(peak), np.full_like(peak, np.inf)
    for level in np.unique(np.concatenate([levels, levels.max() / CLIP])):
        scale = peak / level
        met = error(x * inverse(scale)[..., None]) * scale * scale
        best, least = np.where(met < least, scale, best), np.minimum(met, least)
    return best


def quantized_scales(scales, unit, n_bits):
    """Scales [n, n_sub] >= 0 as d * unit * (2 k + 1), k of n_bits bits.

    The greatest scale gets the k with which all fit best. Returns d [n, 1] in float16, k [n, n_sub] as uint32, and the inverse of the
    scales that they stand for.
    """
    high = 2**n_bits - 1
    greatest = scales.max(axis=1, keepdims=True)
    best, least = np.zeros_like(greatest), np.full_like(greatest, np.inf)
    for top in range(high, -1, -1):
        one = (greatest / np.float32(unit * (2 * top + 1))).astype(np.float16).astype(np.float32) * np.float32(unit)
        error = scales - one * (2 * whole((scales * inverse(one) - 1) / 2, 0, high) + 1)
        error = (error * error).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, one, best), np.minimum(error, least)
    k = whole((scales * inverse(best) - 1) / 2, 0, high)
    return (best / np.float32(unit)).astype(np.float16), k.astype(np.uint32), inverse(best * (2 * k + 1))


def pack_bits(values, n_bits, dtype):
    """Pack values [..., m] of n_bits bits into one number [...] of a dtype.

    The first value has the lowest bits.
    """
    shifts = np.arange(values.shape[-1], dtype=np.uint32) * np.uint32(n_bits)
    return np.bitwise_or.reduce(values.astype(np.uint32) << shifts, axis=-1).astype(dtype)


def as_bytes(*fields):
    """Join fields [n, ...] as the bytes of n blocks."""
    n = len(fields[0])
    return np.concatenate([np.ascontiguousarray(field).reshape(n, -1).view(np.uint8) for field in fields], axis=1)


def magnitudes_and_signs(x, even):
    """x [n, 256] as magnitudes and sign bytes [n, 32].

    even: where a group of 8 has an odd number of minus signs, its smallest magnitude gets the wrong sign, and is negative here.
    """
    groups = x.reshape(-1, 8)
    magnitudes, minus = np.abs(groups), groups < 0
    if even:
        odd = np.flatnonzero(minus.sum(axis=1) & 1)
        smallest = magnitudes[odd].argmin(axis=1)
        minus[odd, smallest] ^= True
        magnitudes[odd, smallest] *= -1
    return magnitudes.reshape(x.shape), np.packbits(minus, axis=1, bitorder="little").reshape(len(x), 32)


def magnitude_codes(x, name, n_sub, unit, even):
    """The parts of IQ2 and IQ3 blocks for x [n, 256].

    Returns d [n, 1], k [n, n_sub], grid indices [n, groups] and sign bytes [n, 32]; where the signs are even, their index in the table.
    """
    grid = grid_of(name)
    levels = np.unique(grid)
    magnitudes, signs = magnitudes_and_signs(x, even)
    rows = magnitudes.reshape(len(x), n_sub, -1)
    scales = best_scale(rows, levels, lambda y: rounding_error(y, levels).sum(axis=-1))
    d, k, inverses = quantized_scales(scales, unit, 4)
    index, _ = nearest((rows * inverses[:, :, None]).reshape(-1, grid.shape[1]), grid)
    return d, k, index.reshape(len(x), -1), sign_indices()[signs] if even else signs


def quantize_iq2_xxs(x):
    """x [n, 256] -> [n, 66] bytes.

    A sub-block is four bytes of indices, and four times 7 bits of signs below its k.
    """
    d, k, index, signs = magnitude_codes(x, "IQ2_XXS", 8, 1 / 8, even=True)
    words = np.stack([pack_bits(index.reshape(-1, 8, 4), 8, "<u4"),
                      pack_bits(signs.reshape(-1, 8, 4), 7, "<u4") | k << 28], axis=2)
    return as_bytes(d, words.astype("<u4"))


def quantize_iq2_xs(x):
    """x [n, 256] -> [n, 74] bytes.

    A group is 9 bits of index below 7 of signs; a byte holds two k.
    """
    d, k, index, signs = magnitude_codes(x, "IQ2_XS", 16, 1 / 8, even=True)
    return as_bytes(d, (index | signs << 9).astype("<u2"), pack_bits(k.reshape(-1, 8, 2), 4, np.uint8))


def quantize_iq2_s(x):
    """x [n, 256] -> [n, 82] bytes.

    The ninth and tenth bits of four indices share a byte after the signs.
    """
    d, k, index, signs = magnitude_codes(x, "IQ2_S", 16, 1 / 8, even=False)
    return as_bytes(d, (index & 255).astype(np.uint8), signs, pack_bits((index >> 8).reshape(-1, 8, 4), 2, np.uint8),
                    pack_bits(k.reshape(-1, 8, 2), 4, np.uint8))


def quantize_iq3_xxs(x):
    """x [n, 256] -> [n, 98] bytes.

    Indices of all 64 groups, then 32 bits of signs and k for each sub-block.
    """
    d, k, index, signs = magnitude_codes(x, "IQ3_XXS", 8, 1 / 4, even=True)
    words = pack_bits(signs.reshape(-1, 8, 4), 7, "<u4") | k << 28
    return as_bytes(d, index.astype(np.uint8), words.astype("<u4"))


def quantize_iq3_s(x):
    """x [n, 256] -> [n, 110] bytes.

    The ninth bits of a sub-block's eight indices share a byte.
    """
    d, k, index, signs = magnitude_codes(x, "IQ3_S", 8, 1, even=False)
    return as_bytes(d, (index & 255).astype(np.uint8), pack_bits((index >> 8).reshape(-1, 8, 8), 1, np.uint8), signs,
                    pack_bits(k.reshape(-1, 4, 2), 4, np.uint8))


def offset_codes(x, n_sub, n_offset):
    """The parts of IQ1 blocks for x [n, 256].

    n_offset: the numbers that share an offset. Returns d [n, 1], k [n, n_sub], grid indices [n, 32], and 1 where the offset is negative
    [n, 256 / n_offset].
    """
    grid, delta = grid_of("IQ1_S"), quants.IQ1_S.delta
    ternary = np.float32([-1, 0, 1])

    def error(y):
        both = [rounding_error(y, ternary + offset).reshape(*y.shape[:2], -1, n_offset).sum(axis=3) for offset in (delta, -delta)]
        return np.minimum(*both).sum(axis=2)

    rows = x.reshape(len(x), n_sub, -1)
    d, k, inverses = quantized_scales(best_scale(rows, np.abs(ternary + delta), error), 1, 3)
    y = (rows * inverses[:, :, None]).reshape(-1, 8)
    (plus, plus_error), (minus, minus_error) = (nearest(y, grid, offset) for offset in (delta, -delta))
    negative = minus_error.reshape(-1, n_offset // 8).sum(axis=1) < plus_error.reshape(-1, n_offset // 8).sum(axis=1)
    index = np.where(np.repeat(negative, n_offset // 8), minus, plus)
    return d, k, index.reshape(len(x), 32), negative.reshape(len(x), -1).astype(np.uint32)


def quantize_iq1_s(x):
    """x [n, 256] -> [n, 50] bytes.

    16 bits of a sub-block hold the upper 3 bits of four indices, k, and the sign of the offset.
    """
    d, k, index, negative = offset_codes(x, 8, 32)
    words = pack_bits((index >> 8).reshape(-1, 8, 4), 3, np.uint32) | k << 12 | negative << 15
    return as_bytes(d, (index & 255).astype(np.uint8), words.astype("<u2"))


def quantize_iq1_m(x):
    """x [n, 256] -> [n, 56] bytes.

    Half a byte holds the upper 3 bits of an index and the sign of its offset. 16 bits hold four k, and four of the 16 bits of d.
    """
    d, k, index, negative = offset_codes(x, 16, 8)
    halves = pack_bits((index >> 8 | negative << 3).reshape(-1, 16, 2), 4, np.uint8)
    parts = d.view(np.uint16) >> np.uint16([0, 4, 8, 12]) & np.uint16(15)
    words = pack_bits(k.reshape(-1, 4, 4), 3, np.uint32) | parts.astype(np.uint32) << 12
    return as_bytes((index & 255).astype(np.uint8), halves, words.astype("<u2"))


def ternary(x, kind):
    """x [n, 256] as d * -1, 0 or 1, in the bytes of a ternary type.

    gguf-py packs it. Its own d is the greatest magnitude, which suits weights that are ternary already.
    """
    levels = np.float32([-1, 0, 1])
    d = best_scale(x, np.float32([1]), lambda y: rounding_error(y, levels).sum(axis=-1))[:, None]
    return quants.quantize(d * whole(x * inverse(d), -1, 1), kind)


def quantize_tq1_0(x):
    """x [n, 256] -> [n, 54] bytes, five numbers a byte."""
    return ternary(x, gguf.GGMLQuantizationType.TQ1_0)


def quantize_tq2_0(x):
    """x [n, 256] -> [n, 66] bytes, four numbers a byte."""
    return ternary(x, gguf.GGMLQuantizationType.TQ2_0)


def quantize_q1_0(x):
    """x [n, 128] -> [n, 18] bytes.

    A number is d, the mean magnitude, where its bit is set, and -d elsewhere; bit j of byte i is number 8 i + j.
    """
    d = np.abs(x).mean(axis=1, keepdims=True).astype(np.float16)
    return as_bytes(d, np.packbits(x >= 0, axis=1, bitorder="little"))


def quantize_nvfp4(x):
    """x [n, 64] -> [n, 36] bytes.

    Each 16 numbers have a scale in eight bits that maps their greatest magnitude to 6, and share bytes in two halves. The type has no
    scale above those, so magnitudes below about 0.01 lose bits.
    """
    levels = np.float32(quants.NVFP4.kvalues[:8])
    x = x.reshape(-1, 4, 16)
    scales = quants.NVFP4.fp32_to_ue4m3(np.abs(x).max(axis=2) * np.float32(2 / levels[-1]))
    y = x * inverse(quants.NVFP4.ue4m3_to_fp32(scales).astype(np.float32))[:, :, None]
    q = np.searchsorted((levels[1:] + levels[:-1]) / 2, np.abs(y)).astype(np.uint8) | (y < 0).astype(np.uint8) << 3
    return as_bytes(scales, q[:, :, :8] | q[:, :, 8:] << 4)


QUANTIZERS = {"IQ1_S": quantize_iq1_s, "IQ1_M": quantize_iq1_m, "IQ2_XXS": quantize_iq2_xxs, "IQ2_XS": quantize_iq2_xs,
              "IQ2_S": quantize_iq2_s, "IQ3_XXS": quantize_iq3_xxs, "IQ3_S": quantize_iq3_s, "TQ1_0": quantize_tq1_0,
              "TQ2_0": quantize_tq2_0, "Q1_0": quantize_q1_0, "NVFP4": quantize_nvfp4}
