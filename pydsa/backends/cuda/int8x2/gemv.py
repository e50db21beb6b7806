"""GEMV of quantized weights with activations of one token, or of a few.

Half a warp has a row of weights. Each of its lanes takes 64 of each 1,024, so that the scales of a block are decoded once for them, and has
two rows at a time, which share what it reads of the activations. These come from the first-level cache: all warps of a processor read the
same. Rows of at most 512 weights are joined: half a warp takes as many as fit into its lanes.

Weights of types whose blocks are multiples of 16 bytes go to registers, 16 bytes a load. All others go through shared memory: each warp has
a ring of stages there. Asynchronous copies fill the others while one is multiplied, also from one row to the next.

Of a few tokens each has blocks of its own, which go through the same rows at the same time: memory is read once, the second-level cache for
each token.
"""
import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.int8x2.linear import TILE_U32, scratch_for_rows
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP, device, sum_of_lanes, sync, warp_sync
from pydsa.backends.cuda.intrinsics.instructions import (commit_copies, copies_left, copy_sixteen_async, instruction, let_later_begin,
                                                         quotient, wait_for_earlier)
from pydsa.backends.cuda.one_token.dots_one import make_activations, make_dot, place_of_lane
from pydsa.backends.cuda.one_token.routing import ARGUMENTS as ROUTED, CHOSEN, FIXED, MOST, MOST_GROUPS, TO_CHOOSE, choose, no_router
from pydsa.backends.cuda.one_token.rows_one import GIVEN, JOINED, NORMED, ROUNDED, SOURCES, Rows, make_row, no_rows, not_rounded, round_tile
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, kernel
from pydsa.quants import TYPES


WARPS = 2 if SIMULATED else 4           # of a block
THREADS = WARPS * WARP
LANES = 4 if SIMULATED else 16          # of a row
HALVES = WARP // LANES                  # rows that a warp has at a time; each lane has two of them
LOG_LANES = LANES.bit_length() - 1
CHUNK = 64                              # weights that a lane takes of a row
STEP = LANES * CHUNK                    # weights of a row that are multiplied at a time
ROWS = 2 * HALVES                       # of a warp
NOTHING = -1 << 20                      # bytes that are left where there is nothing to copy
PARTS = WARPS * ROWS                    # sums of a block
AHEAD = 512 if SIMULATED else 4096      # bytes of weights that are on their way to a warp, at least
BANKS_APART = {"Q6_K": 96}              # bytes, of 128, that the halves' rows lie apart, if not 64: so that they meet in few banks
MOST_TOKENS = 1 if SIMULATED else 8     # of a step whose rows are multiplied one by one
MOST_BLOCKS = 2 * BLOCKS                # that walk through rows: four for each of an H100's processors
MOST_JOINS = 2                          # blocks of a head whose splits each of them joins: one more reads all their sums once more
ZERO = np.float32(0)
SIGNATURE = f"{'f4[:,:], u1[::1], ' * 4}i8, i4[:], i4, i4, i4, i4, i4, u4[:,::1], f4[:,::1], f4[:,::1], {SOURCES}, {ROUNDED}, {ROUTED}"
# a number that is not computed anew in every round of a loop, to save a register
kept = instruction("mov.b32 $0, $1;", "i", "i", lambda x: x, True)


@device
def row_of(v, half, own, joined, n_out, row_bytes):
    """The first byte of joined row v of a half, its bytes, a lane's own row.

    2^joined rows of weights are joined. Beyond the end of the matrix there is its last row.
    """
    first = np.int32(min(np.int32(v * HALVES + half), n_out - 1 >> joined) << joined)
    return (first * np.int64(row_bytes), np.int32(min(np.int32(1 << joined), np.int32(n_out - first)) * np.int32(row_bytes)),
            np.int32(min(own, np.int32(n_out - 1 - first)) * np.int32(row_bytes)))


