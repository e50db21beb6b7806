"""Matrix products in int16 for many tokens.

Activations are rounded to 16 bits, for 16 tokens and fewer to 15; rows are unpacked to tiles; both are superblocks (blocks/block.py).
"""
import numpy as np

from pydsa.backends.cpu.blocks.block import (BYTES_BY_INDEX, BYTES_BY_SIGN, BYTES_IN_PAIRS, IN_COLUMNS, MINS, MINS_16, NATURAL_ORDER,
                                             ONE_SCALE, SCALES, SUPERBLOCK)
from pydsa.backends.cpu.int16.gemm import GROUP, LARGEST_SUM, TILE, TILE_ROWS, int16_products, whole_products
from pydsa.backends.cpu.int16.tiles import matmul_few, takes_few
from pydsa.backends.cpu.jit import call_intp_function, inline, inner
from pydsa.backends.cpu.jobs import read_matmul_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.byte_codes import HERE, repeat_each, split_by_index, split_by_sign
from pydsa.backends.cpu.vectors.byte_pairs import join_columns
from pydsa.backends.cpu.vectors.codes import natural_order, to_columns
from pydsa.backends.cpu.vectors.lanes import (first_quarter, group_maxima, half_group_sums, last_quarter, second_quarter, sum_abs,
                                              sums_of_pairs, sums_of_two, third_quarter, transpose)
from pydsa.backends.cpu.vectors.rounding import max_abs_of, quotients
from pydsa.backends.cpu.vectors.simd import (INT16_TOKENS, eight_floats, float_at, floats, i64_at, load_8_floats, load_floats,
                                             max_abs_lanes, prefetch, reduce_max_abs, round_int16, stack_memory, store, sums_of_16, u8_at)


MAX_INT16 = 32767         # activation of prompts, rounded
MAX_INT15 = 16383         # rounded activation: 32 of them times Q6_K's largest weights, 4096, still fit into 32 bits
BATCH = 4                # register blocks of tokens after which the next tile comes: 15 KiB of activations beside a tile of 20
BATCH_LINES = BATCH * INT16_TOKENS * SUPERBLOCK // 64       # cache lines of their activations


