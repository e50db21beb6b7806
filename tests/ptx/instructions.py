"""PTX instructions on numpy arrays with one element per thread.

They follow the PTX ISA 9.0, "Instruction Set". Floats are rounded to nearest even from float64. A fused multiply-add may be off by one
unit in the last place where both roundings meet a tie.
"""
import numpy as np

BITS = {8: "1", 16: "2", 32: "4", 64: "8"}


def dtype_of(kind):
    """The numpy dtype of a PTX type: "s32", "b64", "f32", "pred" and so on."""
    if kind == "pred":
        return np.dtype("b1")
    return np.dtype({"s": "i", "u": "u", "b": "u", "f": "f"}[kind[0]] + BITS[int(kind[1:])])


def round_down(x):
    """Convert float64 to float32, rounded toward minus infinity."""
    y = x.astype("f4")
    return np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y)


def to_integer(x, dtype, how):
    """Convert floats to integers, saturating.

    NaN becomes 0, or the lowest integer of 64 bits.
    """
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x.astype("f8"))
    limits = np.iinfo(dtype)
    inside = np.clip(np.nan_to_num(x), limits.min, np.nextafter(float(limits.max), 0) if limits.bits == 64 else limits.max)
    whole = np.where(x > limits.max, limits.max, inside.astype(dtype))
    return np.where(np.isnan(x), limits.min if limits.bits == 64 else 0, whole).astype(dtype)


def convert(opcode):
    """cvt: the function of its operand."""
    *modifiers, target, source = opcode
    how = next((m for m in modifiers if m[0] == "r"), "rn")
    target, source = dtype_of(target), dtype_of(source)

    def of(x):
        if target.kind == "f":
            if source.kind == "f" and how in ("rni", "rzi", "rmi", "rpi"):
                x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x)
            if "sat" in modifiers:
                x = np.clip(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf), 0, 1)
            assert how in ("rn", "rni", "rzi", "rmi", "rpi")
            return x.astype(target)
        return to_integer(x, target, how) if source.kind == "f" else x.astype(target)
    return of


def shift(left):
    """shl and shr. Shifts by the register width or more leave only the sign."""
    def of(x, n):
        n_bits = x.dtype.itemsize * 8
        n = np.asarray(n).astype(np.int64)
        inside = np.minimum(n, n_bits - 1).astype(x.dtype)
        y = np.left_shift(x, inside) if left else np.right_shift(x, inside)
        return np.where(n >= n_bits, (x >> x.dtype.type(n_bits - 1) if x.dtype.kind == "i" else x.dtype.type(0)), y).astype(x.dtype)
    return of


def divided(x, y):
    """div: integer division toward zero. Division by zero sets every bit."""
    by_zero = y == 0
    y = np.where(by_zero, y.dtype.type(1), y)
    q = np.floor_divide(x, y)
    if x.dtype.kind == "i":
        q += ((np.remainder(x, y) != 0) & ((x < 0) != (y < 0))).astype(x.dtype)
    return np.where(by_zero, x.dtype.type(-1 if x.dtype.kind == "i" else np.iinfo(x.dtype).max), q)


def remainder(x, y):
    """rem: remainder with the sign of x. x if y is zero."""
    return np.where(y == 0, x, x - divided(x, y) * y)


def upper_half(x, y):
    """mul.hi: the upper half of an integer product."""
    if x.dtype.itemsize == 4:
        wide = x.dtype.kind + "8"
        return (x.astype(wide) * y.astype(wide) >> 32).astype(x.dtype)
    product = np.asarray(x, object) * np.asarray(y, object)
    return np.asarray([int(p) >> 64 & (1 << 64) - 1 for p in np.atleast_1d(product)], np.uint64).astype(x.dtype)


def bit_insert(bits, into, at, n):
    """bfi: insert the lowest n bits of one integer into another at bit `at`."""
    mask = ((1 << np.uint64(n)) - 1) << np.uint64(at)
    return (into & ~mask.astype(into.dtype)) | (bits.astype(np.uint64) << np.uint64(at) & mask).astype(into.dtype)


