"""Launches of one token that do what others did: with the same bits."""
import numpy as np
import pytest
from helpers import IN_SIMULATOR, Rows, integers, normal, tensor
from test_one_token import chosen_rows, of_gpus, uneven_rows, use_tiles

from pydsa.backends import cuda
from pydsa.backends.cuda import attention, int8x2, modes, moe
from pydsa.backends.cuda.chosen.chosen_rows import Tile
from pydsa.backends.cuda.int8x2.gemv import gemv
from pydsa.backends.cuda.int8x2.gemv_scores import gemv_scores
from pydsa.backends.cuda.int8x2.linear import scratch_for_rows
from pydsa.backends.cuda.linear import head_tiles
from pydsa.backends.cuda.one_token import routing, rows_one


@of_gpus
@pytest.mark.parametrize("mode, n_keys", [(modes.SPARSE, 1330), (modes.DENSE, 1300), (modes.DENSE, 40)])
def test_heads_products_join_what_attention_left(monkeypatch, mode, n_keys):
    """Bit for bit as by a launch of its own, with splits that have no keys."""
    use_tiles(monkeypatch, "i8", Tile(32, 32, 2))
    rows, n_head = Rows(uneven_rows(1300, 1), "i8", 512), 3
    q, indices, positions = normal(1, n_head, 576) * np.float32(20), chosen_rows(1300, 1330, 1200), np.array([n_keys - 1])
    cache = cuda.cache_rows(1300, (512, 64), "i8")
    cuda.cache_write(cache, cuda.upload(rows.values), cuda.upload(np.arange(1300)))
    n_keys, q, indices, positions = 1330 if mode == modes.SPARSE else 1300, *map(cuda.upload, (q, indices, positions))
    w, tiles, made = cuda.weight(tensor("Q8_0", n_head, 70, 512)), head_tiles(1, n_head), scratch_for_rows(n_head, 512)
    attended = [cuda.upload(np.full((1, n_head, 512), np.nan, np.float32)) for _ in range(2)]
    products = [cuda.upload(np.full((n_head, 70), np.nan, np.float32)) for _ in range(2)]
    attention.attend(attended[0], q, cache, mode, n_keys, 0.05, positions, indices, made=made)
    gemv([products[0]], [w], made, tiles)
    splits = attention.splits_of_one(attended[1], q, cache, mode, n_keys, positions)
    splits.sums.set(np.full(splits.sums.shape, np.nan, np.float32))
    attention.attend_in_splits(q, cache, mode, n_keys, 0.05, positions, indices, None)
    source = rows_one.Rows(rows_one.JOINED, attended[1].rows, *splits[:2], splits=splits)
    assert rows_one.takes(source) and splits.n > 32 + rows_one.AT_ONCE
    gemv([products[1]], [w], source, tiles)
    for first, second in (attended, products):
        assert np.array_equal(first.get(), second.get()) and np.isfinite(first.get()).all()


RULES = [(2, 8, 3, True, 2.5), (1, 1, 1, False, 1.0), (3, 1, 1, True, 1.0)]      # gating, groups, those that are used, norm, scale


@pytest.mark.parametrize("rule", RULES[:1] if IN_SIMULATOR else RULES)
def test_blocks_choose_the_experts_that_they_multiply_with(rule):
    """As a launch of its own chooses them, also among equals and NaN."""
    n_expert, used, n = 40, 4, 64
    logits, bias, x = np.float32(0.5) * integers(-6, 6, 1, n_expert).astype(np.float32), normal(n_expert), normal(1, n)
    logits[0, 11], bias[::2] = np.nan if rule[0] == 2 else 1, 0
    rule = rule[0], *rule[1:4], np.float32(rule[4])
    experts, shared = cuda.weight(tensor("Q8_0", n_expert, 5, n)), cuda.weight(tensor("Q8_0", 5, n))
    logits, bias, made = cuda.upload(logits), cuda.upload(bias), int8x2.linear.pack(cuda.upload(x))
    found = []
    for routed in (False, True):
        ids, weights = cuda.upload(np.full((1, used), 1 << 30, np.int32)), cuda.upload(np.full((1, used), np.nan, np.float32))
        outs = [cuda.upload(np.full((rows, 5), np.nan, np.float32)) for rows in (used, used, 1)]
        router = routing.Router(weights.flat, logits.flat, bias, *rule) if routed else cuda.moe_route(ids, weights, logits, bias, *rule)
        gemv([*outs[:2], outs[2]], [experts, experts, shared], made, moe.pair_tiles(ids, n_expert, used), 0, None, router)
        found.append([a.get() for a in (ids, weights, *outs)])
    assert all(map(np.array_equal, *found)) and len(set(found[1][0].flat)) == used and np.isfinite(found[1][3]).all()


@of_gpus
@pytest.mark.parametrize("kind, position", [("Q8_0", 299), ("Q5_0", 4)])
def test_products_of_heads_beside_scores(kind, position):
    """Bit for bit as each by itself.

    The indexer has more heads than are staged at a time.
    """
    heads, n_kv = 3, 301
    w, made, tiles = cuda.weight(tensor(kind, heads, 70, 128)), int8x2.linear.pack(cuda.upload(normal(heads, 128))), head_tiles(1, heads)
    keys, queries = cuda.cache_rows(n_kv, (128, 0), "i8"), int8x2.indexer.pack(cuda.upload(normal(1, 40, 128)), cuda.upload(normal(1, 40)))
    cuda.cache_write(keys, cuda.upload(normal(n_kv, 128)), cuda.upload(np.arange(n_kv)))
    positions, scale, found = cuda.upload(np.array([position])), np.float32(0.1), []
    for beside in (False, True):
        out, scores = (cuda.upload(np.full(shape, np.nan, np.float32)) for shape in ((heads, 70), (1, n_kv)))
        if beside:
            gemv_scores(out, w, made, tiles, scores, queries, keys, positions, scale)
        else:
            gemv([out], [w], made, tiles)
            int8x2.indexer.score(scores, queries, keys, positions, 0, scale, False)
        found.append((out.get(), scores.get()))
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1], equal_nan=True)
    assert np.isfinite(found[1][0]).all() and np.isfinite(found[1][1]).sum() == position + 1
