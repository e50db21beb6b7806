"""Products in AMX tiles: two numbers of 16 bits stand for a float, and tile registers multiply 16 x 16 rows of them at once.

A float is split into two bfloat16, high and low, which keep 16 of its 24 bits; of the four products of two floats the three largest are
taken. Sums stay float32. Where the CPU or the system has no AMX, HERE is False and nothing of this is used.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.jit import inline, inner
from pydsa.simd import F32, FAST, FEATURES, I8, I32, WORD, broadcast, call_llvm, constant, f32x16, i32x16, pointer, store

HERE = {"amx-tile", "amx-bf16", "avx512bw"} <= FEATURES

# Operands lie in panels: 16 rows, 32 numbers of each after the other, in 2 KiB a step: 16 x 64 bytes of high parts, then the low ones. The
# right operand's panels have the 16 x 16 pairs of each KiB turned over. Sums lie in tiles of 16 x 16 floats.
STEP, LOW_PARTS, SUMS = 2048, 1024, 1024
AHEAD = 512         # bytes that are fetched ahead with every step
A_0, B_0 = 4, 6     # tile registers: 0 to 3 are sums, then two of each operand
CONFIGURATION = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]     # palette 1; bytes a row, then rows, of eight tiles


def _amx(builder, name, *args):
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
        _amx(builder, "ldtilecfg", builder.bitcast(data, I8.as_pointer()))
        return context.get_dummy_value()
    return types.void(), codegen


@intrinsic
def release(typingctx):
    """Leave the tile registers, which the system would otherwise save and restore at every switch of threads."""
    def codegen(context, builder, signature, args):
        _amx(builder, "tilerelease")
        return context.get_dummy_value()
    return types.void(), codegen


_UPPER = constant([0xFFFF0000] * 16)


def _pair(builder, even, odd):
    """The upper halves of two words, (even >> 16) | (odd & _UPPER), in an instruction that LLVM makes no slower shuffle of."""
    even, odd = (builder.bitcast(v, i32x16.ir) for v in (even, odd))
    even = builder.lshr(even, constant([16] * 16))
    return call_llvm(builder, "llvm.x86.avx512.pternlog.d.512", even.type, [even, odd, _UPPER, I32(0xF8)])


@intrinsic
def pair(typingctx, even, odd):
    """Two f32x16 of numbers that bfloat16 holds -> pairs of these in sixteen 32-bit words."""
    return i32x16(f32x16, f32x16), lambda context, builder, signature, args: _pair(builder, *args)


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


def _every_other(first):
    @intrinsic
    def every_other(typingctx, a, b):
        """Of two vectors side by side, the elements first, first + 2, ..."""
        return a(a, b), lambda context, builder, signature, args: builder.shuffle_vector(*args, constant(range(first, 2 * a.lanes, 2)))
    return every_other


evens, odds = _every_other(0), _every_other(1)


@inline
def store_split(at, even, odd):
    """Sixteen pairs of a panel's row: the 64 bytes at an address, and their low parts."""
    high, low = split(even, odd)
    store(at, 0, high)
    store(at, LOW_PARTS, low)


def _make_products(rows, columns):
    @intrinsic
    def products(typingctx, a, a_panel, b, b_panel, n_steps, sums, sums_row, fresh, ahead, row_ahead, row_bytes):
        """Tile i, j of sums (+)= panel i of a . panel j of b over n_steps > 0 steps; panels and rows of tiles lie so many bytes apart.

        fresh: the sums begin at zero. With every step the next 512 bytes from `ahead` on are fetched into the second-level cache, and 256
        bytes of a row: at row_ahead, row_ahead + row_bytes, ...
        """
        def codegen(context, builder, signature, args):
            a, a_panel, b, b_panel, n_steps, sums, sums_row, fresh, ahead, row_ahead, row_bytes = args

            def at(base, *offsets):
                for offset in offsets:
                    base = builder.add(base, offset)
                return pointer(builder, base, I8)

            cells = [(i, j, at(sums, builder.mul(sums_row, WORD(i)), WORD(SUMS * j))) for i in range(rows) for j in range(columns)]
            with builder.if_else(fresh) as (then, otherwise):
                with then:
                    for i, j, _ in cells:
                        _amx(builder, "tilezero", I8(2 * i + j))
                with otherwise:
                    for i, j, where in cells:
                        _amx(builder, "tileloadd64", I8(2 * i + j), where, WORD(64))
            before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(WORD)
            step.add_incoming(WORD(0), before)
            offset = builder.mul(step, WORD(STEP))

            def load(first, n, base, panel, part):
                for i in range(n):
                    _amx(builder, "tileloadd64", I8(first + i), at(base, offset, builder.mul(panel, WORD(i)), WORD(part)), WORD(64))

            def multiply(part):
                for i in part:
                    fetch(builder, at(ahead, builder.mul(step, WORD(AHEAD)), WORD(64 * i)))
                    if i < 5:
                        fetch(builder, at(row_ahead, builder.mul(step, row_bytes), WORD(64 * i)))
                for i, j, _ in cells:
                    _amx(builder, "tdpbf16ps", I8(2 * i + j), I8(A_0 + i), I8(B_0 + j))

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
                _amx(builder, "tilestored64", I8(2 * i + j), where, WORD(64))
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7, types.boolean, *[types.intp] * 3), codegen
    return products


