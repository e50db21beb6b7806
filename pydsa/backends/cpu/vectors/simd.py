"""Vector registers in Numba: a type `Vec`, operators, and loads and stores.

What differs between CPUs is behind one name, chosen once from the features. Kernels use vectors of one size, 16 floats or 32 int16, on
every CPU: LLVM splits them over narrower registers. A Vec is a value in registers; memory is given as an address and an offset in bytes.
"""
import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from pydsa.backends.cpu.jit import cpu_features


FEATURES = cpu_features()
I8, I16, I32, I64, F32, INTP = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(64)
ELEMENTS = {"i8": (I8, types.int8), "i16": (I16, types.int16), "i32": (I32, types.int32), "f32": (F32, types.float32)}
FAST = ("contract", "nsz")       # sums are not reordered: a row has the same sum wherever a task begins


class Vec(types.Type):
    """A vector of `lanes` elements of "i8", "i16", "i32" or "f32"."""

    def __init__(self, element, lanes):
        self.element, self.lanes = element, lanes
        self.ir = ir.VectorType(ELEMENTS[element][0], lanes)
        super().__init__(f"Vec({element}x{lanes})")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, vec.ir)


f32x8, f32x16, i32x16, i16x32 = Vec("f32", 8), Vec("f32", 16), Vec("i32", 16), Vec("i16", 32)


def constant(values, element=I32):
    """Make an LLVM vector constant."""
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def call_llvm(builder, name, result, args):
    """Emit a call of an LLVM intrinsic."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def pointer(builder, address, kind):
    """Emit a cast of an address to a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def broadcast(builder, value, lanes):
    """Emit a broadcast of one value to all lanes."""
    first = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(first, first, constant([0] * lanes))


def pack(builder, values):
    """Emit a vector of LLVM values of one type."""
    v = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        v = builder.insert_element(v, value, I32(i))
    return v


def _operator(symbol, on_integers, on_floats=None):
    """Overload `a symbol b` for vectors.

    b may be a scalar, which is broadcast. >> shifts zeros in.
    """
    @intrinsic
    def operate(typingctx, a, b):
        def codegen(context, builder, signature, args):
            x, y = args
            if not isinstance(b, Vec):
                y = broadcast(builder, context.cast(builder, y, signature.args[1], ELEMENTS[a.element][1]), a.lanes)
            return getattr(builder, on_floats)(x, y, flags=FAST) if a.element == "f32" else getattr(builder, on_integers)(x, y)
        return a(a, b), codegen

    @overload(symbol)
    def overloaded(a, b):
        if isinstance(a, Vec) and (b == a or isinstance(b, types.Number)):
            return lambda a, b: operate(a, b)


_operator(operator.and_, "and_")
_operator(operator.or_, "or_")
_operator(operator.xor, "xor")
_operator(operator.lshift, "shl")
_operator(operator.rshift, "lshr")
_operator(operator.add, "add", "fadd")
_operator(operator.sub, "sub", "fsub")
_operator(operator.mul, "mul", "fmul")


def _loader(vec):
    @intrinsic
    def load(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            return builder.load(pointer(builder, builder.add(*args), vec.ir), align=1)
        return vec(types.intp, types.intp), codegen
    return load


load_64_bytes, load_32_bytes, load_16_bytes = (_loader(Vec("i8", lanes)) for lanes in (64, 32, 16))
load_int16, load_16_words, load_8_words = _loader(i16x32), _loader(i32x16), _loader(Vec("i32", 8))
load_floats, load_8_floats, load_4_floats, load_2_floats = _loader(f32x16), _loader(f32x8), _loader(Vec("f32", 4)), _loader(Vec("f32", 2))


@intrinsic
def store(typingctx, address, offset, value):
    """Store a vector or a scalar at address + offset bytes."""
    def codegen(context, builder, signature, args):
        builder.store(args[2], pointer(builder, builder.add(args[0], args[1]), args[2].type), align=1)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, value), codegen


def _scalar_at(kind, type_):
    @intrinsic
    def at(typingctx, address, offset):
        def codegen(context, builder, signature, args):
            return builder.load(pointer(builder, builder.add(*args), kind), align=1)
        return type_(types.intp, types.intp), codegen
    return at


u8_at, u16_at = _scalar_at(I8, types.uint8), _scalar_at(I16, types.uint16)
u32_at, i64_at, float_at = _scalar_at(I32, types.uint32), _scalar_at(I64, types.int64), _scalar_at(F32, types.float32)


