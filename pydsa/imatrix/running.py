"""Collect an imatrix into a file, whatever ends the run."""
import os

from pydsa.errors import ImatrixError
from pydsa.imatrix.collecting import collect
from pydsa.imatrix.files import read, save


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


def collect_to_file(model, ids, path, form="gguf", before=None, every=10, copy_every=0, **options):
    """Collect as collecting.collect() does, and write to a file.

    The iterator yields the Imatrix of the text so far after each chunk. The file is written after each `every` chunks and at the end, which
    may be Ctrl-C or an error: it then has the chunks that are complete. before: an Imatrix whose sums are added in the file, or None.
    copy_every: chunks after which a copy stays, PATH.at_N for N chunks; 0: none. options: those of collect(). Raises what collect() and
    save() raise.
    """
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
