"""The indexer's scores over int8 keys in tensor cores.

Keys are multiplied as stored (cpu/integer_rows.py), with int16 queries. A head's query is quantized to at most 32,512 and split into int8
pairs: x = scale (256 high + low), both bytes signed. The query's scale becomes part of the head's weight; a key's scale multiplies the sum
over heads. All int8 dot products are exact.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2.linear import head_scale, pack_head_four
from pydsa.backends.cuda.intrinsics.device import (MMA_WARP, SIMULATED, WARP, bits_float, device, load_four_u32, mma_s8, store_four_u32,
                                                   sync, u32_at)
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, kernel


WIDTH = 128                             # the most values of a key, which stays in registers
STEPS = WIDTH // 32                     # of 32 values, the K of one instruction
WARPS = 1 if SIMULATED else 8           # of a block
THREADS = MMA_WARP * WARPS
WARP_KEYS = 32                          # keys of a warp: two tiles of sixteen
KEYS = WARP_KEYS * WARPS
HEAD_TILES = 1 if SIMULATED else 8      # tiles of eight heads whose queries are staged in shared memory at a time
TILE_U32 = 8 * WIDTH // 2               # uint32 of a tile's queries, high and low bytes, in fragment order
QUERY_U32, HEADS = HEAD_TILES * TILE_U32, 8 * HEAD_TILES
KEY_U32, STEP_U32, SUMS = 8 * STEPS, 4 * STEPS, 4 * KEYS
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


def takes(keys):
    """Whether this file's kernels can score these keys."""
    return keys.storage == "i8" and keys.first <= WIDTH and keys.first % 4 == 0


