"""Blocks, keys and layers of files whose tensors say something else.

MTP blocks that are missing or not declared, an indexer in deepseek2, values for each layer.
"""
import dataclasses
import re

import gguf
import numpy as np
import pytest
from helpers import nmse, random_ids
from rewritten import INT, TEXT, T, rewrite

import pydsa
from pydsa import GGUFError, PydsaError, UnsupportedModelError
from pydsa.cli.report import describe, format_report
from pydsa.gguf.override import parse_overrides
from pydsa.setup import Setup

IDS = random_ids(40)
CLOSE = 1e-10       # NMSE of float32 sums in another order
MTP = "blk.3."      # of a small model with nextn=1
OPTIONS = dict(n_ctx=256, kv_type="f32", threads=1)
COUNT, NEXTN = "deepseek32.block_count", "deepseek32.nextn_predict_layers"


def without(*parts):
    """A function for rewrite() that drops tensors with these in their names."""
    return lambda tensor: [] if any(part in tensor.name for part in parts) else [tensor]


# MTP blocks

@pytest.mark.parametrize("keys, drop, tensors, note", [
    ({}, (), without("blk.9"), None),
    ({}, (), without(MTP), "1 MTP block(s) are declared, but not in the file"),
    ({COUNT: (INT, 3)}, [NEXTN], without(MTP), None),
    ({}, [NEXTN], without("blk.9"), "block_count is 4 and nextn_predict_layers is 0, but 1 block(s) from 3 on have the tensors"),
    ({COUNT: (INT, 3)}, [NEXTN], without("blk.9"), "the 3 blocks before are taken as the layers"),
    ({COUNT: (INT, 3)}, (), without("blk.9"), "block_count is 3 and nextn_predict_layers is 1"),
], ids=["as written", "trunk only", "without MTP", "not declared", "neither declared nor counted", "not counted"])
def test_mtp_blocks_are_known_by_their_tensors(small_model, load, tmp_path, keys, drop, tensors, note):
    path = rewrite(small_model(nextn=1), tmp_path / "m.gguf", keys, drop, tensors)
    setup = Setup(path)
    assert setup.config.n_layer == 3 and ([note] if note else []) == [note for n in setup.notes if note in n]
    if note:
        with pytest.warns(UserWarning, match=re.escape(note)):
            model = pydsa.load(path, **OPTIONS)
        np.testing.assert_array_equal(model.logits(IDS), load(small_model()).logits(IDS))


@pytest.mark.parametrize("keys, drop, tensors, message", [
    ({}, (), without(".nextn."), "nextn_predict_layers is 1, but block 3 has no nextn tensors, .* --override-kv .*layers=int:0"),
    ({COUNT: (INT, 3)}, [NEXTN], without(".nextn."), "blocks 0 to 3, but .*block_count is 3: .* --override-kv .*block_count=int:4"),
    ({}, (), without("blk.0.", "blk.1.", "blk.2.", "token_embd"), "only the MTP block 3, .* open the file of the model itself"),
    ({}, (), without("blk.2."), r"has layers 0 to 1 and 1 MTP block\(s\) from 3 on, expected 3 layers by .*block_count, 4,"),
    ({}, (), lambda t: [(t.name.replace(MTP, "blk.0."), t.data, t.tensor_type)] if ".nextn." in t.name else [t],
     "block 0 has nextn tensors, and block 3 after it has none"),
], ids=["an ordinary layer", "a layer too many", "MTP only", "a layer too few", "in the middle"])
def test_blocks_that_could_be_either(small_model, tmp_path, keys, drop, tensors, message):
    path = rewrite(small_model(nextn=1), tmp_path / "m.gguf", keys, drop, tensors)
    with pytest.raises(PydsaError, match=message):
        Setup(path)


def test_an_ordinary_layer_runs_when_asked_for(small_model, load, tmp_path):
    wrong = rewrite(small_model(), tmp_path / "wrong.gguf", {NEXTN: (INT, 1)})
    with pytest.raises(GGUFError, match="block 2 has no nextn tensors"):
        Setup(wrong)
    model = pydsa.load(wrong, **OPTIONS, override_kv={NEXTN: 0})
    np.testing.assert_array_equal(model.logits(IDS), load(small_model()).logits(IDS))


# deepseek2 with an indexer

def as_deepseek2(source, path, keep=(), arch="deepseek32"):
    """A file saved as deepseek2, with the indexer's tensors."""
    fields = {key: field for key, field in gguf.GGUFReader(source).fields.items() if key.startswith(f"{arch}.")}
    kept = {key: field for key, field in fields.items() if ".indexer." not in key or key.endswith(keep)}
    keys = {key.replace(arch, "deepseek2"): (field.types[0], field.contents()) for key, field in kept.items()}
    return rewrite(source, path, {"general.architecture": (TEXT, "deepseek2"), **keys}, drop=fields)


