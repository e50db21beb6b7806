"""float32 products with unquantized weights: gemv, and gemm of four tokens."""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.blocks.floats import FLOATS, UNITS
from pydsa.backends.cuda.intrinsics.block_sums import block_sum
from pydsa.backends.cuda.intrinsics.device import SIMULATED, WARP, device, sum_of_lanes, warp_sum
from pydsa.backends.cuda.intrinsics.instructions import stream_sixteen
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel
from pydsa.quants import TYPES


WARPS = 4                                   # of a gemm block
GEMV_THREADS = 8 if SIMULATED else 256      # of a gemv block, all for the same rows of weights where these are long
LOG_THREADS = GEMV_THREADS.bit_length() - 1
GEMV_LANES = 4 if SIMULATED else 16         # threads that share short rows, at most
GEMV_ROWS = 2                               # rows that a thread multiplies with the same activations
GEMV_PARTS = 32                             # float32 for the sums of warps
ZERO = np.float32(0)
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


@device
def four_of_row(x, row, i):
    """Four values of a row from i on. Unsigned indices never count from the end."""
    return x[row, i], x[row, np.uint32(i + 1)], x[row, np.uint32(i + 2)], x[row, np.uint32(i + 3)]


@device
def eight_of_row(x, row, i):
    """four_of_row of eight values."""
    a, b, c, d = four_of_row(x, row, i)
    e, f, g, h = four_of_row(x, row, np.uint32(i + 4))
    return a, b, c, d, e, f, g, h


def _make_gemv(name):
    unit, n = UNITS[name], 16 // TYPES[name].n_bytes
    values_of = eight_of_row if n == 8 else four_of_row

    def gemv(out, w, row_bytes, ids, x_div, shift, x):
        """out[y] = matrix ids[y] times row y // x_div of x.

        2^shift threads have GEMV_ROWS rows of weights, of which each takes 16 bytes at a time. Adjacent blocks have the same rows: where
        several y have the same matrix, memory is read once.
        """
        block, n_y, thread, n_out = np.uint32(cuda.blockIdx.x), np.uint32(ids.shape[0]), cuda.threadIdx.x & GEMV_THREADS - 1, out.shape[1]
        y = np.int64(block % n_y)
        row = ((np.int64(block // n_y) << LOG_THREADS - shift) + (thread >> shift)) * GEMV_ROWS
        x_row, base = np.uint32(y // x_div), ids[y] * np.int64(n_out)
        r0, r1, s0, s1 = (base + min(row, n_out - 1)) * row_bytes, (base + min(row + 1, n_out - 1)) * row_bytes, ZERO, ZERO
        parts = cuda.shared.array(GEMV_PARTS, np.float32)
        for u in range(np.int32(thread & (1 << shift) - 1), np.int32(row_bytes >> 4), np.int32(1 << shift)):
            values = values_of(x, x_row, np.uint32(n * u))
            a, b = stream_sixteen(w, r0 + 16 * u), stream_sixteen(w, r1 + 16 * u)
            s0 += unit(a, values)
            s1 += unit(b, values)
        if shift < LOG_THREADS:
            s0, s1 = sum_of_lanes(s0, 1 << shift), sum_of_lanes(s1, 1 << shift)
        else:
            s0, s1 = block_sum(s0, parts, thread, GEMV_THREADS), block_sum(s1, parts, thread, GEMV_THREADS)
        if thread & (1 << shift) - 1 == 0:
            if row < n_out:
                out[y, row] = s0
            if row + 1 < n_out:
                out[y, row + 1] = s1
    return kernel("f4[:,:], u1[::1], i8, i4[:], i4, i4, f4[:,:]", GEMV_THREADS, f"gemv_{name.lower()}")(gemv)


GEMM = {name: _make_gemm(name) for name in FLOATS}
GEMV = {name: _make_gemv(name) for name in FLOATS}


def takes(w, single):
    """Whether activations stay float32.

    They do with float32 weights, with any unquantized weights for one token or a few, and with rows that are not a multiple of 32.
    """
    return w.type in FLOATS and (single or w.type == "F32" or w.shape[-1] % 32 != 0)


def pack(x):
    """Activations unchanged."""
    return x


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
    if tiles.single and w.row_bytes % 16 == 0:
        n_units = w.row_bytes // 16
        shift = (min(GEMV_LANES, n_units) - 1).bit_length() if n_units <= 4 * GEMV_LANES else LOG_THREADS
        n_blocks = blocks_for(out.shape[1], GEMV_ROWS << LOG_THREADS - shift)
        GEMV[w.type](n_blocks * tiles.matrix.size, out, w.data, w.row_bytes, tiles.matrix, tiles.x_div, shift, x)
    else:
        GEMM[w.type]((blocks_for(out.shape[1], WARPS), tiles.matrix.size), out, w.data, w.row_bytes, *tiles[:-1], x)
