"""int8 kernels (dp4a and tensor cores), two int8 per int16.

They compute one token's products, and attention and indexer over integer caches.
"""
from pydsa.backends.cuda.int8x2 import attention, gemv, indexer, linear  # noqa: F401
