"""pydsa convert: logits and ids of other programs, every form of weights, parts, interruptions.

The models are those of data/checkpoints, made by transformers.
"""
import json
import shutil

import numpy as np
import pytest
import tokenizers
from checkpoints import DATA, add_mtp, bf16, copy, to_fp8
from click.testing import CliRunner
from helpers import dequantize, nmse

import pydsa
from pydsa.cli import main
from pydsa.conversion import TYPES, Conversion
from pydsa.conversion.checkpoint import ReadError, Stored, read_header
from pydsa.conversion.fields import Fields
from pydsa.conversion.scales import to_float32, weights
from pydsa.conversion.types import check_importance
from pydsa.errors import CheckpointError, PydsaError, TargetError, UnsupportedModelError
from pydsa.gguf.file import open_gguf
from pydsa.gguf.layout import TensorInfo
from pydsa.gguf.writer import GGUFWriter
from pydsa.text.tokenizer import CONTROL, UNUSED, USER_DEFINED, load_tokenizer

NAMES = ("v32", "glm", "v3", "v2")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted("v32") -> (path of its F32 conversion, report)."""
    made = {}

    def make(name):
        if name not in made:
            path = tmp_path_factory.mktemp("converted") / f"{name}.gguf"
            made[name] = path, pydsa.convert(DATA / name, path, type="F32")
        return made[name]
    return make


def tensor(file, name):
    """A tensor of an open file as float32."""
    found = file.tensors[name]
    return dequantize(found.data, found.type).reshape(found.shape)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, converted, load):
    with np.load(DATA / f"{name}.npz") as stored:
        ids, expected = stored["tokens"].tolist(), stored["logits"]
    model = load(converted(name)[0])
    assert nmse(model.logits(ids), expected).max() < 1e-11
    session = model.session()
    token_by_token = [session.prefill(ids[:1]), *(session.decode(token) for token in ids[1:])]
    assert nmse(token_by_token, expected).max() < 1e-11


def test_rope_of_halves(tmp_path, load):
    """Rows are reordered, so that pairs of neighbours are those of halves."""
    with np.load(DATA / "v3.npz") as stored:
        ids, expected, others = stored["tokens"].tolist(), stored["halves"], stored["logits"]
    pydsa.convert(copy("v3", tmp_path / "in", rope_interleave=False), tmp_path / "m.gguf", "F32")
    logits = load(tmp_path / "m.gguf").logits(ids)
    assert nmse(logits, expected).max() < 1e-11 < nmse(logits, others)[1:].min()


@pytest.mark.parametrize("name, stored", [("v32", False), ("glm", True)])
def test_rope_of_the_indexer(name, stored, tmp_path, load):
    """Indexers that rotate other pairs have their rows reordered."""
    n_rot, size = 8, 64
    order = np.r_[np.arange(n_rot).reshape(2, -1).T.reshape(-1), n_rot:size]       # halves -> neighbours
    order = order if name == "v32" else np.argsort(order)

    def reorder(tensors):
        for key, (dtype, data) in tensors.items():
            if "indexer" in key and "weights_proj" not in key:
                tensors[key] = dtype, data.reshape(-1, size, *data.shape[1:])[:, order].reshape(data.shape)
    with np.load(DATA / f"{name}.npz") as arrays:
        ids, expected = arrays["tokens"].tolist(), arrays["logits"]
    pydsa.convert(copy(name, tmp_path / "in", reorder, indexer_rope_interleave=not stored), tmp_path / "m.gguf", "F32")
    assert nmse(load(tmp_path / "m.gguf").logits(ids), expected).max() < 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_tokenizers_package(name, converted):
    theirs, ours = tokenizers.Tokenizer.from_file(str(DATA / name / "tokenizer.json")), load_tokenizer(converted(name)[0])
    texts = [*json.loads((DATA / "kimi.json").read_text()), "<think>a</think>", "x" * 40, "1+2=3; it's 'quoted'\r\n\r\n ok"]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, parse_special=True) == ids and ours.decode(ids) == text
    special = theirs.token_to_id("<think>")
    assert ours.token_type[special] == USER_DEFINED and ours.token_type[-1] == UNUSED


def test_kimi_without_its_program(tmp_path):
    """Ids are those of tiktoken, and nothing of the folder is run."""
    folder = copy("v3", tmp_path / "in")
    (folder / "tokenizer.json").unlink()
    for path in (DATA / "kimi").iterdir():
        shutil.copy(path, folder)
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this was run')")
    report = pydsa.convert(folder, tmp_path / "m.gguf", "BF16")
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert report["tokenizer"] == "kimi-k2" and tokenizer.tokens[299:303] == [tokenizer.tokens[299], "[BOS]", "[EOS]", "<|im_end|>"]
    assert tokenizer.tokens[319] == "<|reserved_token_319|>" and tokenizer.token_type[319] == CONTROL
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (300, 301, "{{ messages[0].content }}")
    for text, ids in json.loads((DATA / "kimi.json").read_text()).items():
        assert tokenizer.encode(text) == ids


def test_what_deepseek_v32_needs_is_put_right(converted):
    path, report = converted("v32")
    assert any("BOS is to be added" in note for note in report["notes"]) and any("chat template" in note for note in report["notes"])
    tokenizer = load_tokenizer(path)
    assert tokenizer.add_bos and tokenizer.tokens[tokenizer.bos_id] == "<｜begin▁of▁sentence｜>"


def test_special_tokens_of_glm(converted):
    tokenizer = load_tokenizer(converted("glm")[0])
    assert tokenizer.tokens[tokenizer.bos_id] == "[gMASK]" and not tokenizer.add_bos and "[gMASK]<sop>" in tokenizer.chat_template
    assert {tokenizer.tokens[i] for i in tokenizer.eog_ids} == {"<|endoftext|>", "<|user|>", "<|observation|>"}


def test_metadata(converted):
    v32, glm = (open_gguf(converted(name)[0]).metadata for name in ("v32", "glm"))
    expected = {"block_count": 3, "attention.head_count_kv": 1, "attention.key_length": 40, "attention.value_length": 32,
                "attention.key_length_mla": 24, "attention.value_length_mla": 24, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                "rope.scaling.yarn_log_multiplier": np.float32(0.1), "expert_gating_func": 2, "expert_weights_norm": True,
                "expert_group_count": 2, "expert_group_used_count": 1, "leading_dense_block_count": 1, "attention.indexer.top_k": 8}
    assert {key: v32[f"deepseek32.{key}"] for key in expected} == expected
    assert glm["glm-dsa.attention.indexer.types"].tolist() == [True, True, False] and glm["general.architecture"] == "glm-dsa"
    assert v32["general.name"] == "v32" and v32["general.quantization_version"] == 2


def test_mixes(tmp_path, converted):
    """Matrices have the types of pydsa quantize; indexers keep Q8_0."""
    pydsa.convert(DATA / "v32", tmp_path / "m.gguf", "q4_0")
    pydsa.quantize(converted("v32")[0], tmp_path / "q.gguf", "Q4_0")
    file, other = open_gguf(tmp_path / "m.gguf"), open_gguf(tmp_path / "q.gguf")
    types = {name: t.type for name, t in file.tensors.items()}
    assert types["blk.1.ffn_up_exps.weight"] == "Q4_0" and types["blk.1.indexer.attn_q_b.weight"] == "F16"      # rows of 48
    assert types["blk.1.indexer.attn_k.weight"] == "Q8_0" and types["blk.1.indexer.proj.weight"] == "F32"
    assert {name: (t.type, t.data.tobytes()) for name, t in file.tensors.items()} == {
        name: (t.type, t.data.tobytes()) for name, t in other.tensors.items()}
    assert file.metadata["general.file_type"] == other.metadata["general.file_type"] == 2
    with pytest.raises(UnsupportedModelError, match="IQ2_XXS needs an importance matrix.*pydsa quantize"):
        check_importance([TensorInfo("blk.1.ffn_up_exps.weight", "IQ2_XXS", (8, 32, 256))], "IQ2_XXS")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_types(kind, converted, tmp_path):
    """Matrices have the type; rows of 24 are F16, norms and routers F32."""
    exact = open_gguf(converted("v32")[0])
    pydsa.convert(DATA / "v32", tmp_path / "m.gguf", kind)
    file = open_gguf(tmp_path / "m.gguf")
    for name, found in file.tensors.items():
        f32 = len(found.shape) == 1 or "norm" in name or "gate_inp" in name or "indexer.proj" in name
        short = kind == "Q8_0" and found.shape[-1] % 32
        assert found.type == ("F32" if f32 else "F16" if short else kind), name
        bound = 0 if found.type == "F32" else 1e-4 if found.type == "Q8_0" else 3e-7 if found.type == "F16" else 0
        assert nmse(tensor(file, name).reshape(-1), tensor(exact, name).reshape(-1)) <= bound


def test_mtp_blocks_are_kept(tmp_path, load, converted):
    folder = copy("v32", tmp_path / "in", add_mtp, num_nextn_predict_layers=1)
    report = pydsa.convert(folder, tmp_path / "m.gguf", "F32")
    file = open_gguf(tmp_path / "m.gguf")
    assert report["n_mtp_blocks"] == file.metadata["deepseek32.nextn_predict_layers"] == 1 and file.metadata["deepseek32.block_count"] == 4
    assert (tensor(file, "blk.3.nextn.eh_proj.weight") == np.eye(64, 128) + 1).all() and "blk.3.indexer.proj.weight" in file.tensors
    ids = list(range(4, 30))
    assert np.array_equal(load(tmp_path / "m.gguf").logits(ids), load(converted("v32")[0]).logits(ids))


def test_fused_experts(tmp_path, converted):
    """Experts that are stored together, as transformers 5 holds them."""
    def fuse(tensors):
        for il in 1, 2:
            start = f"model.layers.{il}.mlp.experts."
            gate, up, down = (np.stack([tensors.pop(f"{start}{e}.{part}_proj.weight")[1] for e in range(8)])
                              for part in ("gate", "up", "down"))
            tensors |= {f"{start}gate_up_proj": ("BF16", np.concatenate([gate, up], axis=1)), f"{start}down_proj": ("BF16", down)}
    pydsa.convert(copy("v32", tmp_path / "v32", fuse), tmp_path / "m.gguf", "F32")
    assert (tmp_path / "m.gguf").read_bytes() == converted("v32")[0].read_bytes()


def test_fp8_with_scales_of_blocks(tmp_path):
    meant = {}
    folder = copy("v32", tmp_path / "in", lambda tensors: meant.update(to_fp8(tensors)),
                  quantization_config={"quant_method": "fp8", "weight_block_size": [32, 16], "fmt": "e4m3"})
    pydsa.convert(folder, tmp_path / "m.gguf", "F32")
    file = open_gguf(tmp_path / "m.gguf")
    assert np.array_equal(tensor(file, "blk.1.attn_q_b.weight"), meant["model.layers.1.self_attn.q_b_proj.weight"])
    assert np.array_equal(tensor(file, "blk.0.ffn_down.weight"), meant["model.layers.0.mlp.down_proj.weight"])
    both = meant["model.layers.1.self_attn.kv_b_proj.weight"].reshape(4, 40, 32)
    assert np.array_equal(tensor(file, "blk.1.attn_k_b.weight"), both[:, :16].transpose(0, 2, 1))
    assert np.array_equal(tensor(file, "blk.1.attn_v_b.weight"), both[:, 16:])
    experts = tensor(file, "blk.2.ffn_up_exps.weight")
    assert all(np.array_equal(experts[e], meant[f"model.layers.2.mlp.experts.{e}.up_proj.weight"]) for e in range(8))


class Folder:
    """The tensors of one form in forms.safetensors, as a checkpoint."""

    def __init__(self, form, config=()):
        stored = {s.name: s for s in read_header(DATA / "forms.safetensors")}
        self.tensors = {name.removeprefix(f"{form}."): s._replace(name=name.removeprefix(f"{form}.")) for name, s in stored.items()
                        if name.startswith(f"{form}.")}
        self.expected = self.tensors.pop("expected").read()
        self.config = Fields(dict(config), "config.json")


GROUPS = {"num_bits": 4, "group_size": 32, "strategy": "group"}
FORMS = {"int4": GROUPS, "int4-zero": GROUPS, "int8": {"num_bits": 8, "strategy": "channel"}, "nvfp4": GROUPS, "mxfp4": GROUPS}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_compressed_tensors(form):
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": FORMS[form]}}}}
    folder = Folder(form, config)
    found, _ = weights(folder)
    weight = found["weight"]
    assert list(found) == ["weight"] and weight.shape == folder.expected.shape
    # Rounded in between by compressed-tensors, which keeps some of its factors in bfloat16
    assert np.allclose(weight.read(), folder.expected, rtol=0 if form in ("nvfp4", "mxfp4") else 1e-6, atol=0)
    assert np.array_equal(weight.read(3, 11), weight.read()[3:11])


def test_nvfp4_of_modelopt():
    """The same codes; the factor multiplies, and the matrix has its own name."""
    folder = Folder("nvfp4")
    folder.tensors["weight"] = folder.tensors.pop("weight_packed")
    factor = folder.tensors.pop("weight_global_scale")
    folder.tensors["weight_scale_2"] = factor._replace(name="weight_scale_2")
    assert factor.read() == 8
    assert np.array_equal(weights(folder)[0]["weight"].read(), 64 * folder.expected)


def test_codes_of_eight_bits_are_those_of_torch():
    stored = {s.name: s for s in read_header(DATA / "forms.safetensors")}
    for name in "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu":
        codes = stored[f"{name}.weight"]
        assert np.array_equal(to_float32(codes.read(), codes.dtype), stored[f"{name}.expected"].read(), equal_nan=True)


def test_scales_of_channels_and_tensors(tmp_path):
    """One scale a row, one for all, and those of activations."""
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"

    def change(tensors):
        tensors[name] = "I8", np.arange(96 * 64).reshape(96, 64).astype("i1")
        tensors[name + "_scale"] = "BF16", bf16(2.0 ** (np.arange(96) % 5))[:, None]
        tensors[other] = "F8_E5M2", np.full((96, 64), 0x3C, "u1")      # 1.0
        tensors[other + "_scale"] = "F32", np.float32([3])
        tensors["model.layers.0.mlp.up_proj.input_scale"] = "F32", np.float32([1])
    report = pydsa.convert(copy("v32", tmp_path / "in", change), tmp_path / "m.gguf", "F32")
    file = open_gguf(tmp_path / "m.gguf")
    assert np.array_equal(tensor(file, "blk.0.ffn_up.weight"),
                          np.arange(96 * 64).reshape(96, 64).astype("i1") * 2.0 ** (np.arange(96) % 5)[:, None])
    assert (tensor(file, "blk.0.ffn_gate.weight") == 3).all() and any("scales of activations" in note for note in report["notes"])


def test_exponents_as_scales(tmp_path):
    """MXFP8: a byte is the exponent of a power of two, 32 columns share it."""
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        tensors[name] = "F8_E4M3", np.full((96, 64), 0x38, "u1")       # 1.0
        tensors[name + "_scale"] = "U8", (120 + np.arange(192) % 9).reshape(96, 2).astype("u1")
    groups = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"strategy": "group", "group_size": 32}}}}
    pydsa.convert(copy("v32", tmp_path / "in", change, quantization_config=groups), tmp_path / "m.gguf", "F32")
    assert np.array_equal(tensor(open_gguf(tmp_path / "m.gguf"), "blk.0.ffn_up.weight"),
                          (2.0 ** (np.arange(192) % 9 - 7)).reshape(96, 2).repeat(32, axis=1))


def test_pieces_are_put_together(tmp_path, converted, monkeypatch):
    """Pieces of a few rows give the same bytes."""
    monkeypatch.setattr("pydsa.conversion.names.PIECE", 500)
    pydsa.convert(DATA / "v32", tmp_path / "m.gguf", "F32")
    assert (tmp_path / "m.gguf").read_bytes() == converted("v32")[0].read_bytes()


def test_parts_and_interruptions(tmp_path, converted):
    seen = []

    def stop(done, total, name):
        seen.append(name)
        if name.startswith("blk.1.ffn_up_exps"):
            raise KeyboardInterrupt
    options = dict(type="F32", split_max_bytes=200_000)
    with pytest.raises(KeyboardInterrupt):
        pydsa.convert(DATA / "v32", tmp_path / "m.gguf", progress=stop, **options)
    assert not list(tmp_path.glob("*.gguf"))
    report = pydsa.convert(DATA / "v32", tmp_path / "m.gguf", **options)
    assert 0 < report["resumed"] < report["n_bytes"] and len(report["parts"]) == len(list(tmp_path.iterdir())) > 4
    file, whole = open_gguf(report["parts"][0]["path"]), open_gguf(converted("v32")[0])
    assert {name: t.data.tobytes() for name, t in file.tensors.items()} == {name: t.data.tobytes() for name, t in whole.tensors.items()}


def test_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "m.gguf"
    for options, match in (dict(type="Q9"), "'Q9', expected one of"), (dict(type=None), "expected one of"):
        with pytest.raises(PydsaError, match=match):
            pydsa.convert(DATA / "v32", out, **options)
    report = pydsa.convert(DATA / "v32", out, "F32", dry_run=True)
    assert report["dry_run"] and report["n_bytes"] == report["parts"][0]["n_bytes"] > 10**6 and not list(tmp_path.iterdir())
    out.write_bytes(b"mine")
    with pytest.raises(TargetError, match="--force"):
        pydsa.convert(DATA / "v32", out, "F32")
    assert out.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1
    for name in "config.json", "model-00001-of-00005.safetensors":
        with pytest.raises(TargetError, match="which is read"):
            pydsa.convert(DATA / "v32", DATA / "v32" / name, "F32", overwrite=True)
    pydsa.convert(DATA / "v32", out, "F32", overwrite=True)
    assert out.stat().st_size == report["n_bytes"]


@pytest.mark.parametrize("bad, match", [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (1e6, "F16 does not hold")])
def test_weights_that_are_no_numbers_leave_nothing(bad, match, tmp_path):
    def damage(tensors):
        tensors["model.layers.2.mlp.experts.5.down_proj.weight"][1][3, 4] = bf16(bad)
    folder = copy("v32", tmp_path / "in", damage)
    with pytest.raises((CheckpointError, PydsaError), match=match) as error:
        pydsa.convert(folder, tmp_path / "m.gguf", "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert ("experts.5.down_proj" in str(error.value)) == (match == "NaN or infinite")


def test_memory_by_type():
    conversion = Conversion(DATA / "v32")
    memory = conversion.memory(100, kv_type="f32")
    assert memory["caches"] == 100 * 3 * 4 * (40 + 64) and list(memory["weights"]) == list(TYPES)
    assert memory["weights"]["F32"] == 4 * conversion.n_params > 1.9 * memory["weights"]["BF16"]
    with pytest.raises(PydsaError, match="expected an integer from 1"):
        conversion.memory(-1)


def test_on_the_command_line(tmp_path):
    def run(*args):
        return CliRunner().invoke(main, args)
    out = str(tmp_path / "m.gguf")
    result = run("convert", str(DATA / "v32"), out, "--type", "bf16", "--split-max-size", "200K", "--dry-run", "-o", "json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["type"] == "BF16" and len(report["parts"]) > 1 and not list(tmp_path.iterdir())
    result = run("convert", str(DATA / "v32"), out, "--type", "BF16")
    assert result.exit_code == 0 and "pre-tokenizer deepseek-v3" in result.stdout and f"written: {out}" in result.stdout
    result = run("convert", str(DATA / "v32"), out)
    assert result.exit_code == 2 and "--force" in result.stderr and "Traceback" not in result.stderr
    assert run("convert", str(DATA / "v32"), out, "--split-max-size", "4X").exit_code == 2
    result = run("info", str(DATA / "glm"))
    assert result.exit_code == 0 and "GlmMoeDsaForCausalLM -> glm-dsa" in result.stdout and "memory by type" in result.stdout
    assert json.loads(run("info", str(DATA / "glm"), "-o", "json", "-c", "64").stdout)["memory"]["n_ctx"] == 64
    for idle in (["--check"], ["--dsa-top-k", "5"], ["--attention", "dense"]):
        assert "takes -c, --kv-type, --index-type and -o only" in run("info", str(DATA / "glm"), *idle).stderr
    assert run("info", str(tmp_path)).exit_code == 2
    assert "pydsa convert makes one" in run("run", str(DATA / "glm"), "-p", "x").stderr


def test_ctrl_c_on_the_command_line(tmp_path, monkeypatch):
    write = GGUFWriter.write

    def stop(writer, info, chunks):
        if info.name.startswith("blk.1"):
            raise KeyboardInterrupt
        write(writer, info, chunks)
    monkeypatch.setattr(GGUFWriter, "write", stop)
    args = ["convert", str(DATA / "v32"), str(tmp_path / "m.gguf"), "--type", "F32"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
    monkeypatch.undo()
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and "were there from an interrupted run" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_drive_that_fails_for_a_while(tmp_path, monkeypatch):
    """What is written is kept, as the same command may succeed."""
    read, left = Stored.read, [60]

    def fail(stored, first=0, last=None):
        left[0] -= 1
        if not left[0]:
            raise ReadError(f"{stored.path}: the file cannot be read (Input/output error).")
        return read(stored, first, last)
    monkeypatch.setattr(Stored, "read", fail)
    result = CliRunner().invoke(main, ["convert", str(DATA / "v32"), str(tmp_path / "m.gguf"), "--type", "BF16"])
    assert result.exit_code == 2 and "the same command goes on" in result.stderr and "Input/output error" in result.stderr
    monkeypatch.undo()
    assert pydsa.convert(DATA / "v32", tmp_path / "m.gguf", "BF16")["resumed"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_models_that_gguf_cannot_say(tmp_path):
    yarn = json.loads((DATA / "v32" / "config.json").read_text())["rope_parameters"]
    for i, (fields, match) in enumerate([
            ({"architectures": ["LlamaForCausalLM"]}, "architecture is 'LlamaForCausalLM'"), ({"hidden_act": "gelu"}, "hidden_act"),
            ({"rope_parameters": yarn | {"mscale_all_dim": 0.5}}, "mscale"),
            ({"rope_parameters": yarn | {"rope_type": "llama3"}}, "llama3"),
            ({"quantization_config": {"quant_method": "gptq"}}, "gptq")]):
        with pytest.raises(UnsupportedModelError, match=match):
            Conversion(copy("v32", tmp_path / str(i), **fields))
