"""Copies of arrays from one backend to another, in a step.

A transfer is made once for a bound step, and used each time that the step runs:

    start()     the copy is enqueued behind what the source has been given so far; nothing waits for it
    finish()    what the target is given from now on sees the values: the host waits, a GPU's later work does
    settle()    after it the source may overwrite x: a host waits until a GPU has read it; at once where that is done

y belongs to the transfer from start() on, and x until settle(). A GPU that is the source needs no settle(): its later work comes after the
copy. Nothing is allocated while a step runs.
"""
import numpy as np


def transfer(source_backend, x, target_backend, y):
    """The transfer of the contiguous array x of a backend to y of another.

    Both have the same shape. Their dtypes are the same, or float32 and float64, of which values are converted. Where a GPU takes part, the
    host's array should be one of host_empty(), as copies from other memory take one more on the host. Returns an object with start(),
    finish() and settle(). Raises OutOfMemoryError if a buffer for the conversion is refused.
    """
    here, there = isinstance(x, np.ndarray), isinstance(y, np.ndarray)
    if here and there:
        return HostTransfer(x, y)
    return (target_backend if here else source_backend).transfer(x, y)


def convert(y, x):
    """Copy values of one array of the host to another, of any float type."""
    with np.errstate(invalid="ignore", over="ignore"):      # parts that nothing wrote yet have any bits
        np.copyto(y, x, casting="same_kind")


class HostTransfer:
    """A transfer between two arrays of the host."""

    def __init__(self, x, y):
        assert x.shape == y.shape, (x.shape, y.shape)
        self._x, self._y = x, y

    def start(self):
        """Nothing: both are the host's."""

    def finish(self):
        """Copy x to y."""
        convert(self._y, self._x)

    def settle(self):
        """Nothing: finish() has copied."""
