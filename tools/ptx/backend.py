"""Stands in for a GPU below pydsa.backends.cuda: its arrays lie in an Arena, its kernels are compiled to PTX and executed by a machine.

install() before anything of the backend is used. Kernels have the geometry that they have on a GPU.
"""
import functools
import weakref
from types import SimpleNamespace

import numpy as np

from tools.ptx.machine import Kernel
from tools.ptx.memory import Arena
from tools.ptx.program import parse

CAPABILITY = 9, 0
SIZE = 1 << 28


class Bytes:
    """Bytes of the arena as numba's device arrays of bytes are: slices, copies."""

    def __init__(self, arena, start, n_bytes, owner=None):
        self.arena, self.start, self.n_bytes, self.owner = arena, start, n_bytes, owner
        self.device_ctypes_pointer = SimpleNamespace(value=arena.base + start)
        if owner is None:
            weakref.finalize(self, arena.give_back, start)

    def __getitem__(self, item):
        first, end, _ = item.indices(self.n_bytes)
        return Bytes(self.arena, self.start + first, end - first, self)

    @property
    def _slice(self):
        return slice(self.start, self.start + self.n_bytes)

    def copy_to_host(self, stream):
        return self.arena.data[self._slice].copy()

    def copy_to_device(self, values, stream):
        self.arena.data[self._slice] = values
        self.arena.known[self._slice] = True


class Launcher:
    """A kernel compiled, as numba's are launched: launcher[grid, threads, stream](*args)."""

    def __init__(self, kernel, arena):
        self.kernel = Kernel(parse(kernel.ptx(CAPABILITY)), arena)

    def __getitem__(self, geometry):
        grid, threads, _ = geometry
        grid = (grid,) if isinstance(grid, (int, np.integer)) else tuple(grid)
        return functools.partial(self._launch, grid + (1,) * (3 - len(grid)), threads)

    def _launch(self, grid, threads, *args):
        if not (0 < grid[0] < 1 << 31 and 0 < grid[1] < 1 << 16 and 0 < grid[2] < 1 << 16 and threads <= 1024):
            raise ValueError(f"{self.kernel.program.name}: a grid of {grid} blocks of {threads} threads cannot be launched")
        values = []
        for a in args:
            if hasattr(a, "strides") and getattr(a, "shape", ()) != ():
                values += [0, 0, a.size, a.dtype.itemsize, a.span[0], *a.shape, *a.strides]
            else:
                values.append(a)
        kinds = self.kernel.program.parameters.values()
        self.kernel.launch(grid, threads, [v if kind[0] == "f" else int(v) & (1 << int(kind[1:])) - 1 for v, kind in zip(values, kinds)])


def install(size=SIZE):
    """Let the CUDA backend run on the machine of this folder -> its Arena."""
    import numba.cuda.cudadrv.driver
    import numba.cuda.dispatcher
    device = SimpleNamespace(compute_capability=CAPABILITY, name="PTX in numpy (tools/ptx)")
    numba.cuda.dispatcher.get_current_device = numba.cuda.get_current_device = lambda: device
    arena = Arena(size)
    context = SimpleNamespace(get_memory_info=lambda: SimpleNamespace(free=size, total=size),
                              memory_manager=SimpleNamespace(deallocations=SimpleNamespace(clear=lambda: None)))
    numba.cuda.current_context = lambda: context
    numba.cuda.cudadrv.driver.driver.get_version = lambda: (99, 0)
    numba.cuda.stream = lambda: SimpleNamespace(synchronize=lambda: None)
    numba.cuda.device_array = lambda n_bytes, dtype: Bytes(arena, arena.allocate(n_bytes), n_bytes)

    from pydsa.backends import cuda
    from pydsa.backends.cuda.array import DeviceArray
    DeviceArray.numba = property(lambda array: array)
    DeviceArray.clear = lambda array: array.set(np.zeros(array.shape, array.dtype))
    cuda.Kernel.compiled = functools.cached_property(lambda kernel: Launcher(kernel, arena))
    cuda.Kernel.compiled.__set_name__(cuda.Kernel, "compiled")
    cuda.Recording.run = cuda.Recording._launch         # a graph of CUDA needs a driver
    return arena
