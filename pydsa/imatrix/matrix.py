"""Imatrix: sums of squares of the inputs of a model's matrices, merged and fitted to a model."""
import math

import numpy as np

from pydsa.errors import ImatrixError
from pydsa.gguf.file import quote

# Gate and up of the experts have the same inputs, stored as one tensor or as two.
FUSED, PARTS = "ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight")


class Imatrix:
    """What the matrices of a model were multiplied with, in some text.

    sums: {tensor name: float64 [n]}, for each column of a matrix the sum of the squares of what it met, one matrix after the other.
    counts: {tensor name: int64 [m]}, the numbers of rows that were summed; m is the number of experts, or 1. datasets: names of the texts.
    chunk_size: tokens of a chunk of text.
    """

    def __init__(self, sums, counts, datasets=(), chunk_size=512):
        self.sums, self.counts, self.datasets, self.chunk_size = sums, counts, list(datasets), chunk_size

    def __repr__(self):
        return f"<pydsa Imatrix: {len(self.sums)} tensors, {self.chunks} chunks of {self.chunk_size} tokens>"

    @property
    def chunks(self):
        """The number of chunks of the text, by the tensor with most tokens."""
        return max((int(counts.max()) for counts in self.counts.values()), default=0) // self.chunk_size

    def mean(self, name):
        """The mean squares of a tensor's inputs, float32 [m, n / m].

        Those of an expert without data are 1: all its columns count the same, as in llama.cpp.
        """
        sums, counts = self.sums[name].reshape(self.counts[name].size, -1), self.counts[name][:, None]
        return np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)

    @property
    def means(self):
        """{tensor name: float32 [m, n / m]}, as mean() gives them."""
        return {name: self.mean(name) for name in self.sums}

    def merged(self, other):
        """The Imatrix of both texts: sums and counts are added.

        Counts of one of them may be for all of a tensor's experts together. Raises ImatrixError if a tensor has another size in the other.
        """
        sums, counts = dict(self.sums), dict(self.counts)
        for name, theirs in other.sums.items():
            if name not in sums:
                sums[name], counts[name] = theirs, other.counts[name]
                continue
            pair = counts[name], other.counts[name]
            if sums[name].size != theirs.size or len({mine.size for mine in pair} - {1}) > 1:
                raise ImatrixError(f"{quote(name)} has {theirs.size} sums and {pair[1].size} counts, expected {sums[name].size} and "
                                   f"{pair[0].size} as in the imatrix that it is added to: they are of different models.")
            sums[name], counts[name] = sums[name] + theirs, _added(*pair)
        return Imatrix(sums, counts, [*self.datasets, *other.datasets], self.chunk_size)

    def for_model(self, tensors, what="the model"):
        """The mean squares for a model's matrices.

        tensors: {name: gguf.file.Tensor}, of an open file. Returns {name: float32 [n_mat, n_in]} for those with data: n_mat is the product
        of a tensor's leading dimensions, 1 for a matrix. Raises ImatrixError as check_model() does. what: the model's name in errors.
        """
        return {name: self.mean(source).reshape(-1, tensors[name].shape[-1]) for name, source in self.check_model(tensors, what).items()}

    def check_model(self, tensors, what="the model"):
        """Raise ImatrixError if this is the imatrix of another model.

        A tensor has another number of columns or matrices there, or none is the model's. Returns {name: the entry with its data}.
        """
        sources = {name: source for name in tensors if (source := self.source(name)) is not None}
        if not sources:
            raise ImatrixError(f"The imatrix has no tensor of {what}: it is that of another model.")
        for name, source in sources.items():
            n_mat, n_in = math.prod(tensors[name].shape[:-2]), tensors[name].shape[-1]
            if self.sums[source].size != n_mat * n_in or self.counts[source].size not in (1, n_mat):
                raise ImatrixError(f"The imatrix has {self.sums[source].size} sums and {self.counts[source].size} counts of "
                                   f"{quote(source)}, expected those of {n_mat} x {n_in} columns in {what}: it is that of another model.")
        return sources

    def source(self, name):
        """The entry with the inputs of a tensor; None without one.

        Gate and up of the experts have the same, so that one tensor of both may stand for two, and the other way round.
        """
        if name in self.sums:
            return name
        for part in PARTS:
            for mine, theirs in ((part, FUSED), (FUSED, part)):
                if name.endswith(mine) and name.removesuffix(mine) + theirs in self.sums:
                    return name.removesuffix(mine) + theirs
        return None


def _added(a, b):
    """Counts added; those of a whole tensor hold for each of its experts.

    Counts of several matrices that are all equal are those of a whole tensor, as older files have them.
    """
    if a.size != b.size:
        a, b = (counts[:1] if (counts == counts[0]).all() else counts for counts in (a, b))
    return a + b
