"""Flash attention of prompts in MLA's plain form, for capability 9.0.

One float16 stands for a query, a key, a value and a softmax weight. Keys and values of all heads are made of the latents (heads.py) for as
many keys at a time as SCRATCH holds. A block has QUERIES queries of one head, in shared memory as float16, each times a power of two. It
walks over tiles of keys and values, which bulk copies fetch, two under way. A warp has 16 queries, a lane two of them, g and g + 8: their
scores, weights and sums stay in registers. Between one part of the keys and the next the sums wait in the output, and greatest scores and
sums of weights in memory of their own.
"""
import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.current import current
from pydsa.backends.cuda.device import SIMULATED, bits_float, device, float_bits, fma, store_four_u32
from pydsa.backends.cuda.flash import heads, images
from pydsa.backends.cuda.flash.heads import BY_ROWS
from pydsa.backends.cuda.flash.images import CAPABILITY, GAIN, KV_LORA, N_ROT, TILE, inverse, pack_halves, power_for, power_of_part
from pydsa.backends.cuda.hopper import (arrive, copy_bulk, expect_bytes, fence_async, fence_mbarriers, init_mbarrier, make_wgmma,
                                        make_wgmma_shared, make_wgmma_wait, steps_of_rows, wait_phase)
from pydsa.backends.cuda.instructions import instruction, load_eight, read_sixteen, store_eight
from pydsa.backends.cuda.launch import blocks_for, kernel
from pydsa.backends.cuda.shared_memory import folds, power_of_two, shared_address
from pydsa.backends.devices import FLASH_WIDTHS, flash_keys

QUERIES, THREADS, WARPS = 128, 256, 8
ROWS_AT_ONCE, RAW = 4, 32        # rows of queries that a warp reads at a time, and numbers of a lane
U, ZERO, NONE, LOG2_E = np.uint32, np.float32(0), np.float32(-np.inf), np.float32(math.log2(math.e))
greatest_of_four, total_of_four = folds(4)
greatest_of_warp, _ = folds(32)
larger = instruction("max.f32 $0, $1, $2;", "f", "ff")


class Shape(NamedTuple):
    """Widths of queries and values, and how keys are divided into tiles."""
    n_nope: int
    n_v: int
    key_bits: int       # a tile has 2^key_bits keys

    # In shared memory there are images of queries; two tiles, each of keys, their rotated parts, and values; what each query's scores are
    # multiplied by; two mbarriers of full tiles, and two of empty ones.

    @property
    def n_images(self):
        """Images of 64 numbers of queries and keys."""
        return (self.n_nope + N_ROT) // 64

    @property
    def at_tiles(self):
        """Where the tiles begin in shared memory."""
        return 128 * QUERIES * self.n_images

    @property
    def stage_bytes(self):
        """Bytes of a tile."""
        return 2 * (self.n_nope + N_ROT + self.n_v) << self.key_bits

    @property
    def at_factors(self):
        """Where the scores' factors are."""
        return self.at_tiles + 2 * self.stage_bytes

    @property
    def bars(self):
        """Where the mbarriers are."""
        return self.at_factors + 4 * QUERIES


# (n_nope, n_rot, n_v, kv_lora) -> Shape: DeepSeek V2, V3 and Kimi K2; GLM-5 and GLM-4.7-Flash. With fewer values a tile has more keys.
SHAPES = {widths: Shape(widths[0], widths[2], 7 if widths[2] == 128 else 6) for widths in FLASH_WIDTHS}


