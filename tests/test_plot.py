"""The plot of a bench: its lines and bars, and what is refused beforehand.

They show the numbers of the rows. What cannot be drawn is refused before anything is timed.
"""
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pydsa import PydsaError

from pydsa.cli import op_plot, plot

from pydsa.bench import Bench, about
from pydsa.cli import main
from pydsa.executor import costs
from pydsa.executor.graph import Graph

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


def op_rows(attention, n_prompt, n_gen, n_depth, **ops):
    """Rows of Bench.ops of one step. ops: name=(microseconds, share of the ceiling)."""
    step = sum(us for us, _ in ops.values())
    return [{"attention": attention, "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth, "op": op, "us": us, "share": us / step,
             "share_of_ceiling": ceiling} for op, (us, ceiling) in ops.items()]


OPS = (op_rows("sparse", 512, 0, 0, linear=(600, 0.5), sparse_attention=(300, 0.2), add=(90, 1.2), scale=(10, 0.9))
       + op_rows("sparse", 0, 32, 0, linear=(1500, 0.8), sparse_attention=(470, 0.4), add=(30, 0.1))
       + op_rows("masked", 512, 0, 0, linear=(600, 0.5), masked_attention=(400, 0.3)))


def drawn(axes):
    """The lines of a panel as [(x, y, dashed)]."""
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle() == "--") for line in axes.lines]


