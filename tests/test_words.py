"""Quantized products: activations rounded to 15 or 16 bits.

They are compared with float64 products of gguf-py's weights, for gemv by blocks and for gemm in int16 or AMX tiles.
"""
import itertools

import numpy as np
import pytest
from helpers import dequantize, set_scales

from pydsa.backends import cpu
from pydsa.backends.cpu.blocks import BLOCKS
from pydsa.backends.cpu.blocks.block import ONE_SCALE
from pydsa.backends.cpu.int16.gemm import GROUP, LARGEST_SUM
from pydsa.backends.cpu.int16.linear import MAX_INT15, MAX_INT16
from pydsa.backends.cpu.linear import GEMV_TOKENS, by_blocks
from pydsa.backends.cpu.vectors import amx
from pydsa.gguf.file import Tensor
from pydsa.quants import SUPPORTED, TYPES

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = [kind for kind in SUPPORTED if TYPES[kind].dtype.names]
SIZES = [(kind, n_in) for kind in QUANTIZED for n_in in (32, 96, 128, 224, 256, 1024) if n_in % TYPES[kind].size == 0]
N_TOKENS = (1, 7, 17, 40)
HALF_FIELDS = ("d", "dmin", "m")


def stored(kind, blocks, n_rows):
    """A weight in the format of a GGUF file, read-only."""
    data = blocks.view(np.uint8).reshape(n_rows, -1)
    data.flags.writeable = False
    return Tensor("w", kind, (n_rows, len(blocks) // n_rows * TYPES[kind].size), data)


def random_weight(kind, n_rows, n_in):
    """A weight of random bytes, with scales of both signs.

    The scales are within a factor of 30.
    """
    rng = np.random.default_rng([n_rows, n_in])
    n, dtype = n_rows * n_in // TYPES[kind].size, TYPES[kind].dtype
    blocks = np.frombuffer(rng.bytes(n * dtype.itemsize), dtype).copy()
    set_scales(blocks, kind, rng.uniform(-1, 1, n), rng.integers(-4, 1, n))
    return stored(kind, blocks, n_rows)


def products(tensor, x):
    """The products of cpu.linear, and the same in float64."""
    found = np.full((len(x), tensor.shape[0]), np.nan, np.float32)
    cpu.linear(found, cpu.weight(tensor), x)
    return found, x.astype(np.float64) @ dequantize(tensor.data, tensor.type).astype(np.float64).T


def error(found, expected):
    return ((found - expected) ** 2).sum() / (expected ** 2).sum()


def test_both_ways_are_taken():
    assert sum(n <= GEMV_TOKENS for n in N_TOKENS) == 2


@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("kind, n_in", SIZES)
def test_rounded_activations(kind, n_in, n_tokens):
    """The bound is six times the measured error.

    One lost or misplaced activation would exceed it.
    """
    for n_out in (45, 67):
        x = np.random.default_rng(n_tokens).standard_normal((n_tokens, n_in)).astype(np.float32)
        assert error(*products(random_weight(kind, n_out, n_in), x)) < 2e-8


@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("kind, n_in", SIZES)
def test_activations_that_rounding_keeps(kind, n_in, n_tokens):
    """Activations that rounding keeps leave only float rounding.

    They are integers times a power of two for each scale, with the largest number that it allows. In prompts others are smaller, so that
    sums of magnitudes do not decide the scale. In int8x2 weights are rounded, too.
    """
    rng, weight = np.random.default_rng(n_tokens), random_weight(kind, 37, n_in)
    many = not by_blocks(cpu.weight(weight), n_tokens) and not amx.HERE
    most, others = (MAX_INT16, LARGEST_SUM // GROUP - 1000) if many else (MAX_INT15, MAX_INT15)
    shared, groups = 8 if many or BLOCKS[kind].order[0] & ONE_SCALE else 1, np.arange(n_in // 32)      # of 32, that have one scale
    powers = rng.integers(-9, 1, (n_tokens, groups.size))[:, groups // shared]
    x = rng.integers(-others, others + 1, (n_tokens, groups.size, 32))
    x[:, ::shared, rng.integers(32)] = rng.choice([-most, most], x[:, ::shared, 0].shape)
    x = np.ldexp(x, powers[:, :, None]).astype(np.float32).reshape(n_tokens, n_in)
    assert error(*products(weight, x)) < (2e-8 if amx.HERE and n_tokens > GEMV_TOKENS else 1e-12)


@pytest.mark.parametrize("kind, n_in", [(kind, max(64, TYPES[kind].size)) for kind in QUANTIZED])
def test_single_elements(kind, n_in):
    """Each element of a block alone: its place, scale and sign.

    Checked with gemv and with gemm.
    """
    weight, x = random_weight(kind, 17, n_in), np.eye(n_in, dtype=np.float32)
    found, expected = products(weight, x)
    largest = np.abs(expected).max(axis=0)
    bound = (2 ** -13 if amx.HERE else 2 ** -16) * largest     # int8x2 rounds weights; without it, a min is subtracted
    assert (np.abs(found - expected) <= bound).all()
    for i in range(0, n_in, 7):
        assert (np.abs(products(weight, x[i:i + 1])[0] - expected[i]) <= 2 ** -16 * largest).all()


BYTES = (0x00, 0x07, 0x70, 0x77, 0x7F, 0x80, 0x88, 0xFF)        # all nibbles 0, 7, 8 or 15; the largest and the smallest int8


def extreme_weight(kind):
    """A row for every choice of one byte for each field.

    Scales are 1, mins 0 or 1. A type's largest magnitudes are among them.
    """
    dtype, n_blocks = TYPES[kind].dtype, 512 // TYPES[kind].size
    fields = [name for name in dtype.names if name not in (*HALF_FIELDS, "e")]
    choices = list(itertools.product(*[BYTES] * len(fields), (0, 0x3C00)))
    blocks = np.zeros((len(choices), n_blocks, dtype.itemsize), np.uint8)
    for name, column in zip(fields, np.array(choices).T):
        field, offset = dtype.fields[name]
        blocks[:, :, offset:offset + field.itemsize] = column[:, None, None]
    blocks = blocks.reshape(-1).view(dtype)
    set_scales(blocks, kind, np.full(len(blocks), 0x3C00, np.uint16))
    for name in {"m", "dmin"} & set(dtype.names):
        blocks[name] = np.repeat([choice[-1] for choice in choices], n_blocks)
    if kind == "MXFP4":
        blocks["e"] = 128
    return stored(kind, blocks, len(choices))


@pytest.mark.parametrize("n_tokens", [3, 20])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_extremes_do_not_overflow(kind, n_tokens):
    """Activations of the largest magnitude do not overflow.

    Their signs are equal, or alternate by elements, by pairs, or by halves of a block.
    """
    i = np.arange(512)
    signs = np.stack([np.ones(512), -np.ones(512), 1 - i % 2 * 2, 1 - i // 16 % 2 * 2, 1 - i // 2 % 2 * 2])
    # int8x2 rounds equal weights alike, and prompts equal activations: to 8191, as the sum of 64 decides
    weight, bound = extreme_weight(kind), 1e-4 if n_tokens > GEMV_TOKENS else 2e-6
    for part in (np.resize(signs, (n_tokens, 512)), np.resize(signs[::-1], (n_tokens, 512))):
        found, expected = products(weight, (3 * part).astype(np.float32))
        for row, exact in zip(found.T, expected.T):
            assert np.abs(row - exact).max() <= bound * np.abs(expected).max()


def test_extremes_are_extreme():
    """extreme_weight holds each type's largest numbers.

    They are in units of its scale.
    """
    largest = {"Q4_0": 8, "Q4_1": 16, "Q5_0": 16, "Q5_1": 32, "Q8_0": 128, "Q2_K": 3 * 15, "Q3_K": 4 * 32, "Q4_K": 15 * 63, "Q5_K": 31 * 63,
               "Q6_K": 32 * 128, "IQ4_NL": 127, "IQ4_XS": 127 * 32, "MXFP4": 12, "NVFP4": 12 * 240, "IQ1_S": 15 * 9 / 8,
               "IQ1_M": 15 * 9 / 8, "IQ2_XXS": 15.5 / 4 * 43, "IQ2_XS": 15.5 / 4 * 43, "IQ2_S": 15.5 / 4 * 43, "IQ3_XXS": 15.5 / 2 * 62,
               "IQ3_S": 31 * 15, "TQ1_0": 1, "TQ2_0": 2, "Q1_0": 1}
    no_such_row = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}      # of a grid
    assert set(largest) == set(QUANTIZED)
    for kind, bound in largest.items():
        weight = extreme_weight(kind)
        values = dequantize(weight.data, kind)
        assert np.abs(values).max() == bound, kind
        assert (np.abs(values) == bound).all(axis=1).any() or kind in no_such_row, f"{kind}: in no row all at once"


@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_is_not_finite_stays_so(kind, value, n_tokens):
    """A value that is not finite spoils the products of its own token only."""
    weight = random_weight(kind, 33, 512)
    for place in (0, 33, 511):
        x = np.random.default_rng(place).standard_normal((n_tokens, 512)).astype(np.float32)
        x[-1, place] = value
        found = np.empty((n_tokens, 33), np.float32)
        cpu.linear(found, cpu.weight(weight), x)
        assert not np.isfinite(found[-1]).any() and np.isfinite(found[:-1]).all()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_zeros_give_zero(kind):
    for n_tokens in (1, 20):
        x = np.zeros((n_tokens, 512), np.float32)
        assert not products(random_weight(kind, 33, 512), x)[0].any()
