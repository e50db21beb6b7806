"""GGUF block types and cache types as data: layouts and sizes.

Nothing here is compiled. To add a GGUF type, add its layout here, and its kernels in a file of `backends/cpu/blocks` and in one of
`backends/cuda/blocks`.
"""
from typing import NamedTuple

import numpy as np


class BlockType(NamedTuple):
    """A GGUF type: `size` weights are stored as one element of `dtype`.

    group: the number of weights that share a scale, 0 for types that are not quantized. mins: whether each group also has a minimum, which
    is subtracted.
    """
    dtype: np.dtype
    size: int
    group: int = 0
    mins: bool = False

    @property
    def n_bytes(self):
        """Bytes of one block."""
        return self.dtype.itemsize

    @property
    def quantized(self):
        """Whether weights are integers with scales."""
        return self.group > 0


def _block(size, fields, group=32, mins=False):
    return BlockType(np.dtype(fields), size, group, mins)


# float16 and bfloat16 are stored as uint16, as numba cannot compute with them.
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
    "NVFP4": _block(64, [("scales", "u1", 4), ("qs", "u1", 32)], 16),
    "IQ1_S": _block(256, [("d", "<u2"), ("qs", "u1", 32), ("qh", "<u2", 8)]),
    "IQ1_M": _block(256, [("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)], 16),
    "IQ2_XXS": _block(256, [("d", "<u2"), ("qs", "<u4", 16)]),
    "IQ2_XS": _block(256, [("d", "<u2"), ("qs", "<u2", 32), ("scales", "u1", 8)], 16),
    "IQ2_S": _block(256, [("d", "<u2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)], 16),
    "IQ3_XXS": _block(256, [("d", "<u2"), ("qs", "u1", 64), ("signs", "<u4", 8)]),
    "IQ3_S": _block(256, [("d", "<u2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)]),
    "TQ1_0": _block(256, [("qs", "u1", 48), ("qh", "u1", 4), ("d", "<u2")]),
    "TQ2_0": _block(256, [("qs", "u1", 64), ("d", "<u2")]),
    "Q1_0": _block(128, [("d", "<u2"), ("qs", "u1", 16)]),
}
SUPPORTED = tuple(TYPES)

# The levels that the four-bit codes of these types select
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)       # twice the values of the format

# The positive levels that codes of these types select; codes of IQ1 are -1, 0 and 1
IQ2_LEVELS, IQ3_XXS_LEVELS, IQ3_S_LEVELS = (8, 25, 43), (4, 12, 20, 28, 36, 44, 52, 62), (1, 3, 5, 7, 9, 11, 13, 15)


def grid(name):
    """Return the grid of an i-quant: int8 [n, 8], for IQ3 [n, 4].

    An index in a block selects a row. The tables are those of gguf-py.
    """
    from gguf import quants     # a tenth of a second, which `info` need not wait
    kind = getattr(quants, name)
    kind.init_grid()
    return kind.grid.reshape(kind.grid_shape).astype(np.int8)


# The greatest magnitude of an int8x2 number, two signed bytes 256 high + low. It is 127 * 256, as a greater one could carry into a high
# byte of 128.
INT8X2_MAX = 32512


class CacheType(NamedTuple):
    """How a cache stores a value."""
    n_bytes: int                # of a value
    scaled: bool = False        # whether values are integers, with a float32 scale for each part of a row


# "i16" stores the high bytes of all values, then their low bytes. The scales of the row's parts follow the integers.
CACHE_TYPES = {"f32": CacheType(4), "f16": CacheType(2), "bf16": CacheType(2), "i16": CacheType(2, True), "i8": CacheType(1, True)}
CACHE_ALIASES = {"q8_0": "i8"}      # llama.cpp's name for eight bits; its q8_0 has a scale for each 32 values, i8 one for each part


def cache_row_bytes(cache_type, widths):
    """Bytes of a cache row whose parts have these numbers of values."""
    n_bytes, scaled = CACHE_TYPES[cache_type]
    return n_bytes * sum(widths) + (4 * len(widths) if scaled else 0)
