"""How blocks of products in wgmma get their activations: a ring of stages in shared memory.

A stage has 64 numbers of each of a tile's tokens, as panels.py lays them: an image of high float16, then one of low ones. The rows of a
tile's tokens are gathered by copies of 16 bytes, swizzled on their way, AHEAD stages at a time. A stage is overwritten when the next but
one has been asked for, so that a warpgroup's products may go on while others ask for the next one.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.f16x2.panels import PART_BYTES, STAGE_BYTES
from pydsa.backends.cuda.intrinsics.device import device, fma
from pydsa.backends.cuda.intrinsics.hopper import fence_async
from pydsa.backends.cuda.intrinsics.instructions import commit_copies, copies_left, copy_sixteen_async, quotient
from pydsa.backends.cuda.intrinsics.shared_memory import shared_address
from pydsa.backends.cuda.runtime.launch import blocks_for


THREADS, ROWS = 256, 128            # of a block; a warp has 16 rows of weights, a lane two of them, g and g + 8
STAGES, AHEAD = 4, 2                # STAGES: a power of two
DESCRIPTOR = np.uint64(1 << 62 | 64 << 32 | 1 << 16)        # swizzle of 128 bytes; eight tokens are 1,024 bytes
GROUP_STEP = np.uint64(4)           # what 32 numbers further in a stage add to a descriptor
SIGNATURE = "f4[:,:], u1[::1], i8, i4[:], i4[:], i4[:], i4[:], i4, u1[::1], f4[:], i4"      # of products
CAPABILITY = 9, 0
FEW = 64            # tokens of a tile for which there are kernels of their own
U = np.uint32
stage_is_here = copies_left(AHEAD - 1)


class Ring(NamedTuple):
    """The ring of tiles of so many tokens.

    Behind the stages are the row and the scale of each token; `end` is where a kernel's own shared memory begins.
    """
    tokens: int
    end: int
    low_part: object    # what the low float16 add to a descriptor
    begin: object       # begin(shared, rows, scales, order, first, n_tokens, x_div, x_scales, packed, last, thread)
    next_stage: object  # next_stage(shared, packed, stage, last, rows, thread) -> descriptor of the high float16
    store: object       # store(out, sums, order, tile_first, tile_end, scales, row, c)


def _make_copies(tokens):
    part, pieces = tokens * PART_BYTES, tokens * 8 // THREADS       # pieces: of 16 bytes, that a thread copies of each part
    rows_at = STAGES * 2 * part // 4

    @device
    def copy_stage(shared, packed, stage, last, rows, thread):
        """Begin to copy a stage of all tokens, if there is one, pieces swizzled.

        last: how many stages a row has.
        """
        if stage < last:
            token, piece = thread >> 3, thread & 7
            slot = (stage & STAGES - 1) * 2 * part + 128 * token + 16 * (piece ^ token & 7)
            sources = cuda.local.array(pieces, np.int64)        # all before the copies: ptxas has each copy wait for loads before it
            for i in range(pieces):
                sources[i] = STAGE_BYTES * (np.int64(rows[rows_at + token + 32 * i]) * np.int64(last) + stage) + 16 * piece
            for i in range(pieces):
                copy_sixteen_async(shared, slot + 128 * 32 * i, packed, sources[i])
                copy_sixteen_async(shared, slot + 128 * 32 * i + part, packed, sources[i] + PART_BYTES)
        commit_copies()

    @device
    def next_stage(shared, packed, stage, last, rows, thread):
        """Wait for a stage -> the descriptor of its high float16.

        Another one begins to be copied. All products with the stages before the last one must be done.
        """
        stage_is_here()
        fence_async()
        cuda.syncthreads()
        copy_stage(shared, packed, stage + AHEAD, last, rows, thread)
        return np.uint64(U(shared_address(shared, (stage & STAGES - 1) * 2 * part)) >> U(4)) | DESCRIPTOR
    return copy_stage, next_stage


def make_ring(tokens):
    """The Ring of tiles of 128 or 64 tokens."""
    part = tokens * PART_BYTES
    at = STAGES * 2 * part // 4         # where, behind the stages, each token's row is; then its scale
    copy_stage, next_stage = _make_copies(tokens)

    @device
    def begin(shared, rows, scales, order, first, n_tokens, x_div, x_scales, packed, last, thread):
        """Find the rows of a tile's tokens; begin to copy the first stages."""
        if thread < tokens:
            source = quotient(order[first + min(thread, n_tokens - 1)], x_div)
            rows[at + thread], scales[at + tokens + thread] = source, x_scales[source]
        cuda.syncthreads()
        for stage in range(AHEAD):
            copy_stage(shared, packed, stage, last, rows, thread)

    @device
    def store(out, sums, order, tile_first, tile_end, scales, row, c):
        """Store a lane's sums times the tokens' scales.

        What the tile's tokens are is read again, so that no registers have it meanwhile.
        """
        first = tile_first[cuda.blockIdx.y]
        n_tokens = tile_end[cuda.blockIdx.y] - first
        for i in range(tokens // 8):
            for e in range(2):
                t = 8 * i + 2 * c + e
                if t < n_tokens:
                    target, scale = order[first + t], scales[at + tokens + t]
                    if row < out.shape[1]:
                        out[target, row] = sums[4 * i + e] * scale
                    if row + 8 < out.shape[1]:
                        out[target, row + 8] = sums[4 * i + 2 + e] * scale
    return Ring(tokens, 4 * at + 8 * tokens, np.uint64(part >> 4), begin, next_stage, store)


RINGS = {tokens: make_ring(tokens) for tokens in (128, FEW)}        # 128: as many as a tile has (linear.TOKENS), but in the simulator


@device
def add_scaled(sums, first, parts, d, d_8, n):
    """sums, from `first` on, += the parts of n tokens times their factors.

    d: of row g; d_8: of row g + 8.
    """
    for i in range(0, n // 2, 4):
        j = first + i
        sums[j], sums[j + 1] = fma(d, parts[i], sums[j]), fma(d, parts[i + 1], sums[j + 1])
        sums[j + 2], sums[j + 3] = fma(d_8, parts[i + 2], sums[j + 2]), fma(d_8, parts[i + 3], sums[j + 3])


@device
def clear(sums, n):
    """Set the sums of n tokens to zero."""
    for i in range(n // 2):
        sums[i] = np.float32(0)


def launch(kernels, out, w, x, tiles, n):
    """Launch the products of tiles with many tokens and of those with few.

    kernels: for each number of tokens, where there may be such tiles. n: groups of a row.
    """
    n_tiles, most = tiles.matrix.size, max(RINGS)
    for tokens, kernel in kernels.items():
        if tiles.order.size > FEW if tokens > FEW else tiles.order.size <= most * n_tiles - FEW:       # else all tiles have more
            kernel((blocks_for(out.shape[1], ROWS), n_tiles), out, w.data, w.row_bytes, *tiles[:-1], x.packed.flat, x.scales, n)
