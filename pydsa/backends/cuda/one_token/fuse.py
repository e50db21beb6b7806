"""Kernel fusion for one-token steps: consecutive ops become one launch.

Activations are packed to Int8x2 once for all products that take them. Every array is written with the same values as by the ops themselves,
so that any op can be left unfused.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda import attention, indexer, int8x2, modes, moe, norm, rows
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.int8x2.gemv import gemv, grid_of
from pydsa.backends.cuda.linear import head_linear, head_tiles, linear
from pydsa.backends.cuda.one_token import routing, rows_one
from pydsa.backends.cuda.one_token.fused_kernels import Heads, Norm, Queries, Stored, norm_is_narrow, prepare_rows, silu_mul_pack
from pydsa.backends.cuda.one_token.launches import Launches, one_row, touch
from pydsa.backends.cuda.one_token.norm_one import Joined, add_norm, norm_is_wide
from pydsa.backends.cuda.one_token.order import overlap, same, together, written_by
from pydsa.backends.cuda.rope import hadamard, rope
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.variants import kernels


AT_ONCE = 20        # calls that a rule sees


def fewer_launches(calls):
    """Fuse the calls of a one-token step into a list of launches.

    calls: pairs of an op and its arguments. Returns functools.partial objects, to be called in order.
    """
    return [launch for _, launches in fused(calls) for launch in launches]


def fused(calls):
    """The launches of a step: pairs of a call and those that begin with it."""
    launches, groups, i, calls = Launches(), [], 0, together(calls)
    while i < len(calls):
        ops, args = [op for op, _ in calls[i:i + AT_ONCE]], [a for _, a in calls[i:i + AT_ONCE]]
        n = next(filter(None, (rule(launches, ops, args) for rule in RULES)), 0)
        if n == 0:
            launches.add(ops[0], *args[0], written=written_by(*calls[i]))
        groups.append((calls[i], launches.taken()))
        i += max(n, 1)
    return groups


def sums_and_norm(launches, ops, args, joined=None):
    """Fuse rms_norm with up to two add ops before it, and pack its output.

    The product of the norm with a matrix of F32 may follow. joined: (the output of moe_down, what makes it); it is the first summand, or
    there is nothing to fuse.
    """
    n = next((n for n in range(3) if ops[:n + 1] == [norm.add] * n + [norm.rms_norm]), None)
    added = None if n is None or not one_row(args[n][0]) else _summands(args[:n], args[n][1], joined and joined[0])
    if added is None:
        return 0
    out, _, w, eps = args[n]
    product = _float_product(ops[n + 1:n + 2], args[n + 1:n + 2], out)
    written, read = [*([added[0]] if joined else []), *added[2::2]], [*added[joined is not None:2], *added[3:4]]
    made = [*written, out, *([product[0]] if product else [])]
    if (product or joined) and any(overlap(a, b) for i, a in enumerate(made) for b in [*read, *made[:i]]):
        product = None      # each block reads the sums' operands, the first one writes
        if joined:
            return 0
    if any(overlap(a, b) and not same(a, b) for a in written for b in read):
        return 0
    added, normed = [a.rows for a in added], out.rows
    if not norm_is_wide(added, normed, w):
        return 0
    row = (product[0].rows, product[1]) if product else None
    launches.add(add_norm, added, normed, w, eps, joined and joined[1], row, written=[out, *written, *(product[:1] if product else [])],
                 packs=normed)
    return n + (2 if product else 1)


def _summands(adds, normed, first):
    """[x, y, x + y, z, x + y + z] of adds; None if something else is normed."""
    added = [] if first is None else [first]
    for total, x, y in adds:
        if added and not same(x, added[-1]):
            x, y = y, x
        if added and not same(x, added[-1]):
            return None
        added += [x, y, total] if not added else [y, total]
    added = added or [normed]
    return added if same(normed, added[-1]) else None


def _float_product(ops, args, x):
    """The output and the matrix of a linear of x with F32; else None."""
    if ops != [linear] or args[0][1].type != "F32" or not same(args[0][2], x) or args[0][1].data.span[0] % 16:
        return None
    return args[0][:2]


def products(launches, ops, args):
    """Fuse linear ops with the same activations, whose weights are quantized.

    Those of one type and width become launches of up to four. Others stand between them as they are.
    """
    n = next((i for i, op in enumerate(ops) if op is not linear or not same(args[i][2], args[0][2])), len(ops))
    if n == 0 or args[0][2].shape[0] != 1:
        return 0
    x, groups = args[0][2], {}
    for out, w, _ in args[:n]:
        groups.setdefault((w.type, w.row_bytes), []).append((out, w))
    for (kind, _), group in groups.items():
        for i in range(0, len(group), 4):
            outs, weights = zip(*group[i:i + 4])
            if kind in GROUPED:
                launches.add(gemv, [out.rows for out in outs], weights, launches.packed(x.rows), head_tiles(1, 1), written=outs)
            else:
                for out, w in zip(outs, weights):
                    launches.add(linear, out, w, x, written=[out])
    return n


def products_of_heads(launches, ops, args, made=None):
    """Fuse head_linear with quantized weights.

    A linear with quantized weights of all heads' outputs may follow: then these are packed by the blocks that make them, where they can.
    made: Rows of which blocks make their input.
    """
    out, w, x = args[0] if ops[0] is head_linear else [None] * 3
    if out is None or w.type not in GROUPED or x.shape[0] != 1:
        return 0
    rows, tiles = out.rows, head_tiles(1, x.shape[1])
    taken = args[1][2] if ops[1:2] == [linear] and args[1][1].type in GROUPED else None
    rounds = (taken is not None and taken.span == out.span and taken.size == out.size and taken.shape[0] == 1
              and grid_of([rows], x.shape[2], x.shape[1]).rounds(rows.shape[1]))
    launches.add(gemv, [rows], [w], made or launches.packed(x.rows), tiles, 0, written=[out, *([x] if made else [])],
                 packs=taken.rows if rounds else None)
    return 1


class Inputs(NamedTuple):
    """What queries() has found.

    These are parts of a launch that prepares rows, and what comes behind it.
    """
    heads: object       # Heads, or None
    queries: object     # Queries, or None
    table: object
    product: tuple      # the args of head_linear, or None
    choice: tuple       # the args of indexer_select, or None


def queries(launches, ops, args, stored=(), positions=None):
    """Fuse what is done with queries: rotations, packing, and the projection.

    The ops are rope and hadamard of the indexer's queries, head_linear and rope of the others, indexer_select with int8 keys; or the middle
    two of these, or the others. stored, positions: rows of caches that are stored in the same launch.
    """
    both, alone = [rope, hadamard, head_linear, rope, indexer.indexer_select], [head_linear, rope]
    n = next((len(wanted) for wanted in (both, both[:2] + both[4:], alone) if ops[:len(wanted)] == wanted), 0)
    found = _inputs(args, n) if n else None
    if found is None or found.heads and touch([found.heads.out], [a for s in stored for a in (s.row, s.x)]):
        return 0
    written = [*([found.queries.q] if found.queries else []), *([found.heads.out] if found.heads else []), *(s.row for s in stored)]
    launches.add(prepare_rows, None, stored, positions, found.heads, found.queries, found.table, written=written,
                 packs=found.heads and found.heads.x)
    product = choice = ()
    if found.product:
        out, k_b, x = found.product
        product = out.rows, k_b, launches.packed(x.rows), head_tiles(1, x.shape[1])
    if found.choice:
        chosen, _, _, keys, positions, scale = found.choice
        choice = chosen, found.queries.packed, keys, positions, scale
    if product and choice and kernels("scores of one", k_b, keys) and not touch([out], [keys.data, positions]):
        launches.add(indexer.select_beside, *choice, *product, written=[out, chosen])
        return n
    if product:
        launches.add(gemv, *([part] for part in product[:2]), *product[2:], written=[out])
    if choice:
        launches.add(indexer.select, *choice, written=[chosen])
    return n


def _inputs(args, n):
    """The Inputs of n calls, see queries(); None if they are others."""
    of_heads, of_indexer = args[n // 5 * 2:][:2] if n in (2, 5) else None, [*args[:2], args[n - 1]] if n in (3, 5) else None
    if of_heads and not _heads_fit(*of_heads) or of_indexer and not _queries_fit(*of_indexer):
        return None
    heads = found = table = None
    if of_heads:
        rotated, source, table, neox = of_heads[1]
        heads = Heads(of_heads[0][2].rows, rotated, source, neox)
    if of_indexer:
        (rotated, _, other, neox), (q, _), (_, _, w, *_) = of_indexer
        if of_heads and not same(table, other):
            return None
        found, table = Queries(q, rotated, neox, w, int8x2.indexer.scratch_for_queries(q)), other
    return Inputs(heads, found, table, of_heads and of_heads[0], of_indexer and of_indexer[2])


def _heads_fit(product, rotation):
    (out, w, x), (rotated, source, *_) = product, rotation
    return w.type in GROUPED and x.shape[0] == 1 and beside(rotated, out) and not overlap(source, out)


def _queries_fit(rotation, transform, choice):
    (rotated, source, *_), (q, x), (_, selected, w, keys, *_) = rotation, transform, choice
    return (q.shape[0] == 1 and int8x2.indexer.takes(keys) and same(rotated, source) and same(q, x) and same(q, selected)
            and not overlap(w, q) and rotated.shape[:2] == q.shape[:2] and rotated.strides == q.strides
            and 0 <= column(rotated, q) <= q.shape[2] - rotated.shape[2])


def column(a, b):
    """The column of b, rows of float32, at which a begins."""
    return (a.span[0] - b.span[0]) // 4


def beside(a, b):
    """Whether a has columns to the right of b's, in the same rows."""
    return a.shape[:2] == b.shape[:2] and a.strides == b.strides and b.shape[-1] <= column(a, b) <= b.strides[1] // 4 - a.shape[-1]


