"""IQ1_S to IQ3_S: superblocks of 256 weights as indices into a grid.

An index selects eight weights of a small set of levels, in IQ3 four. Here an entry of the grid is sixteen bits: two bits a weight, in IQ3
three. In IQ2 and IQ3 each weight has a sign bit; where only seven of eight are stored, the last makes their number even. In IQ1 a sign
bit of eight weights adds 1/8 to each or subtracts it.

The vector code holds 32 groups of eight weights in int16 lanes, as two codes of four weights each: four bits a weight, the sign on top. A
shift and a lookup give one weight of each group; so activations are in columns, one for each of the eight weights (codes.py), and lane j of
the sum of all products has those of sub-block j of 16, which have one scale.
"""
import numpy as np
from numba import carray

from pydsa.backends.cpu.blocks.block import COLUMNS, COLUMNS_BY_INDEX, COLUMNS_BY_SIGN, COLUMNS_IN_PAIRS, SCALES, SUPERBLOCK, entry
from pydsa.backends.cpu.blocks.byte_grids import DOTS
from pydsa.backends.cpu.blocks.dots import TWICE, dot_large, single_sum
from pydsa.backends.cpu.jit import inline, inner
from pydsa.backends.cpu.vectors.byte_codes import HERE
from pydsa.backends.cpu.vectors.codes import (bytes_of_even_words, code_values, from_columns, grid_entries, lanes_of, seven_bits,
                                              sign_codes, sign_codes_of_7, where_bit, widen)
from pydsa.backends.cpu.vectors.lanes import gather_u32
from pydsa.backends.cpu.vectors.scalars import half, half_at
from pydsa.backends.cpu.vectors.simd import (dot, dot_add, eight_floats, floats, i64_at, load_8_floats, load_8_words, load_32_bytes,
                                             load_int16, multiply_add, store, to_floats)
from pydsa.quants import IQ2_LEVELS, IQ3_S_LEVELS, IQ3_XXS_LEVELS, TYPES, grid


NAMES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# Bytes of a block
IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S = (TYPES[name].n_bytes for name in NAMES)
IQ1_GRID, _, IQ2_XXS_GRID, IQ2_XS_GRID, IQ2_S_GRID, IQ3_XXS_GRID, IQ3_S_GRID = map(grid, NAMES)
EIGHTH, QUARTER, HALF, ONE = np.float32(1 / 8), np.float32(1 / 4), np.float32(1 / 2), np.float32(1)


@inner
def sign_byte(index):
    """Return eight sign bits for seven: an even number of them are set."""
    parity = index ^ (index >> 4)
    parity = parity ^ (parity >> 2)
    return index | (((parity ^ (parity >> 1)) & 1) << 7)


@inner
def put_signed(out, d, levels, signs):
    """Store d times the levels of one index, negated where a bit is set."""
    for k in range(levels.size):
        value = d * np.float32(levels[k])
        out[k] = -value if (signs >> k) & 1 else value


