"""Rows of weights times rows of activations, for one token, for many, and for unquantized weights."""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks import FLOATS, FOURS
from pydsa.backends.cuda.block_sums import block_sum
from pydsa.backends.cuda.device import SIMULATED, WARP, warp_sum
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.many_tokens import MANY, ROWS, halved
from pydsa.backends.cuda.one_token import multiply_one, rounded

WARPS = 4           # of a block
ONE_THREADS = 8 if SIMULATED else 256   # for one token's product with a row of them
FLOAT_TOKENS = 4                        # that a warp multiplies with a row of unquantized weights


def _make_floats(name):
    value_at = FLOATS[name]

    def of_floats(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, x):
        """The same with unquantized weights and activations as they are; a warp multiplies one row with four tokens."""
        lane, row = cuda.threadIdx.x % WARP, cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        at = (chosen * np.int64(out.shape[1]) + min(row, out.shape[1] - 1)) * row_bytes
        for t in range(first, end, FLOAT_TOKENS):
            t0, t1, t2, t3 = (order[t] // x_div, order[min(t + 1, end - 1)] // x_div, order[min(t + 2, end - 1)] // x_div,
                              order[min(t + 3, end - 1)] // x_div)
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(lane, x.shape[1], WARP):
                value = value_at(w, at, i)
                s0 += value * x[t0, i]
                s1 += value * x[t1, i]
                s2 += value * x[t2, i]
                s3 += value * x[t3, i]
            s0, s1, s2, s3 = warp_sum(s0), warp_sum(s1), warp_sum(s2), warp_sum(s3)
            if lane == 0 and row < out.shape[1]:
                out[order[t], row] = s0
                if t + 1 < end:
                    out[order[t + 1], row] = s1
                if t + 2 < end:
                    out[order[t + 2], row] = s2
                if t + 3 < end:
                    out[order[t + 3], row] = s3
    signature = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, f4[:,:]"
    return kernel(signature, WARPS * WARP, f"floats_{name.lower()}")(of_floats)


def _make_one(name):
    four = FOURS[name]

    def one_of_floats(out, w, row_bytes, ids, x_div, x):
        """out[y] = matrix ids[y] of unquantized weights times the y // x_div-th row of activations; a block makes one number."""
        thread, row, y, n = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y, x.shape[1]
        parts, at, total = cuda.shared.array(32, np.float32), (ids[y] * np.int64(out.shape[1]) + row) * row_bytes, np.float32(0)
        for i in range(4 * thread, n, 4 * ONE_THREADS):
            a, b, c, e = four(w, at, i)
            total += (a * x[y // x_div, i] + b * x[y // x_div, i + 1]) + (c * x[y // x_div, i + 2] + e * x[y // x_div, i + 3])
        total = block_sum(total, parts, thread, ONE_THREADS)
        if thread == 0:
            out[y, row] = total
    return kernel("f4[:,:], u1[::1], i8, i4[:], i4, f4[:,:]", ONE_THREADS, f"one_{name.lower()}")(one_of_floats)


OF_FLOATS = {name: _make_floats(name) for name in FLOATS}
ONE_OF_FLOATS = {name: _make_one(name) for name in FLOATS}


class Tiles(NamedTuple):
    """Which rows of activations meet which matrix: int32 arrays of tiles (a matrix or -1, where its rows begin and end in `order`)."""
    matrix: object
    first: object
    end: object
    order: object
    x_div: int      # a row of activations serves so many rows of `order`, one after the other
    single: bool    # each tile has one row, and `order` is 0, 1, 2, ...: one token


def prepared(w, x, single):
    """Activations, a view of any strides, as rows that meet w, of one token or of many; float32 weights meet them as they are."""
    return x.rows if as_floats(w, single) else rounded(x.rows) if single else halved(x.rows)


def as_floats(w, single):
    """Whether activations stay float32: beside float32 weights, any unquantized ones for one token, and rows that groups do not divide."""
    return w.type in FLOATS and (single or w.type == "F32" or w.shape[-1] % 32 != 0)


def multiply(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of what prepared(w, ...) gave, for all tiles; out is a view of any strides."""
    out = out.rows
    if w.type in FLOATS and tiles.single and x.shape[1] % 4 == 0:
        ONE_OF_FLOATS[w.type]((out.shape[1], tiles.matrix.size), out, w.data, w.row_bytes, tiles.matrix, tiles.x_div, x)
    elif as_floats(w, tiles.single):
        OF_FLOATS[w.type]((blocks_for(out.shape[1], WARPS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x)
    elif tiles.single:
        multiply_one([out], [w], x, tiles)
    else:
        MANY[w.type]((blocks_for(out.shape[1], ROWS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x.words.flat, x.scales,
                     x.sums.flat, x.sums.shape[1] // 2)
