"""MLA from queries to the heads' outputs, for prompts.

It is computed in the absorbed form where flash/ has no kernels for the plain one, with keys and values of each head. Kernels for chosen
rows take the parts of queries where they are, or those of mha_chosen.py pass float16 to each other.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.attention import dense_attention, sparse_attention
from pydsa.backends.cuda.linear import head_linear, head_tiles
from pydsa.backends.cuda.modes import SPARSE
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, is_listing, kernel
from pydsa.backends.cuda.variants import kernels


THREADS = 64


@kernel("f4[:,:], f4[:,:]", THREADS)
def copy_rows(out, x):
    """out = x. One part of a row per block."""
    i = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    if i < out.shape[1]:
        out[cuda.blockIdx.x, i] = x[cuda.blockIdx.x, i]


def mha_attention(out, q, latents, k_b, v_b, positions, scale):
    """MLA in its plain form, or computed in the absorbed form.

    out float32 [T, n_head, n_v], q float32 [T, n_head, n_nope + n_rot], k_b [n_head, kv_lora, n_nope], v_b [n_head, n_v, kv_lora],
    positions int64 [T]. Keys are those up to each token's position.
    """
    plain = kernels("mha", out, q, latents, k_b, v_b)
    if plain:
        plain(out, q, latents, k_b, v_b, positions, scale)
        return
    absorbed_form(out, q, k_b, v_b, lambda mixed, absorbed: dense_attention(mixed, absorbed, latents, positions, scale))


def mha_sparse_attention(out, q, latents, indices, k_b, v_b, positions, scale):
    """mha_attention to the chosen keys only."""
    tiles = head_tiles(*q.shape[:2])
    chain = kernels("mha of chosen rows", q, latents, k_b, v_b, kernels("linear", v_b, tiles.single).pack)
    if chain:
        chain(out, q, latents, indices, k_b, v_b, scale, tiles)
    if not chain or is_listing():
        in_float32(out, q, latents, indices, k_b, v_b, positions, scale)


def in_float32(out, q, latents, indices, k_b, v_b, positions, scale):
    """mha_sparse_attention whose kernels pass float32 to each other."""
    absorbed, mixed = scratch_of(q, k_b)
    parts = absorbed[..., :k_b.shape[1]], q[..., k_b.shape[2]:]
    of_many = kernels("attention of many", mixed, *parts, latents, SPARSE)
    if of_many:
        absorb(absorbed, q, k_b)
        of_many(mixed, *parts, latents, indices, positions, scale)
        head_linear(out, v_b, mixed)
    if not of_many or is_listing():
        absorbed_form(out, q, k_b, v_b, lambda mixed, absorbed: sparse_attention(mixed, absorbed, latents, indices, scale))


def scratch_of(q, k_b):
    """Scratch memory for absorbed queries, and for sums of latents."""
    n_tokens, n_head, width = q.shape
    _, kv_lora, n_nope = k_b.shape
    return (scratch("absorbed queries", (n_tokens, n_head, kv_lora + width - n_nope), np.float32),
            scratch("mixed latents", (n_tokens, n_head, kv_lora), np.float32))


def absorb(absorbed, q, k_b):
    """Project the parts of queries that have no position to latents."""
    head_linear(absorbed[..., :k_b.shape[1]], k_b, q[..., :k_b.shape[2]])


def absorbed_form(out, q, k_b, v_b, attend):
    """Absorbed MLA: project queries to latents, attend, project back.

    attend(mixed, absorbed) writes the attention-weighted sums of latents to `mixed`.
    """
    (n_tokens, n_head, width), (_, kv_lora, n_nope) = q.shape, k_b.shape
    absorbed, mixed = scratch_of(q, k_b)
    absorb(absorbed, q, k_b)
    copy_rows((n_tokens * n_head, blocks_for(width - n_nope, THREADS)), absorbed[..., kv_lora:].rows, q[..., n_nope:].rows)
    attend(mixed, absorbed)
    head_linear(out, v_b, mixed)
