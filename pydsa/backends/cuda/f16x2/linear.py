"""Tensor-core GEMM for prompts, with all weights but float32 ones.

An activation is split into two float16, high and low, with a scale per row: 22 bits together. Or it is one float16, the high one, with
half of the products. Weights are exact: int8 fit into float16, and so do bfloat16 apart from their exponents. A group of 32 weights takes
two mma.m16n8k16 per tile and part. The group's scales multiply the float32 accumulators, its offsets the sums of 16 activations. Tokens
are the rows of the instruction (M), weight rows its columns (N).

A group is stored as four quads, one for each lane of a row's fragment: quad i has values 4 i to 4 i + 3 of both halves. In shared memory
tokens are in fragment order. The quads of a weight row are swizzled by row: no bank conflicts.
"""
import functools
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.blocks.floats import two_bf16
from pydsa.backends.cuda.intrinsics.block_sums import row_max
from pydsa.backends.cuda.intrinsics.constants import nothing
from pydsa.backends.cuda.intrinsics.device import (MMA_WARP, SIMULATED, bits_float, device, fma, four_u32_at, int8_to_f16, load_four_u32,
                                                   load_two_f32, mma_f16, of_half, store_four_u32, sum_of_four, to_half)
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


ROW_WARPS, TOKEN_WARPS = (1, 2) if SIMULATED else (4, 2)
TOKEN_TILES = 1 if SIMULATED else 4         # of a warp: tiles of 16 tokens, each multiplied with four tiles of 8 rows
WARPS = ROW_WARPS * TOKEN_WARPS
THREADS = MMA_WARP * WARPS
ROWS, TOKENS = 32 * ROW_WARPS, 16 * TOKEN_TILES * TOKEN_WARPS   # of a block; half of its threads dequantize one row each
COPY_WARPS = (THREADS - ROWS) // MMA_WARP   # the other threads stage tokens, one tile of 16 per warp at a time
COPIES = TOKENS // (16 * COPY_WARPS)
GROUP = 16                                  # uint32 of a group, two float16 each
ROW_U32, PLANE = ROWS * GROUP, TOKENS * GROUP   # uint32 of a stage: weight rows; the high float16 of tokens, followed by the low ones
SUMS = 16 * TOKEN_TILES                     # accumulators of a lane
F16_MAX = 16384                             # the largest float16 that a row's values are scaled to
SPLIT_THREADS = 8 if SIMULATED else 256     # threads that split a row
ZERO, ONE = np.float32(0), np.float32(1)
GEMM_SIGNATURE = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u4[::1], f4[:], f4[::1], i4"


class F16x2(NamedTuple):
    """Rows of activations as one float16 per value, or two: scale (high + low)."""
    packed: object      # uint32 [N, n parts / 2], in quads; of each group first the high float16, then the low ones
    scales: object      # float32 [N]
    sums: object        # float32 [N, n/16], sums of 16 values as they are multiplied, in units of the scale
    parts: int          # 1 or 2


@device
def split_f16x2(x):
    """Split a float32 into the nearest float16 and the residual, as bits."""
    high = to_half(x)
    return high, to_half(x - of_half(high))


@device
def row_factor(scales, x, t, thread):
    """The factor of a row's values, whose scale is stored: by a block.

    A row with a non-finite value gets the scale NaN, and the factor 0.
    """
    maxima = cuda.shared.array(32, np.int32)
    abs_max = bits_float(np.uint32(row_max(x, t, 0, x.shape[1], maxima, thread, SPLIT_THREADS)))
    finite = abs_max < np.float32(np.inf)
    factor = np.float32(F16_MAX) / abs_max if finite and abs_max > np.float32(1e-30) else ZERO
    if thread == 0:
        scales[t] = abs_max / np.float32(F16_MAX) if finite else np.float32(np.nan)
    return factor


@device
def scaled_four(x, t, i, factor, valid):
    """Values i to i + 3 of a row times its factor; zeros unless `valid`."""
    return (x[t, i] * factor, x[t, i + 1] * factor, x[t, i + 2] * factor, x[t, i + 3] * factor) if valid else (ZERO, ZERO, ZERO, ZERO)


@device
def place_of_four(four):
    """Where values 4 * four to 4 * four + 3 lie in a group of its quads."""
    return (four & 3) * 4 + (four >> 2 & 1) * 2


