"""Tiles of cache rows and of queries in shared memory, unpacked to float32, and their products: what attention and indexer begin with.

A block multiplies some heads of a token with some keys, WIDE numbers at a time. Its threads form SLICES groups: each has a thread for every
few heads and keys, and takes its own slice of the numbers, so that a number that is loaded meets several others.

All sizes here are powers of two, and threads and tasks are divided by & and >>: // and %, and indices of which the compiler does not know
that they are not negative, would cost many registers.
"""
import numpy as np

from pydsa.backends.cuda.device import SIMULATED, bits_float, device, half_at, load_four_f32, store_four_f32, sync, u32_at
from pydsa.backends.cuda.rows import CACHED


THREADS = 8 if SIMULATED else 256
HEADS, KEYS = (4, 8) if SIMULATED else (16, 64)             # of a tile
MY_HEADS, MY_KEYS = (4, 2) if SIMULATED else (4, 4)         # of a thread
HEAD_GROUPS, KEY_GROUPS = HEADS // MY_HEADS, KEYS // MY_KEYS
GROUP = HEAD_GROUPS * KEY_GROUPS                # threads that take the same slice
SLICES = THREADS // GROUP
WIDE = 8 if SIMULATED else 64                   # numbers of all rows that are in shared memory at a time
SLICE = WIDE // SLICES
PITCH = WIDE + 4                                # floats from a row to the next: the lanes' fours meet in no bank
QUERIES = KEYS * PITCH                          # where the queries begin
DOTS = MY_HEADS * MY_KEYS                       # sums of a thread
PRODUCTS = HEADS * KEYS                         # of a tile: key, then head
WORK = max(QUERIES + HEADS * PITCH, SLICES * PRODUCTS)      # floats of shared memory
HEAD_BITS, GROUP_BITS, WIDE_BITS = (n.bit_length() - 1 for n in (HEAD_GROUPS, GROUP, WIDE))
FOURS_BITS = WIDE_BITS - 2
BATCH, MY_QUERIES = KEYS * WIDE // 4 // THREADS, HEADS * WIDE // THREADS        # fours of keys and numbers of queries that a thread loads
FOURS = 4 * max(BATCH, MY_KEYS)
ZERO, HALFWAY, BIASED = np.float32(0), np.uint32(0x4B000000), np.float32(2**23 + 128)
TWO_BIASED = np.float32(2**23 + 128 * 257)


@device
def byte_float(word, i):
    """The i-th signed byte of a word: as the last bits of a float of 2^23 and more, which is faster than to convert it."""
    return bits_float(np.uint32((word >> (8 * i) & 255 ^ 128) | HALFWAY)) - BIASED


@device
def two_bytes_float(high, low, i):
    """256 times the i-th signed byte of one word and that of another."""
    return bits_float(np.uint32((high >> (8 * i) & 255 ^ 128) << 8 | (low >> (8 * i) & 255 ^ 128) | HALFWAY)) - TWO_BIASED


@device
def four_f32(data, row, i, first, second):
    at = row + 4 * i
    return (bits_float(u32_at(data, at)), bits_float(u32_at(data, at + 4)), bits_float(u32_at(data, at + 8)),
            bits_float(u32_at(data, at + 12)))


@device
def four_f16(data, row, i, first, second):
    at = row + 2 * i
    return half_at(data, at), half_at(data, at + 2), half_at(data, at + 4), half_at(data, at + 6)


@device
def four_bf16(data, row, i, first, second):
    a, b = u32_at(data, row + 2 * i), u32_at(data, row + 2 * i + 4)
    return (bits_float(np.uint32((a & 0xFFFF) << 16)), bits_float(np.uint32(a & 0xFFFF0000)), bits_float(np.uint32((b & 0xFFFF) << 16)),
            bits_float(np.uint32(b & 0xFFFF0000)))


@device
def four_i8(data, row, i, first, second):
    word, d = u32_at(data, row + i), bits_float(u32_at(data, row + first + second + (0 if i < first else 4)))
    return d * byte_float(word, 0), d * byte_float(word, 1), d * byte_float(word, 2), d * byte_float(word, 3)


@device
def four_i16(data, row, i, first, second):
    low = row + first + second
    a, b, d = u32_at(data, row + i), u32_at(data, low + i), bits_float(u32_at(data, low + first + second + (0 if i < first else 4)))
    return d * two_bytes_float(a, b, 0), d * two_bytes_float(a, b, 1), d * two_bytes_float(a, b, 2), d * two_bytes_float(a, b, 3)


# storage -> four(data, row, i, first, second): numbers i to i + 3 of a row, where i and the lengths of the parts are multiples of 4
UNPACK_FOUR = {"f32": four_f32, "f16": four_f16, "bf16": four_bf16, "i8": four_i8, "i16": four_i16}


