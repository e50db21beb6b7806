"""Speed of a model whose file is not in memory: reads of the drive, and tokens.

    python tools/cold_speed.py model.gguf -n 8

The file leaves the page cache before each prompt and each token, so that all the weights of a step come from the drive. "wanted" are the
bytes of the weights that the step uses, "read" what the system read for it. "sequential" is the rate of one program that reads the file
from the start, measured before and after.
"""
import sys
import time
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.errors import PydsaError  # noqa: E402

PIECE, MOST = 4 << 20, 1 << 30      # bytes of a sequential read, and of all of them


class Evicted:
    """The files of a model, which can leave the page cache."""

    def __init__(self, setup):
        import os
        self._os, self.paths = os, [str(path) for path in setup.file.paths]
        self.maps = {id(data): data for data in map(_owner, setup.file.tensors.values())}

    def evict(self):
        """Drop all pages: those that are mapped first."""
        import mmap
        for data in self.maps.values():
            data.madvise(mmap.MADV_DONTNEED)
        for path in self.paths:
            file = self._os.open(path, self._os.O_RDONLY)
            self._os.posix_fadvise(file, 0, 0, self._os.POSIX_FADV_DONTNEED)
            self._os.close(file)

    def sequential(self):
        """The rate of reading from the start, bytes per second."""
        self.evict()
        done, start, buffer = 0, time.perf_counter(), bytearray(PIECE)
        for path in self.paths:
            with open(path, "rb", buffering=0) as file:
                while done < MOST and (n := file.readinto(buffer)):
                    done += n
        return done / (time.perf_counter() - start)


def _owner(tensor):
    """The mmap that holds a tensor's bytes."""
    data = tensor.data
    while isinstance(data, np.ndarray):
        data = data.base
    return data.obj if isinstance(data, memoryview) else data


def bytes_read():
    """Bytes that this process has read from drives."""
    import resource
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def wanted(model, session, ids):
    """Bytes of weights that a step of ids reads, each once."""
    from pydsa.executor.costs import StepSize, node_cost
    nodes, experts = [], {}

    def observe(node, arrays):
        nodes.append(node)
        if node.op == "moe_route":
            experts[node.args[0]] = np.unique(arrays[0]).size
    n_past = session.n_past
    session.prefill(ids, observe=observe)
    step = StepSize(len(ids), n_past, model.setup.cache_row_bytes, experts)
    return sum(node_cost(node, step).weights for node in nodes)


def measure(model, files, n_prompt, n_gen):
    """Rows of one prompt and of n_gen tokens, with and without asking.

    Each step is run three times after the same tokens: to count what it wants, with `asks`, and without.
    """
    from pydsa.backends.cpu.team import fetching
    from pydsa.bench import random_ids
    ids = random_ids(model, n_prompt + n_gen)
    session = model.session()
    for name, steps in (("prompt", [ids[:n_prompt]]), ("token", [[i] for i in ids[n_prompt:]])):
        n_wanted, sums = 0, {True: np.zeros(2), False: np.zeros(2)}
        for i, step in enumerate(steps):
            n_wanted += wanted(model, session, step)
            for asks in (True, False) if i % 2 else (False, True):
                session.truncate(session.n_past - len(step))
                fetching.allow(asks)
                files.evict()
                before, start = bytes_read(), time.perf_counter()
                session.prefill(step)
                sums[asks] += time.perf_counter() - start, bytes_read() - before
        for asks, (seconds, n_read) in sums.items():
            yield {"step": name, "asks": asks, "tokens": sum(map(len, steps)), "ms": 1e3 * seconds / len(steps),
                   "wanted MB": n_wanted / len(steps) / 1e6, "read MB": n_read / len(steps) / 1e6, "wanted GB/s": n_wanted / seconds / 1e9,
                   "read GB/s": n_read / seconds / 1e9}


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("-p", "--n-prompt", type=click.IntRange(1), default=128, help="tokens of the prompt  [128]")
@click.option("-n", "--n-gen", type=click.IntRange(1), default=8, help="tokens to generate  [8]")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads to use")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", help="form of the table  [md]")
def main(model_path, n_prompt, n_gen, threads, output):
    import pydsa
    from pydsa.bench import format_rows
    try:
        model = pydsa.load(model_path, device="cpu", n_ctx=n_prompt + n_gen + 1, threads=threads)
    except PydsaError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    files = Evicted(model.setup)
    before = files.sequential()
    rows = list(measure(model, files, n_prompt, n_gen))
    rates = before, files.sequential()
    for row in rows:
        row |= {"sequential GB/s": sum(rates) / 2e9}
    click.echo(format_rows(rows, output), nl=False)


if __name__ == "__main__":
    main()
