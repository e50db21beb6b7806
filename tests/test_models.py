"""Configurations: published models, and contradictions in metadata."""
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydsa import GGUFError, PydsaError, UnsupportedModelError
from pydsa.gguf.file import Metadata, Tensor, open_gguf
from pydsa.models.yarn import rope_from_metadata
from pydsa.setup import Setup
from tools.make_model import ModelSpec, model_keys

NAN, INF = float("nan"), float("inf")
ARCHITECTURES = ("deepseek2", "deepseek32", "glm-dsa")
DROP = ...          # an edit that removes a key or a tensor


@pytest.fixture
def planned(small_model, monkeypatch):
    """planned(arch, keys, tensors) -> Setup of a small model with edits.

    Such as planned("glm-dsa", {"block_count": 0}, {"output.weight": DROP}). Keys without a first part "general" belong to the architecture.
    A tensor becomes DROP, another type, or another shape.
    """
    def plan(arch="deepseek32", keys={}, tensors={}, **options):
        file = open_gguf(small_model(arch=arch))
        metadata, there = Metadata(file.metadata, file.metadata.path), dict(file.tensors)
        for key, value in keys.items():
            key = key if key.startswith("general.") else f"{arch}.{key}"
            metadata.pop(key, None)
            if value is not DROP:
                metadata[key] = value
        for name, edit in tensors.items():
            old = there.pop(name, Tensor(name, "F32", (1,), None))
            if isinstance(edit, str):
                there[name] = old._replace(type=edit)
            elif edit is not DROP:
                there[name] = old._replace(shape=edit)
        monkeypatch.setattr("pydsa.setup.open_gguf", lambda path, absent: file._replace(metadata=metadata, tensors=there))
        return Setup("model.gguf", **options)
    return plan


def numbers(*values, dtype=np.int32):
    return np.array(values, dtype)


# Values of published models

V32 = {"rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
       "rope.scaling.yarn_log_multiplier": float(np.float32(0.1))}
ROPES = {   # name: architecture, n_rot, keys, key_length_mla, magnitude, mscale, kq_scale
    "DeepSeek-V3.2": ("deepseek32", 64, V32, 192, 1, 1.3688879, 0.1352338),
    "DeepSeek-V2-Lite": ("deepseek2", 64, V32 | {"rope.scaling.yarn_log_multiplier": 0.0707}, 192, 1, 1.2608040, 0.1147214),
    "GLM-5": ("glm-dsa", 64, {"rope.freq_base": 1e6}, 256, 1, 1, 0.0625),
    "yarn without multiplier": ("deepseek32", 64, V32 | {"rope.scaling.yarn_log_multiplier": 0.0}, 192, 1.3688879, 1.3688879, 0.1352338),
    "yarn that shrinks": ("deepseek32", 64, V32 | {"rope.scaling.factor": 0.5}, 192, 1, 1, 192 ** -0.5),
    "attn_factor": ("glm-dsa", 64, {"rope.scaling.attn_factor": 2.0}, 256, 2, 2, 0.25),
    "yarn_attn_factor": ("deepseek32", 64, V32 | {"rope.scaling.yarn_attn_factor": 2.0}, 192, 2, 2.7377758, 0.5409354),
}


@pytest.mark.parametrize("arch, n_rot, keys, key_length, magnitude, mscale, kq_scale", ROPES.values(), ids=ROPES)
def test_softmax_scale(arch, n_rot, keys, key_length, magnitude, mscale, kq_scale):
    rope = rope_from_metadata(Metadata({f"{arch}.{key}": value for key, value in keys.items()}), arch, n_rot, 163840)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-6) and rope.mscale == pytest.approx(mscale, rel=1e-6)
    assert rope.mscale ** 2 / key_length ** 0.5 == pytest.approx(kq_scale, rel=1e-6)


def rope_of(**keys):
    return rope_from_metadata(Metadata({f"x.rope.{key.replace('__', '.')}": value for key, value in keys.items()}), "x", 64, 163840)


PLAIN = 10000.0 ** (-np.arange(32) / 32)


def test_frequencies_of_v32():
    """V3.2's YaRN frequencies.

    They are kept up to dimension 10, divided by 40 from 23 on, with a linear ramp between.
    """
    rope = rope_from_metadata(Metadata({f"x.{key}": value for key, value in V32.items()}), "x", 64, 163840)
    keep = 1 - np.clip((np.arange(32) - 10) / (23 - 10), 0, 1)
    np.testing.assert_allclose(rope.freqs / PLAIN, keep + (1 - keep) / 40, rtol=1e-12)


