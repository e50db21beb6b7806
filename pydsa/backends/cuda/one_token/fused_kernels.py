"""Fused kernels for one-token steps: short norms, gates and rope, with packing.

A launch takes as long as reading a million bytes of weights, and most ops of one token are smaller. Each kernel here computes what several
ops compute one after the other, and writes all of their outputs: to the last bit, but for the sum of a norm, which has another order.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.indexer import pack_query
from pydsa.backends.cuda.int8x2.linear import pack_four
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP, device, float_bits, sync, to_half
from pydsa.backends.cuda.intrinsics.instructions import let_later_begin, wait_for_earlier
from pydsa.backends.cuda.norm import layer_norm_row, rms_norm_row, silu_times
from pydsa.backends.cuda.one_token.norm_one import load_eight, normed_by_block, pack_eight, store_eight
from pydsa.backends.cuda.rope import MAX_WIDTH, hadamard_row, rotate_pair
from pydsa.backends.cuda.rows import CACHED, CacheRows, store_bits, to_bf16, write_part
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


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


@device
def pack_and_rotate(x, out, rotated, table, neox, h, packed, scales, sums, thread):
    """Round row h of x to an Int8x2, and out = rope(rotated) of head h."""
    n = x.shape[1] // 4
    for begin in range(0, n, THREADS):
        four = begin + thread
        a, b, c, e = ZERO, ZERO, ZERO, ZERO
        if four < n:
            a, b, c, e = x[h, 4 * four], x[h, 4 * four + 1], x[h, 4 * four + 2], x[h, 4 * four + 3]
        pack_four(packed, scales, sums, h, four, four < n, a, b, c, e)
    for i in range(thread, table.shape[2], THREADS):
        rotate_pair(out, rotated, table, neox, 0, h, i)


@device
def rotate_query(q, rotated, table, neox, w, queries, weights, h, values, thread):
    """rope, hadamard and packing of query h of the indexer, by one block."""
    if h < q.shape[1]:
        for i in range(thread, table.shape[2], THREADS):
            rotate_pair(rotated, rotated, table, neox, 0, h, i)
        sync()
        hadamard_row(q[0], q[0], h, values, thread, THREADS)
        sync()
    if thread < WARP:
        pack_query(queries, weights, q, w, 0, h, thread)


OF_NORM, OF_HEADS = "f4[::1], f4[::1], f4[::1], f4, u4[:,::1], f4[:,::1], f4[:,::1]", "f4[:,:], f4[:,:,:], f4[:,:,:], b1"
OF_QUERIES = "f4[:,:,:], f4[:,:,:], b1, f4[:,:], u4[:,:], f4[:,:]"


@kernel(f"b1, i4, i4, {OF_NORM}, i8[:], {OF_A_ROW}, {OF_A_ROW}, {OF_HEADS}, u4[:,:], f4[:,:], f4[:,:], {OF_QUERIES}, f4[:,:,:]", THREADS,
        dependent=True)
def prepare(norms, n_stored, n_head, out, x, w, eps, packed, scales, sums, positions, row, row_x, normed, row_w, b, row_eps, centred,
            row_rotated, row_table, row_neox, rotates, cache, first, second, storage, row2, x2, normed2, w2, b2, eps2, centred2, rotated2,
            table2, neox2, rotates2, cache2, first2, second2, storage2, head_x, head_out, head_rotated, head_neox, head_packed, head_scales,
            head_sums, q, q_rotated, q_neox, head_weights, queries, weights, table):
    """What is done with a token's small rows between products, one a block.

    First out = rms_norm(x), and its Int8x2, if `norms`. Then n_stored rows: store_row(). Then n_head heads: pack_and_rotate(). The rest are
    queries of the indexer: rotate_query().
    """
    block, thread = np.int64(cuda.blockIdx.x) - (1 if norms else 0), cuda.threadIdx.x & THREADS - 1
    parts = cuda.shared.array(32, np.float32)
    maxima = cuda.shared.array(32, np.int32)
    values = cuda.shared.array(MAX_WIDTH, np.float32)
    if block < 0:
        norm_of_few(out, x, w, eps, packed, scales, sums, parts, thread)
        return
    wait_for_earlier()
    let_later_begin()
    if block < n_stored:
        if block == 1:
            row, row_x, normed, row_w, b, row_eps, centred = row2, x2, normed2, w2, b2, eps2, centred2
            row_rotated, row_table, row_neox, rotates = rotated2, table2, neox2, rotates2
            cache, first, second, storage = cache2, first2, second2, storage2
        store_row(row, row_x, normed, row_w, b, row_eps, centred, row_rotated, row_table, row_neox, rotates, cache, first, second, storage,
                  positions, parts, maxima, values, thread)
    elif block < n_stored + n_head:
        pack_and_rotate(head_x, head_out, head_rotated, table, head_neox, block - n_stored, head_packed, head_scales, head_sums, thread)
    else:
        rotate_query(q, q_rotated, table, q_neox, head_weights, queries, weights, block - n_stored - n_head, values, thread)


def norm_is_narrow(out, x, w):
    """Whether prepare_rows() takes the norm: as norm_is_wide, but shorter."""
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


class Heads(NamedTuple):
    """Rows x that are packed, one per head, and out = rope(rotated)."""
    x: object
    out: object
    rotated: object
    neox: bool


class Queries(NamedTuple):
    """The indexer's queries q, which are rotated and packed.

    rope of their columns `rotated`, hadamard, and packing with the heads' weights w. packed: the operand of int8x2.indexer.score().
    """
    q: object
    rotated: object
    neox: bool
    w: object
    packed: tuple


class Norm(NamedTuple):
    """out = rms_norm(x), rows [1, n]: norm_is_narrow()."""
    out: object
    x: object
    w: object
    eps: float


def prepare_rows(norm=None, stored=(), positions=None, heads=None, queries=None, table=None, made=None):
    """Do what a Norm, up to two Stored, Heads and Queries say, some of them.

    made: the Int8x2 of heads.x, or of norm.out where there are no heads. positions: with `stored`. table: with heads or queries.
    """
    nothing, cube = scratch("nothing", (1, 1), np.float32), scratch("nothing", (1, 1, 1), np.float32)
    no_int8x2 = scratch("nothing", (1, 1), np.uint32), nothing, nothing
    assert heads is None or norm is None
    n_head, n_queries = len(heads.x) if heads else 0, queries.packed[1].shape[1] if queries else 0
    out, x, w, eps = norm or (nothing, nothing, nothing[0], np.float32(0))
    rows = stored or [Stored(nothing, nothing, nothing, nothing[0], None, np.float32(0), cube, cube, False, False, no_cache())]
    heads_made = made if heads else no_int8x2
    heads = heads or Heads(nothing, cube, cube, False)
    queries = queries or Queries(cube, cube, False, nothing, (no_int8x2[0], nothing))
    prepare((norm is not None) + len(stored) + n_head + n_queries, norm is not None, len(stored), n_head, out[0], x[0], w, eps,
            *(made if norm else no_int8x2), scratch("nothing", (1,), np.int64) if positions is None else positions, *rows[0].arguments,
            *rows[-1].arguments, *heads, *heads_made, *queries[:-1], *queries.packed, cube if table is None else table)


def no_cache():
    """A CacheRows that is not used."""
    return CacheRows(scratch("nothing", (1, 1), np.uint8), "f32", 0, 0)
