"""Helpers of all block types: unaligned loads, byte arithmetic, signs that come as bits."""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.intrinsics.constants import nothing
from pydsa.backends.cuda.intrinsics.device import device, permuted, u32_at
from pydsa.quants import TYPES


NIBBLES, TWO_BITS, ONE_BIT = 0x0F0F0F0F, 0x03030303, 0x01010101
ZERO = np.float32(0)
NO_OFFSETS = (ZERO, ZERO, ZERO, ZERO)
SIGN_OF_EACH = np.uint32(0xBA98)        # the prmt selector that makes each byte its sign: 0 or 255


class Lane(NamedTuple):
    """How a lane unpacks 64 weights of a row, see __init__.py."""
    weights: object     # weights(data, row, c, second)
    strided: bool       # whether the four sixteens are 32 weights apart, not adjacent
    bias: int           # what is still to be subtracted of each integer
    direct: bool        # whether weights() wants data in global memory, where row is a multiple of 16


class Grouped(NamedTuple):
    """How a quantized type is unpacked."""
    group: object       # group(data, row, g), see __init__.py
    halves: bool        # whether the halves of a group have different scales
    offsets: bool       # whether there are offsets
    prepare: object     # prepare(thread, n_threads), which all threads of a block call before group() and weights()
    lane: Lane          # for one token's products
    scales: object      # scales(data, row, g), see __init__.py; None where a block has one scale


def entry(name, group, prepare=nothing, lane=None, scales=None):
    """The Grouped of a GGUF type. Without a Lane of its own a lane takes two groups."""
    return Grouped(group, TYPES[name].group < 32, TYPES[name].mins, prepare, lane or Lane(_two_groups(group), False, 0, False), scales)


def _two_groups(group):
    @device
    def weights(data, row, c, second):
        """Groups 2 c and 2 c + second of a row, as a Lane has them."""
        a, b, c0, e, f, h, i, j, d, d1, m, m1 = group(data, row, 2 * c)
        k, n, o, p, q, r, s, t, d2, d3, m2, m3 = group(data, row, 2 * c + second)
        return (a, b, c0, e), (f, h, i, j), (k, n, o, p), (q, r, s, t), (d, d1, d2, d3), (m, m1, m2, m3)
    return weights


@device
def four_of(words, shift, mask):
    """Bits of each byte of four uint32, from bit `shift` on."""
    a, b, c, e = words
    return a >> shift & mask, b >> shift & mask, c >> shift & mask, e >> shift & mask


@device
def both(words, others):
    """The bits of two times four uint32."""
    a, b, c, e = words
    f, h, i, j = others
    return a | f, b | h, c | i, e | j


@device
def sub4(quad, zeros):
    """Subtract `zeros` from four bytes, bytewise. All are from 0 to 127."""
    return (quad + (0x80808080 - zeros)) ^ 0x80808080


@device
def selector(at):
    """The prmt selector of an unaligned load at `at`.

    It extracts the uint32 at `at` from the two aligned uint32 that contain it.
    """
    return np.uint32(0x3210 + 0x1111 * (at & 3))


@device
def any_u32(data, at):
    """Load an unaligned uint32. A GPU only has aligned loads."""
    return permuted(u32_at(data, at & ~3), u32_at(data, at + 3 & ~3), selector(at))


@device
def any_two_u32(data, at):
    """Load two unaligned uint32."""
    first, pick = at & ~3, selector(at)
    a, b, c = u32_at(data, first), u32_at(data, first + 4), u32_at(data, at + 7 & ~3)
    return permuted(a, b, pick), permuted(b, c, pick)


@device
def any_four_u32(data, at):
    """Load four unaligned uint32."""
    first, pick = at & ~3, selector(at)
    a, b, c, d, e = (u32_at(data, first), u32_at(data, first + 4), u32_at(data, first + 8), u32_at(data, first + 12),
                     u32_at(data, at + 15 & ~3))
    return permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick)


@device
def four_shifted(data, whole, pick):
    """any_four_u32 with its selector, from the multiple of 4 before it on.

    Four bytes after the last one are loaded too.
    """
    a, b, c, d, e = (u32_at(data, whole), u32_at(data, whole + 4), u32_at(data, whole + 8), u32_at(data, whole + 12),
                     u32_at(data, whole + 16))
    return permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick)


@device
def any_eight_u32(data, at):
    """Load eight unaligned uint32."""
    first, pick = at & ~3, selector(at)
    a, b, c, d = u32_at(data, first), u32_at(data, first + 4), u32_at(data, first + 8), u32_at(data, first + 12)
    e, f, g, h = u32_at(data, first + 16), u32_at(data, first + 20), u32_at(data, first + 24), u32_at(data, first + 28)
    i = u32_at(data, at + 31 & ~3)
    return (permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick), permuted(e, f, pick),
            permuted(f, g, pick), permuted(g, h, pick), permuted(h, i, pick))


@device
def swapped(bits, distance, mask):
    """Swap the bits of a mask with those `distance` places higher."""
    changed = np.uint32((bits ^ bits >> distance) & mask)
    return np.uint32(bits ^ changed * np.uint32((1 << distance) + 1))       # both places in one product, as they do not overlap


@device
def signs_in_bytes(bits):
    """Move bit 4 k + i to byte i: to its bit 0, 4, 1, 5, 2, 6, 3, 7 for k = 0 to 7."""
    return swapped(swapped(bits, 14, 0x0000CCCC), 7, 0x00AA00AA)


@device
def sign_of_four(signs, bit):
    """Bytes of 255 where this bit of a byte is set, else 0."""
    return permuted(np.uint32(signs << (7 - bit) & 0xFFFFFFFF), np.uint32(0), SIGN_OF_EACH)
