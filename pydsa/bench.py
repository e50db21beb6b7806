"""Timings of prompts and generation at several context depths.

The tests have the names and columns of llama-bench. A step can also be timed op by op. Each figure is shown beside the machine's limit:
its memory bandwidth and peak rate, measured with as many threads as the step uses.
"""
import collections
import csv
import functools
import io
import itertools
import statistics
import time

import numpy as np

from pydsa.errors import NOT_FINITE, DamagedWeightsError, PydsaError
from pydsa.executor.costs import StepSize, node_cost, step_cost, total
from pydsa.executor.hooks import Hook
from pydsa.gguf.file import Tensor
from pydsa.options import EXACT
from pydsa.quants import TYPES
from pydsa.sampling import Sampling
from pydsa.terminal import json_text, visible
from pydsa.words import count, size

SEED = 1        # of the random tokens that the tests run
NO_LIMITS = dict.fromkeys(("bytes_per_token", "bandwidth_gbs", "limit_ts", "share_of_limit"))
NO_BUS = dict.fromkeys(("streamed_bytes", "bus_gbs"))
NO_RATES = dict.fromkeys(("bytes", "operations", "gbs", "gops", "bandwidth_gbs", "peak_gops", "share_of_ceiling"))


class Bench:
    """The tests of one table.

    At each depth of n_depth, in tokens of context: each prompt length of n_prompt, then each number of generated tokens of n_gen. Every
    test runs `repetitions` times. Raises PydsaError if there are no tests.
    """

    def __init__(self, n_prompt, n_gen, n_depth, repetitions):
        self.tests = [(p, n, d) for d in n_depth for p, n in [(p, 0) for p in n_prompt if p] + [(0, n) for n in n_gen if n]]
        self.repetitions = repetitions
        if not self.tests:
            raise PydsaError("There is nothing to time: give a prompt length (--n-prompt) or a number of tokens to generate (--n-gen).")

    @property
    def n_ctx(self):
        """The context, in tokens, that the longest test needs."""
        return max(p + n + d for p, n, d in self.tests)

    def run(self, model, progress=None, ops=None):
        """Yield one row, a dict, for each test.

        Generation is timed as generate() runs it: a GPU or the last stage samples, and no logits come to the host. On the CPU the tokens
        are given.

        avg_ts and stddev_ts are tokens per second over the repetitions; one run before them is not counted. Rows of generation also have
        bytes_per_token; bandwidth_gbs, the bandwidth of the memory in 1e9 bytes per second; limit_ts, the tokens per second that use all
        of this bandwidth; and share_of_limit, avg_ts / limit_ts, which can exceed 1 if the model fits in the device's caches. These four
        are None for prompts and on the reference. But for prompts whose experts are copied to GPUs, streamed_bytes are the bytes of these
        copies, bus_gbs the rate of copies from pinned memory, and limit_ts and share_of_limit those of the bus.

        A model on several devices has two columns more, dicts by the name of the device: device_bytes, the bytes per token on each, and
        device_bandwidth_gbs. Its limit is that of devices that work one after the other, and bandwidth_gbs their mean. progress(done,
        total, test) is called before each run. ops: a list, to which the rows of ops() are added: a step of each test is then timed op by
        op, in the context that the test had.
        """
        n_runs = len(self.tests) * (self.repetitions + 1)
        session, done, ids = model.session(), 0, random_ids(model, self.n_ctx)
        for n_prompt, n_gen, n_depth in self.tests:
            ceilings = _ceilings_of(model, 1) if n_gen else None
            sampled = n_gen > 0 and (model.runner.samples or model.runner.picks > 0)
            seconds = []
            reach_depth(session, ids, n_depth)
            for i in range(self.repetitions + 1):
                if progress is not None:
                    progress(done, n_runs, test_name(n_prompt, n_gen, n_depth))
                done += 1
                session.truncate(n_depth)
                seconds.append(time_test(session, ids[n_depth:], n_prompt, n_gen, sampled))
            row = self._row(model, n_prompt, n_gen, n_depth, seconds[1:])
            if ops is not None:
                session.truncate(n_depth)
                ops.extend(self._op_rows(model, session, ids, n_prompt, n_gen))
            yield row | _limits(model, ceilings, n_gen, n_depth, row["avg_ts"]) | (
                _bus_limits(model, n_prompt, row["avg_ts"]) if n_prompt else NO_BUS)

    def _row(self, model, n_prompt, n_gen, n_depth, seconds):
        speeds = [(n_prompt + n_gen) / s for s in seconds]
        nanoseconds = [round(s * 1e9) for s in seconds]
        return about(model) | {
            "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth,
            "avg_ns": round(statistics.mean(nanoseconds)), "stddev_ns": round(_deviation(nanoseconds)),
            "avg_ts": statistics.mean(speeds), "stddev_ts": _deviation(speeds), "samples_ns": nanoseconds, "samples_ts": speeds}

    def ops(self, model, progress=None):
        """Yield one row, a dict, for each op of one step of each test.

        The step is one ubatch of a prompt, or one token. A row has the op's calls, microseconds (the best of the repetitions) and share of
        the step. It also has the least that the op reads and computes (costs.py) and the rates: gbs, 1e9 bytes per second, and gops, 1e9
        operations per second. share_of_ceiling is the time that bandwidth_gbs and peak_gops allow for that, over the measured time. It can
        exceed 1 where the bytes are intermediate values, which may be in the device's caches. All of this is None on the reference. The ops
        of one token are those of the graph; a GPU runs them in fewer launches when it generates. Of a model on several devices there is a
        row for each device that an op runs on, `device`, and the limits are those of that one.
        """
        session, ids = model.session(), random_ids(model, self.n_ctx)
        for n_prompt, n_gen, n_depth in self.tests:
            reach_depth(session, ids, n_depth)
            yield from self._op_rows(model, session, ids, n_prompt, n_gen, progress)

    def _op_rows(self, model, session, ids, n_prompt, n_gen, progress=None):
        """The rows of ops() for one test, in a session that is at its depth."""
        n_depth, n_tokens = session.n_past, min(n_prompt, model.n_ubatch) or 1
        ceilings, several = _ceilings_of(model, n_tokens), len(model.runner.on) > 1
        step_ids = ids[n_depth:n_depth + n_tokens]
        (costs, quantized), best = _op_costs(model, session, step_ids), {}     # this run is not timed
        for i in range(self.repetitions):
            if progress is not None:
                progress(i, self.repetitions, test_name(n_prompt, n_gen, n_depth))
            session.truncate(n_depth)
            for key, (calls, seconds) in _time_ops(model, session, step_ids).items():
                best[key] = calls, min(seconds, best.get(key, (0, seconds))[1])
        step_seconds = sum(seconds for _, seconds in best.values())
        for (op, device), (calls, seconds) in sorted(best.items(), key=lambda item: -item[1][1]):
            key, of_device = (op, device), {"device": device} if several else {}
            yield {"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth, "n_tokens": n_tokens, "attention": model.attention,
                   "op": op, **of_device, "calls": calls, "us": seconds * 1e6, "share": seconds / step_seconds,
                   **(_rates(ceilings[device], _product_format(model, device, op, key in quantized, n_tokens), costs[key], seconds)
                      if ceilings[device] else NO_RATES)}


