"""The online softmax of attention: scores of a tile of keys become weights beside the greatest score so far."""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import SUMS
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.scalars import exp
from pydsa.backends.cpu.simd import (F32, I16, I32, broadcast, call_llvm, constant, f32x16, float_at, i32x16, i64_at, load_floats, pointer,
                                     store, u16_at, u32_at)


@inner
def key_at(indices, i):
    """The i-th key, of those at an address if there is one."""
    return np.int64(u32_at(indices, 4 * i)) if indices else i


@inner
def last_of(last_key, n_tokens):
    """The last key of all tokens."""
    most = np.int64(0)
    for t in range(n_tokens):
        most = max(most, i64_at(last_key, 8 * t))
    return most


@inner
def softmax_row(row, n_visible, mask, scale, row_max, row_sum):
    """Scores of one query -> their weights beside the greatest score so far, 0 where nothing is visible; both sums are brought up to date.

    Returns what the sum of the values so far must be multiplied by.
    """
    new, damaged = row_max[0], False
    for j in range(n_visible):
        row[j] = row[j] * scale + (float_at(mask, 4 * j) if mask else np.float32(0))
        damaged |= row[j] != row[j]
        new = max(new, row[j])
    row[max(n_visible, 0):] = 0
    if damaged:         # NaN must not look like a key that is masked
        row_sum[0] = np.nan
    if new == -np.inf:
        row[:] = 0
        return np.float32(1)
    rescale = exp(row_max[0] - new) if row_max[0] > -np.inf else np.float32(0)
    part = np.float32(0)
    for j in range(n_visible):
        row[j] = exp(row[j] - new) if row[j] > -np.inf else np.float32(0)
        part += row[j]
    row_max[0], row_sum[0] = new, row_sum[0] * rescale + part
    return rescale


MINUS_INFINITY = np.float32(-np.inf)


@intrinsic
def exp_floats(typingctx, x):
    """e^x of f32x16 for x up to 88, with a relative error of 1e-7 (Cephes' polynomial); 0 below -87.3; NaN stays."""
    def codegen(context, builder, signature, args):
        x, = args

        def number(value):
            return constant([value] * 16, F32)

        def multiply_add(a, b, c):
            return call_llvm(builder, "llvm.fma.v16f32", x.type, [a, b, c])

        n = call_llvm(builder, "llvm.rint.v16f32", x.type, [builder.fmul(x, number(1.44269504))])
        r = multiply_add(n, number(2.12194440e-4), multiply_add(n, number(-0.693359375), x))
        p = number(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = multiply_add(p, r, number(c))
        p = builder.fadd(multiply_add(builder.fmul(p, r), r, r), number(1.0))
        p = call_llvm(builder, "llvm.x86.avx512.mask.scalef.ps.512", x.type, [p, n, p, I16(-1), I32(4)])
        return builder.select(builder.fcmp_ordered("<", x, number(-87.3)), number(0.0), p)
    return f32x16(f32x16), codegen


@intrinsic
def larger(typingctx, a, b):
    """The larger of two numbers in each lane; b where a is NaN."""
    return f32x16(f32x16, f32x16), lambda context, builder, signature, args: builder.select(builder.fcmp_ordered(">", *args), *args)


@intrinsic
def causal(typingctx, scores, key, limits):
    """Scores where the key is below the limit of its lane, elsewhere -inf; limits at an address, int32 [16]."""
    def codegen(context, builder, signature, args):
        scores, key, limits = args
        limits = builder.load(pointer(builder, limits, i32x16.ir), align=4)
        there = builder.icmp_signed("<", broadcast(builder, builder.trunc(key, I32), 16), limits)
        return builder.select(there, scores, constant([float("-inf")] * 16, F32))
    return f32x16(f32x16, types.intp, types.intp), codegen


@intrinsic
def only(typingctx, scores, lanes):
    """Scores in the lanes whose bit is set, elsewhere -inf."""
    def codegen(context, builder, signature, args):
        mask = builder.bitcast(builder.trunc(args[1], I16), ir.VectorType(ir.IntType(1), 16))
        return builder.select(mask, args[0], constant([float("-inf")] * 16, F32))
    return f32x16(f32x16, types.intp), codegen


@intrinsic
def or_zero(typingctx, v):
    """0 in place of -inf."""
    def codegen(context, builder, signature, args):
        there = builder.fcmp_unordered("!=", args[0], constant([float("-inf")] * 16, F32))
        return builder.select(there, args[0], constant([0.0] * 16, F32))
    return f32x16(f32x16), codegen


@inner
def least_of(last_key, n_tokens):
    """The last key of the token that sees the fewest."""
    least = i64_at(last_key, 0)
    for t in range(1, n_tokens):
        least = min(least, i64_at(last_key, 8 * t))
    return least


@inner
def rescale_sums(sums, n_tiles, rescale):
    """Rows of tiles times what softmax_row() left for their queries."""
    for i in range(16):
        factor = float_at(rescale, 4 * i)
        if factor != 1:
            for d in range(n_tiles):
                store(sums + d * SUMS, 64 * i, load_floats(sums + d * SUMS, 64 * i) * factor)


@inner
def output_row(row, part, i, n_v, row_max, row_sum):
    """Where the i-th query's sums go and what they are multiplied by: to a row as the output, or to `part`, behind what it leaves there."""
    whole = float_at(row_sum, 4 * i)
    if part:
        store(part, 4 * i * (2 + n_v), float_at(row_max, 4 * i))
        store(part, 4 * i * (2 + n_v) + 4, whole)
        return part + 4 * i * (2 + n_v) + 8, np.float32(1)
    return row, np.float32(1) / whole if whole != 0 else np.float32(0)


@inner
def update_statistics(new, factor, sums, row_max, row_sum, rescale):
    """The greatest scores so far and the sums of weights beside them; `factor` is what earlier weights shrink by."""
    store(row_max, 0, new)
    store(rescale, 0, factor)
    store(row_sum, 0, load_floats(row_sum, 0) * factor + sums)


@inner
def set_limits(limits, first, n_head, n_tokens, last_key, start):
    """How many of the keys from `start` on sixteen queries see, int32: from query `first` on, heads of all tokens."""
    for i in range(16):
        t = (first + i) // n_head
        store(limits, 4 * i, np.int32(i64_at(last_key, 8 * t) - start if t < n_tokens else 0))


@inner
def set_bias(bias, first, n_head, n_tokens, mask, mask_row, n):
    """What a mask adds to the scores of n keys and sixteen queries, [n, 16]."""
    for i in range(16):
        t = min((first + i) // n_head, n_tokens - 1)
        for k in range(n):
            store(bias, 64 * k + 4 * i, float_at(mask, t * mask_row + 4 * k))


@inner
def mask_scores(scores, panel, n_panels, limited, limits, bias, chosen, scale, new):
    """Scores become what the softmax is of: scaled, masked, -inf where a query does not see a key -> the greatest with those before.

    chosen: for each key two bytes, a bit a query; or 0.
    """
    for i in range(n_panels):
        for k in range(16):
            at = scores + i * panel + 64 * k
            row = load_floats(at, 0) * scale
            if bias:
                row = row + load_floats(bias, 64 * (16 * i + k))
            if limited:
                row = causal(row, 16 * i + k, limits)
            if chosen:
                row = only(row, np.int64(u16_at(chosen, 2 * (16 * i + k))))
            store(at, 0, row)
            new = larger(row, new)
    return new
