"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: four bits index a table of sixteen values.

One instruction looks up all lanes. IQ4_NL and MXFP4 are blocks of 32 with one scale d, in MXFP4 a power of two; IQ4_XS has 256 values, and
a 6-bit scale for each 32. Nibble j of the 16 bytes of a group of 32 is element j (low) and j + 16 (high). NVFP4 has 64 values, and for each
16 an eight-bit float as scale; nibble j of the 8 bytes of a group of 16 is element j (low) and j + 8 (high).
"""
import numpy as np
from numba import carray

from pydsa.backends.cpu.blocks.block import NATURAL_ORDER, SCALES, SUPERBLOCK, entry, in_order, inverse
from pydsa.backends.cpu.blocks.dots import (BY_QUARTERS, add_quad, dot_large, dot_quad, dot_rows, four_blocks, join_blocks,
                                            nibbles, signed_quad, single_sum, store_quad, superblock_at, two_blocks)
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.vectors.codes import even_elements_first, pairs_of, to_multiples, twin_groups, ue4m3_floats
from pydsa.backends.cpu.vectors.lanes import gather_u32, lookup, lower_half, spread, spread_int16, upper_half
from pydsa.backends.cpu.vectors.scalars import half, half_at
from pydsa.backends.cpu.vectors.simd import (dot, dot_add, eight_floats, floats, halves, join, load_4_floats, load_8_floats, load_64_bytes,
                                             load_int16, low_int16, multiply_add, store, to_floats, to_int16, u8_at, vector)
from pydsa.quants import IQ4_LEVELS, MXFP4_LEVELS, TYPES


IQ4_NL, IQ4_XS, MXFP4, NVFP4 = (TYPES[name].n_bytes for name in ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"))      # bytes of a block

lookup_iq4, lookup_mxfp4 = lookup(IQ4_LEVELS), lookup(MXFP4_LEVELS)
IQ4, MXFP4_HALVES = np.float32(IQ4_LEVELS), np.float32(MXFP4_LEVELS)
POWERS = np.ldexp(np.float32(1), np.arange(-128, 128)).astype(np.float32)     # e -> the scale of MXFP4_LEVELS, half of 2^(e - 127)
# The byte of an unsigned float of four exponent and three mantissa bits -> the scale of MXFP4_LEVELS, half of it; 127 is 0 too
UE4M3 = np.where(np.arange(256) == 127, 0, np.ldexp(np.where(np.arange(256) & 120, 8, 0) + (np.arange(256) & 7),
                                                    np.maximum(np.arange(256) >> 3 & 15, 1) - 11)).astype(np.float32)


def dequantize_iq4_nl(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32))
    for i in range(n):
        d, qs = half(blocks[i].d), blocks[i].qs
        for j in range(16):
            out[i, j] = d * IQ4[qs[j] & 15]
            out[i, j + 16] = d * IQ4[qs[j] >> 4]


def dequantize_iq4_xs(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 8, 32))
    for i in range(n):
        d, high, low, qs = half(blocks[i].d), blocks[i].scales_h, blocks[i].scales_l, blocks[i].qs
        for k in range(8):
            scale = ((low[k // 2] >> (4 * (k % 2))) & 15) | (((high >> (2 * k)) & 3) << 4)
            dk = d * (np.float32(scale) - np.float32(32))
            for j in range(16):
                out[i, k, j] = dk * IQ4[qs[16 * k + j] & 15]
                out[i, k, j + 16] = dk * IQ4[qs[16 * k + j] >> 4]


def dequantize_mxfp4(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32))
    for i in range(n):
        d, qs = POWERS[blocks[i].e], blocks[i].qs
        for j in range(16):
            out[i, j] = d * MXFP4_HALVES[qs[j] & 15]
            out[i, j + 16] = d * MXFP4_HALVES[qs[j] >> 4]


def dequantize_nvfp4(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 4, 16))
    for i in range(n):
        for k in range(4):
            d = UE4M3[blocks[i].scales[k]]
            for j in range(8):
                q = blocks[i].qs[8 * k + j]
                out[i, k, j] = d * MXFP4_HALVES[q & 15]
                out[i, k, j + 8] = d * MXFP4_HALVES[q >> 4]


@inline
def iq4_quad(v):
    """Look up 128 elements of IQ4 as four int16 vectors (BY_QUARTERS).

    v: the 64 bytes of four groups of 32.
    """
    low, high = nibbles(v)
    return signed_quad(lookup_iq4(low), lookup_iq4(high))


@inline
def mxfp4_quad(v):
    """Look up 128 elements of MXFP4, times two, as four int16 vectors."""
    low, high = nibbles(v)
    return signed_quad(lookup_mxfp4(low), lookup_mxfp4(high))


@inline
def add_iq4_nl(sums, row, i, n, x):
    at = four_blocks(row, IQ4_NL, i, n)
    return add_quad(sums, iq4_quad(join_blocks(at, 2)), x, i, halves(at))


def dot_iq4_nl(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_rows(add_iq4_nl, single_sum, floats(np.float32(0)), IQ4_NL, 4, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_iq4_nl(source, n, superblock):
    for i in range(0, n, 4):
        at = four_blocks(source, IQ4_NL, i, n)
        store(superblock, SCALES + 4 * i, halves(at))
        store_quad(superblock, 64 * i, iq4_quad(join_blocks(at, 2)))


FOUR_BITS, TWO_BITS = gather_u32([0] * 8, range(0, 32, 4)), gather_u32([0] * 8, range(16, 32, 2))


@inline
def whole_scales_of_8(at):
    """Unpack the integer scales of a block of IQ4_XS, as i32x8."""
    return ((FOUR_BITS(at, 4) & 15) | ((TWO_BITS(at, 0) & 3) << 4)) - 32


@inline
def scales_of_8(at):
    """Unpack the scales of a block of IQ4_XS, one for each 32, as f32x8."""
    return to_floats(whole_scales_of_8(at)) * half_at(at, 0)


@inline
def add_iq4_xs(sums, row, i, n, x):
    at, xi = row + IQ4_XS * i, x + SUPERBLOCK * i
    scales = scales_of_8(at) * load_8_floats(xi, SCALES)
    sums = dot_quad(sums, iq4_quad(load_64_bytes(at, 8)), xi, 0, lower_half(scales))
    return dot_quad(sums, iq4_quad(load_64_bytes(at, 72)), xi, 256, upper_half(scales))


def dot_iq4_xs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq4_xs, single_sum, floats(np.float32(0)), IQ4_XS, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


I16_FIRST, I16_SECOND = spread_int16(0, 1, 2, 3), spread_int16(4, 5, 6, 7)


@inline
def times_all(quad, factor):
    """Multiply each of four int16 vectors by a factor."""
    return quad[0] * factor, quad[1] * factor, quad[2] * factor, quad[3] * factor


def unpack_iq4_xs(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0)))
    scales = low_int16(whole_scales_of_8(source))
    store_quad(superblock, 0, times_all(iq4_quad(load_64_bytes(source, 8)), I16_FIRST(scales)))
    store_quad(superblock, 256, times_all(iq4_quad(load_64_bytes(source, 72)), I16_SECOND(scales)))


@inline
def mxfp4_scales(addresses):
    """Look up the scales of four blocks of MXFP4."""
    a, b, c, d = addresses
    return vector((POWERS[u8_at(a, 0)], POWERS[u8_at(b, 0)], POWERS[u8_at(c, 0)], POWERS[u8_at(d, 0)]))


@inline
def add_mxfp4(sums, row, i, n, x):
    at = four_blocks(row, MXFP4, i, n)
    return add_quad(sums, mxfp4_quad(join_blocks(at, 1)), x, i, mxfp4_scales(at))


def dot_mxfp4(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_rows(add_mxfp4, single_sum, floats(np.float32(0)), MXFP4, 4, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_mxfp4(source, n, superblock):
    for i in range(0, n, 4):
        at = four_blocks(source, MXFP4, i, n)
        store(superblock, SCALES + 4 * i, mxfp4_scales(at))
        store_quad(superblock, 64 * i, mxfp4_quad(join_blocks(at, 1)))


# Two blocks of NVFP4: elements 0 to 7 of the four groups of the first, of the second; then elements 8 to 15
TWO_BLOCKS = inverse(*[8 * block + 2 * group + half for half in (0, 1) for block in (0, 1) for group in range(4)])
BY_GROUPS = in_order(TWO_BLOCKS + [16 + piece for piece in TWO_BLOCKS], NATURAL_ORDER)
FIRST, SECOND = spread(0, 1, 2, 3), spread(4, 5, 6, 7)


@inline
def nvfp4_halves(a, b):
    """Unpack two blocks of NVFP4 to int16 vectors.

    Elements 0 to 7 of the groups of each, elements 8 to 15 of the groups of each.
    """
    low, high = nibbles(join((a + 4, b + 4)))
    low, high = lookup_mxfp4(low), lookup_mxfp4(high)
    return (to_int16(lower_half(low)), to_int16(upper_half(low))), (to_int16(lower_half(high)), to_int16(upper_half(high)))


@inline
def add_nvfp4(sums, row, i, n, x):
    a, b = two_blocks(row, NVFP4, i, n)
    xi, at, scale_at = superblock_at(x, 2 * i)
    scales = ue4m3_floats(a, b) * pairs_of(load_4_floats(xi, SCALES + scale_at))
    low, high = nvfp4_halves(a, b)
    first = dot_add(dot(low[0], load_int16(xi, at)), high[0], load_int16(xi, at + 128))
    second = dot_add(dot(low[1], load_int16(xi, at + 64)), high[1], load_int16(xi, at + 192))
    return multiply_add(multiply_add(sums, to_floats(first), FIRST(scales)), to_floats(second), SECOND(scales))


def dot_nvfp4(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_nvfp4, single_sum, floats(np.float32(0)), NVFP4, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_nvfp4(source, n, superblock):
    """Two scales become one, a power of two, and integers from 0 to 240.

    They are rounded where the lesser is below a sixteenth of the greater.
    """
    for i in range(0, n, 2):
        a, b = two_blocks(source, NVFP4, i, n)
        units, factors = to_multiples(ue4m3_floats(a, b))
        store(superblock, SCALES + 8 * i, units)
        low, high = nvfp4_halves(a, b)
        w, v = twin_groups(low[0], high[0]), twin_groups(low[1], high[1])
        store(superblock, 128 * i, even_elements_first(w[0] * factors[0]))
        store(superblock, 128 * i + 64, even_elements_first(w[1] * factors[1]))
        store(superblock, 128 * i + 128, even_elements_first(v[0] * factors[2]))
        store(superblock, 128 * i + 192, even_elements_first(v[1] * factors[3]))


KERNELS = {
    "IQ4_NL": entry("IQ4_NL", dequantize_iq4_nl, None, unpack_iq4_nl, dot_iq4_nl, BY_QUARTERS, 8),
    "IQ4_XS": entry("IQ4_XS", dequantize_iq4_xs, None, unpack_iq4_xs, dot_iq4_xs, BY_QUARTERS, 13, unpack_iq4_xs),
    "MXFP4": entry("MXFP4", dequantize_mxfp4, None, unpack_mxfp4, dot_mxfp4, BY_QUARTERS, 5),
    "NVFP4": entry("NVFP4", dequantize_nvfp4, None, unpack_nvfp4, dot_nvfp4, BY_GROUPS, 13),
}
