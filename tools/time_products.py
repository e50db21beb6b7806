"""Time the products of prompts on a GPU, older kernels beside newer ones.

    python tools/time_products.py
    python tools/time_products.py --tokens 512 --shape 1536x7168

Each line has a shape, the kernels, milliseconds, 1e12 operations per second and the error (NMSE) beside float64 in some rows. Weights are
Q4_K. Where torch is installed, its product of float16 is timed too. The exit code is 1 if an error is above 1e-9.
"""
import importlib.util
import re
import sys

import click
import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType

from pydsa.backends import cuda
from pydsa.backends.cuda.current import gpu
from pydsa.backends.cuda.f16x2 import gemm, linear
from pydsa.backends.cuda.linear import head_tiles
from pydsa.backends.cuda.moe import pair_tiles
from pydsa.gguf_file import Tensor
from pydsa.quants import TYPES

SHAPES = "18432x7168", "7168x18432", "24576x1536", "64*2048x7168"       # rows x columns; before them the number of experts
CHECKED, WORST, REPEATS = 16, 1e-9, 5       # rows that are computed in float64


def random_weights(rng, *shape):
    """A Q4_K tensor of random blocks with usual scales."""
    dtype = TYPES["Q4_K"].dtype
    blocks = np.frombuffer(rng.bytes(int(np.prod(shape)) // 256 * dtype.itemsize), np.uint8).reshape(-1, dtype.itemsize).copy()
    blocks[:, :4] = (rng.random((len(blocks), 2)) / 100).astype(np.float16).view(np.uint8)      # d and dmin
    data = blocks.reshape(*shape[:-1], -1)
    return Tensor("w", "Q4_K", shape, data)


def error_of(found, x, data, pick):
    """NMSE of the first rows of a product [N, rows] beside float64.

    data: a matrix. x: the activations of the rows `pick`.
    """
    weights = gguf.quants.dequantize(data[:CHECKED], GGMLQuantizationType.Q4_K).astype(np.float64)
    expected = x.astype(np.float64) @ weights.T
    return ((found[pick][:, :CHECKED] - expected) ** 2).sum() / (expected ** 2).sum()


def time_shape(shape, n_tokens, seed=0):
    """Yield (kernels, milliseconds, TFLOP/s, error) of a shape."""
    experts, n_out, n = (int(part or 1) for part in re.fullmatch(r"(?:(\d+)\*)?(\d+)x(\d+)", shape).groups())
    rng = np.random.default_rng(seed)
    tensor, x = random_weights(rng, *([experts] if experts > 1 else []), n_out, n), rng.standard_normal((n_tokens, n)).astype(np.float32)
    of_token = min(experts, 2)      # experts that a token uses
    ids = rng.permuted(np.tile(np.arange(experts, dtype=np.int32), (n_tokens, 1)), axis=1)[:, :of_token].copy()
    w, values, out = cuda.weight(tensor), cuda.upload(x), cuda.empty((ids.size, n_out), np.float32)
    tiles = pair_tiles(cuda.upload(ids), experts, of_token) if experts > 1 else head_tiles(n_tokens, 1)
    pick = np.flatnonzero(ids.ravel() == 0)[:CHECKED]
    for name, module in (("mma.sync", linear), *([("wgmma", gemm)] if gemm.takes(w) else [])):
        def work(module=module):
            module.matmul(out, w, module.pack(values), tiles)
        work()      # kernels are compiled and loaded
        seconds = min(gpu.time_each([work] * REPEATS))
        yield name, seconds * 1e3, 2 * ids.size * n_out * n / seconds / 1e12, error_of(
            out.get(), x[pick // of_token], tensor.data.reshape(experts, n_out, -1)[0], pick)


def time_torch(shape, n_tokens):
    """Yield the same of torch's product of float16, with no error.

    Nothing where torch is not installed.
    """
    if importlib.util.find_spec("torch") is None or "*" in shape:
        return
    import torch
    n_out, n = map(int, shape.split("x"))
    x, w = (torch.randn(m, n, device="cuda", dtype=torch.float16) for m in (n_tokens, n_out))
    (begin, end), seconds = (torch.cuda.Event(enable_timing=True) for _ in range(2)), []
    for _ in range(REPEATS + 1):
        begin.record()
        x @ w.T
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    best = min(seconds[1:])
    yield "torch, float16", best * 1e3, 2 * n_tokens * n_out * n / best / 1e12, None


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="rows x columns, or EXPERTS*ROWSxCOLUMNS")
def main(tokens, shapes):
    worst = 0
    for shape in shapes:
        for times in (time_shape, time_torch):
            for name, milliseconds, rate, error in times(shape, tokens):
                worst = max(worst, error or 0)
                said = "" if error is None else f"  {error:.1e}"
                click.echo(f"{shape:16} {name:16} {milliseconds:9.3f} ms {rate:8.1f} TFLOP/s{said}")
    sys.exit(worst > WORST)


if __name__ == "__main__":
    main()
