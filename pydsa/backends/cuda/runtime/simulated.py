"""Stand-in for driver.py in Numba's CUDA simulator. Device memory is host memory."""
import ctypes
from typing import NamedTuple

import numpy as np
import psutil

from pydsa.backends import gpus, host


class Memory(NamedTuple):
    """An allocation: its GPU, its address and its bytes."""
    gpu: object
    address: int
    bytes: np.ndarray
    known: dict     # see DeviceArray.greatest


class SimulatedGpu:
    """The memory and copies of driver.Gpu, on the host.

    The simulator itself launches kernels. Nothing is recorded, and all is done when a call returns: there are no streams and no events.
    """

    name = gpus.SIMULATOR
    has_bus = False

    def __init__(self, index=0):
        self.index = index

    @property
    def title(self):
        """How messages call it: "The GPU", or with its number where there are several."""
        return gpus.title(self.index)

    def check(self):
        """Raise PydsaError if there is no GPU of this index."""
        gpus.check_index(self.index)

    def memory(self):
        """Free and total bytes of memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def allocate(self, n_bytes):
        """Allocate n_bytes, at least one."""
        self.check()
        data = np.empty(n_bytes, np.uint8)
        return Memory(self, data.ctypes.data, data, {})

    def settle_in(self):
        """Do nothing: threads have no context."""

    def copy_stream(self):
        """A stand-in for driver.CopyStream."""
        return SimulatedStream()

    def register(self, array):
        """Nothing to do: the array itself, in place of driver.Registered."""
        return array

    def host_empty(self, shape, dtype):
        """An array without values in the host's memory, numpy's."""
        return host.empty(shape, dtype)

    def event(self):
        """None, in place of an event: see mark()."""

    def mark(self, event):
        """Do nothing, as wait() and follow(): all is done when a call returns."""

    wait = follow = mark

    def send(self, address, source, n_bytes, event):
        """Copy from the host to an address."""
        ctypes.memmove(address, source, n_bytes)

    receive = send

    def copy_in(self, address, values):
        """Copy a contiguous numpy array to an address."""
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def copy_out(self, values, address):
        """Copy from an address into a contiguous numpy array."""
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def copy_across(self, target, address, source, n_bytes):
        """Copy bytes to an address of a GPU, this or another one."""
        ctypes.memmove(address, source, n_bytes)

    def clear(self, address, n_bytes):
        """Set bytes to zero."""
        ctypes.memset(address, 0, n_bytes)

    def synchronize(self):
        """Do nothing: a launch returns when its kernel is done."""


class SimulatedStream:
    """Copies of driver.CopyStream, done at once."""

    def send(self, address, source, n_bytes):
        """Copy from the host to an address."""
        ctypes.memmove(address, source, n_bytes)

    def clear(self, address, n_bytes):
        """Set bytes to zero."""
        ctypes.memset(address, 0, n_bytes)

    def mark(self, event):
        """Do nothing, as follow() and wait(): all is done when a call returns."""

    follow = wait = mark