@intrinsic
def prefetch(typingctx, address, offset):
    """Prefetch the cache line at address + offset into the second-level cache.

    It need not exist.
    """
    def codegen(context, builder, signature, args):
        byte = pointer(builder, builder.add(*args), I8)
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, I32(0), I32(2), I32(1)])
        return context.get_dummy_value()
    return types.void(types.intp, types.intp), codegen


def _filler(vec):
    @intrinsic
    def fill(typingctx, value):
        return vec(types.float32), lambda context, builder, signature, args: broadcast(builder, args[0], vec.lanes)
    return fill


floats, eight_floats, four_floats = _filler(f32x16), _filler(f32x8), _filler(Vec("f32", 4))      # broadcast a float32


@intrinsic
def to_floats(typingctx, v):
    """Convert signed integers to floats."""
    kind = Vec("f32", v.lanes)
    return kind(v), lambda context, builder, signature, args: builder.sitofp(args[0], kind.ir)


@intrinsic
def to_int16(typingctx, v):
    """Widen signed bytes to int16."""
    kind = Vec("i16", v.lanes)
    return kind(v), lambda context, builder, signature, args: builder.sext(args[0], kind.ir)


@intrinsic
def as_int16(typingctx, v):
    """Reinterpret the bits as i16x32."""
    return i16x32(v), lambda context, builder, signature, args: builder.bitcast(args[0], i16x32.ir)


@intrinsic
def as_int8(typingctx, v):
    """Reinterpret the bits as i8x64."""
    kind = Vec("i8", 64)
    return kind(v), lambda context, builder, signature, args: builder.bitcast(args[0], kind.ir)


@intrinsic
def signed_high_bytes(typingctx, v):
    """Shift int16 right by eight bits, keeping the sign."""
    return i16x32(v), lambda context, builder, signature, args: builder.ashr(args[0], constant([8] * 32, I16))


def _join(builder, parts):
    while len(parts) > 1:
        parts = [builder.shuffle_vector(a, b, constant(range(2 * a.type.count))) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


@intrinsic
def join(typingctx, addresses):
    """Load 64 / n bytes at each of n addresses and join them to an i8x64."""
    kind = ir.VectorType(I8, 64 // len(addresses))

    def codegen(context, builder, signature, args):
        parts = [builder.extract_value(args[0], i) for i in range(len(addresses))]
        return _join(builder, [builder.load(pointer(builder, part, kind), align=1) for part in parts])
    return Vec("i8", 64)(addresses), codegen


def extend_halves(builder, bits):
    """Emit a conversion of float16 bits (integers) to floats.

    Without the instruction it moves the exponent's bias, as scalars.half does.
    """
    n = bits.type.count
    if "f16c" in FEATURES:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), n)), ir.VectorType(F32, n))
    bits = builder.zext(bits, ir.VectorType(I32, n))
    magnitude = builder.shl(builder.and_(bits, constant([0x7FFF] * n)), constant([13] * n))
    finite = builder.fmul(builder.bitcast(magnitude, ir.VectorType(F32, n)), constant([2.0 ** 112] * n, F32))
    special = builder.or_(magnitude, constant([0x7F800000] * n))
    magnitude = builder.select(builder.icmp_unsigned("<", magnitude, constant([0x0F800000] * n)),
                               builder.bitcast(finite, special.type), special)
    sign = builder.shl(builder.and_(bits, constant([0x8000] * n)), constant([16] * n))
    return builder.bitcast(builder.or_(magnitude, sign), ir.VectorType(F32, n))


@intrinsic
def halves(typingctx, addresses):
    """Load the float16 at each of n addresses as a vector of floats."""
    n = len(addresses)

    def codegen(context, builder, signature, args):
        places = [pointer(builder, builder.extract_value(args[0], i), I16) for i in range(n)]
        return extend_halves(builder, pack(builder, [builder.load(place, align=1) for place in places]))
    return Vec("f32", n)(addresses), codegen


@intrinsic
def two_halves(typingctx, address, offset):
    """Load two float16 and broadcast them to the halves of an f32x16.

    The first goes to the lower eight lanes, the second to the upper ones.
    """
    def codegen(context, builder, signature, args):
        pair = extend_halves(builder, builder.load(pointer(builder, builder.add(*args), ir.VectorType(I16, 2)), align=1))
        return builder.shuffle_vector(pair, pair, constant([0] * 8 + [1] * 8))
    return f32x16(types.intp, types.intp), codegen


@intrinsic
def vector(typingctx, values):
    """Make a vector of a tuple of float32."""
    n = len(values)

    def codegen(context, builder, signature, args):
        return pack(builder, [builder.extract_value(args[0], i) for i in range(n)])
    return Vec("f32", n)(values), codegen


