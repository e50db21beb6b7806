"""A head's own attention in AMX tiles of bytes: its keys and values are made from latents, 256 at a time, and stay where they are made.

Everything is whole numbers of 16 bits, as in byte_rows.py: latents and weights with a scale for 256 of a row, keys with a scale a key,
values with a scale for each column of 256 of them. All tokens of the head meet these keys before the next ones are made.
"""
import numpy as np

from pydsa.backends.cpu.amx import STEP, SUMS, configure, release
from pydsa.backends.cpu.int8x2.attention import softmax_tile
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8x2
from pydsa.backends.cpu.int8x2.panels import PANEL, SCALED_PANEL, max_abs, pack_int8x2, round_to_panel, scale_to_max, transpose_panel
from pydsa.backends.cpu.jit import call_block_function, inner
from pydsa.backends.cpu.lanes import transpose
from pydsa.backends.cpu.mha import LATENT_TILE
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import float_at, floats, load_floats, prefetch, store
from pydsa.backends.cpu.softmax import MINUS_INFINITY, last_of, rescale_sums, set_limits
from pydsa.quants import INT8X2_MAX


TILE = LATENT_TILE         # keys: 256, whose values are a row of a panel
PANELS = TILE // 16
LEFT = PANELS * (PANEL + 64)        # 256 numbers of each of a tile's latents as left panels, and then all scales
RIGHT = PANELS * SCALED_PANEL           # the same as right panels
GROUP = 8           # panels of 16 queries that meet the keys of a tile together
AHEAD = 8           # tokens whose queries are asked for while one is rounded: they lie far apart
OF_LEFT, OF_RIGHT = np.float32(1 / INT8X2_MAX), np.float32(256 / INT8X2_MAX)      # what largest magnitudes are multiplied by to be scales


@inner
def superblocks(n):
    return (n + 255) // 256


@inner
def steps(n):
    return (n + 63) // 64


@inner
def thirty_twos(n):
    return (n + 31) // 32 * 32


@inner
def clear(at, n_bytes):
    for i in range(0, n_bytes, 64):
        store(at, i, floats(np.float32(0)))


