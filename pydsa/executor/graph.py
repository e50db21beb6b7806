"""Graph records what a model computes, once.

It has one method for each op of backends/reference.py. plan.py assigns memory to a graph's values and runs it. A graph holds nothing that
changes from token to token: ids, or hidden rows, and positions are inputs, and the session provides the caches.
"""
from typing import NamedTuple

import numpy as np


class Value:
    """An intermediate value [n_rows, *tail]; with a base, a view of another.

    rows: "tokens", one row for each token of the step, or "outputs", one for each of the last tokens, whose logits are wanted
    (Graph.last_rows). dtype: "float" (the backend's), "int32" or "int64".
    """

    def __init__(self, name, tail, dtype="float", rows="tokens", base=None, view=None):
        self.name, self.tail, self.dtype, self.rows, self.base, self._view = name, tuple(tail), dtype, rows, base, view

    @property
    def root(self):
        """The value that owns the memory of this view."""
        return self if self.base is None else self.base.root

    def slice(self, start, stop):
        """A view of columns start..stop of the last axis."""
        return Value(self.name, (*self.tail[:-1], stop - start), self.dtype, self.rows, self, lambda a, n: a[..., start:stop])

    def reshape(self, *tail):
        """A view of the same values with rows of another shape."""
        assert np.prod(tail) == np.prod(self.tail), (self.name, self.tail, tail)
        return Value(self.name, tail, self.dtype, self.rows, self, lambda a, n: a.reshape(len(a), *tail))

    def array(self, roots, n_outputs):
        """The array of this value, for one step.

        roots: root Value -> array. n_outputs: the number of rows whose logits are wanted.
        """
        return roots[self] if self.base is None else self._view(self.base.array(roots, n_outputs), n_outputs)


class CacheRef(NamedTuple):
    """A reference to a cache of the session that runs the graph."""
    kind: str       # "latents" or "index_keys"
    layer: int


class Node(NamedTuple):
    """A call of one op, which writes its first n_out arguments."""
    op: str
    name: str
    args: tuple
    n_out: int = 1

    @property
    def writes(self):
        """The indices of the arguments that the op writes."""
        return range(self.n_out) if self.n_out else (0,)       # without an output: a cache

    @property
    def of_one_context(self):
        """Whether the op takes only rows of one context: it has its cache."""
        return any(isinstance(a, CacheRef) for a in self.args)

    @property
    def for_outputs(self):
        """Whether the op computes only rows whose logits are wanted."""
        return any(isinstance(a, Value) and a.rows == "outputs" for a in self.args)