@intrinsic
def where_bits(typingctx, bits, value):
    """Return i8x64: a value in lanes whose bit of a uint64 is set, else 0."""
    def codegen(context, builder, signature, args):
        mask = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64))
        return builder.select(mask, broadcast(builder, builder.trunc(args[1], I8), 64), constant([0] * 64, I8))
    return Vec("i8", 64)(types.uint64, types.uint8), codegen


def _split(builder, v, lanes):
    """Split a vector into a list of narrower ones."""
    return [builder.shuffle_vector(v, v, constant(range(i, i + lanes))) for i in range(0, v.type.count, lanes)]


def _vpdpwssd(builder, sums, a, b):
    """Emit the instruction; before LLVM 22 it takes pairs of int16 as int32."""
    pairs = [builder.bitcast(v, sums.type) for v in (a, b)]
    return call_llvm(builder, f"llvm.x86.avx512.vpdpwssd.{32 * sums.type.count}", sums.type, [sums, *pairs])


def int16_dots(builder, sums, a, b):
    """Emit sums + a[2i] b[2i] + a[2i+1] b[2i+1], by the best of this CPU.

    LLVM values i32x16, i16x32, i16x32 -> i32x16; sums may be None.
    """
    if sums is None:
        if "avx512bw" in FEATURES:
            return call_llvm(builder, "llvm.x86.avx512.pmaddw.d.512", i32x16.ir, [a, b])
        sums = constant([0] * 16)
    if {"avx512vnni", "avx512bw"} <= FEATURES:
        return _vpdpwssd(builder, sums, a, b)
    if "avx512bw" in FEATURES:
        return builder.add(sums, call_llvm(builder, "llvm.x86.avx512.pmaddw.d.512", sums.type, [a, b]))
    if "avxvnni" in FEATURES:
        parts = zip(_split(builder, sums, 8), _split(builder, a, 16), _split(builder, b, 16))
        return _join(builder, [_vpdpwssd(builder, *part) for part in parts])
    for feature, name, lanes in (("avx2", "llvm.x86.avx2.pmadd.wd", 8), ("sse2", "llvm.x86.sse2.pmadd.wd", 4)):
        if feature in FEATURES:
            pairs = zip(_split(builder, a, 2 * lanes), _split(builder, b, 2 * lanes))
            products = [call_llvm(builder, name, ir.VectorType(I32, lanes), [x, y]) for x, y in pairs]
            return builder.add(sums, _join(builder, products))
    wide = ir.VectorType(I32, 32)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (builder.shuffle_vector(products, products, constant(range(i, 32, 2))) for i in (0, 1))
    return builder.add(sums, builder.add(even, odd))


@intrinsic
def dot(typingctx, a, b):
    """Compute a[2i] b[2i] + a[2i+1] b[2i+1] of int16, as i32x16."""
    return i32x16(i16x32, i16x32), lambda context, builder, signature, args: int16_dots(builder, None, *args)


@intrinsic
def dot_add(typingctx, sums, a, b):
    """Compute sums + a[2i] b[2i] + a[2i+1] b[2i+1]."""
    def codegen(context, builder, signature, args):
        if {"avx512vnni", "avx512bw"} <= FEATURES:      # as text, or LLVM would make two instructions of it to shorten the chain
            return builder.asm(ir.FunctionType(i32x16.ir, [v.type for v in args]), "vpdpwssd $3, $2, $0", "=v,0,v,v", args, False)
        return int16_dots(builder, *args)
    return i32x16(i32x16, i16x32, i16x32), codegen


@intrinsic
def multiply_add(typingctx, sums, a, b):
    """Compute sums + a b of floats."""
    def codegen(context, builder, signature, args):
        return builder.fadd(builder.fmul(args[1], args[2], flags=FAST), args[0], flags=FAST)
    return sums(sums, sums, sums), codegen


def reduce_add(builder, v):
    """Emit the sum of an LLVM float vector's lanes."""
    name = f"llvm.vector.reduce.fadd.v{v.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(F32, [F32, v.type]), name)
    return builder.call(function, [F32(0.0), v], fastmath=("reassoc",))


@intrinsic
def stack_memory(typingctx):
    """Return the address of 1 KiB on the stack.

    The same one for every call at one place.
    """
    def codegen(context, builder, signature, args):
        memory = cgutils.alloca_once(builder, ir.ArrayType(I8, 1024))
        memory.align = 64
        return builder.ptrtoint(memory, INTP)
    return types.intp(), codegen


