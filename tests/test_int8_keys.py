"""Int8 index keys: the choice of keys, and models on --kv-type i8."""
import numpy as np
import pytest
from helpers import choose, kernels, nmse

from pydsa.backends import reference

SCALE = 0.1


def made(backend, op, out, q, w, keys, storage, positions):
    """Run an indexer op into `out`, with keys stored in a cache."""
    cache = backend.cache_rows(len(keys), (keys.shape[1],), storage)
    backend.cache_write(cache, keys.astype(backend.FLOAT), np.arange(len(keys)))
    getattr(backend, op)(out, q.astype(backend.FLOAT), w.astype(backend.FLOAT), cache, positions, SCALE)
    return out


@pytest.mark.parametrize("n_head, width", choose([(5, 32)], [(16, 128), (64, 128), (5, 48), (20, 64)]))
@pytest.mark.parametrize("n_tokens, n_kv", choose([(1, 90), (3, 100)], [(1, 300), (2, 1500), (33, 700)]))
def test_selection(n_tokens, n_kv, n_head, width):
    """The selection is that of the scores, and close to that of exact keys."""
    rng, k = np.random.default_rng(n_kv), 64
    q, w, keys = (rng.standard_normal(shape).astype(np.float32) for shape in ((n_tokens, n_head, width), (n_tokens, n_head), (n_kv, width)))
    case = q, w, keys, "i8", np.arange(n_kv - n_tokens, n_kv)
    found = made(kernels, "indexer_select", np.full((n_tokens, k), 77, np.int32), *case)
    scores, chosen = made(kernels, "indexer_scores", np.empty((n_tokens, n_kv), np.float32), *case), np.empty((n_tokens, k), np.int32)
    kernels.top_k(chosen, scores)
    assert np.array_equal(found, chosen)
    expected = made(reference, "indexer_scores", np.empty((n_tokens, n_kv)), *case)
    there = np.isfinite(expected)
    assert np.array_equal(np.isfinite(scores), there) and nmse(scores[there], expected[there]) < 1e-8
    exact = made(reference, "indexer_select", np.empty((n_tokens, k), np.int32), q, w, keys, "f32", case[-1])
    assert np.mean([np.isin(a, b).mean() for a, b in zip(found, exact)]) > 0.96


def test_a_key_that_is_not_finite_is_never_chosen():
    rng = np.random.default_rng(0)
    n, heads, n_kv = choose((1, 3, 120), (4, 16, 200))
    q, w, keys = rng.standard_normal((n, heads, 64)), rng.standard_normal((n, heads)), rng.standard_normal((n_kv, 64)).astype(np.float32)
    keys[[17, 100]] = np.nan
    for backend in (kernels, reference):
        out = np.empty((n, 32), np.int32)
        made(backend, "indexer_select", out, q.astype(np.float32), w.astype(np.float32), keys, "i8", np.arange(n_kv - n, n_kv))
        assert (out >= 0).all() and not np.isin(out, [17, 100]).any()


@pytest.mark.parametrize("name", ["ds32-f32", "ds32-q4_k_m", "glm-q8_0", "ds2-q4_0"])
@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_golden_models_stay_close(golden, load, name, attention):
    """The median NMSE of the golden models is what llama.cpp reaches.

    Rounding latents and keys to 8 bits flips choices, as it does in llama.cpp.
    """
    path, arrays = golden(name)
    dense = load(path, kv_type="f32", attention=attention).logits(arrays["tokens"])
    met = nmse(load(path, kv_type="i8", attention=attention).logits(arrays["tokens"]), dense.astype(np.float64))
    assert 0 < np.median(met) < 0.05


def test_ubatches_do_not_matter(golden, load):
    """A token's keys do not depend on the size of the ubatch."""
    path, arrays = golden("ds32-f32")
    whole, parts = ([], []), ([], [])
    for (chosen, logits), n_ubatch in ((whole, 512), (parts, 7)):
        def observe(node, written):
            if node.name == "indexer_top_k-0":
                chosen.append(written[0].copy())
        session = load(path, kv_type="i8", attention="sparse", n_ubatch=n_ubatch).session()
        logits.append(session.prefill(arrays["tokens"], observe=observe))
    assert np.array_equal(*(np.concatenate(chosen) for chosen, _ in (whole, parts)))
    assert nmse(whole[1][0], parts[1][0]) < 1e-8


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_caches_are_counted_saved_and_loaded(golden, load, device, tmp_path):
    path, arrays = golden("ds32-f32")
    model = load(path, kv_type="i8", device=device)
    session, other = model.session(), model.session()
    assert model.setup.cache_bytes == sum(cache.nbytes for cache in session.caches.values())
    session.prefill(arrays["tokens"])
    session.save(tmp_path / "session")
    other.load(tmp_path / "session")
    assert np.array_equal(other.decode(7), session.decode(7))
