"""Mixture of experts: the router, and the FFNs with tokens grouped by expert."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.f16x2.linear import TOKENS
from pydsa.backends.cuda.int8x2.gemv import gemv
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP
from pydsa.backends.cuda.linear import ChosenTiles, Tiles, arange, by_rows
from pydsa.backends.cuda.norm import silu_mul
from pydsa.backends.cuda.one_token.routing import choose
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel
from pydsa.backends.cuda.variants import kernels


MAX_EXPERTS = 1024             # the most experts, as models/deepseek2.py allows
STARTS = MAX_EXPERTS + 1
THREADS = 8 if SIMULATED else 256


@kernel("i4[:,:], f4[:,:], f4[:,:], f4[:], i4, i4, i4, b1, f4", WARP)
def route_tokens(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):
    """Route one token per warp: choose its experts (reference.moe_route)."""
    t = cuda.blockIdx.x
    s = cuda.shared.array(MAX_EXPERTS, np.float32)
    groups = cuda.shared.array(MAX_EXPERTS, np.float32)
    kept = cuda.shared.array(MAX_EXPERTS, np.int32)
    choose(ids[t], weights[t], logits[t], bias, gating, n_group, n_group_used, norm, scale, ids.shape[1], True, s, groups, kept,
           cuda.threadIdx.x)


@kernel("i4[:], i4[:], i4[:], i4[:], i4[:], i4", THREADS)
def group_by_expert(tile_matrix, tile_first, tile_end, order, ids, n_expert):
    """Sort (token, slot) pairs by expert and cut them into tiles.

    A tile has at most TOKENS pairs of one expert. tile_matrix is -1 where there is no tile.
    """
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
        order[cuda.atomic.add(starts, ids[i], 1)] = i       # any order within an expert: each pair has its own row


@kernel("f4[:,:], f4[:,:], f4[:,:]", THREADS)
def combine(out, parts, weights):
    """out[t] = sum_i weights[t, i] parts[t * used + i], in slot order.

    One value per thread.
    """
    t, i, used = cuda.blockIdx.y, cuda.grid(1), weights.shape[1]
    if i < out.shape[1]:
        total = np.float32(0)
        for slot in range(used):
            total += weights[t, slot] * parts[t * used + slot, i]
        out[t, i] = total


def moe_route(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):
    """The experts of each token and their weights, highest biased score first."""
    route_tokens(ids.shape[0], ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale)


def pair_tiles(ids, n_expert, x_div):
    """Tiles that multiply each (token, slot) pair with its expert's matrix."""
    n_pairs = ids.size
    if by_rows(ids.shape[0]):       # a token's experts are all different: one tile per slot
        n = arange(n_pairs + 1)
        return ChosenTiles(ids.flat, n[:-1], n[1:], n[:-1], x_div, True)
    n_tiles = blocks_for(n_pairs, TOKENS) + min(n_expert, n_pairs)
    tiles = [scratch(f"tile {name}", (n,), np.int32) for name, n in (("matrix", n_tiles), ("first", n_tiles), ("end", n_tiles),
                                                                     ("order", n_pairs))]
    group_by_expert(1, *tiles, ids.flat, n_expert)
    return Tiles(*tiles, x_div, False)


def moe_gate_up(out, x, ids, gate, up):
    """out[t, i] = silu(gate_e x[t]) * up_e x[t] with e = ids[t, i]."""
    hidden, tiles = out.rows, pair_tiles(ids, gate.shape[0], ids.shape[1])
    ups = scratch("ups", hidden.shape, np.float32)
    gate_kernels, up_kernels = kernels("linear", gate, tiles.single), kernels("linear", up, tiles.single)
    packed = gate_kernels.pack(x.rows)
    gate_kernels.matmul(hidden, gate, packed, tiles)
    up_kernels.matmul(ups, up, packed if up_kernels is gate_kernels else up_kernels.pack(x.rows), tiles)
    silu_mul(hidden, hidden, ups)


def moe_linear(out, x, ids, w):
    """out[t, i] = w_e x[t] with e = ids[t, i]."""
    tiles = pair_tiles(ids, w.shape[0], ids.shape[1])
    product = kernels("linear", w, tiles.single)
    product.matmul(out.rows, w, product.pack(x.rows), tiles)


def moe_down(out, hidden, ids, weights, down):
    """out[t] = sum_i weights[t, i] down_e hidden[t, i] with e = ids[t, i]."""
    parts = scratch("parts", (ids.size, out.shape[1]), np.float32)
    outputs_of_experts(parts, ids, down, kernels("linear", down, by_rows(ids.shape[0])).pack(hidden.rows))
    join_experts(out, parts, weights)


def outputs_of_experts(parts, ids, down, packed, shared=None):
    """parts[i] = down_e hidden[i], of hidden rows that are packed.

    For one token and quantized weights `packed` may be a rows_one.Rows. shared: then (out, matrix, all rows, the row) of the shared expert,
    whose product is in the same launch.
    """
    tiles = pair_tiles(ids, down.shape[0], 1)
    if shared is None:
        kernels("linear", down, tiles.single).matmul(parts, down, packed, tiles)
    else:
        other, w, both, row = shared
        gemv([parts, None, other], [down, None, w], both, tiles, row)


def join_experts(out, parts, weights):
    """out[t] = sum_i weights[t, i] parts[t, i]."""
    combine((blocks_for(out.shape[1], THREADS), out.shape[0]), out, parts, weights)
