"""The speed of pydsa's server under load, beside llama.cpp's.

    python tools/serve_load.py model.gguf
    python tools/serve_load.py model.gguf --streams 1,8 --peer llama-server build/bin/llama-server
    python tools/serve_load.py model.gguf --peer llama-cpp-python venv/bin/python -o json

Each server is started by turns, as a process of its own with the same file, threads and contexts, and no two run at the same time. In each
turn it answers one stream at a time or several, each with a prompt of its own, greedily, without the tokens that end an answer. Of several
rounds the fastest counts. t/s are all tokens of the answers by all the time, that of prompts included; those of a stream begin with its
first token.
"""

import contextlib
import os
import queue
import random
import statistics
import sys
import time
from pathlib import Path

import click

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.servers import ANSWERS, PEERS, Load, Stream, pydsa_command, started  # noqa: E402

WARM_UP = 4         # tokens of the answers that are not timed


def words(tokenizer):
    """The tokens of a vocabulary that are a word, or letters."""
    texts = (tokenizer.token_bytes(i).decode(errors="replace") for i in range(tokenizer.n_vocab))
    return sorted({text for text in texts if text.isascii() and text.strip().isalpha()})


class Prompts:
    """Prompts of about n tokens, of random words: no two begin alike."""

    def __init__(self, tokenizer, n):
        self._tokenizer, self._n, self._words = tokenizer, n, words(tokenizer)

    def __call__(self, *seed):
        """The prompt of a seed, the same for all servers."""
        source, text = random.Random(repr(seed)), ""
        while (missing := self._n - len(self._tokenizer.encode(text, add_bos=True))) > 0:
            text += "".join(source.choices(self._words, k=-(-missing // 2)))
        return text


class InProcess:
    """pydsa's engine in this process, without HTTP, asked as a Client is."""

    def __init__(self, engine, load):
        self._engine, self._load = engine, load

    def ask_all(self, prompts, n):
        """Continue some texts at once, each by n tokens -> their Streams."""
        from pydsa import Sampling
        from pydsa.engine.requests import Failed, Finished, Request

        ended, sampling = queue.SimpleQueue(), Sampling(temperature=0, logit_bias={token: -100.0 for token in self._load.ended})

        def listener(heard):
            def listen(event):
                heard.append((time.perf_counter(), event))
                if isinstance(event, (Failed, Finished)):
                    ended.put(event)
            return listen
        asked = []
        for ids in [self._engine.model.tokenize(prompt, add_bos=None, parse_special=True) for prompt in prompts]:
            asked.append((time.perf_counter(), []))
            self._engine.submit(Request(ids, listener(asked[-1][1]), max_tokens=n, sampling=sampling))
        for _ in asked:
            event = ended.get(timeout=ANSWERS)
            if isinstance(event, Failed):
                raise event.error
        return [as_stream(start, heard) for start, heard in asked]


def as_stream(start, heard):
    """The Stream of what was heard of an answer, (seconds, event)."""
    from pydsa.engine.requests import Written

    end, finished = heard[-1]
    times = [when for when, event in heard if isinstance(event, Written) and event.pieces]
    return Stream(start, times, end, finished.timings.n_prompt, finished.timings.n_generated)


@contextlib.contextmanager
def in_process(load, reproducible=False):
    """A context with an engine in this process."""
    import pydsa
    from pydsa.engine.engine import Engine

    options = {"reproducible": True} if reproducible else {}
    model = pydsa.load(load.model, device="cpu", n_ctx=load.n_ctx, threads=load.threads, threads_batch=load.threads, **options)
    engine = Engine(model, load.n_parallel)
    try:
        yield InProcess(engine, load)
    finally:
        engine.close()


def figures(streams):
    """What the Streams of one load tell: tokens a second, and seconds."""
    gaps = [b - a for one in streams for a, b in zip(one.times, one.times[1:])]
    firsts = [one.times[0] - one.start for one in streams if one.times]
    rates = [(one.n_tokens - 1) / (one.times[-1] - one.times[0]) for one in streams if one.times and one.times[-1] > one.times[0]]
    seconds = max(one.end for one in streams) - min(one.start for one in streams)
    return {"streams": len(streams), "tokens": sum(one.n_tokens for one in streams), "prompts": [one.n_prompt for one in streams],
            "seconds": seconds, "t/s": sum(one.n_tokens for one in streams) / seconds,
            "t/s of a stream": statistics.median(rates) if rates else None, "first token": statistics.median(firsts) if firsts else None,
            "last first token": max(firsts, default=None), "longest gap": max(gaps, default=None)}


def measure(servers, prompts, streams, n_gen, rounds):
    """Yield the figures of each server, each load and each round.

    servers: name -> a function that makes its context. Rows have "server" and "round" before the figures.
    """
    for turn in range(rounds):
        for name, start in servers.items():
            try:
                with start() as server:
                    for n in streams:
                        server.ask_all([prompts("warm-up", turn, n, i) for i in range(n)], min(WARM_UP, n_gen))
                        timed = server.ask_all([prompts(turn, n, i) for i in range(n)], n_gen)
                        yield {"server": name, "round": turn} | figures(timed)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from None


def best(rows):
    """The fastest round of each server and load."""
    fastest = {}
    for row in rows:
        key = row["server"], row["streams"]
        if key not in fastest or row["t/s"] > fastest[key]["t/s"]:
            fastest[key] = row
    return list(fastest.values())


def table(rows):
    """A markdown table of rows, for people."""
    from pydsa.bench import markdown

    def text(value, scale=1):
        return "-" if value is None else f"{value * scale:.1f}"
    return markdown([{"server": row["server"], "streams": str(row["streams"]), "t/s": text(row["t/s"]),
                      "t/s of a stream": text(row["t/s of a stream"]), "first token, ms": text(row["first token"], 1e3),
                      "the last one's, ms": text(row["last first token"], 1e3), "longest gap, ms": text(row["longest gap"], 1e3)}
                     for row in rows])


def ratios(rows):
    """Yield sentences: what more streams bring, and pydsa beside its peers."""
    speeds = {(row["server"], row["streams"]): row["t/s"] for row in rows}
    names = list(dict.fromkeys(name for name, _ in speeds))
    counts = sorted({n for _, n in speeds})
    for name in names:
        for n in counts[1:]:
            yield f"{name}: {n} streams together get {speeds[name, n] / speeds[name, counts[0]]:.2f} times the t/s of {counts[0]}."
    for name in names[1:]:
        for n in counts:
            yield f"{names[0]} has {speeds[names[0], n] / speeds[name, n]:.2f} times the t/s of {name} at {n} at once."


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


def the_servers(load, peers, engine, reproducible):
    """The servers to measure: name -> a function that makes its context.

    Each is measured in the same rounds; pydsa's is the first.
    """
    name, start = ("engine", in_process) if engine else ("pydsa", lambda load: started(pydsa_command(load), load))
    servers = {name: lambda: start(load)}
    if reproducible:
        servers[f"{name}, reproducible"] = (lambda: in_process(load, True)) if engine else (
            lambda: started(pydsa_command(load, "--reproducible"), load))
    for kind, path in peers:
        servers[kind] = lambda kind=kind, path=path: started(PEERS[kind](load, path), load)
    return servers


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("--streams", default="1,8", help="streams at the same time, with commas between  [1,8]")
@click.option("--n-prompt", type=click.IntRange(1), default=64, help="tokens of each prompt, about  [64]")
@click.option("--n-gen", type=click.IntRange(2), default=128, help="tokens of each answer  [128]")
@click.option("--rounds", type=click.IntRange(1), default=3, help="turns of each server; the fastest counts  [3]")
@click.option("--peer", "peers", type=(click.Choice(list(PEERS)), click.Path(exists=True, dir_okay=False)), multiple=True,
              help="another server: llama-server PROGRAM, or llama-cpp-python PYTHON")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads of each server  [physical cores]")
@click.option("--engine", is_flag=True, help="pydsa's engine in this process, without HTTP, instead of its server")
@click.option("--reproducible", is_flag=True, help="also measure pydsa with --reproducible")
@click.option("--repack", is_flag=True, help="let llama-server repack weights, which crashes on some CPUs")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", help="a table, or all rounds as JSON  [md]")
def main(model_path, streams, n_prompt, n_gen, rounds, peers, threads, engine, reproducible, repack, output):
    import pydsa
    from pydsa.cli.shared import comma_numbers
    from pydsa.machine.cores import physical_cores
    from pydsa.terminal import json_text

    streams = sorted(set(comma_numbers("--streams", streams)))
    if not streams or not streams[0]:
        raise click.UsageError("--streams has 0 or no number, expected numbers from 1 on.")
    rows = []
    try:
        tokenizer = pydsa.load_tokenizer(model_path)
        n_ctx = -(-(2 * n_prompt + n_gen) // 256) * 256     # twice, as tokenizers may count a text differently
        load = Load(os.path.abspath(model_path), threads or physical_cores(), streams[-1], n_ctx, tuple(sorted(tokenizer.eog_ids)), repack)
        servers = the_servers(load, peers, engine, reproducible)
        for row in measure(servers, Prompts(tokenizer, n_prompt), streams, n_gen, rounds):
            rows.append(row)
            click.echo(f"round {row['round'] + 1}, {row['server']}, {row['streams']} at once: {row['t/s']:.1f} t/s", err=True)
    except (pydsa.PydsaError, RuntimeError) as error:
        fail(str(error))
    where = conditions(load, n_prompt, n_gen, rounds)
    if output == "json":
        click.echo(json_text({"conditions": where, "rounds": rows}, indent=1))
    else:
        click.echo("\n".join([table(best(rows)), *ratios(best(rows)), where]))


def conditions(load, n_prompt, n_gen, rounds):
    """One line: machine, version, model, load, and what llama.cpp was allowed."""
    import pydsa
    from tools.llama_cpp_speed import processor
    return (f"{processor()}; {load.threads} threads; pydsa {pydsa.__version__}; {Path(load.model).name}; prompts of {n_prompt} tokens, "
            f"answers of {n_gen}, greedy; the fastest of {rounds} rounds; each with the caches that it has by default; llama.cpp with "
            f"flash attention and {'with' if load.repack else 'without'} repacked weights.")


if __name__ == "__main__":
    main()
