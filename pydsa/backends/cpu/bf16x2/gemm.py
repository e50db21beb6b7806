"""Matrix products of panels of bfloat16 pairs in AMX tiles.

Of the four products of two pairs the three largest are computed; low times low is left out.
"""
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.amx import A_0, AHEAD, B_0, LOW_PARTS, STEP, TILE_BYTES, call_amx, prefetch_line
from pydsa.backends.cpu.vectors.simd import I8, INTP, pointer


def _make_products(rows, columns):
    @intrinsic
    def products(typingctx, a, a_panel, b, b_panel, n_steps, sums, sums_row, fresh, ahead):
        """Compute tile[i, j] (+)= A panel i . B panel j over n_steps > 0 steps.

        a_panel, b_panel: strides of panels; sums_row: stride of a row of tiles; in bytes. fresh: the sums start at zero. In each step the
        next 512 bytes from `ahead` on are prefetched into the second-level cache.
        """
        def codegen(context, builder, signature, args):
            a, a_panel, b, b_panel, n_steps, sums, sums_row, fresh, ahead = args

            def at(base, *offsets):
                for offset in offsets:
                    base = builder.add(base, offset)
                return pointer(builder, base, I8)

            cells = [(i, j, at(sums, builder.mul(sums_row, INTP(i)), INTP(TILE_BYTES * j))) for i in range(rows) for j in range(columns)]
            with builder.if_else(fresh) as (then, otherwise):
                with then:
                    for i, j, _ in cells:
                        call_amx(builder, "tilezero", I8(2 * i + j))
                with otherwise:
                    for i, j, where in cells:
                        call_amx(builder, "tileloadd64", I8(2 * i + j), where, INTP(64))
            before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(INTP)
            step.add_incoming(INTP(0), before)
            offset = builder.mul(step, INTP(STEP))

            def load(first, n, base, panel, part):
                for i in range(n):
                    call_amx(builder, "tileloadd64", I8(first + i), at(base, offset, builder.mul(panel, INTP(i)), INTP(part)), INTP(64))

            def multiply(part):
                for i in part:
                    prefetch_line(builder, at(ahead, builder.mul(step, INTP(AHEAD)), INTP(64 * i)))
                for i, j, _ in cells:
                    call_amx(builder, "tdpbf16ps", I8(2 * i + j), I8(A_0 + i), I8(B_0 + j))

            load(A_0, rows, a, a_panel, LOW_PARTS)
            load(B_0, columns, b, b_panel, 0)
            multiply(range(3))
            load(A_0, rows, a, a_panel, 0)
            multiply(range(3, 6))
            load(B_0, columns, b, b_panel, LOW_PARTS)
            multiply(range(6, 8))
            following = builder.add(step, INTP(1))
            step.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, n_steps), loop, after)
            builder.position_at_end(after)
            for i, j, where in cells:
                call_amx(builder, "tilestored64", I8(2 * i + j), where, INTP(64))
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7, types.boolean, types.intp), codegen
    return products


_two_by_two, _two_by_one, _one_by_two, _one_by_one = (_make_products(i, j) for i in (2, 1) for j in (2, 1))


@inner
def panel_products(a, a_panel, n_a, b, b_panel, n_b, n_steps, sums, fresh, ahead):
    """Compute tile[i, j] (+)= A panel i . B panel j for i < n_a, j < n_b.

    sums: n_a rows of n_b tiles. What is needed next is prefetched into the second-level cache meanwhile: n_steps * AHEAD bytes from `ahead`
    on for every 2 x 2 tiles.
    """
    for j in range(0, n_b, 2):
        for i in range(0, n_a, 2):
            ai, bj, cell, row = a + i * a_panel, b + j * b_panel, sums + TILE_BYTES * (i * n_b + j), TILE_BYTES * n_b
            if n_a - i > 1 and n_b - j > 1:
                _two_by_two(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            elif n_a - i > 1:
                _two_by_one(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            elif n_b - j > 1:
                _one_by_two(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            else:
                _one_by_one(ai, a_panel, bj, b_panel, n_steps, cell, row, fresh, ahead)
            ahead += n_steps * AHEAD
