"""Kernels in int16 vectors, on CPUs without AMX.

For quantized weights, for index keys of int8, and for attention of prompts.
"""
from pydsa.backends.cpu.int16 import indexer, linear, mha  # noqa: F401
