"""MLA in its plain form: each head has keys and values from the latents.

For prompts, where that is less work.
"""
import numpy as np

from pydsa.backends.cpu.arrays import address, align, marks_at
from pydsa.backends.cpu.jit import call_intp_function, inner
from pydsa.backends.cpu.jobs import HeadJob, call_kernel
from pydsa.backends.cpu.scratch import task_scratch
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.vectors.scalars import bits_of_float
from pydsa.backends.cpu.vectors.simd import float_at, floats, load_floats, store


LATENT_TILE = 256      # latents that are packed together
MIN_TASK_TOKENS = 128       # the fewest tokens of a task: each makes the keys and values of its head


@inner
def clear(at, n_bytes):
    """Fill n_bytes, rounded up to whole vectors, with zeros."""
    for i in range(0, n_bytes, 64):
        store(at, i, floats(np.float32(0)))


@inner
def copy_floats(source, n, target):
    """Copy n floats."""
    for k in range(0, n - 15, 16):
        store(target, 4 * k, load_floats(source, 4 * k))
    for k in range(n // 16 * 16, n):
        store(target, 4 * k, float_at(source, 4 * k))


@inner
def tiles(n_kv):
    """Count the tiles of n_kv latents."""
    return (n_kv + LATENT_TILE - 1) // LATENT_TILE


@inner
def pack_tile(latents, i, n_kv, kv_lora, n_rot, scratch, thread):
    """Pack the i-th tile of latents into scratch."""
    row_bytes, n = latents.data.shape[1], min(LATENT_TILE, n_kv - i * LATENT_TILE)
    call_intp_function(latents.pack_latents, (
        address(latents.data) + i * LATENT_TILE * row_bytes, row_bytes, latents.dequantize, latents.n, n, kv_lora, n_rot,
        scratch + i * latents.tile_bytes, thread))


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
def task_tokens(n_head, n_tokens, n_threads):
    """Count the tokens of a task, a multiple of 16.

    All, if there are several heads for each thread.
    """
    splits = max(1, min(n_tokens // MIN_TASK_TOKENS, 2 * n_threads // n_head))
    splits = max(splits, min((n_tokens + 15) // 16, n_threads // n_head))
    return (n_tokens + 16 * splits - 1) // (16 * splits) * 16


@inner
def begin_heads(q, task):
    """Count the tasks of attend."""
    n_tokens, n_head, _ = q.shape
    size = task_tokens(n_head, n_tokens, task.n_threads)
    return n_head * ((n_tokens + size - 1) // size)


@inner
def attend(out, q, latents, k_b, v_b, positions, scale, packed, marks, marks_row, task):
    """Compute a head's attention for some tokens, the last ones first.

    marks: bits written by mark_selected for every sixteen tokens, or 0 to attend to all keys.
    """
    n_tokens, n_head, width = q.shape
    size = task_tokens(n_head, n_tokens, task.n_threads)
    h, t = task.index % n_head, ((n_tokens + size - 1) // size - 1 - task.index // n_head) * size
    n, k_row, v_row = min(size, n_tokens - t), k_b.data.shape[2], v_b.data.shape[2]
    kv_lora, n_v, n_nope = k_b.data.shape[1], v_b.data.shape[1], k_row // k_b.block_bytes * k_b.block
    key_ends = task_scratch(task.thread, 8 * n)
    for i in range(n):
        store(key_ends, 8 * i, positions[t + i] + 1)
    selected = marks + t // 16 * marks_row if marks else 0
    call_kernel(latents.attend_head, HeadJob(
        thread=task.thread, out=address(out) + t * out.strides[0] + h * out.strides[1], out_token=out.strides[0],
        q=address(q) + t * q.strides[0] + h * q.strides[1], q_token=q.strides[0],
        n_tokens=n, n_nope=n_nope, n_rot=width - n_nope, n_v=n_v, kv_lora=kv_lora,
        n_keys=positions[n_tokens - 1] + 1, packed=packed, packed_tile=latents.tile_bytes,
        k_rows=address(k_b.data) + h * kv_lora * k_row, k_row_bytes=k_row, k_dequantize=k_b.dequantize,
        k_blocks=k_row // k_b.block_bytes,
        v_rows=address(v_b.data) + h * n_v * v_row, v_row_bytes=v_row, v_dequantize=v_b.dequantize,
        v_blocks=v_row // v_b.block_bytes,
        key_ends=key_ends, selected=selected, selected_row=marks_row,
        scale=bits_of_float(np.float32(scale))))


@inner
def pack_latents(q, latents, k_b, positions, task):
    """Pack a tile of latents."""
    n_rot = q.shape[2] - k_b.data.shape[2] // k_b.block_bytes * k_b.block
    pack_tile(latents, task.index, positions[-1] + 1, k_b.data.shape[1], n_rot, task.scratch, task.thread)


@inner
def begin_packing_dense(out, q, latents, k_b, v_b, positions, scale, task):
    return tiles(positions[-1] + 1)


@inner
def pack_dense(out, q, latents, k_b, v_b, positions, scale, task):
    pack_latents(q, latents, k_b, positions, task)


@inner
def begin_dense(out, q, latents, k_b, v_b, positions, scale, task):
    return begin_heads(q, task)


@inner
def attend_dense(out, q, latents, k_b, v_b, positions, scale, task):
    attend(out, q, latents, k_b, v_b, positions, scale, task.scratch, 0, 0, task)


@op(Stage(begin_packing_dense, pack_dense), Stage(begin_dense, attend_dense), grows=True)
def mha_attention(out, q, latents, k_b, v_b, positions, scale):
    return tiles(positions[-1] + 1) * latents.tile_bytes


@inner
def marks_of(latents, positions, scratch):
    """Return where the marks are, behind the packed latents, and their stride."""
    n = tiles(positions[-1] + 1)
    return scratch + align(n * latents.tile_bytes), 2 * n * LATENT_TILE


@inner
def begin_packing_sparse(out, q, latents, indices, k_b, v_b, positions, scale, task):
    return tiles(positions[-1] + 1) + (len(q) + 15) // 16


@inner
def pack_sparse(out, q, latents, indices, k_b, v_b, positions, scale, task):
    n = tiles(positions[-1] + 1)
    if task.index < n:
        pack_latents(q, latents, k_b, positions, task)
        return
    marks, row = marks_of(latents, positions, task.scratch)
    mark_selected(indices, 16 * (task.index - n), marks_at(marks + (task.index - n) * row, n * LATENT_TILE))


@inner
def begin_sparse(out, q, latents, indices, k_b, v_b, positions, scale, task):
    return begin_heads(q, task)


@inner
def attend_sparse(out, q, latents, indices, k_b, v_b, positions, scale, task):
    marks, row = marks_of(latents, positions, task.scratch)
    attend(out, q, latents, k_b, v_b, positions, scale, task.scratch, marks, row, task)


@op(Stage(begin_packing_sparse, pack_sparse), Stage(begin_sparse, attend_sparse), grows=True)
def mha_sparse_attention(out, q, latents, indices, k_b, v_b, positions, scale):
    n = tiles(positions[-1] + 1)
    return align(n * latents.tile_bytes) + (len(q) + 15) // 16 * 2 * n * LATENT_TILE
