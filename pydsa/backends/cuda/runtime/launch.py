"""Kernels and how they are launched: one signature each, compiled when it is first needed and kept on disk."""
import contextlib
import functools
import importlib
import importlib.metadata
import pickle
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numba
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.runtime.array import DeviceArray
from pydsa.backends.cuda.runtime.current import current
from pydsa.compiling import Job, collecting_paused, compile_jobs, counted
from pydsa.kernel_cache import cache_folder, kept, read
from pydsa.machine.cores import physical_cores
from pydsa.signals import interrupts_held


if not SIMULATED:
    from cuda.bindings import nvjitlink
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import nvvm

    from pydsa.backends.cuda.runtime.driver import DEPENDENT_SINCE, Parameters

BLOCKS = 4 if SIMULATED else 264        # that are wanted where work is divided freely, two for each of an H100's processors
KERNELS = {}        # name -> Kernel: all that there are, for the tests that compile them without a GPU
PACKAGE = Path(__file__).parents[3]
COMPILERS = "numba", "numba-cuda", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink"       # packages
KINDS = {"b1": "?", "i4": "i", "i8": "q", "f4": "f", "f8": "d"}     # types of parameters -> letters of the module `struct`


@functools.cache
def _folder():
    versions = []
    for package in COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):      # a part of an installed CUDA toolkit
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return cache_folder(" ".join(versions), [PACKAGE / "quants.py", *PACKAGE.glob("backends/cuda/**/*.py")])


class _Listing(threading.local):
    kernels = None      # a dict {name: Kernel}, to which this thread's calls of kernels add, and launch nothing; or None
    many = False        # whether those of steps of many tokens are listed, however few there are


listing = _Listing()


def is_listing():
    """Whether this thread's calls of kernels only list them.

    Then ops call all kernels that their steps may take, also with other numbers of tokens.
    """
    return listing.kernels is not None


def lists_many():
    """Whether an op's kernels for many tokens are listed, not for a few."""
    return is_listing() and listing.many


class Kernel:
    """A CUDA kernel with one signature, that of arrays of any strides: kernel(grid, *args) launches blocks of `threads` threads.

    bounds: threads of a block, and how many blocks must fit into a processor at a time, which limits their registers. shared, dependent,
    specific and lto: see kernel().
    """

    def __init__(self, function, signature, threads, blocks=1, shared=0, dependent=False, specific=None, lto=None):
        self.function, self.signature, self.threads, self.bounds = function, signature, threads, (threads, blocks)
        self.shared, self.dependent, self.specific, self.lto = shared, dependent, specific, bool(specific) if lto is None else lto
        self._loaded = {}       # index of a GPU -> the kernel as its driver knows it, and its parameters
        functools.update_wrapper(self, function)
        assert function.__name__ not in KERNELS, function.__name__
        KERNELS[function.__name__] = self

    def ptx(self, capability):
        """Its PTX for a compute capability, (9, 0) for example, without a GPU."""
        return self._kept("ptx", capability, lambda: self._compiled(capability).encode()).decode()

    def cubin(self, capability):
        """Its machine code for a compute capability."""
        return self._kept("cubin", capability, lambda: self._assembled(capability))

    def _kept(self, form, capability, make):
        return kept(self._path(form, capability), make) if self._ours else make()

    def _path(self, form, capability):
        return _folder() / f"{self.__name__}.sm_{capability[0]}{capability[1]}.{form}"

    @property
    def _ours(self):
        """Whether the folder is one of its source's."""
        return self.function.__module__.startswith("pydsa.")

    def is_missing(self, capability):
        """Whether its machine code is to be made yet, and to be kept."""
        return self._ours and read(self._path("cubin", capability)) is None

    def _architecture(self, capability):
        """What compilers call the GPU: sm_90, or sm_90a with what only this one has."""
        return f"sm_{capability[0]}{capability[1]}{'a' if self.specific else ''}"

    def _compiled(self, capability):
        with _device_functions_for(capability):
            text, _ = cuda.compile_ptx(self.function, f"void({self.signature})", cc=capability, launch_bounds=self.bounds)
        text = text.replace(re.search(r"\.entry (\w+)", text)[1], self.__name__)
        return re.sub(r"(\.target \w+)", rf"\1{'a' if self.specific else ''}", text, count=1)

    def _intermediate(self, capability):
        """Its LTO-IR, in which it has a name of Numba's."""
        with _device_functions_for(capability):
            code, _ = cuda.compile(self.function, f"void({self.signature})", device=False, abi="numba", cc=capability, output="ltoir",
                                   launch_bounds=self.bounds)
        return code

    def takes_lto(self, target):
        """Whether it goes to a GPU as LTO-IR, not as PTX.

        Where nvJitLink assembles PTX for 8.0 to 8.9, shuffles in code that may be divergent are calls, around which registers are spilled.
        """
        return self.lto or target < DEPENDENT_SINCE

    def _assembled(self, capability):
        return self.linked(capability, capability)[0]

    def linked(self, capability, target, *options):
        """Machine code for `target`, and what nvJitLink says.

        It is made of the code for `capability`. options: more of nvJitLink's; with -verbose it tells of registers and spills.
        """
        options = [f"-arch={self._architecture(target)}", *options, *(["-lto"] if self.takes_lto(target) else [])]
        kind, code = ((nvjitlink.InputType.LTOIR, self._intermediate(capability)) if self.takes_lto(target) else
                      (nvjitlink.InputType.PTX, self.ptx(capability).encode()))
        link = nvjitlink.create(len(options), options)
        try:
            nvjitlink.add_data(link, kind, code, len(code), self.__name__)
            nvjitlink.complete(link)
            code, said = bytearray(nvjitlink.get_linked_cubin_size(link)), bytearray(nvjitlink.get_info_log_size(link))
            nvjitlink.get_linked_cubin(link, code)
            nvjitlink.get_info_log(link, said)
        finally:
            nvjitlink.destroy(link)
        return bytes(code), said.decode()

    def entry(self, code, target):
        """The name that the kernel has in its machine code for a target: by way of LTO-IR, Numba's."""
        found = re.search(rb"\.text\.([\w$]+)\0", code) if self.takes_lto(target) else None       # the name of a section
        return found[1].decode() if found else self.__name__

    def _load(self, here):
        kinds = "".join(_kinds(*found) for found in re.findall(r"(\w\d)(\[.*?\])?", self.signature))
        code = self.cubin(here.capability)
        function = here.load(code, self.entry(code, here.capability))
        if self.shared:
            here.allow_shared(function, self.shared)
        self._loaded[here.index] = function, Parameters(kinds)

    @functools.cached_property
    def _simulated(self):
        return cuda.jit(self.function)

    def __call__(self, grid, *args):
        here, values = current(), []
        for a in args:
            if isinstance(a, DeviceArray):
                assert a.gpu is here, f"{self.__name__} runs on GPU {here.index}, an array is on GPU {a.gpu.index}"
                if SIMULATED:
                    values.append(a.simulated)
                else:
                    values += a.parameters
            else:
                values.append(a)
        if is_listing():
            listing.kernels[self.__name__] = self
        elif SIMULATED:
            self._simulated[grid, self.threads, 0, self.shared](*values)
        else:
            if here.index not in self._loaded:
                self._load(here)
            function, parameters = self._loaded[here.index]
            grid = grid if isinstance(grid, tuple) else (grid,)
            here.launch(function, grid + (1,) * (3 - len(grid)), self.threads, parameters, values, self.shared, self.dependent)

    def load(self):
        """Give the current GPU its machine code before the first launch."""
        if not SIMULATED and current().index not in self._loaded:
            self._load(current())


