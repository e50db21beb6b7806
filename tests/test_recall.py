"""tools/recall.py on the golden models.

Their prompts are three times as long as top_k. Equal choices give 1, and lost keys are counted.
"""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from pydsa.quants import CACHE_TYPES
from tools import recall as tool
from tools.recall import Probe, hits, main, recall, united

INDEXERS = {"ds32-f32": [0, 1, 2], "ds32-q8_0": [0, 1, 2], "ds32-q4_k_m": [0, 1, 2], "glm-q8_0": [0, 2]}


def overall(shares, name="same inputs"):
    return np.concatenate([both[name] for both in shares.values()])


def test_hits():
    exact = np.array([[0, 2, 4], [1, 2, -1], [3, 4, 5]], np.int32)
    found = np.array([[0, 2, 4], [0, 2, -1], [0, 0, 0]], np.int32)
    assert hits(found, exact, 6).tolist() == [3, 1, 0]
    assert hits(exact, exact, 6).tolist() == [3, 2, 3]


def test_united():
    chosen = np.arange(40, dtype=np.int32)[:, None] // 4 + np.int32([0, 100])
    assert united(chosen, 200) == [8, 8]        # 4 of each column; the last eight tokens are less than sixteen
    assert united(np.tile(np.int32([3, 5, 9]), (16, 1)), 10) == [3]


@pytest.mark.parametrize("index_type, whole_run", [("f16", 0.99), ("i8", 0.95)])
@pytest.mark.parametrize("name", INDEXERS)
def test_golden_models(golden, name, index_type, whole_run):
    """Recall is at least 0.99 from the same inputs.

    A whole run has other inputs too, so it may have less.
    """
    path, arrays = golden(name)
    ids = arrays["tokens"].tolist()
    shares = recall(path, ids, index_type, threads=1)
    assert list(shares) == INDEXERS[name]
    assert {both[of].size for both in shares.values() for of in ("same inputs", "whole run")} == {len(ids) - 64}
    assert all(1 <= unions.min() and unions.max() <= len(ids) / 64 for unions in (both["16 together"] for both in shares.values()))
    assert overall(shares).mean() >= 0.99 and overall(shares, "whole run").mean() >= whole_run
    assert overall(shares).min() >= 0.9


@pytest.mark.parametrize("name", ["ds32-q8_0", "glm-q8_0"])
def test_float32_against_itself(golden, name):
    path, arrays = golden(name)
    for both in recall(path, arrays["tokens"].tolist(), "f32", threads=1).values():
        assert (both["same inputs"] == 1).all() and (both["whole run"] == 1).all()


def test_ubatches_make_no_difference(golden, monkeypatch):
    path, arrays = golden("ds32-f32")
    ids = arrays["tokens"].tolist()
    whole = recall(path, ids, "bf16", threads=1)
    monkeypatch.setattr(tool, "UBATCH", 60)     # the first ubatch has no choice yet; in the second some tokens have one
    parts = recall(path, ids, "bf16", threads=1)
    for layer, both in whole.items():
        assert both["same inputs"].size == parts[layer]["same inputs"].size == len(ids) - 64
        assert parts[layer]["same inputs"].mean() == pytest.approx(both["same inputs"].mean(), abs=1e-3)


def test_a_broken_choice_is_noticed(golden, monkeypatch):
    path, arrays = golden("ds32-q8_0")
    right = Probe.choose

    def wrong(self, found, node):
        right(self, found, node)
        if node.args[3].layer == 1:
            found[-1, :16] = -1
    monkeypatch.setattr(Probe, "choose", wrong)
    shares = recall(path, arrays["tokens"].tolist(), "f32", threads=1)
    assert shares[1]["same inputs"][-1] == 0.75 and shares[1]["same inputs"][:-1].min() == 1
    assert shares[0]["same inputs"].min() == shares[2]["same inputs"].min() == 1
    assert overall(shares, "whole run").min() == 1


def test_table(golden):
    args = [str(golden("ds32-f32")[0]), "-l", "150", "-t", "1", "--dsa-top-k", "32"]
    *layers, every = json.loads(CliRunner().invoke(main, [*args, "-o", "json"]).stdout)
    assert [row["layer"] for row in layers] == [0, 1, 2] and every["layer"] == "all"
    assert every["keys"] == 3 * layers[0]["keys"] == 3 * (150 - 32) * 32
    for row in (*layers, every):
        for name in ("same inputs", "whole run"):
            assert row[f"{name}: mean"] == pytest.approx(1 - row[f"{name}: lost"] / row["keys"])
            assert 0 <= row[f"{name}: worst token"] <= row[f"{name}: mean"] <= 1
    text = CliRunner().invoke(main, [*args, "--index-type", "bf16"]).stdout
    assert text.startswith("| layer |") and text.endswith("bf16 index keys beside f32, 150 tokens.\n")


def test_any_type_of_cache_can_be_asked_for():
    option = next(param for param in main.params if param.name == "index_type")
    assert list(option.type.choices) == list(CACHE_TYPES)


@pytest.mark.parametrize("name, args, message", [
    ("ds2-q4_0", [], "has no indexer"),
    ("ds32-f32", ["-p", "short"], "every key is chosen"),
    ("ds32-f32", ["-p", "x", "-f", __file__], "not both"),
    ("ds32-f32", ["-p", ""], "every key is chosen"),
])
def test_mistakes(golden, name, args, message):
    result = CliRunner().invoke(main, [str(golden(name)[0]), "-t", "1", *args])
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
