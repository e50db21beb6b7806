"""tools/make_model.py: tensors, quantizers, files, tokenizer, options.

gguf-py reads back what it writes. The same options give the same bytes.
"""

from collections import Counter
from math import prod

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tools.make_model import FIRST_TOKENS, LAST_TOKENS, MIN_VOCAB, ModelSpec, main, make_model, n_bytes, tensor_shapes, train_tokenizer
from tools.mixes import FILE_TYPES, MIXES, STOCK, tensor_type

TINY = dict(n_embd=256, n_head=2, n_lora_q=256, n_lora_kv=256, n_ff=256, n_expert=4, n_ff_exp=256, n_vocab=300,
            indexer_n_head=4)


def read(path):
    """Metadata and tensors of a file, by gguf-py.

    Tensors are {name: (numpy shape, type name, bytes)}.
    """
    reader = gguf.GGUFReader(path)
    metadata = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    return metadata, {t.name: (tuple(map(int, t.shape[::-1])), t.tensor_type.name, t.data) for t in reader.tensors}


def made(path, **options):
    return read(make_model(path / "model.gguf", ModelSpec(**{**TINY, **options})))


def shapes_of(tensors, prefix):
    return {name[len(prefix):]: shape for name, (shape, _, _) in tensors.items() if name.startswith(prefix)}


ATTENTION = {
    "attn_norm.weight": (256,), "attn_q_a.weight": (256, 256), "attn_q_a_norm.weight": (256,),
    "attn_q_b.weight": (192, 256), "attn_kv_a_mqa.weight": (288, 256), "attn_kv_a_norm.weight": (256,),
    "attn_k_b.weight": (2, 256, 64), "attn_v_b.weight": (2, 64, 256), "attn_output.weight": (256, 128)}
INDEXER = {
    "indexer.attn_q_b.weight": (256, 256), "indexer.attn_k.weight": (64, 256), "indexer.k_norm.weight": (64,),
    "indexer.k_norm.bias": (64,), "indexer.proj.weight": (4, 256)}
DENSE = {
    "ffn_norm.weight": (256,), "ffn_gate.weight": (320, 256), "ffn_up.weight": (320, 256),
    "ffn_down.weight": (256, 320)}
MOE = {
    "ffn_norm.weight": (256,), "ffn_gate_inp.weight": (4, 256), "exp_probs_b.bias": (4,),
    "ffn_gate_exps.weight": (4, 96, 256), "ffn_up_exps.weight": (4, 96, 256), "ffn_down_exps.weight": (4, 256, 96),
    "ffn_gate_shexp.weight": (192, 256), "ffn_up_shexp.weight": (192, 256), "ffn_down_shexp.weight": (256, 192)}
NEXTN = {"nextn.eh_proj.weight": (256, 512), "nextn.enorm.weight": (256,), "nextn.hnorm.weight": (256,),
         "nextn.shared_head_norm.weight": (256,)}
WIDTHS = dict(n_head=2, n_v=64, n_ff=320, n_ff_exp=96, n_expert_shared=2)


def test_tensors_of_deepseek32(tmp_path):
    metadata, tensors = made(tmp_path, **WIDTHS, nextn=1)
    assert metadata["general.architecture"] == "deepseek32"
    assert metadata["deepseek32.block_count"] == 4 and metadata["deepseek32.nextn_predict_layers"] == 1
    assert shapes_of(tensors, "blk.0.") == {**ATTENTION, **INDEXER, **DENSE}
    assert shapes_of(tensors, "blk.1.") == shapes_of(tensors, "blk.2.") == {**ATTENTION, **INDEXER, **MOE}
    assert shapes_of(tensors, "blk.3.") == {**ATTENTION, **INDEXER, **MOE, **NEXTN}
    assert {name: shape for name, (shape, _, _) in tensors.items() if not name.startswith("blk.")} == {
        "token_embd.weight": (300, 256), "output_norm.weight": (256,), "output.weight": (300, 256)}