def test_frequencies_without_yarn():
    np.testing.assert_allclose(rope_of().freqs, PLAIN)
    np.testing.assert_allclose(rope_of(scaling__type="none", scaling__factor=4.0).freqs, PLAIN)
    np.testing.assert_allclose(rope_of(scaling__type="linear", scaling__factor=4.0).freqs, PLAIN / 4)
    np.testing.assert_allclose(rope_of(scale_linear=4.0).freqs, PLAIN / 4)
    np.testing.assert_allclose(rope_of(scaling__factor=0.0).freqs, PLAIN)


def test_betas_of_yarn_are_honoured():
    yarn = dict(scaling__type="yarn", scaling__factor=40.0, scaling__original_context_length=4096)
    usual = rope_of(**yarn).freqs
    np.testing.assert_array_equal(rope_of(**yarn, scaling__yarn_beta_fast=32.0, scaling__yarn_beta_slow=1.0).freqs, usual)
    for beta in (dict(scaling__yarn_beta_fast=16.0), dict(scaling__yarn_beta_slow=2.0)):
        with pytest.warns(UserWarning, match="llama.cpp takes 32 and 1"):
            assert not np.allclose(rope_of(**yarn, **beta).freqs, usual)


# Optional keys and other spellings

SOUND = [
    ("deepseek32", {"nextn_predict_layers": DROP, "rope.freq_base": DROP, "vocab_size": DROP, "attention.head_count_kv": DROP,
                    "expert_weights_scale": DROP, "expert_weights_norm": DROP, "general.name": DROP, "rope.scaling.type": DROP}),
    ("deepseek32", {"attention.key_length": DROP, "attention.value_length": DROP}),
    ("deepseek32", {"expert_group_count": DROP, "expert_group_used_count": DROP}),
    ("deepseek32", {"expert_group_count": 1, "expert_group_used_count": 1}),
    ("deepseek32", {"feed_forward_length": numbers(88, 88, 88), "attention.head_count": numbers(3, 3, 3)}),
    ("deepseek32", {"expert_feed_forward_length": numbers(1, 36, 36)}),
    ("deepseek32", {"feed_forward_length": numbers(88, 1, 1), "attention.indexer.top_k": 2**31 - 1}),
    ("glm-dsa", {"expert_gating_func": DROP, "attention.indexer.types": numbers(True, False, True, dtype=bool)}),
    ("glm-dsa", {"attention.indexer.types": numbers(1, 0, 0, dtype=np.uint32)}),
    ("deepseek2", {"expert_gating_func": DROP}),
    ("deepseek2", {"attention.layer_norm_rms_epsilon": 0.0}),
]


@pytest.mark.parametrize("arch, keys", SOUND)
def test_sound_metadata(planned, arch, keys):
    assert planned(arch, keys).config.n_layer == 3


def test_defaults(planned):
    assert planned("glm-dsa", {"expert_gating_func": DROP}).config.gating == 2
    assert planned("deepseek2", {"expert_gating_func": DROP}).config.gating == 1
    config = planned("deepseek32", {"expert_weights_scale": DROP, "expert_weights_norm": DROP, "expert_group_count": DROP}).config
    assert (config.expert_weights_scale, config.expert_weights_norm, config.n_group) == (1.0, False, 1)
    assert planned("deepseek32", {"expert_weights_scale": 0.0}).config.expert_weights_scale == 1.0


# Refusals

REQUIRED = ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
            "attention.layer_norm_rms_epsilon", "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla",
            "attention.value_length_mla", "rope.dimension_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func",
            "attention.indexer.head_count", "attention.indexer.key_length", "attention.indexer.top_k", "expert_shared_count",
            "expert_count", "general.architecture"]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys(planned, key):
    with pytest.raises((GGUFError, UnsupportedModelError), match=key):
        planned("deepseek32", {key: DROP})


