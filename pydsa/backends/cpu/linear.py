"""Products with GGUF weights, in place: rows of blocks times rows of activations.

Quantized weights meet activations rounded to 15 bits, in chunks (quants/block.py): for a few tokens block by block as the file stores them,
each weight byte read once; for many tokens in tiles of unpacked rows. Other weights are unpacked to float32 a tile at a time.
"""
import numpy as np
from numba import prange

from pydsa.backends.cpu.microkernels import TILE, TILE_ROWS, WORD_TOKENS, address, n_threads, tile_products, turn_over, word_products
from pydsa.backends.cpu.scratch import callers_scratch, own_scratch
from pydsa.jit import call_block_function, call_word_function, inner, kernel
from pydsa.quants.block import CHUNK, LOW, LOW_16, SCALE
from pydsa.simd import (first_quarter, float_at, i64_at, largest, last_quarter, load_floats, prefetch, rounded_words,
                        second_quarter, store, sums_of_16, third_quarter, u8_at)

GROUP = 128             # rows at most that are multiplied with many tokens at a time, so that activations are fetched for all of them
TURN = 4                # register blocks of tokens after which the next tile comes: 15 KiB of activations beside a tile of 20
FEW = 3                 # tokens up to which blocks are not unpacked
NEAR = 16               # rows that these tokens take turns on, within a first-level cache
LARGEST = 16383         # of a rounded activation: 32 of them times Q6_K's largest weights, 4096, still fit into 32 bits
FLOAT_ROWS, FLOAT_WIDTH = 4, 256        # a tile of unquantized weights, 4 KiB of floats


