"""Kernels in AMX tiles of int8 pairs.

An int16 is two int8. For quantized weights, and for caches of integers.
"""
from pydsa.backends.cpu.int8x2 import attention, indexer, linear, mha  # noqa: F401
