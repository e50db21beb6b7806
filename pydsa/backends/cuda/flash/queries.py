"""A block of flash attention in MLA's plain form: its queries, their softmax, and their sums.

A block has QUERIES queries of one head, in shared memory as float16, each times a power of two, in images as keys are. A warp has 16 of
them, a lane two, g and g + 8, where g = lane // 4: their scores, weights and sums stay in registers, as mma.m16n8k16 and wgmma give them.
Of scores [16, n] of a warp a lane has the pairs 2 c, 2 c + 1 of each eight keys, of row g, then of row g + 8, where c = lane % 4. Between
one part of the keys and the next the sums wait in the output, and greatest scores and sums of weights in memory of their own.
"""
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.flash.images import GAIN, WIDE, inverse, pack_halves, power_for, power_of_part
from pydsa.backends.cuda.intrinsics.device import bits_float, device, float_bits, fma, store_four_u32
from pydsa.backends.cuda.intrinsics.instructions import instruction, load_eight, read_sixteen, store_eight
from pydsa.backends.cuda.intrinsics.shared_memory import folds, greatest_integer, power_of_two
from pydsa.backends.cuda.runtime.launch import kernel

QUERIES, THREADS, WARPS = 128, 256, 8
ROWS_AT_ONCE, RAW = 4, 32        # rows of queries that a warp reads at a time, and numbers of a lane
U, ZERO, NONE = np.uint32, np.float32(0), np.float32(-np.inf)
greatest_of_four, total_of_four = folds(4)
larger = instruction("max.f32 $0, $1, $2;", "f", "ff")
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", "f", "f")       # a division would be a call, for which registers are spilled


class Shape(NamedTuple):
    """Widths of queries and values, and how keys are divided into tiles."""
    n_nope: int
    n_rot: int
    n_v: int
    key_bits: int       # a tile has 2^key_bits keys
    stages: int         # tiles that are in shared memory

    # In shared memory there are images of queries; tiles, each of keys, their rotated parts, and values; what each query's scores are
    # multiplied by; what else a kernel has there.

    @property
    def n_images(self):
        """Images of 64 numbers of queries and keys."""
        return self.n_nope // WIDE + 1

    @property
    def at_tiles(self):
        """Where the tiles begin in shared memory."""
        return 128 * QUERIES * self.n_images

    @property
    def stage_bytes(self):
        """Bytes of a tile."""
        return 2 * (self.n_nope + WIDE + self.n_v) << self.key_bits

    @property
    def at_factors(self):
        """Where the scores' factors are."""
        return self.at_tiles + self.stages * self.stage_bytes

    @property
    def end(self):
        """Where shared memory is free for what else there is."""
        return self.at_factors + 4 * QUERIES


@device
def positions_of(positions, first, lane):
    """The least and the greatest position of a block's queries.

    All lanes of a warp must call.
    """
    least, most, end = np.int32(0x7FFFFFFF), np.int32(0), positions.shape[0] - 1
    for i in range(0, QUERIES, 32):
        position = np.int32(positions[min(first + i + lane, end)])
        least, most = min(least, position), max(most, position)
    return np.int32(-greatest_integer(-least)), np.int32(greatest_integer(most))


@device
def halves_of(a, b, c, d, power):
    """Four float32, given as their bits, times a power of two as float16."""
    return (pack_halves(bits_float(b) * power, bits_float(a) * power), pack_halves(bits_float(d) * power, bits_float(c) * power))


@device
def greatest_bits(raw, at):
    """The greatest of eight float32 without signs, as bits: NaN is above all."""
    bits = np.int32(0)
    for i in range(8):
        bits = max(bits, np.int32(raw[at + i] & U(0x7FFFFFFF)))
    return bits


