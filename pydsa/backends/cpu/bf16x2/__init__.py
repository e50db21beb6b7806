"""Kernels in AMX tiles of bfloat16 pairs, for caches of f16 and bf16."""
from pydsa.backends.cpu.bf16x2 import attention, indexer  # noqa: F401
