"""Kernels in float32, for any weights and any cache; they keep all bits."""
from pydsa.backends.cpu.f32 import attention, indexer, linear, mha  # noqa: F401
