"""Products in AMX tiles: two numbers of 16 bits stand for a float, and tile registers multiply 16 x 16 rows of them at once.

A float is split into two bfloat16, high and low, which keep 16 of its 24 bits; of the four products of two floats the three largest are
taken. Sums stay float32. Where the CPU or the system has no AMX, HERE is False and nothing of this is used.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.jit import inline, inner
from pydsa.simd import F32, FEATURES, I32, I8, WORD, broadcast, call_llvm, constant, f32x16, i32x16, pointer, store

HERE = {"amx-tile", "amx-bf16", "amx-int8", "avx512bw"} <= FEATURES

# Operands lie in panels: 16 rows, 32 numbers of each after the other, in 2 KiB a step: 16 x 64 bytes of high parts, then the low ones. The
# right operand's panels have the 16 x 16 pairs of each KiB turned over. Sums lie in tiles of 16 x 16 floats.
STEP, LOW_PARTS, SUMS = 2048, 1024, 1024
AHEAD = 512         # bytes that are fetched ahead with every step
A_0, B_0 = 4, 6     # tile registers: 0 to 3 are sums, then two of each operand
CONFIGURATION = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]     # palette 1; bytes a row, then rows, of eight tiles


def call_amx(builder, name, *args):
    """Call an LLVM intrinsic on tile registers, which are given by number."""
    call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), args)


def fetch(builder, where):
    """Prefetch a line into the second-level cache."""
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(2), I32(1)])


@intrinsic
def configure(typingctx):
    """Let this thread use tile registers, all of 16 rows of 64 bytes."""
    def codegen(context, builder, signature, args):
        data = cgutils.global_constant(builder.module, "pydsa_tiles", ir.Constant(ir.ArrayType(I8, 64), CONFIGURATION))
        data.align = 64
        call_amx(builder, "ldtilecfg", builder.bitcast(data, I8.as_pointer()))
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def release(typingctx):
    """Leave the tile registers, which the system would otherwise save and restore at every switch of threads."""
    def codegen(context, builder, signature, args):
        call_amx(builder, "tilerelease")
        return context.get_dummy_value()
    return types.void(), codegen


_UPPER = constant([0xFFFF0000] * 16)


def _pair(builder, even, odd):
    """The upper halves of two words, (even >> 16) | (odd & _UPPER), in an instruction that LLVM makes no slower shuffle of."""
    even, odd = (builder.bitcast(v, i32x16.ir) for v in (even, odd))
    even = builder.lshr(even, constant([16] * 16))
    return call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", even.type, [even, odd, _UPPER, I32(0xF8)])


@intrinsic
def split(typingctx, even, odd):
    """Two f32x16 -> the bfloat16 nearest to each number, and of what remains; a pair of numbers in each of sixteen 32-bit words.

    What is not finite has a part that is not.
    """
    def codegen(context, builder, signature, args):
        high = [builder.add(builder.bitcast(v, i32x16.ir), constant([0x8000] * 16)) for v in args]
        low = [builder.fsub(v, builder.bitcast(builder.and_(h, _UPPER), v.type)) for v, h in zip(args, high)]
        low = [builder.fmul(v, constant([1.0 + 2.0 ** -8.5] * 16, F32)) for v in low]     # half of what is cut off, on average; NaN stays
        return cgutils.pack_array(builder, [_pair(builder, *high), _pair(builder, *low)])
    return types.UniTuple(i32x16, 2)(f32x16, f32x16), codegen


@inline
def store_split(at, even, odd):
    """Sixteen pairs of a panel's row: the 64 bytes at an address, and their low parts."""
    high, low = split(even, odd)
    store(at, 0, high)
    store(at, LOW_PARTS, low)


