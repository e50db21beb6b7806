"""What a model in stages needs and gives on nodes that need not be there.

That is bytes on each node and on the wire, and the tokens a second that bandwidths allow: reads over bandwidth, and steps that wait for
rows. tools/simulate_stages.py compares it with a simulation.
"""
import math
from typing import NamedTuple

from pydsa.backends.devices import device_of
from pydsa.options import choose
from pydsa.stages.division import Parts
from pydsa.stages.times import CHUNK, PROMPT, Ops
from pydsa.stages.wire import WIRES
from pydsa.words import size

STEP, PART, OUTPUT, ID = 52, 12, 4, 4       # bytes of a step's frame (wire.py): at its begin, for each conversation, output and token
RESULT, PICKED = 40, 20     # of a result's frame, and of each sampled id with its logits' extremes


class Link(NamedTuple):
    """The network between nodes.

    bandwidth: bytes a second, from each node and to each node. latency: seconds until what was sent is used, beside the bytes' own time.
    """
    bandwidth: float
    latency: float

    def seconds(self, n_bytes):
        """The time from sending to use."""
        return self.latency + n_bytes / self.bandwidth


class Wire(NamedTuple):
    """Bytes that pass between stages. row: of one token's hidden values."""
    row: int

    def step(self, n_tokens, n_parts=1, n_outputs=1, first=False):
        """Bytes of a step's frame; first: from the driver, ids alone."""
        return STEP + PART * n_parts + OUTPUT * n_outputs + n_tokens * (ID if first else ID + self.row)

    def result(self, n_outputs=1):
        """Bytes of a result with sampled ids."""
        return RESULT + PICKED * n_outputs


def wire_of(setup, wire="f32"):
    """The Wire of a model with hidden rows of a type of WIRES."""
    own = device_of(setup.placement.devices[0]).float_size
    return Wire(setup.config.n_embd * (2 if choose("wire", wire, WIRES) == "bf16" else own))


class Times:
    """The seconds of steps in each stage of a model.

    ranges: its Layers; nodes: the division.Node of each. An op takes the time to read its bytes, or to do its products, whichever is
    longer; in a step of one token, to read. Experts are taken to be chosen evenly.
    """

    def __init__(self, setup, ranges, nodes):
        self._setup, self._ranges, self._nodes = setup, ranges, nodes

    def generation(self, n_past, n_streams=1):
        """Seconds of each stage for a token of each of n_streams conversations."""
        return self._seconds(Ops(self._setup, 1, n_past, n_streams), n_streams > 1, n_streams)

    def prompt(self, n_tokens, n_past):
        """Seconds of each stage for n_tokens tokens of one prompt."""
        return self._seconds(Ops(self._setup, n_tokens, n_past, n_tokens), n_tokens > 1)

    def reads(self, n_past, n_streams=1):
        """Bytes that each stage reads for a token of n_streams conversations."""
        ops = Ops(self._setup, 1, n_past, n_streams)
        return [float((ops.weights + n_streams * ops.caches)[mine].sum()) for mine in self._in_stages(ops)]

    def _seconds(self, ops, *args):
        return [float(ops.seconds(node, *args)[mine].sum()) for mine, node in zip(self._in_stages(ops), self._nodes)]

    def _in_stages(self, ops):
        return [(first <= ops.layers) & (ops.layers < stop) for first, stop in self._ranges]


def depth_of(n_stages):
    """The number of chunks of a prompt that are under way at once."""
    return n_stages + 1 if n_stages > 1 else 1


class Groups(NamedTuple):
    """How conversations that generate at the same time share steps.

    There are as many steps under way as stages. streams: conversations; each: those of a step; steps: under way.
    """
    streams: int
    each: int
    steps: int

    @classmethod
    def of(cls, n_streams, n_stages):
        """Those of a number of conversations, over stages."""
        each = math.ceil(n_streams / n_stages)
        return cls(n_streams, each, math.ceil(n_streams / each))


