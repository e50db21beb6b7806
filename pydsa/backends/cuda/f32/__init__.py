"""float32 kernels: unquantized weights, and caches of any storage."""
from pydsa.backends.cuda.f32 import attention, indexer, linear  # noqa: F401
