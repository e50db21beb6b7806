"""What the kernels of a few tokens' attention share: their parameters, and what a block does.

A block has some heads of a token and walks tiles of its keys: chosen ones, or all up to the token's position. It asks for all rows of a
tile at once and uses them twice from shared memory: as keys, and as values. Queries are rounded while the first tile comes. Where a block
has room for two tiles, one comes while the other is used. Most blocks have one tile: then memory is waited for twice, for the numbers of
chosen rows, then for the rows.

Rows are as the caches of DeepSeek's models have them: VALUE numbers that are key and value, and ROTATED ones that are only key.

Parameters of the kernels: sums [tokens, splits, n_head, VALUE], of values times weights, not yet divided; stats [tokens, splits, n_head,
2], the greatest score times log2(e), -inf if there is no key, and the sum of weights; q [tokens, n_head, WIDTH]; data, the cache's bytes;
all these flat; row_bytes; positions, indices, mask and mode as in modes.py; n_head; n_splits; scale, times log2(e). A split of no keys
writes nothing: share_of_keys() tells which these are.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import device, float_bits
from pydsa.backends.cuda.intrinsics.instructions import all_copies, commit_copies, copies_left, store_eight
from pydsa.backends.cuda.intrinsics.shared_memory import anew, folds, power_of_two, shared_address, store_float
from pydsa.backends.cuda.modes import key_and_bias, split_of_keys
from pydsa.backends.cuda.runtime.launch import kernel

VALUE, ROTATED = 512, 64        # numbers of a row's two parts
WIDTH = VALUE + ROTATED
SLICES = 4                      # warps that share a score, each with a part of the numbers
COLUMNS = 32                    # of the value, that a warp has at a time
SIGNATURE = "f4[::1], f4[::1], f4[::1], u1[::1], i8, i8[:], i4[:,:], f4[:,:], i4, i4, i4, f4"
LOG2_E = np.float32(1.4426950408889634)
U, ZERO, MINUS_INFINITY = np.uint32, np.float32(0), np.float32(-np.inf)
one_group_left = copies_left(1)


class Tile(NamedTuple):
    """What a block has at a time."""
    keys: int       # 64, 32 or 16
    heads: int      # 32 or 16
    buffers: int    # 2: one tile comes while the other is used; or 1


class Shape:
    """Where what is in a block's shared memory, in bytes from its beginning.

    row, query, weights: bytes of a row, of a rounded query with its scales, and of one of two planes of a head's weights. slices: warps
    that share a score, each with a part of the numbers; None: all. Pitches are odd multiples of 16 bytes: fragments are loaded without bank
    conflicts. Tiles come first, each with the biases of its keys.
    """

    def __init__(self, tile, row, query, weights, slices=SLICES):
        self.keys, self.heads, self.buffers = tile
        self.lanes = self.keys // 4             # threads that share a head
        self.weighing = self.heads * self.lanes         # threads that make weights: all but of the smallest tiles
        self.threads, self.row = max(self.weighing, 128), row
        self.turns = VALUE // COLUMNS // (self.threads // 32)       # in which a warp adds values
        self.pitch, self.q_pitch, self.weight_pitch = (16 * (-(-n // 16) | 1) for n in (row, query, weights))
        self.score_pitch = 4 * self.keys + 32
        self.bias = self.keys * self.pitch
        self.tile = self.bias + 4 * self.keys
        self.queries = self.buffers * self.tile
        self.scores = self.queries + self.heads * self.q_pitch
        self.slices = slices or self.threads // 32
        self.weights = self.scores + self.slices * self.heads * self.score_pitch
        self.factors = self.weights + 2 * self.heads * self.weight_pitch        # two of each head: see attend()
        self.size = self.factors + 8 * self.heads


def make_weigh(lanes):
    """The function that makes weights of scores, with a running softmax.

    lanes: threads that share a head, each with four of a tile's keys.
    """
    greatest, total = folds(lanes)

    @device
    def weigh(s0, s1, s2, s3, top, weight):
        """Four weights of a head, and what the running softmax keeps.

        top, weight: the greatest score so far, and the sum of weights. Behind the weights come what older sums shrink by, top and weight.
        """
        before, top = top, max(top, greatest(max(max(s0, s1), max(s2, s3))))
        least = top if top > MINUS_INFINITY else ZERO
        again = power_of_two(before - least)
        s0, s1, s2, s3 = power_of_two(s0 - least), power_of_two(s1 - least), power_of_two(s2 - least), power_of_two(s3 - least)
        return s0, s1, s2, s3, again, top, weight * again + total((s0 + s1) + (s2 + s3))
    return weigh


def make_ask(shape, copy, unit):
    """The function that starts a tile's copies, of `unit` bytes each."""
    pitch, bias_at, units = shape.pitch, shape.bias, shape.row // unit
    sharing = shape.threads // shape.keys       # threads that share a row

    @device
    def ask(tile, data, row_bytes, start, n, mode, indices, mask, t, thread):
        """Start the copies of a tile's keys, those from `start` on.

        Zeros stand for those that are not.
        """
        row, part = thread // U(sharing), np.int64(thread % U(sharing))
        key, bias = key_and_bias(np.int32(start + row), n, mode, indices, mask, t)
        source, size = max(key, np.int64(0)) * row_bytes + unit * part, U(unit) if key >= 0 else U(0)
        to = tile + row * U(pitch) + U(unit) * U(part)
        for i in range((units + sharing - 1) // sharing):
            if sharing * i + sharing - 1 < units or sharing * i + part < units:
                copy(to + U(sharing * unit * i), data, source + sharing * unit * i, size)
        commit_copies()
        if part == 0:
            store_float(tile + U(bias_at) + U(4) * row, bias * LOG2_E)
    return ask


def make_store_sums(shape, unit):
    """The function that stores sums as mma leaves them, times a unit.

    acc has of each 16 heads four eights of columns.
    """
    eights = shape.heads // 8

    @device
    def store_sums(sums, acc, at_acc, first_row, n_rows, column, lane):
        """Put COLUMNS of the sums of a block's heads into rows of sums."""
        for eight in range(eights):
            h = U(8 * eight) + (lane >> U(2))
            at = (first_row + h) * VALUE + column + 2 * (lane & U(3))
            if h < n_rows:
                for two in range(4):
                    i = at_acc + eight // 2 * 16 + 4 * two + eight % 2 * 2
                    store_eight(sums, 4 * np.int64(at + 8 * two), float_bits(acc[i] * unit), float_bits(acc[i + 1] * unit))
    return store_sums


def make_attend(storage, shape, copy, unit, round_queries, scores, softmax, add_values, store_sums):
    """The kernel of a cache's storage: its steps, on the tiles of a Shape.

    A thread keeps the greatest score and the sum of weights of one head, of which softmax() makes those with a tile more. It leaves two
    factors of each head: what sums so far are multiplied by, and what the tile's are.
    """
    ask, keys, lanes, warps = make_ask(shape, copy, unit), shape.keys, shape.lanes, shape.threads // 32
    two, other, turns, heads, n_sums = shape.buffers == 2, shape.tile, shape.turns, shape.heads, shape.turns * shape.heads
    weighing, all_weigh = shape.weighing, shape.weighing == shape.threads

    def attend(sums, stats, q, data, row_bytes, positions, indices, mask, mode, n_head, n_splits, scale):
        """Sums of values and statistics of a split of a token's keys: see chosen_rows.py."""
        acc = cuda.local.array(n_sums, np.float32)
        thread, split, head, t = U(cuda.threadIdx.x), np.int64(cuda.blockIdx.x), np.int32(heads * cuda.blockIdx.y), cuda.blockIdx.z
        base, token = shared_address(cuda.shared.array(0, np.uint32), 0), np.int64(t) * n_head
        n, start, end = split_of_keys(split, n_splits, keys, mode, positions, indices, t)
        n, start, end = np.int32(n), np.int32(start), np.int32(end)
        if start >= end:
            return
        ask(base, data, row_bytes, start, n, mode, indices, mask, t, thread)
        round_queries(base, q, token, head, n_head, thread)
        for i in range(n_sums):
            acc[i] = ZERO
        tile, top, weight = base, MINUS_INFINITY, ZERO
        for at in range(start, end, np.int32(keys)):
            if two:
                if np.int32(at + keys) < end:
                    ask(base + base + U(other) - tile, data, row_bytes, np.int32(at + keys), n, mode, indices, mask, t, anew(thread))
                else:
                    commit_copies()
                one_group_left()
            else:
                all_copies()
            cuda.syncthreads()
            here = anew(thread)
            scores(base, tile, here >> U(5), here & U(31))
            cuda.syncthreads()
            top, weight = softmax(base, tile, scale, top, weight, anew(thread))
            cuda.syncthreads()
            here = anew(thread)
            for turn in range(turns):
                add_values(base, tile, acc, heads * turn, U(COLUMNS) * ((here >> U(5)) + U(warps * turn)), here & U(31))
            cuda.syncthreads()
            if two:
                tile = base + base + U(other) - tile
            elif np.int32(at + keys) < end:
                ask(tile, data, row_bytes, np.int32(at + keys), n, mode, indices, mask, t, anew(thread))
        row, n_rows, h = (np.int64(t) * n_splits + split) * n_head + head, n_head - head, np.int64(thread // U(lanes))
        if thread % U(lanes) == U(0) and h < n_rows and (all_weigh or thread < U(weighing)):
            stats[2 * (row + h)], stats[2 * (row + h) + 1] = top, weight
        for turn in range(turns):
            store_sums(sums, acc, heads * turn, row, n_rows, U(COLUMNS) * ((thread >> U(5)) + U(warps * turn)), thread & U(31))
    name = f"attend_one_{storage}_{keys}_{heads}_{shape.buffers}"
    return kernel(SIGNATURE, shape.threads, name, shared=shape.size)(attend)
