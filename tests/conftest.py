"""Fixtures of the test files: golden data, random models written once, models loaded once."""
from pathlib import Path

import numpy as np
import pytest

import pydsa
from tools.make_model import ModelSpec, make_model

GOLDEN = Path(__file__).parent / "data" / "golden"

# Widths that no vector register divides, and far fewer keys to attend to than tokens in the tests.
SMALL = dict(type="F32", n_embd=72, n_head=3, n_lora_q=40, n_lora_kv=56, n_nope=20, n_rot=12, n_v=28, n_ff=88, n_ff_exp=36,
             indexer_n_head=8, indexer_head_size=32, indexer_top_k=12, n_vocab=300, n_ctx=128)
# What a simulated GPU runs in seconds.
TINY = dict(n_layer=2, n_embd=32, n_head=2, n_lora_q=32, n_lora_kv=32, n_nope=32, n_rot=4, n_v=32, n_ff=32, n_expert=4, n_ff_exp=32,
            n_expert_groups=0, indexer_n_head=3, indexer_head_size=8, indexer_top_k=3, n_ctx=64)


def nmse(met, expected):
    """Normalised squared error over the last axis: sum (met - expected)^2 / sum expected^2."""
    met, expected = np.asarray(met, np.float64), np.asarray(expected, np.float64)
    return ((met - expected) ** 2).sum(-1) / (expected ** 2).sum(-1)


def random_ids(n, seed=0, n_vocab=300):
    """n token ids."""
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def greedy(session, logits, n):
    """Append the likeliest token n times -> those tokens."""
    tokens = []
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1])
    return tokens


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """small_model(arch="glm-dsa", ...) -> the path of a random model: SMALL with other fields of ModelSpec."""
    paths = {}

    def make(**spec):
        key = tuple(sorted(spec.items()))
        if key not in paths:
            paths[key] = make_model(tmp_path_factory.mktemp("model") / "model.gguf", ModelSpec(**SMALL | spec))
        return paths[key]
    return make


@pytest.fixture(scope="session")
def golden():
    """golden("ds32-f32") -> (path, {"tokens", "exact", "llama_cpp", "llama_cpp_greedy"})."""
    arrays = {}

    def read(name):
        if name not in arrays:
            with np.load(GOLDEN / f"{name}.npz") as stored:
                arrays[name] = dict(stored)
        return GOLDEN / f"{name}.gguf", arrays[name]
    return read


@pytest.fixture(scope="session")
def load():
    """pydsa.load, once for each path and options.

    By default the caches round nothing, and one thread works: on a busy machine two wait for each other.
    """
    models = {}

    def cached(path, **options):
        options = {"threads": 1, "n_ctx": 256, "kv_type": "f32"} | options
        key = (str(path), *sorted(options.items()))
        if key not in models:
            models[key] = pydsa.load(path, **options)
        return models[key]
    return cached
