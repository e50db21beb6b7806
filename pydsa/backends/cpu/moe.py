"""The feed-forward networks of a mixture of experts.

Tokens are grouped by expert, so that each expert's weights are read once.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cpu.arrays import address, align, contiguous, floats_at, ints_at
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.linear import (count_panels, count_pieces, gemm_rows, gemm_task_rows, gemv_rows, gemv_task_rows,
                                       pack_panel, panel_bytes, put_addresses, round_piece, rounded_bytes, uses_gemv)
from pydsa.backends.cpu.norm import silu_mul_row
from pydsa.backends.cpu.op import Stage, op
from pydsa.backends.cpu.scratch import task_scratch
from pydsa.backends.cpu.simd import store

BLOCKS, BLOCK_TOKENS = 16, 64       # the most blocks of tokens that are counted at a time, and the fewest tokens of one


class Groups(NamedTuple):
    """(token, slot) pairs by expert, views of an op's scratch memory, int64.

    A pair is token * n_used + slot.
    """
    pairs: np.ndarray       # [n_tokens * n_used], those of expert 0 first
    start: np.ndarray       # [n_expert + 1], where each expert's pairs start
    busy: np.ndarray        # [n_expert + 1], how many experts have pairs, and which
    firsts: np.ndarray      # [n_expert + 1], the index of each busy expert's first panel of tokens, and the number of all panels
    rows: np.ndarray        # [n_tokens * n_used], the addresses of the pairs' activations
    counts: np.ndarray      # [blocks * n_expert], where the pairs of each block of tokens start
    end: int                # the address behind them


@inner
def groups_of(ids, n_expert, at):
    """View the Groups at an address."""
    n, blocks = ids.size, count_blocks(len(ids))
    start = at + align(8 * n)
    busy = start + align(8 * (n_expert + 1))
    firsts = busy + align(8 * (n_expert + 1))
    rows = firsts + align(8 * (n_expert + 1))
    counts = rows + align(8 * n)
    return Groups(ints_at(at, n), ints_at(start, n_expert + 1), ints_at(busy, n_expert + 1), ints_at(firsts, n_expert + 1),
                  ints_at(rows, n), ints_at(counts, blocks * n_expert), counts + align(8 * blocks * n_expert))


@inner
def groups_bytes(n_tokens, n_used, n_expert):
    """Count the bytes of Groups."""
    return 2 * align(8 * n_tokens * n_used) + 3 * align(8 * (n_expert + 1)) + align(8 * count_blocks(n_tokens) * n_expert)


@inner
def count_blocks(n_tokens):
    """Count the blocks of tokens.

    Their number has a limit, as one thread sums them.
    """
    return max(1, min(BLOCKS, n_tokens // BLOCK_TOKENS))


@inner
def pairs_of(block, n_tokens, n_used):
    """Return the range of a block's pairs."""
    size = (n_tokens + count_blocks(n_tokens) - 1) // count_blocks(n_tokens)
    return range(min(block * size, n_tokens) * n_used, min(block * size + size, n_tokens) * n_used)


