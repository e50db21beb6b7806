"""Attention in float32: keys pass in tiles, turned over, under an online softmax; register-blocked products for scores and values."""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.gemm import COLUMNS, combine
from pydsa.backends.cpu.jit import call_block_function
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import i64_at, store
from pydsa.backends.cpu.softmax import key_at, last_of, softmax_row


TILE = 64       # keys: 144 KiB of floats at V3.2's width of 576, within a second-level cache; a multiple of COLUMNS
WIDTH = 128     # of the keys' values that are multiplied at a time: 32 KiB, within a first-level cache
QUERIES = 96    # heads times tokens that share a tile


def attend(out, out_token, out_head, q, q_head, n_tokens, n_head, width, n_v, rows, row_bytes, dequantize, row_n, indices,
           first_key, last_key, mask, mask_row, scale, part):
    """out[t, h] = softmax(scale q[t, h] . key + mask) value over the keys from first_key to last_key[t], or those that indices have there.

    Addresses: out float32 [T, H, n_v], of which tokens and heads lie so many bytes apart; q float32 [T, H, width], in whose memory one head
    follows the other at one distance; rows of a cache; indices int32, 0 for all keys; last_key int64 [T]; mask float32 [T, n_kv]
    or 0; part: where each query leaves its greatest score, its sum of weights and of values instead, or 0. scale: a float32's bits.
    """
    n, scale = n_tokens * n_head, float_from_bits(np.uint32(scale))
    padded = (width + COLUMNS - 1) // COLUMNS * COLUMNS
    n_sums = (n_v + COLUMNS - 1) // COLUMNS * COLUMNS
    memory = own_scratch(4 * (2 * TILE * padded + n * TILE + n * n_sums))
    tile, transposed = floats_at(memory, TILE, padded), floats_at(memory + 4 * TILE * padded, padded, TILE)
    scores, sums = floats_at(memory + 8 * TILE * padded, n, TILE), floats_at(memory + 4 * TILE * (2 * padded + n), n, n_sums)
    sums[:] = 0
    row_max, row_sum = np.full(n, -np.inf, np.float32), np.zeros(n, np.float32)
    most = last_of(last_key, n_tokens)
    for first in range(first_key, most, TILE):
        there = min(TILE, most - first)
        for j in range(there):
            call_block_function(dequantize, rows + key_at(indices, first + j) * row_bytes, row_n, address(tile[j]))
        for j in range(0, there, 16):
            for k in range(0, width, 16):
                transpose(address(tile[j]) + 4 * k, 4 * padded, address(transposed[k]) + 4 * j, 4 * TILE)
        scores[:] = 0
        for k in range(0, width, WIDTH):
            some = min(WIDTH, width - k)
            combine(address(scores), 4 * TILE, n, TILE, q + 4 * k, q_head, address(transposed[k]), 4 * TILE, some)
        for i in range(n):
            t = i // n_head
            bias = mask + t * mask_row + 4 * first if mask else 0
            rescale = softmax_row(scores[i], min(there, i64_at(last_key, 8 * t) - first), bias, scale, row_max[i:i + 1], row_sum[i:i + 1])
            if rescale != 1:
                row = sums[i]
                for j in range(n_sums):
                    row[j] *= rescale
        combine(address(sums), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, address(tile), 4 * padded, there)
    for i in range(n):
        source = sums[i]
        if part:
            store(part, 4 * i * (2 + n_v), row_max[i])
            store(part, 4 * i * (2 + n_v) + 4, row_sum[i])
            row, factor = floats_at(part + 4 * i * (2 + n_v) + 8, 1, n_v)[0], np.float32(1)
        else:
            row = floats_at(out + i // n_head * out_token + i % n_head * out_head, 1, n_v)[0]
            factor = np.float32(1) / row_sum[i] if row_sum[i] != 0 else np.float32(0)
        for j in range(n_v):
            row[j] = source[j] * factor
