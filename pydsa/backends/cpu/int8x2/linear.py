"""Products with many tokens in AMX tiles of bytes: weights and activations become whole numbers of 16 bits, a high and a low byte each.

A row's next 256 weights have a scale of their own, and so have a token's next 256 activations: the largest magnitude is 32,512. Three of
the four products of bytes are taken; what is left out, low times low, is as small as what rounding loses.
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import STEP, SUMS, configure, release
from pydsa.backends.cpu.blocks.block import MINS, MINS_16, SCALES, SUPERBLOCK
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8x2, rows_prefetched
from pydsa.backends.cpu.int8x2.panels import PANEL, SCALED_PANEL, pack_int8x2, store_bytes, transpose_panel
from pydsa.backends.cpu.jit import call_intp_function, inline, inner
from pydsa.backends.cpu.lanes import both_halves, spread, transpose
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import (I32, broadcast, call_llvm, constant, f32x16, float_at, floats, i16x32, i32x16, i64_at, largest,
                                     load_8_floats, load_floats, load_int16, nearest, pointer, prefetch, store)
from pydsa.quants import INT8X2_MAX


BATCH = 4                    # rows that are unpacked, and then split: what was just written in pieces is slow to read as a whole
TWICE = spread(*range(8))
FOUR_TIMES_0, FOUR_TIMES_1 = spread(0, 1, 2, 3), spread(4, 5, 6, 7)
FOUR_TIMES_2, FOUR_TIMES_3 = spread(8, 9, 10, 11), spread(12, 13, 14, 15)


@intrinsic
def times_fraction(typingctx, a, b):
    """a b / 32768 of words, rounded; not both may be -32768."""
    def codegen(context, builder, signature, args):
        return call_llvm(builder, "llvm.x86.avx512.pmul.hr.sw.512", i16x32.ir, args)
    return i16x32(i16x32, i16x32), codegen


@intrinsic
def everywhere(typingctx, address, offset):
    """Two words in memory, again and again."""
    def codegen(context, builder, signature, args):
        word = builder.load(pointer(builder, builder.add(*args), I32), align=1)
        return builder.bitcast(broadcast(builder, word, 16), i16x32.ir)
    return i16x32(types.intp, types.intp), codegen


@intrinsic
def rounded_twice(typingctx, v):
    """f32x16 of magnitudes below 2^15 -> the nearest whole numbers as words, each in both halves of a lane."""
    def codegen(context, builder, signature, args):
        low = builder.and_(nearest(builder, args[0]), constant([0xFFFF] * 16))
        return builder.or_(low, builder.shl(low, constant([16] * 16)))
    return i32x16(f32x16), codegen


@intrinsic
def magnitude(typingctx, v):
    """|v|"""
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.and_(builder.bitcast(args[0], i32x16.ir), constant([0x7FFFFFFF] * 16)), v.ir)
    return v(v), codegen


def pack(x_at, first, n_tokens, n_in, out):
    """Tokens `first` to first + 16 of n_tokens, rows of n_in floats at addresses x_at -> a panel and 16 scales for each 256 numbers.

    The panels of the first 256 come first, one for 16 tokens each; the last token stands for those that are not there. What is not finite
    becomes a scale that is not.
    """
    n_panels = (n_tokens + 15) // 16
    for k in range(0, n_in, 256):
        panel, n = out + (k // 256 * n_panels + first // 16) * SCALED_PANEL, min(256, n_in - k)
        for i in range(16):
            top = pack_int8x2(i64_at(x_at, 8 * min(first + i, n_tokens - 1)) + 4 * k, 64, n, panel + 64 * i)
            store(panel, PANEL + 4 * i, top * np.float32(256 / INT8X2_MAX))
        transpose_panel(panel, n)


@inline
def requantize(superblock, n, mins, bits, table, at, scale_at):
    """The first n 32s of a chunk of weights, words of `bits` bits, to one row of a panel, and its scale. `table` has 320 bytes.

    A number is scale (word + h) - low for words from -h on, h being half of what `bits` hold, or 0 where there are no lows. Of the scale
    of all 256, scale h is a fraction of 15 bits, which multiplies the word's upper bits, and scale h - low a whole number.
    """
    half = TWICE(load_8_floats(superblock, SCALES)) * np.float32(1 << (bits - 1))
    offset, flip = floats(np.float32(0)), 0
    if mins:
        flip = -32768
        offset = half - (TWICE(load_8_floats(superblock, MINS)) if mins == 8 else load_floats(superblock, MINS_16))
    bound = magnitude(half) + magnitude(offset)
    top = largest(bound, bound)
    store(scale_at, 0, top / np.float32(INT8X2_MAX))
    factor = np.float32(INT8X2_MAX) / top if top > np.float32(1e-30) else np.float32(0)
    store(table, 0, rounded_twice(half * factor))
    offset = rounded_twice(offset * factor)
    store(table, 64, FOUR_TIMES_0(offset))
    store(table, 128, FOUR_TIMES_1(offset))
    store(table, 192, FOUR_TIMES_2(offset))
    store(table, 256, FOUR_TIMES_3(offset))
    for j in range(0, n, 2):
        a = times_fraction((load_int16(superblock, 64 * j) << (16 - bits)) + flip, everywhere(table, 8 * j))
        a = a + both_halves(table, 64 + 32 * j)
        b = a & 0
        if j + 1 < n:
            b = times_fraction((load_int16(superblock, 64 * j + 64) << (16 - bits)) + flip, everywhere(table, 8 * j + 8))
            b = b + both_halves(table, 96 + 32 * j)
        store_bytes(at + j // 2 * STEP, a, b)


def matmul(unpack, block, block_bytes, mins, bits, rows, n_rows, row_bytes, n_in, x, n_tokens, out_at):
    """out_at[t][r] = row r . token t of pack; at out_at lie addresses.

    Each 256 numbers of all rows are unpacked before they meet the tokens: vector and tile instructions do not like to alternate.
    """
    n_panels, n_x = (n_rows + 31) // 32 * 2, (n_tokens + 15) // 16
    next_bytes, fetched = 256 // block * block_bytes, rows_prefetched(n_panels, n_x)
    superblocks = own_scratch(BATCH * SUPERBLOCK + 384 + 10 * SUMS + n_panels * (PANEL + 64 + n_x * SUMS))
    table = superblocks + BATCH * SUPERBLOCK
    buffer = table + 384
    panels = buffer + 10 * SUMS
    scales = panels + n_panels * PANEL
    sums = scales + n_panels * 64
    for i in range(0, n_panels * n_x * SUMS, 64):
        store(sums, i, floats(np.float32(0)))
    configure()
    for k in range(0, n_in, 256):
        width = min(256, n_in - k)
        first, n_blocks = rows + k // 256 * next_bytes, width // block
        for r in range(0, n_rows, BATCH):
            for i in range(r, min(r + BATCH, n_rows)):
                source = first + i * row_bytes
                if i >= fetched:
                    for line in range(0, next_bytes, 64):
                        prefetch(source + next_bytes, line)
                call_intp_function(unpack, (source, n_blocks, superblocks + i % BATCH * SUPERBLOCK))
            for i in range(r, min(r + BATCH, n_rows)):
                superblock = superblocks + i % BATCH * SUPERBLOCK
                for j in range(width // 32, 8):
                    store(superblock, SCALES + 4 * j, np.float32(0))
                    store(superblock, MINS + 4 * j, np.float32(0))
                requantize(superblock, width // 32, mins, bits, table, panels + i // 16 * PANEL + i % 16 * 64, scales + 4 * i)
        here = x + k // 256 * n_x * SCALED_PANEL
        panel_products_int8x2(panels, PANEL, n_panels, here, SCALED_PANEL, n_x, (width + 63) // 64, sums, scales, PANEL, buffer,
                              here + 2 * SCALED_PANEL, first + next_bytes, row_bytes, n_rows)
    release()
    store_tiles(sums, n_panels, n_x, n_rows, n_tokens, out_at)


@inner
def store_tiles(sums, n_panels, n_x, n_rows, n_tokens, out_at):
    """Tiles of sums to where they belong, a token at a time."""
    for t in range(0, n_tokens, 16):
        for i in range(n_panels):
            cell = sums + (i * n_x + t // 16) * SUMS
            transpose(cell, 64, cell, 64)
        for i in range(min(16, n_tokens - t)):
            out, cells = i64_at(out_at, 8 * (t + i)), sums + t // 16 * SUMS + 64 * i
            for r in range(0, n_rows - 15, 16):
                store(out, 4 * r, load_floats(cells, r // 16 * n_x * SUMS))
            for r in range(n_rows // 16 * 16, n_rows):
                store(out, 4 * r, float_at(cells, r // 16 * n_x * SUMS + 4 * (r % 16)))
