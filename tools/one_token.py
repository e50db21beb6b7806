"""Check and time on a GPU what is done for one token beside products.

    python tools/one_token.py

Attention to chosen rows and to all, top-k of one row, norms with sums and rounding: the kernels for one token, and those that do the same
for any number of tokens, on the shapes of DeepSeek V3.2. Times are those of a CUDA graph of many launches, one after the other, as a step
is. The exit code is 1 if the results differ.
"""
import functools
import importlib
import sys

import click
import numpy as np

from pydsa.backends import cuda
from pydsa.backends.cuda import attend_one, attention, modes
from pydsa.backends.cuda.current import gpu
from pydsa.backends.cuda.norm_one import add_norm
from pydsa.backends.cuda.int8x2.linear import pack_into, scratch_for
from pydsa.backends.cuda.variants import VARIANTS
from pydsa.gguf_file import Tensor

TOP_K = importlib.import_module("pydsa.backends.cuda.top_k")        # the package has a function of this name
STORAGES = tuple(dict.fromkeys(storage for storage, _ in attend_one.ATTEND))     # that have kernels for one token
BOUND = 1e-6        # of the NMSE between two ways to compute the same
RNG = np.random.default_rng(0)


def normal(*shape):
    return cuda.upload(RNG.standard_normal(shape, np.float32))


def microseconds(work, repeats):
    """The time of work(), which launches kernels, in a graph that repeats it."""
    work()      # scratch memory grows, kernels are compiled
    return 1e6 / repeats * min(gpu.time_each([lambda: [work() for _ in range(repeats)]])[0] for _ in range(3))


class WithoutOne:
    """A context in which an op has only the last of its variants."""

    def __init__(self, op):
        self._op = op

    def __enter__(self):
        self._variants = VARIANTS[self._op]
        VARIANTS[self._op] = dict(list(self._variants.items())[-1:])

    def __exit__(self, *error):
        VARIANTS[self._op] = self._variants


def both_ways(name, op, work, out, repeats):
    """Print the times of work() with an op's first variant and its last.

    Returns the NMSE between what it writes to `out`.
    """
    new, found = microseconds(work, repeats), out.get().astype(np.float64)
    with WithoutOne(op):
        old, expected = microseconds(work, repeats), out.get().astype(np.float64)
    error = float(((found - expected) ** 2).sum() / (expected ** 2).sum())
    click.echo(f"{name:48} {new:8.2f} us, before {old:8.2f}, NMSE {error:.1e}")
    return error


def attentions(storages, rows, heads, chosen, repeats):
    """Attention to chosen rows of caches of some types, and to all."""
    q, out, values = normal(1, heads, 576), cuda.empty((1, heads, 512), np.float32), normal(min(rows, 4096), 576)
    indices = cuda.upload(np.sort(RNG.choice(rows, chosen, replace=False)).astype(np.int32)[None])
    made = scratch_for(out.rows)
    for storage in storages:
        cache = cuda.cache_rows(rows, (512, 64), storage)
        for start in range(0, rows, len(values)):
            n = min(rows - start, len(values))
            cuda.cache_write(cache, values[:n], cuda.upload(np.arange(start, start + n)))
        work = functools.partial(attention.attend, out, q, cache, modes.SPARSE, chosen, 0.05, indices=indices, made=made)
        yield both_ways(f"attention, {chosen} of {rows} rows of {storage}, {heads} heads", "attention of a few", work, out, repeats)
        for n in sorted({min(rows, 1024), rows}):
            work = functools.partial(attention.attend, out, q, cache, modes.DENSE, rows, 0.05, positions=cuda.upload(np.array([n - 1])),
                                     made=made)
            yield both_ways(f"attention, the first {n} rows of {storage}, {heads} heads", "attention of a few", work, out, repeats)


def products(width, outputs, repeats):
    """Products of a few tokens with a matrix of Q4_K."""
    width = (width + 255) // 256 * 256
    w = cuda.weight(Tensor("w", "Q4_K", (outputs, width), RNG.integers(0, 64, (outputs, width // 256 * 144), np.uint8)))
    for n in (2, 8):
        x, out = normal(n, width), cuda.empty((n, outputs), np.float32)
        yield both_ways(f"[{outputs} x {width}] of Q4_K times {n} tokens", "products of a few", functools.partial(cuda.linear, out, w, x),
                        out, repeats)


def choices(length, chosen, repeats):
    """Top-k of rows of up to `length` scores, of which some end early."""
    out, scores = cuda.empty((1, chosen), np.int32), normal(1, length)
    for n in (length // 32, length // 4, length):
        positions = cuda.upload(np.array([n - 1]))
        work = functools.partial(TOP_K.choose, out, scores, positions)
        yield both_ways(f"top {chosen} of {n} of {length} scores", "top_k of one", work, out, repeats)


def norms(width, repeats):
    """A norm with two sums and rounding in one launch, and op by op."""
    x, y, z, w = normal(1, width), normal(1, width), normal(1, width), normal(width)
    first, second, out = (cuda.empty((1, width), np.float32) for _ in range(3))
    made, eps = scratch_for(out), np.float32(1e-6)

    def ops():
        cuda.add(first, x, y)
        cuda.add(second, first, z)
        cuda.rms_norm(out, second, w, eps)
        pack_into(out, made)
    old, expected = microseconds(ops, repeats), out.get().astype(np.float64)
    new = microseconds(lambda: add_norm([x, y, first, z, second], out, w, eps, None, None, made), repeats)
    error = float(((out.get() - expected) ** 2).sum() / (expected ** 2).sum())
    click.echo(f"{f'norm of {width}, two sums, rounding':48} {new:8.2f} us, by four ops {old:8.2f}, NMSE {error:.1e}")
    return error


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--storage", "storages", multiple=True, default=STORAGES, show_default=True, help="of caches")
@click.option("--rows", default=65536, show_default=True, help="of a cache")
@click.option("--heads", default=128, show_default=True)
@click.option("--chosen", default=2048, show_default=True, help="rows")
@click.option("--scores", default=131072, show_default=True, help="in the row of which the best are chosen")
@click.option("--width", default=7168, show_default=True, help="of a norm, and of products")
@click.option("--outputs", default=18432, show_default=True, help="of products of a few tokens")
@click.option("--repeats", default=50, show_default=True, help="launches in a graph")
def main(storages, rows, heads, chosen, scores, width, outputs, repeats):
    cuda.check_device()
    errors = [*attentions(storages, rows, heads, chosen, repeats), *choices(scores, chosen, repeats), norms(width, repeats),
              *products(width, outputs, repeats)]
    sys.exit(0 if max(errors) < BOUND else "The results differ.")


if __name__ == "__main__":
    main()
