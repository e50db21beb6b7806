"""Time the products of prompts on a GPU, older kernels beside newer ones.

    python tools/time_products.py
    python tools/time_products.py --tokens 512 --shape 1536x7168 --type Q6_K

Each line has a shape, a type of weights, a variant of the table of kernels (backends/cuda/variants.py), milliseconds, 1e12 operations per
second and the error (NMSE) beside float64 in some rows. All variants that take the weights are timed. Where torch is installed, its product
of float16 is timed too. The exit code is 1 if an error is above 1e-9, or above 1e-6 where activations are one float16.
"""
import importlib.util
import re
import sys
from pathlib import Path

import click
import numpy as np

from pydsa.backends import cuda, reference
from pydsa.backends.cuda import f16x2
from pydsa.backends.cuda.current import gpu
from pydsa.backends.cuda.linear import head_tiles
from pydsa.backends.cuda.moe import pair_tiles
from pydsa.backends.cuda.variants import VARIANTS
from pydsa.gguf_file import Tensor

if __name__ == "__main__":      # whatever is in PYTHONPATH
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.gpu_products import random_tensor  # noqa: E402

SHAPES = "18432x7168", "7168x18432", "24576x1536", "64*2048x7168"       # rows x columns; before them the number of experts
KINDS = "Q4_K", "Q6_K", "Q8_0"
CHECKED, REPEATS = 16, 5            # rows that are computed in float64
WORST, WORST_OF_FLOAT16 = 1e-9, 1e-6


def error_of(found, x, tensor, pick):
    """NMSE of the first rows of a product [N, rows] beside float64.

    tensor: matrices, of which the first is meant. x: the activations of the rows `pick`.
    """
    rows = Tensor("w", tensor.type, (min(CHECKED, tensor.shape[1]), tensor.shape[2]), tensor.data[0, :CHECKED])
    weights = reference.weight(rows).astype(np.float64)
    expected = x.astype(np.float64) @ weights.T
    return ((found[pick][:, :CHECKED] - expected) ** 2).sum() / (expected ** 2).sum()


def time_shape(shape, n_tokens, kind="Q4_K", seed=0):
    """Yield (variant, milliseconds, TFLOP/s, error, whether that is too much)."""
    experts, n_out, n = (int(part or 1) for part in re.fullmatch(r"(?:(\d+)\*)?(\d+)x(\d+)", shape).groups())
    rng = np.random.default_rng(seed)
    tensor, x = random_tensor(kind, (experts, n_out, n), rng), rng.standard_normal((n_tokens, n)).astype(np.float32)
    of_token = min(experts, 2)      # experts that a token uses
    ids = rng.permuted(np.tile(np.arange(experts, dtype=np.int32), (n_tokens, 1)), axis=1)[:, :of_token].copy()
    w, values, out = cuda.weight(tensor), cuda.upload(x), cuda.empty((ids.size, n_out), np.float32)
    tiles = pair_tiles(cuda.upload(ids), experts, of_token) if experts > 1 else head_tiles(n_tokens, 1)
    pick = np.flatnonzero(ids.ravel() == 0)[:CHECKED]
    for name, variant in VARIANTS["linear"].items():
        if not variant.takes(w, False):
            continue

        def work(kernels=variant.kernels):
            kernels.matmul(out, w, kernels.pack(values), tiles)
        work()      # kernels are compiled and loaded
        seconds = min(gpu.time_each([work] * REPEATS))
        error = error_of(out.get(), x[pick // of_token], tensor, pick)
        yield (name, seconds * 1e3, 2 * ids.size * n_out * n / seconds / 1e12, error,
               not error <= (WORST if variant.precision is None else WORST_OF_FLOAT16))


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
    yield "torch, float16", best * 1e3, 2 * n_tokens * n_out * n / best / 1e12, None, False


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="rows x columns, or EXPERTS*ROWSxCOLUMNS")
@click.option("--type", "kinds", multiple=True, type=click.Choice([*f16x2.linear.GEMM]), show_default=True, default=KINDS)
def main(tokens, shapes, kinds):
    wrong = False
    for shape in shapes:
        for kind, rows in (*((kind, time_shape(shape, tokens, kind)) for kind in kinds), ("", time_torch(shape, tokens))):
            for name, milliseconds, rate, error, too_much in rows:
                wrong |= too_much
                said = "" if error is None else f"  {error:.1e}"
                click.echo(f"{shape:16} {kind:6} {name:16} {milliseconds:9.3f} ms {rate:8.1f} TFLOP/s{said}{' WRONG' if too_much else ''}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
