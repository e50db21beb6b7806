"""TQ1_0, TQ2_0, Q1_0: weights of three or two values, and one scale for a block.

TQ2_0 has two bits a weight, as Q2_K has them. TQ1_0 has five weights in a byte, as a fraction of 256 in base three: the integer part of
three times it is a weight, the rest the fraction of the others. Q1_0 has a bit a weight: plus or minus the scale.
"""
import numpy as np
from numba import carray

from pydsa.backends.cpu.blocks.block import COLUMNS, MINS_16, NATURAL_WITH_ONE_SCALE, SCALES, SUPERBLOCK, entry
from pydsa.backends.cpu.blocks.dots import TWICE, dot_256, dot_large, single_sum, two_blocks
from pydsa.backends.cpu.blocks.kquants import BY_PARTS, store_pairs
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.vectors.codes import even_elements_first, from_columns, lanes_of, times, times_3_high, widen, widen_two
from pydsa.backends.cpu.vectors.lanes import halves_int16, scaled_bytes, spread
from pydsa.backends.cpu.vectors.scalars import half, half_at
from pydsa.backends.cpu.vectors.simd import (dot, dot_add, eight_floats, floats, halves, load_8_floats, load_32_bytes, load_floats,
                                             load_int16, multiply_add, store, to_floats)
from pydsa.quants import TYPES


TQ1_0, TQ2_0, Q1_0 = (TYPES[name].n_bytes for name in ("TQ1_0", "TQ2_0", "Q1_0"))      # bytes of a block
POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


