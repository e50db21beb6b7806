"""Dot products of blocks with superblocks of activations: shared parts."""
from pydsa.backends.cpu.blocks.block import SCALES, SUPERBLOCK, inverse
from pydsa.backends.cpu.jit import inline
from pydsa.backends.cpu.lanes import first_quarter, last_quarter, lower_half, row_sums, second_quarter, spread, third_quarter, upper_half
from pydsa.backends.cpu.simd import (as_int8, as_int16, dot, dot_add, float_at, join, load_4_floats, load_int16, multiply_add, prefetch,
                                     signed_high_bytes, stack_memory, store, to_floats)


AHEAD = 4096    # prefetch distance in bytes, more than the hardware's own prefetch


@inline
def store_sum(sums, v, r, n_rows, out):
    """Store out[r] = the sum of v's lanes, for sixteen rows at a time.

    Vectors are buffered in stack_memory() at `sums` and reduced together after sixteen rows, or after the last row.
    """
    i = r & 15
    store(sums, 64 * i, v)
    if i == 15:
        store(out, 4 * (r - 15), row_sums(sums))
    elif r == n_rows - 1:
        store(sums, 0, row_sums(sums))
        for j in range(i + 1):
            store(out, 4 * (r - i + j), float_at(sums, 4 * j))


@inline
def single_sum(sums):
    """Return the accumulator itself, where a dot has only one."""
    return sums


@inline
def dot_rows(add, total, init, row_bytes, step, rows, n_rows, n, x, out):
    """Compute a type's dot: out[r] = row r . x for n_rows rows.

    For each row: sums = init; sums = add(sums, row, i, n, x) for i = 0, step, ... < n; out[r] = total(sums). Two rows are computed at a
    time, one from each half of all rows: memory is read in two places at once, which is a fifth faster than in one, and activations are
    loaded once for both.
    """
    buffer, other_buffer = stack_memory(), stack_memory()
    half = (n_rows + 1) // 2
    for line in range(0, min(AHEAD, half * row_bytes), 64):
        prefetch(rows, line)
        prefetch(rows + half * row_bytes, line)
    for r in range(half):
        sums, other_sums = init, init
        row, other_row = rows + r * row_bytes, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            sums = add(sums, row, i, n, x)
            other_sums = add(other_sums, other_row, i, n, x)
        store_sum(buffer, total(sums), r, half, out)
        if r + half < n_rows:
            store_sum(other_buffer, total(other_sums), r, n_rows - half, out + 4 * half)


@inline
def store_halves(superblock, first, second, v):
    """Store the two halves of an int16 vector at two offsets."""
    store(superblock, first, lower_half(v))
    store(superblock, second, upper_half(v))


@inline
def dot_pair(sums, even, odd, x, offset, scales):
    """Return sums + scales (even, odd) . 64 int16 of x.

    `even` and `odd` are the even and the odd elements of the same groups of 32.
    """
    return multiply_add(sums, to_floats(dot_add(dot(even, load_int16(x, offset)), odd, load_int16(x, offset + 64))), scales)


@inline
def fetch_ahead(at, n_bytes):
    """Prefetch a block of n_bytes, AHEAD bytes further."""
    for line in range(0, n_bytes, 64):
        prefetch(at, AHEAD + line)


@inline
def two_blocks(row, size, i, n):
    """Return the addresses of blocks i and i + 1 of a row of n blocks.

    Padded by repeating the last block. `size`: bytes of a block.
    """
    return row + size * i, row + size * min(i + 1, n - 1)


@inline
def four_blocks(row, size, i, n):
    """Return the addresses of blocks i to i + 3 of a row of n blocks.

    Padded by repeating the last block. `size`: bytes of a block.
    """
    last = n - 1
    return row + size * i, row + size * min(i + 1, last), row + size * min(i + 2, last), row + size * min(i + 3, last)


@inline
def next_blocks(row, size, i, n):
    """Return four_blocks, and prefetch the blocks AHEAD bytes further."""
    at = four_blocks(row, size, i, n)
    prefetch(at[0], AHEAD)
    prefetch(at[0], AHEAD + 64)
    return at


@inline
def join_blocks(addresses, offset):
    """Join the 16 bytes at an offset of each of four blocks into one vector."""
    return join((addresses[0] + offset, addresses[1] + offset, addresses[2] + offset, addresses[3] + offset))


@inline
def nibbles(v):
    """Split bytes into low nibbles and high nibbles."""
    return v & 15, as_int8((as_int16(v) >> 4) & 0x0F0F)


@inline
def superblock_at(x, i):
    """Locate the i-th group of 32 in a row of superblocks.

    Returns the superblock, the offset of the group's int16, and the offset of its float32 within SCALES or MINS.
    """
    return x + SUPERBLOCK * (i >> 3), 64 * (i & 7), 4 * (i & 7)


# Four blocks of 32 whose bytes hold element j in the low nibble and j + 16 in the high one: low even, low odd, high even, high odd
BY_QUARTERS = inverse(*[16 * part + 4 * block + i for part in (0, 1) for i in (0, 2, 1, 3) for block in range(4)])
QUARTERS, TWICE = spread(0, 1, 2, 3), spread(*range(8))


@inline
def unsigned_quad(low, high):
    """Widen unsigned bytes of four blocks to four int16 vectors.

    The bytes hold elements j (low) and j + 16 (high), 0 to 255. The vectors are low even, low odd, high even, high odd.
    """
    low, high = as_int16(low), as_int16(high)
    return low & 255, low >> 8, high & 255, high >> 8


@inline
def signed_quad(low, high):
    """Do what unsigned_quad does, for bytes from -128 to 127."""
    low, high = as_int16(low), as_int16(high)
    return signed_high_bytes(low << 8), signed_high_bytes(low), signed_high_bytes(high << 8), signed_high_bytes(high)


@inline
def dot_quad(sums, w, x, offset, scales):
    """Return sums + scales w . 128 int16 of x.

    w: four vectors in the order of BY_QUARTERS.
    """
    dots = dot_add(dot(w[0], load_int16(x, offset)), w[1], load_int16(x, offset + 64))
    dots = dot_add(dot_add(dots, w[2], load_int16(x, offset + 128)), w[3], load_int16(x, offset + 192))
    return multiply_add(sums, to_floats(dots), QUARTERS(scales))


@inline
def add_quad(sums, w, x, i, d):
    """Return sums + d w . groups i to i + 3 (of 32) of a row of superblocks.

    w: four vectors in the order of BY_QUARTERS; d: a scale for each 32.
    """
    xi, int16_offset, scale_offset = superblock_at(x, i)
    return dot_quad(sums, w, xi, int16_offset, d * load_4_floats(xi, SCALES + scale_offset))


@inline
def store_quarters(superblock, at, v):
    """Store the quarters of an int16 vector at one place of four groups of 32."""
    store(superblock, at, first_quarter(v))
    store(superblock, at + 64, second_quarter(v))
    store(superblock, at + 128, third_quarter(v))
    store(superblock, at + 192, last_quarter(v))


@inline
def store_quad(superblock, at, w):
    """Store four vectors in the order of BY_QUARTERS to four groups of 32."""
    store_quarters(superblock, at, w[0])
    store_quarters(superblock, at + 32, w[1])
    store_quarters(superblock, at + 16, w[2])
    store_quarters(superblock, at + 48, w[3])
