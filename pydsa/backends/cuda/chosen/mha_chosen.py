"""MLA of prompts to chosen rows, from queries to the heads' outputs.

For GPUs of capability 9.0, one float16 a number. What one kernel writes is what the next one reads: the product with k_b makes images of
queries for attend_chosen.py, which packs its sums as rows that the product with v_b takes (f16/panels.py).
"""
from pydsa.backends.cuda.chosen import attend_chosen, halved_heads
from pydsa.backends.cuda.chosen.chosen_rows import ROTATED, VALUE
from pydsa.backends.cuda.chosen.half_rows import are_aligned
from pydsa.backends.cuda.f16 import gemm, panels


def takes(q, latents, k_b, v_b, pack):
    """Whether attention() has kernels for these arguments.

    pack: what packs activations for the product with v_b.
    """
    (n_tokens, n_head, width), (_, kv_lora, n_nope) = q.shape, k_b.shape
    return (pack is panels.pack and attend_chosen.takes_rows(n_tokens, n_head, latents) and n_nope in halved_heads.ABSORB
            and (kv_lora, v_b.shape[2], width - n_nope) == (VALUE, VALUE, ROTATED) and are_aligned(q))


def attention(out, q, latents, indices, k_b, v_b, scale, tiles):
    """MLA to the rows that indices [T, n] name: see mha.mha_sparse_attention.

    tiles: those of the product with v_b.
    """
    images, scales = halved_heads.absorbed(q, k_b)
    made = panels.rows_for(scales.size, VALUE)
    attend_chosen.attend_packed(made, images, scales, latents, indices, scale)
    gemm.matmul(out.rows, v_b, made, tiles)