@intrinsic
def reduce_max_abs(typingctx, a, b):
    """Return the largest magnitude of two float vectors; NaN if there is one.

    As integers the bits of magnitudes have the same order.
    """
    def codegen(context, builder, signature, args):
        a, b = (builder.and_(builder.bitcast(v, i32x16.ir), constant([0x7FFFFFFF] * 16)) for v in args)
        top = builder.select(builder.icmp_signed(">", a, b), a, b)
        return builder.bitcast(call_llvm(builder, "llvm.vector.reduce.smax.v16i32", I32, [top]), F32)
    return types.float32(f32x16, f32x16), codegen


@intrinsic
def max_abs_lanes(typingctx, a, b):
    """Return the larger magnitude in each lane; NaN where there is one."""
    def codegen(context, builder, signature, args):
        x, y = (builder.and_(builder.bitcast(v, i32x16.ir), constant([0x7FFFFFFF] * 16)) for v in args)
        return builder.bitcast(builder.select(builder.icmp_signed(">", x, y), x, y), f32x16.ir)
    return f32x16(f32x16, f32x16), codegen


def nearest(builder, v):
    """Emit rounding of floats below 2^22 to integers.

    Only the lower 22 bits of the integers are valid.
    """
    rounded = builder.fadd(v, constant([12582912.0] * v.type.count, F32))        # 1.5 * 2^23, where floats are integers
    return builder.bitcast(rounded, ir.VectorType(I32, v.type.count))


@intrinsic
def round_int16(typingctx, a, b, factor):
    """Round 32 floats times a factor to int16, to nearest even.

    Even elements come first, then the odd ones. Products must be below 2^15.
    """
    def codegen(context, builder, signature, args):
        factor = broadcast(builder, args[2], 16)
        values = [nearest(builder, builder.fmul(v, factor)) for v in args[:2]]
        if "avx512bw" in FEATURES:      # one permute of their lower halves
            values = [builder.bitcast(v, i16x32.ir) for v in values]
            return call_llvm(builder, "llvm.x86.avx512.vpermi2var.hi.512", i16x32.ir,
                             [values[0], constant([*range(0, 64, 4), *range(2, 64, 4)], I16), values[1]])
        values = [builder.trunc(v, ir.VectorType(I16, 16)) for v in values]
        return builder.shuffle_vector(*values, constant([*range(0, 32, 2), *range(1, 32, 2)]))
    return i16x32(f32x16, f32x16, types.float32), codegen


@intrinsic
def store_int16(typingctx, address, v):
    """Store sixteen floats below 2^15 as int16, rounded to nearest even."""
    def codegen(context, builder, signature, args):
        values = builder.trunc(nearest(builder, args[1]), ir.VectorType(I16, 16))
        builder.store(values, pointer(builder, args[0], values.type), align=1)
        return context.get_dummy_value()
    return types.void(types.intp, f32x16), codegen


@intrinsic
def sums_of_16(typingctx, v):
    """Return the sums of the first and of the last 16 elements, as floats.

    v: int16 whose even elements come first.
    """
    def codegen(context, builder, signature, args):
        sums = int16_dots(builder, constant([0] * 16), args[0], constant([1] * 32, I16))     # four lanes first, four last, and again
        sums = builder.add(*_split(builder, sums, 8))
        for distance in (2, 1):
            sums = builder.add(sums, builder.shuffle_vector(sums, sums, constant([(i + distance) % 8 for i in range(8)])))
        sums = builder.sitofp(sums, f32x8.ir)
        return cgutils.pack_array(builder, [builder.extract_element(sums, I32(i)) for i in (0, 4)])
    return types.UniTuple(types.float32, 2)(i16x32), codegen


def _truncation(element):
    @intrinsic
    def truncate(typingctx, v):
        kind = Vec(element, v.lanes)
        return kind(v), lambda context, builder, signature, args: builder.trunc(args[0], kind.ir)
    return truncate


low_int16, low_bytes = _truncation("i16"), _truncation("i8")        # of int32


def _register_plan(features):
    """Return the register blocking: as many sums as fit beside the operands.

    Floats of a register; rows, vectors of f32 `tile_products`; groups of 16 rows, tokens of `int16_products`; rows, groups of 16 columns of
    `matmul_add`.
    """
    if "avx512f" in features:
        return 16, 4, 4, 2, 6, 6, 4     # 32 registers
    if "avx" in features:
        return 8, 4, 2, 1, 3, 6, 1      # 16 registers
    return 4, 4, 2, 1, 1, 2, 1


LANES, ROWS, VECTORS, INT16_ROWS, INT16_TOKENS, GEMM_ROWS, GEMM_COLUMNS = _register_plan(FEATURES)
