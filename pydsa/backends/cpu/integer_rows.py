"""Cache rows of integers: "i8", int8, and "i16", int16 as two bytes.

A row of i16 is all high bytes and then all low ones; a float32 scale a part follows the integers. A part is what has one scale: all of an
index key, whose values the Hadamard transform made alike; of a latent the compressed values, and apart from them the rotated ones, which
can be much larger. Of int16 the largest magnitude is 32,512, so that a high byte is at most 127 though low bytes are signed: x = scale (256
high + low).
"""
import numpy as np

from pydsa.backends.cpu.jit import IntpFunction, inner
from pydsa.backends.cpu.vectors.lanes import load_int8x2
from pydsa.backends.cpu.vectors.rounding import round_to_int8, round_to_int8x2
from pydsa.backends.cpu.vectors.simd import float_at, load_16_bytes, store, to_floats, u8_at


def packed_parts(widths):
    """Pack the lengths of a row's one or two parts into one integer.

    Functions of integer rows take it in place of a number of blocks.
    """
    return widths[0] | sum(widths[1:]) << 32


@inner
def parts(n):
    """Unpack the lengths of a row's two parts; the second may be 0."""
    return n & 0xFFFFFFFF, n >> 32


def dequantize_i8(source, n, target):
    n_first, n_second = parts(n)
    for start, length in ((0, n_first), (n_first, n_second)):
        if length:
            d = float_at(source, n_first + n_second + (4 if start else 0))
            for j in range(start, start + length - 15, 16):
                store(target, 4 * j, to_floats(load_16_bytes(source, j)) * d)
            for j in range(start + length // 16 * 16, start + length):
                store(target, 4 * j, d * np.float32(np.int8(u8_at(source, j))))


def quantize_i8(source, n, target):
    n_first, n_second = parts(n)
    for start, length in ((0, n_first), (n_first, n_second)):
        if length:
            store(target, n_first + n_second + (4 if start else 0), round_to_int8(source + 4 * start, length, target + start))


def dequantize_i16(source, n, target):
    n_first, n_second = parts(n)
    low = source + n_first + n_second
    for start, length in ((0, n_first), (n_first, n_second)):
        if length:
            d = float_at(low, n_first + n_second + (4 if start else 0))
            for j in range(start, start + length - 15, 16):
                store(target, 4 * j, load_int8x2(source + j, low + j) * d)
            for j in range(start + length // 16 * 16, start + length):
                store(target, 4 * j, d * np.float32(256 * np.int8(u8_at(source, j)) + np.int8(u8_at(low, j))))


def quantize_i16(source, n, target):
    n_first, n_second = parts(n)
    low = target + n_first + n_second
    for start, length in ((0, n_first), (n_first, n_second)):
        if length:
            store(low, n_first + n_second + (4 if start else 0), round_to_int8x2(source + 4 * start, length, target + start, low + start))


# cache type -> dequantize, quantize
FUNCTIONS = {"i8": (IntpFunction(dequantize_i8), IntpFunction(quantize_i8)),
             "i16": (IntpFunction(dequantize_i16), IntpFunction(quantize_i16))}
