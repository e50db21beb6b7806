"""Kernels of GGUF blocks as the file stores them, a file for each family of types: dequantize, unpack, dot."""
from pydsa.backends.cpu.blocks import floats, kquants, legacy, tables


BLOCKS = floats.KERNELS | legacy.KERNELS | kquants.KERNELS | tables.KERNELS      # GGUF type -> BlockKernels
