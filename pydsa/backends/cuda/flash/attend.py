"""Flash attention in MLA's plain form in wgmma, for capability 9.0.

One float16 stands for a query, a key, a value and a softmax weight. A block (queries.py) walks over tiles of keys and values (heads.py),
which bulk copies fetch, two under way.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.flash.heads import BY_ROWS, CAPABILITY
from pydsa.backends.cuda.flash.queries import QUERIES, WARPS, Shape, U, make_flash, make_weigh_tile
from pydsa.backends.cuda.intrinsics.device import device
from pydsa.backends.cuda.intrinsics.hopper import (arrive, copy_bulk, expect_bytes, fence_async, fence_mbarriers, init_mbarrier, make_wgmma,
                                                   make_wgmma_shared, make_wgmma_wait, steps_of_rows, wait_phase)
from pydsa.backends.cuda.intrinsics.shared_memory import shared_address


# (n_nope, n_rot, n_v, kv_lora) -> Shape: DeepSeek V2, V3 and Kimi K2; GLM-5 and GLM-4.7-Flash. With fewer values a tile has more keys.
SHAPES = {(128, 64, 128, 512): Shape(128, 64, 128, 7, 2), (192, 64, 256, 512): Shape(192, 64, 256, 6, 2)}


def _make_copy_tile(shape):
    # two mbarriers of full tiles, and two of empty ones, are behind all else in shared memory
    at_tiles, stage_bytes, bars = shape.at_tiles, shape.stage_bytes, shape.end
    key_bytes, rotated_bytes, value_bytes = 2 * shape.n_nope << shape.key_bits, 128 << shape.key_bits, 2 * shape.n_v << shape.key_bits

    @device
    def copy_tile(shared, stage, keys, rotated, values, of_head, tile):
        """Begin to copy a tile of keys and values of a head; of_head: the number of its first tile."""
        bar, to = bars + 8 * stage, at_tiles + stage_bytes * stage
        expect_bytes(shared, bar, U(stage_bytes))
        copy_bulk(shared, to, keys, (of_head + tile) * np.int64(key_bytes), U(key_bytes), shared, bar)
        copy_bulk(shared, to + key_bytes, rotated, tile * np.int64(rotated_bytes), U(rotated_bytes), shared, bar)
        copy_bulk(shared, to + key_bytes + rotated_bytes, values, (of_head + tile) * np.int64(value_bytes), U(value_bytes), shared, bar)
    return copy_tile


def _make_walk(shape):
    keys_of_tile, n_words, n_scores = 1 << shape.key_bits, (1 << shape.key_bits) // 4, (1 << shape.key_bits) // 2
    steps, image, key_image = 4 * shape.n_images, 128 * QUERIES, 128 << shape.key_bits
    weigh_tile, copy_tile, (bars, empty) = make_weigh_tile(shape), _make_copy_tile(shape), (shape.end, shape.end + 16)
    at_tiles, stage_bytes, at_values, key_bits = shape.at_tiles, shape.stage_bytes, shape.n_images * key_image, shape.key_bits
    new_scores = make_wgmma_shared(keys_of_tile, steps_of_rows(steps, image), steps_of_rows(steps, key_image), anew=True)
    wait_scores = make_wgmma_wait(keys_of_tile, 0)
    add_values = make_wgmma(shape.n_v, keys_of_tile // 16, image=128 * shape.n_v)
    wait_values = make_wgmma_wait(shape.n_v, n_words)

    @device
    def walk(shared, acc, top, top_8, total, total_8, factor, factor_8, keys, rotated, values, of_head, n, before, least, last, last_8,
             thread):
        """Add n tiles of keys and values to the sums of a lane's two queries.

        Returns their greatest scores, and the lane's sums of weights. before: keys before the first of the tiles. least: of the block's
        queries' positions; last, last_8: positions of the lane's.
        """
        s, p = cuda.local.array(n_scores, np.float32), cuda.local.array(n_words, np.uint32)
        place = shared_address(shared, 0)
        queries = BY_ROWS | np.uint64((place + U(8192) * U(thread >> 7)) >> U(4))       # of a group of four warps
        for tile in range(np.int32(0), np.int32(n), np.int32(1)):
            stage = tile & 1
            here = place + U(at_tiles) + U(stage_bytes) * U(stage)
            wait_phase(shared, bars + 8 * stage, U(tile >> 1 & 1))
            new_scores(s, queries, BY_ROWS | np.uint64(here >> U(4)))
            if thread == 0 and tile > 0 and tile + 1 < n:       # the other stage, when all warps have left it
                wait_phase(shared, empty + 8 * (stage ^ 1), U(tile - 1 >> 1 & 1))
                copy_tile(shared, stage ^ 1, keys, rotated, values, of_head, tile + 1)
            wait_scores(s, s)
            top, top_8, total, total_8 = weigh_tile(s, p, acc, top, top_8, total, total_8, factor, factor_8, before + (tile << key_bits),
                                                    least, last, last_8, thread)
            add_values(acc, p, BY_ROWS | np.uint64((here + U(at_values)) >> U(4)))
            wait_values(acc, p)
            if thread & 31 == 0:
                arrive(shared, empty + 8 * stage)
        return top, top_8, total, total_8
    return walk


def _make_begin(shape):
    bars, empty, copy_tile = shape.end, shape.end + 16, _make_copy_tile(shape)

    @device
    def begin(shared, keys, rotated, values, of_head, n, thread):
        """Set up mbarriers, and begin to copy the first two tiles."""
        if thread == 0:
            for i in range(2):
                init_mbarrier(shared, bars + 8 * i, U(1))
                init_mbarrier(shared, empty + 8 * i, U(WARPS))
            fence_mbarriers()
            for i in range(min(2, n)):
                copy_tile(shared, i, keys, rotated, values, of_head, i)
    return begin


def _make(shape):
    name = f"flash_{shape.n_nope + shape.n_rot}_{shape.n_v}"
    return make_flash(shape, name, _make_begin(shape), _make_walk(shape), fence_async, shape.end + 32, CAPABILITY)


FLASH = {widths: _make(shape) for widths, shape in SHAPES.items()}