def _make_stage(storage):
    value_at, four = CACHED[storage], UNPACK_FOUR[storage]

    @device
    def stage(work, pitch, bits, fours, key_of, data, row_bytes, column, end, first, second, task):
        """Numbers of keys to work[key, ...]: 4 BATCH of each thread, from `column` on 2^bits fours of each key, zeros after `end`.

        key_of: the keys in shared memory, -1 stands for a row of zeros; task: the thread's first four, others are THREADS apart. All that
        it reads is asked for before anything is waited for.
        """
        if (first | second | end) & 3 == 0:
            for j in range(BATCH):
                key, c = key_of[(j * THREADS + task) >> bits], column + (((j * THREADS + task) & (1 << bits) - 1) << 2)
                a, b, e, f = four(data, max(key, 0) * row_bytes, min(c, end - 4), first, second)
                there = key >= 0 and c < end
                fours[4 * j], fours[4 * j + 1] = a if there else ZERO, b if there else ZERO
                fours[4 * j + 2], fours[4 * j + 3] = e if there else ZERO, f if there else ZERO
            for j in range(BATCH):
                at = ((j * THREADS + task) >> bits) * pitch + (((j * THREADS + task) & (1 << bits) - 1) << 2)
                store_four_f32(work, at, fours[4 * j], fours[4 * j + 1], fours[4 * j + 2], fours[4 * j + 3])
        else:
            for i in range(4 * BATCH):
                number = 4 * task + (i >> 2) * 4 * THREADS + (i & 3)
                row, c = number >> (bits + 2), number & (4 << bits) - 1
                there = key_of[row] >= 0 and column + c < end
                work[row * pitch + c] = value_at(data, key_of[row] * row_bytes, column + c, first, second) if there else ZERO
    return stage


STAGE = {storage: _make_stage(storage) for storage in CACHED}


def _make_products(storage):
    stage = STAGE[storage]

    @device
    def products(work, s, fours, key_of, q, t, head, data, row_bytes, first, second, thread):
        """work[slice, key, head] = a slice's part of q[t, head + ...] . key; all threads must come here.

        s, fours: DOTS and FOURS registers; key_of: the keys in shared memory, -1 stands for a row of zeros.
        """
        n_head, width = q.shape[1], q.shape[2]
        part, hg, kg = thread >> GROUP_BITS, thread & HEAD_GROUPS - 1, thread >> HEAD_BITS & KEY_GROUPS - 1
        for i in range(DOTS):
            s[i] = ZERO
        for start in range(0, width, WIDE):
            stage(work, PITCH, FOURS_BITS, fours, key_of, data, row_bytes, start, width, first, second, thread)
            for j in range(MY_QUERIES):
                h, c = (j * THREADS + thread) >> WIDE_BITS, (j * THREADS + thread) & WIDE - 1
                x = q[t, min(head + h, n_head - 1), min(start + c, width - 1)]
                work[QUERIES + h * PITCH + c] = x if start + c < width else ZERO
            sync()
            for c in range(0, SLICE, 4):
                at = part * SLICE + c
                for j in range(MY_KEYS):
                    key = (kg + j * KEY_GROUPS) * PITCH
                    fours[4 * j], fours[4 * j + 1], fours[4 * j + 2], fours[4 * j + 3] = load_four_f32(work, key + at)
                for i in range(MY_HEADS):
                    x, y, z, w = load_four_f32(work, QUERIES + (hg * MY_HEADS + i) * PITCH + at)
                    for j in range(MY_KEYS):
                        total = s[i * MY_KEYS + j]
                        total += x * fours[4 * j]
                        total += y * fours[4 * j + 1]
                        total += z * fours[4 * j + 2]
                        total += w * fours[4 * j + 3]
                        s[i * MY_KEYS + j] = total
            sync()
        for j in range(MY_KEYS):
            at = part * PRODUCTS + (kg + j * KEY_GROUPS) * HEADS + hg * MY_HEADS
            for i in range(0, MY_HEADS, 4):
                store_four_f32(work, at + i, s[i * MY_KEYS + j], s[(i + 1) * MY_KEYS + j], s[(i + 2) * MY_KEYS + j],
                               s[(i + 3) * MY_KEYS + j])
        sync()
    return products


PRODUCTS_OF = {storage: _make_products(storage) for storage in CACHED}


@device
def sum_of_slices(work, i):
    """The i-th product of the tile: key i // HEADS, head i % HEADS."""
    total = ZERO
    for part in range(SLICES):
        total += work[part * PRODUCTS + i]
    return total
