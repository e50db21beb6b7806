"""Attention against the reference, for every cache type.

Dense, masked and sparse; short and long contexts; one thread and two.
"""
import numpy as np
import pytest
from helpers import (Rows, bound_of_tiles, choose, close, compare, integers, kernels, last_positions, normal, run, same_for_all_threads,
                     some_keys)

from pydsa.quants import CACHE_TYPES

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = choose([(3, 21, 16)], [(1, 37, 29), (3, 40, 32), (4, 17, 16), (16, 96, 64)])      # heads, width, n_v
TILES = choose([(17, 40, 32)], [])      # for the GPU's tensor cores, which take integer caches only
# Numbers of tokens and of keys; the last tokens lie on both sides of a tile's border.
CONTEXTS = choose([(1, 1), (2, 13)], [(1, 1), (1, 32), (2, 33), (7, 31), (7, 100), (33, 33), (33, 90)])     # n_tokens, n_kv


def attention_inputs(n_tokens, n_kv, shape, kv_type="f32"):
    n_head, width, n_v = shape
    return normal(n_tokens, n_head, width), Rows(normal(n_kv, width), kv_type, n_v), last_positions(n_tokens, n_kv)


def ops(positions, mask, indices):
    """The attention ops, with their arguments between latents and scale."""
    return {"dense_attention": [positions], "masked_attention": [mask, positions], "sparse_attention": [indices]}.items()


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
@pytest.mark.parametrize("n_tokens, n_kv", CONTEXTS)
def test_attention(n_tokens, n_kv, kv_type):
    """The three ops agree with the reference, and with each other.

    They agree with each other where they attend to the same keys.
    """
    for shape in SHAPES if n_tokens == 1 or not CACHE_TYPES[kv_type].scaled else [*SHAPES, *TILES]:
        q, latents, positions = attention_inputs(n_tokens, n_kv, shape, kv_type)
        out = (n_tokens, shape[0], shape[2])
        scale = shape[1] ** -0.5
        dense = compare("dense_attention", out, q, latents, positions, scale)
        everything = np.where(np.arange(n_kv) <= positions[:, None], np.arange(n_kv), -1).astype(np.int32)
        bound = 1e-12 if not CACHE_TYPES[kv_type].scaled else bound_of_tiles(latents, "attention") or 1e-12
        assert close(compare("sparse_attention", out, q, latents, everything, scale), dense, bound)
        assert close(compare("masked_attention", out, q, latents, np.zeros((n_tokens, n_kv + 3), np.float32), positions, scale), dense,
                     bound)
        chosen = some_keys(positions, 40)
        sparse = compare("sparse_attention", out, q, latents, chosen, scale)
        mask = run(kernels, "scatter_mask", [(n_tokens, n_kv + 3)], chosen, positions)
        assert close(compare("masked_attention", out, q, latents, mask, positions, scale), sparse, bound)
        assert np.isfinite(sparse).all() and not sparse[1:2].any()      # the token that chooses no key
        compare("masked_attention", out, q, latents, np.where(mask == 0, normal(*mask.shape), mask), positions, scale)


@pytest.mark.parametrize("kv_type", choose(["f32"], ["f32", "f16", "i8"]))
@pytest.mark.parametrize("size", [1, 2.0 ** 10, 2.0 ** 100])
def test_attention_of_large_logits(size, kv_type):
    """Sharp softmaxes, ties of the largest logit, and no overflow.

    Inputs are integers, so that float32 is exact.
    """
    n, n_kv = choose((2, 20), (7, 100))
    q, rows, positions = integers(-2, 2, n, 4, 24) * np.float32(size), Rows(integers(-2, 2, n_kv, 24), kv_type), last_positions(n, n_kv)
    mask = np.where(integers(0, 1, n, n_kv + 3) > 0, 0, -np.inf).astype(np.float32)
    for op, args in ops(positions, mask, some_keys(positions, 50)):
        assert np.isfinite(compare(op, (n, 4, 20), q, rows, *args, 1.0)).all()


@pytest.mark.parametrize("kv_type", ["f32", "f16", "i16", "i8"])
def test_attention_sees_no_future(kv_type):
    """Cache rows after a token's position have no influence."""
    n, n_kv = choose((2, 11), (7, 50))
    q, rows, positions = attention_inputs(n, n_kv, (3, 40, 32), kv_type)
    poisoned = rows._replace(values=np.concatenate([rows.values, np.full((9, 40), np.nan, np.float32)]))
    for op, args in ops(positions, np.zeros((n, n_kv + 12), np.float32), some_keys(positions, 20)):
        assert np.array_equal(*(run(kernels, op, [(n, 3, 32)], q, latents, *args, 0.2) for latents in (rows, poisoned)))


@pytest.mark.parametrize("kv_type", ["f32", "f16", "i16", "i8"])
@pytest.mark.parametrize("n_tokens", [1, 2, 7])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 96, 64)])
def test_attention_divides_heads_and_keys_among_threads(shape, n_tokens, kv_type):
    q, latents, positions = attention_inputs(n_tokens, 100, shape, kv_type)
    for op, args in ops(positions, np.zeros((n_tokens, 103), np.float32), some_keys(positions, 40)):
        assert same_for_all_threads(op, (n_tokens, shape[0], shape[2]), q, latents, *args, 0.2)
