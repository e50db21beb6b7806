"""tools/scaling.py: the model of a team on tasks whose answer is known, and a tiny model measured."""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tools import team_model
from tools.make_model import ModelSpec, make_model
from tools.scaling import Bandwidths, Measured, kind_of, main
from tools.team_model import LOSSES, Stage, by_stage, serial_seconds, shares_lost, shortest, simulate, total

ENDLESS = float("inf")


def stage(*tasks, begin=0.0, light=False, n_bytes=0, op="linear", name="q-0.1"):
    return Stage(op, name, light, begin, np.array(tasks, np.float64), n_bytes)


@pytest.fixture
def free(monkeypatch):
    """Threads that meet without any cost, and never sleep."""
    for name in ("DRAW", "DRAW_ALONE", "HAND_OUT", "SEEN", "READ"):
        monkeypatch.setattr(team_model, name, 0.0)
    monkeypatch.setattr(team_model, "SPIN", ENDLESS)


@pytest.mark.parametrize("tasks, n_threads, seconds", [
    ([1] * 8, 1, 8), ([1] * 8, 4, 2), ([1] * 9, 4, 3), ([1] * 3, 4, 1), ([5, 1, 1, 1], 2, 5), ([1, 1, 1, 5], 2, 6), ([2, 1, 1, 2], 2, 4)])
def test_tasks_in_order(free, tasks, n_threads, seconds):
    """Who is free first takes the next task; costs would only be added."""
    assert shortest(tasks, n_threads) == seconds
    [times] = simulate([[stage(*tasks)]], n_threads, ENDLESS)
    assert times.seconds == seconds and times.work == sum(tasks) / n_threads
    assert times.imbalance == seconds - times.work and times.hand_outs == 0


def test_begins_are_serial(free):
    """Of stages that share an interval too, whatever the number of threads."""
    intervals = [[stage(4, 4, begin=3), stage(4, 4, begin=2)], [stage(8, 8, begin=1)]]
    assert [times.seconds for times in simulate(intervals, 4, ENDLESS)] == [5 + 4, 1 + 8]
    assert simulate(intervals, 4, ENDLESS)[0]._replace(work=0) == (5, 0, 0, 0, 0, 0)
    assert serial_seconds(intervals) == 38 == total(simulate(intervals, 1, ENDLESS)).seconds


@pytest.mark.parametrize("interval, seconds, at_once", [
    ([stage(2)], 2, 2), ([stage(2, light=True), stage(3, light=True)], 5, 5), ([stage(2, 2, light=True)], 2, 0),
    ([stage(3), stage(2, light=True)], 3, 0), ([stage(), stage(2, light=True)], 2, 2), ([stage()], 0, 0)])
def test_what_is_done_at_once(free, interval, seconds, at_once):
    """A single task, and light stages of one task each: no other thread gets any."""
    [times] = simulate([interval], 2, ENDLESS)
    assert (times.seconds, times.at_once) == (seconds, at_once)


def test_the_memory_is_a_limit(free):
    """An interval takes as long as its bytes."""
    [times] = simulate([[stage(1, 1, 1, 1, n_bytes=12, begin=1), stage(n_bytes=4)]], 4, 2.0)
    assert times.seconds == 1 + 8 and times.bandwidth == 7
    assert simulate([[stage(1, 1, 1, 1, n_bytes=2)]], 4, 2.0)[0].bandwidth == 0


def test_costs_of_a_meeting():
    """Two empty tasks on two threads take what was measured.

    With more threads the draws come one after the other.
    """
    [two] = simulate([[stage(0, 0)]], 2, ENDLESS)
    assert two.seconds == pytest.approx(0.3e-6, rel=0.15) and two.hand_outs == two.seconds
    [many] = simulate([[stage(*[1e-6] * 64)]], 64, ENDLESS)
    assert many.seconds > 64 * team_model.DRAW + 1e-6
    assert simulate([[stage(*[1e-6] * 64)]], 1, ENDLESS)[0].hand_outs == pytest.approx(64 * 2 * team_model.DRAW_ALONE)


def test_threads_that_sleep_are_woken():
    """After a serial stretch that is longer than they look for work.

    Only as many as there are tasks for.
    """
    alone, apart = [stage(2 * team_model.SPIN)], [stage(*[200e-6] * 3)]
    seconds = [simulate(list(intervals), 8, ENDLESS)[-1].hand_outs for intervals in ([apart], [alone, apart])]
    assert seconds[0] < 1e-6 and seconds[1] == pytest.approx(team_model.WAKE_CALL + team_model.WAKE + team_model.WAKE_EACH, rel=0.05)
    _, idle = team_model.hand_out([200e-6] * 3, 2 * team_model.SPIN, [0.0] * 7)
    assert idle.count(0.0) == 5 and len(idle) == 7


