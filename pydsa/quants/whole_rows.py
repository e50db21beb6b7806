"""Cache rows of whole numbers: "i8", int8, and "i16", all high bytes of 16 bits and then the low ones; behind them a float32 scale a part.

A part is what is scaled together: all of an index key, whose numbers Hadamard's rotation made alike; of a latent the compressed values,
and apart from them the rotated ones, which can be much larger. Of 16 bits the greatest magnitude is 32,512, so that a high byte is at
most 127 though low bytes are signed: x = scale (256 high + low).
"""
import numpy as np

from pydsa.jit import WordFunction, inner
from pydsa.lanes import store_two_bytes, two_bytes
from pydsa.quants import LARGEST
from pydsa.quants.block import largest_magnitude, round_to_bytes
from pydsa.simd import float_at, floats, load_16_bytes, load_floats, store, to_floats, u8_at


def packed_parts(widths):
    """The lengths of a row's one or two parts as the number that functions of whole rows take where others take a number of blocks."""
    return widths[0] | sum(widths[1:]) << 32


@inner
def parts(n):
    """The lengths of a row's two parts; the second may be 0."""
    return n & 0xFFFFFFFF, n >> 32


def dequantize_i8(source, n, target):
    first, second = parts(n)
    for start, length in ((0, first), (first, second)):
        if length:
            d = float_at(source, first + second + (4 if start else 0))
            for j in range(start, start + length - 15, 16):
                store(target, 4 * j, to_floats(load_16_bytes(source, j)) * d)
            for j in range(start + length // 16 * 16, start + length):
                store(target, 4 * j, d * np.float32(np.int8(u8_at(source, j))))


def quantize_i8(source, n, target):
    first, second = parts(n)
    for start, length in ((0, first), (first, second)):
        if length:
            store(target, first + second + (4 if start else 0), round_to_bytes(source + 4 * start, length, target + start))


def dequantize_i16(source, n, target):
    first, second = parts(n)
    low = source + first + second
    for start, length in ((0, first), (first, second)):
        if length:
            d = float_at(low, first + second + (4 if start else 0))
            for j in range(start, start + length - 15, 16):
                store(target, 4 * j, two_bytes(source + j, low + j) * d)
            for j in range(start + length // 16 * 16, start + length):
                store(target, 4 * j, d * np.float32(256 * np.int8(u8_at(source, j)) + np.int8(u8_at(low, j))))


def quantize_i16(source, n, target):
    first, second = parts(n)
    low = target + first + second
    for start, length in ((0, first), (first, second)):
        if length:
            store(low, first + second + (4 if start else 0), round_to_words(source + 4 * start, length, target + start, low + start))


@inner
def round_to_words(source, n, high, low):
    """n floats -> whole numbers 256 high + low, the largest magnitude becoming LARGEST, halves to even -> the scale.

    If a number is not finite, neither is the scale, and all become 0.
    """
    top = largest_magnitude(source, n)
    factor = np.float32(LARGEST) / top if top > np.float32(1e-30) and top < np.float32(np.inf) else np.float32(0)
    for j in range(0, n - 15, 16):
        store_two_bytes(high + j, low + j, finite(load_floats(source, 4 * j), factor))
    for j in range(n // 16 * 16, n):
        whole = np.int32(np.rint(float_at(source, 4 * j) * factor)) if factor > 0 else np.int32(0)
        store(high, j, np.int8((whole + 128) >> 8))
        store(low, j, np.int8(whole))
    return top / np.float32(LARGEST)


@inner
def finite(v, factor):
    """v times a factor; zeros if that is 0, whatever v is."""
    return v * factor if factor > 0 else floats(np.float32(0))


# storage -> dequantize, quantize
FUNCTIONS = {"i8": (WordFunction(dequantize_i8), WordFunction(quantize_i8)),
             "i16": (WordFunction(dequantize_i16), WordFunction(quantize_i16))}
