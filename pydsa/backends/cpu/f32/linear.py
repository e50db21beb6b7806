"""Matrix products with unquantized weights, for any number of tokens.

Rows are dequantized to float32, a tile at a time.
"""
import numpy as np

from pydsa.backends.cpu.arrays import floats_at
from pydsa.backends.cpu.f32.gemm import tile_products
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import i64_at, store


TILE_ROWS, TILE_WIDTH = 4, 256        # a tile, 4 KiB of floats


def pack(x_at, first, n_tokens, n_in, out):
    """Copy tokens `first` to first + 16 of n_tokens to contiguous memory.

    x_at holds the addresses of rows of n_in floats.
    """
    for t in range(first, min(first + 16, n_tokens)):
        row, source = floats_at(out + 4 * n_in * t, 1, n_in)[0], floats_at(i64_at(x_at, 8 * t), 1, n_in)[0]
        for k in range(n_in):
            row[k] = source[k]


def matmul(dequantize, block, block_bytes, mins, bits, rows, n_rows, row_bytes, n_in, x, n_tokens, out_at):
    """Compute out_at[t][r] = row r . token t, for tokens packed by pack().

    out_at holds addresses. `mins` and `bits` are of other types.
    """
    memory = thread_scratch(4 * TILE_ROWS * TILE_WIDTH + 8 * n_tokens)
    tile, x_at = memory, memory + 4 * TILE_ROWS * TILE_WIDTH
    for t in range(n_tokens):
        store(x_at, 8 * t, x + 4 * n_in * t)
    for t in range(n_tokens):
        for r in range(n_rows):
            store(i64_at(out_at, 8 * t), 4 * r, np.float32(0))
    for r in range(0, n_rows, TILE_ROWS):
        n = min(TILE_ROWS, n_rows - r)
        for k in range(0, n_in, TILE_WIDTH):
            width = min(TILE_WIDTH, n_in - k)
            for i in range(n):
                source = rows + (r + i) * row_bytes + k // block * block_bytes
                call_block_function(dequantize, source, width // block, tile + 4 * TILE_WIDTH * i)
            tile_products(tile, 4 * TILE_WIDTH, n, x_at, n_tokens, 4 * k, width, out_at, 4 * r)
