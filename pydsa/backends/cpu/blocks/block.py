"""What the families of block types share: the table's entry, and the superblock that weights are unpacked to."""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cpu.jit import BlockFunction, IntpFunction
from pydsa.quants import TYPES, BlockType


# A chunk: 256 numbers in words of 16 bits, as a row of weights is unpacked and a row of activations is rounded. Its parts, in bytes:
# the words, each 32 with the even elements before the odd ones; a float32 scale for each 32; what is subtracted for each 32, and for
# each 16 (of a chunk of activations: the sums of its numbers). The product of two chunks, w of weights and x of activations, is
#     sum_j w.scale[j] x.scale[j] (w.words x.words over the j-th 32) - sum_j w.low[j] x.low[j] - sum_i w.low16[i] x.low16[i]
SCALES, MINS, MINS_16, SUPERBLOCK = 512, 544, 576, 640


class BlockKernels(NamedTuple):
    """The kernels of a GGUF type: dequantize(blocks, n, float32 out), quantize the other way (or None).

    Quantized types also have unpack(blocks, n, superblock), at most 256 weights to a superblock; and
    dot(rows, n_rows, n_blocks, x, float32 out), the products of rows with a row of superblocks whose 16-byte pieces lie in `order`:
    order[i] is where the i-th piece goes. The int16 of an unpacked superblock have `bits` bits: unsigned if the type has mins, else signed.
    """
    type: BlockType
    dequantize: BlockFunction
    quantize: BlockFunction | None = None
    unpack: IntpFunction | None = None
    dot: IntpFunction | None = None
    order: np.ndarray | None = None
    bits: int = 0

    @property
    def mins(self):
        """How many mins of a superblock are in use: 0, 8 (MINS) or 16 (MINS_16)."""
        return 256 // self.type.group if self.type.mins else 0


def entry(name, dequantize, quantize=None, unpack=None, dot=None, order=None, bits=0):
    """BlockKernels of a type by its name, from plain functions, or from a IntpFunction for dequantize; order as a list of 32 numbers."""
    kind, floats = TYPES[name], np.dtype(np.float32)
    if not isinstance(dequantize, IntpFunction):
        dequantize = BlockFunction(dequantize, kind.dtype, floats)
    return BlockKernels(kind, dequantize, quantize and BlockFunction(quantize, floats, kind.dtype), unpack and IntpFunction(unpack),
                        dot and IntpFunction(dot), order and np.array(order, np.uint8), bits)


def places(*pieces):
    """The order in which a dot reads the pieces of a chunk, as the place of each piece: the inverse permutation."""
    return [pieces.index(i) for i in range(len(pieces))]
