"""The precision of prompts' products: how it reaches the table of variants, and variants that are switched off."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pydsa.backends.devices import backend_of
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


@has_numba_cuda
def test_variants_can_be_switched_off(table, monkeypatch):
    off = table.without(" linear: single, int8x2,")
    assert off == {("linear", "single"), ("attention", "int8x2"), ("indexer", "int8x2")}
    assert table.without("") == set()
    monkeypatch.setattr(table, "switched_off", lambda: off)
    assert chosen("linear", None, True) == "rest"
    for text, why in (("firsts", "has 'firsts', no variant; expected names of these: linear: first, linear: single, "),
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
