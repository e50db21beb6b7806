"""Kernels in AMX tiles of int8, two for each int16: quantized weights, and caches of integers."""
from pydsa.backends.cpu.int8x2 import attention, indexer, linear, mha  # noqa: F401
