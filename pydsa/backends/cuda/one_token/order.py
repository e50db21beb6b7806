"""The order of a token's ops in which they are fused.

An op moves up, to others that it can be fused with, past ops that neither write what it reads or writes nor read what it writes. What
arrays overlap decides, not names: where two values share memory, ops stay where they are.
"""
from pydsa.backends.cuda import indexer, moe, norm, rows
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.linear import head_linear, linear
from pydsa.backends.cuda.rope import hadamard, rope
from pydsa.backends.cuda.runtime.array import DeviceArray

AHEAD = 40      # ops that are looked at: more than a layer has


def together(calls):
    """The calls of a step, so that those of one launch stand together.

    Calls are pairs of an op and its arguments.
    """
    calls = list(calls)
    for i in range(len(calls)):
        to = i + 1
        for move in MOVES:
            to = move(calls, i, to)
    return calls


def product_of_norm(calls, i, to):
    """Move up the product of a norm with a matrix of F32."""
    if calls[i][0] is norm.rms_norm:
        for j in range(to, min(i + AHEAD, len(calls))):
            if same(calls[i][1][0], input_of(calls[j])) and calls[j][1][1].type == "F32":
                return _moved(calls, j, to)
    return to


def products_of_one_input(calls, i, to):
    """Move up products with the same activations, to the first one.

    Those of an expert layer go to the products of the chosen experts, and with them the gate that takes two of them.
    """
    op, args = calls[i]
    if op not in (linear, moe.moe_gate_up):
        return to
    x = args[2] if op is linear else args[1]
    if op is linear and i and same(x, input_of(calls[i - 1])):
        return to           # the first one has done it
    moved = [] if op is linear else [None]
    for j in range(to, min(i + AHEAD, len(calls))):
        if calls[j][0] is moe.moe_gate_up and same(x, calls[j][1][1]):
            break       # it takes what comes behind
        if same(x, input_of(calls[j])) and calls[j][0] is linear:
            before, to = to, _moved(calls, j, to)
            moved += [calls[before][1][0]] if to > before else []
        elif calls[j][0] is norm.silu_mul and len(moved) == 3 and same(calls[j][1][1], moved[1]) and same(calls[j][1][2], moved[2]):
            to = _moved(calls, j, to)
    return to


def queries_before_choice(calls, i, to):
    """Move up the projection and rotation of queries, to the indexer's."""
    if calls[i][0] is not hadamard or [op for op, _ in calls[i + 1:i + 2]] != [indexer.indexer_select]:
        return to
    for j in range(to, min(i + AHEAD, len(calls) - 1)):
        if calls[j][0] is head_linear and calls[j][1][1].type in GROUPED and calls[j + 1][0] is rope:
            before, to = to, _moved(calls, j, to)
            return _moved(calls, j + 1, to) if to > before else to
    return to


MOVES = product_of_norm, products_of_one_input, queries_before_choice


def input_of(call):
    """The activations of a product with one matrix; None for other ops."""
    return call[1][2] if call[0] is linear else None


def _moved(calls, j, to):
    """Move call j up to `to`, if it may -> the next place behind it."""
    if all(_independent(calls[j], calls[k]) for k in range(to, j)):
        calls.insert(to, calls.pop(j))
        return to + 1
    return to


def _independent(call, earlier):
    writes, theirs = written_by(*call), written_by(*earlier)
    return not any(overlap(a, b) for a in writes for b in arrays_of(earlier)) and not any(
        overlap(a, b) for a in theirs for b in arrays_of(call))


def arrays_of(call):
    """The arrays that an op reads or writes, without weights."""
    found = [a.data if isinstance(a, rows.CacheRows) else a for a in call[1]]
    return [a for a in found if isinstance(a, DeviceArray)]


def written_by(op, args):
    """The arrays that an op writes, of its arguments."""
    return [args[0].data] if op is rows.cache_write else args[:2] if op is moe.moe_route else args[:1]


def overlap(a, b):
    """Whether the spans of two arrays overlap."""
    return a.span[0] < b.span[1] and b.span[0] < a.span[1]


def same(a, b):
    """Whether two arrays, or None, are the same view of the same memory."""
    return a is not None and b is not None and a.span == b.span and a.shape == b.shape and a.strides == b.strides
