"""Experts: the router, and the feed-forward networks with the tokens grouped by expert."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.linear import FEW, GROUP, addresses, few_rows, many_rows, round_input, rounded_bytes, rows_a_task
from pydsa.backends.cpu.microkernels import address, n_threads
from pydsa.backends.cpu.norm import silu_mul_row
from pydsa.backends.cpu.rows import contiguous
from pydsa.backends.cpu.scratch import callers_scratch
from pydsa.jit import inner, kernel
from pydsa.quants.block import CHUNK


@inner
def softmax(p):
    """p = softmax(p), in place."""
    p[:] = np.exp(p - p.max())
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
        p[:] = logits[t]
        if gating == 2:
            p[:] = 1 / (1 + np.exp(-p))
        elif gating == 1:
            softmax(p)
        s[:] = p + bias
        if n_group > 1:
            drop_groups(s, n_group, n_group_used)
        for i in range(n_used):
            best = np.argmax(s)
            ids[t, i], weights[t, i] = best, p[best]
            s[best] = -np.inf
        if gating == 3:
            softmax(weights[t])
        if norm:
            weights[t] /= max(weights[t].sum(), np.float32(6.103515625e-5))
        weights[t] *= scale


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
def rounded_at(w, few, room, n, n_in):
    """Where n rounded rows begin."""
    return addresses(room, rounded_bytes(w, n_in) if few else CHUNK, n)


@inner
def expert_rows(w, few, expert, r, n, n_in, x_at, x_step, out_at):
    """out_at[t] = rows r to r + n of an expert times x_at[t]; int64 arrays of addresses."""
    rows = address(w.data) + (expert * w.data.shape[1] + r) * w.data.shape[2]
    if few and w.dot:
        for i in range(x_at.size):
            few_rows(w, rows, n, n_in, x_at[i], 0, 1, out_at[i], 0)
    else:
        many_rows(w, rows, n, n_in, x_at, x_step, out_at)


@kernel(parallel=True)
def moe_gate_up(out, x, ids, gate, up):
    n_expert, n_ff, _ = gate.data.shape
    n_tokens, n_in, n_used = x.shape[0], x.shape[1], ids.shape[1]
    pairs, start, busy = by_expert(ids, n_expert)
    few = n_tokens <= FEW
    room_gate = callers_scratch(n_tokens * (rounded_bytes(gate, n_in) + rounded_bytes(up, n_in)))
    room_up = room_gate + n_tokens * rounded_bytes(gate, n_in)
    x_at = addresses(address(x), x.strides[0], n_tokens)
    if few:
        for t in range(n_tokens):
            round_twice(gate, up, few, x_at[t], n_tokens, n_in, room_gate, room_up, t)
    else:
        for t in prange(n_tokens):
            round_twice(gate, up, few, x_at[t], n_tokens, n_in, room_gate, room_up, t)
    gate_at = rounded_at(gate, few, room_gate, n_tokens, n_in) if gate.dot else x_at
    up_at = rounded_at(up, few, room_up, n_tokens, n_in) if up.dot else x_at
    size = rows_a_task(n_ff, few)
    groups = (n_ff + size - 1) // size
    for task in prange(busy.size * groups):
        expert, r = busy[task % busy.size], task // busy.size * size       # every thread has rows of every expert
        mine, n = pairs[start[expert]:start[expert + 1]], min(size, n_ff - r)
        tokens = mine // n_used
        ups = np.empty((mine.size, n), np.float32)
        expert_rows(gate, few, expert, r, n, n_in, gate_at[tokens], n_tokens * CHUNK, address(out) + mine * out.strides[1] + 4 * r)
        expert_rows(up, few, expert, r, n, n_in, up_at[tokens], n_tokens * CHUNK, addresses(address(ups), 4 * n, mine.size))
        for i in range(mine.size):
            hidden = contiguous(out[mine[i] // n_used, mine[i] % n_used, r:r + n])
            silu_mul_row(hidden, hidden, ups[i])


@inner
def round_twice(gate, up, few, x, n_tokens, n_in, room_gate, room_up, t):
    """Token t for both: their types may differ."""
    if gate.dot:
        round_input(gate, few, x, n_tokens, n_in, room_gate, t)
    if up.dot:
        round_input(up, few, x, n_tokens, n_in, room_up, t)


@kernel(parallel=True)
def moe_down(out, hidden, ids, weights, down):
    n_expert, n_out, _ = down.data.shape
    n_tokens, n_used, n_ff = hidden.shape
    pairs, start, busy = by_expert(ids, n_expert)
    n_pairs = pairs.size
    few, room = n_tokens <= FEW, callers_scratch(n_pairs * rounded_bytes(down, n_ff))
    hidden_at = address(hidden) + pairs * hidden.strides[1]
    if down.dot:
        if few:
            for i in range(n_pairs):
                round_input(down, few, hidden_at[i], n_pairs, n_ff, room, i)
        else:
            for i in prange(n_pairs):
                round_input(down, few, hidden_at[i], n_pairs, n_ff, room, i)
        hidden_at = rounded_at(down, few, room, n_pairs, n_ff)
    share = max(1, (n_out // (2 * n_threads()) + GROUP - 1) // GROUP) * GROUP      # rows for which a cache keeps an expert's activations
    size = share if few else min(share, GROUP)
    for task in prange((n_out + share - 1) // share):
        first, last = task * share, min(task * share + share, n_out)
        for t in range(n_tokens):
            target = contiguous(out[t, first:last])
            for j in range(last - first):
                target[j] = 0
        for expert in busy:
            a, b = start[expert], start[expert + 1]
            part = np.empty((b - a, size), np.float32)
            for r in range(first, last, size):
                n = min(size, last - r)
                expert_rows(down, few, expert, r, n, n_ff, hidden_at[a:b], n_pairs * CHUNK, addresses(address(part), 4 * size, b - a))
                for i in range(a, b):
                    t, weight = pairs[i] // n_used, weights[pairs[i] // n_used, pairs[i] % n_used]
                    target = contiguous(out[t, r:r + n])
                    for j in range(n):
                        target[j] += weight * part[i - a, j]
