"""Unpacking of GGUF blocks on the GPU, in groups of 32 weights.

Each quantized type has a device function group(data, row, g). It returns eight uint32 of four int8 each, then two scales and two offsets,
one for each half of the group: weight = scale * int8 - offset. data: uint8, all rows of a tensor. row: the byte at which a row begins. g:
the group's index in the row. A type's group() reads a grid that its prepare(thread, n_threads) puts into a block's shared memory first.
"""
from pydsa.backends.cuda.blocks import grids, kquants, legacy, tables, ternary

# GGUF type -> Grouped
GROUPED = legacy.GROUPED | kquants.GROUPED | tables.GROUPED | grids.GROUPED | ternary.GROUPED
