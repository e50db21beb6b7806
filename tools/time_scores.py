"""Time scores of prompts and the choice of keys on a GPU.

Older kernels stand beside newer ones.

    python tools/time_scores.py
    python tools/time_scores.py --keys 4096 --heads 32

Keys are int8, of 128 numbers; the tokens are the last ones of a context. Times are of all tokens, in batches as a prompt has them. The exit
code is 1 if scores differ by an NMSE above 1e-12, or choices at all.
"""
import contextlib
import functools
import sys

import click
import numpy as np

from pydsa.backends import cuda
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.current import gpu
from pydsa.backends.cuda.top_k import choose
from pydsa.backends.cuda.variants import VARIANTS, kernels
from pydsa.backends.devices import tokens_scored_by_gpu

WIDTH, BOUND, COMPARED = 128, 1e-12, 9      # COMPARED: tokens of a batch
RNG = np.random.default_rng(0)


def normal(*shape):
    return cuda.upload(RNG.standard_normal(shape, np.float32))


@contextlib.contextmanager
def without_first(op):
    """A context in which an op's first variant is missing."""
    whole = VARIANTS[op]
    VARIANTS[op] = dict(list(whole.items())[1:])
    try:
        yield
    finally:
        VARIANTS[op] = whole


def index_keys(n):
    """A cache of n int8 keys, 4,096 different ones."""
    cache, values = cuda.cache_rows(n, (WIDTH,), "i8"), normal(min(n, 4096), WIDTH)
    for start in range(0, n, len(values)):
        count = min(n - start, len(values))
        cuda.cache_write(cache, values[:count], cuda.upload(np.arange(start, start + count)))
    return cache


def milliseconds(work, repeats):
    """The least time of several."""
    work()      # kernels are compiled, scratch memory grows
    return 1e3 * min(gpu.time_each([work] * repeats))


def score_batches(rows, q, w, keys, positions):
    """Scores of all tokens, one batch after the other in the same rows."""
    pack, score = kernels("indexer", keys, *q.shape[:2])
    packed = pack(q, w)
    for start in range(0, len(q), len(rows)):
        score(rows[:len(q) - start], packed, keys, positions, start, np.float32(0.1), False)


def choose_batches(out, rows, positions):
    """The choice for as many tokens as score_batches() scores."""
    for start in range(0, len(out), len(rows)):
        choose(out, rows[:len(out) - start], positions, start)


def compare(name, op, work, result, same, repeats):
    """Print the times of work() with an op's first variant and without.

    same(found, expected) -> an error or 0, and a text.
    """
    new, found = milliseconds(work, repeats), result().get()
    with without_first(op):
        old, expected = milliseconds(work, repeats), result().get()
    error, said = same(found, expected)
    click.echo(f"{name:64} {new:9.3f} ms, before {old:9.3f}, {said}")
    return error


def error_of_scores(ends, found, expected):
    there = np.arange(found.shape[1]) < ends[:, None]
    error = ((found[there] - expected[there].astype(np.float64)) ** 2).sum() / (expected[there].astype(np.float64) ** 2).sum()
    return error, f"NMSE {error:.1e}"


def difference_of_choices(found, expected):
    differs = int((found != expected).any(1).sum())
    return differs, f"{differs} rows differ" if differs else "the same"


def time_case(n_tokens, n_keys, n_heads, n_chosen, repeats):
    """Errors of scores and choices of one shape."""
    q, w, keys = normal(n_tokens, n_heads, WIDTH), normal(n_tokens, n_heads), index_keys(n_keys)
    places = np.arange(n_keys - n_tokens, n_keys)
    positions, at_once = cuda.upload(places), min(n_tokens, tokens_scored_by_gpu(n_keys))
    rows = scratch("rows of scores", (at_once, -(-n_keys // 4) * 4), np.float32)[:, :n_keys]
    out = cuda.empty((n_tokens, n_chosen), np.int32)
    ends = places[(n_tokens - 1) // at_once * at_once:] + 1     # of the tokens of the last batch, of which some scores are compared
    step = -(-len(ends) // COMPARED)
    title = f"{n_tokens} tokens of {n_heads} heads, {n_keys} keys"
    yield compare(f"scores, {title}", "indexer", lambda: score_batches(rows, q, w, keys, positions), lambda: rows[:len(ends):step],
                  functools.partial(error_of_scores, ends[::step]), repeats)
    yield compare(f"top {n_chosen}, {title}", "top_k of many", lambda: choose_batches(out, rows, positions), lambda: out,
                  difference_of_choices, repeats)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--tokens", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--keys", "lengths", multiple=True, type=click.IntRange(min=1), default=(4096, 131072), show_default=True)
@click.option("--heads", "numbers", multiple=True, type=click.IntRange(min=1), default=(64, 32), show_default=True)
@click.option("--chosen", default=2048, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="of which the fastest is told")
def main(tokens, lengths, numbers, chosen, repeats):
    cuda.check_device()
    errors = [error for n in lengths for heads in numbers for error in time_case(min(tokens, n), n, heads, min(chosen, n), repeats)]
    sys.exit("The results differ." if max(errors) > BOUND else 0)


if __name__ == "__main__":
    main()
