"""Simulate a model in stages on nodes that need not be there.

    python tools/simulate_stages.py model.gguf --nodes 2,4,8,16 --bandwidth 300 --link 10Gbit/s --latency 100 --jitter 50
    python tools/simulate_stages.py model.gguf --measured one.json --measured two.json --latency 50 --link 5GB/s

Steps pass through the stages event by event: each stage runs one at a time, in the order of arrival, and sends its rows to the next, one
after the other. Conversations generate in a ring, in as many steps as stages: the last stage sends its rows to the first, which has the
head, whose time is with that of its layers, and starts the next tokens. Chunks of a prompt are sent by the driver, one more than stages at
a time. Beside each figure is that of the formula of `pydsa info --stages`, which knows nothing of chance: --jitter makes each way over the
network longer by so much on average, --spread lets the times of stages vary.

--measured takes rows of `pydsa bench -o json` or of tools/stage_speed.py: those of one process give the times of steps, which are shared
out to the stages by their bytes and products; what is predicted from them stands beside the rows of the model in stages. Stages of one
machine are slower where they read more at the same time than its memory gives (--memory), and each step takes them --beside, for what is no
kernel. Without rows of a model in stages the prediction is for --nodes like the measured machine.
"""
import heapq
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.bench import markdown, test_name  # noqa: E402
from pydsa.cli.shared import comma_numbers  # noqa: E402
from pydsa.errors import PydsaError  # noqa: E402
from pydsa.options import bytes_per_second  # noqa: E402
from pydsa.setup import Setup  # noqa: E402
from pydsa.stages import forecast as formula  # noqa: E402
from pydsa.stages.division import AUTO, Node, borders, divided, parse  # noqa: E402
from pydsa.stages.forecast import Groups, Link, Times, chunks, depth_of, wire_of  # noqa: E402

DRIVER = -1
LEFT_OUT = 0.25     # of the tokens of a simulation, at its begin, while the stages fill


class Simulation:
    """Stages, the network between them, and a clock.

    link: a forecast.Link. jitter: seconds by which each way is longer, on average; what one node sends another comes in order. spread: the
    standard deviation of a stage's times, as a share of them.
    """

    def __init__(self, n_stages, link, jitter=0.0, spread=0.0, seed=1):
        self.n_stages, self.now, self._link, self._jitter, self._spread = n_stages, 0.0, link, jitter, spread
        self._rng, self._events, self._numbers = np.random.default_rng(seed), [], itertools.count()
        self._busy, self._sending, self._arrived = [0.0] * n_stages, {}, {}
        self.worked = [0.0] * n_stages      # seconds that each stage ran

    def at(self, time, action, *args):
        """Call action(*args) at a time."""
        heapq.heappush(self._events, (time, next(self._numbers), action, args))

    def run(self):
        """Let all happen, until nothing is left."""
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)

    def send(self, source, target, n_bytes, action, *args):
        """Send a frame from a node to another, where action(*args) is called.

        In a model of one stage all is in one process, and takes no time.
        """
        if self.n_stages == 1:
            return action(*args)
        self._sending[source] = max(self.now, self._sending.get(source, 0.0)) + n_bytes / self._link.bandwidth
        way = self._sending[source] + self._link.latency + (self._rng.exponential(self._jitter) if self._jitter else 0.0)
        self._arrived[source, target] = max(way, self._arrived.get((source, target), 0.0))
        self.at(self._arrived[source, target], action, *args)

    def work(self, stage, seconds, action, *args):
        """Let a stage work on a step behind those that came before."""
        if self._spread:        # a gamma distribution: no time is below 0
            seconds *= self._rng.gamma(self._spread ** -2, self._spread ** 2)
        self._busy[stage] = max(self.now, self._busy[stage]) + seconds
        self.worked[stage] += seconds
        self.at(self._busy[stage], action, *args)

    def step(self, seconds, frame, action, *args, stage=0):
        """Let a step, which has arrived at a stage, go on to the last.

        seconds: of each stage. frame: bytes of its rows. action(*args) is called at the last stage.
        """
        if stage == self.n_stages - 1:
            self.work(stage, seconds[stage], action, *args)
        else:
            self.work(stage, seconds[stage], self._pass_on, stage, seconds, frame, action, args)

    def _pass_on(self, stage, seconds, frame, action, args):
        def arrive():
            self.step(seconds, frame, action, *args, stage=stage + 1)
        self.send(stage, stage + 1, frame, arrive)


