"""Scalars in kernels: the bits of float32, float16, and e^x.

Numba cannot compute in float16.
"""
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.vectors.simd import FEATURES, u16_at


@intrinsic
def float_from_bits(typingctx, bits):
    """Reinterpret a uint32 as float32."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(typingctx, value):
    """Reinterpret a float32 as uint32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _extend_half(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
    return types.float32(types.uint16), codegen


@inner
def _half_by_hardware(bits):
    return _extend_half(np.uint16(bits))


@inner
def _half_by_bits(bits):
    """Convert by multiplying with 2^112.

    That moves the exponent's bias, and makes subnormal halves normal floats.
    """
    bits = np.uint32(bits)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    finite = bits_of_float(float_from_bits(magnitude) * np.float32(2.0 ** 112))
    magnitude = finite if magnitude < np.uint32(0x0F800000) else magnitude | np.uint32(0x7F800000)      # else infinite or NaN
    return float_from_bits(magnitude | ((bits & np.uint32(0x8000)) << np.uint32(16)))


# float16 bits, uint16 -> float32, exactly. Without the instruction LLVM would call a function that does not exist.
half = _half_by_hardware if "f16c" in FEATURES else _half_by_bits


@inline
def half_at(address, offset):
    """Load a float16 from memory as float32."""
    return half(u16_at(address, offset))


@inner
def to_half(value):
    """Convert float32 to float16 bits, rounded to nearest even.

    As numpy's astype(float16): too large becomes infinity.
    """
    bits = bits_of_float(value)
    sign, magnitude = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if magnitude >= np.uint32(0x47800000):
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):       # subnormal half: adding 0.5 lets the float unit round at 2^-24
        return np.uint16(sign | (bits_of_float(float_from_bits(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)))
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    return np.uint16(sign | ((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)))


# Without "reassoc", which would undo the reduction in two steps.
@numba.njit(nogil=True, fastmath={"nsz", "contract"}, error_model="numpy")
def exp(x):
    """Compute e^x in float32 with a relative error of 1e-7, from -87.3 on.

    It uses operations that a loop over it vectorises (Cephes' polynomial). Below -87.3 it stays at e^-87.3; it is infinite from 88.4 on. x
    must not be NaN.
    """
    x = min(max(x, np.float32(-87.3)), np.float32(88.7))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * float_from_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
