"""The CUDA backend without a GPU, and with one (`pytest -m gpu`).

Without a GPU every kernel is compiled. Ops and whole models run as PTX (tests/ptx), which finds races and accesses out of bounds, and some
ops in Numba's simulator, where kernels can be debugged as Python.
"""
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, greedy, nmse
from rewritten import each, fused_experts, rewrite, whole_kv_b, with_factors

import pydsa
from pydsa.errors import PydsaError
from pydsa.options import EXACT, PRECISIONS
from pydsa.setup import Setup

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
OPS = ["test_ops.py", "test_whole_tiles.py", "test_attention.py", "test_mha.py", "test_top_k.py", "test_int8_keys.py", "test_quants.py",
       "test_one_token.py", "test_shared_launches.py", "test_top_k_rows.py", "test_chosen_rows.py"]
# tests of the CPU backend or of the host, left out here
OF_CPU = ("threads or exp_of or half or block_sizes or sampled or golden or ubatches or vectors_are_unpacked or any_ or counted or "
          "2_gib or prompts_take or left_out or packed_latent")
# types whose kernels differ in little from another's of their family; PYDSA_TEST_DEVICE=ptx pytest tests/test_ops.py runs them, too
ALIKE = "Q4_1 or Q5_0 or Q5_1 or Q3_K or Q5_K or IQ4_NL or MXFP4 or IQ2_XS or IQ2_S or IQ3_XXS or IQ1_M or TQ2_0"
# What the simulator runs, at a hundredth of the speed: ops, with a type or two and the smallest shapes, and all types of blocks. All that
# is left out of it runs as PTX.
SIMULATED = ["test_ops.py", "test_attention.py", "test_quants.py::test_dequantize"]
SLOW_SIMULATED = ("(linear and not Q8_0 and not F32) or (head_linear and Q8_0) or Q8_0-96 or 2-13 or logits or no_future or "
                  "test_experts or (select and not 2-1) or (scores and (1-1 or 1-13 or 3-17) and not f32)")


@functools.cache
def gpu_is_there():
    code = "from numba import cuda; raise SystemExit(0 if cuda.is_available() else 1)"
    return importlib.util.find_spec("numba_cuda") is not None and subprocess.run([sys.executable, "-c", code]).returncode == 0


def run_python(*args, device="cuda", simulated=False, precision="float16"):
    """Run Python with the CUDA backend under test -> its stdout.

    It must not fail. precision: that of ops.
    """
    env = os.environ | {"PYDSA_TEST_DEVICE": device, "NUMBA_ENABLE_CUDASIM": "1" if simulated else "0", "PYTHONPATH": str(ROOT),
                        "PYDSA_TEST_PRECISION": precision}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


USES = r"""
from tools.cuda_ptx import report
targets = {(8, 0): "gemm_(one_)?q2_k|choose_of_row|gemv_(q8_0|iq2_xs)|join_rows",
           (9, 0): "wgmma_q8_0_64|f16_64_q8_0|flash_192_128|score_images_.*|attend_chosen.*|gemv_tq1_0",
           (12, 0): "gemm_q2_k|gemv_(iq3_s|scores_q8_0)|join_rows|add_norm_row|attend_one_i8_32_.*|flash_mma_(192_128|keys_512)"}
bad = [line for target, names in targets.items() for line in report([target], names, processes=1)]
assert not bad, bad
"""


def test_kernels_compile(capsys):
    """No kernel spills registers or keeps sums in local memory.

    Each is linked as on a GPU. Those with the fewest registers to spare stand for all, which tools/cuda_ptx.py links in minutes.
    """
    table = run_python("-c", USES)
    with capsys.disabled():
        print(f"\n{table}")
    assert table.count("gemm_q2_k") == table.count("join_rows") == 2 and table.count("gemm_one_q2_k") == table.count("gemv_iq2_xs") == 1
    assert table.count("wgmma_") == len(re.findall("^f16_", table, re.M)) == 1
    assert table.count("score_images_of_1") == table.count("score_images_of_2") == 1
    lines = [line.split() for line in table.splitlines() if line.startswith("gemv_")]       # four blocks of 128 threads a multiprocessor
    assert lines and all(int(line[3]) <= 128 and int(line[6]) <= 48 << 10 for line in lines)


