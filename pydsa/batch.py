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
        results, groups = [None] * len(sessions), collections.defaultdict(list)
        for i, session in enumerate(sessions):
            if session.n_past == self._setup.n_ctx:
                results[i] = session.full(1)
            else:
                groups[self._setup.schedule.variant(session.n_past, 1)].append(i)
        for variant, chosen in groups.items():
            answers = self._step(variant, [sessions[i] for i in chosen], [tokens[i] for i in chosen])
            for i, answer in zip(chosen, answers):
                results[i] = answer
        return results

    def _step(self, variant, sessions, tokens):
        if len(sessions) == 1:
            return [_alone(*sessions, *tokens)]
        logits = np.empty((len(sessions), self._setup.config.n_vocab), np.float32)
        try:
            self._bind(variant, sessions).run(tokens, [session.n_past for session in sessions], logits)
        except DamagedWeightsError:     # of one of them, perhaps
            return [_alone(session, token) for session, token in zip(sessions, tokens)]
        for session, token in zip(sessions, tokens):
            session.tokens.append(token)
        return list(logits)

    def _bind(self, variant, sessions):
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
