"""Unpacking of GGUF blocks on the GPU, in groups of 32 weights.

Each quantized type has a device function group(data, row, g). It returns eight uint32 of four int8 each, then two scales and two offsets,
one for each half of the group: weight = scale * int8 - offset. data: uint8, all rows of a tensor. row: the byte at which a row begins. g:
the group's index in the row.
"""
from pydsa.backends.cuda.blocks import kquants, legacy, tables

GROUPED = legacy.GROUPED | kquants.GROUPED | tables.GROUPED     # GGUF type -> Grouped
