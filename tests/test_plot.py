"""bench --plot: what is drawn are the numbers of the rows, and what could not be written is refused before anything is timed."""
import sys

import pytest
from click.testing import CliRunner

import pydsa
from pydsa.cli import main
from pydsa.plot import check_target, figure

ROW = {"model_arch": "deepseek32", "model_type": "Q4_K", "model_n_params": 5e8, "n_threads": 2, "type_k": "f16"}


def rows():
    for attention, slow in (("sparse", 1), ("dense", 3)):
        for depth in (4096, 0):
            for n_prompt, n_gen in ((512, 0), (0, 32)):
                speed = (n_prompt + 10 * n_gen) / (1 + depth / 4096) / slow
                yield ROW | {"attention": attention, "n_depth": depth, "n_prompt": n_prompt, "n_gen": n_gen, "avg_ts": speed,
                             "limit_ts": 2 * speed if n_gen else None}


def test_lines_hold_the_rows():
    pytest.importorskip("matplotlib")
    prompt, generation = figure(list(rows())).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in prompt.lines}
    assert drawn == {"sparse, pp512": ([0, 4096], [512, 256]), "dense, pp512": ([0, 4096], [512 / 3, 256 / 3])}
    drawn = {line.get_label(): list(line.get_ydata()) for line in generation.lines}
    assert drawn == {"sparse, tg32": [320, 160], "sparse: the bandwidth's limit": [640, 320],
                     "dense, tg32": [320 / 3, 160 / 3], "dense: the bandwidth's limit": [640 / 3, 320 / 3]}
    assert prompt.get_ylim()[0] == 0 and len(figure([row for row in rows() if row["n_gen"]]).axes) == 1


def test_a_picture_is_written(small_model, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "speed.svg"
    done = CliRunner().invoke(main, ["bench", str(small_model()), "-p", "8", "-n", "2", "-d", "0,40", "-r", "1", "-t", "1",
                                     "--attention", "sparse,masked", "--plot", str(target)])
    assert done.exit_code == 0, done.output
    assert target.read_text().count("<svg") == 1


@pytest.mark.parametrize("name, message", [("speed.gif", "must end in .png, .svg"), ("no/such/folder/speed.png", "cannot be written")])
def test_refused(tmp_path, name, message):
    with pytest.raises(pydsa.PydsaError, match=message):
        check_target(tmp_path / name)
    done = CliRunner().invoke(main, ["bench", "there is no such model", "--plot", str(tmp_path / name)])
    assert done.exit_code == 2 and "no such model" not in done.output


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(pydsa.PydsaError, match="pip install"):
        check_target(tmp_path / "speed.png")