SPILLS = """
from tools import cuda_ptx
cuda_ptx.LOCAL = set()      # of which rope_angles is one
bad = cuda_ptx.report([(8, 0), (9, 0)], "rope_angles|add_rows", processes=1)
assert [line.split()[0] for line in bad] == ["rope_angles"] * 2, bad
assert cuda_ptx.Use(8, 4, 0, 0, False).is_too_much("add_rows") and cuda_ptx.Use(8, 0, 0, 0, True).is_too_much("add_rows")
"""


def test_spills_are_told():
    """tools/cuda_ptx.py finds what is in local memory."""
    run_python("-c", SPILLS)


PRODUCTS = """
from tests.ptx.driver import install
install()
from tools import time_kernels
time_kernels.REPEATS = time_kernels.AT_ONCE = 1
time_kernels.main(["products-of-a-token", "--small", "--type", "Q4_K", "--type", "BF16"])
"""


def test_products_are_checked():
    """tools/time_kernels.py times and checks a token's products."""
    lines = run_python("-c", PRODUCTS, device="ptx").splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["Q4_K"] * 3 + ["BF16"] * 3 and all(" GB/s " in line for line in lines)
    assert all(float(line.split()[-1]) < (5e-9 if line.startswith("Q4_K") else 1e-12) for line in lines)


def test_ops():
    """The tests of ops on the CUDA backend, with fewer and smaller shapes.

    They run as PTX, in exact precision, and some in the simulator, which is slow, in float16: see test_precision.py.
    """
    for files, left_out, options in ((OPS, f"{OF_CPU} or {ALIKE}", {"device": "ptx", "precision": EXACT}),
                                     (SIMULATED, f"{OF_CPU} or {SLOW_SIMULATED}", {"simulated": True})):
        tests = [f"tests/{name}" for name in files]
        assert " passed" in run_python("-m", "pytest", "-q", "-x", *tests, "-k", f"not ({left_out})", **options)


MODEL = """
import sys
import numpy as np
from tests.ptx.driver import install
driver = install()
import pydsa
from pydsa.backends.cuda.runtime.launch import KERNELS
path, attention, kv_type, precision = sys.argv[1:]
ids = np.random.default_rng(0).integers(0, 300, 9).tolist()
settings = dict(attention=attention, kv_type=kv_type, n_ctx=12, n_ubatch=4)
with np.errstate(all="ignore"):
    reference = pydsa.load(path, device="reference", **settings)
    expected = reference.logits(ids)[5:].astype(np.float64)
    model = pydsa.load(path, device="cuda", precision=precision, **settings)
    session, other = model.session(), model.session()
    logits = [session.prefill(ids[:6]), *map(session.decode, ids[6:])]
    session.save(path + ".session")
    other.load(path + ".session")
for name, parts in (("gemm_one_q8_0", "float16"), ("gemm_q8_0", "exact")):      # of prompts
    assert bool(KERNELS[name]._loaded) == (precision == parts and any(w.type == "Q8_0" for w in model.setup.weights.used.values())), name
attended = any(kernel._loaded for name, kernel in KERNELS.items() if name.startswith("attend_one_i16"))
assert attended == (kv_type == "i16" and model.setup.config.kv_lora == 512)
# the first token: kernel by kernel; the second: recorded and replayed; the third: replayed
assert [driver.counts[name] for name in ("cuGraphInstantiate", "cuGraphLaunch")] == [1, 2]
other.truncate(8)
one_by_one = other.prefill(ids[8:], observe=lambda node, arrays: None)      # kernel by kernel, not fused
difference = ((one_by_one - logits[-1]) ** 2).sum() / (one_by_one ** 2).sum()
assert difference <= 1e-7, difference     # sums in another order; a value may round to its neighbour
other.load(path + ".session")
for ref, cache in session.caches.items():
    assert np.array_equal(cache.stored(12), other.caches[ref].stored(12)) and cache.stored(7).any(), ref
print(*(float(((a - b) ** 2).sum() / (b ** 2).sum()) for a, b in zip(logits, expected, strict=True)))
if "n.gguf" in path:        # every input of a matrix, of which some are parts of others
    from pydsa import imatrix
    met, theirs = (next(imatrix.collect(m, ids[:8], chunk_size=8)) for m in (model, reference))
    assert met.counts.keys() == theirs.counts.keys() and all(np.array_equal(met.counts[name], theirs.counts[name]) for name in met.counts)
    assert all(np.allclose(met.sums[name], theirs.sums[name], rtol=1e-4) for name in met.sums)
"""


