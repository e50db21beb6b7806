"""Attention to all keys and the indexer's scores, from stored rows.

This is what a choice of keys is measured with. It is numpy's arithmetic, in the type of the queries: float32, or float64 on the reference.
"""
from typing import NamedTuple

import numpy as np

from pydsa.backends import reference
from pydsa.backends.host import cache_values
from pydsa.executor.graph import CacheRef
from pydsa.gguf.file import Tensor

AT_ONCE = 1 << 24       # products of a query with a key that are in memory at a time

# op -> where its arguments are: the queries, the cache, and for MLA's plain form the heads' keys
ATTENTION = {"dense_attention": None, "masked_attention": None, "sparse_attention": None, "mha_attention": 3, "mha_sparse_attention": 4}


def stored_values(cache, n, dtype=np.float32):
    """The first n rows of an executor.cache.VectorCache as floats, [n, width]."""
    rows = np.ascontiguousarray(cache.stored(n))
    return cache_values(rows.view(reference.cache_rows(0, cache.widths, cache.storage).dtype), dtype)


def _products(queries, keys):
    """Products of some tokens after the other: pairs (slice, [., heads, n_keys]).

    queries: [n, heads, width]. keys: [n_keys, width].
    """
    n, heads, width = queries.shape
    step = max(1, AT_ONCE // max(1, heads * len(keys)))
    for start in range(0, n, step):
        block = slice(start, start + step)
        yield block, (queries[block].reshape(-1, width) @ keys.T).reshape(-1, heads, len(keys))


def _later(positions, n_keys):
    """Whether a key comes after a token, bool [n, n_keys]."""
    return np.arange(n_keys) > positions[:, None]


class Attention(NamedTuple):
    """The attention of a layer in one step, before any choice of keys.

    queries: [n, heads, width], in latent space. keys: [n_keys, width]. positions: int64 [n]. scale: the factor of q . k.
    """
    queries: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    scale: float

    def _blocks(self):
        """Weights of some tokens after the other: pairs (slice, [., n_keys])."""
        for block, logits in _products(self.queries, self.keys):
            logits *= self.queries.dtype.type(self.scale)
            later = _later(self.positions[block], len(self.keys))
            logits[np.broadcast_to(later[:, None], logits.shape)] = -np.inf
            logits -= logits.max(axis=-1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=-1, keepdims=True)
            yield block, logits.mean(axis=1)

    def weights(self):
        """How much each token attends to each key, the mean over heads.

        [n, n_keys]; the sum of a row is 1. There is 0 for keys after the token.
        """
        return np.concatenate([weights for _, weights in self._blocks()])

    def mass(self, indices):
        """The share of the attention that chosen keys hold, [n].

        indices: int32 [n, k], -1 for none.
        """
        return np.concatenate([_taken(weights, indices[block], 0).sum(axis=1) for block, weights in self._blocks()])


def _taken(values, indices, otherwise):
    """The values at indices of each row, and another where an index is -1."""
    return np.where(indices >= 0, np.take_along_axis(values, np.maximum(indices, 0), axis=1), values.dtype.type(otherwise))


class Index(NamedTuple):
    """The indexer of a layer in one step.

    queries: [n, heads, width]. weights: [n, heads]. keys: [n_keys, width]. positions: int64 [n]. scale: the factor of the scores.
    """
    queries: np.ndarray
    weights: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    scale: float

    def _blocks(self):
        """Scores of some tokens after the other: pairs (slice, [., n_keys])."""
        for block, dots in _products(self.queries, self.keys):
            np.maximum(dots, 0, out=dots)
            scores = np.matmul(self.weights[block, None], dots)[:, 0] * self.queries.dtype.type(self.scale)
            scores[_later(self.positions[block], len(self.keys))] = -np.inf
            yield block, scores

    def scores(self):
        """The score of each key for each token, [n, n_keys].

        There is -inf for keys after the token.
        """
        return np.concatenate([scores for _, scores in self._blocks()])

    def scores_of(self, indices):
        """The scores of chosen keys, [n, k]; NaN where there is none.

        indices: int32 [n, k], -1 for none.
        """
        return np.concatenate([_taken(scores, indices[block], np.nan) for block, scores in self._blocks()])


def attention_of(call, caches):
    """The Attention of a hooks.Call of an attention op, copied.

    caches: those of the session. The form of attention makes no difference: queries of MLA's plain form are brought to latent space.
    """
    node, queries = call.node, np.array(call.read(1))
    ref = next(a for a in node.args if isinstance(a, CacheRef))
    if ATTENTION[node.op] is not None:
        k_b = node.args[ATTENTION[node.op]]
        heads = reference.weight(k_b.read()) if isinstance(k_b, Tensor) else k_b        # [heads, rank, n_nope]
        heads, n_nope = np.asarray(heads, queries.dtype), heads.shape[2]
        latent = np.matmul(queries[:, :, :n_nope].swapaxes(0, 1), heads.swapaxes(1, 2)).swapaxes(0, 1)
        queries = np.concatenate([latent, queries[:, :, n_nope:]], axis=2)
    return Attention(queries, stored_values(caches[ref], int(call.positions[-1]) + 1, queries.dtype), call.positions.copy(), node.args[-1])


def index_of(call, caches):
    """A function that returns the Index of a hooks.Call of an indexer.

    The queries and their weights are copied at once, as later ops write in their place. caches: those of the session.
    """
    queries, weights, positions = np.array(call.read(1)), np.array(call.read(2)), call.positions.copy()
    ref, scale = call.node.args[3], call.node.args[-1]
    return lambda: Index(queries, weights, stored_values(caches[ref], int(positions[-1]) + 1, queries.dtype), positions, scale)
