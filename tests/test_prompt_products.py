"""Products of prompts in int16, whose sums must fit into 32 bits."""
import ctypes

import numba
import numpy as np
import pytest
from helpers import nmse, normal, set_scales, tensor

from pydsa.backends import cpu, reference
from pydsa.backends.cpu.blocks import BLOCKS
from pydsa.backends.cpu.blocks.block import MINS, MINS_16, SCALES, SUPERBLOCK
from pydsa.backends.cpu.int16.gemm import GROUP, LARGEST_SUM
from pydsa.backends.cpu.int16.linear import MAX_INT16, round_superblock
from pydsa.gguf.file import Tensor
from pydsa.quants import TYPES

pytestmark = pytest.mark.usefixtures("one_thread")
SCALED = [name for name, block in BLOCKS.items() if block.unpack_scaled]
PIECES = np.r_[np.arange(0, 32, 2), np.arange(1, 32, 2)]        # the order of each 32 int16 of a superblock


def extremes(kind):
    """Blocks of random bytes, and of all the same byte, with a scale of one."""
    dtype = TYPES[kind].dtype
    rows = np.random.default_rng(1).integers(0, 256, (40, dtype.itemsize), np.uint8)
    rows[:8] = np.uint8([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, 0x88, 0x77])[:, None]
    blocks = rows.view(dtype)[:, 0]
    set_scales(blocks, kind, np.ones(len(blocks)))
    return Tensor("w", kind, (len(blocks), TYPES[kind].size), blocks.view(np.uint8).reshape(len(blocks), -1))


def superblocks(function, w):
    """The superblocks that a function unpack makes of rows of one block."""
    out = np.zeros((len(w.data), SUPERBLOCK), np.uint8)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(function.address)
    for row, superblock in zip(w.data, out):
        call(row.ctypes.data, 1, superblock.ctypes.data)
    return out


def parts(superblock):
    """int16 in their natural order; scales; mins of 32 and of 16."""
    values = np.empty((len(superblock), 8, 32), np.int16)
    values[..., PIECES] = superblock[:, :SCALES].view(np.int16).reshape(values.shape)
    return values.reshape(len(values), -1), *(superblock[:, a:b].view(np.float32)
                                              for a, b in ((SCALES, MINS), (MINS, MINS_16), (MINS_16, SUPERBLOCK)))


@pytest.mark.parametrize("kind", SCALED)
def test_integer_scales_are_part_of_the_weights(kind):
    w, block = extremes(kind), BLOCKS[kind]
    values, scales, mins, mins_16 = parts(superblocks(block.unpack_scaled, w))
    offsets = {0: np.zeros((len(values), 1)), 8: mins, 16: mins_16}[block.mins]
    found = values * scales[:, :1] - np.repeat(offsets, 256 // offsets.shape[1], axis=1)
    np.testing.assert_array_equal(np.float32(found), reference.weight(w))
    assert np.abs(values.astype(int)).max() <= 4096


@pytest.mark.parametrize("kind", SCALED)
def test_unpacked_integers_have_as_many_bits_as_is_said(kind):
    """On which panels of AMX rely."""
    block = BLOCKS[kind]
    values = parts(superblocks(block.unpack, extremes(kind)))[0].astype(int)
    lowest, above = (0, 1 << block.bits) if block.mins else (-(1 << block.bits - 1), 1 << block.bits - 1)
    assert lowest <= values.min() and values.max() < above


@numba.njit
def rounded(x, n, superblock):
    round_superblock(x.ctypes.data, n, superblock.ctypes.data)


@pytest.mark.parametrize("x", [normal(256), normal(96), np.full(256, -3, np.float32), np.r_[np.full(32, 7), normal(224)],
                               np.r_[normal(255), 1000], np.zeros(64), normal(256) * 1e-36, np.r_[normal(63), np.inf]],
                         ids=["normal", "96", "alike", "some alike", "outlier", "zeros", "tiny", "inf"])
def test_activations(x):
    """Rounded with one scale; large sums of magnitudes are limited."""
    x, superblock = x.astype(np.float32), np.full((1, SUPERBLOCK), 255, np.uint8)
    rounded(x, len(x), superblock[0])
    values, scales, sums, sums_16 = parts(superblock)
    values, scale, whole = values[0].astype(int), float(scales[0, 0]), np.r_[x, np.zeros(256 - len(x))]
    if not np.isfinite(x).all():
        assert not np.isfinite(scale)
        return
    shares = np.abs(values).reshape(-1, GROUP).sum(1)
    assert np.abs(values).max() <= MAX_INT16 and shares.max() * 4096 < 2 ** 31
    assert (np.abs(values * scale - whole) <= 0.501 * scale).all() or np.abs(x).max() < 1e-30
    assert scale <= 1.01 * max(np.abs(x).max() / MAX_INT16, np.abs(whole).reshape(-1, GROUP).sum(1).max() / LARGEST_SUM)
    assert np.array_equal(sums[0], values.reshape(8, 32).sum(1)) and np.array_equal(sums_16[0], values.reshape(16, 16).sum(1))


@pytest.mark.parametrize("kind", ["Q6_K", "IQ4_XS", "IQ2_XXS", "Q8_0"])
def test_largest_sums(kind):
    """Largest weights, and activations alike, with the signs of the weights."""
    w = extremes(kind)
    weights = reference.weight(w).astype(np.float64)
    x = np.where(weights < 0, np.float32(-1), np.float32(1))
    out = np.zeros((len(x), len(x)), np.float32)
    cpu.linear(out, cpu.weight(w), x)
    assert nmse(out, x.astype(np.float64) @ weights.T).max() < 1e-8


def test_types_without_integer_scales():
    """Their scales are floats for each 32: the other half of the kernels."""
    w, x = tensor("Q5_1", 40, 96), normal(20, 96)
    out = np.zeros((20, 40), np.float32)
    cpu.linear(out, cpu.weight(w), x)
    assert nmse(out, x.astype(np.float64) @ reference.weight(w).astype(np.float64).T).max() < 1e-8
