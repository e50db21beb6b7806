"""How far a step scales with threads, without a machine of many cores.

    python tools/scaling.py model.gguf -p 512
    python tools/scaling.py model.gguf -p 0 -n -d 0,4096 --threads 1,16,64 -b 300

For each number of threads T one thread runs the parts of a step as they would be for T, each by itself under the clock, in the order of the
whole step. A model of the team (team_model.py) then says how long T threads would take: with the parts that one thread does alone, what
it costs to hand tasks out, to draw and to wake up, tasks of unequal length, and the memory's bandwidth. It knows nothing of caches and
clock rates that cores share, nor of several sockets.

"lost" says which share of a step's time goes where; with the efficiency it makes 1. "clock" is the step itself, on as many threads as there
are cores; "here" the prediction for this machine's memory. "more work" is what the parts take longer than those for one thread: negative
where smaller tasks are faster.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.team_model import LOSSES, by_stage, is_handed_out, serial_seconds, shares_lost, simulate, total  # noqa: E402


class Bandwidths(NamedTuple):
    """Bytes a second from memory."""
    one: float      # that one thread gets
    most: float     # that all threads of the machine get which is predicted
    here: float     # that all threads of this machine get

    def of(self, n, most=None):
        """What n threads get, at most as much as `most`, or self.most."""
        return min(n * self.one, most or self.most)


class Measured:
    """The times of one step.

    name: as in a benchmark. intervals: number of threads -> intervals, lists of Stages. clock: number of threads -> seconds of the step.
    bandwidths: see Bandwidths. longer: by which share the slowest run took longer than the fastest, that is, how much the machine was
    disturbed.
    """

    def __init__(self, name, intervals, clock, bandwidths, longer):
        self.name, self.intervals, self.clock, self.longer = name, intervals, clock, longer
        self.one = serial_seconds(intervals[1])
        self.times = {n: simulate(each, n, bandwidths.of(n)) for n, each in intervals.items()}
        self.here = {n: total(simulate(intervals[n], n, bandwidths.of(n, bandwidths.here))).seconds for n in clock}
        self.reading = {n: sum(s.n_bytes for interval in each for s in interval) / bandwidths.of(n) for n, each in intervals.items()}

    def whole_rows(self):
        """A row for each number of threads."""
        for n, times in self.times.items():
            whole = total(times)
            yield {"threads": n, "ms": 1e3 * whole.seconds, "here, ms": 1e3 * self.here[n] if n in self.here else None,
                   "clock, ms": 1e3 * self.clock[n] if n in self.clock else None,
                   "speed-up": self.one / whole.seconds, "efficiency": self.one / n / whole.seconds,
                   "of bandwidth": self.reading[n] / whole.seconds,
                   **{f"lost: {name.replace('_', ' ')}": share for name, share in shares_lost(whole, self.one, n).items()}}

    def op_rows(self):
        """A row for each op, those that take longest first.

        It has the time on one thread, and the efficiency for each number of threads.
        """
        seconds = {n: self._by_op(n) for n in self.times}
        for op, one in sorted(seconds[1].items(), key=lambda pair: -pair[1]):
            yield {"op": op, "ms": 1e3 * one, "share": one / sum(seconds[1].values()),
                   **{f"{n} threads": one / n / mine[op] if mine[op] else None for n, mine in seconds.items() if n > 1}}

    def _by_op(self, n):
        found = defaultdict(float)
        for interval, times in zip(self.intervals[n], self.times[n]):
            for stage, seconds in zip(interval, by_stage(interval, times)):
                found[stage.op] += seconds
        return found

    def loss_rows(self, n, most):
        """A row for each kind of interval, those that lose most first.

        Intervals of the same nodes in several layers are one row. "lost" is a share of the step's time; tasks and times are those of an
        interval on average.
        """
        whole, kinds = total(self.times[n]).seconds, defaultdict(list)
        for interval, times in zip(self.intervals[n], self.times[n]):
            kinds[kind_of(interval)].append((interval, times))
        rows = [self._loss_row(kind, *zip(*some), n, whole) for kind, some in kinds.items()]
        return sorted(rows, key=lambda row: -row["lost"])[:most]

    def _loss_row(self, kind, intervals, times, n, whole):
        spent, tasks = total(times), np.concatenate([s.tasks for interval in intervals for s in interval])
        lost = shares_lost(spent, serial_seconds(intervals), n)
        lost = {name: lost[name] * spent.seconds / whole for name in LOSSES}
        return {"interval": kind, "number": len(intervals), "us": 1e6 * spent.seconds / len(intervals),
                "begin, us": 1e6 * spent.begins / len(intervals), "tasks": round(tasks.size / len(intervals)),
                "handed out": all(map(is_handed_out, intervals)),
                "task, us": 1e6 * float(np.median(tasks)) if tasks.size else None,
                "longest, us": 1e6 * float(tasks.max()) if tasks.size else None, "of the step": spent.seconds / whole,
                "lost": sum(lost.values()), "most to": max(lost, key=lost.get).replace("_", " ")}


def kind_of(interval):
    """The ops and nodes of an interval, without the numbers of layers."""
    names = {}
    for stage in interval:
        names.setdefault(stage.op, []).append(re.sub(r"-\d+(?=\.\d+$)", "", stage.name))
    return "; ".join(f"{op}: {', '.join(dict.fromkeys(mine))}" for op, mine in names.items())


def measure(model, caches, n_past, n_tokens, threads, repetitions, bandwidths):
    """The Measured of one step of n_tokens tokens after n_past others.

    bandwidths: see Bandwidths.
    """
    from pydsa.bench import random_ids, test_name
    from pydsa.executor.costs import StepSize, node_cost
    from pydsa.executor.hooks import Observer
    from pydsa.executor.plan import one_step
    from pydsa.machine.cores import physical_cores
    from tools.step_times import Parts

    runner, schedule, experts = model.runner, model.setup.schedule, {}
    ids = random_ids(model, n_past + n_tokens)
    bound = runner.bind(schedule.variant(n_past, n_tokens), caches, n_tokens, 1)

    def observe(node, arrays):
        if node.op == "moe_route":
            experts[node.args[0]] = np.unique(arrays[0]).size

    bound.run(ids[n_past:], n_past, np.empty((1, model.config.n_vocab), np.float32), (Observer(observe),))
    step = StepSize(n_tokens, n_past, model.setup.cache_row_bytes, experts)
    parts = Parts(bound, [node_cost(node, step).n_bytes for node, _, _ in bound.calls])
    with one_step():
        bound.put(ids[n_past:], n_past)
        clock = {n: parts.clock(n, repetitions) for n in threads if n <= physical_cores()}
        intervals, longer = parts.measure(threads, repetitions, bandwidths.one)
    name = test_name(n_tokens if n_tokens > 1 else 0, 1, n_past)
    return Measured(name, intervals, clock, bandwidths, longer)


def reach(model, caches, n_past, n_depth):
    """Run the tokens from n_past to n_depth, which fills the caches."""
    from pydsa.bench import random_ids

    ids, setup = random_ids(model, n_depth), model.setup
    for start in range(n_past, n_depth, setup.n_ubatch):
        ubatch = ids[start:start + setup.n_ubatch]
        bound = model.runner.bind(setup.schedule.variant(start, ubatch.size), caches, ubatch.size, 0)
        bound.run(ubatch, start, np.empty((0, model.config.n_vocab), np.float32))


def measure_steps(path, steps, threads, repetitions, gigabytes):
    """Yield the Measured of each step, a pair (n_past, n_tokens)."""
    import pydsa

    steps = sorted(steps)
    model = pydsa.load(path, device="cpu", n_ctx=max(map(sum, steps)), n_ubatch=max(512, *(n for _, n in steps)))
    measure_ceilings = model.backend.measure_ceilings
    one, here = (measure_ceilings(n).bandwidth for n in (1, model.threads))
    bandwidths = Bandwidths(one, 1e9 * gigabytes if gigabytes else max(one, here), max(one, here))
    caches, n_past = model.runner.make_caches(model.setup, model.setup.n_ctx), 0
    for depth, n_tokens in steps:
        reach(model, caches, n_past, depth)
        n_past = depth
        yield measure(model, caches, depth, n_tokens, threads, repetitions, bandwidths), bandwidths


def in_short(row):
    """The cells of a row as text: shares as per cent."""
    def text(key, value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            shares = "share", "efficiency", "lost", "of the step", "threads", "of bandwidth"
            return f"{value:.1%}" if key.startswith(shares) or key.endswith(shares) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        return "-" if value is None else str(value)
    return {key: text(key, value) for key, value in row.items()}


def report(measured, bandwidths, at, most, markdown):
    """The tables of a step as text."""
    def table(rows):
        return markdown([in_short(row) for row in rows])
    losses = "".join(f"\nWhat most time is lost to with {n} threads:\n\n{table(measured.loss_rows(n, most))}" for n in at)
    one, most, here = (bandwidth / 1e9 for bandwidth in bandwidths)
    return (f"## {measured.name}\n\nMemory: {one:.1f} GB/s for one thread, at most {most:.1f}; {here:.1f} here. "
            f"The slowest run took {measured.longer:.0%} longer than the fastest.\n\n"
            f"{table(measured.whole_rows())}\nEfficiency of each op; ms and share on one thread:\n\n{table(measured.op_rows())}{losses}")


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


def wanted_steps(n_prompt, generation, depths):
    """The steps to measure, pairs (n_past, n_tokens)."""
    steps = [(depth, n) for depth in depths for n in [p for p in n_prompt if p] + [1] * generation]
    if not steps:
        raise click.UsageError("There is no step to measure: give a prompt's length (-p), or -n.")
    return steps


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("-p", "--n-prompt", default="512", help="prompt lengths, each one step, with commas between; 0: none  [512]")
@click.option("-n", "--generation", is_flag=True, help="also a step of one token")
@click.option("-d", "--n-depth", default="0", help="tokens that are in the context already  [0]")
@click.option("--threads", default="1,2,4,8,16,32,64,128", help="numbers of threads  [1,2,4,8,16,32,64,128]")
@click.option("--at", default="16,64", help="those of them for which to list what loses most  [16,64]")
@click.option("-b", "--bandwidth", type=click.FloatRange(0, min_open=True), help="GB/s of the machine's memory  [measured here]")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=3, help="runs; of each part the median counts  [3]")
@click.option("--most", type=click.IntRange(1), default=12, help="intervals to list  [12]")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", help="form of the tables  [md]")
def main(model_path, n_prompt, generation, n_depth, threads, at, bandwidth, repetitions, most, output):
    import pydsa
    from pydsa.bench import markdown
    from pydsa.cli.shared import comma_numbers
    from pydsa.terminal import json_text

    lists = {"--n-prompt": n_prompt, "--n-depth": n_depth, "--threads": threads, "--at": at}
    n_prompt, depths, threads, at = (comma_numbers(name, text) for name, text in lists.items())
    if not all(threads):
        raise click.UsageError("--threads has the number 0, expected numbers from 1 on.")
    threads, found = sorted({1, *threads}), []
    try:
        for measured, bandwidths in measure_steps(model_path, wanted_steps(n_prompt, generation, depths), threads, repetitions, bandwidth):
            if output == "md":
                click.echo(report(measured, bandwidths, [n for n in at if n in threads], most, markdown))
            found.append({"step": measured.name, "bandwidths": bandwidths._asdict(),
                          "slowest_run_took_longer": measured.longer,
                          "whole": list(measured.whole_rows()), "ops": list(measured.op_rows()),
                          "lost": {n: measured.loss_rows(n, most) for n in at if n in threads}})
    except pydsa.PydsaError as error:
        fail(str(error))
    if output == "json":
        click.echo(json_text(found, indent=1))


if __name__ == "__main__":
    main()
