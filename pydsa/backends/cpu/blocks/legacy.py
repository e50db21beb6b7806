"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with one half-precision scale d, and an offset m in the _1 types.

Nibble j of qs is element j (low) and j + 16 (high); bit j of qh is the fifth bit of element j.
"""
import numpy as np
from numba import carray

from pydsa.backends.cpu.blocks.block import MINS, SCALES, entry, inverse
from pydsa.backends.cpu.blocks.dots import (BY_QUARTERS, add_quad, dot_pair, dot_rows, four_blocks, join_blocks,
                                            nibbles, single_sum, store_halves, store_quad, superblock_at, two_blocks, unsigned_quad)
from pydsa.backends.cpu.jit import IntpFunction, inline, inner
from pydsa.backends.cpu.vectors.lanes import padded_to_16, spread
from pydsa.backends.cpu.vectors.scalars import half, half_at
from pydsa.backends.cpu.vectors.simd import (as_int16, floats, four_floats, halves, join, load_2_floats, load_4_floats, load_16_bytes,
                                             multiply_add, signed_high_bytes, store, to_floats, u32_at, where_bits)
from pydsa.quants import TYPES


Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (TYPES[name].n_bytes for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))      # bytes of a block


def dequantize_q4_0(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32))
    for i in range(n):
        d, qs = half(blocks[i].d), blocks[i].qs
        for j in range(16):
            out[i, j] = d * (np.float32(qs[j] & 15) - np.float32(8))
            out[i, j + 16] = d * (np.float32(qs[j] >> 4) - np.float32(8))


def dequantize_q4_1(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32))
    for i in range(n):
        d, m, qs = half(blocks[i].d), half(blocks[i].m), blocks[i].qs
        for j in range(16):
            out[i, j] = d * np.float32(qs[j] & 15) + m
            out[i, j + 16] = d * np.float32(qs[j] >> 4) + m


@inner
def fifth_bits(qh):
    """Load the four bytes of qh as one integer."""
    return np.uint32(qh[0]) | np.uint32(qh[1]) << np.uint32(8) | np.uint32(qh[2]) << np.uint32(16) | np.uint32(qh[3]) << np.uint32(24)


@inner
def fifth_bit(bits, j):
    """Return the fifth bit's value for element j: 0 or 16."""
    return np.float32(np.int32((bits >> np.uint32(j)) & np.uint32(1))) * np.float32(16)


def dequantize_q5_0(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32))
    for i in range(n):
        d, qs, fifth = half(blocks[i].d), blocks[i].qs, fifth_bits(blocks[i].qh)
        for j in range(16):
            out[i, j] = d * (np.float32(qs[j] & 15) + fifth_bit(fifth, j) - np.float32(16))
            out[i, j + 16] = d * (np.float32(qs[j] >> 4) + fifth_bit(fifth, j + 16) - np.float32(16))


def dequantize_q5_1(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32))
    for i in range(n):
        d, m, qs, fifth = half(blocks[i].d), half(blocks[i].m), blocks[i].qs, fifth_bits(blocks[i].qh)
        for j in range(16):
            out[i, j] = d * (np.float32(qs[j] & 15) + fifth_bit(fifth, j)) + m
            out[i, j + 16] = d * (np.float32(qs[j] >> 4) + fifth_bit(fifth, j + 16)) + m


def dequantize_q8_0(source, n, target):
    for i in range(n):
        at, out = source + Q8_0 * i, target + 128 * i
        d = half_at(at, 0)
        store(out, 0, to_floats(load_16_bytes(at, 2)) * d)
        store(out, 64, to_floats(load_16_bytes(at, 18)) * d)


@inline
def fifth_bit_bytes(addresses, offset):
    """Expand the fifth bits of four blocks to bytes of 16 or 0.

    Two vectors: for elements 0 to 15 of each block, and for 16 to 31.
    """
    a, b = np.uint64(u32_at(addresses[0], offset)), np.uint64(u32_at(addresses[1], offset))
    c, d = np.uint64(u32_at(addresses[2], offset)), np.uint64(u32_at(addresses[3], offset))
    m, s1, s2, s3 = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48)
    low = (a & m) | ((b & m) << s1) | ((c & m) << s2) | (d << s3)
    high = (a >> s1) | ((b >> s1) << s1) | ((c >> s1) << s2) | ((d >> s1) << s3)
    return where_bits(low, np.uint8(16)), where_bits(high, np.uint8(16))


@inline
def quad_4(addresses, offset):
    """Unpack 128 elements of four bits, in the layout of unsigned_quad."""
    low, high = nibbles(join_blocks(addresses, offset))
    return unsigned_quad(low, high)


@inline
def quad_5(addresses, offset):
    """Unpack 128 elements of five bits, in the layout of unsigned_quad.

    The fifth bits precede the nibbles in memory.
    """
    low, high = nibbles(join_blocks(addresses, offset))
    low_fifth, high_fifth = fifth_bit_bytes(addresses, offset - 4)
    return unsigned_quad(low | low_fifth, high | high_fifth)


@inline
def subtract_zero(w, zero):
    """Subtract the zero point from four int16 vectors."""
    return w[0] - zero, w[1] - zero, w[2] - zero, w[3] - zero


@inline
def add_mins(sums, mins, x, i):
    """Return sums + mins times the sums of groups i to i + 3 (of 32) of x.

    x: a row of superblocks of activations.
    """
    xi, _, min_offset = superblock_at(x, i)
    return multiply_add(sums, mins, load_4_floats(xi, MINS + min_offset))


@inline
def add_q4_0(sums, row, i, n, x):
    at = four_blocks(row, Q4_0, i, n)
    return add_quad(sums[0], quad_4(at, 2), x, i, halves(at)), add_mins(sums[1], halves(at), x, i)


