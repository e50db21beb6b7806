"""float16 tensor-core kernels for prompts, two float16 per activation."""
from pydsa.backends.cuda.f16x2 import gemm, gemm_rows, linear  # noqa: F401