def round_row(x, n, order, out, stride):
    """Round n floats to superblocks, `stride` bytes apart.

    They are permuted as `order` says (blocks/block.py), which may also ask for one scale for all 256. n is a multiple of 32; the rest of a
    superblock is 0. A value that is not finite makes the scale not finite.
    """
    flags, rest = u8_at(order, 0), stack_memory()
    for k in range(0, n, 256):      # all scales first: a superblock's would be waited for
        source = x + 4 * k
        if n - k < 256:
            source = rest
            for at in range(0, 1024, 64):
                store(rest, at, load_floats(x + 4 * k, at) if at < 4 * (n - k) else floats(np.float32(0)))
        maxima = eight_floats(max_abs_of(source, 256)) if flags & ONE_SCALE else group_maxima(source)
        store(out + k // 256 * stride, SCALES, maxima * np.float32(1 / MAX_INT15))
        store(out + k // 256 * stride, MINS, quotients(np.float32(MAX_INT15), maxima))       # until the mins are known
    for k in range(0, n, 256):
        superblock = out + k // 256 * stride
        round_256(x + 4 * k, min(8, (n - k) // 32), order, superblock)
        if flags & IN_COLUMNS:
            to_columns(superblock)
            if HERE and u8_at(order, 1) & (BYTES_BY_SIGN | BYTES_BY_INDEX):
                split_columns(superblock, u8_at(order, 1))
            if HERE and u8_at(order, 1) & BYTES_IN_PAIRS:
                join_to_pair(superblock, k // 256, (n + 255) // 256, stride)


@inner
def round_256(x, n, order, superblock):
    """Round n groups of 32 floats to a superblock that has their scales."""
    sums, flags, scales = stack_memory(), u8_at(order, 0), load_8_floats(superblock, SCALES)
    for j in range(n):
        values = round_int16(load_floats(x, 128 * j), load_floats(x, 128 * j + 64), float_at(superblock, MINS + 4 * j))
        store(sums, 64 * j, sums_of_two(values))
        if flags & NATURAL_ORDER:
            values = natural_order(values)
        if flags & IN_COLUMNS:
            store(superblock, 64 * j, values)       # is loaded as a whole at once
        else:
            store_pieces(superblock, values, order + 4 * j)
    totals = half_group_sums(sums)
    store(superblock, MINS, sums_of_pairs(totals) * scales)
    store(superblock, MINS_16, totals * repeat_each(scales))


@inline
def store_pieces(superblock, values, order):
    """Store the quarters of 32 int16 where an order has them."""
    store(superblock, 16 * (u8_at(order, 0) & 31), first_quarter(values))
    store(superblock, 16 * (u8_at(order, 1) & 31), second_quarter(values))
    store(superblock, 16 * (u8_at(order, 2) & 31), third_quarter(values))
    store(superblock, 16 * (u8_at(order, 3) & 31), last_quarter(values))


@inner
def join_to_pair(superblock, i, n, stride):
    """Join the i-th superblock of n in columns with the one before it.

    Or with zeros behind it, where an odd number ends.
    """
    if i % 2:
        join_columns(superblock - stride, superblock)
    elif i == n - 1:
        for at in range(0, SUPERBLOCK, 64):
            store(superblock + stride, at, floats(np.float32(0)))
        join_columns(superblock, superblock + stride)


@inner
def split_columns(superblock, flags):
    """Split a superblock's columns into bytes, and repeat each scale."""
    store(superblock, SCALES, repeat_each(load_8_floats(superblock, SCALES)))
    if flags & BYTES_BY_SIGN:
        split_by_sign(superblock)
    else:
        split_by_index(superblock)


def pack(x_at, first, n_tokens, n_in, out):
    """Round tokens `first` to first + 16 of n_tokens to superblocks.

    x_at holds the addresses of rows of n_in floats. The first superblocks of all tokens come first.
    """
    for t in range(first, min(first + 16, n_tokens)):
        for k in range(0, n_in, 256):
            round_superblock(i64_at(x_at, 8 * t) + 4 * k, min(256, n_in - k), out + (k // 256 * n_tokens + t) * SUPERBLOCK)


@inner
def round_superblock(x, n, superblock):
    """Round n floats, a multiple of 32, to a superblock with one scale.

    The rest is 0. Sums, in place of the mins, are of the integers. A value that is not finite makes the scale not finite.
    """
    scale = scale_of(x, n)
    store(superblock, SCALES, scale)
    factor = np.float32(1) / scale if scale > np.float32(1e-34) else np.float32(0)
    for j in range((n + 31) // 32):
        values = round_int16(load_floats(x, 128 * j), load_floats(x, 128 * j + 64), factor)
        first, second = sums_of_16(values)
        store(superblock, 64 * j, values)
        store(superblock, MINS + 4 * j, first + second)
        store(superblock, MINS_16 + 8 * j, first)
        store(superblock, MINS_16 + 8 * j + 4, second)
    zeros = floats(np.float32(0))
    for j in range((n + 31) // 32, 8):
        store(superblock, 64 * j, zeros)
        store(superblock, MINS + 4 * j, np.float32(0))
        store(superblock, MINS_16 + 8 * j, np.float32(0))
        store(superblock, MINS_16 + 8 * j + 4, np.float32(0))


@inner
def scale_of(x, n):
    """Return the scale with which n floats, at most 256, are rounded.

    The largest magnitude becomes at most MAX_INT16, and the sum of the magnitudes of each GROUP at most LARGEST_SUM.
    """
    top, largest = floats(np.float32(0)), np.float32(0)
    for k in range(0, n, GROUP):
        a, b = load_floats(x, 4 * k), load_floats(x, 4 * k + 64)
        top, share = max_abs_lanes(top, max_abs_lanes(a, b)), sum_abs(a, b)
        if k + 32 < n:
            a, b = load_floats(x, 4 * k + 128), load_floats(x, 4 * k + 192)
            top, share = max_abs_lanes(top, max_abs_lanes(a, b)), share + sum_abs(a, b)
        largest = max(largest, share)
    scale, least = reduce_max_abs(top, top) / np.float32(MAX_INT16), largest * np.float32(1 / LARGEST_SUM)
    return least if least > scale else scale        # NaN stays


def matmul(job_at):
    """Run a MatmulJob: rows of weights times packed tokens."""
    job = read_matmul_job(job_at)
    if takes_few(job):
        matmul_few(job)
        return
    next_bytes = 256 // job.block * job.block_bytes
    padded = (job.n_tokens + INT16_TOKENS - 1) // INT16_TOKENS * INT16_TOKENS     # padded by repeating the last token
    n_tiles = (job.n_rows + TILE_ROWS - 1) // TILE_ROWS
    mins, mins_16 = 8 if job.mins == 8 else 0, 16 if job.mins == 16 else 0
    n_sums, tile_bytes = n_tiles * TILE_ROWS, TILE_ROWS // 16 * TILE
    superblocks = thread_scratch(job.thread, TILE_ROWS * SUPERBLOCK + n_tiles * tile_bytes + 4 * padded * n_sums + 3 * 8 * padded)
    tiles = superblocks + TILE_ROWS * SUPERBLOCK
    sums = tiles + n_tiles * tile_bytes
    tables = sums + 4 * padded * n_sums         # addresses of the tokens, of their sums, and of their output
    for t in range(padded):
        store(tables, 8 * t, job.x + (job.first + min(t, job.n_tokens - 1)) * SUPERBLOCK)
        store(tables, 8 * (padded + t), sums + 4 * n_sums * t)
        store(tables, 8 * (2 * padded + t), i64_at(job.out_at, 8 * t) if t < job.n_tokens else sums + 4 * n_sums * t)
    for k in range(0, job.n_in, 256):
        width = min(256, job.n_in - k)
        for i in range(n_tiles):
            n = min(TILE_ROWS, job.n_rows - i * TILE_ROWS)
            first = job.rows + i * TILE_ROWS * job.row_bytes + k // job.block * job.block_bytes
            if k == 0:      # the next tile's first superblocks, which no product has prefetched
                for r in range(TILE_ROWS, min(2 * TILE_ROWS, job.n_rows - i * TILE_ROWS)):
                    for line in range(0, next_bytes, 64):
                        prefetch(first + r * job.row_bytes, line)
            pack_tile(tiles + i * tile_bytes, superblocks, job.unpack, first, n, job.row_bytes, width // job.block, width // 32, job.mins)
        x_offset, before = k // 256 * job.n_packed * SUPERBLOCK, tables + 8 * padded
        for t0 in range(0, padded, BATCH * INT16_TOKENS):
            current = job.rows + k // job.block * job.block_bytes      # prefetch their next superblock meanwhile: they are far apart
            for r in range(job.n_rows * t0 // padded, job.n_rows * min(t0 + BATCH * INT16_TOKENS, padded) // padded):
                for line in range(next_bytes, 2 * next_bytes, 64):
                    prefetch(current + r * job.row_bytes, line)
            following = job.x + x_offset + (job.first + t0 + BATCH * INT16_TOKENS) * SUPERBLOCK
            for i in range(n_tiles):
                for line in range(BATCH_LINES * i // n_tiles, BATCH_LINES * (i + 1) // n_tiles):
                    prefetch(following, 64 * line)      # the activations of the next batch
                out = tables + 8 * padded * (2 if k + 256 >= job.n_in and (i + 1) * TILE_ROWS <= job.n_rows else 1)
                for t in range(8 * t0, 8 * min(t0 + BATCH * INT16_TOKENS, padded), 8 * INT16_TOKENS):
                    if job.one_scale:
                        whole_products(tiles + i * tile_bytes, 8, mins, mins_16, tables + t, x_offset, before + t if k else 0, out + t,
                                       4 * i * TILE_ROWS)
                    else:
                        int16_products(tiles + i * tile_bytes, width // 32, mins, mins_16, tables + t, x_offset, before + t if k else 0,
                                       out + t, 4 * i * TILE_ROWS)
    for t in range(job.n_tokens):
        for r in range(job.n_rows // TILE_ROWS * TILE_ROWS, job.n_rows):
            store(i64_at(job.out_at, 8 * t), 4 * r, float_at(sums, 4 * (n_sums * t + r)))


@inner
def pack_tile(tile, superblocks, unpack, rows, n, row_bytes, n_blocks, n_scales, mins):
    """Unpack n_blocks blocks of n rows and transpose them to tiles."""
    for i in range(n):
        superblock = superblocks + i * SUPERBLOCK
        call_intp_function(unpack, (rows + i * row_bytes, n_blocks, superblock))
        for j in range(n_scales, 8):
            store(superblock, SCALES + 4 * j, np.float32(0))
            store(superblock, MINS + 4 * j, np.float32(0))
    for i in range(0, n, 16):
        for column in range(0, SUPERBLOCK if mins == 16 else MINS_16, 64):
            transpose(superblocks + i * SUPERBLOCK + column, SUPERBLOCK, tile + i // 16 * TILE + 16 * column, 64)
