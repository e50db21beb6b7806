"""What Numba's simulator has instead of driver.py: the GPU's memory is the host's."""
import ctypes
from typing import NamedTuple

import numpy as np
import psutil


class Memory(NamedTuple):
    """Bytes from `address` on."""
    address: int
    bytes: np.ndarray


class SimulatedGpu:
    """The memory and copies of driver.Gpu; kernels are launched by the simulator itself, and nothing is recorded."""

    name = "Numba's CUDA simulator"

    def memory(self):
        """Bytes of memory that are free, and all."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def allocate(self, n_bytes):
        """Memory of so many bytes, at least one."""
        there = np.empty(n_bytes, np.uint8)
        return Memory(there.ctypes.data, there)

    def copy_in(self, address, values):
        """Copy a contiguous numpy array there."""
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def copy_out(self, values, address):
        """Copy from there into a contiguous numpy array."""
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def clear(self, address, n_bytes):
        """Set bytes to zero."""
        ctypes.memset(address, 0, n_bytes)

    def synchronize(self):
        """Kernels are done when their launch is."""
