"""The indexer's scores in float32, for cache rows of any type."""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.gemm import tile_products
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import float_at, store


TILE = 64           # keys dequantized at a time


def score(out, out_token, q, q_token, q_head, w, w_token, n_tokens, n_head, width, rows, row_bytes, dequantize, row_n, first, last,
          scale):
    """Score keys `first` to `last` for all tokens.

    out[t][s] = scale sum_h w[t][h] relu(q[t][h] . key s).

    Addresses: out float32, q float32 [T, H, width] and w float32 [T, H], with strides in bytes; rows of a cache with stride row_bytes, of
    which dequantize takes row_n. scale: the bits of a float32.
    """
    memory, factor = thread_scratch(4 * TILE * (width + n_head + 1) + 16 * n_head), float_from_bits(np.uint32(scale))
    tile, total, tables = memory, floats_at(memory + 4 * TILE * width, 1, TILE)[0], memory + 4 * TILE * (width + n_head + 1)
    dots = floats_at(memory + 4 * TILE * (width + 1), n_head, TILE)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        for j in range(n):
            call_block_function(dequantize, rows + (start + j) * row_bytes, row_n, tile + 4 * width * j)
        for t in range(n_tokens):
            for h in range(n_head):
                store(tables, 8 * h, q + t * q_token + h * q_head)
                store(tables, 8 * (n_head + h), address(dots) + 4 * TILE * h)
            dots[:] = 0
            tile_products(tile, 4 * width, n, tables, n_head, 0, width, tables + 8 * n_head, 0)
            total[:] = 0
            for h in range(n_head):
                weight = float_at(w, t * w_token + 4 * h)
                for j in range(n):
                    total[j] += weight * max(dots[h, j], np.float32(0))
            for j in range(n):
                store(out, t * out_token + 4 * (start + j), total[j] * factor)
