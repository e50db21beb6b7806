"""A few tokens' attention to rows of float16 or bfloat16.

chosen_rows.py tells what a block does, here with tensor cores. Rows are multiplied as they are. Queries and softmax weights are two
numbers of the rows' type, the second one what the first leaves: 22 bits of float16, 16 of bfloat16. A query of float16 is multiplied by a
power of two, so that neither part is too large or too small.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen.chosen_rows import SLICES, WIDTH, Shape, Tile, make_attend, make_store_sums, make_weigh
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits
from pydsa.backends.cuda.intrinsics.device import SIMULATED, bits_float, device, float_bits, load_four_f32, mma_f16, of_half, to_half
from pydsa.backends.cuda.intrinsics.instructions import instruction
from pydsa.backends.cuda.intrinsics.shared_memory import (copy_sixteen, folds, load_float, load_four_floats, load_fragments,
                                                          load_transposed, store_float, store_floats, store_words)

U, ZERO, ONE = np.uint32, np.float32(0), np.float32(1)
GREATEST = np.float32(1 << 14)      # of a weight, so that what the first part leaves is no subnormal float16
mma_bf16 = instruction("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                       "ffff", "rrrrrrffff")
pack_bf16 = instruction("cvt.rn.bf16x2.f32 $0, $1, $2;", "r", "ff")     # pack_bf16(upper, lower)


@device
def pairs_of_f16(a, b, c, d):
    """Four numbers as words of two: two words of first parts, two of what they leave."""
    p, q, r, s = to_half(a), to_half(b), to_half(c), to_half(d)
    e, f, g, h = to_half(a - of_half(p)), to_half(b - of_half(q)), to_half(c - of_half(r)), to_half(d - of_half(s))
    return U(p | q << 16), U(r | s << 16), U(e | f << 16), U(g | h << 16)


@device
def left_of_bf16(word, a, b):
    """What two bfloat16 leave of the numbers that they were made of."""
    return pack_bf16(b - bits_float(U(word & 0xFFFF0000)), a - bits_float(U(word << 16)))


@device
def pairs_of_bf16(a, b, c, d):
    """Four numbers as words of two: two words of first parts, two of what they leave."""
    first, second = pack_bf16(b, a), pack_bf16(d, c)
    return first, second, left_of_bf16(first, a, b), left_of_bf16(second, c, d)


@device
def power_for_half(x):
    """The power of two that brings |x| to 2^13 or more, and its inverse.

    The product is below 2^14. For an infinite x or NaN, and below 2^-113, it is another one.
    """
    exponent = min(max(np.int32(float_bits(x) >> 23 & 255), 14), 253)
    return bits_float(U((267 - exponent) << 23)), bits_float(U((exponent - 13) << 23))


@device
def as_it_is(x):
    """1 and 1, in place of a power of two: bfloat16 has all exponents of float32."""
    return np.float32(1), np.float32(1)


# storage -> four numbers as pairs; a query's power of two and its inverse; mma.m16n8k16
TYPES = {"f16": (pairs_of_f16, power_for_half, mma_f16), "bf16": (pairs_of_bf16, as_it_is, mma_bf16)}


def _make_two(storage):
    mma = TYPES[storage][2]

    @device
    def two(sums, at, a, a_low, b0, b1):
        """sums [at:at + 4] += both parts of 16 rows of A times 8 columns of B."""
        i, j, k, m = at, at + 1, at + 2, at + 3
        sums[i], sums[j], sums[k], sums[m] = mma(a[0], a[1], a[2], a[3], b0, b1, sums[i], sums[j], sums[k], sums[m])
        sums[i], sums[j], sums[k], sums[m] = mma(a_low[0], a_low[1], a_low[2], a_low[3], b0, b1, sums[i], sums[j], sums[k], sums[m])
    return two


def _make_round_queries(storage, shape):
    lanes = shape.lanes
    n_fours, greatest, at_queries, q_pitch = WIDTH // 4 // lanes, folds(lanes)[0], shape.queries, shape.q_pitch
    held, (pairs, power, _) = 4 * n_fours, TYPES[storage]

    @device
    def round_queries(base, q, token, head, n_head, thread):
        """Put a block's queries into shared memory, in two parts.

        The inverse of their power of two is beside them.
        """
        values, bits = cuda.local.array(held, np.float32), np.int32(0)
        h, lane = thread // U(lanes), thread % U(lanes)
        at = (token + min(np.int64(head) + np.int64(h), np.int64(n_head - 1))) * WIDTH + 4 * np.int64(lane)
        for i in range(n_fours):
            values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3] = load_four_f32(q, at + 4 * lanes * i)
        for i in range(held):
            bits = max(bits, abs_bits(values[i]))
        f, inverse = power(bits_float(U(greatest(bits))))
        to = base + U(at_queries) + h * U(q_pitch) + U(8) * lane
        for i in range(n_fours):
            a, b, c, d = pairs(values[4 * i] * f, values[4 * i + 1] * f, values[4 * i + 2] * f, values[4 * i + 3] * f)
            store_words(to + U(8 * lanes * i), a, b)
            store_words(to + U(8 * lanes * i + 2 * WIDTH), c, d)
        if lane == U(0):
            store_float(base + U(at_queries + 4 * WIDTH) + h * U(q_pitch), inverse)
    return round_queries


def _make_scores(storage, shape):
    pitch, q_pitch, score_pitch, at_queries, at_scores = shape.pitch, shape.q_pitch, shape.score_pitch, shape.queries, shape.scores
    columns, two, heads, head_tiles = shape.keys // 32, _make_two(storage), shape.heads, shape.heads // 16

    @device
    def scores(base, tile, warp, lane):
        """Products of queries and rows, in SLICES sums.

        A warp has 16 heads and 32 keys.
        """
        sums, a, a_low = cuda.local.array(16, np.float32), cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
        column, head, part = U(32) * (warp % U(columns)), U(16) * (warp // U(columns) % U(head_tiles)), warp // U(head_tiles * columns)
        g, c, begin = lane >> U(2), lane & U(3), U(2 * WIDTH // SLICES) * part
        of_heads = base + U(at_queries) + (head + (lane & U(15))) * U(q_pitch) + (lane >> U(4)) * U(16) + begin
        of_keys = tile + (column + (lane & U(7)) + (lane >> U(4)) * U(8)) * U(pitch) + (lane >> U(3) & U(1)) * U(16) + begin
        for i in range(16):
            sums[i] = ZERO
        for step in range(WIDTH // 16 // SLICES):
            a[0], a[1], a[2], a[3] = load_fragments(of_heads + U(32) * U(step))
            a_low[0], a_low[1], a_low[2], a_low[3] = load_fragments(of_heads + U(2 * WIDTH) + U(32) * U(step))
            for pair in range(2):
                b0, b1, b2, b3 = load_fragments(of_keys + U(16 * pitch * pair) + U(32) * U(step))
                two(sums, 8 * pair, a, a_low, b0, b1)
                two(sums, 8 * pair + 4, a, a_low, b2, b3)
        to = base + U(at_scores) + (part * U(heads) + head + g) * U(score_pitch) + (column + U(2) * c) * U(4)
        for i in range(4):
            store_floats(to + U(32 * i), sums[4 * i], sums[4 * i + 1])
            store_floats(to + U(32 * i + 8 * score_pitch), sums[4 * i + 2], sums[4 * i + 3])
    return scores


def _make_softmax(storage, shape):
    q_pitch, score_pitch, weight_pitch = shape.q_pitch, shape.score_pitch, shape.weight_pitch
    at_queries, at_scores, at_weights, at_bias = shape.queries, shape.scores, shape.weights, shape.bias
    at_factors, heads, lanes, pairs = shape.factors, shape.heads, shape.lanes, TYPES[storage][0]
    weigh = make_weigh(lanes)

    @device
    def softmax(base, tile, scale, top, weight, thread):
        """Scores become weights, four of a head in each of keys / 4 threads."""
        head, i = thread // U(lanes), thread % U(lanes)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for part in range(SLICES):
            a, b, c, d = load_four_floats(base + U(at_scores) + (U(heads * part) + head) * U(score_pitch) + U(16) * i)
            s0, s1, s2, s3 = s0 + a, s1 + b, s2 + c, s3 + d
        a, b, c, d = load_four_floats(tile + U(at_bias) + U(16) * i)
        f = scale * load_float(base + U(at_queries + 4 * WIDTH) + head * U(q_pitch))
        s0, s1, s2, s3 = s0 * f + a, s1 * f + b, s2 * f + c, s3 * f + d
        s0, s1, s2, s3, again, top, weight = weigh(s0, s1, s2, s3, top, weight)
        a, b, c, d = pairs(s0 * GREATEST, s1 * GREATEST, s2 * GREATEST, s3 * GREATEST)
        at = base + U(at_weights) + head * U(weight_pitch) + U(8) * i
        store_words(at, a, b)
        store_words(at + U(heads * weight_pitch), c, d)
        if i == U(0):
            store_float(base + U(at_factors) + U(8) * head, again)
        return top, weight
    return softmax


def _make_add_values(storage, shape):
    pitch, weight_pitch, steps, at_weights, at_factors = shape.pitch, shape.weight_pitch, shape.keys // 16, shape.weights, shape.factors
    two, heads = _make_two(storage), shape.heads

    @device
    def add_values(base, tile, acc, at_acc, column, lane):
        """acc [at_acc:at_acc + heads] += weights times COLUMNS of a tile's values.

        By one warp.
        """
        a, a_low = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
        for eight in range(heads // 8):
            again = load_float(base + U(at_factors + 64 * eight) + U(8) * (lane >> U(2)))
            for i in range(8):
                acc[at_acc + eight // 2 * 16 + eight % 2 * 2 + i // 2 * 4 + i % 2] *= again
        of_weights = base + U(at_weights) + (lane & U(15)) * U(weight_pitch) + (lane >> U(4)) * U(16)
        of_values = tile + (lane & U(15)) * U(pitch) + U(2) * column + (lane >> U(4)) * U(16)
        for step in range(steps):
            for group in range(2):
                b0, b1, b2, b3 = load_transposed(of_values + U(16 * pitch * step + 32 * group))
                for m in range(heads // 16):
                    at, i = of_weights + U(16 * weight_pitch * m + 32 * step), at_acc + 16 * m + 8 * group
                    a[0], a[1], a[2], a[3] = load_fragments(at)
                    a_low[0], a_low[1], a_low[2], a_low[3] = load_fragments(at + U(heads * weight_pitch))
                    two(acc, i, a, a_low, b0, b1)
                    two(acc, i + 4, a, a_low, b2, b3)
    return add_values


def _make(storage, tile):
    shape = Shape(tile, 2 * WIDTH, 4 * WIDTH + 8, 2 * tile.keys)
    return make_attend(storage, shape, copy_sixteen, 16, _make_round_queries(storage, shape), _make_scores(storage, shape),
                       _make_softmax(storage, shape), _make_add_values(storage, shape), make_store_sums(shape, ONE / GREATEST))


TILES = Tile(64, 32, 1), Tile(32, 32, 2), Tile(32, 32, 1), Tile(32, 16, 1)
ATTEND = {} if SIMULATED else {(storage, tile): _make(storage, tile) for storage in TYPES for tile in TILES}
