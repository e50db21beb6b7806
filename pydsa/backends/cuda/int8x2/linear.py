"""Products of quantized weights with the activations of one token.

Activations become whole numbers of 16 bits with a scale for each 32: x = scale (256 high + low), the largest magnitude 32,512, both bytes
signed. So weights and activations meet as bytes in dp4a: the sums over 32 are exact, and only scales and sums of groups are floats.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.block_sums import abs_bits
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.device import (SIMULATED, WARP, bits_float, copy_sixteen, device, dp4a, load_four_u32, max_of_eight, nearest,
                                        pack_int8x2, sum_of_four, warp_sum, warp_sync)
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.quants import INT8X2_MAX, TYPES


WARPS = 2 if SIMULATED else 4           # of a block
ROWS = 4                                # of weights that a warp multiplies with the same activations
ENOUGH = 8 if SIMULATED else 2112       # warps: sixteen for each of an H100's processors
PACKING = 8 if SIMULATED else 256      # threads, each with four numbers
PARTS = WARPS * ROWS
TILE = 32                               # groups of 32 numbers whose words stand together
LANES = 4 * TILE                        # words of a chunk of all its groups
OF_TILE = 4 * LANES                     # high bytes of the first halves of groups, low bytes, then those of the second halves
STAGED = max(WARP, 8)                   # groups of a row that are in shared memory at a time: whole blocks
ZERO = np.float32(0)


class Int8x2(NamedTuple):
    """Rows of activations as bytes: words [N, tiles * OF_TILE], float32 scales [N, n/32], sums of numbers [N, n/16].

    A chunk is the four words of half a group; chunk c of the groups of a tile lies where the lanes of a warp load it at once.
    """
    packed: object
    scales: object
    sums: object


@device
def pack_four(packed, scales, sums, t, four, there, a, b, c, e):
    """Round numbers 4 * four to 4 * four + 3 of row t, with seven other lanes that have the rest of 32; `there`: whether they count.

    What is not finite becomes a scale that is not.
    """
    top = bits_float(np.uint32(max_of_eight(max(max(abs_bits(a), abs_bits(b)), max(abs_bits(c), abs_bits(e))))))
    factor = np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) else ZERO
    a, b, c, e = nearest(a, factor), nearest(b, factor), nearest(c, factor), nearest(e, factor)
    total = sum_of_four(np.float32(a + b + c + e))
    if there:
        g = four >> 3
        at = (g >> 5) * OF_TILE + (four >> 2 & 1) * 2 * LANES + (g & 31) * 4 + (four & 3)
        packed[t, at], packed[t, at + LANES] = pack_int8x2(a, b, c, e)
        scale = top / np.float32(INT8X2_MAX)
        if four & 3 == 0:
            sums[t, four >> 2] = scale * total
        if four & 7 == 0:
            scales[t, g] = scale


@kernel("u4[:,:], f4[:,:], f4[:,:], f4[:,:]", PACKING)
def pack_rows(packed, scales, sums, x):
    """A thread rounds four numbers of a row."""
    t, four, n = cuda.blockIdx.x, cuda.blockIdx.y * PACKING + cuda.threadIdx.x, x.shape[1] // 4
    i = 4 * min(four, n - 1)
    pack_four(packed, scales, sums, t, four, four < n, x[t, i], x[t, i + 1], x[t, i + 2], x[t, i + 3])


def scratch_for(x, name=""):
    """Scratch memory for the Int8x2 of rows; what another name has stays."""
    n_rows, n = x.shape
    return Int8x2(scratch(("x words", name), (n_rows, blocks_for(n, 32 * TILE) * OF_TILE), np.uint32),
                  scratch(("x scales", name), (n_rows, n // 32), np.float32), scratch(("x sums", name), (n_rows, n // 16), np.float32))


def pack_into(x, made):
    """Make `made` the Int8x2 of rows of any strides."""
    pack_rows((x.shape[0], blocks_for(x.shape[1] // 4, PACKING)), *made, x)


def pack(x):
    """Activations, rows of any strides, as Int8x2 in scratch memory."""
    made = scratch_for(x)
    pack_into(x, made)
    return made


def _make_gemv(name):
    group, halves, offsets = GROUPED[name].group, GROUPED[name].halves, GROUPED[name].offsets
    size, itemsize = TYPES[name].size, TYPES[name].n_bytes
    tile_bytes = STAGED * 32 // size * itemsize
    direct = itemsize % 16 == 0         # its words are loaded sixteen bytes at a time from where they lie
    pitch = 16 if direct else (tile_bytes + 15) // 16 * 16 + 16
    staged_bytes, copies = PARTS * pitch, (pitch // 16 + WARP - 1) // WARP

    @device
    def stage_row(staged, to, data, start, n_bytes, lane):
        """Copy bytes of a row to shared memory, sixteen at a time from the last place before them that is a multiple of it."""
        begin = start & ~15
        n = start - begin + n_bytes + 15 >> 4
        for j in range(copies):
            i = j * WARP + lane
            if i < n:
                copy_sixteen(staged, to + 16 * i, data, begin + 16 * i)

    @device
    def dot(w, row, g, high, high_1, low, low_1, scale, y, y1):
        """The product of the g-th 32 of a row of weights and of activations."""
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

    def one(out, w, other_out, other_w, row_bytes, ids, x_div, splits, packed, scales, sums):
        """out[y] = matrix ids[y] times the y // x_div-th row of activations; a warp makes ROWS numbers, or `splits` warps of a block do.

        Blocks whose z is 1 do that with other weights. Rows whose blocks are not aligned go through shared memory, STAGED groups at a time.
        """
        if cuda.blockIdx.z == 1:
            out, w = other_out, other_w
        y, thread, n_out, n_groups = cuda.blockIdx.y, cuda.threadIdx.x & WARPS * WARP - 1, out.shape[1], scales.shape[1]
        warp, lane, x_row = thread // WARP, thread % WARP, cuda.blockIdx.y // x_div
        part, row = warp % splits, (cuda.blockIdx.x * (WARPS // splits) + warp // splits) * ROWS
        parts = cuda.shared.array(PARTS, np.float32)
        staged = cuda.shared.array(staged_bytes, np.uint8, 16)
        base, last, own = ids[y] * np.int64(n_out), n_out - 1, warp * ROWS * pitch
        x_at = x_row * ((n_groups + TILE - 1) // TILE) * OF_TILE
        r0, r1, r2, r3 = ((base + min(row, last)) * row_bytes, (base + min(row + 1, last)) * row_bytes,
                          (base + min(row + 2, last)) * row_bytes, (base + min(row + 3, last)) * row_bytes)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for first in range(part * STAGED, n_groups, splits * STAGED):
            if not direct:
                at = first * 32 // size * itemsize
                n_bytes = min(tile_bytes, row_bytes - at)
                stage_row(staged, own, w, r0 + at, n_bytes, lane)
                stage_row(staged, own + pitch, w, r1 + at, n_bytes, lane)
                stage_row(staged, own + 2 * pitch, w, r2 + at, n_bytes, lane)
                stage_row(staged, own + 3 * pitch, w, r3 + at, n_bytes, lane)
                warp_sync()
            for j in range(STAGED // WARP):
                i = j * WARP + lane
                g = first + i
                if g < n_groups:
                    at = x_at + (g >> 5) * OF_TILE + (g & 31) * 4
                    h, k, h1, k1 = (load_four_u32(packed, at), load_four_u32(packed, at + LANES), load_four_u32(packed, at + 2 * LANES),
                                    load_four_u32(packed, at + 3 * LANES))
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
        s0, s1, s2, s3 = warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3)
        if splits > 1:
            if lane == 0:
                parts[4 * warp], parts[4 * warp + 1], parts[4 * warp + 2], parts[4 * warp + 3] = s0, s1, s2, s3
            cuda.syncthreads()
            if part == 0:
                for i in range(1, splits):
                    s0 += parts[4 * (warp + i)]
                    s1 += parts[4 * (warp + i) + 1]
                    s2 += parts[4 * (warp + i) + 2]
                    s3 += parts[4 * (warp + i) + 3]
        if part == 0 and lane < ROWS and row + lane < n_out:
            out[y, row + lane] = s0 if lane == 0 else s1 if lane == 1 else s2 if lane == 2 else s3
    signature = "f4[:,:], u1[::1], f4[:,:], u1[::1], i8, i4[:], i4, i4, u4[::1], f4[:,:], f4[:,:]"
    return kernel(signature, WARPS * WARP, f"gemv_{name.lower()}")(one)


GEMV = {name: _make_gemv(name) for name in GROUPED}


def gemv(outs, weights, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of Int8x2 activations; for one out and w, or for two of one type."""
    n_tiles, n_groups, n_out = tiles.matrix.size, x.scales.shape[1], max(out.shape[1] for out in outs)
    splits = 1      # a few rows are better divided among warps than left to a few of them
    while splits < WARPS and splits * WARP < n_groups and blocks_for(n_out, ROWS) * n_tiles * len(outs) * splits < ENOUGH:
        splits *= 2
    w, other_w = weights[0], weights[-1]
    GEMV[w.type]((blocks_for(n_out, ROWS * (WARPS // splits)), n_tiles, len(outs)), outs[0], w.data, outs[-1], other_w.data, w.row_bytes,
                 tiles.matrix, tiles.x_div, splits, x.packed.flat, x.scales, x.sums)


def matmul(out, w, x, tiles):
    """out[y] = matrix tiles.matrix[y] of w times row y // tiles.x_div of Int8x2 activations."""
    gemv([out], [w], x, tiles)
