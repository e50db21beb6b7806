"""The speed of a model in stages, beside that of one process.

The one process has the threads of one stage.

    python tools/stage_speed.py model.gguf --stages 2 -t 1
    python tools/stage_speed.py model.gguf --stages 2,3 --streams 1,4,8 -p 4096 -r 3 -o json

Each is a process of its own, by turns; of several rounds the fastest counts. Streams are conversations of an Engine, which generate
greedily at the same time; their t/s are those of the time in which all of them generate: from the last one's first token to the first
one's last. Prompts are one session's. A model in one process runs prompts in ubatches of as many tokens as one in stages.
"""

import json
import queue
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BEGINS = 16         # tokens of a conversation before it generates
UBATCH = 512        # tokens, those of a model in stages


def generated(model, n_streams, n_gen):
    """Tokens a second of conversations that generate at the same time."""
    from pydsa import Sampling
    from pydsa.engine.engine import Engine
    from pydsa.engine.requests import Failed, Finished, Request, Written
    ends = {token: -100.0 for token in model.tokenizer.eog_ids}
    engine, heard, rng = Engine(model, n_streams, cache_bytes=0), queue.SimpleQueue(), np.random.default_rng(n_streams)
    try:
        for i in range(n_streams):
            ids = rng.integers(0, model.config.n_vocab, BEGINS)
            engine.submit(Request(ids, lambda event, i=i: heard.put((time.perf_counter(), i, event)), max_tokens=n_gen,
                                  sampling=Sampling(temperature=0, logit_bias=ends)))
        times, open_streams = [[] for _ in range(n_streams)], n_streams
        while open_streams:
            when, i, event = heard.get(timeout=600)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Written) and len(times[i]) < n_gen:       # its end may be told once more
                times[i].append(when)
            open_streams -= isinstance(event, Finished)
        begin, end = max(mine[0] for mine in times), min(mine[-1] for mine in times)
        return sum(begin < when <= end for mine in times for when in mine) / (end - begin)
    finally:
        engine.close()


def prompt(model, n):
    """Tokens a second of a prompt of n tokens."""
    session, ids = model.session(), np.random.default_rng(n).integers(0, model.config.n_vocab, n)
    session.prefill(ids[:UBATCH])
    session.truncate(0)
    start = time.perf_counter()
    session.prefill(ids)
    return n / (time.perf_counter() - start)


def measured(path, stages, threads, streams, n_prompt, n_gen, options):
    """What a process measures: {name of a figure: tokens a second}."""
    import pydsa
    n_ctx = max(n_prompt, BEGINS + n_gen + 1)
    split = {} if stages == 1 else {"stages": stages}
    model = pydsa.load(path, device="cpu", n_ctx=n_ctx, n_ubatch=UBATCH, threads=threads, **split, **options)
    found = {}
    for n in streams:
        generated(model, n, 8)
        found[f"tg{n_gen}, {n} stream{'s' * (n > 1)}"] = generated(model, n, n_gen)
    if n_prompt:
        found[f"pp{n_prompt}"] = prompt(model, n_prompt)
    return found


def _numbers(option, text):
    from pydsa.cli.shared import comma_numbers
    numbers = comma_numbers(option, text)
    if 0 in numbers:
        raise click.UsageError(f"{option} is {text!r}, expected numbers from 1 on.")
    return numbers


@click.command()
@click.argument("path")
@click.option("--stages", default="2", show_default=True, help="Numbers of stages, with commas between.")
@click.option("-t", "--threads", default=1, show_default=True, help="Threads of a stage, and of the one process.")
@click.option("--streams", default="1,4", show_default=True, help="Conversations at the same time, with commas between.")
@click.option("-p", "--n-prompt", default=4096, show_default=True, help="Tokens of the prompt; 0: none.")
@click.option("-n", "--n-gen", default=64, show_default=True, help="Tokens that each conversation generates.")
@click.option("--wire", default="f32", show_default=True, help="How hidden rows pass: f32 or bf16.")
@click.option("-r", "--rounds", default=2, show_default=True, help="Rounds.")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="Form of the output.")
@click.option("--child", hidden=True)
def main(path, stages, threads, streams, n_prompt, n_gen, wire, rounds, output, child):
    """Compare a model in stages with one process."""
    stages, streams = _numbers("--stages", stages), _numbers("--streams", streams)
    if child is not None:
        n = int(child)
        print(json.dumps(measured(path, n, threads, streams, n_prompt, n_gen, {} if n == 1 else {"wire": wire})))
        return
    fastest = {}
    for _ in range(rounds):
        for n in [1, *stages]:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", str(n)], stdout=subprocess.PIPE, check=True)
            for name, rate in json.loads(done.stdout.splitlines()[-1]).items():
                fastest[n, name] = max(rate, fastest.get((n, name), 0))
    rows = [{"stages": n, "threads": threads, "test": name, "t/s": rate, "ratio": rate / fastest[1, name]}
            for (n, name), rate in fastest.items()]
    if output == "json":
        print(json.dumps(rows, indent=1))
        return
    from pydsa.bench import markdown
    texts = [{key: f"{value:.2f}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in rows]
    print(markdown(texts), end="")


if __name__ == "__main__":
    main()