@pytest.mark.parametrize("options, full", [
    (dict(n_layer=4), [0, 1, 2, 3]),
    (dict(n_layer=4, indexer_types="FSSF"), [0, 3]),
    (dict(n_layer=12, n_ctx=1 << 20), [0, 1, 2, 6, 10]),
    (dict(n_layer=4, indexer_types="FSSF", indexer_shared_tensors=True), [0, 1, 2, 3]),
])
def test_indexers_of_glm_dsa(tmp_path, options, full):
    metadata, tensors = made(tmp_path, arch="glm-dsa", **WIDTHS, **options, nextn=1)
    blocks = [shapes_of(tensors, f"blk.{layer}.") for layer in range(options["n_layer"] + 1)]
    assert [layer for layer, block in enumerate(blocks) if INDEXER.items() <= block.items()] == full
    assert blocks[-1] == {**ATTENTION, **MOE, **NEXTN}
    assert metadata.get("glm-dsa.attention.indexer.types") == (
        [True, False, False, True] if "indexer_types" in options else None)
    assert metadata["tokenizer.ggml.pre"] == "glm4"


def test_tensors_of_deepseek2(tmp_path):
    metadata, tensors = made(tmp_path, arch="deepseek2", **WIDTHS)
    assert shapes_of(tensors, "blk.0.") == {**ATTENTION, **DENSE}
    assert shapes_of(tensors, "blk.2.") == {**ATTENTION, **MOE}
    assert not [key for key in metadata if "indexer" in key]


def test_variants_of_deepseek2(tmp_path):
    metadata, tensors = made(
        tmp_path, arch="deepseek2", n_lora_q=0, n_expert_shared=0, n_expert_groups=0, exp_probs_b=False,
        expert_gating_func="softmax", expert_weights_norm=False, tied_output=True, legacy_kv_b=True)
    block = shapes_of(tensors, "blk.1.")
    assert block["attn_q.weight"] == (192, 256) and block["attn_kv_b.weight"] == (256, 256)
    assert not [name for name in block for part in ("attn_q_", "shexp", "exp_probs", "attn_k_b") if part in name]
    assert "output.weight" not in tensors
    assert metadata["deepseek2.expert_gating_func"] == 1 and metadata["deepseek2.expert_shared_count"] == 0
    assert (metadata["deepseek2.attention.key_length"], metadata["deepseek2.attention.value_length"]) == (96, 64)
    for key in ("attention.q_lora_rank", "expert_group_count", "expert_weights_norm", "attention.key_length_mla"):
        assert f"deepseek2.{key}" not in metadata


def test_metadata_values_and_types(tmp_path):
    fields = gguf.GGUFReader(make_model(tmp_path / "model.gguf", ModelSpec(**TINY))).fields
    u32, f32, boolean, string = (gguf.GGUFValueType[name] for name in ("UINT32", "FLOAT32", "BOOL", "STRING"))
    for key, kind, value in [
            ("attention.key_length", u32, 288), ("attention.value_length", u32, 256),
            ("attention.key_length_mla", u32, 96), ("attention.value_length_mla", u32, 64),
            ("attention.head_count_kv", u32, 1), ("rope.dimension_count", u32, 32), ("rope.freq_base", f32, 10000.0),
            ("rope.scaling.type", string, "yarn"), ("rope.scaling.factor", f32, 4.0),
            ("rope.scaling.original_context_length", u32, 1024), ("expert_weights_norm", boolean, True),
            ("expert_weights_scale", f32, 2.5), ("expert_gating_func", u32, 2), ("expert_group_used_count", u32, 1),
            ("leading_dense_block_count", u32, 1), ("attention.indexer.top_k", u32, 64), ("context_length", u32, 4096)]:
        assert (fields[f"deepseek32.{key}"].types[0], fields[f"deepseek32.{key}"].contents()) == (kind, value), key


# The error on normal values, relative to them, that each type stays below: what a search of the grid reaches, and a little more.
BOUNDS = {"Q1_0": 0.61, "TQ1_0": 0.49, "TQ2_0": 0.49, "IQ1_S": 0.46, "IQ1_M": 0.43, "IQ2_XXS": 0.345, "IQ2_XS": 0.31, "IQ2_S": 0.26,
          "IQ3_XXS": 0.19, "IQ3_S": 0.145, "Q2_K": 0.36, "Q3_K": 0.17, "Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.022, "IQ4_NL": 0.09,
          "IQ4_XS": 0.09, "NVFP4": 0.1}


def numbers(stored, kind):
    """The numbers that bytes of a type stand for, by gguf-py.

    It does not know Q1_0: a float16 d, then a bit a number, d where it is set and -d elsewhere.
    """
    if kind != "Q1_0":
        return dequantize(stored, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    blocks = stored.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d).reshape(*stored.shape[:-1], -1)


def rmse(x, y):
    return np.sqrt(np.mean((x - y) ** 2)) / x.std()


