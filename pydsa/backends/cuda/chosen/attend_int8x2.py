"""A few tokens' attention to rows of int8 and int16.

chosen_rows.py tells what a block does, here with tensor cores of int8. Queries, rows and softmax weights are pairs of int8, 256 high + low
(int8 rows have one). Of the four products of pairs the three largest are computed, as by int8x2/attention.py. Each part of a row and of a
query has a scale.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen.chosen_rows import ROTATED, SLICES, VALUE, WIDTH, Shape, Tile, make_attend, make_weigh
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits
from pydsa.backends.cuda.intrinsics.device import (SIMULATED, bits_float, device, load_four_f32, mma_s8, nearest, pack_int8x2, permuted,
                                                   store_four_f32)
from pydsa.backends.cuda.intrinsics.shared_memory import (copy_eight, folds, load_float, load_floats, load_fragments, load_transposed,
                                                          nearest_integer, store_floats, store_word)
from pydsa.quants import INT8X2_MAX


U = np.uint32
ZERO, INFINITY, LARGEST = np.float32(0), np.float32(np.inf), np.float32(INT8X2_MAX)


class PlanesShape(Shape):
    """The shape of blocks whose rows have one byte or two for a number.

    Those bytes lie in as many planes, the high ones first.
    """

    def __init__(self, planes, tile):
        super().__init__(tile, planes * WIDTH + 8, 2 * WIDTH + 8, tile.keys)
        self.planes = planes


def _make_round_queries(shape):
    lanes = shape.lanes
    firsts, n_fours, greatest, at_queries = VALUE // 4 // lanes, WIDTH // 4 // lanes, folds(lanes)[0], shape.queries
    held, q_pitch = 4 * n_fours, shape.q_pitch

    @device
    def factor_of(values, first, end):
        """What a part of the queries is multiplied by, and its scale."""
        bits = np.int32(0)
        for i in range(first, end):
            bits = max(bits, abs_bits(values[i]))
        largest = bits_float(U(greatest(bits)))
        finite = largest < INFINITY
        return LARGEST / largest if finite and largest > np.float32(1e-30) else ZERO, largest / LARGEST if finite else np.float32(np.nan)

    @device
    def round_queries(base, q, token, head, n_head, thread):
        """Round a block's queries to pairs of int8 in shared memory."""
        values = cuda.local.array(held, np.float32)
        h, lane = thread // U(lanes), thread % U(lanes)
        at = (token + min(np.int64(head) + np.int64(h), np.int64(n_head - 1))) * WIDTH + 4 * np.int64(lane)
        for i in range(n_fours):
            values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3] = load_four_f32(q, at + 4 * lanes * i)
        factor, scale = factor_of(values, 0, 4 * firsts)
        factor_1, scale_1 = factor_of(values, 4 * firsts, held)
        to = base + U(at_queries) + h * U(q_pitch) + U(4) * lane
        for i in range(n_fours):
            f = factor if i < firsts else factor_1
            high, low = pack_int8x2(nearest(values[4 * i], f), nearest(values[4 * i + 1], f), nearest(values[4 * i + 2], f),
                                    nearest(values[4 * i + 3], f))
            store_word(to + U(4 * lanes * i), high)
            store_word(to + U(4 * lanes * i + WIDTH), low)
        if lane == U(0):
            store_floats(base + U(at_queries + 2 * WIDTH) + h * U(q_pitch), scale, scale_1)
    return round_queries


def _make_three(planes):
    @device
    def three(high, mixed, at, a, a_low, b0, b1, low0, low1):
        """high, mixed [at:at + 4] += the products of pairs: 16 rows of A, 8 columns of B."""
        i, j, k, m = at, at + 1, at + 2, at + 3
        high[i], high[j], high[k], high[m] = mma_s8(a[0], a[1], a[2], a[3], b0, b1, high[i], high[j], high[k], high[m])
        mixed[i], mixed[j], mixed[k], mixed[m] = mma_s8(a_low[0], a_low[1], a_low[2], a_low[3], b0, b1, mixed[i], mixed[j], mixed[k],
                                                        mixed[m])
        if planes == 2:
            mixed[i], mixed[j], mixed[k], mixed[m] = mma_s8(a[0], a[1], a[2], a[3], low0, low1, mixed[i], mixed[j], mixed[k], mixed[m])
    return three


