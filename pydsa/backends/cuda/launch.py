"""Kernels and how they are launched: one signature each, compiled when it is first needed, everything on one stream."""
import functools

from numba import cuda

from pydsa.backends.cuda.array import DeviceArray, stream
from pydsa.backends.cuda.device import SIMULATED
from pydsa.errors import PydsaError

if not SIMULATED:
    from numba.cuda.core import config
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0      # most launches of one token are small

BLOCKS = 4 if SIMULATED else 264        # that are wanted where work is divided freely, two for each of an H100's processors
KERNELS = {}        # name -> Kernel: all that there are, for the tests that compile them without a GPU


class Kernel:
    """A CUDA kernel with one signature, that of arrays of any strides: kernel(grid, *args) launches blocks of `threads` threads.

    bounds: threads of a block, and how many blocks must fit into a processor at a time, which limits their registers.
    """

    only_compile = False        # for all kernels: whether calls compile and launch nothing

    def __init__(self, function, signature, threads, blocks):
        self.function, self.signature, self.threads, self.bounds = function, signature, threads, (threads, blocks)
        functools.update_wrapper(self, function)
        assert function.__name__ not in KERNELS, function.__name__
        KERNELS[function.__name__] = self

    @functools.cached_property
    def compiled(self):
        """The function for this GPU."""
        if SIMULATED:
            return cuda.jit(self.function)
        try:    # without optimization at link time, which takes longer and makes other code than ptx() shows
            return cuda.jit(self.signature, launch_bounds=self.bounds, lto=False)(self.function)
        except Exception as error:      # the driver's errors have no class of their own in common
            if type(error).__name__ not in ("CUDAError", "CudaAPIError"):
                raise
            raise PydsaError(f"The CUDA driver does not take the kernel {self.function.__name__} ({error}).") from error

    def ptx(self, capability):
        """Its PTX for a compute capability, (9, 0) for example, without a GPU."""
        return cuda.compile_ptx(self.function, self.signature, cc=capability, launch_bounds=self.bounds)[0]

    def __call__(self, grid, *args):
        compiled = self.compiled
        if not Kernel.only_compile:
            compiled[grid, self.threads, stream()](*(a.numba if isinstance(a, DeviceArray) else a for a in args))


def kernel(signature, threads, name=None, blocks=1):
    """Make a Kernel of a function: its signature as numba writes it, threads a block; a name, if several are made of one function.

    blocks: that must fit into a processor at a time.
    """
    def make(function):
        function.__name__ = function.__qualname__ = name or function.__name__
        return Kernel(function, f"void({signature})", threads, blocks)
    return make


def blocks_for(n, per_block):
    """Blocks that n pieces of work need, at least one."""
    return max(1, -(-n // per_block))