def round_row(x, n, order, out, stride):
    """n floats -> chunks `stride` bytes apart, pieces in an order (0: as they come); n is a multiple of 32, the rest of a chunk becomes 0.

    What is not finite becomes a scale that is not.
    """
    for k in range(0, (n + 255) // 256 * 256, 32):
        chunk, j = out + k // 256 * stride, k // 32 % 8
        scale, first, second = np.float32(0), np.float32(0), np.float32(0)
        if k < n:
            a, b = load_floats(x, 4 * k), load_floats(x, 4 * k + 64)
            top = largest(a, b)
            scale = top / np.float32(LARGEST)
            words = rounded_words(a, b, np.float32(LARGEST) / top if top > np.float32(1e-30) else np.float32(0))
            if order:
                store(chunk, 16 * u8_at(order, 4 * j), first_quarter(words))
                store(chunk, 16 * u8_at(order, 4 * j + 1), second_quarter(words))
                store(chunk, 16 * u8_at(order, 4 * j + 2), third_quarter(words))
                store(chunk, 16 * u8_at(order, 4 * j + 3), last_quarter(words))
            else:
                store(chunk, 64 * j, words)
            first, second = sums_of_16(words)
        store(chunk, SCALE + 4 * j, scale)
        store(chunk, LOW + 4 * j, scale * (first + second))
        store(chunk, LOW_16 + 8 * j, scale * first)
        store(chunk, LOW_16 + 8 * j + 4, scale * second)


def float_rows(dequantize, block, block_bytes, rows, n_rows, row_bytes, n_in, x_at, n_tokens, out_at):
    """out_at[t][r] = row r . x_at[t]; at x_at and out_at lie addresses, one a token, of floats."""
    tile = np.empty((FLOAT_ROWS, FLOAT_WIDTH), np.float32)
    for t in range(n_tokens):
        for r in range(n_rows):
            store(i64_at(out_at, 8 * t), 4 * r, np.float32(0))
    for r in range(0, n_rows, FLOAT_ROWS):
        n = min(FLOAT_ROWS, n_rows - r)
        for k in range(0, n_in, FLOAT_WIDTH):
            width = min(FLOAT_WIDTH, n_in - k)
            for i in range(n):
                call_block_function(dequantize, rows + (r + i) * row_bytes + k // block * block_bytes, width // block, address(tile[i]))
            tile_products(address(tile), 4 * FLOAT_WIDTH, n, x_at, n_tokens, 4 * k, width, out_at, 4 * r)


def word_rows(unpack, block, block_bytes, lows, rows, n_rows, row_bytes, n_in, x_at, x_step, n_tokens, out_at):
    """out_at[t][r] = row r . the chunks at x_at[t], x_at[t] + x_step, ..."""
    padded = (n_tokens + WORD_TOKENS - 1) // WORD_TOKENS * WORD_TOKENS     # the last token stands for those that are not there
    n_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    n_sums, tile_bytes = n_tiles * TILE_ROWS, TILE_ROWS // 16 * TILE
    chunks = own_scratch(TILE_ROWS * CHUNK + n_tiles * tile_bytes + 4 * padded * n_sums + 3 * 8 * padded)
    tiles = chunks + TILE_ROWS * CHUNK
    sums = tiles + n_tiles * tile_bytes
    tables = sums + 4 * padded * n_sums         # where the tokens are, their sums, and what becomes of them
    for t in range(padded):
        store(tables, 8 * t, i64_at(x_at, 8 * min(t, n_tokens - 1)))
        store(tables, 8 * (padded + t), sums + 4 * n_sums * t)
        store(tables, 8 * (2 * padded + t), i64_at(out_at, 8 * t) if t < n_tokens else sums + 4 * n_sums * t)
    for k in range(0, n_in, 256):
        width = min(256, n_in - k)
        for i in range(n_tiles):
            n = min(TILE_ROWS, n_rows - i * TILE_ROWS)
            first = rows + i * TILE_ROWS * row_bytes + k // block * block_bytes
            make_tile(tiles + i * tile_bytes, chunks, unpack, first, n, row_bytes, width // block, width // 32, lows)
        for t0 in range(0, padded, TURN * WORD_TOKENS):
            here = rows + k // block * block_bytes      # of these rows the next chunk is asked for meanwhile: they lie far apart
            for r in range(n_rows * t0 // padded, n_rows * min(t0 + TURN * WORD_TOKENS, padded) // padded):
                for line in range(0, 256 // block * block_bytes, 64):
                    prefetch(here + r * row_bytes + 256 // block * block_bytes, line)
            for i in range(n_tiles):
                for t in range(min(t0 + TURN * WORD_TOKENS, padded), min(t0 + 2 * TURN * WORD_TOKENS, padded)):
                    for line in range(10 * i // n_tiles, 10 * (i + 1) // n_tiles):      # and of the activations of the next turn
                        prefetch(i64_at(tables, 8 * t) + k // 256 * x_step, 64 * line)
                out = tables + 8 * padded * (2 if k + 256 >= n_in and (i + 1) * TILE_ROWS <= n_rows else 1)
                for t in range(8 * t0, 8 * min(t0 + TURN * WORD_TOKENS, padded), 8 * WORD_TOKENS):
                    word_products(tiles + i * tile_bytes, width // 32, 8 if lows == 8 else 0, 16 if lows == 16 else 0, tables + t,
                                  k // 256 * x_step, tables + 8 * padded + t if k else 0, out + t, 4 * i * TILE_ROWS)
    for t in range(n_tokens):
        for r in range(n_rows // TILE_ROWS * TILE_ROWS, n_rows):
            store(i64_at(out_at, 8 * t), 4 * r, float_at(sums, 4 * (n_sums * t + r)))


@inner
def make_tile(tile, chunks, unpack, rows, n, row_bytes, n_blocks, n_scales, lows):
    """A tile of the chunks of n rows, n_blocks blocks of each."""
    for i in range(n):
        chunk = chunks + i * CHUNK
        call_word_function(unpack, (rows + i * row_bytes, n_blocks, chunk))
        for j in range(n_scales, 8):
            store(chunk, SCALE + 4 * j, np.float32(0))
            store(chunk, LOW + 4 * j, np.float32(0))
    for i in range(0, n, 16):
        for column in range(0, CHUNK if lows == 16 else LOW_16, 64):
            turn_over(chunks + i * CHUNK + column, CHUNK, tile + i // 16 * TILE + 16 * column, 64)


@inner
def addresses(first, stride, n):
    """first, first + stride, ...: where the rows of an array begin."""
    at = np.empty(n, np.int64)
    for i in range(n):
        at[i] = first + i * stride
    return at


@inner
def rounded_bytes(w, n_in):
    """What a rounded row of activations takes; nothing for weights that are not quantized."""
    return (n_in + 255) // 256 * CHUNK if w.dot else 0


@inner
def round_input(w, few, x, n, n_in, room, i):
    """Row i of n activations at the address x into the room: rows of chunks for few tokens, the first chunks of all rows for many."""
    if few:
        call_word_function(w.round_row, (x, n_in, w.order, room + i * rounded_bytes(w, n_in), CHUNK))
    else:
        call_word_function(w.round_row, (x, n_in, 0, room + i * CHUNK, n * CHUNK))


@inner
def few_rows(w, rows, n_rows, n_in, x, x_stride, n_tokens, out, out_stride):
    """out[t][r] = row r . chunks x[t], for a few tokens: n_rows rows at an address, each read once from memory."""
    n, row_bytes = n_in // w.block, n_in // w.block * w.block_bytes
    together = n_rows if n_tokens == 1 else NEAR
    for r in range(0, n_rows, together):
        for t in range(n_tokens):
            call_word_function(w.dot, (rows + r * row_bytes, min(together, n_rows - r), n, x + t * x_stride, out + t * out_stride + 4 * r))


@inner
def many_rows(w, rows, n_rows, n_in, x_at, x_step, out_at):
    """out_at[t][r] = row r . x_at[t], for many tokens, or weights that are not quantized; x_at, out_at: int64 arrays of addresses."""
    row_bytes = n_in // w.block * w.block_bytes
    if w.dot:
        call_word_function(w.times, (w.unpack, w.block, w.block_bytes, w.lows, rows, n_rows, row_bytes, n_in, address(x_at), x_step,
                                     x_at.size, address(out_at)))
    else:
        call_word_function(w.times, (w.dequantize, w.block, w.block_bytes, rows, n_rows, row_bytes, n_in, address(x_at), x_at.size,
                                     address(out_at)))


@inner
def rows_a_task(n_rows, few):
    """Rows that a thread takes at a time, the same for each: for a few tokens its share of all, which it reads in one stretch."""
    share = (n_rows + n_threads() - 1) // n_threads()
    if few:
        return max(4, share)
    turns = (share + GROUP - 1) // GROUP
    return ((share + turns - 1) // turns + 15) // 16 * 16


@kernel(parallel=True)
def linear(out, w, x):
    n_out, row_bytes = w.data.shape
    n_tokens, n_in = x.shape
    few, x_bytes = n_tokens <= FEW, rounded_bytes(w, n_in)
    room = callers_scratch(n_tokens * x_bytes)
    x_at = addresses(address(x), x.strides[0], n_tokens)
    if w.dot:
        if few:
            for t in range(n_tokens):
                round_input(w, few, x_at[t], n_tokens, n_in, room, t)
        else:
            for t in prange(n_tokens):
                round_input(w, few, x_at[t], n_tokens, n_in, room, t)
            x_at = addresses(room, CHUNK, n_tokens)
    size = rows_a_task(n_out, few)
    for task in prange((n_out + size - 1) // size):
        r = task * size
        rows, n = address(w.data) + r * row_bytes, min(size, n_out - r)
        if few and w.dot:
            few_rows(w, rows, n, n_in, room, x_bytes, n_tokens, address(out) + 4 * r, out.strides[0])
        else:
            many_rows(w, rows, n, n_in, x_at, n_tokens * CHUNK, addresses(address(out) + 4 * r, out.strides[0], n_tokens))


@kernel(parallel=True)
def head_linear(out, w, x):
    n_head, n_out, row_bytes = w.data.shape
    n_tokens, n_in = x.shape[0], x.shape[2]
    few, n, x_bytes = n_tokens <= FEW, n_tokens * n_head, rounded_bytes(w, n_in)
    room = callers_scratch(n * x_bytes)
    size = rows_a_task(n_out, few)
    if n_head >= n_threads():
        size = n_out if few else min(n_out, GROUP)
    groups = (n_out + size - 1) // size
    if w.dot and few:
        for i in range(n):      # head by head, so that what is multiplied together lies together
            round_input(w, few, address(x) + i % n_tokens * x.strides[0] + i // n_tokens * x.strides[1], n, n_in, room, i)
    elif w.dot:
        for i in prange(n):
            round_input(w, few, address(x) + i % n_tokens * x.strides[0] + i // n_tokens * x.strides[1], n, n_in, room, i)
    for task in prange(n_head * groups):
        h, r = task // groups, task % groups * size
        rows, rows_n = address(w.data) + (h * n_out + r) * row_bytes, min(size, n_out - r)
        target = address(out) + h * out.strides[1] + 4 * r
        if few and w.dot:
            few_rows(w, rows, rows_n, n_in, room + h * n_tokens * x_bytes, x_bytes, n_tokens, target, out.strides[0])
        else:
            x_at = addresses(address(x) + h * x.strides[1], x.strides[0], n_tokens)
            if w.dot:
                x_at = addresses(room + h * n_tokens * CHUNK, CHUNK, n_tokens)
            many_rows(w, rows, rows_n, n_in, x_at, n * CHUNK, addresses(target, out.strides[0], n_tokens))
