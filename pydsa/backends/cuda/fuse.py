"""Kernel fusion for one-token steps: consecutive ops become one launch.

Activations are packed to Int8x2 once for all products that take them. Every array is written with the same values as by the ops themselves,
so that any op can be left unfused.
"""
import functools

import numpy as np

from pydsa.backends.cuda import attention, indexer, int8x2, linear, modes, moe, norm, rope, rows
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.fused_kernels import add_norm, norm_is_wide, pack_and_rope, rotate_and_pack_queries, silu_mul_pack, store
from pydsa.backends.cuda.int8x2.gemv import gemv
from pydsa.backends.cuda.int8x2.linear import pack_into, scratch_for


def fewer_launches(calls):
    """Fuse the calls of a one-token step into a list of launches.

    calls: (op, args, number of leading args that the op writes). Returns functools.partial objects, to be called in order.
    """
    launches, i = Launches(), 0
    while i < len(calls):
        ops, args = [op for op, _, _ in calls[i:i + 4]], [a for _, a, _ in calls[i:i + 4]]
        n = next(filter(None, (rule(launches, ops, args) for rule in RULES)), 0)
        if n == 0:
            launches.add(ops[0], *args[0], written=args[0][:calls[i][2]])
        i += max(n, 1)
    return launches.calls


class Launches:
    """The launches so far, and which activations have a valid Int8x2."""

    def __init__(self):
        self.calls, self._packed = [], {}       # address, shape, strides of rows -> their Int8x2, their span

    def add(self, function, *args, written, packs=None):
        """Append a launch.

        It invalidates the Int8x2 of every array that it writes. packs: rows whose Int8x2 it makes; that becomes its last argument.
        """
        for low, high in (array.span for array in written):
            self._packed = {key: (made, span) for key, (made, span) in self._packed.items() if span[1] <= low or high <= span[0]}
        if packs is not None:
            key = packs.span[0], packs.shape, packs.strides
            self._packed[key] = scratch_for(packs, key), packs.span
            args += self._packed[key][0],
        self.calls.append(functools.partial(function, *args))

    def packed(self, x):
        """The Int8x2 of rows. Appends a launch that makes it if there is none."""
        key = x.span[0], x.shape, x.strides
        if key not in self._packed:
            self.add(pack_into, x, written=(), packs=x)
        return self._packed[key][0]


def one_row(a):
    """Whether an array has one token and can be packed to Int8x2."""
    return a.shape[0] == 1 and a.shape[-1] % 32 == 0


def same(a, b):
    """Whether two arrays are the same view of the same memory."""
    return a.span == b.span and a.shape == b.shape and a.strides == b.strides


def sums_and_norm(launches, ops, args):
    """Fuse rms_norm with up to two add ops before it, and pack its output."""
    n = next((n for n in range(3) if ops[:n + 1] == [norm.add] * n + [norm.rms_norm]), None)
    if n is None or not one_row(args[n][0]):
        return 0
    out, normed, w, eps = args[n]
    added = []
    for total, x, y in args[:n]:
        if added and not same(x, added[-1]):
            x, y = y, x
        if added and not same(x, added[-1]):
            return 0
        added += [x, y, total] if not added else [y, total]
    added = added or [normed]
    read, written = [*added[:2], *added[3:4]], added[2::2]
    if not same(normed, added[-1]) or any(overlap(a, b) and not same(a, b) for a in written for b in read):
        return 0
    added, normed = [a.rows for a in added], out.rows
    if not norm_is_wide(added, normed, w):
        return 0
    launches.add(add_norm, added, normed, w, eps, written=[out, *written], packs=normed)
    return n + 1


def products(launches, ops, args):
    """Fuse linear or head_linear with quantized weights.

    Two linear ops on the same activations become one launch. An rms_norm of the first one's output may stand between them. A head_linear
    takes the rope op after it into the launch that packs its activations.
    """
    if ops[0] not in (linear.linear, linear.head_linear):
        return 0
    out, w, x = args[0]
    if w.type not in GROUPED or x.shape[0] != 1:
        return 0
    if ops[:2] == [linear.head_linear, rope.rope] and beside(args[1][0], out) and not overlap(args[1][1], out):
        rotated = args[1]
        launches.add(pack_and_rope, x.rows, *rotated, written=rotated[:1], packs=x.rows)
        launches.add(gemv, [out.rows], [w], launches.packed(x.rows), linear.head_tiles(1, x.shape[1]), written=[out])
        return 2
    between = 1 if ops[:3] == [linear.linear, norm.rms_norm, linear.linear] else 0
    other = args[1 + between] if ops[:2 + between] == [linear.linear] + [norm.rms_norm] * between + [linear.linear] else None
    pair = other is not None and same(x, other[2]) and same_layout(w, other[1]) and not (
        between and (overlap(other[0], args[1][0]) or overlap(other[0], args[1][1])))
    outs, weights = [out, other[0]] if pair else [out], [w, other[1]] if pair else [w]
    tiles = linear.head_tiles(1, 1 if ops[0] is linear.linear else x.shape[1])
    launches.add(gemv, [o.rows for o in outs], weights, launches.packed(x.rows), tiles, written=outs)
    if pair and between and sums_and_norm(launches, ops[1:2], args[1:2]) == 0:
        launches.add(norm.rms_norm, *args[1], written=args[1][:1])
    return 2 + between if pair else 1


def overlap(a, b):
    """Whether the spans of two arrays overlap."""
    return a.span[0] < b.span[1] and b.span[0] < a.span[1]