SHORT_ROWS = {"IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL",
              "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0",
              "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q1_0": "F16"}


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_types(tmp_path, kind):
    metadata, tensors = made(tmp_path, type=kind)
    assert metadata["general.file_type"] == FILE_TYPES[kind]
    (tmp_path / "exact").mkdir()
    _, exact = made(tmp_path / "exact", type="F32")
    base = "Q4_K" if kind == "Q4_K_M" else kind
    assert tensors["blk.1.ffn_up_exps.weight"][1] == base
    assert tensors["blk.1.attn_k_b.weight"][1] == SHORT_ROWS.get(base, base)
    kept = [name for name, (shape, _, _) in tensors.items() if len(shape) == 1 or "gate_inp" in name or "proj" in name]
    assert {tensors[name][1] for name in kept} == {"F32"}
    for name, (shape, stored, data) in tensors.items():
        x, y = exact[name][2], numbers(data, stored)
        assert x.shape == y.shape == shape and rmse(x, y) < max(BOUNDS.get(stored, 0), 0.12), name


def test_numbers_of_file_types():
    for name, number in {**FILE_TYPES, **{name: mix.file_type for name, mix in STOCK.items()}}.items():
        names = {f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"MOSTLY_{name}_MOE", f"ALL_{name}"}
        assert gguf.LlamaFileType(number).name in names


def types_of(**options):
    """Tensor name -> type and shape of a model, which is not written."""
    spec = ModelSpec(**options)
    return {name: (tensor_type(spec, name, shape), shape) for name, shape in tensor_shapes(spec).items()}


def counts(**options):
    return dict(Counter(kind.name for kind, _ in types_of(**options).values()))


GLM = dict(arch="glm-dsa", n_layer=78, n_layer_dense=3, nextn=1, n_embd=6144, n_head=64, n_lora_q=2048, n_lora_kv=512, n_nope=192,
           n_rot=64, n_v=256, n_ff=12288, n_expert=256, n_expert_used=8, n_ff_exp=2048, n_expert_groups=1, indexer_n_head=32,
           indexer_head_size=128, n_vocab=154880, n_ctx=1 << 20, indexer_shared_tensors=True)
R1 = dict(arch="deepseek2", legacy_kv_b=True, n_layer=61, n_layer_dense=3, n_embd=7168, n_head=128, n_lora_q=1536, n_lora_kv=512,
          n_nope=128, n_rot=64, n_v=128, n_ff=18432, n_expert=256, n_expert_used=8, n_ff_exp=2048, n_expert_groups=8, n_vocab=129280)
V2 = R1 | dict(n_layer=60, n_layer_dense=1, n_embd=5120, n_expert=160, n_expert_shared=2, n_ff=12288, n_ff_exp=1536, exp_probs_b=False,
               n_vocab=102400)
MOONLIGHT = dict(arch="deepseek2", n_layer=27, n_layer_dense=1, n_embd=2048, n_head=16, n_lora_q=0, n_lora_kv=512, n_nope=128, n_rot=64,
                 n_v=128, n_ff=11264, n_expert=64, n_expert_used=6, n_ff_exp=1408, n_expert_shared=2, n_expert_groups=0, n_vocab=163840)


@pytest.mark.parametrize("mix, n_published", [("UD-IQ1_S", 216715360960), ("UD-IQ2_XXS", 238458632928), ("UD-IQ2_M", 238577580768),
                                              ("UD-Q2_K_XL", 253878401856)])
