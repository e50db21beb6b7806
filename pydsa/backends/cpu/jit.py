"""How kernels are compiled: one decorator, one cache folder per state of the sources, block functions called by address.

Numba stamps a cached kernel with the file of that kernel only, so an edit in a helper elsewhere would leave stale machine code behind.
Here the cache folder's name is a hash of all kernel sources, of numba's version and of the CPU's features. Kernels of the program that
uses pydsa keep their own.
"""
import contextlib
import ctypes
import functools
import importlib.metadata
import platform
from pathlib import Path

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa import quants
from pydsa.backends.cpu.threads import warn_of_workqueue
from pydsa.kernel_cache import cache_folder


HERE = Path(__file__).parent
llvm.initialize_native_asmparser()      # for the one instruction that is given as text (simd.py)


def cpu_features():
    """The features that kernels are compiled for, as LLVM names them: NUMBA_CPU_FEATURES, or those of this CPU.

    Those of AMX only where the system lets this process use its registers.
    """
    if numba.config.CPU_FEATURES is not None:
        features = {name[1:] for name in numba.config.CPU_FEATURES.split(",") if name.startswith("+")}
    else:
        features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    return features if "amx-tile" not in features or _amx_allowed() else {name for name in features if not name.startswith("amx")}


@functools.cache
def _amx_allowed():
    """Ask Linux for the 8 KiB of AMX registers, which a process gets only if it asks (arch_prctl(2), the kernel's x86/xstate page)."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _cache_folder():
    sources = [*HERE.rglob("*.py"), Path(quants.__file__)]
    return cache_folder(importlib.metadata.version("numba") + " ".join(sorted(cpu_features())), sources)


FOLDER = str(_cache_folder())

# Sums may be reordered and contracted, but infinities and NaN keep their meaning: attention masks are made of -inf.
FASTMATH = {"nsz", "contract", "afn", "reassoc"}


@contextlib.contextmanager
def _our_folder():
    """Numba asks for the cache folder when a function is decorated."""
    theirs, numba.config.CACHE_DIR = numba.config.CACHE_DIR, FOLDER
    try:
        yield
    finally:
        numba.config.CACHE_DIR = theirs


def kernel(function=None, *, parallel=False):
    """An op of the CPU backend: nopython, cached on disk, no bounds checks; every argument is validated before it comes here."""
    if function is None:
        return lambda f: kernel(f, parallel=parallel)
    with _our_folder():
        return numba.njit(cache=True, nogil=True, parallel=parallel, fastmath=FASTMATH, error_model="numpy")(function)


def inner(function):
    """A function that kernels call. Not cached by itself: it becomes part of each kernel's machine code."""
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy")(function)


def inline(function):
    """A function whose machine code stands where it is called: for those that take or return vectors."""
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy", forceinline=True)(function)


class BlockFunction:
    """f(source, n_blocks, target), compiled on first use and called by its address, so that no kernel is compiled once per GGUF type."""

    def __init__(self, function, source, target):
        self.function = function
        self.signature = types.void(types.CPointer(numba.from_dtype(source)), types.intp, types.CPointer(numba.from_dtype(target)))
        self._compiled = None

    @property
    def address(self):
        """The machine code's address in this process, an int."""
        if self._compiled is None:
            with _our_folder():
                self._compiled = numba.cfunc(self.signature, cache=True, nopython=True, error_model="numpy")(self.function)
        return self._compiled.address


@intrinsic
def call_block_function(typingctx, address, source, n_blocks, target):
    """Call a BlockFunction by address; source and target are addresses too."""
    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word, word, word]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.sext(a, word) if a.type != word else a for a in args[1:]])
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


class IntpFunction:
    """A function of addresses and integers, all of 64 bits, that returns nothing; compiled on first use and called by its address."""

    def __init__(self, function):
        self.function = function
        self._compiled = None

    @property
    def address(self):
        """The machine code's address in this process, an int."""
        if self._compiled is None:
            signature = types.void(*[types.int64] * self.function.__code__.co_argcount)
            with _our_folder():
                self._compiled = numba.cfunc(signature, cache=True, nopython=True, error_model="numpy")(self.function)
        return self._compiled.address


@intrinsic
def call_intp_function(typingctx, address, arguments):
    """Call a IntpFunction by address with a tuple of integers."""
    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        values = [context.cast(builder, builder.extract_value(args[1], i), kind, types.int64) for i, kind in enumerate(arguments.types)]
        function = ir.FunctionType(ir.VoidType(), [word] * len(values)).as_pointer()
        builder.call(builder.inttoptr(args[0], function), values)
        return context.get_dummy_value()
    return types.void(types.intp, arguments), codegen


def entry_point(function, args):
    """The compiled code of a kernel for arguments of these types, called as the kernel is: it spares looking at their types every time."""
    return function.compile(tuple(numba.typeof(a) for a in args))


def compile_all(calls, progress=None):
    """Compile (or load from the cache) what `calls`, pairs of a kernel and its arguments, will need, without running any.

    progress(done, total, name) is called before each kernel. Kernels with equal argument types are compiled once.
    """
    wanted = {}
    for function, args in calls:
        signature = tuple(numba.typeof(a) for a in args)
        wanted[function.py_func.__name__, signature] = function
    for done, ((name, signature), function) in enumerate(wanted.items()):
        if progress is not None:
            progress(done, len(wanted), name)
        function.compile(signature)
    warn_of_workqueue()
    if progress is not None:
        progress(len(wanted), len(wanted), "")
