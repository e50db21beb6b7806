"""Kernels in dp4a and tensor cores of int8, two for each int16: one token's products, and caches of integers."""
from pydsa.backends.cuda.int8x2 import attention, indexer, linear  # noqa: F401
