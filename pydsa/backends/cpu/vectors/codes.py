"""Lookups of codes: sixteen-bit entries of a grid, and int16 values of four-bit codes.

Thirty-two lanes are looked up at a time. With AVX-512 tables are in registers; without it an entry of a grid is loaded for each lane.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.lanes import SHUFFLES
from pydsa.backends.cpu.vectors.simd import (F32, FEATURES, I8, I16, I32, I64, INTP, Vec, _join, _split, broadcast, call_llvm, constant,
                                             extend_halves, f32x8, i16x32, nearest, pointer)


WIDE = "avx512bw" in FEATURES       # whether one instruction permutes 32 int16
IN_REGISTERS = 1024                 # the most entries that are permuted: more take longer than loads


def _load_entries(builder, table, index):
    """Emit loads of a table's entry for each lane of an index.

    An entry is eight bytes of which six are zero: loads of four lanes, each begun two bytes earlier than the last, are or-ed together.
    """
    data = cgutils.global_constant(builder, "grid", ir.Constant(ir.ArrayType(I64, len(table) + 1), [0, *map(int, table)]))
    first, quads = builder.add(builder.ptrtoint(data, INTP), INTP(8)), builder.bitcast(index, ir.VectorType(I64, 8))
    result = ir.Constant(quads.type, ir.Undefined)
    for quad in range(8):
        lanes, entry = builder.extract_element(quads, I32(quad)), None
        if not WIDE:
            lanes = builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [lanes], False)
        for i in range(4):
            if WIDE:        # LLVM must not see that these are lanes, or it extracts each by itself; this it can share among tokens
                lane = call_llvm(builder, "llvm.x86.bmi.pext.64", I64, [lanes, I64(0xFFFF << 16 * i)])      # slow where not WIDE
            else:
                lane = builder.zext(builder.trunc(builder.lshr(lanes, I64(16 * i)), I16), INTP)
            at = builder.add(builder.add(first, INTP(-2 * i)), builder.shl(lane, INTP(3)))
            loaded = builder.load(pointer(builder, at, I64), align=2)
            entry = loaded if entry is None else builder.or_(entry, loaded)
        result = builder.insert_element(result, entry, I32(quad))
    return builder.bitcast(result, i16x32.ir)


def _permute_entries(builder, table, index):
    """Emit permutations of 64 entries each.

    The upper bits of the index choose among them.
    """
    halves = [constant(table[i:i + 32], I16) for i in range(0, len(table), 32)]
    found = [call_llvm(builder, "llvm.x86.avx512.vpermi2var.hi.512", i16x32.ir, [low, index, high])
             for low, high in zip(halves[::2], halves[1::2])]
    bit = 64
    while len(found) > 1:
        upper = builder.icmp_unsigned("!=", builder.and_(index, constant([bit] * 32, I16)), constant([0] * 32, I16))
        found = [builder.select(upper, b, a) for a, b in zip(found[::2], found[1::2])]
        bit *= 2
    return found[0]


def grid_entries(table):
    """Make a function that maps i16x32 indices to sixteen-bit table entries.

    Indices must be below the length of the table, which is 64, 128, ...
    """
    @intrinsic
    def entries(typingctx, index):
        def codegen(context, builder, signature, args):
            emit = _permute_entries if WIDE and len(table) <= IN_REGISTERS else _load_entries
            return emit(builder, table, args[0])
        return i16x32(i16x32), codegen
    return entries


def _permute_16(builder, table, index):
    """Emit a lookup of the low four or five bits, where WIDE."""
    return call_llvm(builder, "llvm.x86.avx512.permvar.hi.512", i16x32.ir, [constant(table * (32 // len(table)), I16), index])


def code_values(table):
    """Make a function that maps the low four bits of int16 to a table of int8.

    The upper bits are ignored.
    """
    @intrinsic
    def values(typingctx, codes):
        def codegen(context, builder, signature, args):
            if WIDE:
                return _permute_16(builder, [*table], args[0])
            for feature, name, lanes in SHUFFLES:
                if feature in FEATURES:     # the code selects the upper byte, and 128 a lower byte of zero
                    index = builder.or_(builder.and_(builder.shl(args[0], constant([8] * 32, I16)), constant([0x0F00] * 32, I16)),
                                        constant([0x80] * 32, I16))
                    kind, tables = ir.VectorType(I8, lanes), constant([*table] * (lanes // 16), I8)
                    parts = _split(builder, builder.bitcast(index, ir.VectorType(I8, 64)), lanes)
                    found = _join(builder, [call_llvm(builder, f"llvm.x86.{name}", kind, [tables, part]) for part in parts])
                    return builder.ashr(builder.bitcast(found, i16x32.ir), constant([8] * 32, I16))
            code, result = builder.and_(args[0], constant([15] * 32, I16)), constant([0] * 32, I16)
            for i, value in enumerate(table):
                result = builder.select(builder.icmp_unsigned("==", code, constant([i] * 32, I16)), constant([value] * 32, I16), result)
            return result
        return i16x32(i16x32), codegen
    return values


def _to_top_bits(builder, v):
    """Emit moves of the low four bits to the top bits of four nibbles."""
    v = builder.and_(v, constant([15] * 32, I16))
    for shift, mask in (6, 0x0303), (3, 0x1111):
        v = builder.and_(builder.or_(v, builder.shl(v, constant([shift] * 32, I16))), constant([mask] * 32, I16))
    return builder.shl(v, constant([3] * 32, I16))


TOP_BITS = [sum((i >> bit & 1) << (4 * bit + 3) for bit in range(4)) for i in range(16)]


@intrinsic
def sign_codes(typingctx, signs):
    """Move eight sign bits to the top bits of the nibbles of two codes."""
    def codegen(context, builder, signature, args):
        spread = (lambda builder, v: _permute_16(builder, TOP_BITS, v)) if WIDE else _to_top_bits
        return cgutils.pack_array(builder, [spread(builder, v) for v in (args[0], builder.lshr(args[0], constant([4] * 32, I16)))])
    return types.UniTuple(i16x32, 2)(i16x32), codegen


@intrinsic
def sign_codes_of_7(typingctx, signs):
    """Return sign_codes of seven bits and an eighth, their parity."""
    def codegen(context, builder, signature, args):
        signs, upper = args[0], builder.lshr(args[0], constant([4] * 32, I16))
        if WIDE:        # the parity of bits 0 to 4, and that of bits 5 and 6, which are 1 and 2 of `upper`
            odd = _permute_16(builder, [(i.bit_count() & 1) << 15 for i in range(32)], signs)
            rest = [top ^ ((i >> 1).bit_count() & 1) << 15 for i, top in enumerate(TOP_BITS[:8])]
            return cgutils.pack_array(builder, [_permute_16(builder, TOP_BITS, signs), builder.xor(odd, _permute_16(builder, rest, upper))])
        parity = signs
        for shift in (4, 2, 1):
            parity = builder.xor(parity, builder.lshr(parity, constant([shift] * 32, I16)))
        last = builder.shl(parity, constant([15] * 32, I16))
        return cgutils.pack_array(builder, [_to_top_bits(builder, signs), builder.or_(_to_top_bits(builder, upper), last)])
    return types.UniTuple(i16x32, 2)(i16x32), codegen


@intrinsic
def seven_bits(typingctx, v):
    """Split the low 28 bits of each int32 into four int16 of seven bits."""
    def codegen(context, builder, signature, args):
        v = builder.zext(args[0], ir.VectorType(I64, 8))
        v = builder.and_(builder.or_(v, builder.shl(v, constant([18] * 8, I64))), constant([0x3FFF_0000_3FFF] * 8, I64))
        v = builder.and_(builder.or_(v, builder.shl(v, constant([9] * 8, I64))), constant([0x007F_007F_007F_007F] * 8, I64))
        return builder.bitcast(v, i16x32.ir)
    return i16x32(Vec("i32", 8)), codegen


def lanes_of(bits, which, shifts, mask, left=0):
    """Make a function that gathers unsigned integers of 8 or 16 bits as int16.

    Lane i is ((integer which[i] at an address << left) >> shifts[i]) & mask.
    """
    @intrinsic
    def gather(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            v = builder.load(pointer(builder, builder.add(*args), ir.VectorType(ir.IntType(bits), max(which) + 1)), align=1)
            v = builder.shuffle_vector(v, v, constant(which))
            v = v if bits == 16 else builder.zext(v, i16x32.ir)
            v = builder.lshr(builder.shl(v, constant([left] * 32, I16)), constant(shifts, I16))
            return builder.and_(v, constant([mask] * 32, I16))
        return i16x32(types.intp, types.intp), codegen
    return gather


@intrinsic
def where_bit(typingctx, v, bit, value):
    """Return int16: a value in lanes of v that have a bit, else 0."""
    def codegen(context, builder, signature, args):
        v, bit, value = args[0], *(broadcast(builder, builder.trunc(a, I16), 32) for a in args[1:])
        zero = constant([0] * 32, I16)
        return builder.select(builder.icmp_unsigned("!=", builder.and_(v, bit), zero), value, zero)
    return i16x32(i16x32, types.intp, types.intp), codegen


def times(factors):
    """Make a function that multiplies 32 int16 by constants."""
    @intrinsic
    def multiply(typingctx, v):
        return i16x32(i16x32), lambda context, builder, signature, args: builder.mul(args[0], constant(factors, I16))
    return multiply


@intrinsic
def widen(typingctx, v):
    """Widen 32 unsigned bytes to int16."""
    return i16x32(Vec("i8", 32)), lambda context, builder, signature, args: builder.zext(args[0], i16x32.ir)


@intrinsic
def bytes_of_even_words(typingctx, address, offset):
    """Load 64 bytes and widen bytes 0 to 3, 8 to 11, ... to int16."""
    def codegen(context, builder, signature, args):
        v = builder.load(pointer(builder, builder.add(*args), ir.VectorType(I32, 16)), align=1)
        v = builder.shuffle_vector(v, v, constant(range(0, 16, 2)))
        return builder.zext(builder.bitcast(v, ir.VectorType(I8, 32)), i16x32.ir)
    return i16x32(types.intp, types.intp), codegen


@intrinsic
def widen_two(typingctx, first, second):
    """Load sixteen unsigned bytes at each of two addresses as int16."""
    def codegen(context, builder, signature, args):
        a, b = (builder.load(pointer(builder, at, ir.VectorType(I8, 16)), align=1) for at in args)
        return builder.zext(builder.shuffle_vector(a, b, constant(range(32))), i16x32.ir)
    return i16x32(types.intp, types.intp), codegen


@intrinsic
def times_3_high(typingctx, v):
    """Return the upper sixteen bits of three times an unsigned int16: 0, 1 or 2."""
    def codegen(context, builder, signature, args):
        wide = builder.mul(builder.zext(args[0], ir.VectorType(I32, 32)), constant([3] * 32))
        return builder.trunc(builder.lshr(wide, constant([16] * 32)), i16x32.ir)
    return i16x32(i16x32), codegen


def _regroup(builder, vectors, bits, order):
    """Emit the exchange of elements among eight vectors, in three rounds.

    vectors: (LLVM vector, the keys (a, b) of its elements). After a round for a bit of `a`, all elements of a vector have the same value of
    it. order: how the elements of a resulting vector are sorted.
    """
    for bit in bits:
        vectors, result = sorted(vectors, key=lambda v: min(v[1])), []
        for (first, keys), (second, others) in zip(vectors[::2], vectors[1::2]):
            both = keys + others
            for value in (0, bit):
                chosen = sorted((key for key in both if key[0] & bit == value), key=order)
                result.append((builder.shuffle_vector(first, second, constant([both.index(key) for key in chosen])), chosen))
        vectors = result
    return [vector for vector, keys in sorted(vectors, key=lambda v: min(v[1]))]


def _move(regroup):
    """Make an intrinsic that rearranges the 256 int16 at an address."""
    @intrinsic
    def move(typingctx, address):
        def codegen(context, builder, signature, args):
            places = [pointer(builder, builder.add(args[0], I64(64 * i)), i16x32.ir) for i in range(8)]
            vectors = regroup(builder, [builder.load(place, align=1) for place in places])
            for vector, place in zip(vectors, places):
                builder.store(vector, place, align=1)
            return context.get_dummy_value()
        return types.void(types.intp), codegen
    return move


def _columns(builder, vectors):
    keyed = [(vector, [(j % 8, 4 * i + j // 8) for j in range(32)]) for i, vector in enumerate(vectors)]
    return _regroup(builder, keyed, (4, 2, 1), lambda key: key[1])


def _superblock(builder, vectors):
    keyed = [(vector, [(group, k) for group in range(32)]) for k, vector in enumerate(vectors)]
    return _regroup(builder, keyed, (16, 8, 4), lambda key: (key[1] % 2, 8 * (key[0] % 4) + key[1]))


# Columns: element k of all 32 groups of 8, for k = 0 to 7. From elements in their natural order; and back, to the order of a superblock:
# each group of 32 with the even elements before the odd ones
to_columns, from_columns = _move(_columns), _move(_superblock)


@intrinsic
def natural_order(typingctx, v):
    """Reorder 32 int16 whose even elements come first."""
    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(args[0], args[0], constant([16 * (i % 2) + i // 2 for i in range(32)]))
    return i16x32(i16x32), codegen


@intrinsic
def even_elements_first(typingctx, v):
    """Reorder 32 int16: the even elements, then the odd ones."""
    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(args[0], args[0], constant([*range(0, 32, 2), *range(1, 32, 2)]))
    return i16x32(i16x32), codegen


@intrinsic
def twin_groups(typingctx, low, high):
    """Sort int16 of four groups of 16 into two vectors, in their order.

    low: elements 0 to 7 of each group; high: elements 8 to 15.
    """
    def codegen(context, builder, signature, args):
        return cgutils.pack_array(builder, [builder.shuffle_vector(*args, constant(
            [8 * group + j + 32 * half for group in (pair, pair + 1) for half in (0, 1) for j in range(8)])) for pair in (0, 2)])
    return types.UniTuple(i16x32, 2)(i16x32, i16x32), codegen


@intrinsic
def pairs_of(typingctx, v):
    """Repeat each of four floats twice."""
    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(args[0], args[0], constant([i // 2 for i in range(8)]))
    return f32x8(Vec("f32", 4)), codegen


@intrinsic
def ue4m3_floats(typingctx, first, second):
    """Load four unsigned floats of eight bits at each of two addresses.

    Returns half of each as f32x8; 127 stands for 0. Shifted into place as float16, a value lacks a factor of 256.
    """
    def codegen(context, builder, signature, args):
        a, b = (builder.load(pointer(builder, at, ir.VectorType(I8, 4)), align=1) for at in args)
        v = builder.zext(builder.shuffle_vector(a, b, constant(range(8))), ir.VectorType(I16, 8))
        v = builder.select(builder.icmp_unsigned("==", v, constant([127] * 8, I16)), constant([0] * 8, I16), v)
        bits = builder.shl(builder.and_(v, constant([127] * 8, I16)), constant([7] * 8, I16))
        return builder.fmul(extend_halves(builder, bits), constant([128.0] * 8, F32))
    return f32x8(types.intp, types.intp), codegen


@intrinsic
def to_multiples(typingctx, scales):
    """Write each two of eight floats as multiples of a common unit.

    The unit is the power of two that the greater one is 128 to 255 times of. Returns the four units, and for each two scales an i16x32 with
    the first integer in the lower half, the second in the upper one.
    """
    def codegen(context, builder, signature, args):
        v, = args
        other = builder.shuffle_vector(v, v, constant([i ^ 1 for i in range(8)]))
        top = builder.select(builder.fcmp_ordered(">", v, other), v, other)
        power = builder.bitcast(builder.and_(builder.bitcast(top, ir.VectorType(I32, 8)), constant([0x7F800000] * 8)), v.type)
        unit = builder.fmul(power, constant([1 / 128] * 8, F32))
        zero = builder.fcmp_ordered("==", power, constant([0.0] * 8, F32))
        ratio = builder.fdiv(v, builder.select(zero, constant([1.0] * 8, F32), unit))
        integers = builder.trunc(nearest(builder, ratio), ir.VectorType(I16, 8))
        factors = [builder.shuffle_vector(integers, integers, constant([2 * i] * 16 + [2 * i + 1] * 16)) for i in range(4)]
        units = builder.shuffle_vector(unit, unit, constant(range(0, 8, 2)))
        return context.make_tuple(builder, signature.return_type, [units, cgutils.pack_array(builder, factors)])
    return types.Tuple((Vec("f32", 4), types.UniTuple(i16x32, 4)))(f32x8), codegen
