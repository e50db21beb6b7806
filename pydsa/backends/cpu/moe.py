"""Experts: the router, and the feed-forward networks with the tokens grouped by expert."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.linear import (GROUP, addresses, few_rows, is_few, many_rows, piece_bytes, pieces, prepare, round_input,
                                       rounded_bytes, rows_a_task)
from pydsa.backends.cpu.microkernels import address, n_threads
from pydsa.backends.cpu.norm import silu_mul_row
from pydsa.backends.cpu.rows import contiguous, put
from pydsa.backends.cpu.scratch import callers_scratch
from pydsa.jit import inner, kernel


@inner
def softmax(p):
    """p = softmax(p), in place."""
    put(p, np.exp(p - p.max()))
    p /= p.sum()


@inner
def drop_groups(s, n_group, n_group_used):
    """-inf for the experts of all but the best groups; a group's score is the sum of its two greatest, ties go to the first group."""
    size = s.size // n_group
    score = np.empty(n_group, np.float32)
    for g in range(n_group):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if s[e] > first:
                first, second = s[e], first
            elif s[e] > second:
                second = s[e]
        score[g] = first + second if size > 1 else first
    for _ in range(n_group - n_group_used):
        worst = n_group - 1
        for g in range(n_group - 1, -1, -1):
            if score[g] < score[worst]:
                worst = g
        score[worst] = np.inf
        s[worst * size:(worst + 1) * size] = -np.inf


@kernel
def moe_route(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):
    n_expert, n_used = logits.shape[1], ids.shape[1]
    p, s = np.empty(n_expert, np.float32), np.empty(n_expert, np.float32)
    for t in range(ids.shape[0]):
        put(p, logits[t])
        if gating == 2:
            put(p, 1 / (1 + np.exp(-p)))
        elif gating == 1:
            softmax(p)
        put(s, p + bias)
        if n_group > 1:
            drop_groups(s, n_group, n_group_used)
        for i in range(n_used):
            best = np.argmax(s)
            ids[t, i], weights[t, i] = best, p[best]
            s[best] = -np.inf
        row = weights[t]
        if gating == 3:
            softmax(row)
        if norm:
            row /= max(row.sum(), np.float32(6.103515625e-5))
        row *= scale


@inner
def by_expert(ids, n_expert):
    """The (token, slot) pairs in the order of their experts: the pairs, where each expert's begin, and the experts that have any."""
    start = np.zeros(n_expert + 1, np.int64)
    for t in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            start[ids[t, i] + 1] += 1
    busy = np.flatnonzero(start[1:])
    start = np.cumsum(start)
    pairs, fill = np.empty(ids.size, np.int64), start.copy()
    for t in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            pairs[fill[ids[t, i]]] = t * ids.shape[1] + i
            fill[ids[t, i]] += 1
    return pairs, start, busy


@inner
def first_pieces(start, busy):
    """Where the pieces of each busy expert's tokens begin among all of them, and how many there are."""
    firsts = np.zeros(busy.size + 1, np.int64)
    for i in range(busy.size):
        firsts[i + 1] = firsts[i] + pieces(start[busy[i] + 1] - start[busy[i]])
    return firsts


@inner
def prepare_pairs(w, x_at, start, busy, firsts, piece, n_in, room):
    """Lay out one of all pieces: the tokens of one expert, whose activations lie at addresses x_at [n_pairs]."""
    i = np.searchsorted(firsts, piece, side="right") - 1
    first, last = start[busy[i]], start[busy[i] + 1]
    prepare(w, address(x_at[first:]), piece - firsts[i], last - first, n_in, room + firsts[i] * piece_bytes(w, n_in))


@inner
def expert_rows(w, expert, r, n, n_in, few, rows_at, x, out_at):
    """out_at[i] = rows r to r + n of an expert times its i-th token: rounded at rows_at[i] if they are few, else laid out at x."""
    rows = address(w.data) + (expert * w.data.shape[1] + r) * w.data.shape[2]
    if few:
        for i in range(out_at.size):
            few_rows(w, rows, n, n_in, rows_at[i], 1, out_at[i], 0)
    else:
        many_rows(w, rows, n, n_in, x, out_at.size, out_at)


