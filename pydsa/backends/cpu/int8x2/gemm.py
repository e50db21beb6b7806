"""Matrix products of panels of int8 pairs in AMX tiles.

The sums of one pair of tiles are scaled while the next pair is multiplied.
"""
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.amx import LOW_PARTS, STEP, TILE_BYTES, call_amx, prefetch_line
from pydsa.backends.cpu.vectors.simd import F32, I8, INTP, broadcast, constant, f32x16, i32x16, pointer


def int8x2_to_floats(builder, high, low):
    """Emit 256 high + low of vectors of int32, as floats."""
    return builder.sitofp(builder.add(builder.shl(high, constant([8] * 16)), low), f32x16.ir)


class PairArguments(NamedTuple):
    """Arguments of tile_pair_products, LLVM values: two cells and an earlier pair.

    Addresses and strides are in bytes.
    """
    n_steps: ir.Value           # steps of 64 values, at most 4
    a: ir.Value                 # A panels
    a_panel: ir.Value           # stride of a panel
    b: ir.Value                 # B panels
    b_panel: ir.Value
    buffer: ir.Value            # 4 KiB: for each cell two tiles of int32, of high parts, and of high with low parts
    ahead: ir.Value             # 16 cache lines from here on are prefetched into the second-level cache,
    row_ahead: ir.Value         # and five of each of four rows, at row_ahead, row_ahead + row_bytes, ...
    row_bytes: ir.Value
    before: ir.Value            # the buffer of the earlier pair
    sums: ir.Value              # its sums, float32 [16, 16] a cell
    sums_cell: ir.Value         # distance of its second cell's sums
    row_scales: ir.Value        # 16 float32 a cell
    rows_cell: ir.Value         # distance of its second cell's row scales
    column_scales: ir.Value     # 16 float32 a cell
    columns_cell: ir.Value      # distance of its second cell's column scales


def _at(builder, base, *offsets, kind=I8):
    """Emit a pointer to base + offsets."""
    for offset in offsets:
        base = builder.add(base, offset)
    return pointer(builder, base, kind)


def _load_tile(builder, register, base, offset, part):
    call_amx(builder, "tileloadd64", I8(register), _at(builder, base, offset, INTP(part)), INTP(64))


def _emit_step(builder, pair, offset, second, columns, low_one, low_other):
    """Emit one step of the products of two cells.

    Tiles 0, 2: high parts; 1, 3: mixed ones, in an order in which no sum waits for itself. `one` is the panel that both cells share;
    `other` and `second` are the two that differ. low_one, low_other: whether they have low parts.
    """
    one, other = (pair.a, pair.b) if columns == 2 else (pair.b, pair.a)

    def multiply(tile, x, y):
        call_amx(builder, "tdpbssd", I8(tile), *((I8(x), I8(y)) if columns == 2 else (I8(y), I8(x))))

    _load_tile(builder, 4, one, offset, 0)
    if low_other:
        _load_tile(builder, 7, other, offset, LOW_PARTS)
        multiply(1, 4, 7)
    _load_tile(builder, 6, other, offset, 0)
    multiply(0, 4, 6)
    if low_other:
        _load_tile(builder, 5, second, offset, LOW_PARTS)
        multiply(3, 4, 5)
    if low_one:
        _load_tile(builder, 7, one, offset, LOW_PARTS)
        multiply(1, 7, 6)
    _load_tile(builder, 6, second, offset, 0)
    multiply(2, 4, 6)
    if low_one:
        multiply(3, 7, 6)


def _emit_scaling(builder, pair, step):
    """Emit the scaling of eight rows of the earlier pair, and prefetches."""
    cell, first = builder.lshr(step, INTP(1)), builder.shl(builder.and_(step, INTP(1)), INTP(3))
    tile = builder.add(pair.before, builder.add(builder.mul(cell, INTP(2 * TILE_BYTES)), builder.mul(first, INTP(64))))
    target = builder.add(pair.sums, builder.add(builder.mul(cell, pair.sums_cell), builder.mul(first, INTP(64))))
    scales = builder.add(pair.row_scales, builder.add(builder.mul(cell, pair.rows_cell), builder.mul(first, INTP(4))))
    columns = builder.load(_at(builder, pair.column_scales, builder.mul(cell, pair.columns_cell), kind=f32x16.ir), align=4)
    for i in range(8):
        if i < 4:
            prefetch_line(builder, _at(builder, pair.ahead, builder.mul(step, INTP(256)), INTP(64 * i)))
        if i < 5:
            prefetch_line(builder, _at(builder, pair.row_ahead, builder.mul(step, pair.row_bytes), INTP(64 * i)))
        high = builder.load(_at(builder, tile, INTP(64 * i), kind=i32x16.ir), align=4)
        mixed = builder.load(_at(builder, tile, INTP(TILE_BYTES + 64 * i), kind=i32x16.ir), align=4)
        scale = broadcast(builder, builder.load(_at(builder, scales, INTP(4 * i), kind=F32), align=4), 16)
        place = _at(builder, target, INTP(64 * i), kind=f32x16.ir)
        product = builder.fmul(int8x2_to_floats(builder, high, mixed), builder.fmul(scale, columns))
        builder.store(builder.fadd(builder.load(place, align=4), product, flags=("contract",)), place, align=4)


