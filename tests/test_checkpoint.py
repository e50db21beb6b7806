"""Folders that are damaged, incomplete or contradictory: one sentence each, and nothing is left behind."""
import json
import os
import struct

import numpy as np
import pytest
from checkpoints import DATA, bf16, copy, save
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import pydsa
from pydsa.cli import main
from pydsa.conversion import Conversion
from pydsa.conversion.checkpoint import Checkpoint, read_header
from pydsa.errors import CheckpointError, PydsaError, UnsupportedModelError
from pydsa.text.tokenizer import PRE_TOKENIZERS

ONE = {"a": ("F32", np.arange(6, dtype="<f4").reshape(2, 3)), "b": ("U8", np.arange(5, dtype="u1"))}
SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


def refused(folder, match, kind=PydsaError):
    """Assert that a folder is refused, and that nothing is left behind."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(kind, match=match) as error:
        pydsa.convert(folder, folder.parent / "out.gguf", "F32")
    assert "\n" not in str(error.value) and sorted(folder.parent.rglob("*")) == before
    return str(error.value)


def shards(folder, change=None):
    """A copy of v32 as it is, with shards and an index, which may be changed."""
    folder.mkdir()
    for path in (DATA / "v32").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change is not None:
        change(index["weight_map"])
        path.write_text(json.dumps(index))
    return folder


def test_shards(tmp_path):
    folder = shards(tmp_path / "in")
    assert len(Checkpoint(folder).paths) == 5
    (folder / "model.safetensors.index.json").unlink()
    assert len(Checkpoint(folder).tensors) == len(Checkpoint(DATA / "v32").tensors)       # numbered files need no index
    (folder / "model-00002-of-00005.safetensors").unlink()
    refused(folder, "model-00002-of-00005.safetensors is missing")


def test_a_missing_shard(tmp_path):
    folder = shards(tmp_path / "in")
    (folder / "model-00003-of-00005.safetensors").unlink()
    refused(folder, "1 of 5 files are missing, such as model-00003-of-00005.safetensors", CheckpointError)


@pytest.mark.parametrize("change, match", [
    (lambda m: m.pop("lm_head.weight"), "expects nowhere"),
    (lambda m: m.update({"model.extra": "model-00001-of-00005.safetensors"}), "there is no tensor 'model.extra'"),
    (lambda m: m.update({"lm_head.weight": "model-00005-of-00005.safetensors"
                         if m["lm_head.weight"] != "model-00005-of-00005.safetensors" else "model-00001-of-00005.safetensors"}),
     "the index and the files are not of one model"),
    (lambda m: m.update({"lm_head.weight": "../model.safetensors"}), "expected the name of a safetensors file in this folder"),
    (lambda m: m.clear(), "weight_map is empty"),
    (lambda m: m.update({"lm_head.weight": 3}), "expected the name of a safetensors file"),
    (lambda m: m.update({"lm_head.weight": "pytorch_model.bin"}), "expected the name of a safetensors file")])
def test_an_index_that_contradicts_the_files(change, match, tmp_path):
    refused(shards(tmp_path / "in", change), match, CheckpointError)


def test_pickle_files_are_never_opened(tmp_path):
    folder = copy("v32", tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").chmod(0)
    refused(folder, "pickle files can run programs and are never opened", CheckpointError)


def test_nan_scales_are_found_before_anything_is_written(tmp_path, monkeypatch):
    def damage(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = "F8_E4M3", np.zeros((96, 64), "u1")
        tensors[SCALE] = "F32", np.float32([[1], [np.nan], [1]])
    folder = copy("v32", tmp_path / "in", damage, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 64]})
    monkeypatch.setattr("pydsa.conversion.running.GGUFWriter", None)
    assert "at [1, 0]" in refused(folder, f"'{SCALE}' has a scale that is nan", CheckpointError)


def pop(name):
    return lambda tensors: tensors.pop(name)


def put(name, dtype, data):
    return lambda tensors: tensors.update({name: (dtype, data)})


@pytest.mark.parametrize("change, fields, match", [
    (put("model.layers.1.mlp.fc3.weight", "BF16", bf16([1])), {}, "does not know what 1 tensor.s. such as 'model.layers.1.mlp.fc3.weight'"),
    (pop("model.layers.1.self_attn.indexer.k_norm.bias"), {}, r"there is no tensor 'model.layers.1.self_attn.indexer.k_norm.bias'"),
    (pop("model.layers.1.mlp.experts.7.up_proj.weight"), {}, "experts.7.up_proj"),
    (put("model.norm.weight", "BF16", bf16(np.ones(63))), {}, r"has the shape \[63\], config.json expects \[64\]"),
    (put("model.norm.weight", "I32", np.ones(64, "<i4")), {}, "is stored in a way that pydsa does not know"),
    (put("model.layers.0.mlp.up_proj.weight", "F8_E4M3", np.ones((96, 64), "u1")), {}, "without scales"),
    (lambda t: (put(SCALE, "F32", np.ones((9, 9), "<f4"))(t), put(SCALE.removesuffix("_scale_inv"), "F8_E4M3", np.ones((96, 64), "u1"))(t)),
     {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, r"expected \[1, 1\] for blocks of 128 x 128"),
    (lambda t: (put(SCALE, "F32", np.ones((2, 3), "<f4"))(t), put(SCALE.removesuffix("_scale_inv"), "F8_E4M3", np.ones((96, 64), "u1"))(t)),
     {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}, r"expected \[3, 2\] for blocks of 32 x 32"),
    (put(SCALE, "F32", np.ones((1, 1), "<f4")), {}, "of BF16"),
    (put("model.layers.0.mlp.up_proj.weight_packed", "U8", np.ones((96, 32), "u1")), {}, "expected one of them|does not know")])
def test_tensors_that_do_not_fit(change, fields, match, tmp_path):
    refused(copy("v32", tmp_path / "in", change, **fields), match)


@pytest.mark.parametrize("fields, match", [
    ({"architectures": None}, "architectures is missing"), ({"architectures": "DeepseekV32ForCausalLM"}, "expected an array of strings"),
    ({"hidden_size": "64"}, 'hidden_size is .*64.*, expected an integer'), ({"hidden_size": 64.0}, "expected an integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers is"), ({"num_hidden_layers": -1}, "from 1 to 512"),
    ({"num_hidden_layers": 10**30}, "from 1 to 512"), ({"vocab_size": 319}, r"config.json expects \[319, 64\]"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"), ({"rope_parameters": []}, "expected an object"), ({"index_topk": None}, "index_topk"),
    ({"routed_scaling_factor": None}, "routed_scaling_factor is missing"), ({"n_group": None}, "n_group is missing"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"), ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.factor is missing"),
    ({"n_group": 3}, "cannot be divided"),
    ({"num_experts_per_tok": 9}, "expected an integer from 1 to 8"), ({"quantization_config": "fp8"}, "expected an object"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "expected two numbers"),
    ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "dense ones and then sparse ones"), ({"num_key_value_heads": 1}, "as many as"),
    ({"index_head_dim": 7}, "config.json expects"), ({"qk_rope_head_dim": 7}, "config.json expects")])
def test_a_configuration_with_wrong_values(fields, match, tmp_path):
    refused(copy("v32", tmp_path / "in", **fields), match)


@pytest.mark.parametrize("name, text, match", [
    ("config.json", "{", "is not JSON"), ("config.json", "[]", "expected a JSON object"), ("config.json", b"\xff\xfe{", "UTF-8"),
    ("config.json", "[" * 100000, "is not JSON"), ("config.json", '{"a": 1, "a": 2}', "'a' twice"), ("config.json", None, "no such file"),
    ("tokenizer.json", None, "neither tokenizer.json nor tiktoken.model"), ("tokenizer.json", "{}", "model is missing"),
    ("tokenizer.json", '{"model": {"type": "Unigram"}}', "not byte-level BPE"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": [["a"]]}}', "merges"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 1000}, "merges": []}}', "tokenizers library cannot read|splits texts as none|vocab_size"),
    ("tokenizer_config.json", '{"bos_token": "<none>"}', "bos_token"),
    ("tokenizer_config.json", '{"add_bos_token": "yes"}', "true or false"),
    ("tokenizer_config.json", '{"chat_template": 3}', "chat_template")])
def test_files_that_say_something_else(name, text, match, tmp_path):
    folder = copy("v32", tmp_path / "in")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, match)


@pytest.mark.parametrize("line, match", [("AA== 5", "rank 0"), ("!!! 0", "base64"), ("AA==", "base64"), ("AA== 0", "no token for byte 1")])
def test_a_damaged_tiktoken_file(line, match, tmp_path):
    folder = copy("v3", tmp_path / "in")
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_text(line + "\n")
    refused(folder, match, CheckpointError)


def test_a_pre_tokenizer_that_is_unknown(tmp_path):
    folder = copy("v32", tmp_path / "in")
    text = (folder / "tokenizer.json").read_text()
    assert "\\\\p{N}{1,3}" in text
    (folder / "tokenizer.json").write_text(text.replace("\\\\p{N}{1,3}", "\\\\p{N}{1,4}"))
    refused(folder, "splits texts as none", UnsupportedModelError)


def test_a_pre_tokenizer_with_the_same_ids(tmp_path, monkeypatch):
    """It will do where the vocabulary is large, with a word."""
    folder = copy("v32", tmp_path / "in")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("\\\\p{N}{1,3}", "\\\\p{N}{1,4}"))
    monkeypatch.setattr("pydsa.conversion.tokenizer.LARGE", 100)
    conversion = Conversion(folder)
    assert "the same ids" in " ".join(conversion.notes) and conversion.keys["tokenizer.ggml.pre"] in PRE_TOKENIZERS


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}).encode()


@pytest.mark.parametrize("header, match", [
    (entry(offsets=(0, 25)), "expected 24 bytes between them"), (entry(offsets=(24, 0)), "expected 24 bytes"), (entry(dtype="F4"), "dtype"),
    (entry(dtype=3), "dtype"), (entry(shape=(2, -3)), "shape"), (entry(shape=(2**40, 2**40)), "bytes between them"),
    (entry(shape="6"), "shape"), (entry(shape=[1] * 9 + [6]), "shape"), (entry(offsets=(1, 25)), "begins at byte"),
    (entry(offsets=(0, 24, 24)), "data_offsets"),
    (entry(more=1), "expected its dtype, shape and data_offsets"), (b'{"a": 1}', "expected its dtype"), (b"[]", "JSON object"),
    (b"\xff\xfe", "UTF-8"), (b"{", "is not JSON"), (b'{"a": {}, "a": {}}', "twice"), (entry(shape=(2, 3.0)), "shape"),
    (b"{}", "bytes that belong to none"), (entry(), "bytes that belong to none"), (entry(shape=(2, 30), offsets=(0, 240)), "incomplete"),
    (json.dumps({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
                 "b": {"dtype": "U8", "shape": [5], "data_offsets": [20, 25]}}).encode(), "begins at byte"),
    (json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
                 "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}}).encode(), "begins at byte")])
def test_headers_that_lie(header, match, tmp_path):
    save(tmp_path / "m.safetensors", ONE, header)
    with pytest.raises(CheckpointError, match=match):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize("data, match", [
    (b"", "has 0 bytes"), (b"\0" * 7, "has 7 bytes"), (struct.pack("<Q", 2**63) + b"{}", "the header takes"),
    (struct.pack("<Q", 3) + b"{}", "the header takes 3 bytes, expected at most 2"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS")])
def test_files_that_are_no_safetensors(data, match, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        read_header(tmp_path / "m.safetensors")


def test_rows_are_read_alone(tmp_path):
    save(tmp_path / "m.safetensors", ONE)
    a, b = read_header(tmp_path / "m.safetensors")
    assert a.read(1, 2).tolist() == [[3, 4, 5]] and a.read().shape == (2, 3) and b.read(2).tolist() == [2, 3, 4]
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it is incomplete"):
        read_header(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        b.read()


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 250))
def test_damaged_headers_never_end_in_something_else(at, byte, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save(path, ONE)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[:max(cut, 8)] if cut < 100 else data)
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert sum(t.read().nbytes for t in tensors) == 29


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_json_with_other_values_never_ends_in_something_else(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    copy(data.draw(st.sampled_from(["v32", "glm"])), folder)
    path = folder / data.draw(st.sampled_from(["config.json", "tokenizer_config.json", "tokenizer.json"]))
    values = json.loads(path.read_text())
    places = [(values, key) for key in values] + [(part, key) for part in values.values() if isinstance(part, dict) for key in part]
    part, key = data.draw(st.sampled_from(places))
    part[key] = data.draw(st.sampled_from([[], {}, "x", "", -1, 0, 1e308, 10**40, True, [[]], {"a": []}, [1, 2], ["a"], float("nan"),
                                           "\ud800"]))
    path.write_text(json.dumps(values))
    try:
        conversion = Conversion(folder)
        conversion.layout("m.gguf", "Q8_0")
    except PydsaError as error:
        assert "\n" not in str(error)


def test_byte_order_marks(tmp_path):
    """Programs of Windows begin files with them."""
    folder = copy("v32", tmp_path / "in")
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert Conversion(folder).memory()["weights"]["F32"] > 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_a_link_that_leads_nowhere(name, tmp_path):
    """As an incomplete download to a cache of the hub leaves it."""
    folder = copy("v32", tmp_path / "in")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nothing")
    refused(folder, f"{name}: there is no such file", CheckpointError)


def test_a_pipe_in_place_of_a_file(tmp_path):
    for name in "model.safetensors", "config.json", "tokenizer.json":
        folder = copy("v32", tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="not a regular file"):
            Conversion(folder)


def test_on_the_command_line(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint("a\0b")
    for args in (("convert", str(tmp_path / "none"), "out.gguf"), ("info", str(tmp_path))):
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.output


def test_shared_layers_with_an_indexer_nobody_uses(tmp_path):
    """GLM files that repeat it: it is left out with a word."""
    def repeat(tensors):
        tensors |= {name.replace("layers.1.", "layers.2."): value for name, value in tensors.items() if "layers.1.self_attn.ind" in name}
    conversion = Conversion(copy("glm", tmp_path / "in", repeat))
    assert "The indexer of layer 2 is left out" in " ".join(conversion.notes)
    assert not any("blk.2.indexer" in output.name for output in conversion.outputs)
