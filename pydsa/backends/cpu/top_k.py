"""Exact top-k in time linear in the row; ties go to the lowest index.

Of a long row only candidates at or above a threshold are sorted out: a value of a rank in a sample that is probably lower than the k-th
largest. If fewer than k values reach it, the whole row is searched.
"""
import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.arrays import address, floats_at, ints_at, uints_at
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.scratch import mark_nan, thread_scratch
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import by_second_row, rows_of
from pydsa.backends.cpu.vectors.scalars import bits_of_float, float_from_bits
from pydsa.backends.cpu.vectors.simd import (F32, I32, INTP, broadcast, call_llvm, constant, f32x16, float_at, i64_at, load_floats, pointer,
                                             store, u32_at)


LOWEST = np.uint32(0x007FFFFF)      # ordered(-inf)
SAMPLE_STRIDE = 16          # one of this many values is in the sample; of long rows fewer are,
MOST_SAMPLED = 4096         # so many
SAMPLED_SIZE = 2048         # the shortest row that is sampled, if it is also
SAMPLED_RATIO = 4           # times as long as k
PART = 16384                # values of a long row that a task searches for candidates
COUNTERS = 8 * 2048         # bytes of the counters of key_of_rank


@intrinsic
def compress_store(typingctx, v, threshold, index, scores, indices):
    """Store those of sixteen floats that are >= threshold; return their count.

    Values go to `scores`, contiguous; index + lane goes to `indices`, int32.
    """
    def codegen(context, builder, signature, args):
        v, threshold, index, scores, indices = args
        reached = builder.fcmp_ordered(">=", v, broadcast(builder, threshold, 16))
        mask = builder.bitcast(reached, ir.IntType(16))
        with builder.if_then(builder.icmp_unsigned("!=", mask, mask.type(0)), likely=False):
            lanes = builder.add(broadcast(builder, builder.trunc(index, I32), 16), constant(range(16)))
            for name, values, at in (("f32", v, scores), ("i32", lanes, indices)):
                call_llvm(builder, f"llvm.masked.compressstore.v16{name}", ir.VoidType(),
                          [values, pointer(builder, at, F32 if name == "f32" else I32), reached])
        return builder.zext(call_llvm(builder, "llvm.ctpop.i16", mask.type, [mask]), INTP)
    return types.intp(f32x16, types.float32, types.intp, types.intp, types.intp), codegen


@inner
def select(out, row, thread):
    """Select the indices of the out.size largest values of row, ascending.

    Ties go to the lowest index; -inf and NaN are never selected; -1 fills the rest. NaN and infinity are marked.
    """
    if not all_below_infinity(row):
        mark_nan()
    n, k = row.size, out.size
    memory = thread_scratch(thread, COUNTERS + 16 * n + 4 * k + 128)
    if n < SAMPLED_SIZE or n < SAMPLED_RATIO * k:
        select_all(out, row, memory)
        return
    scores, indices = memory + COUNTERS + 8 * n, memory + COUNTERS + 12 * n + 64
    n_found = candidates(row, 0, sampled_threshold(row, k, memory), scores, indices)
    select_of(out, row, n_found, scores, indices, memory)


@inner
def select_of(out, row, n_found, scores, indices, memory):
    """Select from n_found candidates of row, if they are enough.

    Otherwise from all of it. memory: COUNTERS + 8 row.size bytes.
    """
    if n_found < out.size:
        select_all(out, row, memory)
        return
    select_all(out, floats_at(scores, 1, n_found)[0], memory)
    for i in range(out.size):
        out[i] = uints_at(indices, n_found)[out[i]] if out[i] >= 0 else -1


# A long row can be divided among tasks: one finds the threshold, one for each part its candidates, one selects of these.

@inner
def is_long(n, k):
    """Whether it pays to divide a row of n values."""
    return n >= 2 * PART and n >= SAMPLED_RATIO * k


@inner
def count_parts(n):
    """Count the parts of a row of n values."""
    return (n + PART - 1) // PART


@inner
def long_row_bytes(n):
    """Count the bytes that the tasks of a row of n values share."""
    return 64 + count_parts(n) * (64 + 8 * (PART + 16))


@inner
def part_at(shared, part):
    """Return where a part's candidates are: their number, scores, and indices."""
    at = shared + 64 + part * (64 + 8 * (PART + 16))
    return at, at + 64, at + 64 + 4 * (PART + 16)


@inner
def find_threshold(row, k, shared, thread):
    """Store the threshold of a long row's candidates."""
    store(shared, 0, sampled_threshold(row, k, thread_scratch(thread, COUNTERS + 8 * row.size)))


@inner
def find_candidates(row, part, shared):
    """Store the candidates of a part of a long row, and mark NaN and infinity."""
    n_found, scores, indices = part_at(shared, part)
    piece = floats_at(address(row) + 4 * part * PART, 1, min(PART, row.size - part * PART))[0]
    if not all_below_infinity(piece):
        mark_nan()
    store(n_found, 0, np.int64(candidates(piece, part * PART, float_at(shared, 0), scores, indices)))