_two_by_two, _two_by_one, _one_by_two, _one_by_one = (_make_products(i, j) for i in (2, 1) for j in (2, 1))


@inner
def panel_products(a, a_panel, n_a, b, b_panel, n_b, n_steps, sums, fresh, ahead, row_ahead, row_bytes, n_rows):
    """sums[i][j] (+)= panel i of a . panel j of b for i < n_a, j < n_b: n_a rows of n_b tiles.

    Meanwhile what is needed next is fetched into the second-level cache: from `ahead` on, n_steps * AHEAD bytes for every 2 x 2 tiles; and
    320 bytes of rows_fetched(n_a, n_b, n_steps) of n_rows rows.
    """
    for j in range(0, n_b, 2):
        for i in range(0, n_a, 2):
            ai, bj, cell, row = a + i * a_panel, b + j * b_panel, sums + SUMS * (i * n_b + j), SUMS * n_b
            if n_rows <= 0:
                row_ahead, row_bytes = b, 0
            if n_a - i > 1 and n_b - j > 1:
                _two_by_two(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead, row_ahead, row_bytes)
            elif n_a - i > 1:
                _two_by_one(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead, row_ahead, row_bytes)
            elif n_b - j > 1:
                _one_by_two(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead, row_ahead, row_bytes)
            else:
                _one_by_one(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead, row_ahead, row_bytes)
            ahead += n_steps * AHEAD
            row_ahead += n_steps * row_bytes
            n_rows -= n_steps


@inner
def rows_fetched(n_a, n_b, n_steps):
    """Of how many rows panel_products has time to fetch the beginning: one a step."""
    return (n_a + 1) // 2 * ((n_b + 1) // 2) * n_steps


@intrinsic
def scaled_products(typingctx, a, scales, b, sums, fresh, buffer, row_ahead, row_bytes):
    """A tile of sums (+)= sum over i < 8 of scales[row][i] (32 numbers of the row . those of the column): of exact rows and a panel.

    a: eight KiB, 16 rows of 32 bfloat16 each; scales float32 [16, 8]; a buffer of 4 KiB. 256 bytes of 16 rows are fetched.
    """
    def codegen(context, builder, signature, args):
        a, scales, b, sums, fresh, buffer, row_ahead, row_bytes = args

        def at(base, offset, kind=I8):
            return pointer(builder, builder.add(base, WORD(offset)), kind)

        def load(register, base, offset):
            _amx(builder, "tileloadd64", I8(register), at(base, offset), WORD(64))

        def multiply(i):
            """Of the i-th and the next 32 numbers into the buffer; two at a time, by turns in other registers, so that neither waits."""
            first = i % 4
            for k in (0, 1):
                _amx(builder, "tilezero", I8(first + k))
                load(A_0 + k, a, 1024 * (i + k))
                load(B_0 + k, b, STEP * (i + k))
                _amx(builder, "tdpbf16ps", I8(first + k), I8(A_0 + k), I8(B_0 + k))
            for k in (0, 1):
                load(B_0 + k, b, STEP * (i + k) + LOW_PARTS)
                _amx(builder, "tdpbf16ps", I8(first + k), I8(A_0 + k), I8(B_0 + k))
            for k in (0, 1):
                _amx(builder, "tilestored64", I8(first + k), at(buffer, SUMS * (first + k)), WORD(64))

        def add(i):
            for k in range(16):
                line = builder.add(builder.mul(row_bytes, WORD(2 * i + k // 4)), WORD(64 * (k % 4)))
                fetch(builder, pointer(builder, builder.add(row_ahead, line), I8))
            for i in (i, i + 1):
                for row in range(16):
                    scale = broadcast(builder, builder.load(at(scales, 32 * row + 4 * i, F32), align=4), 16)
                    product = builder.fmul(builder.load(at(buffer, SUMS * (i % 4) + 64 * row, f32x16.ir), align=4), scale, flags=FAST)
                    total[row] = builder.fadd(total[row], product, flags=FAST)

        rows = [at(sums, 64 * row, f32x16.ir) for row in range(16)]
        with builder.if_else(fresh) as (then, otherwise):
            with then:
                then_block = builder.block
            with otherwise:
                before, otherwise_block = [builder.load(row, align=4) for row in rows], builder.block
        total = [builder.phi(f32x16.ir) for _ in rows]
        for phi, value in zip(total, before):
            phi.add_incoming(constant([0.0] * 16, F32), then_block)
            phi.add_incoming(value, otherwise_block)
        multiply(0)
        for i in (2, 4, 6):
            multiply(i)
            add(i - 2)
        add(6)
        for value, row in zip(total, rows):
            builder.store(value, row, align=4)
        return context.get_dummy_value()
    return types.void(*[types.intp] * 4, types.boolean, *[types.intp] * 3), codegen
