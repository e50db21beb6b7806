"""Weights as words of A: one float16 each, times a power of two that their row has.

Lane c of four has of each 16 columns of row g + 8 r two words, at r and 2 + r of four, in the order of panels.py.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks.floats import two_bf16
from pydsa.backends.cuda.eights import EIGHTS
from pydsa.backends.cuda.eights.eight import EVEN, LOWER, ODD, THOUSANDS, UPPER, U
from pydsa.backends.cuda.intrinsics.constants import nothing
from pydsa.backends.cuda.intrinsics.device import bits_float, device, float_bits, permuted
from pydsa.backends.cuda.intrinsics.instructions import (fetch_sixteen, fma_high_high, fma_low_high, fma_low_low, halves_by_high,
                                                         halves_by_low, pack_halves, subtract_halves)
from pydsa.quants import TYPES

WHOLE_WARP = U(0xFFFFFFFF)
ONE, AS_IT_IS = np.float32(1), np.float32(512)
ROOM, MIDDLE, SMALLEST = 6, 9, 16               # a period's bound becomes 2^MIDDLE to twice that; up to 2^ROOM times as much it may grow
INVERSE = U(0x7F000000)                         # minus the bits of a power of two: those of its inverse


class Kind(NamedTuple):
    """How a type becomes words. Fields are those of Eights (eights), or here."""
    n_words: int
    n_chunks: int
    load: object
    fill: object        # fill(words, r, raw, i, at, second, j, c, factor): chunk j of row g + 8 r, times its factor
    bound: object       # bound(raw, i, at, second, c): of all magnitudes of the row's period; all lanes of a warp must call it
    set_heads: object   # set_heads(raw, i, at, second, c, factor): the first thing once a period's factor is known
    prepare: object
    period_bytes: int
    second: int         # bytes from the first group of a chunk to the second, where that is another block


def make_fill(eights):
    """The function fill() of a Kind."""
    unpack, offsets, whole, bias = eights.unpack, eights.offsets, eights.whole, U((0x6400 + eights.bias) * 0x10001)

    @device
    def low(some, pick, scales, added, head):
        x = subtract_halves(permuted(some, THOUSANDS, pick), bias)
        if whole:
            x = halves_by_low(x, scales)
            return fma_low_low(x, head, added) if offsets else halves_by_low(x, head)
        return fma_low_low(x, scales, added) if offsets else halves_by_low(x, scales)

    @device
    def high(some, pick, scales, added, head):
        x = subtract_halves(permuted(some, THOUSANDS, pick), bias)
        if whole:
            x = halves_by_high(x, scales)
            return fma_low_high(x, head, added) if offsets else halves_by_low(x, head)
        return fma_high_high(x, scales, added) if offsets else halves_by_high(x, scales)

    @device
    def fill(words, r, raw, i, at, second, j, c, factor):
        a, b, e, f, s, m = unpack(raw, i, at, second, j, c)
        d = raw[i]
        words[r], words[2 + r], words[4 + r], words[6 + r] = (
            low(a, EVEN, s, m, d), low(a, ODD, s, m, d), low(b, EVEN, s, m, d), low(b, ODD, s, m, d))
        words[8 + r], words[10 + r], words[12 + r], words[14 + r] = (
            high(e, EVEN, s, m, d), high(e, ODD, s, m, d), high(f, EVEN, s, m, d), high(f, ODD, s, m, d))
    return fill


def make_bound(eights):
    """The functions bound() and set_heads() of a Kind."""
    head, given = eights.head, eights.most
    (place, place_1), two, (most, most_1) = (*eights.heads, *eights.heads)[:2], len(eights.heads) > 1, map(np.float32, eights.bounds)

    @device
    def bound_of_one(raw, i, at, c):
        x, y = head(raw, i, at, c)
        return abs(x) * most + abs(y) * most_1

    @device
    def bound(raw, i, at, second, c):
        greatest = bound_of_one(raw, i + place, at, c)
        return greatest + bound_of_one(raw, i + place_1, at + second, c) if two else greatest

    @device
    def set_heads(raw, i, at, second, c, factor):
        x, y = head(raw, i + place, at, c)
        raw[i + place] = pack_halves(y * factor, x * factor)
        if two:
            x, y = head(raw, i + place_1, at + second, c)
            raw[i + place_1] = pack_halves(y * factor, x * factor)
    return given or bound, set_heads


@device
def inverse(power):
    """The inverse of a power of two, from 2^-126 to 2^126."""
    return bits_float(INVERSE - float_bits(power))


@device
def set_factor(factors, r, bound):
    """Choose the factor of row g + 8 r if a period's bound needs another one.

    factors: of both rows the factors, then the greatest bounds that they are for, then what the sums so far are to be multiplied by.
    """
    if bound > factors[2 + r]:
        exponent = max(np.int32(float_bits(bound) >> U(23)), SMALLEST)
        factor = bits_float(U(254 + MIDDLE - exponent << 23))
        factors[4 + r] = factor * inverse(factors[r])
        factors[r], factors[2 + r] = factor, bits_float(U(min(exponent + ROOM, 254) << 23))
    else:
        factors[4 + r] = ONE


@device
def load_numbers(raw, i, data, at, second, j, c):
    """raw: eight numbers of 16 bits of each group, of a lane."""
    raw[i], raw[i + 1], raw[i + 2], raw[i + 3] = fetch_sixteen(data, at + 16 * c)
    raw[i + 4], raw[i + 5], raw[i + 6], raw[i + 7] = fetch_sixteen(data, at + second + 16 * c)


@device
def fill_f16(words, r, raw, i, at, second, j, c, factor):
    """Words of float16 weights, as they are. The factor is 1."""
    for k in range(4):
        a, b = raw[i + 2 * k], raw[i + 2 * k + 1]
        words[4 * k + r], words[4 * k + 2 + r] = U(permuted(a, b, LOWER)), U(permuted(a, b, UPPER))


@device
def bound_of_f16(raw, i, at, second, c):
    """The bound for which the factor is 1."""
    return AS_IT_IS


@device
def fill_bf16(words, r, raw, i, at, second, j, c, factor):
    """Words of bfloat16 weights."""
    for k in range(4):
        (a, b), (e, f) = two_bf16(raw[i + 2 * k]), two_bf16(raw[i + 2 * k + 1])
        words[4 * k + r], words[4 * k + 2 + r] = pack_halves(e * factor, a * factor), pack_halves(f * factor, b * factor)


@device
def bound_of_bf16(raw, i, at, second, c):
    """The greatest magnitude of the four lanes of a row."""
    most = np.int32(0)
    for k in range(8):
        most = max(most, max(np.int32(raw[i + k] & U(0x7FFF)), np.int32(raw[i + k] >> U(16) & U(0x7FFF))))
    most = max(most, cuda.shfl_xor_sync(WHOLE_WARP, most, 1))
    most = max(most, cuda.shfl_xor_sync(WHOLE_WARP, most, 2))
    return bits_float(U(U(most) << U(16)))


@device
def no_heads(raw, i, at, second, c, factor):
    """set_heads() of numbers that have no scale."""


def _make_kind(name, eights):
    block, n = TYPES[name], 64 * eights.n_chunks
    return Kind(eights.n_words, eights.n_chunks, eights.load, make_fill(eights), *make_bound(eights), eights.prepare,
                block.n_bytes * n // block.size, block.n_bytes)


KINDS = {name: _make_kind(name, eights) for name, eights in EIGHTS.items()}
KINDS |= {"F16": Kind(8, 1, load_numbers, fill_f16, bound_of_f16, no_heads, nothing, 128, 64),
          "BF16": Kind(8, 1, load_numbers, fill_bf16, bound_of_bf16, no_heads, nothing, 128, 64)}
