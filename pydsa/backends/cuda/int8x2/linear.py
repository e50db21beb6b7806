"""GEMV of quantized weights with the activations of one token.

Activations are quantized to int16 with a scale per 32 values, stored as int8 pairs: x = scale (256 high + low), both bytes signed, the
largest magnitude 32,512. Weights and activations are multiplied as int8 by dp4a. Sums over 32 values are exact; only scales and sums of
groups are floats.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.block_sums import abs_bits
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.device import (SIMULATED, WARP, bits_float, copy_sixteen, device, dp4a, load_four_u32, max_of_eight, nearest,
                                        pack_int8x2, sum_of_four, sync, warp_max_int, warp_sum, warp_sync)
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.quants import INT8X2_MAX, TYPES


WARPS = 2 if SIMULATED else 4           # of a block
ROWS = 4                                # rows of weights that a warp multiplies with the same activations
FULL_GPU_WARPS = 8 if SIMULATED else 2112   # warps that fill the GPU: sixteen for each of an H100's SMs
PACK_THREADS = 8 if SIMULATED else 256  # threads of a packing block, four values each
PARTS = WARPS * ROWS                    # partial sums of a block
TILE = 32                               # groups of 32 values that are interleaved in Int8x2
QUAD_U32 = 4 * TILE                     # uint32 of one quad of all groups of a tile
TILE_U32 = 4 * QUAD_U32                 # of a tile: the first halves' high bytes, their low bytes, then those of the second halves
GEMV_SIGNATURE = "f4[:,:], u1[::1], f4[:,:], u1[::1], i8, i4[:], i4, i4, u4[::1], f4[:,:], f4[:,:]"
STAGED_GROUPS = max(WARP, 8)            # groups of a row that are staged in shared memory at a time: whole GGUF blocks
ZERO = np.float32(0)


class Int8x2(NamedTuple):
    """Rows of activations as int8 pairs: scale (256 high + low).

    A quad is the four uint32 of half a group. Quad c of all groups of a tile is contiguous, so that a warp's loads coalesce.
    """
    packed: object      # uint32 [N, tiles * TILE_U32]
    scales: object      # float32 [N, n/32]
    sums: object        # float32 [N, n/16], sums of 16 values


@device
def pack_four(packed, scales, sums, t, four, valid, a, b, c, e):
    """Quantize values 4 * four to 4 * four + 3 of row t: a, b, c, e.

    Seven adjacent lanes must call it with the rest of the group of 32. valid: whether to store the result. A group with a non-finite value
    gets a non-finite scale.
    """
    abs_max = bits_float(np.uint32(max_of_eight(max(max(abs_bits(a), abs_bits(b)), max(abs_bits(c), abs_bits(e))))))
    factor = np.float32(INT8X2_MAX) / abs_max if abs_max > np.float32(1e-30) else ZERO
    a, b, c, e = nearest(a, factor), nearest(b, factor), nearest(c, factor), nearest(e, factor)
    total = sum_of_four(np.float32(a + b + c + e))
    if valid:
        g = four >> 3
        at = (g >> 5) * TILE_U32 + (four >> 2 & 1) * 2 * QUAD_U32 + (g & 31) * 4 + (four & 3)
        packed[t, at], packed[t, at + QUAD_U32] = pack_int8x2(a, b, c, e)
        scale = abs_max / np.float32(INT8X2_MAX)
        if four & 3 == 0:
            sums[t, four >> 2] = scale * total
        if four & 7 == 0:
            scales[t, g] = scale


@device
def head_scale(q, t, h, start, end, lane):
    """The factor that quantizes q[t, h, start:end] to int16, and the scale.

    One warp computes it. The scale is NaN if a value is not finite.
    """
    bits = np.int32(0)
    for i in range(start + lane, end, WARP):
        bits = max(bits, abs_bits(q[t, h, i]))
    abs_max = bits_float(np.uint32(warp_max_int(bits)))
    finite = abs_max < np.float32(np.inf)
    factor = np.float32(INT8X2_MAX) / abs_max if finite and abs_max > np.float32(1e-30) else ZERO
    return factor, abs_max / np.float32(INT8X2_MAX) if finite else np.float32(np.nan)


@device
def pack_head_four(q, t, h, i, factor, valid):
    """Quantize four values of q[t, h] from i on: high bytes, low bytes.

    Zeros unless `valid`.
    """
    a, b, c, e = (nearest(q[t, h, i], factor), nearest(q[t, h, i + 1], factor), nearest(q[t, h, i + 2], factor),
                  nearest(q[t, h, i + 3], factor)) if valid else (0, 0, 0, 0)
    return pack_int8x2(a, b, c, e)


@kernel("u4[:,:], f4[:,:], f4[:,:], f4[:,:]", PACK_THREADS)
def pack_rows(packed, scales, sums, x):
    """Pack rows to Int8x2. Four values per thread."""
    t, four, n = cuda.blockIdx.x, cuda.blockIdx.y * PACK_THREADS + cuda.threadIdx.x, x.shape[1] // 4
    i = 4 * min(four, n - 1)
    pack_four(packed, scales, sums, t, four, four < n, x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3])


def scratch_for(x, name=""):
    """Scratch memory for the Int8x2 of rows. Each name has its own."""
    n_rows, n = x.shape
    return Int8x2(scratch(("x packed", name), (n_rows, blocks_for(n, 32 * TILE) * TILE_U32), np.uint32),
                  scratch(("x scales", name), (n_rows, n // 32), np.float32), scratch(("x sums", name), (n_rows, n // 16), np.float32))


def pack_into(x, made):
    """Pack rows of any strides into `made`, an Int8x2."""
    pack_rows((x.shape[0], blocks_for(x.shape[1] // 4, PACK_THREADS)), *made, x)


def pack(x):
    """Pack activations, rows of any strides, to Int8x2 in scratch memory."""
    made = scratch_for(x)
    pack_into(x, made)
    return made


def _make_stage_row(pitch):
    copies = (pitch // 16 + WARP - 1) // WARP

    @device
    def stage_row(staged, to, data, start, n_bytes, lane):
        """Stage bytes of a row in shared memory, 16 at a time.

        The copy begins at the 16-byte boundary at or before `start`.
        """
        begin = start & ~15
        n = start - begin + n_bytes + 15 >> 4
        for j in range(copies):
            i = j * WARP + lane
            if i < n:
                copy_sixteen(staged, to + 16 * i, data, begin + 16 * i)
    return stage_row


@device
def load_quads(packed, row_at, g):
    """The four quads of group g of an Int8x2 row.

    High and low bytes of the first half, then of the second half.
    """
    at = row_at + (g >> 5) * TILE_U32 + (g & 31) * 4
    return (load_four_u32(packed, at), load_four_u32(packed, at + QUAD_U32), load_four_u32(packed, at + 2 * QUAD_U32),
            load_four_u32(packed, at + 3 * QUAD_U32))


def _make_dot(entry):
    group, halves, offsets, _ = entry

    @device
    def dot(w, row, g, high, high_1, low, low_1, scale, y, y1):
        """The dot product of group g of a row of weights with the activations.

        high, high_1, low, low_1: the quads of both halves of the activations' group. scale: their scale. y, y1: their sums.
        """
        a, b, c, e, f, h, i, j, d, d1, m, m1 = group(w, row, g)
        x0, x1, x2, x3 = high
        x4, x5, x6, x7 = high_1
        first = dp4a(e, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, 0))))
        second = dp4a(j, x7, dp4a(i, x6, dp4a(h, x5, dp4a(f, x4, 0))))
        x0, x1, x2, x3 = low
        x4, x5, x6, x7 = low_1
        first = dp4a(e, x3, dp4a(c, x2, dp4a(b, x1, dp4a(a, x0, first << 8))))
        second = dp4a(j, x7, dp4a(i, x6, dp4a(h, x5, dp4a(f, x4, second << 8))))
        if halves:
            total = (d * np.float32(np.int32(first)) + d1 * np.float32(np.int32(second))) * scale
        else:
            total = d * np.float32(np.int32(first + second)) * scale
        if offsets:
            total -= m * y + m1 * y1
        return total
    return dot


@device
def sum_warps(parts, s0, s1, s2, s3, warp, lane, part, splits):
    """Sum four values over the `splits` warps that share a row.

    The warp with part 0 gets the sums. parts: shared memory, ROWS float32 per warp.
    """
    if splits > 1:
        if lane == 0:
            parts[4 * warp], parts[4 * warp + 1], parts[4 * warp + 2], parts[4 * warp + 3] = s0, s1, s2, s3
        sync()
        if part == 0:
            for i in range(1, splits):
                s0 += parts[4 * (warp + i)]
                s1 += parts[4 * (warp + i) + 1]
                s2 += parts[4 * (warp + i) + 2]
                s3 += parts[4 * (warp + i) + 3]
    return s0, s1, s2, s3


def _make_gemv(name):
    offsets, prepare, dot = GROUPED[name].offsets, GROUPED[name].prepare, _make_dot(GROUPED[name])
    size, itemsize = TYPES[name].size, TYPES[name].n_bytes
    tile_bytes = STAGED_GROUPS * 32 // size * itemsize
    direct = itemsize % 16 == 0         # blocks are 16-byte aligned and loaded directly from global memory
    pitch = 16 if direct else (tile_bytes + 15) // 16 * 16 + 16
    staged_bytes, stage_row = PARTS * pitch, _make_stage_row(pitch)

    def gemv_rows(out, w, other_out, other_w, row_bytes, ids, x_div, splits, packed, scales, sums):
        """out[y] = matrix ids[y] times row y // x_div of the activations.

        ROWS values per warp, or per `splits` warps of a block, which share the columns (split-K). Blocks with z = 1 use other_w and
        other_out. Rows whose GGUF blocks are not 16-byte aligned are staged in shared memory, STAGED_GROUPS groups at a time.
        """
        if cuda.blockIdx.z == 1:
            out, w = other_out, other_w
        y, thread, n_out, n_groups = cuda.blockIdx.y, cuda.threadIdx.x & WARPS * WARP - 1, out.shape[1], scales.shape[1]
        warp, lane, x_row = thread // WARP, thread % WARP, cuda.blockIdx.y // x_div
        part, row = warp % splits, (cuda.blockIdx.x * (WARPS // splits) + warp // splits) * ROWS
        parts = cuda.shared.array(PARTS, np.float32)
        staged = cuda.shared.array(staged_bytes, np.uint8, 16)
        base, last, own = ids[y] * np.int64(n_out), n_out - 1, warp * ROWS * pitch
        r0, r1, r2, r3 = ((base + min(row, last)) * row_bytes, (base + min(row + 1, last)) * row_bytes,
                          (base + min(row + 2, last)) * row_bytes, (base + min(row + 3, last)) * row_bytes)
        x_at, s0, s1, s2, s3 = x_row * ((n_groups + TILE - 1) // TILE) * TILE_U32, ZERO, ZERO, ZERO, ZERO
        prepare(thread, WARPS * WARP)
        for first in range(part * STAGED_GROUPS, n_groups, splits * STAGED_GROUPS):
            if not direct:
                at = first * 32 // size * itemsize
                n_bytes = min(tile_bytes, row_bytes - at)
                stage_row(staged, own, w, r0 + at, n_bytes, lane)
                stage_row(staged, own + pitch, w, r1 + at, n_bytes, lane)
                stage_row(staged, own + 2 * pitch, w, r2 + at, n_bytes, lane)
                stage_row(staged, own + 3 * pitch, w, r3 + at, n_bytes, lane)
                warp_sync()
            for j in range(STAGED_GROUPS // WARP):
                i = j * WARP + lane
                g = first + i
                if g < n_groups:
                    h, k, h1, k1 = load_quads(packed, x_at, g)
                    scale = scales[x_row, g]
                    y0, y1 = (sums[x_row, 2 * g], sums[x_row, 2 * g + 1]) if offsets else (ZERO, ZERO)
                    if direct:
                        s0 += dot(w, r0, g, h, h1, k, k1, scale, y0, y1)
                        s1 += dot(w, r1, g, h, h1, k, k1, scale, y0, y1)
                        s2 += dot(w, r2, g, h, h1, k, k1, scale, y0, y1)
                        s3 += dot(w, r3, g, h, h1, k, k1, scale, y0, y1)
                    else:
                        at = first * 32 // size * itemsize
                        s0 += dot(staged, own + (r0 + at & 15), i, h, h1, k, k1, scale, y0, y1)
                        s1 += dot(staged, own + pitch + (r1 + at & 15), i, h, h1, k, k1, scale, y0, y1)
                        s2 += dot(staged, own + 2 * pitch + (r2 + at & 15), i, h, h1, k, k1, scale, y0, y1)
                        s3 += dot(staged, own + 3 * pitch + (r3 + at & 15), i, h, h1, k, k1, scale, y0, y1)
            if not direct:
                warp_sync()
        s0, s1, s2, s3 = sum_warps(parts, warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3), warp, lane, part, splits)
        if part == 0 and lane < ROWS and row + lane < n_out:
            out[y, row + lane] = s0 if lane == 0 else s1 if lane == 1 else s2 if lane == 2 else s3
    return kernel(GEMV_SIGNATURE, WARPS * WARP, f"gemv_{name.lower()}")(gemv_rows)


GEMV = {name: _make_gemv(name) for name in GROUPED}


def gemv(outs, weights, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of x.

    x is Int8x2. For one out and one w, or for two with weights of one type.
    """
    n_tiles, n_groups, n_out = tiles.matrix.size, x.scales.shape[1], max(out.shape[1] for out in outs)
    splits = 1      # with few rows, warps share a row so that the GPU is filled
    while splits < WARPS and splits * WARP < n_groups and blocks_for(n_out, ROWS) * n_tiles * len(outs) * splits < FULL_GPU_WARPS:
        splits *= 2
    w, other_w = weights[0], weights[-1]
    GEMV[w.type]((blocks_for(n_out, ROWS * (WARPS // splits)), n_tiles, len(outs)), outs[0], w.data, outs[-1], other_w.data, w.row_bytes,
                 tiles.matrix, tiles.x_div, splits, x.packed.flat, x.scales, x.sums)


def matmul(out, w, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of x."""
    gemv([out], [w], x, tiles)
