"""A tensor from one type to another: in pieces, on all cores, with the error of each.

The pieces are small enough for a core's cache: weights, blocks and the values of these are there one after the other.
"""
import ctypes
import functools
from typing import NamedTuple

import numpy as np

from pydsa.backends.cpu import jit
from pydsa.backends.cpu.blocks import BLOCKS
from pydsa.errors import PydsaError
from pydsa.gguf.file import quote
from pydsa.quantization import rows
from pydsa.quantization.errors import add_errors, signature
from pydsa.quantization.table import TYPES as QUANTIZERS

PIECE = 1 << 25     # weights of a tensor that are quantized before they are written


class Errors(NamedTuple):
    """Normalised squared errors: of the weights, and weighted by importance."""
    plain: float | None
    weighted: float | None


def quantizer(kind):
    """The Quantizer of a type; PydsaError if there is none."""
    if kind not in QUANTIZERS:
        raise PydsaError(f"There is no quantizer to {kind}, expected one of {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[kind]


def compile_for(pairs, progress=None):
    """Compile, or load, what pairs (from type, to type) need."""
    kinds = {kind for pair in pairs for kind in pair}
    wanted = [jit.wanted_function(BLOCKS[kind].dequantize) for kind in sorted(kinds)]
    wanted += [quantizer(kind).wanted() for kind in sorted({target for _, target in pairs})]
    jit.compile_all([*wanted, jit.wanted_kernel(add_errors, *signature())], progress)


@functools.cache
def _dequantize(kind):
    """A function (blocks, their number, floats), which releases the GIL.

    Blocks and floats are addresses.
    """
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_void_p)(BLOCKS[kind].dequantize.address)


class Requantized:
    """The blocks of a tensor in another type, and their error.

    tensor: a gguf.file.Tensor of a type in pydsa.quants.TYPES. importance: float32 [n_mat, k] or None.
    """

    def __init__(self, tensor, kind, importance=None):
        self.tensor, self.kind, self.quantizer = tensor, kind, quantizer(kind)
        self._source = BLOCKS[tensor.type].type
        self._k = tensor.shape[-1]
        self._rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        self._importance = importance
        self._sums = np.zeros(4)

    def pieces(self):
        """Yield the blocks, uint8 [rows, bytes of a row], in order.

        While the caller writes some, the next are made. Raises PydsaError for weights that are not finite.
        """
        waiting = None
        try:
            for begun in self._begin():
                if waiting is not None:
                    yield self._finish(*waiting)
                waiting = begun
            yield self._finish(*waiting)
        except PydsaError as error:
            raise PydsaError(f"The tensor {quote(self.tensor.name)} cannot be stored as {self.kind}: {error}") from None

    def _begin(self):
        """Yield pieces that are begun, the arguments of _finish()."""
        n_mat = 1 if self._importance is None else len(self._importance)
        n_rows, step = len(self._rows) // n_mat, max(1, PIECE // self._k)
        for i in range(n_mat):
            given = None if self._importance is None else self._importance[i]
            importance = self.quantizer.checked_importance(given, self._k)
            share = 1 if given is None else given.mean(dtype=np.float64)        # checked importance has a mean of 1
            for start in range(i * n_rows, (i + 1) * n_rows, step):
                some = self._rows[start:min(start + step, (i + 1) * n_rows)]
                blocks = np.empty((len(some), self.quantizer.row_bytes(self._k)), np.uint8)
                do = functools.partial(self._chunk, some, importance, blocks)
                yield blocks, rows.begin_chunks(len(some), self._k, do), share

    def _chunk(self, source, importance, blocks, start, stop):
        """Quantize rows from start to stop; returns the sums of their errors."""
        x, y = (np.empty((stop - start, self._k), np.float32) for _ in range(2))
        source, target, sums = source[start:stop], blocks[start:stop], np.zeros(4)
        _dequantize(self.tensor.type)(source.ctypes.data, x.size // self._source.size, x.ctypes.data)
        self.quantizer.fill(x, importance, target)
        _dequantize(self.kind)(target.ctypes.data, x.size // self.quantizer.type.size, y.ctypes.data)
        add_errors(x, y, importance, sums)
        return sums

    def _finish(self, blocks, jobs, share):
        """The blocks of a piece, when they are made."""
        for job in jobs:        # in an order that threads do not change
            self._sums += job.result() * (1, 1, share, share)
        return blocks

    @property
    def errors(self):
        """The Errors of all pieces so far."""
        plain, norm, weighted, weighted_norm = self._sums
        share = weighted / weighted_norm if weighted_norm else 0.0
        return Errors(float(plain / norm) if norm else 0.0, None if self._importance is None else float(share))