def column(a, b):
    """The column of b, rows of float32, at which a begins."""
    return (a.span[0] - b.span[0]) // 4


def beside(a, b):
    """Whether a has columns to the right of b's, in the same rows."""
    return a.shape[:2] == b.shape[:2] and a.strides == b.strides and b.shape[-1] <= column(a, b) <= b.strides[1] // 4 - a.shape[-1]


def same_layout(w, other):
    """Whether one launch can multiply with both weights."""
    return w.type == other.type and w.row_bytes == other.row_bytes


def gated(launches, ops, args):
    """Fuse silu_mul with the packing of its output."""
    if ops[0] is not norm.silu_mul or not one_row(args[0][0]):
        return 0
    out, gate, up = (a.rows for a in args[0])
    launches.add(silu_mul_pack, out, gate, up, written=[out], packs=out)
    return 1


def first_of_experts(launches, ops, args):
    """Fuse moe_gate_up with quantized weights: one gemv for both, then silu_mul."""
    out, x, ids, gate, up = args[0] if ops[0] is moe.moe_gate_up else [None] * 5
    if out is None or not one_row(out) or gate.type not in GROUPED or up.type not in GROUPED:
        return 0
    hidden, tiles = out.rows, moe.pair_tiles(ids, gate.shape[0], ids.shape[1])
    ups, x = scratch("ups", hidden.shape, np.float32), launches.packed(x.rows)
    for outs, weights in [([hidden, ups], [gate, up])] if same_layout(gate, up) else [([hidden], [gate]), ([ups], [up])]:
        launches.add(gemv, outs, weights, x, tiles, written=outs)
    launches.add(silu_mul_pack, hidden, hidden, ups, written=[hidden], packs=hidden)
    return 1


def last_of_experts(launches, ops, args):
    """Let moe_down with quantized weights use packed activations."""
    out, hidden, ids, weights, down = args[0] if ops[0] is moe.moe_down else [None] * 5
    if out is None or out.shape[0] != 1 or down.type not in GROUPED:
        return 0
    launches.add(moe.moe_down_packed, out, ids, weights, down, launches.packed(hidden.rows), written=[out])
    return 1


def stored_row(launches, ops, args):
    """Fuse norm, rope, an optional hadamard and cache_write of one row.

    The row is a latent, whose compressed values are normed, or a key of the indexer.
    """
    n = next((n for n in (3, 4) if ops[1:n] == [rope.rope, rope.hadamard, rows.cache_write][:n - 2] + [rows.cache_write]), None)
    if n is None or ops[0] not in (norm.rms_norm, norm.layer_norm):
        return 0
    (normed, x, w, *b, eps), (rotated, source, table, neox), (cache, row, positions) = args[0], args[1], args[n - 1]
    whole_row = n == 3 or same(args[2][0].rows, row) and same(args[2][1].rows, row)
    if row.shape[0] != 1 or not whole_row or not same(rotated, source) or rotated.shape[1] != 1 or normed.span[0] != row.span[0]:
        return 0
    if not 0 <= column(rotated, row) <= row.shape[1] - rotated.shape[-1]:
        return 0
    launches.add(store, row, x, normed, w, b[0] if b else None, eps, rotated, table, neox, n == 4, cache, positions, written=[row])
    return n


def index_queries(launches, ops, args):
    """Fuse rope, hadamard and packing of the indexer's queries.

    The ops are rope, hadamard, the linear of the head weights, and indexer_select with int8 keys.
    """
    if ops != [rope.rope, rope.hadamard, linear.linear, indexer.indexer_select]:
        return 0
    (rotated, source, table, neox), (q, rotated), (w, _, _), (out, selected, weights, keys, positions, scale) = args
    if q.shape[0] != 1 or not int8x2.indexer.takes(keys) or not same(rotated, source) or not same(q, rotated):
        return 0
    if not same(q, selected) or not same(w, weights) or overlap(w, q) or not overlap(rotated, q):
        return 0
    if products(launches, ops[2:3], args[2:3]) == 0:
        launches.add(linear.linear, *args[2], written=[w])
    queries = int8x2.indexer.scratch_for_queries(q)
    launches.add(rotate_and_pack_queries, q, rotated, table, neox, w, queries, written=[q])
    launches.add(indexer.select, out, queries, keys, positions, scale, written=[out])
    return 4


def attended(launches, ops, args):
    """Fuse attention with the packing of its output.

    The output must be the input of a quantized head_linear.
    """
    if ops[0] not in ATTENTION or ops[1:2] != [linear.head_linear] or args[1][1].type not in GROUPED or not one_row(args[0][0]):
        return 0
    out, q, latents, *others, scale = args[0]
    mode, names = ATTENTION[ops[0]]
    named = dict(zip(names, others, strict=True))
    n_keys = named["indices"].shape[1] if "indices" in named else len(latents.data)
    launches.add(attention.attend, out, q, latents, mode, n_keys, scale, *map(named.get, ("positions", "indices", "mask")),
                 written=[out], packs=out.rows)
    return 1


# op -> mode of attend(), names of the op's arguments between the cache and the scale
ATTENTION = {attention.dense_attention: (modes.DENSE, ("positions",)), attention.sparse_attention: (modes.SPARSE, ("indices",)),
             attention.masked_attention: (modes.MASKED, ("mask", "positions"))}
RULES = stored_row, sums_and_norm, index_queries, attended, products, gated, first_of_experts, last_of_experts
