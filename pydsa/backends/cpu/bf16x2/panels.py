"""Panels of AMX operands: each float32 as two bfloat16, high and low, which keep 16 of its 24 bits."""
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import LOW_PARTS
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.simd import F32, I32, call_llvm, constant, f32x16, i32x16, store


_UPPER = constant([0xFFFF0000] * 16)


def _pair(builder, even, odd):
    """The upper halves of two words, (even >> 16) | (odd & _UPPER), in an instruction that LLVM makes no slower shuffle of."""
    even, odd = (builder.bitcast(v, i32x16.ir) for v in (even, odd))
    even = builder.lshr(even, constant([16] * 16))
    return call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", even.type, [even, odd, _UPPER, I32(0xF8)])


@intrinsic
def split(typingctx, even, odd):
    """Two f32x16 -> the bfloat16 nearest to each number, and of what remains; a pair of numbers in each of sixteen 32-bit words.

    What is not finite has a part that is not.
    """
    def codegen(context, builder, signature, args):
        high = [builder.add(builder.bitcast(v, i32x16.ir), constant([0x8000] * 16)) for v in args]
        low = [builder.fsub(v, builder.bitcast(builder.and_(h, _UPPER), v.type)) for v, h in zip(args, high)]
        low = [builder.fmul(v, constant([1.0 + 2.0 ** -8.5] * 16, F32)) for v in low]     # half of what is cut off, on average; NaN stays
        return cgutils.pack_array(builder, [_pair(builder, *high), _pair(builder, *low)])
    return types.UniTuple(i32x16, 2)(f32x16, f32x16), codegen


@inline
def store_bf16x2(at, even, odd):
    """Sixteen pairs of a panel's row: the 64 bytes at an address, and their low parts."""
    high, low = split(even, odd)
    store(at, 0, high)
    store(at, LOW_PARTS, low)
