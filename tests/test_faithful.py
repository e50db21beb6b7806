"""pydsa faithful: right models pass, and each wrong implementation is caught and named."""
import numpy as np
import pytest
from helpers import random_ids

import pydsa
from pydsa import faithful
from pydsa.backends import reference
from pydsa.models import deepseek2, deepseek32, glm_dsa

IDS = random_ids(90)        # top_k is 12
RIGHT = {name: getattr(reference, name) for name in ("rope", "cache_write", "indexer_scores", "top_k", "sparse_attention", "hadamard")}
ROTATE = deepseek32.rotate


def report(path, **options):
    """The report on a model that the reference runs."""
    model = pydsa.load(path, device="reference", n_ctx=128, n_ubatch=40, **{"kv_type": "f32"} | options)
    return faithful.check(model, IDS, samples=48)


def finding(found, name):
    return next(finding for finding in found.findings if finding.name == name)


def turned_queries(out, x, table, neox):
    """RoPE that turns the indexer's queries, of eight heads, as if they were one token later."""
    if x.shape[1] == 8:
        step = 10000.0 ** (-np.arange(0, x.shape[2], 2) / x.shape[2])
        angles = np.arctan2(table[:, 1], table[:, 0]) + step
        table = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    RIGHT["rope"](out, x, table, neox)


def scores_without(part):
    def indexer_scores(out, q, w, keys, positions, scale):
        if part == "weights":
            w = np.ones_like(w)
        RIGHT["indexer_scores"](out, q, w, keys, positions, scale)
        if part == "relu":
            n_kv = positions[-1] + 1
            dots = scale * np.einsum("th,thd,sd->ts", w, q, reference._floats(keys[:n_kv]))
            out[:, :n_kv] = np.where(out[:, :n_kv] > -np.inf, dots, -np.inf)
    return indexer_scores


def choosing(change):
    def top_k(out, scores):
        RIGHT["top_k"](out, scores)
        change(out, scores)
    return top_k


def lowest(out, scores):
    RIGHT["top_k"](out, np.where(scores > -np.inf, -scores, -np.inf))


def newest(out, scores):
    for row, values in zip(out, scores):
        n = int((values > -np.inf).sum())
        if n > row.size:
            row[:] = np.arange(n - row.size, n)


def earlier(out, scores):
    for row, values in zip(out, scores):
        if (values > -np.inf).sum() > row.size:
            row[:] = np.unique(np.concatenate((np.maximum(row - 1, 0), np.arange(row.size))))[-row.size:]


def one_less(out, scores):
    RIGHT["top_k"](out[:, :-1], scores)
    out[:, -1] = -1


def unsorted(out, scores):
    out[:] = np.where(out[:, -1:] >= 0, out[:, ::-1], out)


def one_scale(cache, x, positions):
    RIGHT["cache_write"](cache, x, positions)
    if cache.dtype.names and "low0" not in cache.dtype.names:
        cache["d"][positions] = 0.01


def rotation_of(names):
    def rotate(g, c, x, table, neox):
        if x.name.startswith(names):
            return ROTATE(g, c, x, table, neox)
        g.rope(x.slice(0, c.n_rot), table, neox)
        return x
    return rotate


def patches():
    """Wrong implementations: what is replaced, which findings tell, and which sentence names the fault."""
    selection = ["selection"]
    yield "other pairs", (deepseek32, "INDEXER_NEOX", False), selection, "RoPE rotates neighbours, expected halves"
    yield "no rope", (deepseek32, "rotate", lambda g, c, x, table, neox: g.hadamard(x)), selection, "RoPE is left out"
    yield "queries later", (reference, "rope", turned_queries), selection, "positions of queries are one too great"
    yield "no relu", (reference, "indexer_scores", scores_without("relu")), selection, "ReLU is left out"
    yield "no weights", (reference, "indexer_scores", scores_without("weights")), selection, "weights of heads are left out"
    yield "queries rotated", (deepseek32, "rotate", rotation_of("indexer_q")), selection, "only queries have the Hadamard rotation"
    yield "keys rotated", (deepseek32, "rotate", rotation_of("indexer_k")), selection, "only keys have the Hadamard rotation"
    yield "lowest", (reference, "top_k", lowest), selection, "the keys with the lowest scores"
    yield "newest", (reference, "top_k", choosing(newest)), selection, "the newest keys are chosen"
    yield "earlier", (reference, "top_k", choosing(earlier)), selection, "positions are one too small"
    yield "one less", (reference, "top_k", one_less), ["form"], ""
    yield "unsorted", (reference, "top_k", choosing(unsorted)), ["form"], ""
    yield "softmax scale", (deepseek32.Config, "kq_scale", property(lambda c: 1.5 / np.sqrt(c.n_nope + c.n_rot))), ["attention"], ""
    yield "pairs of attention", (deepseek2, "NEOX", True), ["attention"], ""


@pytest.mark.parametrize("name, patch, wrong, sentence", patches(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_implementation_is_caught_and_named(small_model, monkeypatch, name, patch, wrong, sentence):
    monkeypatch.setattr(*patch)
    found = report(small_model(n_layer=2))
    assert set(wrong) <= set(found.wrong) <= {*wrong, "selection", "form"}
    assert sentence in finding(found, "selection").measured
