"""The same results at every SIMD level.

Kernels are compiled for other CPUs than this one, in processes of their own. Without AMX in this CPU, its level is emulated (amx.py).
"""
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from tests import amx

ROOT = Path(__file__).parent.parent
AVX2 = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2,+ssse3,+sse2"
AVX512 = AVX2 + ",+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd"
LEVELS = {      # name: (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, floats in a register); the product of int16 differs in each
    "avx512vnni": ("icelake-server", AVX512 + ",+avx512vnni", 16),
    "avx512": ("skylake-avx512", AVX512, 16),
    "avxvnni": ("alderlake", AVX2 + ",+avxvnni", 8),
    "avx2": ("haswell", AVX2, 8),
    "plain": ("x86-64", "+sse2", 4),
}
EMULATED = "amx"        # AVX-512 and emulated tiles
HERE = {name for name, there in llvm.get_host_cpu_features().items() if there}
POSSIBLE = [level for level, (_, features, _) in LEVELS.items() if {f[1:] for f in features.split(",")} <= HERE]
if "amx-int8" not in HERE:
    POSSIBLE = POSSIBLE[1:]     # the first is this CPU's own, at which all other tests run
if amx.possible():
    POSSIBLE.append(EMULATED)
LANES = {level: lanes for level, (_, _, lanes) in LEVELS.items()} | {EMULATED: 16}
# Levels of one register width differ in the product of int16 only, so one of each width runs, and a whole model with all kernels and types
# of each kind at one width: kernels take seconds a type to compile, and all levels together minutes of CI.
POSSIBLE = [level for at, level in enumerate(POSSIBLE) if LANES[level] not in [LANES[other] for other in POSSIBLE[at + 1:]]]
WHOLE = [level for level in POSSIBLE if LANES[level] == 8]


def marked(possible):
    return [pytest.param(level, marks=pytest.mark.skipif(level not in possible, reason="not on this CPU, or run elsewhere"))
            for level in LANES]


PROGRAM = """
import os
import sys
import numpy as np
import pytest
if os.environ.pop("PYDSA_TEST_AMX", None):
    from tests.amx import install
    install()
import pydsa
from pydsa.backends.cpu.vectors import simd
lanes, gguf, *tests = sys.argv[1:]
assert simd.LANES == int(lanes), simd.LANES
if gguf:
    arrays = np.load(gguf.replace(".gguf", ".npz"))
    for attention in ("sparse", "auto"):
        logits = pydsa.load(gguf, attention=attention, kv_type="f32", n_ctx=256).logits(arrays["tokens"]).astype(np.float64)
        print("error", np.median(((logits - arrays["exact"]) ** 2).sum(-1) / (arrays["exact"] ** 2).sum(-1)), flush=True)
raise SystemExit(pytest.main(["-q", "-x", *tests]))
"""


# Tests of kernels that multiply int16, and of the others
PRODUCTS = ["test_words.py", "test_few_tokens.py::test_products", "test_int8_keys.py::test_selection",
            "test_int8_keys.py::test_a_key_that_is_not_finite_is_never_chosen"]
# Of any type they are made of the same two instructions; but grids are looked up in bytes, which this CPU's own level may do, or in int16
OF_PRODUCTS = "Q4_K or Q6_K or IQ2_XXS or selection or never_chosen"
OF_WIDTH = f"{OF_PRODUCTS} or Q4_0 or Q8_0 or IQ1_M or IQ4_NL or TQ1_0 or attention or choice or sampled or whole"     # types of each kind
OTHERS = ["test_few_tokens.py::test_heads", "test_few_tokens.py::test_experts",
          "test_attention.py::test_attention", "test_mha.py::test_mha_sparse_attention[40-300-i16]",
          "test_top_k.py::test_rows_that_are_sampled", "test_quants.py::test_backends_store_the_same_whole_numbers",
          *[f"test_reproducible.py::test_{name}" for name in ("attention[16-90-f16]", "attention[16-90-i16]", "choice_of_keys[60-70-f16]")]]
pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are those of x86")


def run(level, folder, gguf, tests):
    """A process of Python with a CPU of this level, which compiles by itself.

    So parts of several kernels are compiled once.
    """
    if level == EMULATED:
        env = {"NUMBA_CPU_FEATURES": amx.cpu_features(), "PYDSA_TEST_AMX": "emulated", "PYDSA_CACHE_DIR": str(folder)}
    else:
        env = dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), LEVELS[level]))
    return subprocess.run([sys.executable, "-c", PROGRAM, str(LANES[level]), gguf, *tests], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1"} | env)


@pytest.fixture(scope="module")
def runs(golden, tmp_path_factory):
    """Level -> a future of its process: a model's logits, then tests of kernels.

    Two run at a time, as most of what they do is to compile.
    """
    path, _ = golden("ds32-q4_k_m")
    pool, folder, futures = ThreadPoolExecutor(2), tmp_path_factory.mktemp("kernels"), {}
    for level in sorted(POSSIBLE, key=lambda level: level not in WHOLE):        # the longer ones first
        tests = [f"tests/{name}" for name in PRODUCTS]
        tests += [*(f"tests/{name}" for name in OTHERS), "-k", OF_WIDTH] if level in WHOLE else ["-k", OF_PRODUCTS]
        futures[level] = pool.submit(run, level, folder, str(path) if level in WHOLE else "", tests)
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("level", marked(WHOLE))
def test_golden_logits_at_level(level, runs):
    result = runs[level].result()
    errors = np.array([line.split()[1] for line in result.stdout.splitlines() if line.startswith("error ")], float)
    assert errors.size == 2 and errors.max() < 1e-6, result.stdout + result.stderr


@pytest.mark.parametrize("level", marked(POSSIBLE))
def test_kernels_at_level(level, runs):
    """By tests of their own: products, attention over every cache, scores of int8 keys, top-k of long rows."""
    result = runs[level].result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "failed" not in result.stdout
