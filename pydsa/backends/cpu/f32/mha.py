"""A head's own attention in float32: its keys and values are made from latents, a tile at a time, by register-blocked products."""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.attention import QUERIES, TILE, WIDTH
from pydsa.backends.cpu.f32.gemm import COLUMNS, combine
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.mha import LATENT_TILE
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import i64_at, u16_at
from pydsa.backends.cpu.softmax import last_of, softmax_row


def tile_bytes(kv_lora, n_rot):
    """What LATENT_TILE latents take as pack_latents leaves them; the spare line is for those who read sixteen floats at once."""
    return 4 * LATENT_TILE * (kv_lora + n_rot) + 64


def pack_latents(rows, row_bytes, dequantize, row_n, n, kv_lora, n_rot, out):
    """n <= LATENT_TILE latents, rows of a cache at an address, as float32."""
    for i in range(n):
        call_block_function(dequantize, rows + i * row_bytes, row_n, out + 4 * i * (kv_lora + n_rot))


@inner
def whole_columns(n):
    return (n + COLUMNS - 1) // COLUMNS * COLUMNS


@inner
def products(a, a_stride, n_rows, b, n, out):
    """out = a b, float32; the rows of a lie so many bytes apart, b and out have whole columns."""
    out[:] = 0
    for k in range(0, n, WIDTH):        # of b so many rows stay in the first-level cache
        combine(address(out), out.strides[0], n_rows, out.shape[1], a + 4 * k, a_stride, address(b[k]), b.strides[0], min(WIDTH, n - k))


@inner
def mask_unchosen(row, n, chosen, bit):
    """Scores of n keys become -inf where the bit of a key's two bytes is not set."""
    for j in range(n):
        if not u16_at(chosen, 2 * j) >> bit & 1:
            row[j] = -np.inf


def attend_head(out, out_token, q, q_token, n_tokens, n_nope, n_rot, n_v, kv_lora, packed, packed_tile,
                k_rows, k_row_bytes, k_dequantize, k_blocks, v_rows, v_row_bytes, v_dequantize, v_blocks, last_key, chosen,
                chosen_row, scale):
    """out[t] = softmax(scale q[t] . (k_b^T latent, rotated)) (v_b latent) over the latents before last_key[t].

    Addresses: out float32 [T, n_v] and q float32 [T, n_nope + n_rot], rows so many bytes apart; tiles of latents as pack_latents
    leaves them, packed_tile bytes apart; k_b [kv_lora, n_nope] and v_b [n_v, kv_lora], rows of blocks; last_key int64 [T]; chosen, as
    mha.py's mark_chosen leaves it, rows chosen_row bytes apart, or 0. scale: a float32's bits.
    """
    scale, width, latent = float_from_bits(np.uint32(scale)), n_nope + n_rot, 4 * (kv_lora + n_rot)
    n_k, n_sums, depth, together = whole_columns(n_nope), whole_columns(n_v), (kv_lora + 15) // 16 * 16, min(QUERIES, n_tokens)
    sizes = (4 * depth * n_k, 4 * depth * n_sums, 4 * (n_v + 15) * depth, 4 * TILE * n_k, 4 * (n_k + width + 16) * TILE, 4 * TILE * n_sums,
             4 * together * TILE, 4 * n_tokens * n_sums)
    at = own_scratch(sum(sizes))
    key_weights, at = floats_at(at, depth, n_k), at + sizes[0]
    value_weights, at = floats_at(at, depth, n_sums), at + sizes[1]
    rows, at = floats_at(at, n_v + 15, depth), at + sizes[2]
    keys, at = floats_at(at, TILE, n_k), at + sizes[3]
    transposed, at = floats_at(at, n_k + width + 16, TILE), at + sizes[4]
    values, at = floats_at(at, TILE, n_sums), at + sizes[5]
    scores, at = floats_at(at, together, TILE), at + sizes[6]
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
    most = last_of(last_key, n_tokens)
    for first in range(0, most, TILE):
        there, source = min(TILE, most - first), packed + first // LATENT_TILE * packed_tile + first % LATENT_TILE * latent
        products(source, latent, there, key_weights, kv_lora, keys)
        products(source, latent, there, value_weights, kv_lora, values)
        for j in range(0, there, 16):
            for k in range(0, n_nope, 16):
                transpose(address(keys[j]) + 4 * k, 4 * n_k, address(transposed[k]) + 4 * j, 4 * TILE)
        for j in range(0, there, 16):
            for k in range(0, n_rot, 16):
                transpose(source + j * latent + 4 * (kv_lora + k), latent, address(transposed[n_nope + k]) + 4 * j, 4 * TILE)
        for t in range(0, n_tokens, together):
            n = min(together, n_tokens - t)
            if last_of(last_key + 8 * t, n) <= first:
                continue
            products(q + t * q_token, q_token, n, transposed, width, scores)
            for i in range(n):
                if chosen:
                    mask_unchosen(scores[i], there, chosen + (t + i) // 16 * chosen_row + 2 * first, (t + i) % 16)
                rescale = softmax_row(scores[i], min(there, i64_at(last_key, 8 * (t + i)) - first), 0, scale, row_max[t + i:t + i + 1],
                                      row_sum[t + i:t + i + 1])
                if rescale != 1:
                    row = sums[t + i]
                    for k in range(n_sums):
                        row[k] *= rescale
            combine(address(sums[t]), 4 * n_sums, n, n_sums, address(scores), 4 * TILE, address(values), 4 * n_sums, there)
    for t in range(n_tokens):
        source, row = sums[t], floats_at(out + t * out_token, 1, n_v)[0]
        factor = np.float32(1) / row_sum[t] if row_sum[t] != 0 else np.float32(0)
        for k in range(n_v):
            row[k] = source[k] * factor
