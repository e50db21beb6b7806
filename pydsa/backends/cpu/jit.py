"""How kernels are compiled: one decorator, one cache folder per state of the sources, block functions called by address.

Numba stamps a cached kernel with the file of that kernel only, so an edit in a helper elsewhere would leave stale machine code behind,
and it trusts what it finds in a file. Here the cache folder's name is a hash of all kernel sources, of numba's version and of the CPU's
features, and each kernel is a file of its own for each signature.
"""
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import pickle
import platform
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import registry
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from pydsa import kernel_cache, quants
from pydsa.backends.cpu.linking import InnerPipeline, KernelPipeline
from pydsa.compiling import Job, collecting_paused, compile_jobs, counted
from pydsa.machine.cores import cache_of_core, physical_cores
from pydsa.signals import interrupts_held


HERE = Path(__file__).parent
FIRST_LEVEL_CACHE, SECOND_LEVEL_CACHE = cache_of_core(1), cache_of_core(2)      # bytes for a core, by which kernels size their work
llvm.initialize_native_asmparser()      # for instructions that are given as text (simd.py, lanes.py, codes.py)


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
    """Ask Linux for the 8 KiB of AMX registers.

    A process gets them only if it asks (arch_prctl(2), the kernel's x86/xstate page).
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _cache_folder(*others):
    """The folder of kernels of the backend's sources, and of others."""
    sources = [*HERE.rglob("*.py"), Path(quants.__file__), *others]
    versions = (f"{importlib.metadata.version('numba')} {importlib.metadata.version('llvmlite')} {sys.implementation.cache_tag} "
                f"{platform.system()} {FIRST_LEVEL_CACHE} {SECOND_LEVEL_CACHE} ")
    return kernel_cache.cache_folder(versions + " ".join(sorted(cpu_features())), sources)


FOLDER = _cache_folder()


def folder_of(package):
    """The cache folder of kernels of a package: the backend's, or its own.

    Kernels outside the backend are made of its sources too, but an edit in them leaves the backend's as they are.
    """
    ours = package.split(".")[0] == __package__.split(".")[0]       # of others nothing is kept
    return _folder_beside(package) if ours and not package.startswith(__package__) else FOLDER


@functools.cache
def _folder_beside(package):
    """The cache folder of a package outside the backend."""
    return _cache_folder(*(source for folder in sys.modules[package].__path__ for source in Path(folder).glob("*.py")))


# Sums may be reordered and contracted, but infinities and NaN keep their meaning: attention masks are made of -inf.
FASTMATH = {"nsz", "contract", "afn", "reassoc"}


def is_ours(function):
    """Whether a function is pydsa's: the cache folder's name says nothing of other sources."""
    return function.__module__.startswith("pydsa.")


class KernelCache(NullCache):
    """Numba's cache of one function, as a file for each signature."""

    def __init__(self, function):
        self.function = function
        self._found = {}        # signature -> what its file holds, b"" once that was loaded; None: there was nothing

    def path(self, signature):
        """The file for a signature."""
        code, magic = self.function.__code__, registry.cpu_target.target_context.codegen().magic_tuple()
        what = self.function.__module__, self.function.__qualname__, code.co_firstlineno, code.co_code, str(signature), magic
        folder = folder_of(self.function.__module__.rpartition(".")[0])
        return folder / f"{self.function.__name__}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.kernel"

    def holds(self, signature):
        """Whether there is code for a signature."""
        if not is_ours(self.function):
            return False
        if signature not in self._found:
            self._found[signature] = kernel_cache.read(self.path(signature))
        return self._found[signature] is not None

    def load_overload(self, signature, context):
        """Numba's: what save_overload() has kept, or None."""
        context.refresh()
        data = self._found.pop(signature, None) or kernel_cache.read(self.path(signature))
        if data is None:
            return None
        result = CompileResult._rebuild(context, *pickle.loads(data))
        self._found[signature] = b""
        return result

    def save_overload(self, signature, result):
        """Numba's: keep what was compiled. Code that has addresses of this process in it is for no other one."""
        if not result.library.has_dynamic_globals:
            kernel_cache.write(self.path(signature), dumps(result._reduce()))
            self._found[signature] = b""


def kernel(function):
    """A function that Python calls: nopython, cached on disk, no bounds checks; every argument is validated before it comes here."""
    compiled = numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy", pipeline_class=KernelPipeline)(function)
    if is_ours(function):
        compiled._cache = KernelCache(function)
    return compiled


INNER = {"nopython": True, "nogil": True, "fastmath": FASTMATH, "error_model": "numpy", "boundscheck": None, "no_cpython_wrapper": True,
         "no_cfunc_wrapper": True}
INLINE = INNER | {"forceinline": True}


class _Inner(registry.CPUDispatcher):
    """A compiled function without the wrappers for calls from Python.

    They took an eighth of the time to compile. Called from Python, it is the Python function.
    """

    for_two = None      # a function that does the same for two rows at once, faster

    def __init__(self, function, **options):
        super().__init__(function, targetoptions=INNER | options, pipeline_class=InnerPipeline)

    def __call__(self, *args):
        return self.py_func(*args)


