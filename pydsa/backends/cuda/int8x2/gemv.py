"""GEMV of quantized weights with activations of one token, or of a few.

Half a warp has a row of weights. Each of its lanes takes 64 of each 1,024, so that the scales of a block are decoded once for them, and has
two rows at a time, which share what it reads of the activations. These come from the first-level cache: all warps of a processor read the
same. Rows of at most 512 weights are joined: half a warp takes as many as fit into its lanes.

Weights of types whose blocks are multiples of 16 bytes go to registers, 16 bytes a load. All others go through shared memory: each warp has
a ring of stages there. Asynchronous copies fill the others while one is multiplied, also from one row to the next.

Of a few tokens each has blocks of its own, which go through the same rows at the same time: memory is read once, the second-level cache for
each token.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.device import SIMULATED, WARP, bits_float, device, dp4a, sum_of_lanes, sync, warp_sync
from pydsa.backends.cuda.instructions import (commit_copies, copies_left, copy_sixteen_async, instruction, load_eight, load_four,
                                              load_sixteen)
from pydsa.backends.cuda.int8x2.linear import LOW, TILE_U32
from pydsa.backends.cuda.launch import BLOCKS, blocks_for, kernel
from pydsa.quants import TYPES


WARPS = 2 if SIMULATED else 4           # of a block
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
LOW_BYTES = 4 * LOW                     # from the high bytes of a quad to its low ones
ZERO = np.float32(0)
SIGNATURE = "f4[:,:], u1[::1], f4[:,:], u1[::1], i8, i4[:], i4, i4, i4, u4[::1], f4[:,:], f4[:,:]"
# a number that is not computed anew in every round of a loop, to save a register
kept = instruction("mov.b32 $0, $1;", "i", "i", lambda x: x, True)


@device
def quads_of(packed, first, second, far, plane):
    """The quads at the bytes `first`, `second`, and `far` from each."""
    first, second = first + plane, second + plane
    return (load_sixteen(packed, first), load_sixteen(packed, second), load_sixteen(packed, first + far),
            load_sixteen(packed, second + far))


@device
def place_of_lane(c, strided):
    """The byte of a row of activations at which a lane's first quad begins.

    It is that of sixteens 4 c to 4 c + 3, or of those of one half of four groups. See place_of_quad.
    """
    at = 4 * TILE_U32 * (c >> 4) + 512 * (c >> 3 & 1)
    if strided:
        return np.int32(at + 32 * (c >> 1 & 3) + 144 * (c & 1))
    return np.int32(at + 16 * (c & 7))


@device
def adjacent_quads(packed, at, second):
    """High and low quads of four adjacent sixteens from a byte on.

    See place_of_lane.
    """
    other = (at ^ 16) + 128
    return quads_of(packed, at, other, 256 * second, 0), quads_of(packed, at, other, 256 * second, LOW_BYTES)


@device
def strided_quads(packed, at):
    """adjacent_quads of the sixteens of one half of four groups."""
    a, b, e, f = quads_of(packed, at, at ^ 16, 256, 0)
    h, i, j, k = quads_of(packed, at, at ^ 16, 256, LOW_BYTES)
    return (a, e, b, f), (h, j, i, k)


@device
def two_floats(array, at):
    """Two float32 at a byte of an array."""
    a, b = load_eight(array, at)
    return bits_float(a), bits_float(b)


@device
def four_floats(array, at):
    """Four float32 at a byte of an array."""
    a, b, c, d = load_sixteen(array, at)
    return bits_float(a), bits_float(b), bits_float(c), bits_float(d)


@device
def float_at(array, at):
    """The float32 at a byte of an array."""
    return bits_float(load_four(array, at))


def _make_activations(name):
    """The function that loads what a lane multiplies 64 weights with.

    These are high quads, low quads, scales and sums of four sixteens. x_at, f_at: the bytes of packed and scales at which they begin. half:
    which half of four groups it is, where the type is strided. second: see blocks/__init__.py.
    """
    entry, whole = GROUPED[name], TYPES[name].size > 32         # rows are multiples of 64 numbers
    needs_sums = entry.offsets or entry.lane.bias > 0

    @device
    def adjacent(packed, scales, sums, x_at, f_at, half, second):
        high, low = adjacent_quads(packed, x_at, second)
        if whole:
            d, d1 = two_floats(scales, f_at)
        else:
            d, d1 = float_at(scales, f_at), float_at(scales, f_at + 4) if second > 0 else ZERO
        a, b, e, f = ZERO, ZERO, ZERO, ZERO
        if needs_sums:
            a, b = two_floats(sums, 2 * f_at)
            if whole or second > 0:
                e, f = two_floats(sums, 2 * f_at + 8)
        return high, low, (d, d, d1, d1), (a, b, e, f)

    @device
    def strided(packed, scales, sums, x_at, f_at, half, second):
        high, low = strided_quads(packed, x_at)
        y, first = (ZERO, ZERO, ZERO, ZERO), 2 * f_at + 4 * half
        if needs_sums:
            y = float_at(sums, first), float_at(sums, first + 8), float_at(sums, first + 16), float_at(sums, first + 24)
        return high, low, four_floats(scales, f_at), y
    return strided if entry.lane.strided else adjacent


@device
def add_sixteen(w, x, total):
    """total + w x: sixteen int8 of each."""
    a, b, c, d = w
    x0, x1, x2, x3 = x
    return dp4a(d, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, total))))


@device
def with_low(high, bias):
    """256 times the sum of products with high bytes, and a bias.

    The sum of products with low bytes begins with it.
    """
    return np.int32(np.int32(high * np.int32(256)) + bias)


def _make_dot(entry):
    lane, offsets = entry.lane, entry.offsets
    weights, bias, pairs = lane.weights, -lane.bias, not lane.strided and not entry.halves      # pairs of sixteens have one scale

    @device
    def bias_of(total):
        return np.int32(np.int32(total) * np.int32(bias)) if bias else np.int32(0)

    @device
    def dot(data, row, c, second, x):
        """64 weights of a row times what activations() returns."""
        high, low, f, y = x
        w0, w1, w2, w3, d, m = weights(data, row, c, second)
        if pairs:
            p = add_sixteen(w1, high[1], add_sixteen(w0, high[0], np.int32(0)))
            q = add_sixteen(w3, high[3], add_sixteen(w2, high[2], np.int32(0)))
            p = add_sixteen(w1, low[1], add_sixteen(w0, low[0], with_low(p, np.int32(bias_of(y[0]) + bias_of(y[1])))))
            q = add_sixteen(w3, low[3], add_sixteen(w2, low[2], with_low(q, np.int32(bias_of(y[2]) + bias_of(y[3])))))
            a, b = d[0] * np.float32(np.int32(p)), d[2] * np.float32(np.int32(q))
            if offsets:
                a -= m[0] * (y[0] + y[1])
                b -= m[2] * (y[2] + y[3])
            return f[0] * a + f[2] * b
        p = add_sixteen(w0, low[0], with_low(add_sixteen(w0, high[0], np.int32(0)), bias_of(y[0])))
        q = add_sixteen(w1, low[1], with_low(add_sixteen(w1, high[1], np.int32(0)), bias_of(y[1])))
        r = add_sixteen(w2, low[2], with_low(add_sixteen(w2, high[2], np.int32(0)), bias_of(y[2])))
        s = add_sixteen(w3, low[3], with_low(add_sixteen(w3, high[3], np.int32(0)), bias_of(y[3])))
        a, b = d[0] * np.float32(np.int32(p)), d[1] * np.float32(np.int32(q))
        e, g = d[2] * np.float32(np.int32(r)), d[3] * np.float32(np.int32(s))
        if offsets:
            a -= m[0] * y[0]
            b -= m[1] * y[1]
            e -= m[2] * y[2]
            g -= m[3] * y[3]
        return (f[0] * a + f[1] * b) + (f[2] * e + f[3] * g)
    return dot


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
def begins(x_row, n_groups):
    """The bytes at which a row's quads and its scales begin."""
    return x_row * np.int64(np.int32(n_groups + 31) >> 5) * (4 * TILE_U32), 4 * x_row * np.int64(n_groups)


