"""pydsa faithful: right models pass, and each wrong implementation is caught and named."""
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids

import pydsa
from pydsa import faithful
from pydsa.backends import reference
from pydsa.cli import main
from pydsa.faithful import definition, read
from pydsa.faithful.verdicts import in_words, percent
from pydsa.models import deepseek2, deepseek32, glm_dsa
from tests.rewritten import rewrite
from tests.test_stored_forms import with_factors

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
    """RoPE, but of the indexer's eight heads as if queries came later."""
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
        n_kv = positions[-1] + 1
        if part == "relu":
            dots = scale * np.einsum("th,thd,sd->ts", w, q, reference._floats(keys[:n_kv]))
            out[:, :n_kv] = np.where(out[:, :n_kv] > -np.inf, dots, -np.inf)
        if part == "mask":
            RIGHT["indexer_scores"](out, q, w, keys, np.full(len(q), n_kv - 1), scale)
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


def before(out, q, latents, indices, scale):
    RIGHT["sparse_attention"](out, q, latents, np.where(indices > 0, indices - 1, indices), scale)


def rotated_end(g, c, x, table, neox):
    size = x.tail[-1]
    g.rope(x.slice(size - c.n_rot, size), table, neox)
    return g.hadamard(x)


def not_normed(out, x, w, b, eps):
    out[:] = x


def patches():
    """Wrong implementations: what is replaced, the findings that tell, and the sentence that names the fault."""
    one_rotated = "only one of queries and keys has the Hadamard rotation"
    yield "other pairs", (deepseek32, "INDEXER_NEOX", False), "selection", "RoPE rotates neighbours, expected halves"
    yield "no RoPE", (deepseek32, "rotate", lambda g, c, x, table, neox: g.hadamard(x)), "selection", "RoPE is left out"
    yield "RoPE at the end", (deepseek32, "rotate", rotated_end), "selection", "RoPE is on the last values of a head"
    yield "no norm", (reference, "layer_norm", not_normed), "selection", "the layer norm of keys is left out"
    yield "queries later", (reference, "rope", turned_queries), "selection", "the positions of queries are one too great"
    yield "no ReLU", (reference, "indexer_scores", scores_without("relu")), "selection", "ReLU is left out"
    yield "no weights", (reference, "indexer_scores", scores_without("weights")), "selection", "the weights of heads are left out"
    yield "only queries rotated", (deepseek32, "rotate", rotation_of("indexer_q")), "selection", one_rotated
    yield "only keys rotated", (deepseek32, "rotate", rotation_of("indexer_k")), "selection", one_rotated
    yield "lowest scores", (reference, "top_k", lowest), "selection", "the keys with the lowest scores are chosen"
    yield "newest keys", (reference, "top_k", choosing(newest)), "selection", "the newest keys are chosen"
    yield "earlier keys", (reference, "top_k", choosing(earlier)), "selection", "positions are one too small"
    yield "one less", (reference, "top_k", one_less), "form", ""
    yield "later keys", (reference, "indexer_scores", scores_without("mask")), "form", ""
    yield "not sorted", (reference, "top_k", choosing(unsorted)), "form", ""
    yield "earlier keys are read", (reference, "sparse_attention", before), "attention", ""
    yield "softmax scale", (deepseek32.Config, "kq_scale", property(lambda c: 1.5 / np.sqrt(c.n_nope + c.n_rot))), "attention", ""
    yield "pairs of attention", (deepseek2, "NEOX", True), "attention", ""


@pytest.mark.parametrize("patch, wrong, sentence", [pytest.param(*rest, id=name) for name, *rest in patches()])
def test_a_wrong_implementation_is_caught_and_named(small_model, monkeypatch, patch, wrong, sentence):
    monkeypatch.setattr(*patch)
    found = report(small_model(n_layer=1))
    assert wrong in found.wrong and set(found.wrong) <= {wrong, "selection"}
    assert sentence in finding(found, "selection").measured


