"""Quantize GGUF files, and rows of weights.

    report = pydsa.quantize("model.gguf", "smaller.gguf", "Q4_K_M", imatrix="imatrix.gguf")     # running.quantize()
    pydsa.quantization.TYPES["Q4_K"](x, importance)     # float32 [n, k], float32 [k] or None -> uint8 [n, bytes of a row]

TYPES maps names of types to rows.Quantizer; numba is imported when it is first asked for.
"""
import importlib

from pydsa.backends.devices import check_numba
from pydsa.quantization.running import Report, Row, quantize, summary  # noqa: F401


def __getattr__(name):
    if name == "TYPES":
        check_numba()
        return importlib.import_module("pydsa.quantization.table").TYPES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
