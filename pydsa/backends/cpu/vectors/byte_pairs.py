"""Two blocks of 256 weights as the lanes of one vector of sums.

For IQ1, with lookups of byte_codes.py. Two superblocks of activations are joined for it.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.byte_codes import as_bytes, i8x64, load_at, loading_pair
from pydsa.backends.cpu.vectors.simd import F32, I8, I16, I32, I64, call_llvm, constant, f32x16, i16x32, i32x16, int16_dots, pack, pointer


def dots_of_two(offset, lower):
    """Make a function that adds the products of two rows' codes.

    With 64 upper bytes of activations at an address + offset, and with the lower ones `lower` bytes further. It takes and returns the sums
    of both for the first row, then for the second. As one text: in LLVM's order all activations are loaded first, and registers spilled.
    """
    text = "\n".join([f"vmovups {offset}($10), $4", f"vmovups {offset + lower}($10), $5", "vpdpbusd $4, $11, $0", "vpdpbusd $5, $11, $1",
                      "vpdpbusd $4, $12, $2", "vpdpbusd $5, $12, $3"])
    constraints = ",".join(["=&v"] * 6 + ["0", "1", "2", "3", "r", "v", "v"])

    @intrinsic
    def add(typingctx, sums, codes, other_codes, address):
        def codegen(context, builder, signature, args):
            args = [*cgutils.unpack_tuple(builder, args[0]), args[3], args[1], args[2]]
            kind = ir.FunctionType(ir.LiteralStructType([i32x16.ir] * 6), [v.type for v in args])
            results = builder.asm(kind, text, constraints, args, False)
            return cgutils.pack_array(builder, [builder.extract_value(results, i) for i in range(4)])
        return types.UniTuple(i32x16, 4)(types.UniTuple(i32x16, 4), i8x64, i8x64, types.intp), codegen
    return add


# A pair of superblocks in columns, joined: the upper bytes of element k of 64 groups, for k = 0 to 7, and the lower ones; the scales of
# all 32, and the sums of their integers, as floats; and -PAIR_BIAS / 2 times these sums, as integers
PAIR_LOWER, PAIR_SCALES, PAIR_SUMS, PAIR_BIASES = 512, 1024, 1088, 1152
PAIR_BIAS = 135
EVEN, ODD = constant(range(0, 32, 2)), constant(range(1, 32, 2))


@intrinsic
def join_columns(typingctx, first, second):
    """Join two superblocks in columns to a pair, at the first address.

    Their scales are 512 bytes further.
    """
    def codegen(context, builder, signature, args):
        def load(at, offset, kind):
            return builder.load(pointer(builder, builder.add(at, I64(offset)), kind), align=1)

        def joined(kind, n, offset, convert=lambda v: v):
            return builder.shuffle_vector(*(convert(load(at, offset, ir.VectorType(kind, n))) for at in args), constant(list(range(2 * n))))

        def byte(shift):
            def convert(v):
                v = builder.add(v, constant([128] * 32, I16)) if shift else v
                return builder.trunc(builder.lshr(v, constant([shift] * 32, I16)), ir.VectorType(I8, 32))
            return convert
        parts = [joined(I16, 32, 64 * k, byte(shift)) for shift in (8, 0) for k in range(8)]
        totals = []
        for at in args:
            sums = constant([0] * 16)
            for k in range(8):
                sums = int16_dots(builder, sums, load(at, 64 * k, i16x32.ir), constant([1] * 32, I16))
            totals.append(sums)
        totals = builder.add(builder.shuffle_vector(*totals, EVEN), builder.shuffle_vector(*totals, ODD))
        biases = builder.ashr(builder.mul(totals, constant([-PAIR_BIAS] * 16)), constant([1] * 16))
        parts += [joined(F32, 8, 512), builder.sitofp(totals, f32x16.ir), biases]
        for i, part in enumerate(parts):
            builder.store(part, pointer(builder, builder.add(args[0], I64(64 * i)), part.type), align=1)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp), codegen


# 32 bytes at each of two addresses; a 64-bit integer at each, repeated
pair_of_indices, pair_of_scales = loading_pair(I64, 4, list(range(8))), loading_pair(I64, 1, [0] * 4 + [1] * 4)


@intrinsic
def pair_of_int16(typingctx, first, second, offset):
    """Load eight int16 at each of two addresses.

    As i32x16, and two of them in each 64 bits, the upper 32 bits 0.
    """
    def codegen(context, builder, signature, args):
        parts = [load_at(builder, (at, args[2]), ir.VectorType(I32, 4)) for at in args[:2]]
        v = builder.shuffle_vector(*parts, constant(list(range(8))))
        wide = builder.zext(builder.bitcast(v, ir.VectorType(I16, 16)), i32x16.ir)
        return context.make_tuple(builder, signature.return_type, [wide, as_bytes(builder, builder.zext(v, ir.VectorType(I64, 8)))])
    return types.Tuple((i32x16, i8x64))(types.intp, types.intp, types.intp), codegen


def float_table(values):
    """Make the lookup of the low four bits of i32x16: a float."""
    table = ir.Constant(f32x16.ir, [ir.Constant(F32, value) for value in values])

    @intrinsic
    def look_up(typingctx, v):
        return f32x16(i32x16), lambda context, builder, signature, args: call_llvm(
            builder, "llvm.x86.avx512.permvar.sf.512", f32x16.ir, [table, args[0]])
    return look_up


def _pairing_halves(emit):
    """Make a function that converts a float16 of each of two blocks.

    Each for eight lanes. emit(builder, address): its bits.
    """
    @intrinsic
    def halves(typingctx, first, second):
        def codegen(context, builder, signature, args):
            parts = pack(builder, [emit(builder, at) for at in args] + [I16(0)] * 2)
            v = builder.fpext(builder.bitcast(parts, ir.VectorType(ir.HalfType(), 4)), ir.VectorType(F32, 4))
            return builder.shuffle_vector(v, v, constant([0] * 8 + [1] * 8))
        return f32x16(types.intp, types.intp), codegen
    return halves


def _top_nibbles(builder, at):
    """Emit the upper four bits of each of the four int16 of IQ1_M's scales."""
    q = load_at(builder, (at, I64(48)), I64)
    return builder.trunc(call_llvm(builder, "llvm.x86.bmi.pext.64", I64, [q, I64(0xF000F000F000F000)]), I16)


pair_of_halves = _pairing_halves(lambda builder, at: load_at(builder, (at, I64(0)), I16))
pair_of_spread_halves = _pairing_halves(_top_nibbles)