@device
def whole(high, mixed):
    """256 high + mixed, as float32."""
    return np.float32(np.int32((high << 8) + mixed))


def _make_put_scores(shape):
    pitch, q_pitch, score_pitch, unit = shape.pitch, shape.q_pitch, shape.score_pitch, np.float32(256 ** (shape.planes - 1))

    @device
    def put_scores(to, high, mixed, of_keys, of_heads, more):
        """Store 16 heads' scaled products with 32 keys; add them if `more`.

        of_keys, of_heads: where the scales of a lane's first key and head are.
        """
        f, f_8 = load_float(of_heads) * unit, load_float(of_heads + U(8 * q_pitch)) * unit
        for i in range(4):
            d, e, j, k = load_float(of_keys + U(8 * i * pitch)), load_float(of_keys + U((8 * i + 1) * pitch)), 4 * i, to + U(32 * i)
            p, q = whole(high[j], mixed[j]) * (d * f), whole(high[j + 1], mixed[j + 1]) * (e * f)
            r, t = whole(high[j + 2], mixed[j + 2]) * (d * f_8), whole(high[j + 3], mixed[j + 3]) * (e * f_8)
            if more:
                a, b = load_floats(k)
                c, g = load_floats(k + U(8 * score_pitch))
                p, q, r, t = p + a, q + b, r + c, t + g
            store_floats(k, p, q)
            store_floats(k + U(8 * score_pitch), r, t)
    return put_scores


