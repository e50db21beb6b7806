"""Dot products of blocks with superblocks of activations: shared parts."""
from numba.extending import overload

from pydsa.backends.cpu.blocks.block import SCALES, SUPERBLOCK, inverse
from pydsa.backends.cpu.jit import INLINE, inline, inner
from pydsa.backends.cpu.vectors.lanes import (first_quarter, last_quarter, lower_half, row_sums, second_quarter, spread, third_quarter,
                                              upper_half)
from pydsa.backends.cpu.vectors.simd import (LANES, as_int8, as_int16, dot, dot_add, float_at, i64_at, join, load_4_floats, load_8_floats,
                                             load_int16, multiply_add, prefetch, signed_high_bytes, stack_memory, store, to_floats)


AHEAD = 4096    # prefetch distance in bytes, more than the hardware's own prefetch


@inline
def store_sum(sums, v, r, n_rows, out):
    """Store out[r] = the sum of v's lanes, for sixteen rows at a time.

    Vectors are buffered in stack_memory() at `sums` and reduced together after sixteen rows, or after the last row.
    """
    i = r & 15
    store(sums, 64 * i, v)
    if i == 15 or r == n_rows - 1:
        store_sums(sums, i + 1, out + 4 * (r - i))


@inner
def store_sums(sums, n, out):
    """Store the sums of the lanes of n vectors, at most sixteen. Not inline: a dot has many places that call it."""
    totals = row_sums(sums)
    if n == 16:
        store(out, 0, totals)
    else:
        store(sums, 0, totals)
        for j in range(n):
            store(out, 4 * j, float_at(sums, 4 * j))


@inline
def single_sum(sums):
    """Return the accumulator itself, where a dot has only one."""
    return sums


def add_to_both(add, sums, other_sums, row, other_row, i, n, x):
    """Call a type's `add` for each of two rows, or its function for both."""


@overload(add_to_both, jit_options=INLINE)
def _add_to_both(add, sums, other_sums, row, other_row, i, n, x):
    both = add.dispatcher.for_two
    if both:
        return lambda add, sums, other_sums, row, other_row, i, n, x: both(sums, other_sums, row, other_row, i, n, x)
    return lambda add, sums, other_sums, row, other_row, i, n, x: (add(sums, row, i, n, x), add(other_sums, other_row, i, n, x))


@inline
def dot_rows(add, total, init, block_bytes, step, rows, n_rows, n, x_at, n_tokens, out_at, offset):
    """Compute a type's dot: out[t][r] = row r . x[t] for n_rows rows of n blocks.

    For each row and token: sums = init; sums = add(sums, row, i, n, x[t]) for i = 0, step, ... < n; out[t][r] = total(sums). Where `add`
    has a function for two rows, it is called. x_at and out_at hold the addresses of the n_tokens tokens and, less `offset`, of their
    outputs. Blocks are decoded once for four tokens: the compiler finds that `add` does it alike for each. A token's products are the same,
    bit for bit, whichever others there are.
    """
    for t in range(0, n_tokens, 4):
        if n_tokens - t == 1:
            dot_one(add, total, init, block_bytes, step, rows, n_rows, n, i64_at(x_at, 8 * t), i64_at(out_at, 8 * t) + offset)
        elif n_tokens - t == 2:
            dot_two(add, total, init, block_bytes, step, rows, n_rows, n, x_at + 8 * t, out_at + 8 * t, offset)
        elif n_tokens - t == 3 and LANES == 16:
            dot_three(add, total, init, block_bytes, step, rows, n_rows, n, x_at + 8 * t, out_at + 8 * t, offset)
        else:       # with fewer registers three are four, of which two are the same: that is less to compile
            last = 8 * min(3, n_tokens - t - 1)
            dot_four(add, total, init, block_bytes, step, rows, n_rows, n, x_at + 8 * t, out_at + 8 * t, last, offset)


@inline
def dot_rows_by_eight(add, total, init, block_bytes, step, rows, n_rows, n, x_at, n_tokens, out_at, offset):
    """Do what dot_rows does, and decode blocks once for eight tokens.

    Seven are eight, six are faster as four and two.
    """
    t = 0
    while n_tokens - t > 6:
        last = 8 * min(7, n_tokens - t - 1)
        dot_eight(add, total, init, block_bytes, step, rows, n_rows, n, x_at + 8 * t, out_at + 8 * t, last, offset)
        t += 8
    dot_rows(add, total, init, block_bytes, step, rows, n_rows, n, x_at + 8 * t, n_tokens - t, out_at + 8 * t, offset)


