"""Simulate a model in stages on nodes that need not be there.

    python tools/simulate_stages.py model.gguf --nodes 2,4,8,16 --bandwidth 300 --link 10Gbit/s --latency 100 --jitter 50
    python tools/simulate_stages.py model.gguf --measured one.json --measured two.json --latency 50 --link 5GB/s

Steps pass through the stages event by event: each stage runs one at a time, in the order of arrival, and sends its rows to the next, one
after the other. One conversation generates in a ring: the last stage starts its next token. Several, and the chunks of a prompt, are sent
by the driver, at most one more than stages at a time. Beside each figure is that of the formula of `pydsa info --stages`, which knows
nothing of chance: --jitter makes each way over the network longer by so much on average, --spread lets the times of stages vary.

--measured takes rows of `pydsa bench -o json`: those of one process give the times of steps, which are shared out to the stages by their
bytes and products; what is predicted from them stands beside the rows of the model in stages. Stages that share one machine's memory are
slower than predicted where the bandwidth of memory, not cores, is what they lack.
"""
import heapq
import itertools
import json
import sys
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.stages import forecast as formula  # noqa: E402
from pydsa.stages.forecast import Link, Times, chunks, depth_of, wire_of  # noqa: E402

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


def generate_one(simulation, wire, seconds, n_tokens):
    """One conversation: the times at which the last stage has each token."""
    last, found = simulation.n_stages - 1, []

    def picked():
        found.append(simulation.now)
        if len(found) < n_tokens:
            simulation.send(last, 0, wire.step(1, first=True), simulation.step, seconds, wire.step(1), picked)
    simulation.step(seconds, wire.step(1), picked)
    simulation.run()
    return np.array([found])


def generate_many(simulation, wire, seconds, n_steps, n_each, n_tokens):
    """Several conversations, n_each in a step: when the driver has each token.

    An array [n_steps, n_tokens]: a row for each step that is under way.
    """
    last, found = simulation.n_stages - 1, [[] for _ in range(n_steps)]
    frame, ids = wire.step(n_each, n_each, n_each), wire.step(n_each, n_each, n_each, first=True)

    def start(i):
        simulation.send(DRIVER, 0, ids, simulation.step, seconds, frame, picked, i)

    def picked(i):
        simulation.send(last, DRIVER, wire.result(n_each), told, i)

    def told(i):
        found[i].append(simulation.now)
        if len(found[i]) < n_tokens:
            start(i)
    for i in range(n_steps):
        start(i)
    simulation.run()
    return np.array(found)


