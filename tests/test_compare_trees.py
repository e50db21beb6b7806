"""tools/compare_trees.py: a tree beside itself, and what the rows say."""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tools.compare_trees import ROOT, main, row_of


def test_a_tree_beside_itself(small_model):
    found = CliRunner().invoke(main, [str(small_model()), str(ROOT), "-t", "1", "--depths", "3,9", "-n", "2", "-r", "2", "-o", "json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.output)
    assert [row["test"] for row in rows] == ["tg2 @ d3", "tg2 @ d9"] and all(value > 0 for row in rows for value in [*row.values()][1:])


def test_ratios_are_of_neighbours_and_by_memory():
    """The machine doubles its speed in the middle; memory limits at first."""
    old, new = np.array([[4.0] * 3] * 3 + [[2.0] * 3] * 3), np.array([[4.0] * 3] * 3 + [[1.0] * 3] * 3)
    row = row_of("tg3", old, new, np.array([1e9, 1.1e9, 1.2e9, 5e9, 6e9, 7e9]))
    assert (row["ratio in slow memory"], row["ratio in fast memory"], row["ratio"]) == (1, 2, 1.5)
    assert (row["slow memory, GB/s"], row["fast memory, GB/s"], row["of the fastest tenth"]) == (pytest.approx(1.05), 6.5, 2)


def test_a_tree_that_does_not_load(small_model, tmp_path):
    (tmp_path / "pydsa.py").write_text("raise SystemExit('broken')")
    found = CliRunner().invoke(main, [str(small_model()), str(tmp_path)])
    assert found.exit_code == 1 and f"{tmp_path} did not load the model" in found.output