@inner
def odd_scale(nibbles, j):
    """Return 1/2 + nibble j of some bytes."""
    return HALF + np.float32((nibbles[j // 2] >> (4 * (j % 2))) & 15)


def dequantize_iq2_xxs(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 8, 4, 8))
    for i in range(n):
        for j in range(8):
            indices, word = blocks[i].qs[2 * j], blocks[i].qs[2 * j + 1]
            d = half(blocks[i].d) * (HALF + np.float32(word >> 28)) * QUARTER
            for g in range(4):
                put_signed(out[i, j, g], d, IQ2_XXS_GRID[(indices >> (8 * g)) & 255], sign_byte((word >> (7 * g)) & 127))


def dequantize_iq2_xs(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32, 8))
    for i in range(n):
        for g in range(32):
            q = blocks[i].qs[g]
            d = half(blocks[i].d) * odd_scale(blocks[i].scales, g // 2) * QUARTER
            put_signed(out[i, g], d, IQ2_XS_GRID[q & 511], sign_byte(np.int64(q) >> 9))


def dequantize_iq2_s(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32, 8))
    for i in range(n):
        for g in range(32):
            index = blocks[i].qs[g] | ((blocks[i].qh[g // 4] >> (2 * (g % 4))) & 3) << 8
            d = half(blocks[i].d) * odd_scale(blocks[i].scales, g // 2) * QUARTER
            put_signed(out[i, g], d, IQ2_S_GRID[index], blocks[i].signs[g])


def dequantize_iq3_xxs(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 8, 4, 2, 4))
    for i in range(n):
        for j in range(8):
            word = blocks[i].signs[j]
            d = half(blocks[i].d) * (HALF + np.float32(word >> 28)) * HALF
            for g in range(4):
                signs = sign_byte((word >> (7 * g)) & 127)
                put_signed(out[i, j, g, 0], d, IQ3_XXS_GRID[blocks[i].qs[8 * j + 2 * g]], signs)
                put_signed(out[i, j, g, 1], d, IQ3_XXS_GRID[blocks[i].qs[8 * j + 2 * g + 1]], signs >> 4)


def dequantize_iq3_s(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32, 2, 4))
    for i in range(n):
        for g in range(32):
            scale = (blocks[i].scales[g // 8] >> (4 * (g // 4 % 2))) & 15
            d, high, signs = half(blocks[i].d) * np.float32(1 + 2 * scale), blocks[i].qh[g // 4] >> (2 * (g % 4)), blocks[i].signs[g]
            put_signed(out[i, g, 0], d, IQ3_S_GRID[blocks[i].qs[2 * g] | (high & 1) << 8], signs)
            put_signed(out[i, g, 1], d, IQ3_S_GRID[blocks[i].qs[2 * g + 1] | (high >> 1 & 1) << 8], signs >> 4)


@inner
def put_shifted(out, d, levels, delta):
    """Store d times the levels of one index plus or minus 1/8."""
    for k in range(levels.size):
        out[k] = d * (np.float32(levels[k]) + (-EIGHTH if delta else EIGHTH))


def dequantize_iq1_s(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 8, 4, 8))
    for i in range(n):
        for j in range(8):
            qh = np.int64(blocks[i].qh[j])
            d = half(blocks[i].d) * np.float32(2 * ((qh >> 12) & 7) + 1)
            for g in range(4):
                put_shifted(out[i, j, g], d, IQ1_GRID[blocks[i].qs[4 * j + g] | ((qh >> (3 * g)) & 7) << 8], qh >> 15)


def dequantize_iq1_m(source, n, target):
    blocks, out = carray(source, (n,)), carray(target, (n, 32, 8))
    for i in range(n):
        packed = blocks[i].scales
        d16 = half(np.uint16(packed[0] >> 12 | (packed[1] >> 12) << 4 | (packed[2] >> 12) << 8 | (packed[3] >> 12) << 12))
        for g in range(32):
            qh, scale = (blocks[i].qh[g // 2] >> (4 * (g % 2))) & 15, (packed[g // 8] >> (3 * (g // 2 % 4))) & 7
            put_shifted(out[i, g], d16 * np.float32(2 * scale + 1), IQ1_GRID[blocks[i].qs[g] | (qh & 7) << 8], qh >> 3)


def packed(levels, name):
    """Pack the rows of a grid to entries: the numbers of its elements' levels.

    Those of elements 0 to 3 are in the low two or three bits of the nibbles, those of elements 4 to 7 in the high two bits.
    """
    return [sum(levels.index(level) << (4 * (k % 4) + 2 * (k // 4)) for k, level in enumerate(row)) for row in grid(name).tolist()]


IQ1_ENTRIES = grid_entries(packed((-1, 0, 1), "IQ1_S"))
IQ2_XXS_ENTRIES, IQ2_XS_ENTRIES, IQ2_S_ENTRIES = (grid_entries(packed(IQ2_LEVELS, name)) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S"))
IQ3_XXS_ENTRIES, IQ3_S_ENTRIES = grid_entries(packed(IQ3_XXS_LEVELS, "IQ3_XXS")), grid_entries(packed(IQ3_S_LEVELS, "IQ3_S"))


def signed_values(levels):
    """Make the lookup of a code: one of eight levels, and a sign on top."""
    levels = [*levels] + [0] * (8 - len(levels))
    return code_values(levels + [-level for level in levels])


IQ2, IQ3_XXS_VALUES, IQ3_S_VALUES = signed_values(IQ2_LEVELS), signed_values(IQ3_XXS_LEVELS), signed_values(IQ3_S_LEVELS)
IQ1 = code_values([-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7, 0, 0, 0, 0, 0])      # eight times a weight: 8 level + 1, or 8 level - 1
ODD_WORDS = gather_u32(range(1, 16, 2), [0] * 8)
NIBBLES_OF_8, NIBBLES_OF_16 = gather_u32([0] * 8, range(0, 32, 4)), gather_u32([0] * 8 + [1] * 8, [*range(0, 32, 4)] * 2)


@inline
def codes_iq2(entries, signs):
    """Return the two codes of entries of two bits a weight, with signs."""
    return (entries & 0x3333) | signs[0], ((entries >> 2) & 0x3333) | signs[1]


@inline
def codes_iq1(entries, deltas):
    """Return the two codes of entries of IQ1; deltas: 0x8888 where 1/8 is subtracted."""
    return (entries & 0x3333) | deltas, ((entries >> 2) & 0x3333) | deltas


@inline
def codes_iq2_xxs(at):
    return codes_iq2(IQ2_XXS_ENTRIES(bytes_of_even_words(at, 2)), sign_codes_of_7(seven_bits(ODD_WORDS(at, 2))))


@inline
def scales_iq2_xxs(at):
    """Return the scale of each 32 weights of a block, f32x8."""
    return to_floats((ODD_WORDS(at, 2) >> 28) * 2 + 1) * (half_at(at, 0) * EIGHTH)


@inline
def codes_iq2_xs(at):
    q = load_int16(at, 2)
    return codes_iq2(IQ2_XS_ENTRIES(q & 511), sign_codes_of_7(q >> 9))


@inline
def odd_scales_of_16(at, offset):
    """Return twice a nibble plus one for each 16 weights, i32x16."""
    return (NIBBLES_OF_16(at, offset) & 15) * 2 + 1


TWO_HIGH_BITS = lanes_of(8, [g // 4 for g in range(32)], [2 * (g % 4) for g in range(32)], 0x0300, left=8)


@inline
def codes_iq2_s(at):
    entries = IQ2_S_ENTRIES(widen(load_32_bytes(at, 2)) | TWO_HIGH_BITS(at, 66))
    return codes_iq2(entries, sign_codes(widen(load_32_bytes(at, 34))))


@inline
def codes_iq3_xxs(at):
    q, signs = load_int16(at, 2), sign_codes_of_7(seven_bits(load_8_words(at, 66)))
    return IQ3_XXS_ENTRIES(q & 255) | signs[0], IQ3_XXS_ENTRIES(q >> 8) | signs[1]


@inline
def scales_iq3_xxs(at):
    """Return the scale of each 32 weights of a block, f32x8."""
    return to_floats((load_8_words(at, 66) >> 28) * 2 + 1) * (half_at(at, 0) * QUARTER)


HIGH_BIT_EVEN, HIGH_BIT_ODD = (lanes_of(8, [g // 4 for g in range(32)], [2 * (g % 4) + odd for g in range(32)], 0x0100, left=8)
                               for odd in (0, 1))


@inline
def codes_iq3_s(at):
    q, signs = load_int16(at, 2), sign_codes(widen(load_32_bytes(at, 74)))
    even, odd = IQ3_S_ENTRIES((q & 255) | HIGH_BIT_EVEN(at, 66)), IQ3_S_ENTRIES((q >> 8) | HIGH_BIT_ODD(at, 66))
    return even | signs[0], odd | signs[1]


@inline
def scales_iq3_s(at):
    """Return the scale of each 32 weights of a block, f32x8."""
    return to_floats((NIBBLES_OF_8(at, 106) & 15) * 2 + 1) * half_at(at, 0)


BY_FOUR = [g // 4 for g in range(32)]
THREE_HIGH_BITS, OF_FOUR = lanes_of(16, BY_FOUR, [3 * (g % 4) for g in range(32)], 7), lanes_of(16, BY_FOUR, [0] * 32, 0xFFFF)
SCALES_IQ1_S = gather_u32([0, 0, 1, 1, 2, 2, 3, 3], [12, 28] * 4)


@inline
def codes_iq1_s(at):
    return codes_iq1(IQ1_ENTRIES(widen(load_32_bytes(at, 2)) | (THREE_HIGH_BITS(at, 34) << 8)), where_bit(OF_FOUR(at, 34), 0x8000, 0x8888))


@inline
def scales_iq1_s(at):
    """Return the scale of each 32 weights of a block, f32x8."""
    return to_floats((SCALES_IQ1_S(at, 34) & 7) * 2 + 1) * (half_at(at, 0) * EIGHTH)


NIBBLES_HIGH = lanes_of(8, [g // 2 for g in range(32)], [4 * (g % 2) for g in range(32)], 0x0F00, left=8)
SCALES_IQ1_M = gather_u32([0] * 8 + [1] * 8, [0, 3, 6, 9, 16, 19, 22, 25] * 2)


@inline
def codes_iq1_m(at):
    high = NIBBLES_HIGH(at, 32)
    return codes_iq1(IQ1_ENTRIES(widen(load_32_bytes(at, 0)) | (high & 0x0700)), where_bit(high, 0x0800, 0x8888))


def products(values):
    """Make a function: a block's codes times a superblock in columns, f32x16.

    Lane j is the sum over sub-block j of 16.
    """
    @inline
    def columns_dot(codes, xi):
        low, high = codes
        dots = dot_add(dot(values(low), load_int16(xi, 0)), values(low >> 4), load_int16(xi, 64))
        dots = dot_add(dot_add(dots, values(low >> 8), load_int16(xi, 128)), values(low >> 12), load_int16(xi, 192))
        dots = dot_add(dot_add(dots, values(high), load_int16(xi, 256)), values(high >> 4), load_int16(xi, 320))
        return to_floats(dot_add(dot_add(dots, values(high >> 8), load_int16(xi, 384)), values(high >> 12), load_int16(xi, 448)))
    return columns_dot


def storing(values):
    """Make a function that stores a block's int16 to a superblock.

    Each is multiplied by a factor of its group of eight.
    """
    @inline
    def store_values(codes, factor, superblock):
        low, high = codes
        for k in range(4):
            store(superblock, 64 * k, values(low) * factor)
            store(superblock, 64 * k + 256, values(high) * factor)
            low, high = low >> 4, high >> 4
        from_columns(superblock)
    return store_values


dot_iq2_values, dot_iq3_xxs_values, dot_iq3_s_values, dot_iq1_values = map(products, (IQ2, IQ3_XXS_VALUES, IQ3_S_VALUES, IQ1))
store_iq2, store_iq3_xxs, store_iq3_s, store_iq1 = map(storing, (IQ2, IQ3_XXS_VALUES, IQ3_S_VALUES, IQ1))


@inline
def add_iq2_xxs(sums, row, i, n, x):
    at, xi = row + IQ2_XXS * i, x + SUPERBLOCK * i
    return multiply_add(sums, dot_iq2_values(codes_iq2_xxs(at), xi), TWICE(scales_iq2_xxs(at) * load_8_floats(xi, SCALES)))


def dot_iq2_xxs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq2_xxs, single_sum, floats(np.float32(0)), IQ2_XXS, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


SCALE_OF_ODD_WORD = lanes_of(16, [4 * (g // 4) + 3 for g in range(32)], [12] * 32, 15)


def unpack_iq2_xxs(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0) * EIGHTH))
    store_iq2(codes_iq2_xxs(source), SCALE_OF_ODD_WORD(source, 2) * 2 + 1, superblock)


@inline
def add_iq2_xs(sums, row, i, n, x):
    at, xi = row + IQ2_XS * i, x + SUPERBLOCK * i
    scales = to_floats(odd_scales_of_16(at, 66)) * TWICE(load_8_floats(xi, SCALES) * (half_at(at, 0) * EIGHTH))
    return multiply_add(sums, dot_iq2_values(codes_iq2_xs(at), xi), scales)


def dot_iq2_xs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq2_xs, single_sum, floats(np.float32(0)), IQ2_XS, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


NIBBLE_OF_GROUP = lanes_of(8, BY_FOUR, [4 * (g // 2 % 2) for g in range(32)], 15)


def unpack_iq2_xs(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0) * EIGHTH))
    store_iq2(codes_iq2_xs(source), NIBBLE_OF_GROUP(source, 66) * 2 + 1, superblock)


@inline
def add_iq2_s(sums, row, i, n, x):
    at, xi = row + IQ2_S * i, x + SUPERBLOCK * i
    scales = to_floats(odd_scales_of_16(at, 74)) * TWICE(load_8_floats(xi, SCALES) * (half_at(at, 0) * EIGHTH))
    return multiply_add(sums, dot_iq2_values(codes_iq2_s(at), xi), scales)


def dot_iq2_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq2_s, single_sum, floats(np.float32(0)), IQ2_S, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def unpack_iq2_s(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0) * EIGHTH))
    store_iq2(codes_iq2_s(source), NIBBLE_OF_GROUP(source, 74) * 2 + 1, superblock)


@inline
def add_iq3_xxs(sums, row, i, n, x):
    at, xi = row + IQ3_XXS * i, x + SUPERBLOCK * i
    return multiply_add(sums, dot_iq3_xxs_values(codes_iq3_xxs(at), xi), TWICE(scales_iq3_xxs(at) * load_8_floats(xi, SCALES)))


def dot_iq3_xxs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq3_xxs, single_sum, floats(np.float32(0)), IQ3_XXS, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


SCALE_OF_WORD = lanes_of(16, [2 * (g // 4) + 1 for g in range(32)], [12] * 32, 15)


def unpack_iq3_xxs(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0) * QUARTER))
    store_iq3_xxs(codes_iq3_xxs(source), SCALE_OF_WORD(source, 66) * 2 + 1, superblock)


@inline
def add_iq3_s(sums, row, i, n, x):
    at, xi = row + IQ3_S * i, x + SUPERBLOCK * i
    return multiply_add(sums, dot_iq3_s_values(codes_iq3_s(at), xi), TWICE(scales_iq3_s(at) * load_8_floats(xi, SCALES)))


def dot_iq3_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq3_s, single_sum, floats(np.float32(0)), IQ3_S, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


NIBBLE_OF_4_GROUPS = lanes_of(8, [g // 8 for g in range(32)], [4 * (g // 4 % 2) for g in range(32)], 15)


def unpack_iq3_s(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0)))
    store_iq3_s(codes_iq3_s(source), NIBBLE_OF_4_GROUPS(source, 106) * 2 + 1, superblock)


@inline
def add_iq1_s(sums, row, i, n, x):
    at, xi = row + IQ1_S * i, x + SUPERBLOCK * i
    return multiply_add(sums, dot_iq1_values(codes_iq1_s(at), xi), TWICE(scales_iq1_s(at) * load_8_floats(xi, SCALES)))


def dot_iq1_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq1_s, single_sum, floats(np.float32(0)), IQ1_S, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


SCALE_OF_4_GROUPS = lanes_of(16, BY_FOUR, [12] * 32, 7)


def unpack_iq1_s(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_at(source, 0) * EIGHTH))
    store_iq1(codes_iq1_s(source), SCALE_OF_4_GROUPS(source, 34) * 2 + 1, superblock)


@inline
def half_of_iq1_m(at):
    """Return the float16 scale of a block, whose bits are in four places."""
    nibbles = (np.uint64(i64_at(at, 48)) >> np.uint64(12)) & np.uint64(0x000F000F000F000F)
    return half(np.uint16((nibbles * np.uint64(0x0001001001001000)) >> np.uint64(48)))      # they meet above bit 48


@inline
def add_iq1_m(sums, row, i, n, x):
    at, xi = row + IQ1_M * i, x + SUPERBLOCK * i
    scales = to_floats((SCALES_IQ1_M(at, 48) & 7) * 2 + 1) * TWICE(load_8_floats(xi, SCALES) * (half_of_iq1_m(at) * EIGHTH))
    return multiply_add(sums, dot_iq1_values(codes_iq1_m(at), xi), scales)


def dot_iq1_m(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq1_m, single_sum, floats(np.float32(0)), IQ1_M, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


SCALE_OF_GROUP = lanes_of(16, [g // 8 for g in range(32)], [3 * (g // 2 % 4) for g in range(32)], 7)


def unpack_iq1_m(source, n, superblock):
    store(superblock, SCALES, eight_floats(half_of_iq1_m(source) * EIGHTH))
    store_iq1(codes_iq1_m(source), SCALE_OF_GROUP(source, 48) * 2 + 1, superblock)


def kernels(name, dequantize, unpack, dot, bits):
    """Make the BlockKernels of a type, with lookups of bytes where there are."""
    order = COLUMNS
    if HERE:
        dot, order = DOTS[name], COLUMNS_BY_SIGN if name.startswith("IQ2") else COLUMNS_BY_INDEX
        order = COLUMNS_IN_PAIRS if name.startswith("IQ1") else order
    return entry(name, dequantize, None, unpack, dot, order, bits, unpack)


KERNELS = {
    "IQ1_S": kernels("IQ1_S", dequantize_iq1_s, unpack_iq1_s, dot_iq1_s, 9),
    "IQ1_M": kernels("IQ1_M", dequantize_iq1_m, unpack_iq1_m, dot_iq1_m, 9),
    "IQ2_XXS": kernels("IQ2_XXS", dequantize_iq2_xxs, unpack_iq2_xxs, dot_iq2_xxs, 12),
    "IQ2_XS": kernels("IQ2_XS", dequantize_iq2_xs, unpack_iq2_xs, dot_iq2_xs, 12),
    "IQ2_S": kernels("IQ2_S", dequantize_iq2_s, unpack_iq2_s, dot_iq2_s, 12),
    "IQ3_XXS": kernels("IQ3_XXS", dequantize_iq3_xxs, unpack_iq3_xxs, dot_iq3_xxs, 12),
    "IQ3_S": kernels("IQ3_S", dequantize_iq3_s, unpack_iq3_s, dot_iq3_s, 10),
}
