"""Collect an imatrix into a file, whatever ends the run."""
import math
import os

import numpy as np

from pydsa.errors import ImatrixError
from pydsa.imatrix.collecting import collect
from pydsa.imatrix.files import read, save
from pydsa.options import counts
from pydsa.quality.distributions import Rows
from pydsa.quality.perplexities import exponential


def read_all(paths, chunk_size):
    """The sum of imatrix files -> Imatrix; None without any.

    chunk_size: tokens of a chunk, of the sum and for .dat files. Raises ImatrixError or GGUFError for a file that is damaged, or has
    tensors of other sizes than one before.
    """
    total = None
    for path in paths:
        found = read(path, chunk_size)
        try:
            total = found if total is None else total.merged(found)
        except ImatrixError as error:
            raise ImatrixError(f"{path}: {error}") from error
    if total is not None:
        total.chunk_size = chunk_size
    return total


class Scores:
    """The perplexity of the chunks so far, by llama.cpp's definition.

    It is a `score` of collecting.collect(). threads: a distributions.Threads.
    """

    def __init__(self, threads):
        self._threads, self._log_probs, self._text = threads, [], ""

    def __call__(self, ids, logits):
        self._log_probs.append(Rows(logits, self._threads).of(ids.astype(np.int64)))
        values = np.concatenate(self._log_probs)
        ppl = exponential(-values.mean())
        error = f" ± {ppl * values.std() / math.sqrt(values.size - 1):.4f}" if values.size > 1 else ""
        self._text = f"perplexity {ppl:.4f}{error}"

    def __str__(self):
        """Such as "perplexity 12.3456 ± 0.1234"; "" before the first."""
        return self._text


def collect_to_file(model, ids, path, form="gguf", before=None, every=10, copy_every=0, **options):
    """Collect as collecting.collect() does, and write to a file.

    The iterator yields the Imatrix of the text so far after each chunk. The file is written after each `every` chunks and at the end, which
    may be Ctrl-C or an error: it then has the chunks that are complete. before: an Imatrix whose sums are added in the file, or None.
    copy_every: chunks after which a copy stays, PATH.at_N for N chunks; 0: none. options: those of collect(). Raises what collect() and
    save() raise.
    """
    every, copy_every = counts(2**31 - 1, every=every, copy_every=copy_every or None)
    done = written = 0

    def write():
        nonlocal written
        total = matrix if before is None else before.merged(matrix)
        save(total, path, form)
        written = done
        if copy_every and done % copy_every == 0:
            save(total, f"{os.fspath(path)}.at_{total.chunks}", form)

    try:
        for matrix in collect(model, ids, **options):
            done += 1
            if done % every == 0 or copy_every and done % copy_every == 0:
                write()
            yield matrix
    finally:
        if done > written:
            write()