# With 32 registers eight tokens are faster for all types but those with blocks of 32
DOT_TOKENS = 8 if LANES == 16 else 4        # the most tokens for which larger blocks are decoded once
dot_large = dot_rows_by_eight if DOT_TOKENS == 8 else dot_rows


@inline
def dot_one(add, total, init, block_bytes, step, rows, n_rows, n, x, out):
    """Multiply rows with one token.

    Two rows are computed at a time, one from each half of all rows: memory is read in two places at once, which is a fifth faster than in
    one, and activations are loaded once for both.
    """
    buffer, other_buffer = stack_memory(), stack_memory()
    half, row_bytes = (n_rows + 1) // 2, n * block_bytes
    fetch_first(rows, half * row_bytes)
    fetch_first(rows + half * row_bytes, half * row_bytes)
    for r in range(half):
        sums, other_sums = init, init
        row, other_row = rows + r * row_bytes, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            fetch_ahead(row + i * block_bytes, step * block_bytes)
            fetch_ahead(other_row + i * block_bytes, step * block_bytes)
            sums, other_sums = add_to_both(add, sums, other_sums, row, other_row, i, n, x)
        store_sum(buffer, total(sums), r, half, out)
        if r + half < n_rows:
            store_sum(other_buffer, total(other_sums), r, n_rows - half, out + 4 * half)


@inline
def dot_two(add, total, init, block_bytes, step, rows, n_rows, n, x_at, out_at, offset):
    """Multiply rows with two tokens, two rows at a time as dot_one does."""
    buffer, other_buffer, buffer_b, other_buffer_b = stack_memory(), stack_memory(), stack_memory(), stack_memory()
    a, b, out, out_b = i64_at(x_at, 0), i64_at(x_at, 8), i64_at(out_at, 0) + offset, i64_at(out_at, 8) + offset
    half, row_bytes = (n_rows + 1) // 2, n * block_bytes
    fetch_first(rows, half * row_bytes)
    fetch_first(rows + half * row_bytes, half * row_bytes)
    for r in range(half):
        sums, other_sums, sums_b, other_sums_b = init, init, init, init
        row, other_row = rows + r * row_bytes, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            fetch_ahead(row + i * block_bytes, step * block_bytes)
            fetch_ahead(other_row + i * block_bytes, step * block_bytes)
            sums, other_sums = add_to_both(add, sums, other_sums, row, other_row, i, n, a)
            sums_b, other_sums_b = add_to_both(add, sums_b, other_sums_b, row, other_row, i, n, b)
        store_sum(buffer, total(sums), r, half, out)
        store_sum(buffer_b, total(sums_b), r, half, out_b)
        if r + half < n_rows:
            store_sum(other_buffer, total(other_sums), r, n_rows - half, out + 4 * half)
            store_sum(other_buffer_b, total(other_sums_b), r, n_rows - half, out_b + 4 * half)


@inline
def dot_three(add, total, init, block_bytes, step, rows, n_rows, n, x_at, out_at, offset):
    """Multiply rows with three tokens, two rows at a time as dot_one does."""
    buffer_a, buffer_b, buffer_c = stack_memory(), stack_memory(), stack_memory()
    others_a, others_b, others_c = stack_memory(), stack_memory(), stack_memory()
    a, b, c = i64_at(x_at, 0), i64_at(x_at, 8), i64_at(x_at, 16)
    half, row_bytes = (n_rows + 1) // 2, n * block_bytes
    fetch_first(rows, half * row_bytes)
    fetch_first(rows + half * row_bytes, half * row_bytes)
    for r in range(half):
        sums_a, sums_b, sums_c, row = init, init, init, rows + r * row_bytes
        other_a, other_b, other_c, other_row = init, init, init, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            fetch_ahead(row + i * block_bytes, step * block_bytes)
            fetch_ahead(other_row + i * block_bytes, step * block_bytes)
            sums_a, other_a = add_to_both(add, sums_a, other_a, row, other_row, i, n, a)
            sums_b, other_b = add_to_both(add, sums_b, other_b, row, other_row, i, n, b)
            sums_c, other_c = add_to_both(add, sums_c, other_c, row, other_row, i, n, c)
        out_a, out_b, out_c = i64_at(out_at, 0) + offset, i64_at(out_at, 8) + offset, i64_at(out_at, 16) + offset
        store_sum(buffer_a, total(sums_a), r, half, out_a)
        store_sum(buffer_b, total(sums_b), r, half, out_b)
        store_sum(buffer_c, total(sums_c), r, half, out_c)
        if r + half < n_rows:
            store_sum(others_a, total(other_a), r, n_rows - half, out_a + 4 * half)
            store_sum(others_b, total(other_b), r, n_rows - half, out_b + 4 * half)
            store_sum(others_c, total(other_c), r, n_rows - half, out_c + 4 * half)


