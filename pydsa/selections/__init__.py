"""Ways to choose keys, for session.select: windows, chance, an oracle, and unions.

    session.select = pydsa.selections.sliding_window(64, sinks=4)

A way is a function of a selector.Choice that returns the keys of each token.
"""
import numbers

import numpy as np

from pydsa.errors import PydsaError
from pydsa.options import counts
from pydsa.selections.selector import checked, name_of


def best(choice, values):
    """The keys with the greatest values that a token sees, int [n, k].

    values: [n, n_keys]. -1 stands where there is none.
    """
    k = min(choice.top_k, choice.n_keys)
    values = np.where(np.arange(choice.n_keys) > choice.positions[:, None], -np.inf, values)
    found = np.argpartition(-values, k - 1, axis=1)[:, :k]
    return np.where(np.take_along_axis(values, found, axis=1) > -np.inf, found, -1)


def indexer(choice):
    """What the model's own indexer chooses."""
    return choice.indices if choice.top_k >= choice.indices.shape[1] else best(choice, choice.scores())


def _named(text, function):
    function.__name__ = function.__qualname__ = text
    return function


def sliding_window(n, sinks=0):
    """The last n keys, the token's own among them, and the first `sinks`."""
    counts(2**31 - 1, n=n, sinks=sinks or None)

    def choose(choice):
        last = choice.positions[:, None] - np.arange(n)
        first = np.broadcast_to(np.arange(sinks), (len(last), sinks))
        return np.concatenate([np.maximum(last, -1), np.where(first <= choice.positions[:, None], first, -1)], axis=1)
    return _named(f"sliding_window({n}, sinks={sinks})" if sinks else f"sliding_window({n})", choose)


def random(seed=0):
    """Any top_k keys; the same ones whenever a token is run.

    Raises PydsaError for a seed that is not an integer from 0 on.
    """
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise PydsaError(f"The seed is {seed!r}, expected an integer from 0 on.")

    def choose(choice):
        return [np.random.default_rng([seed, choice.layer, position]).permutation(position + 1)[:choice.top_k]
                for position in choice.positions.tolist()]
    return _named(f"random({seed})", choose)


def oracle():
    """The keys that attention to all keys would attend to most.

    That is the mean over heads. It takes as long as such attention in numpy.
    """
    return _named("oracle()", lambda choice: best(choice, choice.attention()))


def every_key():
    """All keys; where there are more than top_k, that is an error."""
    return _named("every_key()", lambda choice: np.arange(choice.n_keys) <= choice.positions[:, None])


def union(first, second, share=0.5):
    """The keys of two ways together, which share the top_k keys.

    `first` may choose this share of them, at least one, and `second` the rest. Raises PydsaError for a share that is not above 0 and below
    1.
    """
    if not (isinstance(share, numbers.Real) and 0 < share < 1):
        raise PydsaError(f"The share of the first way is {share!r}, expected a number above 0 and below 1.")

    def choose(choice):
        k = min(max(1, round(share * choice.top_k)), choice.top_k - 1)
        if k == 0:
            raise PydsaError("A union of two ways needs a top_k of at least 2.")
        both = [checked(way, way(choice.within(n)), choice.positions, n) for way, n in ((first, k), (second, choice.top_k - k))]
        return np.concatenate(both, axis=1)
    return _named(f"union({name_of(first)}, {name_of(second)})", choose)