@device
def put_sums(out, parts, y, tile, place, shift, split, s0, s1):
    """Store the sums of a lane's two rows.

    They are summed over the 2^shift lanes of a row, and over the 2^split warps that share it. parts: shared memory, ROWS
    float32 per warp. All threads of a block call it.
    """
    sub, half, warp, own, piece, joined, part, _, _, _ = place
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


def _make_direct(name):
    entry, itemsize = GROUPED[name], TYPES[name].n_bytes
    dot, activations = _make_dot(entry), _make_activations(name)
    step_bytes, prepare = STEP // TYPES[name].size * itemsize, entry.prepare

    def gemv_direct(out, w, other_out, other_w, row_bytes, ids, x_div, shift, split, packed, scales, sums):
        """gemv_staged, but weights are loaded to registers."""
        if cuda.blockIdx.z == 1:
            out, w = other_out, other_w
        y, thread, n_out, n_groups = cuda.blockIdx.y, cuda.threadIdx.x & WARPS * WARP - 1, np.int32(out.shape[1]), np.int32(scales.shape[1])
        place = place_of_thread(thread, n_groups, shift, split)
        sub, half, warp, own, piece, joined, part, group, n_chunks, n_steps = place
        parts, base, splits = cuda.shared.array(PARTS, np.float32), ids[y] * np.int64(n_out) * row_bytes, np.int32(1 << split)
        (x_row_at, f_row_at), per_block = begins(y // x_div, n_groups), np.int32(WARPS >> split)
        prepare(thread, WARPS * WARP)
        begin, stride = np.int32(cuda.blockIdx.x * per_block), np.int32(cuda.gridDim.x * per_block)
        for first in range(begin, np.int32((n_out - 1 >> joined) // ROWS + 1), stride):
            tile, s0, s1 = np.int32(first + group), ZERO, ZERO
            r0, _, own0 = row_of(2 * tile, half, own, joined, n_out, row_bytes)
            r1, _, own1 = row_of(2 * tile + 1, half, own, joined, n_out, row_bytes)
            r0, r1 = base + r0 + own0, base + r1 + own1
            for step in range(part, n_steps, splits):
                c = np.int32(step * LANES + piece)
                if c < n_chunks:
                    x = activations(packed, scales, sums, x_row_at + place_of_lane(c, False), f_row_at + 8 * c, 0, 1)
                    s0 += dot(w, r0 + step * step_bytes, np.int64(piece), 1, x)
                    s1 += dot(w, r1 + step * step_bytes, np.int64(piece), 1, x)
            put_sums(out, parts, y, tile, place, shift, split, s0, s1)
    return kernel(SIGNATURE, WARPS * WARP, f"gemv_{name.lower()}", blocks=4)(gemv_direct)


def copies_of(n, stride):
    """An instruction of many copies: copy_row(target, to, source, at, n_bytes).

    It begins to copy 16 bytes every `stride` bytes, at most n times, and as long as n_bytes is greater than the distance from the first.
    It is one, as each would find out the address of shared memory anew.
    """
    lines = ["{", ".reg .pred %p900;", ".reg .b32 %r900;", ".reg .b64 %rd900;"]
    for i in range(n):
        lines += [f"add.u32 %r900, $0, {i * stride};", f"add.u64 %rd900, $1, {i * stride};", f"setp.gt.s32 %p900, $2, {i * stride};",
                  "@%p900 cp.async.cg.shared.global [%r900], [%rd900], 16;"]

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


def _make_staged(name):
    entry, size, strided = GROUPED[name], TYPES[name].size, GROUPED[name].lane.strided
    dot, activations = _make_dot(entry), _make_activations(name)
    step_bytes, prepare = STEP // size * TYPES[name].n_bytes, entry.prepare
    pitch = (step_bytes + 15 + 15) // 16 * 16
    ask, aim = _make_ring(step_bytes, pitch)
    apart = 2 * pitch + (BANKS_APART.get(name, 64) - 2 * pitch) % 128       # from one half's rows to the other's
    stage_bytes = HALVES * apart
    stages = max(2, blocks_for(AHEAD, stage_bytes) + 1)
    ring_bytes, staged_bytes, wait_for_stage = stages * stage_bytes, WARPS * stages * stage_bytes, copies_left(stages - 1)

    def gemv_staged(out, w, other_out, other_w, row_bytes, ids, x_div, shift, split, packed, scales, sums):
        """out[y] = matrix ids[y] times row y // x_div of the activations.

        A row has 2^shift lanes. `splits` warps of a block share rows (split-K). Blocks with z = 1 use other_w and other_out.
        """
        if cuda.blockIdx.z == 1:
            out, w = other_out, other_w
        y, thread, n_out, n_groups = cuda.blockIdx.y, cuda.threadIdx.x & WARPS * WARP - 1, np.int32(out.shape[1]), np.int32(scales.shape[1])
        place = place_of_thread(thread, n_groups, shift, split)
        sub, half, warp, own, piece, joined, part, group, n_chunks, n_steps = place
        parts = cuda.shared.array(PARTS, np.float32)
        staged = cuda.shared.array(staged_bytes, np.uint8, 16)
        base, (x_row_at, f_row_at) = ids[y] * np.int64(n_out) * row_bytes, begins(y // x_div, n_groups)
        splits, per_block, jump = np.int32(1 << split), np.int32(WARPS >> split), kept(np.int32(step_bytes << split))
        ring = kept(np.int32(warp * ring_bytes + half * apart))
        n_tiles, last_stage = np.int32((n_out - 1 >> joined) // ROWS + 1), kept(np.int32(ring + ring_bytes - stage_bytes))
        begin, stride = np.int32(cuda.blockIdx.x * per_block), np.int32(cuda.gridDim.x * per_block)
        asked, asked_step, to = np.int32(begin + group), part, ring
        p0, p1, n0, n1 = aim(base, asked, n_tiles, part, half, sub, joined, n_out, row_bytes)
        for first in range(np.int32(begin - stride), n_tiles, stride):
            tile, s0, s1 = np.int32(first + group), ZERO, ZERO
            r0, _, own0 = row_of(2 * tile, half, own, joined, n_out, row_bytes)
            r1, _, own1 = row_of(2 * tile + 1, half, own, joined, n_out, row_bytes)
            r0, r1, own0, own1 = kept(np.int32(r0 + base)), kept(np.int32(r1 + base)), kept(own0), kept(np.int32(own1 + pitch))
            for step in range(part if first >= begin else np.int32(n_steps - stages * splits), n_steps, splits):
                c, at = np.int32(step * LANES + piece), np.int32(step * step_bytes)
                wait_for_stage()
                warp_sync()
                if c < n_chunks and tile < n_tiles and first >= begin:
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
            if first < begin:
                prepare(thread, WARPS * WARP)
            else:
                put_sums(out, parts, y, tile, place, shift, split, s0, s1)
    return kernel(SIGNATURE, WARPS * WARP, f"gemv_{name.lower()}", blocks=4)(gemv_staged)


GEMV = {name: (_make_direct if entry.lane.direct else _make_staged)(name) for name, entry in GROUPED.items()}


def takes(n_tokens):
    """Whether products of so many tokens are to be made row by row.

    A tile of many rows walks through its weights in steps of 64, each of which waits for the one before, in as few blocks as 128 rows of
    weights need, however few tokens there are. docs/journal/cuda-kernels.md reckons what that takes.
    """
    return n_tokens <= MOST_TOKENS


def gemv(outs, weights, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of x.

    x is Int8x2. For one out and one w, or for two with weights of one type.
    """
    n_chunks, n_out, n_products = blocks_for(x.scales.shape[1], 2), max(out.shape[1] for out in outs), tiles.matrix.size * len(outs)
    lanes = min(LANES, 1 << (n_chunks - 1).bit_length())        # of a row
    n_tiles, n_steps, splits = blocks_for(n_out * lanes, ROWS * LANES), blocks_for(n_chunks, lanes), 1
    while 2 * splits <= min(WARPS, n_steps) and n_tiles * n_products * splits < WARPS * MOST_BLOCKS:     # few rows: warps share them
        splits *= 2
    w, other_w = weights[0], weights[-1]
    n_blocks = min(blocks_for(n_tiles, WARPS // splits), blocks_for(MOST_BLOCKS, n_products))
    GEMV[w.type]((n_blocks, tiles.matrix.size, len(outs)), outs[0], w.data, outs[-1], other_w.data, w.row_bytes,
                 tiles.matrix, tiles.x_div, lanes.bit_length() - 1, splits.bit_length() - 1, x.packed.flat, x.scales, x.sums)


def matmul(out, w, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of x."""
    gemv([out], [w], x, tiles)