def about(model):
    """The columns of a row that tell what a model is and how it is run."""
    return {"model_filename": model.metadata.path, "model_name": model.config.name, "model_arch": model.config.architecture,
            "model_type": model.setup.file_type, "model_size": model.setup.n_bytes, "model_n_params": model.setup.n_params,
            "backend": model.setup.device_name, "n_threads": model.threads, "n_threads_batch": model.threads_batch,
            "n_ubatch": model.n_ubatch, "type_k": model.kv_type, "type_index": model.index_type if model.top_k else None,
            "attention": model.attention, "reproducible": model.setup.reproducible,
            "precision": model.setup.precision, "top_k": model.top_k, "numa": model.setup.numa,
            "stages": None if model.stages is None else ",".join(map(str, model.stages))}


def _product_format(model, device, op, quantized, n_tokens):
    """The number format that an op of a step multiplies in on a device.

    A reproducible model's is that of one token.
    """
    return model.runner.backends[device].product_format(op, quantized, 1 if model.setup.reproducible else n_tokens)


def _ceilings_of(model, n_tokens):
    """{device: its ceilings} for steps of n_tokens; None for the reference's."""
    return {device: _ceilings(backend, model.runner.threads_for(n_tokens)) for device, backend in model.runner.backends.items()}


@functools.cache
def _ceilings(backend, threads):
    """The backend's measured bandwidth and peak rates; None on the reference.

    They are measured once for each number of threads.
    """
    return backend.measure_ceilings(threads)