@pytest.mark.parametrize("attention, kv_type, precision, spec", [
    ("sparse", "f32", "float16", {"type": "F32"}), ("masked", "f32", "exact", {"type": "Q8_0", "arch": "glm-dsa"}),
    ("auto", "i16", "float16", {"type": "Q8_0", "n_lora_kv": 512, "n_rot": 64, "indexer_head_size": 64}),   # rows as DeepSeek's models have
    ("sparse", "i16", "exact", {"type": "IQ2_XXS", "n_embd": 256, "n_ff": 256, "n_ff_exp": 256})])     # a type with a grid
def test_models(small_model, tmp_path, attention, kv_type, precision, spec):
    """A prompt in ubatches, then a token, against the reference.

    The context is longer than top_k. Caches are saved and loaded.
    """
    path = small_model(**TINY | spec)
    if spec["type"] == "F32":       # as some files store it
        path = rewrite(path, tmp_path / "m.gguf", tensors=each(fused_experts(path), whole_kv_b(path)))
        path = rewrite(path, tmp_path / "n.gguf", tensors=with_factors())
        assert {"scale", "expert_scale", "moe_linear"} < {node.op for node in Setup(path)._nodes}
        assert any(tensor.make for tensor in Setup(path).weights.used.values())
    errors = np.array(run_python("-c", MODEL, str(path), attention, kv_type, precision, device="ptx").split(), float)
    assert errors.size >= 2 and errors.max() < (1e-9 if spec["type"] == "F32" else 1e-6)


RECORDED = """
import sys
import numpy as np
from tests.ptx.driver import install
driver = install()
import pydsa
import pydsa.bench
ids = np.random.default_rng(0).integers(0, 300, 8).tolist()
model = pydsa.load(sys.argv[1], device="cuda", attention="sparse", kv_type="f32", n_ctx=12, n_ubatch=4, precision="exact")


def steps(session, observe=None):
    return np.stack([session.prefill(ids[:4], observe=observe), *(session.prefill([token], observe=observe) for token in ids[4:7])])


session, other, seen = model.session(), model.session(), {}
with session.record() as recording:
    logits = steps(session)
# a prompt kernel by kernel; a token by fused kernels, the next one recorded as a graph and replayed, the last one replayed
assert [driver.counts[name] for name in ("cuGraphInstantiate", "cuGraphLaunch")] == [1, 2]
def observe(node, arrays):
    if node.op in ("indexer_select", "moe_route"):
        for i, rows in enumerate(arrays):
            seen.setdefault((node.op, i), []).extend(rows.copy())
steps(other, observe)       # kernel by kernel
assert np.array_equal(recording.selection[0], seen["indexer_select", 0]) and recording.selection[0][-1, -1] == 6
assert np.array_equal(recording.experts[0], seen["moe_route", 0])
difference = np.abs(recording.expert_weights[0] - seen["moe_route", 1]).max()
assert difference < 1e-6 and len(np.unique(recording.expert_weights[0])) > 4, difference
session.truncate(3)
session.select = pydsa.selections.sliding_window(2)
with session.record(scores=True, mass=True) as recording:
    changed = session.decode(ids[3])
assert recording.selection[0].tolist() == [[2, 3, -1]] and recording.positions.tolist() == [3]
assert 0 < recording.mass[0][0] < 1 and np.isfinite(recording.scores[0][0, :2]).all()
assert ((changed - logits[0]) ** 2).sum() > 1e-5 * (logits[0] ** 2).sum()
session.select = None
session.truncate(3)
assert ((session.decode(ids[3]) - logits[0]) ** 2).sum() < 1e-6 * (logits[0] ** 2).sum()
best = session.decode(ids[4]).argmax()
session.truncate(4)
session.decode = None      # bench takes what the device samples, with no logits on the host
launched = driver.counts["cuGraphLaunch"]
assert pydsa.bench.time_test(session, ids[4:], 0, 3, True) > 0 and session.tokens == ids[:5] + [best, *session.tokens[6:]]
assert session.n_past == 7 and driver.counts["cuGraphLaunch"] - launched == 3
"""


def test_steps_are_recorded_and_changed(small_model):
    """What fused and replayed steps choose is seen, and can be replaced."""
    run_python("-c", RECORDED, str(small_model(**TINY | {"type": "Q8_0", "n_layer": 1, "n_layer_dense": 0})), device="ptx")


