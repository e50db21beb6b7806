"""Kernels of GGUF blocks as stored in the file, a module for each family.

Their parts are dequantize, unpack, dot.
"""
from pydsa.backends.cpu.blocks import floats, grids, kquants, legacy, tables, ternary


# GGUF type -> BlockKernels
BLOCKS = floats.KERNELS | legacy.KERNELS | kquants.KERNELS | tables.KERNELS | grids.KERNELS | ternary.KERNELS