def test_shares_add_up():
    """With the efficiency they make 1.

    Also where parts for many threads take longer.
    """
    one = serial_seconds([[stage(*[1e-4] * 20, begin=1e-5)], [stage(3e-5)]])
    intervals = [[stage(*[6e-5] * 40, begin=1e-5)], [stage(3e-5)]]
    for n in (2, 7, 64):
        times = total(simulate(intervals, n, 1e9))
        lost = shares_lost(times, one, n)
        assert list(lost) == [*LOSSES, "more work"] and sum(lost.values()) == pytest.approx(1 - one / n / times.seconds)
        assert lost["more work"] == pytest.approx(4e-4 / n / times.seconds)


def test_an_interval_by_stage(free):
    interval = [stage(1, 1, begin=1), stage(3, 3, begin=2), stage(begin=1)]
    [times] = simulate(interval and [interval], 2, ENDLESS)
    assert by_stage(interval, times) == [1 + 1, 2 + 3, 1] and sum(by_stage(interval, times)) == times.seconds


def test_rows_of_a_step(free):
    """Layers are one row; ops have their share and their efficiency."""
    intervals = [[stage(4, 4, name=f"q-{layer}.1", n_bytes=9), stage(2, begin=1, op="rope", name=f"k-{layer}.0", light=True)]
                 for layer in (0, 11)]
    measured = Measured("pp8", {1: intervals, 2: intervals}, {1: 23.0}, Bandwidths(ENDLESS, ENDLESS, 0.5), 0.0)
    one, two = measured.whole_rows()
    assert (one["ms"], one["here, ms"], one["clock, ms"], one["efficiency"]) == (22e3, 38e3, 23e3, 1)
    assert two["clock, ms"] is two["here, ms"] is None
    assert two["ms"] == 14e3 and two["speed-up"] == 22 / 14 and two["lost: imbalance"] == 2 / 14 and two["lost: begins"] == 1 / 14
    assert [(row["op"], row["ms"]) for row in measured.op_rows()] == [("linear", 16e3), ("rope", 6e3)]
    [row] = measured.loss_rows(2, 5)
    assert row["interval"] == "linear: q.1; rope: k.0" and row["number"] == 2 and row["us"] == 7e6 and row["most to"] == "imbalance"
    assert row["lost"] == pytest.approx(1 - two["efficiency"]) and (row["tasks"], row["longest, us"], row["of the step"]) == (3, 4e6, 1)
    assert kind_of([stage(name="ffn_norm-2.0"), stage(name="ffn_out-2.1")]) == "linear: ffn_norm.0, ffn_out.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("scaling") / "model.gguf", ModelSpec(n_layer=2, n_layer_dense=1))


def test_a_tiny_model(model):
    """Each step, op and interval is there, with numbers that can be."""
    done = CliRunner().invoke(main, [str(model), "-p", "40", "-n", "-d", "0,70", "--threads", "1,16", "-r", "2", "-b", "300", "-o", "json"])
    assert done.exit_code == 0, done.output
    steps = json.loads(done.output)
    assert [step["step"] for step in steps] == ["tg1", "pp40", "tg1 @ d70", "pp40 @ d70"]
    for step in steps:
        one, sixteen = step["whole"]
        assert one["ms"] > 0 and one["clock, ms"] > 0 and 0.9 < one["efficiency"] <= 1       # any of them may have been disturbed
        assert sixteen["clock, ms"] is None and 0 < sixteen["efficiency"] < 1
        ops = {row["op"] for row in step["ops"]}
        assert {"linear", "moe_gate_up", "moe_down", "rms_norm", "sparse_attention" if "d70" in step["step"] else "dense_attention"} <= ops
        assert sum(row["share"] for row in step["ops"]) == pytest.approx(1)
        assert max(row["tasks"] for row in step["lost"]["16"]) >= 16 and "64" not in step["lost"]


def test_tables_for_people(model):
    done = CliRunner().invoke(main, [str(model), "-p", "0", "-n", "--threads", "2", "--at", "2", "-r", "1", "--most", "3"])
    assert done.exit_code == 0 and done.output.startswith("## tg1\n")
    assert "What most time is lost to with 2 threads:" in done.output and "| linear " in done.output


@pytest.mark.parametrize("args, message", [(["-p", "0"], "no step to measure"), (["--threads", "0,2"], "expected numbers from 1 on"),
                                           (["-d", "x"], "expected integers")])
def test_options_that_make_no_sense(model, args, message):
    done = CliRunner().invoke(main, [str(model), *args])
    assert done.exit_code == 2 and message in done.output
