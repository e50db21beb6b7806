"""tools/simulate_stages.py: the formula where nothing is left to chance, and the tables it prints."""
import copy
import json

import numpy as np
import pytest
from click.testing import CliRunner
from stage_processes import OPTIONS, Launcher

import pydsa
from pydsa import DEMO
from pydsa.bench import Bench, format_rows
from pydsa.stages.division import parse
from pydsa.stages.forecast import Groups, Link, Wire, chunks, depth_of, prompt_seconds
from pydsa.stages.pipeline import Pipeline
from tools.simulate_stages import Simulation, compared, generate, main, read_prompt, speed, step_seconds


class Fixed:
    """Times of stages that are given."""

    def __init__(self, seconds):
        self._seconds = seconds

    def generation(self, n_past, n_streams=1):
        return [s * (1 + 0.3 * (n_streams - 1)) for s in self._seconds]

    def prompt(self, n_tokens, n_past):
        return [s * n_tokens * (1 + n_past / 4096) / 50 for s in self._seconds]


@pytest.mark.parametrize("seed", range(8))
def test_without_chance_it_is_the_formula(seed):
    """Two ways to the same figures: events, one by one, and a few lines of arithmetic."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9)) if seed else 64
    link, wire = Link(10 ** rng.uniform(7, 10), 10 ** rng.uniform(-5, -2)), Wire(int(rng.integers(100, 30000)))
    times, n_streams = Fixed(10 ** rng.uniform(-3, -1.5, n)), int(rng.integers(2, 4 * n))
    row = compared(times, 8191, link, wire, n_streams, int(rng.integers(1, 6000)), 100, {})
    assert abs(row["one: off"]) < 1e-9 and abs(row["many: off"]) < 1e-6 and abs(row["prompt: off"]) < 1e-9
    assert row["busiest stage"] <= 1 + 1e-9 and row["95% within, ms"] == pytest.approx(row["a token of many, ms"], rel=0.5)


def test_worked_example():
    """Two stages of 1 s and 3 s, half a second of latency."""
    link, wire, seconds = Link(1e30, 0.5), Wire(8), [1.0, 3.0]
    one = generate(Simulation(2, link), wire, seconds, Groups(1, 1, 1), 3)
    assert one.tolist() == [[5.5, 10.5, 15.5]]      # 0.5 for the ids, then 1 + 0.5 + 3 + 0.5
    times = generate(Simulation(2, link), wire, seconds, Groups.of(2, 2), 3)
    assert times.tolist() == [[5.5, 11.5, 17.5], [8.5, 14.5, 20.5]]      # the second stage never rests
    assert generate(Simulation(2, link), wire, seconds, Groups(1, 1, 1), 2, 4).tolist() == [[6, 12]]       # by way of the driver
    assert speed(times) == pytest.approx(1 / 3)
    assert Groups.of(5, 2) == (5, 3, 2) and Groups.of(2, 4) == (2, 1, 2) and Groups.of(9, 4) == (9, 3, 3)
    steps = chunks(1024)
    assert read_prompt(Simulation(2, link), wire, lambda n, n_past: seconds, steps, depth_of(2)) == 9
    assert prompt_seconds(lambda n, n_past: seconds, link, wire, steps, depth_of(2)) == 9


def test_chance_costs_time():
    args = Fixed([0.01] * 4), 100, Link(1e9, 1e-4), Wire(28672), 5, 4096, 300
    sure, late, uneven = (compared(*args, chance) for chance in ({}, {"jitter": 5e-3}, {"spread": 0.5}))
    assert late["one, t/s"] == pytest.approx(1 / (4 * 0.01 + 4 * (1e-4 + 5e-3)), rel=0.05)
    for row in (late, uneven):
        assert row["many, t/s"] < 0.95 * sure["many, t/s"] and row["95% within, ms"] > 1.1 * row["a token of many, ms"]
    assert compared(*args, {"spread": 0.5}) == uneven       # the same seed


def run(*args):
    result = CliRunner().invoke(main, [str(DEMO), "--tokens", "40", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_tables():
    lines = run("--nodes", "2,4,64", "--jitter", "10", "--spread", "0.1").splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["stages", "-" * 8, "2", "4"]     # the model has four layers
    rows = json.loads(run("--stages", "0-2,3", "--streams", "9", "-o", "json"))
    assert rows[0]["under way"] == 2 and abs(rows[0]["many: off"]) < 1e-6
    assert "--nodes is 5,64, expected numbers from 1 to 4" in CliRunner().invoke(main, [str(DEMO), "--nodes", "5,64"]).output
    assert "--stages is auto, expected ranges" in CliRunner().invoke(main, [str(DEMO), "--stages", "auto"]).output


def bench_row(**changes):
    return {"n_prompt": 0, "n_gen": 16, "n_depth": 0, "n_ubatch": 512, "avg_ts": 100.0, "stages": None} | changes


def against(tmp_path, *files, rest=("--link", "5GB/s", "--latency", "50")):
    """The rows of --measured for lists of rows, a file for each.

    Files are in turns of JSON and of JSON lines.
    """
    args = []
    for i, rows in enumerate(files):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(rows) if i % 2 == 0 else "".join(json.dumps(row) + "\n" for row in rows))
        args += ["--measured", str(path)]
    return json.loads(run(*args, *rest, "-o", "json"))


def test_bench_beside_a_prediction(tmp_path):
    """Of one process 10 ms a token: in two stages the ways are added."""
    one = [bench_row(), bench_row(n_prompt=2048, n_gen=0, avg_ts=1000.0)]
    staged = [bench_row(stages="0-1,2-3", avg_ts=90.0), bench_row(n_prompt=2048, n_gen=0, stages="0-1,2-3", avg_ts=1500.0),
              bench_row(n_gen=8, stages="0-1,2-3")]
    token, prompt = against(tmp_path, one, staged)
    assert (token["test"], prompt["test"], token["layers"], token["streams"]) == ("tg16", "pp2048", "0-1,2-3", 1)
    assert token["predicted, t/s"] == pytest.approx(1 / (0.01 + 4 * 50e-6), rel=1e-3) and token["measured of one"] == 0.9
    assert token["measured: off"] == pytest.approx(90 / token["predicted, t/s"] - 1)
    # Of four layers the last one writes only keys: two of three against one, in four chunks at most 4 / 3 of one.
    assert 1200 < prompt["predicted, t/s"] < 1340 and prompt["measured of one"] == 1.5


def test_stage_speed_beside_a_prediction(tmp_path):
    """Four conversations over two stages are two steps of two.

    Their time lies between those of one conversation and of four in one process.
    """
    row = {"threads": 1, "ratio": 1.0}
    rows = [row | {"stages": n, "test": test, "t/s": rate} for n, test, rate in (
        (1, "tg64, 1 stream", 100.0), (1, "tg64, 4 streams", 200.0), (2, "tg64, 1 stream", 95.0), (2, "tg64, 4 streams", 250.0),
        (1, "pp4096", 500.0), (2, "pp4096", 800.0))]
    one, four, prompt = against(tmp_path, rows)
    assert step_seconds({1: 100.0, 4: 200.0}, 2) == pytest.approx(0.01 + 0.01 / 3) and step_seconds({1: 100.0}, 3) == 0.03
    assert (four["streams"], four["measured of one"]) == (4, 1.25)
    slowest = 2 / four["predicted, t/s"] / step_seconds({1: 100.0, 4: 200.0}, 2)
    assert 0.5 < slowest < 0.65 and one["predicted, t/s"] < 100 and 650 < prompt["predicted, t/s"] < 710
    beside, = against(tmp_path, rows[1:2] + rows[3:4] + rows[:1], rest=("--link", "5GB/s", "--beside", "10000"))
    assert 2 / beside["predicted, t/s"] == pytest.approx(2 / four["predicted, t/s"] + 0.01, rel=1e-2)
    shared, = against(tmp_path, rows[1:2] + rows[3:4] + rows[:1], rest=("--link", "5GB/s", "--memory", "0.1"))
    assert shared["predicted, t/s"] < four["predicted, t/s"] / 1.5        # both stages wait for the memory


def test_nodes_like_the_measured_machine(tmp_path):
    two, four = against(tmp_path, [bench_row()], rest=("--nodes", "2,4,8", "--latency", "1000", "--link", "1GB/s"))
    assert [len(row["layers"].split(",")) for row in (two, four)] == [2, 4] and "measured, t/s" not in two
    assert two["predicted, t/s"] == pytest.approx(1 / 0.014, rel=0.01) and four["of one process"] == pytest.approx(0.01 / 0.016, rel=0.01)


def test_rows_that_bench_writes(small_model, tmp_path):
    """Of a model in one process, and in stages.

    The memory of these has no limits to show: it may be elsewhere.
    """
    path, tests = small_model(n_layer=3), Bench([16], [4], [8], 1)
    whole, launcher = pydsa.load(path, **OPTIONS), Launcher(path, [(0, 1), (1, 3)])
    pipeline, staged = Pipeline(launcher, launcher.setup), copy.copy(whole)
    try:
        staged.runner, staged.stages = pipeline, parse("0,1-2")
        rows = [*tests.run(whole), *tests.run(staged)]
    finally:
        pipeline.close()
    assert [row["stages"] for row in rows] == [None, None, "0,1-2", "0,1-2"] and rows[3]["limit_ts"] is None
    table = format_rows(rows[2:], "md").splitlines()
    assert "stages" in table[0] and table[3].split("|")[5].strip() == "0,1-2" and "stages" not in format_rows(rows[:2], "md")
    (tmp_path / "rows.json").write_text(format_rows(rows, "json"))
    found = json.loads(CliRunner().invoke(main, [str(path), "-c", "64", "--measured", str(tmp_path / "rows.json"), "-o", "json"]).output)
    assert [(row["test"], row["measured, t/s"]) for row in found] == [("pp16 @ d8", rows[2]["avg_ts"]), ("tg4 @ d8", rows[3]["avg_ts"])]


@pytest.mark.parametrize("rows, error", [
    ([1], "has no rows of"), ([{"stages": 1, "test": "x", "t/s": 1.0}], "has no rows of"),
    ([{"stages": "x", "avg_ts": 1}], "has no rows of"), ([bench_row(stages="auto")], "has no rows of"),
    ([bench_row(n_gen=8), bench_row(stages="0-3")], "--measured has no test in stages"), ([], "--measured has no test in stages")])
def test_measurements_that_are_none(tmp_path, rows, error):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert error in CliRunner().invoke(main, [str(DEMO), "--measured", str(path)]).output
