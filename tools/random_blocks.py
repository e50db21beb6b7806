"""Random blocks of all types of weights, for tools that run kernels."""
import numpy as np

from pydsa.gguf.file import Tensor
from pydsa.quants import TYPES

RANDOM_ROWS = 64


def random_tensor(kind, shape, rng, scale=0.04):
    """A tensor of a GGUF type [matrices, n_out, n_in] of random blocks.

    scale: up to which their scales are random. Only RANDOM_ROWS rows are different ones; they are repeated.
    """
    matrices, n_out, n_in = shape
    dtype = TYPES[kind].dtype
    if dtype.names is None:
        values = rng.standard_normal((RANDOM_ROWS, n_in)).astype(np.float32)
        rows = values if kind == "F32" else values.astype(np.float16) if kind == "F16" else (values.view(np.uint32) >> 16).astype(np.uint16)
        rows = rows.view(np.uint8)
    else:
        blocks = np.frombuffer(rng.bytes(RANDOM_ROWS * n_in // TYPES[kind].size * dtype.itemsize), dtype).copy()
        for field in sorted({"d", "dmin", "m"} & set(dtype.names)):
            blocks[field] = (rng.random(len(blocks)) * scale).astype(np.float16).view(blocks[field].dtype)
        if kind == "IQ1_M":     # four bits of the scale above each of four others
            scales = (rng.random(len(blocks)) * scale).astype(np.float16)
            blocks["scales"] = blocks["scales"] & 0x0FFF | (scales.view(np.uint16)[:, None] >> np.uint16([0, 4, 8, 12]) & 15) << 12
        if "e" in dtype.names:
            blocks["e"] = rng.integers(120, 124, len(blocks))
        rows = blocks.view(np.uint8).reshape(RANDOM_ROWS, -1)
    repeats = -(-matrices * n_out // RANDOM_ROWS)
    return Tensor("w", kind, shape, np.tile(rows, (repeats, 1))[:matrices * n_out].reshape(matrices, n_out, -1))
