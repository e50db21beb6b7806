"""Files that store a model in another form: fused experts, attn_kv_b.

Each gives the logits of the same model in its usual form.
"""
import gguf
import numpy as np
import pytest
from helpers import nmse, random_ids
from rewritten import INT, fused_experts, rewrite, whole_kv_b, with_factors

from pydsa import GGUFError, UnsupportedModelError
from pydsa.backends import reference
from pydsa.gguf.file import open_gguf
from pydsa.setup import Setup
from tools.make_model import FILE_TYPES

IDS = random_ids(40)
WIDE = dict(n_embd=256, n_lora_q=256, n_lora_kv=256, n_nope=64, n_v=64, n_rot=32, n_ff=256, n_ff_exp=256, n_layer=2, n_head=4)


# ffn_gate_up_exps

@pytest.mark.parametrize("kind", FILE_TYPES)
def test_fused_experts_are_views_of_the_mapped_rows(small_model, tmp_path, kind):
    path = small_model(type=kind, **WIDE)
    plain, fused = open_gguf(path).tensors, Setup(rewrite(path, tmp_path / "fused.gguf", tensors=fused_experts(path)))
    whole = fused.file.tensors["blk.1.ffn_gate_up_exps.weight"].data
    for name in ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"):
        used = fused.weights.used[name]
        assert (used.type, used.shape, used.make) == (plain[name].type, plain[name].shape, None)
        assert np.shares_memory(used.data, whole) and not used.data.flags.writeable
        np.testing.assert_array_equal(used.data, plain[name].data)
    assert fused.mapped_bytes == Setup(path).mapped_bytes and fused.n_params == Setup(path).n_params


@pytest.mark.parametrize("spec, device", [
    (dict(arch="deepseek2"), "cpu"), (dict(type="Q4_K_M", **WIDE), "cpu"), (dict(arch="glm-dsa"), "reference")])
def test_fused_experts_give_the_same(small_model, load, tmp_path, spec, device):
    path = small_model(**spec)
    fused = load(rewrite(path, tmp_path / "fused.gguf", tensors=fused_experts(path)), device=device)
    plain = load(path, device=device)
    np.testing.assert_array_equal(fused.logits(IDS), plain.logits(IDS))
    np.testing.assert_array_equal(fused.logits(IDS[:1]), plain.logits(IDS[:1]))      # the kernels of one token are others


def test_fused_experts_of_another_shape(small_model, tmp_path):
    path = small_model()

    def cut(tensor):
        return [(new[0], new[1][:, 1:], new[2]) if "gate_up" in new[0] else new for new in fused_experts(path)(tensor)]

    with pytest.raises(GGUFError, match=r"'blk.1.ffn_gate_up_exps.weight' has shape \[8, 71, 72\], expected \[8, 72, 72\]"):
        Setup(rewrite(path, tmp_path / "cut.gguf", tensors=cut))


def test_fused_experts_beside_their_halves(small_model, tmp_path):
    path = small_model()

    def both(tensor):
        return [tensor] if "exps" not in tensor.name else [tensor, *[new for new in fused_experts(path)(tensor) if new is not tensor]]

    with pytest.raises(UnsupportedModelError, match="what tensor 'blk.1.ffn_gate_up_exps.weight' does"):
        Setup(rewrite(path, tmp_path / "both.gguf", tensors=both))


# attn_kv_b

OLD_KEYS = ("attention.key_length_mla", "attention.value_length_mla")


def old_keys(arch, n_head=3, n_key=32, n_v=28):
    """Keys of files from before April 2025, for rewrite()."""
    return dict(keys={f"{arch}.attention.{key}": (INT, value) for key, value in
                      (("key_length", n_key), ("value_length", n_v), ("head_count_kv", n_head))},
                drop=[f"{arch}.{key}" for key in OLD_KEYS])


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("spec", [
    dict(arch="deepseek2", n_lora_q=0), dict(arch="deepseek2", type="BF16"), dict(arch="glm-dsa", type="F16")], ids=str)
