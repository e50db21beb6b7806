"""The speed of pydsa, and of llama.cpp where it is installed, by threads.

    python tools/thread_speed.py model.gguf
    python tools/thread_speed.py model.gguf --threads 1,2,4,8,16 --n-prompt 512 --n-gen 64 --json speed.json

Both run the same tokens by turns, and the best time of each counts. The most threads come first, as they take the least time; the JSON file
is written anew after each row, so that a run that is cut off leaves what it found. Numbers beyond the physical cores are left out.
"""

import json
import sys
from pathlib import Path

import click

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.compare_llama_cpp import UBATCH, LlamaCpp  # noqa: E402


def opened_peer(path, n_ctx):
    """(session, None) of llama.cpp with a model; (None, why there is none)."""
    from tools.llama_cpp_speed import LlamaSession

    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return None, "llama-cpp-python is not installed"
    try:
        return LlamaSession(LlamaCpp(path, -(-n_ctx // 256) * 256, 1, fast=True)), None
    except RuntimeError as error:
        return None, str(error)


def measure(model, peer, bench, threads):
    """Yield a row for each number of threads and each test of a Bench.

    peer: a LlamaSession, or None. Rows have tokens per second.
    """
    from pydsa.bench import random_ids, test_name
    from tools.llama_cpp_speed import best_seconds

    sessions = {"pydsa": model.session()} | ({"llama.cpp": peer} if peer else {})
    ids = random_ids(model, bench.n_ctx)
    for n in threads:
        model.runner.threads = model.runner.threads_batch = n
        if peer:
            peer.api.llama_set_n_threads(peer.context, n, n)
        for test in bench.tests:
            seconds = best_seconds(list(sessions.values()), ids, test, bench.repetitions)
            yield {"test": test_name(*test), "threads": n,
                   **{f"{name} t/s": (test[0] + test[1]) / s for name, s in zip(sessions, seconds)}}


def with_speed_ups(rows):
    """The rows by test and threads, each beside its gain over one thread."""
    ones = {row["test"]: row for row in rows if row["threads"] == 1}
    for row in sorted(rows, key=lambda row: (row["test"], row["threads"])):
        one, speeds = ones.get(row["test"]), [name for name in row if name.endswith("t/s")]
        yield row | {name.replace("t/s", "speed-up"): row[name] / one[name] if one else None for name in speeds}


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("--threads", default="1,2,4,8,16", help="numbers of threads, with commas between  [1,2,4,8,16]")
@click.option("--n-prompt", default="512", help="prompt lengths to time; 0: none  [512]")
@click.option("--n-gen", default="64", help="numbers of tokens to generate; 0: none  [64]")
@click.option("--n-depth", default="0", help="tokens that are in the context already  [0]")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=2, help="times that each test runs; the best counts  [2]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="file for the rows as JSON")
def main(model_path, threads, n_prompt, n_gen, n_depth, repetitions, json_path):
    import pydsa
    from pydsa.bench import Bench, format_rows
    from pydsa.cli.shared import comma_numbers
    from pydsa.machine.cores import physical_cores
    from tools.llama_cpp_speed import processor

    lists = {"--n-prompt": n_prompt, "--n-gen": n_gen, "--n-depth": n_depth, "--threads": threads}
    n_prompt, n_gen, n_depth, threads = (comma_numbers(name, text) for name, text in lists.items())
    threads = sorted({n for n in threads if n <= physical_cores()}, reverse=True)
    if not threads or not threads[-1]:
        raise click.UsageError(f"--threads has no number from 1 to {physical_cores()}, the physical cores, or it has 0.")
    rows = []
    try:
        bench = Bench(n_prompt, n_gen, n_depth, repetitions)
        model = pydsa.load(model_path, device="cpu", n_ctx=bench.n_ctx, n_ubatch=UBATCH)
        peer, missing = opened_peer(model_path, bench.n_ctx)
        for row in measure(model, peer, bench, threads):
            rows.append(row)
            click.echo(format_rows([row], "jsonl"), nl=False)
            if json_path:
                json_path.write_text(json.dumps(list(with_speed_ups(rows)), indent=1) + "\n", encoding="utf-8")
    except pydsa.PydsaError as error:
        fail(str(error))
    click.echo(f"\n{format_rows(list(with_speed_ups(rows)), 'md')}\n{processor()}, {physical_cores()} cores; {Path(model_path).name}"
               + (f"; without llama.cpp: {missing}" if missing else ""))


if __name__ == "__main__":
    main()
