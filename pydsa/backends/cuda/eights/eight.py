"""What unpacks eight weights at a time, and helpers of all types.

A lane's words are in an array `raw` from index i on; `at` is where in data the period begins, in bytes. The words are those with which
loads are possible, at multiples of 4; what begins between them is cut out of two. The second group of a chunk of types with blocks of 32
begins `second` bytes after the first, or is the same again (0) where a row ends.

A period has a scale in float16 and perhaps a second one, which head() makes float32 numbers. The kernel multiplies them by a power of two
and puts both, as float16, into raw[i]. Scales of groups are whole numbers times the first, and the bytes' products with these whole numbers
are exact; if types have no such numbers, unpack() returns what is in raw.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.blocks.block import selector
from pydsa.backends.cuda.intrinsics.constants import nothing
from pydsa.backends.cuda.intrinsics.device import device, of_half, permuted
from pydsa.backends.cuda.intrinsics.instructions import (add_halves, fetch_four, fma_by_high, fma_by_low, halves_by_high, multiply_halves,
                                                         subtract_halves)

U = np.uint32
NIBBLES, TWO_BITS, ONE_BIT, SIGNS = U(0x0F0F0F0F), U(0x03030303), U(0x01010101), U(0x80808080)
THOUSAND, THOUSANDS = U(0x64006400), U(0x64646464)      # 1024 + n is 0x6400 | n, as float16
EVEN, ODD, LOWER, UPPER, TWICE = U(0x4240), U(0x4341), U(0x5410), U(0x7632), U(0x1010)      # of two words: bytes 0 and 2 of the first, ...
FOUR_IN_PAIR, SIX_IN_PAIR = U(0x000F000F), U(0x003F003F)
BOTH_SIGNS = U(0x80008000)
NONE, NO_OFFSETS = np.float32(0), U(0)


class Eights(NamedTuple):
    """How a lane unpacks its eights of a row, see __init__.py."""
    n_words: int            # of raw
    n_chunks: int           # of a period, which begins wherever a block, or a pair of blocks, does
    load: object            # load(raw, i, data, at, second, j, c): begin to load what chunk j of a period needs and those before it do not
    head: object            # head(raw, i, at, c) -> two float32
    unpack: object          # unpack(raw, i, at, second, j, c) -> four uint32 of bytes; of both groups scales, and offsets, as float16
    bounds: tuple           # by what magnitudes of the two numbers of head() are to be multiplied, so that their sum bounds the weights
    bias: int = 0           # what is to be subtracted of each byte
    whole: bool = False     # whether the scales are whole numbers, still to be multiplied by the first of the head
    offsets: bool = False
    prepare: object = nothing
    heads: tuple = (0,)     # where in raw the heads are: one, or one of each block
    most: object = None     # most(raw, i, at, second, c): a bound of all weights of the period, where head() differs from lane to lane


@device
def load_words(raw, i, n, data, at):
    """raw[i:i + n] = words from that of byte `at` on."""
    for k in range(n):
        raw[i + k] = fetch_four(data, (at & ~3) + 4 * k)


@device
def bytes_from(word, at):
    """A word whose lowest byte is the one at `at`."""
    return U(word) >> U(8 * (at & 3))


@device
def half_in(word, at):
    """The float16 at `at`, even, in its word, as float32."""
    return of_half(U(bytes_from(word, at) & U(0xFFFF)))


@device
def both_halves(word):
    """The two float16 of a word, as float32."""
    return of_half(U(word & U(0xFFFF))), of_half(U(word >> U(16)))


@device
def head_of_d(raw, i, at, c):
    """head() of a type with d in raw[i].

    d is as far from a multiple of 4 as the period.
    """
    return half_in(raw[i], at), NONE


@device
def two_words(raw, i, at):
    """Eight bytes from `at` on, in three words."""
    pick = selector(at)
    return U(permuted(raw[i], raw[i + 1], pick)), U(permuted(raw[i + 1], raw[i + 2], pick))


def whole_numbers(bias=0):
    """The function that makes float16 of whole numbers.

    There are two in a word, below 1024 each; a bias is subtracted.
    """
    least = U((0x6400 + bias) * 0x10001)

    @device
    def made(pair):
        return U(subtract_halves(U(pair) | THOUSAND, least))
    return made


whole, whole_less_32, whole_less_128 = whole_numbers(), whole_numbers(32), whole_numbers(128)


def offsets_of(center):
    """The function of two groups' offsets, weights being less a center.

    They are -dmin times a min, plus d times a scale times the center, which is the type's bias. Both are about as great, and as float16
    they would lose what matters in their sum.
    """
    centers = U(int(np.float16(center).view(np.uint16)) * 0x10001)

    @device
    def made(scales, mins, head):
        rough = U(halves_by_high(mins, head))
        rest = fma_by_high(mins, head, rough ^ BOTH_SIGNS)          # what rough leaves, exactly
        return U(add_halves(fma_by_low(multiply_halves(scales, centers), head, rough), rest))
    return made


@device
def odd(n, n_1):
    """2 n + 1 of two numbers, as float16."""
    return whole((U(n) | U(n_1) << U(16)) * U(2) + U(0x00010001))


@device
def four_bits_in_bytes(bits):
    """The four lowest bits, each in bit 0 of a byte."""
    return U(U(bits & U(15)) * U(0x00204081)) & ONE_BIT         # bit i of them comes to bits i, i + 7, ...: one of these is 8 i
