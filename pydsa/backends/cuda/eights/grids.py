"""Eights of IQ1_S to IQ3_S: a row of a grid has eight weights, or in IQ3 four.

What they are made of is in blocks/grids.py. Bytes are 128 more than levels; one of signs has a bit for each of eight weights.
"""
from pydsa.backends.cuda.blocks.block import selector
from pydsa.backends.cuda.eights.eight import (NO_OFFSETS, NONE, SIGNS, Eights, U, bytes_from, four_bits_in_bytes, half_in,
                                              head_of_d, load_words, odd)
from pydsa.backends.cuda.blocks.grids import (EIGHTH, NEGATIVE, POSITIVE, QUARTER, SHIFTED_DOWN, SHIFTED_UP, eight_levels,
                                              magnitudes_of_iq3_s, magnitudes_of_iq3_xxs, prepare_iq1, prepare_iq2_s, prepare_iq2_xs,
                                              prepare_iq2_xxs, prepare_iq3_s, prepare_iq3_xxs, row_of_iq1, row_of_iq2_s, row_of_iq2_xs,
                                              row_of_iq2_xxs)
from pydsa.backends.cuda.intrinsics.device import device, of_half, permuted
from pydsa.backends.cuda.intrinsics.instructions import count_bits, fetch_eight, fetch_four

POSITIVES, NEGATIVES, UP, DOWN = (levels ^ SIGNS for levels in (POSITIVE, NEGATIVE, SHIFTED_UP, SHIFTED_DOWN))
IQ2_MOST, IQ3_XXS_MOST, IQ3_S_MOST, IQ1_MOST = 31 * 43, 31 * 62, 31 * 15, 15 * 9      # the greatest weights of a block, over its scale
BYTE = U(255)


@device
def with_eighth(seven):
    """Seven signs with the eighth, which makes their number even."""
    seven = U(seven & U(127))
    return seven | U(count_bits(seven) << U(7)) & U(128)


@device
def in_nibbles(signs):
    """Eight bits, each as bit 2 of a nibble."""
    x = U(signs)
    x = (x | x << U(12)) & U(0x000F000F)
    x = (x | x << U(6)) & U(0x03030303)
    return ((x | x << U(3)) & U(0x11111111)) << U(2)


@device
def signed_levels(row, signs):
    """The levels of a row of IQ2 with their signs."""
    return eight_levels(POSITIVES, NEGATIVES, U(row) | in_nibbles(signs))


def _make_head(part):
    @device
    def head(raw, i, at, c):
        return half_in(raw[i], at) * part, NONE
    return head


eighth_of_d, quarter_of_d = _make_head(EIGHTH), _make_head(QUARTER)


@device
def load_iq2_xxs(raw, i, data, at, second, j, c):
    """raw: a word with d; of two groups five with their indices, signs and scales."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 5, data, at + 2 + 16 * j)


@device
def eight_of_iq2_xxs(rows, signs, c):
    """One row of four."""
    return signed_levels(row_of_iq2_xxs(U(rows) >> U(8 * c) & BYTE), with_eighth(U(signs) >> U(7 * c)))


@device
def unpack_iq2_xxs(raw, i, at, second, j, c):
    """A row of each of two groups."""
    pick = selector(at + 2)
    signs, signs_1 = U(permuted(raw[i + 2], raw[i + 3], pick)), U(permuted(raw[i + 4], raw[i + 5], pick))
    a, b = eight_of_iq2_xxs(permuted(raw[i + 1], raw[i + 2], pick), signs, c)
    e, f = eight_of_iq2_xxs(permuted(raw[i + 3], raw[i + 4], pick), signs_1, c)
    return U(a), U(b), U(e), U(f), odd(signs >> U(28), signs_1 >> U(28)), NO_OFFSETS


@device
def load_iq2_xs(raw, i, data, at, second, j, c):
    """raw: a word with d; of two groups one with an index and signs each, and one with both scales."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 1, data, at + 2 + 16 * j + 2 * c)
    load_words(raw, i + 2, 1, data, at + 10 + 16 * j + 2 * c)
    load_words(raw, i + 3, 1, data, at + 66 + 2 * j)


@device
def eight_of_iq2_xs(bits):
    """The row of nine bits, with the seven signs that follow."""
    return signed_levels(row_of_iq2_xs(bits & U(511)), with_eighth(bits >> U(9)))


@device
def unpack_iq2_xs(raw, i, at, second, j, c):
    """A row of each of two groups."""
    a, b = eight_of_iq2_xs(bytes_from(raw[i + 1], at + 2 + 2 * c))
    e, f = eight_of_iq2_xs(bytes_from(raw[i + 2], at + 2 + 2 * c))
    scales = bytes_from(raw[i + 3], at + 66 + 2 * j) >> (U(c) << U(1) & U(4))
    return U(a), U(b), U(e), U(f), odd(scales & U(15), scales >> U(8) & U(15)), NO_OFFSETS


