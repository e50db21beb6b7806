"""Round float32 to integers of 8 or 16 bits with one shared scale."""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.lanes import store_int8x2
from pydsa.backends.cpu.vectors.simd import (F32, broadcast, constant, f32x8, float_at, floats, load_floats, max_abs_lanes, reduce_max_abs,
                                             store)
from pydsa.quants import INT8X2_MAX


@inner
def max_abs_of(x, n):
    """Return the largest magnitude of n floats at an address.

    NaN if there is one.
    """
    top = floats(np.float32(0))
    for k in range(0, n - 15, 16):
        top = max_abs_lanes(top, load_floats(x, 4 * k))
    for k in range(n // 16 * 16, n):
        top = max_abs_lanes(top, floats(float_at(x, 4 * k)))
    return reduce_max_abs(top, top)


@intrinsic
def quotients(typingctx, dividend, v):
    """Divide a float by each of eight, or return 0 where one is tiny or NaN."""
    def codegen(context, builder, signature, args):
        dividend, v = broadcast(builder, args[0], 8), args[1]
        return builder.select(builder.fcmp_ordered(">", v, constant([1e-30] * 8, F32)), builder.fdiv(dividend, v), constant([0.0] * 8, F32))
    return f32x8(types.float32, f32x8), codegen


@inner
def round_to_int8(source, n, target):
    """Round n floats to int8; return the scale.

    The largest magnitude becomes 127; halves are rounded away from zero, as in gguf-py's Q8_0. The scale is not finite if a value is not.
    """
    top = np.float32(0)
    for j in range(n):
        magnitude = abs(float_at(source, 4 * j))
        top = magnitude if magnitude > top or magnitude != magnitude else top       # NaN stays
    scale = top / np.float32(127)
    factor = np.float32(1) / scale if scale > np.float32(1e-30) and scale < np.float32(np.inf) else np.float32(0)
    for j in range(n):
        product = float_at(source, 4 * j) * factor
        rounded = np.floor(abs(product) + np.float32(0.5))
        store(target, j, np.int8(rounded if product > 0 else -rounded) if rounded < 128 else np.int8(0))
    return scale


@inner
def round_to_int8x2(source, n, high, low):
    """Round n floats to integers 256 high + low; return the scale.

    The largest magnitude becomes INT8X2_MAX; halves are rounded to even. If a value is not finite, neither is the scale, and all integers
    are 0.
    """
    top = max_abs_of(source, n)
    factor = np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) and top < np.float32(np.inf) else np.float32(0)
    for j in range(0, n - 15, 16):
        store_int8x2(high + j, low + j, finite(load_floats(source, 4 * j), factor))
    for j in range(n // 16 * 16, n):
        rounded = np.int32(np.rint(float_at(source, 4 * j) * factor)) if factor > 0 else np.int32(0)
        store(high, j, np.int8((rounded + 128) >> 8))
        store(low, j, np.int8(rounded))
    return top / np.float32(INT8X2_MAX)


@inner
def finite(v, factor):
    """Return v times a factor; zeros if the factor is 0, even of NaN."""
    return v * factor if factor > 0 else floats(np.float32(0))
