"""Flash attention in MLA's plain form in mma.sync, for all GPUs.

As attend.py, whose blocks (queries.py) it has, with at most 99 KB of shared memory. There is one tile of keys and one of values
(heads_mma.py) in it: the values of a tile are copied while queries meet its keys, the next keys while weights meet its values.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.flash.heads_mma import add_pair, of_columns, of_rows
from pydsa.backends.cuda.flash.queries import QUERIES, THREADS, ZERO, Shape, U, make_flash, make_weigh_tile
from pydsa.backends.cuda.intrinsics.device import device
from pydsa.backends.cuda.intrinsics.instructions import all_copies, commit_copies
from pydsa.backends.cuda.intrinsics.shared_memory import copy_sixteen, load_fragments, load_transposed, shared_address
from pydsa.backends.devices import FLASH_WIDTHS

# (n_nope, n_rot, n_v, kv_lora) -> Shape; with more values a tile has fewer keys
SHAPES = {widths: Shape(*widths[:3], 6 if widths[2] <= 128 else 5, 1) for widths in FLASH_WIDTHS}


def _make_copy(n_bytes):
    @device
    def copy(to, source, at):
        """Begin to copy n_bytes, of which a thread has each THREADS-th 16."""
        for i in range(n_bytes // (16 * THREADS)):
            copy_sixteen(to + U(16 * THREADS * i), source, at + 16 * THREADS * i, U(16))
    return copy


def _make_copies(shape):
    key_bytes, rotated_bytes, value_bytes = 2 * shape.n_nope << shape.key_bits, 128 << shape.key_bits, 2 * shape.n_v << shape.key_bits
    copy_of_keys, copy_of_rotated, copy_of_values = _make_copy(key_bytes), _make_copy(rotated_bytes), _make_copy(value_bytes)

    @device
    def copy_keys(place, keys, rotated, of_head, tile, thread):
        """Begin to copy a tile of keys of a head; of_head: the number of its first tile."""
        to, at = place + U(16) * U(thread), 16 * np.int64(thread)
        copy_of_keys(to, keys, (of_head + tile) * np.int64(key_bytes) + at)
        copy_of_rotated(to + U(key_bytes), rotated, tile * np.int64(rotated_bytes) + at)
        commit_copies()

    @device
    def copy_values(place, values, of_head, tile, thread):
        """Begin to copy a tile of values."""
        copy_of_values(place + U(16) * U(thread), values, (of_head + tile) * np.int64(value_bytes) + 16 * np.int64(thread))
        commit_copies()
    return copy_keys, copy_values


def _make_scores(shape):
    n_scores, pairs, n_images = (1 << shape.key_bits) // 2, (1 << shape.key_bits) // 16, shape.n_images
    image, key_image = 128 * QUERIES, 128 << shape.key_bits

    @device
    def scores(s, queries, keys):
        """s = products of a warp's queries and the keys of a tile.

        queries, keys: addresses of a lane, as of_rows() and of_columns() tell.
        """
        for i in range(n_scores):
            s[i] = ZERO
        for k in range(n_images):
            for step in range(4):
                a = load_fragments((queries ^ U(32) * U(step)) + U(image) * U(k))
                for pair in range(pairs):
                    b0, b1, b2, b3 = load_fragments((keys ^ U(32) * U(step)) + U(key_image) * U(k) + U(2048 * pair))
                    add_pair(s, 8 * pair, a, b0, b1, b2, b3)
    return scores


def _make_add_values(shape):
    steps, pairs, key_image = (1 << shape.key_bits) // 16, shape.n_v // 16, 128 << shape.key_bits

    @device
    def add_values(acc, p, values):
        """acc += a warp's weights times the values of a tile.

        values: the address of a lane, as of_rows() tells.
        """
        for step in range(steps):
            a = p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]
            for pair in range(pairs):
                b0, b1, b2, b3 = load_transposed((values ^ U(32 * (pair & 3))) + U(key_image * (pair >> 2) + 2048 * step))
                add_pair(acc, 8 * pair, a, b0, b1, b2, b3)
    return add_values


def _make_walk(shape):
    n_words, n_scores, key_bits = (1 << shape.key_bits) // 4, (1 << shape.key_bits) // 2, shape.key_bits
    weigh_tile, scores, add_values = make_weigh_tile(shape), _make_scores(shape), _make_add_values(shape)
    copy_keys, copy_values = _make_copies(shape)
    at_keys, at_values = shape.at_tiles, shape.at_tiles + (128 << key_bits) * shape.n_images

    @device
    def walk(shared, acc, top, top_8, total, total_8, factor, factor_8, keys, rotated, values, of_head, n, before, least, last, last_8,
             thread):
        """Add n tiles of keys and values to the sums of a lane's two queries.

        Arguments and results are those of attend.py.
        """
        s, p = cuda.local.array(n_scores, np.float32), cuda.local.array(n_words, np.uint32)
        place, lane = shared_address(shared, 0), U(thread) & U(31)
        my_queries = place + U(2048) * (U(thread) >> U(5)) + of_rows(lane)
        my_keys, my_values = place + U(at_keys) + of_columns(lane), place + U(at_values) + of_rows(lane)
        for tile in range(np.int32(0), np.int32(n), np.int32(1)):
            all_copies()
            cuda.syncthreads()      # keys are there, and values of the tile before are no longer read
            copy_values(place + U(at_values), values, of_head, tile, thread)
            scores(s, my_queries, my_keys)
            all_copies()
            cuda.syncthreads()      # values are there, and keys are no longer read
            if tile + 1 < n:
                copy_keys(place + U(at_keys), keys, rotated, of_head, tile + 1, thread)
            top, top_8, total, total_8 = weigh_tile(s, p, acc, top, top_8, total, total_8, factor, factor_8, before + (tile << key_bits),
                                                    least, last, last_8, thread)
            add_values(acc, p, my_values)
        return top, top_8, total, total_8
    return walk


def _make_begin(shape):
    at_keys, (copy_keys, _) = shape.at_tiles, _make_copies(shape)

    @device
    def begin(shared, keys, rotated, values, of_head, n, thread):
        """Begin to copy the first tile of keys."""
        copy_keys(shared_address(shared, 0) + U(at_keys), keys, rotated, of_head, np.int32(0), thread)
    return begin


@device
def no_fence():
    """What must stand between queries that are stored and a barrier: nothing."""


def _make(shape):
    name = f"flash_mma_{shape.n_nope + shape.n_rot}_{shape.n_v}"
    return make_flash(shape, name, _make_begin(shape), _make_walk(shape), no_fence, shape.end)


FLASH = {widths: _make(shape) for widths, shape in SHAPES.items()}
