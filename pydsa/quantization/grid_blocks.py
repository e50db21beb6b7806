"""The blocks of IQ1_S to IQ3_S: where the bits of indices, signs and scales are."""
import numpy as np

from pydsa.backends.cpu.jit import inner

IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S = range(7)
NAMES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


@inner
def put(block, at, n, value):
    """Store n bytes of an integer, the lowest first."""
    for i in range(n):
        block[at + i] = np.uint8(value & 255)
        value >>= 8


@inner
def index_at(grid, work, g):
    """Return the entry of group g."""
    return grid.entries[work.codes[g]]


@inner
def sign_bits(work, eight):
    """Return the signs of eight numbers, a bit each."""
    return work.signs[eight] ^ work.changed[eight]


@inner
def seven_signs(work, j):
    """Return 28 bits: seven signs of four times eight numbers, from 4 j on.

    They tell the eighth, as the number of minus signs is even.
    """
    bits = 0
    for i in range(4):
        bits |= (sign_bits(work, 4 * j + i) & 127) << (7 * i)
    return bits


@inner
def nibbles_of_k(k, block, at):
    """Store four bits of each k, two in a byte."""
    for j in range(0, k.size, 2):
        block[at + j // 2] = np.uint8(k[j] | k[j + 1] << 4)


@inner
def store_iq2_xxs(grid, work, d, block):
    """Per 32: four bytes of indices, and four times 7 signs below k."""
    put(block, 0, 2, d)
    for j in range(8):
        for i in range(4):
            block[2 + 8 * j + i] = np.uint8(index_at(grid, work, 4 * j + i))
        put(block, 6 + 8 * j, 4, seven_signs(work, j) | work.k[j] << 28)


@inner
def store_iq2_xs(grid, work, d, block):
    """Per 8: nine bits of index below seven of signs; then the k."""
    put(block, 0, 2, d)
    for g in range(32):
        put(block, 2 + 2 * g, 2, index_at(grid, work, g) | (sign_bits(work, g) & 127) << 9)
    nibbles_of_k(work.k, block, 66)


@inner
def store_iq2_s(grid, work, d, block):
    """Low bytes of indices, signs, four times two upper bits a byte, k."""
    put(block, 0, 2, d)
    for j in range(8):
        high = 0
        for i in range(4):
            g = 4 * j + i
            index = index_at(grid, work, g)
            block[2 + g], block[34 + g] = np.uint8(index & 255), np.uint8(sign_bits(work, g))
            high |= (index >> 8) << (2 * i)
        block[66 + j] = np.uint8(high)
    nibbles_of_k(work.k, block, 74)


@inner
def store_iq3_xxs(grid, work, d, block):
    """A byte for each index, then per 32 four times 7 signs below k."""
    put(block, 0, 2, d)
    for g in range(64):
        block[2 + g] = np.uint8(index_at(grid, work, g))
    for j in range(8):
        put(block, 66 + 4 * j, 4, seven_signs(work, j) | work.k[j] << 28)


@inner
def store_iq3_s(grid, work, d, block):
    """Low bytes of indices, eight upper bits a byte, signs, k."""
    put(block, 0, 2, d)
    for j in range(8):
        high = 0
        for i in range(8):
            index = index_at(grid, work, 8 * j + i)
            block[2 + 8 * j + i] = np.uint8(index & 255)
            high |= (index >> 8) << i
        block[66 + j] = np.uint8(high)
    for eight in range(32):
        block[74 + eight] = np.uint8(sign_bits(work, eight))
    nibbles_of_k(work.k, block, 106)


@inner
def store_iq1_s(grid, work, d, block):
    """Low bytes of indices; per 32 four times three upper bits, k, offset."""
    put(block, 0, 2, d)
    for j in range(8):
        high = work.k[j] << 12 | np.int64(work.offset[0, 4 * j] < 0) << 15
        for i in range(4):
            index = index_at(grid, work, 4 * j + i)
            block[2 + 4 * j + i] = np.uint8(index & 255)
            high |= (index >> 8) << (3 * i)
        put(block, 34 + 2 * j, 2, high)


@inner
def store_iq1_m(grid, work, d, block):
    """Low bytes; per 8 upper bits and offset; four k and a fourth of d."""
    for j in range(16):
        high = 0
        for i in range(2):
            index = index_at(grid, work, 2 * j + i)
            block[2 * j + i] = np.uint8(index & 255)
            high |= ((index >> 8) | np.int64(work.offset[0, 2 * j + i] < 0) << 3) << (4 * i)
        block[32 + j] = np.uint8(high)
    for j in range(4):
        word = ((np.int64(d) >> (4 * j)) & 15) << 12
        for i in range(4):
            word |= work.k[4 * j + i] << (3 * i)
        put(block, 48 + 2 * j, 2, word)


@inner
def store_block(grid, work, d, block):
    """Store what was chosen as a block of the grid's type, uint8 [bytes]."""
    if grid.kind == IQ1_S:
        store_iq1_s(grid, work, d, block)
    elif grid.kind == IQ1_M:
        store_iq1_m(grid, work, d, block)
    elif grid.kind == IQ2_XXS:
        store_iq2_xxs(grid, work, d, block)
    elif grid.kind == IQ2_XS:
        store_iq2_xs(grid, work, d, block)
    elif grid.kind == IQ2_S:
        store_iq2_s(grid, work, d, block)
    elif grid.kind == IQ3_XXS:
        store_iq3_xxs(grid, work, d, block)
    else:
        store_iq3_s(grid, work, d, block)
