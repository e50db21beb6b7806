"""Batch runs tokens of several sessions in one step.

The weights are read once for all tokens; each token attends to the caches of its own session.
"""
import collections

import numpy as np

from pydsa.errors import DamagedWeightsError, PydsaError

KEPT = 32       # bound steps; one is as good for later tokens of the same sessions


class Batch:
    """Steps of sessions of one model, all made by its session().

    The logits that one gives are overwritten after the next one has given its own. (Fresh memory costs a page fault every 4 KiB.)
    """

    def __init__(self, runner, setup):
        self._runner, self._setup = runner, setup
        self._free, self._given = [], None      # arrays for logits: those that nobody reads, and that of the step that was finished last
        self._bound = collections.OrderedDict()     # (variant, *sessions) -> Bound of a token of each, the last used at the end

    def run(self, sessions, ids):
        """Append tokens to each session -> what came of it, for each.

        begin() and its finish().
        """
        return self.begin(sessions, ids).finish()

    def begin(self, sessions, ids, samplers=None, wanted=True, goes_on=False):
        """Begin the step that appends tokens to each session.

        Returns an object whose finish() gives for each what came of it: the logits after the last token, float32 [n_vocab], or a
        PydsaError, where the session has stayed as it was. sessions: different ones. ids: for each a list of ids of the vocabulary,
        together at most n_ubatch. samplers: for each a Sampler or None; where the runner samples, a sampling.Picked comes in place of the
        logits. wanted: whether anything is, where there is one session. goes_on: whether a step of the tokens that are picked comes next,
        which a runner that samples may begin by itself.
        """
        if any(session.has_hooks or session.variant for session in sessions):
            raise PydsaError("A session with hooks or a variant of its own cannot run together with others: give its tokens to its own "
                             "prefill() or decode().")
        results = [session.full(len(mine)) if session.n_begun + len(mine) > self._setup.n_ctx else None
                   for session, mine in zip(sessions, ids)]
        fit = [i for i, result in enumerate(results) if result is None]
        sessions, ids = [sessions[i] for i in fit], [list(ids[i]) for i in fit]
        samplers = [samplers[i] for i in fit] if samplers and self._runner.samples else [None] * len(fit)
        goes_on = goes_on and all(samplers) and all(len(mine) == 1 for mine in ids) and all(
            session.n_begun + 2 <= self._setup.n_ctx for session in sessions)
        step, rows = None, self._rows(len(sessions))
        if len(sessions) == 1 and not goes_on:
            step = _Single(sessions[0], ids[0], samplers[0], rows[:int(wanted)])
        elif sessions:
            step = _Joint(self, sessions, ids, samplers, goes_on, rows)
        return _Results(results, fit, step, lambda: self._give(rows))

    def step(self, sessions, ids, samplers, goes_on, logits):
        """Begin a step of several sessions -> the step of the runner.

        logits: where they belong, [n_sessions, n_vocab].
        """
        # The last tokens, whose logits are wanted, come behind all others: as parts of their own, which see what the others write.
        parts = [(session, mine[:-1], session.n_past) for session, mine in zip(sessions, ids) if len(mine) > 1]
        parts += [(session, mine[-1:], session.n_past + len(mine) - 1) for session, mine in zip(sessions, ids)]
        positions = np.array([first + i for _, some, first in parts for i in range(len(some))])
        tokens = [token for _, some, _ in parts for token in some]
        follow = {"follow": self._variant(positions.max() + 1)} if goes_on else {}
        return self._bind(parts, len(sessions)).begin(tokens, positions, logits, (), samplers, **follow)

    def _rows(self, n):
        """An array for the logits of n tokens, of any content."""
        shape = n, self._setup.config.n_vocab
        whole = self._free.pop() if self._free else np.empty(shape, np.float32)
        if whole.size < n * shape[1]:
            whole = np.empty(shape, np.float32)
        return whole.reshape(-1)[:n * shape[1]].reshape(shape)

    def _give(self, rows):
        """Use the array that was given before these rows again."""
        if self._given is not None:
            self._free.append(self._given)
        self._given = rows if rows.base is None else rows.base

    def _variant(self, n_past):
        return self._setup.schedule.variant(int(n_past), 1)

    def _bind(self, parts, n_outputs):
        """The Bound of a step, in the form that the longest context needs.

        A token of a context of up to top_k keys chooses all of them there: its sums are those of the form that it takes alone.
        """
        variant = self._variant(max(first + len(some) for _, some, first in parts) - 1)
        repeats = len(parts) == n_outputs
        key = variant, *(session for session, _, _ in parts)
        bound = self._bound.pop(key, None) if repeats else None
        if bound is None:
            bound = self._runner.bind_together(variant, [(session.caches, len(some)) for session, some, _ in parts], n_outputs, repeats)
        if repeats:
            self._bound[key] = bound
            if len(self._bound) > KEPT:
                self._bound.popitem(last=False)
        return bound


class _Results:
    """What begin() returns: the results of the sessions whose tokens fit.

    give() is called where all of them are logits.
    """

    def __init__(self, results, fit, step, give):
        self._results, self._fit, self._step, self._give = results, fit, step, give

    def finish(self):
        """Wait for the step -> the results of all sessions."""
        answers = self._step.finish() if self._step else []
        if answers and not any(isinstance(answer, PydsaError) for answer in answers):   # after an error nobody knows who writes there
            self._give()
        for i, answer in zip(self._fit, answers):
            self._results[i] = answer
        return self._results


class _Single:
    """A step of one session."""

    def __init__(self, session, ids, sampler, logits):
        self._error = self._step = None
        try:
            self._step = session.begin(ids, sampler, logits)
        except PydsaError as error:
            self._error = error

    def finish(self):
        try:
            return [self._error if self._step is None else self._step.finish()]
        except PydsaError as error:
            return [error]


class _Joint:
    """A step of several sessions, whose tokens are appended at its end."""

    def __init__(self, batch, sessions, ids, samplers, goes_on, logits):
        self._sessions, self._ids, self._logits = sessions, ids, logits
        try:
            self._step = batch.step(sessions, ids, samplers, goes_on, logits)
        except DamagedWeightsError:     # of one of them, perhaps
            self._step = None

    def finish(self):
        try:
            if self._step is None:
                return self._each_alone()
            picked = self._step.finish() or [None] * len(self._sessions)
        except DamagedWeightsError:
            return self._each_alone()
        for session, mine in zip(self._sessions, self._ids):
            session.append(mine)
        return [logits if one is None else one for one, logits in zip(picked, self._logits)]

    def _each_alone(self):
        return [_Single(session, mine, None, None).finish()[0] for session, mine in zip(self._sessions, self._ids)]
