"""tools/simulate_stages.py: the formula where nothing is left to chance, and the tables it prints."""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from pydsa import DEMO
from pydsa.stages.forecast import Link, Wire, chunks, depth_of, prompt_seconds
from tools.simulate_stages import Groups, Simulation, compared, generate_one, main, read_prompt, speed


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
    assert generate_one(Simulation(2, link), wire, seconds, 3).tolist() == [[4.5, 9.5, 14.5]]      # 1 + 0.5 + 3, then 0.5 back
    times = Groups(3, 2).simulated(Simulation(2, link), wire, seconds, 3)
    assert times[:, 0].tolist() == [5.5, 8.5, 11.5] and np.diff(times).tolist() == [[9, 9]] * 3      # the second stage never rests
    assert speed(times) == pytest.approx(1 / 3)
    steps = chunks(1024)
    assert read_prompt(Simulation(2, link), wire, lambda n, n_past: seconds, steps, depth_of(2)) == 8.5
    assert prompt_seconds(lambda n, n_past: seconds, link, wire, steps, depth_of(2)) == 8.5


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
    assert rows[0]["under way"] == 3 and abs(rows[0]["many: off"]) < 1e-6
    assert "--stages is auto, expected ranges" in CliRunner().invoke(main, [str(DEMO), "--stages", "auto"]).output


def bench_row(**changes):
    return {"n_prompt": 0, "n_gen": 16, "n_depth": 0, "n_ubatch": 512, "avg_ts": 100.0} | changes


def test_measurements(tmp_path):
    """Of one process 10 ms a token: in two stages the ways are added, and three conversations fill them."""
    one = [bench_row(), bench_row(n_prompt=2048, n_gen=0, avg_ts=1000.0)]
    staged = [bench_row(stages="0-1,2-3", avg_ts=90.0), bench_row(stages=2, n_streams=3, avg_ts=150.0),
              bench_row(n_prompt=2048, n_gen=0, stages="0-1,2-3", avg_ts=1500.0), bench_row(n_gen=8, stages=2)]
    paths = [tmp_path / name for name in ("one.json", "two.jsonl")]
    paths[0].write_text(json.dumps(one))
    paths[1].write_text("".join(json.dumps(row) + "\n" for row in staged))
    args = [arg for path in paths for arg in ("--measured", str(path))] + ["--link", "5GB/s", "--latency", "50", "-o", "json"]
    single, many, prompt = json.loads(run(*args))
    assert (single["test"], many["test"], prompt["test"]) == ("tg16", "tg16", "pp2048") and many["streams"] == 3
    assert single["simulated, t/s"] == pytest.approx(1 / (0.01 + 2 * 50e-6), rel=1e-3)
    assert single["measured: off"] == pytest.approx(90 / single["simulated, t/s"] - 1)
    assert 150 < many["simulated, t/s"] < 200 and many["formula, t/s"] == pytest.approx(many["simulated, t/s"])
    assert 1000 < prompt["simulated, t/s"] < 2000 * 4 / 5 + 1 and prompt["of one"] == 1.5
    paths[1].write_text("[1]")
    for given, error in ((args, "has no rows of"), (args[:2], "--measured has no test that ran both")):
        assert error in CliRunner().invoke(main, [str(DEMO), *given]).output