@device
def load_iq2_s(raw, i, data, at, second, j, c):
    """raw: a word with d; of two groups one with an index and one with signs each, one with the upper bits of indices, one with scales."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 1, data, at + 2 + 8 * j + c)
    load_words(raw, i + 2, 1, data, at + 6 + 8 * j + c)
    load_words(raw, i + 3, 1, data, at + 34 + 8 * j + c)
    load_words(raw, i + 4, 1, data, at + 38 + 8 * j + c)
    load_words(raw, i + 5, 1, data, at + 66 + 2 * j)
    load_words(raw, i + 6, 1, data, at + 74 + 2 * j)


@device
def unpack_iq2_s(raw, i, at, second, j, c):
    """A row of each of two groups."""
    high, here = bytes_from(raw[i + 5], at + 66 + 2 * j) >> U(2 * c), at + 2 + c
    first, other = bytes_from(raw[i + 1], here) & BYTE | high << U(8) & U(0x300), bytes_from(raw[i + 2], here) & BYTE | high & U(0x300)
    a, b = signed_levels(row_of_iq2_s(first), bytes_from(raw[i + 3], here) & BYTE)
    e, f = signed_levels(row_of_iq2_s(other), bytes_from(raw[i + 4], here) & BYTE)
    scales = bytes_from(raw[i + 6], at + 74 + 2 * j) >> (U(c) << U(1) & U(4))
    return U(a), U(b), U(e), U(f), odd(scales & U(15), scales >> U(8) & U(15)), NO_OFFSETS


@device
def load_iq3_xxs(raw, i, data, at, second, j, c):
    """raw: a word with d; of two groups one with two indices each, three with their signs and scales."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 1, data, at + 2 + 16 * j + 2 * c)
    load_words(raw, i + 2, 1, data, at + 10 + 16 * j + 2 * c)
    load_words(raw, i + 3, 3, data, at + 66 + 8 * j)


@device
def with_signs(magnitudes, signs):
    """Four magnitudes, negated where one of four bits is set, plus 128. No carry goes from a byte to the next: none is 0."""
    ones = four_bits_in_bytes(U(signs))
    return ((U(magnitudes) ^ ones * U(255)) + ones) ^ SIGNS


@device
def eight_of_iq3_xxs(rows, signs):
    """Two rows of four."""
    return (with_signs(magnitudes_of_iq3_xxs(rows & BYTE), signs), with_signs(magnitudes_of_iq3_xxs(rows >> U(8) & BYTE), signs >> U(4)))


@device
def unpack_iq3_xxs(raw, i, at, second, j, c):
    """Two rows of each of two groups."""
    pick = selector(at + 66)
    bits, bits_1 = U(permuted(raw[i + 3], raw[i + 4], pick)), U(permuted(raw[i + 4], raw[i + 5], pick))
    a, b = eight_of_iq3_xxs(bytes_from(raw[i + 1], at + 2 + 2 * c), with_eighth(bits >> U(7 * c)))
    e, f = eight_of_iq3_xxs(bytes_from(raw[i + 2], at + 2 + 2 * c), with_eighth(bits_1 >> U(7 * c)))
    return a, b, e, f, odd(bits >> U(28), bits_1 >> U(28)), NO_OFFSETS


@device
def load_iq3_s(raw, i, data, at, second, j, c):
    """raw: a word with d; of two groups one with two indices and one with signs each; one with their ninth bits, one with scales."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 1, data, at + 2 + 16 * j + 2 * c)
    load_words(raw, i + 2, 1, data, at + 10 + 16 * j + 2 * c)
    load_words(raw, i + 3, 1, data, at + 74 + 8 * j + c)
    load_words(raw, i + 4, 1, data, at + 78 + 8 * j + c)
    load_words(raw, i + 5, 1, data, at + 66 + 2 * j)
    load_words(raw, i + 6, 1, data, at + 106 + j)


@device
def eight_of_iq3_s(rows, high, signs):
    """Two rows of four. high: their ninth bits."""
    return (with_signs(magnitudes_of_iq3_s(rows & BYTE | high << U(8) & U(256)), signs),
            with_signs(magnitudes_of_iq3_s(rows >> U(8) & BYTE | high << U(7) & U(256)), signs >> U(4)))


@device
def unpack_iq3_s(raw, i, at, second, j, c):
    """Two rows of each of two groups."""
    high = bytes_from(raw[i + 5], at + 66 + 2 * j) >> U(2 * c)
    a, b = eight_of_iq3_s(bytes_from(raw[i + 1], at + 2 + 2 * c), high, bytes_from(raw[i + 3], at + 74 + c))
    e, f = eight_of_iq3_s(bytes_from(raw[i + 2], at + 2 + 2 * c), high >> U(8), bytes_from(raw[i + 4], at + 74 + c))
    scales = bytes_from(raw[i + 6], at + 106 + j)
    return a, b, e, f, odd(scales & U(15), scales >> U(4) & U(15)), NO_OFFSETS


@device
def eight_of_iq1(index, down):
    """A row of IQ1 in eighths. down: whether it is shifted down, not 0 then."""
    levels = DOWN if down != U(0) else UP
    a, b = eight_levels(levels, levels, row_of_iq1(index))
    return U(a), U(b)


@device
def load_iq1_s(raw, i, data, at, second, j, c):
    """raw: a word with d; of two groups one with an index each, two with upper bits, scales and shifts."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 1, data, at + 2 + 8 * j + c)
    load_words(raw, i + 2, 1, data, at + 6 + 8 * j + c)
    load_words(raw, i + 3, 2, data, at + 34 + 4 * j)