ANY = [     # (edits of a deepseek32 model, pattern of the message)
    # architecture
    ({"general.architecture": "llama"}, "'llama', expected one of deepseek2, deepseek32, glm-dsa"),
    ({"general.architecture": "glm-dsa"}, "glm-dsa.block_count"),
    ({"general.architecture": "../deepseek2"}, "architecture"), ({"general.architecture": 3}, "general.architecture"),
    # layers
    ({"block_count": 0}, "block_count"), ({"block_count": 1025}, "block_count"), ({"block_count": 2**32 - 1}, "block_count"),
    ({"block_count": 4}, "blk.3."), *[({"nextn_predict_layers": value}, "nextn_predict_layers") for value in (3, 4, -1)],
    ({"block_count": 3.0}, "block_count"), ({"block_count": "3"}, "block_count"), ({"block_count": True}, "block_count"),
    ({"block_count": numbers(3)}, "block_count"), ({"context_length": 0}, "context_length"), ({"embedding_length": 0}, "embedding_length"),
    ({"leading_dense_block_count": 4000}, "leading_dense_block_count"), ({"leading_dense_block_count": 2}, "blk.1.ffn_gate.weight"),
    # heads and latents
    ({"attention.head_count": 0}, "attention.head_count"), ({"attention.head_count": 4}, "attn_q_b.weight"),
    ({"attention.head_count": numbers(3, 3)}, "attention.head_count"), ({"attention.head_count": numbers(3, 4, 3)}, "attention.head_count"),
    ({"attention.head_count": numbers(3, -3, 3)}, "attention.head_count"), ({"attention.head_count": ["3"]}, "attention.head_count"),
    ({"rope.dimension_count": 11}, "rope.dimension_count"), ({"rope.dimension_count": 0}, "rope.dimension_count"),
    ({"rope.dimension_count": 32}, "rope.dimension_count"), ({"rope.dimension_count": 34}, "rope.dimension_count"),
    ({"rope.dimension_count": 2**31}, "rope.dimension_count"), ({"attention.key_length_mla": 12}, "key_length_mla"),
    ({"attention.key_length_mla": DROP}, "key_length_mla' is missing"), ({"attention.key_length_mla": 33}, "attn_q_b.weight"),
    ({"attention.key_length": 32}, "attention.key_length"), ({"attention.value_length": 57}, "attention.value_length"),
    ({"attention.value_length_mla": 0}, "value_length_mla"), ({"attention.value_length_mla": 29}, "attn_v_b.weight"),
    ({"attention.kv_lora_rank": 0}, "kv_lora_rank"), ({"attention.q_lora_rank": 0}, "q_lora_rank"),
    ({"attention.q_lora_rank": 41}, "attn_q_a.weight"), ({"attention.temperature_scale": 0.1}, "temperature_scale"),
    # indexer
    *[({f"attention.indexer.{key}": value}, key) for key in ("head_count", "key_length", "top_k") for value in (0, -1, 2**31, 2**63, 1.5)],
    ({"attention.indexer.key_length": 48}, "power of two"), ({"attention.indexer.key_length": 8}, "key_length"),
    ({"attention.indexer.key_length": 64}, "indexer.attn_k.weight"), ({"attention.indexer.head_count": 9}, "indexer.attn_q_b.weight"),
    # experts
    ({"expert_count": 0}, "expert_count"), ({"expert_count": 1025}, "expert_count"), ({"expert_count": 10}, "blk.1.exp_probs_b.bias"),
    ({"expert_used_count": 9}, "expert_used_count"), ({"expert_used_count": 0}, "expert_used_count"),
    ({"expert_group_count": 3}, "expert_group_count"), ({"expert_group_count": 1025}, "expert_group_count"),
    ({"expert_group_used_count": 0}, "expert_group_used_count"), ({"expert_group_used_count": 3}, "expert_group_used_count"),
    ({"expert_group_used_count": DROP}, "expert_group_used_count"), ({"expert_used_count": 5}, "expert_used_count is 5, but 1 groups"),
    ({"expert_gating_func": 0}, "expert_gating_func"), ({"expert_gating_func": 4}, "expert_gating_func"),
    ({"expert_shared_count": 2}, "ffn_gate_shexp"), ({"expert_weights_norm": 1}, "expert_weights_norm"),
    ({"expert_feed_forward_length": 0}, "expert_feed_forward_length"),
    ({"expert_feed_forward_length": numbers(36, 36, 37)}, "blk.2.ffn_gate_exps.weight"),
    *[({"feed_forward_length": value}, "feed_forward_length") for value in (0, 2**24 + 1, numbers(88), numbers(88.0, 88, 88, dtype="f4"))],
    # numbers
    *[({"attention.layer_norm_rms_epsilon": value}, "layer_norm_rms_epsilon") for value in (NAN, INF, -1e-6, "1e-6")],
    *[({"rope.freq_base": value}, "rope.freq_base") for value in (0.0, -10000.0, NAN, INF, True)],
    *[({"rope.scaling.factor": value}, "rope.scaling.factor") for value in (-1.0, NAN, INF, "4")],
    *[({"expert_weights_scale": value}, "expert_weights_scale") for value in (-1.0, NAN, INF)],
    ({"rope.scaling.type": "longrope"}, "rope.scaling.type"), ({"rope.scaling.type": 2}, "rope.scaling.type"),
    ({"rope.scaling.original_context_length": 0}, "original_context_length"), ({"rope.scaling.attn_factor": -1.0}, "attn_factor"),
    ({"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"), ({"rope.scaling.yarn_attn_factor": 0.0}, "yarn_attn_factor"),
    ({"rope.scaling.yarn_beta_fast": 0.0}, "yarn_beta_fast"), ({"rope.scaling.yarn_beta_slow": -1.0}, "yarn_beta_slow"),
    # each is a number, but what is computed from it is not
    ({"rope.freq_base": 1.0}, "rope.freq_base"), ({"rope.scaling.attn_factor": 1e300}, "attn_factor"),
    ({"rope.scaling.yarn_log_multiplier": -1 / math.log(4)}, "yarn_log_multiplier"),
    ({"rope.scaling.yarn_log_multiplier": 1e308}, "yarn_log_multiplier"), ({"rope.scaling.yarn_beta_fast": 1e308}, "yarn_beta_fast"),
    ({"rope.scaling.factor": 5e-324}, "rope.scaling.factor"), ({"expert_weights_scale": 1e300}, "expert_weights_scale"),
]


@pytest.mark.parametrize("keys, message", ANY, ids=[" ".join(f"{key}={value}" for key, value in keys.items()) for keys, _ in ANY])
def test_impossible_metadata(planned, keys, message):
    with pytest.raises((GGUFError, UnsupportedModelError), match=message) as error:
        planned("deepseek32", keys)
    assert "model.gguf: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("types", [
    numbers(), numbers(1), numbers(1, 0), numbers(1, 0, 1, 1), numbers(0, 1, 1), numbers(1, 2, 0), numbers(1, -1, 0),
    numbers(0, 0, 0, dtype=bool), numbers(1, 0, 1, dtype="f4"), ["full", "shared", "full"], 1, True], ids=str)
