"""The indexer's scores in AMX tiles (amx.py), whose heads are weighed as they leave: heads x keys for many tokens, keys x heads for few.

The right one of two operands must be turned over: for many tokens that is done to the keys, once for all tokens; for few to the queries.
"""
import numpy as np

from pydsa.backends.cpu.amx import LOW_PARTS, STEP, SUMS, configure, release
from pydsa.backends.cpu.bf16x2.gemm import panel_products
from pydsa.backends.cpu.bf16x2.panels import store_bf16x2
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.lanes import relu, row_sums, transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import float_at, floats, load_floats, multiply_add, prefetch, store


KEYS = 256          # that are prepared at a time: with 128 numbers each, 128 KiB
KEYS_AHEAD = 32     # that are asked for while one is split
PANELS = 16         # 16 heads each, of as many tokens: their sums with KEYS keys take 256 KiB


@inner
def pack_row(source, row, width, n_steps, panel):
    """`width` floats as a row of a panel; zeros follow the last: `row` has room for a step of floats."""
    for s in range(n_steps):
        at = source + 128 * s
        if 32 * s + 32 > width:
            for k in range(32):
                store(row, 4 * k, float_at(at, 4 * k) if 32 * s + k < width else np.float32(0))
            at = row
        store_bf16x2(panel + STEP * s, load_floats(at, 0), load_floats(at, 64))


def score(out, out_token, q, q_token, q_head, w, w_token, n_tokens, n_head, width, rows, row_bytes, dequantize, row_n, first, last,
          scale):
    """out[t][s] = scale sum_h w[t][h] relu(q[t][h] . key s) for first <= s < last, and without meaning up to a multiple of 16 keys.

    Addresses: out float32, q [T, H, width] and w [T, H] float32, of which tokens and heads lie so many bytes apart; rows of a cache, of
    which dequantize takes row_n. scale: a float32's bits.
    """
    factor = float_from_bits(np.uint32(scale))
    n_steps, head_panels = (width + 31) // 32, (n_head + 15) // 16
    together = max(1, PANELS // head_panels)       # tokens
    panel_bytes = n_steps * STEP
    sums_bytes = together * head_panels * KEYS // 16 * SUMS
    queries = own_scratch((together * head_panels + KEYS // 16) * panel_bytes + sums_bytes + 4 * width + 256)
    keys = queries + together * head_panels * panel_bytes
    sums = keys + KEYS // 16 * panel_bytes
    row = sums + sums_bytes
    key = row + 128
    configure()
    for start in range(first, last, KEYS):
        n_panels = (min(KEYS, last - start) + 15) // 16
        for i in range(16 * n_panels):
            s = min(start + i, last - 1)
            call_block_function(dequantize, rows + s * row_bytes, row_n, key)
            pack_row(key, row, width, n_steps, keys + i // 16 * panel_bytes + 64 * (i % 16))
        for i in range(n_panels * n_steps):
            for part in (0, LOW_PARTS):
                transpose(keys + i * STEP + part, 64, keys + i * STEP + part, 64)
        for t0 in range(0, n_tokens, together):
            n = min(together, n_tokens - t0)
            for i in range(16 * n * head_panels):
                t, h = t0 + i // (16 * head_panels), min(i % (16 * head_panels), n_head - 1)
                pack_row(q + t * q_token + h * q_head, row, width, n_steps, queries + i // 16 * panel_bytes + 64 * (i % 16))
            panel_products(queries, panel_bytes, n * head_panels, keys, panel_bytes, n_panels, n_steps, sums, True, keys)
            for t in range(n):
                for j in range(n_panels):
                    total = floats(np.float32(0))
                    for h in range(n_head):
                        dots = load_floats(sums, ((t * head_panels + h // 16) * n_panels + j) * SUMS + 64 * (h % 16))
                        total = multiply_add(total, relu(dots), floats(float_at(w, (t0 + t) * w_token + 4 * h)))
                    store(out, (t0 + t) * out_token + 4 * (start + 16 * j), total * factor)
    release()


def score_gemv(out, out_token, q, q_token, q_head, w, w_token, n_tokens, n_head, width, rows, row_bytes, dequantize, row_n, first,
               last, scale):
    """What score does, where preparing keys costs the most: they are only split."""
    factor = float_from_bits(np.uint32(scale))
    n_steps, head_panels = (width + 31) // 32, (n_head + 15) // 16
    panel_bytes = n_steps * STEP
    queries = own_scratch((head_panels + KEYS // 16) * panel_bytes + head_panels * (KEYS // 16 * SUMS + 64) + 4 * width + 256)
    keys = queries + head_panels * panel_bytes
    sums = keys + KEYS // 16 * panel_bytes
    weights = sums + head_panels * KEYS // 16 * SUMS
    row = weights + 64 * head_panels
    key = row + 128
    configure()
    for t in range(n_tokens):
        for h in range(16 * head_panels):
            pack_row(q + t * q_token + min(h, n_head - 1) * q_head, row, width, n_steps, queries + h // 16 * panel_bytes + 64 * (h % 16))
            store(weights, 4 * h, float_at(w, t * w_token + 4 * h) if h < n_head else np.float32(0))
        for i in range(head_panels * n_steps):
            for part in (0, LOW_PARTS):
                transpose(queries + i * STEP + part, 64, queries + i * STEP + part, 64)
        for start in range(first, last, KEYS):
            n_panels = (min(KEYS, last - start) + 15) // 16
            for i in range(16 * n_panels):
                source = rows + min(start + i, last - 1) * row_bytes
                for line in range(0, row_bytes, 64):
                    prefetch(source + KEYS_AHEAD * row_bytes, line)
                call_block_function(dequantize, source, row_n, key)
                pack_row(key, row, width, n_steps, keys + i // 16 * panel_bytes + 64 * (i % 16))
            panel_products(keys, panel_bytes, n_panels, queries, panel_bytes, head_panels, n_steps, sums, True, keys)
            for i in range(n_panels):
                cell = sums + i * head_panels * SUMS
                for k in range(16):
                    total = relu(load_floats(cell, 64 * k)) * load_floats(weights, 0)
                    for j in range(1, head_panels):
                        total = multiply_add(total, relu(load_floats(cell, j * SUMS + 64 * k)), load_floats(weights, 64 * j))
                    store(cell, 64 * k, total)
                store(out, t * out_token + 4 * (start + 16 * i), row_sums(cell) * factor)
    release()
