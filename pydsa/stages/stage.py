"""Stage runs a range of a model's layers, for the sessions of a Pipeline."""
import collections

import numpy as np

from pydsa.diagnosis import explained
from pydsa.errors import DamagedWeightsError, PydsaError
from pydsa.executor.schedule import HEAD
from pydsa.model import Model

KEPT = 64       # bound steps; one is as good for later tokens of the same sessions


class Stage:
    """The layers of a Setup in this process, and the caches of all sessions.

    setup: of the layers. first, last: whether it has the model's first layer, and the last. has_head: whether it makes logits. n_embd: the
    width of hidden rows. float: their dtype. model: the Model of the layers, whose own sessions are of no use where they are not all.
    threads, threads_batch, progress: as for Model. Raises the errors of load().
    """

    def __init__(self, setup, threads=None, threads_batch=None, progress=None):
        self.setup, self.n_embd, (self.first, self.last) = setup, setup.config.n_embd, setup.ends
        self.has_head = setup.has_head
        self.model = Model(setup, threads, threads_batch, progress)
        self.float = np.dtype(self.model.backend.FLOAT)
        self._caches = {}       # number of a session -> its caches
        self._bound = collections.OrderedDict()     # (variant, *numbers of sessions) -> Bound of a token of each, the last used at the end

    def open(self, number):
        """Make the caches of a session.

        Raises OutOfMemoryError if they do not fit.
        """
        self.close(number)
        runner, setup = self.model.runner, self.setup
        runner.check_room(setup, 1, "the caches of a new session")
        self._caches[number] = runner.make_caches(setup, setup.n_ctx)

    def check_room(self, n, what):
        """Raise OutOfMemoryError if the caches of n more sessions do not fit."""
        self.model.runner.check_room(self.setup, n, what)

    def close(self, number):
        """Free the caches of a session, if there are any."""
        self._caches.pop(number, None)
        for key in [key for key in self._bound if number in key[1:]]:
            del self._bound[key]

    @property
    def sessions(self):
        """The numbers of the open sessions."""
        return tuple(self._caches)

    def caches(self, number):
        """The caches of a session, {CacheRef: VectorCache}.

        Raises PydsaError for a session that is not open.
        """
        if number not in self._caches:
            raise PydsaError(f"The session {number} is not open in the stage of layers {self.setup.layers.start} to "
                             f"{self.setup.layers.stop - 1}.")
        return self._caches[number]

    def stored(self, number, ref, start, stop):
        """Rows of a cache as VectorCache.stored() returns them."""
        return self.caches(number)[ref].stored(stop, start)

    def restore(self, number, ref, start, rows):
        """Overwrite rows of a cache as VectorCache.restore() does."""
        self.caches(number)[ref].restore(rows, start)

    def run(self, parts, variant, inputs, positions, n_outputs):
        """Run one step -> hidden rows, or float32 logits [n_outputs, n_vocab].

        parts: pairs of a session's number and its tokens' count, in the order of the tokens, as for Runner.bind_together(). inputs: the ids
        of the tokens, int32 [n_tokens], in the first stage, else their hidden rows. positions: int64 [n_tokens]. n_outputs: how many of the
        last tokens have logits; the last stage returns these or, without the head, their rows. Raises DamagedWeightsError, with the place,
        if a value that is not finite was met.
        """
        n_tokens = sum(n for _, n in parts)
        assert len(inputs) == len(positions) == n_tokens
        n_rows = n_outputs if self.last else n_tokens
        return self._ran(self._bind(parts, variant, n_tokens, n_rows), inputs, positions, n_rows, self.last and self.has_head)

    def head(self, parts, rows, positions):
        """The logits of rows that the last stage gave, float32 [n, n_vocab].

        parts: of these rows alone. For the first stage, if it has the head of a model whose last layer is in another one.
        """
        return self._ran(self._bind(parts, HEAD, len(rows), len(rows)), rows, positions, len(rows), True)

    def _ran(self, bound, inputs, positions, n_rows, logits):
        """What a bound step writes."""
        out = np.empty((n_rows, self.setup.config.n_vocab if logits else self.n_embd), np.float32 if logits else self.float)
        try:
            bound.run(inputs, positions, out)
            if not np.isfinite(out).all():
                raise DamagedWeightsError("the results of a step are not finite: the weights are damaged, or a computation overflowed")
        except DamagedWeightsError as error:
            raise explained(error, bound, inputs, positions, self.setup.weights.used) from error
        return out

    def _bind(self, parts, variant, n_tokens, n_outputs):
        """The Bound of a step; those of one token for each session are kept."""
        repeats = all(n == 1 for _, n in parts) and n_outputs == n_tokens
        key = variant, *(number for number, _ in parts)
        bound = self._bound.pop(key, None) if repeats else None
        if bound is None:
            bound = self.model.runner.bind_together(variant, [(self.caches(number), n) for number, n in parts], n_outputs, repeats)
        if repeats:
            self._bound[key] = bound
            if len(self._bound) > KEPT:
                self._bound.popitem(last=False)
        return bound