def test_keys_with_one_scale_are_caught(small_model, monkeypatch):
    monkeypatch.setattr(reference, "cache_write", one_scale)
    found = report(small_model(n_layer=1), index_type="i8")
    assert found.wrong == ["selection"] and "the scales of cached keys are left out" in finding(found, "selection").measured
    # the definition rounds keys as it should
    assert found.layers[0]["recall_of_cached_keys"] > 0.97


SHARING = dict(arch="glm-dsa", n_layer=3, indexer_types="FSF", indexer_shared_tensors=True)


def test_shared_layers_that_run_their_own_indexer_are_caught(small_model, monkeypatch):
    right = report(small_model(**SHARING))
    assert right.faithful and "layer 1 should use the choice of an earlier layer, and do" in finding(right, "shared layers").measured
    monkeypatch.setattr(glm_dsa, "indexer_full", lambda metadata, base: (True,) * base["n_layer"])
    wrong = report(small_model(**SHARING))
    assert set(wrong.wrong) == {"selection", "shared layers"}
    assert "layer 1 attended to other keys, at 32 tokens" in finding(wrong, "shared layers").measured
    monkeypatch.setattr(glm_dsa, "INDEXER_NEOX", True)
    assert "RoPE rotates halves, expected neighbours" in finding(report(small_model(**SHARING)), "selection").measured


@pytest.mark.filterwarnings("ignore:.* are not used")
def test_factors_of_matrices_make_no_difference(small_model, tmp_path):
    path = small_model(n_layer=1)
    found = report(rewrite(path, tmp_path / "scaled.gguf", tensors=with_factors((".scale", ".weight.scale"))))
    assert found.faithful and found.layers[0]["attention_error"] < 1e-12 and found.layers[0]["mass"] == report(path).layers[0]["mass"]


@pytest.mark.parametrize("name, owners", [("ds32-q4_k_m", [0, 1, 2]), ("glm-q8_0", [0, 2])])
def test_golden_models(golden, tmp_path, name, owners):
    """Keys of int8 choose 99 % of what others do; llama.cpp is right."""
    path, arrays = golden(name)
    model = pydsa.load(path, device="reference", n_ctx=192, n_ubatch=100)
    np.savez(tmp_path / "theirs.npz", tokens=arrays["tokens"], logits=arrays["llama_cpp"])
    found = faithful.check(model, arrays["tokens"], samples=96, against=read(tmp_path / "theirs.npz"))
    assert found.faithful and [row["layer"] for row in found.layers if row["layer"] == row["chooser"]] == owners
    assert min(found.layers[il]["recall_of_cached_keys"] for il in owners) > 0.99
    whole, = found.runs
    assert whole["run"] == "float32 caches" and np.mean(whole["recall"]) > 0.95 and found.top_k == 64
    assert found.findings[-1].verdict == "right" and "of 192 tokens" in found.findings[-1].measured


def test_random_weights_are_told(small_model):
    found = report(small_model(n_layer=2))
    assert found.faithful and found.layers[1]["keys"] == 12 * found.looked_at - 12 * 12
    unclear = {finding.name for finding in found.findings if finding.verdict == "unclear"}
    assert unclear == {"mass", "sparse and dense"} and "weights may be random" in finding(found, "mass").measured


