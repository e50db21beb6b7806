"""Products with many tokens in AMX tiles: rows are unpacked and split into bfloat16 pairs (amx.py), as activations are."""
import numpy as np

from pydsa.backends.cpu.amx import (LOW_PARTS, STEP, SUMS, configure, evens, odds, pair, panel_products, release, rows_fetched,
                                    scaled_products, store_split)
from pydsa.backends.cpu.microkernels import turn_over
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.jit import call_word_function, inner
from pydsa.quants.block import CHUNK, LOW, LOW_16, SCALE
from pydsa.simd import (float_at, floats, i64_at, load_2_floats, load_8_floats, load_16_words, load_floats, prefetch, spread, store,
                        to_floats, total)

PANEL = 8 * STEP        # 16 rows of a chunk
EXACT = 8 * 1024        # the same of numbers that have no low parts
EXACT_PANELS = 2        # of tokens up to which these numbers are scaled after they are multiplied
LOW_HIGH = spread(0, 1)


def prepare_splits(x_at, first, n_tokens, n_in, out):
    """Tokens `first` to first + 16 of n_tokens, rows of n_in floats at addresses x_at -> a panel for each 256 numbers; then of sums of 32.

    The panels of the first 256 come first, one for 16 tokens each; the last token stands for those that are not there. What exact_rows
    needs follows if it will be used: zeros after the last number, and after all panels the sums of each 32, 32 a step, a panel a piece.
    """
    n_panels, n_steps = (n_tokens + 15) // 16, sum_steps(n_in)
    exact = n_panels <= EXACT_PANELS
    sums = own_scratch(16 * 128 * n_steps)
    for k in range(0, (n_in + 255) // 256 * 256 if exact else n_in, 32):
        at = out + (k // 256 * n_panels + first // 16) * PANEL + k % 256 // 32 * STEP
        for i in range(16):
            a = b = floats(np.float32(0))
            if k < n_in:
                x = i64_at(x_at, 8 * min(first + i, n_tokens - 1)) + 4 * k
                a, b = load_floats(x, 0), load_floats(x, 64)
            store_split(at + 64 * i, evens(a, b), odds(a, b))
            if exact:
                store(sums, 128 * n_steps * i + k // 8, total(a + b))
        turn_step(at)
    if exact:
        for i in range(16):
            for k in range((n_in + 255) // 256 * 8, 32 * n_steps):
                store(sums, 128 * n_steps * i + 4 * k, np.float32(0))
        panel = sums_panel(out, n_panels, n_in) + first // 16 * n_steps * STEP
        split_sums(sums, n_steps, np.float32(1), panel)
        for k in range(n_steps):
            turn_step(panel + k * STEP)


@inner
def turn_step(at):
    """A step of a left panel as that of a right one."""
    turn_over(at, 64, at, 64)
    turn_over(at + LOW_PARTS, 64, at + LOW_PARTS, 64)


@inner
def sum_steps(n_in):
    """Steps of 32 sums of 32 numbers each."""
    return (n_in + 1023) // 1024


@inner
def sums_panel(x, n_panels, n_in):
    """Where the sums of prepared activations begin."""
    return x + (n_in + 255) // 256 * n_panels * PANEL


@inner
def split_sums(sums, n_steps, sign, panel):
    """Sixteen rows of 32 * n_steps floats, times a sign, as a left panel."""
    for i in range(16):
        for k in range(n_steps):
            a, b = load_floats(sums, 128 * (i * n_steps + k)), load_floats(sums, 128 * (i * n_steps + k) + 64)
            store_split(panel + k * STEP + 64 * i, evens(a, b) * sign, odds(a, b) * sign)


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
        first, n_blocks, fetched = rows + k // 256 * next_bytes, width // block, rows_fetched(n_panels, n_x, width // 32)
        for r in range(n_rows):
            source = first + r * row_bytes
            if r >= fetched:
                for line in range(0, next_bytes, 64):
                    prefetch(source + next_bytes, line)
            call_word_function(unpack, (source, n_blocks, chunk))
            split_chunk(chunk, width // 32, lows, panels + r // 16 * PANEL + r % 16 * 64)
        here = x + k // 256 * n_x * PANEL
        panel_products(panels, PANEL, n_panels, here, PANEL, n_x, width // 32, sums, k == 0,
                       here + 2 * PANEL, first + next_bytes, row_bytes, n_rows)
    release()
    leave(sums, n_panels, n_x, n_rows, n_tokens, out_at)


@inner
def leave(sums, n_panels, n_x, n_rows, n_tokens, out_at):
    """Tiles of sums to where they belong, a token at a time."""
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


_split_rows = inner(split_rows)


def exact_rows(unpack, block, block_bytes, lows, rows, n_rows, row_bytes, n_in, x, n_tokens, out_at):
    """split_rows for types whose words are numbers of 8 bits, which one bfloat16 holds: for few tokens, where unpacking costs the most.

    Products of 32 numbers are scaled as they leave the tile registers. Lows times the activations' sums are subtracted at the end.
    """
    if n_tokens > 16 * EXACT_PANELS:
        _split_rows(unpack, block, block_bytes, lows, rows, n_rows, row_bytes, n_in, x, n_tokens, out_at)
        return
    n_panels, n_x, n_steps, next_bytes = (n_rows + 15) // 16, (n_tokens + 15) // 16, sum_steps(n_in), 256 // block * block_bytes
    low_bytes = 128 * n_steps       # of a row
    chunk = own_scratch(CHUNK + 4 * SUMS + n_panels * (EXACT + 16 * 32 + n_x * SUMS + 16 * low_bytes) + n_steps * STEP)
    buffer = chunk + CHUNK
    panels = buffer + 4 * SUMS
    sums = panels + n_panels * EXACT
    scales = sums + n_panels * n_x * SUMS
    row_lows = scales + n_panels * 16 * 32
    low_panel = row_lows + n_panels * 16 * low_bytes
    configure()
    for k in range(0, n_in, 256):
        width = min(256, n_in - k)
        first, n_blocks = rows + k // 256 * next_bytes, width // block
        for r in range(n_rows):
            call_word_function(unpack, (first + r * row_bytes, n_blocks, chunk))
            for j in range(width // 32, 8):
                store(chunk, SCALE + 4 * j, np.float32(0))
                store(chunk, LOW + 4 * j, np.float32(0))
            panel = panels + r // 16 * EXACT + r % 16 * 64
            for j in range(8):
                store(panel, SUMS * j, pair(to_floats(load_16_words(chunk, 64 * j)), to_floats(load_16_words(chunk, 64 * j + 32))))
            store(scales, 32 * r, load_8_floats(chunk, SCALE))
            if lows:
                store(row_lows, r * low_bytes + k // 8, load_8_floats(chunk, LOW))
        for j in range(n_x):
            here = x + (k // 256 * n_x + j) * PANEL
            for i in range(n_panels):
                ahead = first + next_bytes + i * 16 * row_bytes if j == 0 else here
                scaled_products(panels + i * EXACT, scales + i * 16 * 32, here, sums + (i * n_x + j) * SUMS, k == 0, buffer,
                                ahead, row_bytes if j == 0 else 0)
    if lows:
        for r in range(n_rows):
            for k in range((n_in + 255) // 256 * 32, low_bytes, 4):
                store(row_lows, r * low_bytes + k, np.float32(0))
        for i in range(n_panels):
            split_sums(row_lows + i * 16 * low_bytes, n_steps, np.float32(-1), low_panel)
            panel_products(low_panel, 0, 1, sums_panel(x, n_x, n_in), n_steps * STEP, n_x, n_steps, sums + i * n_x * SUMS, False,
                           x, x, 0, 0)
    release()
    leave(sums, n_panels, n_x, n_rows, n_tokens, out_at)


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