def _limits(model, ceilings, n_gen, n_depth, speed):
    """The columns of NO_LIMITS, and those of several devices.

    ceilings: {device: its ceilings}, or None for a prompt. n_gen: the tokens that are generated, at `speed` tokens per second.
    """
    several = {"device_bytes": None, "device_bandwidth_gbs": None} if len(model.setup.placement.devices) > 1 else {}
    if not ceilings or not all(ceilings.values()):      # none in this process, of a model in stages
        return NO_LIMITS | several
    steps = [bytes_on_devices(model, n_depth + i) for i in range(n_gen)]
    n_bytes = {device: round(statistics.mean(step[device] for step in steps)) for device in ceilings}
    bandwidths = {device: found.bandwidth for device, found in ceilings.items()}
    whole = sum(n_bytes.values())
    limit = 1 / sum(n / bandwidths[device] for device, n in n_bytes.items())
    bandwidth = limit * whole if several else bandwidths[model.setup.device_name]
    if several:
        several = {"device_bytes": n_bytes, "device_bandwidth_gbs": {device: rate / 1e9 for device, rate in bandwidths.items()}}
    return {"bytes_per_token": whole, "bandwidth_gbs": bandwidth / 1e9, "limit_ts": limit, "share_of_limit": speed / limit} | several


def _bus_limits(model, n_prompt, speed):
    """The columns of a prompt of n_prompt tokens that is run at `speed`.

    limit_ts: the tokens a second if the copies of experts, one after the other, took all of the time.
    """
    streaming, n_bytes = model.setup.streaming, collections.Counter()
    for start in range(0, n_prompt, model.n_ubatch):
        n_bytes.update(streaming.n_bytes(min(model.n_ubatch, n_prompt - start)))
    rates = {name: _bus(model.runner.backends[name]) for name, n in n_bytes.items() if n}
    if not rates or not all(rates.values()):
        return NO_BUS
    total_bytes = sum(n_bytes.values())
    seconds = sum(n_bytes[name] / rate for name, rate in rates.items())
    return {"streamed_bytes": total_bytes, "bus_gbs": total_bytes / seconds / 1e9, "limit_ts": n_prompt / seconds,
            "share_of_limit": speed * seconds / n_prompt}


@functools.cache
def _bus(backend):
    """Bytes a second from pinned memory to a device; None if not measured."""
    rates = backend.measure_bus()
    return rates and rates.pinned


def bytes_per_token(model, n_past):
    """Bytes of weights and caches that decoding one token at n_past reads."""
    return sum(bytes_on_devices(model, n_past).values())


def bytes_on_devices(model, n_past):
    """{device: bytes} of what decoding one token at n_past reads there."""
    setup = model.setup
    found = dict.fromkeys(setup.placement.devices, 0)
    layout = setup.layouts[setup.schedule.variant(n_past, 1)]
    for name in found:
        nodes = [node for device, nodes in layout.segments if device == name for _, node in nodes]
        cost = step_cost(nodes, StepSize(1, n_past, setup.cache_row_bytes))
        found[name] = cost.weights + cost.cache
    return found


