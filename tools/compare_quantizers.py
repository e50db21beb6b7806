"""Errors and speed of pydsa's quantizers beside llama.cpp's.

    python tools/compare_quantizers.py LIBGGML_BASE_SO [TYPE ...]

One thread each, the same rows, runs in turn; times are medians of the process's time on a core. Errors are of normal weights, as a
part of llama.cpp's.
"""
import statistics
import time

import click
import numpy as np

from pydsa.quantization import TYPES, rows
from tools.golden_quantizers import error, llama_cpp

SHAPE, REPETITIONS = (64, 4096), 7


def seconds(functions):
    """The median times of functions that are called in turn."""
    times = [[] for _ in functions]
    for _ in range(REPETITIONS):
        for function, found in zip(functions, times):
            start = time.process_time()
            function()
            found.append(time.process_time() - start)
    return [statistics.median(found) for found in times]


@click.command(help=__doc__.split("\n")[0])
@click.argument("library", type=click.Path(exists=True, dir_okay=False))
@click.argument("types", nargs=-1)
def main(library, types):
    theirs, rng = llama_cpp(library), np.random.default_rng(0)
    x = rng.standard_normal(SHAPE, np.float32) * np.float32(0.02)
    importance = np.exp(1.5 * rng.standard_normal(SHAPE[1])).astype(np.float32)
    rows.set_threads(1)
    click.echo("| type | error | with importance | ns a weight | llama.cpp | times as fast | with importance | llama.cpp | times as fast |")
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for name in types or [name for name in TYPES if name != "F32"]:
        mine, cells, speeds = TYPES[name], [], []
        for w in (None, importance):
            if w is None and mine.needs_importance:
                cells.append("-")
                speeds += ["-"] * 3
                continue
            made, other = mine(x, w), theirs(name, x, w)
            cells.append(f"{error(x, made, name, w) / error(x, other, name, w):.3f}")
            a, b = (1e9 * t / x.size for t in seconds([lambda: mine(x, w), lambda: theirs(name, x, w)]))
            speeds += [f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}"]
        click.echo(f"| {' | '.join([name, *cells, *speeds])} |")


if __name__ == "__main__":
    main()
