"""Quantized weights by eights, as a lane has them of wgmma's matrix A: registers of 64 rows and 64 columns of a chunk.

Lane c of four, those of a row, takes weights 8 c to 8 c + 7 of each of the two groups of 32 of a chunk of 64, whatever the type: weight =
scale * (byte - bias) + offset. Loads come before: raw words are loaded while those of an earlier chunk are multiplied. A type's functions
are those of Eights (eight.py).
"""
from pydsa.backends.cuda.eights import grids, kquants, legacy, ternary

# GGUF type -> Eights: all that GROUPED has
EIGHTS = legacy.EIGHTS | kquants.EIGHTS | grids.EIGHTS | ternary.EIGHTS
