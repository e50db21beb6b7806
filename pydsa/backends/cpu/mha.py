"""MLA in its plain form: each head has keys and values from the latents.

For prompts, where that is less work.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.jit import call_intp_function, inner, kernel
from pydsa.backends.cpu.jobs import HeadJob, call_kernel
from pydsa.backends.cpu.scalars import bits_of_float
from pydsa.backends.cpu.scratch import caller_scratch
from pydsa.backends.cpu.threads import n_threads


LATENT_TILE = 256      # latents that are packed together


@inner
def tiles(n_kv):
    """Count the tiles of n_kv latents."""
    return (n_kv + LATENT_TILE - 1) // LATENT_TILE


@inner
def pack_tile(latents, i, n_kv, kv_lora, n_rot, scratch):
    """Pack the i-th tile of latents into scratch."""
    row_bytes, n = latents.data.shape[1], min(LATENT_TILE, n_kv - i * LATENT_TILE)
    call_intp_function(latents.pack_latents, (
        address(latents.data) + i * LATENT_TILE * row_bytes, row_bytes, latents.dequantize, latents.n, n, kv_lora, n_rot,
        scratch + i * latents.tile_bytes))


@inner
def mark_selected(indices, first, marks):
    """Mark which of sixteen tokens, from `first` on, selected each key.

    marks [n_kv]: a bit for each token.
    """
    marks[:] = 0
    for t in range(first, min(first + 16, indices.shape[0])):
        bit, i = np.uint16(1 << (t - first)), 0
        while i < indices.shape[1] and indices[t, i] >= 0:
            marks[indices[t, i]] |= bit
            i += 1


@inner
def splits_per_head(n_head, n_tokens):
    """Count the splits of the tokens.

    There is more than one if there are more threads than heads.
    """
    return max(1, min(n_threads() // n_head, (n_tokens + 15) // 16))


@inner
def attend(out, q, latents, k_b, v_b, key_ends, scale, task, scratch, marks):
    """Compute a head's attention for one split of the tokens.

    marks: bits written by mark_selected, or [0, ...] to attend to all keys.
    """
    n_tokens, n_head, width = q.shape
    n_splits = splits_per_head(n_head, n_tokens)
    size = (n_tokens + 16 * n_splits - 1) // (16 * n_splits) * 16
    h, t = task // n_splits, task % n_splits * size
    n, k_row, v_row = min(size, n_tokens - t), k_b.data.shape[2], v_b.data.shape[2]
    kv_lora, n_v, n_nope = k_b.data.shape[1], v_b.data.shape[1], k_row // k_b.block_bytes * k_b.block
    if n > 0:
        selected = address(marks) + t // 16 * marks.strides[0] if marks.size else 0
        call_kernel(latents.attend_head, HeadJob(
            out=address(out) + t * out.strides[0] + h * out.strides[1], out_token=out.strides[0],
            q=address(q) + t * q.strides[0] + h * q.strides[1], q_token=q.strides[0],
            n_tokens=n, n_nope=n_nope, n_rot=width - n_nope, n_v=n_v, kv_lora=kv_lora, packed=scratch, packed_tile=latents.tile_bytes,
            k_rows=address(k_b.data) + h * kv_lora * k_row, k_row_bytes=k_row, k_dequantize=k_b.dequantize,
            k_blocks=k_row // k_b.block_bytes,
            v_rows=address(v_b.data) + h * n_v * v_row, v_row_bytes=v_row, v_dequantize=v_b.dequantize,
            v_blocks=v_row // v_b.block_bytes,
            key_ends=address(key_ends) + 8 * t, selected=selected, selected_row=marks.strides[0],
            scale=bits_of_float(np.float32(scale))))


@kernel(parallel=True)
def mha_attention(out, q, latents, k_b, v_b, positions, scale):
    n_kv, kv_lora, n_rot = positions[-1] + 1, k_b.data.shape[1], q.shape[2] - k_b.data.shape[2] // k_b.block_bytes * k_b.block
    scratch, marks = caller_scratch(tiles(n_kv) * latents.tile_bytes), np.empty((0, 1), np.uint16)
    for i in prange(tiles(n_kv)):
        pack_tile(latents, i, n_kv, kv_lora, n_rot, scratch)
    key_ends = positions + 1
    for i in prange(q.shape[1] * splits_per_head(q.shape[1], q.shape[0])):
        attend(out, q, latents, k_b, v_b, key_ends, scale, i, scratch, marks)


@kernel(parallel=True)
def mha_sparse_attention(out, q, latents, indices, k_b, v_b, positions, scale):
    n_kv, kv_lora, n_rot = positions[-1] + 1, k_b.data.shape[1], q.shape[2] - k_b.data.shape[2] // k_b.block_bytes * k_b.block
    scratch = caller_scratch(tiles(n_kv) * latents.tile_bytes)
    marks = np.empty(((q.shape[0] + 15) // 16, tiles(n_kv) * LATENT_TILE), np.uint16)
    for i in prange(tiles(n_kv)):
        pack_tile(latents, i, n_kv, kv_lora, n_rot, scratch)
    for i in prange(marks.shape[0]):
        mark_selected(indices, 16 * i, marks[i])
    key_ends = positions + 1
    for i in prange(q.shape[1] * splits_per_head(q.shape[1], q.shape[0])):
        attend(out, q, latents, k_b, v_b, key_ends, scale, i, scratch, marks)