def generate(simulation, wire, seconds, groups, n_tokens, logits=0):
    """Conversations that generate: the times at which steps have their tokens.

    groups: a forecast.Groups. The first stage starts the next step; where logits go to the driver, so many bytes, that does. An array
    [steps under way, n_tokens].
    """
    n, last, found = groups.each, simulation.n_stages - 1, [[] for _ in range(groups.steps)]
    frame, ids = wire.step(n, n, n), wire.step(n, n, n, first=True)

    def start(i):
        simulation.send(DRIVER, 0, ids, work, i)

    def work(i):
        simulation.step(seconds, frame, back, i)

    def back(i):
        simulation.send(last, 0, frame, picked, i)

    def picked(i):
        if logits:
            simulation.send(0, DRIVER, wire.result(n) + logits, told, i, start)
        else:
            told(i, work)

    def told(i, go_on):
        found[i].append(simulation.now)
        if len(found[i]) < n_tokens:
            go_on(i)
    for i in range(groups.steps):
        start(i)
    simulation.run()
    return np.array(found)


def read_prompt(simulation, wire, times, steps, depth):
    """A prompt: the time at which the driver has the token after it.

    times(n_tokens, n_past): the seconds of each stage. steps: those of forecast.chunks().
    """
    done, last = [], simulation.n_stages - 1

    def start(i):
        n, n_past = steps[i]
        simulation.send(DRIVER, 0, wire.step(n, first=True), simulation.step, times(n, n_past), wire.step(n), finished, i)

    def finished(i):
        if i < len(steps) - 1:
            simulation.send(last, DRIVER, wire.result(0), told, i)
        else:
            simulation.send(last, 0, wire.step(1), simulation.send, 0, DRIVER, wire.result(), told, i)

    def told(i):
        done.append(simulation.now)
        if i + depth < len(steps):
            start(i + depth)
    for i in range(min(depth, len(steps))):
        start(i)
    simulation.run()
    return done[-1]


def speed(times):
    """Steps a second, without those at the begin, while the stages fill.

    times: [steps under way, tokens], as generate() returns them.
    """
    times = times[:, int(times.shape[1] * LEFT_OUT):]
    return float(((times.shape[1] - 1) / (times[:, -1] - times[:, 0])).sum())


def compared(times, n_past, link, wire, n_streams, n_prompt, n_tokens, chance):
    """The row of a table: a model in stages, simulated and by the formula.

    times: a forecast.Times, or what has its methods. n_past: tokens in each context. chance: the jitter, spread and seed of a Simulation.
    """
    one = times.generation(n_past)
    n = len(one)
    groups, steps = Groups.of(n_streams or n, n), chunks(n_prompt)
    seconds = times.generation(n_past, groups.each)
    single = generate(Simulation(n, link, **chance), wire, one, Groups(1, 1, 1), n_tokens)
    simulation = Simulation(n, link, **chance)
    many = generate(simulation, wire, seconds, groups, n_tokens)
    gaps = np.diff(many, axis=1)[:, int(n_tokens * LEFT_OUT):]
    first = read_prompt(Simulation(n, link, **chance), wire, times.prompt, steps, depth_of(n))
    found = {"one": (speed(single), 1 / formula.one_stream(one, link, wire)),
             "many": [groups.streams / groups.steps * rate
                      for rate in (speed(many), 1 / formula.in_turn(seconds, link, wire, groups.steps, groups.each))],
             "prompt": (n_prompt / first, n_prompt / formula.prompt_seconds(times.prompt, link, wire, steps, depth_of(n)))}
    row = {"stages": n, "streams": groups.streams, "under way": groups.steps}
    for name, (simulated, by_formula) in found.items():
        row |= {f"{name}, t/s": simulated, f"{name}: formula": by_formula, f"{name}: off": simulated / by_formula - 1}
    return row | {"a token of many, ms": 1e3 * gaps.mean(), "95% within, ms": 1e3 * float(np.quantile(gaps, 0.95)), "first token, s": first,
                  "busiest stage": max(simulation.worked) / simulation.now}


class Measurement(NamedTuple):
    """A row of a benchmark: tokens a second of a prompt, or of generation.

    stages: None for one process, or a value of division.parse(). logits: whether these came back, rather than sampled ids. ts: None where
    it was not measured.
    """
    stages: object
    n_prompt: int
    n_gen: int
    n_depth: int
    n_streams: int
    n_ubatch: int
    logits: bool
    ts: float | None

    @classmethod
    def of(cls, row):
        """That of a row of `pydsa bench`, or of tools/stage_speed.py.

        Raises KeyError, TypeError or ValueError for what is none.
        """
        stages = None if row.get("stages") in (None, 1) else parse(row["stages"])
        if stages == AUTO:
            raise ValueError("it does not tell the stages")
        if "avg_ts" in row:
            return cls(stages, *(int(row[key]) for key in ("n_prompt", "n_gen", "n_depth")), 1, int(row["n_ubatch"]), True,
                       float(row["avg_ts"]))
        kind, n, streams = re.fullmatch(r"(pp|tg)(\d+)(?:, (\d+) streams?)?", row["test"]).groups()
        n_prompt, n_gen = (int(n), 0) if kind == "pp" else (0, int(n))
        return cls(stages, n_prompt, n_gen, 0, int(streams or 1), formula.CHUNK, False, float(row["t/s"]))

    @property
    def test(self):
        """What is measured, but for the number of conversations."""
        return self.n_prompt, self.n_gen, self.n_depth, self.logits


