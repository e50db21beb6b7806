"""Fused kernels for one-token steps: adds, norms, gates and rope, with packing.

A launch takes as long as reading a million bytes of weights, and most ops of one token are smaller. Each kernel here computes what several
ops compute one after the other, to the last bit, and writes all of their outputs.
"""
import math

import numpy as np
from numba import cuda

from pydsa.backends.cuda.block_sums import block_sum
from pydsa.backends.cuda.device import SIMULATED, WARP
from pydsa.backends.cuda.int8x2.indexer import pack_query
from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.norm import layer_norm_row, rms_norm_row, silu_times
from pydsa.backends.cuda.rope import MAX_WIDTH, hadamard_row, rotate_pair
from pydsa.backends.cuda.rows import BITS, CACHED, store_bits, write_part


THREADS = 8 if SIMULATED else 256
ZERO = np.float32(0)


@kernel("f4[:,:], f4[:,:], f4[:,:], f4[:,:], f4[:,:], f4[:,:], i4, f4[:], f4, u4[:,:], f4[:,:], f4[:,:]", THREADS)
def add_norm_rows(out, second, first, x, y, z, n_added, w, eps, packed, scales, sums):
    """out = rms_norm(x + y + z) and its Int8x2; n_added of the adds are done.

    first = x + y and second = first + z are stored too. One row per block; a row has a multiple of 32 values.
    """
    t, thread, parts, n = cuda.blockIdx.x, cuda.threadIdx.x, cuda.shared.array(32, np.float32), x.shape[1]
    total = ZERO
    for i in range(thread, n, THREADS):
        value = x[t, i]
        if n_added > 0:
            value += y[t, i]
            first[t, i] = value
        if n_added > 1:
            value += z[t, i]
            second[t, i] = value
        total += value * value
    total = block_sum(total, parts, thread, THREADS)
    factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(n) + eps))
    source = second if n_added > 1 else first if n_added > 0 else x
    for begin in range(0, n // 4, THREADS):
        four = begin + thread
        a, b, c, e = ZERO, ZERO, ZERO, ZERO
        if four < n // 4:
            i = 4 * four
            a, b, c, e = (source[t, i] * factor * w[i], source[t, i + 1] * factor * w[i + 1], source[t, i + 2] * factor * w[i + 2],
                          source[t, i + 3] * factor * w[i + 3])
            out[t, i], out[t, i + 1], out[t, i + 2], out[t, i + 3] = a, b, c, e
        pack_four(packed, scales, sums, t, four, four < n // 4, a, b, c, e)


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


def add_norm(added, out, w, eps, made):
    """rms_norm of a sum, and its Int8x2.

    added: [x], [x, y, x + y] or [x, y, x + y, z, x + y + z]; the last one is normed.
    """
    x, y, first, z, second = added + [added[0]] * (5 - len(added))
    add_norm_rows(out.shape[0], out, second, first, x, y, z, (len(added) - 1) // 2, w, eps, *made)


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