def compile_all(kernels, progress=None):
    """Make the machine code of kernels and give it to the current GPU.

    What is not kept yet is made in several processes. progress(done, total, name) is called before each.
    """
    missing = [] if SIMULATED else [k for k in kernels if k.is_missing(current().capability)]
    jobs = [Job(k.__name__, len(k.function.__code__.co_code), __name__, "make",
                pickle.dumps((k.function.__module__, k.__name__, current().capability))) for k in missing]
    n_here = len(kernels) - len(missing)
    report = counted(progress, len(kernels), n_here)

    with interrupts_held() as check, collecting_paused():
        compile_jobs(jobs, _folder(), min(physical_cores(), numba.config.NUMBA_NUM_THREADS), report, check)
        for done, k in enumerate(kernels):
            check()
            report(done - n_here, k.__name__)
            k.load()
    report(len(missing), "")


def make(module, name, capability):
    """Make and keep the machine code of a module's Kernel: what a Job asks for."""
    importlib.import_module(module)
    KERNELS[name].cubin(capability)


def _kinds(kind, axes):
    """The letters of a parameter: "f4", "[:,:]" is an array (see DeviceArray.parameters)."""
    return "PPqqP" + "qq" * (axes.count(",") + 1) if axes else KINDS[kind]


@contextlib.contextmanager
def _device_functions_for(capability):
    """Numba compiles what kernels call for the GPU that it finds: let it find one of this capability.

    NVVM does not look into assembly: where no launch depends on another in part, instructions for that are taken out before.
    """
    theirs, compile_ir = dispatcher.get_current_device, nvvm.compile_ir
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    if capability < DEPENDENT_SINCE:
        nvvm.compile_ir = lambda texts, **options: compile_ir([re.sub(r"griddepcontrol\.\w+;", "", text) for text in texts], **options)
    try:
        yield
    finally:
        dispatcher.get_current_device, nvvm.compile_ir = theirs, compile_ir


def kernel(signature, threads, name=None, blocks=1, **others):
    """Make a Kernel of a function: the types of its parameters as numba writes them, threads a block; a name, if several are made of one.

    blocks: that must fit into a processor at a time. Others: shared, bytes of dynamic shared memory, cuda.shared.array(0, ...) in the
    kernel; dependent, it may begin before the launch before it has ended, and calls wait_for_earlier() (instructions.py); specific, the
    only capability that it is for, (9, 0) for wgmma; lto, whether it is compiled by way of LTO-IR, as specific ones are, and all for GPUs
    before 9.0. What nvJitLink makes of PTX may call others: there each product of wgmma waits for the one before, and changes of the number
    of registers are not heeded.
    """
    def make(function):
        function.__name__ = function.__qualname__ = name or function.__name__
        return Kernel(function, signature, threads, blocks, **others)
    return make


def blocks_for(n, per_block):
    """Blocks that n pieces of work need, at least one."""
    return max(1, -(-n // per_block))
