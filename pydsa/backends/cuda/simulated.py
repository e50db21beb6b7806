"""Stand-in for driver.py in Numba's CUDA simulator. Device memory is host memory."""
import ctypes
from typing import NamedTuple

import numpy as np
import psutil


class Memory(NamedTuple):
    """An allocation: its address and its bytes."""
    address: int
    bytes: np.ndarray


class SimulatedGpu:
    """The memory and copies of driver.Gpu, on the host.

    The simulator itself launches kernels. Nothing is recorded.
    """

    name = "Numba's CUDA simulator"

    def memory(self):
        """Free and total bytes of memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def allocate(self, n_bytes):
        """Allocate n_bytes, at least one."""
        data = np.empty(n_bytes, np.uint8)
        return Memory(data.ctypes.data, data)

    def copy_in(self, address, values):
        """Copy a contiguous numpy array to an address."""
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def copy_out(self, values, address):
        """Copy from an address into a contiguous numpy array."""
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def clear(self, address, n_bytes):
        """Set bytes to zero."""
        ctypes.memset(address, 0, n_bytes)

    def synchronize(self):
        """Do nothing: a launch returns when its kernel is done."""
