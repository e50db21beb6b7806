"""Ops at sizes that fill whole tiles of the GPU's kernels.

The sizes reach a bit into the next tiles. The simulator would take hours for them.
"""
import numpy as np
import pytest
from helpers import DEVICE, IN_SIMULATOR, Rows, close, compare, integers, kernels, last_positions, normal, rng, run, tensor

from pydsa.backends import reference
from pydsa.quants import SUPPORTED, TYPES

pytestmark = [pytest.mark.skipif(IN_SIMULATOR, reason="too much for the simulator"), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("kind", SUPPORTED)
def test_linear(kind):
    """150 rows and 150 tokens.

    The number of blocks is odd, that of groups too where a block is a group.
    """
    w = tensor(kind, 150, 3 * TYPES[kind].size if TYPES[kind].size > 32 else 7 * 32)
    for n_tokens in (1, 150):
        compare("linear", (n_tokens, 150), w, normal(n_tokens, w.shape[1]))


@pytest.mark.parametrize("kind, n_in", [("Q6_K", 1280), ("Q8_0", 1312), ("Q4_K", 2304), ("Q8_0", 4128), ("IQ2_XXS", 1280), ("Q4_1", 2144),
                                        ("F32", 1164), ("BF16", 2056)])
def test_one_token(kind, n_in, monkeypatch):
    """Rows of several steps, the last one partial.

    First warps share rows, then there are few blocks, each of which walks through many rows.
    """
    for n_out, most_blocks in ((9, None), (70, 2)):
        if most_blocks and DEVICE == "cuda":
            monkeypatch.setattr("pydsa.backends.cuda.int8x2.gemv.MOST_BLOCKS", most_blocks)
        w, x = tensor(kind, n_out, n_in), normal(1, n_in)
        found, expected = run(kernels, "linear", [(1, n_out)], w, x), run(reference, "linear", [(1, n_out)], w, x)
        assert close(found, expected, 1e-12 if kind in ("F32", "F16", "BF16") else 2e-8)


@pytest.mark.parametrize("kind, n_in, n_out", [("Q8_0", 128, 70), ("Q8_0", 96, 17), ("Q4_K", 512, 33), ("Q5_K", 256, 35), ("F16", 72, 35),
                                               ("F32", 20, 9)])
def test_heads_of_one_token(kind, n_in, n_out):
    """Short rows, of which lanes of a warp have several."""
    compare("head_linear", (1, 3, n_out), tensor(kind, 3, n_out, n_in), normal(1, 3, n_in))


def test_experts_of_one_token():
    ids, weights = np.array([[4, 1, 3]], np.int32), normal(1, 3)
    gate, up, down = tensor("Q4_K", 5, 37, 1280), tensor("Q4_K", 5, 37, 1280), tensor("Q6_K", 5, 18, 1536)
    compare("moe_gate_up", (1, 3, 37), normal(1, 1280), ids, gate, up)
    compare("moe_down", (1, 18), normal(1, 3, 1536), ids, weights, down)


def test_experts_of_many_tokens():
    """Of 300 pairs most use one expert, so that it has several tiles."""
    n_tokens, ids = 150, np.zeros((150, 2), np.int32)
    ids[:, 1] = 1 + rng(3).integers(0, 2, n_tokens)
    gate, up, down = tensor("Q4_K", 3, 40, 256), tensor("Q5_0", 3, 40, 256), tensor("Q8_0", 3, 140, 64)
    compare("moe_gate_up", (n_tokens, 2, 40), normal(n_tokens, 256), ids, gate, up)
    compare("moe_down", (n_tokens, 140), normal(n_tokens, 2, 64), ids, normal(n_tokens, 2), down)


@pytest.mark.parametrize("kv_type", ["i16", "i8"])
@pytest.mark.parametrize("n_head, n_v, n_rot, n_kv, n_tokens", [(40, 512, 64, 200, 1), (25, 96, 12, 150, 3), (128, 512, 64, 70, 1)])
def test_attention(kv_type, n_head, n_v, n_rot, n_kv, n_tokens):
    """Enough heads for tensor cores, few chosen keys, partial tiles."""
    q, rows = normal(n_tokens, n_head, n_v + n_rot), Rows(normal(n_kv, n_v + n_rot), kv_type, n_v)
    positions = last_positions(n_tokens, n_kv)
    indices = np.full((n_tokens, 70), -1, np.int32)
    for t, position in enumerate(positions):
        indices[t, :65] = np.sort(rng(t).choice(position + 1, 65, replace=False))
    mask = np.where(rng(5).random((n_tokens, n_kv + 3)) < 0.5, -np.inf, 0).astype(np.float32)
    compare("dense_attention", (n_tokens, n_head, n_v), q, rows, positions, 0.05)
    compare("sparse_attention", (n_tokens, n_head, n_v), q, rows, indices, 0.05)
    compare("masked_attention", (n_tokens, n_head, n_v), q, rows, mask, positions, 0.05)


@pytest.mark.parametrize("n", [8192, 20_000, 163_840])
def test_top_k_of_long_rows(n):
    """Rows that a GPU divides among blocks, with many ties.

    The choice among equals is made in both steps.
    """
    scores = integers(-3, 3, 2, n)
    scores[1, ::7] = -np.inf
    compare("top_k", [2, 2048], scores)


def test_selection_in_long_rows():
    """Selection in rows that end at a position, as indexer_select has them.

    All numbers are integers, so the choice is float64's.
    """
    rows, q, w = Rows(integers(-2, 2, 9001, 32)), integers(-2, 2, 2, 3, 32), integers(1, 3, 2, 3)
    compare("indexer_select", [2, 64], q, w, rows, np.array([8999, 9000]), 1.0)
    compare("indexer_select", [1, 64], q[:1], w[:1], rows, np.array([70]), 1.0)