@kernel("u4[:,:], f4[:], f4[:,:], f4[:,:]", SPLIT_THREADS)
def split_rows(packed, scales, sums, x):
    """Split rows into F16x2. One row per block, four values per thread at a time."""
    t, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    factor = row_factor(scales, x, t, thread)
    for first in range(0, n // 4, SPLIT_THREADS):
        four = first + thread
        valid = four < n // 4 and factor > ZERO         # infinity * 0 is NaN
        v0, v1, v2, v3 = scaled_four(x, t, 4 * four, factor, valid)
        total = sum_of_four((v0 + v1) + (v2 + v3))
        if four < n // 4:
            a, a1 = split_f16x2(v0)
            b, b1 = split_f16x2(v1)
            c, c1 = split_f16x2(v2)
            e, e1 = split_f16x2(v3)
            at = (four >> 3) * 2 * GROUP + place_of_four(four)
            packed[t, at], packed[t, at + 1], packed[t, at + GROUP], packed[t, at + GROUP + 1] = (
                a | b << 16, c | e << 16, a1 | b1 << 16, c1 | e1 << 16)
            if four & 3 == 0:
                sums[t, four >> 2] = total


@kernel("u4[:,:], f4[:], f4[:,:], f4[:,:]", SPLIT_THREADS)
def round_rows(packed, scales, sums, x):
    """Round rows to one float16 per value, as split_rows() splits them.

    Sums are those of the rounded values: what an offset is multiplied with fits what the weight is.
    """
    t, thread, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    factor = row_factor(scales, x, t, thread)
    for first in range(0, n // 4, SPLIT_THREADS):
        four = first + thread
        v0, v1, v2, v3 = scaled_four(x, t, 4 * four, factor, four < n // 4 and factor > ZERO)
        a, b, c, e = to_half(v0), to_half(v1), to_half(v2), to_half(v3)
        total = sum_of_four((of_half(a) + of_half(b)) + (of_half(c) + of_half(e)))
        if four < n // 4:
            at = (four >> 3) * GROUP + place_of_four(four)
            packed[t, at], packed[t, at + 1] = a | b << 16, c | e << 16
            if four & 3 == 0:
                sums[t, four >> 2] = total


def pack(x, parts=2):
    """Activations, rows of any strides, as F16x2 of so many parts.

    They are in scratch memory.
    """
    n_rows, n = x.shape
    made = F16x2(scratch("x halves", (n_rows, n * parts // 2), np.uint32), scratch("x row scales", (n_rows,), np.float32),
                 scratch("x half sums", (n_rows, n // 16), np.float32), parts)
    (split_rows if parts == 2 else round_rows)(n_rows, *made[:-1], x)
    return made


pack_one = functools.partial(pack, parts=1)


@device
def quad_offset(row, quad):
    """The swizzled offset of a row's quad in shared memory."""
    return row * GROUP + 4 * (quad ^ row >> 1 & 3)


@device
def store_quad(row_stage, at, first_half, second_half):
    """Store a quad as float16: four int8 of each half of a group."""
    w0, w1 = int8_to_f16(np.uint32(first_half))
    w2, w3 = int8_to_f16(np.uint32(second_half))
    store_four_u32(row_stage, at, w0, w1, w2, w3)


def _make_unpack(group):
    @device
    def unpack(row_stage, row, data, at, k):
        """Dequantize group k of a row to float16 quads in shared memory.

        at: where the row begins in data. Returns the scales and the offsets of both halves.
        """
        w0, w1, w2, w3, w4, w5, w6, w7, d, d1, m, m1 = group(data, at, k)
        store_quad(row_stage, quad_offset(row, 0), w0, w4)
        store_quad(row_stage, quad_offset(row, 1), w1, w5)
        store_quad(row_stage, quad_offset(row, 2), w2, w6)
        store_quad(row_stage, quad_offset(row, 3), w3, w7)
        return d, d1, m, m1
    return unpack


@device
def unpack_f16(row_stage, row, data, at, k):
    """unpack() of float16 weights, unchanged."""
    for i in range(2):
        a, b, c, d = four_u32_at(data, at + 64 * k + 16 * i)
        e, f, g, h = four_u32_at(data, at + 64 * k + 32 + 16 * i)
        store_four_u32(row_stage, quad_offset(row, 2 * i), a, b, e, f)
        store_four_u32(row_stage, quad_offset(row, 2 * i + 1), c, d, g, h)
    return ONE, ONE, ZERO, ZERO


@device
def bf16_to_f16(pair, factor):
    """Two bfloat16 of a uint32, times a power of two, as float16."""
    a, b = two_bf16(pair)
    return np.uint32(to_half(a * factor) | to_half(b * factor) << 16)


@device
def unpack_bf16(row_stage, row, data, at, k):
    """unpack() of bfloat16 weights, scaled by a power of two to float16.

    Values below 2^-29 of the group's largest lose bits.
    """
    max_exponent = 0
    for i in range(4):
        a, b, c, d = four_u32_at(data, at + 64 * k + 16 * i)
        max_exponent = max(max_exponent, a & 0x7F80, b & 0x7F80, c & 0x7F80, d & 0x7F80)
        max_exponent = max(max_exponent, a >> 16 & 0x7F80, b >> 16 & 0x7F80, c >> 16 & 0x7F80, d >> 16 & 0x7F80)
    exponent = min(max(max_exponent >> 7, 16), 254)          # of the largest value, which becomes about 2^14
    factor, scale = bits_float(np.uint32(268 - exponent << 23)), bits_float(np.uint32(exponent - 14 << 23))
    for i in range(2):
        a, b, c, d = four_u32_at(data, at + 64 * k + 16 * i)
        e, f, g, h = four_u32_at(data, at + 64 * k + 32 + 16 * i)
        store_four_u32(row_stage, quad_offset(row, 2 * i), bf16_to_f16(a, factor), bf16_to_f16(b, factor), bf16_to_f16(e, factor),
                       bf16_to_f16(f, factor))
        store_four_u32(row_stage, quad_offset(row, 2 * i + 1), bf16_to_f16(c, factor), bf16_to_f16(d, factor), bf16_to_f16(g, factor),
                       bf16_to_f16(h, factor))
    return scale, scale, ZERO, ZERO


def _make_factors(halves, offsets):
    kinds = 2 if halves else 1

    @device
    def store_factors(factors, row, scales_and_offsets):
        """Store a row's scales and negated offsets, the result of unpack()."""
        d, d1, m, m1 = scales_and_offsets
        factors[row] = d
        if halves:
            factors[ROWS + row] = d1
        if offsets:
            factors[kinds * ROWS + row] = -m
        if offsets and halves:
            factors[3 * ROWS + row] = -m1

    @device
    def stage_sums(x_sums, sums, x_at, k, token):
        """Stage a token's sums of group k: of both halves, or of all of it."""
        i = 2 * (np.int64(x_at[token]) + k)
        y, y1 = sums[i], sums[i + 1]
        x_sums[2 * token], x_sums[2 * token + 1] = y if halves else y + y1, y1
    return store_factors, stage_sums


def _make_stage_tokens(parts):
    @device
    def stage_tokens(token_stage, packed, x_at, k, copier, n_tokens, lane):
        """Stage group k of all tokens in fragment order.

        A warp stages one tile of 16 tokens at a time.
        """
        g, c = lane >> 2, lane & 3
        for i in range(COPIES):
            tile = (copier >> 5) + i * COPY_WARPS
            if 16 * tile < n_tokens:
                from_a = (np.int64(x_at[16 * tile + g]) + k) * parts * GROUP + 4 * c
                from_b = (np.int64(x_at[16 * tile + g + 8]) + k) * parts * GROUP + 4 * c
                for plane in range(parts):
                    a0, a1, a2, a3 = load_four_u32(packed, from_a + plane * GROUP)
                    b0, b1, b2, b3 = load_four_u32(packed, from_b + plane * GROUP)
                    at = plane * PLANE + tile * 256 + 4 * lane
                    store_four_u32(token_stage, at, a0, b0, a1, b1)
                    store_four_u32(token_stage, at + 128, a2, b2, a3, b3)
    return stage_tokens


@device
def store_tiles(out, acc, order, first, x_scales, n_tokens, first_token, row, g):
    """Store a warp's accumulators times the tokens' scales.

    row: the first of a lane's rows of weights; two adjacent ones of each tile of eight.
    """
    for tile in range(TOKEN_TILES):
        for i in range(2):
            t = 16 * TOKEN_WARPS * tile + first_token + g + 8 * i
            if t < n_tokens:
                target, x_scale = order[first + t], x_scales[t]
                for j in range(8):
                    if row + 8 * (j // 2) + j % 2 < out.shape[1]:
                        out[target, row + 8 * (j // 2) + j % 2] = acc[16 * tile + 4 * (j // 2) + 2 * i + j % 2] * x_scale


def _make_add_offsets(halves):
    kinds = 2 if halves else 1

    @device
    def add_offsets(acc, at, factors, of, y, y1):
        """acc[at:at + 4] += offsets of 8 rows of weights times sums of 16 tokens."""
        m, o = load_two_f32(factors, kinds * ROWS + of)
        acc[at] = fma(m, y[0], acc[at])
        acc[at + 1] = fma(o, y[0], acc[at + 1])
        acc[at + 2] = fma(m, y1[0], acc[at + 2])
        acc[at + 3] = fma(o, y1[0], acc[at + 3])
        if halves:
            m1, o1 = load_two_f32(factors, 3 * ROWS + of)
            acc[at] = fma(m1, y[1], acc[at])
            acc[at + 1] = fma(o1, y[1], acc[at + 1])
            acc[at + 2] = fma(m1, y1[1], acc[at + 2])
            acc[at + 3] = fma(o1, y1[1], acc[at + 3])
    return add_offsets


def _make_add_tiles(half, halves, offsets, parts):
    """The function that adds products of half a group.

    Where its halves share a scale, it adds those of all of it.
    """
    second, two, whole, add_offsets = (parts - 1) * PLANE, parts == 2, not halves, _make_add_offsets(halves)
    scales_at, place, ends = half * ROWS, 128 * half, offsets and half == halves

    @device
    def add_tile(acc, at, x, x1, z, z1, b, scales):
        """acc[at:at + 4] += the product of 16 tokens and 8 rows of weights.

        x, x1: fragments of the tokens, of this half and of the other one; z, z1: their low float16, where there are two parts.
        """
        d, f = scales
        p0, p1, p2, p3 = ZERO, ZERO, ZERO, ZERO
        if two:
            p0, p1, p2, p3 = mma_f16(z[0], z[1], z[2], z[3], b[2 * half], b[2 * half + 1], p0, p1, p2, p3)
        p0, p1, p2, p3 = mma_f16(x[0], x[1], x[2], x[3], b[2 * half], b[2 * half + 1], p0, p1, p2, p3)
        if whole and two:
            p0, p1, p2, p3 = mma_f16(z1[0], z1[1], z1[2], z1[3], b[2], b[3], p0, p1, p2, p3)
        if whole:
            p0, p1, p2, p3 = mma_f16(x1[0], x1[1], x1[2], x1[3], b[2], b[3], p0, p1, p2, p3)
        acc[at] = fma(d, p0, acc[at])
        acc[at + 1] = fma(f, p1, acc[at + 1])
        acc[at + 2] = fma(d, p2, acc[at + 2])
        acc[at + 3] = fma(f, p3, acc[at + 3])

    @device
    def add_tiles(acc, b0, b1, b2, b3, factors, of, token_stage, x_sums, first_token, n_tokens, lane):
        """Multiply a warp's tokens with its 32 rows of weights."""
        d0, d1 = load_two_f32(factors, scales_at + of), load_two_f32(factors, scales_at + of + 8)
        d2, d3 = load_two_f32(factors, scales_at + of + 16), load_two_f32(factors, scales_at + of + 24)
        for tile in range(TOKEN_TILES):
            t = 16 * TOKEN_WARPS * tile + first_token
            if t < n_tokens:
                at, y_at = t * GROUP + 4 * lane + place, 2 * (t + (lane >> 2))
                x, z = load_four_u32(token_stage, at), load_four_u32(token_stage, second + at)
                x1, z1 = (load_four_u32(token_stage, at + 128), load_four_u32(token_stage, second + at + 128)) if whole else (x, z)
                add_tile(acc, 16 * tile, x, x1, z, z1, b0, d0)
                add_tile(acc, 16 * tile + 4, x, x1, z, z1, b1, d1)
                add_tile(acc, 16 * tile + 8, x, x1, z, z1, b2, d2)
                add_tile(acc, 16 * tile + 12, x, x1, z, z1, b3, d3)
                if ends:
                    y, y1 = load_two_f32(x_sums, y_at), load_two_f32(x_sums, y_at + 16)
                    for i in range(4):
                        add_offsets(acc, 16 * tile + 4 * i, factors, of + 8 * i, y, y1)
    return add_tiles


def _make_gemm(parts, name, unpack, halves=False, offsets=False, prepare=nothing):
    n_factors, n_sums, token_u32 = (4 if halves else 2) * ROWS, 2 * TOKENS if offsets else 2, parts * PLANE
    (store_factors, stage_sums), stage_tokens = _make_factors(halves, offsets), _make_stage_tokens(parts)
    add_tiles, add_others = (_make_add_tiles(half, halves, offsets, parts) for half in (0, 1))

    def gemm(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, packed, scales, sums, n_groups):
        """out[i] = a matrix times row i // x_div of x, for i in order[first:end].

        first and end are those of a tile. A block multiplies ROWS rows of weights with at most TOKENS tokens, one group of 32 values at a
        time. A warp has 32 rows and every second tile of 16 tokens.
        """
        thread = cuda.threadIdx.x & THREADS - 1
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        row_stage = cuda.shared.array(ROW_U32, np.uint32, 16)
        token_stage = cuda.shared.array(token_u32, np.uint32, 16)
        factors = cuda.shared.array(n_factors, np.float32, 16)      # scales of groups or of their halves, then negated offsets
        x_sums = cuda.shared.array(n_sums, np.float32, 16)          # sums of activations, of both halves of groups
        x_at = cuda.shared.array(TOKENS, np.int32)                  # the first group of each token's row of activations
        x_scales = cuda.shared.array(TOKENS, np.float32)
        acc = cuda.local.array(SUMS, np.float32)
        for i in range(SUMS):
            acc[i] = ZERO
        prepare(thread, THREADS)
        n_out, n_tokens, lane, c, g, warp = out.shape[1], end - first, thread & 31, thread & 3, (thread & 31) >> 2, thread >> 5
        first_row, first_token = warp // TOKEN_WARPS * 32, 16 * (warp % TOKEN_WARPS)
        for t in range(thread, TOKENS, THREADS):
            row = order[first + min(t, n_tokens - 1)] // x_div
            x_at[t], x_scales[t] = row * n_groups, scales[row]
        unpacks, copier = thread < ROWS, thread & ROWS - 1         # as many threads stage tokens as dequantize rows
        row_at = (chosen * np.int64(n_out) + min(cuda.blockIdx.x * ROWS + min(thread, ROWS - 1), n_out - 1)) * row_bytes
        cuda.syncthreads()
        for k in range(np.int32(0), np.int32(n_groups), np.int32(1)):
            if unpacks:
                store_factors(factors, thread, unpack(row_stage, thread, w, row_at, k))
            else:
                stage_tokens(token_stage, packed, x_at, k, copier, n_tokens, lane)
                if offsets and copier & ~15 < n_tokens:
                    stage_sums(x_sums, sums, x_at, k, copier)
            cuda.syncthreads()
            of, row = first_row + 2 * c, first_row + g
            b0, b1 = load_four_u32(row_stage, quad_offset(row, c)), load_four_u32(row_stage, quad_offset(row + 8, c))
            b2, b3 = load_four_u32(row_stage, quad_offset(row + 16, c)), load_four_u32(row_stage, quad_offset(row + 24, c))
            add_tiles(acc, b0, b1, b2, b3, factors, of, token_stage, x_sums, first_token, n_tokens, lane)
            if halves:      # with half as many fragments and scales in registers
                add_others(acc, b0, b1, b2, b3, factors, of, token_stage, x_sums, first_token, n_tokens, lane)
            cuda.syncthreads()
        store_tiles(out, acc, order, first, x_scales, n_tokens, first_token, cuda.blockIdx.x * ROWS + first_row + 2 * c, g)
    return kernel(GEMM_SIGNATURE, THREADS, f"gemm_{'one_' if parts == 1 else ''}{name.lower()}", blocks=2)(gemm)


KINDS = {name: (_make_unpack(entry.group), entry.halves, entry.offsets, entry.prepare) for name, entry in GROUPED.items()}
KINDS |= {"F16": (unpack_f16,), "BF16": (unpack_bf16,)}
GEMM = {(name, parts): _make_gemm(parts, name, *made) for name, made in KINDS.items() for parts in (1, 2)}


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
    GEMM[w.type, x.parts]((blocks_for(out.shape[1], ROWS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x.packed.flat,
                          x.scales, x.sums.flat, x.sums.shape[1] // 2)
