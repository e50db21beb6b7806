"""README.md and pydsa/docs: generated pages are those of the code."""
import re
from pathlib import Path

import numpy as np
import pytest

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.team.op import Stage, op
from tools.update_docs import DOCS, PAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name):
    # words only: versions of click break lines at other places
    assert (DOCS / name).read_text(encoding="utf-8").split() == PAGES[name]().split(), "run python tools/update_docs.py"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*.md")))])
def test_links_lead_to_files(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    assert all((path.parent / link).exists() for link in links), links


def test_the_example_in_python_runs(golden, tmp_path, monkeypatch, capsys):
    example = README.split("```python\n")[1].split("```")[0].replace('"model.gguf"', repr(str(golden("ds32-q8_0")[0])))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example.replace("n_ctx=8192", "n_ctx=256, threads=1"), names)
    assert len(capsys.readouterr().out) > 40 and (tmp_path / "conversation.session").exists()
    assert names["values"]["kqv_out-0"].shape[0] == len(names["ids"])


def test_the_op_in_the_docs_runs():
    example = (DOCS / "speed.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names = {"__name__": "example", "np": np, "inner": inner, "Stage": Stage, "op": op}
    exec(example, names)
    x, out = np.arange(60, dtype=np.float32).reshape(20, 3), np.zeros((20, 6), np.float32)
    names["scaled"](out[:, ::2], x, 0.5)
    assert np.array_equal(out[:, ::2], x / 2) and not out[:, 1::2].any()