@inner
def tokens_each(ids, n_expert):
    """The number of tokens that decides how all experts are multiplied.

    Twice as many as an expert has on average, at most all. With about eight tokens, products by blocks take as long as those of unpacked
    rows; and no token may depend on how many others there are, up to gemv_tokens of a step.
    """
    return min(len(ids), 2 * (ids.size // n_expert))


# Stages of all ops here, whose arguments are (out, x, ids, ..., w, task), with x [n_tokens, n_in] or [n_tokens, n_used, n_in]

@inner
def begin_counting(out, x, ids, *others):
    """Count the blocks of tokens."""
    return count_blocks(len(ids))


@inner
def count_pairs(out, x, ids, *others):
    """Count each expert's pairs in a block of tokens."""
    w, task = others[-2], others[-1]
    n_expert = len(w.data)
    counts = groups_of(ids, n_expert, task.scratch).counts[task.index * n_expert:(task.index + 1) * n_expert]
    for e in range(n_expert):
        counts[e] = 0
    for pair in pairs_of(task.index, *ids.shape):
        counts[ids[pair // ids.shape[1], pair % ids.shape[1]]] += 1


@inner
def begin_sorting(out, x, ids, *others):
    """Sum the counts; return the number of blocks."""
    w, task = others[-2], others[-1]
    n_expert, blocks, at, n_busy, panels = len(w.data), count_blocks(len(ids)), 0, 0, 0
    groups = groups_of(ids, n_expert, task.scratch)
    for e in range(n_expert):
        groups.start[e] = at
        for block in range(blocks):
            n = groups.counts[block * n_expert + e]
            groups.counts[block * n_expert + e] = at
            at += n
        if at > groups.start[e]:
            groups.firsts[n_busy] = panels
            n_busy += 1
            groups.busy[n_busy] = e
            panels += count_panels(at - groups.start[e])
    groups.start[n_expert], groups.busy[0], groups.firsts[n_busy] = at, n_busy, panels
    return blocks


@inner
def sort_pairs(out, x, ids, *others):
    """Sort a block's pairs by expert, and note where their activations are."""
    w, task = others[-2], others[-1]
    n_expert, n_used, slot_stride = len(w.data), ids.shape[1], x.strides[1] if x.ndim == 3 else 0
    groups = groups_of(ids, n_expert, task.scratch)
    for pair in pairs_of(task.index, *ids.shape):
        e = ids[pair // n_used, pair % n_used]
        at = groups.counts[task.index * n_expert + e]
        groups.pairs[at], groups.rows[at] = pair, address(x) + pair // n_used * x.strides[0] + pair % n_used * slot_stride
        groups.counts[task.index * n_expert + e] = at + 1


SORT_BY_EXPERT = Stage(begin_counting, count_pairs, light=True), Stage(begin_sorting, sort_pairs, light=True)


@inner
def n_rows_of(x):
    """Count the rows of activations."""
    return x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]


@inner
def begin_packing(out, x, ids, *others):
    """Count the tasks of pack."""
    w, task = others[-2], others[-1]
    return count_packing(w, groups_of(ids, len(w.data), task.scratch), n_rows_of(x), tokens_each(ids, len(w.data)), x.shape[-1])


@inner
def pack(out, x, ids, *others):
    """Round or pack some activations for one weight."""
    w, task = others[-2], others[-1]
    groups = groups_of(ids, len(w.data), task.scratch)
    pack_some(w, groups, tokens_each(ids, len(w.data)), x.shape[-1], address(x), x.strides[x.ndim - 2], task.index, groups.end)


@inner
def count_packing(w, groups, n_rows, each, n_in):
    """Count the tasks of pack_some: n_rows rows are rounded, or all panels packed."""
    return n_rows * count_pieces(n_in) if uses_gemv(w, each) else groups.firsts[groups.busy[0]]


@inner
def pack_some(w, groups, each, n_in, x, row_stride, index, packed):
    """Round a piece of a row of x, or pack a panel: tokens of one expert."""
    if uses_gemv(w, each):
        row = index // count_pieces(n_in)
        round_piece(w, x + row * row_stride, n_in, index % count_pieces(n_in), packed + row * rounded_bytes(n_in))
        return
    i = np.searchsorted(groups.firsts[:groups.busy[0] + 1], index, side="right") - 1
    e = groups.busy[1 + i]
    first, last = groups.start[e], groups.start[e + 1]
    pack_panel(w, address(groups.rows) + 8 * first, index - groups.firsts[i], last - first, n_in,
               packed + groups.firsts[i] * panel_bytes(w, n_in))


@inner
def most_packed_bytes(w, n_rows, n_pairs, each, n_expert, n_in):
    """Count the bytes of n_rows rounded rows, or of all panels, at most."""
    if uses_gemv(w, each):
        return n_rows * rounded_bytes(n_in)
    return min(n_pairs, n_pairs // 16 + n_expert) * panel_bytes(w, n_in)


@inner
def expert_rows(w, groups, i, r, n, n_in, each, packed, slots, x_at, out_at, thread):
    """Compute rows r to r + n of the i-th busy expert times its tokens.

    out_at: where the addresses of the outputs are; x_at: memory for those of rounded rows. packed: rounded rows, of which a pair's is
    pair // slots, or panels.
    """
    e = groups.busy[1 + i]
    rows = address(w.data) + e * w.data.strides[0] + r * w.data.shape[2]      # gate and up may be halves of one tensor
    first, n_pairs = groups.start[e], groups.start[e + 1] - groups.start[e]
    if uses_gemv(w, each):
        for k in range(n_pairs):
            store(x_at, 8 * k, packed + groups.pairs[first + k] // slots * rounded_bytes(n_in))
        gemv_rows(w, rows, n, n_in, x_at, n_pairs, out_at)
    else:
        gemm_rows(w, rows, n, n_in, packed + groups.firsts[i] * panel_bytes(w, n_in), n_pairs, 0, n_pairs, out_at, thread)


@inner
def task_rows(w, n_out, n_busy, each, n_threads):
    """Count the rows of a task, the same for all experts."""
    if each <= w.gemv_tokens:
        return min(n_out, gemv_task_rows(n_out * n_busy, w.data.shape[2], n_threads))
    return min(n_out, gemm_task_rows(n_out, n_busy, n_threads))


# Gate and up

@inner
def packed_alike(gate, up):
    """Whether both take activations in the same form."""
    return gate.pack == up.pack and gate.order == up.order


@inner
def packed_for(x, ids, gate, up, scratch):
    """Return the Groups, and where activations are packed for gate and for up."""
    groups, n_tokens, n_in = groups_of(ids, len(gate.data), scratch), x.shape[0], x.shape[1]
    each = tokens_each(ids, len(gate.data))
    for_up = groups.end
    if not packed_alike(gate, up):
        for_up += align(most_packed_bytes(gate, n_tokens, ids.size, each, len(gate.data), n_in))
    return groups, groups.end, for_up


@inner
def begin_packing_for_gate(out, x, ids, gate, up, task):
    groups, each = groups_of(ids, len(gate.data), task.scratch), tokens_each(ids, len(gate.data))
    n = count_packing(gate, groups, x.shape[0], each, x.shape[1])
    return n if packed_alike(gate, up) else n + count_packing(up, groups, x.shape[0], each, x.shape[1])


@inner
def pack_for_gate(out, x, ids, gate, up, task):
    groups, for_gate, for_up = packed_for(x, ids, gate, up, task.scratch)
    each = tokens_each(ids, len(gate.data))
    n = count_packing(gate, groups, x.shape[0], each, x.shape[1])
    w, packed, index = (gate, for_gate, task.index) if task.index < n else (up, for_up, task.index - n)
    pack_some(w, groups, each, x.shape[1], address(x), x.strides[0], index, packed)


@inner
def begin_gate_up_rows(out, x, ids, gate, up, task):
    n_busy, n_ff = groups_of(ids, len(gate.data), task.scratch).busy[0], gate.data.shape[1]
    size = task_rows(gate, n_ff, n_busy, tokens_each(ids, len(gate.data)), task.n_threads)
    return n_busy * ((n_ff + size - 1) // size)


@inner
def multiply_gate_up(out, x, ids, gate, up, task):
    groups, for_gate, for_up = packed_for(x, ids, gate, up, task.scratch)
    n_busy, n_ff, n_in, n_used, each = groups.busy[0], gate.data.shape[1], x.shape[1], ids.shape[1], tokens_each(ids, len(gate.data))
    size = task_rows(gate, n_ff, n_busy, each, task.n_threads)
    i, r = task.index % n_busy, task.index // n_busy * size
    n, e = min(size, n_ff - r), groups.busy[1 + i]
    first, n_pairs = groups.start[e], groups.start[e + 1] - groups.start[e]
    out_at = task_scratch(task.thread, 2 * align(8 * n_pairs) + 8 * n * n_pairs)
    x_at, ups = out_at + align(8 * n_pairs), out_at + 2 * align(8 * n_pairs)
    gates = ups + 4 * n * n_pairs       # not in place: LLVM vectorises silu_mul_row for arrays that do not overlap
    put_addresses(out_at, ups, 4 * n, n_pairs)
    expert_rows(up, groups, i, r, n, n_in, each, for_up, n_used, x_at, out_at, task.thread)
    put_addresses(out_at, gates, 4 * n, n_pairs)
    expert_rows(gate, groups, i, r, n, n_in, each, for_gate, n_used, x_at, out_at, task.thread)
    for k in range(n_pairs):
        hidden = floats_at(address(out) + groups.pairs[first + k] * out.strides[1] + 4 * r, 1, n)[0]
        silu_mul_row(hidden, floats_at(gates + 4 * n * k, 1, n)[0], floats_at(ups + 4 * n * k, 1, n)[0])


@op(*SORT_BY_EXPERT, Stage(begin_packing_for_gate, pack_for_gate, light=True), Stage(begin_gate_up_rows, multiply_gate_up))
def moe_gate_up(out, x, ids, gate, up):
    each = tokens_each(ids, len(gate.data))
    sizes = [align(most_packed_bytes(w, len(x), ids.size, each, len(gate.data), x.shape[1])) for w in (gate, up)]
    return groups_bytes(*ids.shape, len(gate.data)) + sum(sizes[:1] if packed_alike(gate, up) else sizes)


# One matrix an expert

@inner
def begin_one_rows(out, x, ids, w, task):
    n_busy, n_out = groups_of(ids, len(w.data), task.scratch).busy[0], w.data.shape[1]
    size = task_rows(w, n_out, n_busy, tokens_each(ids, len(w.data)), task.n_threads)
    return n_busy * ((n_out + size - 1) // size)


@inner
def multiply_one(out, x, ids, w, task):
    groups, n_out, each = groups_of(ids, len(w.data), task.scratch), w.data.shape[1], tokens_each(ids, len(w.data))
    n_busy = groups.busy[0]
    size = task_rows(w, n_out, n_busy, each, task.n_threads)
    i, r = task.index % n_busy, task.index // n_busy * size
    first, last = groups.start[groups.busy[1 + i]], groups.start[groups.busy[1 + i] + 1]
    out_at = task_scratch(task.thread, 16 * (last - first))
    x_at = out_at + 8 * (last - first)
    for k in range(last - first):
        store(out_at, 8 * k, address(out) + groups.pairs[first + k] * out.strides[1] + 4 * r)
    expert_rows(w, groups, i, r, min(size, n_out - r), x.shape[1], each, groups.end, ids.shape[1], x_at, out_at, task.thread)


@op(*SORT_BY_EXPERT, Stage(begin_packing, pack, light=True), Stage(begin_one_rows, multiply_one))
def moe_linear(out, x, ids, w):
    n_expert = len(w.data)
    return groups_bytes(*ids.shape, n_expert) + most_packed_bytes(w, len(x), ids.size, tokens_each(ids, n_expert), n_expert, x.shape[1])


# Down: the weighted sum of the experts' outputs

@inner
def down_task_rows(down, ids, n_busy, n_threads):
    """Count the rows of a task, which computes them for all experts."""
    n_out = down.data.shape[1]
    if tokens_each(ids, len(down.data)) <= down.gemv_tokens:
        return gemv_task_rows(n_out, n_busy * down.data.shape[2], n_threads)
    return gemm_task_rows(n_out, 1, n_threads)


@inner
def begin_down_rows(out, hidden, ids, weights, down, task):
    size = down_task_rows(down, ids, groups_of(ids, len(down.data), task.scratch).busy[0], task.n_threads)
    return (out.shape[1] + size - 1) // size


@inner
def multiply_down(out, hidden, ids, weights, down, task):
    groups, n_used, n_tokens = groups_of(ids, len(down.data), task.scratch), ids.shape[1], len(ids)
    each = tokens_each(ids, len(down.data))
    size = down_task_rows(down, ids, groups.busy[0], task.n_threads)
    r = task.index * size
    n = min(size, out.shape[1] - r)
    out_at = task_scratch(task.thread, 2 * align(8 * n_tokens) + 4 * n * n_tokens)
    x_at, part = out_at + align(8 * n_tokens), out_at + 2 * align(8 * n_tokens)
    put_addresses(out_at, part, 4 * n, n_tokens)
    for t in range(n_tokens):
        target = contiguous(out[t, r:r + n])
        for j in range(n):
            target[j] = 0
    for i in range(groups.busy[0]):
        expert_rows(down, groups, i, r, n, hidden.shape[2], each, groups.end, 1, x_at, out_at, task.thread)
        first, last = groups.start[groups.busy[1 + i]], groups.start[groups.busy[1 + i] + 1]
        for k in range(first, last):
            t, slot = groups.pairs[k] // n_used, groups.pairs[k] % n_used
            target, row, weight = contiguous(out[t, r:r + n]), floats_at(part + 4 * n * (k - first), 1, n)[0], weights[t, slot]
            for j in range(n):
                target[j] += weight * row[j]


@op(*SORT_BY_EXPERT, Stage(begin_packing, pack, light=True), Stage(begin_down_rows, multiply_down))
def moe_down(out, hidden, ids, weights, down):
    n_expert = len(down.data)
    return groups_bytes(*ids.shape, n_expert) + most_packed_bytes(down, ids.size, ids.size, tokens_each(ids, n_expert), n_expert,
                                                                  hidden.shape[2])
