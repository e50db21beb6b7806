"""Damaged weights: whichever is NaN or infinite, no text comes, and the error names the tensor."""
import warnings

import numpy as np
import pytest
from helpers import random_ids
from rewritten import fused_experts, rewrite

import pydsa
from pydsa import DamagedWeightsError, GGUFError, diagnosis, faithful
from pydsa.backends import cpu, reference
from pydsa.bench import Bench
from pydsa.cli.report import compare_nodes
from pydsa.gguf import check
from pydsa.gguf.file import open_gguf

IDS = random_ids(100, n_vocab=250)
BITS = {"nan": {4: 0x7FC00000, 2: 0x7E00}, "inf": {4: 0x7F800000, 2: 0x7C00}}       # of float32, and of float16


@pytest.fixture
def damaged(golden, tmp_path):
    """damaged(name, "nan" or "inf"[, path]) -> the path of a damaged model.

    The first value, or the first scale, of the tensor is not finite: of each expert, and of the row of a token in the middle of IDS.
    """
    def make(name, what, path=None):
        path = path or golden("ds32-q8_0")[0]
        data = bytearray(path.read_bytes())
        (offset, tensor), = [place for place in check.places(open_gguf(path))[0][1] if place[1].name == name]
        rows = np.frombuffer(data, np.uint8, tensor.data.nbytes, offset).reshape(tensor.shape[0] if len(tensor.shape) == 3 else 1, -1)
        if name == "token_embd.weight":
            rows = rows.reshape(tensor.shape[0], -1)[IDS[30], None]
        size = 4 if tensor.type == "F32" else 2
        rows[:, :size] = np.frombuffer(BITS[what][size].to_bytes(size, "little"), np.uint8)
        (tmp_path / "model.gguf").write_bytes(data)
        return tmp_path / "model.gguf"
    return make


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("name", [
    "token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.weight",
    "blk.1.attn_q_a_norm.weight", "blk.1.attn_kv_a_mqa.weight", "blk.1.attn_k_b.weight", "blk.1.indexer.k_norm.weight",
    "blk.1.indexer.k_norm.bias", "blk.1.indexer.proj.weight", "blk.1.indexer.attn_q_b.weight", "blk.1.ffn_gate_inp.weight",
    "blk.1.exp_probs_b.bias", "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"])
def test_no_text_comes(damaged, name, what):
    model = pydsa.load(damaged(name, what), n_ctx=128, threads=1)
    text = model.generate(IDS, max_tokens=2, temperature=0)
    with pytest.raises(DamagedWeightsError, match=rf"damaged, or a computation overflowed; tensor '{name}' has [\d]+ "
                       f"{'NaN' if what == 'nan' else 'infinities'}: get the file again"):
        next(text)


@pytest.mark.parametrize("name", ["blk.1.attn_kv_b.weight", "blk.1.ffn_gate_up_exps.weight"])
def test_tensors_in_another_form_have_their_own_names(damaged, small_model, tmp_path, name):
    path = small_model(arch="deepseek2", legacy_kv_b="kv_b" in name)
    if "gate_up" in name:
        path = rewrite(path, tmp_path / "fused.gguf", tensors=fused_experts(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pydsa.load(damaged(name, "nan", path), n_ctx=128, threads=1)
    with pytest.raises(DamagedWeightsError, match=rf"tensor '{name}' has [\d]+ NaN"):
        next(model.generate(IDS, max_tokens=2, temperature=0))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.indexer.k_norm.weight", "blk.1.exp_probs_b.bias", "output.weight"])
def test_the_reference_notices_too(damaged, name):
    model = pydsa.load(damaged(name, "nan"), n_ctx=128, device="reference")
    with np.errstate(invalid="ignore"), pytest.raises(DamagedWeightsError, match=name):
        next(model.generate(IDS, max_tokens=2, temperature=0))


def test_comparisons_do_not_pass_over_it(damaged):
    """... although both sides have NaN at the same places."""
    path = damaged("output.weight", "nan")
    model, expected = pydsa.load(path, n_ctx=128, threads=1), pydsa.load(path, n_ctx=128, device="reference")
    with np.errstate(invalid="ignore"), pytest.raises(DamagedWeightsError, match="The logits are not finite"):
        faithful.check(model, IDS, reference=expected, samples=32)
    with np.errstate(invalid="ignore"):
        assert [row["node"] for row in compare_nodes(model, expected, IDS[:4]) if row["error"] == np.inf] == ["result_output"]


def test_where_it_shows(damaged, monkeypatch):
    """... is told if no tensor is found, as when a computation overflows."""
    monkeypatch.setattr(diagnosis, "faults", lambda tensor: check.Faults())
    model = pydsa.load(damaged("blk.1.attn_kv_a_mqa.weight", "nan"), n_ctx=128, threads=1)
    with pytest.raises(DamagedWeightsError, match="'kv_cmpr_pe-1' in layer 1 has the first value that is not finite"):
        next(model.generate(IDS, max_tokens=2, temperature=0))


@pytest.mark.parametrize("name", ["blk.1.attn_kv_a_norm.weight", "output_norm.weight"])
def test_what_only_measures_says_it_too(damaged, name):
    """... and no report or figure is made of it; `faithful` looks at values before the step has ended."""
    path = damaged(name, "nan")
    model = pydsa.load(path, n_ctx=128, n_ubatch=32, threads=1)
    for measure in (lambda: list(Bench([8], [2], [0], 1).run(model)), lambda: list(Bench([8], [], [0], 1).ops(model)),
                    lambda: faithful.check(model, IDS, samples=48)):
        with pytest.raises(DamagedWeightsError, match="not finite"):
            measure()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("backend", [cpu, reference])
def test_choices_mark_what_they_hide(backend, bad):
    def met(op, *args):
        with np.errstate(invalid="ignore"):
            getattr(backend, op)(*args)
        return backend.nan_met()
    scores = np.linspace(-1, 1, 5000, dtype=np.float32)[None].astype(backend.FLOAT)
    scores[0, 7] = -np.inf
    indices, weights = np.empty((1, 16), np.int32), np.empty((1, 2), backend.FLOAT)
    route = np.linspace(0, 1, 8)[None].astype(backend.FLOAT), np.zeros(8, backend.FLOAT), 2, 4, 2, True, 1.0
    backend.nan_met()
    assert not met("top_k", indices, scores) and not met("moe_route", indices[:, :2], weights, *route)
    for place in (0, 7, 4999):
        damaged = scores.copy()
        damaged[0, place] = bad
        assert met("top_k", indices, damaged) and not met("top_k", indices, scores)
    for argument, place in ((0, (0, 0)), (0, (0, 7)), (1, 0)):
        damaged = [np.copy(a) if isinstance(a, np.ndarray) else a for a in route]
        damaged[argument][place] = bad
        assert met("moe_route", indices[:, :2], weights, *damaged) and not met("moe_route", indices[:, :2], weights, *route)


def test_weights_are_looked_at_when_they_are_copied(golden, damaged):
    """... to a device that does not mark what its choices meet."""
    for tensor in open_gguf(golden("ds32-q8_0")[0]).tensors.values():
        diagnosis.refuse_hidden(tensor, "file")
    for name in ("blk.1.indexer.attn_q_b.weight", "blk.1.exp_probs_b.bias", "blk.1.ffn_gate_inp.weight", "token_embd.weight"):
        with pytest.raises(GGUFError, match=f"tensor '{name}' has 1 NaN"):
            diagnosis.refuse_hidden(open_gguf(damaged(name, "nan")).tensors[name], "file")