@pytest.fixture(scope="module")
def demo():
    """The report on the demo, by the command line, and a recording."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.npz"
        result = CliRunner().invoke(main, ["faithful", "-l", "300", "--samples", "48", "-t", "1", "-o", "json", "--save", str(path)])
        assert result.exit_code == 0, result.output
        yield json.loads(result.stdout), path


def test_the_demo_is_faithful(demo):
    found, path = demo
    assert found["faithful"] and all(finding["verdict"] in ("right", "note") for finding in found["findings"])
    assert [run["run"] for run in found["runs"]] == ["float32 caches", "the reference"] and found["runs"][1]["tokens"] == 300
    for row in found["layers"]:
        assert row["recall"] > 0.999 and row["wrong_keys"] == 0 and row["malformed"] == 0
        assert row["recall_of_cached_keys"] > 0.99 and row["mass_of_newest"] < row["mass"] < row["mass_of_best"] <= 1
        assert 1 <= row["together"] < 4 and row["attention_error"] < 2e-7
    assert [row["from"] for row in found["depths"]] == [0, 128] and found["depths"][0]["kl"] == 0
    recording = pydsa.Recording.open(path)
    assert recording.n == 300 and recording.selection[3].shape == (300, 128) and recording.experts[3].shape == (300, 2)


def test_a_wrong_definition_would_be_seen_too(monkeypatch):
    """Where the engine is wrong alike, mass tells, in a trained model."""
    monkeypatch.setattr(deepseek32, "INDEXER_NEOX", False)
    monkeypatch.setitem(definition.INDEXER_PAIRS, "deepseek32", definition.NEIGHBOURS)
    model = pydsa.load(pydsa.DEMO, device="reference", n_ctx=160, kv_type="f32", dsa_top_k=32)
    found = faithful.check(model, faithful.text_ids(pydsa.DEMO, length=160), samples=48)
    assert found.wrong == ["mass"] and "The model was trained, as its loss shows" in finding(found, "mass").measured


def test_logits_of_another_output_are_seen(monkeypatch):
    """The keys are the same, as the fault comes after all choices."""
    right = reference.linear

    def linear(out, w, x):
        right(out, w, x)
        if out.shape[-1] == model.config.n_vocab:
            out *= -1
    model = pydsa.load(pydsa.DEMO, n_ctx=160, dsa_top_k=32)
    other = pydsa.load(pydsa.DEMO, n_ctx=160, dsa_top_k=32, device="reference")
    monkeypatch.setattr(reference, "linear", linear)
    found = faithful.check(model, faithful.text_ids(pydsa.DEMO, length=160), samples=48, reference=other)
    assert found.wrong == ["whole run, the reference"]
    monkeypatch.undo()
    assert faithful.check(model, faithful.text_ids(pydsa.DEMO, length=160), samples=48, reference=other).faithful


def test_words(small_model):
    found = report(small_model(n_layer=2))
    text = in_words(found)
    assert "| layer |" in text and "0 to 11 |" in text and text.endswith("unclear: mass, sparse and dense.\n")
    assert all(part in text for finding in found.findings for part in (finding.verdict.upper(), finding.name))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["top_k"] == 12


def test_percent():
    shares = {0: "0.0 %", 0.5: "50.0 %", 0.994: "99.40 %", 0.99997: "99.9970 %", 1: "100.0 %", 0.001: "0.10 %", 1e-5: "0.0010 %"}
    assert {share: percent(share) for share in shares} == shares


@pytest.mark.parametrize("args, message", [
    (["-p", "short"], "and with a top_k of 128 a choice is made from 129 on: give a text of at least 160 tokens, or a smaller --dsa-top-k"),
    (["-p", "x", "-f", __file__], "not both"), (["-p", ""], "at least"), (["--against", __file__], "neither .npz nor .npy")])
def test_mistakes(args, message):
    result = CliRunner().invoke(main, ["faithful", "-t", "1", *args])
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_the_reference_must_be_the_same_model(small_model, load):
    model = load(small_model(n_layer=2), device="reference")
    with pytest.raises(pydsa.PydsaError, match="The reference is .* with a top_k of 8, expected .* with 12"):
        faithful.check(model, IDS, reference=load(small_model(n_layer=2), device="reference", dsa_top_k=8))


def test_models_without_an_indexer_and_without_both_forms(small_model, load):
    for options, message in (dict(arch="deepseek2"), "has no indexer, so there is no sparse attention to check"), ({}, "expected 'auto'"):
        model = load(small_model(**options), device="reference", **{} if options else {"attention": "sparse"})
        with pytest.raises(pydsa.PydsaError, match=message):
            faithful.check(model, IDS)


def test_the_example_in_the_docs_runs(capsys):
    page = Path(pydsa.__file__).with_name("docs") / "faithful.md"
    example = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(example.replace("threads=1", "device='reference'"), {})
    text = capsys.readouterr().out
    assert text.startswith("True [0.9") and "0 of 16384 chosen keys differ" in text
