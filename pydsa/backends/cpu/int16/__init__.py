"""Kernels in int16 by vectors: quantized weights, and index keys of int8, on CPUs without AMX."""
from pydsa.backends.cpu.int16 import indexer, linear  # noqa: F401