def gated(launches, ops, args):
    """Fuse silu_mul with the packing of its output."""
    if ops[0] is not norm.silu_mul or not one_row(args[0][0]):
        return 0
    out, gate, up = (a.rows for a in args[0])
    launches.add(silu_mul_pack, out, gate, up, None, written=[out], packs=out)
    return 1


def routed(launches, ops, args):
    """Let the blocks of the chosen experts' first products choose the experts.

    No output of theirs may overlap the logits, which all of them read.
    """
    if ops[:2] != [moe.moe_route, moe.moe_gate_up] or not kernels("choice of experts", args[0][2], args[0][5]):
        return 0
    ids, weights, logits, bias, *how = args[0]
    if not same(ids, args[1][2]) or touch([ids, weights, *(a[0] for a in args[2:4])], [logits, args[1][1]]):
        return 0
    n = first_of_experts(launches, ops[1:], args[1:], routing.Router(weights.flat, logits.flat, bias, *how))
    return n and 1 + n


def first_of_experts(launches, ops, args, router=None):
    """Fuse moe_gate_up with quantized weights: one gemv for both, then silu_mul.

    The same products of the shared expert, and its silu_mul, may follow: they join these. Where moe_down follows, and the shared expert's
    product, their blocks make what silu_mul makes. router: the Router by which blocks choose the experts.
    """
    out, x, ids, gate, up = args[0] if ops[0] is moe.moe_gate_up else [None] * 5
    if out is None or not one_row(out) or gate.type not in GROUPED or up.type not in GROUPED:
        return 0
    hidden, tiles = out.rows, moe.pair_tiles(ids, gate.shape[0], ids.shape[1])
    gates, ups = (scratch(name, hidden.shape, np.float32) for name in ("gates", "ups"))
    packed, shared = launches.packed(x.rows), _shared_expert(ops[1:4], args[1:4], x, gate) if _one_layout(gate, up) else []
    for outs, weights in [([gates, ups], [gate, up])] if _one_layout(gate, up) else [([gates], [gate]), ([ups], [up])]:
        outs, weights = outs + [a.rows for a, _, _ in shared[:2]], weights + [w for _, w, _ in shared[:2]]
        launches.add(gemv, outs, weights, packed, tiles, 0, None, router, written=[*outs, *([ids, router.weights] if router else [])])
        router = None       # the ids are there
    others = [a.rows for a in shared[2]] if shared and shared[2][0].shape[-1] == hidden.shape[1] else None
    n = 4 if others else 3 if shared else 1
    last = last_of_experts(launches, ops[n:], args[n:], out, rows_one.Rows(rows_one.GATED, hidden, gates, ups, *(others or [])))
    if last == 0:
        written = [hidden, *others[:1]] if others else [hidden]
        launches.add(silu_mul_pack, hidden, gates, ups, others, written=written, packs=hidden, packs_too=others and others[0])
    return n + last


