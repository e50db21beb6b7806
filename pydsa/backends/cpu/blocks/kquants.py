"""Q2_K to Q6_K: blocks of 256 values in sub-blocks with quantized scales.

Q4_K and Q5_K: eight sub-blocks of 32, each with a 6-bit scale and a 6-bit min packed in `scales`. Q6_K: sixteen of 16, int8 scales. Q3_K:
sixteen of 16, 6-bit scales. Q2_K: sixteen of 16, a 4-bit scale and a 4-bit min each.

The vector code reads 64 bytes as 32 int16: some bits of the lower byte are an even element, the same bits of the upper byte the odd element
after it.
"""
import numpy as np
from numba import carray

from pydsa.backends.cpu.blocks.block import MINS_16, SCALES, SUPERBLOCK, entry, inverse, with_one_scale
from pydsa.backends.cpu.blocks.dots import dot_128, dot_256, dot_large, single_sum, store_halves
from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.vectors.lanes import (all_quarters, both_halves, even_quarters, gather_bytes, gather_u32, halves_int16,
                                              minus_upper_half, odd_quarters, scaled_bytes, shift_quarters, spread, spread_bytes,
                                              spread_int16)
from pydsa.backends.cpu.vectors.scalars import half, half_at
from pydsa.backends.cpu.vectors.simd import (eight_floats, floats, load_16_bytes, load_floats, load_int16, low_bytes, low_int16,
                                             multiply_add, store, to_floats, to_int16, two_halves)
from pydsa.quants import TYPES


Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (TYPES[name].n_bytes for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"))      # bytes of a block


@inner
def scale_and_min(packed, j):
    """Unpack the 6-bit scale and min of sub-block j.

    Sub-blocks 0 to 3 are stored whole in bytes j and j + 4; 4 to 7 in nibbles, with their top bits above those of the first four.
    """
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)


def dequantize_q4_k(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 4, 2, 32))
    for i in range(n):
        d, dmin, packed, qs = half(blocks[i].d), half(blocks[i].dmin), blocks[i].scales, blocks[i].qs
        for pair in range(4):
            scale0, min0 = scale_and_min(packed, 2 * pair)
            scale1, min1 = scale_and_min(packed, 2 * pair + 1)
            d0, m0, d1, m1 = d * np.float32(scale0), dmin * np.float32(min0), d * np.float32(scale1), dmin * np.float32(min1)
            for j in range(32):
                q = qs[32 * pair + j]
                out[i, pair, 0, j] = d0 * np.float32(q & 15) - m0
                out[i, pair, 1, j] = d1 * np.float32(q >> 4) - m1


def dequantize_q5_k(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 4, 2, 32))
    for i in range(n):
        d, dmin, packed, qs, qh = half(blocks[i].d), half(blocks[i].dmin), blocks[i].scales, blocks[i].qs, blocks[i].qh
        for pair in range(4):
            scale0, min0 = scale_and_min(packed, 2 * pair)
            scale1, min1 = scale_and_min(packed, 2 * pair + 1)
            d0, m0, d1, m1 = d * np.float32(scale0), dmin * np.float32(min0), d * np.float32(scale1), dmin * np.float32(min1)
            for j in range(32):
                q, high = qs[32 * pair + j], qh[j] >> (2 * pair)
                out[i, pair, 0, j] = d0 * np.float32((q & 15) | ((high & 1) << 4)) - m0
                out[i, pair, 1, j] = d1 * np.float32((q >> 4) | ((high & 2) << 3)) - m1


