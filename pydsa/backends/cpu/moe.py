"""Mixture of experts: the router, and the feed-forward networks.

Tokens are grouped by expert.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu.arrays import address, contiguous
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.linear import (MAX_TASK_ROWS, addresses, count_panels, gemm_rows, gemv_rows, pack, panel_bytes, round_input,
                                       rounded_bytes, rows_per_task, uses_gemv)
from pydsa.backends.cpu.norm import silu_mul_row
from pydsa.backends.cpu.rows import put
from pydsa.backends.cpu.scratch import caller_scratch, mark_nan
from pydsa.backends.cpu.threads import n_threads


@inner
def softmax(p):
    """Compute p = softmax(p), in place."""
    put(p, np.exp(p - p.max()))
    p /= p.sum()


@inner
def drop_groups(s, n_group, n_group_used):
    """Set the scores of experts outside the best groups to -inf.

    A group's score is the sum of its two largest; ties go to the first group.
    """
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
        total = np.float32(0)       # of all experts: those that are not chosen would hide it
        for e in range(n_expert):
            total += logits[t, e] + s[e]
        if not abs(total) < np.float32(np.inf):
            mark_nan()
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
    """Sort the (token, slot) pairs by expert.

    Returns the pairs, the start of each expert's pairs, and the experts that have any.
    """
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
def first_panels(start, busy):
    """Return the index of each busy expert's first panel of tokens.

    The last element is the number of all panels.
    """
    firsts = np.zeros(busy.size + 1, np.int64)
    for i in range(busy.size):
        firsts[i + 1] = firsts[i] + count_panels(start[busy[i] + 1] - start[busy[i]])
    return firsts


@inner
def pack_pairs(w, x_at, start, busy, firsts, panel, n_in, scratch):
    """Pack one panel: tokens of one expert.

    x_at [n_pairs]: the addresses of their activations.
    """
    i = np.searchsorted(firsts, panel, side="right") - 1
    first, last = start[busy[i]], start[busy[i] + 1]
    pack(w, address(x_at[first:]), panel - firsts[i], last - first, n_in, scratch + firsts[i] * panel_bytes(w, n_in))


@inner
def expert_rows(w, expert, r, n, n_in, gemv, rows_at, x, out_at):
    """Compute out_at[i] = rows r to r + n of an expert times its i-th token.

    With gemv, token i is rounded at rows_at[i]; else tokens are packed at x.
    """
    rows = address(w.data) + expert * w.data.strides[0] + r * w.data.shape[2]      # gate and up may be halves of one tensor
    if gemv:
        for i in range(out_at.size):
            gemv_rows(w, rows, n, n_in, rows_at[i], 1, out_at[i], 0)
    else:
        gemm_rows(w, rows, n, n_in, x, out_at.size, out_at)


@kernel(parallel=True)
def moe_gate_up(out, x, ids, gate, up):
    n_expert, n_ff, _ = gate.data.shape
    n_tokens, n_in, n_used = x.shape[0], x.shape[1], ids.shape[1]
    pairs, start, busy = by_expert(ids, n_expert)
    firsts = first_panels(start, busy)
    x_at = address(x) + pairs // n_used * x.strides[0]
    gemv_gate, gemv_up = uses_gemv(gate, n_tokens), uses_gemv(up, n_tokens)
    scratch_gate = caller_scratch(packed_bytes(gate, gemv_gate, n_tokens, firsts[-1], n_in)
                                  + packed_bytes(up, gemv_up, n_tokens, firsts[-1], n_in))
    scratch_up, shared = scratch_gate, gate.pack == up.pack and gate.order == up.order       # packed once if both take the same format
    if not shared:
        scratch_up += packed_bytes(gate, gemv_gate, n_tokens, firsts[-1], n_in)
    for t in range(n_tokens if gemv_gate or gemv_up else 0):
        token = address(x) + t * x.strides[0]
        if gemv_gate:
            round_input(gate, token, n_in, scratch_gate + t * rounded_bytes(n_in))
        if gemv_up and not shared:
            round_input(up, token, n_in, scratch_up + t * rounded_bytes(n_in))
    for panel in prange(0 if gemv_gate and gemv_up else firsts[-1]):
        if not gemv_gate:
            pack_pairs(gate, x_at, start, busy, firsts, panel, n_in, scratch_gate)
        if not gemv_up and not shared:
            pack_pairs(up, x_at, start, busy, firsts, panel, n_in, scratch_up)
    size = rows_per_task(n_ff, gemv_gate)
    groups = (n_ff + size - 1) // size
    for task in prange(busy.size * groups):
        i, r = task % busy.size, task // busy.size * size       # every thread has rows of every expert
        slots, n = pairs[start[busy[i]]:start[busy[i] + 1]], min(size, n_ff - r)
        tokens = slots // n_used * rounded_bytes(n_in)
        ups = np.empty((slots.size, n), np.float32)
        expert_rows(gate, busy[i], r, n, n_in, gemv_gate, scratch_gate + tokens, scratch_gate + firsts[i] * panel_bytes(gate, n_in),
                    address(out) + slots * out.strides[1] + 4 * r)
        expert_rows(up, busy[i], r, n, n_in, gemv_up, scratch_up + tokens, scratch_up + firsts[i] * panel_bytes(up, n_in),
                    addresses(address(ups), 4 * n, slots.size))
        for j in range(slots.size):
            hidden = contiguous(out[slots[j] // n_used, slots[j] % n_used, r:r + n])
            silu_mul_row(hidden, hidden, ups[j])


@inner
def packed_bytes(w, gemv, n_rows, n_panels, n_in):
    """Count the bytes of n_rows rounded rows, or of n_panels packed panels."""
    return n_rows * rounded_bytes(n_in) if gemv else n_panels * panel_bytes(w, n_in)


@kernel(parallel=True)
def moe_linear(out, x, ids, w):
    n_expert, n_out, _ = w.data.shape
    n_tokens, n_in, n_used = x.shape[0], x.shape[1], ids.shape[1]
    pairs, start, busy = by_expert(ids, n_expert)
    firsts, gemv = first_panels(start, busy), uses_gemv(w, n_tokens)
    scratch = caller_scratch(packed_bytes(w, gemv, n_tokens, firsts[-1], n_in))
    x_at = address(x) + pairs // n_used * x.strides[0]
    if gemv:
        for t in range(n_tokens):
            round_input(w, address(x) + t * x.strides[0], n_in, scratch + t * rounded_bytes(n_in))
    else:
        for panel in prange(firsts[-1]):
            pack_pairs(w, x_at, start, busy, firsts, panel, n_in, scratch)
    size = rows_per_task(n_out, gemv)
    for task in prange(busy.size * ((n_out + size - 1) // size)):
        i, r = task % busy.size, task // busy.size * size
        slots = pairs[start[busy[i]]:start[busy[i] + 1]]
        expert_rows(w, busy[i], r, min(size, n_out - r), n_in, gemv, scratch + slots // n_used * rounded_bytes(n_in),
                    scratch + firsts[i] * panel_bytes(w, n_in), address(out) + slots * out.strides[1] + 4 * r)


@kernel(parallel=True)
def moe_down(out, hidden, ids, weights, down):
    n_expert, n_out, _ = down.data.shape
    n_tokens, n_used, n_ff = hidden.shape
    pairs, start, busy = by_expert(ids, n_expert)
    firsts, n_pairs = first_panels(start, busy), pairs.size
    gemv = uses_gemv(down, n_tokens)
    scratch = caller_scratch(packed_bytes(down, gemv, n_pairs, firsts[-1], n_ff))
    hidden_at = address(hidden) + pairs * hidden.strides[1]
    rows_at = addresses(scratch, rounded_bytes(n_ff), n_pairs)
    if gemv:
        for i in range(n_pairs):
            round_input(down, hidden_at[i], n_ff, rows_at[i])
    else:
        for panel in prange(firsts[-1]):
            pack_pairs(down, hidden_at, start, busy, firsts, panel, n_ff, scratch)
    # rows for which a cache keeps an expert's activations
    share = max(1, (n_out // (2 * n_threads()) + MAX_TASK_ROWS - 1) // MAX_TASK_ROWS) * MAX_TASK_ROWS
    size = share if gemv else min(share, MAX_TASK_ROWS)
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
                expert_rows(down, busy[i], r, n, n_ff, gemv, rows_at[a:b], scratch + firsts[i] * panel_bytes(down, n_ff),
                            addresses(address(part), 4 * size, b - a))
                for k in range(a, b):
                    t, weight = pairs[k] // n_used, weights[pairs[k] // n_used, pairs[k] % n_used]
                    target = contiguous(out[t, r:r + n])
                    for j in range(n):
                        target[j] += weight * part[k - a, j]
