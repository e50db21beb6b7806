"""Q4_K and Q5_K: a lane makes its words of A of the file's bytes, in registers.

A weight becomes a whole number, q times its sub-block's scale, at most 1,953, which float16 holds.
"""
import numpy as np

from pydsa.backends.cuda.f16x2.halves import HALF_1024, fma_halves, multiply_halves, subtract_halves, twice
from pydsa.backends.cuda.intrinsics.device import device
from pydsa.backends.cuda.intrinsics.instructions import read_sixteen, stream_eight
from pydsa.backends.cuda.intrinsics.shared_memory import anew


RAW = 16            # words of a lane that are not unpacked yet, of two rows, as below
U = np.uint32
LOW, HIGH, ONE = U(0x000F000F), U(0x00F000F0), U(0x00010001)
SIXTEENTH, MINUS_64 = U(0x2C002C00), U(0xD400D400)


@device
def whole(n):
    """A whole number as two float16."""
    return twice(np.float32(np.int32(n)))


def make_put(j, fifth):
    """put(words, raw): the weights of the j-th 64 of a block, as words of A.

    raw: for each of two rows eight words: four of the block's beginning, two of the weights' lower four bits, two of their fifth bits (if
    `fifth`), of which each byte has bits 2 j and 2 j + 1. The first word has d of both rows; those that nobody reads take no registers.
    """
    shift, bit, bit_1 = U(16 * (j & 1)), U(2 * j), U(2 * j + 1)

    @device
    def scales(first, third):
        if j < 2:
            return whole(first >> shift & U(63)), whole(first >> shift + U(8) & U(63))
        return (whole(third >> shift & U(15) | (first >> shift + U(6) & U(3)) << U(4)),
                whole(third >> shift + U(8) & U(15) | (first >> shift + U(14) & U(3)) << U(4)))

    @device
    def low(w, h, scale):
        bits = w & LOW | (h >> bit & ONE) << U(4) if fifth else w & LOW
        return multiply_halves(subtract_halves(bits | HALF_1024, HALF_1024), scale)

    @device
    def high(w, h, scale):
        bits = w & HIGH | (h >> bit_1 & ONE) << U(8) if fifth else w & HIGH     # sixteen times the weights
        return multiply_halves(fma_halves(bits | HALF_1024, SIXTEENTH, MINUS_64), scale)

    @device
    def put(words, raw):
        for r in range(2):
            scale, scale_1 = scales(raw[8 * r + 1], raw[8 * r + 3])
            w, v, h, k = raw[8 * r + 4], raw[8 * r + 5], raw[8 * r + 6], raw[8 * r + 7]
            words[r], words[2 + r], words[4 + r], words[6 + r] = (
                low(w, h, scale), low(w >> U(8), h >> U(8), scale), low(v, k, scale), low(v >> U(8), k >> U(8), scale))
            words[8 + r], words[10 + r], words[12 + r], words[14 + r] = (
                high(w, h, scale_1), high(w >> U(8), h >> U(8), scale_1), high(v, k, scale_1), high(v >> U(8), k >> U(8), scale_1))
    return put


def make_loads(fifth):
    first = 48 if fifth else 16         # where the lower four bits begin in a block

    @device
    def load_block(raw, w, at, apart, c):
        """The beginnings of a block in both rows of a lane, and its fifth bits."""
        at_8 = at + np.int64(anew(apart))       # one register a loop, not two
        d, raw[1], _, raw[3] = read_sixteen(w, at)
        d_8, raw[9], _, raw[11] = read_sixteen(w, at_8)
        raw[0] = d & U(0xFFFF) | d_8 << U(16)
        if fifth:
            raw[6], raw[7] = stream_eight(w, at + 16 + 8 * c)
            raw[14], raw[15] = stream_eight(w, at_8 + 16 + 8 * c)

    @device
    def load_weights(raw, w, at, apart, j, c):
        """A lane's bytes of the j-th 64 weights of a block, in both its rows."""
        at += first + 32 * j + 8 * np.int64(c)
        raw[4], raw[5] = stream_eight(w, at)
        raw[12], raw[13] = stream_eight(w, at + np.int64(anew(apart)))
    return load_block, load_weights
