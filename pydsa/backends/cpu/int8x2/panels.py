"""Panels of AMX operands: numbers of 16 bits as a high and a low signed byte, with a scale for each row."""
import numpy as np
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import LOW_PARTS, STEP
from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.lanes import store_int8x2, transpose
from pydsa.backends.cpu.rounding import max_abs_of
from pydsa.backends.cpu.simd import (I16, I32, call_llvm, constant, float_at, floats, i16x32, i32x16, largest, load_floats, max_abs_lanes,
                                     round_int16, store)
from pydsa.quants import INT8X2_MAX


PANEL = 4 * STEP            # 16 rows of 256 numbers: steps of 64 numbers, high bytes and then low ones
SCALED_PANEL = PANEL + 64       # and for activations their scales


@intrinsic
def mixed_bytes(typingctx, a, b):
    """The upper bytes of the words a and b by turns, one of a first; a and b are i16x32."""
    def codegen(context, builder, signature, args):
        a = builder.lshr(args[0], constant([8] * 32, I16))
        a, b = (builder.bitcast(v, i32x16.ir) for v in (a, args[1]))
        mixed = call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", a.type, [a, b, constant([0xFF00FF00] * 16), I32(0xF8)])
        return builder.bitcast(mixed, i16x32.ir)
    return i16x32(i16x32, i16x32), codegen


@inline
def store_bytes(at, a, b):
    """64 numbers, two vectors of words, to a step of a panel's row: their high bytes at an address, their low ones after LOW_PARTS."""
    store(at, 0, mixed_bytes(a + 128, b + 128))
    store(at, LOW_PARTS, mixed_bytes(a << 8, b << 8))


@inline
def pack_int8x2(x, stride, n, at):
    """n floats, a multiple of 32 up to 256, of which 16 each lie `stride` bytes apart, to a row of a left panel -> the largest magnitude.

    In the row that becomes INT8X2_MAX.
    """
    top = max_abs(x, stride, n)
    round_to_panel(x, stride, n, scale_to_max(top), at)
    return top


@inline
def max_abs(x, stride, n):
    """The largest magnitude, as pack_int8x2 wants it."""
    top = floats(np.float32(0))
    for j in range(0, n // 16, 2):
        top = max_abs_lanes(top, max_abs_lanes(load_floats(x, stride * j), load_floats(x, stride * (j + 1))))
    return largest(top, top)


@inline
def scale_to_max(top):
    """What makes INT8X2_MAX of the largest magnitude."""
    return np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) else np.float32(0)


@inline
def round_to_panel(x, stride, n, factor, at):
    """n floats times a factor to a row of a left panel, at its first step; the last step may be half a one, and zeros."""
    for j in range(0, n // 16, 4):
        a = round_int16(load_floats(x, stride * j), load_floats(x, stride * (j + 1)), factor)
        b = a & 0
        if j + 2 < n // 16:
            b = round_int16(load_floats(x, stride * (j + 2)), load_floats(x, stride * (j + 3)), factor)
        store_bytes(at + j // 4 * STEP, a, b)


@inner
def transpose_panel(panel, n):
    """A left panel of n numbers a row becomes a right one."""
    for j in range((n + 63) // 64):
        for part in (0, LOW_PARTS):
            transpose(panel + j * STEP + part, 64, panel + j * STEP + part, 64)


@inner
def round_query(x, n, row, at):
    """n floats as one row of a panel of byte pairs, before it is turned over -> the scale. `row` has room for 64 floats.

    What is not finite becomes a scale that is not.
    """
    whole, top = n // 64 * 64, max_abs_of(x, n)
    for k in range(whole, (n + 63) // 64 * 64):
        store(row, 4 * (k - whole), float_at(x, 4 * k) if k < n else np.float32(0))
    factor = np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) else np.float32(0)
    for k in range(0, n, 64):
        for j in range(k, k + 64, 16):
            high = at + k // 64 * STEP + j % 64
            store_int8x2(high, high + LOW_PARTS, (load_floats(x, 4 * j) if k < whole else load_floats(row, 4 * (j - k))) * factor)
    return top / np.float32(INT8X2_MAX)
