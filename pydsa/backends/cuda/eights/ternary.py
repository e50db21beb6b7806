"""Eights of TQ1_0, TQ2_0 and Q1_0."""
from pydsa.backends.cuda.blocks.block import selector
from pydsa.backends.cuda.eights.eight import (NO_OFFSETS, SIGNS, TWICE, TWO_BITS, Eights, U, bytes_from, four_bits_in_bytes,
                                              head_of_d, load_words, two_words)
from pydsa.backends.cuda.blocks.ternary import trits
from pydsa.backends.cuda.intrinsics.device import device, permuted

# Of TQ1_0: the power of three of each group's first half, and of its second one, but for that of group 7
FIRST, SECOND = (1, 3, 9, 27, 81, 1, 9, 81), (1, 3, 9, 27, 81, 3, 27, 0)


@device
def twice(head):
    """The lower float16 of a head, for both groups."""
    return U(permuted(head, U(0), TWICE))


@device
def load_tq1_0(raw, i, data, at, second, j, c):
    """raw: d; eight of the first 32 bytes, eight of the next 16, which two lanes take; the last four, before d."""
    if j == 0:
        load_words(raw, i + 1, 3, data, at + 8 * c)
        load_words(raw, i + 4, 3, data, at + 32 + 8 * (c & 1))
        load_words(raw, i + 7, 2, data, at + 48)
        raw[i] = raw[i + 8]


def _make_trits(g):
    """The function of the trits of a lane in group g."""
    first, later, place = U(FIRST[g]), U(SECOND[g]), 1 if g < 5 else 4

    @device
    def trits_of(raw, i, at, c):
        a, b = two_words(raw, i + place, at)
        power = first if c < 2 else later
        p, q = power, power
        if g == 7 and c >= 2:
            a = U(permuted(raw[i + 7], raw[i + 8], selector(at)))
            b = a
            p, q = (U(1), U(3)) if c == 2 else (U(9), U(27))
        return U(trits(a, p)) ^ SIGNS, U(trits(b, q)) ^ SIGNS
    return trits_of


T0, T1, T2, T3, T4, T5, T6, T7 = (_make_trits(g) for g in range(8))


@device
def unpack_tq1_0(raw, i, at, second, j, c):
    """Eight trits of each of two groups."""
    if j == 0:
        (a, b), (e, f) = T0(raw, i, at, c), T1(raw, i, at, c)
    elif j == 1:
        (a, b), (e, f) = T2(raw, i, at, c), T3(raw, i, at, c)
    elif j == 2:
        (a, b), (e, f) = T4(raw, i, at, c), T5(raw, i, at, c)
    else:
        (a, b), (e, f) = T6(raw, i, at, c), T7(raw, i, at, c)
    return a, b, e, f, twice(raw[i]), NO_OFFSETS


@device
def load_tq2_0(raw, i, data, at, second, j, c):
    """raw: a word with d, and eight bytes of half a block."""
    if j == 0:
        load_words(raw, i, 1, data, at + 64)
    if j == 0 or j == 2:
        load_words(raw, i + 1, 3, data, at + 16 * j + 8 * c)


@device
def unpack_tq2_0(raw, i, at, second, j, c):
    """Two of the four times two bits of eight bytes."""
    a, b = two_words(raw, i + 1, at)
    a, b = a >> U(4 * (j & 1)), b >> U(4 * (j & 1))
    return a & TWO_BITS, b & TWO_BITS, a >> U(2) & TWO_BITS, b >> U(2) & TWO_BITS, twice(raw[i]), NO_OFFSETS


@device
def load_q1_0(raw, i, data, at, second, j, c):
    """raw: a word with d, and one with eight bits of each group."""
    if j == 0:
        load_words(raw, i, 1, data, at)
    load_words(raw, i + 1, 1, data, at + 2 + 8 * j + c)
    load_words(raw, i + 2, 1, data, at + 6 + 8 * j + c)


@device
def unpack_q1_0(raw, i, at, second, j, c):
    """Two for a bit that is set, else 0."""
    x, y = bytes_from(raw[i + 1], at + 2 + c), bytes_from(raw[i + 2], at + 2 + c)
    return (four_bits_in_bytes(x) << U(1), four_bits_in_bytes(x >> U(4)) << U(1), four_bits_in_bytes(y) << U(1),
            four_bits_in_bytes(y >> U(4)) << U(1), twice(raw[i]), NO_OFFSETS)


# a code of TQ2_0 may be 3, which stands for 2, though none is written
EIGHTS = {"TQ1_0": Eights(9, 4, load_tq1_0, head_of_d, unpack_tq1_0, (1, 0), 128),
          "TQ2_0": Eights(4, 4, load_tq2_0, head_of_d, unpack_tq2_0, (2, 0), 1),
          "Q1_0": Eights(3, 2, load_q1_0, head_of_d, unpack_q1_0, (1, 0), 1)}
