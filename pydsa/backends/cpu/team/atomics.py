"""Words that threads share: atomic loads, stores and sums, and the pause of a waiting loop.

An address is an integer. All are sequentially consistent: "write, then look whether someone sleeps" needs that of both. A plain load in a
waiting loop would be moved out of it.
"""
import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.simd import I32, I64, pointer


@intrinsic
def load_word(typingctx, address):
    """Load an int64.

    What was written before it was stored is seen from here on.
    """
    return (types.int64(types.int64),
            lambda context, builder, signature, args: builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8))


@intrinsic
def store_word(typingctx, address, value):
    """Store an int64; no later load passes it."""
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "seq_cst", 8)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@intrinsic
def add_to_word(typingctx, address, n):
    """Add n to an int64 and return what was there before."""
    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")
    return types.int64(types.int64, types.int64), codegen


# The instruction that tells the core that this is a waiting loop, where there is one
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", []), "amd64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [I32(1)]),
          "arm64": ("llvm.aarch64.hint", [I32(1)])}.get(platform.machine().lower())


@intrinsic
def pause(typingctx):
    """Wait for some 5 to 50 nanoseconds."""
    def codegen(context, builder, signature, args):
        if _PAUSE:
            name, arguments = _PAUSE
            function = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
            builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)
        return context.get_dummy_value()
    return types.void(), codegen
