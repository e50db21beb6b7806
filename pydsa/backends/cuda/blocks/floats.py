"""F32, F16, BF16: loads of one value, and products of 16 bytes."""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import bits_float, byte_at, device, half_at, of_half, u32_at


@device
def value_f32(data, row, i):
    """Value i of an F32 row."""
    return bits_float(u32_at(data, row + 4 * i))


@device
def value_f16(data, row, i):
    """Value i of an F16 row."""
    return half_at(data, row + 2 * i)


@device
def value_bf16(data, row, i):
    """Value i of a BF16 row."""
    return bits_float(np.uint32((byte_at(data, row + 2 * i) | byte_at(data, row + 2 * i + 1) << 8) << 16))


# type -> value(data, row, i): value i of the row that begins at byte `row`
FLOATS = {"F32": value_f32, "F16": value_f16, "BF16": value_bf16}


@device
def two_bf16(pair):
    """The two bfloat16 of a uint32, as float32."""
    return bits_float(np.uint32(pair << 16 & 0xFFFF0000)), bits_float(np.uint32(pair & 0xFFFF0000))


@device
def two_f16(pair):
    """The two float16 of a uint32, as float32."""
    return of_half(np.uint32(pair & 0xFFFF)), of_half(np.uint32(pair >> 16))


@device
def unit_f32(words, x):
    """Four float32, as four uint32, times four values."""
    return ((bits_float(words[0]) * x[0] + bits_float(words[1]) * x[1]) + (bits_float(words[2]) * x[2] + bits_float(words[3]) * x[3]))


def _make_unit(two):
    @device
    def unit(words, x):
        """Eight numbers of 16 bits, as four uint32, times eight values."""
        a, b = two(words[0])
        c, d = two(words[1])
        e, f = two(words[2])
        g, h = two(words[3])
        return ((a * x[0] + b * x[1]) + (c * x[2] + d * x[3])) + ((e * x[4] + f * x[5]) + (g * x[6] + h * x[7]))
    return unit


# type -> the sum of products of 16 bytes of weights with a tuple of values
UNITS = {"F32": unit_f32, "F16": _make_unit(two_f16), "BF16": _make_unit(two_bf16)}
