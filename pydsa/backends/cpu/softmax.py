"""The online softmax of attention (FlashAttention).

Scores of a tile of keys become weights exp(score - row_max), where row_max is the running maximum.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.amx import TILE_BYTES
from pydsa.backends.cpu.vectors.scalars import exp
from pydsa.backends.cpu.vectors.simd import (F32, FAST, I16, I32, broadcast, call_llvm, constant, f32x16, float_at, floats, i32x16, i64_at,
                                             load_floats, pointer, reduce_add, store, u16_at, u32_at)

ROUNDING = 1.5 * 2**23      # a float32 whose last bit is 1: what is added to it is rounded to an integer


@inner
def key_at(indices, i):
    """Return the i-th key: indices[i] if there are indices, else i."""
    return np.int64(u32_at(indices, 4 * i)) if indices else i


@inner
def max_end(key_ends, n_tokens):
    """Return the largest of the tokens' key_ends."""
    end = np.int64(0)
    for t in range(n_tokens):
        end = max(end, i64_at(key_ends, 8 * t))
    return end


@intrinsic
def larger(typingctx, a, b):
    """Return the larger value in each lane; b where a is NaN."""
    return f32x16(f32x16, f32x16), lambda context, builder, signature, args: builder.select(builder.fcmp_ordered(">", *args), *args)


@intrinsic
def largest(typingctx, v):
    """Return the largest lane of f32x16, none of which is NaN.

    As integers floats have the same order, if the other bits of negative ones are inverted.
    """
    def codegen(context, builder, signature, args):
        def in_order(bits, splat):
            return builder.xor(bits, builder.and_(builder.ashr(bits, splat(31)), splat(0x7FFFFFFF)))
        ordered = in_order(builder.bitcast(args[0], i32x16.ir), lambda n: constant([n] * 16))
        return builder.bitcast(in_order(call_llvm(builder, "llvm.vector.reduce.smax.v16i32", I32, [ordered]), I32), F32)
    return types.float32(f32x16), codegen


@intrinsic
def sum_of_lanes(typingctx, v):
    """Return the sum of the lanes of f32x16."""
    return types.float32(f32x16), lambda context, builder, signature, args: reduce_add(builder, args[0])


def _splat(value):
    return constant([value] * 16, F32)


def _multiply_add(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=FAST), c, flags=FAST)


