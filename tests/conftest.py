"""Fixtures: golden data, random models written once and loaded once.

With PYDSA_TEST_AMX=emulated, AMX kernels run on a CPU without AMX (amx.py).
"""
import os
from pathlib import Path

import numpy as np
import pytest

if os.environ.get("PYDSA_TEST_AMX") == "emulated":     # before the CPU backend is imported
    from tests.amx import install
    install()

import pydsa  # noqa: E402
from tools.make_model import ModelSpec, make_model  # noqa: E402

os.environ.setdefault("PYDSA_DEVICE", "cpu")        # also beside a GPU tests run on what they name, else on the CPU

GOLDEN = Path(__file__).parent / "data" / "golden"

SLOW = ("test_levels.py", "test_cuda.py", "test_words.py")       # files that take longest

pytest.register_assert_rewrite("helpers")


def pytest_collection_modifyitems(items):
    """Run the slow files first, so that no process is left alone with one."""
    items.sort(key=lambda item: item.path.name not in SLOW)


# Widths that are no multiple of a vector register; top_k is far below the number of tokens in the tests.
SMALL = dict(type="F32", n_embd=72, n_head=3, n_lora_q=40, n_lora_kv=56, n_nope=20, n_rot=12, n_v=28, n_ff=88, n_ff_exp=36,
             indexer_n_head=8, indexer_head_size=32, indexer_top_k=12, n_vocab=300, n_ctx=128)


@pytest.fixture
def one_thread():
    """One thread: on a busy machine two wait for each other."""
    from pydsa.backends.cpu.team import threads
    threads.set_threads(1)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """small_model(arch="glm-dsa", ...) -> the path of a random model.

    The arguments replace fields of SMALL.
    """
    paths = {}

    def make(**spec):
        key = tuple(sorted(spec.items()))
        if key not in paths:
            paths[key] = make_model(tmp_path_factory.mktemp("model") / "model.gguf", ModelSpec(**SMALL | spec))
        return paths[key]
    return make


@pytest.fixture(scope="session")
def golden():
    """golden("ds32-f32") -> (path, arrays).

    The arrays are "tokens", "exact", "llama_cpp" and "llama_cpp_greedy".
    """
    arrays = {}

    def read(name):
        if name not in arrays:
            with np.load(GOLDEN / f"{name}.npz") as stored:
                arrays[name] = dict(stored)
        return GOLDEN / f"{name}.gguf", arrays[name]
    return read


@pytest.fixture(scope="session")
def load():
    """pydsa.load, called once for each path and options.

    By default caches are float32, which rounds nothing, and there is one thread: on a busy machine two wait for each other.
    """
    models = {}

    def cached(path, **options):
        options = {"threads": 1, "n_ctx": 256, "kv_type": "f32"} | options
        key = (str(path), *sorted((name, str(value)) for name, value in options.items()))
        if key not in models:
            models[key] = pydsa.load(path, **options)
        return models[key]
    return cached
