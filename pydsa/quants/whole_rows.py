"""Cache rows of int8 with one scale: "i8", n numbers and behind them a float32. Index keys are stored so, since Hadamard's rotation made
their numbers alike."""
import numpy as np

from pydsa.jit import WordFunction
from pydsa.quants.block import round_to_bytes
from pydsa.simd import float_at, load_16_bytes, store, to_floats, u8_at


def dequantize_i8(source, n, target):
    d = float_at(source, n)
    for j in range(0, n - 15, 16):
        store(target, 4 * j, to_floats(load_16_bytes(source, j)) * d)
    for j in range(n // 16 * 16, n):
        store(target, 4 * j, d * np.float32(np.int8(u8_at(source, j))))


def quantize_i8(source, n, target):
    store(target, n, round_to_bytes(source, n, target))


DEQUANTIZE, QUANTIZE = WordFunction(dequantize_i8), WordFunction(quantize_i8)