def test_ubatches_must_fit_into_a_grid(small_model):
    with pytest.raises(PydsaError, match="n_ubatch is 40000, expected at most 32768 on cuda"):
        Setup(small_model(), device="cuda", n_ctx=50_000, n_ubatch=40_000)


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_no_gpu_is_one_clear_sentence():
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run([sys.executable, "-m", "pydsa", "run", "--device", "cuda", "-p", "hello"], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "--device cuda finds no NVIDIA driver or no GPU" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


AS_PTX = os.environ.get("PYDSA_TEST_DEVICE") == "ptx"       # golden models in tests/ptx take minutes each
on_gpu = pytest.mark.skipif(not AS_PTX and not gpu_is_there(), reason="there is no GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ops_on_the_gpu(precision):
    """In float16 those that multiply with weights, or attend."""
    which = f"not ({OF_CPU})" if precision == EXACT else f"(linear or experts or attention or mha) and not ({OF_CPU})"
    assert " passed" in run_python("-m", "pytest", "-q", *(f"tests/{name}" for name in OPS), "-k", which, precision=precision)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("attention", ["sparse", "masked", "auto", "dense"])
@pytest.mark.parametrize("name", ["ds32-f32", "ds32-q8_0", "ds32-q4_k_m", "glm-q8_0", "ds2-q4_0"])
def test_golden_models_on_the_gpu(golden, name, attention, precision):
    """The golden logits, of the prompt at once and token by token.

    A token by itself is the same in both precisions.
    """
    if name == "ds2-q4_0" and attention in ("sparse", "masked"):
        pytest.skip("it has no indexer")
    path, arrays = golden(name)
    model = pydsa.load(path, device="cuda", attention=attention, kv_type="f32", n_ctx=256, precision=precision)
    expected = arrays["exact"] if attention != "dense" or name == "ds2-q4_0" else pydsa.load(
        path, attention="dense", kv_type="f32", n_ctx=256).logits(arrays["tokens"]).astype(np.float64)
    session = model.session()
    found = [(model.logits(arrays["tokens"]), 1e-6 if precision == EXACT else 1e-5)]
    if precision == EXACT:
        found.append((np.array([session.decode(token) for token in arrays["tokens"]]), 1e-6))
    for logits, median in found:
        errors = nmse(logits, expected)
        print(f"{name}, {attention}, {precision}: median {np.median(errors):.1e}, greatest {errors.max():.1e}")
        assert errors.max() <= 1e-8 if name == "ds32-f32" else np.median(errors) <= median
    rows = [n for n in (30, 100, 192) if n <= len(expected)]        # of the last layer alone, in the absorbed form
    last = [model.session().prefill(arrays["tokens"][:n]) for n in rows]
    assert np.median(nmse(np.array(last), expected[[n - 1 for n in rows]])) <= (1e-8 if name == "ds32-f32" else 1e-3)


GOLDEN = """
import sys
import numpy as np
from tests.ptx.driver import install
install().capability = 9, 0
import pydsa
from pydsa.backends.cuda.runtime.launch import KERNELS
arrays, prompt, ended = np.load(sys.argv[2]), 68, 70
ids, expected = arrays["tokens"], arrays["exact"][:ended]
for precision, median, product in (("float16", 1e-5, "f16_64_q8_0"), ("exact", 1e-6, "wgmma_q8_0_64")):
    session = pydsa.load(sys.argv[1], device="cuda", attention="sparse", n_ctx=72, n_ubatch=64, precision=precision).session()
    logits = np.stack([*session.logits(ids[:prompt]), *map(session.decode, ids[prompt:ended])])
    errors = ((logits - expected) ** 2).sum(-1) / (expected ** 2).sum(-1)
    assert np.median(errors) <= median and errors[-2:].max() <= median and KERNELS[product]._loaded, (precision, errors)
assert KERNELS["score_images_of_2"]._loaded
"""


@pytest.mark.gpu
@pytest.mark.skipif(not AS_PTX, reason="it takes more than a minute in tests/ptx")
def test_golden_model_on_capability_9_0(golden):
    """A prompt that is longer than top_k, and two tokens, in both precisions.

    The measure is the float64 forward pass from outside.
    """
    path = golden("ds32-q8_0")[0]
    run_python("-c", GOLDEN, str(path), str(path.with_suffix(".npz")), device="ptx")


@pytest.mark.gpu
@on_gpu
def test_greedy_continuation_on_the_gpu(golden):
    path, arrays = golden("ds32-f32")
    session = pydsa.load(path, device="cuda", kv_type="f32", n_ctx=256).session()
    assert greedy(session, session.prefill(arrays["tokens"]), 24) == arrays["llama_cpp_greedy"].tolist()
