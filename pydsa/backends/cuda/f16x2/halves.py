"""Arithmetic of pairs of float16, uint32."""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import device, to_half
from pydsa.backends.cuda.intrinsics.instructions import instruction


U = np.uint32
HALF_1024 = U(0x64006400)       # 1024 + n, as float16, is 0x6400 | n
multiply_halves = instruction("mul.rn.f16x2 $0, $1, $2;", "r", "rr")
subtract_halves = instruction("sub.rn.f16x2 $0, $1, $2;", "r", "rr")
fma_halves = instruction("fma.rn.f16x2 $0, $1, $2, $3;", "r", "rrr")


@device
def twice(x):
    """A float32 as two equal float16."""
    bits = to_half(x)
    return U(bits | bits << U(16))


@device
def two_numbers(a, b):
    """Two whole numbers up to 1,023 as two float16."""
    return subtract_halves(a | b << U(16) | HALF_1024, HALF_1024)