def test_mixes_have_the_sizes_of_published_files(mix, n_published):
    """Unsloth's files of GLM-5.2 have 9,541,344 bytes besides tensors.

    They have an indexer in the MTP block too, of 10,535,936 bytes. A file more has a header more.
    """
    total = sum(-(-n_bytes(shape, kind) // 32) * 32 for kind, shape in types_of(**GLM, mix=mix).values())
    assert abs(total + 10535936 + 9541344 - n_published) < 100


@pytest.mark.parametrize("options, expected", [
    (dict(**R1, mix="UD-Q2_K_XL-R1"), dict(F32=361, Q2_K=171, Q3_K=3, Q4_K=306, Q6_K=184)),
    (dict(**V2, mix="IQ3_XXS"), dict(F32=300, IQ3_XXS=597, IQ3_S=61, Q5_K=1)),
    (dict(**MOONLIGHT, mix="IQ4_XS"), dict(F32=134, IQ4_XS=242, IQ4_NL=53, Q6_K=1)),
], ids=["R1", "V2", "Moonlight"])
def test_mixes_have_the_counts_of_published_files(options, expected):
    """The numbers of tensors of each type, as llama.cpp printed them."""
    assert counts(**options) == expected


def test_unsloth_mix():
    """The types that the header of GLM-5.2's UD-IQ2_XXS has."""
    types = {name: kind.name for name, (kind, _) in types_of(**GLM, mix="UD-IQ2_XXS").items()}

    def layers(part, kind):
        return [layer for layer in range(79) if types.get(f"blk.{layer}.{part}.weight") == kind]

    usual = [*range(3, 8), *range(9, 78)]
    assert layers("ffn_down_exps", "IQ3_XXS") == usual[:-3] and layers("ffn_down_exps", "IQ4_XS") == [8, 75, 76, 77]
    for part in ("ffn_gate_exps", "ffn_up_exps"):
        assert (layers(part, "IQ2_XXS"), layers(part, "IQ2_S"), layers(part, "Q2_K")) == (usual, [8], [78])
    assert layers("ffn_down_exps", "Q3_K") == [78] and layers("nextn.eh_proj", "Q8_0") == [78]
    assert layers("ffn_down_shexp", "Q8_0") == layers("ffn_up_shexp", "Q6_K") == layers("attn_output", "Q6_K") == [8]
    assert layers("ffn_down_shexp", "Q6_K") == layers("ffn_gate_shexp", "Q5_K") == [*usual, 78]
    assert layers("attn_k_b", "Q8_0") == list(range(79))
    assert layers("indexer.attn_k", "Q8_0") == layers("indexer.proj", "F32") == list(range(78))
    assert layers("ffn_down", "Q6_K") == layers("ffn_up", "Q5_K") == [0, 1, 2]
    assert types["output.weight"] == types["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize("mix, experts, expected", [
    ("IQ1_S", 16, {"token_embd": "Q2_K", "output": "Q5_K", "blk.0.ffn_down": "Q2_K", "blk.1.ffn_down_exps": "Q2_K", "blk.1.ffn_down_shexp":
                   "IQ1_S", "blk.1.attn_output": "IQ2_XXS", "blk.1.attn_kv_b": "Q4_K", "blk.1.attn_q_b": "IQ1_S"}),
    ("IQ2_S", 16, {"token_embd": "IQ3_S", "blk.1.ffn_down_exps": "IQ3_S", "blk.2.ffn_down_exps": "IQ2_XS", "blk.2.attn_output": "IQ3_S"}),
    ("IQ2_M", 2, {"blk.1.attn_kv_b": "IQ3_S", "blk.5.attn_q_a": "IQ2_S"}),
    ("IQ2_XS", 8, {"blk.1.attn_output": "Q5_K", "blk.1.attn_q_a": "IQ2_XS"}),
    ("Q2_K", 16, {"output": "Q6_K", "blk.3.ffn_down_exps": "Q3_K", "blk.3.attn_output": "Q3_K", "blk.3.ffn_up_exps": "Q2_K"}),
    ("Q2_K_S", 8, {"blk.1.ffn_down_exps": "Q4_K", "blk.2.ffn_down_exps": "Q2_K", "blk.2.attn_output": "Q2_K", "blk.2.attn_kv_b": "Q8_0"}),
    ("IQ3_XS", 16, {"blk.1.ffn_up_exps": "IQ3_S", "blk.2.ffn_up_exps": "IQ3_XXS", "blk.14.ffn_gate_exps": "IQ3_S"}),
    ("IQ3_M", 8, {"blk.4.ffn_down_exps": "Q4_K", "blk.5.ffn_down_exps": "IQ3_S", "blk.4.attn_output": "Q5_K"}),
    ("IQ3_M", 16, {"blk.1.ffn_down_exps": "Q4_K", "blk.4.ffn_down_exps": "IQ3_S", "blk.4.attn_output": "Q4_K"}),
    ("Q3_K_M", 16, {"blk.0.ffn_down": "Q5_K", "blk.1.ffn_down_exps": "Q4_K", "blk.1.attn_kv_b": "Q5_K", "blk.2.attn_kv_b": "Q4_K"}),
    ("Q3_K_L", 8, {"blk.1.attn_output": "Q3_K", "blk.1.ffn_down_exps": "Q5_K", "blk.1.attn_kv_b": "Q8_0"}),
    ("Q4_K_S", 16, {"blk.1.ffn_down_exps": "Q5_K", "blk.2.ffn_down_exps": "Q4_K", "blk.3.attn_kv_b": "Q5_K", "blk.4.attn_kv_b": "Q4_K"}),
    ("Q5_K_M", 16, {"blk.4.ffn_down_exps": "Q6_K", "blk.5.ffn_down_exps": "Q5_K", "blk.4.attn_kv_b": "Q6_K"}),
    ("MXFP4_MOE", 16, {"blk.1.ffn_up_exps": "MXFP4", "blk.1.ffn_up_shexp": "Q8_0", "token_embd": "Q8_0", "output": "Q8_0"}),
])
def test_stock_mixes(mix, experts, expected):
    """Types that llama-quantize gives, worked out by hand from its rules."""
    types = types_of(arch="deepseek2", n_layer=16, n_expert=experts, n_v=64, legacy_kv_b=True, n_ff_exp=256, n_ff=256, mix=mix)
    assert {name: types[f"{name}.weight"][0].name for name in expected} == expected


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_fits_every_architecture(mix):
    for arch in ("deepseek32", "glm-dsa", "deepseek2"):
        types = types_of(arch=arch, n_layer=5, n_expert=4, n_embd=320, n_ff_exp=96, nextn=arch != "deepseek2", tied_output=True, mix=mix)
        assert all(shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 for kind, shape in types.values())
        assert types["token_embd.weight"][0].name in ("Q8_0", "Q5_1", "Q5_0")


def test_mixed_file(tmp_path):
    metadata, tensors = made(tmp_path, mix="UD-IQ2_XXS", arch="glm-dsa")
    assert metadata["general.file_type"] == 19
    assert {kind for _, kind, _ in tensors.values()} == {"F32", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ2_S", "IQ4_XS", "IQ2_XXS", "Q5_1"}


def test_q4_k_m_mix():
    spec = ModelSpec(type="Q4_K_M", n_layer=16, n_expert=4, n_v=48)
    kinds = {name: tensor_type(spec, name, shape).name for name, shape in tensor_shapes(spec).items()}
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("Q6_K", "Q4_K")
    more_bits = [layer for layer in range(1, 16) if kinds[f"blk.{layer}.ffn_down_exps.weight"] == "Q6_K"]
    assert more_bits == [1, 4, 7, 10, 13, 14, 15]
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.4.ffn_down_shexp.weight"] == "Q6_K"
    assert kinds["blk.3.ffn_down_shexp.weight"] == "Q4_K"
    assert kinds["blk.0.attn_k_b.weight"] == "Q5_0" and kinds["blk.0.attn_output.weight"] == "Q5_0"
    eight = ModelSpec(type="Q4_K_M", n_expert=8)
    assert tensor_type(eight, "blk.0.attn_output.weight", (256, 256)).name == "Q5_K"
    odd = ModelSpec(type="Q8_0")
    assert tensor_type(odd, "blk.0.attn_output.weight", (256, 40)).name == "F16"


def test_same_options_same_bytes(tmp_path):
    spec = ModelSpec(type="Q5_K", **TINY)
    first, second = (make_model(tmp_path / name, spec).read_bytes() for name in ("a.gguf", "b.gguf"))
    assert first == second
    assert make_model(tmp_path / "c.gguf", ModelSpec(type="Q5_K", seed=1, **TINY)).read_bytes() != first


def test_weights_discriminate(tmp_path):
    _, tensors = made(tmp_path, type="F32")
    for name, (shape, _, data) in tensors.items():
        assert np.isfinite(data).all() and data.std() > 0
        if name.endswith("norm.weight"):
            assert abs(data.mean() - 1) < 0.1
    assert np.abs(tensors["blk.0.indexer.k_norm.bias"][2]).max() > 0.05
    assert tensors["blk.0.attn_q_a.weight"][2].std() == pytest.approx(1 / 16, rel=0.05)
    assert not np.array_equal(tensors["blk.1.ffn_up_exps.weight"][2], tensors["blk.2.ffn_up_exps.weight"][2])


def test_split(tmp_path):
    whole = read(make_model(tmp_path / "whole.gguf", ModelSpec(**TINY)))[1]
    first = make_model(tmp_path / "split.gguf", ModelSpec(split_max_tensors=25, **TINY))
    parts = sorted(tmp_path.glob("split*"))
    n = -(-len(whole) // 25)
    assert [part.name for part in parts] == [f"split-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    assert first == parts[0]
    joined = {}
    for i, part in enumerate(parts):
        metadata, tensors = read(part)
        assert (metadata["split.no"], metadata["split.count"], metadata["split.tensors.count"]) == (i, n, len(whole))
        assert ("deepseek32.block_count" in metadata) == (i == 0) and len(tensors) <= 25
        joined |= tensors
    assert joined.keys() == whole.keys()
    assert all(np.array_equal(joined[name][2], whole[name][2]) for name in whole)


@pytest.mark.parametrize("n_vocab", [MIN_VOCAB, 400, 40000])
def test_tokenizer(tmp_path, n_vocab):
    metadata, tensors = made(tmp_path, n_vocab=n_vocab, n_embd=32, n_layer=1, chat_template="{{ messages }}")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == metadata["deepseek32.vocab_size"] == n_vocab
    assert tensors["token_embd.weight"][0] == (n_vocab, 32)
    kind = dict(zip(tokens, kinds))
    assert [kind[token] for token in FIRST_TOKENS + LAST_TOKENS] == [3, 3, 3, 3, 3, 4, 4]
    assert all((kind[token] == 5) == token.startswith("<unused-") for token in tokens)
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [0, 1, 2]
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.chat_template"] == "{{ messages }}"

    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = "The import statement binds names. Ünïcødé 漢字 \x00\t\r\n 123"
    assert bpe.decode(bpe.encode(text).ids) == text


def test_tokenizer_training_repeats():
    first = train_tokenizer.__wrapped__(900)
    assert train_tokenizer.__wrapped__(900) == first
    assert len(first[0]) == 900 and len(first[1]) == 900 - 256


@pytest.mark.parametrize("options, message", [
    (dict(arch="llama"), "llama"), (dict(type="Q9_K"), "Q9_K' is none"),
    (dict(type="IQ2_M"), "as mix"), (dict(mix="Q9_K"), "Q9_K"), (dict(n_vocab=MIN_VOCAB - 1), "n_vocab"),
    (dict(n_layer_dense=4), "n_layer_dense"), (dict(n_expert_groups=3), "n_expert_groups"),
    (dict(n_expert=0), "n_layer_dense"), (dict(n_expert_used=9), "n_expert_used"), (dict(n_lora_q=0), "deepseek2"),
    (dict(arch="glm-dsa", indexer_types="FS"), "each layer"), (dict(arch="glm-dsa", indexer_types="SFF"), "F first"),
    (dict(indexer_types="FFF"), "glm-dsa"), (dict(expert_gating_func="tanh"), "expert_gating_func"),
    (dict(legacy_kv_b=True), "deepseek2"), (dict(nextn=2), "nextn"),
])
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelSpec(**options)


def test_command_line(tmp_path):
    path = tmp_path / "model.gguf"
    (tmp_path / "template").write_text("{{ bos_token }}", encoding="utf-8")
    result = CliRunner().invoke(main, [
        str(path), "--arch", "deepseek2", "--type", "Q4_0", "--n-layer", "2", "--n-lora-q", "0",
        "--no-expert-weights-norm", "--chat-template", str(tmp_path / "template")])
    assert result.exit_code == 0, result.output
    metadata, tensors = read(path)
    n_weights = sum(prod(shape) for shape, _, _ in tensors.values())
    size = sum(data.nbytes for _, _, data in tensors.values())
    assert result.output == f"{path}: deepseek2 Q4_0, {n_weights / 1e6:.1f} M parameters, {size / 1e6:.1f} MB\n"
    assert metadata["tokenizer.chat_template"] == "{{ bos_token }}" and "deepseek2.expert_weights_norm" not in metadata
    assert "blk.1.attn_q.weight" in tensors


def test_command_line_mistakes(tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path / "model.gguf"), "--n-vocab", "10"])
    assert result.exit_code == 2 and "n_vocab must be at least" in result.output
    result = CliRunner().invoke(main, [str(tmp_path / "model.gguf"), "--mix", "Q2_K", "--type", "Q4_0"])
    assert result.exit_code == 2 and "with --type or with --mix, not both" in result.output
    result = CliRunner().invoke(main, [str(tmp_path / "none" / "model.gguf")])
    assert result.exit_code == 1 and "the model cannot be written (No such file or directory)" in result.output
    assert not list(tmp_path.iterdir())