def chunks(n_tokens, n_past=0, most=CHUNK):
    """The steps of a prompt: pairs of tokens, and those before them."""
    return [(min(most, n_tokens - start), n_past + start) for start in range(0, n_tokens, most)]


def one_stream(seconds, link, wire):
    """Seconds from token to token of one conversation.

    seconds: of each stage. The first has the head: rows go on to it from the last, and it starts the next step itself.
    """
    n = len(seconds)
    return sum(seconds) + (n * link.seconds(wire.step(1)) if n > 1 else 0)


def in_turn(seconds, link, wire, n_steps, n_each=1):
    """Seconds between results of n_steps steps that are under way at once.

    Each is of n_each conversations, whose next tokens the first stage starts. Whichever is longest: the slowest stage, the rows on the
    wire, or the way of a step around, by the number of steps.
    """
    n = len(seconds)
    if n == 1:
        return seconds[0]
    frame = wire.step(n_each, n_each, n_each)
    way = sum(seconds) + n * link.seconds(frame)
    return max(*seconds, frame / link.bandwidth, way / n_steps)


def prompt_seconds(times, link, wire, steps, depth):
    """Seconds until the driver has the first token after a prompt.

    times(n_tokens, n_past): the seconds of each stage for a step. steps: those of chunks(). depth: how many may be under way at once; the
    next is sent when the result of the one that many before is there. A node sends one chunk's rows after the other's. The last chunk's
    result goes by way of the first stage, which has the head.
    """
    results, free, sent = [], None, None
    for i, (n, n_past) in enumerate(steps):
        seconds = times(n, n_past)
        stages = len(seconds)
        free, sent = free or [0.0] * stages, sent or [0.0] * stages
        here = (results[i - depth] if i >= depth else 0.0) + (link.seconds(wire.step(n, first=True)) if stages > 1 else 0)
        ends = i == len(steps) - 1
        for stage in range(stages):
            free[stage] = max(here, free[stage]) + seconds[stage]
            rows = wire.step(n) if stage < stages - 1 else wire.step(1) if ends else wire.result(0)
            if stages > 1:
                sent[stage] = max(sent[stage], free[stage]) + rows / link.bandwidth
            here = sent[stage] + link.latency if stages > 1 else free[stage]
        results.append(here + (link.seconds(wire.result()) if ends and stages > 1 else 0))
    return results[-1]


def forecast(setup, ranges, nodes, link, wire="f32", n_streams=None, assumed=()):
    """What a model in stages takes and gives, as a dict of JSON types.

    ranges: division.Layers of each stage; nodes: the division.Node of each. wire: a type of WIRES. n_streams: conversations with caches of
    their own; None: as many as stages, which fill them. assumed: names of options that were not given. Sizes are bytes, times seconds;
    generation is at the end of the context.
    """
    n, rows, times, chunk = len(ranges), wire_of(setup, wire), Times(setup, ranges, nodes), min(CHUNK, setup.n_ubatch)
    groups = Groups.of(n_streams or n, n)
    parts, n_past, n_prompt = Parts(setup, groups.streams), setup.n_ctx - 1, min(PROMPT, setup.n_ctx)
    shares = [parts.share(*pair) for pair in zip(ranges, nodes)]
    one, reads = one_stream([share.seconds for share in shares], link, rows), sum(share.seconds for share in shares)
    each = [share.seconds for share in shares] if groups.each == 1 else times.generation(n_past, groups.each)
    between = one if groups.streams == 1 else in_turn(each, link, rows, groups.steps, groups.each)
    first = prompt_seconds(times.prompt, link, rows, chunks(n_prompt, most=chunk), depth_of(n))
    return {
        "options": f"--stages {','.join(map(str, ranges))}",
        "stages": [{"layers": str(share.layers), "node": share.node.name, "memory": share.node.memory, "bandwidth": share.node.bandwidth,
                    "rate": share.node.rate, "weights": share.weights, "caches": share.caches, "scratch": share.scratch,
                    "free": share.free, "token_bytes": share.token, "token_seconds": share.seconds} for share in shares],
        "wire": {"type": wire, "row_bytes": rows.row, "token_bytes": rows.step(1) if n > 1 else 0,
                 "result_bytes": rows.result() if n > 1 else 0,
                 "logits_bytes": 4 * setup.config.n_vocab if n > 1 else 0, "bandwidth": link.bandwidth, "latency": link.latency},
        "one": {"ts": 1 / one, "seconds": one, "wire_seconds": one - reads},
        "many": {"streams": groups.streams, "steps": groups.steps, "ts": groups.streams / groups.steps / between,
                 "step_seconds": between},
        "prompt": {"tokens": n_prompt, "chunk": min(chunk, n_prompt), "seconds": first, "ts": n_prompt / first}, "assumed": list(assumed)}


