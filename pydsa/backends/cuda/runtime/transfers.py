"""Copies between a GPU and the host, or another GPU.

The host waits for them only where it reads or overwrites what is copied.
"""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.runtime.array import DeviceArray
from pydsa.backends.transfers import convert

if not SIMULATED:
    from pydsa.backends.cuda.runtime.driver import Pinned, Registered


def transfer(x, y):
    """The transfer of x to y, of which one is a GPU's: see backends/transfers.py."""
    if not isinstance(x, DeviceArray):
        return FromHost(x, y)
    if not isinstance(y, DeviceArray):
        return ToHost(x, y)
    return Across(x, y)


def is_pinned(array):
    """Whether a GPU can copy from a contiguous array while the host goes on.

    It lies in memory of host_empty(), or in a registered array.
    """
    if SIMULATED:
        return False
    owner, start = array, array.ctypes.data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, Pinned) or any(
        first <= start and start + array.nbytes <= first + n for first, n in list(Registered.ranges.items()))


def _address(array):
    """The address of the first byte of a contiguous array of a GPU."""
    assert array.span[1] - array.span[0] == array.nbytes, "a transfer needs contiguous arrays"
    return array.span[0]


class _WithHost:
    """A transfer between an array of a GPU and one of the host.

    Where the host's is of another dtype, or in pageable memory, from which copies are slow and synchronous, they go through a buffer of the
    transfer's own.
    """

    def __init__(self, array, there):
        assert array.flags.c_contiguous and array.shape == there.shape, (array.shape, there.shape)
        self._gpu, self._address, self._n_bytes, self._array = there.gpu, _address(there), there.nbytes, array
        direct = SIMULATED or is_pinned(array)
        self._near = array if direct and array.dtype == there.dtype else self._gpu.host_empty(array.shape, there.dtype)
        self._there, self._pending = there, False       # pending: whether a copy may be under way
        self._near_address, self._event = self._near.ctypes.data, self._gpu.event()

    def _wait(self):
        if self._pending:
            self._gpu.wait(self._event)
            self._pending = False


class FromHost(_WithHost):
    """A transfer of an array of the host to a GPU."""

    def __init__(self, x, y):
        super().__init__(x, y)

    def start(self):
        """Copy behind what the GPU has been given so far."""
        if self._near is not self._array:
            self._wait()
            convert(self._near, self._array)
        if self._n_bytes:
            self._gpu.send(self._address, self._near_address, self._n_bytes, self._event)
            self._pending = True

    def finish(self):
        """Nothing: what the GPU is given from now on comes after the copy."""

    def settle(self):
        """Wait until the host may overwrite x."""
        if self._near is self._array:
            self._wait()


class ToHost(_WithHost):
    """A transfer of an array of a GPU to the host."""

    def __init__(self, x, y):
        super().__init__(y, x)

    def start(self):
        """Copy behind what the GPU has been given so far."""
        if self._n_bytes:
            self._gpu.receive(self._near_address, self._address, self._n_bytes, self._event)
            self._pending = True

    def finish(self):
        """Wait until y has the values. The GPU may be at later work by then."""
        self._wait()
        if self._near is not self._array:
            convert(self._array, self._near)

    def settle(self):
        """Nothing: what the GPU is given after start() comes after the copy."""


class Across:
    """A transfer between two GPUs, or on one.

    The copy is in the order of the source's work. It waits for what the target was given before, which may still use the place of y.
    """

    def __init__(self, x, y):
        assert x.dtype == y.dtype and x.shape == y.shape, (x.dtype, x.shape, y.dtype, y.shape)
        self._source, self._target, self._arrays = x.gpu, y.gpu, (x, y)
        self._copy = y.gpu, _address(y), _address(x), x.nbytes
        self._free, self._done = (y.gpu.event(), x.gpu.event()) if x.gpu is not y.gpu else (None, None)

    def start(self):
        """Copy behind what both GPUs have been given so far."""
        if self._done is not None:
            self._target.mark(self._free)
            self._source.follow(self._free)
        if self._copy[-1]:
            self._source.copy_across(*self._copy)
        if self._done is not None:
            self._source.mark(self._done)

    def finish(self):
        """Let what the target is given from now on wait for the copy."""
        if self._done is not None:
            self._target.follow(self._done)

    def settle(self):
        """Nothing: what the source is given after start() comes after the copy."""
