"""Division and square root of float32 without calls.

Numba's round correctly, by a call where a number or the result is extreme. Where nvJitLink assembles PTX, a call may change most registers,
so a kernel that has all of them in use spills some around each. These take the steps that ptxas takes for all other numbers: results are
the same bits, except those below 2^-126, which may differ in their last bits.
"""
import math

import numpy as np

from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, fma
from pydsa.backends.cuda.intrinsics.instructions import instruction

ONE = np.float32(1)

if SIMULATED:
    def divide(a, b):
        """a / b."""
        with np.errstate(all="ignore"):
            return np.float32(a) / np.float32(b)

    def inverse_root(x):
        """1 / sqrt(x)."""
        with np.errstate(all="ignore"):
            return ONE / np.float32(math.sqrt(x) if x >= 0 else math.nan)

else:
    _inverse = instruction("rcp.approx.f32 $0, $1;", "f", "f")
    _inverse_root = instruction("rsqrt.approx.f32 $0, $1;", "f", "f")
    LARGE, SMALLER = np.float32(2 ** 64), np.float32(2 ** -64)

    @device
    def divide(a, b):
        """a / b."""
        a, b = (a * SMALLER, b * SMALLER) if abs(b) > LARGE else (a, b)     # 1 / b is not below 2^-126
        near = _inverse(b)
        inverse = fma(near, fma(-b, near, ONE), near)
        first = a * inverse
        second = fma(fma(-b, first, a), inverse, first)
        left = fma(-b, second, a)
        return fma(left, inverse, second) if left == left else a * near       # infinities and zeros

    @device
    def inverse_root(x):
        """1 / sqrt(x)."""
        near = _inverse_root(x)
        first = x * near
        root = fma(fma(-first, first, x), np.float32(0.5) * near, first)
        near = _inverse(root)
        left = fma(-root, near, ONE)
        return fma(near, left, near) if left == left else _inverse_root(x)
