"""GGUF block types and cache types as data: layouts and sizes. Nothing here is compiled.

To add a GGUF type: its layout here, and an entry with its kernels in a file of `backends/cpu/blocks` and of `backends/cuda/blocks`.
"""
from typing import NamedTuple

import numpy as np


class BlockType(NamedTuple):
    """How the file stores `size` weights: as one element of `dtype`.

    group: how many weights share a scale. mins: whether something is subtracted from each group, too. Both are of quantized types.
    """
    dtype: np.dtype
    size: int
    group: int = 0
    mins: bool = False

    @property
    def n_bytes(self):
        """Bytes of a block."""
        return self.dtype.itemsize

    @property
    def quantized(self):
        """Whether weights are integers with scales."""
        return self.group > 0


def _block(size, fields, group=32, mins=False):
    return BlockType(np.dtype(fields), size, group, mins)


# float16 and bfloat16 are fields of uint16: Numba cannot compute with them.
TYPES = {
    "F32": BlockType(np.dtype("<f4"), 1),
    "F16": BlockType(np.dtype("<u2"), 1),
    "BF16": BlockType(np.dtype("<u2"), 1),
    "Q4_0": _block(32, [("d", "<u2"), ("qs", "u1", 16)]),
    "Q4_1": _block(32, [("d", "<u2"), ("m", "<u2"), ("qs", "u1", 16)], mins=True),
    "Q5_0": _block(32, [("d", "<u2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_1": _block(32, [("d", "<u2"), ("m", "<u2"), ("qh", "u1", 4), ("qs", "u1", 16)], mins=True),
    "Q8_0": _block(32, [("d", "<u2"), ("qs", "i1", 32)]),
    "Q2_K": _block(256, [("scales", "u1", 16), ("qs", "u1", 64), ("d", "<u2"), ("dmin", "<u2")], 16, mins=True),
    "Q3_K": _block(256, [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<u2")], 16),
    "Q4_K": _block(256, [("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qs", "u1", 128)], mins=True),
    "Q5_K": _block(256, [("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)], mins=True),
    "Q6_K": _block(256, [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<u2")], 16),
    "IQ4_NL": _block(32, [("d", "<u2"), ("qs", "u1", 16)]),
    "IQ4_XS": _block(256, [("d", "<u2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)]),
    "MXFP4": _block(32, [("e", "u1"), ("qs", "u1", 16)]),
}
SUPPORTED = tuple(TYPES)

# What four bits stand for in the types that look them up
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)       # twice the numbers of the format

# The greatest magnitude of an int16 as two signed bytes, 256 high + low: 127 * 256, as one more could carry into a high byte of 128.
INT8X2_MAX = 32512


class CacheType(NamedTuple):
    """How a cache stores a value: bytes, and whether values are integers, with a float32 scale for each part of a row."""
    n_bytes: int
    scaled: bool = False


# "i16": the high bytes of all values, then the low ones. Behind integers stand the scales of the row's parts.
CACHE_TYPES = {"f32": CacheType(4), "f16": CacheType(2), "bf16": CacheType(2), "i16": CacheType(2, True), "i8": CacheType(1, True)}
CACHE_ALIASES = {"q8_0": "i8"}      # llama.cpp's word for eight bits; its rows have a scale for each 32 values, these one a part


def cache_row_bytes(cache_type, widths):
    """Bytes of a cache row with parts of so many values."""
    n_bytes, scaled = CACHE_TYPES[cache_type]
    return n_bytes * sum(widths) + (4 * len(widths) if scaled else 0)
