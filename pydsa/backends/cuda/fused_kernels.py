"""Fused kernels for one-token steps: short norms, gates and rope, with packing.

A launch takes as long as reading a million bytes of weights, and most ops of one token are smaller. Each kernel here computes what several
ops compute one after the other, and writes all of their outputs: to the last bit, but for the sum of a norm, which has another order.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, WARP, device, float_bits, sync, to_half
from pydsa.backends.cuda.instructions import let_later_begin, wait_for_earlier
from pydsa.backends.cuda.int8x2.indexer import pack_query
from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.norm import layer_norm_row, rms_norm_row, silu_times
from pydsa.backends.cuda.norm_one import load_eight, normed_by_block, pack_eight, store_eight
from pydsa.backends.cuda.rope import MAX_WIDTH, hadamard_row, rotate_pair
from pydsa.backends.cuda.rows import CACHED, store_bits, to_bf16, write_part


THREADS = 8 if SIMULATED else 256
ZERO = np.float32(0)


@kernel(f"{'f4[:,:], ' * 6}u4[:,:], f4[:,:], f4[:,:]", THREADS, dependent=True)
def silu_mul_packed(out, gate, up, other_out, other_gate, other_up, packed, scales, sums):
    """out = gate sigmoid(gate) up, and its Int8x2. Four values per thread.

    Rows past those of `out` are those of other_out.
    """
    row, four = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    valid, i, t = four < out.shape[1] // 4, 4 * four, row
    if row >= out.shape[0]:
        t, out, gate, up = row - out.shape[0], other_out, other_gate, other_up
    a, b, c, e = ZERO, ZERO, ZERO, ZERO
    wait_for_earlier()
    let_later_begin()
    if valid:
        a, b = silu_times(gate[t, i], up[t, i]), silu_times(gate[t, i + 1], up[t, i + 1])
        c, e = silu_times(gate[t, i + 2], up[t, i + 2]), silu_times(gate[t, i + 3], up[t, i + 3])
        out[t, i], out[t, i + 1], out[t, i + 2], out[t, i + 3] = a, b, c, e
    pack_four(packed, scales, sums, row, four, valid, a, b, c, e)


STORAGES = tuple(CACHED)            # what the kernels call by number
F32, F16, BF16, I16 = map(STORAGES.index, ("f32", "f16", "bf16", "i16"))
OF_A_ROW = "f4[:,:], f4[:,:], f4[:,:], f4[:], f4[:], f4, b1, f4[:,:,:], f4[:,:,:], b1, b1, u1[:,:], i4, i4, i4"     # of store_row()


@device
def norm_of_few(out, x, w, eps, packed, scales, sums, parts, thread):
    """out = rms_norm(x) and its Int8x2, by a block of THREADS threads."""
    there, far = thread < x.shape[0] >> 2, thread + THREADS < x.shape[0] >> 2
    i, j = 4 * thread, 4 * (thread + THREADS)
    factors = load_eight(w, i, there, j, far)
    wait_for_earlier()
    let_later_begin()
    v = normed_by_block(load_eight(x, i, there, j, far), factors, eps, x.shape[0], parts, thread, THREADS)
    store_eight(out, i, there, j, far, v)
    pack_eight(packed, scales, sums, thread, there, far, v, THREADS)


@device
def store_row(row, x, normed, w, b, eps, centred, rotated, table, neox, rotates, cache, first, second, storage, positions, parts, maxima,
              values, thread):
    """Norm, rope, optional hadamard and cache_write of one row, by one block.

    The norm of x goes to `normed`, the first columns of `row`. rope rotates its columns `rotated`, hadamard the whole row. centred:
    layer_norm, not rms_norm. rotates: whether there is a hadamard. storage: its number in STORAGES.
    """
    if centred:
        layer_norm_row(normed, x, w, b, eps, 0, parts, thread, THREADS)
    else:
        rms_norm_row(normed, x, w, eps, 0, parts, thread, THREADS)
    sync()
    for i in range(thread, table.shape[2], THREADS):
        rotate_pair(rotated, rotated, table, neox, 0, 0, i)
    sync()
    if rotates:
        hadamard_row(row, row, 0, values, thread, THREADS)
        sync()
    stored = cache[positions[0]]
    if storage == F32 or storage == F16 or storage == BF16:
        for i in range(thread, row.shape[1], THREADS):
            value = row[0, i]
            if storage == F32:
                store_bits(stored, 4 * i, float_bits(value), 4)
            else:
                store_bits(stored, 2 * i, to_half(value) if storage == F16 else to_bf16(value), 2)
    else:
        write_part(stored, row, 0, 0, first, second, storage == I16, maxima, thread, THREADS)
        if second > 0:
            write_part(stored, row, 0, 1, first, second, storage == I16, maxima, thread, THREADS)


@kernel(f"i4, f4[::1], f4[::1], f4[::1], f4, u4[:,::1], f4[:,::1], f4[:,::1], i8[:], {OF_A_ROW}, {OF_A_ROW}", THREADS, dependent=True)
def norm_and_store(begin, out, x, w, eps, packed, scales, sums, positions, row, row_x, normed, row_w, b, row_eps, centred, rotated, table,
                   neox, rotates, cache, first, second, storage, row2, x2, normed2, w2, b2, eps2, centred2, rotated2, table2, neox2,
                   rotates2, cache2, first2, second2, storage2):
    """What is done with a token's small rows, one a block.

    0: out = rms_norm(x), and its Int8x2. 1, 2: store_row(). The first block has number `begin`.
    """
    part, thread = begin + cuda.blockIdx.x, cuda.threadIdx.x & THREADS - 1
    parts, maxima = cuda.shared.array(32, np.float32), cuda.shared.array(32, np.int32)
    values = cuda.shared.array(MAX_WIDTH, np.float32)
    if part == 0:
        norm_of_few(out, x, w, eps, packed, scales, sums, parts, thread)
        return
    wait_for_earlier()
    let_later_begin()
    if part == 2:
        row, row_x, normed, row_w, b, row_eps, centred = row2, x2, normed2, w2, b2, eps2, centred2
        rotated, table, neox, rotates = rotated2, table2, neox2, rotates2
        cache, first, second, storage = cache2, first2, second2, storage2
    store_row(row, row_x, normed, row_w, b, row_eps, centred, rotated, table, neox, rotates, cache, first, second, storage, positions,
              parts, maxima, values, thread)


@kernel("i4, f4[:,:], f4[:,:,:], f4[:,:,:], b1, u4[:,:], f4[:,:], f4[:,:], f4[:,:,:], f4[:,:,:], b1, f4[:,:], u4[:,:], f4[:,:], f4[:,:,:]",
        THREADS, dependent=True)
def prepare_heads(n_head, x, out, rotated, neox, packed, scales, sums, q, q_rotated, q_neox, w, queries, weights, table):
    """What is done with a token's queries before products; a head a block.

    Of the first n_head a row of x is packed to Int8x2, and out = rope(rotated). The others are the indexer's: rope of q_rotated, columns of
    q, hadamard of q, and packing with the heads' weights w (int8x2/indexer.py).
    """
    block, thread, values = np.int64(cuda.blockIdx.x), cuda.threadIdx.x, cuda.shared.array(MAX_WIDTH, np.float32)
    wait_for_earlier()
    let_later_begin()
    if block < n_head:
        n = x.shape[1] // 4
        for begin in range(0, n, THREADS):
            four = begin + thread
            a, b, c, e = ZERO, ZERO, ZERO, ZERO
            if four < n:
                a, b, c, e = x[block, 4 * four], x[block, 4 * four + 1], x[block, 4 * four + 2], x[block, 4 * four + 3]
            pack_four(packed, scales, sums, block, four, four < n, a, b, c, e)
        for i in range(thread, table.shape[2], THREADS):
            rotate_pair(out, rotated, table, neox, 0, block, i)
        return
    h = block - n_head
    if h < q.shape[1]:
        for i in range(thread, table.shape[2], THREADS):
            rotate_pair(q_rotated, q_rotated, table, q_neox, 0, h, i)
        cuda.syncthreads()
        hadamard_row(q[0], q[0], h, values, thread, THREADS)
        cuda.syncthreads()
    if thread < WARP:
        pack_query(queries, weights, q, w, 0, h, thread)


def norm_is_narrow(out, x, w):
    """Whether norm_and_store() takes the norm of a row: as norm_is_wide, but shorter."""
    return len(out) == 1 and out.shape[1] <= 8 * THREADS and all(a.span[0] % 16 == 0 for a in (out, x, w))


def silu_mul_pack(out, gate, up, others, made):
    """silu_mul, and the Int8x2 of its output.

    others: (out, gate, up) of more rows as wide, which come behind, or None.
    """
    n_rows = out.shape[0] + (others[0].shape[0] if others else 0)
    silu_mul_packed((n_rows, blocks_for(out.shape[1] // 4, THREADS)), out, gate, up, *(others or (out, gate, up)), *made)


class Stored(NamedTuple):
    """A row of a cache that is stored: the arguments of store_row().

    b: the bias of layer_norm, or None for rms_norm.
    """
    row: object
    x: object
    normed: object
    w: object
    b: object
    eps: float
    rotated: object
    table: object
    neox: bool
    rotates: bool
    cache: object       # CacheRows

    @property
    def arguments(self):
        """What the kernel takes."""
        row, x, normed, w, b, eps, rotated, table, neox, rotates, cache = self
        return (row, x, normed, w, w if b is None else b, eps, b is not None, rotated, table, neox, rotates, cache.data, cache.first,
                cache.second, STORAGES.index(cache.storage))


def store(stored, positions, norm=None, made=None):
    """Store one or two rows of caches, and norm a row that norm_is_narrow().

    stored: one or two Stored. norm: (out, x, w, eps), rows of two axes; made: the Int8x2 of its output.
    """
    if norm is None:
        nothing = scratch("nothing", (1, 1), np.float32)
        norm = nothing, nothing, nothing[0], np.float32(0)
        made = scratch("nothing", (1, 1), np.uint32), nothing, nothing
        begin = 1
    else:
        begin = 0
    out, x, w, eps = norm
    norm_and_store(len(stored) + 1 - begin, begin, out[0], x[0], w, eps, *made, positions, *stored[0].arguments, *stored[-1].arguments)


class Heads(NamedTuple):
    """Rows x that are packed, one per head, and out = rope(rotated)."""
    x: object
    out: object
    rotated: object
    neox: bool


class Queries(NamedTuple):
    """The indexer's queries q: rope of their columns `rotated`, hadamard, and packing with w.

    packed: the operand of int8x2.indexer.score().
    """
    q: object
    rotated: object
    neox: bool
    w: object
    packed: tuple


def rope_and_pack(table, heads=None, queries=None, made=None):
    """Do what Heads and Queries say, either or both. made: the Int8x2 of heads.x."""
    n_head, n_queries = len(heads.x) if heads else 0, queries.packed[1].shape[1] if queries else 0
    if heads is None:
        nothing, cube = scratch("nothing", (1, 1), np.float32), scratch("nothing", (1, 1, 1), np.float32)
        heads, made = Heads(nothing, cube, cube, False), (scratch("nothing", (1, 1), np.uint32), nothing, nothing)
    if queries is None:
        nothing, cube = scratch("nothing", (1, 1), np.float32), scratch("nothing", (1, 1, 1), np.float32)
        queries = Queries(cube, cube, False, nothing, (scratch("nothing", (1, 1), np.uint32), nothing))
    prepare_heads(n_head + n_queries, n_head, *heads, *made, *queries[:-1], *queries.packed, table)
