"""TQ1_0, TQ2_0, Q1_0: weights of -1, 0 or 1, or of -1 or 1, times a scale."""
import numpy as np

from pydsa.backends.cuda.blocks.block import (NO_OFFSETS, ONE_BIT, TWO_BITS, ZERO, Lane, any_eight_u32, any_four_u32, any_u32, entry,
                                              four_of, sign_of_four, signs_in_bytes, sub4)
from pydsa.backends.cuda.intrinsics.device import device, half_at, permuted
from pydsa.quants import TYPES


TQ1_0, TQ2_0, Q1_0 = (TYPES[name].n_bytes for name in ("TQ1_0", "TQ2_0", "Q1_0"))      # bytes of a block
LOW_BYTES = 0x00FF00FF      # of two uint16
ODD_BYTES, HIGH_BYTES = np.uint32(0x4341), np.uint32(0x7351)    # prmt selectors: to uint16; of uint16, in turns from both


def _packed(numbers):
    """Eight bytes as two uint32."""
    return tuple(np.array(numbers, np.uint8).view(np.uint32))


# The powers of three with which groups 0 to 7 of TQ1_0 are unpacked: their first half, and their second, but for group 7
FIRST_POWERS, SECOND_POWERS = _packed([1, 3, 9, 27, 81, 1, 9, 81]), _packed([1, 3, 9, 27, 81, 3, 27, 0])


@device
def byte_of(pair, i):
    """Byte i of two uint32."""
    return np.uint32(permuted(pair[0], pair[1], np.uint32(i)) & 255)


@device
def digits(two, power):
    """The digits of two bytes in uint16, plus 127, in the high bytes."""
    return np.uint32(np.uint32(np.uint32(two * power) & LOW_BYTES) * np.uint32(3) + np.uint32(0x7F007F00))


@device
def trits(quad, power):
    """A trit of each of four bytes, less one. power: 3^i for trit i.

    A byte is a fraction of 256, and its digits to base three are the trits: three times what the power leaves of it, over 256.
    """
    even, odd = np.uint32(quad & LOW_BYTES), permuted(quad, np.uint32(0), ODD_BYTES)
    return permuted(digits(even, power), digits(odd, power), HIGH_BYTES) ^ 0x80808080      # 127, 128, 129 become -1, 0, 1


@device
def group_tq1_0(data, row, g):
    """Group g of a TQ1_0 row.

    Groups 0 to 4 are trits of 32 bytes. Those of the next 16 bytes fill the halves of groups 5 and 6 and one of group 7, whose other half
    has trits of four bytes.
    """
    at, s = row + TQ1_0 * (g >> 3), g & 7
    whole, last, d = s < 5, s == 7, half_at(data, at + 52)
    a, b, c, e = any_four_u32(data, at + (0 if whole else 32))
    f, h, i, j = any_four_u32(data, at + (16 if whole else 32))
    p, q = byte_of(FIRST_POWERS, s), byte_of(SECOND_POWERS, s)
    q0, q1, q2, q3 = q, q, q, q
    if last:
        f = any_u32(data, at + 48)
        h, i, j, q0, q1, q2, q3 = f, f, f, np.uint32(1), np.uint32(3), np.uint32(9), np.uint32(27)
    return (trits(a, p), trits(b, p), trits(c, p), trits(e, p), trits(f, q0), trits(h, q1), trits(i, q2), trits(j, q3), d, d, ZERO, ZERO)


@device
def two_bits(quad, shift):
    """Two bits of each of four bytes, less one."""
    return sub4(quad >> shift & TWO_BITS, ONE_BIT)


@device
def group_tq2_0(data, row, g):
    """Group g of a TQ2_0 row."""
    at, shift = row + TQ2_0 * (g >> 3), 2 * (g & 3)
    d = half_at(data, at + 64)
    a, b, c, e, f, h, i, j = any_eight_u32(data, at + 32 * (g >> 2 & 1))
    return (two_bits(a, shift), two_bits(b, shift), two_bits(c, shift), two_bits(e, shift), two_bits(f, shift), two_bits(h, shift),
            two_bits(i, shift), two_bits(j, shift), d, d, ZERO, ZERO)


@device
def weights_tq2_0(data, row, c, second):
    """Half of four groups of TQ2_0, in the same sixteen bytes."""
    at = row + TQ2_0 * (c >> 2)
    words, d = any_four_u32(data, at + 32 * (c >> 1 & 1) + 16 * (c & 1)), half_at(data, at + 64)
    return (four_of(words, 0, TWO_BITS), four_of(words, 2, TWO_BITS), four_of(words, 4, TWO_BITS), four_of(words, 6, TWO_BITS),
            (d, d, d, d), NO_OFFSETS)


@device
def one_or_minus_one(signs, bit):
    """Bytes of 1 where this bit of a byte is set, else -1."""
    return sign_of_four(signs, bit) ^ 0xFFFFFFFF | ONE_BIT


@device
def group_q1_0(data, row, g):
    """Group g of a Q1_0 row."""
    at = row + Q1_0 * (g >> 2)
    signs, d = signs_in_bytes(any_u32(data, at + 2 + 4 * (g & 3))), half_at(data, at)
    return (one_or_minus_one(signs, 0), one_or_minus_one(signs, 4), one_or_minus_one(signs, 1), one_or_minus_one(signs, 5),
            one_or_minus_one(signs, 2), one_or_minus_one(signs, 6), one_or_minus_one(signs, 3), one_or_minus_one(signs, 7),
            d, d, ZERO, ZERO)


GROUPED = {"TQ1_0": entry("TQ1_0", group_tq1_0), "TQ2_0": entry("TQ2_0", group_tq2_0, lane=Lane(weights_tq2_0, True, 1, False)),
           "Q1_0": entry("Q1_0", group_q1_0)}
