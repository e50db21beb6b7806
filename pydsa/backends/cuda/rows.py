"""Rows of GGUF blocks and of caches: weights as they lie in the file, cache rows of every storage, and the ops that only move rows."""
import math
from typing import NamedTuple

import numpy as np
from numba import cuda

from pydsa import quants
from pydsa.backends.cuda.array import empty, upload, zeros
from pydsa.backends.cuda.blocks import FLOATS, GROUPED, any_word, value_bf16, value_f16, value_f32
from pydsa.backends.cuda.block_sums import block_top, magnitude_bits
from pydsa.backends.cuda.device import bits_float, byte_at, device, float_bits, nearest, to_half
from pydsa.backends.cuda.launch import blocks_for, kernel

THREADS = 128
PADDING = 16        # bytes behind a tensor, which kernels that copy sixteen bytes at a time may read


class Weight(NamedTuple):
    """A tensor on the device: all bytes of its blocks and PADDING more, uint8; the GGUF type; its shape; the bytes of a row."""
    data: object
    type: str
    shape: tuple
    row_bytes: int


class CacheRows(NamedTuple):
    """A cache on the device: uint8 [n_ctx, row_bytes]; quants' name of the storage; the lengths of its two parts, of which one may be 0."""
    data: object
    storage: str
    first: int
    second: int


def weight(tensor):
    """A GGUF tensor as its ops take it here: matrices as blocks, vectors as float32."""
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
    """An empty cache of n_ctx rows of sum(widths) values, stored as quants.KV_TYPES says."""
    data = zeros((n_ctx, quants.cache_row_bytes(storage, widths)), np.uint8)
    return CacheRows(data, storage, widths[0], sum(widths[1:]))


def cache_bytes(rows):
    """The cache's storage as bytes [n_ctx, row_bytes]: the same on every backend."""
    return rows.data


def _make_get_rows(name, group):
    def get_rows(out, w, row_bytes, ids):
        """out[t] = row ids[t]; a thread unpacks 32 numbers."""
        t, g = cuda.blockIdx.y, cuda.grid(1)
        if g < out.shape[1] // 32:
            a, b, c, e, f, h, i, j, d, d1, m, m1 = group(w, ids[t] * np.int64(row_bytes), g)
            words = (a, b, c, e, f, h, i, j)
            for k in range(8):
                word = words[k]
                scale, low = (d, m) if k < 4 else (d1, m1)
                for byte in range(4):
                    value = np.int32(word >> (8 * byte) & 255)
                    out[t, 32 * g + 4 * k + byte] = scale * np.float32(value - ((value & 128) << 1)) - low
    return kernel("f4[:,:], u1[::1], i8, i4[:]", THREADS, f"get_rows_{name}")(get_rows)


def _make_get_float_rows(name, value_at):
    def get_rows(out, w, row_bytes, ids):
        t, i = cuda.blockIdx.y, cuda.grid(1)
        if i < out.shape[1]:
            out[t, i] = value_at(w, ids[t] * np.int64(row_bytes), i)
    return kernel("f4[:,:], u1[::1], i8, i4[:]", THREADS, f"get_rows_{name}")(get_rows)


GET_ROWS = {name: _make_get_rows(name.lower(), entry.group) for name, entry in GROUPED.items()}
GET_ROWS |= {name: _make_get_float_rows(name.lower(), value_at) for name, value_at in FLOATS.items()}


def get_rows(out, w, ids):
    """out[t] = w[ids[t]]"""
    n = out.shape[1] // 32 if w.type in GROUPED else out.shape[1]
    GET_ROWS[w.type]((blocks_for(n, THREADS), out.shape[0]), out, w.data, w.row_bytes, ids)


@device
def value_i8(data, row, i, first, second):
    """The i-th number of a row of int8 whose parts have lengths `first` and `second`."""
    whole = byte_at(data, row + i)
    scale = bits_float(any_word(data, row + first + second + (0 if i < first else 4)))
    return scale * np.float32(whole - ((whole & 128) << 1))


