"""Quantize GGUF files, and rows of weights.

    pydsa.quantize.TYPES["Q4_K"](x, importance)     # float32 [n, k], float32 [k] or None -> uint8 [n, bytes of a row]

TYPES maps names of types to rows.Quantizer; numba is imported when it is first asked for.
"""
import importlib


def __getattr__(name):
    if name == "TYPES":
        return importlib.import_module("pydsa.quantize.table").TYPES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
