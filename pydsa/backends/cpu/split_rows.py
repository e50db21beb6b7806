"""Products with many tokens in AMX tiles: rows are unpacked and split into bfloat16 pairs (amx.py), as activations are."""
import numpy as np

from pydsa.backends.cpu.amx import LOW_PARTS, STEP, SUMS, configure, panel_products, release, split
from pydsa.backends.cpu.microkernels import turn_over
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.jit import call_word_function, inline, inner
from pydsa.quants.block import CHUNK, LOW, LOW_16, SCALE
from pydsa.simd import (evens, float_at, floats, i64_at, load_2_floats, load_16_words, load_floats, odds, prefetch, spread, store,
                        to_floats)

PANEL = 8 * STEP        # 16 rows of a chunk
LOW_HIGH = spread(0, 1)


def prepare_splits(x_at, first, n_tokens, n_in, out):
    """Tokens `first` to first + 16 of n_tokens, rows of n_in floats at addresses x_at -> a panel for each 256 numbers.

    The panels of the first 256 come first, one for 16 tokens each; the last token stands for those that are not there.
    """
    n_panels = (n_tokens + 15) // 16
    for k in range(0, n_in, 32):
        at = out + (k // 256 * n_panels + first // 16) * PANEL + k % 256 // 32 * STEP
        for i in range(16):
            x = i64_at(x_at, 8 * min(first + i, n_tokens - 1)) + 4 * k
            a, b = load_floats(x, 0), load_floats(x, 64)
            store_split(at + 64 * i, evens(a, b), odds(a, b))
        turn_over(at, 64, at, 64)
        turn_over(at + LOW_PARTS, 64, at + LOW_PARTS, 64)


@inline
def store_split(at, even, odd):
    high, low = split(even, odd)
    store(at, 0, high)
    store(at, LOW_PARTS, low)


def split_rows(unpack, block, block_bytes, lows, rows, n_rows, row_bytes, n_in, x, n_tokens, out_at):
    """out_at[t][r] = row r . token t of prepare_splits; at out_at lie addresses.

    Each 256 numbers of all rows are unpacked before they meet the tokens: vector and tile instructions do not like to alternate.
    """
    n_panels, n_x = (n_rows + 15) // 16, (n_tokens + 15) // 16
    next_bytes = 256 // block * block_bytes
    chunk = own_scratch(CHUNK + n_panels * PANEL + n_panels * n_x * SUMS)
    panels = chunk + CHUNK
    sums = panels + n_panels * PANEL
    configure()
    for k in range(0, n_in, 256):
        width = min(256, n_in - k)
        first, n_blocks = rows + k // 256 * next_bytes, width // block
        for r in range(n_rows):
            source = first + r * row_bytes
            for line in range(0, next_bytes, 64):
                prefetch(source + next_bytes, line)
            call_word_function(unpack, (source, n_blocks, chunk))
            split_chunk(chunk, width // 32, lows, panels + r // 16 * PANEL + r % 16 * 64)
        here = x + k // 256 * n_x * PANEL
        panel_products(panels, PANEL, n_panels, here, PANEL, n_x, width // 32, sums, k == 0, here + 2 * PANEL)
    release()
    for t in range(0, n_tokens, 16):
        for i in range(n_panels):
            cell = sums + (i * n_x + t // 16) * SUMS
            turn_over(cell, 64, cell, 64)
        for i in range(min(16, n_tokens - t)):
            out, cells = i64_at(out_at, 8 * (t + i)), sums + t // 16 * SUMS + 64 * i
            for r in range(0, n_rows - 15, 16):
                store(out, 4 * r, load_floats(cells, r // 16 * n_x * SUMS))
            for r in range(n_rows // 16 * 16, n_rows):
                store(out, 4 * r, float_at(cells, r // 16 * n_x * SUMS + 4 * (r % 16)))


@inner
def split_chunk(chunk, n, lows, at):
    """The first n 32s of a chunk of weights to the steps of one row of a panel."""
    for j in range(n):
        scale, low = floats(float_at(chunk, SCALE + 4 * j)), floats(np.float32(0))
        if lows == 8:
            low = floats(float_at(chunk, LOW + 4 * j))
        elif lows == 16:
            low = LOW_HIGH(load_2_floats(chunk, LOW_16 + 8 * j))
        even, odd = to_floats(load_16_words(chunk, 64 * j)), to_floats(load_16_words(chunk, 64 * j + 32))
        store_split(at + STEP * j, even * scale - low, odd * scale - low)
