"""Arrays in the GPU's memory, with slices, shapes and strides as in numpy.

Each holds a numpy array at the device's address, which the host never reads. It only carries shape and strides. Kernels get the address and
the strides. In the simulator that memory is the host's.
"""
import functools

import numpy as np

from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.runtime.current import current, kept_per_gpu


if SIMULATED:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray


class DeviceArray:
    """A view of memory on a GPU, its `gpu`.

    It has shape, strides, dtype, size, len(), slices, reshape and view as a numpy array has them.
    """

    def __init__(self, memory, places):
        self._memory, self._places = memory, places     # the allocation, kept alive; the numpy array that the host never reads
        self.gpu = memory.gpu
        self.shape, self.strides, self.dtype, self.size, self.nbytes = (
            places.shape, places.strides, places.dtype, places.size, places.nbytes)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, item):
        return DeviceArray(self._memory, self._places[item])

    def reshape(self, *shape):
        """A view of the same memory in another shape. Never copies."""
        places = self._places.reshape(*shape)
        assert places.size == 0 or np.shares_memory(places, self._places)
        return DeviceArray(self._memory, places)

    def followed_by(self, other):
        """This array and another one, which begins where it ends, as one."""
        assert other.span[0] == self.span[1] and other.shape[1:] == self.shape[1:] and other.strides == self.strides
        places = np.lib.stride_tricks.as_strided(self._places, (len(self) + len(other), *self.shape[1:]))
        return DeviceArray(self._memory, places)

    def view(self, dtype):
        """The same bytes as values of another dtype."""
        return DeviceArray(self._memory, self._places.view(dtype))

    @functools.cached_property
    def rows(self):
        """A 2-D view: all axes but the last merged into one.

        The strides of the merged axes must allow that.
        """
        n = self.shape[-1]
        assert all(a == b * n_b for a, b, n_b in zip(self.strides[:-2], self.strides[1:-1], self.shape[1:-1]) if n_b)
        places = np.lib.stride_tricks.as_strided(self._places, (self.size // n, n), self.strides[-2:])
        return DeviceArray(self._memory, places)

    @functools.cached_property
    def flat(self):
        """A 1-D view of a contiguous array."""
        return self.reshape(self.size)

    @functools.cached_property
    def span(self):
        """The addresses of the first byte and of one past the last byte."""
        return np.lib.array_utils.byte_bounds(self._places) if hasattr(np.lib, "array_utils") else np.byte_bounds(self._places)

    @functools.cached_property
    def parameters(self):
        """The array as a compiled kernel's parameters.

        Numba's array struct: meminfo and parent, both null; then size, item size, address, shape and strides.
        """
        return 0, 0, self.size, self.dtype.itemsize, self._places.ctypes.data, *self.shape, *self.strides

    @property
    def simulated(self):
        """The array as a kernel in the simulator gets it."""
        return FakeCUDAArray(self._places)

    def get(self):
        """Copy the values to the host, as a numpy array."""
        low, high = self.span
        span = np.empty(high - low, np.uint8)
        self.gpu.copy_out(span, low)
        return np.ndarray(self.shape, self.dtype, span, 0, self.strides)

    def set(self, values):
        """Copy values from the host. The array must be contiguous."""
        values, (low, high) = np.ascontiguousarray(values, self.dtype), self.span
        assert high - low == values.nbytes
        self.gpu.copy_in(low, values)
        known = self._memory.known
        for span in [span for span in list(known) if span[0] < high and low < span[1]]:
            known.pop(span, None)
        if self.dtype == np.int64 and values.size:
            known[low, high] = int(values.max())

    @property
    def greatest(self):
        """The greatest number of int64 that the host has set, or more.

        None where it has not. It is not known what kernels write there. A view has that of the array which was set.
        """
        low, high = self.span
        return next((n for span, n in list(self._memory.known.items()) if span[0] <= low and high <= span[1]), None)

    def clear(self):
        """Set a contiguous array to zero."""
        self.gpu.clear(self.span[0], self.nbytes)


class _Places:
    """Device memory with numpy's array interface, as uint8."""

    def __init__(self, address, n_bytes):
        self.__array_interface__ = {"data": (address, False), "shape": (n_bytes,), "typestr": "|u1", "version": 3}


def empty(shape, dtype):
    """An uninitialized array on the thread's current GPU."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = current().allocate(max(1, n_bytes))
    places = np.asarray(_Places(memory.address, n_bytes))
    return DeviceArray(memory, places.view(dtype).reshape(shape))


def zeros(shape, dtype):
    """An array of zeros on the device."""
    array = empty(shape, dtype)
    if array.nbytes:
        array.clear()
    return array


def upload(values):
    """Copy a numpy array to the device."""
    array = empty(values.shape, values.dtype)
    if array.nbytes:
        array.set(values)
    return array


class Scratch:
    """Named scratch buffers of one GPU, that ops share.

    Ops run one after the other, so they can share a buffer. Nothing is freed: recorded steps still use it.
    """

    def __init__(self):
        self._memory, self._outgrown, self._views = {}, [], {}

    def __call__(self, name, shape, dtype):
        """An uninitialized array [*shape] of a named buffer.

        The same shape gives the same object, until the buffer has to grow.
        """
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


@kept_per_gpu()
def _scratch():
    return Scratch()


def scratch(name, shape, dtype):
    """An uninitialized array of a named buffer of the current GPU: see Scratch."""
    return _scratch()(name, shape, dtype)
