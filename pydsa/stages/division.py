"""Which layers a stage has: texts of --stages, and the division of a model.

The division is by bytes and bandwidth. Nothing is read of the weights: all figures come from a Setup of the whole model.
"""
import collections
import re
from typing import NamedTuple

import numpy as np

from pydsa.backends.devices import device_of
from pydsa.errors import LESS, OutOfMemoryError, PydsaError
from pydsa.executor.costs import StepSize, step_cost
from pydsa.executor.placement import home_layer
from pydsa.executor.streaming import ASSUMED, REACHED
from pydsa.gguf.file import Tensor
from pydsa.models.blocks import spans
from pydsa.stages.times import of_a_chunk
from pydsa.words import size

AUTO = "auto"
EXPECTED = f"a number of stages such as 2, {AUTO!r}, or ranges of layers such as '0-20,21-40,41-60'"
MOST = 1024         # stages; files have no more layers
EVEN = 1e-6         # weight of an even division, among those of equal time
WHOLE = 2.0**40     # what makes whole numbers of costs


class Layers(NamedTuple):
    """The layers of a stage, from first up to stop, which is not among them."""
    first: int
    stop: int

    def __str__(self):
        return f"{self.first}-{self.stop - 1}" if self.stop - self.first > 1 else str(self.first)

    @property
    def words(self):
        """The layers in words: "layers 0-20"."""
        return f"layer{'s' * (self.stop - self.first > 1)} {self}"


class Node(NamedTuple):
    """A machine for one stage.

    bandwidth: bytes a second that its device reads of its memory. memory: bytes that are free there; None: not known, and not checked.
    rate: operations of products that it does in a second in steps of many tokens; a multiply-add is two. layers: those whose tensors are in
    the parts of the file that it has; None: all.
    """
    name: str
    bandwidth: float
    memory: int | None = None
    rate: float = REACHED * ASSUMED.peak
    layers: frozenset | None = None

    def lacks(self, layers):
        """Whether it has not the tensors of all layers of a range."""
        return self.layers is not None and not self.layers.issuperset(range(*layers))


class Share(NamedTuple):
    """What a stage takes of its node, in bytes.

    weights: as stored, and copies of vectors. caches: of all conversations, with full contexts. scratch: intermediate values of a ubatch,
    rows of scores and the like, at most, and what the device's driver takes. token: what one token reads, weights and caches.
    """
    layers: Layers
    node: Node
    weights: int
    caches: int
    scratch: int
    token: int

    @property
    def total(self):
        """Bytes of memory."""
        return self.weights + self.caches + self.scratch

    @property
    def free(self):
        """Bytes that are left on the node, below 0 where some lack; None: not known."""
        return None if self.node.memory is None else self.node.memory - self.total

    @property
    def seconds(self):
        """The time in which the node reads what a token needs."""
        return self.token / self.node.bandwidth


def parse(stages):
    """A value of --stages: AUTO, a number, or a tuple of Layers.

    stages: an integer or a text. It is not compared with a model yet: check() does. Raises PydsaError for what is none.
    """
    if isinstance(stages, (int, np.integer)) and not isinstance(stages, bool):
        stages = str(stages)
    text = re.sub(r"\s+", "", stages).lower() if isinstance(stages, str) else None
    if text == AUTO:
        return AUTO
    if text and re.fullmatch(r"[0-9]{1,9}", text):
        if not 1 <= int(text) <= MOST:
            raise PydsaError(f"stages is {stages!r}, expected 1 to {MOST} of them; a stage of the layer {text} alone is {text}-{text}.")
        return int(text)
    parts = [re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part) for part in (text or "").split(",")]
    if not all(parts):
        raise PydsaError(f"stages is {stages!r}, expected {EXPECTED}.")
    found = tuple(Layers(int(part[1]), int(part[2] or part[1]) + 1) for part in parts)
    backwards = next((part[0] for part, one in zip(parts, found) if one.first >= one.stop), None)
    if backwards is not None:
        raise PydsaError(f"stages has {backwards}, expected a range whose first layer is not above its last.")
    return found


def borders(config):
    """The layers at which a stage may begin, 0 among them.

    They are those of begins_a_stage(), at once.
    """
    indexed = config.indexed_layers
    return [il for il in range(config.n_layer) if indexed is None or indexed[il] == il]