def in_words(found):
    """The lines of a forecast()."""
    yield from _table(found["stages"])
    yield f"as {found['options']}"
    wire, one, many, prompt = (found[key] for key in ("wire", "one", "many", "prompt"))
    wires = len(found["stages"]) > 1
    if wires:
        yield (f"on the wire: {size(wire['token_bytes'])} a token from stage to stage and back to the first ({wire['type']} rows), "
               f"{wire['result_bytes']} B to the driver ({size(wire['logits_bytes'])} more where logits are asked for)")
        yield f"the link: {wire['bandwidth'] / 1e9:g} GB/s and {1e6 * wire['latency']:g} us" + _assumed(found, "link", "latency")
    ways = [f"{1e3 * (one['seconds'] - one['wire_seconds']):.3g} ms of reads",
            *([f"{1e3 * one['wire_seconds']:.3g} ms on the wire"] * wires)]
    yield (f"one conversation: at most {one['ts']:.3g} tokens a second at the end of the context, {' and '.join(ways)} for each"
           + _assumed(found, "bandwidth"))
    if many["streams"] > 1:
        under_way = f", {many['steps']} steps under way" if wires else ""
        yield f"{many['streams']} conversations{under_way}: at most {many['ts']:.3g} tokens a second in all"
    rates = " to ".join(f"{rate / 1e9:g}" for rate in sorted({pick(stage["rate"] for stage in found["stages"]) for pick in (min, max)}))
    yield (f"a prompt of {prompt['tokens']} tokens in chunks of {prompt['chunk']}: at most {prompt['ts']:.3g} tokens a second, the first "
           f"after {prompt['seconds']:.3g} s; products at {rates} GOP/s a node" + _assumed(found, "gops"))


def _assumed(found, *options):
    """A remark on values that were not given."""
    names = [f"--{option}" for option in options if option in found["assumed"]]
    return f" (assumed: {' and '.join(names)} give{'s' * (len(names) == 1)} others)" if names else ""


def _table(stages):
    """The lines of a table of a forecast's stages."""
    rows = [("node", "", "layers", "weights", "caches", "scratch", "free", "a token reads", "in")]
    for stage in stages:
        free = stage["free"]
        left = "?" if free is None else size(free) if free >= 0 else f"lacks {size(-free)}"
        of_memory = "" if stage["memory"] is None else f"{size(stage['memory'])}, "
        rows.append((stage["node"], f"{of_memory}{stage['bandwidth'] / 1e9:g} GB/s", stage["layers"],
                     *(size(stage[key]) for key in ("weights", "caches", "scratch")), left,
                     size(stage["token_bytes"]), f"{1e3 * stage['token_seconds']:.3g} ms"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ("  ".join([*(cell.ljust(n) for cell, n in zip(row[:2], widths)), *(cell.rjust(n) for cell, n in zip(row[2:], widths[2:]))])
            for row in rows)
