"""Steps of one session: what goes into them, and several of them under way."""
import collections

import numpy as np

from pydsa.errors import PydsaError
from pydsa.executor.hooks import Hook


def check_max_tokens(n):
    """Raise PydsaError if n is not a limit of tokens: an integer or None."""
    if n is not None and (not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 0):
        raise PydsaError(f"max_tokens is {n!r}, expected an integer from 0 on, or None.")


def check_ids(ids, n_vocab):
    """Check token ids -> an int32 array [n], n > 0, all in the vocabulary."""
    try:
        ids = np.asarray(ids)
    except ValueError:      # lists of different lengths
        ids = np.empty(0)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":       # integers beyond 64 bits are objects or floats
        raise PydsaError(f"The token ids must be a list of at least one integer, each from 0 to {n_vocab - 1}.")
    least, most = (ids[0], ids[0]) if ids.size == 1 else (ids.min(), ids.max())     # a generation checks one id for each token
    if least < 0 or most >= n_vocab:
        bad = ids[(ids < 0) | (ids >= n_vocab)][0]
        raise PydsaError(f"The token id is {bad}, expected 0 to {n_vocab - 1}.")
    return ids.astype(np.int32)


class Layers(Hook):
    """Report progress after each layer of a step.

    One step can take minutes, if the weights are read from a slow disk. report(layers) gets the number of layers that are done.
    """
    all_rows = False

    def __init__(self, report):
        self._report, self._done = report, 0

    def wants(self, node):
        return node.name.startswith("l_out-")

    def after(self, call):
        self._done += 1
        self._report(self._done)


class Step:
    """A step of one session that was begun.

    ids: its tokens, int32 [n]. Steps are finished in the order they were begun; one whose predecessor failed is dropped.
    """

    def __init__(self, session, ids, n_past, bound, hooks, logits, pending):
        self.ids, self._session, self._n_past = ids, session, n_past
        self._bound, self._hooks, self._logits, self._pending = bound, hooks, logits, pending

    def finish(self):
        """Append the tokens -> the logits after the last one, [n_vocab].

        Or a sampling.Picked, if the runner has sampled. None: nothing was wanted.
        """
        session = self._session
        try:
            if session.n_past != self._n_past:
                raise PydsaError("A step before this one failed; its tokens are not in the context.")
            with session._explaining(lambda: (self._bound, self.ids, self._n_past)):
                picked = self._pending.finish()
        except BaseException:       # an interruption too: nothing of it must be under way when others begin
            self._pending.drop()
            raise
        finally:
            session._under_way.remove(self)
        session.append(self.ids.tolist())
        for hook in self._hooks:
            hook.completed(self.ids, np.arange(self._n_past, session.n_past))
        return picked[0] if picked and picked[0] else self._logits[-1] if len(self._logits) else None

    def drop(self):
        """Wait for the end; the tokens are not appended."""
        try:
            self._pending.drop()
        finally:
            self._session._under_way.remove(self)


def in_ubatches(ids, n_ubatch, depth, begin, done=None):
    """Run ids in ubatches, `depth` of which are under way at once.

    begin(start, ubatch) -> the Step of ids[start:start + n_ubatch]. done(n) is called with the number of ids whose steps are finished. If
    one fails, those that were begun after it are dropped.
    """
    begun = collections.deque()

    def finish():
        begun.popleft().finish()
        if done is not None and begun:
            done(start_of_next - sum(step.ids.size for step in begun))

    try:
        for start in range(0, ids.size, n_ubatch):
            if len(begun) == depth:
                finish()
            begun.append(begin(start, ids[start:start + n_ubatch]))
            start_of_next = start + begun[-1].ids.size
        while begun:
            finish()
    finally:
        for step in begun:
            step.drop()
