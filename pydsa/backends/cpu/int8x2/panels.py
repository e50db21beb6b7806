"""Pack AMX operands: int16 as a high and a low signed byte.

Each row of a panel has a scale.
"""
import numpy as np
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.vectors.amx import LOW_PARTS, STEP
from pydsa.backends.cpu.vectors.lanes import store_int8x2, transpose
from pydsa.backends.cpu.vectors.rounding import max_abs_of
from pydsa.backends.cpu.vectors.simd import (I16, I32, call_llvm, constant, float_at, floats, i16x32, i32x16, load_floats, max_abs_lanes,
                                             reduce_max_abs, round_int16, store)
from pydsa.quants import INT8X2_MAX


PANEL = 4 * STEP            # 16 rows of 256 values: steps of 64, high bytes and then low ones
SCALED_PANEL = PANEL + 64       # and the 16 scales of activations


@intrinsic
def interleave_high_bytes(typingctx, a, b):
    """Interleave the upper bytes of a and b, a first; both are i16x32."""
    def codegen(context, builder, signature, args):
        a = builder.lshr(args[0], constant([8] * 32, I16))
        a, b = (builder.bitcast(v, i32x16.ir) for v in (a, args[1]))
        mixed = call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", a.type, [a, b, constant([0xFF00FF00] * 16), I32(0xF8)])
        return builder.bitcast(mixed, i16x32.ir)
    return i16x32(i16x32, i16x32), codegen


@inline
def store_step(at, a, b):
    """Store 64 values, two int16 vectors, as a step of a panel's row.

    High bytes go to the address, low ones to LOW_PARTS after it.
    """
    store(at, 0, interleave_high_bytes(a + 128, b + 128))
    store(at, LOW_PARTS, interleave_high_bytes(a << 8, b << 8))


@inline
def pack_int8x2(x, stride, n, at):
    """Round n floats to a row of an A panel; return the largest magnitude.

    The largest magnitude becomes INT8X2_MAX. n is a multiple of 32 up to 256; each 16 floats are `stride` bytes after those before.
    """
    top = max_abs(x, stride, n)
    round_to_panel(x, stride, n, scale_to_max(top), at)
    return top


@inline
def max_abs(x, stride, n):
    """Return the largest magnitude of n floats, for pack_int8x2."""
    top = floats(np.float32(0))
    for j in range(0, n // 16, 2):
        top = max_abs_lanes(top, max_abs_lanes(load_floats(x, stride * j), load_floats(x, stride * (j + 1))))
    return reduce_max_abs(top, top)


@inline
def scale_to_max(top):
    """Return the factor that maps the largest magnitude to INT8X2_MAX."""
    return np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) else np.float32(0)


@inline
def round_to_panel(x, stride, n, factor, at):
    """Round n floats times a factor to a row of an A panel.

    From its first step on. The second half of the last step may be zeros.
    """
    for j in range(0, n // 16, 4):
        a = round_int16(load_floats(x, stride * j), load_floats(x, stride * (j + 1)), factor)
        b = a & 0
        if j + 2 < n // 16:
            b = round_int16(load_floats(x, stride * (j + 2)), load_floats(x, stride * (j + 3)), factor)
        store_step(at + j // 4 * STEP, a, b)


@inner
def transpose_panel(panel, n):
    """Transpose an A panel of n values a row to a B panel, in place."""
    for j in range((n + 63) // 64):
        for part in (0, LOW_PARTS):
            transpose(panel + j * STEP + part, 64, panel + j * STEP + part, 64)


@inner
def round_query(x, n, row, at):
    """Round n floats to a row of a panel of int8 pairs, not yet transposed.

    Returns the scale, which is not finite if a value is not. `row` is scratch for 64 floats.
    """
    n_whole, top = n // 64 * 64, max_abs_of(x, n)
    for k in range(n_whole, (n + 63) // 64 * 64):
        store(row, 4 * (k - n_whole), float_at(x, 4 * k) if k < n else np.float32(0))
    factor = np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) else np.float32(0)
    for k in range(0, n, 64):
        for j in range(k, k + 64, 16):
            high = at + k // 64 * STEP + j % 64
            store_int8x2(high, high + LOW_PARTS, (load_floats(x, 4 * j) if k < n_whole else load_floats(row, 4 * (j - k))) * factor)
    return top / np.float32(INT8X2_MAX)
