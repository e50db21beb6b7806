"""Weights and caches on the device, and the ops that move rows.

Weights are GGUF blocks as in the file. Cache rows are in any storage of quants.CACHE_TYPES.
"""
import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa import quants
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.blocks.block import any_u32
from pydsa.backends.cuda.blocks.floats import FLOATS, value_bf16, value_f16, value_f32
from pydsa.backends.cuda.intrinsics.block_sums import row_max
from pydsa.backends.cuda.intrinsics.device import bits_float, byte_at, device, float_bits, nearest, to_half
from pydsa.backends.cuda.runtime.array import empty, upload, zeros
from pydsa.backends.cuda.runtime.launch import blocks_for, kernel


THREADS = 128
PADDING = 16        # bytes after a tensor, which kernels that load 16 bytes at a time may read


class Weight(NamedTuple):
    """A GGUF tensor on the device."""
    data: object        # uint8, the bytes of all blocks and PADDING more
    type: str           # GGUF type
    shape: tuple
    row_bytes: int


class CacheRows(NamedTuple):
    """A cache on the device. A row has two parts, of which one may be empty."""
    data: object        # uint8 [n_ctx, row_bytes]
    storage: str        # a storage of quants
    first: int          # values of the first part
    second: int         # values of the second part


def weight(tensor):
    """Upload a GGUF tensor as the ops take it.

    Matrices stay GGUF blocks; vectors become float32.
    """
    n = tensor.data.nbytes
    padded = empty((n + PADDING,), np.uint8)
    padded[:n].reshape(tensor.data.shape).set(tensor.data)
    padded[n:].clear()
    w = Weight(padded, tensor.type, tensor.shape, tensor.data.shape[-1])
    if len(tensor.shape) > 1:
        return w
    if tensor.type == "F32":
        return padded[:n].view(np.float32)
    values = empty((1, *tensor.shape), np.float32)
    get_rows(values, w._replace(row_bytes=tensor.data.nbytes), upload(np.zeros(1, np.int32)))
    return values.flat


def cache_rows(n_ctx, widths, storage):
    """An empty cache of n_ctx rows of sum(widths) values.

    storage: one of quants.CACHE_TYPES.
    """
    data = zeros((n_ctx, quants.cache_row_bytes(storage, widths)), np.uint8)
    return CacheRows(data, storage, widths[0], sum(widths[1:]))


def cache_bytes(rows):
    """The cache's bytes [n_ctx, row_bytes], the same on every backend."""
    return rows.data


def _make_get_rows(name, group, prepare):
    def get_rows(out, w, row_bytes, ids):
        """out[t] = row ids[t], dequantized. 32 values per thread."""
        t, g = cuda.blockIdx.y, cuda.grid(1)
        prepare(cuda.threadIdx.x, THREADS)
        if g < out.shape[1] // 32:
            a, b, c, e, f, h, i, j, d, d1, m, m1 = group(w, ids[t] * np.int64(row_bytes), g)
            quads = (a, b, c, e, f, h, i, j)
            for k in range(8):
                quad = quads[k]
                scale, offset = (d, m) if k < 4 else (d1, m1)
                for byte in range(4):
                    value = np.int32(quad >> (8 * byte) & 255)
                    out[t, 32 * g + 4 * k + byte] = scale * np.float32(value - ((value & 128) << 1)) - offset
    return kernel("f4[:,:], u1[::1], i8, i4[:]", THREADS, f"get_rows_{name}")(get_rows)


def _make_get_float_rows(name, value_at):
    def get_rows(out, w, row_bytes, ids):
        """out[t] = row ids[t], converted to float32. One value per thread."""
        t, i = cuda.blockIdx.y, cuda.grid(1)
        if i < out.shape[1]:
            out[t, i] = value_at(w, ids[t] * np.int64(row_bytes), i)
    return kernel("f4[:,:], u1[::1], i8, i4[:]", THREADS, f"get_rows_{name}")(get_rows)


GET_ROWS = {name: _make_get_rows(name.lower(), entry.group, entry.prepare) for name, entry in GROUPED.items()}
GET_ROWS |= {name: _make_get_float_rows(name.lower(), value_at) for name, value_at in FLOATS.items()}


def get_rows(out, w, ids):
    """out[t] = w[ids[t]]."""
    n = out.shape[1] // 32 if w.type in GROUPED else out.shape[1]
    GET_ROWS[w.type]((blocks_for(n, THREADS), out.shape[0]), out, w.data, w.row_bytes, ids)


