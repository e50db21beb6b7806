"""Batch runs tokens of several sessions in one step.

The weights are read once for all tokens; each token attends to the caches of its own session.
"""
import collections

import numpy as np

from pydsa.errors import DamagedWeightsError, PydsaError

KEPT = 32       # bound steps; one is as good for later tokens of the same sessions


class Batch:
    """Steps of sessions of one model, all made by its session()."""

    def __init__(self, runner, setup):
        self._runner, self._setup = runner, setup
        self._bound = collections.OrderedDict()     # (variant, *sessions) -> Bound of a token of each, the last used at the end

    def run(self, sessions, ids):
        """Append tokens to each session -> what came of it, for each.

        That is the logits after the last one, float32 [n_vocab], or a PydsaError, where the session has stayed as it was. sessions:
        different ones. ids: for each a list of ids of the vocabulary, together at most n_ubatch.
        """
        if any(session.has_hooks or session.variant for session in sessions):
            raise PydsaError("A session with hooks or a variant of its own cannot run together with others: give its tokens to its own "
                             "prefill() or decode().")
        results = [session.full(len(mine)) if session.n_past + len(mine) > self._setup.n_ctx else None
                   for session, mine in zip(sessions, ids)]
        fit = [i for i, result in enumerate(results) if result is None]
        for i, answer in zip(fit, self._step([sessions[i] for i in fit], [list(ids[i]) for i in fit])):
            results[i] = answer
        return results

    def _step(self, sessions, ids):
        if len(sessions) < 2:
            return [_alone(session, mine) for session, mine in zip(sessions, ids)]
        logits = np.empty((len(sessions), self._setup.config.n_vocab), np.float32)
        # The last tokens, whose logits are wanted, come behind all others: as parts of their own, which see what the others write.
        parts = [(session, mine[:-1], session.n_past) for session, mine in zip(sessions, ids) if len(mine) > 1]
        parts += [(session, mine[-1:], session.n_past + len(mine) - 1) for session, mine in zip(sessions, ids)]
        positions = np.concatenate([np.arange(first, first + len(some)) for _, some, first in parts])
        try:
            self._bind(parts, len(sessions)).run([token for _, some, _ in parts for token in some], positions, logits)
        except DamagedWeightsError:     # of one of them, perhaps
            return [_alone(session, mine) for session, mine in zip(sessions, ids)]
        for session, mine in zip(sessions, ids):
            session.append(mine)
        return list(logits)

    def _bind(self, parts, n_outputs):
        """The Bound of a step, in the form that the longest context needs.

        A token of a context of up to top_k keys chooses all of them there: its sums are those of the form that it takes alone.
        """
        variant = self._setup.schedule.variant(max(first + len(some) for _, some, first in parts) - 1, 1)
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


def _alone(session, ids):
    """The logits after some tokens, or a PydsaError."""
    try:
        return session.prefill(ids)
    except PydsaError as error:
        return error
