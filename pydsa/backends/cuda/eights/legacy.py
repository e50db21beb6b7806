"""Eights of types whose blocks have 32 weights: a chunk is of two of them.

Where the first sixteen weights of a block are low nibbles and the others high ones, two lanes take the same eight bytes. Four bits that
stand for one of sixteen levels are looked up with byte permutes (prmt), 128 being added to the levels.
"""
import numpy as np

from pydsa.backends.cuda.eights.eight import (LOWER, NIBBLES, NO_OFFSETS, NONE, SIGNS, UPPER, Eights, U, both_halves, bytes_from,
                                              head_of_d, load_words, two_words, whole_less_32)
from pydsa.backends.cuda.blocks.legacy import fifth_bits
from pydsa.backends.cuda.blocks.tables import half_of_e4m3, half_of_power
from pydsa.backends.cuda.intrinsics.device import device, permuted
from pydsa.backends.cuda.intrinsics.instructions import fetch_eight, fetch_four
from pydsa.quants import IQ4_LEVELS, MXFP4_LEVELS


def _packed(levels):
    """Sixteen levels, 128 added to each, as four uint32."""
    return tuple(np.array(levels, np.int8).view(np.uint32) ^ SIGNS)


IQ4, MXFP4 = _packed(IQ4_LEVELS), _packed(MXFP4_LEVELS)
MOST_OF_NVFP4 = np.float32(240 * 12)        # half the greatest scale of four bits of exponent and three of mantissa, and the greatest level
UPPER_EIGHTS, THREES = U(0x88888888), U(0x77777777)


def in_pairs(n, load_block, head, bytes_of, bounds, bias=0, offsets=False):
    """Eights of a type with blocks of 32 weights.

    They have a scale, or that and an offset. load_block(raw, i, data, at, c): the n words of a lane in one, the first with the scale.
    head(raw, i, at, c): its numbers. bytes_of(raw, i, at, c) -> two uint32 of bytes.
    """
    @device
    def load(raw, i, data, at, second, j, c):
        load_block(raw, i, data, at, c)
        load_block(raw, i + n, data, at + second, c)

    @device
    def unpack(raw, i, at, second, j, c):
        a, b = bytes_of(raw, i, at, c)
        e, f = bytes_of(raw, i + n, at + second, c)
        return (a, b, e, f, U(permuted(raw[i], raw[i + n], LOWER)), U(permuted(raw[i], raw[i + n], UPPER)) if offsets else NO_OFFSETS)
    return Eights(2 * n, 1, load, head, unpack, bounds, bias, offsets=offsets, heads=(0, n))


def with_d(first, half, bytes_of, bound, bias):
    """in_pairs() of a type whose blocks begin with d.

    Of the bytes from `first` on, of which there are sixteen if `half`, a lane takes eight. In front may be fifth bits.
    """
    n = 3 if first > 2 else 1

    @device
    def load(raw, i, data, at, c):
        if n == 1:
            load_words(raw, i, 1, data, at)
        else:
            load_words(raw, i + 1, 2, data, at)
            raw[i] = raw[i + 1]
        load_words(raw, i + n, 3, data, at + first + 8 * (c & 1 if half else c))
    return in_pairs(n + 3, load, head_of_d, bytes_of, (bound, 0), bias)


@device
def nibbles_of(a, b, c):
    """A lane's nibbles of eight bytes."""
    shift = U(c) << U(1) & U(4)
    return a >> shift & NIBBLES, b >> shift & NIBBLES


@device
def bytes_q4_0(raw, i, at, c):
    """Eight weights of a Q4_0 block, plus 8."""
    a, b = two_words(raw, i + 1, at + 2)
    return nibbles_of(a, b, c)


@device
def with_fifths(a, b, high, c):
    """Nibbles with their fifth bits, eight of 32."""
    a, b = nibbles_of(a, b, c)
    high = U(high) >> U(8 * c)
    return a | U(fifth_bits(high, 0)), b | U(fifth_bits(high, 1))


@device
def bytes_q5_0(raw, i, at, c):
    """Eight weights of a Q5_0 block, plus 16."""
    a, b = two_words(raw, i + 3, at + 6)
    return with_fifths(a, b, permuted(raw[i + 1], raw[i + 2], U(0x5432 + 0x1111 * (at & 3))), c)


@device
def bytes_q8_0(raw, i, at, c):
    """Eight weights of a Q8_0 block, plus 128."""
    a, b = two_words(raw, i + 1, at + 2)
    return a ^ SIGNS, b ^ SIGNS


def _make_with_offset(fifth):
    """Q4_1, or Q5_1: d and an offset, fifth bits, nibbles; blocks of whole words."""
    n = 2 if fifth else 1       # words before the nibbles

    @device
    def load(raw, i, data, at, c):
        for k in range(n):
            raw[i + k] = fetch_four(data, at + 4 * k)
        for k in range(2):
            raw[i + n + k] = fetch_four(data, at + 4 * n + 8 * (c & 1) + 4 * k)

    @device
    def bytes_of(raw, i, at, c):
        a, b = U(raw[i + n]), U(raw[i + n + 1])
        return with_fifths(a, b, raw[i + 1], c) if fifth else nibbles_of(a, b, c)

    @device
    def head(raw, i, at, c):
        return both_halves(raw[i])
    return in_pairs(n + 2, load, head, bytes_of, (31 if fifth else 15, 1), offsets=True)