@kernel(parallel=True)
def moe_gate_up(out, x, ids, gate, up):
    n_expert, n_ff, _ = gate.data.shape
    n_tokens, n_in, n_used = x.shape[0], x.shape[1], ids.shape[1]
    pairs, start, busy = by_expert(ids, n_expert)
    firsts = first_pieces(start, busy)
    x_at = address(x) + pairs // n_used * x.strides[0]
    few_gate, few_up = is_few(gate, n_tokens), is_few(up, n_tokens)
    room_gate = callers_scratch(laid_bytes(gate, few_gate, n_tokens, firsts[-1], n_in) + laid_bytes(up, few_up, n_tokens, firsts[-1], n_in))
    room_up, one = room_gate, gate.prepare == up.prepare and gate.order == up.order       # laid out once if they take it alike
    if not one:
        room_up += laid_bytes(gate, few_gate, n_tokens, firsts[-1], n_in)
    for t in range(n_tokens if few_gate or few_up else 0):
        token = address(x) + t * x.strides[0]
        if few_gate:
            round_input(gate, token, n_in, room_gate + t * rounded_bytes(n_in))
        if few_up and not one:
            round_input(up, token, n_in, room_up + t * rounded_bytes(n_in))
    for piece in prange(0 if few_gate and few_up else firsts[-1]):
        if not few_gate:
            prepare_pairs(gate, x_at, start, busy, firsts, piece, n_in, room_gate)
        if not few_up and not one:
            prepare_pairs(up, x_at, start, busy, firsts, piece, n_in, room_up)
    size = rows_a_task(n_ff, few_gate)
    groups = (n_ff + size - 1) // size
    for task in prange(busy.size * groups):
        i, r = task % busy.size, task // busy.size * size       # every thread has rows of every expert
        mine, n = pairs[start[busy[i]]:start[busy[i] + 1]], min(size, n_ff - r)
        tokens = mine // n_used * rounded_bytes(n_in)
        ups = np.empty((mine.size, n), np.float32)
        expert_rows(gate, busy[i], r, n, n_in, few_gate, room_gate + tokens, room_gate + firsts[i] * piece_bytes(gate, n_in),
                    address(out) + mine * out.strides[1] + 4 * r)
        expert_rows(up, busy[i], r, n, n_in, few_up, room_up + tokens, room_up + firsts[i] * piece_bytes(up, n_in),
                    addresses(address(ups), 4 * n, mine.size))
        for j in range(mine.size):
            hidden = contiguous(out[mine[j] // n_used, mine[j] % n_used, r:r + n])
            silu_mul_row(hidden, hidden, ups[j])


@inner
def laid_bytes(w, few, n_rows, n_pieces, n_in):
    """What n_rows rows take rounded, or n_pieces pieces laid out."""
    return n_rows * rounded_bytes(n_in) if few else n_pieces * piece_bytes(w, n_in)


@kernel(parallel=True)
def moe_down(out, hidden, ids, weights, down):
    n_expert, n_out, _ = down.data.shape
    n_tokens, n_used, n_ff = hidden.shape
    pairs, start, busy = by_expert(ids, n_expert)
    firsts, n_pairs = first_pieces(start, busy), pairs.size
    few = is_few(down, n_tokens)
    room = callers_scratch(laid_bytes(down, few, n_pairs, firsts[-1], n_ff))
    hidden_at = address(hidden) + pairs * hidden.strides[1]
    rows_at = addresses(room, rounded_bytes(n_ff), n_pairs)
    if few:
        for i in range(n_pairs):
            round_input(down, hidden_at[i], n_ff, rows_at[i])
    else:
        for piece in prange(firsts[-1]):
            prepare_pairs(down, hidden_at, start, busy, firsts, piece, n_ff, room)
    share = max(1, (n_out // (2 * n_threads()) + GROUP - 1) // GROUP) * GROUP      # rows for which a cache keeps an expert's activations
    size = share if few else min(share, GROUP)
    for task in prange((n_out + share - 1) // share):
        first, last = task * share, min(task * share + share, n_out)
        for t in range(n_tokens):
            target = contiguous(out[t, first:last])
            for j in range(last - first):
                target[j] = 0
        for i in range(busy.size):
            a, b = start[busy[i]], start[busy[i] + 1]
            part = np.empty((b - a, size), np.float32)
            for r in range(first, last, size):
                n = min(size, last - r)
                expert_rows(down, busy[i], r, n, n_ff, few, rows_at[a:b], room + firsts[i] * piece_bytes(down, n_ff),
                            addresses(address(part), 4 * size, b - a))
                for k in range(a, b):
                    t, weight = pairs[k] // n_used, weights[pairs[k] // n_used, pairs[k] % n_used]
                    target = contiguous(out[t, r:r + n])
                    for j in range(n):
                        target[j] += weight * part[k - a, j]