@inline
def total_q4_0(sums):
    return sums[0] - padded_to_16(sums[1]) * np.float32(8)


def dot_q4_0(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    zeros = floats(np.float32(0)), four_floats(np.float32(0))
    dot_rows(add_q4_0, total_q4_0, zeros, Q4_0, 4, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q4_0(source, n, superblock):
    for i in range(0, n, 4):
        at = four_blocks(source, Q4_0, i, n)
        store(superblock, SCALES + 4 * i, halves(at))
        store_quad(superblock, 64 * i, subtract_zero(quad_4(at, 2), 8))


@inline
def add_q5_0(sums, row, i, n, x):
    at = four_blocks(row, Q5_0, i, n)
    return add_quad(sums[0], quad_5(at, 6), x, i, halves(at)), add_mins(sums[1], halves(at), x, i)


@inline
def total_q5_0(sums):
    return sums[0] - padded_to_16(sums[1]) * np.float32(16)


def dot_q5_0(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    zeros = floats(np.float32(0)), four_floats(np.float32(0))
    dot_rows(add_q5_0, total_q5_0, zeros, Q5_0, 4, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q5_0(source, n, superblock):
    for i in range(0, n, 4):
        at = four_blocks(source, Q5_0, i, n)
        store(superblock, SCALES + 4 * i, halves(at))
        store_quad(superblock, 64 * i, subtract_zero(quad_5(at, 6), 16))


@inline
def offsets(addresses):
    """Load the m of four blocks, which follow their d."""
    return halves((addresses[0] + 2, addresses[1] + 2, addresses[2] + 2, addresses[3] + 2))


@inline
def add_q4_1(sums, row, i, n, x):
    at = four_blocks(row, Q4_1, i, n)
    return add_quad(sums[0], quad_4(at, 4), x, i, halves(at)), add_mins(sums[1], offsets(at), x, i)


@inline
def total_with_offsets(sums):
    """Sum up Q4_1 or Q5_1: products plus offsets."""
    return sums[0] + padded_to_16(sums[1])


def dot_q4_1(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    zeros = floats(np.float32(0)), four_floats(np.float32(0))
    dot_rows(add_q4_1, total_with_offsets, zeros, Q4_1, 4, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q4_1(source, n, superblock):
    for i in range(0, n, 4):
        at = four_blocks(source, Q4_1, i, n)
        store(superblock, SCALES + 4 * i, halves(at))
        store(superblock, MINS + 4 * i, offsets(at) * np.float32(-1))
        store_quad(superblock, 64 * i, quad_4(at, 4))


@inline
def add_q5_1(sums, row, i, n, x):
    at = four_blocks(row, Q5_1, i, n)
    return add_quad(sums[0], quad_5(at, 8), x, i, halves(at)), add_mins(sums[1], offsets(at), x, i)


def dot_q5_1(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    zeros = floats(np.float32(0)), four_floats(np.float32(0))
    dot_rows(add_q5_1, total_with_offsets, zeros, Q5_1, 4, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q5_1(source, n, superblock):
    for i in range(0, n, 4):
        at = four_blocks(source, Q5_1, i, n)
        store(superblock, SCALES + 4 * i, halves(at))
        store(superblock, MINS + 4 * i, offsets(at) * np.float32(-1))
        store_quad(superblock, 64 * i, quad_5(at, 8))


# Q8_0, two blocks at a time: the even elements of both, then the odd ones
BY_TWO = inverse(*[8 * pair + 4 * block + 2 * odd + i for pair in range(4) for odd in (0, 1) for block in (0, 1) for i in (0, 1)])
TWO = spread(0, 1)


@inline
def even_and_odd(addresses):
    """Widen the elements of two blocks of Q8_0 to two int16 vectors.

    The even elements of both blocks, then the odd ones.
    """
    v = as_int16(join((addresses[0] + 2, addresses[1] + 2)))
    return signed_high_bytes(v << 8), signed_high_bytes(v)


@inline
def add_q8_0(sums, row, i, n, x):
    at = two_blocks(row, Q8_0, i, n)
    xi, int16_offset, scale_offset = superblock_at(x, i)
    even, odd = even_and_odd(at)
    return dot_pair(sums, even, odd, xi, int16_offset, TWO(halves(at) * load_2_floats(xi, SCALES + scale_offset)))


def dot_q8_0(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_rows(add_q8_0, single_sum, floats(np.float32(0)), Q8_0, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q8_0(source, n, superblock):
    for i in range(0, n, 2):
        at = two_blocks(source, Q8_0, i, n)
        store(superblock, SCALES + 4 * i, halves(at))
        even, odd = even_and_odd(at)
        store_halves(superblock, 64 * i, 64 * i + 64, even)
        store_halves(superblock, 64 * i + 32, 64 * i + 96, odd)


KERNELS = {
    "Q4_0": entry("Q4_0", dequantize_q4_0, None, unpack_q4_0, dot_q4_0, BY_QUARTERS, 4),
    "Q4_1": entry("Q4_1", dequantize_q4_1, None, unpack_q4_1, dot_q4_1, BY_QUARTERS, 4),
    "Q5_0": entry("Q5_0", dequantize_q5_0, None, unpack_q5_0, dot_q5_0, BY_QUARTERS, 5),
    "Q5_1": entry("Q5_1", dequantize_q5_1, None, unpack_q5_1, dot_q5_1, BY_QUARTERS, 5),
    "Q8_0": entry("Q8_0", IntpFunction(dequantize_q8_0), None, unpack_q8_0, dot_q8_0, BY_TWO, 8),
}
