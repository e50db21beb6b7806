"""Rows of GGUF blocks: weights and cache rows as the kernels see them, and the ops that only move rows."""
from typing import NamedTuple

import numpy as np

from pydsa import quants
from pydsa.backends.cpu import int16, integer_rows
from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.blocks import BLOCKS
from pydsa.backends.cpu.jit import IntpFunction, call_block_function, inner, kernel
from pydsa.backends.cpu.variants import kernels


class Weight(NamedTuple):
    """A tensor where it lies in the file: uint8 [n_rows, row_bytes] or [n, n_rows, row_bytes]; then what is known of its type.

    All but the numbers that are explained are addresses: of the type's functions and order (quants/block.py), and of functions that lay
    out activations and multiply rows with them (linear.py). What concerns blocks as they lie is 0 if the type is not quantized.
    """
    data: np.ndarray
    block: int          # elements in a block
    block_bytes: int
    mins: int           # BlockType.lows, BlockType.bits
    bits: int
    packed_bytes: int       # bytes that `pack` takes for 256 numbers of a token
    dequantize: int
    unpack: int         # as `matmul` wants it
    pack: int
    matmul: int
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
    score_gemm: int
    score_gemv: int
    pack_latents: int            # for mha.py: to lay out its tiles of latents, and to attend to them with keys and values of a head's own
    attend_head: int
    tile_bytes: int           # bytes that a tile takes there


@inner
def unpack(rows, source, n, target):
    """n elements from the blocks at the address `source`, as floats at the address `target`."""
    call_block_function(rows.dequantize, source, n // rows.block, target)


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
        row[:] = x[t]
        call_block_function(cache.quantize, address(row), cache.n, address(cache.data) + positions[t] * row_bytes)


SPARE_ROWS = 32         # behind the last one: tiles are loaded whole, 64 bytes of each row
ROUND_ROW = IntpFunction(int16.linear.round_row)


def weight(tensor):
    """A GGUF tensor as its ops take it here: matrices in place as blocks, vectors as float32."""
    block = BLOCKS[tensor.type]
    gemm, unpack, gemv = kernels("linear", block), block.dequantize, ()
    if block.type.quantized:
        unpack, gemv = block.unpack, (ROUND_ROW.address, block.order.ctypes.data, block.dot.address)
    w = Weight(tensor.data, block.type.size, block.type.n_bytes, block.mins, block.bits, gemm.packed_bytes, block.dequantize.address,
               unpack.address, gemm.pack.address, gemm.matmul.address, *gemv)
    if len(tensor.shape) > 1:
        return w
    values = np.empty((1, *tensor.shape), np.float32)
    get_rows(values, w._replace(data=tensor.data[None]), np.zeros(1, np.int32))
    values.flags.writeable = False
    return values[0]


def cache_rows(n_ctx, widths, storage):
    """An empty cache of n_ctx rows of sum(widths) values of a cache type; the system gives pages as they are written."""
    if quants.CACHE_TYPES[storage].scaled:
        n, (dequantize, quantize) = integer_rows.packed_parts(widths), integer_rows.FUNCTIONS[storage]
    else:
        block = BLOCKS[storage.upper()]
        n, dequantize, quantize = sum(widths), block.dequantize, block.quantize
    row_bytes = quants.cache_row_bytes(storage, widths)
    attend, mha, scores = kernels("attention", storage), kernels("mha", storage), kernels("indexer", storage)
    data = np.zeros((n_ctx + SPARE_ROWS) * row_bytes + 64, np.uint8)[:n_ctx * row_bytes].reshape(n_ctx, row_bytes)
    functions = attend, scores.gemm, scores.gemv, mha.pack_latents, mha.attend_head
    return CacheRows(data, dequantize.address, quantize.address, n, *(f.address for f in functions),
                     mha.tile_bytes(widths[0], sum(widths[1:])))


def cache_bytes(rows):
    """The cache's storage as bytes [n_ctx, row_bytes], a view: the same on every backend."""
    return rows.data
