"""Attention of one head in float32, with keys and values from latents.

Keys and values are computed a tile at a time by register-blocked products.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.attention import QUERIES, TILE, WIDTH
from pydsa.backends.cpu.f32.gemm import COLUMNS, matmul_add
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.mha import LATENT_TILE
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.simd import i64_at, u16_at
from pydsa.backends.cpu.softmax import max_end, softmax_row


def tile_bytes(kv_lora, n_rot):
    """Count the bytes of LATENT_TILE latents packed by pack_latents.

    The spare cache line is for readers that load sixteen floats at once.
    """
    return 4 * LATENT_TILE * (kv_lora + n_rot) + 64


def pack_latents(rows, row_bytes, dequantize, row_n, n, kv_lora, n_rot, out):
    """Dequantize n <= LATENT_TILE latents, rows of a cache, to float32."""
    for i in range(n):
        call_block_function(dequantize, rows + i * row_bytes, row_n, out + 4 * i * (kv_lora + n_rot))


@inner
def round_up_columns(n):
    """Round n up to a multiple of COLUMNS."""
    return (n + COLUMNS - 1) // COLUMNS * COLUMNS


@inner
def matmul(a, a_stride, n_rows, b, n, out):
    """Compute out = a b, float32.

    a_stride: bytes; b and out are padded to whole columns.
    """
    out[:] = 0
    for k in range(0, n, WIDTH):        # this many rows of b stay in the first-level cache
        matmul_add(address(out), out.strides[0], n_rows, out.shape[1], a + 4 * k, a_stride, address(b[k]), b.strides[0], min(WIDTH, n - k))


@inner
def mask_unselected(row, n, selected, bit):
    """Set scores to -inf where a key's bit is not set.

    selected: two bytes for each of n keys.
    """
    for j in range(n):
        if not u16_at(selected, 2 * j) >> bit & 1:
            row[j] = -np.inf


def attend_head(out, out_token, q, q_token, n_tokens, n_nope, n_rot, n_v, kv_lora, packed, packed_tile,
                k_rows, k_row_bytes, k_dequantize, k_blocks, v_rows, v_row_bytes, v_dequantize, v_blocks, key_ends, selected,
                selected_row, scale):
    """Compute one head's attention, with keys and values from latents.

    out[t] = softmax(scale q[t] . (k_b^T latent, rotated)) (v_b latent) over the latents before key_ends[t].

    Addresses: out float32 [T, n_v] with stride out_token; q float32 [T, n_nope + n_rot] with stride q_token; tiles of latents packed by
    pack_latents, with stride packed_tile; k_b [kv_lora, n_nope] and v_b [n_v, kv_lora], rows of blocks; key_ends int64 [T]; selected: bits
    written by mha.py's mark_selected, with stride selected_row, or 0. Strides are in bytes. scale: the bits of a float32.
    """
    scale, width, latent = float_from_bits(np.uint32(scale)), n_nope + n_rot, 4 * (kv_lora + n_rot)
    n_k, n_sums, depth, batch = round_up_columns(n_nope), round_up_columns(n_v), (kv_lora + 15) // 16 * 16, min(QUERIES, n_tokens)
    sizes = (4 * depth * n_k, 4 * depth * n_sums, 4 * (n_v + 15) * depth, 4 * TILE * n_k, 4 * (n_k + width + 16) * TILE, 4 * TILE * n_sums,
             4 * batch * TILE, 4 * n_tokens * n_sums)
    at = thread_scratch(sum(sizes))
    key_weights, at = floats_at(at, depth, n_k), at + sizes[0]
    value_weights, at = floats_at(at, depth, n_sums), at + sizes[1]
    rows, at = floats_at(at, n_v + 15, depth), at + sizes[2]
    keys, at = floats_at(at, TILE, n_k), at + sizes[3]
    transposed, at = floats_at(at, n_k + width + 16, TILE), at + sizes[4]
    values, at = floats_at(at, TILE, n_sums), at + sizes[5]
    scores, at = floats_at(at, batch, TILE), at + sizes[6]
    sums = floats_at(at, n_tokens, n_sums)
    sums[:] = 0
    row_max, row_sum = np.full(n_tokens, -np.inf, np.float32), np.zeros(n_tokens, np.float32)
    key_weights[:] = 0
    for i in range(kv_lora):
        call_block_function(k_dequantize, k_rows + i * k_row_bytes, k_blocks, address(key_weights[i]))
    value_weights[:] = 0
    for i in range(n_v):
        call_block_function(v_dequantize, v_rows + i * v_row_bytes, v_blocks, address(rows[i]))
    for i in range(0, n_v, 16):
        for k in range(0, kv_lora, 16):
            transpose(address(rows[i]) + 4 * k, 4 * depth, address(value_weights[k]) + 4 * i, 4 * n_sums)
    end = max_end(key_ends, n_tokens)
    for first in range(0, end, TILE):
        n_valid, source = min(TILE, end - first), packed + first // LATENT_TILE * packed_tile + first % LATENT_TILE * latent
        matmul(source, latent, n_valid, key_weights, kv_lora, keys)
        matmul(source, latent, n_valid, value_weights, kv_lora, values)
        for j in range(0, n_valid, 16):
            for k in range(0, n_nope, 16):
                transpose(address(keys[j]) + 4 * k, 4 * n_k, address(transposed[k]) + 4 * j, 4 * TILE)
        for j in range(0, n_valid, 16):
            for k in range(0, n_rot, 16):
                transpose(source + j * latent + 4 * (kv_lora + k), latent, address(transposed[n_nope + k]) + 4 * j, 4 * TILE)
        for t in range(0, n_tokens, batch):
            n = min(batch, n_tokens - t)
            if max_end(key_ends + 8 * t, n) <= first:
                continue
            matmul(q + t * q_token, q_token, n, transposed, width, scores)
            for i in range(n):
                if selected:
                    mask_unselected(scores[i], n_valid, selected + (t + i) // 16 * selected_row + 2 * first, (t + i) % 16)
                rescale = softmax_row(scores[i], min(n_valid, i64_at(key_ends, 8 * (t + i)) - first), 0, scale, row_max[t + i:t + i + 1],
                                      row_sum[t + i:t + i + 1])
                if rescale != 1:
                    row = sums[t + i]
                    for k in range(n_sums):
                        row[k] *= rescale
            matmul_add(address(sums[t]), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, address(values), 4 * n_sums, n_valid)
    for t in range(n_tokens):
        source, row = sums[t], floats_at(out + t * out_token, 1, n_v)[0]
        factor = np.float32(1) / row_sum[t] if row_sum[t] != 0 else np.float32(0)
        for k in range(n_v):
            row[k] = source[k] * factor