def test_impossible_indexer_types(planned, types):
    with pytest.raises(GGUFError, match="attention.indexer.types"):
        planned("glm-dsa", {"attention.indexer.types": types})


TENSORS = [
    ({"token_embd.weight": DROP}, "token_embd.weight"), ({"token_embd.weight": (300,)}, "token_embd.weight"),
    ({"token_embd.weight": (300, 72, 1)}, "token_embd.weight"), ({"token_embd.weight": (300, 71)}, "token_embd.weight"),
    ({"output_norm.weight": DROP}, "output_norm.weight"), ({"output.weight": (299, 72)}, "output.weight"),
    ({"blk.0.attn_k_b.weight": DROP}, "blk.0.attn_k_b.weight"), ({"blk.0.attn_k_b.weight": (3, 20, 56)}, "blk.0.attn_k_b.weight"),
    ({"blk.1.attn_norm.weight": (1, 72)}, "blk.1.attn_norm.weight"),
    ({"blk.1.ffn_up_exps.weight": (7, 36, 72)}, "blk.1.ffn_up_exps.weight"),
    ({"blk.2.exp_probs_b.bias": (7,)}, "blk.2.exp_probs_b.bias"), ({"blk.2.indexer.k_norm.bias": DROP}, "blk.2.indexer.k_norm.bias"),
    ({"blk.2.indexer.attn_k.weight": DROP}, "blk.2.indexer.attn_k.weight"),
    ({"blk.1.ffn_gate_exps.weight": "Q8_1"}, "'blk.1.ffn_gate_exps.weight' is stored as Q8_1"),
    ({"output.weight": "Q8_K"}, "'output.weight' is stored as Q8_K"),
    ({"token_embd.weight": "I8"}, "'token_embd.weight' is stored as I8"),
]


@pytest.mark.parametrize("tensors, message", TENSORS, ids=[f"{name} {edit}" for tensors, _ in TENSORS for name, edit in tensors.items()])
def test_impossible_tensors(planned, tensors, message):
    with pytest.raises((GGUFError, UnsupportedModelError), match=message) as error:
        planned("deepseek32", {}, tensors)
    assert "model.gguf: " in str(error.value)