def _rates(ceilings, kind, cost, seconds):
    """The columns of NO_RATES for an op of this cost and time in seconds.

    kind: the key of ceilings.peaks whose peak rate applies to the op.
    """
    peak = ceilings.peaks[kind]
    shortest = max(cost.n_bytes / ceilings.bandwidth, cost.operations / peak)
    return {"bytes": cost.n_bytes, "operations": cost.operations, "gbs": cost.n_bytes / seconds / 1e9,
            "gops": cost.operations / seconds / 1e9, "bandwidth_gbs": ceilings.bandwidth / 1e9, "peak_gops": peak / 1e9,
            "share_of_ceiling": shortest / seconds}


def test_name(n_prompt, n_gen, n_depth):
    """The name of a test as in llama-bench: pp512, tg128 @ d4096."""
    return (f"pp{n_prompt}" if n_prompt else f"tg{n_gen}") + (f" @ d{n_depth}" if n_depth else "")


def random_ids(model, n):
    """n random token ids, the same in every run."""
    return np.random.default_rng(SEED).integers(0, model.config.n_vocab, n)


def reach_depth(session, ids, n_depth):
    """Bring the session to a context of exactly the first n_depth ids."""
    session.truncate(min(session.n_past, n_depth))
    if session.n_past < n_depth:
        session.prefill(ids[session.n_past:n_depth])


def time_test(session, ids, n_prompt, n_gen, sampled=False):
    """Seconds for a prompt of n_prompt tokens, then n_gen single tokens.

    session: a Session, or what has its prefill() and decode(), which may return None. sampled: whether the device samples single tokens,
    as it does for generate(): it then takes its own, and hands out no logits. Raises DamagedWeightsError if the last logits are not
    finite.
    """
    start, logits = time.perf_counter(), None
    if n_prompt:
        logits = session.prefill(ids[:n_prompt])
    if sampled:
        _generate(session, ids[n_prompt:], n_gen)
    else:
        for token in ids[n_prompt:n_prompt + n_gen]:
            logits = session.decode(token)
    seconds = time.perf_counter() - start
    if logits is not None:
        _check_finite(logits)
    return seconds


def _check_finite(logits):
    if not np.isfinite(logits).all():
        raise DamagedWeightsError(NOT_FINITE)


def _generate(session, ids, n):
    """Append n tokens: the first of ids, then the likeliest. After one that ends a turn, the next of ids."""
    end = session.n_past + n
    for first in itertools.cycle(ids):
        if session.n_past == end:
            return
        logits = np.zeros(session.setup.config.n_vocab, np.float32)
        logits[first] = 1       # sample() begins with this token
        collections.deque(session.sample(logits, end - session.n_past + 1, Sampling(temperature=0.0)), maxlen=0)


def _devices_of_nodes(model, n_tokens):
    """{id of a node: the name of its device}, in steps of n_tokens tokens."""
    streaming = model.runner.streaming
    layouts = streaming.layouts if streaming.takes(n_tokens) else model.runner.layouts
    return {id(node): segment.device for layout in layouts.values() for segment in layout.segments for _, node in segment.nodes}


class _Ran(Hook):
    """The nodes that run, and the number of experts that each chooses."""
    all_rows = False

    def __init__(self):
        self.nodes, self.experts = [], {}

    def wants(self, node):
        return True

    def after(self, call):
        self.nodes.append(call.node)
        if call.node.op == "moe_route":
            self.experts[call.node.args[0]] = np.unique(call.read(0)).size


