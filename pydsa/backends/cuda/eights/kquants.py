"""Eights of Q2_K to Q6_K."""
from pydsa.backends.cuda.blocks.block import selector
from pydsa.backends.cuda.eights.eight import (EVEN, FOUR_IN_PAIR, NIBBLES, NO_OFFSETS, ONE_BIT, SIGNS, SIX_IN_PAIR, TWO_BITS,
                                              Eights, U, both_halves, head_of_d, load_words, offsets_of,
                                              two_words, whole, whole_less_128, whole_less_32)
from pydsa.backends.cuda.intrinsics.device import device, permuted
from pydsa.backends.cuda.intrinsics.instructions import fetch_eight, fetch_sixteen

APART = U(0x4140)       # of a word: its bytes 0 and 1, each in 16 bits
offsets_q2_k = offsets_of(2)


@device
def two_heads(raw, i, at, c):
    """d, and dmin with its sign changed."""
    d, dmin = both_halves(raw[i])
    return d, -dmin


@device
def bytes_apart(pair):
    """The two lowest bytes, each in 16 bits."""
    return U(permuted(U(pair), U(0), APART))


def _make_q4_k(fifth):
    """Q4_K, or Q5_K, whose fifth bits are bits 2 j and 2 j + 1 of 32 bytes."""
    center = 16 if fifth else 8
    offsets = offsets_of(center)
    q = 6 if fifth else 4       # where in raw the nibbles are, after the block's beginning and the fifth bits

    @device
    def load(raw, i, data, at, second, j, c):
        if j == 0:
            raw[i], raw[i + 1], raw[i + 2], raw[i + 3] = fetch_sixteen(data, at)
            if fifth:
                raw[i + 4], raw[i + 5] = fetch_eight(data, at + 16 + 8 * c)
        raw[i + q], raw[i + q + 1] = fetch_eight(data, at + (48 if fifth else 16) + 32 * j + 8 * c)

    @device
    def fifths(raw, i, bit):
        return (U(raw[i]) >> U(bit) & ONE_BIT) << U(4)

    @device
    def unpack(raw, i, at, second, j, c):
        shift = U(16 * (j & 1))
        a, b, e = U(raw[i + 1]) >> shift, U(raw[i + 2]) >> shift, U(raw[i + 3]) >> shift
        scales, mins = a & U(0x3F3F), b & U(0x3F3F)
        if j >= 2:
            scales, mins = e & U(0x0F0F) | a >> U(2) & U(0x3030), e >> U(4) & U(0x0F0F) | b >> U(2) & U(0x3030)
        v, w = U(raw[i + q]), U(raw[i + q + 1])
        p, r, s, t = v & NIBBLES, w & NIBBLES, v >> U(4) & NIBBLES, w >> U(4) & NIBBLES
        if fifth:
            p, r = p | fifths(raw, i + 4, 2 * j), r | fifths(raw, i + 5, 2 * j)
            s, t = s | fifths(raw, i + 4, 2 * j + 1), t | fifths(raw, i + 5, 2 * j + 1)
        scales, mins = whole(bytes_apart(scales)), whole(bytes_apart(mins))
        return p, r, s, t, scales, offsets(scales, mins, raw[i])
    return Eights(q + 2, 4, load, two_heads, unpack, (63 * (31 if fifth else 15), 63), center, whole=True, offsets=True)


@device
def load_q6_k(raw, i, data, at, second, j, c):
    """raw: words with d, and of half a block three with each 32 low bits, the high bits and the scales."""
    if j == 0:
        load_words(raw, i, 1, data, at + 208)
    if j == 0 or j == 2:
        load_words(raw, i + 1, 3, data, at + 32 * j + 8 * c)
        load_words(raw, i + 4, 3, data, at + 32 * j + 32 + 8 * c)
        load_words(raw, i + 7, 3, data, at + 16 * j + 128 + 8 * c)
        load_words(raw, i + 10, 3, data, at + 4 * j + 192)


