"""Arrays in the GPU's memory that are viewed as numpy's are: slices, shapes and strides are numpy's own, kernels get places and strides.

Behind each stands a numpy array at the device's address, which the host never reads: it only knows shape and strides. In the simulator
that memory is the host's.
"""
import functools

import numpy as np

from pydsa.backends.cuda.device import SIMULATED


if SIMULATED:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    from pydsa.backends.cuda.simulated import SimulatedGpu as Gpu
else:
    from pydsa.backends.cuda.driver import Gpu

gpu = Gpu()


class DeviceArray:
    """A view of memory on the device: shape, strides, dtype, size, len(), slices, reshape, view as of a numpy array."""

    def __init__(self, memory, places):
        self._memory, self._places = memory, places     # kept for as long as it is viewed; the numpy array that is never read
        self.shape, self.strides, self.dtype, self.size, self.nbytes = (
            places.shape, places.strides, places.dtype, places.size, places.nbytes)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, item):
        return DeviceArray(self._memory, self._places[item])

    def reshape(self, *shape):
        """Another shape of the same memory; never a copy."""
        places = self._places.reshape(*shape)
        assert places.size == 0 or np.shares_memory(places, self._places)
        return DeviceArray(self._memory, places)

    def view(self, dtype):
        """The same bytes as numbers of another type."""
        return DeviceArray(self._memory, self._places.view(dtype))

    @functools.cached_property
    def rows(self):
        """All axes but the last as one: they must lie as far apart as if there were only they."""
        n = self.shape[-1]
        assert all(a == b * n_b for a, b, n_b in zip(self.strides[:-2], self.strides[1:-1], self.shape[1:-1]) if n_b)
        places = np.lib.stride_tricks.as_strided(self._places, (self.size // n, n), self.strides[-2:])
        return DeviceArray(self._memory, places)

    @functools.cached_property
    def flat(self):
        """One axis, of a contiguous array."""
        return self.reshape(self.size)

    @functools.cached_property
    def span(self):
        """The addresses of its first byte, and of that behind its last one."""
        return np.lib.array_utils.byte_bounds(self._places) if hasattr(np.lib, "array_utils") else np.byte_bounds(self._places)

    @functools.cached_property
    def parameters(self):
        """What a compiled kernel gets of it: two objects that it does not have, then its size, item size, address, shape and strides."""
        return 0, 0, self.size, self.dtype.itemsize, self._places.ctypes.data, *self.shape, *self.strides

    @property
    def simulated(self):
        """What a kernel in the simulator gets."""
        return FakeCUDAArray(self._places)

    def get(self):
        """The values as a numpy array."""
        low, high = self.span
        span = np.empty(high - low, np.uint8)
        gpu.copy_out(span, low)
        return np.ndarray(self.shape, self.dtype, span, 0, self.strides)

    def set(self, values):
        """Copy values here; the array must be contiguous."""
        values, (low, high) = np.ascontiguousarray(values, self.dtype), self.span
        assert high - low == values.nbytes
        gpu.copy_in(low, values)

    def clear(self):
        """Set a contiguous array to zeros."""
        gpu.clear(self.span[0], self.nbytes)


class _Places:
    """Memory that numpy takes for its own."""

    def __init__(self, address, n_bytes):
        self.__array_interface__ = {"data": (address, False), "shape": (n_bytes,), "typestr": "|u1", "version": 3}


def empty(shape, dtype):
    """An array on the device, without values."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = gpu.allocate(max(1, n_bytes))
    places = np.asarray(_Places(memory.address, n_bytes))
    return DeviceArray(memory, places.view(dtype).reshape(shape))


def zeros(shape, dtype):
    """An array of zeros on the device."""
    array = empty(shape, dtype)
    if array.nbytes:
        array.clear()
    return array


def upload(values):
    """A copy of a numpy array on the device."""
    array = empty(values.shape, values.dtype)
    if array.nbytes:
        array.set(values)
    return array


class Scratch:
    """Memory that ops work in, by name. Ops run one after the other, so they may share it. Nothing is given back: recorded steps use it."""

    def __init__(self):
        self._memory, self._outgrown, self._views = {}, [], {}

    def __call__(self, name, shape, dtype):
        """An array [*shape], whose values are whatever they were; the same object for the same shape, as long as it need not grow."""
        key = name, np.dtype(dtype)
        view = self._views.get((key, shape))
        if view is None:
            count, memory = int(np.prod(shape, dtype=np.int64)), self._memory.get(key)
            if memory is None or memory.size < count:
                self._outgrown.append(memory)
                memory = self._memory[key] = empty(count, dtype)
                self._views = {known: v for known, v in self._views.items() if known[0] != key}
            view = self._views[key, shape] = memory[:count].reshape(shape)
        return view


scratch = Scratch()