def _make_put_queries(shape):
    n_pieces, nope_pieces, n_stored, image = (shape.n_nope + shape.n_rot) // 8, shape.n_nope // 8, 8 * shape.n_images, 128 * QUERIES

    @device
    def put_queries(words, factors, at_factors, q, first, head, scale, of_keys, of_rotated, warp, lane):
        """Sixteen queries of a warp as float16 in shared memory.

        factors: what scores of each query are multiplied by. of_keys, of_rotated: the powers of two of keys and of their rotated parts.
        """
        raw, piece = cuda.local.array(RAW, np.uint32), min(lane, n_pieces - 1)
        own = of_keys * inverse(of_rotated) if piece >= nope_pieces else np.float32(1)
        if lane >= n_pieces:        # zeros, as keys have there
            own = ZERO
        for start in range(0, 16, ROWS_AT_ONCE):
            for i in range(ROWS_AT_ONCE):
                t = min(first + 16 * warp + start + i, q.shape[0] - 1)
                at = t * np.int64(q.strides[0]) + head * np.int64(q.strides[1]) + 32 * piece
                raw[8 * i], raw[8 * i + 1], raw[8 * i + 2], raw[8 * i + 3] = read_sixteen(q, at)
                raw[8 * i + 4], raw[8 * i + 5], raw[8 * i + 6], raw[8 * i + 7] = read_sixteen(q, at + 16)
            for i in range(ROWS_AT_ONCE):
                row, j = 16 * warp + start + i, 8 * i
                power = power_for(bits_float(U(greatest_integer(float_bits_of(raw, j, own)))))
                a, b = halves_of(raw[j], raw[j + 1], raw[j + 2], raw[j + 3], power * own)
                c, d = halves_of(raw[j + 4], raw[j + 5], raw[j + 6], raw[j + 7], power * own)
                if lane < n_stored:
                    store_four_u32(words, ((lane >> 3) * image + 128 * row + 16 * ((lane ^ row) & 7)) >> 2, a, b, c, d)
                if lane == 0:
                    factors[at_factors + row] = scale * inverse(power) * inverse(of_keys)
    return put_queries


@device
def float_bits_of(raw, at, own):
    """The bits of the greatest of eight float32 times a power of two."""
    return np.int32(float_bits(bits_float(U(greatest_bits(raw, at))) * own))


