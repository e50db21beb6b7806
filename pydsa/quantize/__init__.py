"""Quantize GGUF files, and rows of weights.

    report = pydsa.quantize("model.gguf", "smaller.gguf", "Q4_K_M", imatrix="imatrix.gguf")     # running.quantize()
    pydsa.quantize.TYPES["Q4_K"](x, importance)     # float32 [n, k], float32 [k] or None -> uint8 [n, bytes of a row]

TYPES maps names of types to rows.Quantizer; numba is imported when it is first asked for.
"""
import importlib
import sys
from types import ModuleType

from pydsa.quantize.running import Report, Row, quantize, summary  # noqa: F401


class _Callable(ModuleType):
    """A module that is called as its main function is."""

    def __call__(self, *args, **options):
        return quantize(*args, **options)


sys.modules[__name__].__class__ = _Callable
_Callable.__call__.__doc__ = quantize.__doc__


def __getattr__(name):
    if name == "TYPES":
        return importlib.import_module("pydsa.quantize.table").TYPES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
