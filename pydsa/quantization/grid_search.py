"""The nearest entries of a grid under weights, for 32 groups at a time.

An entry has two halves. The cost of a half, the weighted squares of what four numbers (of IQ3 two) differ from their levels, is looked up:
there are at most 81 halves of three levels, 64 of eight. So an exhaustive search costs a load and a comparison for each entry and sixteen
groups, whose costs lie in the lanes of vectors (pydsa.backends.cpu.vectors.simd).
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.vectors.simd import (_loader, broadcast, constant, f32x16, floats, i32x16, load_floats, multiply_add, store,
                                             to_floats)
from pydsa.quantization.vectors import greatest, least, rint, where_greater

BYTES, ROW = 64, 128    # of a vector, and of the costs of a half: 32 groups at a time
TAG = 127               # bits of a cost in whose place its half's code is: one part in 65536
INFINITE = np.float32(np.inf)
FAR = np.float32(1e4)   # a number that far beyond the levels costs as much more at any of them: squares stay finite

load_ints = _loader(i32x16)


@intrinsic
def as_ints(typingctx, v):
    """Reinterpret the bits of sixteen floats as integers."""
    return i32x16(f32x16), lambda context, builder, signature, args: builder.bitcast(args[0], i32x16.ir)


@intrinsic
def as_floats(typingctx, v):
    """Reinterpret the bits of sixteen integers as floats."""
    return f32x16(i32x16), lambda context, builder, signature, args: builder.bitcast(args[0], f32x16.ir)


@intrinsic
def ints(typingctx, value):
    """Broadcast an integer to sixteen lanes."""
    return i32x16(types.int32), lambda context, builder, signature, args: broadcast(builder, args[0], 16)


@intrinsic
def lesser(typingctx, a, b):
    """Return the lesser of two integers in each lane."""
    return i32x16(i32x16, i32x16), lambda context, builder, signature, args: builder.select(builder.icmp_signed("<", *args), *args)


@intrinsic
def magnitudes(typingctx, v):
    """Clear the signs of sixteen floats."""
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.and_(builder.bitcast(args[0], i32x16.ir), constant([0x7FFFFFFF] * 16)), f32x16.ir)
    return f32x16(f32x16), codegen


@inline
def store_costs(x, w, inverse, levels, offset, out):
    """Store w (x inverse - level)^2 for each level."""
    y, w = greatest(least(load_floats(x, 0) * load_floats(inverse, 0), FAR), -FAR), load_floats(w, 0)
    for c in range(levels.size):
        off = y - floats(levels[c] + offset)
        store(out, ROW * c, off * off * w)


@inner
def store_sums(a, n_a, b, n_b, out, mask):
    """Store a[i] + b[j] at i n_b + j; with a mask that number is in its bits."""
    for part in range(0, ROW, BYTES):
        for i in range(n_a):
            first = load_floats(a, ROW * i + part)
            for j in range(n_b):
                code = i * n_b + j
                store(out, ROW * code + part, (as_ints(first + load_floats(b, ROW * j + part)) & ~mask) | (code & mask))


@inner
def half_costs(x, w, stride, inverse, levels, offset, n, scratch, out, mask):
    """Store the costs of all halves of n numbers (2 or 4), stride bytes apart."""
    m = levels.size
    for i in range(n):
        for part in range(0, ROW, BYTES):
            store_costs(x + i * stride + part, w + i * stride + part, inverse + part, levels, offset, scratch + ROW * m * i + part)
    if n == 2:
        store_sums(scratch, m, scratch + ROW * m, m, out, mask)
    else:
        pairs, size = scratch + ROW * 4 * m, ROW * m
        store_sums(scratch, m, scratch + size, m, pairs, 0)
        store_sums(scratch + 2 * size, m, scratch + 3 * size, m, pairs + size * m, 0)
        store_sums(pairs, m * m, pairs + size * m, m * m, out, mask)


@inner
def nearest_entries(low, high, starts, lows, highs, costs, codes):
    """Store the least cost of all entries, and which has it, for 32 groups.

    low, high: addresses of the halves' costs, the first with tags. The entries whose second half's cost is at highs[h] have first halves
    whose costs are at lows[starts[h] : starts[h + 1]]. A code is 128 times the second half's, and the first half's.
    """
    least_a, first_a, second_a = floats(INFINITE), ints(np.int32(0)), ints(np.int32(0))
    least_b, first_b, second_b = floats(INFINITE), ints(np.int32(0)), ints(np.int32(0))
    for h in range(highs.size):
        at = low + lows[starts[h]]
        best_a, best_b = load_ints(at, 0), load_ints(at, BYTES)
        for i in range(starts[h] + 1, starts[h + 1]):
            at = low + lows[i]
            best_a, best_b = lesser(best_a, load_ints(at, 0)), lesser(best_b, load_ints(at, BYTES))
        at, row = high + highs[h], ints(np.int32(highs[h]))
        cost_a, cost_b = as_floats(best_a) + load_floats(at, 0), as_floats(best_b) + load_floats(at, BYTES)
        first_a, second_a = where_greater(least_a, cost_a, best_a, first_a), where_greater(least_a, cost_a, row, second_a)
        first_b, second_b = where_greater(least_b, cost_b, best_b, first_b), where_greater(least_b, cost_b, row, second_b)
        least_a, least_b = where_greater(least_a, cost_a, cost_a, least_a), where_greater(least_b, cost_b, cost_b, least_b)
    store(costs, 0, least_a)
    store(costs, BYTES, least_b)
    store(codes, 0, (first_a & TAG) | second_a)
    store(codes, BYTES, (first_b & TAG) | second_b)


@inline
def level_of(c, levels):
    """Return the level of each of sixteen numbers c.

    All but the top one are evenly spaced.
    """
    last = np.float32(levels.size - 1)
    even = multiply_add(floats(levels[0]), c, floats(levels[1] - levels[0]))
    return where_greater(floats(last - np.float32(0.5)), c, even, floats(levels[levels.size - 1]))


@inline
def nearest_level(y, levels, offset):
    """Return the level, plus an offset, nearest to each of sixteen numbers."""
    step, last = levels[1] - levels[0], np.float32(levels.size - 1)
    c = multiply_add(floats(-(levels[0] + offset) / step), y, floats(np.float32(1) / step))
    return level_of(greatest(rint(least(c, last)), np.float32(0)), levels) + floats(offset)


@inner
def rounded_sums(x, w, stride, n, inverse, levels, offset, sums, costs):
    """Store what rounding each of n numbers to its nearest level comes to.

    For sixteen groups: sums of w x g and, stride bytes further, of w g^2, where g are levels; and the cost but for its constant term.
    """
    products, squares, factor = floats(np.float32(0)), floats(np.float32(0)), load_floats(inverse, 0)
    for i in range(n):
        v = load_floats(x + i * stride, 0)
        g = nearest_level(v * factor, levels, offset)
        weighted = load_floats(w + i * stride, 0) * g
        products, squares = multiply_add(products, weighted, v), multiply_add(squares, weighted, g)
    store(sums, 0, products)
    store(sums, stride, squares)
    store(costs, 0, squares - products * factor * np.float32(2))


@inner
def entry_sums(x, w, stride, n, codes, levels, offset, sums):
    """Store the sums of w x g and w g^2 for sixteen groups and their entries."""
    products, squares, shift = floats(np.float32(0)), floats(np.float32(0)), load_floats(offset, 0)
    code = load_ints(codes, 0)
    for i in range(n):
        half = code & TAG if i < n // 2 else code >> 7
        if n == 4:
            c = half >> 3 if i % 2 == 0 else half & 7
        else:
            pair = (half * 57) >> 9             # half // 9
            if i % 4 > 1:
                pair = half - pair * 9
            c = (pair * 11) >> 5                # pair // 3
            if i % 2:
                c = pair - c * 3
        g = level_of(to_floats(c), levels) + shift
        weighted = load_floats(w + i * stride, 0) * g
        products, squares = multiply_add(products, weighted, load_floats(x + i * stride, 0)), multiply_add(squares, weighted, g)
    store(sums, 0, products)
    store(sums, stride, squares)


@inner
def cheapest_signs(x, w, stride, n, inverse, levels, costs, which):
    """Store for sixteen groups which of n magnitudes can best be negative.

    It would become the lowest level of the wrong sign; costs: what that costs. Magnitudes in x that are negative become positive.
    """
    best, index, factor = floats(INFINITE), ints(np.int32(0)), load_floats(inverse, 0)
    for i in range(n):
        v = magnitudes(load_floats(x + i * stride, 0))
        store(x + i * stride, 0, v)
        y = v * factor
        kept, changed = y - nearest_level(y, levels, np.float32(0)), y + floats(levels[0])
        cost = load_floats(w + i * stride, 0) * (changed * changed - kept * kept)
        index, best = where_greater(best, cost, ints(np.int32(i)), index), where_greater(best, cost, cost, best)
    store(costs, 0, best)
    store(which, 0, index)
