"""Device intrinsics: vector loads, int8 products and warp-level primitives.

Each function is defined twice, for the GPU and for the simulator. With NUMBA_ENABLE_CUDASIM=1 kernels are Python functions: one Python
thread per CUDA thread, one block after the other. Warp-level primitives then exchange values through arrays of this module.
"""
import collections
import importlib.util
import sys
import threading
import time

import numpy as np

from pydsa.backends.gpus import SIMULATED
from pydsa.errors import PydsaError


if importlib.util.find_spec("numba_cuda") is None:
    raise PydsaError("--device cuda needs the package numba-cuda, which is not installed: pip install 'pydsa[cuda]'.")

WARP = 4 if SIMULATED else 32       # lanes of a warp-level reduction; fewer in the simulator, which is slow
MMA_WARP = 32                       # lanes that hold the fragments of an mma instruction, in the simulator too

if SIMULATED:
    from numba.cuda.np import numpy_support
    from numba.cuda.simulator import kernelapi

    sys.setswitchinterval(1e-5)     # the simulator's threads wait for each other all the time
    _lock = threading.Lock()

    def _shared_array(self, shape, dtype, alignment=None):
        """Thread-safe cuda.shared.array of the simulator. Ignores alignment."""
        caller, dtype = sys._getframe(1), dtype if isinstance(dtype, type) else numpy_support.as_dtype(dtype)
        with _lock:
            return (self._dynshared.view(dtype) if shape == 0 else
                    self._allocations.setdefault((caller.f_code.co_filename, caller.f_lineno), np.empty(shape, dtype)))

    kernelapi.FakeCUDAShared.array = _shared_array

    _values = np.zeros(1024, np.float32)
    counts_of_lanes = np.zeros(1024, np.int64)
    _operands = np.zeros((1024, 6), np.uint32)
    _halves = np.zeros((1024, 6, 2), np.float32)
    this_thread = threading.current_thread

    def device(function):
        """Mark a function that kernels call."""
        return function

    def byte_at(data, at):
        """The uint8 data[at] as an int."""
        return int(data[at])

    def u32_at(data, at):
        """Load four bytes as a uint32. `at` is a multiple of 4."""
        return int(data[at]) | int(data[at + 1]) << 8 | int(data[at + 2]) << 16 | int(data[at + 3]) << 24

    def permuted(a, b, selector):
        """Byte permute (prmt): four bytes of a and b chosen by a selector.

        Nibble i of the selector, lowest first, names byte i of the result: 0 to 3 are the bytes of a, 4 to 7 those of b, 8 to 15
        their signs, 0 or 255.
        """
        both, nibbles = int(a) | int(b) << 32, [int(selector) >> 4 * i & 15 for i in range(4)]
        chosen = [both >> 8 * (nibble & 7) & 255 for nibble in nibbles]
        return sum(((byte >> 7) * 255 if nibble > 7 else byte) << 8 * i for i, (byte, nibble) in enumerate(zip(chosen, nibbles)))

    def four_u32_at(data, at):
        """Load 16 bytes as four uint32. `at` is a multiple of 16."""
        return u32_at(data, at), u32_at(data, at + 4), u32_at(data, at + 8), u32_at(data, at + 12)

    def load_four_u32(array, i):
        """Load four uint32 of a uint32 array from index i, a multiple of 4."""
        return int(array[i]), int(array[i + 1]), int(array[i + 2]), int(array[i + 3])

    def half_at(data, at):
        """Load the float16 at an even offset, as float32."""
        return np.float32(np.array(int(data[at]) | int(data[at + 1]) << 8, np.uint16).view(np.float16))

    def to_half(x):
        """Convert float32 to float16 bits, rounded to nearest even."""
        with np.errstate(over="ignore"):
            return int(np.float32(x).astype(np.float16).view(np.uint16))

    def of_half(bits):
        """Convert float16 bits to float32."""
        return np.float32(np.array(bits, np.uint16).view(np.float16))

    def float_bits(x):
        """The bits of a float32."""
        return int(np.float32(x).view(np.uint32))

    def bits_float(bits):
        """The float32 with these bits."""
        return np.array(bits & 0xFFFFFFFF, np.uint32).view(np.float32)[()]

    def _signed_bytes(quad):
        return np.array([quad], np.uint32).view(np.int8).astype(int)

    def nearest(x, factor):
        """x * factor rounded to nearest even; 0 if the factor is 0, whatever x is."""
        return int(round(x * factor)) if factor > 0 else 0

    def exp(x):
        """e^x of a float32. Infinity on overflow."""
        with np.errstate(over="ignore"):
            return np.exp(np.float32(x))

    def fma(a, b, c):
        """Fused multiply-add: a b + c."""
        return a * b + c

    def sync():
        """Wait for all threads of the block, as cuda.syncthreads does.

        In the simulator only kernels may call cuda.syncthreads; device functions call this.
        """
        this_thread().syncthreads()

    def warp_sync():
        """Warp barrier: orders the memory accesses of a warp's lanes, as cuda.syncwarp does."""
        wait_for_lanes(WARP)

    def dp4a(a, b, c):
        """c plus the dot product of four int8 pairs."""
        return c + int(_signed_bytes(a) @ _signed_bytes(b))

    _arrivals = collections.defaultdict(lambda: [0, 0])    # (group size, group of the block) -> lanes that arrived, rounds completed

    def wait_for_lanes(n):
        """Barrier of a group of n adjacent lanes."""
        with _lock:     # two threads that arrive first at the same time must find the same list
            arrivals = _arrivals[n, this_thread().threadIdx.x // n]
            rounds = arrivals[1]
            arrivals[0] += 1
            if arrivals[0] == n:
                arrivals[:] = 0, rounds + 1
        while arrivals[1] == rounds:
            if this_thread().abort:
                raise RuntimeError("another thread of the block has failed")
            time.sleep(0)

    def _combine(x, combine, n=WARP, values=_values):
        """Combine x over n adjacent lanes; every lane gets the result."""
        i = this_thread().threadIdx.x
        values[i] = x
        wait_for_lanes(n)
        first = i // n * n
        result = combine(values[first:first + n])
        wait_for_lanes(n)
        return result

    def warp_sum(x):
        """Warp-level sum of float32, in every lane."""
        return _combine(x, lambda values: values.sum(dtype=np.float32))

    sum_of_four = warp_sum      # over four adjacent lanes

    def sum_of_lanes(x, n):
        """Sum of float32 over n adjacent lanes, in each; n = 1, 2, 4, 8, 16."""
        return _combine(x, lambda values: values.sum(dtype=np.float32), n)

    def max_of_eight(x):
        """Maximum of int32 over eight adjacent lanes, in each of them."""
        return _combine(x, lambda values: values.max(), 8, counts_of_lanes)

    def warp_max(x):
        """Warp-level maximum of float32, in every lane."""
        return _combine(x, lambda values: values.max())

    def warp_max_int(x):
        """Warp-level maximum of int32, in every lane."""
        return _combine(x, lambda values: values.max(), WARP, counts_of_lanes)

    def warp_prefix(x, lane):
        """Warp-level inclusive prefix sum of int32."""
        i = this_thread().threadIdx.x
        counts_of_lanes[i] = x
        wait_for_lanes(WARP)
        total = int(counts_of_lanes[i - lane:i + 1].sum())
        wait_for_lanes(WARP)
        return total

    def load_four_f32(array, i):
        """Load four float32 of 16-byte aligned shared memory. i is a multiple of 4."""
        return array[i], array[i + 1], array[i + 2], array[i + 3]

    def load_two_f32(array, i):
        """Load two float32 of 8-byte aligned shared memory. i is even."""
        return array[i], array[i + 1]

    def store_four_f32(array, i, a, b, c, d):
        """Store four float32 in 16-byte aligned shared memory. i is a multiple of 4."""
        array[i], array[i + 1], array[i + 2], array[i + 3] = a, b, c, d

    def mma_s8(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """Tensor-core product c + a b of int8 tiles, mma.m16n8k32.

        a [16, 32] and b [32, 8] are int8, c [16, 8] is int32. Each of 32 lanes holds the fragments that the instruction defines.
        """
        i = this_thread().threadIdx.x
        _operands[i] = a0, a1, a2, a3, b0, b1
        wait_for_lanes(MMA_WARP)
        first = i // MMA_WARP * MMA_WARP
        lanes = _operands[first:first + MMA_WARP].copy()
        wait_for_lanes(MMA_WARP)
        row, column = i % MMA_WARP // 4, i % 4 * 2

        def product(upper, column):
            operands = [(upper, 4), (2 + upper, 5)]
            return sum(int(_signed_bytes(lanes[4 * row + k, a]) @ _signed_bytes(lanes[4 * column + k, b]))
                       for a, b in operands for k in range(4))
        return c0 + product(0, column), c1 + product(0, column + 1), c2 + product(1, column), c3 + product(1, column + 1)

    def mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """Tensor-core product c + a b of float16 tiles, mma.m16n8k16.

        a [16, 16] and b [16, 8] are float16, c [16, 8] is float32. Each of 32 lanes holds the fragments that the instruction defines.
        """
        i = this_thread().threadIdx.x
        _halves[i] = np.array([a0, a1, a2, a3, b0, b1], np.uint32).view(np.float16).reshape(6, 2)
        wait_for_lanes(MMA_WARP)
        first = i // MMA_WARP * MMA_WARP
        lanes = _halves[first:first + MMA_WARP].reshape(8, 4, 6, 2).copy()
        wait_for_lanes(MMA_WARP)
        rows, columns = lanes[i % MMA_WARP // 4], lanes[i % 4 * 2:i % 4 * 2 + 2]

        def product(upper, column):
            return np.float32((rows[:, [upper, 2 + upper]] * columns[column][:, 4:]).sum())
        return c0 + product(0, 0), c1 + product(0, 1), c2 + product(1, 0), c3 + product(1, 1)

    def int8_to_f16(quad):
        """Convert four int8 to float16, two per uint32."""
        first, second = _signed_bytes(quad).astype(np.float16).view(np.uint32)
        return int(first), int(second)

    def store_four_u32(array, i, a, b, c, d):
        """Store four uint32 in 16-byte aligned shared memory. i is a multiple of 4."""
        array[i], array[i + 1], array[i + 2], array[i + 3] = a, b, c, d

else:
    import math

    from llvmlite import ir
    from numba import cuda
    from numba.core import cgutils, types
    from numba.cuda.extending import intrinsic

    device = cuda.jit(device=True)
    I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
    WHOLE_WARP, ZERO = np.uint32(0xFFFFFFFF), np.float32(0)

    def _loader(kind, align, result, convert=lambda builder, value: value):
        """Intrinsic that loads an LLVM type at a byte offset and converts it."""
        @intrinsic
        def load(typingctx, data, at):
            def codegen(context, builder, signature, args):
                base = context.make_array(signature.args[0])(context, builder, args[0]).data
                place = builder.gep(builder.bitcast(base, I8.as_pointer()), [args[1]])
                return convert(builder, builder.load(builder.bitcast(place, kind.as_pointer()), align=align))
            return result(data, types.int64), codegen
        return load

    def _loader_16_bytes(scale):
        """Intrinsic that loads 16 bytes; an array element has `scale` bytes."""
        @intrinsic
        def load(typingctx, data, at):
            def codegen(context, builder, signature, args):
                base = context.make_array(signature.args[0])(context, builder, args[0]).data
                place = builder.gep(builder.bitcast(base, I8.as_pointer()), [builder.mul(args[1], args[1].type(scale))])
                four = builder.load(builder.bitcast(place, ir.VectorType(I32, 4).as_pointer()), align=16)
                return cgutils.pack_array(builder, [builder.extract_element(four, I32(i)) for i in range(4)])
            return types.UniTuple(types.uint32, 4)(data, types.int64), codegen
        return load

    FOUR_F32, FOUR_U32 = ir.VectorType(ir.FloatType(), 4), ir.VectorType(I32, 4)

    def _place_of_four(context, builder, array_type, array, i, four=FOUR_F32):
        base = context.make_array(array_type)(context, builder, array).data
        return builder.bitcast(builder.gep(base, [i]), four.as_pointer())

    def _load_of(n):
        kind = ir.VectorType(ir.FloatType(), n)

        @intrinsic
        def load(typingctx, array, i):
            def codegen(context, builder, signature, args):
                loaded = builder.load(_place_of_four(context, builder, signature.args[0], *args, kind), align=4 * n)
                return cgutils.pack_array(builder, [builder.extract_element(loaded, I32(j)) for j in range(n)])
            return types.UniTuple(types.float32, n)(array, types.int64), codegen
        return load

    load_two_f32, load_four_f32 = _load_of(2), _load_of(4)

    def _store_of_four(kind, element):
        @intrinsic
        def put(typingctx, array, i, a, b, c, d):
            def codegen(context, builder, signature, args):
                four = ir.Constant(kind, ir.Undefined)
                for j, x in enumerate(args[2:]):
                    four = builder.insert_element(four, x, I32(j))
                builder.store(four, _place_of_four(context, builder, signature.args[0], *args[:2], kind), align=16)
            return types.void(array, types.int64, *[element] * 4), codegen
        return put

    store_four_f32, store_four_u32 = _store_of_four(FOUR_F32, types.float32), _store_of_four(FOUR_U32, types.uint32)

    four_u32_at, load_four_u32 = _loader_16_bytes(1), _loader_16_bytes(4)
    byte_at = _loader(I8, 1, types.int32, lambda builder, value: builder.zext(value, I32))
    u32_at = _loader(I32, 4, types.uint32)
    half_at = _loader(ir.HalfType(), 2, types.float32, lambda builder, value: builder.fpext(value, ir.FloatType()))

    @intrinsic
    def to_half(typingctx, x):
        def codegen(context, builder, signature, args):
            return builder.zext(builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), I16), I32)
        return types.uint32(types.float32), codegen

    @intrinsic
    def of_half(typingctx, bits):
        def codegen(context, builder, signature, args):
            return builder.fpext(builder.bitcast(builder.trunc(args[0], I16), ir.HalfType()), ir.FloatType())
        return types.float32(types.uint32), codegen

    def _bitcast(source, target):
        @intrinsic
        def cast(typingctx, x):
            return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], context.get_value_type(target))
        return cast

    float_bits, bits_float = _bitcast(types.float32, types.uint32), _bitcast(types.uint32, types.float32)

    def _assembly(builder, result, text, constraints, args):
        function = ir.FunctionType(result, [a.type for a in args])
        return builder.call(ir.InlineAsm(function, text, constraints, side_effect=False), args)

    def _permute(builder, args):
        return _assembly(builder, I32, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", args)

    @intrinsic
    def permuted(typingctx, a, b, selector):
        return (types.uint32(types.uint32, types.uint32, types.uint32),
                lambda context, builder, signature, args: _permute(builder, args))

    @device
    def exp(x):
        return math.exp(x)

    @device
    def fma(a, b, c):
        return cuda.fma(a, b, c)

    @device
    def nearest(x, factor):
        return cuda.libdevice.float2int_rn(x * factor) if factor > ZERO else 0

    @device
    def sync():
        cuda.syncthreads()

    @device
    def warp_sync():
        cuda.syncwarp()

    @intrinsic
    def dp4a(typingctx, a, b, c):
        def codegen(context, builder, signature, args):
            return _assembly(builder, I32, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", args)
        return types.int32(types.uint32, types.uint32, types.int32), codegen

    @device
    def warp_sum(x):
        for step in (16, 8, 4, 2, 1):
            x += cuda.shfl_xor_sync(WHOLE_WARP, x, step)
        return x

    @device
    def max_of_eight(x):
        for step in (4, 2, 1):
            x = max(x, cuda.shfl_xor_sync(WHOLE_WARP, x, step))
        return x

    @device
    def sum_of_four(x):
        for step in (2, 1):
            x += cuda.shfl_xor_sync(WHOLE_WARP, x, step)
        return x

    @device
    def sum_of_lanes(x, n):
        for step in (8, 4, 2, 1):
            if step < n:
                x += cuda.shfl_xor_sync(WHOLE_WARP, x, step)
        return x

    @device
    def warp_prefix(x, lane):
        for step in (1, 2, 4, 8, 16):
            below = cuda.shfl_up_sync(WHOLE_WARP, x, step)
            if lane >= step:
                x = np.int32(x + below)
        return x

    @device
    def warp_max(x):
        for step in (16, 8, 4, 2, 1):
            x = max(x, cuda.shfl_xor_sync(WHOLE_WARP, x, step))
        return x

    warp_max_int = warp_max

    @intrinsic
    def mma_s8(typingctx, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        def codegen(context, builder, signature, args):
            four = ir.LiteralStructType([I32] * 4)
            made = _assembly(builder, four, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, "
                             "{$10,$11,$12,$13};", ",".join(["=r"] * 4 + ["r"] * 10), args)
            return cgutils.pack_array(builder, [builder.extract_value(made, i) for i in range(4)])
        return types.UniTuple(types.int32, 4)(*[types.uint32] * 6, *[types.int32] * 4), codegen

    @intrinsic
    def mma_f16(typingctx, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        def codegen(context, builder, signature, args):
            made = _assembly(builder, ir.LiteralStructType([ir.FloatType()] * 4), "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                             "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                             ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4), args)
            return cgutils.pack_array(builder, [builder.extract_value(made, i) for i in range(4)])
        return types.UniTuple(types.float32, 4)(*[types.uint32] * 6, *[types.float32] * 4), codegen

    @intrinsic
    def int8_to_f16(typingctx, quad):
        def codegen(context, builder, signature, args):
            # 0x6400 | (byte + 128) is the float16 1024 + (byte + 128)
            biased = builder.xor(args[0], I32(0x80808080))
            pairs = [_permute(builder, [biased, I32(0x64646464), I32(selector)]) for selector in (0x4140, 0x4342)]
            return cgutils.pack_array(builder, [_assembly(builder, I32, "sub.f16x2 $0, $1, $2;", "=r,r,r", [pair, I32(0x64806480)])
                                                for pair in pairs])
        return types.UniTuple(types.uint32, 2)(types.uint32), codegen


@device
def pack_int8x2(a, b, c, d):
    """Split four int16 into int8 pairs: 256 high + low.

    Returns a uint32 of the four high bytes and one of the four low bytes, all signed.
    """
    return (np.uint32((a + 128 >> 8 & 255) | (b + 128 >> 8 & 255) << 8 | (c + 128 >> 8 & 255) << 16 | (d + 128 >> 8 & 255) << 24),
            np.uint32((a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24))
