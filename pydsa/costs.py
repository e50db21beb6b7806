"""What an op must read and compute at least: a function for each op of backends/reference.py, with the step before its parameters.

Of intermediate values only those are counted that pass through ops that do little else: they may well lie in a cache of the machine.
"""
import math
from typing import NamedTuple

from pydsa.gguf_file import Tensor
from pydsa.graph import CacheRef, Value


class Cost(NamedTuple):
    """Bytes, and the operations of products: a multiplication and an addition are two. Exponentials and the like are not counted."""
    weights: int = 0        # bytes read, each once
    cache: int = 0          # bytes read, each once
    values: int = 0         # bytes of intermediates read and written, of the ops that only move or change them
    operations: int = 0

    @property
    def n_bytes(self):
        return self.weights + self.cache + self.values


class StepSize(NamedTuple):
    """The sizes of one step."""
    n_tokens: int
    n_past: int
    row_bytes: dict         # CacheRef -> bytes of a row
    experts: dict = {}      # Value with ids of experts -> how many different ones are in it, where that is known
    n_outputs: int = 1
    float_size: int = 4

    @property
    def n_kv(self):
        """Tokens in the context at the end."""
        return self.n_past + self.n_tokens

    def rows(self, value):
        return self.n_tokens if value.rows == "tokens" else self.n_outputs

    def pairs(self, most):
        """Pairs of a token and a key: the token at position p has p + 1 keys, of which it uses `most` at most."""
        below = min(self.n_tokens, max(0, most - self.n_past))      # tokens that use all
        return below * self.n_past + below * (below + 1) // 2 + (self.n_tokens - below) * most


def node_cost(node, step):
    """The Cost of one node of a graph."""
    return globals()[node.op](step, *node.args)


def step_cost(nodes, step):
    """The Cost of a whole step. A matrix that is both the embedding and the output is read once, as the output."""
    whole = {node.args[1].name for node in nodes if node.op == "linear"}
    return total(node_cost(node, step) for node in nodes if node.op != "get_rows" or node.args[1].name not in whole)


def total(costs):
    """The sum of several."""
    return Cost(*map(sum, zip(*costs)))


def get_rows(s, out, w, ids):       # a row a token, though tokens may be equal
    return Cost(weights=s.rows(out) * (w.data.nbytes // w.shape[0]), values=_n_bytes(s, out))


def linear(s, out, w, x):
    return Cost(weights=w.data.nbytes, operations=2 * s.rows(x) * math.prod(w.shape))


def head_linear(s, out, w, x):
    return Cost(weights=w.data.nbytes, operations=2 * s.rows(x) * math.prod(w.shape))


def moe_gate_up(s, out, x, ids, gate, up):
    return total(_experts(s, ids, w) for w in (gate, up))


def moe_down(s, out, hidden, ids, weights, down):
    return _experts(s, ids, down)


def _experts(s, ids, w):
    """Each expert that is used is read once: as many as the step knows of, else those of one token, since all may choose the same."""
    n_expert, used = w.shape[0], ids.tail[0]
    return Cost(weights=s.experts.get(ids, used) * (w.data.nbytes // n_expert),
                operations=2 * s.n_tokens * used * math.prod(w.shape[1:]))


def indexer_scores(s, out, q, w, keys, positions, scale):       # a dot product a head and key, and their weighted sum
    n_head, width = q.tail
    return Cost(cache=s.n_kv * s.row_bytes[keys], operations=2 * s.pairs(s.n_kv) * n_head * (width + 1))


def indexer_select(s, out, q, w, keys, positions, scale):
    return indexer_scores(s, out, q, w, keys, positions, scale)


def dense_attention(s, out, q, latents, positions, scale):
    return _attention(s, out, q, latents, s.n_kv)


def masked_attention(s, out, q, latents, mask, positions, scale):       # it attends to all keys, too
    return _attention(s, out, q, latents, s.n_kv)


def sparse_attention(s, out, q, latents, indices, scale):
    return _attention(s, out, q, latents, indices.tail[0])


def mha_attention(s, out, q, latents, k_b, v_b, positions, scale):      # with a choice too it goes through all pairs
    attention = Cost(cache=s.n_kv * s.row_bytes[latents], operations=2 * s.pairs(s.n_kv) * q.tail[0] * (q.tail[1] + out.tail[1]))
    made = (Cost(weights=w.data.nbytes, operations=2 * s.n_kv * math.prod(w.shape)) for w in (k_b, v_b))
    return total([attention, *made])


def mha_sparse_attention(s, out, q, latents, indices, k_b, v_b, positions, scale):
    return mha_attention(s, out, q, latents, k_b, v_b, positions, scale)


def _attention(s, out, q, latents, most):
    """A token uses `most` keys at most; that many rows are read at least, since all tokens may choose the same."""
    n_head, width = q.tail
    return Cost(cache=min(most, s.n_kv) * s.row_bytes[latents], operations=2 * s.pairs(most) * n_head * (width + out.tail[-1]))


def _moves(s, *args):
    """Every array once; one that is changed in place is both `out` and `x`."""
    return Cost(weights=sum(a.data.nbytes for a in args if isinstance(a, Tensor)), values=sum(_n_bytes(s, a) for a in args))


rms_norm = layer_norm = silu_mul = add = rope_table = rope = hadamard = cache_write = moe_route = top_k = scatter_mask = _moves


def _n_bytes(s, a):
    """Bytes that a value takes, or the rows that a step writes to a cache; anything else is no intermediate."""
    if isinstance(a, CacheRef):
        return s.n_tokens * s.row_bytes[a]
    if isinstance(a, Value):
        return s.rows(a) * math.prod(a.tail) * {"float": s.float_size, "int32": 4, "int64": 8}[a.dtype]
    return 0