def read_prompt(simulation, wire, times, steps, depth):
    """A prompt: the time at which the driver has the token after it.

    times(n_tokens, n_past): the seconds of each stage. steps: those of forecast.chunks().
    """
    done = []

    def start(i):
        n, n_past = steps[i]
        simulation.send(DRIVER, 0, wire.step(n, first=True), simulation.step, times(n, n_past), wire.step(n), finished, i)

    def finished(i):
        simulation.send(simulation.n_stages - 1, DRIVER, wire.result(), told, i)

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

    times: [steps under way, tokens], as generate_many() returns them.
    """
    times = times[:, int(times.shape[1] * LEFT_OUT):]
    return float(((times.shape[1] - 1) / (times[:, -1] - times[:, 0])).sum())


class Groups:
    """How conversations share the steps that are under way."""

    def __init__(self, n_streams, n_stages):
        self.n_streams = n_streams
        self.n_each = -(-n_streams // depth_of(n_stages))       # conversations in a step
        self.n_steps = -(-n_streams // self.n_each)

    def simulated(self, simulation, wire, seconds, n_tokens):
        """When each step is over, an array as of generate_many()."""
        if self.n_streams == 1:
            return generate_one(simulation, wire, seconds, n_tokens)
        return generate_many(simulation, wire, seconds, self.n_steps, self.n_each, n_tokens)

    def by_formula(self, link, wire, seconds):
        """Seconds between the ends of steps."""
        return formula.one_stream(seconds, link, wire) if self.n_streams == 1 else formula.in_turn(
            seconds, link, wire, self.n_steps, self.n_each)

    def tokens_a_second(self, steps_a_second):
        """The tokens of all conversations; the last step may have fewer than others."""
        return steps_a_second * self.n_streams / self.n_steps


def compared(times, n_past, link, wire, n_streams, n_prompt, n_tokens, chance):
    """The row of a table: a model in stages, simulated and by the formula.

    times: a forecast.Times, or what has its methods. n_past: tokens in each context. chance: the jitter, spread and seed of a Simulation.
    """
    one = times.generation(n_past)
    n = len(one)
    groups, steps = Groups(n_streams or n + 1, n), chunks(n_prompt)
    alone, seconds = Groups(1, n), times.generation(n_past, groups.n_each)
    single = alone.simulated(Simulation(n, link, **chance), wire, one, n_tokens)
    simulation = Simulation(n, link, **chance)
    many = groups.simulated(simulation, wire, seconds, n_tokens)
    gaps = np.diff(many, axis=1)[:, int(n_tokens * LEFT_OUT):]
    first = read_prompt(Simulation(n, link, **chance), wire, times.prompt, steps, depth_of(n))
    found = {"one": (speed(single), 1 / alone.by_formula(link, wire, one)),
             "many": [groups.tokens_a_second(x) for x in (speed(many), 1 / groups.by_formula(link, wire, seconds))],
             "prompt": (n_prompt / first, n_prompt / formula.prompt_seconds(times.prompt, link, wire, steps, depth_of(n)))}
    row = {"stages": n, "streams": groups.n_streams, "under way": groups.n_steps}
    for name, (simulated, by_formula) in found.items():
        row |= {f"{name}, t/s": simulated, f"{name}: formula": by_formula, f"{name}: off": simulated / by_formula - 1}
    return row | {"a token of many, ms": 1e3 * gaps.mean(), "95% within, ms": 1e3 * float(np.quantile(gaps, 0.95)), "first token, s": first,
                  "busiest stage": max(simulation.worked) / simulation.now}


class Shared:
    """Times of stages from those of a whole model: each has its part.

    times: the forecast.Times of its stages, whose proportions count. whole: seconds of one step of generation. factor: what a prompt
    took, by the time that `times` has for it.
    """

    def __init__(self, times, whole=None, factor=None):
        self._times, self._whole, self._factor = times, whole, factor

    def generation(self, n_past):
        """Seconds of each stage for a token."""
        parts = self._times.generation(n_past)
        return [self._whole * part / sum(parts) for part in parts]

    def prompt(self, n_tokens, n_past):
        """Seconds of each stage for tokens of a prompt."""
        return [self._factor * part for part in self._times.prompt(n_tokens, n_past)]


def ranges_of(row):
    """What a row of bench has as stages: None, or a value of division.parse()."""
    from pydsa.stages.division import parse
    stages = None if row.get("stages") is None else parse(row["stages"])
    return None if stages == 1 else stages


def test_of(row):
    """What a row of bench has timed."""
    return tuple(row[key] for key in ("n_prompt", "n_gen", "n_depth"))


def predicted(setup, row, whole, link, wire, n_tokens, chance):
    """What the table shows of a row of bench, of a model in stages.

    whole: the row of the same test in one process.
    """
    from pydsa.stages.division import Node, divided
    stages, n_streams = ranges_of(row), row.get("n_streams") or 1
    nodes = [Node(f"process {i + 1}", 1e11) for i in range(stages if isinstance(stages, int) else len(stages))]
    times, n_past = Times(setup, divided(stages, setup, nodes), nodes), row["n_depth"] + row["n_gen"] // 2
    n, seconds = len(nodes), (row["n_prompt"] + row["n_gen"]) / whole["avg_ts"]
    if row["n_prompt"]:
        steps = chunks(row["n_prompt"], row["n_depth"], row["n_ubatch"])
        shared = Shared(times, factor=seconds / sum(sum(times.prompt(*step)) for step in steps))
        found = row["n_prompt"] / read_prompt(Simulation(n, link, **chance), wire, shared.prompt, steps, depth_of(n))
        by_formula = row["n_prompt"] / formula.prompt_seconds(shared.prompt, link, wire, steps, depth_of(n))
    else:
        groups = Groups(n_streams, n)
        each = Shared(times, whole=groups.n_each * seconds / row["n_gen"]).generation(n_past)     # as if a step read all for each token
        found = groups.tokens_a_second(speed(groups.simulated(Simulation(n, link, **chance), wire, each, n_tokens)))
        by_formula = groups.tokens_a_second(1 / groups.by_formula(link, wire, each))
    from pydsa.bench import test_name
    return {"test": test_name(*test_of(row)), "stages": n, "streams": n_streams, "one process, t/s": whole["avg_ts"],
            "measured, t/s": row["avg_ts"], "of one": row["avg_ts"] / whole["avg_ts"], "simulated, t/s": found,
            "formula, t/s": by_formula, "measured: off": row["avg_ts"] / found - 1}


def against_measurements(setup, rows, *network):
    """A row for each of bench's that a row of one process stands beside.

    network: the arguments of predicted() after the rows. Raises UsageError if there is none.
    """
    whole = {test_of(row): row for row in rows if ranges_of(row) is None and (row.get("n_streams") or 1) == 1}
    found = [predicted(setup, row, whole[test_of(row)], *network) for row in rows if ranges_of(row) is not None and test_of(row) in whole]
    if not found:
        raise click.UsageError("--measured has no test that ran both in one process and in stages: give rows of both.")
    return found


def read_rows(paths):
    """The rows of files of `pydsa bench -o json` or jsonl."""
    rows = []
    for path in paths:
        text = Path(path).read_text()
        try:
            rows += json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
            assert all(isinstance(row, dict) and {"n_prompt", "n_gen", "n_depth", "avg_ts", "n_ubatch"} <= row.keys() for row in rows)
        except (ValueError, AssertionError):
            raise click.UsageError(f"{path} has no rows of `pydsa bench -o json`.") from None
    return rows


def simulated(setup, stages, numbers, bandwidth, gops, *network):
    """A row for each number of nodes, or for the stages that are given."""
    from pydsa.stages.division import Node, borders, divided
    most, found = len(borders(setup.config)), []
    for n in [len(stages)] if stages else [n for n in numbers if n <= most]:
        nodes = [Node(f"node {i + 1}", bandwidth * 1e9, rate=gops * 1e9) for i in range(n)]
        times = Times(setup, divided(stages or n, setup, nodes), nodes)
        found.append(compared(times, setup.n_ctx - 1, *network))
    return found


def shown(row):
    """A row as strings."""
    def text(key, value):
        if isinstance(value, (int, str)):
            return str(value)
        return f"{value:+.1%}" if key.endswith("off") else f"{value:.1%}" if key == "busiest stage" else (
            f"{value:.0f}" if value >= 1000 else f"{value:.4g}")
    return {key: text(key, value) for key, value in row.items()}


@click.command()
@click.argument("model")
@click.option("--nodes", default="2,3,4,8,16,32,64", show_default=True, help="Numbers of nodes, all alike.")
@click.option("--stages", help="Layers of each stage instead, like 0-20,21-40,41-60.")
@click.option("--measured", multiple=True, type=click.Path(exists=True, dir_okay=False),
              help="Rows of `pydsa bench -o json`; can be repeated.")
@click.option("--bandwidth", type=float, default=100.0, show_default=True, help="What a node reads of its memory, GB/s.")
@click.option("--gops", type=float, default=1500.0, show_default=True, help="Products that a node does, GOP/s.")
@click.option("--link", default="10Gbit/s", show_default=True, help="What a node sends, in Gbit/s or GB/s.")
@click.option("--latency", type=float, default=100.0, show_default=True, help="Microseconds from sending to use.")
@click.option("--jitter", type=float, default=0.0, show_default=True, help="Microseconds more, on average.")
@click.option("--spread", type=click.FloatRange(0, 2), default=0.0, show_default=True,
              help="Standard deviation of a stage's times, as a share of them.")
@click.option("--streams", type=click.IntRange(1, 1024), help="Conversations at a time.  [default: one more than stages]")
@click.option("--prompt", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", type=click.IntRange(8), default=400, show_default=True, help="Tokens that each conversation generates.")
@click.option("--wire", type=click.Choice(formula.WIRES), default="f32", show_default=True, help="Type of hidden rows between stages.")
@click.option("-c", "--ctx-size", "n_ctx", type=int, help="Tokens of context.  [default: 8192, or the model's limit]")
@click.option("--kv-type", default="i16", show_default=True, help="Type of the cached latents.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of what is left to chance.")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="Form of the table.")
def main(model, nodes, stages, measured, bandwidth, gops, link, latency, jitter, spread, streams, prompt, tokens, wire, n_ctx, kv_type,
         seed, output):
    """Simulate a model in stages, beside the formula and measurements."""
    from pydsa.bench import markdown
    from pydsa.cli.shared import comma_numbers
    from pydsa.options import bytes_per_second
    from pydsa.setup import Setup
    from pydsa.stages.division import parse
    setup = Setup(model, n_ctx=n_ctx, kv_type=kv_type, n_ubatch=formula.CHUNK)
    network = Link(bytes_per_second("link", link), latency / 1e6), wire_of(setup, wire)
    chance = {"jitter": jitter / 1e6, "spread": spread, "seed": seed}
    if measured:
        rows = against_measurements(setup, read_rows(measured), *network, tokens, chance)
    else:
        ranges = None if stages is None else parse(stages)
        if isinstance(ranges, (int, str)):
            raise click.UsageError(f"--stages is {stages}, expected ranges of layers; --nodes takes numbers.")
        rows = simulated(setup, ranges, comma_numbers("--nodes", nodes), bandwidth, gops, *network, streams, min(prompt, setup.n_ctx),
                         tokens, chance)
    click.echo(json.dumps(rows, indent=1) if output == "json" else markdown([shown(row) for row in rows]), nl=output == "json")


if __name__ == "__main__":
    from pydsa.errors import PydsaError
    try:
        main()
    except PydsaError as error:
        sys.exit(f"Error: {error}")
