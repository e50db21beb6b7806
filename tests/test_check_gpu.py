"""tools/check_gpu.py: how stages end, and what a run leaves behind.

Every command of its stages exists.
"""
import importlib
import sys

import pytest
from click.testing import CliRunner

from pydsa.cli import main as pydsa_cli
from tools import check_gpu, check_placement
from tools.check_gpu import STAGES, Stage, main, run_stage

SAY, FAIL, SLEEP = ((sys.executable, "-c", code) for code in ("print('{out}')", "raise SystemExit(3)", "import time; time.sleep(60)"))


@pytest.mark.parametrize("command, optional, ended", [
    (SAY, False, "passed"), (FAIL, False, "failed with exit code 3"), (SLEEP, False, "stopped after 1 s"),
    (("no-such-program",), False, "failed: no-such-program is not there"),
    (("no-such-program",), True, "left out: no-such-program is not there")])
def test_how_a_stage_ends(tmp_path, command, optional, ended):
    assert run_stage(Stage("one", command, 1, optional), tmp_path, 1 if command is SLEEP else 50) == ended
    assert (tmp_path / "one.log").read_text().strip() == (str(tmp_path) if command is SAY else "")


def test_a_run_leaves_a_report(tmp_path, monkeypatch):
    """Stages run in order, each within its share of the time.

    Those for which no time is left are left out.
    """
    stages = ("first", SAY), ("second", FAIL), ("long", SLEEP), ("late", SAY)
    monkeypatch.setattr(check_gpu, "STAGES", [Stage(name, command, 1) for name, command in stages])
    done = CliRunner().invoke(main, [str(tmp_path / "out"), "--minutes", "0.06"])
    assert done.exit_code == 1 and done.output.splitlines()[:2] == ["first: passed", "second: failed with exit code 3"]
    rows = [line.split("|")[1:4] for line in (tmp_path / "out" / "report.md").read_text().splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["first", "second", "long", "late"]
    assert rows[2][2].startswith(" stopped after") and rows[3][2] == " left out: no time was left "


def test_stages_ask_for_what_there_is():
    """`pydsa` and the tools know every option of the stages.

    They show their help for --help, which they would refuse beside an unknown option.
    """
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    for stage in STAGES:
        if "pydsa" in stage.command:
            args = stage.command[stage.command.index("pydsa") + 1:]
            ended = [CliRunner().invoke(pydsa_cli, [*args, *more, "--help"]).exit_code for more in ([], ["--no-such-option"])]
            assert ended == [0, 2] and "--device" in args
        elif path := next((part for part in stage.command if part.startswith("tools/")), None):
            args = stage.command[stage.command.index(path) + 1:]
            command = importlib.import_module(path.removesuffix(".py").replace("/", ".")).main
            ended = [CliRunner().invoke(command, [*args, *more, "--help"]).exit_code for more in ([], ["--no-such-option"])]
            assert ended == [0, 2]


def test_placements_are_compared_and_timed(small_model, tmp_path, monkeypatch):
    """A model that is there is taken; other logits than alone are an error."""
    args = [str(small_model()), "--device", "reference", "-p", "4", "-n", "1", "-r", "1"]
    done = CliRunner().invoke(check_placement.main, args)
    assert done.exit_code == 0 and done.output.count("tg1: no limit is known") == 2, done.output
    assert "--cpu-moe on reference+cpu: logits within" in done.output and "--n-cpu-moe 2 on reference+cpu" in done.output
    monkeypatch.setattr(check_placement, "NMSE", -1)
    monkeypatch.setattr(check_placement, "placements", lambda model: {"--cpu-moe": dict(cpu_moe=True), "again": dict(cpu_moe=True)})
    done = CliRunner().invoke(check_placement.main, args)
    assert done.exit_code == 1 and done.output.count("| pp4 ") == 1 and done.output.endswith("more than -1e+00: --cpu-moe, again\n")
    made = []
    monkeypatch.setattr(check_placement, "make_model", lambda path, spec: made.append((path, spec)))
    check_placement.made(tmp_path / "none.gguf", "v3.2-layers")
    check_placement.made(small_model(), "v3.2-layers")
    assert [(path, spec.type, spec.n_embd) for path, spec in made] == [(tmp_path / "none.gguf", "Q4_K_M", 7168)]
    rows = [{"n_prompt": p, "n_gen": 4 - p, "n_depth": 0, "share_of_limit": share} for p, share in ((4, 0.7), (0, 0.8))]
    assert list(check_placement.goals(rows)) == ["pp4: 0.70 of the limit, at least 0.7", "tg4: 0.80 of the limit, below 0.85"]


def test_speed_by_threads_is_measured_on_models_that_were_made():
    """Their files come from an earlier stage, and each leaves its own JSON."""
    made, left = set(), set()
    for stage in STAGES:
        if "tools/make_model.py" in stage.command:
            made.add(stage.command[-1])
        elif "tools/thread_speed.py" in stage.command:
            assert stage.command[stage.command.index("tools/thread_speed.py") + 1] in made
            left.add(stage.command[stage.command.index("--json") + 1])
    assert left == {"{out}/threads-0.5b.json", "{out}/threads-v3.2.json"}
