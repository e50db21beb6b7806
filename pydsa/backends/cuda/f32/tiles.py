"""Tiles of q k^T in float32, for attention and the indexer.

A block multiplies HEADS heads of a token with KEYS keys. Both are staged in shared memory as float32, WIDE values of each row at a time.
The threads form SLICES groups, each with its own slice of those values (CUTLASS's sliced-K). A thread of a group computes MY_HEADS x
MY_KEYS products, so that every value it loads is used several times.

All sizes are powers of two, and thread and task indices are split with & and >>. // and %, and indices that the compiler cannot prove
non-negative, would cost many registers.
"""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import SIMULATED, bits_float, device, half_at, load_four_f32, store_four_f32, sync, u32_at
from pydsa.backends.cuda.rows import CACHED


THREADS = 8 if SIMULATED else 256
HEADS, KEYS = (4, 8) if SIMULATED else (16, 64)     # of a tile
MY_HEADS, MY_KEYS = (4, 2) if SIMULATED else (4, 4)     # of a thread
HEAD_GROUPS, KEY_GROUPS = HEADS // MY_HEADS, KEYS // MY_KEYS
GROUP = HEAD_GROUPS * KEY_GROUPS                # threads of the same slice
SLICES = THREADS // GROUP
WIDE = 8 if SIMULATED else 64                   # values of each row that are in shared memory at a time
SLICE = WIDE // SLICES
PITCH = WIDE + 4                                # floats from a row to the next: no bank conflicts in loads of four
QUERIES = KEYS * PITCH                          # where the queries begin in shared memory
DOTS = MY_HEADS * MY_KEYS                       # accumulators of a thread
PRODUCTS = HEADS * KEYS                         # of a tile, [key, head]
WORK = max(QUERIES + HEADS * PITCH, SLICES * PRODUCTS)  # floats of shared memory
HEAD_BITS, GROUP_BITS, WIDE_BITS = (n.bit_length() - 1 for n in (HEAD_GROUPS, GROUP, WIDE))
FOURS_BITS = WIDE_BITS - 2
BATCH, MY_QUERIES = KEYS * WIDE // 4 // THREADS, HEADS * WIDE // THREADS    # fours of keys and values of queries that a thread loads
FOURS = 4 * max(BATCH, MY_KEYS)
ZERO, HALFWAY, BIASED = np.float32(0), np.uint32(0x4B000000), np.float32(2**23 + 128)
TWO_BIASED = np.float32(2**23 + 128 * 257)


@device
def byte_float(quad, i):
    """The i-th int8 of a uint32 as float32.

    The byte becomes the low mantissa bits of a float of at least 2^23, which is faster than a conversion.
    """
    return bits_float(np.uint32((quad >> (8 * i) & 255 ^ 128) | HALFWAY)) - BIASED


@device
def two_bytes_float(high, low, i):
    """The i-th int8 pair, 256 high + low, as float32. See byte_float."""
    return bits_float(np.uint32((high >> (8 * i) & 255 ^ 128) << 8 | (low >> (8 * i) & 255 ^ 128) | HALFWAY)) - TWO_BIASED


@device
def four_f32(data, row, i, first, second):
    """Values i to i + 3 of a float32 row."""
    at = row + 4 * i
    return (bits_float(u32_at(data, at)), bits_float(u32_at(data, at + 4)), bits_float(u32_at(data, at + 8)),
            bits_float(u32_at(data, at + 12)))


@device
def four_f16(data, row, i, first, second):
    """Values i to i + 3 of a float16 row."""
    at = row + 2 * i
    return half_at(data, at), half_at(data, at + 2), half_at(data, at + 4), half_at(data, at + 6)


@device
def four_bf16(data, row, i, first, second):
    """Values i to i + 3 of a bfloat16 row."""
    a, b = u32_at(data, row + 2 * i), u32_at(data, row + 2 * i + 4)
    return (bits_float(np.uint32((a & 0xFFFF) << 16)), bits_float(np.uint32(a & 0xFFFF0000)), bits_float(np.uint32((b & 0xFFFF) << 16)),
            bits_float(np.uint32(b & 0xFFFF0000)))


@device
def four_i8(data, row, i, first, second):
    """Values i to i + 3 of an int8 row."""
    q, d = u32_at(data, row + i), bits_float(u32_at(data, row + first + second + (0 if i < first else 4)))
    return d * byte_float(q, 0), d * byte_float(q, 1), d * byte_float(q, 2), d * byte_float(q, 3)


@device
def four_i16(data, row, i, first, second):
    """Values i to i + 3 of an int16 row."""
    low = row + first + second
    a, b, d = u32_at(data, row + i), u32_at(data, low + i), bits_float(u32_at(data, low + first + second + (0 if i < first else 4)))
    return d * two_bytes_float(a, b, 0), d * two_bytes_float(a, b, 1), d * two_bytes_float(a, b, 2), d * two_bytes_float(a, b, 3)


# storage -> four(data, row, i, first, second): values i to i + 3 of a row, where i and the lengths of the parts are multiples of 4
UNPACK_FOUR = {"f32": four_f32, "f16": four_f16, "bf16": four_bf16, "i8": four_i8, "i16": four_i16}


def _make_stage(storage):
    value_at, four = CACHED[storage], UNPACK_FOUR[storage]

    @device
    def stage(work, pitch, bits, fours, key_of, data, row_bytes, column, end, first, second, task):
        """Stage values of keys in shared memory: work[key, ...].

        From `column` on, 2^bits fours of each key, zero-padded after `end`; 4 BATCH values per thread. key_of: the keys, in shared memory;
        -1 is a row of zeros. task: the thread's first four; its others are THREADS apart. All loads are issued before any is used.
        """
        if (first | second | end) & 3 == 0:
            for j in range(BATCH):
                key, c = key_of[(j * THREADS + task) >> bits], column + (((j * THREADS + task) & (1 << bits) - 1) << 2)
                a, b, e, f = four(data, max(key, 0) * row_bytes, min(c, end - 4), first, second)
                valid = key >= 0 and c < end
                fours[4 * j], fours[4 * j + 1] = a if valid else ZERO, b if valid else ZERO
                fours[4 * j + 2], fours[4 * j + 3] = e if valid else ZERO, f if valid else ZERO
            for j in range(BATCH):
                at = ((j * THREADS + task) >> bits) * pitch + (((j * THREADS + task) & (1 << bits) - 1) << 2)
                store_four_f32(work, at, fours[4 * j], fours[4 * j + 1], fours[4 * j + 2], fours[4 * j + 3])
        else:
            for i in range(4 * BATCH):
                value = 4 * task + (i >> 2) * 4 * THREADS + (i & 3)
                row, c = value >> (bits + 2), value & (4 << bits) - 1
                valid = key_of[row] >= 0 and column + c < end
                work[row * pitch + c] = value_at(data, key_of[row] * row_bytes, column + c, first, second) if valid else ZERO
    return stage


STAGE = {storage: _make_stage(storage) for storage in CACHED}


def _make_products(storage):
    stage = STAGE[storage]

    @device
    def products(work, s, fours, key_of, q, t, head, data, row_bytes, first, second, thread):
        """work[slice, key, head] = a slice's partial sum of q[t, head + ...] . key.

        All threads of the block must call it. s, fours: local arrays of DOTS and FOURS floats, which become registers. key_of: the keys,
        in shared memory; -1 is a row of zeros.
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
    """Product i of the tile: key i // HEADS, head i % HEADS."""
    total = ZERO
    for part in range(SLICES):
        total += work[part * PRODUCTS + i]
    return total