@device
def place_of_thread(thread, n_groups, shift, split):
    """Which rows and which of their weights are a thread's.

    shift, split: see gemv_staged. The last two numbers are those of chunks and of steps of a row.
    """
    sub, half, warp = np.int32(thread & LANES - 1), np.int32(thread // LANES & HALVES - 1), np.int32(thread // WARP)     # lane of a half
    own, piece = np.int32(sub >> shift), np.int32(sub & (1 << shift) - 1)       # row of those that are joined, lane of the row
    part, group = np.int32(warp & (1 << split) - 1), np.int32(warp >> split)    # which steps, which tile of rows
    n_chunks = kept(np.int32(np.int32(n_groups + 1) >> 1))
    return sub, half, warp, own, piece, np.int32(LOG_LANES - shift), part, group, n_chunks, kept(np.int32((n_chunks - 1 >> shift) + 1))


@device
def one_of(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, first, others):
    """A block's output and matrix, of four.

    Of the `first` two or the last it has the `others` where z is 1. The last two, where y is past the ids, are single matrices, multiplied
    with one row of activations. A matrix may have no rows at all.
    """
    if others:
        out, w, third_out, third_w = second_out, second_w, fourth_out, fourth_w
    return (out, w) if first else (third_out, third_w)


@device
def matrix_of(y, ids, chosen, weights, logits, bias, gating, n_group, n_group_used, norm, scale, thread):
    """The matrix of a block's products: that of a place among the ids, else 0.

    chosen: FIXED, CHOSEN or TO_CHOOSE. All threads of a block call it, and wait for earlier kernels if these have to do with the choice.
    The first block of the last place, which chooses all, stores ids and weights.
    """
    s = cuda.shared.array(MOST, np.float32)
    groups = cuda.shared.array(MOST_GROUPS, np.float32)
    of_groups = cuda.shared.array(MOST_GROUPS, np.int32)
    if y >= ids.size:
        return np.int32(0)
    if chosen != FIXED:
        wait_for_earlier()
    if chosen != TO_CHOOSE:
        return ids[y]
    if thread < WARP:
        writes = y == ids.size - 1 and cuda.blockIdx.x == 0 and cuda.blockIdx.z == 0
        e = choose(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale, y + 1, writes, s, groups, of_groups, thread)
        if thread == 0:
            of_groups[0] = e
    sync()
    return of_groups[0]


@device
def product_of(y, ids, x_div, single_row):
    """Which rows of output and input the products of blocks of a y have."""
    return (np.int32(0), single_row) if y >= ids.size else (np.int32(y), quotient(np.int32(y), x_div))


@device
def block_number():
    """The number of a block in the grid."""
    return cuda.blockIdx.x + cuda.gridDim.x * (cuda.blockIdx.y + cuda.gridDim.y * cuda.blockIdx.z)


@device
def rows_of_tile(base, tile, half, own, joined, n_out, row_bytes):
    """First bytes of a half's two joined rows, and those of a lane in them."""
    r0, _, own0 = row_of(2 * tile, half, own, joined, n_out, row_bytes)
    r1, _, own1 = row_of(2 * tile + 1, half, own, joined, n_out, row_bytes)
    return base + r0, base + r1, own0, own1


@device
def begins(x_row, n_groups):
    """The bytes at which a row's quads and its scales begin."""
    return x_row * np.int64(np.int32(n_groups + 31) >> 5) * (4 * TILE_U32), 4 * x_row * np.int64(n_groups)


@device
def put_sums(out, parts, first, tile, place, shift, split, s0, s1, rounds, at_tile, to_packed, to_scales, to_sums, thread):
    """Store the sums of a lane's two rows.

    They are summed over the 2^shift lanes of a row, and over the 2^split warps that share it. parts: shared memory, ROWS
    float32 per warp. All threads of a block call it. rounds: round_tile() follows, for the block's tiles from at_tile on.
    """
    sub, half, warp, own, piece, joined, part, _, _, _ = place
    y = kept(np.int32(cuda.blockIdx.y)) if first else np.int32(0)
    s0, s1 = sum_of_lanes(s0, 1 << shift), sum_of_lanes(s1, 1 << shift)
    if split > 0:
        at = 2 * (warp * HALVES + half)
        if sub == 0:
            parts[at], parts[at + 1] = s0, s1
        sync()
        if part == 0:
            for i in range(1, 1 << split):
                s0 += parts[at + i * ROWS]
                s1 += parts[at + i * ROWS + 1]
        sync()
    row, n_out = np.int32((np.int32(tile * ROWS + half) << joined) + own), np.int32(out.shape[1])
    other = np.int32(row + (HALVES << joined))
    if part == 0 and piece == 0 and row < n_out:
        out[y, row] = s0
    if part == 0 and piece == 0 and other < n_out:
        out[y, other] = s1
    if rounds:
        round_tile(out, y, np.int32(at_tile * ROWS << joined), to_packed, to_scales, to_sums, thread)


def _make_direct(name):
    entry, itemsize = GROUPED[name], TYPES[name].n_bytes
    dot, activations = make_dot(entry), make_activations(name)
    step_bytes, begin_products = STEP // TYPES[name].size * itemsize, _make_begin(entry.prepare)

    def gemv_direct(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, row_bytes, ids, x_div, single_row, chosen,
                    shift, split, packed, scales, sums, mode, made, source, other, single_made, single_source, single_other, gain, eps,
                    n_splits, keys, n_chosen, positions, rounds, to_packed, to_scales, to_sums, weights, logits, bias, gating, n_group,
                    n_group_used, norm, scale):
        """gemv_staged, but weights are loaded to registers."""
        first, others, thread = cuda.blockIdx.y < ids.size, cuda.blockIdx.z == 1, cuda.threadIdx.x & WARPS * WARP - 1
        matrix = matrix_of(cuda.blockIdx.y, ids, chosen, weights, logits, bias, gating, n_group, n_group_used, norm, scale, thread)
        out, w = one_of(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, first, others)
        n_out, n_groups = np.int32(out.shape[1]), np.int32(scales.shape[1])
        y, x_row = product_of(cuda.blockIdx.y, ids, x_div, single_row)
        parts, base, splits = cuda.shared.array(PARTS, np.float32), matrix * np.int64(n_out) * row_bytes, np.int32(1 << split)
        begin_products(mode, made, source, other, single_made, single_source, single_other, gain, eps, n_splits, keys, n_chosen, positions,
                       ids, x_div, single_row, packed, scales, sums, parts, thread)
        place = place_of_thread(thread, n_groups, shift, split)
        sub, half, warp, own, piece, joined, part, group, n_chunks, n_steps = place
        (x_row_at, f_row_at), per_block = begins(x_row if mode == GIVEN else block_number(), n_groups), np.int32(WARPS >> split)
        begin, stride = np.int32(cuda.blockIdx.x * per_block), np.int32(cuda.gridDim.x * per_block)
        for at_tile in range(begin, np.int32((n_out - 1 >> joined) // ROWS + 1), stride):
            tile, s0, s1 = np.int32(at_tile + group), ZERO, ZERO
            r0, r1, own0, own1 = rows_of_tile(base, tile, half, own, joined, n_out, row_bytes)
            r0, r1 = r0 + own0, r1 + own1
            for step in range(part, n_steps, splits):
                c = np.int32(step * LANES + piece)
                if c < n_chunks:
                    x = activations(packed, scales, sums, x_row_at + place_of_lane(c, False), f_row_at + 8 * c, 0, 1)
                    s0 += dot(w, r0 + step * step_bytes, np.int64(piece), 1, x)
                    s1 += dot(w, r1 + step * step_bytes, np.int64(piece), 1, x)
            put_sums(out, parts, first, tile, place, shift, split, s0, s1, rounds, at_tile, to_packed, to_scales, to_sums, thread)
    return kernel(SIGNATURE, THREADS, f"gemv_{name.lower()}", blocks=4, dependent=True)(gemv_direct)


def _make_begin(prepare):
    @device
    def begin_products(mode, made, source, other, single_made, single_source, single_other, gain, eps, n_splits, keys, n_chosen, positions,
                       ids, x_div, single_row, packed, scales, sums, parts, thread):
        """Copy the type's tables; then wait for the activations, or make them."""
        prepare(thread, WARPS * WARP)
        wait_for_earlier()
        let_later_begin()
        if mode != GIVEN:
            y, row = kept(np.int32(cuda.blockIdx.y)), single_row        # found out anew, to save registers
            if y < ids.size:
                row = quotient(y, x_div)
            else:
                made, source, other = single_made, single_source, single_other
            writes = cuda.blockIdx.x == 0 and cuda.blockIdx.z == 0 and (mode != NORMED or y == 0)
            make_row(mode, made, source, other, gain, eps, n_splits, keys, n_chosen, positions, row, writes, packed, scales, sums,
                     block_number(), parts, thread, WARPS * WARP)
    return begin_products


def copies_of(n, stride):
    """An instruction of many copies: copy_row(target, to, source, at, n_bytes).

    It begins to copy 16 bytes every `stride` bytes, at most n times, and as long as n_bytes is greater than the distance from the first.
    It is one, as each would find out the address of shared memory anew.
    """
    lines = ["{", ".reg .pred %there;", ".reg .b32 %to;", ".reg .b64 %from;"]
    for i in range(n):
        lines += [f"add.u32 %to, $0, {i * stride};", f"add.u64 %from, $1, {i * stride};", f"setp.gt.s32 %there, $2, {i * stride};",
                  "@%there cp.async.cg.shared.global [%to], [%from], 16;"]

    def simulated(target, to, source, at, n_bytes):
        for distance in range(0, min(n_bytes, n * stride), stride):
            copy_sixteen_async(target, to + distance, source, at + distance)
    return instruction("\n".join([*lines, "}"]), "", "sgi", simulated, True)


def _make_ring(step_bytes, pitch):
    """The functions that fill a warp's ring, see gemv_staged.

    pitch: bytes between rows there, at least those of a step and 15 before it.
    """
    copy_row = copies_of(blocks_for(pitch, 16 * LANES), 16 * LANES)

    @device
    def ask(staged, to, w, at, left, sub):
        """Begin to copy a step of a row, 16 bytes a lane at a time.

        It is copied from the multiple of 16 at or before its first byte on. at: where the lane begins to copy. left: how
        many bytes there are from there to the row's end.
        """
        copy_row(staged, to + 16 * sub, w, at & ~15, np.int32(np.int32(at & 15) + min(np.int32(step_bytes - 16 * sub), left)))

    @device
    def aim(base, tile, n_tiles, part, half, sub, joined, n_out, row_bytes):
        """Where a lane begins to copy two rows, and bytes to their ends.

        There are none in tiles that are not there.
        """
        r0, n0, _ = row_of(2 * tile, half, np.int32(0), joined, n_out, row_bytes)
        r1, n1, _ = row_of(2 * tile + 1, half, np.int32(0), joined, n_out, row_bytes)
        skipped = part * step_bytes + 16 * sub
        if tile >= n_tiles:
            n0, n1 = np.int32(NOTHING), np.int32(NOTHING)
        return base + r0 + skipped, base + r1 + skipped, np.int32(n0 - skipped), np.int32(n1 - skipped)
    return ask, aim


def _sizes_of_ring(name):
    """Bytes of a step of a row, of its place in the ring, and between halves.

    The last number is that of the stages.
    """
    step_bytes = STEP // TYPES[name].size * TYPES[name].n_bytes
    pitch = (step_bytes + 15 + 15) // 16 * 16
    apart = 2 * pitch + (BANKS_APART.get(name, 64) - 2 * pitch) % 128
    return step_bytes, pitch, apart, max(2, blocks_for(AHEAD, HALVES * apart) + 1)


def _make_staged(name):
    size, strided, begin_products = TYPES[name].size, GROUPED[name].lane.strided, _make_begin(GROUPED[name].prepare)
    dot, activations = make_dot(GROUPED[name]), make_activations(name)
    step_bytes, pitch, apart, stages = _sizes_of_ring(name)
    (ask, aim), stage_bytes = _make_ring(step_bytes, pitch), HALVES * apart
    ring_bytes, staged_bytes, wait_for_stage = stages * stage_bytes, WARPS * stages * stage_bytes, copies_left(stages - 1)

    def gemv_staged(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, row_bytes, ids, x_div, single_row, chosen,
                    shift, split, packed, scales, sums, mode, made, source, other, single_made, single_source, single_other, gain, eps,
                    n_splits, keys, n_chosen, positions, rounds, to_packed, to_scales, to_sums, weights, logits, bias, gating, n_group,
                    n_group_used, norm, scale):
        """out[y] = matrix ids[y] of w times row y // x_div of the activations.

        See one_of(); chosen: matrix_of(). A row has 2^shift lanes. 2^split warps of a block share rows (split-K).
        """
        first, others, thread = cuda.blockIdx.y < ids.size, cuda.blockIdx.z == 1, cuda.threadIdx.x & WARPS * WARP - 1
        matrix = matrix_of(cuda.blockIdx.y, ids, chosen, weights, logits, bias, gating, n_group, n_group_used, norm, scale, thread)
        out, w = one_of(out, w, second_out, second_w, third_out, third_w, fourth_out, fourth_w, first, others)
        n_out, n_groups = np.int32(out.shape[1]), np.int32(scales.shape[1])
        y, x_row = product_of(cuda.blockIdx.y, ids, x_div, single_row)
        place = place_of_thread(thread, n_groups, shift, split)
        sub, half, warp, own, piece, joined, part, group, n_chunks, n_steps = place
        parts = cuda.shared.array(PARTS, np.float32)
        staged = cuda.shared.array(staged_bytes, np.uint8, 16)
        base, (x_row_at, f_row_at) = kept(matrix) * row_bytes * n_out, begins(x_row if mode == GIVEN else block_number(), n_groups)
        splits, per_block, jump = np.int32(1 << split), np.int32(WARPS >> split), kept(np.int32(step_bytes << split))
        ring = kept(np.int32(warp * ring_bytes + half * apart))
        n_tiles, last_stage = np.int32((n_out - 1 >> joined) // ROWS + 1), kept(np.int32(ring + ring_bytes - stage_bytes))
        begin, stride = np.int32(cuda.blockIdx.x * per_block), np.int32(cuda.gridDim.x * per_block)
        asked, asked_step, to = np.int32(begin + group), part, ring
        p0, p1, n0, n1 = aim(base, asked, n_tiles, part, half, sub, joined, n_out, row_bytes)
        for at_tile in range(np.int32(begin - stride), n_tiles, stride):
            tile, s0, s1 = np.int32(at_tile + group), ZERO, ZERO
            r0, r1, own0, own1 = rows_of_tile(base, tile, half, own, joined, n_out, row_bytes)
            r0, r1, own0, own1 = kept(np.int32(r0)), kept(np.int32(r1)), kept(own0), kept(np.int32(own1 + pitch))
            for step in range(part if at_tile >= begin else np.int32(n_steps - stages * splits), n_steps, splits):
                c, at = np.int32(step * LANES + piece), np.int32(step * step_bytes)
                wait_for_stage()
                warp_sync()
                if c < n_chunks and tile < n_tiles and at_tile >= begin:
                    second = np.int32(1 if size > 32 else min(np.int32(1), np.int32(n_groups - 1 - 2 * c)))
                    x_at, f_at = x_row_at + place_of_lane(c, strided), f_row_at + (16 * (c >> 1) if strided else 8 * c)
                    x = activations(packed, scales, sums, x_at, f_at, c & 1, second)
                    s0 += dot(staged, np.int32(to + (np.int32(r0 + at) & 15) + own0), np.int64(piece), second, x)
                    s1 += dot(staged, np.int32(to + (np.int32(r1 + at) & 15) + own1), np.int64(piece), second, x)
                warp_sync()
                ask(staged, to, w, p0, n0, sub)
                ask(staged, to + pitch, w, p1, n1, sub)
                commit_copies()
                to = np.int32(to + stage_bytes) if to < last_stage else ring
                asked_step, p0, p1, n0, n1 = np.int32(asked_step + splits), p0 + jump, p1 + jump, np.int32(n0 - jump), np.int32(n1 - jump)
                if asked_step >= n_steps:
                    asked, asked_step = np.int32(asked + stride), part
                    p0, p1, n0, n1 = aim(base, asked, n_tiles, part, half, sub, joined, n_out, row_bytes)
            if at_tile < begin:       # the first weights are on their way
                begin_products(mode, made, source, other, single_made, single_source, single_other, gain, eps, n_splits, keys, n_chosen,
                               positions, ids, x_div, single_row, packed, scales, sums, parts, thread)
            else:
                put_sums(out, parts, first, tile, place, shift, split, s0, s1, rounds, at_tile, to_packed, to_scales, to_sums, thread)
    return kernel(SIGNATURE, THREADS, f"gemv_{name.lower()}", blocks=4, dependent=True)(gemv_staged)


GEMV = {name: (_make_direct if entry.lane.direct else _make_staged)(name) for name, entry in GROUPED.items()}


def takes(n_tokens):
    """Whether products of so many tokens are to be made row by row.

    A tile of many rows walks through its weights in steps of 64, each of which waits for the one before, in as few blocks as 128 rows of
    weights need, however few tokens there are. docs/journal/cuda-kernels.md reckons what that takes.
    """
    return n_tokens <= MOST_TOKENS


class Grid(NamedTuple):
    """How products are divided.

    Into blocks in x, y and z, lanes of a row, and warps that share rows.
    """
    blocks: tuple
    lanes: int
    splits: int

    def rounds(self, n_out):
        """Whether a block has 32 of n_out outputs at a time, which it can round."""
        return self.splits == 1 and ROWS * WARPS * (LANES // self.lanes) == 32 and n_out % 32 == 0


def grid_of(outs, n_in, n_pairs, most=MOST_BLOCKS):
    """The Grid of products of n_in numbers each.

    outs: some may be None; the first two are n_pairs products each. most: blocks of a product.
    """
    n_chunks, there = blocks_for(n_in, CHUNK), [out is not None for out in outs]
    lanes = min(LANES, 1 << (n_chunks - 1).bit_length())        # of a row
    n_tiles = [0 if out is None else blocks_for(out.shape[1] * lanes, ROWS * LANES) for out in outs]
    n_steps, splits, n_all = blocks_for(n_chunks, lanes), 1, sum(n_tiles[:2]) * n_pairs + sum(n_tiles[2:])
    while 2 * splits <= min(WARPS, n_steps) and n_all * splits < WARPS * MOST_BLOCKS:       # few rows: warps share them
        splits *= 2
    n_products = n_pairs * sum(there[:2]) + sum(there[2:])
    n_blocks = min(blocks_for(max(n_tiles), WARPS // splits), blocks_for(MOST_BLOCKS, n_products), most)
    of_two = 2 if any(there[1::2]) else 1       # whether there is a second or a fourth one
    return Grid((n_blocks, n_pairs + any(there[2:]), of_two), lanes, splits)


def gemv(outs, weights, x, tiles, single_row=0, rounded=None, router=None):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of x.

    x is Int8x2, or a Rows of which each block makes its row. For one to four outs and weights of one type, of which the second may be None.
    From the third on weights are single matrices, all multiplied with row `single_row` of x, and the outs rows of their own, [1, n_out].
    rounded: the Int8x2 of one row that receives all rows of a single out, one behind the other, if Grid.rounds() them; or None. router: a
    Router, by which blocks choose the matrices, whose numbers are written to tiles.matrix; or None.
    """
    n_in = x.x.shape[1] if isinstance(x, Rows) else 32 * x.scales.shape[1]
    grid = grid_of(outs, n_in, tiles.matrix.size, MOST_JOINS if isinstance(x, Rows) and x.mode == JOINED else MOST_BLOCKS)
    GEMV[weights[0].type](grid.blocks, *arguments(outs, weights, x, tiles, grid, n_in, single_row, rounded, router))


def arguments(outs, weights, x, tiles, grid, n_in, single_row=0, rounded=None, router=None):
    """What kernels take for products in a Grid: see gemv()."""
    if isinstance(x, Rows):
        rows, (packed, scales, sums) = x.arguments, scratch_for_rows(math.prod(grid.blocks), n_in, "rows of blocks")
    else:
        rows, (packed, scales, sums) = no_rows(), x
    assert rounded is None or len(outs) == 1 and grid.rounds(outs[0].shape[1])
    chosen = TO_CHOOSE if router else CHOSEN if tiles.chosen else FIXED
    nothing = [(outs[0][:, :0], weights[0])] if None in outs or len(outs) < 4 else []
    pairs = [(out, w) if out is not None else nothing[0] for out, w in zip(outs, weights, strict=True)] + nothing * (4 - len(outs))
    return (*(part for out, w in pairs for part in (out, w.data)), weights[0].row_bytes, tiles.matrix, tiles.x_div, single_row, chosen,
            grid.lanes.bit_length() - 1, grid.splits.bit_length() - 1, packed, scales, sums, *rows,
            *((True, *rounded) if rounded else not_rounded()), *(router or no_router()))


def matmul(out, w, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of x."""
    gemv([out], [w], x, tiles)