def check_number(n, config):
    """Raise PydsaError if a model has too few layers for n stages."""
    most = len(borders(config))
    if n > most:
        raise PydsaError(f"There are {n} stages, expected at most {most}: so many layers of the model can begin one.")


def check(ranges, config):
    """Raise PydsaError if a tuple of Layers cannot be the stages of a model.

    They have all of its layers once, in order, and begin at borders().
    """
    at = 0
    for i, layers in enumerate(ranges):
        if layers.first != at:
            after = f" after {ranges[i - 1]}" if i else ""
            raise PydsaError(f"stages has {layers}{after}, expected a range that begins with layer {at}: stages have all layers, once "
                             "each, in order.")
        at = layers.stop
    if at != config.n_layer:
        raise PydsaError(f"stages ends with layer {at - 1}, expected {config.n_layer - 1}, the model's last.")
    allowed = borders(config)
    for i, layers in enumerate(ranges):
        if layers.first not in allowed:
            below, above = max(il for il in allowed if il < layers.first), [il for il in allowed if il > layers.first]
            raise PydsaError(f"stage {i + 1} begins with layer {layers.first}, which uses the keys that layer {below} chooses: expected "
                             f"one that begins with layer {' or '.join(map(str, [below, *above[:1]]))}.")


def divided(stages, setup, nodes, **options):
    """The stages of a model on nodes, a tuple of Layers: those that are asked for.

    stages: a value of parse(). A number must be that of the nodes. options: those of divide(), which chooses them if no ranges are given.
    """
    if stages == AUTO or isinstance(stages, int):
        if stages not in (AUTO, len(nodes)):
            raise PydsaError(f"There are {len(nodes)} nodes for {stages} stages, expected one for each.")
        return divide(setup, nodes, **options)
    check(stages, setup.config)
    if len(stages) != len(nodes):
        raise PydsaError(f"There are {len(nodes)} nodes for the stages {','.join(map(str, stages))}, expected one for each.")
    return stages


def divide(setup, nodes, n_sessions=1, n_past=None, mapped=True, head=0):
    """The division of a model over nodes whose slowest stage takes least time.

    There are two times: that in which a node reads what a token needs after n_past others (None: at the end of the context), and that of a
    chunk of a prompt, with its products. Each is compared with the least that any division has; the sum of both is the least. Of such
    divisions it is one in which they take least time in all, and then an even one. nodes: one for each stage, in this order. Each stage
    fits its node's memory, with the caches of n_sessions conversations. mapped: whether weights that lie in the mapped file must fit too;
    else they may be read from the drive. head: the layer beside which the head is, 0 or -1. Returns a tuple of Layers. Raises
    OutOfMemoryError if nothing fits, PydsaError if there are too few layers.
    """
    return Parts(setup, n_sessions, n_past, mapped, head).divide(nodes)


def fewest(setup, node, n_sessions=None):
    """The least number of stages that fit nodes that are all like one.

    n_sessions: as for divide(); None: as many as stages. Raises OutOfMemoryError if even a stage for each border is too large.
    """
    most = len(borders(setup.config))
    for n in range(1, most + 1):
        try:
            divide(setup, [node] * n, n_sessions or n)
            return n
        except OutOfMemoryError:
            if n == most:
                raise


