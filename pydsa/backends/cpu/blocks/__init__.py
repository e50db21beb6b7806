"""Kernels of GGUF blocks as stored in the file, a module for each family.

Their parts are dequantize, unpack, dot.
"""
from pydsa.backends.cpu.blocks import floats, grids, kquants, legacy, tables, ternary, tiles


# GGUF type -> BlockKernels
BLOCKS = floats.KERNELS | legacy.KERNELS | kquants.KERNELS | tables.KERNELS | grids.KERNELS | ternary.KERNELS
BLOCKS |= {name: BLOCKS[name]._replace(unpack_tile=unpack, multiply_tiles=multiply) for name, (unpack, multiply) in tiles.KERNELS.items()}
