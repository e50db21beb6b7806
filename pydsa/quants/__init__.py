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
KV_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}     # a type of cache -> the GGUF type of its rows
ROW_OF_BYTES = "i8"     # how index keys of q8_0 are stored: int8, and behind them one float32, their scale


def cache_storage(kv_type, index_type):
    """How the rows of each CacheRef.kind are stored, as cache_rows() takes it."""
    return {"latents": kv_type, "index_keys": ROW_OF_BYTES if index_type == "q8_0" else index_type}


def block_type(name):
    """The BlockType of a supported GGUF type, e.g. block_type("Q4_K").dtype["d"]."""
    return importlib.import_module(f"pydsa.quants.{FAMILIES[name]}").TYPES[name]
