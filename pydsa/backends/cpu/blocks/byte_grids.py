"""IQ1_S to IQ3_S times a few tokens, with lookups of bytes.

byte_codes.py says where. It takes half of the lookups and shifts that grids.py takes.

Two blocks are looked up together where an index has eight weights, so that a table serves 64 indices at once.
"""
import numpy as np

from pydsa.backends.cpu.blocks.block import SCALES, SUPERBLOCK, SUMS
from pydsa.backends.cpu.blocks.dots import dot_large, single_sum, two_blocks
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.vectors.byte_codes import (BY_SIGN, add_byte_dot, as_int32, biased_values, byte_entries, byte_values, eight_u32,
                                                   even_with_parity, load_bytes, load_sums, low_codes, no_sums, pair_entries, pair_halves,
                                                   pair_of_bytes, pair_of_u64, picked_pair, repeated_u32, repeated_u64, selecting,
                                                   signed_codes, to_tops, unaligned, unaligned_of_four, upper_nibbles, with_last_tops)
from pydsa.backends.cpu.vectors.byte_pairs import (PAIR_BIAS, PAIR_BIASES, PAIR_LOWER, PAIR_SCALES, PAIR_SUMS, dots_of_two, float_table,
                                                   pair_of_halves, pair_of_indices, pair_of_int16, pair_of_scales, pair_of_spread_halves)
from pydsa.backends.cpu.vectors.scalars import half_at
from pydsa.backends.cpu.vectors.simd import floats, load_floats, multiply_add, to_floats
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
IQ1_HALVES = pair_halves(IQ1_PACKED)
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


def odd_scales(offset_of_lane, bits, load, offset):
    """Make a function that returns twice a scale plus one for each lane.

    As i32x16, of the block at an address: load(at, offset) gives integers of 64 bits, where the scale of a lane begins at offset_of_lane.
    """
    pick, mask = unaligned([offset_of_lane(lane) - 1 for lane in range(16) for _ in range(4)]), 2 ** (bits + 1) - 1

    @inline
    def scales(at):
        return (as_int32(pick(load(at, offset))) & mask) | 1
    return scales


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


add_iq2_values = adding(IQ2_VALUES)
add_iq2_xxs = adding_pairs(IQ2_XXS, IQ2_XXS_ENTRIES, indices_iq2_xxs, codes_iq2_xxs, scales_iq2_xxs, first_half, add_iq2_values)
add_iq2_xs = adding_pairs(IQ2_XS, IQ2_XS_ENTRIES, indices_iq2_xs, codes_iq2_xs, scales_iq2_xs, first_half, add_iq2_values)
add_iq2_s = adding_pairs(IQ2_S, IQ2_S_ENTRIES, indices_iq2_s, codes_iq2_s, scales_iq2_s, first_half, add_iq2_values)
add_iq3_xxs = adding_single(IQ3_XXS, codes_iq3_xxs, scales_iq3_xxs, IQ3_XXS_VALUES)
add_iq3_s = adding_single(IQ3_S, codes_iq3_s, scales_iq3_s, IQ3_S_VALUES)


# IQ1: a lane is four bytes of one element, in natural order, so 32 weights; two blocks are the lanes of one vector
DOTS_0, DOTS_1, DOTS_2, DOTS_3, DOTS_4, DOTS_5, DOTS_6, DOTS_7 = (dots_of_two(64 * i, PAIR_LOWER) for i in range(8))


def adding_joined(size, decode, first, second, third, last, begin, weigh):
    """Make the `add` of a type whose two blocks are one vector of sums.

    It has a function for two rows. decode(a, b) returns the indices of blocks at a and b, bits 8 to 10 of them, and what `first`, `second`,
    `third` and `last`, which make four vectors of factors of a lookup's bytes, and `weigh` take besides. begin(pair of superblocks) is what
    the lower sums begin with; weigh(sums, upper, lower, rest, a, b, pair) adds them.
    """
    @inline
    def add_four_dots(sums, v, rest, at, offset):
        sums = add_byte_dot(add_byte_dot(sums, first(v, rest), at, offset), second(v, rest), at, offset + 64)
        return add_byte_dot(add_byte_dot(sums, third(v, rest), at, offset + 128), last(v, rest), at, offset + 192)

    @inline
    def add(sums, row, i, n, x):
        a, b = two_blocks(row, size, i, n)
        index, bits, rest = decode(a, b)
        low, high = IQ1_HALVES((index,), (bits,))
        xi = x + SUPERBLOCK * i
        upper_dots = add_four_dots(add_four_dots(no_sums(), low, rest, xi, 0), high, rest, xi, 256)
        lower_dots = add_four_dots(add_four_dots(begin(xi), low, rest, xi, PAIR_LOWER), high, rest, xi, PAIR_LOWER + 256)
        return weigh(sums, upper_dots, lower_dots, rest, a, b, xi)

    @inline
    def add_for_two(sums, other_sums, row, other_row, i, n, x):
        (a, b), (c, e) = two_blocks(row, size, i, n), two_blocks(other_row, size, i, n)
        (index, bits, rest), (other_index, other_bits, other_rest) = decode(a, b), decode(c, e)
        low, high, other_low, other_high = IQ1_HALVES((index, other_index), (bits, other_bits))
        xi = x + SUPERBLOCK * i
        # each when it is multiplied, or LLVM spills tables; in two chains, or a product waits longer for the one before
        dots = DOTS_0((no_sums(), begin(xi), no_sums(), begin(xi)), first(low, rest), first(other_low, other_rest), xi)
        dots = DOTS_1(dots, second(low, rest), second(other_low, other_rest), xi)
        dots = DOTS_2(dots, third(low, rest), third(other_low, other_rest), xi)
        dots = DOTS_3(dots, last(low, rest), last(other_low, other_rest), xi)
        more = DOTS_4((no_sums(), no_sums(), no_sums(), no_sums()), first(high, rest), first(other_high, other_rest), xi)
        more = DOTS_5(more, second(high, rest), second(other_high, other_rest), xi)
        more = DOTS_6(more, third(high, rest), third(other_high, other_rest), xi)
        more = DOTS_7(more, last(high, rest), last(other_high, other_rest), xi)
        return (weigh(sums, dots[0] + more[0], dots[1] + more[1], rest, a, b, xi),
                weigh(other_sums, dots[2] + more[2], dots[3] + more[3], other_rest, c, e, xi))
    add.for_two = add_for_two
    return add


