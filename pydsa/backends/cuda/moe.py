"""Experts: the router, and the feed-forward networks with the tokens grouped by expert."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.device import SIMULATED, WARP, device, exp, warp_max, warp_sum
from pydsa.backends.cuda.f16x2.linear import TOKENS
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.linear import Tiles, numbers
from pydsa.backends.cuda.norm import silu_mul
from pydsa.backends.cuda.variants import kernels


MOST = 1024             # experts, as models/deepseek2.py allows
STARTS = MOST + 1
THREADS = 8 if SIMULATED else 256
MINUS_INFINITY = np.float32(-np.inf)


@device
def first_of_greatest(values, n, lane):
    """Where the greatest of n numbers stands, the first place if there are several; the same in every lane of the warp."""
    best, place = MINUS_INFINITY, np.float32(n)
    for i in range(lane, n, WARP):
        if values[i] > best or place == n:
            best, place = values[i], np.float32(i)
    greatest = warp_max(best)
    return int(-warp_max(-place if best == greatest else MINUS_INFINITY))


@kernel("i4[:,:], f4[:,:], f4[:,:], f4[:], i4, i4, i4, b1, f4", WARP)
def route_tokens(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):
    """A warp chooses the experts of one token (reference.moe_route). NaN counts as the least of all."""
    t, lane, n_expert = cuda.blockIdx.x, cuda.threadIdx.x, logits.shape[1]
    p = cuda.shared.array(MOST, np.float32)
    s = cuda.shared.array(MOST, np.float32)
    groups = cuda.shared.array(MOST, np.float32)
    kept = cuda.shared.array(MOST, np.int32)
    greatest, total = MINUS_INFINITY, np.float32(0)
    for e in range(lane, n_expert, WARP):
        greatest = max(greatest, logits[t, e])
    greatest = warp_max(greatest)
    for e in range(lane, n_expert, WARP):
        value = logits[t, e]
        if gating == 2:
            value = np.float32(1) / (np.float32(1) + exp(-value))
        elif gating == 1:
            value = exp(value - greatest)
        p[e] = value
        total += value
    total = warp_sum(total)
    for e in range(lane, n_expert, WARP):
        if gating == 1:
            p[e] /= total
        value = p[e] + bias[e]
        s[e] = value if value == value else MINUS_INFINITY
    cuda.syncthreads()
    if n_group > 1:
        size = n_expert // n_group
        for g in range(lane, n_group, WARP):
            first, second = MINUS_INFINITY, MINUS_INFINITY
            for e in range(g * size, (g + 1) * size):
                if s[e] > first:
                    first, second = s[e], first
                elif s[e] > second:
                    second = s[e]
            groups[g] = first + second if size > 1 else first
            kept[g] = 0
        cuda.syncthreads()
        for i in range(n_group_used):
            g = first_of_greatest(groups, n_group, lane)
            cuda.syncthreads()
            if lane == 0:
                groups[g], kept[g] = MINUS_INFINITY, 1
            cuda.syncthreads()
        for e in range(lane, n_expert, WARP):
            if kept[e // size] == 0:
                s[e] = MINUS_INFINITY
        cuda.syncthreads()
    total = np.float32(0)
    for i in range(ids.shape[1]):
        e = first_of_greatest(s, n_expert, lane)
        cuda.syncthreads()
        if lane == 0:
            ids[t, i], weights[t, i], s[e] = e, p[e], MINUS_INFINITY
        cuda.syncthreads()
    if lane == 0:
        if gating == 3:
            greatest = MINUS_INFINITY
            for i in range(ids.shape[1]):
                greatest = max(greatest, weights[t, i])
            for i in range(ids.shape[1]):
                weights[t, i] = exp(weights[t, i] - greatest)
                total += weights[t, i]
            for i in range(ids.shape[1]):
                weights[t, i] /= total
        if norm:
            total = np.float32(0)
            for i in range(ids.shape[1]):
                total += weights[t, i]
            scale /= max(total, np.float32(6.103515625e-5))
        for i in range(ids.shape[1]):
            weights[t, i] *= scale


@kernel("i4[:], i4[:], i4[:], i4[:], i4[:], i4", THREADS)
def group_by_expert(tile_matrix, tile_first, tile_end, order, ids, n_expert):
    """The pairs of a token and a slot in the order of their experts, and tiles of at most TOKENS of one expert; -1: no tile."""
    thread = cuda.threadIdx.x
    starts = cuda.shared.array(STARTS, np.int32)
    for e in range(thread, n_expert + 1, THREADS):
        starts[e] = 0
    cuda.syncthreads()
    for i in range(thread, ids.size, THREADS):
        cuda.atomic.add(starts, ids[i] + 1, 1)
    cuda.syncthreads()
    if thread == 0:
        tile = 0
        for e in range(n_expert):
            first, end = starts[e], starts[e] + starts[e + 1]
            starts[e + 1] = end
            for at in range(first, end, TOKENS):
                tile_matrix[tile], tile_first[tile], tile_end[tile] = e, at, min(at + TOKENS, end)
                tile += 1
        for i in range(tile, tile_matrix.size):
            tile_matrix[i] = -1
    cuda.syncthreads()
    for i in range(thread, ids.size, THREADS):
        order[cuda.atomic.add(starts, ids[i], 1)] = i       # any order within an expert: each pair has a row of its own


@kernel("f4[:,:], f4[:,:], f4[:,:]", THREADS)
def combine(out, parts, weights):
    """out[t] = sum_i weights[t, i] parts[t * used + i], in the order of the slots"""
    t, i, used = cuda.blockIdx.y, cuda.grid(1), weights.shape[1]
    if i < out.shape[1]:
        total = np.float32(0)
        for slot in range(used):
            total += weights[t, slot] * parts[t * used + slot, i]
        out[t, i] = total


def moe_route(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):
    """The experts of each token, greatest biased score first, and their weights."""
    route_tokens(ids.shape[0], ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale)


def pair_tiles(ids, n_expert, x_div):
    """Tiles that multiply each pair of a token and a slot with its expert's matrix."""
    n_pairs = ids.size
    if ids.shape[0] == 1:       # its experts are all different: a tile for each slot
        n = numbers(n_pairs + 1)
        return Tiles(ids.flat, n[:-1], n[1:], n[:-1], x_div, True)
    n_tiles = blocks_for(n_pairs, TOKENS) + min(n_expert, n_pairs)
    tiles = [scratch(f"tile {name}", (n,), np.int32) for name, n in (("matrix", n_tiles), ("first", n_tiles), ("end", n_tiles),
                                                                     ("order", n_pairs))]
    group_by_expert(1, *tiles, ids.flat, n_expert)
    return Tiles(*tiles, x_div, False)


