"""GGUF blocks as products read them: a group of 32 weights becomes eight words of four signed bytes, with scales and offsets.

For each quantized type a device function group(data, row, g) -> eight words, then two scales and two offsets, one for each half of the
group: weight = scale * byte - offset. data: uint8, all rows of a tensor; row: where a row begins in it; g: which 32 of the row.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.device import bits_float, byte_at, device, four_words_at, half_at, of_half, permuted, word_at
from pydsa.quants.levels import HALVES, LEVELS

NIBBLES, TWO_BITS, ONE_BIT = 0x0F0F0F0F, 0x03030303, 0x01010101
ZERO = np.float32(0)


class Grouped(NamedTuple):
    """A quantized type: its group(); whether the halves of a group differ in scale; whether there are offsets."""
    group: object
    halves: bool
    offsets: bool


@device
def less(word, zeros):
    """Four bytes from 0 to 127, each less the same byte of `zeros`, which is at most 127."""
    return ((word | 0x80808080) - zeros) ^ 0x80808080


@device
def selector(at):
    """What makes of two words, of which the first contains the byte at `at`, the word that begins there."""
    return np.uint32(0x3210 + 0x1111 * (at & 3))


@device
def any_word(data, at):
    """Four bytes that begin anywhere: every load of a GPU must be aligned."""
    return permuted(word_at(data, at & ~3), word_at(data, at + 3 & ~3), selector(at))


@device
def any_four(data, at):
    """Four words that begin anywhere."""
    first, pick = at & ~3, selector(at)
    a, b, c, d, e = (word_at(data, first), word_at(data, first + 4), word_at(data, first + 8), word_at(data, first + 12),
                     word_at(data, at + 15 & ~3))
    return permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick)


@device
def any_eight(data, at):
    """Eight words that begin anywhere."""
    first, pick = at & ~3, selector(at)
    a, b, c, d = word_at(data, first), word_at(data, first + 4), word_at(data, first + 8), word_at(data, first + 12)
    e, f, g, h = word_at(data, first + 16), word_at(data, first + 20), word_at(data, first + 24), word_at(data, first + 28)
    i = word_at(data, at + 31 & ~3)
    return (permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick), permuted(e, f, pick),
            permuted(f, g, pick), permuted(g, h, pick), permuted(h, i, pick))


@device
def fifth_bits(bits, i):
    """Bits 4 i to 4 i + 3, each as 16 in a byte of its own."""
    four = bits >> (4 * i)
    return (four & 1) << 4 | (four & 2) << 11 | (four & 4) << 18 | (four & 8) << 25


@device
def group_q4_0(data, row, g):
    at = row + 18 * g
    a, b, c, e = any_four(data, at + 2)
    d = half_at(data, at)
    return (less(a & NIBBLES, 0x08080808), less(b & NIBBLES, 0x08080808), less(c & NIBBLES, 0x08080808), less(e & NIBBLES, 0x08080808),
            less((a >> 4) & NIBBLES, 0x08080808), less((b >> 4) & NIBBLES, 0x08080808), less((c >> 4) & NIBBLES, 0x08080808),
            less((e >> 4) & NIBBLES, 0x08080808), d, d, ZERO, ZERO)


@device
def group_q4_1(data, row, g):
    at = row + 20 * g
    a, b, c, e = word_at(data, at + 4), word_at(data, at + 8), word_at(data, at + 12), word_at(data, at + 16)
    d, low = half_at(data, at), -half_at(data, at + 2)
    return (a & NIBBLES, b & NIBBLES, c & NIBBLES, e & NIBBLES, (a >> 4) & NIBBLES, (b >> 4) & NIBBLES, (c >> 4) & NIBBLES,
            (e >> 4) & NIBBLES, d, d, low, low)


@device
def group_q5_0(data, row, g):
    at = row + 22 * g
    high = any_word(data, at + 2)
    a, b, c, e = any_four(data, at + 6)
    d = half_at(data, at)
    return (less(a & NIBBLES | fifth_bits(high, 0), 0x10101010), less(b & NIBBLES | fifth_bits(high, 1), 0x10101010),
            less(c & NIBBLES | fifth_bits(high, 2), 0x10101010), less(e & NIBBLES | fifth_bits(high, 3), 0x10101010),
            less((a >> 4) & NIBBLES | fifth_bits(high, 4), 0x10101010), less((b >> 4) & NIBBLES | fifth_bits(high, 5), 0x10101010),
            less((c >> 4) & NIBBLES | fifth_bits(high, 6), 0x10101010), less((e >> 4) & NIBBLES | fifth_bits(high, 7), 0x10101010),
            d, d, ZERO, ZERO)


@device
def group_q5_1(data, row, g):
    at = row + 24 * g
    high = word_at(data, at + 4)
    a, b, c, e = word_at(data, at + 8), word_at(data, at + 12), word_at(data, at + 16), word_at(data, at + 20)
    d, low = half_at(data, at), -half_at(data, at + 2)
    return (a & NIBBLES | fifth_bits(high, 0), b & NIBBLES | fifth_bits(high, 1), c & NIBBLES | fifth_bits(high, 2),
            e & NIBBLES | fifth_bits(high, 3), (a >> 4) & NIBBLES | fifth_bits(high, 4), (b >> 4) & NIBBLES | fifth_bits(high, 5),
            (c >> 4) & NIBBLES | fifth_bits(high, 6), (e >> 4) & NIBBLES | fifth_bits(high, 7), d, d, low, low)


@device
def group_q8_0(data, row, g):
    at = row + 34 * g
    d = half_at(data, at)
    a, b, c, e, f, h, i, j = any_eight(data, at + 2)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def scale_and_min(data, at, s):
    """The scale and the minimum of sub-block s of Q4_K and Q5_K, which begin with two float16 and twelve bytes of packed 6-bit numbers."""
    both, first, second, third = four_words_at(data, at)
    if s < 4:
        scale, low = first >> 8 * s & 63, second >> 8 * s & 63
    else:
        shift = 8 * (s & 3)
        scale, low = third >> shift & 15 | (first >> shift + 6 & 3) << 4, third >> shift + 4 & 15 | (second >> shift + 6 & 3) << 4
    return of_half(np.uint32(both & 0xFFFF)) * np.float32(np.int32(scale)), of_half(np.uint32(both >> 16)) * np.float32(np.int32(low))


@device
def group_q4_k(data, row, g):
    at, s = row + 144 * (g >> 3), g & 7
    d, m = scale_and_min(data, at, s)
    q, shift = at + 16 + 32 * (s >> 1), 4 * (s & 1)
    a, b, c, e = four_words_at(data, q)
    f, h, i, j = four_words_at(data, q + 16)
    return (a >> shift & NIBBLES, b >> shift & NIBBLES, c >> shift & NIBBLES, e >> shift & NIBBLES, f >> shift & NIBBLES,
            h >> shift & NIBBLES, i >> shift & NIBBLES, j >> shift & NIBBLES, d, d, m, m)


@device
def five_bits(nibbles, high, s):
    """Four elements of sub-block s of Q5_K from the words with their nibbles and their fifth bits."""
    return nibbles >> (4 * (s & 1)) & NIBBLES | (high >> s & ONE_BIT) << 4


@device
def group_q5_k(data, row, g):
    at, s = row + 176 * (g >> 3), g & 7
    d, m = scale_and_min(data, at, s)
    q, h = at + 48 + 32 * (s >> 1), at + 16
    a, b, c, e = four_words_at(data, q)
    f, g1, i, j = four_words_at(data, q + 16)
    a5, b5, c5, e5 = four_words_at(data, h)
    f5, g5, i5, j5 = four_words_at(data, h + 16)
    return (five_bits(a, a5, s), five_bits(b, b5, s), five_bits(c, c5, s), five_bits(e, e5, s), five_bits(f, f5, s),
            five_bits(g1, g5, s), five_bits(i, i5, s), five_bits(j, j5, s), d, d, m, m)


@device
def signed_byte(data, at):
    """The int8 at a place, as float32."""
    value = byte_at(data, at)
    return np.float32(np.int32(value - ((value & 128) << 1)))


@device
def six_bits(low, high, k):
    """Four elements of Q6_K of the k-th 32 of a half block, of words with their lower and their upper bits."""
    return less(low >> (4 * (k >> 1)) & NIBBLES | (high >> (2 * k) & TWO_BITS) << 4, 0x20202020)


@device
def group_q6_k(data, row, g):
    at, part, k = row + 210 * (g >> 3), g >> 2 & 1, g & 3
    d, scales = half_at(data, at + 208), at + 192 + 8 * part + 2 * k
    a, b, c, e, f, h, i, j = any_eight(data, at + 64 * part + 32 * (k & 1))
    a2, b2, c2, e2, f2, h2, i2, j2 = any_eight(data, at + 128 + 32 * part)
    return (six_bits(a, a2, k), six_bits(b, b2, k), six_bits(c, c2, k), six_bits(e, e2, k), six_bits(f, f2, k), six_bits(h, h2, k),
            six_bits(i, i2, k), six_bits(j, j2, k), d * signed_byte(data, scales),
            d * signed_byte(data, scales + 1), ZERO, ZERO)


@device
def group_q2_k(data, row, g):
    at, part, k = row + 84 * (g >> 3), g >> 2 & 1, g & 3
    d, dmin = half_at(data, at + 80), half_at(data, at + 82)
    first, second = byte_at(data, at + 8 * part + 2 * k), byte_at(data, at + 8 * part + 2 * k + 1)
    q, shift = at + 16 + 32 * part, 2 * k
    return (word_at(data, q) >> shift & TWO_BITS, word_at(data, q + 4) >> shift & TWO_BITS, word_at(data, q + 8) >> shift & TWO_BITS,
            word_at(data, q + 12) >> shift & TWO_BITS, word_at(data, q + 16) >> shift & TWO_BITS, word_at(data, q + 20) >> shift & TWO_BITS,
            word_at(data, q + 24) >> shift & TWO_BITS, word_at(data, q + 28) >> shift & TWO_BITS,
            d * np.float32(first & 15), d * np.float32(second & 15), dmin * np.float32(first >> 4), dmin * np.float32(second >> 4))


@device
def six_bit_scale(data, at, j):
    """The scale of sub-block j of Q3_K, whose twelve packed bytes lie at `at`."""
    low, high = byte_at(data, at + j % 8) >> (4 * (j // 8)) & 15, byte_at(data, at + 8 + j % 4) >> (2 * (j // 4)) & 3
    return np.float32((low | high << 4) - 32)


@device
def three_bits(low, high, g):
    """Four elements of Q3_K of the g-th 32 of a block, of words with their lower bits and their third ones."""
    return less(low >> (2 * (g & 3)) & TWO_BITS | (high >> (g & 7) & ONE_BIT) << 2, 0x04040404)


@device
def group_q3_k(data, row, g):
    at, s = row + 110 * (g >> 3), g & 7
    d = half_at(data, at + 108)
    a, b, c, e, f, h, i, j = any_eight(data, at + 32 + 32 * (s >> 2))
    a2, b2, c2, e2, f2, h2, i2, j2 = any_eight(data, at)
    return (three_bits(a, a2, s), three_bits(b, b2, s), three_bits(c, c2, s), three_bits(e, e2, s), three_bits(f, f2, s),
            three_bits(h, h2, s), three_bits(i, i2, s), three_bits(j, j2, s),
            d * six_bit_scale(data, at + 96, 2 * s), d * six_bit_scale(data, at + 96, 2 * s + 1), ZERO, ZERO)


def _packed(levels):
    """Sixteen signed bytes as four words."""
    return tuple(np.array(levels, np.int8).view(np.uint32))


LEVEL_WORDS, HALF_WORDS = _packed(LEVELS), _packed(HALVES)


@device
def four_looked_up(table, nibbles):
    """Bytes of a table of sixteen, for the four lowest nibbles of a word."""
    low, high = permuted(table[0], table[1], np.uint32(nibbles & 0x7777)), permuted(table[2], table[3], np.uint32(nibbles & 0x7777))
    return permuted(low, high, np.uint32(0x3210 | (nibbles & 0x8888) >> 1))


@device
def looked_up(table, word):
    """Bytes of a table for the lower nibbles of a word's bytes, and for the upper ones."""
    first, second = four_looked_up(table, word), four_looked_up(table, word >> 16)
    return permuted(first, second, np.uint32(0x6420)), permuted(first, second, np.uint32(0x7531))