def _rest_of_exp(builder, x, n):
    """Emit e^x / 2^n of f32x16, where n is x / ln 2, rounded.

    Cephes' polynomial.
    """
    r = _multiply_add(builder, n, _splat(2.12194440e-4), _multiply_add(builder, n, _splat(-0.693359375), x))
    p = _splat(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _multiply_add(builder, p, r, _splat(c))
    return builder.fadd(_multiply_add(builder, builder.fmul(p, r, flags=FAST), r, r), _splat(1.0), flags=FAST)


def _or_zero_below(builder, x, power):
    """Emit power = e^x, or 0 where it would be denormal; NaN stays."""
    return builder.select(builder.fcmp_ordered("<", x, _splat(-87.3)), _splat(0.0), power)


@intrinsic
def exp_below_0(typingctx, x):
    """Compute e^x of f32x16 for x up to 0, with a relative error of 1e-7.

    For any vector registers. 0 below -87.3; NaN stays.
    """
    def codegen(context, builder, signature, args):
        x, = args
        shifted = _multiply_add(builder, x, _splat(1.44269504), _splat(ROUNDING))        # the nearest integer is in its last bits
        p = _rest_of_exp(builder, x, builder.fsub(shifted, _splat(ROUNDING), flags=FAST))
        exponent = builder.shl(builder.bitcast(shifted, i32x16.ir), constant([23] * 16))
        power = builder.bitcast(builder.add(exponent, constant([127 << 23] * 16)), x.type)
        return _or_zero_below(builder, x, builder.fmul(p, power, flags=FAST))
    return f32x16(f32x16), codegen


@inner
def scale_row(row, n, mask, scale):
    """Scale the first n scores of a row in place, and add their mask.

    Returns the largest, and whether one is NaN: their sum is, too.
    """
    at, top, total, whole = address(row), floats(-np.inf), floats(np.float32(0)), n // 16 * 16
    for j in range(0, whole, 16):
        v = load_floats(at, 4 * j) * scale
        if mask:
            v = v + load_floats(mask, 4 * j)
        store(at, 4 * j, v)
        top, total = larger(v, top), total + v
    most, rest = largest(top), sum_of_lanes(total)
    for j in range(whole, n):
        row[j] = row[j] * scale + (float_at(mask, 4 * j) if mask else np.float32(0))
        most, rest = max(most, row[j]), rest + row[j]
    return most, rest != rest


@inner
def softmax_row(row, n_visible, mask, scale, row_max, row_sum):
    """Turn scores of one query into weights, 0 where a key is not visible.

    row_max and row_sum are updated. Returns the factor for the sum of values so far.
    """
    n_visible = max(n_visible, 0)
    new, has_nan = scale_row(row, n_visible, mask, scale)
    new = max(row_max[0], new)
    row[n_visible:] = 0
    if has_nan:         # NaN must not look like a masked key
        row_sum[0] = np.nan
    if new == -np.inf:
        row[:] = 0
        return np.float32(1)
    rescale = exp(row_max[0] - new) if row_max[0] > -np.inf else np.float32(0)
    at, sums, whole = address(row), floats(np.float32(0)), n_visible // 16 * 16
    for j in range(0, whole, 16):
        weights = exp_below_0(load_floats(at, 4 * j) - floats(new))
        store(at, 4 * j, weights)
        sums = sums + weights
    tile_sum = sum_of_lanes(sums)
    for j in range(whole, n_visible):
        row[j] = exp(row[j] - new) if row[j] > -np.inf else np.float32(0)
        tile_sum += row[j]
    row_max[0], row_sum[0] = new, row_sum[0] * rescale + tile_sum
    return rescale


MINUS_INFINITY = np.float32(-np.inf)


@intrinsic
def exp_floats(typingctx, x):
    """Compute e^x of f32x16 for x up to 88, with a relative error of 1e-7.

    For AVX-512. 0 below -87.3; NaN stays.
    """
    def codegen(context, builder, signature, args):
        x, = args
        n = call_llvm(builder, "llvm.rint.v16f32", x.type, [builder.fmul(x, _splat(1.44269504))])
        p = _rest_of_exp(builder, x, n)
        return _or_zero_below(builder, x, call_llvm(builder, "llvm.x86.avx512.mask.scalef.ps.512", x.type, [p, n, p, I16(-1), I32(4)]))
    return f32x16(f32x16), codegen


@intrinsic
def causal(typingctx, scores, key, limits):
    """Set scores to -inf where `key` is not below the limit of its lane.

    limits: an address of int32 [16].
    """
    def codegen(context, builder, signature, args):
        scores, key, limits = args
        limits = builder.load(pointer(builder, limits, i32x16.ir), align=4)
        visible = builder.icmp_signed("<", broadcast(builder, builder.trunc(key, I32), 16), limits)
        return builder.select(visible, scores, constant([float("-inf")] * 16, F32))
    return f32x16(f32x16, types.intp, types.intp), codegen


@intrinsic
def keep_lanes(typingctx, scores, lanes):
    """Set scores to -inf in lanes whose bit is not set."""
    def codegen(context, builder, signature, args):
        mask = builder.bitcast(builder.trunc(args[1], I16), ir.VectorType(ir.IntType(1), 16))
        return builder.select(mask, args[0], constant([float("-inf")] * 16, F32))
    return f32x16(f32x16, types.intp), codegen


@intrinsic
def or_zero(typingctx, v):
    """Replace -inf by 0."""
    def codegen(context, builder, signature, args):
        finite = builder.fcmp_unordered("!=", args[0], constant([float("-inf")] * 16, F32))
        return builder.select(finite, args[0], constant([0.0] * 16, F32))
    return f32x16(f32x16), codegen


@inner
def min_end(key_ends, n_tokens):
    """Return the smallest of the tokens' key_ends."""
    end = i64_at(key_ends, 0)
    for t in range(1, n_tokens):
        end = min(end, i64_at(key_ends, 8 * t))
    return end


@inner
def rescale_sums(sums, n_tiles, rescale):
    """Multiply rows of tiles by the rescale factors of their queries."""
    for i in range(16):
        factor = float_at(rescale, 4 * i)
        if factor != 1:
            for d in range(n_tiles):
                store(sums + d * TILE_BYTES, 64 * i, load_floats(sums + d * TILE_BYTES, 64 * i) * factor)


@inner
def output_row(row, partial, i, n_v, row_max, row_sum):
    """Return the address and the factor for the i-th query's values.

    They go to `row` as the output, divided by row_sum; or to `partial`, after row_max and row_sum, which are stored here.
    """
    total = float_at(row_sum, 4 * i)
    if partial:
        store(partial, 4 * i * (2 + n_v), float_at(row_max, 4 * i))
        store(partial, 4 * i * (2 + n_v) + 4, total)
        return partial + 4 * i * (2 + n_v) + 8, np.float32(1)
    return row, np.float32(1) / total if total != 0 else np.float32(0)


@inner
def update_statistics(new, factor, sums, row_max, row_sum, rescale):
    """Update row_max and row_sum; store the rescale factor.

    sums: of the new weights; factor: for the earlier ones.
    """
    store(row_max, 0, new)
    store(rescale, 0, factor)
    store(row_sum, 0, load_floats(row_sum, 0) * factor + sums)


@inner
def set_limits(limits, first, n_head, n_tokens, key_ends, start):
    """Store how many keys from `start` on each of sixteen queries sees, int32.

    Queries are the heads of all tokens, from query `first` on.
    """
    for i in range(16):
        t = (first + i) // n_head
        store(limits, 4 * i, np.int32(i64_at(key_ends, 8 * t) - start if t < n_tokens else 0))


@inner
def set_bias(bias, first, n_head, n_tokens, mask, mask_row, n):
    """Transpose a mask of n keys for sixteen queries, float32 [n, 16]."""
    for i in range(16):
        t = min((first + i) // n_head, n_tokens - 1)
        for k in range(n):
            store(bias, 64 * k + 4 * i, float_at(mask, t * mask_row + 4 * k))


@inner
def mask_scores(scores, panel, n_panels, limited, limits, bias, selected, scale, new):
    """Scale and mask scores in place; return the queries' running maximum.

    Scores are -inf where a query does not see a key. selected: two bytes for each key, a bit for each query; or 0.
    """
    for i in range(n_panels):
        for k in range(16):
            at = scores + i * panel + 64 * k
            row = load_floats(at, 0) * scale
            if bias:
                row = row + load_floats(bias, 64 * (16 * i + k))
            if limited:
                row = causal(row, 16 * i + k, limits)
            if selected:
                row = keep_lanes(row, np.int64(u16_at(selected, 2 * (16 * i + k))))
            store(at, 0, row)
            new = larger(row, new)
    return new
