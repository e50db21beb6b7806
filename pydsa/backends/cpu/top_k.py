"""Top-k: exact, the greatest first and of equals the lowest index, in time linear in the row.

Of a long row only those are looked at that reach a threshold, the value of a rank in a sample that is lower than the k-th greatest, as
far as a sample tells. If fewer than k reach it, it was not, and all are looked at.
"""
import math

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from pydsa.backends.cpu.arrays import address, floats_at, uints_at
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.scalars import bits_of_float, float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import F32, I32, INTP, broadcast, call_llvm, constant, f32x16, load_floats, pointer, store


LOWEST = np.uint32(0x007FFFFF)      # ordered(-inf)
EVERY = 16          # one of so many is in the sample
LONG = 2048         # a row for which a sample pays, if it is also
TIMES = 4           # times as long as what is chosen


@intrinsic
def compress_store(typingctx, v, threshold, index, scores, indices):
    """Of sixteen floats those >= threshold go to `scores`, side by side, and index + lane to `indices`, int32 -> how many they are."""
    def codegen(context, builder, signature, args):
        v, threshold, index, scores, indices = args
        there = builder.fcmp_ordered(">=", v, broadcast(builder, threshold, 16))
        mask = builder.bitcast(there, ir.IntType(16))
        with builder.if_then(builder.icmp_unsigned("!=", mask, mask.type(0)), likely=False):
            lanes = builder.add(broadcast(builder, builder.trunc(index, I32), 16), constant(range(16)))
            for name, numbers, at in (("f32", v, scores), ("i32", lanes, indices)):
                call_llvm(builder, f"llvm.masked.compressstore.v16{name}", ir.VoidType(),
                          [numbers, pointer(builder, at, F32 if name == "f32" else I32), there])
        return builder.zext(call_llvm(builder, "llvm.ctpop.i16", mask.type, [mask]), INTP)
    return types.intp(f32x16, types.float32, types.intp, types.intp, types.intp), codegen


@inner
def select(out, row):
    """The out.size greatest of row, ascending indices, ties to the lowest index; -inf and NaN never; -1 fills the rest."""
    n, k = row.size, out.size
    memory = own_scratch(16 * n + 4 * k + 128)
    if n < LONG or n < TIMES * k:
        select_all(out, row, memory)
        return
    scores, indices = memory + 8 * n, memory + 12 * n + 64
    found = candidates(row, sampled_threshold(row, k, memory), scores, indices)
    if found < k:
        select_all(out, row, memory)
        return
    select_all(out, floats_at(scores, 1, found)[0], memory)
    for i in range(k):
        out[i] = uints_at(indices, found)[out[i]] if out[i] >= 0 else -1


@inner
def sampled_threshold(row, k, memory):
    """A value that more than k of row reach, as far as a sample tells: four standard deviations of its rank below that of the k-th."""
    n, rank = row.size // EVERY, k / EVERY
    keys = uints_at(memory, n)
    for i in range(n):
        keys[i] = ordered(row[EVERY * i])
    key = key_of_rank(keys, min(int(rank + 4 * math.sqrt(rank)) + 1, n), uints_at(memory + 4 * n, n))[0]
    if key <= LOWEST:
        return np.float32(-np.inf)
    return float_from_bits(key & np.uint32(0x7FFFFFFF) if key & np.uint32(0x80000000) else ~key)


@inner
def candidates(row, threshold, scores, indices):
    """Those of row that reach a threshold, floats, and their indices, to two addresses with room for row.size + 16 -> how many."""
    found, n = 0, row.size
    for s in range(0, n - 15, 16):
        found += compress_store(load_floats(address(row), 4 * s), threshold, s, scores + 4 * found, indices + 4 * found)
    for s in range(n // 16 * 16, n):
        if row[s] >= threshold:
            store(scores, 4 * found, row[s])
            store(indices, 4 * found, np.int32(s))
            found += 1
    return found


@inner
def ordered(x):
    """A uint32 that sorts as the float does; both zeros are equal; NaN is below -inf."""
    if x != x:
        return np.uint32(0)
    if x == 0:
        return np.uint32(0x80000000)
    bits = bits_of_float(x)
    return ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)


@inner
def select_all(out, row, memory):
    """What select() does, by looking at all of row; with 8 row.size bytes of memory."""
    keys, n, valid = uints_at(memory, row.size), row.size, 0
    for s in range(n):
        keys[s] = ordered(row[s])
        valid += keys[s] > LOWEST
    threshold, n_ties = LOWEST, 0         # room: how many that equal the threshold are chosen
    if valid > out.size:
        threshold, n_ties = key_of_rank(keys, out.size, uints_at(memory + 4 * n, n))
    n = 0
    for s in range(row.size):
        if keys[s] > threshold:
            out[n] = s
            n += 1
        elif n_ties > 0 and keys[s] == threshold:
            out[n] = s
            n += 1
            n_ties -= 1
    out[n:] = -1


@inner
def key_of_rank(keys, rank, rivals):
    """The rank-th greatest key, and how many that equal it are among the first `rank`; there is room in `rivals` for all keys.

    Radix select: eleven bits narrow it down, then the next bits of those that share them.
    """
    count = np.zeros(2048, np.int64)
    for s in range(keys.size):
        count[keys[s] >> np.uint32(21)] += 1
    digit, n_ties = last_digit(count, rank)
    threshold, n = np.uint32(digit << 21), 0
    for s in range(keys.size):
        if keys[s] >> np.uint32(21) == digit:
            rivals[n] = keys[s]
            n += 1
    for shift, above in ((10, 21), (0, 10)):
        count[:] = 0
        for i in range(n):
            if (rivals[i] ^ threshold) >> np.uint32(above) == 0:
                count[(rivals[i] >> np.uint32(shift)) & np.uint32((1 << (above - shift)) - 1)] += 1
        digit, n_ties = last_digit(count, n_ties)
        threshold |= np.uint32(digit << shift)
    return threshold, n_ties


@inner
def last_digit(count, wanted):
    """The digit of the last of so many, from the greatest on, and how many of those with this digit are among them."""
    digit = count.size - 1
    while count[digit] < wanted:
        wanted -= count[digit]
        digit -= 1
    return digit, wanted


@kernel(parallel=True)
def top_k(out, scores):
    for t in prange(out.shape[0]):
        select(out[t], scores[t])