@device
def value_i8(data, row, i, first, second):
    """Value i of an int8 row, whose parts have `first` and `second` values.

    The int8 come first, then a float32 scale per part.
    """
    q = byte_at(data, row + i)
    scale = bits_float(any_u32(data, row + first + second + (0 if i < first else 4)))
    return scale * np.float32(q - ((q & 128) << 1))


@device
def value_i16(data, row, i, first, second):
    """Value i of an int16 row: all high bytes, all low bytes, then the scales."""
    high, low = byte_at(data, row + i), byte_at(data, row + first + second + i)
    q = 256 * (high - ((high & 128) << 1)) + low - ((low & 128) << 1)
    return bits_float(any_u32(data, row + 2 * (first + second) + (0 if i < first else 4))) * np.float32(q)


@device
def cached_f32(data, row, i, first, second):
    return value_f32(data, row, i)


@device
def cached_f16(data, row, i, first, second):
    return value_f16(data, row, i)


@device
def cached_bf16(data, row, i, first, second):
    return value_bf16(data, row, i)


# storage -> value(data, row, i, first, second): value i of the cache row that begins at byte `row` of the cache
CACHED = {"f32": cached_f32, "f16": cached_f16, "bf16": cached_bf16, "i8": value_i8, "i16": value_i16}


@device
def store_bits(data, at, bits, n):
    """Store the n lowest bytes of an integer, little-endian."""
    for i in range(n):
        data[at + i] = bits >> (8 * i) & 255


@device
def to_bf16(x):
    """Convert float32 to bfloat16 bits, rounded to nearest even. NaN stays NaN."""
    bits = float_bits(x)
    if bits & 0x7FFFFFFF > 0x7F800000:
        return bits >> 16 | 64
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


BITS = {"f32": (float_bits, 4), "f16": (to_half, 2), "bf16": (to_bf16, 2)}      # storage -> conversion to bits, bytes of a value


def _make_write(storage):
    to_bits, n_bytes = BITS[storage]

    def write(cache, x, positions):
        """cache[positions[t]] = x[t]. One value per thread, one row per block in y."""
        t, i = cuda.blockIdx.y, cuda.grid(1)
        if i < x.shape[1]:
            store_bits(cache[positions[t]], n_bytes * i, to_bits(x[t, i]), n_bytes)
    return kernel("u1[:,:], f4[:,:], i8[:]", THREADS, f"write_{storage}")(write)


WRITE = {storage: _make_write(storage) for storage in BITS}


@device
def write_part(row, x, t, part, first, second, wide, maxima, thread, n_threads):
    """Quantize one part of a row and store it with its scale, by one block.

    wide: int16 as int8 pairs (256 high + low), else int8. maxima: shared memory with one int32 per warp.
    """
    start, end = (0, first) if part == 0 else (first, first + second)
    abs_max = bits_float(np.uint32(row_max(x, t, start, end, maxima, thread, n_threads)))       # NaN stays NaN
    scale = abs_max / np.float32(quants.INT8X2_MAX if wide else 127)
    usable = (abs_max if wide else scale) > np.float32(1e-30) and scale < np.float32(math.inf)
    factor = np.float32(0)
    if usable:
        factor = np.float32(quants.INT8X2_MAX) / abs_max if wide else np.float32(1) / scale
    for i in range(start + thread, end, n_threads):
        if wide:
            q = nearest(x[t, i], factor)
            row[i] = q + 128 >> 8 & 255
            row[first + second + i] = q & 255
        else:
            product = x[t, i] * factor if usable else np.float32(0)
            q = int(math.floor(abs(product) + np.float32(0.5)))       # ties away from zero
            row[i] = (q if product > 0 else -q) & 255
    if thread == 0:
        store_bits(row, (2 if wide else 1) * (first + second) + 4 * part, float_bits(scale), 4)


@kernel("u1[:,:], f4[:,:], i8[:], i4, i4, b1", 32)
def write_quantized(cache, x, positions, first, second, wide):
    """cache[positions[t]] = x[t] as int8, or as int16 if `wide`.

    One part of one row per block.
    """
    t, maxima = cuda.blockIdx.y, cuda.shared.array(32, np.int32)
    write_part(cache[positions[t]], x, t, cuda.blockIdx.x, first, second, wide, maxima, cuda.threadIdx.x, 32)


def cache_write(cache, x, positions):
    """cache[positions[t]] = x[t], converted to the cache's storage."""
    if cache.storage in WRITE:
        WRITE[cache.storage]((blocks_for(x.shape[1], THREADS), x.shape[0]), cache.data, x, positions)
    else:
        write_quantized((2 if cache.second else 1, x.shape[0]), cache.data, x, positions, cache.first, cache.second, cache.storage == "i16")