@device
def positions_of(positions, first, lane):
    """The least and the greatest position of a block's queries.

    All lanes of a warp must call.
    """
    least, most, end = np.int32(0x7FFFFFFF), np.int32(0), positions.shape[0] - 1
    for i in range(0, QUERIES, 32):
        position = np.int32(positions[min(first + i + lane, end)])
        least, most = min(least, position), max(most, position)
    return np.int32(-greatest_of_warp(-least)), np.int32(greatest_of_warp(most))


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
    n_pieces, nope_pieces, image = (shape.n_nope + N_ROT) // 8, shape.n_nope // 8, 128 * QUERIES

    @device
    def put_queries(words, factors, at_factors, q, first, head, scale, of_keys, of_rotated, warp, lane):
        """Sixteen queries of a warp as float16 in shared memory.

        factors: what scores of each query are multiplied by. of_keys, of_rotated: the powers of two of keys and of their rotated parts.
        """
        raw, piece = cuda.local.array(RAW, np.uint32), min(lane, n_pieces - 1)
        own = of_keys * inverse(of_rotated) if piece >= nope_pieces else np.float32(1)
        for start in range(0, 16, ROWS_AT_ONCE):
            for i in range(ROWS_AT_ONCE):
                t = min(first + 16 * warp + start + i, q.shape[0] - 1)
                at = t * np.int64(q.strides[0]) + head * np.int64(q.strides[1]) + 32 * piece
                raw[8 * i], raw[8 * i + 1], raw[8 * i + 2], raw[8 * i + 3] = read_sixteen(q, at)
                raw[8 * i + 4], raw[8 * i + 5], raw[8 * i + 6], raw[8 * i + 7] = read_sixteen(q, at + 16)
            for i in range(ROWS_AT_ONCE):
                row, j = 16 * warp + start + i, 8 * i
                power = power_for(bits_float(U(greatest_of_warp(float_bits_of(raw, j, own)))))
                a, b = halves_of(raw[j], raw[j + 1], raw[j + 2], raw[j + 3], power * own)
                c, d = halves_of(raw[j + 4], raw[j + 5], raw[j + 6], raw[j + 7], power * own)
                if lane < n_pieces:
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


