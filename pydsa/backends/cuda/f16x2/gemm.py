"""Products for prompts in wgmma with Q4_K and Q5_K: no bit is lost.

They are for GPUs of capability 9.0. An activation is two float16, 22 bits together (panels.py). A weight is a whole number (words_q4_k.py),
and the sums of a block of 256 are multiplied by its d in float32. Offsets (offsets.py) are whole numbers, too. Weights are the rows of
wgmma (A) and stay in registers, where lanes make them of the file's bytes. Activations are its columns (B), in a ring of stages
(stages.py).

A block multiplies ROWS rows of weights with a tile's tokens; a warp has 16 rows, a lane two of them, g and g + 8. While a stage of 64
numbers is multiplied, lanes make the words of the next one.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.f16x2.offsets import OFFSETS
from pydsa.backends.cuda.f16x2.panels import STAGE_BYTES, n_stages, split, split_columns_q4_k
from pydsa.backends.cuda.f16x2.stages import (CAPABILITY, FEW, RINGS, ROWS, SIGNATURE, THREADS, add_scaled, clear, launch)
from pydsa.backends.cuda.f16x2.words_q4_k import RAW, make_loads, make_put
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, of_half
from pydsa.backends.cuda.intrinsics.hopper import make_wgmma, make_wgmma_wait
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import kernel
from pydsa.quants import TYPES


WORDS = 16                  # of a lane, words of A for 64 columns
SUMMED = 32                 # weights that share an offset
U = np.uint32


def _make_multiply(ring, puts, load_block, load_weights):
    (put_0, put_1, put_2, put_3), next_stage, low_part = puts, ring.next_stage, ring.low_part
    start, wait_before, wait_all = make_wgmma(ring.tokens, 4, 2), make_wgmma_wait(0, WORDS, 1), make_wgmma_wait(ring.tokens, WORDS)

    @device
    def multiply_block(there, parts, words, others, raw, w, at, apart, more, c, shared, packed, stage, last, rows, thread):
        """parts += the products of a block's whole numbers.

        Returns the descriptor of the next stage, and d of both rows. The block has four stages. words: those of its first 64 weights; then
        those of the next block's, `more` bytes further. raw: the bytes after those.
        """
        start(parts, words, there, there + low_part)
        put_1(others, raw)
        load_weights(raw, w, at, apart, 2, c)
        there = next_stage(shared, packed, stage + 1, last, rows, thread)
        start(parts, others, there, there + low_part)
        wait_before(parts, words)
        put_2(words, raw)
        load_weights(raw, w, at, apart, 3, c)
        there = next_stage(shared, packed, stage + 2, last, rows, thread)
        start(parts, words, there, there + low_part)
        wait_before(parts, others)
        put_3(others, raw)
        d, d_8 = of_half(raw[0]), of_half(raw[0] >> U(16))
        load_block(raw, w, at + more, apart, c)
        load_weights(raw, w, at + more, apart, 0, c)
        there = next_stage(shared, packed, stage + 3, last, rows, thread)
        start(parts, others, there, there + low_part)
        wait_before(parts, words)
        put_0(words, raw)
        load_weights(raw, w, at + more, apart, 1, c)
        there = next_stage(shared, packed, stage + 4, last, rows, thread)
        wait_all(parts, others)
        return there, d, d_8
    return multiply_block


def _make_gemm(name, fifth, tokens):
    ring, block_bytes, puts, loads = RINGS[tokens], TYPES[name].n_bytes, [make_put(j, fifth) for j in range(4)], make_loads(fifth)
    (load_block, load_weights), put, multiply_block = loads, puts[0], _make_multiply(ring, puts, *loads)
    begin, next_stage, store, add_offsets, n_sums = ring.begin, ring.next_stage, ring.store, OFFSETS[name][1](ring), tokens // 2

    def gemm(out, w, w_bytes, tile_matrix, tile_first, tile_end, order, x_div, packed, x_scales, n_groups):
        """out[i] = a matrix times row i // x_div of x.

        i is in order[first:end], where first and end are those of a tile. See above.
        """
        thread, chosen = cuda.threadIdx.x, tile_matrix[cuda.blockIdx.y]
        if chosen < 0:
            return
        first, n_tokens = tile_first[cuda.blockIdx.y], tile_end[cuda.blockIdx.y] - tile_first[cuda.blockIdx.y]
        if (n_tokens <= FEW) != (tokens == FEW):
            return
        shared, rows = cuda.shared.array(0, np.uint8, 1024), cuda.shared.array(0, np.int32, 1024)
        scales = cuda.shared.array(0, np.float32, 1024)
        before, n_blocks = n_groups + 63 >> 6, n_groups >> 3
        last = np.int32(before + 4 * n_blocks)
        begin(shared, rows, scales, order, first, n_tokens, x_div, x_scales, packed, last, thread)
        sums, parts = cuda.local.array(n_sums, np.float32), cuda.local.array(n_sums, np.float32)
        words, others, raw = cuda.local.array(WORDS, np.uint32), cuda.local.array(WORDS, np.uint32), cuda.local.array(RAW, np.uint32)
        clear(sums, tokens)
        clear(parts, tokens)
        g, c, most = thread >> 2 & 7, U(thread & 3), out.shape[1] - 1
        row = cuda.blockIdx.x * ROWS + 16 * (thread >> 5) + g
        at = (chosen * np.int64(out.shape[1]) + min(row, most)) * w_bytes
        apart = U((min(row + 8, most) - min(row, most)) * w_bytes)
        add_offsets(sums, parts, words, w, at, at + np.int64(apart), n_groups, c, shared, packed, last, rows, thread)
        load_block(raw, w, at, apart, c)
        load_weights(raw, w, at, apart, 0, c)
        put(words, raw)
        load_weights(raw, w, at, apart, 1, c)
        there = next_stage(shared, packed, before, last, rows, thread)
        for block in range(n_blocks):
            more = np.int64(block_bytes if block + 1 < n_blocks else 0)
            there, d, d_8 = multiply_block(there, parts, words, others, raw, w, at, apart, more, c, shared, packed, before + 4 * block,
                                           last, rows, thread)
            at += more
            add_scaled(sums, 0, parts, d, d_8, tokens)
            clear(parts, tokens)
        store(out, sums, order, tile_first, tile_end, scales, row, c)
    return kernel(SIGNATURE, THREADS, f"wgmma_{name.lower()}{'' if tokens > FEW else '_64'}", shared=ring.end,
                  blocks=1 if tokens > FEW or fifth else 2, specific=CAPABILITY)(gemm)


GEMM = {name: {tokens: _make_gemm(name, name == "Q5_K", tokens) for tokens in RINGS} for name in ("Q4_K", "Q5_K")}


def takes(w):
    """Whether there is a kernel for this Weight on the current GPU."""
    return not SIMULATED and w.type in GEMM and current().capability == CAPABILITY


def pack(x):
    """Activations, rows of any strides, as Columns in scratch memory."""
    return split(x, split_columns_q4_k, SUMMED)


def matmul(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
    assert x.packed.shape[1] == STAGE_BYTES * n_stages(w.shape[-1], SUMMED)
    launch(GEMM[w.type], out, w, x, tiles, w.shape[-1] // 32)
