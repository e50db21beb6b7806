"""F32, F16, BF16: one element a block.

They are cache types too, so they also quantize.
"""
import numpy as np
from numba import carray

from pydsa.backends.cpu.blocks.block import entry
from pydsa.backends.cpu.vectors.scalars import bits_of_float, float_from_bits, half, to_half


def dequantize_f32(source, n, target):
    values, out = carray(source, (n,)), carray(target, (n,))
    for i in range(n):
        out[i] = values[i]


def dequantize_f16(source, n, target):
    bits, out = carray(source, (n,)), carray(target, (n,))
    for i in range(n):
        out[i] = half(bits[i])


def quantize_f16(source, n, target):
    values, out = carray(source, (n,)), carray(target, (n,))
    for i in range(n):
        out[i] = to_half(values[i])


def dequantize_bf16(source, n, target):
    bits, out = carray(source, (n,)), carray(target, (n,))
    for i in range(n):
        out[i] = float_from_bits(np.uint32(bits[i]) << np.uint32(16))


def quantize_bf16(source, n, target):
    """Round float32 to its upper half, to nearest even; NaN stays NaN."""
    values, out = carray(source, (n,)), carray(target, (n,))
    for i in range(n):
        bits = bits_of_float(values[i])
        if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
            out[i] = np.uint16((bits >> np.uint32(16)) | np.uint32(64))
        else:
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


KERNELS = {
    "F32": entry("F32", dequantize_f32, dequantize_f32),
    "F16": entry("F16", dequantize_f16, quantize_f16),
    "BF16": entry("BF16", dequantize_bf16, quantize_bf16),
}
