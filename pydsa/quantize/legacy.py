"""Quantize to F32, F16, BF16 and the types with blocks of 32: Q4_0 to Q8_0, IQ4_NL, MXFP4."""
import numpy as np

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.scalars import bits_of_float, to_half
from pydsa.backends.cpu.simd import load_floats, reduce_max_abs, store
from pydsa.quantize.rows import quantizer
from pydsa.quantize.vectors import round_away, store_bytes

LARGEST_HALF = np.float32(65504)


@inner
def scale_half(d):
    """A scale as float16 bits; one that is too large becomes the largest."""
    return to_half(min(max(d, -LARGEST_HALF), LARGEST_HALF))


@inner
def inverse(d):
    """1 / d, and 0 where that is not finite: weights that small are zeros."""
    return np.float32(1) / d if abs(d) > np.float32(3e-38) else np.float32(0)


@kernel
def quantize_f32(x, importance, blocks):
    source, target = address(x), address(blocks)
    for i in range(0, x.size // 16 * 16, 16):
        store(target, 4 * i, load_floats(source, 4 * i))
    for i in range(x.size // 16 * 16, x.size):
        store(target, 4 * i, x.reshape(-1)[i])


@kernel
def quantize_f16(x, importance, blocks):
    bits, values = blocks.view(np.uint16).reshape(-1), x.reshape(-1)
    for i in range(values.size):
        bits[i] = to_half(values[i])


@kernel
def quantize_bf16(x, importance, blocks):
    out, values = blocks.view(np.uint16).reshape(-1), x.reshape(-1)
    for i in range(values.size):
        bits = bits_of_float(values[i])
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@kernel
def quantize_q8_0(x, importance, blocks):
    """The largest magnitude becomes 127; the same blocks as llama.cpp's."""
    source, target = address(x), address(blocks)
    for i in range(x.size // 32):
        first, second = load_floats(source + 128 * i, 0), load_floats(source + 128 * i, 64)
        d = reduce_max_abs(first, second) / np.float32(127)
        factor, at = inverse(d), target + 34 * i
        store(at, 0, scale_half(d))
        store_bytes(at, 2, round_away(first * factor))
        store_bytes(at, 18, round_away(second * factor))


QUANTIZERS = {
    "F32": quantizer("F32", quantize_f32), "F16": quantizer("F16", quantize_f16), "BF16": quantizer("BF16", quantize_bf16),
    "Q8_0": quantizer("Q8_0", quantize_q8_0),
}