@device
def looked_up(table, nibbles):
    """The levels that four bytes from 0 to 15 stand for, plus 128."""
    pairs = nibbles | nibbles >> U(4)
    picks = U(permuted(pairs, U(0), U(0x4420)))
    few = picks & THREES
    low, high = U(permuted(table[0], table[1], few)), U(permuted(table[2], table[3], few))
    return U(permuted(low, high, U(0x3210) | (picks & UPPER_EIGHTS) >> U(1)))


@device
def bytes_iq4_nl(raw, i, at, c):
    """Eight levels of an IQ4_NL block."""
    a, b = bytes_q4_0(raw, i, at, c)
    return looked_up(IQ4, a), looked_up(IQ4, b)


@device
def load_mxfp4(raw, i, data, at, c):
    """raw: a word with the exponent, three with eight bytes."""
    load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 3, data, at + 1 + 8 * (c & 1))


@device
def head_of_mxfp4(raw, i, at, c):
    """The scale of an MXFP4 block."""
    return half_of_power(bytes_from(raw[i], at) & U(255)), NONE


@device
def bytes_mxfp4(raw, i, at, c):
    """Eight levels of an MXFP4 block."""
    a, b = two_words(raw, i + 1, at + 1)
    a, b = nibbles_of(a, b, c)
    return looked_up(MXFP4, a), looked_up(MXFP4, b)


@device
def load_nvfp4(raw, i, data, at, second, j, c):
    """raw: the scales of a block of 64, then eight bytes of each half, of which two lanes take the nibbles."""
    raw[i] = fetch_four(data, at)
    for k in range(2):
        raw[i + 1 + k], raw[i + 3 + k] = (fetch_four(data, at + 4 + 4 * (c & 2) + 4 * k), fetch_four(data, at + 20 + 4 * (c & 2) + 4 * k))


@device
def unpack_nvfp4(raw, i, at, second, j, c):
    """Eight levels of each half of a block."""
    shift = U(c) << U(2) & U(4)
    return (looked_up(MXFP4, U(raw[i + 1]) >> shift & NIBBLES), looked_up(MXFP4, U(raw[i + 2]) >> shift & NIBBLES),
            looked_up(MXFP4, U(raw[i + 3]) >> shift & NIBBLES), looked_up(MXFP4, U(raw[i + 4]) >> shift & NIBBLES),
            raw[i], NO_OFFSETS)


@device
def head_of_nvfp4(raw, i, at, c):
    """The scales of a lane's weights in both halves."""
    scales = U(raw[i]) >> (U(c) << U(2) & U(8))
    return half_of_e4m3(scales & U(255)), half_of_e4m3(scales >> U(16) & U(255))


@device
def most_nvfp4(raw, i, at, second, c):
    """The greatest scale that there is, times the greatest level."""
    return MOST_OF_NVFP4


@device
def load_iq4_xs(raw, i, data, at, second, j, c):
    """raw: d and all scales, then eight bytes of each group, of which two lanes take the nibbles."""
    if j == 0:
        raw[i], raw[i + 1] = fetch_eight(data, at)
        raw[i + 2] = raw[i]
    raw[i + 3], raw[i + 4] = fetch_eight(data, at + 8 + 32 * j + 8 * (c & 1))
    raw[i + 5], raw[i + 6] = fetch_eight(data, at + 24 + 32 * j + 8 * (c & 1))


@device
def unpack_iq4_xs(raw, i, at, second, j, c):
    """Eight levels of each of two groups."""
    low, high = U(raw[i + 1]) >> U(8 * j), U(raw[i + 2]) >> U(16 + 4 * j)
    scales = low & U(15) | (high & U(3)) << U(4) | (low & U(0xF0)) << U(12) | (high & U(12)) << U(18)
    shift = U(c) << U(1) & U(4)
    return (looked_up(IQ4, U(raw[i + 3]) >> shift & NIBBLES), looked_up(IQ4, U(raw[i + 4]) >> shift & NIBBLES),
            looked_up(IQ4, U(raw[i + 5]) >> shift & NIBBLES), looked_up(IQ4, U(raw[i + 6]) >> shift & NIBBLES),
            whole_less_32(scales), NO_OFFSETS)


@device
def head_of_iq4_xs(raw, i, at, c):
    """d, which is beside the upper bits of scales."""
    return both_halves(raw[i])[0], NONE


EIGHTS = {"Q4_0": with_d(2, True, bytes_q4_0, 8, 8), "Q5_0": with_d(6, True, bytes_q5_0, 16, 16),
          "Q8_0": with_d(2, False, bytes_q8_0, 128, 128), "IQ4_NL": with_d(2, True, bytes_iq4_nl, 127, 128),
          "Q4_1": _make_with_offset(False), "Q5_1": _make_with_offset(True),
          "MXFP4": in_pairs(4, load_mxfp4, head_of_mxfp4, bytes_mxfp4, (12, 0), 128),
          "NVFP4": Eights(5, 1, load_nvfp4, head_of_nvfp4, unpack_nvfp4, (0, 0), 128, most=most_nvfp4),
          "IQ4_XS": Eights(7, 4, load_iq4_xs, head_of_iq4_xs, unpack_iq4_xs, (32 * 127, 0), 128, whole=True)}
