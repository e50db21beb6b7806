"""Weights of all types as rows of float16 in shared memory.

Lanes read their words of A from there. Each lane of a warp unpacks 32 weights of one of its 16 rows for a stage of 64: lanes 0 to 15 the
first 32, the others the second. Integers are multiplied by the whole scale that their block has for them, so that what is left is one
factor a block; float16 holds the products, but those above 2,048: these are two float16, of which the second one is what the first one
leaves.

A row has 128 bytes, eight pieces of 16; piece i of row r is at i ^ (r % 8), as ldmatrix reads eight rows in eight turns of the banks.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.f16x2.halves import fma_halves, multiply_halves, twice
from pydsa.backends.cuda.f16x2.linear import bf16_to_f16
from pydsa.backends.cuda.f16x2.offsets import OFFSETS
from pydsa.backends.cuda.intrinsics.constants import nothing
from pydsa.backends.cuda.intrinsics.device import bits_float, device, int8_to_f16
from pydsa.backends.cuda.intrinsics.instructions import instruction, read_sixteen
from pydsa.backends.cuda.intrinsics.shared_memory import load_fragments, store_four_words
from pydsa.quants import TYPES


WARP_BYTES = 16 * 128       # of a warp's rows
U, ONE = np.uint32, np.float32(1)
SIGNS = U(0x80008000)       # of two float16
REST = U(WARP_BYTES)        # where what is left of weights lies, behind the weights
TWO_NUMBERS = {"Q6_K", "IQ4_XS"}        # types whose weights are two float16
NO_FACTOR = 8               # groups whose products are summed before they join others, where weights have no factor
AHEAD = 8                   # groups whose weights are asked for, so that they are in L2 when they are needed
prefetch = instruction("prefetch.global.L2 [$0];", "", "g", fixed=True)


class Rows(NamedTuple):
    """How weights of a type become words of A."""
    unpack: object      # unpack(place, data, row, g) -> the factor of group g, which it stores; place: of its first piece
    prepare: object     # prepare(thread, n_threads), before that
    groups: int         # that share a factor; NO_FACTOR where that is 1
    rest: bool          # whether weights are two float16
    sums_of_group: int      # offsets of a group: 0, 1 or 2
    make_offsets: object    # makes add_offsets() of a Ring (offsets.py), or None
    bytes: int          # of a row's block
    shift: int          # the binary logarithm of the number of its groups


def _make_put(rest):
    @device
    def put(place, first, second, scale):
        """Store eight int8, two uint32, times a scale, two equal float16."""
        a, b = int8_to_f16(U(first))
        c, e = int8_to_f16(U(second))
        p, q, r, s = multiply_halves(a, scale), multiply_halves(b, scale), multiply_halves(c, scale), multiply_halves(e, scale)
        store_four_words(place, p, q, r, s)
        if rest:
            store_four_words(place + REST, fma_halves(a, scale, p ^ SIGNS), fma_halves(b, scale, q ^ SIGNS),
                             fma_halves(c, scale, r ^ SIGNS), fma_halves(e, scale, s ^ SIGNS))
    return put


@device
def put_bytes(place, first, second):
    """Store eight int8, two uint32."""
    a, b = int8_to_f16(U(first))
    c, e = int8_to_f16(U(second))
    store_four_words(place, a, b, c, e)


def _make_unpack(group, scales, rest):
    put = _make_put(rest)

    @device
    def unpack(place, data, row, g):
        a, b, c, e, f, h, i, j, d, _, _, _ = group(data, row, g)
        if scales is None:
            put_bytes(place, a, b)
            put_bytes(place ^ U(16), c, e)
            put_bytes(place ^ U(32), f, h)
            put_bytes(place ^ U(48), i, j)
        else:
            d, s, s1 = scales(data, row, g)
            first, second = twice(s), twice(s1)
            put(place, a, b, first)
            put(place ^ U(16), c, e, first)
            put(place ^ U(32), f, h, second)
            put(place ^ U(48), i, j, second)
        return d
    return unpack


@device
def unpack_f16(place, data, row, g):
    """unpack() of float16 weights, unchanged."""
    for i in range(4):
        a, b, c, d = read_sixteen(data, row + 64 * g + 16 * i)
        store_four_words(place ^ U(16 * i), a, b, c, d)
    return ONE


@device
def greatest_exponent(most, a, b, c, d):
    """The greatest exponent of eight bfloat16 and of one before, in its place."""
    for pair in (a, b, c, d):
        most = max(most, max(np.int32(pair & U(0x7F80)), np.int32(pair >> U(16) & U(0x7F80))))
    return most


@device
def unpack_bf16(place, data, row, g):
    """unpack() of bfloat16 weights, scaled by a power of two to float16.

    Values below 2^-29 of the group's largest lose bits.
    """
    most = np.int32(0)
    for i in range(4):
        a, b, c, d = read_sixteen(data, row + 64 * g + 16 * i)
        most = greatest_exponent(most, a, b, c, d)
    exponent = min(max(most >> np.int32(7), np.int32(16)), np.int32(254))          # of the largest value, which becomes about 2^14
    factor = bits_float(U(U(268 - exponent) << U(23)))
    for i in range(4):
        a, b, c, d = read_sixteen(data, row + 64 * g + 16 * i)
        store_four_words(place ^ U(16 * i), bf16_to_f16(a, factor), bf16_to_f16(b, factor), bf16_to_f16(c, factor), bf16_to_f16(d, factor))
    return bits_float(U(U(exponent - 14) << U(23)))


def _make_rows(name, entry):
    size, n_bytes, rest = TYPES[name].size, TYPES[name].n_bytes, name in TWO_NUMBERS
    sums_of_group, make_offsets = OFFSETS.get(name, (0, None))
    groups = NO_FACTOR if name == "NVFP4" else size // 32
    return Rows(_make_unpack(entry.group, entry.scales, rest), entry.prepare, groups, rest, sums_of_group, make_offsets, n_bytes,
                (size // 32).bit_length() - 1)


UNPACKED = {name: _make_rows(name, entry) for name, entry in GROUPED.items() if name not in ("Q4_K", "Q5_K")}
UNPACKED |= {"F16": Rows(unpack_f16, nothing, NO_FACTOR, False, 0, None, 64, 0),
             "BF16": Rows(unpack_bf16, nothing, 1, False, 0, None, 64, 0)}


def make_load(group, rest):
    """load(words, read): a lane's words of A for a group of its rows.

    They are 8, and 8 of what is left of the weights. group: 0 or 1, the first or second 32 weights of a stage.
    """
    @device
    def load(words, read):
        for step in range(2):
            place = U(read ^ U(64 * group + 32 * step))
            words[4 * step], words[4 * step + 1], words[4 * step + 2], words[4 * step + 3] = load_fragments(place)
            if rest:
                words[8 + 4 * step], words[9 + 4 * step], words[10 + 4 * step], words[11 + 4 * step] = load_fragments(place + REST)
    return load


@device
def place_to_write(base, lane):
    """The place of the first piece that a lane writes.

    base: of its warp's rows.
    """
    return U(base + U(128) * (lane & U(15)) + (U(64) * (lane >> U(4)) ^ U(16) * (lane & U(7))))


@device
def place_to_read(base, lane):
    """The place whose first matrix's row a lane names to ldmatrix."""
    return U(base + U(128) * (lane & U(15)) + (U(16) * (lane >> U(4)) ^ U(16) * (lane & U(7))))
