"""--override-kv and override_kv: what is read, what is refused, what info shows."""
import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids

import pydsa
from pydsa import PydsaError
from pydsa.cli import main
from pydsa.gguf.file import Metadata
from pydsa.gguf.override import override, parse_overrides
from pydsa.setup import Setup

IDS = random_ids(40)
TOP_K = "deepseek32.attention.indexer.top_k"


@pytest.mark.parametrize("texts, expected", [
    ([], {}), (["a.b=int:7"], {"a.b": 7}), (["a=int:-7", "b=float:1e-5"], {"a": -7, "b": 1e-5}),
    (["a=bool:true,b=bool:false"], {"a": True, "b": False}), (["a=str:x=y, z,b=int:1,c=str:"], {"a": "x=y, z", "b": 1, "c": ""}),
    (["a=str:int:3"], {"a": "int:3"}), (["a=float:2"], {"a": 2.0})])
def test_texts(texts, expected):
    met = parse_overrides(texts)
    assert met == expected and [type(value) for value in met.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("text, message", [
    ("a", "'a', expected KEY=TYPE:VALUE"), ("", "expected KEY=TYPE:VALUE"), ("a=3", "expected KEY=TYPE:VALUE"), ("=int:3", "KEY=TYPE"),
    ("a=i32:3", "KEY=TYPE"), ("a=double:3", "type 'double', expected one of int"), ("a=int:3.5", "'3.5', expected a number"),
    ("a=int:", "expected a number"), ("a=bool:1", "'1', expected true or false"), ("a=float:x", "expected a number"),
    ("a=int:1,a=int:2", "'a' twice")])
def test_texts_that_are_refused(text, message):
    with pytest.raises(PydsaError, match=message):
        parse_overrides([text])


FILE = Metadata({"general.architecture": "x", "x.n": 3, "x.f": 1.0, "x.b": True, "x.s": "text", "x.list": ["a"], "y.n": 9,
                 "x.array": np.arange(3, dtype=np.int32), "general.alignment": 32}, "model.gguf")


def test_values_replace_those_of_the_file():
    values = {"x.n": 4, "x.f": 0.5, "x.b": False, "x.s": "", "x.array": 7, "x.new": 1}
    met = override(FILE, values)
    assert {key: met[key] for key in values} == values and met["x.list"] == ["a"] and FILE["x.n"] == 3 and "x.new" not in FILE


def test_another_architecture_takes_the_keys_along():
    met = override(FILE, {"general.architecture": "z", "z.f": 2.0})
    assert met["z.n"] == 3 and met["z.f"] == 2.0 and met["y.n"] == 9 and not any(key.startswith("x.") for key in met)
    assert override(FILE, {"general.architecture": "y"})["y.n"] == 9        # a key that is there already stays


@pytest.mark.parametrize("values, message", [
    ({"x.n": 4}, "'x.n' would change nothing, as the architecture is overridden too; use 'z.n'"),
    ({"z.n": 4.0}, "'z.n' is of type float, expected int, as in the file"), ({"z.array": 1.0}, "expected int")])
def test_another_architecture_has_keys_of_its_own(values, message):
    with pytest.raises(PydsaError, match=message):
        override(FILE, {"general.architecture": "z", **values})


@pytest.mark.parametrize("values, message", [
    ({"x.n": 3.0}, "type float, expected int, as in the file"), ({"x.f": 3}, "type int, expected float"), ({"x.b": 1}, "expected bool"),
    ({"x.n": True}, "type bool, expected int"), ({"x.s": 1}, "expected str"), ({"x.array": 1.0}, "expected int"),
    ({"x.list": "a"}, "array of strings"), ({"x.new": [1]}, "type list"), ({"x.new": None}, "type NoneType"),
    ({"x.new": float("nan")}, "finite"), ({"x.new": 2**64}, "64 bits"), ({"": 1}, "''"), ({3: 1}, "'3'"), ({"k" * 99999: 1}, "1 to 65535"),
    ({"split.count": 1}, "read with the file"), ({"general.alignment": 64}, "read with the file")], ids=str)
def test_values_that_are_refused(values, message):
    with pytest.raises(PydsaError, match=message) as error:
        override(FILE, values)
    assert len(str(error.value)) < 300


def test_overrides_of_another_form(small_model):
    with pytest.raises(PydsaError, match="override_kv is of type list, expected a dict"):
        Setup(small_model(), override_kv=[f"{TOP_K}=int:5"])


def test_keys_that_nothing_reads(small_model):
    for key in ("deepseek32.atention.indexer.top_k", "glm-dsa.block_count", "tokenizer.ggml.add_bos", "tokenizer.ggml.eof_token_id"):
        with pytest.raises(PydsaError, match=f"nothing reads the key '{key}'"):
            Setup(small_model(), override_kv={key: 3})
    for key, value in (("deepseek32.rope.scaling.attn_factor", 1.0), ("tokenizer.ggml.eot_token_id", 3), ("general.name", "new")):
        Setup(small_model(), override_kv={key: value})


def test_a_model_runs_with_them(small_model, load):
    model = pydsa.load(small_model(), n_ctx=256, kv_type="f32", threads=1, override_kv={TOP_K: 5, "tokenizer.ggml.add_bos_token": False})
    np.testing.assert_array_equal(model.logits(IDS), load(small_model(), dsa_top_k=5).logits(IDS))
    assert not model.tokenizer.add_bos and load(small_model()).tokenizer.add_bos
    assert model.setup.fingerprint != load(small_model()).setup.fingerprint       # a session of one is not one of the other


def test_the_command_line(small_model):
    def info(*args):
        return CliRunner().invoke(main, ["info", str(small_model()), *args])

    args = ["--override-kv", f"{TOP_K}=int:5,general.name=str:My model", "--override-kv", "deepseek32.rope.freq_base=float:5e5"]
    text = info(*args).output
    assert text.startswith("My model: deepseek32") and f"overridden: {TOP_K} = 5 (12)" in text and "freq_base = 500000.0 (10000.0)" in text
    report = json.loads(info(*args, "-o", "json").output)
    assert report["config"]["indexer_top_k"] == 5 and report["overrides"][TOP_K] == {"value": 5, "file": 12}
    for wrong, message in (("x", "KEY=TYPE:VALUE"), (f"{TOP_K}=str:5", "expected int, as in the file"), ("x.y=int:1", "nothing reads")):
        result = info("--override-kv", wrong)
        assert result.exit_code == 2 and message in result.stderr and not result.stdout
    for command in ("run", "bench", "trace"):
        assert "--override-kv" in CliRunner().invoke(main, [command, "--help"]).output


def test_notes_are_lines_of_the_command_line(small_model):
    """A command that loads warns of it; info has it in its report."""
    path = str(small_model(arch="deepseek2", legacy_kv_b=True))
    assert "\nnote: attn_kv_b is split in two on load" in CliRunner().invoke(main, ["info", path]).output
    result = CliRunner().invoke(main, ["run", path, "-p", "a", "--raw", "-n", "1", "-c", "64", "-t", "1"])
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith(f"warning: {path}: attn_kv_b is split")]
