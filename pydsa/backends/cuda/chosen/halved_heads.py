"""Queries of prompts times k_b, as images for attend_chosen.py: products in wgmma of capability 9.0.

A block keeps a head's matrix in shared memory, as float16 (flash/images.py), and takes tiles of TOKENS tokens: it rounds their queries to
float16, each with a power of two, and multiplies. All VALUE numbers of a result are in the block, half of them in each group of four warps,
so the greatest of them and of the rotated part is known before they are rounded.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.chosen.chosen_rows import ROTATED, VALUE
from pydsa.backends.cuda.chosen.half_rows import HEADS, IMAGE, PART, load_piece, of_both_groups, store_piece
from pydsa.backends.cuda.f16.panels import factors_for
from pydsa.backends.cuda.flash.heads import turned
from pydsa.backends.cuda.flash.images import inverse, weights_of
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits
from pydsa.backends.cuda.intrinsics.device import bits_float, device
from pydsa.backends.cuda.intrinsics.hopper import (copy_bulk, expect_bytes, fence_async, fence_mbarriers, init_mbarrier, make_wgmma_shared,
                                                   make_wgmma_wait, steps_of_rows, wait_phase)
from pydsa.backends.cuda.intrinsics.instructions import pack_halves, store_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import folds, load_float, shared_address, store_float, store_four_words
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel

CAPABILITY = 9, 0
TOKENS, THREADS = HEADS, 256    # tokens of a tile, as many as an image of queries has heads
BLOCKS = 264                    # at most, if heads are not more: one fits into each of 132 multiprocessors, and copies its weights first
COLUMNS = VALUE // 2            # of a group of warps
SUMS = COLUMNS // 2             # of a lane
OF_ROTATED = ROTATED // 4       # numbers of a rotated part that a lane has
U, ZERO = np.uint32, np.float32(0)
BY_ROWS = np.uint64(1 << 62 | 64 << 32 | 1 << 16)       # descriptor: swizzle of 128 bytes; eight rows are 1,024 bytes
greatest_of_four, greatest_of_eight = folds(4)[0], folds(8)[0]
wait_sums = make_wgmma_wait(COLUMNS, 0)


class Places:
    """Where what is in shared memory.

    n_nope: numbers of a query without a position. Behind the weights are queries, images of 64 numbers of all tokens; of each token the
    unit of its query; of each group of warps and token the greatest result; an mbarrier.
    """

    def __init__(self, n_nope):
        self.images = n_nope // 64
        self.weights = 2 * VALUE * n_nope
        self.units = self.weights + 2 * TOKENS * n_nope
        self.greatest = self.units + 4 * TOKENS
        self.here = self.greatest + 8 * TOKENS
        self.size = self.here + 8


def _make_queries(places):
    parts, at_queries, at_units, n_values = places.images, places.weights, places.units, 8 * places.images

    @device
    def load_queries(values, q, first, head, thread):
        """Load a thread's share of a tile's queries.

        Eight lanes have one. Behind the last token stands that one again.
        """
        for half in range(TOKENS // 32):
            t = min(np.int64(first) + np.int64(thread >> U(3)) + 32 * half, np.int64(q.shape[0] - 1))
            at = t * q.strides[0] + np.int64(head) * q.strides[1] + np.int64(U(32) * (thread & U(7)))
            for i in range(parts):
                load_piece(values, n_values * half + 8 * i, q, at + 256 * i)

    @device
    def put_queries(base, values, thread):
        """Round queries to float16, times a power of two each."""
        chunk, words = thread & U(7), cuda.local.array(4, np.uint32)
        for half in range(TOKENS // 32):
            row, bits = (thread >> U(3)) + U(32 * half), np.int32(0)
            for i in range(n_values):
                bits = max(bits, abs_bits(values[n_values * half + i]))
            factor, unit = factors_for(greatest_of_eight(np.int32(bits)))
            to = base + U(at_queries) + U(128) * row + ((chunk ^ row & U(7)) << U(4))
            for i in range(parts):
                for j in range(4):
                    v = n_values * half + 8 * i + 2 * j
                    words[j] = pack_halves(values[v + 1] * factor, values[v] * factor) if factor > ZERO else U(0)
                store_four_words(to + U(128 * TOKENS * i), words[0], words[1], words[2], words[3])
            if chunk == U(0):
                store_float(base + U(at_units) + U(4) * row, unit)
    return load_queries, put_queries


@device
def greatest_of_row(sums, first, unit):
    """The bits of the greatest |sum| of a row, of four lanes, times its unit."""
    bits = np.int32(0)
    for i in range(COLUMNS // 8):
        bits = max(bits, max(abs_bits(sums[4 * i + first]), abs_bits(sums[4 * i + first + 1])))
    return abs_bits(bits_float(U(greatest_of_four(np.int32(bits)))) * unit)


@device
def load_rotated(rotated, q, token, head, at, c):
    """Load a lane's share of the rotated part of a query.

    That begins at byte `at`. Returns the bits of the greatest |number| of it, of four lanes.
    """
    at += min(token, np.int64(q.shape[0] - 1)) * q.strides[0] + np.int64(head) * q.strides[1] + np.int64(U(32) * c)
    load_piece(rotated, 0, q, at)
    load_piece(rotated, 8, q, at + 128)
    bits = np.int32(0)
    for i in range(OF_ROTATED):
        bits = max(bits, abs_bits(rotated[i]))
    return greatest_of_four(np.int32(bits))


@device
def store_rotated(images, at, rotated, head, factor, c):
    """Store a lane's share of a rotated part as pieces of an image."""
    store_piece(images, at, np.int64(head), np.int64(U(VALUE // 8) + c), rotated, 0, factor)
    store_piece(images, at, np.int64(head), np.int64(U(VALUE // 8 + 4) + c), rotated, 8, factor)


@device
def store_row(images, at, sums, first, gain, group, head, lane, valid):
    """Store a row's columns of a lane, times `gain`, as pieces of an image.

    at: where the image's row begins. All lanes of a warp must call.
    """
    for j in range(COLUMNS // 64):
        for half in range(2):
            i = 32 * j + 16 * half + first
            w0, w1, w2, w3 = turned((pack_halves(sums[i + 1] * gain, sums[i] * gain), pack_halves(sums[i + 5] * gain, sums[i + 4] * gain),
                                     pack_halves(sums[i + 9] * gain, sums[i + 8] * gain),
                                     pack_halves(sums[i + 13] * gain, sums[i + 12] * gain)), lane)
            if valid:
                piece = (U(4 * half) + (lane & U(3))) ^ head & U(7)
                store_sixteen(images, at + PART * j + np.int64(U(4 * PART) * group + U(16) * piece), w0, w1, w2, w3)


@device
def begin(shared, weights, head, places, thread):
    """Begin to copy a head's weights to shared memory."""
    n_bytes, at_here = places
    if thread == U(0):
        init_mbarrier(shared, at_here, U(1))
        fence_mbarriers()
        expect_bytes(shared, at_here, U(n_bytes))
        for i in range(0, n_bytes, 128 * VALUE):
            copy_bulk(shared, i, weights, np.int64(head) * n_bytes + i, U(128 * VALUE), shared, at_here)


@device
def clear(images, n_tokens, n_groups, head, thread):
    """Zeros for a head past the last, which fills up an image."""
    n, step = n_tokens * (IMAGE // PART) * 8, np.int64(cuda.gridDim.y) * THREADS
    for i in range(np.int64(cuda.blockIdx.y) * THREADS + np.int64(thread), n, step):
        row = i >> 3
        token = row // (IMAGE // PART)
        at = (token * n_groups + head // HEADS) * IMAGE + (row - token * (IMAGE // PART)) * PART + 128 * (head % HEADS) + 16 * (i & 7)
        store_sixteen(images, at, U(0), U(0), U(0), U(0))


def _make_absorb(n_nope):
    places = Places(n_nope)
    (load_queries, put_queries), n_steps, copied = _make_queries(places), n_nope // 16, (places.weights, places.here)
    at_queries, at_units, at_greatest = places.weights, places.units, places.greatest
    multiply = make_wgmma_shared(COLUMNS, steps_of_rows(n_steps, 128 * TOKENS), steps_of_rows(n_steps, 128 * VALUE), anew=True)
    n_values = TOKENS * n_nope // THREADS

    def absorb(images, scales, q, weights, powers, n_groups):
        """Images of queries times k_b, and what each is to be multiplied by.

        One head per block in x; blocks in y share the tiles of tokens. images: as halve_queries makes them (half_rows.py). weights, powers:
        k_b as images (flash/images.py), whose heads have a power of two each.
        """
        thread, head, n_head = U(cuda.threadIdx.x), U(cuda.blockIdx.x), U(scales.shape[1])
        shared = cuda.shared.array(0, np.uint8, 1024)
        if head >= n_head:
            clear(images, q.shape[0], n_groups, np.int64(head), thread)
            return
        begin(shared, weights, head, copied, thread)
        base, lane, group = shared_address(shared, 0), thread & U(31), thread >> U(7)
        of_weight, g, c, of_warp = inverse(powers[head]), lane >> U(2), lane & U(3), U(16) * (thread >> U(5) & U(3))
        row, n_tokens = of_warp + g, np.int32(q.shape[0])
        of_queries = BY_ROWS | np.uint64(base + U(at_queries) >> U(4))
        of_weights = BY_ROWS | np.uint64(base + U(128 * COLUMNS) * group >> U(4))
        sums, rotated = cuda.local.array(SUMS, np.float32), cuda.local.array(OF_ROTATED, np.float32)
        values = cuda.local.array(n_values, np.float32)
        load_queries(values, q, TOKENS * cuda.blockIdx.y, head, thread)
        for first in range(np.int32(TOKENS * cuda.blockIdx.y), n_tokens, np.int32(TOKENS * cuda.gridDim.y)):
            put_queries(base, values, thread)
            fence_async()
            cuda.syncthreads()
            wait_phase(shared, copied[1], U(0))
            multiply(sums, of_queries, of_weights)
            load_queries(values, q, first + np.int32(TOKENS * cuda.gridDim.y), head, thread)       # of the next tile, if there is one
            unit = of_weight * load_float(base + U(at_units) + U(4) * row)
            unit_8 = of_weight * load_float(base + U(at_units) + U(4) * row + U(32))
            t = np.int64(first) + np.int64(row)
            turn = t + np.int64(U(8) * group)       # the token of whose rotated part the lane has a share
            bits = load_rotated(rotated, q, turn, head, 4 * n_nope, c)
            wait_sums(sums, sums)
            most, most_8 = greatest_of_row(sums, 0, unit), greatest_of_row(sums, 2, unit_8)
            most, most_8 = max(most, bits if group == U(0) else np.int32(0)), max(most_8, bits if group == U(1) else np.int32(0))
            most, most_8 = of_both_groups(base + U(at_greatest), group, row, np.int32(most), np.int32(most_8), c)
            factor, scale = factors_for(most)
            factor_8, scale_8 = factors_for(most_8)
            at = (t * n_groups + np.int64(head // U(HEADS))) * IMAGE + np.int64(U(128) * (head % U(HEADS)))
            at_8 = at + 8 * np.int64(n_groups) * IMAGE
            store_row(images, at, sums, 0, unit * factor if factor > ZERO else ZERO, group, head, lane, t < n_tokens)
            store_row(images, at_8, sums, 2, unit_8 * factor_8 if factor_8 > ZERO else ZERO, group, head, lane, t + 8 < n_tokens)
            if turn < n_tokens:
                at, f = (at, factor) if group == U(0) else (at_8, factor_8)
                store_rotated(images, at, rotated, head, f, c)
                if c == U(0):
                    scales[turn, head] = scale if group == U(0) else scale_8
    return kernel("u1[::1], f4[:,::1], f4[:,:,::1], u1[::1], f4[:], i4", THREADS, f"absorb_{n_nope}", shared=places.size,
                  specific=CAPABILITY)(absorb)


ABSORB = {n_nope: _make_absorb(n_nope) for n_nope in (128, 192)}        # numbers of a query without a position -> kernel


def absorbed(q, k_b):
    """Queries as images, uint8, and their scales, float32 [T, H].

    q [T, H, n_nope + ROTATED], rows of which begin at multiples of 16 bytes; k_b [H, VALUE, n_nope].
    """
    n_tokens, n_head, _ = q.shape
    n_groups = blocks_for(n_head, HEADS)
    weights, powers = weights_of(k_b, "k_b")
    images = scratch("packed heads", (n_tokens * n_groups * IMAGE // 4,), np.uint32).view(np.uint8)      # in place of another kernel's
    scales = scratch("scales of queries", (n_tokens, n_head), np.float32)
    parts = min(blocks_for(n_tokens, TOKENS), max(1, BLOCKS // (n_groups * HEADS)))
    ABSORB[k_b.shape[2]]((n_groups * HEADS, parts), images, scales, q, weights, powers, n_groups)
    return images, scales
