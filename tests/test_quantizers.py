"""Quantizers of rows: errors against llama.cpp's, edge cases, and layouts that gguf-py reads."""
import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from pydsa.backends.cpu import jit
from pydsa.errors import PydsaError
from pydsa.quantize import TYPES, rows
from tools.golden_quantizers import error

GOLDEN = np.load(Path(__file__).parent / "data/quantizers.npz")
ROWS = {name.removeprefix("rows."): GOLDEN[name] for name in GOLDEN.files if name.startswith("rows.")}
CHOOSING = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
ALL = ("F32", "F16", "BF16", "Q8_0", *CHOOSING)


def values_of(blocks, name):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", CHOOSING)
def test_errors_are_those_of_llama_cpp_or_less(name):
    importance = GOLDEN["importance"]
    for statistic, x in ROWS.items():
        plain, weighted = GOLDEN[f"{name}.{statistic}"]
        assert error(x, TYPES[name](x), name) <= 1.02 * plain, statistic
        blocks = TYPES[name](x, importance)
        assert error(x, blocks, name, importance) <= 1.02 * weighted, statistic
        if statistic != "small":        # there float16 has few scales to choose from
            assert error(x, blocks, name, importance) < error(x, TYPES[name](x), name, importance), statistic


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0"])
def test_blocks_are_those_of_llama_cpp(name):
    for statistic, x in ROWS.items():
        assert hashlib.sha256(TYPES[name](x).tobytes()).digest() == GOLDEN[f"{name}.{statistic}.sha256"].tobytes()


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_numbers_at_the_ends_of_the_range(name):
    quantize = TYPES[name]
    assert not values_of(quantize(np.zeros((1, 512), np.float32)), name).any()
    rng = np.random.default_rng(0)
    for scale in (1e-42, 1e-30, 1e-9, 1e4):
        x = rng.standard_normal((3, 256)).astype(np.float32) * np.float32(scale)
        y = values_of(quantize(x, np.ones(256, np.float32)), name)
        assert np.isfinite(y).all() and np.square((y - x).astype(np.float64)).sum() <= np.square(x.astype(np.float64)).sum() * 1.001
    if name not in ("F16",):
        assert np.isfinite(values_of(quantize(np.full((1, 256), 3e38, np.float32)), name)).all()


@pytest.mark.parametrize("name", ALL)
def test_rows_are_the_same_whatever_runs_with_them(name):
    x = np.random.default_rng(1).standard_normal((7, 512)).astype(np.float32)
    importance = GOLDEN["importance"]
    try:
        rows.set_threads(3)
        together = TYPES[name](x, importance)
    finally:
        rows.set_threads(None)
    np.testing.assert_array_equal(together, np.concatenate([TYPES[name](row[None], importance) for row in x]))
    np.testing.assert_array_equal(together, TYPES[name](np.asfortranarray(x), importance.astype(np.float64)))
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(together, TYPES[name](read_only, importance))


@pytest.mark.parametrize("name", CHOOSING)
def test_scales_of_importance_do_not_matter(name):
    x, importance = ROWS["heavy"], GOLDEN["importance"]
    for factor in (1e-30, 1e30):
        np.testing.assert_allclose(error(x, TYPES[name](x, importance * np.float32(factor)), name, importance),
                                   error(x, TYPES[name](x, importance), name, importance), rtol=0.03)
    np.testing.assert_array_equal(TYPES[name](x, np.zeros_like(importance)), TYPES[name](x))
    some = importance.copy()
    some[:256] = 0      # a whole block that no input meets is not given up
    assert error(x[:, :256], TYPES[name](x, some)[:, :TYPES[name].row_bytes(256)], name) < 0.6 * np.sqrt(np.square(x[:, :256]).sum())


def test_mxfp4_keeps_values_that_it_holds():
    blocks = TYPES["MXFP4"](ROWS["normal"])
    assert error(values_of(blocks, "MXFP4"), TYPES["MXFP4"](values_of(blocks, "MXFP4")), "MXFP4") == 0


def test_what_is_refused():
    x = np.ones((2, 256), np.float32)
    for at in (0, -1):
        for value in (np.nan, np.inf):
            bad = x.copy()
            bad.flat[at] = value
            with pytest.raises(PydsaError, match="not finite"):
                TYPES["Q4_K"](bad)
    with pytest.raises(PydsaError, match="blocks of 256 weights, which rows of 128 do not fill"):
        TYPES["Q4_K"](x[:, :128])
    with pytest.raises(PydsaError, match=r"shape \(2,\), expected \(256,\)"):
        TYPES["Q4_K"](x, [1, 2])
    with pytest.raises(PydsaError, match="below 0"):
        TYPES["Q4_K"](x, -np.ones(256))
    with pytest.raises(PydsaError, match="F16"):
        TYPES["F16"](x * 1e5)


# The greatest error at the edges
EDGES = {"Q2_K": 0.4, "Q3_K": 0.3, "Q4_K": 0.1, "Q5_K": 0.06, "Q6_K": 0.04, "IQ4_NL": 0.2, "IQ4_XS": 0.2, "Q4_0": 0.2, "Q4_1": 0.1,
         "Q5_0": 0.1, "Q5_1": 0.05, "MXFP4": 1.01, "Q8_0": 0.02}


@pytest.mark.parametrize("name", EDGES)
def test_rows_of_one_value_one_outlier_or_one_sign(name):
    """Zeros stay zeros, and one value stays; errors are bounded."""
    rng = np.random.default_rng(1)
    x = np.stack([np.zeros(256), np.full(256, 3.0), np.full(256, -3.0), np.where(np.arange(256) == 77, 5.0, 0.0),
                  rng.uniform(1, 2, 256), rng.uniform(-2, -1, 256)]).astype(np.float32)
    y = values_of(TYPES[name](x), name)
    assert not y[0].any()
    assert np.abs(x[1:3] - y[1:3]).max() < 0.002
    assert np.abs(x - y).max() < EDGES[name]


def test_kernels_are_kept_apart_from_those_of_the_engine():
    """A second start compiles nothing, an edit in a quantizer little."""
    quantizer = TYPES["Q8_0"]
    quantizer(np.zeros((1, 32), np.float32))
    assert quantizer.wanted().holds()
    path = quantizer.kernel._cache.path(tuple(quantizer.kernel.signatures[0]))
    assert path.exists() and path.parent != jit.FOLDER and path.parent.parent == jit.FOLDER.parent
