"""AMX tile registers: their configuration, and the layout of operands.

Without AMX in the CPU or in the operating system, HERE is False, and no number format that needs tiles is used.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.simd import FEATURES, I8, I32, call_llvm


HERE = {"amx-tile", "amx-bf16", "amx-int8", "avx512bw"} <= FEATURES

# Operands are packed as panels of 16 rows. A step of the loop over k takes 2 KiB of a panel: 64 bytes of high parts of each row (32
# bfloat16 or 64 int8), then as many of low parts. In panels of the right operand each KiB is transposed as 16 x 16 cells of four bytes, the
# VNNI layout. Sums are tiles of 16 x 16 float32.
STEP, LOW_PARTS, TILE_BYTES = 2048, 1024, 1024
AHEAD = 512         # prefetch distance: bytes for each step
A_0, B_0 = 4, 6     # tile registers: 0 to 3 hold sums, then come two of each operand
CONFIGURATION = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]     # palette 1; bytes per row, then rows, of eight tiles


def call_amx(builder, name, *args):
    """Emit a call of an LLVM intrinsic on tile registers, given by number."""
    call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), args)


def prefetch_line(builder, where):
    """Emit a prefetch of a cache line into the second-level cache."""
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(2), I32(1)])


@intrinsic
def configure(typingctx):
    """Configure this thread's tile registers: all have 16 rows of 64 bytes."""
    def codegen(context, builder, signature, args):
        data = cgutils.global_constant(builder.module, "pydsa_tiles", ir.Constant(ir.ArrayType(I8, 64), CONFIGURATION))
        data.align = 64
        call_amx(builder, "ldtilecfg", builder.bitcast(data, I8.as_pointer()))
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def release(typingctx):
    """Release the tile registers.

    Otherwise the system would save and restore them at every context switch.
    """
    def codegen(context, builder, signature, args):
        call_amx(builder, "tilerelease")
        return context.get_dummy_value()
    return types.void(), codegen
