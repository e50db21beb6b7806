"""Identities: two ways to run a model give the same result.

Random models of every architecture, with far more tokens than top_k.
"""
import subprocess
import sys

import gguf
import numpy as np
import pytest
from helpers import greedy, nmse, random_ids

from pydsa.quants import SUPPORTED
from pydsa.setup import Setup
from tools.make_model import FILE_TYPES

SPARSE = {
    "deepseek32": dict(),
    "deepseek32, one indexer head, no groups": dict(indexer_n_head=1, n_expert_groups=0, indexer_top_k=8, rope_scaling="absent", seed=1),
    "glm-dsa": dict(arch="glm-dsa", seed=2),
    "glm-dsa with shared layers": dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS", indexer_top_k=16, exp_probs_b=False, seed=3),
}
DENSE = {
    "deepseek2": dict(arch="deepseek2", seed=4),
    "deepseek2 lite": dict(arch="deepseek2", n_lora_q=0, expert_gating_func="softmax", n_expert_groups=0, expert_weights_norm=False,
                           n_expert_shared=2, exp_probs_b=False, seed=5),
    "deepseek2 without experts": dict(arch="deepseek2", n_expert=0, n_layer_dense=3, expert_gating_func="absent", seed=6),
}
MODELS = SPARSE | DENSE
CLOSE = 1e-10       # NMSE of float32 sums in another order
IDS = random_ids(60)


def each(models):
    return pytest.mark.parametrize("spec", models.values(), ids=models)


# One model, the same tokens divided into other steps

@each(MODELS)
def test_cpu_equals_reference(small_model, load, spec):
    path = small_model(**spec)
    reference = load(path, device="reference").logits(IDS)
    assert np.isfinite(reference).all()
    assert nmse(load(path).logits(IDS), reference).max() < CLOSE


@each(MODELS)
@pytest.mark.parametrize("n_ubatch", [1, 7, 16, 59])
def test_ubatches_equal_whole(small_model, load, spec, n_ubatch):
    path = small_model(**spec)
    assert nmse(load(path, n_ubatch=n_ubatch).logits(IDS), load(path).logits(IDS)).max() < CLOSE


@each(MODELS)
def test_decode_equals_prefill(small_model, load, spec):
    model = load(small_model(**spec))
    session = model.session()
    logits = [session.prefill(IDS[:5]), *(session.decode(token) for token in IDS[5:])]
    assert nmse(logits, model.logits(IDS)[4:]).max() < CLOSE


@each(MODELS)
def test_prefill_gives_the_last_row(small_model, load, spec):
    model = load(small_model(**spec), n_ubatch=16)
    np.testing.assert_allclose(model.session().prefill(IDS), model.logits(IDS)[-1], rtol=1e-4, atol=1e-4)


@each(MODELS)
def test_interleaved_sessions_equal_each_alone(small_model, load, spec):
    model, other = load(small_model(**spec), n_ubatch=16), random_ids(50, seed=1)

    def run(session, ids):
        yield session.prefill(ids[:20])
        for token in ids[20:]:
            yield session.decode(token)

    alone = [list(run(model.session(), ids[:50])) for ids in (IDS, other)]
    together = list(zip(run(model.session(), IDS[:50]), run(model.session(), other)))
    np.testing.assert_array_equal(list(zip(*together)), alone)


@each(MODELS)
@pytest.mark.parametrize("cut", [5, 20, 40])
def test_truncated_session_equals_fresh_one(small_model, load, spec, cut):
    """A truncated session continues as a fresh one does.

    A cut at 5 is below every top_k: "auto" returns from sparse to dense attention, and needs the keys that it left out before.
    """
    model = load(small_model(**spec))

    def end(session):
        return [session.prefill(IDS[cut:cut + 12]), *(session.decode(token) for token in IDS[:20])]

    again, fresh = model.session(), model.session()
    for session in (again, fresh):
        session.prefill(IDS[:cut])
    again.prefill(random_ids(70, seed=2))
    again.truncate(cut)
    np.testing.assert_array_equal(end(again), end(fresh))


@each(MODELS)
def test_threads_do_not_matter(small_model, load, spec):
    """... bit for bit; test_threads.py has more."""
    def run(threads):
        session = load(small_model(**spec), threads=threads).session()
        return [session.prefill(IDS), *(session.decode(token) for token in IDS[:3])]

    expected = run(1)
    for threads in (2, 5):
        np.testing.assert_array_equal(run(threads), expected)


# Forms of attention

@each(SPARSE)
def test_sparse_and_masked_give_the_same_tokens(small_model, load, spec):
    def run(attention):
        session = load(small_model(**spec), attention=attention).session()
        return greedy(session, session.prefill(IDS[:30]), 40)

    assert run("sparse") == run("masked")


