"""Which types tensors get: llama-quantize's for every file type, and what the user asks for."""
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from pydsa.errors import PydsaError
from pydsa.gguf.file import Metadata, Tensor
from pydsa.quantization.choice import Choice, checked_patterns, choose, file_type
from pydsa.quantization.mixes import MIXES
from tools.golden_mixes import MODELS
from tools.make_model import ModelSpec, model_keys, tensor_shapes, tensor_type

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "data/mixes.json.gz").read_bytes()))


def model(title):
    """The metadata and the tensors, without data, of one of the models."""
    spec = ModelSpec(**MODELS[title])
    keys = {f"{spec.arch}.{key}": value for key, value in model_keys(spec).items() if value is not None}
    tensors = {name: Tensor(name, tensor_type(spec, name, shape).name, shape, np.empty(0, np.uint8))
               for name, shape in tensor_shapes(spec).items()}
    return Metadata({"general.architecture": spec.arch, **keys}), tensors


def chosen(title, mix, imatrix=False, **options):
    options["tensor_types"] = checked_patterns(options.get("tensor_types", ()))
    return choose(*model(title), mix, Choice(**options), imatrix)


@pytest.mark.parametrize("title", MODELS)
def test_types_are_those_of_llama_quantize(title):
    assert {name.split()[0] for name in GOLDEN[title]} >= MIXES.keys() - {"Q1_0"}
    for name, expected in GOLDEN[title].items():
        mix, *imatrix = name.split()
        assert list(chosen(title, mix, bool(imatrix), keep_indexer=False).values()) == expected, name


def test_indexers_stay_q8_0_or_better():
    matrices = [f"blk.{layer}.indexer.{part}.weight" for layer in range(17) for part in ("attn_q_b", "attn_k")]
    for mix in MIXES:
        types = chosen("v3.2", mix)
        assert {types[name] for name in matrices} == {mix if mix in ("F32", "F16", "BF16") else "Q8_0"}
        assert types["blk.3.indexer.proj.weight"] == "F32"
    metadata, tensors = model("v3.2")
    stored = {name: tensor._replace(type="Q4_K") for name, tensor in tensors.items() if len(tensor.shape) > 1}
    types = choose(metadata, tensors | stored, "Q2_K", Choice(), False)
    assert {types[name] for name in matrices} == {"Q4_K"}, "less is not made more, nor less still"
    assert choose(metadata, tensors | stored, "F16", Choice(), False)[matrices[0]] == "F16"
    asked = chosen("v3.2", "Q4_K_M", tensor_types=[("indexer.attn_k", "q5_k")])
    assert asked[matrices[1]] == "Q5_K" and asked[matrices[0]] == "Q8_0"
    ragged = chosen("ragged", "Q2_K")
    assert ragged["blk.3.indexer.attn_q_b.weight"] == ragged["blk.3.indexer.attn_k.weight"] == "Q8_0"


def test_what_the_user_asks_for_goes_before_the_mix():
    types = chosen("v3.2", "Q4_K_M", tensor_types=[(r"blk\.1\.ffn_down", "Q8_0"), ("ffn_down|exp_probs", "Q5_K")])
    assert (types["blk.1.ffn_down_exps.weight"], types["blk.2.ffn_down_exps.weight"]) == ("Q8_0", "Q5_K")
    assert types["blk.1.exp_probs_b.bias"] == "F32" and types["blk.1.ffn_up_exps.weight"] == "Q4_K"
    assert chosen("v3.2", "Q4_K_M", output="IQ4_XS", embedding="F16")["output.weight"] == "IQ4_XS"
    assert chosen("v3.2", "Q4_K_M", output="IQ4_XS", embedding="F16")["token_embd.weight"] == "F16"
    assert chosen("glm, tied", "Q4_K_M", output="Q8_0")["token_embd.weight"] == "Q8_0"
    assert chosen("v3.2", "Q4_K_M", leave_output=True)["output.weight"] == "BF16"
    pure = chosen("v3.2", "Q4_K_M", pure=True)
    assert {pure[name] for name in ("output.weight", "token_embd.weight", "blk.0.ffn_down.weight")} == {"Q4_K"}
    assert chosen("v3.2", "F16", tensor_types=[("ffn_down", "Q8_0")])["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert chosen("v3.2", "COPY") == {name: tensor.type for name, tensor in model("v3.2")[1].items()}
    assert file_type("q5_k") == "Q5_K_M" and file_type("copy") == "COPY"


def test_what_is_refused():
    for text in ("Q4_K_X", "", 3, None):
        with pytest.raises(PydsaError, match="The type is .*, expected one of .*Q4_K_M.* or COPY"):
            file_type(text)
    with pytest.raises(PydsaError, match="has the type 'Q9', expected one of F32"):
        checked_patterns([("a", "Q9")])
    with pytest.raises(PydsaError, match=r"pattern '\(', which is no regular expression"):
        checked_patterns([("(", "Q8_0")])
    with pytest.raises(PydsaError, match="pattern 'ffn_dwon', which is in no name"):
        chosen("v3.2", "Q4_K_M", tensor_types=[("ffn_dwon", "Q8_0")])
