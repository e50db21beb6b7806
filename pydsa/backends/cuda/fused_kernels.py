"""Fused kernels for one-token steps: adds, norms, gates and rope, with packing.

A launch takes as long as reading a million bytes of weights, and most ops of one token are smaller. Each kernel here computes what several
ops compute one after the other, and writes all of their outputs: to the last bit, but for the sum of a norm, which has another order.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.device import SIMULATED, WARP, device, load_four_f32, store_four_f32, sync, warp_sum
from pydsa.backends.cuda.instructions import wait_for_earlier
from pydsa.backends.cuda.int8x2.indexer import pack_query
from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.norm import layer_norm_row, rms_norm_row, silu_times
from pydsa.backends.cuda.rope import MAX_WIDTH, hadamard_row, rotate_pair
from pydsa.backends.cuda.rows import BITS, CACHED, store_bits, write_part


THREADS = 8 if SIMULATED else 256
WIDE = 8 if SIMULATED else 1024     # threads of a block that norms a row
MOST = 8 * WIDE                     # values of a row that it can have in its registers
WARP_BITS = WARP.bit_length() - 1
ZERO = np.float32(0)


@device
def load_eight(row, i, there, j, far):
    """Four values of a row from i on if `there`, and four from j on if `far`.

    Zeros stand for those that are not loaded: another thread may write them meanwhile.
    """
    a, b, c, d = load_four_f32(row, i) if there else (ZERO, ZERO, ZERO, ZERO)
    e, f, g, h = load_four_f32(row, j) if far else (ZERO, ZERO, ZERO, ZERO)
    return a, b, c, d, e, f, g, h


@device
def store_eight(row, i, there, j, far, values):
    """Store four values from i on if `there`, and four from j on if `far`."""
    if there:
        store_four_f32(row, i, values[0], values[1], values[2], values[3])
    if far:
        store_four_f32(row, j, values[4], values[5], values[6], values[7])


@device
def plus(x, y):
    """The sums of two tuples of eight."""
    return (x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3], x[4] + y[4], x[5] + y[5], x[6] + y[6], x[7] + y[7])


@device
def squares(a, b, c, d):
    """The sum of four squares."""
    return (a * a + b * b) + (c * c + d * d)


@device
def sum_of_warps(x, parts, thread):
    """Block-level sum of float32 over WIDE threads, in every thread.

    The warps' sums are added by all warps at once, not one after the other. parts: shared memory with one float32 per warp.
    """
    x, lane = warp_sum(x), thread & WARP - 1
    if lane == 0:
        parts[thread >> WARP_BITS] = x
    sync()
    return warp_sum(parts[lane] if lane < WIDE // WARP else ZERO)


@kernel("f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], i4, f4[::1], f4, u4[:,::1], f4[:,::1], f4[:,::1]", WIDE, dependent=True)
def add_norm_row(out, second, first, x, y, z, n_added, w, eps, packed, scales, sums):
    """out = rms_norm(x + y + z) and its Int8x2; n_added of the adds are done.

    first = x + y and second = first + z are stored too. One block for the row. A thread has its values in registers: all loads are under
    way at once, and each value is read once.
    """
    thread, parts, n_fours = cuda.threadIdx.x & WIDE - 1, cuda.shared.array(32, np.float32), x.shape[0] >> 2
    i, there, j, far = 4 * thread, thread < n_fours, 4 * (thread + WIDE), thread + WIDE < n_fours
    factors = load_eight(w, i, there, j, far)
    wait_for_earlier()
    values = load_eight(x, i, there, j, far)
    if n_added == 1:
        values = plus(values, load_eight(y, i, there, j, far))
        store_eight(first, i, there, j, far, values)
    if n_added == 2:
        added, last = load_eight(y, i, there, j, far), load_eight(z, i, there, j, far)
        values = plus(values, added)
        store_eight(first, i, there, j, far, values)
        values = plus(values, last)
        store_eight(second, i, there, j, far, values)
    total = squares(values[0], values[1], values[2], values[3]) + squares(values[4], values[5], values[6], values[7])
    f = np.float32(1) / np.float32(math.sqrt(sum_of_warps(total, parts, thread) / np.float32(x.shape[0]) + eps))
    v = (values[0] * f * factors[0], values[1] * f * factors[1], values[2] * f * factors[2], values[3] * f * factors[3],
         values[4] * f * factors[4], values[5] * f * factors[5], values[6] * f * factors[6], values[7] * f * factors[7])
    store_eight(out, i, there, j, far, v)
    pack_four(packed, scales, sums, 0, thread, there, v[0], v[1], v[2], v[3])
    if n_fours > WIDE:      # the same in all threads
        pack_four(packed, scales, sums, 0, thread + WIDE, far, v[4], v[5], v[6], v[7])


@kernel("f4[:,:], f4[:,:], f4[:,:], u4[:,:], f4[:,:], f4[:,:]", THREADS)
def silu_mul_packed(out, gate, up, packed, scales, sums):
    """out = gate sigmoid(gate) up, and its Int8x2. Four values per thread."""
    t, four = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    valid, i = four < out.shape[1] // 4, 4 * four
    a, b, c, e = ZERO, ZERO, ZERO, ZERO
    if valid:
        a, b = silu_times(gate[t, i], up[t, i]), silu_times(gate[t, i + 1], up[t, i + 1])
        c, e = silu_times(gate[t, i + 2], up[t, i + 2]), silu_times(gate[t, i + 3], up[t, i + 3])
        out[t, i], out[t, i + 1], out[t, i + 2], out[t, i + 3] = a, b, c, e
    pack_four(packed, scales, sums, t, four, valid, a, b, c, e)


def _make_store(storage):
    to_bits, n_bytes = BITS.get(storage, BITS["f32"])
    floats, wide = storage in BITS, storage == "i16"

    def store_row(row, x, normed, w, b, eps, centred, rotated, table, neox, rotates, cache, positions, first, second):
        """Norm, rope, optional hadamard and cache_write of one row, by one block.

        The norm of x goes to `normed`, the first columns of `row`. rope rotates its columns `rotated`, hadamard the whole row. centred:
        layer_norm, not rms_norm. rotates: whether there is a hadamard.
        """
        thread, parts, maxima = cuda.threadIdx.x, cuda.shared.array(32, np.float32), cuda.shared.array(32, np.int32)
        values = cuda.shared.array(MAX_WIDTH, np.float32)
        if centred:
            layer_norm_row(normed, x, w, b, eps, 0, parts, thread, THREADS)
        else:
            rms_norm_row(normed, x, w, eps, 0, parts, thread, THREADS)
        cuda.syncthreads()
        for i in range(thread, table.shape[2], THREADS):
            rotate_pair(rotated, rotated, table, neox, 0, 0, i)
        cuda.syncthreads()
        if rotates:
            hadamard_row(row, row, 0, values, thread, THREADS)
            cuda.syncthreads()
        stored = cache[positions[0]]
        if floats:
            for i in range(thread, row.shape[1], THREADS):
                store_bits(stored, n_bytes * i, to_bits(row[0, i]), n_bytes)
        else:
            write_part(stored, row, 0, 0, first, second, wide, maxima, thread, THREADS)
            if second > 0:
                write_part(stored, row, 0, 1, first, second, wide, maxima, thread, THREADS)
    signature = "f4[:,:], f4[:,:], f4[:,:], f4[:], f4[:], f4, b1, f4[:,:,:], f4[:,:,:], b1, b1, u1[:,:], i8[:], i4, i4"
    return kernel(signature, THREADS, f"store_row_{storage}")(store_row)


STORE = {storage: _make_store(storage) for storage in CACHED}


@kernel("f4[:,:,:], f4[:,:,:], f4[:,:,:], b1, f4[:,:], u4[:,:], f4[:,:]", THREADS)
def rotate_queries(q, rotated, table, neox, w, queries, weights):
    """rope, hadamard and packing of the indexer's queries.

    See int8x2/indexer.py. One head of one token per block.
    """
    h, thread, values = cuda.blockIdx.x, cuda.threadIdx.x, cuda.shared.array(MAX_WIDTH, np.float32)
    if h < q.shape[1]:
        for i in range(thread, table.shape[2], THREADS):
            rotate_pair(rotated, rotated, table, neox, 0, h, i)
        cuda.syncthreads()
        hadamard_row(q[0], q[0], h, values, thread, THREADS)
        cuda.syncthreads()
    if thread < WARP:
        pack_query(queries, weights, q, w, 0, h, thread)


@kernel("f4[:,:], f4[:,:,:], f4[:,:,:], f4[:,:,:], b1, u4[:,:], f4[:,:], f4[:,:]", THREADS)
def pack_and_rotate(x, out, rotated, table, neox, packed, scales, sums):
    """Pack x to Int8x2, one row per head, and rotate columns of the queries.

    out = rope(rotated). One head per block.
    """
    h, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1] // 4
    for begin in range(0, n, THREADS):
        four = begin + thread
        a, b, c, e = ZERO, ZERO, ZERO, ZERO
        if four < n:
            a, b, c, e = x[h, 4 * four], x[h, 4 * four + 1], x[h, 4 * four + 2], x[h, 4 * four + 3]
        pack_four(packed, scales, sums, h, four, four < n, a, b, c, e)
    for i in range(thread, table.shape[2], THREADS):
        rotate_pair(out, rotated, table, neox, 0, h, i)


def norm_is_wide(added, out, w):
    """Whether add_norm takes these rows: one, short enough, aligned to 16 bytes.

    They are float32 of a multiple of 32 values.
    """
    return len(out) == 1 and out.shape[1] <= MOST and all(a.span[0] % 16 == 0 for a in (*added, out, w))


def add_norm(added, out, w, eps, made):
    """rms_norm of a sum, and its Int8x2.

    added: [x], [x, y, x + y] or [x, y, x + y, z, x + y + z]; the last one is normed. norm_is_wide() must hold for them.
    """
    x, y, first, z, second = [a[0] for a in added] + [added[0][0]] * (5 - len(added))
    add_norm_row(1, out[0], second, first, x, y, z, (len(added) - 1) // 2, w, eps, *made)


def silu_mul_pack(out, gate, up, made):
    """silu_mul, and the Int8x2 of its output."""
    silu_mul_packed((out.shape[0], blocks_for(out.shape[1] // 4, THREADS)), out, gate, up, *made)


def store(row, x, normed, w, b, eps, rotated, table, neox, rotates, cache, positions):
    """Norm, rope, hadamard if `rotates`, and cache_write of one row.

    See store_row. b: the bias of layer_norm, or None for rms_norm.
    """
    STORE[cache.storage](1, row, x, normed, w, w if b is None else b, eps, b is not None, rotated, table, neox, rotates, cache.data,
                         positions, cache.first, cache.second)


def rotate_and_pack_queries(q, rotated, table, neox, w, queries):
    """rope of columns of q, hadamard, and packing of q and w.

    queries: the operand of int8x2.indexer.score().
    """
    rotate_queries(queries[1].shape[1], q, rotated, table, neox, w, *queries)


def pack_and_rope(x, out, rotated, table, neox, made):
    """Pack x to Int8x2, one row per head, and rotate: out = rope(rotated)."""
    pack_and_rotate(x.shape[0], x, out, rotated, table, neox, *made)