# IQ1_S: scales are of 32, so of a lane. The delta is a factor of the sums, as codes are multiplied as they are
THREE_BITS = unaligned([16 * (i % 8 // 4) + 3 * (i % 4) - 4 for i in range(64)])
ODD_SCALES = float_table([2.0 * (q & 7) + 1 for q in range(16)])
# With the delta's sign on top of a scale: what the sum of the activations is multiplied with, as levels have 1 added
SHIFTS = float_table([-9 / 8 if q & 8 else -7 / 8 for q in range(16)])


@inline
def decode_iq1_s(a, b):
    q, wide = pair_of_int16(a, b, 34)
    return pair_of_indices(a, b, 2), THREE_BITS(wide), q


def low_code(shift):
    """Make a function that returns two bits of each byte as they are."""
    @inline
    def code(v, _):
        return low_codes(v >> shift)
    return code


@inline
def begin_iq1_s(xi):
    return no_sums()


@inline
def weigh_iq1_s(sums, upper, lower, q, a, b, xi):
    """q: the int16 of the blocks that have scales in their four upper bits."""
    scales = q >> 12
    products = multiply_add(to_floats((upper << 8) + lower), SHIFTS(scales), load_floats(xi, PAIR_SUMS))      # exact
    return multiply_add(sums, products, ODD_SCALES(scales) * pair_of_halves(a, b) * load_floats(xi, PAIR_SCALES))


# IQ1_M: scales are of 16, and deltas of 8; they are looked up with the code: four times the product of scale and weight, and 135/2 added,
# which makes it an integer of eight bits, and the same for all, so that it is multiplied with the sum of the activations beforehand
FOUR_BITS = unaligned([4 * (i % 8) - 4 for i in range(64)])
SCALES_AT_2 = unaligned([16 * (i % 32 // 8) + 3 * (i % 8 // 2) - 2 for i in range(64)])
DELTA_AT_5, CODE_AT_0, CODE_AT_4 = selecting(0x20), selecting(0x03), selecting(0x30)


def iq1_m_value(code, delta, scale):
    """Return the value of a code, 0 to 2; there is no 3."""
    return (PAIR_BIAS + (2 * scale + 1) * (8 * (code - 1) + (-1 if delta else 1))) // 2 if code < 3 else 0


# With the code in bits 0 and 1, then scale and delta; or with those first, and the code above
VALUES_AT_0 = byte_values([iq1_m_value(q & 3, q >> 5, q >> 2 & 7) for q in range(64)])
VALUES_AT_4 = byte_values([iq1_m_value(q >> 4, q >> 3 & 1, q & 7) for q in range(64)])


@inline
def decode_iq1_m(a, b):
    bits = FOUR_BITS(pair_of_int16(a, b, 32)[1])
    return pair_of_indices(a, b, 0), bits, DELTA_AT_5(as_int32(bits) >> 2, SCALES_AT_2(pair_of_scales(a, b, 48)))


def value_at_0(shift):
    """Make a function that returns the values of codes in bits 0 and 1."""
    @inline
    def value(v, rest):
        return VALUES_AT_0(CODE_AT_0(v >> shift, rest))
    return value


def value_at_4(shift):
    """Make a function that returns the values of codes in bits 4 and 5."""
    @inline
    def value(v, rest):
        return VALUES_AT_4(CODE_AT_4(v >> shift, as_int32(rest) >> 2))
    return value


@inline
def begin_iq1_m(xi):
    return load_sums(xi, PAIR_BIASES)


@inline
def weigh_iq1_m(sums, upper, lower, q, a, b, xi):
    return multiply_add(sums, to_floats((upper << 8) + lower), pair_of_spread_halves(a, b) * load_floats(xi, PAIR_SCALES))


add_iq1_s = adding_joined(IQ1_S, decode_iq1_s, low_code(0), low_code(2), low_code(4), low_code(6), begin_iq1_s, weigh_iq1_s)
add_iq1_m = adding_joined(IQ1_M, decode_iq1_m, value_at_0(0), value_at_0(2), value_at_4(0), value_at_4(2), begin_iq1_m, weigh_iq1_m)


def dot_bytes_iq1_s(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq1_s, single_sum, floats(np.float32(0)), IQ1_S, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


def dot_bytes_iq1_m(rows, n_rows, n, x_at, n_tokens, out_at, offset):
    dot_large(add_iq1_m, a_quarter, floats(np.float32(0)), IQ1_M, 2, rows, n_rows, n, x_at, n_tokens, out_at, offset)


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
