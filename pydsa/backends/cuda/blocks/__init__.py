"""Unpacking of GGUF blocks on the GPU, in groups of 32 weights.

Each quantized type has a device function group(data, row, g). It returns eight uint32 of four int8 each, then two scales and two offsets,
one for each half of the group: weight = scale * int8 - offset. data: uint8, all rows of a tensor. row: the byte at which a row begins. g:
the group's index in the row. A type's group() reads a grid that its prepare(thread, n_threads) puts into a block's shared memory first.

Where groups of a block have scales of their own, scales(data, row, g) returns what they are made of: the block's factor, and one number for
each half of the group. Scale = factor * number, without rounding. A number has at most eight bits, and float16 holds it.

For one token's products a lane takes 64 weights of a row at a time: weights(data, row, c, second) of the type's Lane returns four times
four uint32, then four scales and four offsets, one for each sixteen weights. These are sixteens 4 c to 4 c + 3 of the row. Where the type
is strided they are those of one half of the groups 4 (c >> 1) to 4 (c >> 1) + 3: the first halves if c is even. second: 1, or 0 where the
row ends after the first two sixteens, which are returned twice then. weight = scale * (int8 - bias) - offset.
"""
from pydsa.backends.cuda.blocks import grids, kquants, legacy, tables, ternary

# GGUF type -> Grouped
GROUPED = legacy.GROUPED | kquants.GROUPED | tables.GROUPED | grids.GROUPED | ternary.GROUPED