@inline
def dot_four(add, total, init, block_bytes, step, rows, n_rows, n, x_at, out_at, last, offset):
    """Multiply rows with four tokens, two rows at a time as dot_one does.

    last: where the fourth token is in the tables.
    """
    buffer_a, buffer_b, buffer_c, buffer_d = stack_memory(), stack_memory(), stack_memory(), stack_memory()
    others_a, others_b, others_c, others_d = stack_memory(), stack_memory(), stack_memory(), stack_memory()
    a, b, c, d = i64_at(x_at, 0), i64_at(x_at, 8), i64_at(x_at, 16), i64_at(x_at, last)
    half, row_bytes = (n_rows + 1) // 2, n * block_bytes
    fetch_first(rows, half * row_bytes)
    fetch_first(rows + half * row_bytes, half * row_bytes)
    for r in range(half):
        sums_a, sums_b, sums_c, sums_d, row = init, init, init, init, rows + r * row_bytes
        other_a, other_b, other_c, other_d, other_row = init, init, init, init, rows + min(r + half, n_rows - 1) * row_bytes
        for i in range(0, n, step):
            fetch_ahead(row + i * block_bytes, step * block_bytes)
            fetch_ahead(other_row + i * block_bytes, step * block_bytes)
            sums_a, other_a = add_to_both(add, sums_a, other_a, row, other_row, i, n, a)
            sums_b, other_b = add_to_both(add, sums_b, other_b, row, other_row, i, n, b)
            sums_c, other_c = add_to_both(add, sums_c, other_c, row, other_row, i, n, c)
            sums_d, other_d = add_to_both(add, sums_d, other_d, row, other_row, i, n, d)
        out_a, out_b, out_c = i64_at(out_at, 0) + offset, i64_at(out_at, 8) + offset, i64_at(out_at, 16) + offset
        out_d = i64_at(out_at, last) + offset
        store_sum(buffer_a, total(sums_a), r, half, out_a)
        store_sum(buffer_b, total(sums_b), r, half, out_b)
        store_sum(buffer_c, total(sums_c), r, half, out_c)
        store_sum(buffer_d, total(sums_d), r, half, out_d)
        if r + half < n_rows:
            store_sum(others_a, total(other_a), r, n_rows - half, out_a + 4 * half)
            store_sum(others_b, total(other_b), r, n_rows - half, out_b + 4 * half)
            store_sum(others_c, total(other_c), r, n_rows - half, out_c + 4 * half)
            store_sum(others_d, total(other_d), r, n_rows - half, out_d + 4 * half)


