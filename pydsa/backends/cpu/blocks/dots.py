"""Dot products of blocks with superblocks of activations: what the families' kernels are made of."""
from pydsa.backends.cpu.blocks.block import SCALES, SUPERBLOCK, places
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.lanes import first_quarter, last_quarter, lower_half, row_sums, second_quarter, spread, third_quarter, upper_half
from pydsa.backends.cpu.simd import (as_int8, as_int16, dot, dot_add, float_at, join, load_4_floats, load_int16, multiply_add, prefetch,
                                     signed_high_bytes, stack_memory, store, to_floats)


AHEAD = 4096    # bytes that a product asks for ahead of those it reads: more than the hardware's own prefetch does


@inline
def store_sum(sums, v, r, n_rows, out):
    """out[r] = the sum of v's lanes, written when sixteen rows are there, or the last one: the vectors wait in stack_memory() at `sums`."""
    i = r & 15
    store(sums, 64 * i, v)
    if i == 15:
        store(out, 4 * (r - 15), row_sums(sums))
    elif r == n_rows - 1:
        store(sums, 0, row_sums(sums))
        for j in range(i + 1):
            store(out, 4 * (r - i + j), float_at(sums, 4 * j))


@inline
def alone(sums):
    """The total of one vector of sums."""
    return sums


@inline
def dot_rows(add, total, nothing, row_bytes, step, rows, n_rows, n, x, out):
    """A BlockType's dot: out[r] = total(sums) of row r, after sums = add(sums, row, i, n, x) for i = 0, step, ... < n, from `nothing` on.

    Two rows at a time, from either half of all rows: memory is read in two places at once, which is a fifth faster than in one, and
    activations are loaded once for both.
    """
    first, second = stack_memory(), stack_memory()
    half = (n_rows + 1) // 2
    for r in range(half):
        one, other = nothing, nothing
        row, other_row = rows + r * row_bytes, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            one = add(one, row, i, n, x)
            other = add(other, other_row, i, n, x)
        store_sum(first, total(one), r, half, out)
        if r + half < n_rows:
            store_sum(second, total(other), r, n_rows - half, out + 4 * half)


@inline
def store_halves(superblock, first, second, v):
    """The halves of a vector of words at two offsets."""
    store(superblock, first, lower_half(v))
    store(superblock, second, upper_half(v))


@inline
def dot_pair(sums, even, odd, x, offset, scales):
    """sums + scales (even, odd) . 64 words of x: the even and the odd elements of the same 32s."""
    return multiply_add(sums, to_floats(dot_add(dot(even, load_int16(x, offset)), odd, load_int16(x, offset + 64))), scales)


@inline
def four_blocks(row, size, i, n):
    """The addresses of blocks i to i + 3 of a row of n blocks of `size` bytes; the last block stands for those that are not there."""
    last = n - 1
    return row + size * i, row + size * min(i + 1, last), row + size * min(i + 2, last), row + size * min(i + 3, last)


@inline
def next_blocks(row, size, i, n):
    """four_blocks, after asking for those AHEAD of them."""
    at = four_blocks(row, size, i, n)
    prefetch(at[0], AHEAD)
    prefetch(at[0], AHEAD + 64)
    return at


@inline
def joined(addresses, offset):
    """The 16 bytes at an offset of four blocks, side by side."""
    return join((addresses[0] + offset, addresses[1] + offset, addresses[2] + offset, addresses[3] + offset))


@inline
def nibbles(v):
    """Bytes -> their low nibbles, their high nibbles."""
    return v & 15, as_int8((as_int16(v) >> 4) & 0x0F0F)


@inline
def superblock_at(x, i):
    """The chunk of the i-th 32, the offset of its words, and that of its float32s from the first of their kind."""
    return x + SUPERBLOCK * (i >> 3), 64 * (i & 7), 4 * (i & 7)


# Four blocks of 32 whose bytes have the element j in their low nibble and j + 16 in the high one: low even, low odd, high even, high odd
BY_QUARTERS = places(*[16 * part + 4 * block + i for part in (0, 1) for i in (0, 2, 1, 3) for block in range(4)])
QUARTERS = spread(0, 1, 2, 3)


@inline
def unsigned_quad(low, high):
    """Bytes with the elements j and j + 16 of four blocks, 0 to 255, as four vectors of words: low even, low odd, high even, high odd."""
    low, high = as_int16(low), as_int16(high)
    return low & 255, low >> 8, high & 255, high >> 8


@inline
def signed_quad(low, high):
    """unsigned_quad of bytes from -128 to 127."""
    low, high = as_int16(low), as_int16(high)
    return signed_high_bytes(low << 8), signed_high_bytes(low), signed_high_bytes(high << 8), signed_high_bytes(high)


@inline
def dot_quad(sums, w, x, offset, scales):
    """sums + scales w . 128 words of x; w are four vectors in the order of BY_QUARTERS."""
    dots = dot_add(dot(w[0], load_int16(x, offset)), w[1], load_int16(x, offset + 64))
    dots = dot_add(dot_add(dots, w[2], load_int16(x, offset + 128)), w[3], load_int16(x, offset + 192))
    return multiply_add(sums, to_floats(dots), QUARTERS(scales))


@inline
def add_quad(sums, w, x, i, d):
    """sums + d w . the i-th to (i + 3)-rd 32 of a row of chunks; w in the order of BY_QUARTERS, d a scale for each 32."""
    xi, words, number = superblock_at(x, i)
    return dot_quad(sums, w, xi, words, d * load_4_floats(xi, SCALES + number))


@inline
def store_quarters(superblock, at, v):
    """The quarters of a vector of words to the same place of four 32s."""
    store(superblock, at, first_quarter(v))
    store(superblock, at + 64, second_quarter(v))
    store(superblock, at + 128, third_quarter(v))
    store(superblock, at + 192, last_quarter(v))


@inline
def store_quad(superblock, at, w):
    """Four vectors in the order of BY_QUARTERS to four 32s of a chunk."""
    store_quarters(superblock, at, w[0])
    store_quarters(superblock, at + 32, w[1])
    store_quarters(superblock, at + 16, w[2])
    store_quarters(superblock, at + 48, w[3])