@device
def pack_query(queries, weights, q, w, t, h, lane):
    """Quantize one head's query, by one warp, into fragments of mma.m16n8k32.

    queries: [tile, step, lane, part]; the four parts are the two uint32 of a lane's B fragment, high bytes, then low bytes. Heads are
    zero-padded to a multiple of eight, values to WIDTH. A query with a non-finite value gets a NaN weight.
    """
    n_head, width = q.shape[1], q.shape[2]
    factor, scale = head_scale(q, t, h, 0, width if h < n_head else 0, lane)
    if lane == 0:
        weights[t, h] = w[t, h] * scale if h < n_head else ZERO
    for four in range(lane, WIDTH // 4, WARP):
        i = 4 * four
        at = h // 8 * TILE_U32 + four // 8 * 128 + (h % 8 * 4 + four % 4) * 4 + four % 8 // 4
        queries[t, at], queries[t, at + 2] = pack_head_four(q, t, h, i, factor, h < n_head and i < width)


@kernel("u4[:,:], f4[:,:], f4[:,:,:], f4[:,:]", WARP)
def pack_queries(queries, weights, q, w):
    """Pack queries. One head of one token per block, which is one warp."""
    pack_query(queries, weights, q, w, cuda.blockIdx.y, cuda.blockIdx.x, cuda.threadIdx.x)


def scratch_for_queries(q):
    """Scratch memory for packed queries, the operand of score().

    Queries [T, 64 heads] of uint32 and weights [T, heads], with the heads padded to a multiple of eight.
    """
    n_heads = 8 * blocks_for(q.shape[1], 8)
    return (scratch("queries", (len(q), n_heads * WIDTH // 2), np.uint32), scratch("weights of heads", (len(q), n_heads), np.float32))


def pack(q, w):
    """Pack queries and head weights for score()."""
    queries = scratch_for_queries(q)
    pack_queries((queries[1].shape[1], len(q)), *queries, q, w)
    return queries


@device
def load_keys(key, data, row_bytes, base, n, n_u32, lane, column):
    """Load a warp's 32 keys into A fragments, zero-padded to WIDTH."""
    for i in range(4):          # rows 0 and 8 of the first 16 keys, then of the others
        at = min(base + 8 * i + (lane >> 2), n - 1) * row_bytes + 4 * column
        if n_u32 == WIDTH // 4:
            for slot in range(2 * STEPS):
                key[2 * STEPS * i + slot] = u32_at(data, at + 16 * slot)
        else:
            for slot in range(2 * STEPS):
                key[2 * STEPS * i + slot] = u32_at(data, at + 16 * slot) if 4 * slot + column < n_u32 else np.uint32(0)


@device
def multiply_tile(key, b):
    """Products of a warp's 32 keys with eight heads: a lane's eight of them.

    Both are zero-padded to WIDTH.
    """
    p0, p1, p2, p3 = 0, 0, 0, 0
    r0, r1, r2, r3 = 0, 0, 0, 0
    for part in range(2):       # high bytes, then low ones
        p0, p1, p2, p3, r0, r1, r2, r3 = p0 << 8, p1 << 8, p2 << 8, p3 << 8, r0 << 8, r1 << 8, r2 << 8, r3 << 8
        for step in range(STEPS):
            k, i = 2 * step, 4 * step + 2 * part
            p0, p1, p2, p3 = mma_s8(key[k], key[2 * STEPS + k], key[k + 1], key[2 * STEPS + k + 1], b[i], b[i + 1], p0, p1, p2, p3)
            r0, r1, r2, r3 = mma_s8(key[4 * STEPS + k], key[6 * STEPS + k], key[4 * STEPS + k + 1], key[6 * STEPS + k + 1],
                                    b[i], b[i + 1], r0, r1, r2, r3)
    return p0, p1, p2, p3, r0, r1, r2, r3


@device
def weighted_relu(w0, p0, w1, p1):
    """w0 relu(p0) + w1 relu(p1)."""
    return w0 * max(np.float32(np.int32(p0)), ZERO) + w1 * max(np.float32(np.int32(p1)), ZERO)


def make_score(warps, head_tiles):
    """The function by which blocks of so many warps score keys.

    head_tiles: of eight heads, whose queries are in shared memory at a time: `panel` and `head_weights`. sums: four float32 a thread.
    """
    threads, queries_u32 = MMA_WARP * warps, head_tiles * TILE_U32
    bits = threads.bit_length() - 1     # a thread has a key

    @device
    def stage_queries(panel, head_weights, queries, weights, token, first, n_staged, thread):
        """Stage the queries and weights of head tiles first to first + n_staged."""
        sync()
        source = queries[token]
        for j in range(queries_u32 // (4 * threads)):
            i = 4 * (j * threads + thread)
            if i < n_staged * TILE_U32:
                a, b, c, d = load_four_u32(source, first * TILE_U32 + i)
                store_four_u32(panel, i, a, b, c, d)
        for i in range(thread, 8 * n_staged, threads):
            head_weights[i] = weights[token, 8 * first + i]
        sync()

    @device
    def score_keys(out, queries, weights, data, row_bytes, width, positions, start, scale, fill, row, block, n_blocks, panel, head_weights,
                   sums, thread):
        """Scores of tiles block, block + n_blocks, ... of keys: see score_int8x2."""
        key = cuda.local.array(KEY_U32, np.uint32)
        b = cuda.local.array(STEP_U32, np.uint32)
        warp, lane, column = thread >> 5, thread & 31, thread & 3
        token, n_u32 = start + row, width >> 2
        n, n_tiles, staged = min(positions[token] + 1, out.shape[1]), weights.shape[1] >> 3, -1
        for tile in range(block, (out.shape[1] + threads - 1 if fill else n + threads - 1) >> bits, n_blocks):
            base, s = tile << bits, (tile << bits) + thread
            if base < n:
                load_keys(key, data, row_bytes, base + (warp << 5), n, n_u32, lane, column)
                t0, t1, t2, t3 = ZERO, ZERO, ZERO, ZERO
                for first in range(0, n_tiles, head_tiles):
                    n_staged = min(head_tiles, n_tiles - first)
                    if staged != first:
                        stage_queries(panel, head_weights, queries, weights, token, first, n_staged, thread)
                        staged = first
                    for j in range(n_staged):
                        w0, w1 = head_weights[8 * j + 2 * column], head_weights[8 * j + 2 * column + 1]
                        for i in range(STEPS):
                            b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3] = load_four_u32(panel, j * TILE_U32 + 128 * i + 4 * lane)
                        p0, p1, p2, p3, r0, r1, r2, r3 = multiply_tile(key, b)
                        t0 += weighted_relu(w0, p0, w1, p1)
                        t1 += weighted_relu(w0, p2, w1, p3)
                        t2 += weighted_relu(w0, r0, w1, r1)
                        t3 += weighted_relu(w0, r2, w1, r3)
                at = (warp << 7) + lane         # 32 keys, four partial sums each
                sums[at], sums[at + 32], sums[at + 64], sums[at + 96] = t0, t1, t2, t3
                sync()
                if s < n:
                    total = sums[4 * thread] + sums[4 * thread + 1] + sums[4 * thread + 2] + sums[4 * thread + 3]
                    out[row, s] = total * (bits_float(u32_at(data, s * row_bytes + width)) * scale)
                sync()
            if fill and n <= s < out.shape[1]:
                out[row, s] = MINUS_INFINITY
    return score_keys


score_keys = make_score(WARPS, HEAD_TILES)


@kernel("f4[:,:], u4[:,::1], f4[:,:], u1[::1], i8, i4, i8[:], i4, f4, b1", THREADS)
def score_int8x2(out, queries, weights, data, row_bytes, width, positions, start, scale, fill):
    """out[t, s] as in f32/indexer.py, by mma.m16n8k32.

    One token per block in y; blocks walk tiles of KEYS keys with a grid stride. A warp has 32 keys, which stay in registers. The
    instruction multiplies 16 keys x 32 values with 32 values x 8 heads. A lane accumulates a quarter of the heads for four keys; four
    lanes are added for each key.
    """
    panel = cuda.shared.array(QUERY_U32, np.uint32, 16)
    head_weights = cuda.shared.array(HEADS, np.float32)
    sums = cuda.shared.array(SUMS, np.float32)
    score_keys(out, queries, weights, data, row_bytes, width, positions, start, scale, fill, cuda.blockIdx.y & 0xFFFF, cuda.blockIdx.x,
               cuda.gridDim.x, panel, head_weights, sums, cuda.threadIdx.x & THREADS - 1)


def score(out, queries, keys, positions, start, scale, fill):
    """Scores of tokens start, start + 1, ..., one per row of `out`.

    queries: the result of pack() for all tokens.
    """
    grid = min(blocks_for(out.shape[1], KEYS), blocks_for(BLOCKS, len(out))), len(out)
    score_int8x2(grid, out, *queries, keys.data.flat, keys.data.shape[1], keys.first, positions, start, scale, fill)
