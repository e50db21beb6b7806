"""float32 products with unquantized weights: gemv, and gemm of four tokens."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.block_sums import block_sum
from pydsa.backends.cuda.blocks.floats import FLOATS, FOURS
from pydsa.backends.cuda.device import SIMULATED, WARP, warp_sum
from pydsa.backends.cuda.launch import blocks_for, kernel


WARPS = 4                                   # of a gemm block
GEMV_THREADS = 8 if SIMULATED else 256      # of a gemv block, which has one row of weights
GEMM_TOKENS = 4                             # tokens that a warp multiplies with a row of weights at a time


def _make_gemm(name):
    value_at = FLOATS[name]

    def gemm(out, w, row_bytes, tile_matrix, tile_first, tile_end, order, x_div, x):
        """out[i] = a matrix times row i // x_div of x, for i in order[first:end].

        first and end are those of a tile. A warp multiplies one row of weights with four tokens at a time.
        """
        lane, row = cuda.threadIdx.x % WARP, cuda.blockIdx.x * WARPS + cuda.threadIdx.x // WARP
        chosen = tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, end = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y]
        at = (chosen * np.int64(out.shape[1]) + min(row, out.shape[1] - 1)) * row_bytes
        for t in range(first, end, GEMM_TOKENS):
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
    return kernel(signature, WARPS * WARP, f"f32_gemm_{name.lower()}")(gemm)


def _make_gemv(name):
    four = FOURS[name]

    def gemv(out, w, row_bytes, ids, x_div, x):
        """out[y] = matrix ids[y] times row y // x_div of x. One value per block."""
        thread, row, y, n = cuda.threadIdx.x, cuda.blockIdx.x, cuda.blockIdx.y, x.shape[1]
        parts, at, total = cuda.shared.array(32, np.float32), (ids[y] * np.int64(out.shape[1]) + row) * row_bytes, np.float32(0)
        for i in range(4 * thread, n, 4 * GEMV_THREADS):
            a, b, c, e = four(w, at, i)
            total += (a * x[y // x_div, i] + b * x[y // x_div, i + 1]) + (c * x[y // x_div, i + 2] + e * x[y // x_div, i + 3])
        total = block_sum(total, parts, thread, GEMV_THREADS)
        if thread == 0:
            out[y, row] = total
    return kernel("f4[:,:], u1[::1], i8, i4[:], i4, f4[:,:]", GEMV_THREADS, f"gemv_{name.lower()}")(gemv)


GEMM = {name: _make_gemm(name) for name in FLOATS}
GEMV = {name: _make_gemv(name) for name in FLOATS}


def takes(w, single):
    """Whether activations stay float32.

    They do with float32 weights, with any unquantized weights for one token, and with rows that are not a multiple of 32.
    """
    return w.type in FLOATS and (single or w.type == "F32" or w.shape[-1] % 32 != 0)


def pack(x):
    """Activations unchanged."""
    return x


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
    if tiles.single and x.shape[1] % 4 == 0:
        GEMV[w.type]((out.shape[1], tiles.matrix.size), out, w.data, w.row_bytes, tiles.matrix, tiles.x_div, x)
    else:
        GEMM[w.type]((blocks_for(out.shape[1], WARPS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x)