@inline
def dot_eight(add, total, init, block_bytes, step, rows, n_rows, n, x_at, out_at, last, offset):
    """Multiply rows with eight tokens, row by row: registers hold the sums and the weights of one.

    A row is prefetched at once, each line one time: it is short, as the tokens are in a first-level cache (linear.py). last: where the
    eighth token is in the tables.
    """
    buffer_a, buffer_b, buffer_c, buffer_d = stack_memory(), stack_memory(), stack_memory(), stack_memory()
    buffer_e, buffer_f, buffer_g, buffer_h = stack_memory(), stack_memory(), stack_memory(), stack_memory()
    a, b, c, d = i64_at(x_at, 0), i64_at(x_at, 8), i64_at(x_at, 16), i64_at(x_at, 24)
    e, f, g, h = i64_at(x_at, 32), i64_at(x_at, 40), i64_at(x_at, 48), i64_at(x_at, last)
    row_bytes = n * block_bytes
    fetch_first(rows, n_rows * row_bytes)
    for r in range(n_rows):
        sums_a, sums_b, sums_c, sums_d, row = init, init, init, init, rows + r * row_bytes
        sums_e, sums_f, sums_g, sums_h = init, init, init, init
        for line in range(AHEAD, AHEAD + row_bytes, 64):
            prefetch(row, line)
        for i in range(0, n, step):
            sums_a, sums_b = add(sums_a, row, i, n, a), add(sums_b, row, i, n, b)
            sums_c, sums_d = add(sums_c, row, i, n, c), add(sums_d, row, i, n, d)
            sums_e, sums_f = add(sums_e, row, i, n, e), add(sums_f, row, i, n, f)
            sums_g, sums_h = add(sums_g, row, i, n, g), add(sums_h, row, i, n, h)
        store_sum(buffer_a, total(sums_a), r, n_rows, i64_at(out_at, 0) + offset)
        store_sum(buffer_b, total(sums_b), r, n_rows, i64_at(out_at, 8) + offset)
        store_sum(buffer_c, total(sums_c), r, n_rows, i64_at(out_at, 16) + offset)
        store_sum(buffer_d, total(sums_d), r, n_rows, i64_at(out_at, 24) + offset)
        store_sum(buffer_e, total(sums_e), r, n_rows, i64_at(out_at, 32) + offset)
        store_sum(buffer_f, total(sums_f), r, n_rows, i64_at(out_at, 40) + offset)
        store_sum(buffer_g, total(sums_g), r, n_rows, i64_at(out_at, 48) + offset)
        store_sum(buffer_h, total(sums_h), r, n_rows, i64_at(out_at, last) + offset)


@inner
def fetch_first(rows, n_bytes):
    """Prefetch the first AHEAD bytes, of n_bytes. Not inline: a dot has nine places that call it."""
    for line in range(0, min(AHEAD, n_bytes), 64):
        prefetch(rows, line)


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
    """Prefetch n_bytes, at most 256, AHEAD bytes further.

    A rest of eight bytes is left to the next blocks. It stands beside `add`, not in it, where the compiler would not join what tokens have
    in common.
    """
    prefetch(at, AHEAD)
    if n_bytes > 72:
        prefetch(at, AHEAD + 64)
    if n_bytes > 136:
        prefetch(at, AHEAD + 128)
    if n_bytes > 200:
        prefetch(at, AHEAD + 192)


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


TWICE = spread(*range(8))


@inline
def dot_256(sums, w, x, d):
    """Return sums + d w . x, a superblock with ONE_SCALE.

    w: eight vectors of integers, times the scales of their sub-blocks. Sixteen products of at most 8064 x 16383 fit into a lane's 32 bits.
    """
    dots = dot_add(dot(w[0], load_int16(x, 0)), w[1], load_int16(x, 64))
    dots = dot_add(dot_add(dots, w[2], load_int16(x, 128)), w[3], load_int16(x, 192))
    dots = dot_add(dot_add(dots, w[4], load_int16(x, 256)), w[5], load_int16(x, 320))
    dots = dot_add(dot_add(dots, w[6], load_int16(x, 384)), w[7], load_int16(x, 448))
    return multiply_add(sums, to_floats(dots), TWICE(load_8_floats(x, SCALES)) * d)


# Four blocks of 32 whose bytes hold element j in the low nibble and j + 16 in the high one: low even, low odd, high even, high odd
BY_QUARTERS = inverse(*[16 * part + 4 * block + i for part in (0, 1) for i in (0, 2, 1, 3) for block in range(4)])
QUARTERS = spread(0, 1, 2, 3)


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
def dot_128(sums, w, x, offset, scales):
    """Return sums + scales w . 128 int16 of x.

    w: four vectors, whose lanes of int32 products belong to the same groups; scales: of each lane.
    """
    dots = dot_add(dot(w[0], load_int16(x, offset)), w[1], load_int16(x, offset + 64))
    dots = dot_add(dot_add(dots, w[2], load_int16(x, offset + 128)), w[3], load_int16(x, offset + 192))
    return multiply_add(sums, to_floats(dots), scales)


@inline
def dot_quad(sums, w, x, offset, scales):
    """Return sums + scales w . 128 int16 of x.

    w: four vectors in the order of BY_QUARTERS.
    """
    return dot_128(sums, w, x, offset, QUARTERS(scales))


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
