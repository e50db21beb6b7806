"""Check a GPU in one run: ops, models, a sanitizer, speed.

    python tools/check_gpu.py results --minutes 9

Each stage writes results/STAGE.log as it goes, and results/report.md tells how all ended: a run that is cut off leaves what it found.
Stages come in the order of their importance: first every variant of the table of kernels, beside the one that it replaces. Those that are
wrong there are left out of all later stages (PYDSA_CUDA_WITHOUT), and nothing is timed before. A stage that takes much longer than expected
is stopped. The exit code is 1 if a stage failed. Speed is measured op by op and at several depths, and that of the CPU by threads.
"""
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).resolve().parents[1]
PYTHON, MODEL = (sys.executable, "-u"), "v3.2-layers-{}.gguf"
PYDSA = (*PYTHON, "-m", "pydsa")
WITHOUT, WRONG = "PYDSA_CUDA_WITHOUT", "wrong-variants.txt"
JOINS = "joined, normed, gated, by products, beside k_b"        # launches of one token that do what others would
MINUTES, LATE, LEAST = 9, 2.5, 15       # of all stages; a stage is stopped after LATE times its seconds, or LEAST seconds


class Stage(NamedTuple):
    """A command, and the seconds that it should take on an H200.

    They are estimates. optional: its program may be missing. without: variants that are left out, as PYDSA_CUDA_WITHOUT names them.
    """
    name: str
    command: tuple
    seconds: float
    optional: bool = False
    without: str = ""


def bench(name, kind, seconds, *options, without=""):
    return Stage(name, (*PYDSA, "bench", "{out}/" + MODEL.format(kind), "--device", "cuda", *options), seconds, without=without)


def make(kind, seconds):
    command = *PYTHON, "tools/make_model.py", "--preset", "v3.2-layers", "--type", kind, "{out}/" + MODEL.format(kind)
    return Stage(f"make-{kind}", command, seconds)


def tests(name, which, seconds):
    return Stage(name, (*PYTHON, "-m", "pytest", "-s", "-m", "gpu", "-k", which, "tests/test_cuda.py"), seconds)


def threads(name, file, seconds):
    """Speed of the CPU of the machine by threads: machines with GPUs have more cores than most."""
    return Stage(name, (*PYTHON, "tools/thread_speed.py", "{out}/" + file, "--json", "{out}/" + name + ".json", "-r", "1"), seconds)


STAGES = [
    Stage("device", ("nvidia-smi",), 1, optional=True),
    Stage("info", (*PYDSA, "info", "pydsa/demo/demo.gguf", "--device", "cuda"), 4),
    # what has never run on a GPU is found here, and left out of the stages behind it
    Stage("variants", (*PYTHON, "tools/check_variants.py", "--seconds", "30", "--wrong", "{out}/" + WRONG), 95),
    tests("ops-float16", "ops and float16", 30),
    tests("ops-exact", "ops and exact", 50),
    Stage("products", (*PYTHON, "tools/time_kernels.py", "products"), 25),       # older kernels of prompts beside newer ones, and torch's
    Stage("attention-of-a-prompt", (*PYTHON, "tools/time_kernels.py", "attention"), 14),        # in the precision exact, and in float16
    Stage("chosen-rows", (*PYTHON, "tools/time_kernels.py", "chosen-rows"), 12),        # the same, to chosen rows
    # 0.31 and 10.1 ms for 64 heads and 4,096, 131,072 keys, and 0.089 and 1.17 to choose, gave the prototypes on an H200
    Stage("scores", (*PYTHON, "tools/time_kernels.py", "scores"), 10),
    Stage("one-token", (*PYTHON, "tools/time_kernels.py", "one-token"), 12),
    # before they had half a warp a row: 2.4 to 2.7 TB/s in Q4_K, 1.2 to 1.5 in Q6_K and Q8_0 on an H200
    Stage("products-of-a-token", (*PYTHON, "tools/time_kernels.py", "products-of-a-token"), 20),
    tests("models", "not ops", 50),         # golden ones, in both precisions
    Stage("demo", (*PYDSA, "run", "-f", "pydsa/demo/notes.txt", "--temp", "0", "--device", "cuda"), 6),
    make("Q4_K_M", 15),
    bench("ops-of-a-prompt", "Q4_K_M", 12, "--ops", "-p", "2048", "-n", "0", "-ub", "2048"),
    bench("ops-of-a-token", "Q4_K_M", 12, "--ops", "-p", "0", "-n", "16", "-d", "4096"),
    bench("depths", "Q4_K_M", 35, "-p", "2048", "-n", "64", "-ub", "2048", "-d", "0,4096,131072", "-r", "2"),
    # beside the tokens of "depths": whether it pays that launches of one token do what others would
    bench("token-in-more-launches", "Q4_K_M", 8, "-p", "0", "-n", "64", "-ub", "2048", "-d", "4096", "-r", "2", without=JOINS),
    bench("prompts-exact", "Q4_K_M", 12, "-p", "2048", "-n", "0", "-ub", "2048", "-d", "0,4096", "-r", "1", "--precision", "exact"),
    # three loads, of which the first has all weights on the GPU
    Stage("placement", (*PYTHON, "tools/check_placement.py", "{out}/" + MODEL.format("Q4_K_M"), "-p", "2048,4096", "-n", "32"), 35),
    make("Q8_0", 20),
    bench("q8_0", "Q8_0", 12, "-p", "2048", "-n", "64", "-ub", "2048", "-d", "4096"),
    Stage("sanitizer", ("compute-sanitizer", "--error-exitcode", "9", *PYTHON, "-m", "pytest", "-x", "-q", "-k",
                        "not (threads or sampled)", "tests/test_attention.py", "tests/test_top_k.py"), 12, optional=True),
    Stage("make-0.5b", (*PYTHON, "tools/make_model.py", "--preset", "0.5b", "--type", "Q4_K_M", "{out}/0.5b.gguf"), 3),
    threads("threads-0.5b", "0.5b.gguf", 15),
    threads("threads-v3.2", MODEL.format("Q4_K_M"), 20),
]