def _make_products(rows, columns):
    @intrinsic
    def products(typingctx, a, a_panel, b, b_panel, n_steps, sums, sums_row, fresh, ahead):
        """Tile i, j of sums (+)= panel i of a . panel j of b over n_steps > 0 steps; panels and rows of tiles lie so many bytes apart.

        fresh: the sums begin at zero. With every step the next 512 bytes from `ahead` on are fetched into the second-level cache.
        """
        def codegen(context, builder, signature, args):
            a, a_panel, b, b_panel, n_steps, sums, sums_row, fresh, ahead = args

            def at(base, *offsets):
                for offset in offsets:
                    base = builder.add(base, offset)
                return pointer(builder, base, I8)

            cells = [(i, j, at(sums, builder.mul(sums_row, WORD(i)), WORD(SUMS * j))) for i in range(rows) for j in range(columns)]
            with builder.if_else(fresh) as (then, otherwise):
                with then:
                    for i, j, _ in cells:
                        call_amx(builder, "tilezero", I8(2 * i + j))
                with otherwise:
                    for i, j, where in cells:
                        call_amx(builder, "tileloadd64", I8(2 * i + j), where, WORD(64))
            before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(WORD)
            step.add_incoming(WORD(0), before)
            offset = builder.mul(step, WORD(STEP))

            def load(first, n, base, panel, part):
                for i in range(n):
                    call_amx(builder, "tileloadd64", I8(first + i), at(base, offset, builder.mul(panel, WORD(i)), WORD(part)), WORD(64))

            def multiply(part):
                for i in part:
                    fetch(builder, at(ahead, builder.mul(step, WORD(AHEAD)), WORD(64 * i)))
                for i, j, _ in cells:
                    call_amx(builder, "tdpbf16ps", I8(2 * i + j), I8(A_0 + i), I8(B_0 + j))

            load(A_0, rows, a, a_panel, LOW_PARTS)
            load(B_0, columns, b, b_panel, 0)
            multiply(range(3))
            load(A_0, rows, a, a_panel, 0)
            multiply(range(3, 6))
            load(B_0, columns, b, b_panel, LOW_PARTS)
            multiply(range(6, 8))
            following = builder.add(step, WORD(1))
            step.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, n_steps), loop, after)
            builder.position_at_end(after)
            for i, j, where in cells:
                call_amx(builder, "tilestored64", I8(2 * i + j), where, WORD(64))
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7, types.boolean, types.intp), codegen
    return products


_two_by_two, _two_by_one, _one_by_two, _one_by_one = (_make_products(i, j) for i in (2, 1) for j in (2, 1))


