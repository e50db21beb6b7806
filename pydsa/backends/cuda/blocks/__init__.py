"""GGUF blocks as products read them: a group of 32 weights becomes eight words of four signed bytes, with scales and offsets.

For each quantized type a device function group(data, row, g) -> eight words, then two scales and two offsets, one for each half of the
group: weight = scale * byte - offset. data: uint8, all rows of a tensor; row: where a row begins in it; g: which 32 of the row.
"""
from pydsa.backends.cuda.blocks import kquants, legacy, tables

GROUPED = legacy.GROUPED | kquants.GROUPED | tables.GROUPED     # GGUF type -> Grouped
