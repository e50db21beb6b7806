"""Quantize rows on all cores: a kernel for each type, called for chunks of rows.

A kernel is `kernel(x, importance, blocks, *tables)`: float32 [n, k]; float32 [k], or [0] where all inputs matter alike; uint8 [n, bytes of
a row], which it fills. It releases the GIL, so that chunks of rows run in threads. `quantizer(...)` makes the function that
`pydsa.quantization.TYPES` holds of it.
"""
import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numba import types

from pydsa.backends.cpu import jit
from pydsa.errors import PydsaError
from pydsa.machine.cores import physical_cores
from pydsa.quants import TYPES

CHUNK = 1 << 16     # weights that a thread takes at a time, at least
LEAST_IMPORTANCE = 1e-6     # of a column, where their mean is 1
NO_IMPORTANCE = np.empty(0, np.float32)
_threads = None


def set_threads(n):
    """Quantize with n threads from now on; None: as many as there are physical cores."""
    global _threads
    _threads = n
    _pool.cache_clear()


@contextlib.contextmanager
def threads(n):
    """A context that quantizes with n threads; None: as many as without it."""
    before = _threads
    if n is not None:
        set_threads(n)
    try:
        yield
    finally:
        set_threads(before)


@functools.cache
def _pool():
    return ThreadPoolExecutor(_threads or physical_cores())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)       # a child has none of its parent's threads


def begin_chunks(n, weights_of_one, do):
    """Begin do(start, stop) for chunks of n rows, in threads -> futures."""
    step = max(1, min(CHUNK // weights_of_one, -(-n // (_threads or physical_cores()))))
    return [_pool().submit(do, start, min(start + step, n)) for start in range(0, n, step)]


def _normalised(importance):
    """Importance with a mean of 1; none where it is all zeros.

    Columns that no input met keep a little, so that a group of such columns is not given up.
    """
    mean = importance.mean(dtype=np.float64) if importance.size else 0
    if not mean:
        return NO_IMPORTANCE
    return np.maximum(importance / mean, LEAST_IMPORTANCE).astype(np.float32)


class Quantizer:
    """The function that quantizes rows to one type (see quantizer())."""

    def __init__(self, name, kernel, tables, needs_importance):
        self.name, self.type, self.kernel, self.needs_importance = name, TYPES[name], kernel, needs_importance
        self._tables = functools.cache(tables)

    def row_bytes(self, k):
        """Bytes of a row of k weights."""
        return k // self.type.size * self.type.n_bytes

    def __call__(self, x, importance=None):
        """GGUF blocks, uint8 [n, row bytes], of rows x, float32 [n, k].

        importance: float32 [k], the mean squares of the inputs that meet the columns (from 0 on), or None. Raises PydsaError for rows that
        do not fill blocks, for importance of another size, and for numbers that are not finite.
        """
        x = np.require(x, np.float32, "CW")
        n, k = x.shape
        if k % self.type.size:
            raise PydsaError(f"{self.name} has blocks of {self.type.size} weights, which rows of {k} do not fill.")
        importance, blocks = self.checked_importance(importance, k), np.empty((n, self.row_bytes(k)), np.uint8)
        if (_threads or physical_cores()) == 1:
            self.fill(x, importance, blocks)
            return blocks
        for job in begin_chunks(n, k, lambda start, stop: self.fill(x[start:stop], importance, blocks[start:stop])):
            job.result()
        return blocks

    def checked_importance(self, importance, k):
        """Importance of k columns, or None, as fill() takes it."""
        importance = NO_IMPORTANCE if importance is None else np.require(importance, np.float32, "CW")
        if importance.shape not in ((0,), (k,)):
            raise PydsaError(f"The importance has the shape {importance.shape}, expected ({k},), a number for each column.")
        if not np.isfinite(importance).all() or (importance < 0).any():
            raise PydsaError("The importance has numbers that are not finite, or below 0, expected mean squares.")
        return _normalised(importance)

    def fill(self, x, importance, blocks):
        """Quantize rows in this thread, into blocks that are there.

        x and blocks are C-contiguous and writable. Raises PydsaError for numbers that are not finite.
        """
        if not np.isfinite(x).all():
            raise PydsaError("The weights have numbers that are not finite (NaN or infinity).")
        self.kernel(x, importance, blocks, *self._tables())
        if self.name == "F16" and (blocks.view(np.uint16) & 0x7FFF == 0x7C00).any():
            raise PydsaError("The weights have numbers above 65504, which F16 does not hold; BF16 does.")

    def wanted(self):
        """What jit.compile_all() needs to compile the kernel."""
        signature = [types.float32[:, ::1], types.float32[::1], types.uint8[:, ::1], *map(numba.typeof, self._tables())]
        return jit.wanted_kernel(self.kernel, *signature)


def quantizer(name, kernel, tables=tuple, needs_importance=False):
    """A Quantizer for a type of pydsa.quants.TYPES.

    tables: a function that makes the kernel's other arguments, C-contiguous writable arrays or numbers, when they are first needed.
    needs_importance: whether the type is of no use without importance, as the i-quants below 3 bits.
    """
    return Quantizer(name, kernel, tables, needs_importance)
