"""A few tokens' attention to rows of float32.

chosen_rows.py tells what a block does, here with tensor cores of tf32: eight bits of exponent, and 11 of a number. Each number is two of
them, the second one what the first leaves: 22 bits or 23. Of the four products of both the three largest are computed. Rows and queries lie
in shared memory as they are, and are split in registers. Each warp has all heads and keys of a tile, and a part of the numbers.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen.chosen_rows import WIDTH, Shape, Tile, make_attend, make_store_sums, make_weigh
from pydsa.backends.cuda.intrinsics.device import SIMULATED, bits_float, device, float_bits
from pydsa.backends.cuda.intrinsics.instructions import commit_copies, instruction
from pydsa.backends.cuda.intrinsics.shared_memory import (anew, copy_sixteen, load_float, load_floats, load_four_floats, load_fragments,
                                                          store_float, store_floats, store_four_words)

U, ZERO, ONE = np.uint32, np.float32(0), np.float32(1)
FIRST, HALF = U(0xFFFFE000), U(0x1000)      # the bits of a tf32; half of the last one
ROW = 4 * WIDTH                             # bytes
mma_tf32 = instruction("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                       "ffff", "rrrrrrffff")


@device
def parts(word):
    """A float32 as two tf32: the nearest one, and what that leaves.

    If it is not finite one of both is not.
    """
    first = U(word + HALF) & FIRST
    return first, float_bits(bits_float(word) - bits_float(first)) & FIRST


@device
def split(words, low, at, a, b, c, d):
    """Four float32 become words [at:at + 4] and low [at:at + 4]."""
    words[at], low[at] = parts(a)
    words[at + 1], low[at + 1] = parts(b)
    words[at + 2], low[at + 2] = parts(c)
    words[at + 3], low[at + 3] = parts(d)


@device
def three(sums, at, a, a_low, of, b0, b1, l0, l1):
    """sums [at:at + 4] += 16 rows of A, from a[of] on, times 8 columns of B."""
    i, j, k, m = at, at + 1, at + 2, at + 3
    sums[i], sums[j], sums[k], sums[m] = mma_tf32(a_low[of], a_low[of + 1], a_low[of + 2], a_low[of + 3], b0, b1, sums[i], sums[j], sums[k],
                                                  sums[m])
    sums[i], sums[j], sums[k], sums[m] = mma_tf32(a[of], a[of + 1], a[of + 2], a[of + 3], l0, l1, sums[i], sums[j], sums[k], sums[m])
    sums[i], sums[j], sums[k], sums[m] = mma_tf32(a[of], a[of + 1], a[of + 2], a[of + 3], b0, b1, sums[i], sums[j], sums[k], sums[m])


def _make_copy_queries(shape):
    lanes, at_queries, q_pitch = shape.threads // shape.heads, shape.queries, shape.q_pitch

    @device
    def copy_queries(base, q, token, head, n_head, thread):
        """Begin to copy a block's queries to shared memory."""
        h, lane = thread // U(lanes), thread % U(lanes)
        at = 4 * WIDTH * (token + min(np.int64(head) + np.int64(h), np.int64(n_head - 1))) + np.int64(U(16) * lane)
        to = base + U(at_queries) + h * U(q_pitch) + U(16) * lane
        for i in range(ROW // 16 // lanes):
            copy_sixteen(to + U(16 * lanes * i), q, at + 16 * lanes * i, U(16))
        commit_copies()
    return copy_queries


def _make_scores(shape):
    pitch, q_pitch, score_pitch, at_queries, at_scores = shape.pitch, shape.q_pitch, shape.score_pitch, shape.queries, shape.scores
    heads, head_tiles, pairs, share = shape.heads, shape.heads // 16, shape.keys // 16, ROW // shape.slices
    n_sums, n_words, steps = shape.heads * shape.keys // 32, shape.heads // 4, share // 32

    @device
    def scores(base, tile, warp, lane):
        """Products of queries and rows, in a sum of each warp."""
        sums, a, a_low = cuda.local.array(n_sums, np.float32), cuda.local.array(n_words, np.uint32), cuda.local.array(n_words, np.uint32)
        g, c, begin = lane >> U(2), lane & U(3), U(share) * warp
        of_heads = base + U(at_queries) + (lane & U(15)) * U(q_pitch) + (lane >> U(4)) * U(16) + begin
        of_keys = tile + ((lane & U(7)) + (lane >> U(4)) * U(8)) * U(pitch) + (lane >> U(3) & U(1)) * U(16) + begin
        for i in range(n_sums):
            sums[i] = ZERO
        for step in range(anew(U(steps))):      # NVVM unrolls what is in it only if not this one, too
            for m in range(head_tiles):
                x, y, z, w = load_fragments(of_heads + U(16 * q_pitch * m) + U(32) * U(step))
                split(a, a_low, 4 * m, x, y, z, w)
            for pair in range(pairs):
                x, y, z, w = load_fragments(of_keys + U(16 * pitch * pair) + U(32) * U(step))
                b0, l0 = parts(x)
                b1, l1 = parts(y)
                b2, l2 = parts(z)
                b3, l3 = parts(w)
                for m in range(head_tiles):
                    at = 8 * (pairs * m + pair)
                    three(sums, at, a, a_low, 4 * m, b0, b1, l0, l1)
                    three(sums, at + 4, a, a_low, 4 * m, b2, b3, l2, l3)
        to = base + U(at_scores) + (warp * U(heads) + g) * U(score_pitch) + U(8) * c
        for m in range(head_tiles):
            for n in range(2 * pairs):
                i, at = 4 * (2 * pairs * m + n), to + U(16 * score_pitch * m + 32 * n)
                store_floats(at, sums[i], sums[i + 1])
                store_floats(at + U(8 * score_pitch), sums[i + 2], sums[i + 3])
    return scores


def _make_softmax(shape):
    score_pitch, weight_pitch, slices, at_scores, at_weights = (shape.score_pitch, shape.weight_pitch, shape.slices, shape.scores,
                                                                shape.weights)
    at_factors, heads, lanes, at_bias, weighing = shape.factors, shape.heads, shape.lanes, shape.bias, shape.weighing
    weigh = make_weigh(lanes)

    @device
    def softmax(base, tile, scale, top, weight, thread):
        """Scores become weights, four of a head in each of keys / 4 threads.

        Threads past these do as the first ones, and store nothing.
        """
        words, low = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
        head, i = thread // U(lanes) % U(heads), thread % U(lanes)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for part in range(slices):
            a, b, c, d = load_four_floats(base + U(at_scores) + (U(heads * part) + head) * U(score_pitch) + U(16) * i)
            s0, s1, s2, s3 = s0 + a, s1 + b, s2 + c, s3 + d
        a, b, c, d = load_four_floats(tile + U(at_bias) + U(16) * i)
        s0, s1, s2, s3 = s0 * scale + a, s1 * scale + b, s2 * scale + c, s3 * scale + d
        s0, s1, s2, s3, again, top, weight = weigh(s0, s1, s2, s3, top, weight)
        split(words, low, 0, float_bits(s0), float_bits(s1), float_bits(s2), float_bits(s3))
        at = base + U(at_weights) + head * U(weight_pitch) + U(16) * i
        if thread < U(weighing):
            store_four_words(at, words[0], words[1], words[2], words[3])
            store_four_words(at + U(heads * weight_pitch), low[0], low[1], low[2], low[3])
        if i == U(0) and thread < U(weighing):
            store_float(base + U(at_factors) + U(8) * head, again)
        return top, weight
    return softmax


def _make_add_values(shape):
    pitch, weight_pitch, steps, at_weights, at_factors = shape.pitch, shape.weight_pitch, shape.keys // 8, shape.weights, shape.factors
    heads, head_tiles, n_words = shape.heads, shape.heads // 16, shape.heads // 4

    @device
    def load_weights(words, at):
        """Fragments of eight keys: words 0 and 2 of a lane are of adjacent keys."""
        for m in range(head_tiles):
            for half in range(2):
                a, b = load_floats(at + U(8 * weight_pitch * (2 * m + half)))
                words[4 * m + half], words[4 * m + half + 2] = float_bits(a), float_bits(b)

    @device
    def add_values(base, tile, acc, at_acc, column, lane):
        """acc [at_acc:at_acc + heads] += weights times COLUMNS of a tile's values.

        By one warp.
        """
        a, a_low = cuda.local.array(n_words, np.uint32), cuda.local.array(n_words, np.uint32)
        for eight in range(heads // 8):
            again = load_float(base + U(at_factors + 64 * eight) + U(8) * (lane >> U(2)))
            for i in range(8):
                acc[at_acc + eight // 2 * 16 + eight % 2 * 2 + i // 2 * 4 + i % 2] *= again
        g, c = lane >> U(2), lane & U(3)
        of_weights = base + U(at_weights) + g * U(weight_pitch) + U(8) * c
        of_values = tile + U(2 * pitch) * c + U(4) * (column + g)
        for step in range(anew(U(steps))):      # NVVM unrolls what is in it only if not this one, too
            load_weights(a, of_weights + U(32 * step))
            load_weights(a_low, of_weights + U(heads * weight_pitch + 32 * step))
            for n in range(4):
                at = of_values + U(8 * pitch * step + 32 * n)
                b0, l0 = parts(float_bits(load_float(at)))
                b1, l1 = parts(float_bits(load_float(at + U(pitch))))
                for m in range(head_tiles):
                    three(acc, at_acc + 16 * m + 4 * n, a, a_low, 4 * m, b0, b1, l0, l1)
    return add_values


def _make(tile):
    shape = Shape(tile, ROW, ROW, 4 * tile.keys, None)
    return make_attend("f32", shape, copy_sixteen, 16, _make_copy_queries(shape), _make_scores(shape), _make_softmax(shape),
                       _make_add_values(shape), make_store_sums(shape, ONE))


TILES = Tile(32, 32, 1), Tile(32, 16, 1), Tile(16, 16, 1)
ATTEND = {} if SIMULATED else {("f32", tile): _make(tile) for tile in TILES}