def read_measurements(paths):
    """The Measurements of files with JSON, or with JSON in each line."""
    found = []
    for path in paths:
        text = Path(path).read_text()
        try:
            rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
            found += [Measurement.of(row) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError, PydsaError):
            raise click.UsageError(f"{path} has no rows of `pydsa bench -o json` or of `tools/stage_speed.py -o json`.") from None
    return found


class Machine(NamedTuple):
    """What stages on one machine share, and what is no kernel.

    memory: bytes a second that processes read together; None: each as much as one alone. beside: seconds of a stage for each step.
    """
    memory: float | None = None
    beside: float = 0.0

    def seconds(self, kernels, reads, n_at_once):
        """Seconds of a step in each stage.

        kernels: seconds of each alone; reads: its bytes. n_at_once: how many stages work at the same time.
        """
        slowest = 0.0 if self.memory is None else n_at_once / self.memory
        return [max(alone, slowest * n_bytes) + self.beside for alone, n_bytes in zip(kernels, reads)]


def step_seconds(whole, n_each):
    """Seconds of a step of n_each conversations in one process.

    whole: {conversations that generated at the same time: tokens a second}. In between it is interpolated; beyond, a token takes as long.
    """
    most = max(whole)
    if n_each >= most:
        return n_each / whole[most]
    numbers = sorted(whole)
    return float(np.interp(n_each, numbers, [n / whole[n] for n in numbers]))


