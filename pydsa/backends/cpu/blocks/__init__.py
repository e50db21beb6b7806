"""Kernels of GGUF blocks as stored in the file, a module for each family.

Their parts are dequantize, unpack, dot.
"""
from pydsa.backends.cpu.blocks import floats, kquants, legacy, tables


BLOCKS = floats.KERNELS | legacy.KERNELS | kquants.KERNELS | tables.KERNELS      # GGUF type -> BlockKernels
