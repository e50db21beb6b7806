"""Offsets of weights, of types that have them: they meet sums of activations, which come in stages of 64 before the activations.

add_offsets(sums, parts, words, w, row, row_8, n_groups, c, shared, packed, last, rows, thread) adds their products to a lane's
sums. row, row_8: where its rows g and g + 8 begin in w. c = lane % 4. parts, words: room for sums, zeros, and for 16 words of A.
"""
import numpy as np

from pydsa.backends.cuda.f16x2.halves import two_numbers
from pydsa.backends.cuda.f16x2.stages import add_scaled, clear
from pydsa.backends.cuda.intrinsics.device import device, half_at, of_half, to_half, u32_at
from pydsa.backends.cuda.intrinsics.hopper import make_wgmma, make_wgmma_wait
from pydsa.backends.cuda.intrinsics.instructions import read_sixteen
from pydsa.quants import TYPES


U = np.uint32


def make_mins(name, put, sums_of_group):
    """A function that makes add_offsets() of a Ring.

    It is that of types whose blocks have whole offsets with one factor, sixteen for 16 weights each or eight for 32. put: below.
    """
    n_bytes, each = TYPES[name].n_bytes, 2 // sums_of_group        # each: blocks that share 16 columns

    def make_add_offsets(ring):
        tokens, low_part, next_stage = ring.tokens, ring.low_part, ring.next_stage
        start, wait = make_wgmma(tokens, 1, 2), make_wgmma_wait(tokens, 4)

        @device
        def add_offsets(sums, parts, words, w, row, row_8, n_groups, c, shared, packed, last, rows, thread):
            """sums += the products of all offsets and sums of activations.

            A stage has 64 of these. parts: zeros, before and after.
            """
            there = np.uint64(0)
            for block in range(np.int32(0), np.int32(n_groups >> 3), np.int32(1)):
                step = block // each & 3
                if block & 4 * each - 1 == 0:
                    there = next_stage(shared, packed, block // (4 * each), last, rows, thread)
                d = put(words, 0, w, row + n_bytes * np.int64(block), c, block & each - 1)
                d_8 = put(words, 1, w, row_8 + n_bytes * np.int64(block), c, block & each - 1)
                start(parts, words, there + np.uint64(2 * step), there + np.uint64(2 * step) + low_part)
                wait(parts, words)
                add_scaled(sums, 0, parts, d, d_8, tokens)
                clear(parts, tokens)
        return add_offsets
    return make_add_offsets


@device
def put_mins_q4_k(words, of, data, at, c, half):
    """The eight offsets of a block of Q4_K or Q5_K as words of A.

    The words are for 16 sums, of which eight meet zeros. of: 0, or 1 for the row g + 8. half: which eight of the sums are the block's.
    Returns their factor.
    """
    dmin, _, b, d = read_sixteen(data, at)
    shift = U(16) * (c & U(1))
    b, d = b >> shift, d >> shift
    m = b & U(0x3F3F) if c < U(2) else d >> U(4) & U(0x0F0F) | b >> U(2) & U(0x3030)
    pair = two_numbers(m & U(63), m >> U(8))
    words[of], words[2 + of] = pair if half == 0 else U(0), pair if half else U(0)
    return -of_half(dmin >> U(16))


@device
def put_mins_q2_k(words, of, data, at, c, half):
    """The sixteen offsets of a block of Q2_K as words of A -> their factor."""
    a, b, shift = u32_at(data, at + (2 * c & 4)), u32_at(data, at + 8 + (2 * c & 4)), U(16) * U(c & 1)
    words[of], words[2 + of] = (two_numbers(a >> shift + U(4) & U(15), a >> shift + U(12) & U(15)),
                                two_numbers(b >> shift + U(4) & U(15), b >> shift + U(12) & U(15)))
    return -half_at(data, at + 82)


def _make_add_m(name):
    """As make_mins, of types whose groups have an offset each, a float16."""
    n_bytes = TYPES[name].n_bytes

    @device
    def offset(data, row, g, n_groups):
        return U(to_half(half_at(data, row + n_bytes * np.int64(min(g, n_groups - 1)) + 2)))

    @device
    def put_offsets(words, of, data, row, g, n_groups):
        """m of 64 groups of Q4_1 or Q5_1 from one on, as a row's words of A.

        g: the first that the lane has. of: 0, or 1 for the row g + 8. Beyond the last group the sums of activations are zero.
        """
        for i in range(8):
            j = g + 8 * i
            words[2 * i + of] = offset(data, row, j, n_groups) | offset(data, row, j + 1, n_groups) << U(16)

    def make_add_offsets(ring):
        low_part, next_stage = ring.low_part, ring.next_stage
        add, wait = make_wgmma(ring.tokens, 4, 2), make_wgmma_wait(ring.tokens, 16)

        @device
        def add_offsets(sums, parts, words, w, row, row_8, n_groups, c, shared, packed, last, rows, thread):
            for stage in range(np.int32(0), np.int32(n_groups + 63 >> 6), np.int32(1)):
                there = next_stage(shared, packed, stage, last, rows, thread)
                put_offsets(words, 0, w, row, np.int32(64 * stage + 2 * np.int32(c)), n_groups)
                put_offsets(words, 1, w, row_8, np.int32(64 * stage + 2 * np.int32(c)), n_groups)
                add(sums, words, there, there + low_part)
                wait(sums, words)
        return add_offsets
    return make_add_offsets


# type -> offsets of a group of 32 weights, and what makes add_offsets() of a Ring
OFFSETS = {name: (1, make_mins(name, put_mins_q4_k, 1)) for name in ("Q4_K", "Q5_K")} | {
    "Q2_K": (2, make_mins("Q2_K", put_mins_q2_k, 2)), "Q4_1": (1, _make_add_m("Q4_1")), "Q5_1": (1, _make_add_m("Q5_1"))}