def moe_gate_up(out, x, ids, gate, up):
    """out[t, i] = silu(gate_e x[t]) * up_e x[t] with e = ids[t, i]"""
    hidden, tiles = out.rows, pair_tiles(ids, gate.shape[0], ids.shape[1])
    ups = scratch("ups", hidden.shape, np.float32)
    of_gate, of_up = kernels("linear", gate, tiles.single), kernels("linear", up, tiles.single)
    packed = of_gate.pack(x.rows)
    of_gate.matmul(hidden, gate, packed, tiles)
    of_up.matmul(ups, up, packed if of_up is of_gate else of_up.pack(x.rows), tiles)
    silu_mul(hidden, hidden, ups)


def moe_down(out, hidden, ids, weights, down):
    """out[t] = sum_i weights[t, i] down_e hidden[t, i] with e = ids[t, i]"""
    finish(out, ids, weights, down, kernels("linear", down, ids.shape[0] == 1).pack(hidden.rows))


def finish(out, ids, weights, down, packed):
    """moe_down of hidden rows that are packed"""
    parts, tiles = scratch("parts", (ids.size, out.shape[1]), np.float32), pair_tiles(ids, down.shape[0], 1)
    kernels("linear", down, tiles.single).matmul(parts, down, packed, tiles)
    combine((blocks_for(out.shape[1], THREADS), out.shape[0]), out, parts, weights)
