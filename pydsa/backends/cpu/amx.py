"""AMX tile registers: how a thread gets them, and how operands lie in memory.

Without AMX, in the CPU or in the system, HERE is False and no number format that needs tiles is used."""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.simd import FEATURES, I8, I32, call_llvm


HERE = {"amx-tile", "amx-bf16", "amx-int8", "avx512bw"} <= FEATURES

# Operands lie in panels: 16 rows, 32 numbers of each after the other, in 2 KiB a step: 16 x 64 bytes of high parts, then the low ones. The
# right operand's panels have the 16 x 16 pairs of each KiB turned over. Sums lie in tiles of 16 x 16 floats.
STEP, LOW_PARTS, SUMS = 2048, 1024, 1024
AHEAD = 512         # bytes that are fetched ahead with every step
A_0, B_0 = 4, 6     # tile registers: 0 to 3 are sums, then two of each operand
CONFIGURATION = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]     # palette 1; bytes a row, then rows, of eight tiles


def call_amx(builder, name, *args):
    """Call an LLVM intrinsic on tile registers, which are given by number."""
    call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), args)


def fetch(builder, where):
    """Prefetch a line into the second-level cache."""
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(2), I32(1)])


@intrinsic
def configure(typingctx):
    """Let this thread use tile registers, all of 16 rows of 64 bytes."""
    def codegen(context, builder, signature, args):
        data = cgutils.global_constant(builder.module, "pydsa_tiles", ir.Constant(ir.ArrayType(I8, 64), CONFIGURATION))
        data.align = 64
        call_amx(builder, "ldtilecfg", builder.bitcast(data, I8.as_pointer()))
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def release(typingctx):
    """Leave the tile registers, which the system would otherwise save and restore at every switch of threads."""
    def codegen(context, builder, signature, args):
        call_amx(builder, "tilerelease")
        return context.get_dummy_value()
    return types.void(), codegen
