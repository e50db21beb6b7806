"""F32, F16, BF16: loads of one value and of four values."""
import numpy as np

from pydsa.backends.cuda.device import bits_float, byte_at, device, four_u32_at, half_at, of_half, u32_at


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
def four_f32(data, row, i):
    """Values i to i + 3 of an F32 row."""
    a, b, c, d = four_u32_at(data, row + 4 * i)
    return bits_float(a), bits_float(b), bits_float(c), bits_float(d)


@device
def four_f16(data, row, i):
    """Values i to i + 3 of an F16 row."""
    a, b = u32_at(data, row + 2 * i), u32_at(data, row + 2 * i + 4)
    return of_half(np.uint32(a & 0xFFFF)), of_half(np.uint32(a >> 16)), of_half(np.uint32(b & 0xFFFF)), of_half(np.uint32(b >> 16))


@device
def two_bf16(pair):
    """The two bfloat16 of a uint32, as float32."""
    return bits_float(np.uint32(pair << 16 & 0xFFFF0000)), bits_float(np.uint32(pair & 0xFFFF0000))


@device
def four_bf16(data, row, i):
    """Values i to i + 3 of a BF16 row."""
    a, b = two_bf16(u32_at(data, row + 2 * i))
    c, d = two_bf16(u32_at(data, row + 2 * i + 4))
    return a, b, c, d


# type -> four(data, row, i): values i to i + 3 of a row whose length is a multiple of four
FOURS = {"F32": four_f32, "F16": four_f16, "BF16": four_bf16}