def byte_permute(x, y, selector):
    """prmt: each of four bytes is one of eight, or its sign replicated."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for i in range(4):
        which = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (which & np.uint32(7))).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(which & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        out |= byte << np.uint32(8 * i)
    return out


def dot_int8(x, y, total):
    """dp4a of int8."""
    x, y = np.ascontiguousarray(x).view("i1").reshape(-1, 4), np.ascontiguousarray(y).view("i1").reshape(-1, 4)
    products = x.astype(np.int32) * y.astype(np.int32)
    return products.sum(-1, dtype=np.int32) + total


def dot_uint8(x, y, total):
    """dp4a of uint8 and int8."""
    x, y = np.ascontiguousarray(x).view("u1").reshape(-1, 4), np.ascontiguousarray(y).view("i1").reshape(-1, 4)
    return (x.astype(np.int32) * y.astype(np.int32)).sum(-1, dtype=np.int32) + total


def funnel_right(low, high, n):
    """shf.r.wrap: 32 bits of 64, from bit n % 32 on."""
    return ((low.astype("u8") | high.astype("u8") << np.uint64(32)) >> (n & np.uint32(31)).astype("u8")).astype("u4")


def dot_uint16(x, y, total):
    """dp2a.lo of unsigned integers: two uint16 with the lower two bytes of y."""
    mask = np.uint32(0xFFFF), np.uint32(0xFF)
    return total + (x & mask[0]) * (y & mask[1]) + (x >> np.uint32(16)) * (y >> np.uint32(8) & mask[1])


def mma_int8(a, b, c):
    """mma.m16n8k32 of int8, on fragments.

    a [warps, 32, 4] and b [warps, 32, 2] are uint32 of four int8, c [warps, 32, 4] and the result int32. With g = lane // 4 and i = lane %
    4 a lane holds: of A rows g (registers 0 and 2) and g + 8 (1 and 3), columns 4 i + 0..3 (registers 0 and 1) and those 16 further (2 and
    3); of B column g, rows 4 i + 0..3 and those 16 further; of C columns 2 i and 2 i + 1 of rows g and g + 8.
    """
    n = len(a)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    a = a.view("i1").reshape(n, 8, 4, 2, 2, 4)                  # warp, g, i, half of columns, half of rows, byte
    rows = a.transpose(0, 4, 1, 3, 2, 5).reshape(n, 16, 32)     # half of rows and g; half of columns, i, byte
    b = b.view("i1").reshape(n, 8, 4, 2, 4)
    columns = b.transpose(0, 1, 3, 2, 4).reshape(n, 8, 32)
    product = np.matmul(rows.astype("f8"), columns.astype("f8").transpose(0, 2, 1)).astype(np.int32)       # [n, 16, 8], exact
    return product.reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(n, 32, 4) + c


def mma_float16(a, b, c):
    """mma.m16n8k16 of float16, on fragments.

    a [warps, 32, 4] and b [warps, 32, 2] are uint32 of two float16, c [warps, 32, 4] and the result float32. As above, but a register has
    two values: of A columns 2 i and 2 i + 1 (registers 0 and 1) and those 8 further, of B the same rows.
    """
    n = len(a)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    rows = a.view("f2").reshape(n, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(n, 16, 16)
    columns = b.view("f2").reshape(n, 8, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, 8, 16)
    product = np.matmul(rows.astype("f8"), columns.astype("f8").transpose(0, 2, 1))
    return (product.reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(n, 32, 4) + c).astype("f4")


def mma_bfloat16(a, b, c):
    """mma.m16n8k16 of bfloat16, on fragments as those of float16."""
    n = len(a)
    a, b = ((np.ascontiguousarray(x).view("u2").astype("u4") << np.uint32(16)).view("f4") for x in (a, b))
    rows = a.reshape(n, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(n, 16, 16)
    columns = b.reshape(n, 8, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, 8, 16)
    product = np.matmul(rows.astype("f8"), columns.astype("f8").transpose(0, 2, 1))
    return (product.reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(n, 32, 4) + c).astype("f4")


def mma_tf32(a, b, c):
    """mma.m16n8k8 of tf32, on fragments.

    a [warps, 32, 4] and b [warps, 32, 2] are uint32, the bits of float32 of which the last 13 are 0, c [warps, 32, 4] and the result
    float32.
    Lane 4 g + i has of A rows g (registers 0 and 2) and g + 8, columns i (registers 0 and 1) and i + 4, of B column g and the same rows.
    """
    n = len(a)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert not ((a & 0x1FFF).any() or (b & 0x1FFF).any()), "an operand of mma has more bits than tf32"
    rows = a.view("f4").reshape(n, 8, 4, 2, 2).transpose(0, 4, 1, 3, 2).reshape(n, 16, 8)
    columns = b.view("f4").reshape(n, 8, 4, 2).transpose(0, 1, 3, 2).reshape(n, 8, 8)
    product = np.matmul(rows.astype("f8"), columns.astype("f8").transpose(0, 2, 1))
    return (product.reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(n, 32, 4) + c).astype("f4")


def pack_bf16x2(upper, lower):
    """cvt.rn.bf16x2.f32: two bfloat16 in a word, each rounded to nearest even.

    NaN becomes 0x7FFF.
    """
    def bits(x):
        word = x.view("u4").astype("u8")
        return np.where(np.isnan(x), 0x7FFF, (word + 0x7FFF + (word >> 16 & 1)) >> 16).astype("u4")
    return bits(upper) << np.uint32(16) | bits(lower)


def pack_f16x2(upper, lower):
    """cvt.rn.f16x2.f32: two float16 in a word, rounded to nearest even."""
    with np.errstate(over="ignore"):
        return np.stack([lower, upper], -1).astype("f2").view("u4")[:, 0]


def of_pairs(function):
    """The function of float16 pairs, in uint32, of one of float64, rounded."""
    return lambda *xs: function(*(np.ascontiguousarray(x).view("f2").astype("f8") for x in xs)).astype("f2").view("u4")


def fma(x, y, z):
    """fma: x y + z with one rounding, up to ties in the last place."""
    if x.dtype == np.float32:
        return (x.astype("f8") * y.astype("f8") + z.astype("f8")).astype("f4")
    return (x.astype(np.longdouble) * y.astype(np.longdouble) + z.astype(np.longdouble)).astype("f8")


def fma_down(x, y, z):
    """fma.rm: x y + z rounded toward minus infinity."""
    return round_down(x.astype("f8") * y.astype("f8") + z.astype("f8"))


def nearly(function):
    """rcp.approx or rsqrt.approx, as far off as allowed: a unit."""
    def compute(x):
        y = function(x)
        return np.where(np.isfinite(y) & (y != 0), np.nextafter(y, np.float32(0)), y)
    return compute


def power_of_two(x):
    """ex2.approx.ftz: 2^x, with subnormal results flushed to zero."""
    y = np.exp2(x.astype("f8")).astype("f4")
    return np.where(y < np.finfo("f4").tiny, np.float32(0), y)


def leading_zeros(x):
    """clz of 64 bits."""
    return np.array([64 - int(v).bit_length() for v in x], np.uint32)


def set_bits(x):
    """popc: the number of bits that are set."""
    return np.array([int(v).bit_count() for v in x], np.uint32)


def compare(how):
    """setp: a comparison. Those that end in u hold if an operand is NaN."""
    ordered = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
               "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    if how == "nan":
        return lambda x, y: np.isnan(x) | np.isnan(y)
    if how == "num":
        return lambda x, y: ~(np.isnan(x) | np.isnan(y))
    if how.endswith("u"):
        return lambda x, y: ordered[how[:-1]](x, y) | np.isnan(x) | np.isnan(y)
    if how == "ne":
        return lambda x, y: np.not_equal(x, y) & (x == x) & (y == y)
    return ordered[how]


def select(x, y, p):
    """selp: x where p, else y."""
    return np.where(p, x, y)


def chosen(which):
    """min and max. If one operand is NaN the result is the other."""
    return lambda x, y: (which[1] if np.asarray(x).dtype.kind == "f" else which[0])(x, y)


# opcode -> function of arrays; operands have the type of the opcode's last part, with the exceptions below
PLAIN = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "mul.hi": upper_half, "div": divided, "rem": remainder,
    "mad.lo": lambda x, y, z: x * y + z, "min": chosen((np.minimum, np.fmin)), "max": chosen((np.maximum, np.fmax)), "neg": np.negative,
    "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "div.rn": np.divide,
    "add.rn": np.add, "mul.rn": np.multiply, "fma.rn": fma, "fma.rm": fma_down, "sqrt.rn": np.sqrt, "rcp.rn": np.reciprocal,
    "rcp.approx.ftz": np.reciprocal, "rcp.approx": nearly(np.reciprocal), "rsqrt.approx": nearly(lambda x: np.float32(1) / np.sqrt(x)),
    "ex2.approx.ftz": power_of_two, "clz": leading_zeros, "popc": set_bits,
    "prmt": byte_permute, "bfi": bit_insert, "selp": select, "shl": shift(True),
    "shr": shift(False), "shf.r.wrap": funnel_right,
}
PAIRS = {name: of_pairs(function) for name, function in (      # of float16 pairs, f16x2
    ("add", np.add), ("add.rn", np.add), ("sub", np.subtract), ("sub.rn", np.subtract), ("mul", np.multiply), ("mul.rn", np.multiply),
    ("fma.rn", lambda x, y, z: x * y + z))}
PACK = {"bf16x2": pack_bf16x2, "f16x2": pack_f16x2}      # cvt.rn of two float32, the upper one first
WIDE = {"mul.wide": np.multiply, "mad.wide": lambda x, y, z: x * y + z}
# operand types that differ from the opcode's
OPERANDS = {"selp": (None, None, "pred"), "shl": (None, "u32"), "shr": (None, "u32"), "bfi": (None, None, "u32", "u32")}