@device
def value_i16(data, row, i, first, second):
    """The same of 16 bits: all high bytes, then all low ones."""
    high, low = byte_at(data, row + i), byte_at(data, row + first + second + i)
    whole = 256 * (high - ((high & 128) << 1)) + low - ((low & 128) << 1)
    return bits_float(any_word(data, row + 2 * (first + second) + (0 if i < first else 4))) * np.float32(whole)


@device
def cached_f32(data, row, i, first, second):
    return value_f32(data, row, i)


@device
def cached_f16(data, row, i, first, second):
    return value_f16(data, row, i)


@device
def cached_bf16(data, row, i, first, second):
    return value_bf16(data, row, i)


# storage -> value(data, row, i, first, second): the i-th number of a cache row that begins at `row` in all bytes of the cache
CACHED = {"f32": cached_f32, "f16": cached_f16, "bf16": cached_bf16, "i8": value_i8, "i16": value_i16}


@device
def store_bits(data, at, bits, n):
    """n bytes of a word, the lowest first."""
    for i in range(n):
        data[at + i] = bits >> (8 * i) & 255


@device
def to_bf16(x):
    """float32 -> the upper half of its bits, rounded to nearest even; NaN stays NaN."""
    bits = float_bits(x)
    if bits & 0x7FFFFFFF > 0x7F800000:
        return bits >> 16 | 64
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


BITS = {"f32": (float_bits, 4), "f16": (to_half, 2), "bf16": (to_bf16, 2)}      # storage -> bits of a number, how many bytes they take


def _make_write(storage):
    to_bits, n_bytes = BITS[storage]

    def write(cache, x, positions):
        """cache[positions[t]] = x[t]; a thread writes one number, a block in y is one row."""
        t, i = cuda.blockIdx.y, cuda.grid(1)
        if i < x.shape[1]:
            store_bits(cache[positions[t]], n_bytes * i, to_bits(x[t, i]), n_bytes)
    return kernel("u1[:,:], f4[:,:], i8[:]", THREADS, f"write_{storage}")(write)


WRITE = {storage: _make_write(storage) for storage in BITS}


@device
def write_part(row, x, t, part, first, second, wide, tops, thread, n_threads):
    """A block writes one part of a row of whole numbers, and its scale (quants/whole_rows.py); tops: int32 for each warp."""
    start, end = (0, first) if part == 0 else (first, first + second)
    top = np.int32(0)
    for i in range(start + thread, end, n_threads):
        top = max(top, magnitude_bits(x[t, i]))
    top = bits_float(np.uint32(block_top(top, tops, thread, n_threads)))        # NaN stays
    scale = top / np.float32(quants.LARGEST if wide else 127)
    known = (top if wide else scale) > np.float32(1e-30) and scale < np.float32(math.inf)
    factor = np.float32(0)
    if known:
        factor = np.float32(quants.LARGEST) / top if wide else np.float32(1) / scale
    for i in range(start + thread, end, n_threads):
        if wide:
            whole = nearest(x[t, i], factor)
            row[i] = whole + 128 >> 8 & 255
            row[first + second + i] = whole & 255
        else:
            product = x[t, i] * factor if known else np.float32(0)
            whole = int(math.floor(abs(product) + np.float32(0.5)))       # halves away from zero
            row[i] = (whole if product > 0 else -whole) & 255
    if thread == 0:
        store_bits(row, (2 if wide else 1) * (first + second) + 4 * part, float_bits(scale), 4)


@kernel("u1[:,:], f4[:,:], i8[:], i4, i4, b1", 32)
def write_whole(cache, x, positions, first, second, wide):
    """Whole numbers of 8 bits, or of 16 if `wide`; a block is one part of one row."""
    t, tops = cuda.blockIdx.y, cuda.shared.array(32, np.int32)
    write_part(cache[positions[t]], x, t, cuda.blockIdx.x, first, second, wide, tops, cuda.threadIdx.x, 32)


def cache_write(cache, x, positions):
    """cache[positions[t]] = x[t], converted to the cache's type"""
    if cache.storage in WRITE:
        WRITE[cache.storage]((blocks_for(x.shape[1], THREADS), x.shape[0]), cache.data, x, positions)
    else:
        write_whole((2 if cache.second else 1, x.shape[0]), cache.data, x, positions, cache.first, cache.second, cache.storage == "i16")
