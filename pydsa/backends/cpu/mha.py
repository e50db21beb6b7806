"""MLA in its plain form: every head has keys and values of its own, made from the latents. For prompts, where that is less work."""
import numpy as np
from numba import prange

from pydsa.backends.cpu.microkernels import address, n_threads
from pydsa.backends.cpu.scratch import callers_scratch
from pydsa.jit import call_word_function, kernel
from pydsa.quants.block import bits_of_float

LAID = 256      # latents that are laid out together


@kernel(parallel=True)
def mha_attention(out, q, latents, k_b, v_b, positions, scale):
    n_tokens, n_head, width = q.shape
    n_kv, kv_lora, n_v = positions[-1] + 1, k_b.data.shape[1], v_b.data.shape[1]
    k_blocks, v_blocks = k_b.data.shape[2] // k_b.block_bytes, v_b.data.shape[2] // v_b.block_bytes
    n_nope = k_blocks * k_b.block
    n_rot, row_bytes = width - n_nope, latents.data.shape[1]
    room = callers_scratch((n_kv + LAID - 1) // LAID * latents.laid)
    for i in prange((n_kv + LAID - 1) // LAID):
        call_word_function(latents.lay, (address(latents.data) + i * LAID * row_bytes, row_bytes, latents.dequantize, latents.n,
                                         min(LAID, n_kv - i * LAID), kv_lora, n_rot, room + i * latents.laid))
    last_key = positions + 1
    pieces = max(1, min(n_threads() // n_head, (n_tokens + 15) // 16))      # of the tokens, where there are more threads than heads
    size = (n_tokens + 16 * pieces - 1) // (16 * pieces) * 16
    for i in prange(n_head * pieces):
        h, t = i // pieces, i % pieces * size
        n = min(size, n_tokens - t)
        if n > 0:
            call_word_function(latents.attend_head, (
                address(out) + t * out.strides[0] + h * out.strides[1], out.strides[0],
                address(q) + t * q.strides[0] + h * q.strides[1], q.strides[0], n, n_nope, n_rot, n_v, kv_lora, room, latents.laid,
                address(k_b.data) + h * kv_lora * k_b.data.shape[2], k_b.data.shape[2], k_b.dequantize, k_blocks,
                address(v_b.data) + h * n_v * v_b.data.shape[2], v_b.data.shape[2], v_b.dequantize, v_blocks,
                address(last_key) + 8 * t, bits_of_float(np.float32(scale))))
