"""Arrays in the host's memory, for the backends that work there: numpy's own."""
import time

import numpy as np


def empty(shape, dtype):
    """An array of the backend, without values; it begins at a cache line."""
    memory = np.empty(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize + 64, np.uint8)     # pages come as they are written
    start = -memory.ctypes.data % 64
    return memory[start:memory.size - 64 + start].view(dtype).reshape(shape)


def upload(values):
    """A numpy array as one of the backend: itself."""
    return values


def fetch(array):
    """The values of an array of the backend, as a numpy array: itself."""
    return array


def store(array, values):
    """Copy the values of a numpy array into an array of the backend."""
    array[...] = values


def timed(calls):
    """Do calls, pairs of an op and its arguments -> the seconds of each."""
    times = [time.perf_counter()]
    for op, args in calls:
        op(*args)
        times.append(time.perf_counter())
    return np.diff(times).tolist()


def recorded(calls):
    """None: the calls of a step are made one by one."""


def free_bytes():
    """None: the machine's own memory."""
