"""Kernels in int16 vectors, on CPUs without AMX.

For quantized weights, and for index keys of int8.
"""
from pydsa.backends.cpu.int16 import indexer, linear  # noqa: F401
