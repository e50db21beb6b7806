"""Cache rows of whole numbers: "i8", int8, and "i16", all high bytes of 16 bits and then the low ones; behind them a float32 scale a part.

A part is what is scaled together: all of an index key, whose numbers Hadamard's rotation made alike; of a latent the compressed values,
and apart from them the rotated ones, which can be much larger. Of 16 bits the greatest magnitude is 32,512, so that a high byte is at
most 127 though low bytes are signed: x = scale (256 high + low).
"""
import numpy as np

from pydsa.backends.cpu.jit import IntpFunction, inner
from pydsa.backends.cpu.lanes import load_int8x2
from pydsa.backends.cpu.rounding import round_to_int8, round_to_words
from pydsa.backends.cpu.simd import float_at, load_16_bytes, store, to_floats, u8_at


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
            store(target, first + second + (4 if start else 0), round_to_int8(source + 4 * start, length, target + start))


def dequantize_i16(source, n, target):
    first, second = parts(n)
    low = source + first + second
    for start, length in ((0, first), (first, second)):
        if length:
            d = float_at(low, first + second + (4 if start else 0))
            for j in range(start, start + length - 15, 16):
                store(target, 4 * j, load_int8x2(source + j, low + j) * d)
            for j in range(start + length // 16 * 16, start + length):
                store(target, 4 * j, d * np.float32(256 * np.int8(u8_at(source, j)) + np.int8(u8_at(low, j))))


def quantize_i16(source, n, target):
    first, second = parts(n)
    low = target + first + second
    for start, length in ((0, first), (first, second)):
        if length:
            store(low, first + second + (4 if start else 0), round_to_words(source + 4 * start, length, target + start, low + start))


# storage -> dequantize, quantize
FUNCTIONS = {"i8": (IntpFunction(dequantize_i8), IntpFunction(quantize_i8)),
             "i16": (IntpFunction(dequantize_i16), IntpFunction(quantize_i16))}
