"""Batch decodes one token of each of several sessions in one step.

The weights are read once for all tokens; each token attends to the caches of its own session.
"""
import collections

import numpy as np

from pydsa.errors import DamagedWeightsError, PydsaError

KEPT = 32       # bound steps; one is as good for later steps of the same sessions


class Batch:
    """Steps of sessions of one model, all made by its session()."""

    def __init__(self, runner, setup):
        self._runner, self._setup = runner, setup
        self._bound = collections.OrderedDict()     # (variant, sessions) -> Bound, the last used at the end

    def decode(self, sessions, tokens):
        """Append a token to each session -> what came of it, for each.

        That is the logits after it, float32 [n_vocab], or a PydsaError, where the session has stayed as it was. sessions: different ones,
        at most n_ubatch. tokens: ids of the vocabulary.
        """
        results = [session.full(1) if session.n_past == self._setup.n_ctx else None for session in sessions]
        open_ = [i for i, result in enumerate(results) if result is None]
        for i, answer in zip(open_, self._step([sessions[i] for i in open_], [tokens[i] for i in open_])):
            results[i] = answer
        return results

    def _step(self, sessions, tokens):
        if len(sessions) < 2:
            return [_alone(session, token) for session, token in zip(sessions, tokens)]
        logits = np.empty((len(sessions), self._setup.config.n_vocab), np.float32)
        try:
            self._bind(sessions).run(tokens, [session.n_past for session in sessions], logits)
        except DamagedWeightsError:     # of one of them, perhaps
            return [_alone(session, token) for session, token in zip(sessions, tokens)]
        for session, token in zip(sessions, tokens):
            session.tokens.append(token)
        return list(logits)

    def _bind(self, sessions):
        """The Bound of a step, in the variant that the longest context needs.

        A token of a context of up to top_k keys chooses all of them there: its sums are those of the variant that it takes alone.
        """
        variant = self._setup.schedule.variant(max(session.n_past for session in sessions), 1)
        key = variant, *sessions
        bound = self._bound.pop(key, None)
        if bound is None:
            bound = self._runner.bind_together(variant, [session.caches for session in sessions], again=True)
        self._bound[key] = bound
        if len(self._bound) > KEPT:
            self._bound.popitem(last=False)
        return bound


def _alone(session, token):
    """The logits after a token, or a PydsaError."""
    try:
        return session.decode(token)
    except PydsaError as error:
        return error
