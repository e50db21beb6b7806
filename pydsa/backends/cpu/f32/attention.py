"""Flash attention in float32, for cache rows of any type.

Tiles of keys are dequantized, transposed, and pass under an online softmax; scores and values are register-blocked products.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.gemm import COLUMNS, matmul_add
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import i64_at, store
from pydsa.backends.cpu.softmax import key_at, max_end, softmax_row


TILE = 64       # keys: 144 KiB of floats at V3.2's width of 576, within a second-level cache; a multiple of COLUMNS
WIDTH = 128     # values of keys that are multiplied at a time: 32 KiB, within a first-level cache
QUERIES = 96    # heads times tokens that share a tile of keys


def attend(out, out_token, out_head, q, q_head, n_tokens, n_head, width, n_v, rows, row_bytes, dequantize, row_n, indices,
           key_start, key_ends, mask, mask_row, scale, partial):
    """Attend to keys key_start to key_ends[t] of each token t.

    out[t, h] = softmax(scale q[t, h] . key + mask) value. With indices, key s is the row indices[s].

    Addresses: out float32 [T, H, n_v] with strides out_token, out_head; q float32 [T, H, width], where q_head is the stride of all T H
    queries; rows of a cache with stride row_bytes; indices int32, or 0 for all keys; key_ends int64 [T]; mask float32 [T, n_kv] with stride
    mask_row, or 0; partial: where each query's row_max, row_sum and sum of values are written instead of out (see partial_bytes), or 0.
    Strides are in bytes. scale: the bits of a float32.
    """
    n, scale = n_tokens * n_head, float_from_bits(np.uint32(scale))
    padded = (width + COLUMNS - 1) // COLUMNS * COLUMNS
    n_sums = (n_v + COLUMNS - 1) // COLUMNS * COLUMNS
    memory = thread_scratch(4 * (2 * TILE * padded + n * TILE + n * n_sums))
    tile, transposed = floats_at(memory, TILE, padded), floats_at(memory + 4 * TILE * padded, padded, TILE)
    scores, sums = floats_at(memory + 8 * TILE * padded, n, TILE), floats_at(memory + 4 * TILE * (2 * padded + n), n, n_sums)
    sums[:] = 0
    row_max, row_sum = np.full(n, -np.inf, np.float32), np.zeros(n, np.float32)
    end = max_end(key_ends, n_tokens)
    for first in range(key_start, end, TILE):
        n_valid = min(TILE, end - first)
        for j in range(n_valid):
            call_block_function(dequantize, rows + key_at(indices, first + j) * row_bytes, row_n, address(tile[j]))
        for j in range(0, n_valid, 16):
            for k in range(0, width, 16):
                transpose(address(tile[j]) + 4 * k, 4 * padded, address(transposed[k]) + 4 * j, 4 * TILE)
        scores[:] = 0
        for k in range(0, width, WIDTH):
            block_width = min(WIDTH, width - k)
            matmul_add(address(scores), 4 * TILE, n, TILE, q + 4 * k, q_head, address(transposed[k]), 4 * TILE, block_width)
        for i in range(n):
            t = i // n_head
            bias = mask + t * mask_row + 4 * first if mask else 0
            rescale = softmax_row(scores[i], min(n_valid, i64_at(key_ends, 8 * t) - first), bias, scale, row_max[i:i + 1], row_sum[i:i + 1])
            if rescale != 1:
                row = sums[i]
                for j in range(n_sums):
                    row[j] *= rescale
        matmul_add(address(sums), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, address(tile), 4 * padded, n_valid)
    for i in range(n):
        source = sums[i]
        if partial:
            store(partial, 4 * i * (2 + n_v), row_max[i])
            store(partial, 4 * i * (2 + n_v) + 4, row_sum[i])
            row, factor = floats_at(partial + 4 * i * (2 + n_v) + 8, 1, n_v)[0], np.float32(1)
        else:
            row = floats_at(out + i // n_head * out_token + i % n_head * out_head, 1, n_v)[0]
            factor = np.float32(1) / row_sum[i] if row_sum[i] != 0 else np.float32(0)
        for j in range(n_v):
            row[j] = source[j] * factor
