"""pydsa runs models with DeepSeek Sparse Attention from GGUF files.

    model = pydsa.load("model.gguf")
    for piece in model.generate("Once upon a time", max_tokens=64): print(piece, end="")

Importing pydsa is fast: numba is imported with the first model.
"""
import importlib
import os

from pydsa.errors import (CheckpointError, ContextFullError, DamagedWeightsError, GGUFError, ImatrixError, LogitsFileError,  # noqa: F401
                          LostFileError, OutOfMemoryError, PydsaError, RecordingFileError, SessionFileError, StageError, TargetError,
                          UnsupportedModelError)

__version__ = "0.1.0"
DEMO = os.path.join(os.path.dirname(__file__), "demo", "demo.gguf")      # path of the model that comes with the package
_MODULES = {"load": "loading", "Model": "model", "Session": "session", "Sampling": "sampling", "load_tokenizer": "text.tokenizer",
            "Engine": "engine.engine", "Request": "engine.requests", "Recording": "recordings.recording", "Look": "look",
            "perplexity": "quality", "convert": "conversion", "quantize": "quantization"}
__all__ = ["DEMO", "load", "load_tokenizer", "Model", "Session", "Sampling", "Engine", "Request", "Recording", "Look", "perplexity",
           "convert", "quantize", "PydsaError", "GGUFError", "UnsupportedModelError", "ContextFullError", "DamagedWeightsError",
           "LostFileError", "OutOfMemoryError", "RecordingFileError", "SessionFileError", "LogitsFileError", "ImatrixError",
           "CheckpointError", "StageError", "TargetError"]


def __getattr__(name):
    if name == "selections":
        return importlib.import_module(f"pydsa.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'pydsa' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pydsa.{_MODULES[name]}"), name)


def __dir__():
    return sorted(set(globals()) | set(_MODULES) | {"selections"})
