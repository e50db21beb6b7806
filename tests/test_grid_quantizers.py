"""Quantizers of the i-quants, ternary, one bit and NVFP4: llama.cpp's errors, blocks that are kept, bad and odd numbers."""
from pathlib import Path

import numpy as np
import pytest

from pydsa.errors import PydsaError
from pydsa.quantization import TYPES, rows
from pydsa.quants import TYPES as BLOCKS
from tools.golden_quantizers import error, values_of
from tools.golden_quantizers_iq import TYPES as NAMES

DATA = Path(__file__).parent / "data"
GOLDEN, GIVEN = np.load(DATA / "quantizers_iq.npz"), np.load(DATA / "quantizers.npz")
ROWS, IMPORTANCE = {key.removeprefix("rows."): GIVEN[key] for key in GIVEN.files if key.startswith("rows.")}, GIVEN["importance"]


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_llama_cpp_or_less(name):
    for statistic, x in ROWS.items():
        plain, weighted = GOLDEN[f"{name}.{statistic}"]
        without, with_importance = TYPES[name](x), TYPES[name](x, IMPORTANCE)
        assert error(x, without, name) <= 1.02 * plain, statistic
        assert error(x, with_importance, name, IMPORTANCE) <= 1.02 * weighted, statistic
        if statistic != "small":        # there float16 has few scales to choose from
            assert error(x, with_importance, name, IMPORTANCE) < error(x, without, name, IMPORTANCE), statistic


def random_blocks(name, n):
    """Blocks of a type with random bits and sensible scales: uint8 [n, bytes]."""
    rng, kind = np.random.default_rng(3), BLOCKS[name]
    blocks = rng.integers(0, 256, (n, kind.n_bytes), dtype=np.uint8)
    fields = blocks.view(kind.dtype).reshape(n)
    d = (0.01 * np.exp(rng.standard_normal(n))).astype(np.float16).view(np.uint16)
    if name == "IQ1_M":
        fields["scales"] = fields["scales"] & 0x0FFF | (d[:, None] >> np.uint16([0, 4, 8, 12]) & 15) << 12
    elif name == "NVFP4":
        fields["scales"] = rng.integers(8, 120, (n, 4))
        fields["qs"].reshape(n, 4, 8)[:, :, 0] |= 7     # the top level is met, or there may be several ways to write a block
    else:
        fields["d"] = d
    if name == "TQ2_0":
        fields["qs"] = rng.integers(0, 3, (4, n, 64)).astype(np.uint8).T.swapaxes(0, 1) @ np.uint8([1, 4, 16, 64])
    return blocks


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_a_type_holds_are_kept(name):
    x = values_of(random_blocks(name, 200), name)
    np.testing.assert_allclose(values_of(TYPES[name](x), name), x, rtol=1e-6)
    y = x.copy()
    y[:, 5] *= 1.3      # and the comparison sees what is not kept
    assert np.abs(values_of(TYPES[name](y), name) - y).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_numbers_at_the_ends_of_the_range(name):
    quantize, rng = TYPES[name], np.random.default_rng(0)
    x = np.zeros((3, 512), np.float32)
    x[1, 300] = 1
    values = values_of(quantize(x), name)
    assert not values[[0, 2]].any() and not values[1, :256].any() and values[1, 300] > 0
    for scale in (1e-42, 1e-30, 1e-9, 1e4):
        x = rng.standard_normal((3, 256)).astype(np.float32) * np.float32(scale)
        y = values_of(quantize(x, np.ones(256, np.float32)), name)
        assert np.isfinite(y).all() and np.square((y - x).astype(np.float64)).sum() <= np.square(x.astype(np.float64)).sum() * 1.001
    huge = values_of(quantize(np.float32([[3e38, -3e38] * 128])), name)
    assert np.isfinite(huge).all() and (huge[:, ::2] > 0).all() and (huge[:, 1::2] < 0).all()
    mixed = np.float32([[1e30] + [1e-30] * 255])
    assert np.isfinite(values_of(quantize(mixed, IMPORTANCE[:256]), name)).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_whatever_runs_with_them(name):
    x = np.random.default_rng(1).standard_normal((7, 512)).astype(np.float32)
    try:
        rows.set_threads(3)
        together = TYPES[name](x, IMPORTANCE)
    finally:
        rows.set_threads(None)
    assert together.shape == (7, TYPES[name].row_bytes(512)) and together.dtype == np.uint8
    np.testing.assert_array_equal(together, np.concatenate([TYPES[name](row[None], IMPORTANCE) for row in x]))
    np.testing.assert_array_equal(together, np.hstack([TYPES[name](x[:, half], IMPORTANCE[half] * np.float32(4))
                                                       for half in (slice(256), slice(256, None))]))


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_no_input_meets_are_not_given_up(name):
    x, some = ROWS["normal"], IMPORTANCE.copy()
    some[:256] = 0
    first = np.ascontiguousarray(TYPES[name](x, some)[:, :TYPES[name].row_bytes(256)])
    assert error(x[:, :256], first, name) < 0.7 * np.sqrt(np.square(x[:, :256]).sum())
    np.testing.assert_array_equal(TYPES[name](x, np.zeros_like(some)), TYPES[name](x))


def test_signs_are_even_where_a_block_stores_seven_of_eight():
    """The sign that is wrong costs least: it is that of a number near 0."""
    x = np.abs(np.random.default_rng(2).standard_normal((4, 256))).astype(np.float32) + 1
    x[:, ::8] = -0.01
    for name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"):
        assert (values_of(TYPES[name](x), name) > 0).all()
    for name in ("IQ2_S", "IQ3_S"):
        assert ((values_of(TYPES[name](x), name) < 0) == (x < 0)).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name):
    x = np.ones((2, 256), np.float32)
    for value in (np.nan, -np.inf):
        bad = x.copy()
        bad[1, -1] = value
        with pytest.raises(PydsaError, match="not finite"):
            TYPES[name](bad)
    with pytest.raises(PydsaError, match="which rows of 32 do not fill"):
        TYPES[name](x[:, :32])