@each(SPARSE)
@pytest.mark.parametrize("attention", ["sparse", "masked", "auto"])
def test_attention_is_dense_up_to_top_k(small_model, load, spec, attention):
    """Sparse and dense logits are equal up to position top_k - 1.

    Token top_k (counted from 0) is the first that has to leave out a key.
    """
    path = small_model(**spec)
    k = load(path).top_k
    for n in (k - 1, k, k + 1, 2 * k):
        error = nmse(load(path, attention=attention).logits(IDS[:n]), load(path, attention="dense").logits(IDS[:n]))
        assert error[:k].max() < CLOSE
        assert n <= k or error[k:].min() > 1e-4


@each(SPARSE)
def test_auto_equals_sparse_around_the_crossing(small_model, load, spec):
    path = small_model(**spec)
    k = load(path).top_k
    assert [load(path).setup.schedule.variant(0, n) for n in (1, k, k + 1)] == ["dense+keys", "dense+keys", "sparse"]
    for portions in ([k - 1, 1, 1, 1], [k, 1, 7], [k + 1, 1], [k - 3, 6, 1, 9], [2 * k], [1] * (k + 3)):
        auto, sparse = load(path).session(), load(path, attention="sparse").session()
        for n in portions:
            ids = IDS[auto.n_past:auto.n_past + n]
            assert nmse(auto.logits(ids), sparse.logits(ids)).max() < CLOSE, (portions, auto.n_past)


def test_top_k_can_be_chosen(small_model, load):
    path = small_model()
    assert load(path, dsa_top_k=60).top_k == 60
    assert nmse(load(path, dsa_top_k=60, attention="sparse").logits(IDS), load(path, attention="dense").logits(IDS)).max() < CLOSE
    assert nmse(load(path, dsa_top_k=5).logits(IDS), load(path).logits(IDS))[12:].min() > 1e-4


# The same model, stored in another way

