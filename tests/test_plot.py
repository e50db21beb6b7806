"""The plot of a bench: its lines, and what is refused beforehand.

Its lines show the numbers of the rows. What cannot be drawn is refused before anything is timed.
"""
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pydsa import PydsaError, plot
from pydsa.cli import main

ROOT = Path(__file__).parent.parent


def row(attention, n_prompt, n_gen, n_depth, speed, limit=None):
    return {"model_name": "a $model$", "model_arch": "deepseek32", "model_type": "Q4_K", "model_n_params": 5e8, "backend": "cpu",
            "n_threads": 2, "n_threads_batch": 2, "type_k": "f16", "type_index": "i8", "top_k": 64,
            "attention": attention, "n_prompt": n_prompt, "n_gen": n_gen,
            "n_depth": n_depth, "avg_ts": speed, "stddev_ts": speed / 10, "limit_ts": limit}


ROWS = [row("sparse", 512, 0, 4096, 591.0), row("sparse", 0, 32, 4096, 108.0, 259.0),
        row("sparse", 512, 0, 0, 1339.0), row("sparse", 0, 32, 0, 190.0, 317.0),
        row("masked", 512, 0, 0, 1300.0), row("masked", 0, 32, 0, 180.0, 317.0),
        row("masked", 512, 0, 4096, 400.0), row("masked", 0, 32, 4096, 60.0, 200.0)]


def drawn(axes):
    """The lines of a panel as [(x, y, dashed)]."""
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle() == "--") for line in axes.lines]


def test_lines_hold_the_numbers_of_the_rows():
    pytest.importorskip("matplotlib")
    prompt, generation = plot.draw(ROWS).axes
    depths = [0, 4096]
    assert drawn(prompt) == [(depths, [1339, 591], False), (depths, [1300, 400], False)]
    assert drawn(generation) == [(depths, [190, 108], False), (depths, [317, 259], True),
                                 (depths, [180, 60], False), (depths, [317, 200], True)]
    colours = [line.get_color() for line in generation.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [text.get_text() for text in prompt.get_legend().get_texts()] == ["sparse", "masked"]
    assert [text.get_text() for text in generation.get_legend().get_texts()][2:] == ["limit of the memory's bandwidth"]
    for axes in (prompt, generation):
        assert axes.get_ylim()[0] == 0 and "tokens" in axes.get_xlabel() and "tokens per second" in axes.get_ylabel()


def test_the_title_names_model_and_threads():
    pytest.importorskip("matplotlib")
    text = plot.draw(ROWS).get_suptitle()
    assert text == "a $model$: deepseek32 Q4_K, 500.00 M parameters\n2 threads, f16 latents, i8 index keys, top_k 64"
    assert "1 thread," in plot.title(ROWS[0] | {"n_threads": 1, "n_threads_batch": 1})
    assert "\n1 thread (2 for prompts)," in plot.title(ROWS[0] | {"n_threads": 1})
    reference = {"n_threads": None, "n_threads_batch": None, "backend": "reference", "top_k": None}
    assert plot.title(ROWS[0] | reference).endswith("\nreference, f16 latents")


def test_panels_and_lines_are_those_of_the_tests():
    pytest.importorskip("matplotlib")
    [only] = plot.draw([r for r in ROWS if r["n_gen"]]).axes
    assert only.get_title() == "generation of 32 tokens"
    [lengths] = plot.draw([row("auto", 8, 0, 0, 5.0), row("auto", 16, 0, 0, 6.0)]).axes
    assert [line.get_label() for line in lengths.lines] == ["auto, 8 tokens", "auto, 16 tokens"]
    [reference] = plot.draw([row("auto", 0, 8, 0, 5.0)]).axes       # the reference has no known limit
    assert drawn(reference) == [([0], [5.0], False)]


def test_labels_do_not_touch():
    assert plot._labelled([0]) == [0]
    assert plot._labelled([0, 512, 1024, 4096, 15999, 16384]) == [0, 4096, 16384]
    assert plot._labelled([0, 4096]) == [0, 4096]


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_the_ending_decides_the_format(tmp_path, ending, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed.{ending}"
    plot.check_plot(str(path))
    assert not path.exists()
    plot.save_plot(ROWS, str(path))
    assert path.read_bytes().startswith(start)
    plot.check_plot(str(path))      # an existing file stays until it is replaced
    assert path.read_bytes().startswith(start)


def test_drawing_leaves_others_alone(tmp_path):
    pytest.importorskip("matplotlib")
    program = ("import sys; from tests.test_plot import ROWS, plot; plot.save_plot(ROWS, sys.argv[1]); "
               "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "speed.png")], check=True, cwd=ROOT)


def refused(*args):
    """The error of bench, which must not begin to load a model."""
    result = CliRunner().invoke(main, ["bench", "no-such.gguf", *map(str, args)])
    assert result.exit_code == 2 and result.stdout == "" and "loading" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("name", ["speed.gif", "speed", "png", ""])
def test_unknown_endings_are_refused(tmp_path, name):
    assert "must end in .png, .svg, .pdf" in refused("--plot", name)


def test_places_without_room_for_a_file_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    assert "No such file or directory" in refused("--plot", tmp_path / "missing" / "speed.png")
    assert "Is a directory" in refused("--plot", tmp_path / "folder.png")
    with pytest.raises(PydsaError, match="cannot be written"):
        plot.check_plot("a\0b.png")


def test_ops_are_not_drawn():
    assert "--ops" in refused("--plot", "speed.png", "--ops")


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'pydsa[plot]'" in refused("--plot", tmp_path / "speed.png")
    assert list(tmp_path.iterdir()) == []


def test_bench_draws_what_it_prints(golden, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.svg"
    args = ["bench", str(golden("ds32-q8_0")[0]), "-t", "1", "-p", "8", "-n", "2", "-d", "0,70", "-r", "1", "--plot", str(path)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and "tg2 @ d70" in result.stdout and str(path) in result.stderr and str(path) not in result.stdout
    assert path.read_bytes().startswith(b"<?xml")


def test_a_file_that_vanishes_meanwhile_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(PydsaError, match="the picture cannot be written"):
        plot.save_plot(ROWS, str(tmp_path / "gone" / "speed.png"))