def test_unknown_tensors_are_not_left_out(planned):
    for name in ("blk.0.attn_gate.weight", "blk.1.ffn_gate.weight", "rope_freqs.weight", "blk.1.indexer.k_scale.weight"):
        with pytest.raises(UnsupportedModelError, match=f"what tensor '{name}' does"):
            planned("deepseek32", {}, {name: (1,)})
    mtp, name = "blk.3.nextn.eh_proj.weight", "blk.3.attn_gate.weight"
    assert name not in planned("deepseek32", {"block_count": 4, "nextn_predict_layers": 1}, {mtp: (1,), name: (1,)}).weights.used
    whole = "blk.0.attn_kv_b.weight"        # beside its two halves
    assert whole not in planned("deepseek32", {}, {whole: (1,)}).weights.used
    assert planned("deepseek32", attention="dense").weights.used.keys() < planned("deepseek32").weights.used.keys()


OPTIONS = [
    ("deepseek32", dict(n_ctx=0), "n_ctx"), ("deepseek32", dict(n_ctx=-1), "n_ctx"), ("deepseek32", dict(n_ctx=2**31), "n_ctx"),
    ("deepseek32", dict(n_ctx=1.5), "n_ctx"), ("deepseek32", dict(n_ctx=True), "n_ctx"), ("deepseek32", dict(n_ubatch=0), "n_ubatch"),
    ("deepseek32", dict(dsa_top_k=0), "dsa_top_k"), ("deepseek32", dict(dsa_top_k="9"), "dsa_top_k"),
    ("deepseek32", dict(kv_type="q4_0"), "kv_type"),
    ("deepseek32", dict(attention="flash"), "attention"), ("deepseek32", dict(device="tpu"), "device"),
    ("deepseek2", dict(attention="sparse"), "--attention sparse"), ("deepseek2", dict(attention="masked"), "--attention masked"),
    ("deepseek2", dict(dsa_top_k=9), "--dsa-top-k"),
]


@pytest.mark.parametrize("arch, options, message", OPTIONS)
def test_impossible_options(planned, arch, options, message):
    with pytest.raises(PydsaError, match=message):
        planned(arch, **options)


# Arbitrary values and bytes

HOSTILE = [DROP, 0, 1, 2, 7, -1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, 0.0, -0.0, 1.0, 0.1, -1.0, 1e-45, 5e-324, 3.4e38, 1e308, -1e308,
           NAN, INF, True, False, "", "yarn", "none", "x" * 999, "a\nb\0c", [], [""] * 3, numbers(), numbers(1), numbers(1, 0, 1),
           numbers(-1, 2**31 - 1, 0), numbers(2**64 - 1, 0, 0, dtype=np.uint64), numbers(NAN, 1, 1, dtype="f4"),
           numbers(True, False, True, dtype=bool)]


KEYS = sorted({f"{arch}.{key}" for arch in ARCHITECTURES for key in model_keys(ModelSpec(arch=arch))}
              | {f"deepseek32.rope.scaling.{key}" for key in
                 ("attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor", "yarn_attn_factor")}
              | {"deepseek32.rope.scale_linear", "deepseek2.attention.temperature_scale", "glm-dsa.attention.indexer.types"})


@pytest.mark.filterwarnings("ignore:.*llama.cpp takes 32 and 1")
@pytest.mark.parametrize("name", KEYS)
def test_hostile_values_of_every_key(planned, name):
    """A model gives finite numbers, or one sentence says why not."""
    arch, key = name.split(".", 1)
    for value in HOSTILE:
        try:
            config = planned(arch, {key: value}).config
        except PydsaError as error:
            assert "model.gguf: " in str(error) and "\n" not in str(error)
        else:
            finite = np.isfinite(np.float32([config.kq_scale, config.rope.magnitude, config.expert_weights_scale, *config.rope.freqs]))
            assert finite.all(), f"{name} = {value}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_our_errors_only(small_model, arch, data):
    """Damaged headers raise only our errors.

    Half of the changed bytes are in the model's own keys and the tensor infos, not in the long vocabulary.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        damaged = bytearray(small_model(arch=arch).read_bytes())
        tokens, infos = damaged.index(b"tokenizer.ggml.model"), damaged.index(b"token_embd.weight")
        end = damaged.rindex(b"blk.2.") + 100
        places = st.one_of(st.integers(0, tokens), st.integers(tokens, infos), st.integers(infos, end))
        for place in data.draw(st.lists(places, min_size=1, max_size=4)):
            damaged[place] = data.draw(st.one_of(st.sampled_from([0, 1, 2, 255]), st.integers(0, 255)))
        path.write_bytes(damaged)
        try:
            Setup(path)
        except PydsaError as error:
            assert "\n" not in str(error)
