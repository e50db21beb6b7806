"""A placed graph as segments: runs of nodes on one device, and what crosses between them.

A segment is launched when what it needs has arrived. Those of a GPU run by themselves: the CPU works on its own segment meanwhile.
"""
import bisect
import itertools
from typing import NamedTuple

from pydsa.executor.graph import Value, levels_of, waits


class Segment(NamedTuple):
    """Nodes of one device that run without waiting for another."""
    device: str
    nodes: list         # (time, Node) in the order they run; those of equal times may run at the same time


def cut(nodes, devices, side_by_side=(), before=None, streamed=()):
    """The Segments of a graph, in the order that they are launched.

    before: waits(nodes), where it is known. devices: the name of each node's device. side_by_side: the names of the devices that run nodes
    of equal times at the same time; others run one after the other, in the order of the graph. Times ascend from segment to segment.
    streamed: for each node whether its weights are copied to the device for the step; such nodes have segments of their own, which wait for
    the weights.

    A node's wave is the number of changes of the place on the way to it: a segment has the nodes of a place and a wave. First come those
    that others wait for: the rest, such as the shared expert, runs while another device works on what was handed over.
    """
    before, order = before or waits(nodes), {name: i for i, name in enumerate(dict.fromkeys(devices))}
    places = list(zip(devices, [alone and i + 1 for i, alone in enumerate(streamed or [False] * len(nodes))]))
    wave, urgent = [0] * len(nodes), [False] * len(nodes)
    for i, others in enumerate(before):
        wave[i] = max((wave[j] + (places[j] != places[i]) for j in others), default=0)
    for i in reversed(range(len(nodes))):
        for j in before[i]:
            urgent[j] |= places[j] != places[i] or wave[j] == wave[i] and urgent[i]
    groups = {}
    for i in range(len(nodes)):
        # the devices that work while others are waited for come first, and those that hold up the caller last
        key = wave[i], devices[i] in side_by_side, order[devices[i]], places[i][1], not urgent[i]
        groups.setdefault(key, []).append(i)
    level, time, segments = levels_of(before), -1, []
    for key in sorted(groups):
        device, members, last = devices[groups[key][0]], groups[key], None
        if device in side_by_side:
            members = sorted(members, key=level.__getitem__)
        timed = []
        for i in members:
            if device not in side_by_side or level[i] != last:
                time, last = time + 1, level[i]
            timed.append((time, nodes[i]))
        segments.append(Segment(device, timed))
    return segments


class Crossing(NamedTuple):
    """A value that one segment makes and another, on another device, needs.

    source, target: the indices of the segments. only_outputs: whether the rows whose logits are wanted are all that is needed.
    """
    value: Value
    source: int
    target: int
    only_outputs: bool


def crossings(segments, inputs):
    """The Crossings of segments: each value goes once to each device.

    inputs: the values that are on all devices before a step.
    """
    there, made_in, found = {}, {}, []     # root Value -> {device: whether only its last rows are there}; -> the segment that wrote it last
    for at, (device, nodes) in enumerate(segments):
        for _, node in nodes:
            for i, a in enumerate(node.args):
                if not isinstance(a, Value) or a.root in inputs or a.root not in there:
                    continue
                if i in node.writes and a.base is None and not any(a is b for b in node.args[node.n_out:]):
                    continue        # it is written as a whole
                only_outputs = a.rows == "outputs" != a.root.rows
                has = there[a.root].get(device)
                if has is None or has and not only_outputs:
                    found.append(Crossing(a.root, made_in[a.root], at, only_outputs))
                    there[a.root][device] = only_outputs
            for i in node.writes:
                if isinstance(node.args[i], Value):
                    root = node.args[i].root
                    there[root], made_in[root] = {device: False}, at
    return found


def settled_before(segments, found):
    """For each Crossing, the first segment that may overwrite what it reads.

    That is one of its source's device, or one from which something comes to that device; None: there is none. What its target sends back
    comes behind the copy anyway.
    """
    sent = [set() for _ in segments]        # the devices that get something from a segment
    for crossing in found:
        sent[crossing.source].add(segments[crossing.target].device)
    settled = []
    for crossing in found:
        source, target = segments[crossing.source].device, segments[crossing.target].device
        settled.append(next((i for i in range(crossing.target + 1, len(segments)) if segments[i].device == source
                             or source in sent[i] and segments[i].device != target), None))
    return settled


class Part(NamedTuple):
    """A segment of a bound step: calls first to last, and its transfers.

    Those that depart start behind the segment; those that arrive are finished before it (backends/transfers.py). What was read by those of
    `settled`, which went to earlier segments, may be overwritten from the segment on. weights: the streaming.Delivery of each weight that
    is copied to the device for the segment.
    """
    backend: object
    first: int
    last: int
    arrivals: list
    departures: list
    settled: list
    weights: list


def in_turn(parts, run):
    """Call run(i), which runs the i-th Part, for each, when it may start."""
    weights = [delivery for part in parts for delivery in part.weights]
    try:
        for delivery in weights:
            if delivery.first:
                delivery.start()
        for i, part in enumerate(parts):
            for transfer in part.settled:
                transfer.settle()
            for transfer in part.arrivals:
                transfer.finish()
            for delivery in part.weights:
                delivery.finish()
            run(i)
            for delivery in part.weights:
                delivery.settle()
            for transfer in part.departures:
                transfer.start()
    except BaseException:       # a copy that is still under way would write to memory that the next step uses
        for delivery in weights:
            delivery.abandon()
        for transfer in _all_of(parts):
            transfer.finish()
        raise
    finally:
        for transfer in _all_of(parts):
            transfer.settle()


def _all_of(parts):
    return itertools.chain.from_iterable(part.departures for part in parts)


class Chain:
    """The recordings of a step's segments, one after the other."""

    def __init__(self, parts, recordings):
        self._parts, self._recordings, self._firsts = parts, recordings, [part.first for part in parts]

    def run(self, before=None, after=None):
        """Run the step; before, after: {i: function} of the i-th call."""
        if not before and not after:
            in_turn(self._parts, lambda i: self._recordings[i].run())
            return
        stops = list(zip(self._by_part(before or {}), self._by_part(after or {})))
        in_turn(self._parts, lambda i: self._recordings[i].run(*stops[i]))

    def _by_part(self, stops):
        """For each part, the functions at its calls, which it counts from 0."""
        found = [{} for _ in self._parts]
        for i, function in stops.items():
            part = bisect.bisect(self._firsts, i) - 1
            found[part][i - self._firsts[part]] = function
        return found