@device
def unpack_iq1_s(raw, i, at, second, j, c):
    """A row of each of two groups."""
    both, here = U(permuted(raw[i + 3], raw[i + 4], selector(at + 34))), at + 2 + c
    upper, upper_1 = both >> U(3 * c), both >> U(16 + 3 * c)
    a, b = eight_of_iq1(bytes_from(raw[i + 1], here) & BYTE | upper << U(8) & U(0x700), both & U(0x8000))
    e, f = eight_of_iq1(bytes_from(raw[i + 2], here) & BYTE | upper_1 << U(8) & U(0x700), both >> U(31))
    return a, b, e, f, odd(both >> U(12) & U(7), both >> U(28) & U(7)), NO_OFFSETS


@device
def load_iq1_m(raw, i, data, at, second, j, c):
    """raw, after the head: two words of scales, which have it; of two groups two with indices, one with upper bits and shifts."""
    if j == 0:
        raw[i + 1], raw[i + 2] = fetch_eight(data, at + 48)
    raw[i + 3], raw[i + 4] = fetch_eight(data, at + 8 * j)
    raw[i + 5] = fetch_four(data, at + 32 + 4 * j)


@device
def head_of_iq1_m(raw, i, at, c):
    """d, over 8: its bits are the highest of four uint16."""
    a, b = U(raw[i + 1]), U(raw[i + 2])
    return of_half(U(a >> U(12) & U(0xF) | a >> U(24) & U(0xF0) | b >> U(4) & U(0xF00) | b >> U(16) & U(0xF000))) * EIGHTH, NONE


@device
def unpack_iq1_m(raw, i, at, second, j, c):
    """A row of each of two groups."""
    high = U(raw[i + 5]) >> U(4 * c)
    a, b = eight_of_iq1(U(raw[i + 3]) >> U(8 * c) & BYTE | high << U(8) & U(0x700), high & U(8))
    e, f = eight_of_iq1(U(raw[i + 4]) >> U(8 * c) & BYTE | high >> U(8) & U(0x700), high >> U(16) & U(8))
    scales = U(raw[i + 1 + (j >> 1)]) >> (U(16 * (j & 1)) + U(3) * (U(c) >> U(1)))
    return a, b, e, f, odd(scales & U(7), scales >> U(6) & U(7)), NO_OFFSETS


EIGHTS = {"IQ2_XXS": Eights(6, 4, load_iq2_xxs, eighth_of_d, unpack_iq2_xxs, (IQ2_MOST, 0), 128, True, prepare=prepare_iq2_xxs),
          "IQ2_XS": Eights(4, 4, load_iq2_xs, eighth_of_d, unpack_iq2_xs, (IQ2_MOST, 0), 128, True, prepare=prepare_iq2_xs),
          "IQ2_S": Eights(7, 4, load_iq2_s, eighth_of_d, unpack_iq2_s, (IQ2_MOST, 0), 128, True, prepare=prepare_iq2_s),
          "IQ3_XXS": Eights(6, 4, load_iq3_xxs, quarter_of_d, unpack_iq3_xxs, (IQ3_XXS_MOST, 0), 128, True, prepare=prepare_iq3_xxs),
          "IQ3_S": Eights(7, 4, load_iq3_s, head_of_d, unpack_iq3_s, (IQ3_S_MOST, 0), 128, True, prepare=prepare_iq3_s),
          "IQ1_S": Eights(5, 4, load_iq1_s, eighth_of_d, unpack_iq1_s, (IQ1_MOST, 0), 128, True, prepare=prepare_iq1),
          "IQ1_M": Eights(6, 4, load_iq1_m, head_of_iq1_m, unpack_iq1_m, (IQ1_MOST, 0), 128, True, prepare=prepare_iq1)}
