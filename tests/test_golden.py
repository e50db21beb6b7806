"""Logits against an external float64 forward pass and llama.cpp.

Prompts are three times as long as top_k. A last test compares the backends node by node.
"""
import numpy as np
import pytest
from helpers import greedy, nmse

import pydsa
from pydsa.models import deepseek32

EXACT = 1e-8        # the NMSE per position that float32 kernels must keep
SPARSE = ("ds32-f32", "ds32-q8_0", "ds32-q4_k_m", "glm-q8_0")
MODELS = (*SPARSE, "ds2-q4_0")
MODES = [(name, attention) for name in SPARSE for attention in ("sparse", "masked", "auto", "dense")] + [("ds2-q4_0", "auto")]


def errors(logits, arrays):
    """NMSE of every position against the float64 forward pass."""
    return nmse(logits, arrays["exact"])


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("attention", ["sparse", "masked", "auto"])
@pytest.mark.parametrize("n_ubatch", [512, 64, 7])
def test_prefill_is_exact(golden, load, device, attention, n_ubatch):
    path, arrays = golden("ds32-f32")
    model = load(path, device=device, attention=attention, n_ubatch=n_ubatch, kv_type="f32")
    assert model.n_ubatch < 192 or n_ubatch == 512
    assert errors(model.logits(arrays["tokens"]), arrays).max() <= EXACT


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("attention", ["sparse", "masked", "auto"])
def test_decode_is_exact(golden, load, device, attention):
    path, arrays = golden("ds32-f32")
    session = load(path, device=device, attention=attention, kv_type="f32").session()
    logits = [session.decode(token) for token in arrays["tokens"]]
    assert errors(logits, arrays).max() <= EXACT


@pytest.mark.parametrize("name", MODELS[1:])
def test_quantized_weights_are_close(golden, load, name):
    """The median NMSE of quantized models is below 1e-6.

    Activations are rounded to 15 or 16 bits, which may flip a choice between equals, so the median is bounded (llama.cpp: 0.002 to 0.01).
    """
    path, arrays = golden(name)
    met = np.median(errors(load(path, kv_type="f32").logits(arrays["tokens"]), arrays))
    assert met <= 1e-6 < np.median(errors(arrays["llama_cpp"], arrays))


@pytest.mark.parametrize("attention", ["sparse", "masked", "auto"])
def test_greedy_continuation_is_llama_cpps(golden, load, attention):
    path, arrays = golden("ds32-f32")
    session = load(path, attention=attention, kv_type="f32").session()
    assert greedy(session, session.prefill(arrays["tokens"]), 24) == arrays["llama_cpp_greedy"].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv_type, median", [("f16", 1e-5), ("bf16", 4e-3)])
def test_halved_caches_are_close(golden, load, name, kv_type, median):
    """The median NMSE of 16-bit caches is bounded.

    A rounded key or latent may change a choice and with it a whole position. The bound is ten times what was measured.
    """
    path, arrays = golden(name)
    assert 0 < np.median(errors(load(path, kv_type=kv_type, index_type=kv_type).logits(arrays["tokens"]), arrays)) <= median


def test_wrong_indexer_is_noticed(golden, load, monkeypatch):
    """The data exercise selection: a wrong indexer spoils the logits.

    RoPE in the other style, or no selection at all, spoils the positions after top_k.
    """
    path, arrays = golden("ds32-f32")
    dense = errors(load(path, attention="dense", kv_type="f32").logits(arrays["tokens"]), arrays)
    monkeypatch.setattr(deepseek32, "INDEXER_NEOX", False)
    turned = errors(pydsa.load(path, n_ctx=256, kv_type="f32", threads=1).logits(arrays["tokens"]), arrays)
    for wrong in (dense, turned):
        assert wrong[:64].max() <= EXACT and wrong[96:].min() > 1e-3


def departs(met, expected, exact):
    """Whether an array departs from the reference's.

    With unquantized weights choices must be equal, and numbers within an NMSE of 1e-9. Int8x2 activations may flip a choice between near
    equals, with all that follows for its token: one choice in fifty may differ, and the median over the tokens must be within 3e-6.
    """
    if met.dtype.kind == "i":
        return np.mean(met != expected) > (0 if exact else 0.02)
    finite = np.isfinite(expected) & np.isfinite(met)      # masks, and scores of future keys, have infinities
    if np.mean(~finite & (met != expected)) > (0 if exact else 0.02):
        return True
    rows = [np.where(finite, a, 0).reshape(len(a), -1).astype(np.float64) for a in (met, expected)]
    error, size = ((rows[0] - rows[1]) ** 2).sum(-1), (rows[1] ** 2).sum(-1)
    if exact:
        return not error.sum() <= 1e-9 * size.sum()
    return len(met) > 1 and not np.median(error - 3e-6 * size) <= 0     # a last token alone may have a flipped choice


@pytest.mark.parametrize("name, attention", MODES)
def test_cpu_equals_reference_node_by_node(golden, load, name, attention):
    path, arrays = golden(name)
    options, expected, departures = dict(attention=attention, kv_type="f32"), {}, []

    def compare(node, written):
        expected_arrays = expected[node.name].pop(0)        # of equal names in their order
        departures.extend(f"{node.op} {node.name}" for pair in zip(written, expected_arrays, strict=True)
                          if departs(*pair, exact=name == "ds32-f32"))

    load(path, device="reference", **options).session().prefill(
        arrays["tokens"], observe=lambda node, written: expected.setdefault(node.name, []).append([a.copy() for a in written]))
    assert sum(map(len, expected.values())) > 60
    load(path, **options).session().prefill(arrays["tokens"], observe=compare)
    assert not any(expected.values())
    assert not departures, f"{departures[0]} is the first to depart, of {len(departures)}"
