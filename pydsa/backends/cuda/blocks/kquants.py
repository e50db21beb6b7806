"""Q2_K to Q6_K: superblocks of 256 weights, eight groups each."""
import numpy as np

from pydsa.backends.cuda.blocks.block import (NIBBLES, NO_OFFSETS, ONE_BIT, TWO_BITS, ZERO, Lane, any_eight_u32, both, entry,
                                              four_of, four_shifted, selector, sub4)
from pydsa.backends.cuda.intrinsics.device import byte_at, device, four_u32_at, half_at, of_half, u32_at
from pydsa.backends.cuda.intrinsics.instructions import read_sixteen, stream_sixteen
from pydsa.quants import TYPES


Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (TYPES[name].n_bytes for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"))      # bytes of a block


@device
def scale_and_min(data, at, s):
    """The scale and the min of sub-block s of a Q4_K or Q5_K block.

    The block begins with two float16, d and dmin, and twelve bytes of packed 6-bit scales and mins.
    """
    d_dmin, first, second, third = four_u32_at(data, at)
    if s < 4:
        scale, m = first >> 8 * s & 63, second >> 8 * s & 63
    else:
        shift = 8 * (s & 3)
        scale, m = third >> shift & 15 | (first >> shift + 6 & 3) << 4, third >> shift + 4 & 15 | (second >> shift + 6 & 3) << 4
    return of_half(np.uint32(d_dmin & 0xFFFF)) * np.float32(np.int32(scale)), of_half(np.uint32(d_dmin >> 16)) * np.float32(np.int32(m))


@device
def group_q4_k(data, row, g):
    """Group g of a Q4_K row."""
    at, s = row + Q4_K * (g >> 3), g & 7
    d, m = scale_and_min(data, at, s)
    q, shift = at + 16 + 32 * (s >> 1), 4 * (s & 1)
    a, b, c, e = four_u32_at(data, q)
    f, h, i, j = four_u32_at(data, q + 16)
    return (a >> shift & NIBBLES, b >> shift & NIBBLES, c >> shift & NIBBLES, e >> shift & NIBBLES, f >> shift & NIBBLES,
            h >> shift & NIBBLES, i >> shift & NIBBLES, j >> shift & NIBBLES, d, d, m, m)


@device
def five_bits(nibbles, high, s):
    """Four weights of sub-block s of Q5_K, as bytes.

    nibbles, high: the uint32 with their low four bits and with their fifth bits.
    """
    return nibbles >> (4 * (s & 1)) & NIBBLES | (high >> s & ONE_BIT) << 4


@device
def group_q5_k(data, row, g):
    """Group g of a Q5_K row."""
    at, s = row + Q5_K * (g >> 3), g & 7
    d, m = scale_and_min(data, at, s)
    q, h = at + 48 + 32 * (s >> 1), at + 16
    a, b, c, e = four_u32_at(data, q)
    f, g1, i, j = four_u32_at(data, q + 16)
    a5, b5, c5, e5 = four_u32_at(data, h)
    f5, g5, i5, j5 = four_u32_at(data, h + 16)
    return (five_bits(a, a5, s), five_bits(b, b5, s), five_bits(c, c5, s), five_bits(e, e5, s), five_bits(f, f5, s),
            five_bits(g1, g5, s), five_bits(i, i5, s), five_bits(j, j5, s), d, d, m, m)


@device
def signed_byte(data, at):
    """The int8 at an offset, as float32."""
    return np.float32(np.int32(np.int32(byte_at(data, at) ^ 128) - 128))


@device
def six_bits(low, high, k):
    """Four weights of group k of half a Q6_K block, as bytes.

    low, high: the uint32 with their low four bits and with their high two bits.
    """
    return sub4(low >> (4 * (k >> 1)) & NIBBLES | (high >> (2 * k) & TWO_BITS) << 4, 0x20202020)


@device
def scales_q6_k(data, row, g):
    """The scales of group g of a Q6_K row."""
    at = row + Q6_K * (g >> 3)
    scales = at + 192 + 2 * (g & 7)
    return half_at(data, at + 208), signed_byte(data, scales), signed_byte(data, scales + 1)


@device
def group_q6_k(data, row, g):
    """Group g of a Q6_K row."""
    at, part, k = row + Q6_K * (g >> 3), g >> 2 & 1, g & 3
    d, s, s1 = scales_q6_k(data, row, g)
    a, b, c, e, f, h, i, j = any_eight_u32(data, at + 64 * part + 32 * (k & 1))
    a2, b2, c2, e2, f2, h2, i2, j2 = any_eight_u32(data, at + 128 + 32 * part)
    return (six_bits(a, a2, k), six_bits(b, b2, k), six_bits(c, c2, k), six_bits(e, e2, k), six_bits(f, f2, k), six_bits(h, h2, k),
            six_bits(i, i2, k), six_bits(j, j2, k), d * s, d * s1, ZERO, ZERO)


@device
def scales_q2_k(data, row, g):
    """The scales of group g of a Q2_K row."""
    at = row + Q2_K * (g >> 3)
    return (half_at(data, at + 80), np.float32(byte_at(data, at + 2 * (g & 7)) & 15),
            np.float32(byte_at(data, at + 2 * (g & 7) + 1) & 15))


@device
def group_q2_k(data, row, g):
    """Group g of a Q2_K row."""
    at, part, k = row + Q2_K * (g >> 3), g >> 2 & 1, g & 3
    (d, s, s1), dmin = scales_q2_k(data, row, g), half_at(data, at + 82)
    first, second = byte_at(data, at + 8 * part + 2 * k), byte_at(data, at + 8 * part + 2 * k + 1)
    q, shift = at + 16 + 32 * part, 2 * k
    return (u32_at(data, q) >> shift & TWO_BITS, u32_at(data, q + 4) >> shift & TWO_BITS, u32_at(data, q + 8) >> shift & TWO_BITS,
            u32_at(data, q + 12) >> shift & TWO_BITS, u32_at(data, q + 16) >> shift & TWO_BITS, u32_at(data, q + 20) >> shift & TWO_BITS,
            u32_at(data, q + 24) >> shift & TWO_BITS, u32_at(data, q + 28) >> shift & TWO_BITS,
            d * s, d * s1, dmin * np.float32(first >> 4), dmin * np.float32(second >> 4))


@device
def six_bit_scale(data, at, j):
    """The scale of sub-block j of Q3_K, from the twelve packed bytes at `at`."""
    low, high = byte_at(data, at + j % 8) >> (4 * (j // 8)) & 15, byte_at(data, at + 8 + j % 4) >> (2 * (j // 4)) & 3
    return np.float32(np.int32((low | high << 4) - 32))


@device
def three_bits(low, high, g):
    """Four weights of group g of a Q3_K block, as bytes.

    low, high: the uint32 with their low two bits and with their third bits.
    """
    return sub4(low >> (2 * (g & 3)) & TWO_BITS | (high >> (g & 7) & ONE_BIT) << 2, 0x04040404)


@device
def scales_q3_k(data, row, g):
    """The scales of group g of a Q3_K row."""
    at, j = row + Q3_K * (g >> 3), 2 * (g & 7)
    return half_at(data, at + 108), six_bit_scale(data, at + 96, j), six_bit_scale(data, at + 96, j + 1)


@device
def group_q3_k(data, row, g):
    """Group g of a Q3_K row."""
    at, s = row + Q3_K * (g >> 3), g & 7
    d, scale, scale_1 = scales_q3_k(data, row, g)
    a, b, c, e, f, h, i, j = any_eight_u32(data, at + 32 + 32 * (s >> 2))
    a2, b2, c2, e2, f2, h2, i2, j2 = any_eight_u32(data, at)
    return (three_bits(a, a2, s), three_bits(b, b2, s), three_bits(c, c2, s), three_bits(e, e2, s), three_bits(f, f2, s),
            three_bits(h, h2, s), three_bits(i, i2, s), three_bits(j, j2, s),
            d * scale, d * scale_1, ZERO, ZERO)


@device
def pair_of_scales(d_dmin, first, second, third, j):
    """Scales and offsets of sub-blocks 2 j and 2 j + 1 of Q4_K or Q5_K.

    Four uint32 are those with which the block begins.
    """
    shift = 16 * (j & 1)
    a, b, c = first >> shift, second >> shift, third >> shift
    scales, mins = a & 0x3F3F, b & 0x3F3F
    if j >= 2:
        scales, mins = c & 0x0F0F | a >> 2 & 0x3030, c >> 4 & 0x0F0F | b >> 2 & 0x3030
    d, dmin = of_half(np.uint32(d_dmin & 0xFFFF)), of_half(np.uint32(d_dmin >> 16))
    d, d1 = d * np.float32(np.int32(scales & 63)), d * np.float32(np.int32(scales >> 8))
    m, m1 = dmin * np.float32(np.int32(mins & 63)), dmin * np.float32(np.int32(mins >> 8))
    return (d, d, d1, d1), (m, m, m1, m1)


@device
def weights_q4_k(data, row, c, second):
    """Two sub-blocks of Q4_K, the low and the high nibbles of 32 bytes."""
    at, j = row + Q4_K * (c >> 2), c & 3
    d_dmin, s0, s1, s2 = read_sixteen(data, at)
    q = stream_sixteen(data, at + 16 + 32 * j)
    r = stream_sixteen(data, at + 32 + 32 * j)
    scales, offsets = pair_of_scales(d_dmin, s0, s1, s2, j)
    return (four_of(q, 0, NIBBLES), four_of(r, 0, NIBBLES), four_of(q, 4, NIBBLES), four_of(r, 4, NIBBLES), scales, offsets)


@device
def fifths(high, s):
    """The fifth bits of 16 weights of sub-block s of Q5_K, as bits 4."""
    a, b, c, e = high
    return (a >> s & ONE_BIT) << 4, (b >> s & ONE_BIT) << 4, (c >> s & ONE_BIT) << 4, (e >> s & ONE_BIT) << 4


@device
def weights_q5_k(data, row, c, second):
    """Two sub-blocks of Q5_K, as those of Q4_K, each weight with a fifth bit."""
    at, j = row + Q5_K * (c >> 2), c & 3
    d_dmin, s0, s1, s2 = read_sixteen(data, at)
    q, h = stream_sixteen(data, at + 48 + 32 * j), read_sixteen(data, at + 16)
    r, i = stream_sixteen(data, at + 64 + 32 * j), read_sixteen(data, at + 32)
    scales, offsets = pair_of_scales(d_dmin, s0, s1, s2, j)
    return (both(four_of(q, 0, NIBBLES), fifths(h, 2 * j)), both(four_of(r, 0, NIBBLES), fifths(i, 2 * j)),
            both(four_of(q, 4, NIBBLES), fifths(h, 2 * j + 1)), both(four_of(r, 4, NIBBLES), fifths(i, 2 * j + 1)), scales, offsets)


@device
def high_bits(words, shift, mask):
    """Masked bits of four uint32, shifted left, or right if shift is negative."""
    a, b, c, e = words
    if shift < 0:
        return a >> -shift & mask, b >> -shift & mask, c >> -shift & mask, e >> -shift & mask
    return a << shift & mask, b << shift & mask, c << shift & mask, e << shift & mask


@device
def weights_q6_k(data, row, c, second):
    """Half of four groups of Q6_K, in three times sixteen bytes."""
    at, part, i = row + Q6_K * (c >> 2), c >> 1 & 1, c & 1
    pick, q = selector(at), (at & ~3) + 16 * i
    a, b = four_shifted(data, q + 64 * part, pick), four_shifted(data, q + 64 * part + 32, pick)
    h = four_shifted(data, q + 32 * part + 128, pick)
    s, d = at + 192 + 8 * part + i, half_at(data, at + 208)
    return (both(four_of(a, 0, NIBBLES), high_bits(h, 4, 0x30303030)), both(four_of(b, 0, NIBBLES), high_bits(h, 2, 0x30303030)),
            both(four_of(a, 4, NIBBLES), high_bits(h, 0, 0x30303030)), both(four_of(b, 4, NIBBLES), high_bits(h, -2, 0x30303030)),
            (d * signed_byte(data, s), d * signed_byte(data, s + 2), d * signed_byte(data, s + 4), d * signed_byte(data, s + 6)),
            NO_OFFSETS)


@device
def weights_q2_k(data, row, c, second):
    """Half of four groups of Q2_K, in the same sixteen bytes."""
    at, part, i = row + Q2_K * (c >> 2), c >> 1 & 1, c & 1
    q, s = at + 16 + 32 * part + 16 * i, at + 8 * part + i
    words = u32_at(data, q), u32_at(data, q + 4), u32_at(data, q + 8), u32_at(data, q + 12)
    d, dmin = half_at(data, at + 80), half_at(data, at + 82)
    a, b, e, f = byte_at(data, s), byte_at(data, s + 2), byte_at(data, s + 4), byte_at(data, s + 6)
    return (four_of(words, 0, TWO_BITS), four_of(words, 2, TWO_BITS), four_of(words, 4, TWO_BITS), four_of(words, 6, TWO_BITS),
            (d * np.float32(a & 15), d * np.float32(b & 15), d * np.float32(e & 15), d * np.float32(f & 15)),
            (dmin * np.float32(a >> 4), dmin * np.float32(b >> 4), dmin * np.float32(e >> 4), dmin * np.float32(f >> 4)))


@device
def weights_q3_k(data, row, c, second):
    """Half of four groups of Q3_K, in sixteen bytes, and their third bits."""
    at, part, i = row + Q3_K * (c >> 2), c >> 1 & 1, c & 1
    pick, q = selector(at), (at & ~3) + 16 * i
    words = four_shifted(data, q + 32 * part + 32, pick)
    h0, h1, h2, h3 = four_shifted(data, q, pick)
    n = 4 * part
    high = h0 >> n, h1 >> n, h2 >> n, h3 >> n
    d, j = half_at(data, at + 108), 8 * part + i
    return (both(four_of(words, 0, TWO_BITS), high_bits(high, 2, 0x04040404)),
            both(four_of(words, 2, TWO_BITS), high_bits(high, 1, 0x04040404)),
            both(four_of(words, 4, TWO_BITS), high_bits(high, 0, 0x04040404)),
            both(four_of(words, 6, TWO_BITS), high_bits(high, -1, 0x04040404)),
            (d * six_bit_scale(data, at + 96, j), d * six_bit_scale(data, at + 96, j + 2), d * six_bit_scale(data, at + 96, j + 4),
             d * six_bit_scale(data, at + 96, j + 6)), NO_OFFSETS)


GROUPED = {"Q2_K": entry("Q2_K", group_q2_k, lane=Lane(weights_q2_k, True, 0, False), scales=scales_q2_k),
           "Q3_K": entry("Q3_K", group_q3_k, lane=Lane(weights_q3_k, True, 4, False), scales=scales_q3_k),
           "Q4_K": entry("Q4_K", group_q4_k, lane=Lane(weights_q4_k, False, 0, True)),
           "Q5_K": entry("Q5_K", group_q5_k, lane=Lane(weights_q5_k, False, 0, True)),
           "Q6_K": entry("Q6_K", group_q6_k, lane=Lane(weights_q6_k, True, 32, False), scales=scales_q6_k)}
