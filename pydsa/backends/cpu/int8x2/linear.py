"""Matrix products in AMX tiles of int8 for many tokens.

Weights and activations are rounded to int16, split into a high and a low byte each. Each 256 weights of a row have their own scale, and so
have each 256 activations of a token: the largest magnitude becomes 32,512. Three of the four products of bytes are computed; what is left
out, low times low, is as small as the rounding error.
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.blocks.block import MINS, MINS_16, SCALES, SUPERBLOCK
from pydsa.backends.cpu.int8x2.gemm import panel_products_int8x2, rows_prefetched
from pydsa.backends.cpu.int8x2.panels import PANEL, SCALED_PANEL, pack_int8x2, store_step, transpose_panel
from pydsa.backends.cpu.jit import call_intp_function, inline, inner
from pydsa.backends.cpu.jobs import read_matmul_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.amx import STEP, TILE_BYTES, configure, release
from pydsa.backends.cpu.vectors.lanes import both_halves, spread, transpose
from pydsa.backends.cpu.vectors.simd import (I32, broadcast, call_llvm, constant, f32x16, float_at, floats, i16x32, i32x16, i64_at,
                                             load_8_floats, load_floats, load_int16, nearest, pointer, prefetch, reduce_max_abs, store)
from pydsa.quants import INT8X2_MAX


BATCH = 4                    # rows that are unpacked before they are split: a load that spans several recent stores is slow
TWICE = spread(*range(8))
FOUR_TIMES_0, FOUR_TIMES_1 = spread(0, 1, 2, 3), spread(4, 5, 6, 7)
FOUR_TIMES_2, FOUR_TIMES_3 = spread(8, 9, 10, 11), spread(12, 13, 14, 15)


@intrinsic
def multiply_q15(typingctx, a, b):
    """Multiply Q15 fractions: a b / 32768, rounded.

    Not both may be -32768.
    """
    def codegen(context, builder, signature, args):
        return call_llvm(builder, "llvm.x86.avx512.pmul.hr.sw.512", i16x32.ir, args)
    return i16x32(i16x32, i16x32), codegen


@intrinsic
def broadcast_pair(typingctx, address, offset):
    """Broadcast two int16 in memory to all lanes."""
    def codegen(context, builder, signature, args):
        pair = builder.load(pointer(builder, builder.add(*args), I32), align=1)
        return builder.bitcast(broadcast(builder, pair, 16), i16x32.ir)
    return i16x32(types.intp, types.intp), codegen


@intrinsic
def round_to_pairs(typingctx, v):
    """Round f32x16 to int16, duplicated in both halves of each 32-bit lane.

    Magnitudes are below 2^15.
    """
    def codegen(context, builder, signature, args):
        low = builder.and_(nearest(builder, args[0]), constant([0xFFFF] * 16))
        return builder.or_(low, builder.shl(low, constant([16] * 16)))
    return i32x16(f32x16), codegen


@intrinsic
def absolute(typingctx, v):
    """Return |v|."""
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.and_(builder.bitcast(args[0], i32x16.ir), constant([0x7FFFFFFF] * 16)), v.ir)
    return v(v), codegen


def pack(x_at, first, n_tokens, n_in, out):
    """Pack tokens `first` to first + 16 of n_tokens as B panels.

    x_at holds the addresses of rows of n_in floats. There is a panel, with 16 scales, for each 256 values; the panels of the first 256 of
    all tokens come first, one for 16 tokens each, padded by repeating the last token. A value that is not finite makes the scale not
    finite.
    """
    n_panels = (n_tokens + 15) // 16
    for k in range(0, n_in, 256):
        panel, n = out + (k // 256 * n_panels + first // 16) * SCALED_PANEL, min(256, n_in - k)
        for i in range(16):
            max_abs = pack_int8x2(i64_at(x_at, 8 * min(first + i, n_tokens - 1)) + 4 * k, 64, n, panel + 64 * i)
            store(panel, PANEL + 4 * i, max_abs * np.float32(256 / INT8X2_MAX))
        transpose_panel(panel, n)


@inline
def requantize(superblock, n, mins, bits, table, at, scale_at):
    """Requantize n groups of 32 weights to a row of a panel, with one scale.

    superblock: int16 of `bits` bits; table: 320 bytes of scratch. A weight is scale (int16 + h) - min with int16 from -h on, where h is
    half the range of `bits`, or 0 if there are no mins. Relative to the scale of all 256, scale h is a fraction of 15 bits, which
    multiplies the upper bits of the int16, and scale h - min an integer.
    """
    half = TWICE(load_8_floats(superblock, SCALES)) * np.float32(1 << (bits - 1))
    offset, flip = floats(np.float32(0)), 0
    if mins:
        flip = -32768
        offset = half - (TWICE(load_8_floats(superblock, MINS)) if mins == 8 else load_floats(superblock, MINS_16))
    bound = absolute(half) + absolute(offset)
    max_abs = reduce_max_abs(bound, bound)
    store(scale_at, 0, max_abs / np.float32(INT8X2_MAX))
    factor = np.float32(INT8X2_MAX) / max_abs if max_abs > np.float32(1e-30) else np.float32(0)
    store(table, 0, round_to_pairs(half * factor))
    offset = round_to_pairs(offset * factor)
    store(table, 64, FOUR_TIMES_0(offset))
    store(table, 128, FOUR_TIMES_1(offset))
    store(table, 192, FOUR_TIMES_2(offset))
    store(table, 256, FOUR_TIMES_3(offset))
    for j in range(0, n, 2):
        a = multiply_q15((load_int16(superblock, 64 * j) << (16 - bits)) + flip, broadcast_pair(table, 8 * j))
        a = a + both_halves(table, 64 + 32 * j)
        b = a & 0
        if j + 1 < n:
            b = multiply_q15((load_int16(superblock, 64 * j + 64) << (16 - bits)) + flip, broadcast_pair(table, 8 * j + 8))
            b = b + both_halves(table, 96 + 32 * j)
        store_step(at + j // 2 * STEP, a, b)


def matmul(job_at):
    """Run a MatmulJob: rows of weights times packed tokens.

    Each 256 values of all rows are unpacked before they are multiplied: alternating vector and tile instructions is slow.
    """
    job = read_matmul_job(job_at)
    n_panels, n_x = (job.n_rows + 31) // 32 * 2, (job.n_tokens + 15) // 16
    next_bytes, fetched = 256 // job.block * job.block_bytes, rows_prefetched(n_panels, n_x)
    superblocks = thread_scratch(job.thread, BATCH * SUPERBLOCK + 384 + 10 * TILE_BYTES + n_panels * (PANEL + 64 + n_x * TILE_BYTES))
    table = superblocks + BATCH * SUPERBLOCK
    buffer = table + 384
    panels = buffer + 10 * TILE_BYTES
    scales = panels + n_panels * PANEL
    sums = scales + n_panels * 64
    for i in range(0, n_panels * n_x * TILE_BYTES, 64):
        store(sums, i, floats(np.float32(0)))
    configure()
    for k in range(0, job.n_in, 256):
        width = min(256, job.n_in - k)
        first, n_blocks = job.rows + k // 256 * next_bytes, width // job.block
        for r in range(0, job.n_rows, BATCH):
            for i in range(r, min(r + BATCH, job.n_rows)):
                source = first + i * job.row_bytes
                if i >= fetched:
                    for line in range(0, next_bytes, 64):
                        prefetch(source + next_bytes, line)
                call_intp_function(job.unpack, (source, n_blocks, superblocks + i % BATCH * SUPERBLOCK))
            for i in range(r, min(r + BATCH, job.n_rows)):
                superblock = superblocks + i % BATCH * SUPERBLOCK
                for j in range(width // 32, 8):
                    store(superblock, SCALES + 4 * j, np.float32(0))
                    store(superblock, MINS + 4 * j, np.float32(0))
                requantize(superblock, width // 32, job.mins, job.bits, table, panels + i // 16 * PANEL + i % 16 * 64, scales + 4 * i)
        x_panels = job.x + (k // 256 * ((job.n_packed + 15) // 16) + job.first // 16) * SCALED_PANEL
        panel_products_int8x2(panels, PANEL, n_panels, x_panels, SCALED_PANEL, n_x, (width + 63) // 64, sums, scales, PANEL, buffer,
                              x_panels + 2 * SCALED_PANEL, first + next_bytes, job.row_bytes, job.n_rows)
    release()
    store_tiles(sums, n_panels, n_x, job.n_rows, job.n_tokens, job.out_at)


@inner
def store_tiles(sums, n_panels, n_x, n_rows, n_tokens, out_at):
    """Store tiles of sums to out, a token at a time."""
    for t in range(0, n_tokens, 16):
        for i in range(n_panels):
            cell = sums + (i * n_x + t // 16) * TILE_BYTES
            transpose(cell, 64, cell, 64)
        for i in range(min(16, n_tokens - t)):
            out, cells = i64_at(out_at, 8 * (t + i)), sums + t // 16 * TILE_BYTES + 64 * i
            for r in range(0, n_rows - 15, 16):
                store(out, 4 * r, load_floats(cells, r // 16 * n_x * TILE_BYTES))
            for r in range(n_rows // 16 * 16, n_rows):
                store(out, 4 * r, float_at(cells, r // 16 * n_x * TILE_BYTES + 4 * (r % 16)))
