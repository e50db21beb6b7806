"""Arrays in the host's memory, for the backends cpu and reference.

They are plain numpy arrays.
"""
import threading
import time

import numpy as np

from pydsa.backends.devices import FORMS_BY_TILES
from pydsa.machine.limits import allocating
from pydsa.machine.numa import place_memory


def empty(shape, dtype):
    """A new array without values, aligned to a cache line of 64 bytes.

    The system provides its pages as they are written. Raises OutOfMemoryError where it refuses them at once.
    """
    with allocating("intermediate values"):
        memory = place_memory(np.empty(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize + 64, np.uint8))
    start = -memory.ctypes.data % 64
    return memory[start:memory.size - 64 + start].view(dtype).reshape(shape)


def upload(values):
    """A numpy array as an array of the backend: itself."""
    return values


def fetch(array):
    """An array of the backend as a numpy array: itself."""
    return array


def store(array, values):
    """Copy the values of a numpy array into an array of the backend."""
    array[...] = values


def cache_values(rows, dtype=np.float64):
    """The values of cache rows of any storage, floats [n, width].

    The rows are as reference.cache_rows() makes them. A bf16 row is uint16, the upper half of a float32.
    """
    if rows.dtype.names:
        def integers(i):
            high = rows[f"high{i}"][:, 0].astype(dtype)
            return 256 * high + rows[f"low{i}"][:, 0] if f"low{i}" in rows.dtype.names else high
        scales = rows["d"][:, 0].astype(dtype)
        return np.concatenate([integers(i) * scales[:, i:i + 1] for i in range(scales.shape[1])], axis=1)
    if rows.dtype == np.uint16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(dtype)


class Slot:
    """Memory that holds one weight at a time, in the backend's form.

    n_bytes: of the largest. make(tensor) -> the array of a weight. fill() begins to copy one, and returns an object whose ready() waits for
    it; what runs from then on uses it until release(). A step that breaks off releases too; a fill that nobody waited for is forgotten.
    """

    def __init__(self, n_bytes, make):
        self._memory, self._make, self._filling, self._in_use = empty((n_bytes,), np.uint8), make, None, False

    def weight(self, tensor):
        """The array that holds a tensor while the slot does, float32."""
        return self._memory[:4 * int(np.prod(tensor.shape, dtype=np.int64))].view(np.float32).reshape(tensor.shape)

    def fill(self, tensor):
        """Begin to copy a tensor to the slot -> an object with ready()."""
        if self._in_use:
            raise RuntimeError(f"{tensor.name} is copied to a slot whose weight is in use")
        self._filling = Filling(self, tensor, self._filling)
        return self._filling

    def release(self):
        """Let the next fill() overwrite the weight."""
        self._in_use = False


class Filling:
    """A copy of a tensor to a Slot, by a thread of its own."""

    def __init__(self, slot, tensor, before):
        self._slot, self._tensor, self._before, self._error = slot, tensor, before, None
        self._thread = threading.Thread(target=self._run, name="pydsa-fill", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            if self._before is not None:
                self._before._thread.join()
                self._before = None
            self._slot.weight(self._tensor)[...] = self._slot._make(self._tensor)
        except Exception as error:
            self._error = error

    def ready(self):
        """Wait for the weight. Raises what went wrong meanwhile."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._slot._in_use = True


def timed(calls):
    """Run calls, pairs (op, args) -> the seconds of each."""
    times = [time.perf_counter()]
    for op, args in calls:
        op(*args)
        times.append(time.perf_counter())
    return np.diff(times).tolist()


class Calls:
    """The calls of a step, made one by one."""

    def __init__(self, calls):
        self._calls = calls     # [(node, op, args)]

    def run(self, before=None, after=None):
        """Make all calls; before, after: {i: function}, called at the i-th."""
        before, after = before or {}, after or {}
        for i, (_, op, args) in enumerate(self._calls):
            if i in before:
                before[i]()
            op(*args)
            if i in after:
                after[i]()


def recorded(calls, levels, again):
    """The Calls of a step, whether it repeats or not."""
    return Calls(calls)


def measure_bus(n_bytes=1 << 26):
    """None: there is no bus to the machine's own memory."""


def form_costs(kv_type):
    """The devices.FormCosts of attention to caches of a type."""
    return FORMS_BY_TILES


def free_bytes():
    """None: arrays are in the machine's own memory."""
