"""Kernels in tensor cores of float16, two for each activation: prompts."""
from pydsa.backends.cuda.f16x2 import linear  # noqa: F401