def _op_costs(model, session, ids):
    """{(op, device): Cost} of one step, and those with quantized weights.

    The step is run, to count the experts that its tokens choose.
    """
    ran, before = _Ran(), session.hooks
    step = StepSize(len(ids), session.n_past, model.setup.cache_row_bytes, ran.experts)
    session.hooks = *before, ran
    try:
        _check_finite(session.prefill(ids))
    finally:
        session.hooks = before
    costs, quantized, devices = {}, set(), _devices_of_nodes(model, len(ids))
    for node in ran.nodes:
        key = node.op, devices[id(node)]
        costs.setdefault(key, []).append(node_cost(node, step))
        if any(isinstance(a, Tensor) and TYPES[a.type].quantized for a in node.args):
            quantized.add(key)
    return {key: total(parts) for key, parts in costs.items()}, quantized


def _time_ops(model, session, ids):
    """{(op, device): (calls, seconds)} of one step."""
    times, devices = {}, _devices_of_nodes(model, len(ids))
    for node, seconds in session.timed(ids):
        key = node.op, devices[id(node)]
        calls, before = times.get(key, (0, 0.0))
        times[key] = calls + 1, before + seconds
    return times


def _deviation(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def format_rows(rows, form):
    """Rows, dicts with the same keys, as text.

    form: "md" for a readable markdown table; "csv", "json" or "jsonl" for every column.
    """
    if form == "json":
        return json_text(rows, indent=1) + "\n"
    if form == "jsonl":
        return "".join(json_text(row) + "\n" for row in rows)
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return visible(out.getvalue(), keep="\n")
    return visible(markdown([_display_row(row) for row in rows]), keep="\n")


def _display_row(row):
    """A row of the markdown table, as strings, with shortened numbers.

    A timing has the columns of llama-bench and the limit, an op its rates; any other row keeps its columns.
    """
    if "share_of_ceiling" in row:
        labels = {"n_tokens": "tokens", "gbs": "GB/s", "gops": "GOP/s", "share_of_ceiling": "of ceiling"}
        hidden = ("n_prompt", "n_gen", "n_depth", "bytes", "operations", "bandwidth_gbs", "peak_gops")
        test = {"test": test_name(row["n_prompt"], row["n_gen"], row["n_depth"])}
        return test | {labels.get(key, key): _short(value) for key, value in row.items() if key not in hidden}
    if "avg_ts" not in row:
        return {key: _short(value) for key, value in row.items()}
    # of several devices in the order of "backend"
    n_bytes = row["bytes_per_token"] and row.get("device_bytes", {"": row["bytes_per_token"]}).values()
    megabytes = " + ".join(_short(n / 1e6) for n in n_bytes) if n_bytes else "-"
    share, threads = row["share_of_limit"], {"threads": _short(row["n_threads"])}
    if row["n_threads_batch"] != row["n_threads"]:      # the same in all rows of a table
        threads["threads batch"] = _short(row["n_threads_batch"])
    if row.get("numa"):
        threads["numa"] = row["numa"]
    return {"model": f"{row['model_arch']} {row['model_type']}", "size": size(row["model_size"]),
            "params": count(row["model_n_params"]), "backend": row["backend"] + (", exact" if row["precision"] == EXACT else ""),
            **({"stages": row["stages"]} if row.get("stages") else {}), **threads,
            "kv": row["type_k"], "index": row["type_index"] or "",
            "attention": row["attention"] + (", reproducible" if row["reproducible"] else ""),
            "test": test_name(row["n_prompt"], row["n_gen"], row["n_depth"]),
            "t/s": f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}", "MB/token": megabytes, "limit t/s": _short(row["limit_ts"]),
            "share": "-" if share is None else f"{share:.0%}"}


def _short(value):
    """A value of a row as text; "-" for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def markdown(rows):
    """A markdown table of rows, dicts of strings with the same keys.

    Columns of numbers are aligned to the right.
    """
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table
    table = Table(box=MARKDOWN)
    for name in rows[0] if rows else []:
        number = all(row[name][:1].isdigit() or row[name] == "-" for row in rows)
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()) + "\n"
