"""Vectors of sixteen floats in kernels of quantizers: what pydsa.backends.cpu.vectors.simd has no need of."""
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.vectors.simd import F32, I8, I16, I32, INTP, broadcast, call_llvm, constant, f32x16, pointer


def _binary(emit):
    @intrinsic
    def operate(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return emit(builder, *(broadcast(builder, x, 16) if kind != f32x16 else x for x, kind in zip(args, signature.args)))
        return f32x16(*(f32x16 if v == f32x16 else types.float32 for v in (a, b))), codegen
    return operate


# The lesser and the greater in each lane, and quotients; one of both may be a float32
least = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
greatest = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
quotient = _binary(lambda builder, a, b: builder.fdiv(a, b))


def _rounding(name):
    @intrinsic
    def rounded(typingctx, v):
        return f32x16(f32x16), lambda context, builder, signature, args: call_llvm(builder, f"llvm.{name}.v16f32", f32x16.ir, [args[0]])
    return rounded


# Whole floats: halves to even, halves away from zero, and what stands before the point
rint, round_away, truncate = _rounding("nearbyint"), _rounding("round"), _rounding("trunc")


@intrinsic
def where_greater(typingctx, a, b, x, y):
    """Take x in the lanes where a > b, else y: floats, or integers."""
    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])
    return x(f32x16, f32x16, x, x), codegen


@intrinsic
def lanes_from(typingctx, v, low):
    """The lanes with at least `low`, as the bits of a uint16."""
    def codegen(context, builder, signature, args):
        mask = builder.fcmp_ordered(">=", args[0], broadcast(builder, args[1], 16))
        return builder.bitcast(mask, I16)
    return types.uint16(f32x16, types.float32), codegen


@intrinsic
def store_bytes(typingctx, address, offset, v):
    """Store sixteen whole floats from -128 to 255 as bytes."""
    def codegen(context, builder, signature, args):
        values = builder.trunc(builder.fptosi(args[2], ir.VectorType(I32, 16)), ir.VectorType(I8, 16))
        builder.store(values, pointer(builder, builder.add(args[0], args[1]), values.type), align=1)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, f32x16), codegen


def _reducer(name, start=None, flags=("nnan",)):
    @intrinsic
    def reduce(typingctx, v):
        def codegen(context, builder, signature, args):
            kinds = ([F32] if start is not None else []) + [f32x16.ir]
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(F32, kinds), f"llvm.vector.reduce.{name}.v16f32")
            return builder.call(function, ([F32(start)] if start is not None else []) + [args[0]], fastmath=flags)
        return types.float32(f32x16), codegen
    return reduce


largest, smallest, total = _reducer("fmax"), _reducer("fmin"), _reducer("fadd", 0.0, ("reassoc",))


@intrinsic
def looked_up(typingctx, address, v):
    """Load the float32 at each of sixteen whole indices of a table."""
    def codegen(context, builder, signature, args):
        kind = ir.VectorType(F32.as_pointer(), 16)
        wide = ir.VectorType(INTP, 16)
        offsets = builder.shl(builder.zext(builder.fptosi(args[1], ir.VectorType(I32, 16)), wide), constant([2] * 16, INTP))
        places = builder.inttoptr(builder.add(offsets, broadcast(builder, args[0], 16)), kind)
        name = "llvm.masked.gather.v16f32.v16p0"
        mask = ir.Constant(ir.VectorType(ir.IntType(1), 16), [1] * 16)
        function = ir.FunctionType(f32x16.ir, [kind, I32, mask.type, f32x16.ir])
        called = cgutils.get_or_insert_function(builder.module, function, name)
        return builder.call(called, [places, I32(4), mask, ir.Constant(f32x16.ir, ir.Undefined)])
    return f32x16(types.intp, f32x16), codegen


@intrinsic
def lane(typingctx, v, i):
    """Take the float in lane i, modulo 16."""
    def codegen(context, builder, signature, args):
        i = builder.and_(builder.trunc(args[1], I32), I32(15))
        return builder.extract_element(args[0], i)
    return types.float32(f32x16, types.intp), codegen


@intrinsic
def first_lane(typingctx, mask):
    """The number of the lowest bit that is set, 16 if none is."""
    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I16, [I16, ir.IntType(1)]), "llvm.cttz.i16")
        return builder.zext(builder.call(function, [args[0], ir.IntType(1)(0)]), INTP)
    return types.intp(types.uint16), codegen


@inline
def best(v):
    """The number of the lane with the greatest float, 16 for NaN."""
    return first_lane(lanes_from(v, largest(v)))


def lanes(values):
    """A function that makes a vector of sixteen constants."""
    values = [float(np.float32(value)) for value in values]

    @intrinsic
    def make(typingctx):
        return f32x16(), lambda context, builder, signature, args: constant(values, F32)
    return make
