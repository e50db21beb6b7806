"""Recordings written by hand, and a vocabulary, for tests of pydsa.look."""
from types import SimpleNamespace

import numpy as np

from pydsa.text.tokenizer import CONTROL, NORMAL


class Words:
    """A tokenizer whose tokens are given as bytes.

    Those that begin with <| are control tokens.
    """

    def __init__(self, *tokens):
        self.data = [token.encode() if isinstance(token, str) else token for token in tokens]
        self.n_vocab = len(self.data)
        self.token_type = np.array([CONTROL if data.startswith(b"<|") else NORMAL for data in self.data])

    def token_bytes(self, token):
        return self.data[token]

    def decode(self, ids, skip_special=False):
        return b"".join(self.data[i] for i in ids if not (skip_special and self.token_type[i] == CONTROL)).decode(errors="replace")


def recording(tokens, selection, scores=None, experts=None, mass=None, first=0, all_keys=None, name="a model", n_expert=4, shared=None):
    """A Recording by hand: tokens from position `first` on; the others are {layer: rows}."""
    n, layers = len(tokens), sorted({*(selection or {}), *(experts or {})})
    top_k = None if selection is None else next(iter(selection.values())).shape[1]
    indexed = {layer: layer for layer in layers} | (shared or {})
    facts = SimpleNamespace(name=name, architecture="deepseek32", n_expert=n_expert, n_vocab=1 + max(tokens, default=0), top_k=top_k,
                            n_left=0)
    return SimpleNamespace(positions=np.arange(first, first + n), tokens=np.array(tokens, np.int32), top_k=top_k, layers=layers,
                           indexed_layers=indexed, all_keys=np.zeros(n, bool) if all_keys is None else all_keys, selection=selection,
                           scores=scores, experts=experts, mass=mass, facts=facts)


def random_recording(n, k, layers, n_vocab, seed=0, scored=True):
    """Tokens that each chose k keys beside each other, somewhere.

    There is -1 where there are fewer.
    """
    random, positions, selection, scores = np.random.default_rng(seed), np.arange(n), {}, {}
    for layer in layers:
        first = random.integers(0, np.maximum(positions - k + 1, 0) + 1)
        keys = first[:, None] + np.arange(k)
        selection[layer] = np.where(keys <= positions[:, None], keys, -1).astype(np.int32)
        scores[layer] = random.normal(size=(n, k)).astype(np.float32)
    return recording(random.integers(0, n_vocab, n).tolist(), selection, scores if scored else None)
