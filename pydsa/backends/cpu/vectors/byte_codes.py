"""Lookups of codes as bytes, for grids of weights.

For CPUs with AVX-512 VBMI, VNNI and GFNI. Two codes of four weights each of 32 groups are 64 bytes, of two weights each, the sign on top of
each four bits. A lookup returns as many weights, plus BIAS, which are multiplied with activations whose upper and lower bytes are apart.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.simd import (FEATURES, I8, I16, I64, Vec, broadcast, call_llvm, constant, f32x8, f32x16, i16x32, i32x16,
                                             int16_dots, pointer)


HERE = {"avx512bw", "avx512vbmi", "avx512vnni", "bmi2", "gfni"} <= FEATURES
BIAS = 72               # added to a weight of IQ2 and IQ3, so that it is an unsigned byte
i8x64 = Vec("i8", 64)
BITS_OF_64 = ir.VectorType(ir.IntType(1), 64)
# Elements of a group in the lower and the upper byte of four vectors. Signs four bits apart come in pairs, for types with one index a
# group; or each byte has those of one of two indices, or of a half of a sorted grid
BY_SIGN, BY_INDEX = ((3, 2), (7, 6), (1, 0), (5, 4)), ((0, 4), (1, 5), (2, 6), (3, 7))


def as_bytes(builder, v):
    """Emit a vector as 64 bytes."""
    return builder.bitcast(v, i8x64.ir)


def select_bits(builder, mask, v, others):
    """Emit the bits `mask` of each byte of v, and all others of `others`."""
    parts = zip((v, others), (mask, 255 - mask))
    return builder.or_(*(builder.and_(as_bytes(builder, part), constant([bits] * 64, I8)) for part, bits in parts))


def load_at(builder, args, kind):
    """Emit a load from args, an address and an offset."""
    return builder.load(pointer(builder, builder.add(*args), kind), align=1)


@intrinsic
def load_bytes(typingctx, address, offset):
    """Load 64 bytes."""
    return i8x64(types.intp, types.intp), lambda context, builder, signature, args: load_at(builder, args, i8x64.ir)


def _loading(bits, n, repeat=None):
    """Make a function that loads n unsigned integers, each widened to 64 bits.

    Or one, repeated.
    """
    @intrinsic
    def load(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            if repeat:
                return as_bytes(builder, broadcast(builder, load_at(builder, args, ir.IntType(bits)), repeat))
            return as_bytes(builder, builder.zext(load_at(builder, args, ir.VectorType(ir.IntType(bits), n)), ir.VectorType(I64, 8)))
        return i8x64(types.intp, types.intp), codegen
    return load


eight_u32, repeated_u32, repeated_u64 = _loading(32, 8), _loading(32, 1, 16), _loading(64, 1, 8)


def loading_pair(kind, n, which):
    """Make a function that loads n integers at each of two addresses.

    which: in which order.
    """
    @intrinsic
    def load(typingctx, first, second, offset):
        def codegen(context, builder, signature, args):
            parts = [load_at(builder, (at, args[2]), ir.VectorType(kind, n)) for at in args[:2]]
            return as_bytes(builder, builder.shuffle_vector(*parts, constant(which)))
        return i8x64(types.intp, types.intp, types.intp), codegen
    return load


# Where pair_entries takes its 64 indices: of eight groups of the first block, of eight of the second, and so on
EIGHTS = [(block, group) for quarter in range(4) for block in range(2) for group in range(8 * quarter, 8 * quarter + 8)]
# 32 bytes of each; a 64-bit integer of each, repeated
pair_of_bytes = loading_pair(I64, 4, [part + 4 * block for part in range(4) for block in range(2)])
pair_of_u64 = loading_pair(I64, 1, [0, 1] * 4)


def picked_pair(byte_of_group):
    """Make a function that picks a byte for each group of two blocks.

    From 64 bytes of each.
    """
    @intrinsic
    def pick(typingctx, first, second):
        which = constant([64 * block + byte_of_group(group) for block, group in EIGHTS])
        return i8x64(i8x64, i8x64), lambda context, builder, signature, args: builder.shuffle_vector(*args, which)
    return pick


def unaligned(offsets):
    """Make a function that returns bytes which begin at any bits.

    offsets: eight for each 64 bits.
    """
    offsets = constant([offset % 64 for offset in offsets], I8)

    @intrinsic
    def pick(typingctx, v):
        return i8x64(i8x64), lambda context, builder, signature, args: call_llvm(
            builder, "llvm.x86.avx512.pmultishift.qb.512", i8x64.ir, [offsets, args[0]])
    return pick


def unaligned_of_four(lower, upper):
    """Make one of `unaligned` for four groups in each 64 bits.

    lower, upper: group -> where its lower and its upper byte begin.
    """
    return unaligned([offset(group) for _ in range(8) for group in range(4) for offset in (lower, upper)])


def _linear(rows, mask=None):
    """Make functions for bit i as the parity of a byte's bits in rows[i].

    mask: of even and odd bytes; others stay as they are, or, in the second function, as in another vector.
    """
    matrix = constant([sum(row << 8 * (7 - i) for i, row in enumerate(rows))] * 8, I64)

    def emit(builder, v, other):
        result = call_llvm(builder, "llvm.x86.vgf2p8affineqb.512", i8x64.ir, [v, as_bytes(builder, matrix), I8(0)])
        return result if mask is None else builder.select(ir.Constant(BITS_OF_64, mask * 32), result, other)

    @intrinsic
    def one(typingctx, v):
        return i8x64(i8x64), lambda context, builder, signature, args: emit(builder, args[0], args[0])

    @intrinsic
    def two(typingctx, v, other):
        return i8x64(i8x64, i8x64), lambda context, builder, signature, args: emit(builder, *args)
    return one, two


ALL_SEVEN = 0x7F
# Bit 7 of even bytes as the parity of the others; bits 0 and 1 to the tops of both nibbles; in odd bytes bit 6 and the parity of all seven
even_with_parity, _ = _linear([1 << i for i in range(7)] + [ALL_SEVEN], [1, 0])
to_tops, _ = _linear([0, 0, 0, 1, 0, 0, 0, 2])
_, with_last_tops = _linear([0, 0, 0, 64, 0, 0, 0, ALL_SEVEN], [0, 1])


@intrinsic
def signed_codes(typingctx, entries, signs):
    """Return three low bits of each nibble of entries, and signs on top."""
    def codegen(context, builder, signature, args):
        entries = builder.and_(as_bytes(builder, args[0]), constant([0x77] * 64, I8))
        return builder.or_(entries, builder.and_(args[1], constant([0x88] * 64, I8)))
    return i8x64(entries, i8x64), codegen


def _lookup(builder, table, indices, masks):
    """Emit lookups of 64 bytes each in a table.

    masks: of each index, those whose bit 7, 8, ... is set. All meet a part of the table before the next one is loaded.
    """
    if len(table) > 128:
        half = len(table) // 2
        lower, upper = (_lookup(builder, part, indices, masks) for part in (table[:half], table[half:]))
        bit = half.bit_length() - 8
        return [builder.select(mask[bit], b, a) for mask, a, b in zip(masks, lower, upper)]
    return _in_128(builder, table, indices)


def _in_128(builder, table, indices):
    """Emit lookups of 64 bytes each in a table of 128."""
    low, high = constant(table[:64], I8), constant(table[64:], I8)
    return [call_llvm(builder, "llvm.x86.avx512.vpermi2var.qi.512", i8x64.ir, [low, index, high]) for index in indices]


def _lookup_sorted(builder, table, indices, uppers):
    """Emit lookups in a table that changes once in sixteen entries at most.

    So sixteen have a first byte, a last one, and a place where it comes. uppers: bits 8 to 10 of the indices, in bits 4 to 6.
    """
    pieces = [table[i:i + 16] for i in range(0, len(table), 16)]
    counts = [piece.count(piece[0]) for piece in pieces]
    assert len(pieces) == 128 and all(piece == [piece[0]] * n + [piece[-1]] * (16 - n) for piece, n in zip(pieces, counts))
    lows = (builder.lshr(builder.bitcast(index, i16x32.ir), constant([4] * 32, I16)) for index in indices)
    which = [select_bits(builder, 15, low, upper) for low, upper in zip(lows, uppers)]       # bit 7 is ignored
    lasts = [16 * (i % 16) + n - 1 for i, n in enumerate(counts)]
    found = (_in_128(builder, part, which) for part in ([piece[0] for piece in pieces], [piece[-1] for piece in pieces], lasts))
    return [builder.select(builder.icmp_unsigned("<=", index, n), first, last) for index, first, last, n in zip(indices, *found)]


def _upper_bits(builder, index, upper, n, first=0):
    """Emit masks of bit 7 of the index, and of n - 1 bits of `upper`.

    first: the lowest of them.
    """
    zero = constant([0] * 64, I8)
    tests = [builder.icmp_unsigned("!=", builder.and_(upper, constant([1 << bit] * 64, I8)), zero) for bit in range(first, first + n - 1)]
    return [builder.icmp_signed("<", index, zero), *tests]


def _halves(table):
    return [entry & 255 for entry in table], [entry >> 8 for entry in table]


# Which bytes, of lower and upper ones of the entries of a pair of blocks, are the int16 of the first one, and of the second
INTERLEAVED = [[16 * quarter + 8 * block + byte + 64 * upper for quarter in range(4) for byte in range(8) for upper in (0, 1)]
               for block in (0, 1)]


def _unpack(builder, args, table, first=0):
    """Emit the vectors of two tuples, and masks of the upper bits of indices.

    first: the lowest bit of uppers that is one.
    """
    indices, uppers = (cgutils.unpack_tuple(builder, arg) for arg in args)
    return indices, uppers, [_upper_bits(builder, *both, len(table).bit_length() - 8, first) for both in zip(indices, uppers)]


def pair_entries(table):
    """Make a function that looks up sixteen-bit entries for pairs of blocks.

    It takes a tuple of 64 indices for each pair, in the order of EIGHTS, and one of vectors with bits 8, 9 and 10 of the indices. It
    returns i16x32 for each block.
    """
    @intrinsic
    def entries(typingctx, indices, upper):
        def codegen(context, builder, signature, args):
            indices, _, masks = _unpack(builder, args, table)
            found = zip(*(_lookup(builder, half, indices, masks) for half in _halves(table)))
            blocks = [builder.shuffle_vector(*both, constant(which)) for both in found for which in INTERLEAVED]
            return cgutils.pack_array(builder, [builder.bitcast(block, i16x32.ir) for block in blocks])
        return types.UniTuple(i16x32, 2 * len(indices))(indices, upper), codegen
    return entries


def pair_halves(table):
    """Make a function that looks up entries whose upper bytes are sorted.

    It takes tuples of indices, and of vectors with bits 8 to 10 of them in bits 4 to 6. It returns the lower and the upper bytes of the
    entries of each, in the order of its indices.
    """
    @intrinsic
    def entries(typingctx, indices, upper):
        def codegen(context, builder, signature, args):
            indices, uppers, masks = _unpack(builder, args, table, 4)
            lower_half, upper_half = _halves(table)
            found = zip(_lookup(builder, lower_half, indices, masks), _lookup_sorted(builder, upper_half, indices, uppers))
            return cgutils.pack_array(builder, [builder.bitcast(half, i16x32.ir) for both in found for half in both])
        return types.UniTuple(i16x32, 2 * len(indices))(indices, upper), codegen
    return entries


def byte_entries(table):
    """Make a function that looks up 64 indices of eight bits, or of nine.

    It returns the lower bytes of all entries and the upper ones. Ninth bits are, bit by bit, at an address.
    """
    def emit(builder, index, more):
        masks = [[*_upper_bits(builder, index, None, 1), *more]]
        return cgutils.pack_array(builder, [_lookup(builder, half, [index], masks)[0] for half in _halves(table)])

    @intrinsic
    def eight(typingctx, index):
        return types.UniTuple(i8x64, 2)(i8x64), lambda context, builder, signature, args: emit(builder, args[0], [])

    @intrinsic
    def nine(typingctx, index, address, offset):
        def codegen(context, builder, signature, args):
            ninth = builder.bitcast(load_at(builder, args[1:], I64), BITS_OF_64)
            return emit(builder, args[0], [ninth])
        return types.UniTuple(i8x64, 2)(i8x64, types.intp, types.intp), codegen
    return eight if len(table) == 256 else nine


def byte_values(table):
    """Make the lookup of the low six bits of bytes."""
    table = constant(table, I8)

    @intrinsic
    def values(typingctx, codes):
        return i8x64(i8x64), lambda context, builder, signature, args: call_llvm(
            builder, "llvm.x86.avx512.permvar.qi.512", i8x64.ir, [table, args[0]])
    return values


def biased_values(levels):
    """Make the lookup of the low four bits of bytes: a level plus BIAS.

    levels: of codes 0 to 7, and of those with the sign on top.
    """
    return byte_values([BIAS + level for level in levels] * 4)


def selecting(mask):
    """Make a function that joins bits of two vectors.

    Of the first one it takes the bits `mask` of each byte, all others of the second one.
    """
    @intrinsic
    def select(typingctx, v, others):
        return i8x64(v, others), lambda context, builder, signature, args: select_bits(builder, mask, *args)
    return select


@intrinsic
def upper_nibbles(typingctx, codes):
    """Move the upper four bits of bytes down, and any above them."""
    def codegen(context, builder, signature, args):
        return as_bytes(builder, builder.lshr(builder.bitcast(args[0], i16x32.ir), constant([4] * 32, I16)))
    return i8x64(i8x64), codegen


@intrinsic
def add_byte_dot(typingctx, sums, unsigned, address, offset):
    """Add products of unsigned bytes and signed ones in memory, four to a sum."""
    def codegen(context, builder, signature, args):
        args = [*args[:2], load_at(builder, args[2:], i8x64.ir)]     # as text: see dot_add
        return builder.asm(ir.FunctionType(i32x16.ir, [v.type for v in args]), "vpdpbusd $3, $2, $0", "=v,0,v,v", args, False)
    return i32x16(i32x16, i8x64, types.intp, types.intp), codegen


@intrinsic
def low_codes(typingctx, v):
    """Return the two low bits of each byte."""
    return i8x64(v), lambda context, builder, signature, args: builder.and_(as_bytes(builder, args[0]), constant([3] * 64, I8))


@intrinsic
def no_sums(typingctx):
    """Return zeros as i32x16."""
    return i32x16(), lambda context, builder, signature, args: constant([0] * 16)


@intrinsic
def load_sums(typingctx, address, offset):
    """Load i32x16."""
    return i32x16(types.intp, types.intp), lambda context, builder, signature, args: load_at(builder, args, i32x16.ir)


@intrinsic
def as_int32(typingctx, v):
    """Reinterpret bytes as i32x16."""
    return i32x16(i8x64), lambda context, builder, signature, args: builder.bitcast(args[0], i32x16.ir)


@intrinsic
def repeat_each(typingctx, v):
    """Repeat each of eight floats twice."""
    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(args[0], args[0], constant([i // 2 for i in range(16)]))
    return f32x16(f32x8), codegen


def split_columns(pairs):
    """Make a function that splits 256 int16 in columns into bytes.

    They are at an address. Four vectors of upper bytes, of the elements `pairs`, and four of lower ones, which are signed; 64 bytes behind
    them it stores -BIAS times the sums of sixteen.
    """
    @intrinsic
    def split(typingctx, address):
        def codegen(context, builder, signature, args):
            at = [pointer(builder, builder.add(args[0], I64(64 * i)), i16x32.ir) for i in range(10)]
            columns = [builder.load(place, align=1) for place in at[:8]]
            low, eight = constant([255] * 32, I16), constant([8] * 32, I16)
            rounded = [builder.add(column, constant([128] * 32, I16)) for column in columns]
            upper = [builder.or_(builder.lshr(rounded[i], eight), builder.and_(rounded[j], constant([0xFF00] * 32, I16))) for i, j in pairs]
            lower = [builder.or_(builder.and_(columns[i], low), builder.shl(columns[j], eight)) for i, j in pairs]
            sums = constant([0] * 16)
            for column in columns:
                sums = int16_dots(builder, sums, column, constant([-BIAS] * 32, I16))
            for v, place in zip([*upper, *lower, builder.bitcast(sums, i16x32.ir)], [*at[:8], at[9]]):
                builder.store(v, place, align=1)
            return context.get_dummy_value()
        return types.void(types.intp), codegen
    return split


split_by_sign, split_by_index = split_columns(BY_SIGN), split_columns(BY_INDEX)
