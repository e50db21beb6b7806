"""AMX tile registers, emulated: AMX kernels run on any AVX-512 CPU.

install() before pydsa.backends.cpu is imported; cpu_features() goes into NUMBA_CPU_FEATURES. The emulated process needs a
PYDSA_CACHE_DIR of its own: its kernels call the functions below by name, which no other process has.

    PYDSA_TEST_AMX=emulated PYDSA_CACHE_DIR=... python -m pytest tests/test_ops.py
"""
import contextlib
import ctypes

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

AMX = "amx-tile", "amx-int8", "amx-bf16"
TILES = np.zeros((1 << 14, 8, 16, 64), np.uint8)        # of each thread, by its number: eight registers, 16 rows of 64 bytes
GETTID = 186        # the system call that tells a thread's number, on x86
INSTRUCTIONS = {        # intrinsic -> its arguments: r a register, p an address, n a number
    "ldtilecfg": "p", "tilerelease": "", "tilezero": "r", "tileloadd64": "rpn", "tilestored64": "rpn", "tdpbssd": "rrr", "tdpbf16ps": "rrr"}


def possible():
    """Whether this CPU has what AMX kernels need, but not AMX."""
    here = llvm.get_host_cpu_features()
    return here.get("avx512bw", False) and here.get("avx512vnni", False) and not here.get("amx-tile", False)


def cpu_features():
    """This CPU's features and AMX, for NUMBA_CPU_FEATURES."""
    here = [name for name, there in llvm.get_host_cpu_features().items() if there and name not in AMX]
    return ",".join(f"+{name}" for name in (*here, *AMX))


class _Permitted:
    """The C library, whose arch_prctl() permits AMX."""

    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        return (lambda *args: 0) if name == "syscall" else getattr(self._library, name)


@contextlib.contextmanager
def _permitted():
    """Let the system seem to permit AMX."""
    load = ctypes.CDLL
    ctypes.CDLL = lambda name=None, *args, **options: _Permitted(load(None)) if name is None else load(name, *args, **options)
    try:
        yield
    finally:
        ctypes.CDLL = load


def _registers():
    """register(i): this thread's tile register i as uint8 [16, 64], and row(address): 64 bytes there."""
    import numba
    from numba import carray, types
    from numba.extending import intrinsic

    syscall = types.ExternalFunction("syscall", types.int64(types.int64))

    @intrinsic
    def bytes_at(typingctx, address):
        kind = types.CPointer(types.uint8)
        return kind(types.int64), lambda context, builder, signature, args: builder.inttoptr(args[0], context.get_value_type(kind))

    tiles, n_threads = TILES.ctypes.data, len(TILES)

    @numba.njit
    def register(i):
        return carray(bytes_at(tiles + (syscall(GETTID) % n_threads * 8 + i) * 1024), (16, 64))

    @numba.njit
    def row(address):
        return carray(bytes_at(address), (64,))
    return register, row


def _products(register):
    """tdpbssd and tdpbf16ps: c += a b, where b is interleaved by four bytes (Intel SDM)."""
    def tdpbssd(c, a, b):
        sums, left, right = register(c).view(np.int32), register(a).view(np.int8), register(b).view(np.int8)
        columns = np.empty((64, 16), np.int32)
        for k in range(64):
            for n in range(16):
                columns[k, n] = right[k // 4, 4 * n + k % 4]
        for m in range(16):
            for k in range(64):
                x = np.int32(left[m, k])
                for n in range(16):
                    sums[m, n] += x * columns[k, n]

    def tdpbf16ps(c, a, b):
        sums, left, right = register(c).view(np.float32), register(a).view(np.uint16), register(b).view(np.uint16)
        bits, row = np.empty((32, 16), np.uint32), np.empty(32, np.uint32)
        for k in range(32):
            for n in range(16):
                bits[k, n] = np.uint32(right[k // 2, 2 * n + k % 2]) << np.uint32(16)
        columns, values = bits.view(np.float32), row.view(np.float32)
        for m in range(16):
            for k in range(32):
                row[k] = np.uint32(left[m, k]) << np.uint32(16)
            for k in range(32):
                for n in range(16):
                    sums[m, n] += values[k] * columns[k, n]
    return tdpbssd, tdpbf16ps


def _functions():
    """The instructions by name, compiled; their arguments are int64."""
    import numba
    from numba import types
    register, row_at = _registers()

    def ldtilecfg(address):
        pass

    def tilerelease():
        pass

    def tilezero(i):
        register(i)[:] = 0

    def tileloadd64(i, address, stride):
        tile = register(i)
        for row in range(16):
            tile[row] = row_at(address + row * stride)

    def tilestored64(i, address, stride):
        tile = register(i)
        for row in range(16):
            row_at(address + row * stride)[:] = tile[row]

    functions = ldtilecfg, tilerelease, tilezero, tileloadd64, tilestored64, *_products(register)
    return {f.__name__: numba.cfunc(types.void(*[types.int64] * f.__code__.co_argcount))(f) for f in functions}


def install():
    """Emulate AMX in this process."""
    from pydsa import compiling
    compiling._python = lambda: None        # other processes would compile the instructions themselves
    with _permitted():
        from pydsa.backends.cpu.vectors import amx
    assert amx.HERE, "NUMBA_CPU_FEATURES must name AMX"
    global functions        # they must stay alive
    functions = _functions()
    for name, function in functions.items():
        llvm.add_symbol(f"emulated_{name}", function.address)
    i64, call = ir.IntType(64), amx.call_llvm

    def emulated(builder, name, result, args):
        """Emit a call of an emulated instruction; any other intrinsic as it is."""
        kinds = INSTRUCTIONS.get(name.removeprefix("llvm.x86."))
        if kinds is None:
            return call(builder, name, result, args)
        values = [builder.ptrtoint(a, i64) if kind == "p" else builder.zext(a, i64) if kind == "r" else a for a, kind in zip(args, kinds)]
        return call(builder, f"emulated_{name.removeprefix('llvm.x86.')}", result, values)
    amx.call_llvm = emulated
