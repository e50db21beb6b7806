"""tools/recall.py: what caches of other types choose on the golden models, whose prompts are three times as long as top_k."""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tools.recall import compare, main, recalls

ASKED = {"f32": 1.0, "f16": 0.995, "q8_0": 0.99}


def test_recalls():
    exact = np.array([[0, -1], [0, 1], [0, 2], [1, 3]], np.int32)
    found = np.array([[0, -1], [0, 1], [1, 2], [0, 2]], np.int32)
    assert recalls(found, exact, 2).tolist() == [0.5, 0.0]      # the first two tokens have no choice


@pytest.mark.parametrize("kv_type", ASKED)
@pytest.mark.parametrize("name", ["ds32-f32", "ds32-q4_k_m", "glm-q8_0"])
def test_golden_models(golden, name, kv_type):
    path, arrays = golden(name)
    result = compare(str(path), arrays["tokens"], kv_type, threads=1)
    assert len(result) > 1 and all(len(same) == len(whole) == len(arrays["tokens"]) - 64 for same, whole in result.values())
    assert np.mean([same.mean() for same, _ in result.values()]) >= ASKED[kv_type]


def test_command_line(golden):
    path, _ = golden("ds32-f32")
    done = CliRunner().invoke(main, [str(path), "-p", "one two three " * 40, "--dsa-top-k", "16", "-t", "1", "-o", "json"])
    rows = json.loads(done.stdout)
    assert rows[-1]["layer"] == "all" and float(rows[-1]["same inputs"]) > 0.9
    short = CliRunner().invoke(main, [str(path), "-p", "one", "-t", "1"])
    assert short.exit_code == 2 and "the indexer only chooses beyond 64" in short.output
    dense = CliRunner().invoke(main, [str(golden("ds2-q4_0")[0]), "-p", "one", "-t", "1"])
    assert dense.exit_code == 2 and "has no indexer" in dense.output
