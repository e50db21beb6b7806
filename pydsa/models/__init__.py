"""The supported architectures, one file each, found by GGUF name.

A file has a Config and build(graph, config, weights, variant, layers), which records a range of layers: all, or those of a stage.
"""
import importlib

from pydsa.errors import UnsupportedModelError
from pydsa.gguf.file import quote

ARCHITECTURES = ("deepseek2", "deepseek32", "glm-dsa")


def architecture(metadata):
    """The module of the architecture that a file's metadata name."""
    name = metadata.string("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"{metadata.path}: the architecture is {quote(name)}, expected one of {', '.join(ARCHITECTURES)}.")
    return importlib.import_module(f"pydsa.models.{name.replace('-', '_')}")
