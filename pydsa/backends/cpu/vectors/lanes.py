"""Operations across lanes of vectors (see simd.py for the rest).

Shuffles, broadcasts, table lookups, transposes, and sums of sixteen vectors at a time.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.simd import (F32, FAST, FEATURES, I8, I16, I32, INTP, Vec, _join, _split, call_llvm, constant, f32x8,
                                             f32x16, i16x32, i32x16, int16_dots, nearest, pack, pointer, reduce_add)


@intrinsic
def halves_int16(typingctx, low, high):
    """Broadcast one int16 to the lower sixteen lanes, one to the upper."""
    def codegen(context, builder, signature, args):
        pair = pack(builder, args)
        return builder.shuffle_vector(pair, pair, constant([0] * 16 + [1] * 16))
    return i16x32(types.int16, types.int16), codegen


def _spreader(lanes):
    def spread(*which):
        @intrinsic
        def pick(typingctx, v):
            def codegen(context, builder, signature, args):
                return builder.shuffle_vector(args[0], args[0], constant([lane for lane in which for _ in range(lanes // len(which))]))
            return Vec(v.element, lanes)(v), codegen
        return pick
    return spread


# spread(0, 2): a function that broadcasts lane 0 of a vector to the first half of sixteen lanes, lane 2 to the second; spread_int16: of 32
spread, spread_int16 = _spreader(16), _spreader(32)


def spread_bytes(*which):
    """Make a function like one of spread_int16, of an i8x16.

    Its bytes become the low bytes of int16, whose high ones are 0.
    """
    @intrinsic
    def pick(typingctx, v):
        def codegen(context, builder, signature, args):
            lanes = [lane for byte in which for lane in [byte, 16] * (32 // len(which))]
            return builder.bitcast(builder.shuffle_vector(args[0], constant([0] * 16, I8), constant(lanes)), i16x32.ir)
        return i16x32(v), codegen
    return pick


def _repeater(n):
    """Make a function that loads n int16 into each part of an i16x32."""
    @intrinsic
    def repeat(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            v = builder.load(pointer(builder, builder.add(*args), ir.VectorType(I16, n)), align=1)
            return builder.shuffle_vector(v, v, constant([*range(n)] * (32 // n)))
        return i16x32(types.intp, types.intp), codegen
    return repeat


both_halves, all_quarters = _repeater(16), _repeater(8)     # load 32 bytes, 16 bytes


def _quarters(*which):
    """Make a function that joins quarters of two vectors.

    0 to 3 are those of the first, 4 to 7 those of the second.
    """
    @intrinsic
    def quarters(typingctx, a, b):
        def codegen(context, builder, signature, args):
            size = a.lanes // 4
            return builder.shuffle_vector(*args, constant([size * quarter + j for quarter in which for j in range(size)]))
        return a(a, a), codegen
    return quarters


even_quarters, odd_quarters = _quarters(0, 2, 4, 6), _quarters(1, 3, 5, 7)


@intrinsic
def shift_quarters(typingctx, v):
    """Shift the int16 of the quarters right by 0, 2, 4 and 6 bits."""
    return i16x32(i16x32), lambda context, builder, signature, args: builder.lshr(args[0], constant([j // 8 * 2 for j in range(32)], I16))


def _piece(n, i):
    """Make a function that extracts the i-th of n equal pieces of a vector."""
    @intrinsic
    def piece(typingctx, v):
        size = v.lanes // n

        def codegen(context, builder, signature, args):
            return builder.shuffle_vector(args[0], args[0], constant(range(i * size, (i + 1) * size)))
        return Vec(v.element, size)(v), codegen
    return piece


lower_half, upper_half = _piece(2, 0), _piece(2, 1)


first_quarter, second_quarter, third_quarter, last_quarter = (_piece(4, i) for i in range(4))


def _fold(builder, rows, bits, combine):
    """Emit one vector of sixteen lanes that combines pairs of lanes of many.

    bits: in which the indices of a pair's lanes differ. A lane with the first bit is of the last half of the rows, and so on.
    """
    for bit in bits:
        half = len(rows) // 2
        low = constant([j if not j & bit else j - bit + 16 for j in range(16)])
        high = constant([j + bit if not j & bit else j + 16 for j in range(16)])
        rows = [combine(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)) for a, b in zip(rows[:half], rows[half:])]
    return rows[0]


def sum_rows(builder, rows):
    """Emit the sums of the lanes of each of sixteen f32x16, as one vector."""
    return _fold(builder, rows, (8, 4, 2, 1), lambda a, b: builder.fadd(a, b, flags=FAST))


def _load_rows(builder, address, n, kind):
    return [builder.load(pointer(builder, builder.add(address, INTP(64 * i)), kind), align=4) for i in range(n)]


@intrinsic
def group_maxima(typingctx, address):
    """Return the largest magnitude of each of eight groups of 32 floats.

    NaN where there is one: as integers the bits of magnitudes have the same order.
    """
    def codegen(context, builder, signature, args):
        def larger(a, b):
            return builder.select(builder.icmp_signed(">", a, b), a, b)
        rows = [builder.and_(v, constant([0x7FFFFFFF] * 16)) for v in _load_rows(builder, args[0], 16, i32x16.ir)]
        top = _fold(builder, [larger(a, b) for a, b in zip(rows[::2], rows[1::2])], (4, 2, 1), larger)
        return builder.bitcast(larger(*(builder.shuffle_vector(top, top, constant(range(i, i + 8))) for i in (0, 8))), f32x8.ir)
    return f32x8(types.intp), codegen


@intrinsic
def sums_of_two(typingctx, v):
    """Return the sums of int16 2 i and 2 i + 1."""
    def codegen(context, builder, signature, args):
        return int16_dots(builder, None, args[0], constant([1] * 32, I16))
    return i32x16(i16x32), codegen


@intrinsic
def half_group_sums(typingctx, address):
    """Return the sums of the halves of eight groups of 32 integers.

    As f32x16. At an address are the sums_of_two of each group, whose even elements come first.
    """
    def codegen(context, builder, signature, args):
        sums = _fold(builder, _load_rows(builder, args[0], 8, i32x16.ir), (8, 2, 1), builder.add)       # bit 4: the second half
        sums = builder.shuffle_vector(sums, sums, constant([j & 8 | (j & 1) << 2 | (j & 6) >> 1 for j in range(16)]))
        return builder.sitofp(sums, f32x16.ir)
    return f32x16(types.intp), codegen


@intrinsic
def sums_of_pairs(typingctx, v):
    """Return the sums of lanes 2 i and 2 i + 1."""
    def codegen(context, builder, signature, args):
        return builder.fadd(*(builder.shuffle_vector(args[0], args[0], constant(range(i, 16, 2))) for i in (0, 1)), flags=FAST)
    return f32x8(f32x16), codegen


@intrinsic
def row_sums(typingctx, address):
    """Sum the lanes of each of sixteen f32x16 in memory, as f32x16.

    It takes half as many instructions as sixteen separate reductions.
    """
    def codegen(context, builder, signature, args):
        return sum_rows(builder, _load_rows(builder, args[0], 16, f32x16.ir))
    return f32x16(types.intp), codegen


@intrinsic
def load_strided(typingctx, address, stride):
    """Load sixteen float32 with a stride in bytes."""
    def codegen(context, builder, signature, args):
        places = [pointer(builder, builder.add(args[0], builder.mul(args[1], INTP(i))), F32) for i in range(16)]
        return pack(builder, [builder.load(place, align=1) for place in places])
    return f32x16(types.intp, types.intp), codegen


@intrinsic
def butterflies_of_16(typingctx, v):
    """Compute the Walsh-Hadamard transform of sixteen floats, not normalised.

    Butterflies of lanes 1, 2, 4 and 8 apart.
    """
    def codegen(context, builder, signature, args):
        v, = args
        for step in (1, 2, 4, 8):
            other = builder.shuffle_vector(v, v, constant([j ^ step for j in range(16)]))
            sign = constant([-1.0 if j & step else 1.0 for j in range(16)], F32)
            v = builder.fadd(other, builder.fmul(v, sign, flags=FAST), flags=FAST)
        return v
    return f32x16(f32x16), codegen


@intrinsic
def padded_to_16(typingctx, v):
    """Pad a vector of floats with zeros to sixteen lanes."""
    def codegen(context, builder, signature, args):
        zeros = ir.Constant(v.ir, [0.0] * v.lanes)
        return builder.shuffle_vector(args[0], zeros, constant([i if i < v.lanes else v.lanes for i in range(16)]))
    return f32x16(v), codegen


@intrinsic
def minus_upper_half(typingctx, a, b):
    """Subtract the upper half of b from that of a; the lower half of a stays."""
    def codegen(context, builder, signature, args):
        n = a.lanes // 2
        if a.lanes == 16 and "avx512f" in FEATURES:     # as text, or LLVM would merge by a permute, of which there are fewer a cycle
            kind = ir.FunctionType(a.ir, [a.ir, a.ir, I16])
            return builder.asm(kind, "vsubps $2, $0, $0 {$3}", "=v,0,v,^Yk", [*args, I16(0xFF00)], False)
        return builder.shuffle_vector(args[0], builder.fsub(*args, flags=FAST), constant([*range(n), *range(3 * n, 4 * n)]))
    return a(a, a), codegen


def split_int8x2(builder, v):
    """Split vectors of int32 256 high + low, of which the lower 16 bits count.

    Returns high and low, each valid in its lower eight bits.
    """
    return builder.lshr(builder.add(v, constant([128] * 16)), constant([8] * 16)), v


@intrinsic
def store_int8x2(typingctx, high, low, v):
    """Round sixteen floats to integers 256 high + low and store the bytes.

    High bytes go to one address, low ones, signed, to another.
    """
    def codegen(context, builder, signature, args):
        for part, at in zip(split_int8x2(builder, nearest(builder, args[2])), args):
            part = builder.trunc(part, ir.VectorType(I8, 16))
            builder.store(part, pointer(builder, at, part.type), align=1)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, f32x16), codegen


@intrinsic
def load_int8x2(typingctx, high, low):
    """Load sixteen integers, high and low bytes at two addresses, as floats."""
    def codegen(context, builder, signature, args):
        kind = ir.VectorType(I8, 16)
        high, low = (builder.sext(builder.load(pointer(builder, at, kind), align=1), i32x16.ir) for at in args)
        return builder.sitofp(builder.add(builder.shl(high, constant([8] * 16)), low), f32x16.ir)
    return f32x16(types.intp, types.intp), codegen


SHUFFLES = (("avx512bw", "avx512.pshuf.b.512", 64), ("avx2", "avx2.pshuf.b", 32), ("ssse3", "ssse3.pshuf.b.128", 16))


MULTIPLICATIONS = (("avx512bw", "avx512.pmaddubs.w.512", 64), ("avx2", "avx2.pmadd.ub.sw", 32), ("ssse3", "ssse3.pmadd.ub.sw.128", 16))


@intrinsic
def scaled_bytes(typingctx, v, scales):
    """Widen unsigned bytes to int16 and multiply them by signed bytes.

    v: i16x32 of two bytes each; scales: i16x32, a factor of both in the low byte, 0 in the high one. Returns two i16x32, the products of
    the low bytes and those of the high ones, which must be below 2^15.
    """
    def codegen(context, builder, signature, args):
        (v, scales), eight = args, constant([8] * 32, I16)
        for feature, name, lanes in MULTIPLICATIONS:
            if feature in FEATURES:     # sums of two products, of which one is 0
                kind, products = ir.VectorType(I16, lanes // 2), []
                parts, *factors = ([builder.bitcast(part, ir.VectorType(I8, lanes)) for part in _split(builder, a, lanes // 2)]
                                   for a in (v, scales, builder.shl(scales, eight)))
                for factor in factors:
                    products.append(_join(builder, [call_llvm(builder, f"llvm.x86.{name}", kind, pair) for pair in zip(parts, factor)]))
                return cgutils.pack_array(builder, products)
        scales = builder.ashr(builder.shl(scales, eight), eight)
        elements = builder.and_(v, constant([255] * 32, I16)), builder.lshr(v, eight)
        return cgutils.pack_array(builder, [builder.mul(w, scales) for w in elements])
    return types.UniTuple(i16x32, 2)(i16x32, i16x32), codegen


def lookup(table):
    """Make a function that maps bytes 0 to 15 of an i8x64 to an int8 table."""
    @intrinsic
    def look(typingctx, v):
        def codegen(context, builder, signature, args):
            for feature, name, lanes in SHUFFLES:
                if feature in FEATURES:
                    kind, tables = ir.VectorType(I8, lanes), constant([*table] * (lanes // 16), I8)
                    parts = _split(builder, args[0], lanes)
                    return _join(builder, [call_llvm(builder, f"llvm.x86.{name}", kind, [tables, part]) for part in parts])
            result = constant([0] * 64, I8)
            for i, value in enumerate(table):
                mask = builder.icmp_unsigned("==", args[0], constant([i] * 64, I8))
                result = builder.select(mask, constant([value] * 64, I8), result)
            return result
        return v(v), codegen
    return look


def gather_bytes(which, shifts, masks):
    """Make a function that gathers bytes of 16, shifts and masks them.

    Lane i of the i32x16 is (byte which[i] >> shifts[i]) & masks[i].
    """
    @intrinsic
    def pick(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            v = builder.load(pointer(builder, builder.add(*args), ir.VectorType(I8, 16)), align=1)
            if "avx512bw" in FEATURES:      # one instruction, where LLVM would take two
                v = builder.shuffle_vector(v, v, constant([*range(16)] * 4))
                table = constant([n for byte in which for n in (byte, 128, 128, 128)], I8)
                v = builder.bitcast(call_llvm(builder, "llvm.x86.avx512.pshuf.b.512", v.type, [v, table]), i32x16.ir)
            else:
                v = builder.zext(builder.shuffle_vector(v, v, constant(which)), i32x16.ir)
            return builder.and_(builder.lshr(v, constant(shifts)), constant(masks))
        return i32x16(types.intp, types.intp), codegen
    return pick


def gather_u32(which, shifts):
    """Make a function that gathers 32-bit integers and shifts them.

    Lane i of the i32 vector is integer which[i] at an address >> shifts[i].
    """
    @intrinsic
    def shift(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            v = builder.load(pointer(builder, builder.add(*args), ir.VectorType(I32, max(which) + 1)), align=1)
            return builder.lshr(builder.shuffle_vector(v, v, constant(which)), constant(shifts))
        return Vec("i32", len(which))(types.intp, types.intp), codegen
    return shift


@intrinsic
def transpose(typingctx, source, stride, target, target_stride):
    """Compute target[j][i] = source[i][j] for 16 x 16 cells of four bytes.

    stride, target_stride: bytes between rows.
    """
    def codegen(context, b, signature, args):
        source, stride, target, target_stride = args
        intp, vector = stride.type, ir.VectorType(I32, 16)
        rows = [b.load(pointer(b, b.add(source, b.mul(stride, intp(i))), vector), align=4) for i in range(16)]
        for step in (1, 2, 4, 8):       # exchange blocks of step x step cells
            for i in (i for i in range(16) if not i & step):
                first, second = rows[i], rows[i + step]
                rows[i] = b.shuffle_vector(first, second, constant([j + 16 - step if j & step else j for j in range(16)]))
                rows[i + step] = b.shuffle_vector(first, second, constant([j + 16 if j & step else j + step for j in range(16)]))
        for j, column in enumerate(rows):
            b.store(column, pointer(b, b.add(target, b.mul(target_stride, intp(j))), vector), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def sum_abs(typingctx, a, b):
    """Sum the magnitudes of two float vectors."""
    def codegen(context, builder, signature, args):
        a, b = (builder.bitcast(builder.and_(builder.bitcast(v, i32x16.ir), constant([0x7FFFFFFF] * 16)), f32x16.ir) for v in args)
        return reduce_add(builder, builder.fadd(a, b, flags=FAST))
    return types.float32(f32x16, f32x16), codegen


@intrinsic
def relu(typingctx, v):
    """Return max(v, 0); NaN stays."""
    def codegen(context, builder, signature, args):
        zero = constant([0.0] * 16, F32)
        return builder.select(builder.fcmp_ordered("<", args[0], zero), zero, args[0])
    return f32x16(f32x16), codegen
