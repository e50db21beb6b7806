"""Attention of one head in float32, with keys and values from latents.

Keys and values are computed a tile at a time by register-blocked products.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, floats_at
from pydsa.backends.cpu.f32.attention import QUERIES, TILE, WIDTH
from pydsa.backends.cpu.f32.gemm import COLUMNS, matmul_add
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.jobs import read_head_job
from pydsa.backends.cpu.mha import LATENT_TILE
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.softmax import max_end, softmax_row
from pydsa.backends.cpu.vectors.lanes import transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import i64_at, u16_at


def tile_bytes(kv_lora, n_rot):
    """Count the bytes of LATENT_TILE latents packed by pack_latents.

    The spare cache line is for readers that load sixteen floats at once.
    """
    return 4 * LATENT_TILE * (kv_lora + n_rot) + 64


def pack_latents(rows, row_bytes, dequantize, row_n, n, kv_lora, n_rot, out, thread):
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


def attend_head(job_at):
    """Run a HeadJob: attention of one head."""
    job = read_head_job(job_at)
    n_tokens, width, latent = job.n_tokens, job.n_nope + job.n_rot, 4 * (job.kv_lora + job.n_rot)
    n_k, n_sums, depth = round_up_columns(job.n_nope), round_up_columns(job.n_v), (job.kv_lora + 15) // 16 * 16
    batch = min(QUERIES, n_tokens)
    sizes = (4 * depth * n_k, 4 * depth * n_sums, 4 * (job.n_v + 15) * depth, 4 * TILE * n_k, 4 * (n_k + width + 16) * TILE,
             4 * TILE * n_sums, 4 * batch * TILE, 4 * n_tokens * n_sums, 8 * n_tokens)
    at = thread_scratch(job.thread, sum(sizes))
    key_weights, at = floats_at(at, depth, n_k), at + sizes[0]
    value_weights, at = floats_at(at, depth, n_sums), at + sizes[1]
    rows, at = floats_at(at, job.n_v + 15, depth), at + sizes[2]
    keys, at = floats_at(at, TILE, n_k), at + sizes[3]
    transposed, at = floats_at(at, n_k + width + 16, TILE), at + sizes[4]
    values, at = floats_at(at, TILE, n_sums), at + sizes[5]
    scores, at = floats_at(at, batch, TILE), at + sizes[6]
    sums, at = floats_at(at, n_tokens, n_sums), at + sizes[7]
    sums[:] = 0
    row_max, row_sum = floats_at(at, 2, n_tokens)
    row_max[:], row_sum[:] = -np.inf, 0
    unpack_weights(job, key_weights, value_weights, rows)
    end = max_end(job.key_ends, n_tokens)
    for first in range(0, end, TILE):
        n, source = min(TILE, end - first), job.packed + first // LATENT_TILE * job.packed_tile + first % LATENT_TILE * latent
        matmul(source, latent, n, key_weights, job.kv_lora, keys)
        matmul(source, latent, n, value_weights, job.kv_lora, values)
        transpose_keys(job, keys, source, n, transposed)
        for t_batch in range(0, n_tokens, batch):
            stop, t = min(t_batch + batch, n_tokens), t_batch
            while t < stop and i64_at(job.key_ends, 8 * t) <= first:      # tokens before these keys
                t += 1
            if t < stop:
                n_seen = min(n, max_end(job.key_ends + 8 * t, stop - t) - first)
                matmul(job.q + t * job.q_token, job.q_token, stop - t, transposed, width, scores)
                weigh_scores(job, t, stop - t, first, n, scores, row_max, row_sum, sums)
                matmul_add(address(sums[t]), 4 * n_sums, stop - t, n_sums, address(scores), 4 * TILE, address(values), 4 * n_sums, n_seen)
    for t in range(n_tokens):
        source, row = sums[t], floats_at(job.out + t * job.out_token, 1, job.n_v)[0]
        factor = np.float32(1) / row_sum[t] if row_sum[t] != 0 else np.float32(0)
        for k in range(job.n_v):
            row[k] = source[k] * factor


@inner
def unpack_weights(job, key_weights, value_weights, rows):
    """Dequantize k_b, and transpose v_b, both [kv_lora, ...].

    Zeros follow. rows: scratch for v_b.
    """
    key_weights[:] = 0
    for i in range(job.kv_lora):
        call_block_function(job.k_dequantize, job.k_rows + i * job.k_row_bytes, job.k_blocks, address(key_weights[i]))
    value_weights[:] = 0
    for i in range(job.n_v):
        call_block_function(job.v_dequantize, job.v_rows + i * job.v_row_bytes, job.v_blocks, address(rows[i]))
    for i in range(0, job.n_v, 16):
        for k in range(0, job.kv_lora, 16):
            transpose(address(rows[i]) + 4 * k, rows.strides[0], address(value_weights[k]) + 4 * i, value_weights.strides[0])


@inner
def transpose_keys(job, keys, latents, n, transposed):
    """Transpose n keys: computed values, then the latents' rotated ones."""
    latent = 4 * (job.kv_lora + job.n_rot)
    for j in range(0, n, 16):
        for k in range(0, job.n_nope, 16):
            transpose(address(keys[j]) + 4 * k, keys.strides[0], address(transposed[k]) + 4 * j, 4 * TILE)
    for j in range(0, n, 16):
        for k in range(0, job.n_rot, 16):
            transpose(latents + j * latent + 4 * (job.kv_lora + k), latent, address(transposed[job.n_nope + k]) + 4 * j, 4 * TILE)


@inner
def weigh_scores(job, t, n_tokens, first, n, scores, row_max, row_sum, sums):
    """Turn scores of n keys from `first` on into weights.

    For tokens from t on, whose sums of values so far are rescaled.
    """
    scale = float_from_bits(np.uint32(job.scale))
    for i in range(n_tokens):
        if job.selected:
            mask_unselected(scores[i], n, job.selected + (t + i) // 16 * job.selected_row + 2 * first, (t + i) % 16)
        n_visible = min(n, i64_at(job.key_ends, 8 * (t + i)) - first)
        rescale = softmax_row(scores[i], n_visible, 0, scale, row_max[t + i:t + i + 1], row_sum[t + i:t + i + 1])
        if rescale != 1:
            row = sums[t + i]
            for k in range(row.size):
                row[k] *= rescale
