"""What the families of block types share: words that begin anywhere, bytes that are looked up, and the table's entry."""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.device import device, permuted, u32_at
from pydsa.quants import TYPES


NIBBLES, TWO_BITS, ONE_BIT = 0x0F0F0F0F, 0x03030303, 0x01010101
ZERO = np.float32(0)


class Grouped(NamedTuple):
    """A quantized type: its group(); whether the halves of a group differ in scale; whether there are offsets."""
    group: object
    halves: bool
    offsets: bool


def entry(name, group):
    """Grouped of a type by its name."""
    return Grouped(group, TYPES[name].group < 32, TYPES[name].mins)


@device
def less(word, zeros):
    """Four bytes from 0 to 127, each less the same byte of `zeros`, which is at most 127."""
    return ((word | 0x80808080) - zeros) ^ 0x80808080


@device
def selector(at):
    """What makes of two words, of which the first contains the byte at `at`, the word that begins there."""
    return np.uint32(0x3210 + 0x1111 * (at & 3))


@device
def any_u32(data, at):
    """Four bytes that begin anywhere: every load of a GPU must be aligned."""
    return permuted(u32_at(data, at & ~3), u32_at(data, at + 3 & ~3), selector(at))


@device
def any_four_u32(data, at):
    """Four words that begin anywhere."""
    first, pick = at & ~3, selector(at)
    a, b, c, d, e = (u32_at(data, first), u32_at(data, first + 4), u32_at(data, first + 8), u32_at(data, first + 12),
                     u32_at(data, at + 15 & ~3))
    return permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick)


@device
def any_eight_u32(data, at):
    """Eight words that begin anywhere."""
    first, pick = at & ~3, selector(at)
    a, b, c, d = u32_at(data, first), u32_at(data, first + 4), u32_at(data, first + 8), u32_at(data, first + 12)
    e, f, g, h = u32_at(data, first + 16), u32_at(data, first + 20), u32_at(data, first + 24), u32_at(data, first + 28)
    i = u32_at(data, at + 31 & ~3)
    return (permuted(a, b, pick), permuted(b, c, pick), permuted(c, d, pick), permuted(d, e, pick), permuted(e, f, pick),
            permuted(f, g, pick), permuted(g, h, pick), permuted(h, i, pick))
