"""Register-blocked inner loops, each one intrinsic: R rows times T vectors whose sums stay in registers.

`products` of float32 is under attention, the indexer and unquantized weights; `word_products`, of 16-bit words with scales, under prompts.
"""
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.jit import inner
from pydsa.quants.block import CHUNK, LOW, LOW_16, SCALE, float_from_bits
from pydsa.simd import F32, FAST, FEATURES, I16, I32, broadcast, constant, float_at, i64_at, pointer, reduce_add, word_dots


def _register_plan(features):
    """How many sums fit into the registers beside the operands.

    Floats in a register; rows, vectors of `products`; 16s of rows, tokens of `word_products`; rows, 16s of columns of `combine`.
    """
    if "avx512f" in features:
        return 16, 4, 4, 2, 6, 6, 4     # 32 registers
    if "avx" in features:
        return 8, 4, 2, 1, 3, 6, 1      # 16 registers
    return 4, 4, 2, 1, 1, 2, 1


numba.get_num_threads()     # launches the threads, and so defines the symbol that n_threads() calls
LANES, ROWS, VECTORS, WORD_ROWS, WORD_TOKENS, COMBINE_ROWS, COMBINE_COLUMNS = _register_plan(FEATURES)
TILE_ROWS = 16 * WORD_ROWS          # rows that word_products takes at a time


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
def n_threads(typingctx):
    """The threads that a parallel region of this kernel will use. numba.get_num_threads would keep the kernel out of the cache."""
    def codegen(context, builder, signature, args):
        word = context.get_value_type(types.intp)       # as numba declares it for its own parallel regions; the function returns an int
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), "get_num_threads")
        return builder.sext(builder.trunc(builder.call(function, []), ir.IntType(32)), word)
    return types.intp(), codegen


@intrinsic
def add_at(typingctx, address, value):
    """Add a float32 to the one at an address."""
    def codegen(context, builder, signature, args):
        target = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        builder.store(builder.fadd(builder.load(target, align=4), args[1]), target, align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.float32), codegen


def _pointer_to(number):
    @intrinsic
    def pointer_to(typingctx, address):
        """An address as a pointer that carray takes: contiguous rows inside arrays of any strides."""
        return (types.CPointer(number)(types.intp), lambda context, builder, signature, args: builder.inttoptr(
            args[0], context.get_value_type(types.CPointer(number))))
    return pointer_to


floats_pointer, uints_pointer = _pointer_to(types.float32), _pointer_to(types.uint32)


@inner
def address(array):
    """Where an array begins, as a signed integer: numba's ctypes.data is unsigned, and added to a signed one becomes a float."""
    return np.int64(array.ctypes.data)


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


# Without "reassoc", which would undo the reduction in two steps.
@numba.njit(nogil=True, fastmath={"nsz", "contract"}, error_model="numpy")
def exp(x):
    """e^x in float32 with a relative error of 1e-7, from -87.3 on, in operations that a loop over it vectorises (Cephes' polynomial).

    Below -87.3 it stays at e^-87.3; it is infinite from 88.4 on. NaN must not come here.
    """
    x = min(max(x, np.float32(-87.3)), np.float32(88.7))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * float_from_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


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


# A tile is 16 rows of chunks with the 16 x 16 four-byte cells of every 64 bytes turned over: the cells of one column lie side by side.
TILE = 16 * CHUNK


@intrinsic
def turn_over(typingctx, source, stride, target, target_stride):
    """target[j][i] = source[i][j] for 16 x 16 cells of four bytes; rows are `stride` and `target_stride` bytes apart."""
    def codegen(context, b, signature, args):
        source, stride, target, target_stride = args
        word, vector = stride.type, ir.VectorType(I32, 16)
        rows = [b.load(pointer(b, b.add(source, b.mul(stride, word(i))), vector), align=4) for i in range(16)]
        for step in (1, 2, 4, 8):       # exchange blocks of step x step cells
            for i in (i for i in range(16) if not i & step):
                first, second = rows[i], rows[i + step]
                rows[i] = b.shuffle_vector(first, second, constant([j + 16 - step if j & step else j for j in range(16)]))
                rows[i + step] = b.shuffle_vector(first, second, constant([j + 16 if j & step else j + step for j in range(16)]))
        for j, column in enumerate(rows):
            b.store(column, pointer(b, b.add(target, b.mul(target_stride, word(j))), vector), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


def _make_word_products(rows, tokens):
    @intrinsic
    def word_products(typingctx, tiles, n_scales, n_lows, n_lows_16, x_at, x_offset, before_at, out_at, out_offset):
        """*(out_at[t] + out_offset)[r] = *(before_at[t] + out_offset)[r] + row r of the tiles . the chunk *(x_at[t] + x_offset).

        n_scales, n_lows, n_lows_16: how many 32s, lows and low16s of the chunks are in use. before_at may be 0: nothing was before.
        """
        def codegen(context, b, signature, args):
            tiles, n_scales, n_lows, n_lows_16, x_at, x_offset, before_at, out_at, out_offset = args
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
                    return [word_dots(b, s, w[r], xs_now[t]) for s, (r, t) in zip(sums, pairs)]

                tile, xs_i = b.add(tiles, b.mul(i, word(1024))), [b.add(x, b.mul(i, word(64))) for x in xs]
                dots = loop(word(16), [constant([0] * 16)] * len(pairs), dots)
                column = b.add(b.add(tiles, word(16 * SCALE)), b.mul(i, word(64)))
                scales = [load(floats, b.add(column, word(r * TILE)), 64) for r in range(rows)]
                x = [broadcast(b, load(F32, b.add(b.add(xs[t], word(SCALE)), b.mul(i, word(4)))), 16) for t in range(tokens)]
                return [b.fadd(s, b.fmul(b.sitofp(d, floats), b.fmul(scales[r], x[t], flags=FAST), flags=FAST), flags=FAST)
                        for s, d, (r, t) in zip(sums, dots, pairs)]

            def lowered(part):
                def body(i, sums):
                    column = b.add(b.add(tiles, word(16 * part)), b.mul(i, word(64)))
                    lows = [load(floats, b.add(column, word(r * TILE)), 64) for r in range(rows)]
                    x = [broadcast(b, load(F32, b.add(b.add(xs[t], word(part)), b.mul(i, word(4)))), 16) for t in range(tokens)]
                    return [b.fsub(s, b.fmul(lows[r], x[t], flags=FAST), flags=FAST) for s, (r, t) in zip(sums, pairs)]
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
            sums = loop(n_lows, sums, lowered(LOW))
            sums = loop(n_lows_16, sums, lowered(LOW_16))
            outs = table(out_at, out_offset)
            for s, (r, t) in zip(sums, pairs):
                b.store(s, pointer(b, cell(outs, r, t), floats), align=4)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 9), codegen
    return word_products


word_products = _make_word_products(WORD_ROWS, WORD_TOKENS)
