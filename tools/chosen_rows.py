"""Check and time on a GPU the attention of prompts to chosen rows.

    python tools/chosen_rows.py
    python tools/chosen_rows.py --tokens 512 --heads 64 --rows 8192

On the shapes of DeepSeek V3.2: the kernels in wgmma, with what they need made beforehand, and those that work in tiles. TFLOP/s are of the
absorbed form, 576 + 512 numbers a pair of a token and a row. Errors (NMSE) of both are beside float64, of some tokens. The exit code is 1
if one is too large.
"""
import sys

import click
import numpy as np

from pydsa.backends import cuda, reference
from pydsa.backends.cuda import attend_chosen, attention, half_rows, modes
from pydsa.backends.cuda.current import gpu
from pydsa.backends.cuda.variants import kernels

VALUE, ROTATED, SCALE = half_rows.VALUE, 64, 0.05
WIDTH = VALUE + ROTATED
BOUND, PERIOD, REPEATS = 1e-6, 64, 3        # of errors; queries and choices repeat after so many tokens
RNG = np.random.default_rng(0)


def seconds(work):
    """The least time of work(), which launches kernels."""
    work()      # scratch memory grows, kernels are compiled
    return min(gpu.time_each([work] * REPEATS))


def repeated(values, n):
    """The first n rows of an array that is repeated, on the device."""
    return cuda.upload(np.ascontiguousarray(np.resize(values, (n, *values.shape[1:]))))


def filled_cache(storage, rows):
    """A cache of random rows, of which some thousand differ; and them."""
    values, cache = RNG.standard_normal((min(rows, 4096), WIDTH), np.float32), cuda.cache_rows(rows, (VALUE, ROTATED), storage)
    given = cuda.upload(values)
    for start in range(0, rows, len(values)):
        n = min(rows - start, len(values))
        cuda.cache_write(cache, given[:n], cuda.upload(np.arange(start, start + n)))
    return cache, values


def exactly(q, values, storage, choices):
    """The attention of tokens in float64, to rows as a cache stores them."""
    cache, out = reference.cache_rows(len(values), (VALUE, ROTATED), storage), np.empty((*q.shape[:2], VALUE))
    reference.cache_write(cache, values, np.arange(len(values)))
    reference.sparse_attention(out, q.astype(np.float64), cache, np.where(choices < 0, -1, choices % len(values)), SCALE)
    return out


def error_of(out, expected):
    """NMSE of the first tokens of an output."""
    found = out[:len(expected)].get().astype(np.float64)
    return float(((found - expected) ** 2).sum() / (expected ** 2).sum())


def ways(q, out, cache, indices):
    """Yield (name, work, whether that writes out) for what is timed."""
    parts = q[..., :VALUE], q[..., VALUE:]
    if kernels("attention of many", out, *parts, cache, modes.SPARSE) is attend_chosen.attend:
        yield "rows as float16", lambda: half_rows.halved(cache, half_rows.facts_of(indices)), False
        yield "queries as float16", lambda: half_rows.halved_queries(*parts), False
        yield "wgmma, all", lambda: attend_chosen.attend(out, *parts, cache, indices, None, SCALE), True
    yield "tiles", lambda: attention.attend_in_tiles(out, q, cache, modes.SPARSE, indices.shape[1], SCALE, None, indices, None, None), True


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--storage", "storages", multiple=True, default=("i16", "i8", "f16"), show_default=True, help="of caches")
@click.option("--tokens", type=click.IntRange(min=3), default=2048, show_default=True)
@click.option("--heads", default=128, show_default=True)
@click.option("--rows", "depths", multiple=True, default=(8192, 131072), show_default=True, help="of a cache")
@click.option("--chosen", default=2048, show_default=True, help="rows of a token")
def main(storages, tokens, heads, depths, chosen):
    cuda.check_device()
    worst, given = 0, RNG.standard_normal((PERIOD, heads, WIDTH), np.float32)
    q, out = repeated(given, tokens), cuda.empty((tokens, heads, VALUE), np.float32)
    for rows, storage in [(depths[0], storage) for storage in storages] + [(n, storages[0]) for n in depths[1:]]:
        cache, values = filled_cache(storage, rows)
        choices = np.stack([np.sort(RNG.choice(rows, min(chosen, rows), replace=False)) for _ in range(PERIOD)]).astype(np.int32)
        choices[1, len(choices[1]) // 2:] = -1
        indices, expected = repeated(choices, tokens), exactly(given[:3], values, storage, choices[:3])
        for name, work, attends in ways(q, out, cache, indices):
            took = seconds(work)
            said = f"{1e3 * took:9.3f} ms"
            if attends:
                error = error_of(out, expected)
                worst = max(worst, error)
                said += f" {2 * tokens * heads * choices.shape[1] * (WIDTH + VALUE) / took / 1e12:8.1f} TFLOP/s  NMSE {error:.1e}"
            click.echo(f"{choices.shape[1]} of {rows} rows of {storage:5} {name:20} {said}")
    sys.exit(0 if worst < BOUND else f"An error is above {BOUND:.0e}.")


if __name__ == "__main__":
    main()
