"""Arrays in the GPU's memory that are viewed as numpy's are: slices, shapes and strides are numpy's own, kernels get numba's arrays.

Behind each stands a numpy array at the device's address, which the host never reads: it only knows shape and strides. In the simulator
that memory is the host's.
"""
import functools
import threading

import numpy as np
from numba import cuda

from pydsa.backends.cuda.device import SIMULATED
from pydsa.errors import OutOfMemoryError


alone = threading.RLock()       # is held by what must not come in between while another thread records a step: it would be recorded too


class DeviceArray:
    """A view of memory on the device: shape, strides, dtype, size, len(), slices, reshape, view as of a numpy array."""

    def __init__(self, memory, places):
        self._memory, self._places = memory, places     # numba's device bytes; the numpy array that is never read
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

    def _bytes(self):
        """Where the bytes from its first to its last begin in the memory, and how many there are."""
        low, high = self.span
        return low - _address(self._memory), high - low

    @functools.cached_property
    def numba(self):
        """What kernels take."""
        if SIMULATED:
            from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
            return FakeCUDAArray(self._places)
        from numba.cuda.cudadrv.devicearray import DeviceNDArray
        start, n = self._bytes()
        data = self._memory.gpu_data.view(start, start + n)
        return DeviceNDArray(shape=self.shape, strides=self.strides, dtype=self.dtype, gpu_data=data)

    def get(self):
        """The values as a numpy array."""
        start, n = self._bytes()
        with alone:
            span = self._memory[start:start + n].copy_to_host(stream=stream())
            stream().synchronize()
        return np.ndarray(self.shape, self.dtype, span, 0, self.strides)

    def set(self, values):
        """Copy values here; the array must be contiguous."""
        values = np.ascontiguousarray(values, self.dtype)
        start, n = self._bytes()
        assert n == values.nbytes
        with alone:
            self._memory[start:start + n].copy_to_device(values.reshape(-1).view(np.uint8), stream=stream())
            stream().synchronize()      # the values may be gone when the copy begins

    def clear(self):
        """Set a contiguous array to zeros."""
        if SIMULATED:
            self._places[...] = 0
        else:
            with alone:
                self.numba.gpu_data.memset(0, self.nbytes, stream())


def _address(memory):
    return memory.ctypes.data if SIMULATED else memory.device_ctypes_pointer.value       # the simulator's arrays are numpy's


@functools.cache
def stream():
    """The stream of all that is launched or copied; not the default one, which cannot be recorded."""
    return cuda.stream()


class _Places:
    """Memory that numpy takes for its own."""

    def __init__(self, address, n_bytes):
        self.__array_interface__ = {"data": (address, False), "shape": (n_bytes,), "typestr": "|u1", "version": 3}


def empty(shape, dtype):
    """An array on the device, without values."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = _allocate(max(1, n_bytes))
    places = np.asarray(_Places(_address(memory), n_bytes))
    return DeviceArray(memory, places.view(dtype).reshape(shape))


def _allocate(n_bytes):
    try:
        return cuda.device_array(n_bytes, np.uint8)
    except Exception as error:      # the driver's errors have no class of their own in common
        if "OUT_OF_MEMORY" not in str(error):
            raise
        raise OutOfMemoryError(f"The GPU has no room for {n_bytes / 2**20:.0f} MiB more; ask for a smaller context (-c), a smaller chunk "
                               "(-ub) or a smaller cache type (--kv-type).") from error


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
