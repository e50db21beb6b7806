"""Time attention of prompts to all keys on a GPU, both ways.

    python tools/time_attention.py
    python tools/time_attention.py --tokens 512 --keys 8192 --kv-type f16

It is done as exact models take it, and as those in float16 do. Each line has the widths, the precision, milliseconds, 1e12 operations per
second of MLA's plain form, keys and values included, and the error (NMSE) beside the exact way. Weights are Q8_0. The exit code is 1 if an
error is above 1e-6.
"""
import sys

import click
import numpy as np

from pydsa.backends import cuda
from pydsa.backends.cuda.current import gpu
from pydsa.backends.devices import FLASH_WIDTHS
from pydsa.gguf_file import Tensor
from pydsa.options import EXACT, FLOAT16
from pydsa.quants import CACHE_TYPES, TYPES

WORST, REPEATS = 1e-6, 5


def random_weights(rng, *shape):
    """A Q8_0 tensor of random blocks."""
    dtype = TYPES["Q8_0"].dtype
    blocks = np.frombuffer(rng.bytes(int(np.prod(shape)) // 32 * dtype.itemsize), np.uint8).reshape(-1, dtype.itemsize).copy()
    blocks[:, :2] = np.full((len(blocks), 1), 0.0005, np.float16).view(np.uint8)     # d
    return cuda.weight(Tensor("w", "Q8_0", shape, blocks.reshape(*shape[:-1], -1)))


def cache_of(rng, n_keys, widths, kv_type):
    """A cache of n_keys random rows."""
    cache = cuda.cache_rows(n_keys, widths, kv_type)
    for first in range(0, n_keys, 4096):
        n = min(4096, n_keys - first)
        cuda.cache_write(cache, cuda.upload(rng.standard_normal((n, sum(widths)), np.float32)), cuda.upload(np.arange(first, first + n)))
    return cache


def time_widths(widths, n_head, n_tokens, n_keys, kv_type, seed=0):
    """Yield (precision, milliseconds, TFLOP/s, error) of a model's widths."""
    (n_nope, n_rot, n_v, kv_lora), rng = widths, np.random.default_rng(seed)
    q = cuda.upload(rng.standard_normal((n_tokens, n_head, n_nope + n_rot), np.float32))
    out = cuda.empty((n_tokens, n_head, n_v), np.float32)
    k_b, v_b = random_weights(rng, n_head, kv_lora, n_nope), random_weights(rng, n_head, n_v, kv_lora)
    args = q, cache_of(rng, n_keys, (kv_lora, n_rot), kv_type), k_b, v_b, cuda.upload(np.arange(n_keys - n_tokens, n_keys)), 0.07
    pairs = n_tokens * (n_keys - n_tokens) + n_tokens * (n_tokens + 1) // 2
    operations, exact = 2 * n_head * (pairs * (n_nope + n_rot + n_v) + n_keys * kv_lora * (n_nope + n_v)), None
    for precision in (EXACT, FLOAT16):
        with cuda.on(0, precision).selected():
            cuda.mha_attention(out, *args)      # kernels are compiled and loaded
            seconds = min(gpu.time_each([lambda: cuda.mha_attention(out, *args)] * REPEATS))
        found = out.get().astype(np.float64)
        exact = found if exact is None else exact
        yield precision, seconds * 1e3, operations / seconds / 1e12, ((found - exact) ** 2).sum() / (exact ** 2).sum()


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--keys", type=click.IntRange(min=2), multiple=True, default=(2048, 10240), show_default=True,
              help="of which the tokens are the last")
@click.option("--heads", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--kv-type", type=click.Choice(list(CACHE_TYPES)), default="i16", show_default=True)
def main(tokens, keys, heads, kv_type):
    worst = 0
    for widths in FLASH_WIDTHS:
        for n_keys in keys:
            for name, milliseconds, rate, error in time_widths(widths, heads, min(tokens, n_keys), n_keys, kv_type):
                worst = max(worst, error if error == error else np.inf)
                click.echo(f"{widths} {n_keys:7} keys {name:10} {milliseconds:9.3f} ms {rate:8.1f} TFLOP/s  {error:.1e}")
    sys.exit(worst > WORST)


if __name__ == "__main__":
    main()