def test_lines_hold_the_numbers_of_the_rows():
    pytest.importorskip("matplotlib")
    prompt, generation = plot.draw(ROWS[0], ROWS).axes
    depths = [0, 4096]
    assert drawn(prompt) == [(depths, [1339, 591], False), (depths, [1300, 400], False)]
    assert drawn(generation) == [(depths, [190, 108], False), (depths, [317, 259], True),
                                 (depths, [180, 60], False), (depths, [317, 200], True)]
    colours = [line.get_color() for line in generation.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [text.get_text() for text in prompt.get_legend().get_texts()] == ["sparse", "masked"]
    assert [text.get_text() for text in generation.get_legend().get_texts()][2:] == ["limit of the memory's bandwidth"]
    [alone] = plot.draw(ROWS[0], [row("auto", 0, 8, 0, 5.0, 9.0)]).axes
    assert [line.get_marker() for line in generation.lines[1::2]] == ["None", "None"] and alone.lines[1].get_marker() == "_"
    for axes in (prompt, generation):
        assert axes.get_ylim()[0] == 0 and "tokens" in axes.get_xlabel() and "tokens per second" in axes.get_ylabel()


def test_the_title_names_model_and_threads():
    pytest.importorskip("matplotlib")
    text = plot.draw(ROWS[0], ROWS).get_suptitle()
    assert text == "a $model$: deepseek32 Q4_K, 500.00 M parameters\n2 threads, f16 latents, i8 index keys, top_k 64"
    assert "1 thread," in plot.title(ROWS[0] | {"n_threads": 1, "n_threads_batch": 1})
    assert "\n1 thread (2 for prompts)," in plot.title(ROWS[0] | {"n_threads": 1})
    reference = {"n_threads": None, "n_threads_batch": None, "backend": "reference", "top_k": None}
    assert plot.title(ROWS[0] | reference).endswith("\nreference, f16 latents")


def test_panels_and_lines_are_those_of_the_tests():
    pytest.importorskip("matplotlib")
    [only] = plot.draw(ROWS[0], [r for r in ROWS if r["n_gen"]]).axes
    assert only.get_title() == "generation of 32 tokens"
    [lengths] = plot.draw(ROWS[0], [row("auto", 8, 0, 0, 5.0), row("auto", 16, 0, 0, 6.0)]).axes
    assert [line.get_label() for line in lengths.lines] == ["auto, 8 tokens", "auto, 16 tokens"]
    [reference] = plot.draw(ROWS[0], [row("auto", 0, 8, 0, 5.0)]).axes       # the reference has no known limit
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
    plot.save_plot(str(path), ROWS[0], ROWS)
    assert path.read_bytes().startswith(start)
    plot.check_plot(str(path))      # an existing file stays until it is replaced
    assert path.read_bytes().startswith(start)


def test_drawing_leaves_others_alone(tmp_path):
    pytest.importorskip("matplotlib")
    program = ("import sys; from tests.test_plot import OPS, ROWS, plot; plot.save_plot(sys.argv[1], ROWS[0], ROWS, OPS); "
               "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "speed.png")], check=True, cwd=ROOT)


def refused(*args):
    """The error of bench, which must not begin to load a model."""
    result = CliRunner().invoke(main, ["bench", "no-such.gguf", *map(str, args)])
    assert result.exit_code == 2 and result.stdout == "" and "loading" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("name", ["speed.gif", "speed", "png"])
def test_unknown_endings_are_refused(tmp_path, name):
    assert "must end in .png, .svg, .pdf" in refused("--plot", name)


def test_places_without_room_for_a_file_are_refused(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    assert "No such file or directory" in refused("--plot", tmp_path / "missing" / "speed.png")
    assert "Is a directory" in refused("--plot", tmp_path / "folder.png")
    with pytest.raises(PydsaError, match="cannot be written"):
        plot.check_plot("a\0b.png")


def bars(axes):
    """The bars of a panel: {op: [(bottom, height)]}, in percent, for each step."""
    return {bar.get_label(): [(round(float(part.get_y()), 6), round(float(part.get_height()), 6)) for part in bar]
            for bar in axes.containers}


def cells(axes):
    """The table of a panel: {op: texts of the steps}."""
    names, n = [label.get_text() for label in axes.get_yticklabels()], len(axes.get_xticks())
    texts = [text.get_text() for text in axes.texts]
    return {name: texts[i * n:i * n + n] for i, name in enumerate(names)}


def labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_bars_and_tables_hold_the_numbers_of_the_ops():
    pytest.importorskip("matplotlib")
    prompt, generation, prompt_table, table = plot.draw(ROWS[0], [], OPS).axes
    assert bars(prompt) == {"linear": [(0, 60), (0, 60)], "sparse_attention": [(60, 30), (60, 0)], "masked_attention":
                            [(90, 0), (60, 40)], "add": [(90, 9), (100, 0)], "other": [(99, 1), (100, 0)]}
    assert bars(generation)["sparse_attention"] == [(75, 23.5)]
    assert [text.get_text() for text in prompt.texts] == ["1 ms", "1 ms"] and generation.texts[0].get_text() == "2 ms"
    assert cells(prompt_table) == {"the step": ["48%", "42%"], "linear": ["50%", "50%"], "sparse_attention": ["20%", ""],
                                   "masked_attention": ["", "30%"], "add": ["120%", ""], "other": ["90%", ""]}
    assert cells(table)["the step"] == ["70%"] and cells(table)["other"] == [""]
    assert labels(prompt) == labels(prompt_table) == ["sparse\nd0", "masked\nd0"] and labels(table) == ["d0"]
    assert prompt.get_xlim() == prompt_table.get_xlim()         # a step's cells are under its bar
    assert [text.get_text() for text in generation.get_legend().get_texts()] == list(reversed(bars(prompt)))


def test_ops_are_below_the_speeds():
    pytest.importorskip("matplotlib")
    titles = [axes.get_title() or axes.get_title("left") for axes in plot.draw(ROWS[0], ROWS, OPS).axes]
    assert titles == ["prompt of 512 tokens", "generation of 32 tokens", "prompt: where a step's time goes",
                      "generation: where a step's time goes", "prompt: share of the ceiling", "generation: share of the ceiling"]
    unknown = [row | {"share_of_ceiling": None} for row in OPS]         # on the reference
    assert len(plot.draw(ROWS[0], ROWS, unknown).axes) == 4


def test_small_ops_are_one_and_colours_stay():
    pytest.importorskip("matplotlib")
    names = [name for name in op_plot.COLOURS if name != "other"]
    many = op_rows("auto", 0, 1, 0, **{name: (100 - i, 0.5) for i, name in enumerate(names)})
    panels = op_plot.OpPanels(many)
    assert panels.names == [*names[:op_plot.MOST], "other"]
    assert panels.share(panels.steps("n_gen")[0][1], "other") == pytest.approx(sum(row["share"] for row in many[op_plot.MOST:]))
    assert len(set(op_plot.COLOURS.values())) == len(op_plot.COLOURS)
    ops = {name for name in vars(Graph) if not name.startswith("_") and hasattr(costs, name)}
    assert ops == set(names), "a new op needs a colour"


def test_durations_are_readable():
    assert [op_plot.duration(us) for us in (0.4, 812.3, 3412, 1.234e6)] == ["0 µs", "812 µs", "3.41 ms", "1.23 s"]


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


def test_bench_times_ops_where_it_was(golden, load):
    """The steps of the picture are those of the table, in the same session."""
    model, ops = load(golden("ds32-q8_0")[0], kv_type="i16"), []
    rows = list(Bench([8], [2], [0, 70], 1).run(model, ops=ops))
    assert len(rows) == 4 and rows[0].keys() == {*about(model), *rows[0]}
    steps = {(row["n_prompt"], row["n_gen"], row["n_depth"], row["n_tokens"]) for row in ops}
    assert steps == {(8, 0, 0, 8), (0, 2, 0, 1), (8, 0, 70, 8), (0, 2, 70, 1)}
    deep = {row["op"] for row in ops if row["n_depth"] == 70}
    assert "sparse_attention" in deep and "sparse_attention" not in {row["op"] for row in ops if row["n_depth"] == 0}
    assert sum(row["share"] for row in ops) == pytest.approx(4)


def test_ops_alone_can_be_drawn(golden, tmp_path):
    pytest.importorskip("matplotlib")
    args = ["bench", str(golden("ds32-q8_0")[0]), "-t", "1", "-p", "8", "-n", "1", "-r", "1", "--ops", "--plot", str(tmp_path / "ops.svg")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and "of ceiling" in result.stdout
    assert "where a step" in (tmp_path / "ops.svg").read_text() and "tokens per second" not in (tmp_path / "ops.svg").read_text()


def test_a_file_that_vanishes_meanwhile_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(PydsaError, match="the picture cannot be written"):
        plot.save_plot(str(tmp_path / "gone" / "speed.png"), ROWS[0], ROWS)
