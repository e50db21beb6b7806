"""Register-blocked matrix products of float32.

tile_products: rows times vectors, both contiguous along k. matmul_add: rows times columns, c += a b.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.lanes import sum_rows
from pydsa.backends.cpu.vectors.simd import (F32, FAST, GEMM_COLUMNS, GEMM_ROWS, LANES, ROWS, VECTORS, broadcast, constant, float_at,
                                             i64_at, pointer, reduce_add)


def _make_products(rows, vectors):
    @intrinsic
    def products(typingctx, w, w_stride, x_at, x_offset, n, out_at, out_offset):
        """Add dot products of n floats to out, for all r and t.

        *(out_at[t] + out_offset + 4 r) += *(w + r w_stride) . *(x_at[t] + x_offset); n is a multiple of LANES.
        """
        def codegen(context, b, signature, args):
            w, w_stride, x_at, x_offset, n, out_at, out_offset = args
            intp = n.type
            vector = ir.VectorType(F32, LANES)

            def load(kind, address, align):
                return b.load(b.inttoptr(address, kind.as_pointer()), align=align)

            def table(base, offset):        # loads addresses from an array, and adds offset
                return [b.add(load(intp, b.add(base, intp(8 * t)), 8), offset) for t in range(vectors)]

            xs, outs = table(x_at, x_offset), table(out_at, out_offset)
            ws = [b.add(w, b.mul(w_stride, intp(r))) for r in range(rows)]
            before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
            b.branch(loop)
            b.position_at_end(loop)
            k = b.phi(intp)
            k.add_incoming(intp(0), before)
            sums = [[b.phi(vector) for _ in range(vectors)] for _ in range(rows)]
            w_now = [load(vector, b.add(a, k), 4) for a in ws]
            x_now = [load(vector, b.add(a, k), 4) for a in xs]
            new = [[b.fadd(sums[r][t], b.fmul(w_now[r], x_now[t], flags=FAST), flags=FAST) for t in range(vectors)] for r in range(rows)]
            k_next = b.add(k, intp(4 * LANES))
            for r in range(rows):
                for t in range(vectors):
                    sums[r][t].add_incoming(ir.Constant(vector, [0.0] * LANES), before)
                    sums[r][t].add_incoming(new[r][t], loop)
            k.add_incoming(k_next, loop)
            b.cbranch(b.icmp_signed("<", k_next, b.mul(n, intp(4))), loop, after)
            b.position_at_end(after)
            if LANES == rows * vectors == 16:
                sums_of_all = sum_rows(b, [new[r][t] for t in range(vectors) for r in range(rows)])
                for t in range(vectors):
                    some = b.shuffle_vector(sums_of_all, sums_of_all, constant(range(rows * t, rows * t + rows)))
                    target = b.inttoptr(outs[t], some.type.as_pointer())
                    b.store(b.fadd(b.load(target, align=4), some), target, align=4)
                return context.get_dummy_value()
            for t in range(vectors):
                for r in range(rows):
                    target = b.inttoptr(b.add(outs[t], intp(4 * r)), F32.as_pointer())
                    b.store(b.fadd(b.load(target, align=4), reduce_add(b, new[r][t])), target, align=4)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7), codegen
    return products


_block, _column, _single = _make_products(ROWS, VECTORS), _make_products(ROWS, 1), _make_products(1, 1)


@intrinsic
def add_at(typingctx, address, value):
    """Add a float32 to the float32 at an address."""
    def codegen(context, builder, signature, args):
        target = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        builder.store(builder.fadd(builder.load(target, align=4), args[1]), target, align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.float32), codegen


@inner
def tile_products(w, w_stride, n_rows, x_at, n_vectors, x_offset, n, out_at, out_offset):
    """Compute out_at[t][r] += row r . vector t over n floats.

    For any n_rows and n_vectors. All arguments are addresses, byte strides and byte offsets; x_at and out_at hold int64 addresses, one a
    vector.
    """
    n_vectorised = n // LANES * LANES
    for r in range(0, n_rows, ROWS):
        if n_vectorised > 0 and n_rows - r >= ROWS:
            t = 0
            while n_vectors - t >= VECTORS:
                _block(w + r * w_stride, w_stride, x_at + 8 * t, x_offset, n_vectorised, out_at + 8 * t, out_offset + 4 * r)
                t += VECTORS
            while t < n_vectors:
                _column(w + r * w_stride, w_stride, x_at + 8 * t, x_offset, n_vectorised, out_at + 8 * t, out_offset + 4 * r)
                t += 1
        elif n_vectorised > 0:
            for i in range(r, n_rows):
                for t in range(n_vectors):
                    _single(w + i * w_stride, w_stride, x_at + 8 * t, x_offset, n_vectorised, out_at + 8 * t, out_offset + 4 * i)
    if n_vectorised < n:
        for r in range(n_rows):
            for t in range(n_vectors):
                total = np.float32(0)
                x = i64_at(x_at, 8 * t) + x_offset
                for k in range(n_vectorised, n):
                    total += float_at(w + r * w_stride, 4 * k) * float_at(x, 4 * k)
                add_at(i64_at(out_at, 8 * t) + out_offset + 4 * r, total)


def _make_matmul_add(rows, columns):
    @intrinsic
    def matmul_add(typingctx, c, c_stride, a, a_stride, b, b_stride, n):
        """Compute c[i][j] += sum over k < n of a[i][k] b[k][j].

        For i < rows and j < 16 columns; float32 at addresses, strides in bytes.
        """
        def codegen(context, builder, signature, args):
            c, c_stride, a, a_stride, b, b_stride, n = args
            intp, vector = n.type, ir.VectorType(F32, 16)

            def at(address, kind):
                return pointer(builder, address, kind)

            a_rows = [builder.add(a, builder.mul(a_stride, intp(i))) for i in range(rows)]
            cells = [[at(builder.add(builder.add(c, builder.mul(c_stride, intp(i))), intp(64 * j)), vector) for j in range(columns)]
                     for i in range(rows)]
            before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
            sums = [[constant([0.0] * 16, F32)] * columns for _ in cells]
            builder.branch(loop)
            builder.position_at_end(loop)
            k, b_row = builder.phi(intp), builder.phi(intp)
            k.add_incoming(intp(0), before)
            b_row.add_incoming(b, before)
            now = [[builder.phi(vector) for _ in row] for row in cells]
            xs = [builder.load(at(builder.add(b_row, intp(64 * j)), vector), align=4) for j in range(columns)]
            for i in range(rows):
                factor = broadcast(builder, builder.load(at(builder.add(a_rows[i], builder.mul(k, intp(4))), F32), align=4), 16)
                for j in range(columns):
                    new = builder.fadd(now[i][j], builder.fmul(factor, xs[j], flags=FAST), flags=FAST)
                    now[i][j].add_incoming(sums[i][j], before)
                    now[i][j].add_incoming(new, loop)
                    sums[i][j] = new
            after_k = builder.add(k, intp(1))
            k.add_incoming(after_k, loop)
            b_row.add_incoming(builder.add(b_row, b_stride), loop)
            builder.cbranch(builder.icmp_signed("<", after_k, n), loop, after)
            builder.position_at_end(after)
            for row, new in zip(cells, sums):
                for cell, value in zip(row, new):
                    builder.store(builder.fadd(builder.load(cell, align=4), value, flags=FAST), cell, align=4)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 7), codegen
    return matmul_add


_matmul_add_block, _matmul_add_pair, _matmul_add_row = (_make_matmul_add(rows, GEMM_COLUMNS) for rows in (GEMM_ROWS, 2, 1))
COLUMNS = 16 * GEMM_COLUMNS


@inner
def matmul_add(c, c_stride, n_rows, n_columns, a, a_stride, b, b_stride, n):
    """Compute c += a b, float32 at addresses, strides in bytes.

    For any n_rows; n_columns is a multiple of COLUMNS, n > 0.
    """
    for j in range(0, n_columns, COLUMNS):
        i = 0
        while n_rows - i >= GEMM_ROWS:
            _matmul_add_block(c + i * c_stride + 4 * j, c_stride, a + i * a_stride, a_stride, b + 4 * j, b_stride, n)
            i += GEMM_ROWS
        while n_rows - i >= 2:      # a single row waits for its own sums
            _matmul_add_pair(c + i * c_stride + 4 * j, c_stride, a + i * a_stride, a_stride, b + 4 * j, b_stride, n)
            i += 2
        if i < n_rows:
            _matmul_add_row(c + i * c_stride + 4 * j, c_stride, a + i * a_stride, a_stride, b + 4 * j, b_stride, n)