def _emit_pair(builder, pair, columns, low_a, low_b):
    """Emit tile_pair_products, a loop of four turns.

    A turn is a step, while there are any, and a quarter of the scaling.
    """
    low_one, low_other = (low_a, low_b) if columns == 2 else (low_b, low_a)
    other, panel = (pair.b, pair.b_panel) if columns == 2 else (pair.a, pair.a_panel)
    second = builder.add(other, panel)
    for register in range(4):
        call_amx(builder, "tilezero", I8(register))
    start, loop, inside, scaling, after = builder.block, *(builder.append_basic_block(name) for name in (
        "loop", "inside", "scaling", "after"))
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(INTP)
    step.add_incoming(INTP(0), start)
    builder.cbranch(builder.icmp_signed("<", step, pair.n_steps), inside, scaling)
    builder.position_at_end(inside)
    _emit_step(builder, pair, builder.mul(step, INTP(STEP)), second, columns, low_one, low_other)
    builder.branch(scaling)
    builder.position_at_end(scaling)
    _emit_scaling(builder, pair, step)
    following = builder.add(step, INTP(1))
    step.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, INTP(4)), loop, after)
    builder.position_at_end(after)
    for register in range(4):
        call_amx(builder, "tilestored64", I8(register), _at(builder, pair.buffer, INTP(TILE_BYTES * register)), INTP(64))


def _make_products(columns, low_a, low_b):
    """Make a kernel for two cells: one A panel times two of B, or two times one.

    low_a, low_b: whether the values of a and b have low parts.
    """
    @intrinsic
    def tile_pair_products(typingctx, n_steps, a, a_panel, b, b_panel, buffer, ahead, row_ahead, row_bytes,
                           before, sums, sums_cell, row_scales, rows_cell, column_scales, columns_cell):
        """Multiply two cells, and scale an earlier pair (see PairArguments).

        The earlier pair's sums are += row_scales[i] column_scales[j] (256 high + low)[i][j].
        """
        def codegen(context, builder, signature, args):
            _emit_pair(builder, PairArguments(*args), columns, low_a, low_b)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 16), codegen
    return tile_pair_products


def _make_panel_products(low_a, low_b):
    one_row, one_column = (_make_products(columns, low_a, low_b) for columns in (2, 1))

    @inner
    def panel_products_int8x2(a, a_panel, n_a, b, b_panel, n_b, n_steps, sums, row_scales, column_scales, buffer, ahead, row_ahead,
                              row_bytes, n_rows):
        """Compute sums[i][j] += scales * A panel i . B panel j for i < n_a, j < n_b.

        sums: n_a rows of n_b tiles of float32; n_a and n_b are not both odd. Panels are of int8 pairs: each value is 256 high + low; the
        products of two low parts are left out. In panel_products_int8_a the panels of a have no low parts, in panel_products_int8_b those
        of b. Each panel has 16 scales: of rows at row_scales, 64 bytes a panel; of columns column_scales bytes after the start of a panel
        of b. The buffer has 10 KiB. Meanwhile 1 KiB from `ahead` on is prefetched for every two tiles, and the starts of
        rows_prefetched(n_a, n_b) of n_rows rows.
        """
        now, before, n_pairs = buffer, buffer + 4 * TILE_BYTES, n_b // 2
        unused = buffer + 8 * TILE_BYTES        # sums and scales of a pair that nobody reads
        last_sums, last_rows, last_columns = unused, unused, unused
        for i in range(n_a * n_pairs + 1):
            j, k = i // n_a, i % n_a
            if i == n_a * n_pairs:      # only scale the last pair
                j, k = 0, 0
            if n_rows <= 0:
                row_ahead, row_bytes = b, 0
            one_row(n_steps if i < n_a * n_pairs else 0, a + k * a_panel, a_panel, b + 2 * j * b_panel, b_panel, now,
                    ahead, row_ahead, row_bytes, before, last_sums, TILE_BYTES, last_rows, 0, last_columns, b_panel if i else 0)
            last_sums, last_rows = sums + (k * n_b + 2 * j) * TILE_BYTES, row_scales + 64 * k
            last_columns = b + 2 * j * b_panel + column_scales
            now, before = before, now
            ahead += 16 * 64
            row_ahead += 4 * row_bytes
            n_rows -= 4
        if n_b % 2:
            last_sums, last_rows, last_columns = unused, unused, b + column_scales
            for i in range(0, n_a + 2, 2):
                k = i if i < n_a else 0
                if n_rows <= 0:
                    row_ahead, row_bytes = b, 0
                one_column(n_steps if i < n_a else 0, a + k * a_panel, a_panel, b + (n_b - 1) * b_panel, b_panel, now, ahead, row_ahead,
                           row_bytes, before, last_sums, n_b * TILE_BYTES if i else 0, last_rows, 64 if i else 0, last_columns, 0)
                last_sums, last_rows = sums + (k * n_b + n_b - 1) * TILE_BYTES, row_scales + 64 * k
                last_columns = b + (n_b - 1) * b_panel + column_scales
                now, before = before, now
                ahead += 16 * 64
                row_ahead += 4 * row_bytes
                n_rows -= 4
    return panel_products_int8x2


panel_products_int8x2 = _make_panel_products(True, True)
panel_products_int8_a, panel_products_int8_b = _make_panel_products(False, True), _make_panel_products(True, False)


@inner
def rows_prefetched(n_a, n_b):
    """Count the rows whose start panel_products_int8x2 has time to prefetch.

    Four a pair of tiles.
    """
    return 4 * (n_a * (n_b // 2) + n_b % 2 * n_a // 2)
