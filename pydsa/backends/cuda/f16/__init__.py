"""Activations as one float16 each: products of prompts in wgmma."""
from pydsa.backends.cuda.f16 import gemm, panels  # noqa: F401
