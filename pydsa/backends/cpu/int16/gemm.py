"""Register-blocked matrix products of superblocks of int16 with scales."""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.blocks.block import MINS, MINS_16, SCALES, SUPERBLOCK
from pydsa.backends.cpu.simd import F32, FAST, I16, I32, INT16_ROWS, INT16_TOKENS, broadcast, constant, int16_dots, pointer


TILE_ROWS = 16 * INT16_ROWS          # rows that int16_products takes at a time


# A tile is 16 rows of superblocks in which each 64-byte column is transposed as 16 x 16 cells of four bytes: the cells of one column are
# contiguous.
TILE = 16 * SUPERBLOCK


def _make_int16_products(rows, tokens):
    @intrinsic
    def int16_products(typingctx, tiles, n_scales, n_mins, n_mins_16, x_at, x_offset, before_at, out_at, out_offset):
        """Compute sums + rows of the tiles . superblocks of tokens.

        *(out_at[t] + out_offset)[r] = *(before_at[t] + out_offset)[r] + row r . superblock *(x_at[t] + x_offset). before_at may be 0: the
        sums start at zero. n_scales, n_mins, n_mins_16: how many groups of 32, mins and mins of 16 are in use.
        """
        def codegen(context, b, signature, args):
            tiles, n_scales, n_mins, n_mins_16, x_at, x_offset, before_at, out_at, out_offset = args
            word, floats, ints, words = n_scales.type, ir.VectorType(F32, 16), ir.VectorType(I32, 16), ir.VectorType(I16, 32)

            def load(kind, address, align=4):
                return b.load(pointer(b, address, kind), align=align)

            def table(base, offset):        # the addresses in an array of them, moved by offset
                return [b.add(load(word, b.add(base, word(8 * t)), 8), offset) for t in range(tokens)]

            def cell(table, r, t):
                return b.add(table[t], word(64 * r))

            xs = table(x_at, x_offset)
            pairs = [(r, t) for r in range(rows) for t in range(tokens)]

            def loop(n, sums, body):
                """sums = body(i, sums) for i < n"""
                before, head, inside, after = b.block, *(b.append_basic_block(name) for name in ("head", "inside", "after"))
                b.branch(head)
                b.position_at_end(head)
                i = b.phi(word)
                i.add_incoming(word(0), before)
                phis = [b.phi(s.type) for s in sums]
                for phi, s in zip(phis, sums):
                    phi.add_incoming(s, before)
                b.cbranch(b.icmp_signed("<", i, n), inside, after)
                b.position_at_end(inside)
                new = body(i, phis)
                for phi, s in zip(phis, new):
                    phi.add_incoming(s, b.block)
                i.add_incoming(b.add(i, word(1)), b.block)
                b.branch(head)
                b.position_at_end(after)
                return phis

            def scaled(i, sums):
                def dots(k, sums):      # not unrolled: LLVM would make two instructions of each dot product, to shorten the chain
                    w = [b.bitcast(load(ints, b.add(tile, b.add(word(r * TILE), b.mul(k, word(64)))), 64), words) for r in range(rows)]
                    xs_now = [load(I32, b.add(x, b.mul(k, word(4)))) for x in xs_i]
                    xs_now = [b.bitcast(broadcast(b, x, 16), words) for x in xs_now]
                    return [int16_dots(b, s, w[r], xs_now[t]) for s, (r, t) in zip(sums, pairs)]

                tile, xs_i = b.add(tiles, b.mul(i, word(1024))), [b.add(x, b.mul(i, word(64))) for x in xs]
                dots = loop(word(16), [constant([0] * 16)] * len(pairs), dots)
                column = b.add(b.add(tiles, word(16 * SCALES)), b.mul(i, word(64)))
                scales = [load(floats, b.add(column, word(r * TILE)), 64) for r in range(rows)]
                x = [broadcast(b, load(F32, b.add(b.add(xs[t], word(SCALES)), b.mul(i, word(4)))), 16) for t in range(tokens)]
                return [b.fadd(s, b.fmul(b.sitofp(d, floats), b.fmul(scales[r], x[t], flags=FAST), flags=FAST), flags=FAST)
                        for s, d, (r, t) in zip(sums, dots, pairs)]

            def subtract_mins(part):
                def body(i, sums):
                    column = b.add(b.add(tiles, word(16 * part)), b.mul(i, word(64)))
                    mins = [load(floats, b.add(column, word(r * TILE)), 64) for r in range(rows)]
                    x = [broadcast(b, load(F32, b.add(b.add(xs[t], word(part)), b.mul(i, word(4)))), 16) for t in range(tokens)]
                    return [b.fsub(s, b.fmul(mins[r], x[t], flags=FAST), flags=FAST) for s, (r, t) in zip(sums, pairs)]
                return body

            zeros = [constant([0.0] * 16, F32)] * len(pairs)
            with b.if_else(b.icmp_signed("!=", before_at, word(0))) as (then, otherwise):
                with then:
                    before = table(before_at, out_offset)
                    loaded, then_block = [load(floats, cell(before, r, t)) for r, t in pairs], b.block
                with otherwise:
                    otherwise_block = b.block
            sums = [b.phi(floats) for _ in pairs]
            for phi, value, zero in zip(sums, loaded, zeros):
                phi.add_incoming(value, then_block)
                phi.add_incoming(zero, otherwise_block)
            sums = loop(n_scales, sums, scaled)
            sums = loop(n_mins, sums, subtract_mins(MINS))
            sums = loop(n_mins_16, sums, subtract_mins(MINS_16))
            outs = table(out_at, out_offset)
            for s, (r, t) in zip(sums, pairs):
                b.store(s, pointer(b, cell(outs, r, t), floats), align=4)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 9), codegen
    return int16_products


int16_products = _make_int16_products(INT16_ROWS, INT16_TOKENS)