def _shared_expert(ops, args, x, gate):
    """The args of the shared expert's two products of x and of its silu_mul.

    [] if they are not those, or if a product with `gate` cannot take them in.
    """
    if ops != [linear, linear, norm.silu_mul]:
        return []
    (out, w, first), (other_out, other_w, second), (_, *taken) = args
    fits = same(first, x) and same(second, x) and _one_layout(w, gate) and _one_layout(other_w, gate) and one_row(out)
    return args if fits and same(out, taken[0]) and same(other_out, taken[1]) else []


def _one_layout(w, other):
    """Whether one launch can multiply with both weights."""
    return w.type == other.type and w.row_bytes == other.row_bytes


def last_of_experts(launches, ops, args, gated=None, rows=None):
    """Let moe_down with quantized weights use packed activations.

    The same product of the shared expert joins it where its activations are packed behind those of the chosen ones. gated, rows: the
    activations, and the Rows that make them, which must fit.
    """
    out, hidden, ids, weights, down = args[0] if ops[:1] == [moe.moe_down] else [None] * 5
    if out is None or out.shape[0] != 1 or down.type not in GROUPED:
        return 0
    other, w, x = args[1] if ops[1:2] == [linear] and _one_layout(args[1][1], down) else [None] * 3
    if rows is None:
        packed = launches.packed(hidden.rows)
        whole = launches.packed_with(hidden.rows, x.rows) if other is not None else None
        shared = (other.rows, w, whole, ids.size) if whole is not None else None
    else:
        alone = rows.single_out is None
        fits = same(gated, hidden) and kernels("rows of products", rows) and (alone or other is not None and same(x.rows, rows.single_out))
        if not fits or not alone and touch([other, rows.single_out], [rows.out, rows.single_x, rows.single_other]):
            return 0
        packed, shared = rows, None if alone else (other.rows, w, rows, 0)
    n, parts = 1 if shared is None else 2, scratch("parts", (ids.size, out.shape[1]), np.float32)
    made = [] if rows is None else [rows.out] if rows.single_out is None else [rows.out, rows.single_out]
    launches.add(moe.outputs_of_experts, parts, ids, down, packed, shared, written=[parts, *made, *([other] if shared else [])])
    joins = sums_and_norm(launches, ops[n:], args[n:], (out, Joined(parts, weights)))
    if joins == 0:
        launches.add(moe.join_experts, out, parts, weights, written=[out])
    return n + joins


