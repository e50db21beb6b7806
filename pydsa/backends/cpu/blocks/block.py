"""Shared by the block families: BlockKernels, and the superblock layout."""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cpu.jit import BlockFunction, IntpFunction
from pydsa.quants import TYPES, BlockType


# A superblock: 256 values in int16, the format of an unpacked row of weights and of a rounded row of activations. Its parts, in bytes: the
# int16 values, each group of 32 with the even elements before the odd ones; a float32 scale for each 32; a float32 min for each 32 (MINS);
# a float32 min for each 16 (MINS_16). In a superblock of activations the mins are the sums of its values, times the scale. The product of
# two superblocks, w of weights and x of activations, is
#     sum_j w.scale[j] x.scale[j] (w.values x.values over the j-th 32) - sum_j w.min[j] x.min[j] - sum_i w.min16[i] x.min16[i]
SCALES, MINS, MINS_16, SUPERBLOCK = 512, 544, 576, 640


# Flags in the first place of the order of a superblock of activations: each 32 in their natural order, not the even elements first; and
# then all 256 in columns, element k of all 32 groups of 8 for k = 0 to 7 (codes.py). ONE_SCALE, beside any order: all 256 have the same
# scale
NATURAL_ORDER, IN_COLUMNS, ONE_SCALE = 32, 64, 128
# Flags in the second place, beside columns: these as bytes, all upper ones before the lower ones (byte_codes.py). Then each scale stands
# twice, and in the place of mins of 16 there are int32. Or two superblocks are joined, the second one 0 if there is none
BYTES_BY_SIGN, BYTES_BY_INDEX, BYTES_IN_PAIRS, SUMS = 32, 64, 128, MINS_16


def in_order(pieces, *flags):
    """Make the order of a superblock: pieces, and flags in the first places."""
    order = np.array(pieces, np.uint8)
    order[:len(flags)] |= np.array(flags, np.uint8)
    return order


NATURAL_WITH_ONE_SCALE = in_order(range(32), NATURAL_ORDER | ONE_SCALE)
COLUMNS, COLUMNS_BY_SIGN, COLUMNS_BY_INDEX, COLUMNS_IN_PAIRS = (in_order(range(32), NATURAL_ORDER | IN_COLUMNS, flag) for flag in (
    0, BYTES_BY_SIGN, BYTES_BY_INDEX, BYTES_IN_PAIRS))


class BlockKernels(NamedTuple):
    """The kernels of a GGUF type.

    dequantize(blocks, n, float32 out), and quantize the other way (or None). Quantized types also have unpack(blocks, n, superblock), at
    most 256 weights to a superblock; and dot(rows, n_rows, n_blocks, x_at, n_tokens, out_at, offset), the products of rows with tokens.
    x_at and out_at hold addresses: of rows of superblocks whose 16-byte pieces are permuted, piece i stored at position order[i], which may
    have flags; and, `offset` bytes before it, of each token's float32 [n_rows]. The int16 of an unpacked superblock have
    `bits` bits: unsigned if the type has mins, else signed. unpack_scaled, of types with integer scales, is unpack with these in the
    int16, whose magnitudes are at most 4,096, and one float32 scale, the first. unpack_tile(blocks, stride, n, tile) unpacks n values of
    sixteen rows to a tile, in a form of each type, and multiply_tiles multiplies two of them with eight tokens (int16/tiles.py).
    """
    type: BlockType
    dequantize: BlockFunction
    quantize: BlockFunction | None = None
    unpack: IntpFunction | None = None
    dot: IntpFunction | None = None
    order: np.ndarray | None = None
    bits: int = 0
    unpack_scaled: IntpFunction | None = None
    unpack_tile: IntpFunction | None = None
    multiply_tiles: IntpFunction | None = None

    @property
    def mins(self):
        """Count the mins of a superblock in use: 0, 8 (MINS) or 16 (MINS_16)."""
        return 256 // self.type.group if self.type.mins else 0


def entry(name, dequantize, quantize=None, unpack=None, dot=None, order=None, bits=0, unpack_scaled=None):
    """Make the BlockKernels of a type, given by name.

    The kernels are plain functions, or an IntpFunction for dequantize; order is a list of 32 integers.
    """
    type_, f32 = TYPES[name], np.dtype(np.float32)
    if not isinstance(dequantize, IntpFunction):
        dequantize = BlockFunction(dequantize, type_.dtype, f32)
    functions = {function: IntpFunction(function) for function in (unpack, unpack_scaled, dot) if function}
    unpack, unpack_scaled, dot = (function and functions[function] for function in (unpack, unpack_scaled, dot))
    return BlockKernels(type_, dequantize, quantize and BlockFunction(quantize, f32, type_.dtype), unpack, dot,
                        None if order is None else np.asarray(order, np.uint8), bits, unpack_scaled)


def inverse(*pieces):
    """Invert a permutation: the position of each piece.

    `pieces` is the order in which a dot reads the 16-byte pieces of a superblock.
    """
    return [pieces.index(i) for i in range(len(pieces))]


def with_one_scale(*pieces):
    """Do what inverse does, for activations with one scale for all 256."""
    return in_order(inverse(*pieces), ONE_SCALE)
