"""Logits as distributions, and how much two distributions differ.

Rows are reduced in blocks that fit in a cache, on several threads, as a vocabulary has a hundred thousand tokens and more.
"""
import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pydsa.errors import NOT_FINITE, DamagedWeightsError
from pydsa.machine.cores import physical_cores

BLOCK = 1 << 18         # float32 values that a thread works on at a time
MOST_THREADS = 8        # more threads only wait for the memory
LEAST_REST = 1e-12      # the least probability that the tokens beside the likeliest are given


class Threads:
    """Threads that work on blocks of rows; a context."""

    def __init__(self, n=None):
        self._pool = ThreadPoolExecutor(max(1, min(MOST_THREADS, n or physical_cores())))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._pool.shutdown(cancel_futures=True)

    def each_block(self, function, n_rows, width):
        """Call function(slice) for blocks of n_rows rows of so many values."""
        size = max(1, BLOCK // width)
        blocks = [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
        if len(blocks) == 1:
            function(blocks[0])
            return
        with contextlib.closing(self._pool.map(function, blocks)) as done:
            for _ in done:
                pass


class Rows:
    """The logits after several tokens, float32 [n, n_vocab], as distributions.

    best: int64 [n], the likeliest token of each row, the first of equals. Raises DamagedWeightsError for logits that are not finite.
    """

    def __init__(self, logits, threads):
        self.logits, self.threads = logits, threads
        n, self.n_vocab = logits.shape
        self.best, self.tops, self.least = np.empty(n, np.int64), np.empty((n, 1), np.float32), np.empty((n, 1), np.float32)
        self.log_sums = np.empty((n, 1), np.float64)       # log of the sum of exp(logits - top)
        threads.each_block(self._reduce, n, self.n_vocab)
        if not (np.isfinite(self.least).all() and np.isfinite(self.log_sums).all()):
            raise DamagedWeightsError(NOT_FINITE)
        self._shifts = (self.tops + self.log_sums).astype(np.float32)

    def _reduce(self, part):
        logits = self.logits[part]
        self.best[part] = best = logits.argmax(axis=1)
        self.tops[part] = tops = np.take_along_axis(logits, best[:, None], axis=1)
        self.least[part] = logits.min(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore"):
            self.log_sums[part] = np.log(np.exp(logits - tops).sum(axis=1, keepdims=True, dtype=np.float64))

    def of(self, ids):
        """The log-probability of one token in each row, float64 [n]."""
        return (np.take_along_axis(self.logits, ids[:, None], axis=1).astype(np.float64) - self.tops - self.log_sums)[:, 0]

    def of_all(self, part):
        """The log-probabilities of a slice of rows, float32 [rows, n_vocab]."""
        return self.logits[part] - self._shifts[part]

    def of_several(self, ids):
        """The log-probabilities of tokens ids [n, k], float32 [n, k]."""
        return np.take_along_axis(self.logits, ids, axis=1) - self._shifts

    def likeliest(self, k):
        """The k likeliest tokens of each row, int64 [n, k], in that order.

        Of equals the one with the lower id comes first, as in `best`.
        """
        ids = np.empty((len(self.logits), k), np.int64)

        def choose(part):
            logits = self.logits[part]
            some = np.sort(np.argpartition(-logits, k - 1, axis=1)[:, :k], axis=1) if k < self.n_vocab else np.tile(
                np.arange(k), (len(logits), 1))
            order = np.argsort(-np.take_along_axis(logits, some, axis=1), axis=1, kind="stable")
            ids[part] = np.take_along_axis(some, order, axis=1)
            ids[part, 0] = self.best[part]      # where more than k are equal
        self.threads.each_block(choose, len(self.logits), self.n_vocab)
        return ids

    def compared(self, rows, ids):
        """How other Rows, for the same tokens, differ from these.

        ids: the tokens that came, int [n]. Returns these rows' log-probabilities of ids, the KL divergences, in nats, of the other rows
        from these, both float64 [n], and whether the likeliest tokens are the same, bool [n].
        """
        kl = np.empty(len(self.logits))
        shifts = (self.tops + self.log_sums - (rows.tops + rows.log_sums)).astype(np.float32)     # small where the rows are alike

        def diverge(part):
            differences = self.logits[part] - rows.logits[part] - shifts[part]
            weights = np.exp(self.logits[part] - self.tops[part])       # probabilities times exp(log_sums)
            kl[part] = (weights * differences).sum(axis=1, dtype=np.float64) * np.exp(-self.log_sums[part, 0])
        self.threads.each_block(diverge, len(self.logits), self.n_vocab)
        return self.of(ids), kl, self.best == rows.best


class LikeliestRows:
    """The likeliest tokens of each row, and all others as if they were one.

    log_probs: those of the tokens that came, float64 [n]. ids: int64 [n, k], the likeliest tokens first; likeliest: their
    log-probabilities, float32 [n, k].
    """

    def __init__(self, log_probs, ids, likeliest):
        self._log_probs, self._ids, self._likeliest = log_probs, ids, likeliest

    def compared(self, rows, ids):
        """As Rows.compared().

        Putting tokens together makes a KL divergence less, never more.
        """
        others = rows.of_several(self._ids)
        p = np.exp(self._likeliest)
        kl = (p * (self._likeliest - others)).sum(axis=1, dtype=np.float64)
        if self._ids.shape[1] < rows.n_vocab:
            rest, other_rest = _rest(p), _rest(np.exp(others))
            kl += rest * np.log(rest / other_rest)
        return self._log_probs, kl, self._ids[:, 0] == rows.best


def _rest(p):
    """What probabilities [n, k] leave for all other tokens, float64 [n]."""
    return np.maximum(1 - p.sum(axis=1, dtype=np.float64), LEAST_REST)


class SteppedRows:
    """Log-probabilities in llama.cpp's form: 65,536 equal steps for each row.

    scales, lows: float32 [n], the size of a step and the log-probability of step 0. steps: uint16 [n, n_vocab]. A log-probability below -16
    is not in the file, and counts as nothing, as it does there.
    """
    LEAST = -16

    def __init__(self, scales, lows, steps, threads):
        self._scales, self._lows, self._steps, self.threads = scales[:, None], lows[:, None], steps, threads

    def compared(self, rows, ids):
        """As Rows.compared()."""
        n, n_vocab = self._steps.shape
        kl, same = np.empty(n), np.empty(n, bool)

        def diverge(part):
            mine = self._scales[part] * self._steps[part] + self._lows[part]
            terms = np.exp(mine) * (mine - rows.of_all(part))
            kl[part] = np.where(mine > self.LEAST, terms, 0).sum(axis=1, dtype=np.float64)
            same[part] = mine.argmax(axis=1) == rows.best[part]
        self.threads.each_block(diverge, n, n_vocab)
        return (self._scales * np.take_along_axis(self._steps, ids[:, None], axis=1) + self._lows)[:, 0].astype(np.float64), kl, same
