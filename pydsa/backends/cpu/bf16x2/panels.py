"""Pack float32 as bfloat16 pairs, high and low, for AMX.

A pair keeps 16 of the 24 bits.
"""
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.vectors.amx import LOW_PARTS
from pydsa.backends.cpu.vectors.simd import F32, I32, call_llvm, constant, f32x16, i32x16, store


_UPPER = constant([0xFFFF0000] * 16)


def _pair(builder, even, odd):
    """Emit (even >> 16) | (odd & _UPPER): the upper halves of two 32-bit vectors.

    The intrinsic keeps LLVM from making a slower shuffle of it.
    """
    even, odd = (builder.bitcast(v, i32x16.ir) for v in (even, odd))
    even = builder.lshr(even, constant([16] * 16))
    return call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", even.type, [even, odd, _UPPER, I32(0xF8)])


@intrinsic
def split(typingctx, even, odd):
    """Split two f32x16 into bfloat16 pairs: the nearest, and the remainder.

    Each of the two results holds a pair (even, odd) in each of sixteen 32-bit lanes. A value that is not finite yields a part that is not
    finite.
    """
    def codegen(context, builder, signature, args):
        high = [builder.add(builder.bitcast(v, i32x16.ir), constant([0x8000] * 16)) for v in args]
        low = [builder.fsub(v, builder.bitcast(builder.and_(h, _UPPER), v.type)) for v, h in zip(args, high)]
        low = [builder.fmul(v, constant([1.0 + 2.0 ** -8.5] * 16, F32)) for v in low]     # adds half of what is cut off, on average
        return cgutils.pack_array(builder, [_pair(builder, *high), _pair(builder, *low)])
    return types.UniTuple(i32x16, 2)(f32x16, f32x16), codegen


@inline
def store_bf16x2(at, even, odd):
    """Store sixteen pairs of a panel's row: 64 bytes at `at`, and the low parts."""
    high, low = split(even, odd)
    store(at, 0, high)
    store(at, LOW_PARTS, low)
