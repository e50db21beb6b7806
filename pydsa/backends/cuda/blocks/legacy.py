"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: a block of 32 weights is one group."""
from pydsa.backends.cuda.blocks.block import (NIBBLES, NO_OFFSETS, ZERO, Lane, any_eight_u32, any_four_u32, any_u32, both, entry,
                                              four_of, sub4)
from pydsa.backends.cuda.intrinsics.device import device, half_at, u32_at
from pydsa.quants import TYPES


Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (TYPES[name].n_bytes for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))      # bytes of a block


@device
def fifth_bits(bits, i):
    """Bits 4 i to 4 i + 3, each moved to bit 4 of its own byte."""
    return (bits >> (4 * i) & 15) * 0x02040810 & 0x10101010     # no two of these bits meet in the product


@device
def group_q4_0(data, row, g):
    """Group g of a Q4_0 row."""
    at = row + Q4_0 * g
    a, b, c, e = any_four_u32(data, at + 2)
    d = half_at(data, at)
    return (sub4(a & NIBBLES, 0x08080808), sub4(b & NIBBLES, 0x08080808), sub4(c & NIBBLES, 0x08080808), sub4(e & NIBBLES, 0x08080808),
            sub4((a >> 4) & NIBBLES, 0x08080808), sub4((b >> 4) & NIBBLES, 0x08080808), sub4((c >> 4) & NIBBLES, 0x08080808),
            sub4((e >> 4) & NIBBLES, 0x08080808), d, d, ZERO, ZERO)


@device
def group_q4_1(data, row, g):
    """Group g of a Q4_1 row."""
    at = row + Q4_1 * g
    a, b, c, e = u32_at(data, at + 4), u32_at(data, at + 8), u32_at(data, at + 12), u32_at(data, at + 16)
    d, offset = half_at(data, at), -half_at(data, at + 2)
    return (a & NIBBLES, b & NIBBLES, c & NIBBLES, e & NIBBLES, (a >> 4) & NIBBLES, (b >> 4) & NIBBLES, (c >> 4) & NIBBLES,
            (e >> 4) & NIBBLES, d, d, offset, offset)


@device
def group_q5_0(data, row, g):
    """Group g of a Q5_0 row."""
    at = row + Q5_0 * g
    high = any_u32(data, at + 2)
    a, b, c, e = any_four_u32(data, at + 6)
    d = half_at(data, at)
    return (sub4(a & NIBBLES | fifth_bits(high, 0), 0x10101010), sub4(b & NIBBLES | fifth_bits(high, 1), 0x10101010),
            sub4(c & NIBBLES | fifth_bits(high, 2), 0x10101010), sub4(e & NIBBLES | fifth_bits(high, 3), 0x10101010),
            sub4((a >> 4) & NIBBLES | fifth_bits(high, 4), 0x10101010), sub4((b >> 4) & NIBBLES | fifth_bits(high, 5), 0x10101010),
            sub4((c >> 4) & NIBBLES | fifth_bits(high, 6), 0x10101010), sub4((e >> 4) & NIBBLES | fifth_bits(high, 7), 0x10101010),
            d, d, ZERO, ZERO)


@device
def group_q5_1(data, row, g):
    """Group g of a Q5_1 row."""
    at = row + Q5_1 * g
    high = u32_at(data, at + 4)
    a, b, c, e = u32_at(data, at + 8), u32_at(data, at + 12), u32_at(data, at + 16), u32_at(data, at + 20)
    d, offset = half_at(data, at), -half_at(data, at + 2)
    return (a & NIBBLES | fifth_bits(high, 0), b & NIBBLES | fifth_bits(high, 1), c & NIBBLES | fifth_bits(high, 2),
            e & NIBBLES | fifth_bits(high, 3), (a >> 4) & NIBBLES | fifth_bits(high, 4), (b >> 4) & NIBBLES | fifth_bits(high, 5),
            (c >> 4) & NIBBLES | fifth_bits(high, 6), (e >> 4) & NIBBLES | fifth_bits(high, 7), d, d, offset, offset)


@device
def group_q8_0(data, row, g):
    """Group g of a Q8_0 row."""
    at = row + Q8_0 * g
    d = half_at(data, at)
    a, b, c, e, f, h, i, j = any_eight_u32(data, at + 2)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def fifths(bits, i):
    """fifth_bits of sixteen weights from bit 4 i on."""
    return fifth_bits(bits, i), fifth_bits(bits, i + 1), fifth_bits(bits, i + 2), fifth_bits(bits, i + 3)


@device
def weights_q4_0(data, row, c, second):
    """Two blocks of Q4_0, from 0 to 15."""
    at = row + 2 * Q4_0 * c
    other = at + Q4_0 * second
    q, r, d, e = any_four_u32(data, at + 2), any_four_u32(data, other + 2), half_at(data, at), half_at(data, other)
    return (four_of(q, 0, NIBBLES), four_of(q, 4, NIBBLES), four_of(r, 0, NIBBLES), four_of(r, 4, NIBBLES), (d, d, e, e), NO_OFFSETS)


@device
def weights_q5_0(data, row, c, second):
    """Two blocks of Q5_0, from 0 to 31."""
    at = row + 2 * Q5_0 * c
    other = at + Q5_0 * second
    q, r, h, i = any_four_u32(data, at + 6), any_four_u32(data, other + 6), any_u32(data, at + 2), any_u32(data, other + 2)
    d, e = half_at(data, at), half_at(data, other)
    return (both(four_of(q, 0, NIBBLES), fifths(h, 0)), both(four_of(q, 4, NIBBLES), fifths(h, 4)),
            both(four_of(r, 0, NIBBLES), fifths(i, 0)), both(four_of(r, 4, NIBBLES), fifths(i, 4)), (d, d, e, e), NO_OFFSETS)


GROUPED = {"Q4_0": entry("Q4_0", group_q4_0, lane=Lane(weights_q4_0, False, 8, False)), "Q4_1": entry("Q4_1", group_q4_1),
           "Q5_0": entry("Q5_0", group_q5_0, lane=Lane(weights_q5_0, False, 16, False)), "Q5_1": entry("Q5_1", group_q5_1),
           "Q8_0": entry("Q8_0", group_q8_0)}
