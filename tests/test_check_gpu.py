"""tools/check_gpu.py: how stages end, and what a run leaves behind.

Every command of its stages exists.
"""
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pydsa.cli import main as pydsa_cli
from tools import check_gpu, check_placement
from tools.check_gpu import STAGES, Stage, main, run_stage

ROOT = Path(__file__).parent.parent
has_numba_cuda = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
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
    lines = done.output.splitlines()
    assert done.exit_code == 1 and lines[0] == "expected: 4 s for 4 stages"
    assert lines[1].startswith("first: passed, ") and lines[2].startswith("second: failed with exit code 3, "), lines
    rows = [line.split("|")[1:5] for line in (tmp_path / "out" / "report.md").read_text().splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["first", "second", "long", "late"]
    assert rows[2][3].startswith(" stopped after") and rows[3][2:] == [" 1 ", " left out: no time was left "]


def test_wrong_variants_are_left_out_of_later_stages(tmp_path, monkeypatch):
    wrong, tell = ((sys.executable, "-c", code) for code in (
        "open(r'{out}/wrong-variants.txt', 'w').write('linear: f16'); raise SystemExit(1)",
        "import os; print(os.environ['PYDSA_CUDA_WITHOUT'])"))
    monkeypatch.setattr(check_gpu, "STAGES", [Stage("before", tell, 1), Stage("variants", wrong, 1), Stage("after", tell, 1),
                                              Stage("joins", tell, 1, without=check_gpu.JOINS)])
    monkeypatch.setenv("PYDSA_CUDA_WITHOUT", "int8x2")
    (tmp_path / "wrong-variants.txt").write_text("of an earlier run")
    assert CliRunner().invoke(main, [str(tmp_path), "--minutes", "1"]).exit_code == 1
    assert [(tmp_path / f"{name}.log").read_text().strip() for name in ("before", "after", "joins")] == [
        "int8x2", "int8x2, linear: f16", f"int8x2, linear: f16, {check_gpu.JOINS}"]
    assert (tmp_path / "report.md").read_text().endswith("without: int8x2, linear: f16\n")


def test_the_stages_fit_into_nine_minutes():
    assert sum(stage.seconds for stage in STAGES) <= 60 * check_gpu.MINUTES
    assert check_gpu.limit(STAGES[2], 9) == 2.5 * STAGES[2].seconds == check_gpu.limit(STAGES[2], 18) / 2
    names = [stage.name for stage in STAGES]
    assert names.index("variants") < names.index("ops-float16") < names.index("products") < names.index("models")


PRODUCTS = """
from tests.ptx.driver import install
install()
from click.testing import CliRunner
from pydsa.backends.cuda.variants import VARIANTS
from tools import check_variants
check_variants.SMALL = check_variants.SMALL._replace(kinds=("Q4_K",))
first = CliRunner().invoke(check_variants.main, ["--small", "--variant", "linear: f16"])
assert first.exit_code == 0 and first.output.endswith("4 cases, 0 wrong\\n"), first.output
kernels = VARIANTS["linear"]["f16"].kernels
VARIANTS["linear"]["f16"] = VARIANTS["linear"]["f16"]._replace(kernels=kernels._replace(matmul=lambda *args: None))
second = CliRunner().invoke(check_variants.main, ["--small", "--variant", "linear: f16"])
assert second.exit_code == 1 and "WRONG: linear, Q4_K x 1 tokens" in second.output and "4 cases, 4 wrong" in second.output, second.output
VARIANTS["linear"]["f16"] = VARIANTS["linear"]["f16"]._replace(takes=lambda w, single: False)
assert CliRunner().invoke(check_variants.main, ["--small", "--variant", "linear: f16"]).output == f"{check_variants.NOT_TAKEN}\\n"
"""


@has_numba_cuda
def test_variants_are_compared_with_those_that_they_replace():
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@has_numba_cuda
def test_each_variant_is_checked_apart(tmp_path, monkeypatch):
    """One that hangs or ends with an error is wrong.

    All others are still checked.
    """
    from tools import check_variants
    said = "import sys, time; name = sys.argv[2]; print('case 1'); 'f16' in name and time.sleep(60); sys.exit(name == 'indexer: int8x2')"
    monkeypatch.setattr(check_variants, "COMMAND", (sys.executable, "-u", "-c", said))
    monkeypatch.setattr(check_variants.cuda, "check_device", lambda: None)
    monkeypatch.setattr(check_variants, "named", lambda: ["linear: f16", "indexer: int8x2", "linear: f32"])
    done = CliRunner().invoke(check_variants.main, ["--small", "--seconds", "3", "--wrong", str(tmp_path / "wrong.txt")])
    assert done.output.splitlines() == ["linear: f16: hangs, or takes more than 3 s; the last case that ended: case 1",
                                        "indexer: int8x2: case 1", "linear: f32: case 1",
                                        'PYDSA_CUDA_WITHOUT="linear: f16, indexer: int8x2"']
    assert done.exit_code == 1 and (tmp_path / "wrong.txt").read_text() == "linear: f16, indexer: int8x2"


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
