"""Rows of GGUF blocks: weights and cache rows as the kernels see them, and the ops that only move rows."""
from typing import NamedTuple

import numpy as np
from numba import carray

from pydsa.backends.cpu.microkernels import address, floats_pointer
from pydsa.jit import call_block_function, inner, kernel


class Weight(NamedTuple):
    """A tensor where it lies in the file: uint8 [n_rows, row_bytes] or [n, n_rows, row_bytes]; then what is known of its type.

    All but the numbers that are explained are addresses: of the type's functions and order (quants/block.py), and of functions that lay
    out activations and multiply rows with them (linear.py). What concerns blocks as they lie is 0 if the type is not quantized.
    """
    data: np.ndarray
    block: int          # elements in a block
    block_bytes: int
    lows: int           # BlockType.lows, BlockType.bits
    bits: int
    prepared: int       # bytes that `prepare` takes for 256 numbers of a token
    dequantize: int
    unpack: int         # as `times` wants it
    prepare: int
    times: int
    round_row: int = 0
    order: int = 0
    dot: int = 0


class CacheRows(NamedTuple):
    """A cache: uint8 [n_ctx, row_bytes], and addresses of functions: to read and write rows, attend to them, score them."""
    data: np.ndarray
    dequantize: int
    quantize: int
    n: int              # what these two take for a row: its values, or for whole numbers its parts (whole_rows.packed_parts)
    attend: int
    score_many: int
    score_few: int
    lay: int            # for mha.py: to lay out its tiles of latents, and to attend to them with keys and values of a head's own
    attend_head: int
    laid: int           # bytes that a tile takes there


@inner
def unpack(rows, source, n, target):
    """n elements from the blocks at the address `source`, as floats at the address `target`."""
    call_block_function(rows.dequantize, source, n // rows.block, target)


@inner
def put(target, source):
    """target[:] = source, whose check of the lengths, or rather its message, takes numba a second to compile."""
    for i in range(target.size):
        target[i] = source[i]


@kernel
def get_rows(out, w, ids):
    row_bytes, n = w.data.shape[1], out.shape[1]
    for t in range(out.shape[0]):
        unpack(w, address(w.data) + ids[t] * row_bytes, n, address(out[t]))


@kernel
def cache_write(cache, x, positions):
    row_bytes = cache.data.shape[1]
    row = np.empty(x.shape[1], np.float32)       # x may be a slice of wider rows
    for t in range(x.shape[0]):
        put(row, x[t])
        call_block_function(cache.quantize, address(row), cache.n, address(cache.data) + positions[t] * row_bytes)


@inner
def contiguous(values):
    """A row whose stride the compiler does not know to be one element, as an array that it does."""
    return carray(floats_pointer(address(values)), (values.size,))
