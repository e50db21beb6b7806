"""Q2_K to Q6_K: superblocks of 256 weights, eight groups each."""
import numpy as np

from pydsa.backends.cuda.blocks.block import NIBBLES, ONE_BIT, TWO_BITS, ZERO, any_eight_u32, entry, sub4
from pydsa.backends.cuda.device import byte_at, device, four_u32_at, half_at, of_half, u32_at
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
    value = byte_at(data, at)
    return np.float32(np.int32(value - ((value & 128) << 1)))


@device
def six_bits(low, high, k):
    """Four weights of group k of half a Q6_K block, as bytes.

    low, high: the uint32 with their low four bits and with their high two bits.
    """
    return sub4(low >> (4 * (k >> 1)) & NIBBLES | (high >> (2 * k) & TWO_BITS) << 4, 0x20202020)


@device
def group_q6_k(data, row, g):
    """Group g of a Q6_K row."""
    at, part, k = row + Q6_K * (g >> 3), g >> 2 & 1, g & 3
    d, scales = half_at(data, at + 208), at + 192 + 8 * part + 2 * k
    a, b, c, e, f, h, i, j = any_eight_u32(data, at + 64 * part + 32 * (k & 1))
    a2, b2, c2, e2, f2, h2, i2, j2 = any_eight_u32(data, at + 128 + 32 * part)
    return (six_bits(a, a2, k), six_bits(b, b2, k), six_bits(c, c2, k), six_bits(e, e2, k), six_bits(f, f2, k), six_bits(h, h2, k),
            six_bits(i, i2, k), six_bits(j, j2, k), d * signed_byte(data, scales),
            d * signed_byte(data, scales + 1), ZERO, ZERO)


@device
def group_q2_k(data, row, g):
    """Group g of a Q2_K row."""
    at, part, k = row + Q2_K * (g >> 3), g >> 2 & 1, g & 3
    d, dmin = half_at(data, at + 80), half_at(data, at + 82)
    first, second = byte_at(data, at + 8 * part + 2 * k), byte_at(data, at + 8 * part + 2 * k + 1)
    q, shift = at + 16 + 32 * part, 2 * k
    return (u32_at(data, q) >> shift & TWO_BITS, u32_at(data, q + 4) >> shift & TWO_BITS, u32_at(data, q + 8) >> shift & TWO_BITS,
            u32_at(data, q + 12) >> shift & TWO_BITS, u32_at(data, q + 16) >> shift & TWO_BITS, u32_at(data, q + 20) >> shift & TWO_BITS,
            u32_at(data, q + 24) >> shift & TWO_BITS, u32_at(data, q + 28) >> shift & TWO_BITS,
            d * np.float32(first & 15), d * np.float32(second & 15), dmin * np.float32(first >> 4), dmin * np.float32(second >> 4))


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
def group_q3_k(data, row, g):
    """Group g of a Q3_K row."""
    at, s = row + Q3_K * (g >> 3), g & 7
    d = half_at(data, at + 108)
    a, b, c, e, f, h, i, j = any_eight_u32(data, at + 32 + 32 * (s >> 2))
    a2, b2, c2, e2, f2, h2, i2, j2 = any_eight_u32(data, at)
    return (three_bits(a, a2, s), three_bits(b, b2, s), three_bits(c, c2, s), three_bits(e, e2, s), three_bits(f, f2, s),
            three_bits(h, h2, s), three_bits(i, i2, s), three_bits(j, j2, s),
            d * six_bit_scale(data, at + 96, 2 * s), d * six_bit_scale(data, at + 96, 2 * s + 1), ZERO, ZERO)


GROUPED = {"Q2_K": entry("Q2_K", group_q2_k), "Q3_K": entry("Q3_K", group_q3_k),
           "Q4_K": entry("Q4_K", group_q4_k), "Q5_K": entry("Q5_K", group_q5_k),
           "Q6_K": entry("Q6_K", group_q6_k)}