def small_rows(launches, ops, args):
    """Fuse the norm of a short row and the storing of one or two rows.

    Where products of the norm follow, and then queries(), each block of the products makes the norm for itself, and the rows are stored in
    the launch that prepares the queries.
    """
    n, normed = 0, None
    if ops[0] is norm.rms_norm and one_row(args[0][0]) and norm_is_narrow(args[0][0].rows, args[0][1].rows, args[0][2]):
        normed, n = Norm(args[0][0].rows, args[0][1].rows, *args[0][2:]), 1
    stored, positions, n_stored = _stored_rows(ops[n:], args[n:])
    if normed and touch(normed[:2], [a for s in stored for a in (s.row, s.x)]):
        stored = []
    if not stored:
        normed, n = None, 0
        stored, positions, n_stored = _stored_rows(ops, args)
    n += n_stored
    if not stored:
        return 0
    n_products = _products_of_norm(launches, ops[n:], args[n:], normed, stored) if normed else 0
    if n_products:
        n += n_products
        n_queries = queries(launches, ops[n:], args[n:], stored, positions)
        if n_queries == 0:
            launches.add(prepare_rows, None, stored, positions, None, None, None, None, written=[s.row for s in stored])
        return n + n_queries
    rest = [] if normed else [None]
    launches.add(prepare_rows, normed, stored, positions, None, None, None, *rest, written=[s.row for s in stored] + list(normed or [])[:1],
                 packs=normed and normed.out)
    return n


