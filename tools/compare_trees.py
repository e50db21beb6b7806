"""The speed of this tree of pydsa beside that of another one, by turns.

    git worktree add ../old v1.0
    python tools/compare_trees.py model.gguf ../old -t 2 --depths 3,512 -p 512

Each tree runs in a process of its own, with its own compiled kernels, and both load the model once. A round times some tokens, or a prompt,
of the old tree and then of this one, after this one has read memory alone with all threads. Ratios are of neighbours, so a machine whose
speed changes changes both. What other tenants leave of the memory's bandwidth changes most, and a token that memory limits cannot be faster
than it is read: so ratios are also shown for the thirds of the rounds in which memory was slowest and fastest.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
READ = 1 << 27      # bytes that are read to measure memory
CHILD = """
import sys
import time
import numpy as np
import pydsa
path, n_threads, n_ctx = sys.argv[1], *map(int, sys.argv[2:])
model = pydsa.load(path, device="cpu", threads=n_threads, n_ctx=n_ctx)
session, ids = model.session(), np.random.default_rng(0).integers(0, model.config.n_vocab, n_ctx).tolist()

def at(depth):
    session.truncate(min(depth, session.n_past))
    if session.n_past < depth:
        session.prefill(ids[session.n_past:depth])

def token(depth, n):
    at(depth)
    for token in ids[depth:depth + n]:
        start = time.perf_counter()
        session.decode(token)
        yield time.perf_counter() - start

def prompt(depth, n):
    at(depth)
    start = time.perf_counter()
    session.prefill(ids[depth:depth + n])
    yield time.perf_counter() - start

arrays = []

def memory(n_passes, n_bytes):
    from pydsa.backends.cpu import ceilings
    if not arrays:
        n = n_bytes // 8 // ceilings.BLOCK
        arrays[:] = np.zeros(n, np.uint64), np.empty(n * ceilings.BLOCK, np.uint64)
        ceilings.fill(*arrays)
        ceilings.read(*arrays)
    start = time.perf_counter()
    for _ in range(n_passes):
        ceilings.read(*arrays)
    yield n_passes * arrays[1].nbytes / (time.perf_counter() - start)

print("ready", flush=True)
for line in sys.stdin:
    kind, *numbers = line.split()
    print(*{"token": token, "prompt": prompt, "memory": memory}[kind](*map(int, numbers)), flush=True)
"""


class Tree:
    """A tree of pydsa that has loaded a model in a process of its own."""

    def __init__(self, tree, *args):
        env = os.environ | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen([sys.executable, "-c", CHILD, *map(str, args)], cwd=tree, env=env, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._process.stdout.readline() != "ready\n":
            raise click.ClickException(f"{tree} did not load the model: see above.")

    def ask(self, *request):
        """What the process answers to a request, a list of floats."""
        print(*request, file=self._process.stdin, flush=True)
        return [float(word) for word in self._process.stdout.readline().split()]

    def close(self):
        """End the process."""
        self._process.kill()
        self._process.communicate()


def rounds(old, new, kind, depth, n, n_rounds):
    """Times of both trees by turns: seconds [n_rounds, n] of each, and bytes a second [n_rounds]."""
    for tree in (old, new):
        tree.ask(kind, depth, n)
    seconds, read = ([], []), []
    for _ in range(n_rounds):
        read += new.ask("memory", 3, READ)
        for found, tree in zip(seconds, (old, new)):
            found.append(tree.ask(kind, depth, n))
    return *map(np.array, seconds), np.array(read)


def row_of(test, old, new, read):
    """The row of a test: its ratios, medians and tenth percentiles.

    old, new: seconds [n_rounds, n]; read: bytes a second [n_rounds].
    """
    each, order = np.median(old, 1) / np.median(new, 1), np.argsort(read)
    third = max(1, len(read) // 3)
    row = {"test": test, "old, ms": 1e3 * np.median(old), "new, ms": 1e3 * np.median(new), "ratio": np.median(each),
           "of the fastest tenth": np.percentile(old, 10) / np.percentile(new, 10)}
    for name, some in (("slow", order[:third]), ("fast", order[-third:])):
        row |= {f"{name} memory, GB/s": np.median(read[some]) / 1e9, f"ratio in {name} memory": np.median(each[some])}
    return {name: value if name == "test" else round(float(value), 3) for name, value in row.items()}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, resolve_path=True))
@click.argument("old", type=click.Path(exists=True, file_okay=False, resolve_path=True))
@click.option("-t", "--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--depths", default="3,512", show_default=True, help="Contexts, in tokens, after which tokens and prompts are timed.")
@click.option("-n", "n_gen", type=click.IntRange(0), default=16, show_default=True, help="Tokens of a round; 0: none.")
@click.option("-p", "n_prompt", type=click.IntRange(0), default=0, show_default=True, help="Tokens of a prompt, one a round; 0: none.")
@click.option("-r", "n_rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("-o", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def main(model, old, threads, depths, n_gen, n_prompt, n_rounds, form):
    depths = [int(depth) for depth in depths.split(",")]
    args, rows, trees = (model, threads, max(depths) + max(n_gen, n_prompt) + 1), [], []
    try:
        for tree in (old, ROOT):
            trees.append(Tree(tree, *args))
        for kind, name, n in (("token", "tg", n_gen), ("prompt", "pp", n_prompt)):
            for depth in depths if n else ():
                rows.append(row_of(f"{name}{n} @ d{depth}", *rounds(*trees, kind, depth, n, n_rounds)))
                if form == "text":
                    click.echo("; ".join(f"{key} {value}" for key, value in rows[-1].items()))
    finally:
        for tree in trees:
            tree.close()
    if form == "json":
        click.echo(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
