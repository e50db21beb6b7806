"""Attention to all keys and index scores, against the reference's ops."""
import numpy as np
import pytest
from helpers import nmse, normal, random_ids

from pydsa.backends import reference
from pydsa.executor.cache import VectorCache
from pydsa.executor.hooks import Hook, layer_of
from pydsa.quants import CACHE_TYPES
from pydsa.selections import dense

IDS = random_ids(60)
POSITIONS = np.arange(13, 20)


def cache(kv_type, *widths):
    """A cache with twenty rows."""
    made = VectorCache(reference, 24, widths, kv_type)
    reference.cache_write(made.rows, normal(20, sum(widths)).astype(np.float64), np.arange(20))
    return made


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
def test_weights_give_the_outputs_of_attention(monkeypatch, kv_type):
    """The sums of values are those of the op.

    There are more values than keys, so that no other weights have the same.
    """
    monkeypatch.setattr(dense, "AT_ONCE", 200)      # a few tokens at a time
    latents, q = cache(kv_type, 24, 8), normal(7, 3, 32).astype(np.float64)
    keys, out = dense.stored_values(latents, 20, np.float64), np.empty((7, 3, 24))
    attention = dense.Attention(q, keys, POSITIONS, 0.3)
    weights = attention.weights()
    reference.dense_attention(out, q, latents.rows, POSITIONS, 0.3)
    assert nmse(weights @ keys[:, :24], out.mean(axis=1)).max() < 1e-28 and np.linalg.matrix_rank(keys[:, :24]) == 20
    chosen = np.array([[0, 3, t, -1] for t in POSITIONS], np.int32)
    assert np.allclose(attention.mass(chosen), [row[[0, 3, t]].sum() for row, t in zip(weights, POSITIONS)], rtol=1e-13)
    single = dense.Attention(q.astype(np.float32), keys.astype(np.float32), POSITIONS, 0.3)
    assert single.weights().dtype == np.float32 and np.abs(single.weights() - weights).max() < 1e-6


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
def test_scores_are_those_of_the_op(monkeypatch, kv_type):
    monkeypatch.setattr(dense, "AT_ONCE", 200)
    rows, q, w = cache(kv_type, 16), normal(7, 3, 16).astype(np.float64), normal(7, 3).astype(np.float64)
    index, out = dense.Index(q, w, dense.stored_values(rows, 20, np.float64), POSITIONS, 0.2), np.empty((7, 20))
    reference.indexer_scores(out, q, w, rows.rows, POSITIONS, 0.2)
    assert np.allclose(index.scores(), out, rtol=1e-12, atol=1e-14)
    assert np.array_equal(index.scores_of(np.array([[2, -1]] * 7, np.int32))[:, 0], index.scores()[:, 2])


class Seen(Hook):
    """The weights of attention and the index scores of all steps, by layer."""

    def __init__(self, caches):
        self._caches, self.weights, self.scores, self.ops = caches, {}, {}, set()

    def wants(self, node):
        return node.op in dense.ATTENTION or node.op in ("indexer_select", "indexer_scores")

    def after(self, call):
        self.ops.add(call.node.op)
        if call.node.op in dense.ATTENTION:
            self.weights.setdefault(layer_of(call.node), []).extend(dense.attention_of(call, self._caches).weights())
        else:
            self.scores.setdefault(layer_of(call.node), []).extend(dense.index_of(call, self._caches)().scores())


def seen(load, path, **options):
    session = load(path, **options).session()
    session.hooks = hook, = Seen(session.caches),
    session.prefill(IDS)
    return hook


def test_both_forms_and_backends_agree(small_model, load):
    """The reference in MLA's absorbed form, in its plain form, and the CPU."""
    options = {"attention": "auto", "n_ctx": 64}
    exact = seen(load, small_model(n_layer=2), device="reference", n_ubatch=16, **options)
    plain = seen(load, small_model(n_layer=2), device="reference", n_ubatch=60, **options)
    assert "sparse_attention" in exact.ops and plain.ops == {"indexer_select", "mha_sparse_attention"}
    for kv_type, bound, found in [("f32", 1e-10, plain), *((kv_type, bound, seen(load, small_model(n_layer=2), n_ubatch=60, kv_type=kv_type,
                                                                                 index_type=kv_type, **options))
                                                           for kv_type, bound in (("f32", 1e-9), ("i16", 1e-5)))]:
        for layer in (0, 1):
            for a, b in zip(found.weights[layer], exact.weights[layer], strict=True):
                assert nmse(a[:len(b)], b) < bound and not a[len(b):].any()
            last = exact.scores[layer][-1]
            assert nmse(found.scores[layer][-1][:len(last)], last) < bound
