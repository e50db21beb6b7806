"""The least that each op must read and compute.

There is one function for each op of backends/reference.py, with the step before the op's parameters. Intermediate values are counted only
for ops that mainly move them, as they may be in a cache of the machine.
"""
import math
from typing import NamedTuple

from pydsa.executor.graph import CacheRef, Value
from pydsa.gguf.file import Tensor


class Cost(NamedTuple):
    """Bytes and arithmetic operations of one op or of several.

    A multiplication and an addition count as two operations. Exponentials and similar functions are not counted.
    """
    weights: int = 0        # bytes of weights, each read once
    cache: int = 0          # bytes of cache rows, each read once
    values: int = 0         # bytes of intermediate values read and written, by the ops that only move or change them
    operations: int = 0     # of products

    @property
    def n_bytes(self):
        """All bytes: weights, cache rows and intermediate values."""
        return self.weights + self.cache + self.values


class StepSize(NamedTuple):
    """The sizes of one step."""
    n_tokens: int
    n_past: int
    row_bytes: dict         # CacheRef -> bytes of a cache row
    experts: dict = {}      # Value with expert ids -> the number of different experts in it, where known
    n_outputs: int = 1
    float_size: int = 4

    @property
    def n_kv(self):
        """Tokens in the context after the step."""
        return self.n_past + self.n_tokens

    def rows(self, value):
        """The number of rows of a graph's Value."""
        return self.n_tokens if value.rows == "tokens" else self.n_outputs

    def of(self, value):
        """The part of this step that computes the rows of a Value, the last ones."""
        n = self.rows(value)
        return self._replace(n_tokens=n, n_past=self.n_kv - n)

    def pairs(self, most):
        """The number of pairs of a token and a key it attends to.

        The token at position p has p + 1 keys, and attends to `most` of them at most.
        """
        below = min(self.n_tokens, max(0, most - self.n_past))      # tokens that attend to all their keys
        return below * self.n_past + below * (below + 1) // 2 + (self.n_tokens - below) * most


def node_cost(node, step):
    """The Cost of one node of a graph."""
    return globals()[node.op](step, *node.args)


def step_cost(nodes, step):
    """The Cost of a whole step.

    A matrix that is both the embedding and the output is counted once, as the output.
    """
    read_whole = {node.args[1].name for node in nodes if node.op == "linear"}
    return total(node_cost(node, step) for node in nodes if node.op != "get_rows" or node.args[1].name not in read_whole)


def total(costs):
    """The sum of several Costs."""
    return Cost(*map(sum, zip(*costs)))


def get_rows(s, out, w, ids):       # one row a token, also where ids are equal
    return Cost(weights=s.rows(out) * (w.data.nbytes // w.shape[0]), values=_n_bytes(s, out))


def linear(s, out, w, x):
    return Cost(weights=w.data.nbytes, operations=2 * s.rows(x) * math.prod(w.shape))


def head_linear(s, out, w, x):
    return Cost(weights=w.data.nbytes, operations=2 * s.rows(x) * math.prod(w.shape))


def moe_gate_up(s, out, x, ids, gate, up):
    return total(_experts(s, ids, w) for w in (gate, up))


def moe_linear(s, out, x, ids, w):
    return _experts(s, ids, w)


def moe_down(s, out, hidden, ids, weights, down):
    return _experts(s, ids, down)


def _experts(s, ids, w):
    """The Cost of the chosen experts' matrices, each read once.

    Their number is step.experts[ids] where known, else that of one token, as all tokens may choose the same experts.
    """
    n_expert, used = w.shape[0], ids.tail[0]
    return Cost(weights=s.experts.get(ids, used) * (w.data.nbytes // n_expert),
                operations=2 * s.rows(ids) * used * math.prod(w.shape[1:]))


def indexer_scores(s, out, q, w, keys, positions, scale):       # a dot product for each head and key, and their weighted sum
    n_head, width = q.tail
    return Cost(cache=s.n_kv * s.row_bytes[keys], operations=2 * s.of(q).pairs(s.n_kv) * n_head * (width + 1))


def indexer_select(s, out, q, w, keys, positions, scale):
    return indexer_scores(s, out, q, w, keys, positions, scale)


def dense_attention(s, out, q, latents, positions, scale):
    return _attention(s, out, q, latents, s.n_kv)


def masked_attention(s, out, q, latents, mask, positions, scale):       # it attends to all keys too
    return _attention(s, out, q, latents, s.n_kv)


def sparse_attention(s, out, q, latents, indices, scale):
    return _attention(s, out, q, latents, indices.tail[0])


def mha_attention(s, out, q, latents, k_b, v_b, positions, scale):      # it computes all pairs, also of mha_sparse_attention
    attention = Cost(cache=s.n_kv * s.row_bytes[latents], operations=2 * s.pairs(s.n_kv) * q.tail[0] * (q.tail[1] + out.tail[1]))
    keys_and_values = (Cost(weights=w.data.nbytes, operations=2 * s.n_kv * math.prod(w.shape)) for w in (k_b, v_b))
    return total([attention, *keys_and_values])


def mha_sparse_attention(s, out, q, latents, indices, k_b, v_b, positions, scale):
    return mha_attention(s, out, q, latents, k_b, v_b, positions, scale)


def _attention(s, out, q, latents, most):
    """The Cost of absorbed attention to `most` keys a token at most.

    At least that many rows are read, as all tokens may choose the same keys.
    """
    n_head, width = q.tail
    return Cost(cache=min(most, s.n_kv) * s.row_bytes[latents], operations=2 * s.of(q).pairs(most) * n_head * (width + out.tail[-1]))


def _moves(s, *args):
    """The Cost of an op that reads or writes each of its arrays once.

    An array that is changed in place counts twice, as `out` and as `x`.
    """
    return Cost(weights=sum(a.data.nbytes for a in args if isinstance(a, Tensor)), values=sum(_n_bytes(s, a) for a in args))


scale = expert_scale = _moves
rms_norm = layer_norm = silu_mul = add = rope_table = rope = hadamard = cache_write = moe_route = top_k = scatter_mask = _moves


def _n_bytes(s, a):
    """Bytes of a Value, or of the rows that the step writes to a cache.

    0 for anything else.
    """
    if isinstance(a, CacheRef):
        return s.n_tokens * s.row_bytes[a]
    if isinstance(a, Value):
        return s.rows(a) * math.prod(a.tail) * {"float": s.float_size, "int32": 4, "int64": 8}[a.dtype]
    return 0