def _make_copy_tile(shape):
    at_tiles, stage_bytes, bars = shape.at_tiles, shape.stage_bytes, shape.bars
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
        factor = scale_back / total
    elif c == 0:
        tops[head, t], totals[head, t] = top, total
    for i in range(acc.size // 4):
        store_eight(out, at + 32 * i, float_bits(acc[4 * i + 2 * row] * factor), float_bits(acc[4 * i + 2 * row + 1] * factor))


SIGNATURE = "f4[:,:,:], f4[:,:], f4[:,:], f4[:,:,:], u1[::1], u1[::1], u1[::1], f4[:,:], f4[:], f4[:], i8[:], i4, i4, f4"


def _make_walk(shape):
    keys_of_tile, n_words, n_scores, n_sums = 1 << shape.key_bits, (1 << shape.key_bits) // 4, (1 << shape.key_bits) // 2, shape.n_v // 2
    steps, image, key_image = 4 * shape.n_images, 128 * QUERIES, 128 << shape.key_bits
    weigh, copy_tile, (bars, empty) = _make_weigh(n_scores), _make_copy_tile(shape), (shape.bars, shape.bars + 16)
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
            if before + (tile + 1 << key_bits) > least + 1:
                key = before + (tile << key_bits) + 2 * (thread & 3)
                hide(s, 0, np.int32(last - key))
                hide(s, 1, np.int32(last_8 - key))
            top, total, shrink = weigh(s, p, 0, top, total, factor)
            top_8, total_8, shrink_8 = weigh(s, p, 1, top_8, total_8, factor_8)
            for i in range(0, n_sums, 4):
                acc[i], acc[i + 1] = acc[i] * shrink, acc[i + 1] * shrink
                acc[i + 2], acc[i + 3] = acc[i + 2] * shrink_8, acc[i + 3] * shrink_8
            add_values(acc, p, BY_ROWS | np.uint64((here + U(at_values)) >> U(4)))
            wait_values(acc, p)
            if thread & 31 == 0:
                arrive(shared, empty + 8 * stage)
        return top, top_8, total_of_four(total), total_of_four(total_8)
    return walk


def _make_begin(shape):
    bars, empty, copy_tile = shape.bars, shape.bars + 16, _make_copy_tile(shape)

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


def _make_flash(shape):
    begin, put_queries, walk = _make_begin(shape), _make_put_queries(shape), _make_walk(shape)
    at_factors, key_bits, n_sums = shape.at_factors // 4, shape.key_bits, shape.n_v // 2

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
        fence_async()
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
        scale_back = inverse(of_latents) * inverse(v_powers[head]) if most < first_key + n_keys else ZERO
        if first + row <= end:
            store_row(out, at, acc, 0, tops, totals, head, t, c, top, total, scale_back)
        if first + row + 8 <= end:
            store_row(out, at_8, acc, 1, tops, totals, head, t_8, c, top_8, total_8, scale_back)
    return kernel(SIGNATURE, THREADS, f"flash_{shape.n_nope + N_ROT}_{shape.n_v}", shared=shape.bars + 32, specific=CAPABILITY)(flash)


FLASH = {widths: _make_flash(shape) for widths, shape in SHAPES.items()}


def takes(out, q, latents, k_b, v_b):
    """Whether there are kernels for these arguments on the current GPU."""
    widths = k_b.shape[2], q.shape[2] - k_b.shape[2], v_b.shape[1], k_b.shape[1]
    return (not SIMULATED and current().capability == CAPABILITY and widths in FLASH and (latents.first, latents.second) == (KV_LORA, N_ROT)
            and not any(n % 16 for n in (q.span[0], *q.strides[:2])) and q.strides[2] == 4
            and not any(n % 8 for n in (out.span[0], *out.strides[:2])) and out.strides[2] == 4)


def attention(out, q, latents, k_b, v_b, positions, scale):
    """MLA in its plain form: see mha.mha_attention.

    Rows of float32 of any strides that are multiples of 16 bytes.
    """
    (n_tokens, n_head, n_v), (_, _, n_nope) = out.shape, k_b.shape
    widths, data = (n_nope, N_ROT, n_v, KV_LORA), (latents.data.flat, latents.data.shape[1], positions)
    shape, flash = SHAPES[widths], FLASH[widths]
    n_kv = min(latents.data.shape[0], latents.data.shape[0] if positions.greatest is None else positions.greatest + 1)
    at_once = flash_keys(n_head, n_nope, n_v, n_kv)
    maxima = scratch("greatest of latents", (2, images.MAXIMA), np.float32)
    find_maxima, make_rows = images.ROWS[latents.storage]
    find_maxima(images.MAXIMA, maxima, *data)
    (k_images, k_powers), (v_images, v_powers) = images.weights_of(k_b, "k_b"), images.weights_of(v_b, "v_b")
    rows, rotated, keys, values = (scratch(f"images of {name}", (2 * at_once * n,), np.uint8) for name, n in (
        ("latents", KV_LORA), ("rotated parts", N_ROT), ("keys", n_head * n_nope), ("values", n_head * n_v)))
    tops, totals = (scratch(f"{name} of queries", (n_head, n_tokens), np.float32) for name in ("greatest scores", "sums"))
    for first in range(0, n_kv, at_once):
        n_tiles = blocks_for(min(at_once, n_kv - first), TILE)
        make_rows(images.BLOCKS_OF_TILE * n_tiles, rows, rotated, *data, maxima, first)
        parts = min(n_tiles, blocks_for(heads.BLOCKS, n_head * blocks_for(n_nope + n_v, heads.ROWS)))
        for make, made, of, n in ((heads.KEYS, keys, k_images, n_nope), (heads.VALUES, values, v_images, n_v)):
            make((n_head, blocks_for(n, heads.ROWS), parts), made, 2 * at_once * n, of, n, shape.key_bits, rows, n_tiles)
        flash((blocks_for(n_tokens, QUERIES), n_head), out, tops, totals, q, keys, rotated, values, maxima, k_powers, v_powers, positions,
              first, at_once, np.float32(scale) * LOG2_E)
