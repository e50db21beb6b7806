"""The place of each value of a graph in memory: values that are not live at the same time share it."""
import math
from typing import NamedTuple

from pydsa.executor.graph import Value
from pydsa.gguf.file import Tensor

ALIGN = 64      # bytes: a cache line, and the widest vector register


class Layout(NamedTuple):
    """The place of each value of a graph in the buffer.

    Offsets and sizes are bytes, for a step of up to max_tokens tokens. They are the same on all devices, each of which has a buffer.
    """
    graph: object
    segments: list      # of segments.Segment
    max_tokens: int
    float_size: int
    offsets: dict       # root Value -> offset
    ends: dict          # device -> bytes of its buffer
    of_one: dict = None     # the same as offsets for a step of one token, where that has places of its own
    streamed: frozenset = frozenset()       # names of weights that are copied to the device of their node for the step

    @property
    def output_device(self):
        """The device that computes the logits."""
        return next(device for device, nodes in reversed(self.segments) for _, node in nodes if node.args[0] is self.graph.output.root)

    @property
    def nodes(self):
        """(time, Node) of all segments."""
        return [pair for segment in self.segments for pair in segment.nodes]

    @property
    def arrivals(self):
        """(device, Node, Tensor) of each weight that is copied for a step.

        They are in the order of their use.
        """
        return [(device, node, a) for device, nodes in self.segments for _, node in nodes
                for a in node.args if isinstance(a, Tensor) and a.name in self.streamed]

    @property
    def n_bytes(self):
        """Bytes of all devices' buffers."""
        return sum(self.ends.values())


def row_bytes(value, float_size):
    """Bytes of a row of a Value, with floats of float_size bytes."""
    return math.prod(value.tail) * {"float": float_size, "int32": 4, "int64": 8}[value.dtype]


def _values(node):
    """The root Values of a node that lie in the buffer."""
    return [a.root for a in node.args if isinstance(a, Value) and a.root.rows == "tokens"]


def lay_out(graph, segments, max_tokens, float_size=4, apart=0):
    """The Layout of a graph, cut into segments, for steps of up to max_tokens.

    Values that are not live at the same time share memory: first fit, in the order of their first use. float_size: bytes, of the device
    with the widest ones. apart: in steps of one token the memory of a value is used again so many ops later only, so that ops can be done
    in another order; 0: such steps are as others.
    """
    offsets, ends = _places(graph, segments, max_tokens, float_size, 0)
    if apart == 0:
        return Layout(graph, segments, max_tokens, float_size, offsets, ends)
    of_one, others = _places(graph, segments, 1, float_size, apart)
    ends = {device: max(end, others[device]) for device, end in ends.items()}
    return Layout(graph, segments, max_tokens, float_size, offsets, ends, of_one)


def _places(graph, segments, max_tokens, float_size, apart):
    """The offsets of values, and the bytes of each device's buffer."""
    inputs, last = (graph.input, graph.positions), segments[-1].nodes[-1][0]
    born, dies, there = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, last + 1), {}
    for device, nodes in segments:
        mine = there.setdefault(device, set(inputs))
        for time, node in nodes:
            for value in _values(node):
                born.setdefault(value, time)
                dies[value] = max(time, dies.get(value, 0))
                mine.add(value)
    offsets, live, sizes = {}, [], {}        # live: (offset, end, dies)
    for value in sorted(born, key=born.get):
        live = [space for space in live if space[2] + apart >= born[value]]
        size = sizes[value] = -(-max_tokens * row_bytes(value, float_size) // ALIGN) * ALIGN
        offset = 0
        for start, end, _ in sorted(live):
            if start - offset >= size:
                break
            offset = max(offset, end)
        offsets[value] = offset
        live.append((offset, offset + size, dies[value]))
    return offsets, {device: max(offsets[value] + sizes[value] for value in mine) for device, mine in there.items()}