def test_whole_kv_b_gives_the_same(small_model, load, tmp_path, spec, device):
    """Float types are transposed exactly, on every backend."""
    path = small_model(**spec)
    old = rewrite(path, tmp_path / "old.gguf", **old_keys(spec["arch"]), tensors=whole_kv_b(path))
    with pytest.warns(UserWarning, match="attn_kv_b is split in two on load, keys in .* and values in .*, which takes [0-9.]+ KiB beside"):
        model = load(old, device=device)
    assert "blk.0.attn_k_b.weight" not in model.setup.file.tensors
    np.testing.assert_array_equal(model.logits(IDS), load(path, device=device).logits(IDS))


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "IQ4_XS"])
def test_quantized_kv_b(small_model, load, tmp_path, kind):
    """Of quantized attn_kv_b, values keep their blocks and keys become F16."""
    path = small_model(arch="deepseek2", type=kind, legacy_kv_b=True, **WIDE)

    def split(tensor):
        if "attn_kv_b" not in tensor.name:
            return [tensor]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(4, 128, 256)
        return [(tensor.name.replace("kv_b", "k_b"), whole[:, :64].transpose(0, 2, 1), gguf.GGMLQuantizationType.F32),
                (tensor.name.replace("kv_b", "v_b"), tensor.data.reshape(4, 128, -1)[:, 64:], tensor.tensor_type)]

    now = {f"deepseek2.attention.{key}": (INT, value) for key, value in
           (("key_length_mla", 96), ("value_length_mla", 64), ("key_length", 288), ("value_length", 256))}
    new = load(rewrite(path, tmp_path / "new.gguf", now, tensors=split))
    with pytest.warns(UserWarning, match="keys in F16 and values in"):
        old = load(path)
    k_b, v_b = (old.setup.weights.used[f"blk.0.attn_{part}_b.weight"] for part in "kv")
    assert k_b.type == "F16" and v_b.type == open_gguf(path).tensors["blk.0.attn_kv_b.weight"].type
    np.testing.assert_array_equal(v_b.read().data, new.setup.weights.used["blk.0.attn_v_b.weight"].data)
    exact = reference.weight(new.setup.weights.used["blk.0.attn_k_b.weight"])
    assert nmse(reference.weight(k_b.read()).ravel(), exact.ravel()) < 1e-7
    assert np.median(nmse(old.logits(IDS), new.logits(IDS))) < 1e-5


def test_memory_of_a_split_kv_b_is_counted(small_model, load):
    """It is copied, not mapped, and made once; a plan takes no memory."""
    path = small_model(arch="deepseek2", type="Q4_0", legacy_kv_b=True, **WIDE)
    with pytest.warns(UserWarning, match="split in two"):
        model = load(path)
    setup, weights = model.setup, model.runner.on["cpu"].weights
    made = {name: tensor for name, tensor in setup.weights.used.items() if tensor.make is not None}
    assert len(made) == 4 and all(tensor.data.strides == (0, 0, 0) for tensor in made.values())
    sizes = {name: weights[name].data.nbytes for name in made}
    assert sizes == {name: tensor.data.nbytes for name, tensor in made.items()}
    assert setup.copied_bytes == sum(sizes.values()) + sum(w.nbytes for w in weights.values() if isinstance(w, np.ndarray))
    assert setup.mapped_bytes == sum(setup.file.tensors[name].data.nbytes for name in weights if name not in made)
    assert made["blk.0.attn_k_b.weight"].read().data is weights["blk.0.attn_k_b.weight"].data
    assert Setup(path, device="cuda").copied_bytes == setup.mapped_bytes + sum(sizes.values())       # a GPU copies all blocks


def test_heads_in_one_axis(small_model, load, tmp_path):
    """Other converters write k_b and v_b as matrices, with the old keys.

    attn_kv_b is there too.
    """
    path = small_model(arch="deepseek2")

    def flat(tensor):
        both = [new for new in whole_kv_b(path)(tensor) if new is not tensor]
        return [(tensor.name, tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.tensor_type), *both] if tensor.data.ndim == 3 and (
            "_b.weight" in tensor.name) else [tensor]

    model = load(rewrite(path, tmp_path / "flat.gguf", **old_keys("deepseek2"), tensors=flat))
    assert not model.setup.notes and model.setup.copied_bytes == load(path).setup.copied_bytes
    np.testing.assert_array_equal(model.logits(IDS), load(path).logits(IDS))


@pytest.mark.parametrize("keys, message", [
    (dict(n_key=68, n_v=56), "key_length_mla and value_length_mla are missing, expected the sizes of a head's key and value"),
    (dict(n_key=36), r"'blk.0.attn_q_b.weight' has shape"),
    (dict(n_v=29), r"'blk.0.attn_kv_b.weight' has shape \[144, 56\], expected"),
    (dict(n_key=12), "rope.dimension_count is 12, expected an even number less than key_length, 12")])
def test_old_keys_that_are_wrong(small_model, tmp_path, keys, message):
    path = small_model(arch="deepseek2")
    with pytest.raises(GGUFError, match=message):
        Setup(rewrite(path, tmp_path / "old.gguf", **old_keys("deepseek2", **keys), tensors=whole_kv_b(path)))