def _make_scores(shape):
    planes, pitch, score_pitch, at_queries, at_scores = shape.planes, shape.pitch, shape.score_pitch, shape.queries, shape.scores
    columns, three, put_scores, q_pitch = shape.keys // 32, _make_three(planes), _make_put_scores(shape), shape.q_pitch
    heads, head_tiles = shape.heads, shape.heads // 16

    @device
    def add_step(high, mixed, a, a_low, of_heads, of_keys, step):
        """Multiply 32 numbers of 16 heads with those of 32 keys."""
        a[0], a[1], a[2], a[3] = load_fragments(of_heads + U(32) * step)
        a_low[0], a_low[1], a_low[2], a_low[3] = load_fragments(of_heads + U(WIDTH) + U(32) * step)
        for pair in range(2):
            at = of_keys + U(16 * pitch * pair) + U(32) * step
            b0, b1, b2, b3 = load_fragments(at)
            l0, l1, l2, l3 = load_fragments(at + U(WIDTH)) if planes == 2 else (U(0), U(0), U(0), U(0))
            three(high, mixed, 8 * pair, a, a_low, b0, b1, l0, l1)
            three(high, mixed, 8 * pair + 4, a, a_low, b2, b3, l2, l3)

    @device
    def scores(base, tile, warp, lane):
        """Products of queries and rows, in SLICES sums.

        A warp has 16 heads and 32 keys.
        """
        high, mixed = cuda.local.array(16, np.int32), cuda.local.array(16, np.int32)
        a, a_low = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
        column, head, part = U(32) * (warp % U(columns)), U(16) * (warp // U(columns) % U(head_tiles)), warp // U(head_tiles * columns)
        g, c = lane >> U(2), lane & U(3)
        of_heads = base + U(at_queries) + (head + (lane & U(15))) * U(q_pitch) + (lane >> U(4)) * U(16)
        of_keys = tile + (column + (lane & U(7)) + (lane >> U(4)) * U(8)) * U(pitch) + (lane >> U(3) & U(1)) * U(16)
        head_scales = base + U(at_queries + 2 * WIDTH) + (head + g) * U(q_pitch)
        key_scales = tile + (column + U(2) * c) * U(pitch) + U(planes * WIDTH)
        to = base + U(at_scores) + (part * U(heads) + head + g) * U(score_pitch) + (column + U(2) * c) * U(4)
        for i in range(16):
            high[i], mixed[i] = np.int32(0), np.int32(0)
        for step in range(VALUE // 32 // SLICES):
            add_step(high, mixed, a, a_low, of_heads, of_keys, U(VALUE // 32 // SLICES) * part + U(step))
        put_scores(to, high, mixed, key_scales, head_scales, False)
        if part < U(ROTATED // 32):
            for i in range(16):
                high[i], mixed[i] = np.int32(0), np.int32(0)
            add_step(high, mixed, a, a_low, of_heads, of_keys, U(VALUE // 32) + part)
            put_scores(to, high, mixed, key_scales + U(4), head_scales + U(4), True)
    return scores


def _make_softmax(shape):
    planes, pitch, score_pitch, weight_pitch = shape.planes, shape.pitch, shape.score_pitch, shape.weight_pitch
    at_scores, at_weights, at_bias, at_factors = shape.scores, shape.weights, shape.bias, shape.factors
    lanes, unit, heads = shape.lanes, np.float32(256 ** (planes - 1)), shape.heads
    greatest, weigh = folds(lanes)[0], make_weigh(lanes)

    @device
    def usable(x):
        """The scale of a row, or 0 where it is no number above 0."""
        return x if ZERO < x < INFINITY else ZERO

    @device
    def softmax(base, tile, scale, top, weight, thread):
        """Scores become weights, four of a head in each of keys / 4 threads.

        Weights are multiplied by the scale of the row's value, relative to the largest one, and rounded to pairs of int8. A thread's keys
        are 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of sixteen, as transposed fragments of values have them.
        """
        head, i = thread // U(lanes), thread % U(lanes)
        key = U(16) * (i >> U(2)) + U(2) * (i & U(3))
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for part in range(SLICES):
            at = base + U(at_scores) + (U(heads * part) + head) * U(score_pitch) + U(4) * key
            a, b = load_floats(at)
            c, d = load_floats(at + U(32))
            s0, s1, s2, s3 = s0 + a, s1 + b, s2 + c, s3 + d
        a, b = load_floats(tile + U(at_bias) + U(4) * key)
        c, d = load_floats(tile + U(at_bias) + U(4) * key + U(32))
        s0, s1, s2, s3 = s0 * scale + a, s1 * scale + b, s2 * scale + c, s3 * scale + d
        s0, s1, s2, s3, again, top, weight = weigh(s0, s1, s2, s3, top, weight)
        at = tile + key * U(pitch) + U(planes * WIDTH)
        a, b = usable(load_float(at)), usable(load_float(at + U(pitch)))
        c, d = usable(load_float(at + U(8 * pitch))), usable(load_float(at + U(9 * pitch)))
        most = max(greatest(max(max(a, b), max(c, d))), np.float32(1e-30))
        share = LARGEST / most
        high, low = pack_int8x2(nearest_integer(s0 * (a * share)), nearest_integer(s1 * (b * share)), nearest_integer(s2 * (c * share)),
                                nearest_integer(s3 * (d * share)))
        at = base + U(at_weights) + head * U(weight_pitch) + U(4) * i
        store_word(at, high)
        store_word(at + U(heads * weight_pitch), low)
        if i == U(0):
            store_floats(base + U(at_factors) + U(8) * head, again, most / LARGEST * unit)
        return top, weight
    return softmax


def _make_add_values(shape):
    planes, pitch, weight_pitch, steps, heads = shape.planes, shape.pitch, shape.weight_pitch, shape.keys // 32, shape.heads
    at_weights, at_factors, n_sums, head_tiles, low = shape.weights, shape.factors, heads // 2, heads // 16, heads * shape.weight_pitch

    @device
    def add_plane(sums, of_weights, of_values, weights_at, values_at):
        """sums += a plane of the weights times one of 16 columns of values."""
        for step in range(steps):
            r0, r1, r2, r3 = load_transposed(of_values + U(32 * pitch * step + values_at))
            e0, e1 = permuted(r0, r1, U(0x6420)), permuted(r2, r3, U(0x6420))       # even columns
            o0, o1 = permuted(r0, r1, U(0x7531)), permuted(r2, r3, U(0x7531))
            for m in range(head_tiles):
                a, b, c, d = load_fragments(of_weights + U(16 * weight_pitch * m + 32 * step + weights_at))
                i, j, k, n = 8 * m, 8 * m + 1, 8 * m + 2, 8 * m + 3
                sums[i], sums[j], sums[k], sums[n] = mma_s8(a, b, c, d, e0, e1, sums[i], sums[j], sums[k], sums[n])
                i, j, k, n = 8 * m + 4, 8 * m + 5, 8 * m + 6, 8 * m + 7
                sums[i], sums[j], sums[k], sums[n] = mma_s8(a, b, c, d, o0, o1, sums[i], sums[j], sums[k], sums[n])

    @device
    def add_values(base, tile, acc, at_acc, column, lane):
        """acc [at_acc:at_acc + heads] += weights times COLUMNS of a tile's values.

        By one warp, 16 columns at a time: first the high bytes' products, then 256 times those and the mixed ones. So fewer numbers are in
        registers, at the price of loads.
        """
        sums = cuda.local.array(n_sums, np.int32)
        of_weights = base + U(at_weights) + (lane & U(15)) * U(weight_pitch) + (lane >> U(4)) * U(16)
        of_values = tile + lane * U(pitch) + column
        for group in range(2):
            for i in range(n_sums):
                sums[i] = np.int32(0)
            add_plane(sums, of_weights, of_values, 0, 16 * group)
            for i in range(n_sums):
                sums[i] = np.int32(sums[i] << 8)
            add_plane(sums, of_weights, of_values, low, 16 * group)
            if planes == 2:
                add_plane(sums, of_weights, of_values, 0, 16 * group + WIDTH)
            for eight in range(heads // 8):
                again, f = load_floats(base + U(at_factors + 64 * eight) + U(8) * (lane >> U(2)))
                for i in range(4):
                    at, j = at_acc + 8 * eight + 4 * group + i, eight // 2 * 8 + i % 2 * 4 + eight % 2 * 2 + i // 2
                    acc[at] = acc[at] * again + np.float32(sums[j]) * f
    return add_values


def _make_store_sums(shape):
    eights = shape.heads // 8

    @device
    def store_sums(sums, acc, at_acc, first_row, n_rows, column, lane):
        """Put COLUMNS of the sums of a block's heads into rows of sums."""
        for eight in range(eights):
            h = U(8 * eight) + (lane >> U(2))
            at = (first_row + h) * VALUE + column + 4 * (lane & U(3))
            if h < n_rows:
                for group in range(2):
                    i = at_acc + 8 * eight + 4 * group
                    store_four_f32(sums, np.int64(at + 16 * group), acc[i], acc[i + 1], acc[i + 2], acc[i + 3])
    return store_sums


def _make(storage, tile):
    shape = PlanesShape(2 if storage == "i16" else 1, tile)
    return make_attend(storage, shape, copy_eight, 8, _make_round_queries(shape), _make_scores(shape), _make_softmax(shape),
                       _make_add_values(shape), _make_store_sums(shape))


TILES = {"i16": (Tile(64, 32, 2), Tile(64, 32, 1), Tile(32, 32, 1)), "i8": (Tile(64, 32, 2), Tile(32, 32, 2))}
ATTEND = {} if SIMULATED else {(storage, tile): _make(storage, tile) for storage, tiles in TILES.items() for tile in tiles}
