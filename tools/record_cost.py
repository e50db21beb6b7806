"""What it costs to record selection and routing.

    python tools/record_cost.py model.gguf
    python tools/record_cost.py model.gguf -d 0,4096 -p 512 -n 64 -r 20 -o json

Steps without and with a recording follow each other in one process, many times. The least time of each step counts, and the least time to
pack what was recorded, or to write it to the file: other programs may use the machine. "own": processor time of the recording's functions,
the least of all runs, which busy machines change less.
"""
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import click

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WAYS = ("off", "memory", "file")


def timed(run):
    """The seconds that a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextlib.contextmanager
def own_time():
    """A context that counts the processor time of recording: a list of seconds."""
    from pydsa.recordings.recorder import Recorder
    seconds, before = [], {name: getattr(Recorder, name) for name in ("after", "completed", "_flush")}
    depth = 0

    def counting(function):
        def count(*args):
            nonlocal depth
            depth, start = depth + 1, time.thread_time()
            function(*args)
            depth -= 1
            if depth == 0:      # not called by another one of them
                seconds.append(time.thread_time() - start)
        return count
    try:
        for name, function in before.items():
            setattr(Recorder, name, counting(function))
        yield seconds
    finally:
        for name, function in before.items():
            setattr(Recorder, name, function)


def recorded(session, way, steps, folder):
    """Seconds of each step and of what follows them; bytes of a token.

    way: one of WAYS. The session is as before afterwards.
    """
    n_past = session.n_past
    context = contextlib.nullcontext() if way == "off" else session.record(path=folder / "a.npz" if way == "file" else None)
    with context as recording:
        seconds = [timed(lambda: session.prefill(ids)) for ids in steps]
        if way == "memory":
            seconds.append(timed(lambda: recording.chunks))     # packs what is pending
        start = time.perf_counter()
    seconds.append(time.perf_counter() - start)     # with a file, this packs and writes
    session.truncate(n_past)
    return seconds, None if way == "off" else recording.n_bytes / recording.n


def rows(model, depths, n_prompt, n_tokens, n_repeats):
    """A row for each depth and kind of step, with t/s and per cent."""
    ids = [7 + i * 31 % 250 for i in range(max(depths) + max(n_prompt, n_tokens))]
    with tempfile.TemporaryDirectory() as folder:
        for depth in depths:
            session, new = model.session(), ids[depth:]
            if depth:
                session.prefill(ids[:depth])
            for test, steps in ((f"pp{n_prompt}", [new[:n_prompt]]), (f"tg{n_tokens}", [[i] for i in new[:n_tokens]])):
                met = {way: [] for way in WAYS}
                for _ in range(n_repeats + 1):      # the first ones warm up
                    for way in WAYS:
                        met[way].append(recorded(session, way, steps, Path(folder)))
                seconds = {way: sum(map(min, zip(*(times for times, _ in met[way][1:])))) for way in WAYS}
                speed = sum(map(len, steps)) / seconds["off"]
                own = []
                for _ in range(n_repeats):
                    with own_time() as parts:
                        recorded(session, "memory", steps, Path(folder))
                    own.append(sum(parts))
                yield {"test": test, "depth": depth, "off t/s": round(speed, 1)} | {
                    f"{way}: cost %": round(100 * (seconds[way] / seconds["off"] - 1), 1) for way in WAYS[1:]} | {
                    "own us/token": round(1e6 * min(own) / sum(map(len, steps)), 1)} | {
                    f"{way}: bytes a token": round(met[way][-1][1]) for way in WAYS[1:]}


@click.command(help=__doc__.split("\n")[0])
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("-d", "--depths", default="0,4096", show_default=True, help="Tokens in the context before, with commas between.")
@click.option("-p", "--n-prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prompt.")
@click.option("-n", "--n-gen", "n_tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=10, show_default=True, help="How often each is run.")
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--device", default="cpu", show_default=True, help="As for pydsa.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", help="form of the table  [md]")
def main(path, depths, n_prompt, n_tokens, repetitions, threads, device, output):
    import pydsa
    from pydsa.bench import format_rows

    try:
        depths = [int(depth) for depth in depths.split(",")]
        model = pydsa.load(path, n_ctx=max(depths) + max(n_prompt, n_tokens), threads=threads, device=device)
        click.echo(format_rows(list(rows(model, depths, n_prompt, n_tokens, repetitions)), output), nl=False)
    except (ValueError, pydsa.PydsaError) as error:
        click.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