def predicted(setup, row, whole, link, wire, n_tokens, chance, machine):
    """What the table shows of a Measurement of a model in stages.

    whole: those of the same test in one process, as step_seconds() takes them. A stage has its part of each time there. machine: a Machine.
    """
    nodes = [Node(f"process {i + 1}", 1e11) for i in range(row.stages if isinstance(row.stages, int) else len(row.stages))]
    ranges, n = divided(row.stages, setup, nodes), len(nodes)
    times, simulation = Times(setup, ranges, nodes), Simulation(n, link, **chance)
    if row.n_prompt:
        steps = chunks(row.n_prompt, row.n_depth, row.n_ubatch)
        factor = row.n_prompt / whole[1] / sum(sum(times.prompt(*step)) for step in steps)
        found = row.n_prompt / read_prompt(simulation, wire, lambda *step: [factor * part for part in times.prompt(*step)], steps,
                                           depth_of(n))
    else:
        groups = Groups.of(row.n_streams, n)
        reads = times.reads(row.n_depth + row.n_gen // 2, groups.each)
        seconds = machine.seconds([step_seconds(whole, groups.each) * part / sum(reads) for part in reads], reads, groups.steps)
        logits = 4 * setup.config.n_vocab if row.logits else 0
        found = groups.streams / groups.steps * speed(generate(simulation, wire, seconds, groups, n_tokens, logits))
    one = whole.get(row.n_streams)
    shown = {"test": test_name(row.n_prompt, row.n_gen, row.n_depth), "streams": row.n_streams, "layers": ",".join(map(str, ranges)),
             "one process, t/s": one, "predicted, t/s": found, "of one process": one and found / one}
    return shown if row.ts is None else shown | {"measured, t/s": row.ts, "measured of one": one and row.ts / one,
                                                 "measured: off": row.ts / found - 1}


def against_measurements(setup, rows, numbers, *network):
    """A row for each Measurement in stages that one of one process is beside.

    Where there is none in stages at all: for each number of stages. network: the arguments of predicted() after the rows. Raises UsageError
    if there is none of one process.
    """
    if all(row.stages is None for row in rows):
        rows = rows + [row._replace(stages=n, ts=None) for n in numbers for row in rows]
    whole = {}
    for row in rows:
        if row.stages is None:
            whole.setdefault(row.test, {})[row.n_streams] = row.ts
    found = [predicted(setup, row, whole[row.test], *network) for row in rows if row.stages is not None and 1 in whole.get(row.test, ())]
    if not found:
        raise click.UsageError("--measured has no test in stages that also ran in one process: give rows of both, or of one process.")
    return found


def simulated(setup, stages, numbers, bandwidth, gops, *network):
    """A row for each number of nodes, or for the stages that are given."""
    found = []
    for n in [len(stages)] if stages else numbers:
        nodes = [Node(f"node {i + 1}", bandwidth * 1e9, rate=gops * 1e9) for i in range(n)]
        times = Times(setup, divided(stages or n, setup, nodes), nodes)
        found.append(compared(times, setup.n_ctx - 1, *network))
    return found


def shown(row):
    """A row as strings."""
    def text(key, value):
        if value is None or isinstance(value, (int, str)):
            return "-" if value is None else str(value)
        return f"{value:+.1%}" if key.endswith("off") else f"{value:.1%}" if key == "busiest stage" else (
            f"{value:.0f}" if value >= 1000 else f"{value:.4g}")
    return {key: text(key, value) for key, value in row.items()}


@click.command()
@click.argument("model")
@click.option("--nodes", default="2,3,4,8,16,32,64", show_default=True, help="Numbers of nodes, all alike; as far as the layers reach.")
@click.option("--stages", help="Layers of each stage instead, like 0-20,21-40,41-60.")
@click.option("--measured", multiple=True, type=click.Path(exists=True, dir_okay=False),
              help="Rows of `pydsa bench -o json` or `tools/stage_speed.py -o json`; can be repeated.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True),
              help="With --measured: what processes of the machine read together, GB/s.  [default: each as much as one]")
@click.option("--beside", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="With --measured: microseconds of a stage for each step beside the kernels.")
@click.option("--bandwidth", type=float, default=100.0, show_default=True, help="What a node reads of its memory, GB/s.")
@click.option("--gops", type=float, default=1500.0, show_default=True, help="Products that a node does, GOP/s.")
@click.option("--link", default="10Gbit/s", show_default=True, help="What a node sends, in Gbit/s or GB/s.")
@click.option("--latency", type=float, default=100.0, show_default=True, help="Microseconds from sending to use.")
@click.option("--jitter", type=float, default=0.0, show_default=True, help="Microseconds more, on average.")
@click.option("--spread", type=click.FloatRange(0, 2), default=0.0, show_default=True,
              help="Standard deviation of a stage's times, as a share of them.")
@click.option("--streams", type=click.IntRange(1, 1024), help="Conversations at a time.  [default: as many as stages]")
@click.option("--prompt", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", type=click.IntRange(8), default=400, show_default=True, help="Tokens that each conversation generates.")
@click.option("--wire", type=click.Choice(formula.WIRES), default="f32", show_default=True, help="Type of hidden rows between stages.")
@click.option("-c", "--ctx-size", "n_ctx", type=int, help="Tokens of context.  [default: 8192, or the model's limit]")
@click.option("--kv-type", default="i16", show_default=True, help="Type of the cached latents.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of what is left to chance.")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="Form of the table.")
def main(model, nodes, stages, measured, memory, beside, bandwidth, gops, link, latency, jitter, spread, streams, prompt, tokens, wire,
         n_ctx, kv_type, seed, output):
    """Simulate a model in stages, beside the formula and measurements."""
    setup = Setup(model, n_ctx=n_ctx, kv_type=kv_type, n_ubatch=formula.CHUNK)
    network = Link(bytes_per_second("link", link), latency / 1e6), wire_of(setup, wire)
    most = len(borders(setup.config))
    numbers = [n for n in comma_numbers("--nodes", nodes) if 0 < n <= most]
    if not numbers:
        raise click.UsageError(f"--nodes is {nodes}, expected numbers from 1 to {most}: so many layers of the model can begin a stage.")
    chance = {"jitter": jitter / 1e6, "spread": spread, "seed": seed}
    if measured:
        machine = Machine(None if memory is None else memory * 1e9, beside / 1e6)
        rows = against_measurements(setup, read_measurements(measured), numbers, *network, tokens, chance, machine)
    else:
        ranges = None if stages is None else parse(stages)
        if isinstance(ranges, (int, str)):
            raise click.UsageError(f"--stages is {stages}, expected ranges of layers; --nodes takes numbers.")
        rows = simulated(setup, ranges, numbers, bandwidth, gops, *network, streams, min(prompt, setup.n_ctx),
                         tokens, chance)
    click.echo(json.dumps(rows, indent=1) if output == "json" else markdown([shown(row) for row in rows]), nl=output == "json")


if __name__ == "__main__":
    try:
        main()
    except PydsaError as error:
        sys.exit(f"Error: {error}")