class Parts:
    """What ranges of a model's layers take and read.

    setup: of the whole model, in ubatches as the stages run them. The other arguments are those of divide(). Arrays are [n_layer] bytes.
    """

    def __init__(self, setup, n_sessions=1, n_past=None, mapped=True, head=0):
        self.setup, self.n_sessions, n_layer = setup, n_sessions, setup.config.n_layer
        self.borders = borders(setup.config)
        users = collections.defaultdict(set)        # name of a weight -> layers
        tensors = {}
        for graph in setup.graphs.values():
            for node in graph.nodes:
                for a in node.args:
                    if isinstance(a, Tensor):
                        users[a.name].add(_layer(node, n_layer, head))
                        tensors[a.name] = a
        self._weights, self._on_drive = [0] * n_layer, [0] * n_layer       # and those of them that need not be in memory
        self._several = []      # weights that several layers use: layers, bytes, bytes that need not be in memory
        for name, layers in users.items():
            in_file, copied = device_of(setup.placement.of_weight(name, min(layers))).weights([tensors[name]])
            for il in layers:
                self._weights[il] += in_file + copied
                self._on_drive[il] += 0 if mapped else in_file
            if len(layers) > 1:
                self._several.append((layers, in_file + copied, 0 if mapped else in_file))
        self._caches = [0] * n_layer
        for ref, n_bytes in setup.cache_row_bytes.items():
            self._caches[ref.layer] += n_bytes * setup.n_ctx * n_sessions
        self._token = token_bytes(setup, setup.n_ctx - 1 if n_past is None else n_past, head)
        self._ops = of_a_chunk(setup)
        self.scratch = sum(memory.total - memory.copied - memory.caches for memory in setup.memory.values()) + sum(
            device_of(name).reserved for name in setup.placement.devices)       # of the whole model
        # Beside that, a stage has the hidden rows of a ubatch that come in, and those that go out.
        self.passing = 2 * setup.n_ubatch * setup.config.n_embd * max(device_of(name).float_size for name in setup.placement.devices)

    def share(self, layers, node):
        """The Share of a range of layers on a Node."""
        first, stop = layers
        twice = sum((len(mine) - 1) * n for some, n, _ in self._several if (mine := [il for il in some if first <= il < stop]))
        passing = self.passing if stop - first < self.setup.config.n_layer else 0
        return Share(Layers(first, stop), node, sum(self._weights[first:stop]) - twice, sum(self._caches[first:stop]),
                     self.scratch + passing, sum(self._token[first:stop]))

    def divide(self, nodes):
        """The function divide(), on Nodes."""
        check_number(len(nodes), self.setup.config)
        taken = self._in_memory()
        lacks = [np.where(self._elsewhere(node), np.inf, _lacking(taken, node.memory)) for node in nodes]
        if not np.isfinite(_best(lacks, np.maximum)[1]):
            raise nowhere(nodes)
        tokens = [np.where(lack > 0, np.inf, self._between(self._token) / node.bandwidth) for lack, node in zip(lacks, nodes)]
        if not np.isfinite(_best(tokens, np.maximum)[1]):
            raise self._too_large(nodes, lacks)
        chunks = [np.where(lack > 0, np.inf, self._between(self._chunk(node))) for lack, node in zip(lacks, nodes)]
        return self._layers(_best(_least_of_both(tokens, chunks), np.add)[0])

    def _chunk(self, node):
        """Seconds of each layer for a chunk of a prompt, [n_layer]."""
        return np.bincount(self._ops.layers.astype(np.intp), self._ops.seconds(node), self.setup.config.n_layer)

    def _elsewhere(self, node):
        """Whether a node lacks tensors of the layers between borders, bool [n, n]."""
        ends = np.array([*self.borders, self.setup.config.n_layer])
        absent = [node.lacks((il, il + 1)) for il in range(self.setup.config.n_layer)]
        below = np.concatenate([[0], np.cumsum(absent)])[ends]
        return below[None, :] > below[:, None]

    def _layers(self, found):
        ends = [*self.borders, self.setup.config.n_layer]
        return tuple(Layers(ends[a], ends[b]) for a, b in zip(found, found[1:]))

    def _between(self, each):
        """The sums of layers between any two borders, float64 [n, n].

        each: of the layers, [n_layer]. Infinite where the second border is not above the first.
        """
        ends = np.array([*self.borders, self.setup.config.n_layer])
        below = np.concatenate([[0.0], np.cumsum(each, dtype=np.float64)])[ends]
        return np.where(np.arange(len(ends))[:, None] < np.arange(len(ends)), below[None, :] - below[:, None], np.inf)

    def _in_memory(self):
        """Bytes of the layers between any two borders, [n, n] as _between()."""
        ends = np.array([*self.borders, self.setup.config.n_layer])
        found = self._between(np.subtract(np.add(self._weights, self._caches), self._on_drive)) + self.scratch + self.passing
        found[0, -1] -= self.passing
        for layers, n_bytes, in_file in self._several:
            there = np.searchsorted(sorted(layers), ends)
            found -= np.maximum(there[None, :] - there[:, None] - 1, 0) * (n_bytes - in_file)
        return found

    def _too_large(self, nodes, lacks):
        """The OutOfMemoryError where no division fits.

        It tells of the division whose stages lack least.
        """
        ends = [*self.borders, self.setup.config.n_layer]
        ranges = self._layers(_best(lacks, np.maximum)[0])
        lacking = [lack[ends.index(one.first), ends.index(one.stop)] for one, lack in zip(ranges, lacks)]
        i = int(np.argmax(lacking))
        taken, several = sum(self.share(*pair).total for pair in zip(ranges, nodes)), len(nodes) > 1
        of_sessions = f" for each of {self.n_sessions} conversations" if self.n_sessions > 1 else ""
        there = "" if any(node.memory is None for node in nodes) else (
            f", and the node{'s have' if several else ' has'} {size(sum(node.memory for node in nodes))}")
        return OutOfMemoryError(
            f"The model with a context of {self.setup.n_ctx} tokens{of_sessions} takes {size(taken)} in {len(nodes)} "
            f"stage{'s' * several}{there}: at best {ranges[i].words} would need {size(int(lacking[i]))} more on {nodes[i].name}; take "
            f"more or larger nodes, or {LESS}.")


