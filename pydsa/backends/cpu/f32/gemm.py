"""Register-blocked products of float32: tiles of rows times vectors, and of rows times columns."""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.simd import (COMBINE_COLUMNS, COMBINE_ROWS, F32, FAST, LANES, ROWS, VECTORS, broadcast, constant, float_at, i64_at,
                                     pointer, reduce_add)


def _make_products(rows, vectors):
    @intrinsic
    def products(typingctx, w, w_stride, x_at, x_offset, n, out_at, out_offset):
        """*(out_at[t] + out_offset + 4 r) += sum over n floats of *(w + r w_stride) * *(x_at[t] + x_offset), for all r and t.

        n is a multiple of LANES.
        """
        def codegen(context, b, signature, args):
            w, w_stride, x_at, x_offset, n, out_at, out_offset = args
            word = n.type
            vector = ir.VectorType(F32, LANES)

            def load(kind, address, align):
                return b.load(b.inttoptr(address, kind.as_pointer()), align=align)

            def table(base, offset):        # the addresses in an array of them, moved by offset
                return [b.add(load(word, b.add(base, word(8 * t)), 8), offset) for t in range(vectors)]

            xs, outs = table(x_at, x_offset), table(out_at, out_offset)
            ws = [b.add(w, b.mul(w_stride, word(r))) for r in range(rows)]
            before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
            b.branch(loop)
            b.position_at_end(loop)
            k = b.phi(word)
            k.add_incoming(word(0), before)
            sums = [[b.phi(vector) for _ in range(vectors)] for _ in range(rows)]
            w_now = [load(vector, b.add(a, k), 4) for a in ws]
            x_now = [load(vector, b.add(a, k), 4) for a in xs]
            new = [[b.fadd(sums[r][t], b.fmul(w_now[r], x_now[t], flags=FAST), flags=FAST) for t in range(vectors)] for r in range(rows)]
            k_next = b.add(k, word(4 * LANES))
            for r in range(rows):
                for t in range(vectors):
                    sums[r][t].add_incoming(ir.Constant(vector, [0.0] * LANES), before)
                    sums[r][t].add_incoming(new[r][t], loop)
            k.add_incoming(k_next, loop)
            b.cbranch(b.icmp_signed("<", k_next, b.mul(n, word(4))), loop, after)
            b.position_at_end(after)
            for t in range(vectors):
                for r in range(rows):
                    target = b.inttoptr(b.add(outs[t], word(4 * r)), F32.as_pointer())
                    b.store(b.fadd(b.load(target, align=4), reduce_add(b, new[r][t])), target, align=4)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7), codegen
    return products


_block, _column, _single = _make_products(ROWS, VECTORS), _make_products(ROWS, 1), _make_products(1, 1)


@intrinsic
def add_at(typingctx, address, value):
    """Add a float32 to the one at an address."""
    def codegen(context, builder, signature, args):
        target = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        builder.store(builder.fadd(builder.load(target, align=4), args[1]), target, align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.float32), codegen


@inner
def tile_products(w, w_stride, n_rows, x_at, n_vectors, x_offset, n, out_at, out_offset):
    """out_at[t][r] += row r . vector t over n floats, for any n_rows and n_vectors; all are addresses and byte offsets.

    At x_at and out_at lie int64 addresses, one a vector.
    """
    whole = n // LANES * LANES
    for r in range(0, n_rows, ROWS):
        if whole > 0 and n_rows - r >= ROWS:
            t = 0
            while n_vectors - t >= VECTORS:
                _block(w + r * w_stride, w_stride, x_at + 8 * t, x_offset, whole, out_at + 8 * t, out_offset + 4 * r)
                t += VECTORS
            while t < n_vectors:
                _column(w + r * w_stride, w_stride, x_at + 8 * t, x_offset, whole, out_at + 8 * t, out_offset + 4 * r)
                t += 1
        elif whole > 0:
            for i in range(r, n_rows):
                for t in range(n_vectors):
                    _single(w + i * w_stride, w_stride, x_at + 8 * t, x_offset, whole, out_at + 8 * t, out_offset + 4 * i)
    if whole < n:
        for r in range(n_rows):
            for t in range(n_vectors):
                total = np.float32(0)
                x = i64_at(x_at, 8 * t) + x_offset
                for k in range(whole, n):
                    total += float_at(w + r * w_stride, 4 * k) * float_at(x, 4 * k)
                add_at(i64_at(out_at, 8 * t) + out_offset + 4 * r, total)


def _make_combine(rows, columns):
    @intrinsic
    def combine(typingctx, c, c_stride, a, a_stride, b, b_stride, n):
        """c[i][j] += sum over k < n of a[i][k] b[k][j], for i < rows and j < 16 columns; float32 at addresses, strides in bytes."""
        def codegen(context, builder, signature, args):
            c, c_stride, a, a_stride, b, b_stride, n = args
            word, vector = n.type, ir.VectorType(F32, 16)

            def at(address, kind):
                return pointer(builder, address, kind)

            a_rows = [builder.add(a, builder.mul(a_stride, word(i))) for i in range(rows)]
            cells = [[at(builder.add(builder.add(c, builder.mul(c_stride, word(i))), word(64 * j)), vector) for j in range(columns)]
                     for i in range(rows)]
            before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
            sums = [[constant([0.0] * 16, F32)] * columns for _ in cells]
            builder.branch(loop)
            builder.position_at_end(loop)
            k, b_row = builder.phi(word), builder.phi(word)
            k.add_incoming(word(0), before)
            b_row.add_incoming(b, before)
            now = [[builder.phi(vector) for _ in row] for row in cells]
            xs = [builder.load(at(builder.add(b_row, word(64 * j)), vector), align=4) for j in range(columns)]
            for i in range(rows):
                factor = broadcast(builder, builder.load(at(builder.add(a_rows[i], builder.mul(k, word(4))), F32), align=4), 16)
                for j in range(columns):
                    new = builder.fadd(now[i][j], builder.fmul(factor, xs[j], flags=FAST), flags=FAST)
                    now[i][j].add_incoming(sums[i][j], before)
                    now[i][j].add_incoming(new, loop)
                    sums[i][j] = new
            after_k = builder.add(k, word(1))
            k.add_incoming(after_k, loop)
            b_row.add_incoming(builder.add(b_row, b_stride), loop)
            builder.cbranch(builder.icmp_signed("<", after_k, n), loop, after)
            builder.position_at_end(after)
            for row, new in zip(cells, sums):
                for cell, value in zip(row, new):
                    builder.store(builder.fadd(builder.load(cell, align=4), value, flags=FAST), cell, align=4)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7), codegen
    return combine


_combine_block, _combine_row = _make_combine(COMBINE_ROWS, COMBINE_COLUMNS), _make_combine(1, COMBINE_COLUMNS)
COLUMNS = 16 * COMBINE_COLUMNS


@inner
def combine(c, c_stride, n_rows, n_columns, a, a_stride, b, b_stride, n):
    """c += a b for any n_rows, n_columns a multiple of COLUMNS and n > 0; float32 at addresses, strides in bytes."""
    for j in range(0, n_columns, COLUMNS):
        i = 0
        while n_rows - i >= COMBINE_ROWS:
            _combine_block(c + i * c_stride + 4 * j, c_stride, a + i * a_stride, a_stride, b + 4 * j, b_stride, n)
            i += COMBINE_ROWS
        while i < n_rows:
            _combine_row(c + i * c_stride + 4 * j, c_stride, a + i * a_stride, a_stride, b + 4 * j, b_stride, n)
            i += 1
