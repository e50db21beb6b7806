"""The precision of prompts' products: how it reaches the table of variants, and variants that are switched off."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pydsa
from pydsa.backends.devices import backend_of
from pydsa.cli import main
from pydsa.errors import PydsaError
from pydsa.options import EXACT, FLOAT16, PRECISIONS
from pydsa.setup import Setup

ROOT = Path(__file__).parent.parent
has_numba_cuda = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")


def chosen(op, *args):
    """The name of the variant of the table that a call takes."""
    from pydsa.backends.cuda import variants
    found = variants.kernels(op, *args)
    return next(name for name, variant in variants.VARIANTS[op].items() if variant.kernels is found)


@pytest.fixture
def table(monkeypatch):
    """The module of the table of variants, those of linear replaced."""
    from pydsa.backends.cuda import variants
    made = {"first": variants.Variant(lambda w, single: not single, "kernels in float16", FLOAT16),
            "single": variants.Variant(lambda w, single: single, "of one"), "rest": variants.Variant(variants.anything, "others")}
    monkeypatch.setitem(variants.VARIANTS, "linear", made)
    return variants


@has_numba_cuda
def test_steps_choose_kernels_in_the_precision_of_their_backend(table):
    """It is that of the backend by which they were recorded.

    A backend of another precision on the same GPU, which the same thread uses meanwhile, changes nothing.
    """
    met = []

    def product():
        met.append(chosen("linear", None, False))

    backends = [backend_of("cuda", precision) for precision in PRECISIONS]
    steps = [backend.recorded([(None, product, ())], [0], False) for backend in backends]
    for step in (*steps, *steps[::-1]):
        step.run()
    assert met == ["first", "rest", "rest", "first"]
    with backends[1].selected():
        steps[0].run()
        assert met[-1] == "first" and chosen("linear", None, False) == "rest"
    assert chosen("linear", None, False) == "first" and chosen("linear", None, True) == "single"
    assert backend_of("cuda1", EXACT) is backend_of("cuda1", EXACT) is not backend_of("cuda1", FLOAT16)


PRODUCTS = """
import numpy as np
from tests.helpers import kernels, normal, reference, rng, run, tensor
from pydsa.backends.cuda.runtime.launch import KERNELS

def error(op, shape, *args):
    found, expected = run(kernels, op, [shape], *args), run(reference, op, [shape], *args)
    return found, ((found - expected) ** 2).sum() / (expected ** 2).sum()

def check(*args):
    nmse = error(*args)[1]
    assert 2e-8 < nmse < 2e-7, (args[0], args[1], nmse)

