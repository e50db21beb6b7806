"""IQ1_S to IQ3_S: indices of rows of a grid, which is in shared memory.

A row of a grid is one uint32: eight nibbles, which number the levels of eight weights for a byte permute (prmt), or in IQ3 four bytes.
Levels are positive, and signs come as bits; IQ1 has negative levels, and all are shifted up or down by an eighth. Every superblock has 256
weights. k numbers the rows of a group of 32.
"""
import numpy as np

from pydsa.backends.cuda.blocks.block import ONE_BIT, ZERO, any_two_u32, any_u32, entry, sign_of_four, signs_in_bytes, swapped
from pydsa.backends.cuda.intrinsics.constants import shared_table
from pydsa.backends.cuda.intrinsics.device import byte_at, device, half_at, of_half, permuted, u32_at
from pydsa.quants import IQ2_LEVELS, TYPES, grid


IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S = (
    TYPES[name].n_bytes for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"))      # bytes of a block
QUARTER, EIGHTH = np.float32(0.25), np.float32(0.125)


def _four_levels(levels):
    """At most four int8 as a uint32."""
    return np.array([*levels, 0, 0, 0, 0][:4], np.int8).view(np.uint32)[0]


def _nibbles(rows, levels):
    """Rows of eight weights as uint32: the number of each weight's level."""
    numbers = np.searchsorted(np.array(levels), rows).astype(np.uint32)
    return np.bitwise_or.reduce(numbers << np.arange(0, 32, 4, dtype=np.uint32), axis=1)


def _bytes(rows):
    """Rows of four int8 as uint32."""
    return np.ascontiguousarray(rows).view(np.uint32)[:, 0]


prepare_iq1, row_of_iq1 = shared_table("grid_iq1", _nibbles(grid("IQ1_S"), (-1, 0, 1)))     # that of IQ1_M too
prepare_iq2_xxs, row_of_iq2_xxs = shared_table("grid_iq2_xxs", _nibbles(grid("IQ2_XXS"), IQ2_LEVELS))
prepare_iq2_xs, row_of_iq2_xs = shared_table("grid_iq2_xs", _nibbles(grid("IQ2_XS"), IQ2_LEVELS))
prepare_iq2_s, row_of_iq2_s = shared_table("grid_iq2_s", _nibbles(grid("IQ2_S"), IQ2_LEVELS))
prepare_iq3_xxs, magnitudes_of_iq3_xxs = shared_table("grid_iq3_xxs", _bytes(grid("IQ3_XXS")))
prepare_iq3_s, magnitudes_of_iq3_s = shared_table("grid_iq3_s", _bytes(grid("IQ3_S")))

SHIFTED_UP, SHIFTED_DOWN = _four_levels((-7, 1, 9)), _four_levels((-9, -1, 7))      # the levels of IQ1 in eighths, with their shift
POSITIVE, NEGATIVE = _four_levels(IQ2_LEVELS), _four_levels([-level for level in IQ2_LEVELS])


@device
def signs_in_nibbles(bits):
    """Move bit 8 k + i to nibble i: to its bit 0, 2, 1, 3 for k = 0 to 3."""
    return swapped(swapped(swapped(bits, 6, 0x00CC00CC), 12, 0x0000F0F0), 3, 0x0A0A0A0A)


@device
def with_eighth(sevens):
    """Add the eighth sign to seven in each byte: their number is even."""
    odd = np.uint32(sevens ^ sevens >> 4)
    odd = np.uint32(odd ^ odd >> 2)
    odd = np.uint32(odd ^ odd >> 1)
    return np.uint32(sevens ^ odd << 7 & 0x80808080)


@device
def four_sevens(bits):
    """The four lowest seven bits of a uint32, each in a byte."""
    return np.uint32(bits & 0x7F | bits << 1 & 0x7F00 | bits << 2 & 0x7F0000 | bits << 3 & 0x7F000000)


@device
def eight_levels(low, high, row):
    """The levels of a row's eight nibbles: of `low` from 0 to 3, of `high` from 4 to 7."""
    row = np.uint32(row)
    return permuted(low, high, row), permuted(low, high, np.uint32(row >> 16))


@device
def signed_rows(first, second, third, fourth, signs):
    """Four rows of IQ2 with their signs, bit 8 k + i for weight i of row k."""
    signs = signs_in_nibbles(signs)
    a, b = eight_levels(POSITIVE, NEGATIVE, first | signs << 2 & 0x44444444)
    c, e = eight_levels(POSITIVE, NEGATIVE, second | signs & 0x44444444)
    f, h = eight_levels(POSITIVE, NEGATIVE, third | signs << 1 & 0x44444444)
    i, j = eight_levels(POSITIVE, NEGATIVE, fourth | signs >> 1 & 0x44444444)
    return a, b, c, e, f, h, i, j


@device
def odd_number(bits):
    """The scale of a sub-block with these bits."""
    return np.float32(np.int32(2 * bits + 1))


@device
def scales_iq2_xxs(data, row, g):
    """The scales of group g of an IQ2_XXS row."""
    at = row + IQ2_XXS * (g >> 3)
    _, signs = any_two_u32(data, at + 2 + 8 * (g & 7))
    scale = odd_number(signs >> 28)
    return half_at(data, at) * EIGHTH, scale, scale


@device
def group_iq2_xxs(data, row, g):
    """Group g of an IQ2_XXS row."""
    at = row + IQ2_XXS * (g >> 3)
    q, signs = any_two_u32(data, at + 2 + 8 * (g & 7))
    d, scale, _ = scales_iq2_xxs(data, row, g)
    d *= scale
    a, b, c, e, f, h, i, j = signed_rows(row_of_iq2_xxs(q & 255), row_of_iq2_xxs(q >> 8 & 255), row_of_iq2_xxs(q >> 16 & 255),
                                         row_of_iq2_xxs(q >> 24), with_eighth(four_sevens(signs)))
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def scales_iq2_xs(data, row, g):
    """The scales of group g of an IQ2_XS row."""
    at = row + IQ2_XS * (g >> 3)
    scales = byte_at(data, at + 66 + (g & 7))
    return half_at(data, at) * EIGHTH, odd_number(scales & 15), odd_number(scales >> 4)


@device
def group_iq2_xs(data, row, g):
    """Group g of an IQ2_XS row."""
    q, q1 = any_two_u32(data, row + IQ2_XS * (g >> 3) + 2 + 8 * (g & 7))
    d, scale, scale_1 = scales_iq2_xs(data, row, g)
    sevens = permuted(np.uint32(q >> 1), np.uint32(q1 >> 1), np.uint32(0x7531)) & 0x7F7F7F7F
    a, b, c, e, f, h, i, j = signed_rows(row_of_iq2_xs(q & 511), row_of_iq2_xs(q >> 16 & 511), row_of_iq2_xs(q1 & 511),
                                         row_of_iq2_xs(q1 >> 16 & 511), with_eighth(sevens))
    return a, b, c, e, f, h, i, j, d * scale, d * scale_1, ZERO, ZERO


@device
def scales_iq2_s(data, row, g):
    """The scales of group g of an IQ2_S row."""
    at = row + IQ2_S * (g >> 3)
    scales = byte_at(data, at + 74 + (g & 7))
    return half_at(data, at) * EIGHTH, odd_number(scales & 15), odd_number(scales >> 4)


@device
def group_iq2_s(data, row, g):
    """Group g of an IQ2_S row."""
    at, s = row + IQ2_S * (g >> 3), g & 7
    q, signs, high = any_u32(data, at + 2 + 4 * s), any_u32(data, at + 34 + 4 * s), byte_at(data, at + 66 + s)
    d, scale, scale_1 = scales_iq2_s(data, row, g)
    a, b, c, e, f, h, i, j = signed_rows(row_of_iq2_s(q & 255 | high << 8 & 0x300), row_of_iq2_s(q >> 8 & 255 | high << 6 & 0x300),
                                         row_of_iq2_s(q >> 16 & 255 | high << 4 & 0x300), row_of_iq2_s(q >> 24 | high << 2 & 0x300), signs)
    return a, b, c, e, f, h, i, j, d * scale, d * scale_1, ZERO, ZERO


@device
def row_of_iq3_xxs(index, signs, bit):
    """Four weights of IQ3_XXS, negated where this bit of `signs` is set. None is zero."""
    negative = sign_of_four(signs, bit)
    return (magnitudes_of_iq3_xxs(index) ^ negative) + (negative & ONE_BIT)


@device
def scales_iq3_xxs(data, row, g):
    """The scales of group g of an IQ3_XXS row."""
    at = row + IQ3_XXS * (g >> 3)
    scale = odd_number(any_u32(data, at + 66 + 4 * (g & 7)) >> 28)
    return half_at(data, at) * QUARTER, scale, scale


@device
def group_iq3_xxs(data, row, g):
    """Group g of an IQ3_XXS row."""
    at, s = row + IQ3_XXS * (g >> 3), g & 7
    q, q1 = any_two_u32(data, at + 2 + 8 * s)
    signs = signs_in_bytes(with_eighth(four_sevens(any_u32(data, at + 66 + 4 * s))))
    d, scale, _ = scales_iq3_xxs(data, row, g)
    d *= scale
    return (row_of_iq3_xxs(q & 255, signs, 0), row_of_iq3_xxs(q >> 8 & 255, signs, 4),
            row_of_iq3_xxs(q >> 16 & 255, signs, 1), row_of_iq3_xxs(q >> 24, signs, 5),
            row_of_iq3_xxs(q1 & 255, signs, 2), row_of_iq3_xxs(q1 >> 8 & 255, signs, 6),
            row_of_iq3_xxs(q1 >> 16 & 255, signs, 3), row_of_iq3_xxs(q1 >> 24, signs, 7), d, d, ZERO, ZERO)


@device
def row_of_iq3_s(index, signs, bit):
    """Four weights of IQ3_S, negated where this bit of `signs` is set.

    All are odd: all bits but the lowest change.
    """
    return magnitudes_of_iq3_s(index) ^ sign_of_four(signs, bit) & 0xFEFEFEFE


@device
def scales_iq3_s(data, row, g):
    """The scales of group g of an IQ3_S row."""
    at, s = row + IQ3_S * (g >> 3), g & 7
    scale = odd_number(byte_at(data, at + 106 + (s >> 1)) >> 4 * (s & 1) & 15)
    return half_at(data, at), scale, scale


@device
def group_iq3_s(data, row, g):
    """Group g of an IQ3_S row."""
    at, s = row + IQ3_S * (g >> 3), g & 7
    q, q1 = any_two_u32(data, at + 2 + 8 * s)
    high, signs = byte_at(data, at + 66 + s), signs_in_bytes(any_u32(data, at + 74 + 4 * s))
    d, scale, _ = scales_iq3_s(data, row, g)
    d *= scale
    return (row_of_iq3_s(q & 255 | high << 8 & 256, signs, 0), row_of_iq3_s(q >> 8 & 255 | high << 7 & 256, signs, 4),
            row_of_iq3_s(q >> 16 & 255 | high << 6 & 256, signs, 1), row_of_iq3_s(q >> 24 | high << 5 & 256, signs, 5),
            row_of_iq3_s(q1 & 255 | high << 4 & 256, signs, 2), row_of_iq3_s(q1 >> 8 & 255 | high << 3 & 256, signs, 6),
            row_of_iq3_s(q1 >> 16 & 255 | high << 2 & 256, signs, 3), row_of_iq3_s(q1 >> 24 | high << 1 & 256, signs, 7),
            d, d, ZERO, ZERO)


@device
def shifted_row(index, down):
    """Eight weights of IQ1 in eighths. down: whether they are shifted down, as an integer."""
    levels = SHIFTED_DOWN if down else SHIFTED_UP
    return eight_levels(levels, levels, row_of_iq1(index))


@device
def scales_iq1_s(data, row, g):
    """The scales of group g of an IQ1_S row."""
    at = row + IQ1_S * (g >> 3)
    scale = odd_number(byte_at(data, at + 35 + 2 * (g & 7)) >> 4 & 7)
    return half_at(data, at) * EIGHTH, scale, scale


@device
def group_iq1_s(data, row, g):
    """Group g of an IQ1_S row."""
    at, s = row + IQ1_S * (g >> 3), g & 7
    q, high = any_u32(data, at + 2 + 4 * s), byte_at(data, at + 34 + 2 * s) | byte_at(data, at + 35 + 2 * s) << 8
    (d, scale, _), down = scales_iq1_s(data, row, g), high >> 15
    d *= scale
    a, b = shifted_row(q & 255 | high << 8 & 0x700, down)
    c, e = shifted_row(q >> 8 & 255 | high << 5 & 0x700, down)
    f, h = shifted_row(q >> 16 & 255 | high << 2 & 0x700, down)
    i, j = shifted_row(q >> 24 | high >> 1 & 0x700, down)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def scales_iq1_m(data, row, g):
    """The scales of group g of an IQ1_M row.

    The bits of d are the highest of four uint16 of scales.
    """
    at, s = row + IQ1_M * (g >> 3), g & 7
    first, second = u32_at(data, at + 48), u32_at(data, at + 52)
    d = of_half(np.uint32(first >> 12 & 0xF | first >> 24 & 0xF0 | second >> 4 & 0xF00 | second >> 16 & 0xF000))
    scales = (first if s < 4 else second) >> (16 * (s >> 1 & 1) + 6 * (s & 1))
    return d * EIGHTH, odd_number(scales & 7), odd_number(scales >> 3 & 7)


@device
def group_iq1_m(data, row, g):
    """Group g of an IQ1_M row."""
    at, s = row + IQ1_M * (g >> 3), g & 7
    q, high = u32_at(data, at + 4 * s), u32_at(data, at + 32 + 4 * (s >> 1)) >> 16 * (s & 1)
    d, scale, scale_1 = scales_iq1_m(data, row, g)
    a, b = shifted_row(q & 255 | high << 8 & 0x700, high & 8)
    c, e = shifted_row(q >> 8 & 255 | high << 4 & 0x700, high & 0x80)
    f, h = shifted_row(q >> 16 & 255 | high & 0x700, high & 0x800)
    i, j = shifted_row(q >> 24 | high >> 4 & 0x700, high & 0x8000)
    return a, b, c, e, f, h, i, j, d * scale, d * scale_1, ZERO, ZERO


GROUPED = {"IQ1_S": entry("IQ1_S", group_iq1_s, prepare_iq1, scales=scales_iq1_s),
           "IQ1_M": entry("IQ1_M", group_iq1_m, prepare_iq1, scales=scales_iq1_m),
           "IQ2_XXS": entry("IQ2_XXS", group_iq2_xxs, prepare_iq2_xxs, scales=scales_iq2_xxs),
           "IQ2_XS": entry("IQ2_XS", group_iq2_xs, prepare_iq2_xs, scales=scales_iq2_xs),
           "IQ2_S": entry("IQ2_S", group_iq2_s, prepare_iq2_s, scales=scales_iq2_s),
           "IQ3_XXS": entry("IQ3_XXS", group_iq3_xxs, prepare_iq3_xxs, scales=scales_iq3_xxs),
           "IQ3_S": entry("IQ3_S", group_iq3_s, prepare_iq3_s, scales=scales_iq3_s)}
