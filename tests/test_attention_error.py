"""tools/attention_error.py: the error of each cache type.

It is measured under the same indices, and is the figure in the README.
"""
import json

import pytest
from click.testing import CliRunner

from tools.attention_error import errors, main


@pytest.mark.parametrize("heads, keys", [(16, 512), (5, 100)])
def test_errors(heads, keys):
    """Every cache type keeps its bound of the error.

    The bound of 1e-5 is asked of the kernels; 16-bit caches keep it with their own rounding included, i16 as well as f16.
    """
    rows = {row["cache"]: row for row in errors(heads, keys, 1.0, tokens=2)}
    assert all(row["NMSE from the same rows"] < 2e-7 for row in rows.values())
    assert rows["f32"]["NMSE"] < 1e-12 < rows["i16"]["NMSE"] < 2e-7
    assert rows["f16"]["NMSE"] < 2e-7 < rows["bf16"]["NMSE"] < 1e-5 < rows["i8"]["NMSE"] < 2e-4


def test_table():
    done = CliRunner().invoke(main, ["--heads", "3", "--keys", "20", "-o", "json"])
    rows = json.loads(done.stdout)
    assert done.exit_code == 0 and [row["cache"] for row in rows] == ["f32", "f16", "bf16", "i16", "i8"] * 2
    assert {row["heads"] for row in rows} == {3} and {row["keys"] for row in rows} == {20}