@device
def all_looked_up(table, a, b, c, e):
    """Eight words for the lower and then the upper nibbles of four."""
    a, f = looked_up(table, a)
    b, h = looked_up(table, b)
    c, i = looked_up(table, c)
    e, j = looked_up(table, e)
    return a, b, c, e, f, h, i, j


@device
def group_iq4_nl(data, row, g):
    at = row + 18 * g
    a, b, c, e = any_four(data, at + 2)
    d = half_at(data, at)
    a, b, c, e, f, h, i, j = all_looked_up(LEVEL_WORDS, a, b, c, e)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def group_iq4_xs(data, row, g):
    at, s = row + 136 * (g >> 3), g & 7
    low = byte_at(data, at + 4 + s // 2) >> (4 * (s % 2)) & 15
    high = (byte_at(data, at + 2) | byte_at(data, at + 3) << 8) >> (2 * s) & 3
    d, q = half_at(data, at) * np.float32((low | high << 4) - 32), at + 8 + 16 * s
    a, b, c, e = word_at(data, q), word_at(data, q + 4), word_at(data, q + 8), word_at(data, q + 12)
    a, b, c, e, f, h, i, j = all_looked_up(LEVEL_WORDS, a, b, c, e)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def half_of_power(exponent):
    """2^(exponent - 128), exponent from 0 to 255: subnormal for 0 and 1."""
    return bits_float(np.uint32((exponent - 1) << 23 if exponent > 1 else 0x200000 << exponent))


@device
def group_mxfp4(data, row, g):
    at = row + 17 * g
    a, b, c, e = any_four(data, at + 1)
    a, b, c, e, f, h, i, j = all_looked_up(HALF_WORDS, a, b, c, e)
    d = half_of_power(byte_at(data, at))
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


GROUPED = {
    "Q4_0": Grouped(group_q4_0, False, False), "Q4_1": Grouped(group_q4_1, False, True),
    "Q5_0": Grouped(group_q5_0, False, False), "Q5_1": Grouped(group_q5_1, False, True),
    "Q8_0": Grouped(group_q8_0, False, False),
    "Q2_K": Grouped(group_q2_k, True, True), "Q3_K": Grouped(group_q3_k, True, False),
    "Q4_K": Grouped(group_q4_k, False, True), "Q5_K": Grouped(group_q5_k, False, True),
    "Q6_K": Grouped(group_q6_k, True, False),
    "IQ4_NL": Grouped(group_iq4_nl, False, False), "IQ4_XS": Grouped(group_iq4_xs, False, False),
    "MXFP4": Grouped(group_mxfp4, False, False),
}


@device
def value_f32(data, row, i):
    return bits_float(word_at(data, row + 4 * i))


@device
def value_f16(data, row, i):
    return half_at(data, row + 2 * i)


@device
def value_bf16(data, row, i):
    return bits_float(np.uint32((byte_at(data, row + 2 * i) | byte_at(data, row + 2 * i + 1) << 8) << 16))


# type -> value(data, row, i), the i-th number of a row that begins at `row`
FLOATS = {"F32": value_f32, "F16": value_f16, "BF16": value_bf16}


@device
def four_f32(data, row, i):
    a, b, c, d = four_words_at(data, row + 4 * i)
    return bits_float(a), bits_float(b), bits_float(c), bits_float(d)


@device
def four_f16(data, row, i):
    a, b = word_at(data, row + 2 * i), word_at(data, row + 2 * i + 4)
    return of_half(np.uint32(a & 0xFFFF)), of_half(np.uint32(a >> 16)), of_half(np.uint32(b & 0xFFFF)), of_half(np.uint32(b >> 16))


@device
def two_bf16(word):
    """The two bfloat16 of a word, as float32."""
    return bits_float(np.uint32(word << 16 & 0xFFFF0000)), bits_float(np.uint32(word & 0xFFFF0000))


@device
def four_bf16(data, row, i):
    a, b = two_bf16(word_at(data, row + 2 * i))
    c, d = two_bf16(word_at(data, row + 2 * i + 4))
    return a, b, c, d


# type -> four(data, row, i), the i-th to (i + 3)-th number of a row of a multiple of four
FOURS = {"F32": four_f32, "F16": four_f16, "BF16": four_bf16}
