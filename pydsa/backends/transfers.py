"""Copies of values from the memory of one backend to that of another."""
import numpy as np


def transfer(source, x, target, y):
    """A Copy of array x of one backend to array y of another."""
    return Copy(source, x, target, y)


class Copy:
    """A copy between two arrays of one shape, made again and again.

    source, target: the backends of the two.
    """

    def __init__(self, source, x, target, y):
        self.source, self.target, self._x, self._y = source, target, x, y

    def start(self):
        """Begin to copy what the source has made by now."""

    def finish(self):
        """Let the target see the values in what it does from now on."""
        with np.errstate(invalid="ignore", over="ignore"):      # parts that nothing wrote yet have any bits
            self._y[...] = self._x

    def settle(self):
        """Let the source overwrite its array in what it does from now on."""