def dequantize_tq1_0(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 256))
    for i in range(n):
        d = half(blocks[i].d)
        for e in range(256):
            if e < 160:
                byte, power = blocks[i].qs[e % 32], POWERS_OF_3[e // 32]
            elif e < 240:
                byte, power = blocks[i].qs[32 + e % 16], POWERS_OF_3[(e - 160) // 16]
            else:
                byte, power = blocks[i].qh[e % 4], POWERS_OF_3[(e - 240) // 4]
            out[i, e] = d * np.float32((((np.int64(byte) * power) & 255) * 3 >> 8) - 1)


def dequantize_tq2_0(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 2, 4, 32))
    for i in range(n):
        d = half(blocks[i].d)
        for part in range(2):
            for k in range(4):
                for j in range(32):
                    out[i, part, k, j] = d * np.float32(((np.int64(blocks[i].qs[32 * part + j]) >> (2 * k)) & 3) - 1)


def dequantize_q1_0(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 16, 8))
    for i in range(n):
        d = half(blocks[i].d)
        for j in range(16):
            for k in range(8):
                out[i, j, k] = d if (blocks[i].qs[j] >> k) & 1 else -d


LAST_16 = lanes_of(8, [*range(16), *[16, 17, 18, 19] * 4], [0] * 32, 0xFF00, left=8)       # bytes 32 to 47, and the four of qh four times
TWO_POWERS, NEXT_POWERS = times([1] * 16 + [3] * 16), times([9] * 16 + [27] * 16)
LAST_POWERS = times([81] * 16 + [3 ** (i // 4) for i in range(16)])
LOW_16_TWICE = lanes_of(8, [*range(16)] * 2, [0] * 32, 0xFF00, left=8)


@inline
def digits_tq1_0(at):
    """Unpack a block: eight int16 vectors of 32 weights each, plus one.

    A byte is shifted up, to a fraction of 65536: the carry of its product with a power of three is lost, as it should.
    """
    first, rest = widen(load_32_bytes(at, 0)) << 8, LOW_16_TWICE(at, 32)
    return (times_3_high(first), times_3_high(first * 3), times_3_high(first * 9), times_3_high(first * 27), times_3_high(first * 81),
            times_3_high(TWO_POWERS(rest)), times_3_high(NEXT_POWERS(rest)), times_3_high(LAST_POWERS(LAST_16(at, 32))))


@inline
def add_tq1_0(sums, row, i, n, x):
    at, xi = row + TQ1_0 * i, x + SUPERBLOCK * i
    d = half_at(at, 52)
    return dot_256(multiply_add(sums, load_floats(xi, MINS_16), floats(-d)), digits_tq1_0(at), xi, d)


def dot_tq1_0(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_tq1_0, single_sum, floats(np.float32(0)), TQ1_0, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_tq1_0(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 52)))
    w = digits_tq1_0(source)
    for j in range(8):
        store(superblock, 64 * j, even_elements_first(w[j] - 1))


@inline
def two_bits(at):
    """Load a block of TQ2_0: its even and its odd elements, as Q2_K has them."""
    even = load_int16(at, 0)
    return even, even >> 8


@inline
def scaled(v, factor):
    """Multiply bytes in int16 by a factor: the even and the odd elements."""
    return scaled_bytes(v, halves_int16(np.int16(factor), np.int16(factor)))


@inline
def add_tq2_0(sums, row, i, n, x):
    at, xi = row + TQ2_0 * i, x + SUPERBLOCK * i
    d, q = half_at(at, 64), load_int16(at, 0)
    sums = multiply_add(sums, load_floats(xi, MINS_16), floats(-d))
    w = (*scaled(q & 0x0303, 64), *scaled(q & 0x0C0C, 16), *scaled(q & 0x3030, 4), *scaled(q & 0xC0C0, 1))     # all of them times 64
    return dot_256(sums, w, xi, d * np.float32(1 / 64))


def dot_tq2_0(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_tq2_0, single_sum, floats(np.float32(0)), TQ2_0, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_tq2_0(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 64)))
    even, odd = two_bits(source)
    for k in range(4):
        store_pairs(superblock, 0, k, 4 + k, ((even >> (2 * k)) & 3) - 1, ((odd >> (2 * k)) & 3) - 1)


HALVES = spread(0, 1)


@inline
def add_q1_0(sums, row, i, n, x):
    xi, (a, b) = x + SUPERBLOCK * (i >> 1), two_blocks(row, Q1_0, i, n)
    v = widen_two(a + 2, b + 2)
    dots = dot_add(dot(v & 1, load_int16(xi, 0)), (v >> 1) & 1, load_int16(xi, 64))
    dots = dot_add(dot_add(dots, (v >> 2) & 1, load_int16(xi, 128)), (v >> 3) & 1, load_int16(xi, 192))
    dots = dot_add(dot_add(dots, (v >> 4) & 1, load_int16(xi, 256)), (v >> 5) & 1, load_int16(xi, 320))
    dots = dot_add(dot_add(dots, (v >> 6) & 1, load_int16(xi, 384)), (v >> 7) & 1, load_int16(xi, 448))
    products = to_floats(dots) * TWICE(load_8_floats(xi, SCALES)) * np.float32(2) - load_floats(xi, MINS_16)
    return multiply_add(sums, products, HALVES(halves((a, b))))


def dot_q1_0(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_q1_0, single_sum, floats(np.float32(0)), Q1_0, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q1_0(source, n, superblock):
    a, b = two_blocks(source, Q1_0, 0, n)
    v = widen_two(a + 2, b + 2)
    for k in range(8):
        store(superblock, 64 * k, (((v >> k) & 1) << 1) - 1)
    from_columns(superblock)
    for j in range(4):
        store(superblock, SCALES + 4 * j, half_at(a, 0))
        store(superblock, SCALES + 16 + 4 * j, half_at(b, 0))


KERNELS = {
    "TQ1_0": entry("TQ1_0", dequantize_tq1_0, None, unpack_tq1_0, dot_tq1_0, NATURAL_WITH_ONE_SCALE, 2, unpack_tq1_0),
    "TQ2_0": entry("TQ2_0", dequantize_tq2_0, None, unpack_tq2_0, dot_tq2_0, BY_PARTS, 3, unpack_tq2_0),
    "Q1_0": entry("Q1_0", dequantize_q1_0, None, unpack_q1_0, dot_q1_0, COLUMNS, 2),
}