def test_an_indexer_in_deepseek2(small_model, load, tmp_path):
    """It runs dense and says so, and sparse with the overrides it names."""
    path = as_deepseek2(small_model(), tmp_path / "v2.gguf")
    advice = ("3 layers have an indexer .* --override-kv general.architecture=str:deepseek32,deepseek32.attention.indexer.head_count=int:8,"
              "deepseek32.attention.indexer.key_length=int:32,deepseek32.attention.indexer.top_k=int:2048")
    with pytest.warns(UserWarning, match=advice):
        dense = pydsa.load(path, **OPTIONS)
    assert nmse(dense.logits(IDS), load(small_model(), attention="dense").logits(IDS)).max() < CLOSE
    with pytest.raises(UnsupportedModelError, match="no indexer to choose keys .* " + advice):
        Setup(path, attention="sparse")
    text = format_report(describe(Setup(path)))
    assert re.search("note: " + advice, text) and "dense (the architecture deepseek2 has no indexer)" in text
    overrides = parse_overrides([text.split("--override-kv ")[1].split(".\n")[0]]) | {"deepseek32.attention.indexer.top_k": 12}
    sparse = pydsa.load(path, **OPTIONS, override_kv=overrides)
    assert sparse.config.architecture == "deepseek32" and not sparse.setup.notes
    np.testing.assert_array_equal(sparse.logits(IDS), load(small_model()).logits(IDS))
    assert nmse(dense.logits(IDS), sparse.logits(IDS)).max() > 1e-4


def test_an_indexer_of_glm_in_deepseek2(small_model, load, tmp_path):
    """It is told by the tokenizer."""
    path = as_deepseek2(small_model(arch="glm-dsa"), tmp_path / "v2.gguf", keep=("head_count", "key_length", "top_k"), arch="glm-dsa")
    assert Setup(path).notes[0].endswith("use --override-kv general.architecture=str:glm-dsa.")
    sparse = pydsa.load(path, **OPTIONS, override_kv={"general.architecture": "glm-dsa"})
    np.testing.assert_array_equal(sparse.logits(IDS), load(small_model(arch="glm-dsa")).logits(IDS))


def test_advice_names_only_keys_that_are_missing(small_model, tmp_path):
    path = as_deepseek2(small_model(), tmp_path / "v2.gguf", keep=("head_count", "key_length", "top_k"))
    assert Setup(path).notes[0].endswith("use --override-kv general.architecture=str:deepseek32.")
    assert Setup(path, override_kv={"general.architecture": "deepseek32"}).config.top_k == 12


def test_unknown_tensors_of_an_indexer_in_deepseek2(small_model, tmp_path):
    source = small_model()
    path = as_deepseek2(source, tmp_path / "v2.gguf")
    path = rewrite(path, tmp_path / "half.gguf", tensors=without("indexer.attn_k.weight"))
    with pytest.raises(UnsupportedModelError, match="what tensor 'blk.0.indexer.attn_q_b.weight' does in deepseek2"):
        Setup(path)


# Values for each layer

def array(*values):
    return T.ARRAY, T.INT32, list(values)


@pytest.mark.parametrize("key, value, dense", [
    ("attention.head_count", 3, 3), ("attention.kv_lora_rank", 56, 56), ("attention.key_length_mla", 32, 32),
    ("rope.dimension_count", 12, 12),
    ("expert_count", 8, 0), ("expert_used_count", 2, 0), ("expert_shared_count", 1, 0), ("expert_feed_forward_length", 36, 0),
    ("feed_forward_length", 88, 88), ("attention.indexer.head_count", 8, 8), ("attention.indexer.top_k", 12, 12)])
def test_equal_values_for_each_layer(small_model, tmp_path, key, value, dense):
    """They are one value; a layer without experts may have 0."""
    path = rewrite(small_model(), tmp_path / "m.gguf", {f"deepseek32.{key}": array(dense, value, value)})
    met, expected = (dataclasses.asdict(Setup(p).config) | {"rope": None} for p in (path, small_model()))
    assert {name: value for name, value in met.items() if value != expected[name]} == (
        {"n_ff_exp": (0, 36, 36)} if key == "expert_feed_forward_length" else {})


@pytest.mark.parametrize("key, values, message", [
    ("attention.head_count", (3, 4, 3), "attention.head_count is 3 in layers 0, 2, 4 in layers 1, expected one number for all layers"),
    ("expert_used_count", (0, 2, 1), "expert_used_count is 0 in layers 0, 2 in layers 1, 1 in layers 2, .* for all layers from 1 on"),
    ("attention.indexer.key_length", (32, 32, 64), "key_length is 32 in layers 0-1, 64 in layers 2"),
])
def test_different_values_that_are_refused(small_model, tmp_path, key, values, message):
    path = rewrite(small_model(), tmp_path / "m.gguf", {f"deepseek32.{key}": array(*values)})
    with pytest.raises(UnsupportedModelError, match=message):
        Setup(path)


def test_layers_with_widths_of_their_own(small_model, load, tmp_path):
    """Experts and dense layers may be wider in some layers: rows of zeros change nothing."""
    def widen(tensor):
        if "blk.2." not in tensor.name or "ffn_" not in tensor.name or "exps" not in tensor.name and "shexp" not in tensor.name:
            return [tensor]
        axis = -1 if "down" in tensor.name else -2
        width = [(0, 0)] * tensor.data.ndim
        width[axis] = (0, 12)
        return [(tensor.name, np.pad(tensor.data, width), tensor.tensor_type)]

    for arch in ("deepseek2", "glm-dsa"):
        source = small_model(arch=arch)
        path = rewrite(source, tmp_path / f"{arch}.gguf", {f"{arch}.expert_feed_forward_length": array(0, 36, 48)}, tensors=widen)
        model = load(path)
        assert model.config.n_ff_exp == (0, 36, 48)
        assert nmse(model.logits(IDS), load(source).logits(IDS)).max() < CLOSE
    assert re.search("n_ff_exp +36 in layers 1, 48 in layers 2\n", format_report(describe(model.setup)))
