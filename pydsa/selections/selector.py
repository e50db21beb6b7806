"""Replace the indexers' choices of keys by those of a user's function: session.select.

The function gets a Choice, one for each layer that has an indexer, in each step; layers that share a choice follow.
"""
import numpy as np

from pydsa.errors import PydsaError
from pydsa.executor.hooks import Hook, layer_of
from pydsa.selections.dense import attention_of, index_of

ATTENTION = ("sparse_attention", "mha_sparse_attention")
INDICES = 3     # their argument with the chosen keys


class Choice:
    """What a function that chooses keys can see of a layer and a step.

    layer: its number. positions: int64 [n], those of the step's n tokens. top_k: the most keys that a token may choose. n_keys: how many
    keys there are, those of all tokens up to the last one; a token sees those up to its own position. indices: int32 [n, k], what the
    indexer chose, ascending, -1 at the end.
    """

    def __init__(self, layer, positions, top_k, indices, sources):
        self.layer, self.positions, self.top_k, self.indices = layer, positions, top_k, indices
        self.n_keys = int(positions[-1]) + 1
        self._sources = sources     # {name: function that makes an array, or the array once it is made}

    def scores(self):
        """The indexer's score of each key, float32 [n, n_keys].

        There is -inf for keys that a token does not see. They are computed from the stored keys, once for each Choice.
        """
        return self._once("scores")

    def attention(self):
        """How much each token would attend to each key, if it attended to all.

        float32 [n, n_keys], the mean over heads; the sum of a row is 1. It is computed once for each Choice, in float32 by numpy, which
        takes long for long prompts.
        """
        return self._once("attention")

    def _once(self, name):
        if name not in self._sources:
            raise PydsaError(f"{name}() of a Choice was called after its step had gone on; call it inside of the function that chooses.")
        if callable(self._sources[name]):
            self._sources[name] = self._sources[name]()
        return self._sources[name]

    def within(self, top_k):
        """The same Choice where a token may choose only top_k keys.

        Its `indices` are still the indexer's.
        """
        return Choice(self.layer, self.positions, top_k, self.indices, self._sources)


def name_of(select):
    """The name of a function that chooses keys, for messages."""
    return getattr(select, "__name__", type(select).__name__)


def checked(select, chosen, positions, top_k):
    """What a function chose, as the kernels take it: int32 [n, top_k].

    chosen: integers [n, m] in any order, -1 for none; or bool [n, n_keys], a mask; or a list of n lists of integers. Keys that come twice
    count once. Raises PydsaError if it is anything else, or has a key that a token does not see, or more than top_k for one.
    """
    def fail(text):
        raise PydsaError(f"session.select: {name_of(select)} {text}.")

    n, n_keys = len(positions), int(positions[-1]) + 1
    try:
        rows = [np.asarray(row) for row in chosen]
    except (TypeError, ValueError):
        rows = []
    if len(rows) != n or any(row.ndim != 1 for row in rows):
        fail(f"returned {type(chosen).__name__} of another shape than expected: a row of keys for each of {n} tokens")
    found = np.full((n, top_k), -1, np.int32)
    for out, row, position in zip(found, rows, positions.tolist()):
        if row.dtype == np.bool_:
            if len(row) != n_keys:
                fail(f"returned a mask of {len(row)} keys, expected {n_keys}")
            keys = np.flatnonzero(row)
        elif row.size and row.dtype.kind not in "iu":
            fail(f"returned {row.dtype}, expected integers or a mask of bool")
        else:
            keys = np.unique(row[row != -1])
        if keys.size and not 0 <= keys[0] <= keys[-1] <= position:
            wrong = keys[0] if keys[0] < 0 else keys[-1]
            fail(f"chose key {wrong} for the token at position {position}, expected 0 to {position}, or -1 for none")
        if keys.size > top_k:
            fail(f"chose {keys.size} keys for the token at position {position}, but only {top_k} fit: choose fewer, or load the model with "
                 "a larger dsa_top_k")
        out[:keys.size] = keys
    return found


class Selector(Hook):
    """Calls a function before a layer's attention, and puts its keys in place."""

    def __init__(self, select, caches, layers):
        self.select, self._caches, self._layers = select, caches, layers
        self._indices = self._index = None

    def wants(self, node):
        return layer_of(node) in self._layers and node.op in ("indexer_select", *ATTENTION)

    def after(self, call):
        if call.node.op == "indexer_select":        # its layer's attention comes next
            self._indices, self._index = np.array(call.read(0)), index_of(call, self._caches)

    def before(self, call):
        if call.node.op in ATTENTION:
            indices, index, self._index = self._indices, self._index, None
            sources = {"scores": lambda: index().scores(), "attention": lambda: attention_of(call, self._caches).weights()}
            choice = Choice(layer_of(call.node), call.positions.copy(), indices.shape[1], indices, sources)
            chosen = checked(self.select, self.select(choice), call.positions, indices.shape[1])
            for name in [name for name, source in sources.items() if callable(source)]:
                del sources[name]       # what it would be made of changes from here on
            call.write(INDICES, chosen)


def check_select(select, setup):
    """Raise PydsaError if `select` is no function, or nothing can be chosen."""
    if select is None:
        return
    if not callable(select):
        raise PydsaError(f"session.select is {select!r}, expected a function of a Choice, or None.")
    if setup.config.top_k is None:
        raise PydsaError(f"{setup.config.architecture} has no indexer whose choice session.select could replace.")
    if not setup.schedule.selects:
        advice = "attention='sparse'"
        if setup.attention == "auto":
            advice += f" or with a context (n_ctx) of more than top_k, {setup.config.top_k}, tokens"
        raise PydsaError(f"With attention={setup.attention!r} and a context of {setup.n_ctx} no step takes a list of keys that "
                         f"session.select could replace: load the model with {advice}.")