class Graph:
    """The nodes of a model in the order they run.

    A method for an op takes the name of the new value first, the name that llama.cpp gives it, records the op and returns the value.
    """

    def __init__(self, n_ctx):
        self.n_ctx = n_ctx
        self.nodes = []
        self.input = Value("inp_tokens", (), "int32")        # the ids, or what hidden() made of it
        self.positions = Value("inp_pos", (), "int64")
        self.output = None      # set by the model: the logits, or the rows that the next stage takes

    def _node(self, op, out, *args):
        self.nodes.append(Node(op, out.name, (out, *args)))
        return out

    def value(self, name, *tail, dtype="float", like=None):
        """A new value, which ops may write part by part.

        Its rows are those of the value `like`, or else the tokens.
        """
        return Value(name, tail, dtype, like.rows if like is not None else "tokens")

    def last_rows(self, x):
        """A view of the rows whose logits are wanted, the last of the step.

        The ops that follow compute only these rows.
        """
        if x.rows == "outputs":
            return x
        return Value(x.name, x.tail, x.dtype, "outputs", x, lambda a, n: a[len(a) - n:])

    def _positions_of(self, x):
        """The positions of the rows of a value."""
        return self.positions if x.rows == "tokens" else self.last_rows(self.positions)

    def hidden(self, name, width):
        """The rows that the stage before gives, in place of ids, as a value."""
        self.input = self.value(name, width)
        return self.input

    def get_rows(self, name, w):
        return self._node("get_rows", self.value(name, w.shape[1]), w, self.input)

    def rms_norm(self, name, x, w, eps, into=None):
        return self._node("rms_norm", into or self.value(name, *x.tail, like=x), x, w, eps)

    def layer_norm(self, name, x, w, b, eps):
        return self._node("layer_norm", self.value(name, *x.tail, like=x), x, w, b, eps)

    def linear(self, name, w, x):
        assert w.shape[1:] == x.tail, (name, w.shape, x.tail)
        return self._node("linear", self.value(name, w.shape[0], like=x), w, x)

    def head_linear(self, name, w, x, into=None):
        assert (w.shape[0], w.shape[2]) == x.tail, (name, w.shape, x.tail)
        return self._node("head_linear", into or self.value(name, *w.shape[:2], like=x), w, x)

    def rope_table(self, name, freqs, magnitude):
        return self._node("rope_table", self.value(name, 2, freqs.size), self.positions, freqs, magnitude)

    def rope(self, x, table, neox, into=None):
        """Rotate x in place, or write to `into`, a value of the same shape."""
        return self._node("rope", into or x, x, table, neox)

    def hadamard(self, x):
        """Transform x in place."""
        return self._node("hadamard", x, x)

    def cache_write(self, cache, x):
        self.nodes.append(Node("cache_write", x.name, (cache, x, self.positions), 0))

    def indexer_scores(self, name, q, w, keys, scale):
        return self._node("indexer_scores", self.value(name, self.n_ctx, like=q), q, w, keys, self._positions_of(q), scale)

    def top_k(self, name, scores, k):
        return self._node("top_k", self.value(name, k, dtype="int32", like=scores), scores)

    def indexer_select(self, name, q, w, keys, k, scale):
        return self._node("indexer_select", self.value(name, k, dtype="int32", like=q), q, w, keys, self._positions_of(q), scale)

    def scatter_mask(self, name, indices):
        return self._node("scatter_mask", self.value(name, self.n_ctx, like=indices), indices, self._positions_of(indices))

    def dense_attention(self, name, q, latents, n_v, scale):
        return self._node("dense_attention", self.value(name, q.tail[0], n_v, like=q), q, latents, self._positions_of(q), scale)

    def masked_attention(self, name, q, latents, mask, n_v, scale):
        return self._node("masked_attention", self.value(name, q.tail[0], n_v, like=q), q, latents, mask, self._positions_of(q), scale)

    def sparse_attention(self, name, q, latents, indices, n_v, scale):
        return self._node("sparse_attention", self.value(name, q.tail[0], n_v, like=q), q, latents, indices, scale)

    def mha_attention(self, name, q, latents, k_b, v_b, scale):
        assert k_b.shape[:1] == v_b.shape[:1] == q.tail[:1] and k_b.shape[1] == v_b.shape[2], (name, k_b.shape, v_b.shape, q.tail)
        return self._node("mha_attention", self.value(name, *v_b.shape[:2]), q, latents, k_b, v_b, self.positions, scale)

    def mha_sparse_attention(self, name, q, latents, indices, k_b, v_b, scale):
        assert k_b.shape[:1] == v_b.shape[:1] == q.tail[:1] and k_b.shape[1] == v_b.shape[2], (name, k_b.shape, v_b.shape, q.tail)
        return self._node("mha_sparse_attention", self.value(name, *v_b.shape[:2]), q, latents, indices, k_b, v_b, self.positions, scale)

    def moe_route(self, names, logits, n_used, bias, *rule):
        ids, weights = self.value(names[0], n_used, dtype="int32", like=logits), self.value(names[1], n_used, like=logits)
        self.nodes.append(Node("moe_route", names[1], (ids, weights, logits, bias, *rule), 2))
        return ids, weights

    def moe_gate_up(self, name, x, ids, gate, up):
        return self._node("moe_gate_up", self.value(name, *ids.tail, gate.shape[1], like=ids), x, ids, gate, up)

    def moe_linear(self, name, x, ids, w):
        return self._node("moe_linear", self.value(name, *ids.tail, w.shape[1], like=ids), x, ids, w)

    def expert_scale(self, x, ids, factors):
        """Multiply x in place."""
        return self._node("expert_scale", x, x, ids, factors)

    def moe_down(self, name, hidden, ids, weights, down):
        return self._node("moe_down", self.value(name, down.shape[1], like=ids), hidden, ids, weights, down)

    def silu_mul(self, name, gate, up):
        return self._node("silu_mul", self.value(name, *gate.tail, like=gate), gate, up)

    def scale(self, x, factor):
        """Multiply x in place."""
        heads = x if len(x.tail) == 2 else x.reshape(1, *x.tail)
        self._node("scale", heads, heads, factor)
        return x

    def add(self, name, x, y):
        return self._node("add", self.value(name, *x.tail, like=x), x, y)


class _OneRow(dict):
    """An array of one row for each root Value, to see which views overlap."""

    def __missing__(self, value):
        self[value] = np.empty((1, *value.tail), np.int8)
        return self[value]


def waits(nodes):
    """For each node, the indices of the earlier ones that it waits for.

    It reads what they write, or writes what they read or write.
    """
    accesses, found = {}, []        # root Value or CacheRef -> [(index, view, whether it is written)]
    roots = _OneRow()
    for index, node in enumerate(nodes):
        before, mine = set(), []
        for i, a in enumerate(node.args):
            if isinstance(a, (Value, CacheRef)):
                key, view = (a.root, a.array(roots, 1)) if isinstance(a, Value) else (a, None)
                writes = i in node.writes
                mine.append((key, view, writes))
                before.update(earlier for earlier, other, written in accesses.get(key, ())
                              if (writes or written) and (view is None or np.shares_memory(view, other)))
        for key, view, writes in mine:
            accesses.setdefault(key, []).append((index, view, writes))
        found.append(sorted(before))
    return found


def levels_of(before):
    """How many others each node must wait for, one after the other.

    before: what waits() returns. Nodes of equal levels do not depend on each other: they could run at the same time.
    """
    found = []
    for others in before:
        found.append(max((found[j] + 1 for j in others), default=0))
    return found
