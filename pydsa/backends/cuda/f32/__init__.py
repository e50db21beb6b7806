"""Kernels in float32: unquantized weights, and caches of any type."""
from pydsa.backends.cuda.f32 import attention, indexer, linear  # noqa: F401