def _stored_rows(ops, args):
    """Up to two Stored with which calls begin.

    Returns also their positions, and the number of calls.
    """
    stored, positions, n = [], None, 0
    while len(stored) < 2:
        found = stored_row(ops[n:], args[n:])
        if found is None or positions is not None and not same(positions, found[1]):
            break
        stored, positions, n = [*stored, found[0]], found[1], n + found[2]
    return stored, positions, n


def _products_of_norm(launches, ops, args, normed, stored):
    """Launch products whose blocks make the norm -> the number of calls, or 0.

    They are done before `stored`, whose rows they may not touch.
    """
    n = next((i for i, op in enumerate(ops) if op is not linear or not same(args[i][2].rows, normed.out)), len(ops))
    fits = 0 < n <= 4 and args[0][1].type in GROUPED and all(_one_layout(args[0][1], w) for _, w, _ in args[:n])
    outs = [out for out, _, _ in args[:n]]
    rows = rows_one.Rows(rows_one.NORMED, normed.out, normed.x, gain=normed.w, eps=normed.eps)
    if not fits or not kernels("rows of products", rows) or touch(outs, [*normed[:2], *(a for s in stored for a in (s.row, s.x))]):
        return 0
    if overlap(normed.out, normed.x):
        return 0
    launches.add(gemv, [out.rows for out in outs], [w for _, w, _ in args[:n]], rows, head_tiles(1, 1),
                 written=[*outs, normed.out])
    return n


def stored_row(ops, args):
    """What stores a row of a cache, if calls begin so.

    These are norm, rope, an optional hadamard and cache_write. The row is a latent, whose compressed values are normed, or a key of the
    indexer. Returns a Stored, positions and the number of calls.
    """
    n = next((n for n in (3, 4) if ops[1:n] == [rope, hadamard, rows.cache_write][:n - 2] + [rows.cache_write]), None)
    if n is None or ops[0] not in (norm.rms_norm, norm.layer_norm):
        return None
    (normed, x, w, *b, eps), (rotated, source, table, neox), (cache, row, positions) = args[0], args[1], args[n - 1]
    whole_row = n == 3 or same(args[2][0].rows, row) and same(args[2][1].rows, row)
    if row.shape[0] != 1 or not whole_row or not same(rotated, source) or rotated.shape[1] != 1 or normed.span[0] != row.span[0]:
        return None
    if not 0 <= column(rotated, row) <= row.shape[1] - rotated.shape[-1]:
        return None
    return Stored(row, x, normed, w, b[0] if b else None, eps, rotated, table, neox, n == 4, cache), positions, n


def attended(launches, ops, args):
    """Fuse attention with the packing of what a head_linear takes.

    The weights of this must be quantized. Where attention leaves sums of splits of the keys, its blocks join those of their head.
    """
    if ops[0] not in ATTENTION or ops[1:2] != [head_linear] or args[1][1].type not in GROUPED or not one_row(args[0][0]):
        return 0
    out, q, latents, *others, scale = args[0]
    mode, names = ATTENTION[ops[0]]
    named = dict(zip(names, others, strict=True))
    n_keys = named["indices"].shape[1] if "indices" in named else len(latents.data)
    positions, *others = map(named.get, ("positions", "indices", "mask"))
    splits = attention.splits_of_one(out, q, latents, mode, n_keys, positions)
    rows = splits and rows_one.Rows(rows_one.JOINED, out.rows, *splits[:2], splits=splits)
    product, _, joined = args[1]
    read = [out, *([] if positions is None else [positions])]
    if rows and kernels("rows of products", rows) and same(out.rows, joined.rows) and not touch([product], read):
        launches.add(attention.attend_in_splits, q, latents, mode, n_keys, scale, positions, *others, written=splits[:2])
        return 1 + products_of_heads(launches, ops[1:], args[1:], rows)
    launches.add(attention.attend, out, q, latents, mode, n_keys, scale, positions, *others, written=[out], packs=out.rows)
    return 1


# op -> mode of attend(), names of the op's arguments between the cache and the scale
ATTENTION = {attention.dense_attention: (modes.DENSE, ("positions",)), attention.sparse_attention: (modes.SPARSE, ("indices",)),
             attention.masked_attention: (modes.MASKED, ("mask", "positions"))}
RULES = small_rows, sums_and_norm, queries, attended, products, products_of_heads, gated, routed, first_of_experts, last_of_experts