@inner
def copy_floats(source, n, target):
    for k in range(0, n - 15, 16):
        store(target, 4 * k, load_floats(source, 4 * k))
    for k in range(n // 16 * 16, n):
        store(target, 4 * k, float_at(source, 4 * k))


def tile_bytes(kv_lora, n_rot):
    """What a tile takes as pack_latents leaves it."""
    return (kv_lora + 255) // 256 * (LEFT + RIGHT) + 4 * TILE * ((n_rot + 63) // 64 * 64 + 1)


@inner
def column_of(key):
    """Where a key goes among the columns of values, so that pack_int8x2, which mixes 64 numbers, puts it where it belongs."""
    word = key % 64 // 2
    return key // 64 * 64 + 32 * (key % 2) + (2 * word if word < 16 else 2 * word - 31)


def pack_latents(rows, row_bytes, dequantize, row_n, n, kv_lora, n_rot, out):
    """A tile of n latents, rows of a cache at an address; the last one stands for those that are not there.

    The compressed values as left panels, LEFT bytes for each 256, and as right panels, RIGHT bytes; the rotated ones as floats, steps of 64
    a key, and the largest magnitude of each key's. In the right panels, for values, latents that are not finite are 0.
    """
    n_lora, rotated = superblocks(kv_lora), out + superblocks(kv_lora) * (LEFT + RIGHT)
    lora = own_scratch(1024 * n_lora + 4 * (kv_lora + n_rot))
    row = lora + 1024 * n_lora
    clear(lora, 1024 * n_lora)
    clear(rotated, 256 * TILE * steps(n_rot))
    for i in range(TILE):
        if i < n:
            call_block_function(dequantize, rows + i * row_bytes, row_n, row)
            copy_floats(row, kv_lora, lora)
        of_key = rotated + 256 * steps(n_rot) * i
        copy_floats(row + 4 * kv_lora, n_rot, of_key)
        store(rotated, 256 * TILE * steps(n_rot) + 4 * i, max_abs(of_key, 64, 64 * steps(n_rot)))
        column = column_of(i)
        for k in range(n_lora):
            left, right = out + k * LEFT, out + n_lora * LEFT + k * RIGHT + column // 16 * SCALED_PANEL
            source, width = lora + 1024 * k, thirty_twos(min(256, kv_lora - 256 * k))
            top = pack_int8x2(source, 64, width, left + i // 16 * PANEL + 64 * (i % 16))
            store(left, PANELS * PANEL + 4 * i, top * OF_LEFT)
            round_to_panel(source, 64, width, scale_to_max(top), right + 64 * (column % 16))
            store(right, PANEL + 4 * (column % 16), top * OF_RIGHT if top < np.inf else np.float32(0))
    for k in range(n_lora):
        for j in range(PANELS):
            transpose_panel(out + n_lora * LEFT + k * RIGHT + j * SCALED_PANEL, min(256, kv_lora - 256 * k))


@inner
def pack_weights(rows, n_rows, n, n_panels, to_right, panels, scales):
    """n_rows rows of n floats, padded to whole superblocks, as n_panels panels a superblock, padded by repeating the last row.

    to_right: as right panels; left ones have their scales apart, 64 bytes for each panel.
    """
    for k in range(superblocks(n)):
        width = thirty_twos(min(256, n - 256 * k))
        for i in range(16 * n_panels):
            panel, source = panels + (k * n_panels + i // 16) * SCALED_PANEL, rows + 1024 * (min(i, n_rows - 1) * superblocks(n) + k)
            top = pack_int8x2(source, 64, width, panel + 64 * (i % 16))
            if to_right:
                store(panel, PANEL + 4 * (i % 16), top * OF_RIGHT)
            else:
                store(scales, 64 * k * n_panels + 4 * i, top * OF_LEFT)
        if to_right:
            for j in range(n_panels):
                transpose_panel(panels + (k * n_panels + j) * SCALED_PANEL, width)


@inner
def pack_key_weights(rows, row_bytes, dequantize, blocks, kv_lora, n_nope, n_panels, panels, scratch):
    """A head's k_b, rows of n_nope weights for each of kv_lora values: as right panels whose columns are its columns."""
    stride, depth, row = (4 * n_nope + 63) // 64 * 64, (kv_lora + 15) // 16 * 16, 1024 * superblocks(kv_lora)
    transposed = scratch + depth * stride
    clear(scratch + (depth - 16) * stride, 16 * stride)
    if kv_lora % 256:
        clear(transposed, 16 * n_panels * row)
    for i in range(kv_lora):
        call_block_function(dequantize, rows + i * row_bytes, blocks, scratch + i * stride)
    for i in range(0, depth, 16):
        for j in range(0, n_nope, 16):
            transpose(scratch + i * stride + 4 * j, stride, transposed + j * row + 4 * i, row)
    pack_weights(transposed, n_nope, kv_lora, n_panels, True, panels, 0)


@inner
def pack_value_weights(rows, row_bytes, dequantize, blocks, kv_lora, n_v, n_panels, panels, scales, scratch):
    """A head's v_b, n_v rows of kv_lora weights, as left panels."""
    row = 1024 * superblocks(kv_lora)
    if kv_lora % 256:
        clear(scratch, n_v * row)
    for i in range(n_v):
        call_block_function(dequantize, rows + i * row_bytes, blocks, scratch + i * row)
    pack_weights(scratch, n_v, kv_lora, n_panels, False, panels, scales)


@inner
def pack_queries(q, q_token, n_tokens, n_nope, n_rot, n_panels, panels, row):
    """Queries as right panels of the steps of their first part and then of the rotated one, with 64 bytes of scales behind."""
    n_steps = steps(n_nope) + steps(n_rot)
    clear(row, 256 * n_steps)
    for i in range(16 * n_panels):
        source, panel = q + min(i, n_tokens - 1) * q_token, panels + i // 16 * (n_steps * STEP + 64)
        soon = q + min(i + AHEAD, n_tokens - 1) * q_token
        for line in range(0, 4 * (n_nope + n_rot), 64):
            prefetch(soon, line)
        copy_floats(source, n_nope, row)
        copy_floats(source + 4 * n_nope, n_rot, row + 256 * steps(n_nope))
        top = max_abs(row, 64, 64 * n_steps)
        round_to_panel(row, 64, 64 * n_steps, scale_to_max(top), panel + 64 * (i % 16))
        store(panel, n_steps * STEP + 4 * (i % 16), top * OF_RIGHT)
        if i % 16 == 15:
            transpose_panel(panel, 64 * n_steps)


@inner
def make_keys(packed, n_panels, kv_lora, n_nope, n_rot, weights, keys, scales, scratch, buffer):
    """n_panels panels of 16 keys, latents k_b and then what is rotated, as left panels with a scale a key."""
    n_steps, n_k, rotated = steps(n_nope) + steps(n_rot), 4 * steps(n_nope), packed + superblocks(kv_lora) * (LEFT + RIGHT)
    clear(scratch, n_panels * n_k * SUMS)
    for k in range(superblocks(kv_lora)):
        left = packed + k * LEFT
        panel_products_int8x2(left, PANEL, n_panels, weights + k * n_k * SCALED_PANEL, SCALED_PANEL, n_k,
                              steps(min(256, kv_lora - 256 * k)), scratch, left + PANELS * PANEL, PANEL, buffer, left, 0, 0, 0)
    for i in range(16 * n_panels):
        source, target = scratch + i // 16 * n_k * SUMS + 64 * (i % 16), keys + i // 16 * n_steps * STEP + 64 * (i % 16)
        tops = max_abs(source, SUMS, 16 * n_k), float_at(rotated, 256 * TILE * steps(n_rot) + 4 * i)
        top = tops[1] if tops[0] == tops[0] and not tops[1] <= tops[0] else tops[0]     # NaN if one is
        round_to_panel(source, SUMS, 16 * n_k, scale_to_max(top), target)
        round_to_panel(rotated + 256 * steps(n_rot) * i, 64, 64 * steps(n_rot), scale_to_max(top), target + steps(n_nope) * STEP)
        store(scales, 4 * i, top * OF_LEFT)


@inner
def make_values(right, n_panels, kv_lora, n_v_panels, weights, scales, values, scratch, buffer):
    """v_b latents^T, the values of n_panels panels of 16 keys, as right panels with a scale for each column of them."""
    clear(scratch, n_v_panels * n_panels * SUMS)
    for k in range(superblocks(kv_lora)):
        panel_products_int8x2(weights + k * n_v_panels * SCALED_PANEL, SCALED_PANEL, n_v_panels, right + k * RIGHT, SCALED_PANEL, n_panels,
                              steps(min(256, kv_lora - 256 * k)), scratch, scales + 64 * k * n_v_panels, PANEL, buffer, right, 0, 0, 0)
    for p in range(n_v_panels):
        for i in range(16):
            top = pack_int8x2(scratch + p * n_panels * SUMS + 64 * i, SUMS, 16 * n_panels, values + p * SCALED_PANEL + 64 * i)
            store(values, p * SCALED_PANEL + PANEL + 4 * i, top * OF_RIGHT)
        transpose_panel(values + p * SCALED_PANEL, 16 * n_panels)


def attend_head(out, out_token, q, q_token, n_tokens, n_nope, n_rot, n_v, kv_lora, packed, packed_tile,
                k_rows, k_row_bytes, k_dequantize, k_blocks, v_rows, v_row_bytes, v_dequantize, v_blocks, last_key, chosen,
                chosen_row, scale):
    """out[t] = softmax(scale q[t] . (k_b^T latent, rotated)) (v_b latent) over the latents before last_key[t].

    Addresses: out float32 [T, n_v] and q float32 [T, n_nope + n_rot], rows so many bytes apart; tiles of latents as pack_latents
    leaves them, packed_tile bytes apart; k_b [kv_lora, n_nope] and v_b [n_v, kv_lora], rows of blocks; last_key int64 [T]; chosen, as
    mha.py's mark_chosen leaves it, rows chosen_row bytes apart, or 0. scale: a float32's bits.
    """
    scale = float_from_bits(np.uint32(scale))
    n_lora, n_steps = superblocks(kv_lora), steps(n_nope) + steps(n_rot)
    n_q, n_k, n_v_panels = (n_tokens + 15) // 16, 4 * steps(n_nope), (n_v + 31) // 32 * 2     # panels: queries, columns of keys and values
    query_panel = n_steps * STEP + 64
    # what is dequantized, a query, or tiles of what becomes keys and values, or of scores; then all that stays
    sizes = (max(4 * (kv_lora + 15) * (n_nope + 15) + 1024 * n_lora * 16 * n_k, 1024 * n_lora * n_v, 256 * n_steps,
                 PANELS * max(n_k, n_v_panels, GROUP) * SUMS) // 64 * 64 + 64,
             n_lora * n_k * SCALED_PANEL, n_lora * n_v_panels * (SCALED_PANEL + 64), n_q * query_panel, PANELS * (n_steps * STEP + 64),
             n_v_panels * SCALED_PANEL, GROUP * (PANEL + 64), n_q * n_v_panels * SUMS, 10 * SUMS, 4 * TILE, 128 * n_q, 128)
    scratch = own_scratch(sum(sizes))
    key_weights = scratch + sizes[0]
    value_weights = key_weights + sizes[1]
    queries = value_weights + sizes[2]
    keys = queries + sizes[3]
    values = keys + sizes[4]
    weights = values + sizes[5]
    sums = weights + sizes[6]
    buffer = sums + sizes[7]
    factors = buffer + sizes[8]
    row_max = factors + sizes[9]
    row_sum, rescale, limits = row_max + 64 * n_q, row_max + 128 * n_q, row_max + 128 * n_q + 64
    value_scales, key_scales = value_weights + n_lora * n_v_panels * SCALED_PANEL, keys + PANELS * n_steps * STEP
    weight_scales = weights + GROUP * PANEL
    pack_key_weights(k_rows, k_row_bytes, k_dequantize, k_blocks, kv_lora, n_nope, n_k, key_weights, scratch)
    pack_value_weights(v_rows, v_row_bytes, v_dequantize, v_blocks, kv_lora, n_v, n_v_panels, value_weights, value_scales, scratch)
    pack_queries(q, q_token, n_tokens, n_nope, n_rot, n_q, queries, scratch)
    for i in range(TILE):
        store(factors, 4 * i, np.float32(INT8X2_MAX))
    for i in range(16 * GROUP):
        store(weight_scales, 4 * i, OF_LEFT)
    for j in range(n_q):
        store(row_max, 64 * j, floats(MINUS_INFINITY))
        store(row_sum, 64 * j, floats(np.float32(0)))
    clear(sums, n_q * n_v_panels * SUMS)
    most = last_of(last_key, n_tokens)
    configure()
    for start in range(0, most, TILE):
        latents, n_panels = packed + start // TILE * packed_tile, (min(TILE, most - start) + 63) // 64 * 4
        make_keys(latents, n_panels, kv_lora, n_nope, n_rot, key_weights, keys, key_scales, scratch, buffer)
        make_values(latents + n_lora * LEFT, n_panels, kv_lora, n_v_panels, value_weights, value_scales, values, scratch, buffer)
        for j in range(0, n_q, GROUP):
            n_group, t = min(GROUP, n_q - j), 16 * j
            there = min(TILE, last_of(last_key + 8 * t, min(16 * GROUP, n_tokens - t)) - start)
            if there <= 0:
                continue
            n_there = (there + 63) // 64 * 4
            clear(scratch, n_there * n_group * SUMS)
            for s in range(0, n_steps, 4):
                b = queries + j * query_panel + s * STEP
                panel_products_int8x2(keys + s * STEP, n_steps * STEP, n_there, b, query_panel, n_group, min(4, n_steps - s), scratch,
                                      key_scales, (n_steps - s) * STEP, buffer, b, 0, 0, 0)
            for i in range(n_group):
                at = sums + (j + i) * n_v_panels * SUMS
                set_limits(limits, t + 16 * i, 1, n_tokens, last_key, start)
                softmax_tile(scratch + i * SUMS, n_group * SUMS, n_there, True, limits, 0,
                             chosen + (j + i) * chosen_row + 2 * start if chosen else 0, scale, row_max + 64 * (j + i),
                             row_sum + 64 * (j + i), rescale, factors, weights + i * PANEL)
                if start:
                    rescale_sums(at, n_v_panels, rescale)
            panel_products_int8x2(weights, PANEL, n_group, values, SCALED_PANEL, n_v_panels, n_there // 4, sums + j * n_v_panels * SUMS,
                                  weight_scales, PANEL, buffer, values, 0, 0, 0)
    release()
    for t in range(n_tokens):
        at, row, whole = sums + t // 16 * n_v_panels * SUMS + 64 * (t % 16), out + t * out_token, float_at(row_sum, 4 * t)
        factor = np.float32(1) / whole if whole != 0 else np.float32(0)
        for k in range(0, n_v - 15, 16):
            store(row, 4 * k, load_floats(at, k // 16 * SUMS) * factor)
        for k in range(n_v // 16 * 16, n_v):
            store(row, 4 * k, float_at(at, k // 16 * SUMS + 4 * (k % 16)) * factor)