@device
def unpack_q6_k(raw, i, at, second, j, c):
    """The low or the high nibbles of two times eight bytes."""
    shift, jj = U(4 * (j & 1)), j & 1
    a, b = two_words(raw, i + 1, at)
    e, f = two_words(raw, i + 4, at)
    h, k = two_words(raw, i + 7, at)
    h, k = h >> shift, k >> shift
    scales = U(permuted(raw[i + 10 + jj], raw[i + 11 + jj], selector(at))) >> (c << U(2) & U(8))
    return (a >> shift & NIBBLES | (h & TWO_BITS) << U(4), b >> shift & NIBBLES | (k & TWO_BITS) << U(4),
            e >> shift & NIBBLES | (h >> U(2) & TWO_BITS) << U(4), f >> shift & NIBBLES | (k >> U(2) & TWO_BITS) << U(4),
            whole_less_128(permuted(scales ^ SIGNS, U(0), EVEN)), NO_OFFSETS)


@device
def load_q2_k(raw, i, data, at, second, j, c):
    """raw: d and dmin, and of half a block two words of weights and two of scales."""
    if j == 0:
        load_words(raw, i, 1, data, at + 80)
    if j == 0 or j == 2:
        load_words(raw, i + 1, 2, data, at + 16 + 16 * j + 8 * c)
        load_words(raw, i + 3, 2, data, at + 4 * j)


@device
def unpack_q2_k(raw, i, at, second, j, c):
    """Two of the four times two bits of eight bytes."""
    shift = U(4 * (j & 1))
    a, b = U(raw[i + 1]) >> shift, U(raw[i + 2]) >> shift
    scales = U(raw[i + 3 + (j & 1)]) >> (c << U(2) & U(8))
    scales, mins = whole(scales & FOUR_IN_PAIR), whole(scales >> U(4) & FOUR_IN_PAIR)
    return a & TWO_BITS, b & TWO_BITS, a >> U(2) & TWO_BITS, b >> U(2) & TWO_BITS, scales, offsets_q2_k(scales, mins, raw[i])


@device
def load_q3_k(raw, i, data, at, second, j, c):
    """raw: d, the scales before it, the third bits of a block, and the lower bits of half of it."""
    if j == 0:
        load_words(raw, i, 1, data, at + 108)
        load_words(raw, i + 1, 4, data, at + 96)
        load_words(raw, i + 5, 3, data, at + 8 * c)
    if j == 0 or j == 2:
        load_words(raw, i + 8, 3, data, at + 32 + 16 * j + 8 * c)


@device
def unpack_q3_k(raw, i, at, second, j, c):
    """Two of the four times two bits of eight bytes, each with a third bit."""
    shift, bit, pick = U(4 * (j & 1)), U(2 * j), selector(at)
    h, k = two_words(raw, i + 5, at)
    a, b = two_words(raw, i + 8, at)
    h, k, a, b = h >> bit, k >> bit, a >> shift, b >> shift
    low, high = U(permuted(raw[i + 1 + (j & 1)], raw[i + 2 + (j & 1)], pick)), U(permuted(raw[i + 3], raw[i + 4], pick))
    scales = (low >> U(4 * (j >> 1)) & NIBBLES | (high >> bit & TWO_BITS) << U(4)) >> (c << U(2) & U(8))
    return (a & TWO_BITS | (h & ONE_BIT) << U(2), b & TWO_BITS | (k & ONE_BIT) << U(2),
            a >> U(2) & TWO_BITS | (h >> U(1) & ONE_BIT) << U(2), b >> U(2) & TWO_BITS | (k >> U(1) & ONE_BIT) << U(2),
            whole_less_32(scales & SIX_IN_PAIR), NO_OFFSETS)


EIGHTS = {"Q4_K": _make_q4_k(False), "Q5_K": _make_q4_k(True),
          "Q6_K": Eights(13, 4, load_q6_k, head_of_d, unpack_q6_k, (128 * 32, 0), 32, whole=True),
          "Q2_K": Eights(5, 4, load_q2_k, two_heads, unpack_q2_k, (15 * 3, 15), 2, whole=True, offsets=True),
          "Q3_K": Eights(11, 4, load_q3_k, head_of_d, unpack_q3_k, (32 * 4, 0), 4, whole=True)}
