"""Arrays in the host's memory, for the backends cpu and reference.

They are plain numpy arrays.
"""
import time

import numpy as np

from pydsa.limits import allocating
from pydsa.numa import place_memory


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


def free_bytes():
    """None: arrays are in the machine's own memory."""