@inner
def panel_products(a, a_panel, n_a, b, b_panel, n_b, n_steps, sums, fresh, ahead):
    """sums[i][j] (+)= panel i of a . panel j of b for i < n_a, j < n_b: n_a rows of n_b tiles.

    Meanwhile what is needed next is fetched into the second-level cache: from `ahead` on, n_steps * AHEAD bytes for every 2 x 2 tiles.
    """
    for j in range(0, n_b, 2):
        for i in range(0, n_a, 2):
            ai, bj, cell, row = a + i * a_panel, b + j * b_panel, sums + SUMS * (i * n_b + j), SUMS * n_b
            if n_a - i > 1 and n_b - j > 1:
                _two_by_two(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            elif n_a - i > 1:
                _two_by_one(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            elif n_b - j > 1:
                _one_by_two(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            else:
                _one_by_one(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            ahead += n_steps * AHEAD


def whole_numbers_of(builder, high, low):
    """256 high + low of LLVM vectors of int32, as floats."""
    return builder.sitofp(builder.add(builder.shl(high, constant([8] * 16)), low), f32x16.ir)


def _make_byte_products(columns, low_a, low_b):
    """A pair of cells: one panel of a times two of b, or two times one. low_a, low_b: whether the numbers of a and b have low parts."""
    low_one, low_other = (low_a, low_b) if columns == 2 else (low_b, low_a)

    @intrinsic
    def byte_products(typingctx, n_steps, a, a_panel, b, b_panel, buffer, ahead, row_ahead, row_bytes,
                      before, sums, sums_cell, row_scales, rows_cell, column_scales, columns_cell):
        """A pair of cells' products into a buffer of 4 KiB; meanwhile those of an earlier pair, at `before`, are added to its sums.

        For each cell, two tiles of int32 over n_steps <= 4 steps: of high parts, and of high with low parts. Sums: float32 [16, 16] a cell,
        += row_scales[i] column_scales[j] (256 high + low)[i][j]; sums, scales of rows and of columns of two cells lie so many bytes apart.
        16 lines from `ahead` on are fetched into the second-level cache, five of each of four rows: at row_ahead, ... + row_bytes.
        """
        def codegen(context, builder, signature, args):
            (n_steps, a, a_panel, b, b_panel, buffer, ahead, row_ahead, row_bytes,
             before, sums, sums_cell, row_scales, rows_cell, column_scales, columns_cell) = args

            def at(base, *offsets, kind=I8):
                for offset in offsets:
                    base = builder.add(base, offset)
                return pointer(builder, base, kind)

            def load(register, base, offset, part):
                call_amx(builder, "tileloadd64", I8(register), at(base, offset, WORD(part)), WORD(64))

            def multiply(tile, one, other):
                call_amx(builder, "tdpbssd", I8(tile), *((I8(one), I8(other)) if columns == 2 else (I8(other), I8(one))))

            one, other, panel = (a, b, b_panel) if columns == 2 else (b, a, a_panel)
            second = builder.add(other, panel)
            for register in range(4):
                call_amx(builder, "tilezero", I8(register))
            start, loop, inside, scaling, after = builder.block, *(builder.append_basic_block(name) for name in (
                "loop", "inside", "scaling", "after"))
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(WORD)
            step.add_incoming(WORD(0), start)
            builder.cbranch(builder.icmp_signed("<", step, n_steps), inside, scaling)
            builder.position_at_end(inside)     # tiles 0, 2: high parts; 1, 3: mixed ones, in an order in which no sum waits for itself
            offset = builder.mul(step, WORD(STEP))
            load(4, one, offset, 0)
            if low_other:
                load(7, other, offset, LOW_PARTS)
                multiply(1, 4, 7)
            load(6, other, offset, 0)
            multiply(0, 4, 6)
            if low_other:
                load(5, second, offset, LOW_PARTS)
                multiply(3, 4, 5)
            if low_one:
                load(7, one, offset, LOW_PARTS)
                multiply(1, 7, 6)
            load(6, second, offset, 0)
            multiply(2, 4, 6)
            if low_one:
                multiply(3, 7, 6)
            builder.branch(scaling)
            builder.position_at_end(scaling)    # of eight rows: half a cell
            cell, first = builder.lshr(step, WORD(1)), builder.shl(builder.and_(step, WORD(1)), WORD(3))
            tile = builder.add(before, builder.add(builder.mul(cell, WORD(2 * SUMS)), builder.mul(first, WORD(64))))
            target = builder.add(sums, builder.add(builder.mul(cell, sums_cell), builder.mul(first, WORD(64))))
            scales = builder.add(row_scales, builder.add(builder.mul(cell, rows_cell), builder.mul(first, WORD(4))))
            of_columns = builder.load(at(column_scales, builder.mul(cell, columns_cell), kind=f32x16.ir), align=4)
            for i in range(8):
                if i < 4:
                    fetch(builder, at(ahead, builder.mul(step, WORD(256)), WORD(64 * i)))
                if i < 5:
                    fetch(builder, at(row_ahead, builder.mul(step, row_bytes), WORD(64 * i)))
                high = builder.load(at(tile, WORD(64 * i), kind=i32x16.ir), align=4)
                mixed = builder.load(at(tile, WORD(SUMS + 64 * i), kind=i32x16.ir), align=4)
                scale = broadcast(builder, builder.load(at(scales, WORD(4 * i), kind=F32), align=4), 16)
                place = at(target, WORD(64 * i), kind=f32x16.ir)
                product = builder.fmul(whole_numbers_of(builder, high, mixed), builder.fmul(scale, of_columns))
                builder.store(builder.fadd(builder.load(place, align=4), product, flags=("contract",)), place, align=4)
            following = builder.add(step, WORD(1))
            step.add_incoming(following, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, WORD(4)), loop, after)
            builder.position_at_end(after)
            for register in range(4):
                call_amx(builder, "tilestored64", I8(register), at(buffer, WORD(SUMS * register)), WORD(64))
            return context.get_dummy_value()
        return types.void(*[types.intp] * 16), codegen
    return byte_products


def _make_byte_panel_products(low_a, low_b):
    one_row, one_column = (_make_byte_products(columns, low_a, low_b) for columns in (2, 1))

    @inner
    def byte_panel_products(a, a_panel, n_a, b, b_panel, n_b, n_steps, sums, row_scales, column_scales, buffer, ahead, row_ahead, row_bytes,
                            n_rows):
        """sums[i][j] += scales times panel i of a . panel j of b for i < n_a and j < n_b, not both odd: n_a rows of n_b tiles of float32.

        Panels are of byte pairs: each number is 256 high + low; the products of two low parts are left out. In high_rows_products those of
        a have no low parts, in high_columns_products those of b. Each has 16 scales: of rows at row_scales, 64 bytes a panel; of columns
        column_scales bytes after the beginning of a panel of b. A buffer has ten KiB. Meanwhile a KiB from `ahead` on is fetched for every
        two tiles, and the beginnings of byte_rows_fetched(n_a, n_b) of n_rows rows.
        """
        now, before, n_pairs = buffer, buffer + 4 * SUMS, n_b // 2
        last_sums, last_rows, last_columns = buffer + 8 * SUMS, buffer + 8 * SUMS, buffer + 8 * SUMS     # a pair whose sums nobody reads
        for i in range(n_a * n_pairs + 1):
            j, k = i // n_a, i % n_a
            if i == n_a * n_pairs:      # only what the last pair left
                j, k = 0, 0
            if n_rows <= 0:
                row_ahead, row_bytes = b, 0
            one_row(n_steps if i < n_a * n_pairs else 0, a + k * a_panel, a_panel, b + 2 * j * b_panel, b_panel, now,
                    ahead, row_ahead, row_bytes, before, last_sums, SUMS, last_rows, 0, last_columns, b_panel if i else 0)
            last_sums, last_rows, last_columns = sums + (k * n_b + 2 * j) * SUMS, row_scales + 64 * k, b + 2 * j * b_panel + column_scales
            now, before = before, now
            ahead += 16 * 64
            row_ahead += 4 * row_bytes
            n_rows -= 4
        if n_b % 2:
            last_sums, last_rows, last_columns = buffer + 8 * SUMS, buffer + 8 * SUMS, b + column_scales
            for i in range(0, n_a + 2, 2):
                k = i if i < n_a else 0
                if n_rows <= 0:
                    row_ahead, row_bytes = b, 0
                one_column(n_steps if i < n_a else 0, a + k * a_panel, a_panel, b + (n_b - 1) * b_panel, b_panel, now, ahead, row_ahead,
                           row_bytes, before, last_sums, n_b * SUMS if i else 0, last_rows, 64 if i else 0, last_columns, 0)
                last_sums, last_rows = sums + (k * n_b + n_b - 1) * SUMS, row_scales + 64 * k
                last_columns = b + (n_b - 1) * b_panel + column_scales
                now, before = before, now
                ahead += 16 * 64
                row_ahead += 4 * row_bytes
                n_rows -= 4
    return byte_panel_products


byte_panel_products = _make_byte_panel_products(True, True)
high_rows_products, high_columns_products = _make_byte_panel_products(False, True), _make_byte_panel_products(True, False)


@inner
def byte_rows_fetched(n_a, n_b):
    """Of how many rows byte_panel_products has time to fetch the beginning: four a pair of tiles."""
    return 4 * (n_a * (n_b // 2) + n_b % 2 * n_a // 2)