@device
def hide(s, row, last):
    """Give scores of keys beyond a query's position none of its weight.

    last: the last key that it sees, counted from that of the lane's first score.
    """
    for i in range(s.size // 4):
        for e in range(2):
            if 8 * i + e > last:
                s[4 * i + 2 * row + e] = NONE


def _make_weigh(n_sums):
    @device
    def weigh(s, p, row, top, total, factor):
        """Scores of a query become weights: words of float16 in p.

        row: 0, or 1 for the second query of the lane. Returns the greatest score so far, the lane's sum of weights, and what older sums
        shrink by.
        """
        best = top
        for i in range(n_sums // 4):
            best = larger(best, larger(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]))
        best = greatest_of_four(best)
        shrink, low, added = power_of_two((top - best) * factor), -best * factor, ZERO
        for i in range(n_sums // 4):
            a = power_of_two(fma(s[4 * i + 2 * row], factor, low))
            b = power_of_two(fma(s[4 * i + 2 * row + 1], factor, low))
            added += a + b
            p[2 * i + row] = pack_halves(b, a)
        return best, total * shrink + added, shrink
    return weigh


def make_weigh_tile(shape):
    """The function that makes weights of a tile's scores, for walks."""
    n_keys, n_sums, weigh = 1 << shape.key_bits, shape.n_v // 2, _make_weigh((1 << shape.key_bits) // 2)

    @device
    def weigh_tile(s, p, acc, top, top_8, total, total_8, factor, factor_8, key, least, last, last_8, thread):
        """Scores of a lane's two queries become weights in p; sums in acc shrink.

        key: the tile's first. least: of the block's queries' positions; last, last_8: positions of the lane's. Returns the greatest scores,
        and the lane's sums of weights.
        """
        if key + n_keys > least + 1:
            first = key + 2 * (thread & 3)
            hide(s, 0, np.int32(last - first))
            hide(s, 1, np.int32(last_8 - first))
        top, total, shrink = weigh(s, p, 0, top, total, factor)
        top_8, total_8, shrink_8 = weigh(s, p, 1, top_8, total_8, factor_8)
        for i in range(0, n_sums, 4):
            acc[i], acc[i + 1] = acc[i] * shrink, acc[i + 1] * shrink
            acc[i + 2], acc[i + 3] = acc[i + 2] * shrink_8, acc[i + 3] * shrink_8
        return top, top_8, total, total_8
    return weigh_tile


@device
def load_row(acc, row, out, at, tops, totals, head, t, c):
    """What an earlier part of the keys has left of a query.

    Its sums come into acc. Returns its greatest score, and a lane's share of the sum of weights.
    """
    for i in range(acc.size // 4):
        a, b = load_eight(out, at + 32 * i)
        acc[4 * i + 2 * row], acc[4 * i + 2 * row + 1] = bits_float(a), bits_float(b)
    return tops[head, t], totals[head, t] if c == 0 else ZERO


@device
def store_row(out, at, acc, row, tops, totals, head, t, c, top, total, scale_back):
    """Store sums of a query, divided by its sum of weights.

    If scale_back is 0 they are for the next part of the keys: they are stored as they are, and so is what weights are made with.
    """
    factor = np.float32(1)
    if scale_back > ZERO:
        factor = scale_back * reciprocal(total)
    elif c == 0:
        tops[head, t], totals[head, t] = top, total
    for i in range(acc.size // 4):
        store_eight(out, at + 32 * i, float_bits(acc[4 * i + 2 * row] * factor), float_bits(acc[4 * i + 2 * row + 1] * factor))


SIGNATURE = "f4[:,:,:], f4[:,:], f4[:,:], f4[:,:,:], u1[::1], u1[::1], u1[::1], f4[:,:], f4[:], f4[:], i8[:], i4, i4, f4"


def make_flash(shape, name, begin, walk, fence, shared, specific=None):
    """The kernel of attention of a block's queries.

    begin(shared, keys, rotated, values, of_head, n, thread) begins to copy tiles, fence() lets queries be read, walk() adds n tiles to what
    a lane has of two queries. shared: bytes of shared memory.
    """
    put_queries, at_factors, key_bits, n_sums = _make_put_queries(shape), shape.at_factors // 4, shape.key_bits, shape.n_v // 2

    def flash(out, tops, totals, q, keys, rotated, values, maxima, k_powers, v_powers, positions, first_key, n_keys, scale):
        """Attention of QUERIES queries of a head to keys.

        These are n_keys from the first_key-th on. It goes on with what earlier parts of the keys have left: in out, and in tops and totals
        [n_head, T], a query's greatest score and its sum of weights. scale: of scores, for weights that are powers of two.
        """
        thread, head, first = cuda.threadIdx.x, cuda.blockIdx.y, np.int32((cuda.gridDim.x - 1 - cuda.blockIdx.x) * QUERIES)
        warp, lane, shared = thread >> 5, thread & 31, cuda.shared.array(0, np.uint8, 1024)
        factors, words = cuda.shared.array(0, np.float32, 1024), cuda.shared.array(0, np.uint32, 1024)
        least, most = positions_of(positions, first, lane)
        if most < first_key:
            return
        n = (min(n_keys, most + 1 - first_key) + (1 << key_bits) - 1) >> key_bits
        of_head = np.int64(head) * (n_keys >> key_bits)
        begin(shared, keys, rotated, values, of_head, n, thread)
        of_latents = power_of_part(maxima, 0, lane) * GAIN
        put_queries(words, factors, at_factors, q, first, head, scale, of_latents * k_powers[head], power_of_part(maxima, 1, lane), warp,
                    lane)
        fence()
        cuda.syncthreads()
        row, c, end = 16 * warp + (lane >> 2), lane & 3, q.shape[0] - 1
        t, t_8, acc = min(first + row, end), min(first + row + 8, end), cuda.local.array(n_sums, np.float32)
        at = t * np.int64(out.strides[0]) + head * np.int64(out.strides[1]) + 8 * c
        at_8 = t_8 * np.int64(out.strides[0]) + head * np.int64(out.strides[1]) + 8 * c
        top, top_8, total, total_8 = NONE, NONE, ZERO, ZERO
        for i in range(n_sums):
            acc[i] = ZERO
        if first_key > 0:
            top, total = load_row(acc, 0, out, at, tops, totals, head, t, c)
            top_8, total_8 = load_row(acc, 1, out, at_8, tops, totals, head, t_8, c)
        top, top_8, total, total_8 = walk(
            shared, acc, top, top_8, total, total_8, factors[at_factors + row], factors[at_factors + row + 8], keys, rotated, values,
            of_head, n, first_key, least, np.int32(positions[t]), np.int32(positions[t_8]), thread)
        cuda.syncthreads()      # others have read what an earlier part has left: of the last query those that have none
        total, total_8 = total_of_four(total), total_of_four(total_8)
        scale_back = inverse(of_latents) * inverse(v_powers[head]) if most < first_key + n_keys else ZERO
        if first + row <= end:
            store_row(out, at, acc, 0, tops, totals, head, t, c, top, total, scale_back)
        if first + row + 8 <= end:
            store_row(out, at_8, acc, 1, tops, totals, head, t_8, c, top_8, total_8, scale_back)
    return kernel(SIGNATURE, THREADS, name, shared=shared, specific=specific)(flash)