check("linear", (150, 37), tensor("Q4_K", 37, 768), normal(150, 768))       # tails of tokens, of rows; sums for offsets
check("linear", (3, 140), tensor("Q6_K", 140, 256), normal(3, 256))         # two scales a group
check("head_linear", (5, 3, 19), tensor("BF16", 3, 19, 96), normal(5, 3, 96))
ids = np.zeros((40, 2), np.int32)           # most use one expert, one is used by nobody
ids[:, 1] = 1 + 2 * rng(3).integers(0, 2, 40)
check("moe_gate_up", (40, 2, 45), normal(40, 256), ids, tensor("Q4_K", 4, 45, 256), tensor("Q6_K", 4, 45, 256))
x = normal(3, 256)
x[1, 7], x[2] = np.inf, 0
found, _ = error("linear", (3, 5), tensor("Q4_K", 5, 256), x)
assert np.isnan(found[1]).all() and (found[2] == 0).all() and np.isfinite(found[0]).all()
loaded = {name for name, kernel in KERNELS.items() if name.startswith("gemm_") and kernel._loaded}
assert loaded == {"gemm_one_q4_k", "gemm_one_q6_k", "gemm_one_bf16"}, loaded
"""


@has_numba_cuda
def test_products_of_one_float16():
    """Errors are those of float16, and products take the kernels of one part."""
    env = os.environ | {"PYDSA_TEST_DEVICE": "ptx", "PYDSA_TEST_PRECISION": "float16", "NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@has_numba_cuda
def test_variants_can_be_switched_off(table, monkeypatch):
    off = table.without(" linear: single, int8x2,")
    assert off == {("linear", "single"), ("attention", "int8x2"), ("indexer", "int8x2")}
    assert table.without("") == set()
    monkeypatch.setattr(table, "switched_off", lambda: off)
    assert chosen("linear", None, True) == "rest"
    for text, why in (("firsts", "has 'firsts', no variant; expected names of these: .*linear: first, linear: single, "),
                      ("attention: first", "has 'attention: first', no variant"),
                      ("f32", "has 'f32', what attention and indexer cannot do without"),
                      ("rest", "has 'rest', what linear cannot do without")):
        with pytest.raises(PydsaError, match=f"^PYDSA_CUDA_WITHOUT {why}"):
            table.without(text)


@has_numba_cuda
def test_names_of_the_environment_are_checked_before_anything_runs():
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "PYDSA_CUDA_WITHOUT": "f17"}
    done = subprocess.run([sys.executable, "-m", "pydsa", "run", "--device", "cuda", "-p", "hello"], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "PYDSA_CUDA_WITHOUT has 'f17', no variant" in done.stderr.splitlines()[-1], done.stderr


def test_precisions_that_there_are_not_are_refused(small_model):
    assert Setup(small_model()).precision == "float16" and Setup(small_model(), precision="exact").precision == "exact"
    with pytest.raises(PydsaError, match="^precision is 'float32', expected one of float16, exact.$"):
        Setup(small_model(), precision="float32")
    with pytest.raises(PydsaError, match="^precision is 'float32', expected one of float16, exact.$"):      # and Ray is not started
        pydsa.load(small_model(), stages=2, precision="float32")


def test_commands_take_it_and_say_it(small_model):
    path = str(small_model())
    for command, found in ((["info", path], lambda text: json.loads(text)["precision"]),
                           (["bench", path, "-p", "8", "-n", "2", "-r", "1", "-t", "1"], lambda text: json.loads(text)[0]["precision"])):
        for options, expected in ((["--precision", "exact"], "exact"), ([], "float16")):
            done = CliRunner().invoke(main, [*command, "--device", "cpu", "-o", "json", *options])
            assert done.exit_code == 0 and found(done.stdout) == expected, done.output
    commands = [name for name, command in main.commands.items() if any(option.name == "device" for option in command.params)]
    takes = [name for name in commands if any(option.name == "precision" for option in main.commands[name].params)]
    assert takes == commands and {"run", "serve", "bench", "perplexity", "info", "trace", "look", "imatrix", "faithful"} <= set(takes)
    assert "exact: where a GPU multiplies" in CliRunner().invoke(main, ["info", path, "--precision", "exact"]).stdout
    assert "| cpu, exact |" in CliRunner().invoke(main, ["bench", path, "-p", "0", "-n", "2", "-r", "1", "--precision", "exact",
                                                         "--device", "cpu"]).stdout


def test_a_session_of_one_precision_is_loaded_in_the_other(small_model, tmp_path):
    """What is in the caches has the same form; the CPU computes the same bits."""
    models = [pydsa.load(small_model(), device="cpu", n_ctx=32, precision=precision) for precision in PRECISIONS]
    sessions = [model.session() for model in models]
    logits = sessions[0].prefill([1, 2, 3, 4, 5])
    sessions[0].save(tmp_path / "session")
    sessions[1].load(tmp_path / "session")
    assert sessions[1].tokens == [1, 2, 3, 4, 5] and np.array_equal(sessions[0].decode(6), sessions[1].decode(6))
    assert np.array_equal(models[1].session().prefill([1, 2, 3, 4, 5]), logits)
