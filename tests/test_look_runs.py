"""Looks of models that run: in Python, on the command line, and of recordings in files."""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids

import pydsa
from pydsa import PydsaError, selections
from pydsa.cli import main
from pydsa.look import page
from pydsa.look.running import default_window

NOTES = Path(pydsa.DEMO).with_name("notes.txt").read_text(encoding="utf-8").removesuffix("\n")


@pytest.fixture(scope="module")
def demo():
    return pydsa.load(pydsa.DEMO, threads=1, n_ctx=4096)


def test_the_fact_lights_up_where_the_code_is_answered(demo):
    """In the notes the answer looks most at the code."""
    seen = demo.look(NOTES, window=64)
    assert seen.answer == "The code of the autumn kettle is 5920." and len(seen.recording.positions) == 64 + 11
    text, start = "", None
    for token, piece in enumerate(seen.texts):
        if start is None and text.endswith("The code of the autumn kettle is "):
            start = token
        text += piece
    values, figures = seen.figures.looked_at(), seen.figures
    most = np.argsort(-values[:figures.far])[:4].tolist()       # the first tokens of a text are looked at for no reason
    assert "".join(seen.texts[start:start + 2]) == "5920" and most[0] == start and sorted(most) == [0, 1, start, start + 1]
    assert seen.texts[figures.far:seen.n_prompt].count(" kettle") == 1
    writes = seen.n_prompt + seen.texts[seen.n_prompt:].index("592") - 1
    row = np.flatnonzero(seen.recording.positions == writes)[0]
    assert seen.recording.selection[1][row][np.argmax(seen.recording.scores[1][row])] == start


def test_options_of_a_run(demo):
    seen = demo.look("Hello", max_tokens=3, layers=[1, 3], system="Be brief.")
    assert seen.n_prompt == len(seen.ids) - 3 and seen.figures.layers == [1, 3]
    assert "No choice was made" in str(page.page_data(seen)["notes"])
    short = demo.look(demo.tokenize(NOTES)[:300], max_tokens=2, window=10, mass=True)
    assert short.recording.positions[0] == 290 and len(short.ids) == 302
    assert all(0 < row["mass_answer"] <= 1 for row in short.figures.layer_rows)
    alone = demo.look(NOTES[:1000], max_tokens=0, raw=True, window=20)
    assert alone.n_prompt is None and alone.figures.groups[0].rows.tolist() == [19] and alone.html()
    alone = demo.look(NOTES[:1000], max_tokens=1, raw=True, window=20, select=selections.sliding_window(128))
    assert np.flatnonzero(alone.figures.looked_at()).tolist() == list(range(alone.n_prompt - 128, alone.n_prompt))
    stopped = demo.look("Hello", stop="llo")
    assert stopped.answer.startswith("He") and len(stopped.ids) < stopped.n_prompt + 8


@pytest.mark.parametrize("options, message", [
    ({"prompt": ""}, "The prompt is empty."), ({"prompt": []}, "The prompt is empty."), ({"window": 0}, "window is 0"),
    ({"max_tokens": -1}, "max_tokens is -1"), ({"prompt": [5000]}, "token id is 5000"), ({"layers": [4]}, "There is no layer 4"),
    ({"prompt": NOTES * 2}, "The context holds 4096 tokens"), ({"temperature": -1}, "temperature is -1")])
def test_mistakes(demo, options, message):
    with pytest.raises(PydsaError, match=message):
        demo.look(**{"prompt": "Hello", "max_tokens": 1} | options)


def test_an_answer_that_fills_the_context(demo, load):
    model = load(pydsa.DEMO, n_ctx=40, kv_type="i16")
    seen = model.look("Tell me about Python.", raw=True)
    assert len(seen.ids) == 41 and "The answer ends where the context was full (-c)." in page.page_data(seen)["notes"]


