"""The indexer's scores of prompts over int8 keys, in wgmma.

For GPUs of capability 9.0. The numbers are those of int8x2/indexer.py: keys as stored, queries of 16 bits as two int8, exact products.
Keys are the rows of wgmma (A) and stay in registers. Queries are its columns (B): an image has 64 columns of high bytes, the 64 of low
bytes, and the weights of heads. It is one token of up to 64 heads, or two of up to 32. A block has KEYS keys; images pass through its
shared memory, STAGES of them under way, each by one bulk copy. A warp has 16 keys, a lane two of them, g and g + 8, and of a token the
heads 2 c and 2 c + 1 of each eight, where g = lane // 4 and c = lane % 4.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.int8x2 import indexer
from pydsa.backends.cuda.intrinsics.block_sums import abs_bits, block_max
from pydsa.backends.cuda.intrinsics.device import (SIMULATED, bits_float, device, float_bits, fma, nearest, pack_int8x2, u32_at,
                                                   warp_max_int, warp_sync)
from pydsa.backends.cuda.intrinsics.hopper import (arrive_at, copy_bulk_at, fence_mbarriers, init_mbarrier_at, make_wgmma_int8,
                                                   make_wgmma_wait, wait_phase_at)
from pydsa.backends.cuda.intrinsics.instructions import instruction, quotient, store_four
from pydsa.backends.cuda.intrinsics.shared_memory import WHOLE_WARP, load_floats, shared_address
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import BLOCKS, blocks_for, kernel
from pydsa.quants import INT8X2_MAX


CAPABILITY = 9, 0
KEYS, THREADS, WARPS, STAGES = 128, 256, 8, 4       # STAGES: a power of two
KEYS_BITS = KEYS.bit_length() - 1
WIDTH, COLUMNS, STEPS = indexer.WIDTH, 64, indexer.STEPS      # bytes of a key; columns of a part of an image; of 32 bytes
PART = COLUMNS * WIDTH                      # bytes of an image's high bytes, which the low ones follow
WEIGHTS = 2 * PART                          # where its weights begin
IMAGE = WEIGHTS + 4 * COLUMNS               # bytes
PITCH = WEIGHTS + 1024                      # from one to the next in shared memory: a multiple of 1,024
BARS = STAGES * PITCH                       # where the mbarriers are: of images that have come, then of those that have been read
READ = 8 * STAGES
SHARED = BARS + 2 * READ
SUMS, WORDS = COLUMNS, 4 * STEPS            # of a lane: sums, of both parts of 64 columns; words of keys
ITEMS, LEAST = 8 * BLOCKS, 4                # pieces of work that are wanted, and the least images of one
U = np.uint32
DESCRIPTOR = np.uint64(1 << 62 | 64 << 32 | 1 << 16)        # swizzle of 128 bytes; eight columns are 1,024 bytes
ZERO, MINUS_INFINITY = np.float32(0), np.float32(-np.inf)

multiply, wait_sums = make_wgmma_int8(2 * COLUMNS, STEPS), make_wgmma_wait(2 * COLUMNS, WORDS)
both_parts = instruction("mad.lo.s32 $0, $1, 256, $2;", "i", "ii")
relu = instruction("max.s32 $0, $1, 0;", "i", "i")


@kernel("u4[:,::1], f4[:,:,:], f4[:,:], i4", THREADS)
def pack_images(images, q, w, bits):
    """Quantize queries as pack_query does, and put them into images.

    A warp has a column, which is a head of a token; a token has 1 << bits. Columns that are none are zeros. Images are swizzled, as wgmma
    wants them.
    """
    thread, image = cuda.threadIdx.x & THREADS - 1, cuda.blockIdx.y & 0xFFFF
    lane, column = thread & 31, WARPS * (cuda.blockIdx.x & 7) + (thread >> 5)
    t, h, i = (image * COLUMNS + column) >> bits, column & (1 << bits) - 1, 4 * lane
    is_one = t < q.shape[0] and h < q.shape[1]
    a, b, c, e = ZERO, ZERO, ZERO, ZERO
    if is_one and i < q.shape[2]:
        a, b, c, e = q[t, h, i], q[t, h, i + 1], q[t, h, i + 2], q[t, h, i + 3]
    largest = bits_float(U(warp_max_int(max(max(abs_bits(a), abs_bits(b)), max(abs_bits(c), abs_bits(e))))))
    finite = largest < np.float32(np.inf)
    factor = np.float32(INT8X2_MAX) / largest if finite and largest > np.float32(1e-30) else ZERO
    at = WIDTH // 4 * column + (((lane >> 2) ^ (column & 7)) << 2) + (lane & 3)
    images[image, at], images[image, PART // 4 + at] = pack_int8x2(nearest(a, factor), nearest(b, factor), nearest(c, factor),
                                                                   nearest(e, factor))
    if lane == 0:
        weight = w[t, h] * (largest / np.float32(INT8X2_MAX) if finite else np.float32(np.nan)) if is_one else ZERO
        images[image, WEIGHTS // 4 + column] = float_bits(weight)


@device
def first_needed(positions, start, end, base, parts, thread):
    """The first of tokens start to end whose position is `base` or later.

    end if there is none.
    """
    first = np.int32(end)
    for t in range(start + thread, end, THREADS):
        if positions[t] >= base:
            first = min(first, np.int32(t))
    return np.int32(-block_max(np.int32(-first), parts, thread, THREADS))


@device
def load_keys(words, data, row_bytes, n_u32, first, last, c):
    """Load a lane's two keys, from `first` on, zero-padded to WIDTH.

    Those past the last one are the last one.
    """
    for row in range(2):
        at = min(first + 8 * row, last) * np.int64(row_bytes) + 4 * c
        for slot in range(2 * STEPS):
            words[2 * slot + row] = u32_at(data, at + 16 * slot) if 4 * slot + c < n_u32 else U(0)


@device
def begin_copy(images, image, shared, slot):
    """Begin to copy an image to a slot of shared memory."""
    copy_bulk_at(shared + U(PITCH) * slot, images, np.int64(image) * IMAGE, U(IMAGE), shared + U(BARS) + U(8) * slot)


@device
def begin(images, first, end, shared, thread):
    """Make the mbarriers, and begin to copy the first images."""
    if thread == 0:
        for i in range(STAGES):
            init_mbarrier_at(shared + U(BARS + 8 * i), U(1))
            init_mbarrier_at(shared + U(BARS + READ + 8 * i), U(WARPS))
        fence_mbarriers()
        for i in range(STAGES):
            if first + i < end:
                begin_copy(images, first + i, shared, U(i))
    cuda.syncthreads()


@device
def refill(images, i, first, end, shared, slot, parity):
    """Let the image before i be overwritten, once all warps have read it.

    By one thread. slot, parity: those of image i.
    """
    if i > first and np.int32(i + np.int32(STAGES - 1)) < end:
        before = U((slot + U(STAGES - 1)) & U(STAGES - 1))
        wait_phase_at(shared + U(BARS + READ) + U(8) * before, U(parity ^ (U(1) if slot == U(0) else U(0))))
        begin_copy(images, np.int32(i + np.int32(STAGES - 1)), shared, before)


@device
def exchanged(odd, a, b, step):
    """a of even lanes, b of odd ones, with the other's of a pair added.

    The other lane of the pair is `step` away.
    """
    mine, theirs = (b, a) if odd else (a, b)
    return mine + cuda.shfl_xor_sync(WHOLE_WARP, theirs, step)


def _make_weigh(two):
    @device
    def add_heads(sums, j, weights, a, b):
        """a, b plus the weighted heads of the j-th eight, of both keys."""
        w, w_1 = load_floats(weights + U(32 * j))
        a = fma(np.float32(relu(both_parts(sums[4 * j], sums[COLUMNS // 2 + 4 * j]))), w, a)
        b = fma(np.float32(relu(both_parts(sums[4 * j + 2], sums[COLUMNS // 2 + 4 * j + 2]))), w, b)
        a = fma(np.float32(relu(both_parts(sums[4 * j + 1], sums[COLUMNS // 2 + 4 * j + 1]))), w_1, a)
        b = fma(np.float32(relu(both_parts(sums[4 * j + 3], sums[COLUMNS // 2 + 4 * j + 3]))), w_1, b)
        return a, b

    @device
    def weigh(sums, weights, c):
        """A lane's sum over heads, of key g + 8 (c & 1).

        Of the image's token, or of token c >> 1 of two. weights: the address of a lane's two of the first eight.
        """
        a, b, e, f = ZERO, ZERO, ZERO, ZERO
        for j in range(4):
            a, b = add_heads(sums, j, weights, a, b)
            e, f = add_heads(sums, 4 + j, weights, e, f)
        if two:
            first, second = exchanged(c & 1, a, b, 1), exchanged(c & 1, e, f, 1)
            return exchanged(c >> 1, first, second, 2)
        both = exchanged(c & 1, a + e, b + f, 1)
        return both + cuda.shfl_xor_sync(WHOLE_WARP, both, 2)
    return weigh


SIGNATURE = "f4[:,:], i8, u4[:,::1], u1[::1], i8, i4, i8[:], i4, f4, b1"


def _make_scores(two):
    weigh, per_image = _make_weigh(two), 2 if two else 1

    def scores(out, pitch, images, data, row_bytes, width, positions, start, scale, fill):
        """out[t, s] as in f32/indexer.py, of tokens start, start + 1, ...

        A row of out begins `pitch` bytes after the one before. A block has one of the pieces of work: a tile of keys, and some images.
        """
        parts = cuda.shared.array(WARPS, np.int32)
        shared = shared_address(cuda.shared.array(0, np.uint8, 1024), 0)
        thread = cuda.threadIdx.x & THREADS - 1
        last = min(np.int64(out.shape[1]), positions[positions.size - 1] + 1) - 1
        n = np.int64(out.shape[1]) if fill else last + 1
        n_images, n_tiles = (out.shape[0] + per_image - 1) // per_image, np.int32((n + KEYS - 1) >> KEYS_BITS)
        n_splits = max(1, min(quotient(ITEMS, n_tiles), n_images // LEAST))
        split = quotient(cuda.blockIdx.x, n_tiles)
        share = quotient(n_images + n_splits - 1, n_splits)
        first, end, base = np.int32(split * share), np.int32(min(n_images, (split + 1) * share)), (cuda.blockIdx.x - split * n_tiles) * KEYS
        if not fill and first < end:
            stop = min(start + per_image * end, start + out.shape[0])
            first += np.int32((first_needed(positions, start + per_image * first, stop, base, parts, thread) - start) // per_image - first)
        if first >= end or split >= n_splits:
            return
        begin(images, start // per_image + first, start // per_image + end, shared, thread)
        score_tile(out, pitch, images, data, row_bytes, width, positions, start, scale, fill, first, end, base, last, n, shared, thread)

    @device
    def score_tile(out, pitch, images, data, row_bytes, width, positions, start, scale, fill, first, end, base, last, n, shared, thread):
        """Scores of a tile of keys, which begins at `base`, and images.

        last: the last key that a token has. Of n keys the scores are stored.
        """
        words, sums = cuda.local.array(WORDS, np.uint32), cuda.local.array(SUMS, np.int32)
        c, key = thread & 3, base + 16 * (thread >> 5) + (thread >> 2 & 7)
        load_keys(words, data, row_bytes, width >> 2, key, last, c)
        key += 8 * (c & 1)
        d = bits_float(u32_at(data, min(key, last) * np.int64(row_bytes) + width)) * scale
        t = np.int32(per_image * first + (c >> 1 if two else 0))
        at, step, stores = t * pitch + 4 * key, per_image * pitch, key < n and (two or c < 2)
        slot, parity, before = U(0), U(0), np.int32(start // per_image)
        for i in range(np.int32(before + first), np.int32(before + end)):
            here = U(shared + U(PITCH) * slot)
            wait_phase_at(shared + U(BARS) + U(8) * slot, parity)
            multiply(sums, words, np.uint64(here >> U(4)) | DESCRIPTOR)
            wait_sums(sums, words)
            score = weigh(sums, here + U(WEIGHTS) + U(8 * c), c) * d
            warp_sync()
            if thread & 31 == 0:
                arrive_at(shared + U(BARS + READ) + U(8) * slot)
            if thread == 0:
                refill(images, i, np.int32(before + first), np.int32(before + end), shared, slot, parity)
            if stores and t < out.shape[0]:
                if fill and key > positions[start + t]:
                    score = MINUS_INFINITY
                store_four(out, at, float_bits(score))
            t, at = np.int32(t + per_image), at + step
            slot = U((slot + U(1)) & U(STAGES - 1))
            parity = U(parity ^ (U(1) if slot == U(0) else U(0)))

    return kernel(SIGNATURE, THREADS, f"score_images_of_{per_image}", blocks=2, shared=SHARED, specific=CAPABILITY)(scores)


SCORES = {n: _make_scores(n == 2) for n in (1, 2)}      # tokens of an image -> kernel


def takes(keys, n_tokens, n_heads):
    """Whether these kernels can score the keys, for tokens of a prompt."""
    return not SIMULATED and n_tokens > 1 and n_heads <= COLUMNS and indexer.takes(keys) and current().capability == CAPABILITY


def pack(q, w):
    """Pack queries [T, heads, width] and weights [T, heads] for score().

    Returns the images, uint32 [., IMAGE / 4], and how many tokens each has.
    """
    bits = 5 if q.shape[1] <= COLUMNS // 2 else 6
    per_image = COLUMNS >> bits
    images = scratch("images of queries", (blocks_for(len(q), per_image), IMAGE // 4), np.uint32)
    pack_images((COLUMNS // WARPS, len(images)), images, q, w, bits)
    return images, per_image


def score(out, queries, keys, positions, start, scale, fill):
    """Scores of tokens start, start + 1, ..., one per row of `out`.

    queries: the result of pack() for all tokens. start is even. The last position is the largest. Numbers of a row of out are adjacent.
    """
    images, per_image = queries
    assert start % per_image == 0 and out.strides[1] == 4
    n_tiles = blocks_for(out.shape[1], KEYS)
    grid = max(n_tiles, min(ITEMS, n_tiles * max(1, blocks_for(len(out), per_image) // LEAST)))
    SCORES[per_image](grid, out, out.strides[0], images, keys.data.flat, keys.data.shape[1], keys.first, positions, start, scale, fill)
