"""IQ1_S to IQ3_S times a few tokens, with lookups of bytes.

byte_codes.py says where. It takes half of the lookups and shifts that grids.py takes.

Two blocks are looked up together where an index has eight weights, so that a table serves 64 indices at once.
"""
import numpy as np

from pydsa.backends.cpu.blocks.block import SCALES, SUPERBLOCK, SUMS
from pydsa.backends.cpu.blocks.dots import dot_large, single_sum, two_blocks
from pydsa.backends.cpu.byte_codes import (BY_SIGN, add_byte_dot, as_int32, biased_values, bit_4_unset, byte_entries, eight_u16, eight_u32,
                                           even_with_parity, load_bytes, load_sums, low_codes, no_sums, pair_entries, pair_halves,
                                           pair_of_bytes, pair_of_u32, pair_of_u64, picked_pair, repeated_u32, repeated_u64,
                                           signed_codes, to_tops, top_codes, unaligned, unaligned_of_four, upper_nibbles, with_last_tops)
from pydsa.backends.cpu.byte_pairs import (PAIR_LOWER, PAIR_SCALES, PAIR_SUMS, dots_of_two, float_table, pair_of_halves, pair_of_indices,
                                           pair_of_int16)
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.scalars import half, half_at
from pydsa.backends.cpu.simd import floats, i64_at, load_floats, multiply_add, to_floats
from pydsa.quants import IQ2_LEVELS, IQ3_S_LEVELS, IQ3_XXS_LEVELS, TYPES, grid


EIGHTH, QUARTER = np.float32(1 / 8), np.float32(1 / 4)
NAMES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S = (TYPES[name].n_bytes for name in NAMES)


