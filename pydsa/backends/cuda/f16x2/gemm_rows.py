"""Products for prompts in wgmma with weights of any type: no bit is lost.

They are for GPUs of capability 9.0. As gemm.py, but for how lanes get their words of A: by way of rows of float16 in shared memory
(words_rows.py), which each warp unpacks while products go on. A stage of 64 numbers is two groups of 32, each with words of its own, so
that one is loaded while the other is multiplied, and tensor cores need not wait.

Types whose blocks have one factor: sums of a block, then those times the factor; so that all sums in tensor cores are short, this goes for
types without a factor, too. Types with a factor for each 32 weights: 64 tokens of a group at a time, with two sets of sums in turns: one is
multiplied with the factors while tensor cores make the other.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.f16x2.panels import (PART_BYTES, STAGE_BYTES, n_stages, split, split_columns, split_columns_and_16,
                                              split_columns_and_32)
from pydsa.backends.cuda.f16x2.stages import CAPABILITY, FEW, GROUP_STEP, RINGS, ROWS, SIGNATURE, THREADS, add_scaled, clear, launch
from pydsa.backends.cuda.f16x2.words_rows import AHEAD, UNPACKED, WARP_BYTES, make_load, place_to_read, place_to_write, prefetch
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device
from pydsa.backends.cuda.intrinsics.hopper import make_wgmma, make_wgmma_wait
from pydsa.backends.cuda.intrinsics.shared_memory import shared_address
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import kernel


ALL_LANES = np.uint32(0xFFFFFFFF)
U = np.uint32
SUMS = FEW // 2          # of a lane, of one set
ZERO = np.float32(0)
HALF = np.uint64(FEW * PART_BYTES >> 4)      # what the second 64 tokens add to a descriptor
new_pairs, wait_last = make_wgmma(FEW, 2, 2, True), make_wgmma_wait(FEW, 8)
wait_sums, wait_one = make_wgmma_wait(FEW, 0, 1), make_wgmma_wait(FEW, 8, 1)        # all but the last group; without words, and with


@device
def factors_of(factor, g):
    """The factors of rows g and g + 8, of a stage's first and second group.

    factor: the one of what a lane has unpacked.
    """
    return (cuda.shfl_sync(ALL_LANES, factor, g), cuda.shfl_sync(ALL_LANES, factor, g + U(8)),
            cuda.shfl_sync(ALL_LANES, factor, g + U(16)), cuda.shfl_sync(ALL_LANES, factor, g + U(24)))


def _make_unpack_group(kind):
    unpack_group, shift, n_bytes = kind.unpack, kind.shift, kind.bytes

    @device
    def unpack(place, w, row, g, n_groups):
        """Unpack group g of a row, or the last one -> its factor.

        A later group is asked for.
        """
        prefetch(w, row + (n_bytes * np.int64(min(g + AHEAD, n_groups - 1)) >> shift))
        return unpack_group(place, w, row, np.int64(min(g, n_groups - 1)))
    return unpack


def _make_walk_blocks(kind, ring):
    """walk() of types with a factor a block."""
    tokens, low_part, next_stage, rest, stages = ring.tokens, ring.low_part, ring.next_stage, kind.rest, kind.groups // 2
    unpack, load_0, load_1 = _make_unpack_group(kind), make_load(0, rest), make_load(1, rest)
    n_words = 16 if rest else 8
    start = make_wgmma(tokens, 2, 2, rest=rest)
    wait_before, wait_all = make_wgmma_wait(0, n_words, 1), make_wgmma_wait(tokens, n_words)

    @device
    def walk(sums, parts, _, words, others, w, row, n_groups, write, read, lane, shared, packed, before, last, rows, thread):
        """sums += the products of all groups.

        parts: zeros, before and after. words, others: of the first and second 32 weights of a stage.
        """
        second, stage, n_stages = np.int32(lane >> U(4)), np.int32(0), np.int32(n_groups + 1 >> 1)
        for i in range(n_words):
            others[i] = U(0)
        factor = unpack(write, w, row, second, n_groups)
        cuda.syncwarp()
        load_0(words, read)
        there = next_stage(shared, packed, before, last, rows, thread)
        while stage < n_stages:
            d, d_8 = cuda.shfl_sync(ALL_LANES, factor, lane >> U(2)), cuda.shfl_sync(ALL_LANES, factor, (lane >> U(2)) + U(8))
            end = min(np.int32(stage + stages), n_stages)
            while stage < end:
                start(parts, words, there, there + low_part)
                wait_before(parts, others)
                load_1(others, read)
                start(parts, others, there + GROUP_STEP, there + GROUP_STEP + low_part)
                cuda.syncwarp()
                stage = np.int32(stage + 1)
                factor = unpack(write, w, row, np.int32(2 * stage + second), n_groups)
                cuda.syncwarp()
                wait_before(parts, words)
                load_0(words, read)
                there = next_stage(shared, packed, before + stage, last, rows, thread)
            wait_all(parts, others)
            add_scaled(sums, 0, parts, d, d_8, tokens)
            clear(parts, tokens)
    return walk


def _make_walk_groups(kind, ring):
    """walk() of types with a factor for each 32 weights."""
    low_part, next_stage, two = ring.low_part, ring.next_stage, ring.tokens > FEW
    unpack, load_0, load_1 = _make_unpack_group(kind), make_load(0, False), make_load(1, False)

    @device
    def walk(sums, parts, parts_1, words, others, w, row, n_groups, write, read, lane, shared, packed, before, last, rows,
             thread):
        """sums += the products of all groups.

        parts, parts_1: products of a group, under way in turns: of the first and the second 64 tokens, or of one group and the next.
        words, others: of the first and second 32 weights of a stage.
        """
        second = np.int32(lane >> U(4))
        factor = unpack(write, w, row, second, n_groups)
        cuda.syncwarp()
        load_0(words, read)
        there = next_stage(shared, packed, before, last, rows, thread)
        for stage in range(np.int32(1), np.int32(1 + (n_groups + 1 >> 1)), np.int32(1)):
            d, d_8, d1, d1_8 = factors_of(factor, lane >> U(2))
            new_pairs(parts, words, there, there + low_part)
            load_1(others, read)
            if two:
                new_pairs(parts_1, words, there + HALF, there + HALF + low_part)
            cuda.syncwarp()
            factor = unpack(write, w, row, np.int32(2 * stage + second), n_groups)
            cuda.syncwarp()
            if two:
                wait_sums(parts, words)
                add_scaled(sums, 0, parts, d, d_8, FEW)
                new_pairs(parts, others, there + GROUP_STEP, there + GROUP_STEP + low_part)
                wait_one(parts_1, words)
                add_scaled(sums, SUMS, parts_1, d, d_8, FEW)
                load_0(words, read)
                new_pairs(parts_1, others, there + GROUP_STEP + HALF, there + GROUP_STEP + HALF + low_part)
                there = next_stage(shared, packed, before + stage, last, rows, thread)
                wait_sums(parts, words)
                add_scaled(sums, 0, parts, d1, d1_8, FEW)
                wait_last(parts_1, others)
                add_scaled(sums, SUMS, parts_1, d1, d1_8, FEW)
            else:
                wait_last(parts, words)
                add_scaled(sums, 0, parts, d, d_8, FEW)
                new_pairs(parts, others, there + GROUP_STEP, there + GROUP_STEP + low_part)
                load_0(words, read)
                there = next_stage(shared, packed, before + stage, last, rows, thread)
                wait_last(parts, others)
                add_scaled(sums, 0, parts, d1, d1_8, FEW)
    return walk


def _make_gemm(name, kind, tokens):
    ring, prepare, per_group = RINGS[tokens], kind.prepare, kind.sums_of_group
    begin, store, area, by_groups = ring.begin, ring.store, ring.end, kind.groups == 1
    walk = (_make_walk_groups if by_groups else _make_walk_blocks)(kind, ring)
    add_offsets = kind.make_offsets(ring) if per_group else None
    warp_bytes, n_words, n_sums = WARP_BYTES * (1 + kind.rest), 16 if kind.rest else 8, tokens // 2
    n_parts = SUMS if by_groups else n_sums

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
        before = n_groups * per_group + 63 >> 6
        last = np.int32(before + (n_groups + 1 >> 1))
        begin(shared, rows, scales, order, first, n_tokens, x_div, x_scales, packed, last, thread)
        prepare(thread, THREADS)
        sums, parts, parts_1 = (cuda.local.array(n_sums, np.float32), cuda.local.array(n_parts, np.float32),
                                cuda.local.array(n_parts, np.float32))
        words, others, sixteen = (cuda.local.array(n_words, np.uint32), cuda.local.array(n_words, np.uint32),
                                  cuda.local.array(16, np.uint32))
        clear(sums, tokens)
        clear(parts, 2 * n_parts)
        lane, c, most = U(thread & 31), thread & 3, out.shape[1] - 1
        warp_row, matrix = cuda.blockIdx.x * ROWS + 16 * (thread >> 5), chosen * np.int64(out.shape[1])
        row = warp_row + (thread >> 2 & 7)
        if per_group:
            add_offsets(sums, parts, sixteen, w, (matrix + min(row, most)) * w_bytes, (matrix + min(row + 8, most)) * w_bytes, n_groups,
                        U(c), shared, packed, last, rows, thread)
        base = U(shared_address(shared, area + warp_bytes * (thread >> 5)))
        walk(sums, parts, parts_1, words, others, w, (matrix + min(warp_row + (thread & 15), most)) * w_bytes, n_groups,
             place_to_write(base, lane), place_to_read(base, lane), lane, shared, packed, before, last, rows, thread)
        store(out, sums, order, tile_first, tile_end, scales, row, c)
    return kernel(SIGNATURE, THREADS, f"wgmma_{name.lower()}{'' if tokens > FEW else '_64'}", shared=area + 8 * warp_bytes,
                  blocks=1 if tokens > FEW or kind.rest else 2, specific=CAPABILITY)(gemm)


GEMM = {name: {tokens: _make_gemm(name, kind, tokens) for tokens in RINGS} for name, kind in UNPACKED.items()}
SPLITS = {0: split_columns, 16: split_columns_and_16, 32: split_columns_and_32}


class Products(NamedTuple):
    """Products of types with so many weights an offset; 0: with no offsets."""
    summed: int

    def takes(self, w):
        """Whether there is a kernel for this Weight on the current GPU."""
        kind = UNPACKED.get(w.type)
        return not SIMULATED and kind is not None and kind.sums_of_group == (32 // self.summed if self.summed else 0) and (
            current().capability == CAPABILITY)

    def pack(self, x):
        """Activations, rows of any strides, as Columns in scratch memory."""
        return split(x, SPLITS[self.summed], self.summed)

    def matmul(self, out, w, x, tiles):
        """out[i] = a matrix of w times row i // x_div of x, for all tiles."""
        assert x.packed.shape[1] == STAGE_BYTES * n_stages(w.shape[-1], self.summed)
        launch(GEMM[w.type], out, w, x, tiles, w.shape[-1] // 32)


PRODUCTS = {summed: Products(summed) for summed in SPLITS}
