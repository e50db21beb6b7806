"""pydsa/docs/tour.ipynb: its cells run, and show what the file says that they show."""
import json
import re

import pytest

from tools.run_notebook import TOUR, code_cells, run, store

MACHINES = re.compile(r"[\d.]+ (s\b|t/s)|\d+ threads?( \(\d+ for prompts\))?")       # what differs between machines
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.fixture(scope="module")
def notebook():
    return json.loads(TOUR.read_text(encoding="utf-8"))


def same(text, other):
    """Whether texts have the same words, and numbers within a tenth.

    Columns may be wider by a digit.
    """
    text, other = (re.sub(" +", " ", MACHINES.sub("", t)) for t in (text, other))
    numbers = zip(NUMBER.findall(text), NUMBER.findall(other))
    return NUMBER.split(text) == NUMBER.split(other) and all(float(a) == pytest.approx(float(b), rel=0.1) for a, b in numbers)


def texts(outputs):
    """The texts of a cell's outputs, and its pictures: (kind, text)."""
    for output in outputs:
        data = {"text/plain": output["text"]} if output["output_type"] == "stream" else output["data"]
        yield from ((kind, "" if kind == "image/png" else "".join(text)) for kind, text in sorted(data.items()))


def test_the_tour_shows_what_it_says(notebook):
    pytest.importorskip("matplotlib")
    for cell, made in zip(code_cells(notebook), run(notebook), strict=True):
        stored, found = list(texts(cell["outputs"])), list(texts(made))
        assert [kind for kind, _ in stored] == [kind for kind, _ in found], "run python tools/run_notebook.py"
        for (_, before), (_, now) in zip(stored, found):
            assert same(before, now), f"run python tools/run_notebook.py:\n{before}\n{now}"


def test_the_tour_is_a_notebook_with_outputs(notebook):
    assert TOUR.stat().st_size < 300_000
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert sum("image/png" in kind for cell in code_cells(notebook) for kind, _ in texts(cell["outputs"])) >= 5
    assert "/root" not in TOUR.read_text(encoding="utf-8") and "error" not in {o["output_type"] for c in code_cells(notebook)
                                                                               for o in c["outputs"]}
    links = re.findall(r"\]\(([^)#:]+)\)", "".join(line for cell in notebook["cells"] if cell["cell_type"] == "markdown"
                                                   for line in cell["source"]))
    assert links and all((TOUR.parent / link).exists() for link in links)


class Pictured:
    def _repr_html_(self):
        return "<p>" + "x" * 30_000

    def png(self, path):
        path.write_bytes(b"a picture")


def test_what_cells_show_is_stored():
    cell = {"cell_type": "code", "source": []}
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# Title"]},
                          *(cell | {"source": [source]} for source in ("x = 1\nprint('a')", "print(x)\nx + 1", "x;", "None", "thing"))]}
    code_cells(notebook)[-1]["source"] = ["from tests.test_tour import Pictured\nPictured()"]
    store(notebook, run(notebook))
    assert [list(texts(cell["outputs"])) for cell in code_cells(notebook)][:4] == [
        [("text/plain", "a\n")], [("text/plain", "1\n"), ("text/plain", "2")], [], []]
    last = code_cells(notebook)[-1]["outputs"][0]
    assert last["data"]["image/png"] == "YSBwaWN0dXJl\n" and last["execution_count"] == 5 and "text/html" not in last["data"]
    code_cells(notebook)[0]["source"] = ["1 / 0"]
    with pytest.raises(ZeroDivisionError):
        run(notebook)


@pytest.mark.parametrize("text, other, equal", [
    ("ppl 1.02, 5920", "ppl 1.03, 5920", True), ("ppl 1.02", "ppl 1.92", False), ("layer 1", "layer 2", False), ("a", "b", False),
    ("3 tokens, 21.2 t/s, 0.5 s", "3 tokens, 400 t/s, 11.5 s", True), ("on cpu, 2 threads", "on cpu, 8 threads (4 for prompts)", True)])
def test_numbers_of_other_machines_are_the_same(text, other, equal):
    assert same(text, other) == equal
