"""A step of one token in fewer launches: ops that follow each other become one kernel, activations are rounded once for all that take them.

Every array is written as by the ops themselves, in an order that gives the same; so any op may be left as it is.
"""
import functools

import numpy as np

from pydsa.backends.cuda import linear, moe, norm
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.fused import add_norm, silu_mul_round
from pydsa.backends.cuda.one_token import multiply_one, room_for, round_into


def fused(calls):
    """Functions without arguments that do what the calls, (node, op, args) of one token's step, do in this order."""
    step, i = Step(), 0
    while i < len(calls):
        ops, args = [op for _, op, _ in calls[i:i + 4]], [a for _, _, a in calls[i:i + 4]]
        n = next(filter(None, (rule(step, ops, args) for rule in RULES)), 0)
        if n == 0:
            step.launch(ops[0], *args[0], written=args[0][:calls[i][0].n_out])
        i += max(n, 1)
    return step.launches


class Step:
    """The launches so far, and which rows stand rounded somewhere."""

    def __init__(self):
        self.launches, self._rounded = [], {}       # address, shape, strides of rows -> their Rounded, where they lie

    def launch(self, function, *args, written, rounds=None):
        """One more. What is rounded of the arrays that it writes is no longer right; `rounds`: rows whose Rounded is its last argument."""
        for low, high in (array.span for array in written):
            self._rounded = {key: (made, span) for key, (made, span) in self._rounded.items() if span[1] <= low or high <= span[0]}
        if rounds is not None:
            key = rounds.span[0], rounds.shape, rounds.strides
            self._rounded[key] = room_for(rounds, key), rounds.span
            args += self._rounded[key][0],
        self.launches.append(functools.partial(function, *args))

    def rounded(self, x):
        """The Rounded of rows, of which a launch makes it if none has."""
        key = x.span[0], x.shape, x.strides
        if key not in self._rounded:
            self.launch(round_into, x, written=(), rounds=x)
        return self._rounded[key][0]


def one_row(a):
    """Whether an array is of one token, and its numbers can be rounded."""
    return a.shape[0] == 1 and a.shape[-1] % 32 == 0


def same(a, b):
    """Whether two arrays are the same memory, in the same order."""
    return a.span == b.span and a.shape == b.shape and a.strides == b.strides


def sums_and_norm(step, ops, args):
    """rms_norm of one array, or of what one or two ops add before it."""
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
    if not same(normed, added[-1]):
        return 0
    step.launch(add_norm, [a.rows for a in added], out.rows, w, eps, written=[out, *added[2::2]], rounds=out.rows)
    return n + 1


def products(step, ops, args):
    """linear or head_linear with quantized weights; two of the first that take the same activations become one launch."""
    if ops[0] not in (linear.linear, linear.head_linear):
        return 0
    out, w, x = args[0]
    if w.type not in GROUPED or x.shape[0] != 1:
        return 0
    n = 2 if ops[:2] == [linear.linear] * 2 and same(x, args[1][2]) and alike(w, args[1][1]) else 1
    outs, weights = [a[0] for a in args[:n]], [a[1] for a in args[:n]]
    tiles = linear.head_tiles(1, 1 if ops[0] is linear.linear else x.shape[1])
    step.launch(multiply_one, [o.rows for o in outs], weights, step.rounded(x.rows), tiles, written=outs)
    return n


def alike(w, other):
    """Whether one launch can multiply with both."""
    return w.type == other.type and w.row_bytes == other.row_bytes


def gates(step, ops, args):
    """silu_mul"""
    if ops[0] is not norm.silu_mul or not one_row(args[0][0]):
        return 0
    out, gate, up = (a.rows for a in args[0])
    step.launch(silu_mul_round, out, gate, up, written=[out], rounds=out)
    return 1


def first_of_experts(step, ops, args):
    """moe_gate_up with quantized weights"""
    out, x, ids, gate, up = args[0] if ops[0] is moe.moe_gate_up else [None] * 5
    if out is None or not one_row(out) or gate.type not in GROUPED or up.type not in GROUPED:
        return 0
    hidden, tiles = out.rows, moe.pair_tiles(ids, gate.shape[0], ids.shape[1])
    ups, x = scratch("ups", hidden.shape, np.float32), step.rounded(x.rows)
    for outs, weights in [([hidden, ups], [gate, up])] if alike(gate, up) else [([hidden], [gate]), ([ups], [up])]:
        step.launch(multiply_one, outs, weights, x, tiles, written=outs)
    step.launch(silu_mul_round, hidden, hidden, ups, written=[hidden], rounds=hidden)
    return 1


def last_of_experts(step, ops, args):
    """moe_down with quantized weights"""
    out, hidden, ids, weights, down = args[0] if ops[0] is moe.moe_down else [None] * 5
    if out is None or out.shape[0] != 1 or down.type not in GROUPED:
        return 0
    parts = scratch("parts", (ids.size, out.shape[1]), np.float32)
    step.launch(multiply_one, [parts], [down], step.rounded(hidden.rows), moe.pair_tiles(ids, down.shape[0], 1), written=[parts])
    step.launch(moe.add_parts, out, parts, weights, written=[out])
    return 1


RULES = sums_and_norm, products, gates, first_of_experts, last_of_experts