def dequantize_q6_k(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 2, 4, 32))
    for i in range(n):
        d, scales, ql, qh = half(blocks[i].d), blocks[i].scales, blocks[i].ql, blocks[i].qh
        for part in range(2):
            for first in range(0, 32, 16):
                at = 8 * part + first // 16
                d0, d1, d2, d3 = (d * np.float32(scales[at]), d * np.float32(scales[at + 2]),
                                  d * np.float32(scales[at + 4]), d * np.float32(scales[at + 6]))
                for j in range(first, first + 16):
                    a, b, high = ql[64 * part + j], ql[64 * part + 32 + j], qh[32 * part + j]
                    out[i, part, 0, j] = d0 * six_bits(a & 15, high & 3)
                    out[i, part, 1, j] = d1 * six_bits(b & 15, (high >> 2) & 3)
                    out[i, part, 2, j] = d2 * six_bits(a >> 4, (high >> 4) & 3)
                    out[i, part, 3, j] = d3 * six_bits(b >> 4, high >> 6)


@inner
def six_bits(low, high):
    """Join four low bits and two high bits to a float from -32 to 31."""
    return np.float32(low) + np.float32(high) * np.float32(16) - np.float32(32)


def dequantize_q2_k(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 2, 4, 32))
    for i in range(n):
        d, dmin, scales, qs = half(blocks[i].d), half(blocks[i].dmin), blocks[i].scales, blocks[i].qs
        for part in range(2):
            for k in range(4):
                for j in range(32):
                    scale = scales[8 * part + 2 * k + j // 16]
                    q = (qs[32 * part + j] >> (2 * k)) & 3
                    out[i, part, k, j] = d * np.float32(scale & 15) * np.float32(q) - dmin * np.float32(scale >> 4)


@inner
def six_bit_scale(packed, j):
    """Unpack the 6-bit scale of sub-block j of Q3_K.

    Four bits are in a nibble of the first eight bytes, two in the last four.
    """
    low, high = (packed[j % 8] >> (4 * (j // 8))) & 15, (packed[8 + j % 4] >> (2 * (j // 4))) & 3
    return np.float32(low) + np.float32(16) * np.float32(high) - np.float32(32)


def dequantize_q3_k(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 2, 4, 32))
    for i in range(n):
        d, packed, qs, hmask = half(blocks[i].d), blocks[i].scales, blocks[i].qs, blocks[i].hmask
        for part in range(2):
            for k in range(4):
                for j in range(32):
                    high = (hmask[j] >> (4 * part + k)) & 1
                    q = np.float32((qs[32 * part + j] >> (2 * k)) & 3) + np.float32(4) * np.float32(high) - np.float32(4)
                    out[i, part, k, j] = d * six_bit_scale(packed, 8 * part + 2 * k + j // 16) * q


# The scales and then the mins of Q4_K, as scale_and_min unpacks them: their lower bits, and the upper two bits of the last four of each
LOWER_BITS = gather_bytes([4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15], [0] * 12 + [4] * 4, ([63] * 4 + [15] * 4) * 2)
UPPER_BITS = gather_bytes([4, 5, 6, 7] * 2 + [8, 9, 10, 11] * 2, [2] * 16, ([0] * 4 + [48] * 4) * 2)


@inline
def whole_scales_and_mins(at):
    """Unpack all eight scales and all eight mins, in 6 bits, as i32x16."""
    return LOWER_BITS(at, 0) | UPPER_BITS(at, 0)


@inline
def scales_and_mins(at):
    """Unpack all eight scales, times d, and all eight mins, times dmin.

    As f32x16: the scales, then the mins. d and dmin precede them in memory.
    """
    return to_floats(whole_scales_and_mins(at)) * two_halves(at, 0)


# Sixteen bytes of each two sub-blocks of Q4_K and Q5_K, 2 s in low nibbles and 2 s + 1 in high ones: their even elements, then the odd
# ones; then the same of the other sixteen bytes. First all low nibbles, then all high ones.
BY_NIBBLES = inverse(*[8 * pair + 4 * nibble + 2 * odd + i for nibble in (0, 1) for i in (0, 1) for odd in (0, 1) for pair in range(4)])
LOW, HIGH = spread(0, 2, 4, 6), spread(1, 3, 5, 7)


@inline
def store_pairs(superblock, at, first, second, even, odd):
    """Store int16 of two sub-blocks, even and odd elements, to a superblock.

    `at`: the offset of the superblock's half; first, second: the sub-blocks within it.
    """
    store_halves(superblock, at + 64 * first, at + 64 * second, even)
    store_halves(superblock, at + 64 * first + 32, at + 64 * second + 32, odd)


@inline
def four_bits(q):
    """Split bytes to four int16 vectors: low nibbles even, odd; high nibbles even, odd."""
    return q & 15, (q >> 8) & 15, (q >> 4) & 15, q >> 12


@inline
def add_nibbles(sums, first, second, xi, scales):
    """Add a superblock's products, less its mins, to the sums of Q4_K or Q5_K.

    first, second: the first and the last elements of all sub-blocks, 128 each as four int16 vectors; scales: of the weights, and mins.
    """
    scales = scales * load_floats(xi, SCALES)       # times the activations' scales, and mins times sums of activations
    sums = dot_128(sums, (first[0], first[1], second[0], second[1]), xi, 0, LOW(scales))
    sums = dot_128(sums, (first[2], first[3], second[2], second[3]), xi, 256, HIGH(scales))
    return minus_upper_half(sums, scales)


# Scales of the low nibbles of 64 bytes, and of the high ones; of the second 64
LOW_0, HIGH_0, LOW_1, HIGH_1 = spread_int16(0, 2), spread_int16(1, 3), spread_int16(4, 6), spread_int16(5, 7)


@inline
def store_scaled(at, superblock, first, second):
    """Store d, the mins and int16 times their integer scales of Q4_K or Q5_K.

    d and dmin precede the scales at `at`. first, second: 128 elements each, in the order of four_bits.
    """
    v = whole_scales_and_mins(at)
    store(superblock, SCALES, to_floats(v) * two_halves(at, 0))
    store(superblock, SCALES, half_at(at, 0))
    scales = low_int16(v)
    store_pairs(superblock, 0, 0, 2, first[0] * LOW_0(scales), first[1] * LOW_0(scales))
    store_pairs(superblock, 0, 1, 3, first[2] * HIGH_0(scales), first[3] * HIGH_0(scales))
    store_pairs(superblock, 256, 0, 2, second[0] * LOW_1(scales), second[1] * LOW_1(scales))
    store_pairs(superblock, 256, 1, 3, second[2] * HIGH_1(scales), second[3] * HIGH_1(scales))


@inline
def add_q4_k(sums, row, i, n, x):
    at = row + Q4_K * i
    q, other = load_int16(at, 16), load_int16(at, 80)
    first, second = four_bits(even_quarters(q, other)), four_bits(odd_quarters(q, other))
    return add_nibbles(sums, first, second, x + SUPERBLOCK * i, scales_and_mins(at))


def dot_q4_k(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_q4_k, single_sum, floats(np.float32(0)), Q4_K, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q4_k(source, n, superblock):
    store(superblock, SCALES, scales_and_mins(source))        # and MINS, which follow SCALES
    for part in range(2):
        w, v, y, z = four_bits(load_int16(source, 16 + 64 * part))
        store_pairs(superblock, 256 * part, 0, 2, w, v)
        store_pairs(superblock, 256 * part, 1, 3, y, z)


def unpack_scaled_q4_k(source, n, superblock):
    store_scaled(source, superblock, four_bits(load_int16(source, 16)), four_bits(load_int16(source, 80)))


@inline
def five_bits(q, fifth):
    """Do what four_bits does, with the fifth bits: the lowest two of each byte."""
    w, v, y, z = four_bits(q)
    return w | ((fifth << 4) & 16), v | ((fifth >> 4) & 16), y | ((fifth << 3) & 16), z | ((fifth >> 5) & 16)


@inline
def add_q5_k(sums, row, i, n, x):
    at = row + Q5_K * i
    q, other = load_int16(at, 48), load_int16(at, 112)
    first = five_bits(even_quarters(q, other), shift_quarters(all_quarters(at, 16)))
    second = five_bits(odd_quarters(q, other), shift_quarters(all_quarters(at, 32)))
    return add_nibbles(sums, first, second, x + SUPERBLOCK * i, scales_and_mins(at))


def dot_q5_k(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_q5_k, single_sum, floats(np.float32(0)), Q5_K, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


@inline
def half_of_q5_k(at, part):
    """Unpack 128 elements of Q5_K, in the order of four_bits."""
    return five_bits(load_int16(at, 48 + 64 * part), both_halves(at, 16) >> halves_int16(np.int16(4 * part), np.int16(4 * part + 2)))


def unpack_q5_k(source, n, superblock):
    store(superblock, SCALES, scales_and_mins(source))        # and MINS, which follow SCALES
    for part in range(2):
        w, v, y, z = half_of_q5_k(source, part)
        store_pairs(superblock, 256 * part, 0, 2, w, v)
        store_pairs(superblock, 256 * part, 1, 3, y, z)


def unpack_scaled_q5_k(source, n, superblock):
    store_scaled(source, superblock, half_of_q5_k(source, 0), half_of_q5_k(source, 1))


# Q6_K: sub-blocks s and s + 1 share the low nibbles of 64 bytes, s + 2 and s + 3 the high ones
BY_NEIGHBOURS = with_one_scale(*[16 * part + 8 * nibble + 4 * s + 2 * odd + i for part in (0, 1) for nibble in (0, 1) for odd in (0, 1)
                                 for s in (0, 1) for i in (0, 1)])
BYTES_A, BYTES_B = spread_bytes(0, 1, 2, 3), spread_bytes(4, 5, 6, 7)
BYTES_C, BYTES_D = spread_bytes(8, 9, 10, 11), spread_bytes(12, 13, 14, 15)
I16_A, I16_B = spread_int16(0, 1, 2, 3), spread_int16(4, 5, 6, 7)
I16_C, I16_D = spread_int16(8, 9, 10, 11), spread_int16(12, 13, 14, 15)


@inline
def unsigned_six_bits(at, part):
    """Unpack 128 elements of Q6_K, each plus 32, to four int16 vectors.

    Low nibbles even, odd; high nibbles even, odd.
    """
    q = load_int16(at, 64 * part)
    high = both_halves(at, 128 + 32 * part) >> halves_int16(np.int16(0), np.int16(2))
    return ((q & 15) | ((high << 4) & 48), ((q >> 8) & 15) | ((high >> 4) & 48),
            ((q >> 4) & 15) | (high & 48), (q >> 12) | ((high >> 8) & 48))


@inline
def six_bit_bytes(at, part):
    """Unpack 128 elements of Q6_K, each plus 32, as bytes in int16.

    Two vectors: those of low nibbles, and of high ones.
    """
    q = load_int16(at, 64 * part)
    high = both_halves(at, 128 + 32 * part) >> halves_int16(np.int16(0), np.int16(2))
    return (q & 0x0F0F) | ((high << 4) & 0x3030), ((q >> 4) & 0x0F0F) | (high & 0x3030)


@inline
def add_q6_k(sums, row, i, n, x):
    at, xi = row + Q6_K * i, x + SUPERBLOCK * i
    scales, d = load_16_bytes(at, 192), half_at(at, 208)
    sums = multiply_add(sums, to_floats(scales) * (d * np.float32(-32)), load_floats(xi, MINS_16))
    (a, b), (c, e) = six_bit_bytes(at, 0), six_bit_bytes(at, 1)
    first = (*scaled_bytes(a, BYTES_A(scales)), *scaled_bytes(b, BYTES_B(scales)))
    return dot_256(sums, (*first, *scaled_bytes(c, BYTES_C(scales)), *scaled_bytes(e, BYTES_D(scales))), xi, d)


def dot_q6_k(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_q6_k, single_sum, floats(np.float32(0)), Q6_K, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q6_k(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 208)))
    scales = to_int16(load_16_bytes(source, 192))
    w, v, y, z = unsigned_six_bits(source, 0)
    store_pairs(superblock, 0, 0, 1, (w - 32) * I16_A(scales), (v - 32) * I16_A(scales))
    store_pairs(superblock, 0, 2, 3, (y - 32) * I16_B(scales), (z - 32) * I16_B(scales))
    w, v, y, z = unsigned_six_bits(source, 1)
    store_pairs(superblock, 256, 0, 1, (w - 32) * I16_C(scales), (v - 32) * I16_C(scales))
    store_pairs(superblock, 256, 2, 3, (y - 32) * I16_D(scales), (z - 32) * I16_D(scales))


# Q2_K and Q3_K: 64 bytes hold sub-blocks k and 4 + k in their bits 2k and 2k + 1: the even elements of both, then the odd ones
BY_PARTS = with_one_scale(*[16 * part + 4 * k + 2 * odd + i for k in range(4) for odd in (0, 1) for part in (0, 1) for i in (0, 1)])
BYTES_0, BYTES_1, BYTES_2, BYTES_3 = (spread_bytes(2 * k, 2 * k + 1, 8 + 2 * k, 9 + 2 * k) for k in range(4))
I16_0, I16_1, I16_2, I16_3 = (spread_int16(2 * k, 2 * k + 1, 8 + 2 * k, 9 + 2 * k) for k in range(4))


@inline
def scaled_parts(q, scales):
    """Multiply the four parts of Q2_K or Q3_K by the scales of sub-blocks.

    q: four int16 vectors of bytes; scales: i8x16.
    """
    a, b = scaled_bytes(q[0], BYTES_0(scales)), scaled_bytes(q[1], BYTES_1(scales))
    return (*a, *b, *scaled_bytes(q[2], BYTES_2(scales)), *scaled_bytes(q[3], BYTES_3(scales)))


@inline
def two_bits(q):
    """Split bytes to their four pairs of bits."""
    return q & 0x0303, (q >> 2) & 0x0303, (q >> 4) & 0x0303, (q >> 6) & 0x0303


@inline
def add_q2_k(sums, row, i, n, x):
    at, xi = row + Q2_K * i, x + SUPERBLOCK * i
    packed = load_16_bytes(at, 0)
    sums = multiply_add(sums, to_floats(packed >> 4) * -half_at(at, 82), load_floats(xi, MINS_16))
    return dot_256(sums, scaled_parts(two_bits(load_int16(at, 16)), packed & 15), xi, half_at(at, 80))


def dot_q2_k(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_q2_k, single_sum, floats(np.float32(0)), Q2_K, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q2_k(source, n, superblock):
    packed = load_16_bytes(source, 0)
    store(superblock, SCALES, eight_floats(half_at(source, 80)))
    store(superblock, MINS_16, to_floats(packed >> 4) * half_at(source, 82))
    scales, even = to_int16(packed & 15), load_int16(source, 16)
    odd = even >> 8
    store_pairs(superblock, 0, 0, 4, (even & 3) * I16_0(scales), (odd & 3) * I16_0(scales))
    store_pairs(superblock, 0, 1, 5, ((even >> 2) & 3) * I16_1(scales), ((odd >> 2) & 3) * I16_1(scales))
    store_pairs(superblock, 0, 2, 6, ((even >> 4) & 3) * I16_2(scales), ((odd >> 4) & 3) * I16_2(scales))
    store_pairs(superblock, 0, 3, 7, ((even >> 6) & 3) * I16_3(scales), ((odd >> 6) & 3) * I16_3(scales))


LOW_FOUR_BITS = gather_u32([0] * 4 + [1] * 4 + [0] * 4 + [1] * 4, [0, 8, 16, 24] * 2 + [4, 12, 20, 28] * 2)
HIGH_TWO_BITS = gather_u32([0] * 16, [8 * (j % 4) + 2 * (j // 4) for j in range(16)])


@inline
def six_bit_scales(at):
    """Unpack all sixteen 6-bit scales of a block of Q3_K, as i32x16."""
    return ((LOW_FOUR_BITS(at, 96) & 15) | ((HIGH_TWO_BITS(at, 104) & 3) << 4)) - 32


@inline
def blended(a, b, bits):
    """Replace some bits of a by those of b."""
    return (a & ~bits) | (b & bits)


@inline
def three_bits(at):
    """Unpack the 256 elements of Q3_K, at bits 2k to 2k + 2.

    Even elements of k = 0 and 2, of k = 1 and 3, then odd ones.
    """
    low = load_int16(at, 32)
    high = (both_halves(at, 0) >> halves_int16(np.int16(0), np.int16(4))) & 0x0F0F        # in each byte: bit k
    high = (high | (high << 2)) & 0x3333
    high = (high | (high << 1)) & 0x5555                                                # bit 2k
    low_odd, high_odd, high = low >> 8, high >> 6, high << 2
    return blended(low, high, 0x44), blended(low, high, 0x110), blended(low_odd, high_odd, 0x44), blended(low_odd, high_odd, 0x110)


@inline
def three_bit_bytes(at):
    """Unpack the four parts of Q3_K, each element plus 4, as bytes."""
    a, b, c, e = two_bits(load_int16(at, 32))
    high = both_halves(at, 0) >> halves_int16(np.int16(0), np.int16(4))        # in each byte: bit k of part k
    return a | ((high << 2) & 0x0404), b | ((high << 1) & 0x0404), c | (high & 0x0404), e | ((high >> 1) & 0x0404)


@inline
def add_q3_k(sums, row, i, n, x):
    at, xi = row + Q3_K * i, x + SUPERBLOCK * i
    scales, d = low_bytes(six_bit_scales(at)), half_at(at, 108)
    sums = multiply_add(sums, to_floats(scales) * (d * np.float32(-4)), load_floats(xi, MINS_16))
    return dot_256(sums, scaled_parts(three_bit_bytes(at), scales), xi, d)


def dot_q3_k(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_q3_k, single_sum, floats(np.float32(0)), Q3_K, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_q3_k(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 108)))
    scales = low_int16(six_bit_scales(source))
    w, v, y, z = three_bits(source)
    store_pairs(superblock, 0, 0, 4, ((w & 7) - 4) * I16_0(scales), ((y & 7) - 4) * I16_0(scales))
    store_pairs(superblock, 0, 1, 5, (((v >> 2) & 7) - 4) * I16_1(scales), (((z >> 2) & 7) - 4) * I16_1(scales))
    store_pairs(superblock, 0, 2, 6, (((w >> 4) & 7) - 4) * I16_2(scales), (((y >> 4) & 7) - 4) * I16_2(scales))
    store_pairs(superblock, 0, 3, 7, (((v >> 6) & 7) - 4) * I16_3(scales), (((z >> 6) & 7) - 4) * I16_3(scales))


KERNELS = {
    "Q2_K": entry("Q2_K", dequantize_q2_k, None, unpack_q2_k, dot_q2_k, BY_PARTS, 6, unpack_q2_k),
    "Q3_K": entry("Q3_K", dequantize_q3_k, None, unpack_q3_k, dot_q3_k, BY_PARTS, 9, unpack_q3_k),
    "Q4_K": entry("Q4_K", dequantize_q4_k, None, unpack_q4_k, dot_q4_k, BY_NIBBLES, 4, unpack_scaled_q4_k),
    "Q5_K": entry("Q5_K", dequantize_q5_k, None, unpack_q5_k, dot_q5_k, BY_NIBBLES, 5, unpack_scaled_q5_k),
    "Q6_K": entry("Q6_K", dequantize_q6_k, None, unpack_q6_k, dot_q6_k, BY_NEIGHBOURS, 14, unpack_q6_k),
}