def test_models_of_experts_alone(small_model, load):
    seen = load(small_model(arch="deepseek2"), attention="dense").look(random_ids(20), max_tokens=2)
    data = page.page_data(seen)
    assert data["choices"] is None and data["experts"]["groups"][0]["tokens"] == 2
    with pytest.raises(PydsaError, match="no mass to measure"):
        load(small_model(arch="deepseek2"), attention="dense").look(random_ids(5), mass=True)
    with pytest.raises(PydsaError, match="nothing to look at"):
        load(small_model(arch="deepseek2", n_layer_dense=2, n_layer=2, n_expert=0), attention="dense").look(random_ids(5))


def test_the_window_of_a_large_model_is_small(demo):
    from types import SimpleNamespace
    large = SimpleNamespace(top_k=2048, indexed_layers=range(61), indexer_n_head=64, indexer_head_size=128)
    assert default_window(demo.config, 8192) == 8192 and default_window(large, 131072) == 67 and default_window(large, 32) == 32


def run(*args, **options):
    return CliRunner().invoke(main, ["look", *map(str, args)], **options)


def test_the_command_line(demo, tmp_path):
    pytest.importorskip("matplotlib")
    path, notes = tmp_path / "out.html", tmp_path / "notes.txt"
    notes.write_text(NOTES[-900:], encoding="utf-8")
    result = run("-f", notes, "-n", 2, "-t", 1, "-o", path, "--png", tmp_path / "pictures", "--layers", "1,2", "--mass", "--recall")
    assert result.exit_code == 0 and len(result.stdout) > 2 and f"{path}: " in result.stderr
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>\n<!-- pydsa look:") and len(re.findall(r'"recall":(0\.9\d+|1\.0)[,}]', page)) == 2
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == [
        "changes.png", "experts.png", "layers.png", "mass.png", "text.png"]
    result = run("-p", "Hello", "-n", 1, "-t", 1, "-o", notes)
    assert result.exit_code == 2 and "must end in .html" in result.stderr and "loading" not in result.stderr


def test_without_matplotlib_the_page_is_written(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("-p", "Hello", "-n", 1, "-t", 1, "-o", tmp_path / "out.html", "--png", tmp_path / "new")
    assert result.exit_code == 2 and "pip install 'pydsa[plot]', then run this again. The page is written all the same." in result.stderr
    assert (tmp_path / "out.html").exists() and not list((tmp_path / "new").iterdir())


def test_without_a_prompt_it_looks_at_the_notes(demo, tmp_path, monkeypatch):
    opened = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    result = run("-t", 1, "--window", 30, "--open")
    assert result.stdout == "The code of the autumn kettle is 5920." and opened == [(tmp_path / "look.html").as_uri()]
    for args in (), ("-p", ""):
        result = run("model.gguf", *args)
        assert result.exit_code == 2 and "no text to look at" in result.stderr
    assert "no text to look at" in run("-p", "").stderr


def test_a_recording_in_a_file(demo, tmp_path):
    session, file, path = demo.session(), tmp_path / "run.npz", tmp_path / "look.html"
    with session.record(scores=True, path=str(file)):
        session.prefill(demo.tokenize(NOTES)[:200])
    result = run("--recording", file, "-o", path, "--answer", 20)
    assert result.exit_code == 0 and "loading" not in result.stderr and "200 tokens" in result.stderr and path.exists()
    for args, message in (("-p", "x"), "leave out -p and -f"), (("--answer", 200), "cannot have 200"), (("--layers", "9"), "no layer 9"):
        result = run("--recording", file, "-o", path, *args)
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert "--answer is for --recording" in run("--answer", 3).stderr
    assert "are measured while a text runs" in run("--recording", "a.npz", "--recall").stderr
    assert run("--recording", tmp_path / "no.npz", "-o", path).exit_code == 2


def test_the_example_in_the_docs_runs(demo, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = (Path(pydsa.__file__).parent / "docs/looking.md").read_text(encoding="utf-8")
    names = {"model": demo}
    exec(next(part.split("```")[0] for part in text.split("```python\n")[1:] if "model.look" in part).replace("=64", "=2"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.html", "text.png"] and names["look"].answer