# Factors beside matrices

@pytest.mark.parametrize("spec, device, options", [
    (dict(), "cpu", {}), (dict(arch="glm-dsa"), "cpu", dict(attention="masked")), (dict(arch="deepseek2", n_lora_q=0), "cpu", {}),
    (dict(arch="deepseek2", tied_output=True), "reference", {}), (dict(), "reference", dict(attention="sparse"))], ids=str)
def test_factors_of_matrices(small_model, load, tmp_path, spec, device, options):
    """Weights divided by a power of two, which is then the factor.

    The logits are those of the model without, bit by bit.
    """
    path = small_model(**spec)
    ends = (".scale", ".weight.scale") if device == "cpu" else (".weight.scale", ".scale")
    with pytest.warns(UserWarning, match=r"tensors \*.input_scale are not used"):
        model = load(rewrite(path, tmp_path / "scaled.gguf", tensors=with_factors(ends)), device=device, **options)
    assert "moe_gate_up" not in {node.op for node in model.setup._nodes}
    plain = load(path, device=device, **options)
    for ids in (IDS, IDS[:1]):
        np.testing.assert_array_equal(model.logits(ids), plain.logits(ids))


@pytest.mark.filterwarnings("ignore:.* are not used")
@pytest.mark.parametrize("kind", ["NVFP4", "Q4_K_M"])
def test_factors_of_quantized_matrices(small_model, load, tmp_path, kind):
    path = small_model(type=kind, **WIDE)
    scaled = rewrite(path, tmp_path / "scaled.gguf", tensors=with_factors())
    reference = load(scaled, device="reference").logits(IDS)
    assert np.median(nmse(load(scaled).logits(IDS), reference)) < 1e-5
    assert nmse(load(path).logits(IDS), reference).min() > 1e-3


@pytest.mark.filterwarnings("ignore:.* are not used", "ignore:.* split in two on load")
@pytest.mark.parametrize("form", [fused_experts, whole_kv_b])
def test_factors_of_whole_matrices(small_model, load, tmp_path, form):
    path = small_model(arch="deepseek2")
    whole = rewrite(path, tmp_path / "whole.gguf", tensors=form(path))
    model = load(rewrite(whole, tmp_path / "scaled.gguf", tensors=with_factors()))
    np.testing.assert_array_equal(model.logits(IDS), load(path).logits(IDS))


@pytest.mark.filterwarnings("ignore:.* are not used")
def test_factors_of_some_experts(small_model, load, tmp_path):
    """Of gate, up and down, each may be without factors."""
    path = small_model(arch="deepseek2")
    for part in ("gate", "up", "down"):
        others = [f"ffn_{other}_exps" for other in ("gate", "up", "down") if other != part]
        alone = with_factors(but=["token", "output", "attn", "inp", "shexp", "ffn_gate.", "ffn_up.", "ffn_down.", *others])
        model = load(rewrite(path, tmp_path / f"{part}.gguf", tensors=alone))
        assert ("moe_gate_up" in {node.op for node in model.setup._nodes}) == (part == "down")
        np.testing.assert_array_equal(model.logits(IDS), load(path).logits(IDS))


def test_factors_are_not_left_out_in_silence(small_model, tmp_path):
    """Of an indexer that does not run they are; of vectors there can be none."""
    path = small_model()
    scaled = rewrite(path, tmp_path / "scaled.gguf", tensors=with_factors())
    assert not {"blk.0.indexer.proj.scale", "blk.0.attn_q_b.input_scale"} & Setup(scaled, attention="dense").weights.read
    kind = gguf.GGMLQuantizationType
    for name, values, error in (
            ("attn_norm.scale", [2.0], "what tensor 'blk.0.attn_norm.scale' does"), ("attn_q_c.input_scale", [2.0], "what tensor"),
            ("attn_q_b.scale", [2.0, 2.0], r"shape \[2\], expected \[1\]"), ("attn_q_b.scale", [np.nan], "not finite"),
            ("attn_q_b.scale", np.float16([2.0]), "stored as F16, expected F32")):
        values = np.asarray(values, np.float16 if isinstance(values, np.ndarray) else np.float32)
        extra = (f"blk.0.{name}", values, kind.F16 if values.dtype == np.float16 else kind.F32)
        wrong = rewrite(path, tmp_path / "wrong.gguf", tensors=lambda t: [t, extra] if t.name == "output.weight" else [t])
        with pytest.raises((GGUFError, UnsupportedModelError), match=error):
            Setup(wrong)