def _layer(node, n_layer, head):
    """The layer beside which a node runs in stages; head: that of the head."""
    layer = home_layer(node)
    return layer if layer >= 0 else head % n_layer


def token_bytes(setup, n_past, head=0):
    """Bytes that one token reads of each layer after n_past others: [n_layer].

    The embedding is with the first layer, the output matrix with the layer `head`, 0 or -1.
    """
    step, layers = StepSize(1, n_past, setup.cache_row_bytes), [[] for _ in range(setup.config.n_layer)]
    for node in setup.graphs[setup.schedule.variant(n_past, 1)].nodes:
        layers[_layer(node, len(layers), head)].append(node)
    costs = [step_cost(nodes, step) for nodes in layers]
    return [cost.weights + cost.cache for cost in costs]


def nowhere(nodes):
    """The PydsaError of nodes whose parts of the file allow no division."""
    def layers(node):
        return spans(["x" if il in node.layers else "" for il in range(MOST)]).get("x", "none")

    there = "; ".join(f"{node.name}: {'all' if node.layers is None else layers(node)}" for node in nodes)
    return PydsaError(f"The nodes, in this order, have not the parts of the file for a division: layers on {there}. Copy the parts that "
                      "lack.")


def _lacking(taken, memory):
    """Bytes that lack in a memory for those that are taken, an array."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(taken), 0.0 if memory is None else np.maximum(taken - memory, 0.0), np.inf)


def _least_of_both(tokens, chunks):
    """What the divisions cost whose slowest stages have the least sum.

    tokens, chunks: seconds of each stage, [n, n]. The sum is that of the slowest stage's times, each in units of the least that can be.
    Returns costs of stages [n, n] for _best, infinite where a stage would be slower.
    """
    least, (_, least_chunk) = _best(tokens, np.maximum)[1] or 1.0, _best(chunks, np.maximum)
    least_chunk = least_chunk or 1.0
    limits = np.unique(np.concatenate([some[np.isfinite(some)] for some in tokens]))
    best = np.inf, 0.0, 0.0
    for limit in limits[limits >= least * (1 - EVEN)]:
        if limit / least + 1 >= best[0]:
            break
        slowest = _best([np.where(some <= limit, chunk, np.inf) for some, chunk in zip(tokens, chunks)], np.maximum)[1]
        best = min(best, (limit / least + slowest / least_chunk, limit, slowest))
    _, limit, slowest = best
    both = [np.where((some <= limit) & (chunk <= slowest * (1 + EVEN)), some / least + chunk / least_chunk, np.inf)
            for some, chunk in zip(tokens, chunks)]
    return [np.rint(WHOLE * some * (1 + EVEN * some)) for some in both]       # sums are exact, so that the first of equal ones is found


def _best(costs, together):
    """The way through borders that costs least, and its cost.

    costs: for each stage [n, n], from a border to a later one. together: np.maximum or np.add, how costs of stages are put together. The
    way is the index of each stage's first border, and the end; None where all cost infinitely much.
    """
    n = costs[0].shape[0]
    reached, before = np.where(np.arange(n) == 0, 0.0, np.inf), []
    for cost in costs:
        ways = together(reached[:, None], cost)
        before.append(ways.argmin(0))
        reached = ways.min(0)
    if not np.isfinite(reached[-1]):
        return None, np.inf
    way = [n - 1]
    for some in reversed(before):
        way.append(int(some[way[-1]]))
    return way[::-1], float(reached[-1])
