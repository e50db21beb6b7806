"""GGUF block types: one file a family. Each entry gives the block's layout and how to unpack it, as the file stores it.

To add a type: a dtype, dequantize, unpack and dot (block.py says what they are) in its family's file, and its name here.
"""
import importlib

# name -> the file of its family; importing this table compiles nothing
FAMILIES = {
    "F32": "floats", "F16": "floats", "BF16": "floats",
    "Q4_0": "legacy", "Q4_1": "legacy", "Q5_0": "legacy", "Q5_1": "legacy", "Q8_0": "legacy",
    "Q2_K": "kquants", "Q3_K": "kquants", "Q4_K": "kquants", "Q5_K": "kquants", "Q6_K": "kquants",
    "IQ4_NL": "tables", "IQ4_XS": "tables", "MXFP4": "tables",
}
SUPPORTED = tuple(FAMILIES)
LARGEST = 32512     # of 16 bits in two signed bytes, 256 high + low: 127 * 256, as one more would carry into a high byte of 128
FLOAT_ROWS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}      # how cache rows are stored -> the GGUF type
WHOLE_ROWS = {"i8": 1, "i16": 2}        # -> bytes of a number; behind them a float32 for each part of a row (whole_rows.py)
KV_TYPES = {name: name for name in FLOAT_ROWS} | {"i16": "i16", "q8_0": "i8"}       # --kv-type, --index-type -> how rows are stored


def cache_row_bytes(storage, widths):
    """Bytes of a cache row with parts of so many values."""
    if storage in WHOLE_ROWS:
        return WHOLE_ROWS[storage] * sum(widths) + 4 * len(widths)
    return (4 if storage == "f32" else 2) * sum(widths)


def block_type(name):
    """The BlockType of a supported GGUF type, e.g. block_type("Q4_K").dtype["d"]."""
    return importlib.import_module(f"pydsa.quants.{FAMILIES[name]}").TYPES[name]