@inner
def select_of_parts(out, row, shared, thread):
    """Select from the candidates of all parts of a long row."""
    memory = thread_scratch(thread, COUNTERS + 16 * row.size)
    scores, indices, total = memory + COUNTERS + 8 * row.size, memory + COUNTERS + 12 * row.size, 0
    for part in range(count_parts(row.size)):
        n_found, some_scores, some_indices = part_at(shared, part)
        n = i64_at(n_found, 0)
        for i in range(n):
            store(scores, 4 * (total + i), float_at(some_scores, 4 * i))
            store(indices, 4 * (total + i), u32_at(some_indices, 4 * i))
        total += n
    select_of(out, row, total, scores, indices, memory)


@inner
def all_below_infinity(row):
    """Whether no value is NaN or infinite; -inf is a masked key."""
    others = 0
    for s in range(row.size):
        others += not row[s] < np.float32(np.inf)
    return others == 0


@inner
def sampled_threshold(row, k, memory):
    """Estimate a value that more than k values of row reach, from a sample.

    Its rank in the sample is four standard deviations below that of the k-th largest.
    """
    stride = max(SAMPLE_STRIDE, row.size // MOST_SAMPLED)
    n, rank = row.size // stride, k / stride
    keys = uints_at(memory + COUNTERS, n)
    for i in range(n):
        keys[i] = ordered(row[stride * i])
    key = key_of_rank(keys, min(int(rank + 4 * math.sqrt(rank)) + 1, n), uints_at(memory + COUNTERS + 4 * n, n), ints_at(memory, 2048))[0]
    if key <= LOWEST:
        return np.float32(-np.inf)
    return float_from_bits(key & np.uint32(0x7FFFFFFF) if key & np.uint32(0x80000000) else ~key)


@inner
def candidates(row, first, threshold, scores, indices):
    """Store the values of row that reach a threshold, and their indices.

    Indices begin at `first`. Both buffers have space for row.size + 16. Returns the count.
    """
    found, n = 0, row.size
    for s in range(0, n - 15, 16):
        found += compress_store(load_floats(address(row), 4 * s), threshold, first + s, scores + 4 * found, indices + 4 * found)
    for s in range(n // 16 * 16, n):
        if row[s] >= threshold:
            store(scores, 4 * found, row[s])
            store(indices, 4 * found, np.int32(first + s))
            found += 1
    return found


@inner
def ordered(x):
    """Map a float to a uint32 that sorts alike.

    Both zeros are equal; NaN is below -inf.
    """
    if x != x:
        return np.uint32(0)
    if x == 0:
        return np.uint32(0x80000000)
    bits = bits_of_float(x)
    return ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)


@inner
def select_all(out, row, memory):
    """Do what select() does by searching all of row.

    memory: COUNTERS + 8 row.size bytes.
    """
    keys, n, valid = uints_at(memory + COUNTERS, row.size), row.size, 0
    for s in range(n):
        keys[s] = ordered(row[s])
        valid += keys[s] > LOWEST
    threshold, n_ties = LOWEST, 0         # n_ties: how many that equal the threshold are selected
    if valid > out.size:
        threshold, n_ties = key_of_rank(keys, out.size, uints_at(memory + COUNTERS + 4 * n, n), ints_at(memory, 2048))
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
def key_of_rank(keys, rank, matches, count):
    """Find the rank-th largest key, and count its ties in the first `rank`.

    Radix select: eleven bits narrow it down, then the next bits of the keys that share them. `matches` has space for all keys,
    `count` for 2048 counters.
    """
    count[:] = 0
    for s in range(keys.size):
        count[keys[s] >> np.uint32(21)] += 1
    digit, n_ties = last_digit(count, rank)
    threshold, n = np.uint32(digit << 21), 0
    for s in range(keys.size):
        if keys[s] >> np.uint32(21) == digit:
            matches[n] = keys[s]
            n += 1
    for shift, above in ((10, 21), (0, 10)):
        count[:] = 0
        for i in range(n):
            if (matches[i] ^ threshold) >> np.uint32(above) == 0:
                count[(matches[i] >> np.uint32(shift)) & np.uint32((1 << (above - shift)) - 1)] += 1
        digit, n_ties = last_digit(count, n_ties)
        threshold |= np.uint32(digit << shift)
    return threshold, n_ties


@inner
def last_digit(count, rank):
    """Return the digit of the key of a rank, and its rank among equal digits.

    Keys are counted from the largest digit on.
    """
    digit = count.size - 1
    while count[digit] < rank:
        rank -= count[digit]
        digit -= 1
    return digit, rank


@inner
def top_k_rows(out, scores, task):
    for t in rows_of(scores, task):
        select(out[t], scores[t], task.thread)


@op(Stage(by_second_row, top_k_rows))
def top_k(out, scores):
    return 0
