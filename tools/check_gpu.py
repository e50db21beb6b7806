"""Check a GPU in one run: ops, models, a sanitizer, speed.

    python tools/check_gpu.py results --minutes 9

Each stage writes results/STAGE.log as it goes, and results/report.md tells how all ended: a run that is cut off leaves what it found.
Stages come in the order of their importance. A stage that would not end in time is stopped. The exit code is 1 if a stage failed. Speed is
measured op by op and at several depths, and that of the CPU by threads.
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


class Stage(NamedTuple):
    """A command, and the share of the whole time that it may take.

    optional: its program may be missing.
    """
    name: str
    command: tuple
    share: float
    optional: bool = False


def bench(name, kind, share, *options):
    return Stage(name, (*PYDSA, "bench", "{out}/" + MODEL.format(kind), "--device", "cuda", *options), share)


def make(kind):
    command = *PYTHON, "tools/make_model.py", "--preset", "v3.2-layers", "--type", kind, "{out}/" + MODEL.format(kind)
    return Stage(f"make-{kind}", command, 0.3)


def threads(name, file, share):
    """Speed of the CPU of the machine by threads: machines with GPUs have more cores than most."""
    return Stage(name, (*PYTHON, "tools/thread_speed.py", "{out}/" + file, "--json", "{out}/" + name + ".json", "-r", "1"), share)


STAGES = [
    Stage("device", ("nvidia-smi",), 0.05, optional=True),
    Stage("info", (*PYDSA, "info", "pydsa/demo/demo.gguf", "--device", "cuda"), 0.1),
    Stage("chosen-rows", (*PYTHON, "tools/chosen_rows.py"), 0.1),        # prompts' attention, older kernels beside newer ones
    Stage("ops", (*PYTHON, "-m", "pytest", "-m", "gpu", "-k", "ops", "tests/test_cuda.py"), 0.4),
    Stage("models", (*PYTHON, "-m", "pytest", "-m", "gpu", "-k", "not ops", "tests/test_cuda.py"), 0.4),
    Stage("one-token", (*PYTHON, "tools/one_token.py"), 0.1),
    Stage("demo", (*PYDSA, "run", "-f", "pydsa/demo/notes.txt", "--temp", "0", "--device", "cuda"), 0.15),
    # before they had half a warp a row: 2.4 to 2.7 TB/s in Q4_K, 1.2 to 1.5 in Q6_K and Q8_0 on an H200
    Stage("products-of-a-token", (*PYTHON, "tools/gpu_products.py"), 0.15),
    Stage("products", (*PYTHON, "tools/time_products.py"), 0.15),       # older kernels of prompts beside newer ones
    make("Q4_K_M"),
    bench("ops-of-a-token", "Q4_K_M", 0.3, "--ops", "-p", "0", "-n", "16", "-d", "4096"),
    bench("ops-of-a-prompt", "Q4_K_M", 0.3, "--ops", "-p", "2048", "-n", "0", "-ub", "2048"),
    bench("depths", "Q4_K_M", 0.4, "-p", "2048", "-n", "64", "-ub", "2048", "-d", "0,4096,131072", "-r", "2"),
    # three loads, of which the first has all weights on the GPU
    Stage("placement", (*PYTHON, "tools/check_placement.py", "{out}/" + MODEL.format("Q4_K_M"), "-p", "2048,4096", "-n", "32"), 0.4),
    make("Q8_0"),
    bench("q8_0", "Q8_0", 0.3, "-p", "2048", "-n", "64", "-ub", "2048", "-d", "0,4096"),
    Stage("make-0.5b", (*PYTHON, "tools/make_model.py", "--preset", "0.5b", "--type", "Q4_K_M", "{out}/0.5b.gguf"), 0.1),
    threads("threads-0.5b", "0.5b.gguf", 0.1),
    threads("threads-v3.2", MODEL.format("Q4_K_M"), 0.3),
    Stage("sanitizer", ("compute-sanitizer", "--error-exitcode", "9", *PYTHON, "-m", "pytest", "-x", "-q", "-k",
                        "not (threads or sampled)", "tests/test_attention.py", "tests/test_top_k.py"), 0.5, optional=True),
]


def run_stage(stage, out, seconds):
    """Run a stage for at most `seconds`, and return how it ended."""
    command = [part.format(out=out) for part in stage.command]
    with open(out / f"{stage.name}.log", "wb") as log:
        try:
            # this variable makes the tests of ops test the GPU's kernels
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYDSA_TEST_DEVICE": "cuda"}, stdin=subprocess.DEVNULL,
                                  stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
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
    start, rows = time.monotonic(), []
    for stage in (stage for stage in STAGES if not names or stage.name in names):
        began, left = time.monotonic(), 60 * minutes - (time.monotonic() - start)
        ended = run_stage(stage, out, min(left, 60 * minutes * stage.share)) if left > 1 else "left out: no time was left"
        rows.append((stage.name, f"{time.monotonic() - began:.0f}", ended))
        click.echo(f"{stage.name}: {ended}")
        lines = ["| stage | s | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(any(row[2].startswith("failed") for row in rows))


if __name__ == "__main__":
    main()