def dequantized(path):
    """The tensors of a file, name -> float32 array, by gguf-py."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors}


def rotated(x, freq_base):
    """Interleaved RoPE of x [T, H, n_rot] at positions 0 to T - 1.

    It is computed as products of complex numbers.
    """
    n_rot = x.shape[-1]
    angles = np.arange(len(x))[:, None, None] * freq_base ** (-np.arange(0, n_rot, 2) / n_rot)
    return ((x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)).view(np.float64)


@pytest.mark.parametrize("n_lora_q", [40, 0])
def test_absorbed_attention_equals_expanded(small_model, load, n_lora_q):
    """Absorbed attention equals MLA with expanded keys and values.

    This is checked for layer 0, from its own normalised input.
    """
    path = small_model(arch="deepseek2", rope_scaling="absent", n_lora_q=n_lora_q)
    model, seen = load(path, kv_type="f32"), {}
    model.session().prefill(IDS, observe=lambda node, arrays: seen.setdefault(node.name, arrays[0].copy() if arrays else None))
    c, w = model.config, {name[6:-7]: array.astype(np.float64) for name, array in dequantized(path).items() if name.startswith("blk.0.")}
    T, H = len(IDS), c.n_head

    def rms(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_eps) * weight

    h = seen["attn_norm-0"].astype(np.float64)
    q = rms(h @ w["attn_q_a"].T, w["attn_q_a_norm"]) @ w["attn_q_b"].T if n_lora_q else h @ w["attn_q"].T
    latent, k_pe = np.split(h @ w["attn_kv_a_mqa"].T, [c.kv_lora], axis=-1)
    latent = rms(latent, w["attn_kv_a_norm"])
    q_nope, q_pe = np.split(q.reshape(T, H, -1), [c.n_nope], axis=-1)
    q = np.concatenate([q_nope, rotated(q_pe, 10000.0)], -1)
    k_nope = np.einsum("tc,hcn->thn", latent, w["attn_k_b"])
    k = np.concatenate([k_nope, np.repeat(rotated(k_pe[:, None], 10000.0), H, axis=1)], -1)
    v = np.einsum("tc,hvc->thv", latent, w["attn_v_b"])

    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(c.n_nope + c.n_rot)
    logits[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    out = np.einsum("hts,shv->thv", p / p.sum(-1, keepdims=True), v).reshape(T, -1) @ w["attn_output"].T
    assert nmse(seen["attn_out-0"], out).max() < CLOSE


def test_shared_layers_never_use_their_own_indexer(small_model, load, tmp_path):
    """Unused indexer tensors of shared layers have no influence.

    Such files exist; here these tensors are NaN.
    """
    spec = dict(arch="glm-dsa", n_layer=4, indexer_types="FSSF", seed=7)
    poisoned = tmp_path / "poisoned.gguf"
    poisoned.write_bytes(small_model(**spec, indexer_shared_tensors=True).read_bytes())
    tensors = [t for t in gguf.GGUFReader(poisoned).tensors if t.name.startswith(("blk.1.indexer", "blk.2.indexer"))]
    assert len(tensors) == 10
    with open(poisoned, "r+b") as file:
        for tensor in tensors:
            file.seek(tensor.data_offset)
            file.write(b"\xff" * tensor.n_bytes)
    for attention in ("auto", "masked"):
        expected = load(small_model(**spec), attention=attention).logits(IDS)
        np.testing.assert_array_equal(load(poisoned, attention=attention).logits(IDS), expected)


def test_shared_layers_follow_the_last_full_one(small_model, load):
    model, chosen, used = load(small_model(**SPARSE["glm-dsa with shared layers"]), attention="sparse"), [], []
    for node in model.setup.layouts["sparse"].graph.nodes:
        if node.op == "indexer_select":
            chosen.append(node.args[0])
        if node.op == "sparse_attention":
            used.append(chosen.index(node.args[3]))
    assert used == [0, 0, 1, 1]
    assert [ref.layer for ref in model.setup.cache_widths if ref.kind == "index_keys"] == [0, 2]


def test_glm_default_pattern(small_model, load):
    """glm-dsa's default pattern of indexers.

    With a context of 1,048,576 tokens and no indexer.types, layers 0, 1, 2, 6, 10, ... are full and the others share.
    """
    spec = dict(arch="glm-dsa", n_layer=12, n_layer_dense=12)
    implied, written = small_model(**spec, n_ctx=1 << 20), small_model(**spec, indexer_types="FFFSSSFSSSFS")
    assert "glm-dsa.attention.indexer.types" not in Setup(implied).file.metadata
    assert [il for il, full in enumerate(Setup(implied).config.indexer_full) if full] == [0, 1, 2, 6, 10]
    np.testing.assert_array_equal(load(implied).logits(IDS), load(written).logits(IDS))
    assert all(Setup(small_model(**spec, n_ctx=(1 << 20) - 1)).config.indexer_full)


@pytest.mark.parametrize("arch", ["deepseek2", "deepseek32", "glm-dsa"])
def test_mtp_block_is_left_aside(small_model, load, arch):
    path = small_model(arch=arch, nextn=1)
    assert "blk.3.nextn.eh_proj.weight" in Setup(path).file.tensors and Setup(path).config.n_layer == 3
    np.testing.assert_array_equal(load(path).logits(IDS), load(small_model(arch=arch)).logits(IDS))


def test_split_file_equals_single(small_model, load):
    path = small_model(split_max_tensors=9)
    assert len(Setup(path).file.paths) > 3
    np.testing.assert_array_equal(load(path).logits(IDS), load(small_model()).logits(IDS))


@pytest.mark.parametrize("tied_output", [False, True])
def test_output_is_tied_to_the_embedding(small_model, load, tied_output):
    path, seen = small_model(tied_output=tied_output), {}
    tensors = dequantized(path)
    assert ("output.weight" in tensors) != tied_output
    logits = load(path).session().prefill(IDS, observe=lambda node, arrays: seen.update({node.name: arrays[0].copy() if arrays else None}))
    head = tensors["token_embd.weight" if tied_output else "output.weight"]
    assert nmse(logits, head @ seen["result_norm"][0]) < CLOSE


WIDE = dict(n_embd=256, n_lora_q=256, n_lora_kv=256, n_nope=64, n_v=64, n_rot=32, n_ff=256, n_ff_exp=256, n_layer=2, n_head=4)


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_type_runs(small_model, load, kind):
    path = small_model(type=kind, quantize_indexer_proj=True, **WIDE)
    types = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types <= set(SUPPORTED) and (kind in types or kind == "Q4_K_M")
    reference = load(path, device="reference").logits(IDS[:24])
    assert np.isfinite(reference).all()
    errors = nmse(load(path).logits(IDS[:24]), reference)
    if kind in ("F32", "F16", "BF16"):
        assert errors.max() < CLOSE
    else:       # a rounded activation may change a choice, and with it a whole position
        assert np.median(errors) < 1e-5


# Nothing is compiled once a model is loaded

COUNT = """
import importlib, pkgutil, sys
import pydsa, pydsa.backends.cpu as cpu
from numba.core.dispatcher import Dispatcher
modules = [importlib.import_module(f"pydsa.backends.cpu.{m.name}") for m in pkgutil.iter_modules(cpu.__path__)]
kernels = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, Dispatcher)}.values()
assert len(kernels) > 15
model = pydsa.load(sys.argv[1], n_ctx=128, n_ubatch=16, attention=sys.argv[2])
before = [len(f.signatures) for f in kernels]
session = model.session()
for n in (1, 2, 3, 7, 16, 17, 33):
    session.prefill([5] * n)
for _ in range(30):
    session.decode(6)
model.logits([7] * 19)
print([f.__name__ for f, n in zip(kernels, before) if len(f.signatures) != n])
"""


@pytest.mark.parametrize("arch, attention", [("deepseek32", "auto"), ("glm-dsa", "masked"), ("deepseek2", "dense")])
def test_nothing_is_compiled_after_loading(small_model, arch, attention):
    """Running compiles nothing, in a process of its own.

    In this process other tests have compiled everything.
    """
    run = subprocess.run([sys.executable, "-c", COUNT, small_model(arch=arch), attention], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[]\n", 0), run.stderr
