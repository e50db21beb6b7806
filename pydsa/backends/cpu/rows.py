"""Weights and cache rows as the kernels see them, and ops that copy rows."""
from typing import NamedTuple

import numpy as np

from pydsa import quants
from pydsa.backends.cpu import int16, integer_rows
from pydsa.backends.cpu.arrays import address
from pydsa.backends.cpu.blocks import BLOCKS
from pydsa.backends.cpu.jit import IntpFunction, call_block_function, inner, is_listing
from pydsa.backends.cpu.linear import GEMV_TOKENS
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import by_row, by_second_row, rows_of
from pydsa.backends.cpu.variants import kernels
from pydsa.machine.numa import place_memory


class Weight(NamedTuple):
    """A tensor as stored in the file, with its type's kernels.

    data: uint8 [n_rows, row_bytes] or [n, n_rows, row_bytes]. Fields without a comment are addresses: of the type's functions and order
    (blocks/block.py), and of functions that pack activations and multiply rows with them (linear.py). round_row, order and dot are 0 if the
    type is not quantized.
    """
    data: np.ndarray
    block: int          # elements in a block
    block_bytes: int
    mins: int           # BlockKernels.mins, BlockKernels.bits
    bits: int
    one_scale: int      # whether `unpack` is BlockKernels.unpack_scaled
    unpack_tile: int    # 0 where tiles are not used, as is multiply_tiles
    multiply_tiles: int
    packed_bytes: int       # bytes of 256 values of a token packed by `pack`
    dequantize: int
    unpack: int         # in the form that `matmul` calls
    pack: int
    matmul: int
    gemv_tokens: int    # the most tokens in a step for which `dot` multiplies; and of a step whose tasks have all tokens
    round_row: int = 0
    order: int = 0
    dot: int = 0


class CacheRows(NamedTuple):
    """A cache: uint8 [n_ctx, row_bytes], and addresses of its kernels.

    To read and write rows, attend to them, score them.
    """
    data: np.ndarray
    dequantize: int
    quantize: int
    n: int              # length argument of these two: a row's values, or for integers its parts (integer_rows.packed_parts)
    attend: int
    score_gemm: int
    score_gemv: int
    pack_latents: int            # for mha.py: packs tiles of latents; attend_head attends to them with keys and values of each head
    attend_head: int
    tile_bytes: int           # bytes of a packed tile
    alone: int = 0          # whether each token attends as if it were the only one of its step (attention.py)
    beside: int = 1         # calls of attention that share an interval, each for its own conversation


@inner
def unpack(rows, source, n, target):
    """Dequantize n elements of the blocks at `source` to floats at `target`."""
    call_block_function(rows.dequantize, source, n // rows.block, target)


@inner
def put(target, source):
    """Copy: target[:] = source.

    Numba's own assignment of slices checks their lengths; its error message alone takes a second to compile.
    """
    for i in range(target.size):
        target[i] = source[i]


@inner
def get_rows_rows(out, w, ids, task):
    for t in rows_of(out, task):
        unpack(w, address(w.data) + ids[t] * w.data.shape[1], out.shape[1], address(out[t]))


@op(Stage(by_row, get_rows_rows, light=True))
def get_rows(out, w, ids):
    return 0


@inner
def cache_write_rows(cache, x, positions, task):
    row_bytes = cache.data.shape[1]
    for t in rows_of(x, task):
        call_block_function(cache.quantize, address(x[t]), cache.n, address(cache.data) + positions[t] * row_bytes)


@op(Stage(by_second_row, cache_write_rows, light=True))
def cache_write(cache, x, positions):
    return 0


ALL_TOKENS = 2**31 - 1
SPARE_ROWS = 32         # after the last row: tiles are loaded whole, 64 bytes of each row
ROUND_ROW = IntpFunction(int16.linear.round_row)


def weight(tensor):
    """Wrap a GGUF tensor for the ops here.

    Matrices are used in place as blocks; vectors are converted to float32.
    """
    block = BLOCKS[tensor.type]
    gemm, unpack, gemv = kernels("linear", block), block.dequantize, ()
    one_scale = gemm.one_scale and block.unpack_scaled is not None
    if block.type.quantized:
        unpack = block.unpack_scaled if one_scale else block.unpack
        gemv = (ROUND_ROW.address, block.order.ctypes.data, block.dot.address)
    tiles = (block.unpack_tile.address, block.multiply_tiles.address) if gemm.tiles and block.unpack_tile else (0, 0)
    w = Weight(tensor.data, block.type.size, block.type.n_bytes, block.mins, block.bits, int(one_scale), *tiles, gemm.packed_bytes,
               block.dequantize.address, unpack.address, gemm.pack.address, gemm.matmul.address, GEMV_TOKENS, *gemv)
    if len(tensor.shape) > 1:
        return w
    values = np.empty((1, *tensor.shape), np.float32)
    if not is_listing():
        get_rows(values, w._replace(data=tensor.data[None]), np.zeros(1, np.int32))
    values.flags.writeable = False
    return values[0]


def cache_rows(n_ctx, widths, storage):
    """Make an empty cache of n_ctx rows of sum(widths) values of a cache type.

    The system allocates pages as they are written.
    """
    if quants.CACHE_TYPES[storage].scaled:
        n, (dequantize, quantize) = integer_rows.packed_parts(widths), integer_rows.FUNCTIONS[storage]
    else:
        block = BLOCKS[storage.upper()]
        n, dequantize, quantize = sum(widths), block.dequantize, block.quantize
    row_bytes = quants.cache_row_bytes(storage, widths)
    attend, mha, scores = kernels("attention", storage), kernels("mha", storage), kernels("indexer", storage)
    memory = place_memory(np.zeros((n_ctx + SPARE_ROWS) * row_bytes + 64, np.uint8))
    data = memory[:n_ctx * row_bytes].reshape(n_ctx, row_bytes)
    functions = attend, scores.gemm, scores.gemv, mha.pack_latents, mha.attend_head
    return CacheRows(data, dequantize.address, quantize.address, n, *(f.address for f in functions),
                     mha.tile_bytes(widths[0], sum(widths[1:])))


def form_costs(kv_type):
    """Return the devices.FormCosts of attention to caches of a type."""
    return kernels("mha", kv_type).costs


def reproducible(rows):
    """Return weights or cache rows in reproducible form.

    With them an op gives a token the same bits in all steps. rows: what weight() or cache_rows() made. Quantized weights are multiplied
    block by block, however many tokens there are. Products with others are sums in one order anyway, as are norms, rotations and the
    router.
    """
    if isinstance(rows, CacheRows):
        return rows._replace(score_gemv=rows.score_gemm, alone=1)
    return rows._replace(gemv_tokens=ALL_TOKENS, unpack_tile=0, multiply_tiles=0) if isinstance(rows, Weight) and rows.order else rows


def cache_bytes(rows):
    """Return a view of the cache as bytes [n_ctx, row_bytes].

    The same on every backend.
    """
    return rows.data