def packed_by_eight(levels, name, pairs=BY_SIGN):
    """Pack a grid's rows to entries: two bits for each element of eight.

    The elements of the first code are in the low two bits of the nibbles, in the order of `pairs`, those of the second in the high two.
    """
    places = {element: 8 * byte + 4 * (vector % 2) + 2 * (vector // 2) for vector, some in enumerate(pairs) for byte, element in
              enumerate(some)}
    return [sum(levels.index(row[element]) << place for element, place in places.items()) for row in grid(name).tolist()]


def packed_by_four(levels, name):
    """Pack a grid's rows to entries: a nibble for each element of four."""
    return [sum(levels.index(level) << 4 * k for k, level in enumerate(row)) for row in grid(name).tolist()]


# Two bits for each element of IQ1, its level plus one; the grid is sorted by the last elements first
IQ1_PACKED = [sum(level + 1 << 2 * k for k, level in enumerate(row)) for row in grid("IQ1_S").tolist()]
IQ1_ENTRIES, IQ1_HALVES = pair_entries(IQ1_PACKED, is_sorted=True), pair_halves(IQ1_PACKED)
IQ2_XXS_ENTRIES, IQ2_XS_ENTRIES, IQ2_S_ENTRIES = (pair_entries(packed_by_eight(IQ2_LEVELS, name)) for name in NAMES[2:5])
IQ3_XXS_ENTRIES = byte_entries(packed_by_four(IQ3_XXS_LEVELS, "IQ3_XXS"))
IQ3_S_ENTRIES = byte_entries(packed_by_four(IQ3_S_LEVELS, "IQ3_S"))
IQ3_XXS_VALUES, IQ3_S_VALUES = (biased_values([*levels, *[-level for level in levels]]) for levels in (IQ3_XXS_LEVELS, IQ3_S_LEVELS))
# Of two-bit levels bit 2 of a code is another element's, and ignored
IQ2_VALUES = biased_values(([*IQ2_LEVELS, 0] * 2 + [-level for level in [*IQ2_LEVELS, 0] * 2]))


def signs_of_eight(first, each):
    """Make two functions: signs of both codes of each group, without parity.

    first: where they begin in 64 bits; each: how many bits later those of the next group do.
    """
    low, high = (unaligned_of_four(lambda g: first - 2 * code + each * g, lambda g: first - 2 * code - 1 + each * g) for code in (0, 1))
    return low, high


LOW_OF_WORDS, HIGH_OF_WORDS = signs_of_eight(32, 7)
LOW_OF_INT16, HIGH_OF_INT16 = signs_of_eight(9, 16)
LOW_OF_BYTES, HIGH_OF_BYTES = signs_of_eight(0, 8)


@inline
def two_codes(entries, signs, other_signs):
    """Return both codes of entries of eight elements."""
    return signed_codes(entries, signs), signed_codes(entries >> 2, other_signs)


BYTES_OF_EVEN_WORDS, EVEN_BYTES = picked_pair(lambda group: 8 * (group // 4) + group % 4), picked_pair(lambda group: 2 * group)
ODD_BYTES = picked_pair(lambda group: 2 * group + 1)
TWO_BITS = unaligned([16 * (i // 16) + 2 * (i % 8) for i in range(64)])
THREE_BITS, FOUR_BITS = unaligned([16 * (i % 8 // 4) + 3 * (i % 4) for i in range(64)]), unaligned([4 * (i % 8) for i in range(64)])
TOPS_OF_NIBBLES_AT_4 = unaligned_of_four(lambda g: 4 * g - 1, lambda g: 4 * g - 1)


def odd_scales(offset_of_lane, bits, load, offset):
    """Make a function that returns twice a scale plus one for each lane.

    As i32x16, of the block at an address: load(at, offset) gives integers of 64 bits, where the scale of a lane begins at offset_of_lane.
    """
    pick, mask = unaligned([offset_of_lane(lane) - 1 for lane in range(16) for _ in range(4)]), 2 ** (bits + 1) - 1

    @inline
    def scales(at):
        return (as_int32(pick(load(at, offset))) & mask) | 1
    return scales


scales_iq1_m = odd_scales(lambda j: 16 * (j // 4) + 3 * (j % 4), 3, repeated_u64, 48)
scales_iq2_xxs = odd_scales(lambda j: 60, 4, load_bytes, 2)
scales_iq2_xs, scales_iq2_s = (odd_scales(lambda j: 4 * j, 4, repeated_u64, offset) for offset in (66, 74))
scales_iq3_xxs, scales_iq3_s = odd_scales(lambda j: 28, 4, eight_u32, 66), odd_scales(lambda j: 4 * (j // 2), 4, repeated_u32, 106)


@inline
def indices_iq2_xxs(a, b):
    index = BYTES_OF_EVEN_WORDS(load_bytes(a, 2), load_bytes(b, 2))
    return index, index


@inline
def codes_iq2_xxs(entries, at):
    q = load_bytes(at, 2)
    return two_codes(entries, even_with_parity(LOW_OF_WORDS(q)), HIGH_OF_WORDS(q))


@inline
def indices_iq2_xs(a, b):
    q, r = load_bytes(a, 2), load_bytes(b, 2)
    return EVEN_BYTES(q, r), ODD_BYTES(q, r)


@inline
def codes_iq2_xs(entries, at):
    q = load_bytes(at, 2)
    return two_codes(entries, even_with_parity(LOW_OF_INT16(q)), HIGH_OF_INT16(q))


@inline
def indices_iq2_s(a, b):
    return pair_of_bytes(a, b, 2), TWO_BITS(pair_of_u64(a, b, 66))


@inline
def codes_iq2_s(entries, at):
    q = eight_u32(at, 34)
    return two_codes(entries, LOW_OF_BYTES(q), HIGH_OF_BYTES(q))


@inline
def indices_iq1_m(a, b):
    return pair_of_bytes(a, b, 0), FOUR_BITS(pair_of_u32(a, b, 32))


@inline
def codes_iq1_m(entries, at):
    """Return 64 times a weight of each eight plus BIAS: its code, and 16 where 1/8 is added."""
    deltas = bit_4_unset(TOPS_OF_NIBBLES_AT_4(eight_u16(at, 32)))
    return top_codes(entries << 6, deltas), top_codes(entries << 4, deltas), top_codes(entries << 2, deltas), top_codes(entries, deltas)


FIRST_TOPS_7, FIRST_TOPS_8 = (unaligned_of_four(lambda g: n * g, lambda g: n * g + 4) for n in (7, 8))
LAST_TOPS_7 = unaligned_of_four(lambda g: 7 * g + 2, lambda g: 7 * g)
LAST_TOPS_8 = unaligned_of_four(lambda g: 8 * g + 2, lambda g: 8 * g + 6)


@inline
def codes_iq3_xxs(at):
    first, second = IQ3_XXS_ENTRIES(load_bytes(at, 2))
    q = eight_u32(at, 66)
    last = LAST_TOPS_7(q)
    return signed_codes(first, to_tops(FIRST_TOPS_7(q))), signed_codes(second, with_last_tops(last, to_tops(last)))


@inline
def codes_iq3_s(at):
    first, second = IQ3_S_ENTRIES(load_bytes(at, 2), at, 66)
    q = eight_u32(at, 74)
    return signed_codes(first, to_tops(FIRST_TOPS_8(q))), signed_codes(second, to_tops(LAST_TOPS_8(q)))


@inline
def first_half(at):
    """Return the float16 that most blocks begin with."""
    return half_at(at, 0)


@inline
def half_of_iq1_m(at):
    """Return the float16 scale of a block, whose bits are in four places."""
    nibbles = (np.uint64(i64_at(at, 48)) >> np.uint64(12)) & np.uint64(0x000F000F000F000F)
    return half(np.uint16((nibbles * np.uint64(0x0001001001001000)) >> np.uint64(48)))      # they meet above bit 48


@inline
def add_weights(sums, weights, scales, d, xi):
    """Return sums + d scales (weights . superblock); weights have BIAS."""
    a, b, c, e = weights
    upper = add_byte_dot(add_byte_dot(no_sums(), a, xi, 0), b, xi, 64)
    upper = add_byte_dot(add_byte_dot(upper, c, xi, 128), e, xi, 192)
    lower = add_byte_dot(add_byte_dot(load_sums(xi, SUMS), a, xi, 256), b, xi, 320)
    lower = add_byte_dot(add_byte_dot(lower, c, xi, 384), e, xi, 448)
    return multiply_add(sums, to_floats((upper << 8) + lower), to_floats(scales) * d * load_floats(xi, SCALES))


def adding(values):
    """Make a function that returns sums + d scales (codes . superblock)."""
    @inline
    def add(sums, codes, scales, d, xi):
        low, high = codes
        return add_weights(sums, (values(low), values(upper_nibbles(low)), values(high), values(upper_nibbles(high))), scales, d, xi)
    return add


def adding_pairs(size, entries, indices, codes, scales, scale_of_block, add_block):
    """Make the `add` of a type whose blocks are looked up by two.

    It has a function for two rows. The last one of an odd number of blocks meets itself, with a scale of 0. codes(entries, at): what
    add_block multiplies.
    """
    @inline
    def add_first(sums, at, entries, i, x):
        return add_block(sums, codes(entries, at), scales(at), scale_of_block(at), x + SUPERBLOCK * i)

    @inline
    def add_second(sums, at, entries, i, n, x):
        d, xi = scale_of_block(at), x + SUPERBLOCK * min(i + 1, n - 1)
        return add_block(sums, codes(entries, at), scales(at), d if i + 1 < n else np.float32(0), xi)

    @inline
    def add(sums, row, i, n, x):
        a, b = two_blocks(row, size, i, n)
        index, upper = indices(a, b)
        first, second = entries((index,), (upper,))
        return add_second(add_first(sums, a, first, i, x), b, second, i, n, x)

    @inline
    def add_for_two(sums, other_sums, row, other_row, i, n, x):
        # rows by turns, or LLVM would look up those of the second one later and load the table twice
        (a, b), (c, e) = two_blocks(row, size, i, n), two_blocks(other_row, size, i, n)
        (index, upper), (other_index, other_upper) = indices(a, b), indices(c, e)
        first, second, third, fourth = entries((index, other_index), (upper, other_upper))
        sums, other_sums = add_first(sums, a, first, i, x), add_first(other_sums, c, third, i, x)
        return add_second(sums, b, second, i, n, x), add_second(other_sums, e, fourth, i, n, x)
    add.for_two = add_for_two
    return add


def adding_single(size, codes, scales, values):
    """Make the `add` of a type whose blocks are looked up one by one."""
    add_block = adding(values)

    @inline
    def add(sums, row, i, n, x):
        at = row + size * i
        return add_block(sums, codes(at), scales(at), half_at(at, 0), x + SUPERBLOCK * i)
    return add


@inline
def an_eighth(sums):
    return sums * EIGHTH


@inline
def a_quarter(sums):
    return sums * QUARTER


@inline
def a_64th(sums):
    return sums * np.float32(1 / 64)


add_iq2_values = adding(IQ2_VALUES)
add_iq1_m = adding_pairs(IQ1_M, IQ1_ENTRIES, indices_iq1_m, codes_iq1_m, scales_iq1_m, half_of_iq1_m, add_weights)
add_iq2_xxs = adding_pairs(IQ2_XXS, IQ2_XXS_ENTRIES, indices_iq2_xxs, codes_iq2_xxs, scales_iq2_xxs, first_half, add_iq2_values)
add_iq2_xs = adding_pairs(IQ2_XS, IQ2_XS_ENTRIES, indices_iq2_xs, codes_iq2_xs, scales_iq2_xs, first_half, add_iq2_values)
add_iq2_s = adding_pairs(IQ2_S, IQ2_S_ENTRIES, indices_iq2_s, codes_iq2_s, scales_iq2_s, first_half, add_iq2_values)
add_iq3_xxs = adding_single(IQ3_XXS, codes_iq3_xxs, scales_iq3_xxs, IQ3_XXS_VALUES)
add_iq3_s = adding_single(IQ3_S, codes_iq3_s, scales_iq3_s, IQ3_S_VALUES)


# IQ1_S: scales are of 32, which are four bytes of one element in natural order, so a lane. Two blocks are the lanes of one vector
DOTS_0, DOTS_1, DOTS_2, DOTS_3, DOTS_4, DOTS_5, DOTS_6, DOTS_7 = (dots_of_two(64 * i, PAIR_LOWER) for i in range(8))
ODD_SCALES = float_table([2.0 * (q & 7) + 1 for q in range(16)])
# With the delta's sign on top of a scale: what the sum of the activations is multiplied with, as levels have 1 added
SHIFTS = float_table([-9 / 8 if q & 8 else -7 / 8 for q in range(16)])


@inline
def weigh_pair(sums, upper, lower, q, a, b, xi):
    """Return sums + scales (codes . pair of superblocks), of which these are the dots.

    q: the int16 of blocks at a and b that have scales in their four upper bits.
    """
    scales = q >> 12
    products = multiply_add(to_floats((upper << 8) + lower), SHIFTS(scales), load_floats(xi, PAIR_SUMS))      # exact
    return multiply_add(sums, products, ODD_SCALES(scales) * pair_of_halves(a, b) * load_floats(xi, PAIR_SCALES))


@inline
def add_iq1_s_for_two(sums, other_sums, row, other_row, i, n, x):
    (a, b), (c, e) = two_blocks(row, IQ1_S, i, n), two_blocks(other_row, IQ1_S, i, n)
    (q, upper), (other_q, other_upper) = pair_of_int16(a, b, 34), pair_of_int16(c, e, 34)
    indices = pair_of_indices(a, b, 2), pair_of_indices(c, e, 2)
    low, high, other_low, other_high = IQ1_HALVES(indices, (THREE_BITS(upper), THREE_BITS(other_upper)))
    xi, zero = x + SUPERBLOCK * i, no_sums()
    dots = DOTS_0((zero, zero, zero, zero), low_codes(low), low_codes(other_low), xi)
    dots = DOTS_1(dots, low_codes(low >> 2), low_codes(other_low >> 2), xi)
    dots = DOTS_2(dots, low_codes(low >> 4), low_codes(other_low >> 4), xi)
    dots = DOTS_3(dots, low_codes(low >> 6), low_codes(other_low >> 6), xi)
    dots = DOTS_4(dots, low_codes(high), low_codes(other_high), xi)
    dots = DOTS_5(dots, low_codes(high >> 2), low_codes(other_high >> 2), xi)
    dots = DOTS_6(dots, low_codes(high >> 4), low_codes(other_high >> 4), xi)
    dots = DOTS_7(dots, low_codes(high >> 6), low_codes(other_high >> 6), xi)
    return weigh_pair(sums, dots[0], dots[1], q, a, b, xi), weigh_pair(other_sums, dots[2], dots[3], other_q, c, e, xi)


@inline
def add_four_dots(sums, v, at, offset):
    """Add the products of the four codes of each byte."""
    sums = add_byte_dot(add_byte_dot(sums, low_codes(v), at, offset), low_codes(v >> 2), at, offset + 64)
    return add_byte_dot(add_byte_dot(sums, low_codes(v >> 4), at, offset + 128), low_codes(v >> 6), at, offset + 192)


@inline
def add_iq1_s(sums, row, i, n, x):
    a, b = two_blocks(row, IQ1_S, i, n)
    q, upper = pair_of_int16(a, b, 34)
    low, high = IQ1_HALVES((pair_of_indices(a, b, 2),), (THREE_BITS(upper),))
    xi = x + SUPERBLOCK * i
    upper_dots = add_four_dots(add_four_dots(no_sums(), low, xi, 0), high, xi, 256)
    lower_dots = add_four_dots(add_four_dots(no_sums(), low, xi, PAIR_LOWER), high, xi, PAIR_LOWER + 256)
    return weigh_pair(sums, upper_dots, lower_dots, q, a, b, xi)


add_iq1_s.for_two = add_iq1_s_for_two


def dot_bytes_iq1_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq1_s, single_sum, floats(np.float32(0)), IQ1_S, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq1_m(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq1_m, a_64th, floats(np.float32(0)), IQ1_M, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq2_xxs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq2_xxs, an_eighth, floats(np.float32(0)), IQ2_XXS, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq2_xs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq2_xs, an_eighth, floats(np.float32(0)), IQ2_XS, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq2_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq2_s, an_eighth, floats(np.float32(0)), IQ2_S, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq3_xxs(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq3_xxs, a_quarter, floats(np.float32(0)), IQ3_XXS, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq3_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq3_s, single_sum, floats(np.float32(0)), IQ3_S, 1, rows, n_rows, n, x_at, n_tokens, out_at, offset)


DOTS = {"IQ1_S": dot_bytes_iq1_s, "IQ1_M": dot_bytes_iq1_m, "IQ2_XXS": dot_bytes_iq2_xxs, "IQ2_XS": dot_bytes_iq2_xs,
        "IQ2_S": dot_bytes_iq2_s, "IQ3_XXS": dot_bytes_iq3_xxs, "IQ3_S": dot_bytes_iq3_s}