def inner(function):
    """A function that kernels call. Not cached by itself: it becomes part of each kernel's machine code."""
    return _Inner(function)


def inline(function):
    """A function whose machine code stands where it is called: for those that take or return vectors."""
    return _Inner(function, **INLINE)


class ByAddress:
    """A function that kernels call by its address, compiled on first use."""

    def __init__(self, function, *args, result=types.void):
        self.function = function
        self.signature = result(*args)
        self.cache = KernelCache(function)
        self._compiled = None

    @property
    def address(self):
        """The machine code's address in this process, an int. While calls are listed: 0."""
        listed = getattr(_listing, "functions", None)
        if listed is not None:
            listed.append(self)
            return 0
        return self.compile()

    def compile(self):
        """Compile the function, if it is not yet; return its address."""
        if self._compiled is None:
            compiled = CFunc(self.function, normalize_signature(self.signature), {}, {"nopython": True, "error_model": "numpy"},
                             KernelPipeline)
            if is_ours(self.function):
                compiled._cache = self.cache
            compiled.compile()
            self._compiled = compiled
        return self._compiled.address


class BlockFunction(ByAddress):
    """A function f(source, n_blocks, target) that kernels call by address.

    So no kernel is compiled once per GGUF type.
    """

    def __init__(self, function, source, target):
        super().__init__(function, types.CPointer(numba.from_dtype(source)), types.intp, types.CPointer(numba.from_dtype(target)))


@intrinsic
def call_block_function(typingctx, address, source, n_blocks, target):
    """Call a BlockFunction by address; source and target are addresses too."""
    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word, word, word]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.sext(a, word) if a.type != word else a for a in args[1:]])
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


class IntpFunction(ByAddress):
    """A function of int64 arguments, addresses among them, without a result."""

    def __init__(self, function):
        super().__init__(function, *[types.int64] * function.__code__.co_argcount)


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


_listing = threading.local()


@contextlib.contextmanager
def listing():
    """While it lasts this Python thread gets 0 for every function's address.

    It yields the list of the functions that were asked for theirs. So calls can be made up, for the types of their arguments, before
    anything is compiled.
    """
    _listing.functions = []
    try:
        yield _listing.functions
    finally:
        _listing.functions = None


def is_listing():
    """Whether addresses are not known yet."""
    return getattr(_listing, "functions", None) is not None


class Wanted(NamedTuple):
    """A function to compile for one signature."""
    name: str
    module: str             # where it is found by its name, so that another process can compile it
    signature: object
    holds: object           # called, it says whether the cache has the code
    compile: object         # called, it compiles the function, or loads it from the cache
    size: int               # about how much there is to compile


def compile_all(wanted, progress=None):
    """Compile, or load, all that is Wanted.

    Several processes compile what is not in the cache. progress(done, total, name) is called before each.
    """
    missing = [w for w in wanted if not w.holds()]
    n_here = len(wanted) - len(missing)
    report = counted(progress, len(wanted), n_here)

    with interrupts_held() as check, collecting_paused():
        compile_jobs(_jobs(missing), FOLDER, min(physical_cores(), numba.config.NUMBA_NUM_THREADS), report, check)
        for done, w in enumerate(wanted):
            check()
            report(done - n_here, w.name)
            w.compile()
    report(len(missing), "")


def wanted_function(function):
    """A function by address as Wanted."""
    f = function.function
    return Wanted(f.__name__, f.__module__, function.signature, lambda: function.cache.holds(function.signature), function.compile,
                  code_size(f))


def wanted_kernel(kernel, *signature):
    """A kernel for one signature as Wanted."""
    f = kernel.py_func
    return Wanted(f.__name__, f.__module__, signature, lambda: kernel._cache.holds(signature), lambda: kernel.compile(signature),
                  code_size(f))


def _jobs(missing):
    """Jobs for what is missing, one a function that a process can import."""
    jobs = {}
    for w in missing:
        if getattr(sys.modules[w.module], w.name, None) is not None:
            jobs.setdefault((w.module, w.name), []).append(w)
    return [Job(name, sum(w.size for w in some), __name__, "compile_named", pickle.dumps((module, name, [w.signature for w in some])))
            for (module, name), some in jobs.items()]


def compile_named(module, name, signatures):
    """Compile what a Job asks for into the cache."""
    function = getattr(importlib.import_module(module), name)
    for signature in signatures:
        if hasattr(function, "compile"):        # a kernel or an op
            function.compile(signature)
        else:
            ByAddress(function, *signature.args).compile()


def code_size(function, seen=None):
    """How much there is to compile: bytes of its code and of all that it calls."""
    seen = set() if seen is None else seen
    if function in seen:
        return 0
    seen.add(function)
    called = (getattr(function.__globals__.get(name), "py_func", None) for name in function.__code__.co_names)
    return len(function.__code__.co_code) + sum(code_size(f, seen) for f in called if f)