def left_out(out, *others):
    """What PYDSA_CUDA_WITHOUT says, with the variants that were found wrong."""
    path = out / WRONG
    return ", ".join(filter(None, (os.environ.get(WITHOUT), path.read_text(encoding="utf-8") if path.exists() else None, *others)))


def run_stage(stage, out, seconds):
    """Run a stage for at most `seconds`, and return how it ended."""
    command = [part.format(out=out) for part in stage.command]
    # the first variable makes the tests of ops test the GPU's kernels
    env = os.environ | {"PYDSA_TEST_DEVICE": "cuda", WITHOUT: left_out(out, stage.without)}
    with open(out / f"{stage.name}.log", "wb") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                  timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        except FileNotFoundError:
            return f"left out: {command[0]} is not there" if stage.optional else f"failed: {command[0]} is not there"
    return "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}"


@click.command(help=__doc__.split("\n\n")[0], epilog="Stages: " + ", ".join(stage.name for stage in STAGES))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=30, show_default=True, help="time for all stages")
@click.option("--stage", "names", multiple=True, type=click.Choice([stage.name for stage in STAGES]), help="only these  [all]")
def main(out, minutes, names):
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / WRONG).unlink(missing_ok=True)       # of another run
    start, rows, stages = time.monotonic(), [], [stage for stage in STAGES if not names or stage.name in names]
    click.echo(f"expected: {sum(stage.seconds for stage in stages):.0f} s for {len(stages)} stages")
    for stage in stages:
        began, left = time.monotonic(), 60 * minutes - (time.monotonic() - start)
        ended = run_stage(stage, out, min(left, limit(stage, minutes))) if left > 1 else "left out: no time was left"
        rows.append((stage.name, f"{time.monotonic() - began:.0f}", f"{stage.seconds:.0f}", ended))
        click.echo(f"{stage.name}: {ended}, {rows[-1][1]} s of {rows[-1][2]} expected")
        without = left_out(out)
        lines = ["| stage | s | expected | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows),
                 *(["", f"From `variants` on without: {without}"] if without else [])]
        (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(any(row[-1].startswith("failed") for row in rows))


def limit(stage, minutes):
    """The seconds after which a stage is stopped.

    They are LATE times what is expected, and more if the whole has more than MINUTES.
    """
    return max(LEAST, LATE * stage.seconds * max(1, minutes / MINUTES))


if __name__ == "__main__":
    main()
