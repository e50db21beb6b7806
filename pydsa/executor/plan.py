"""Bind a laid out graph to arrays of its devices, and run it.

Arguments are bound once: a step is then only a list of calls, in segments if there are several devices.
"""
import dataclasses

import numpy as np

from pydsa.backends.devices import HOST
from pydsa.backends.transfers import transfer
from pydsa.errors import LESS, DamagedWeightsError, OutOfMemoryError
from pydsa.executor.ahead import Ahead
from pydsa.executor.cache import VectorCache
from pydsa.executor.graph import CacheRef, Value
from pydsa.executor.hooks import Stops
from pydsa.executor.schedule import ends_early, ending_early
from pydsa.executor.segments import Chain, Part, Segment, crossings, in_turn, settled_before
from pydsa.executor.streaming import NEVER, deliveries, role
from pydsa.executor.turns import one_step
from pydsa.gguf.file import Tensor
from pydsa.machine import limits, maps
from pydsa.options import size
from pydsa.saved.parts import Keeper, opened, write_whole


def check_memory(wanted, what, backend=None):
    """Raise OutOfMemoryError if `wanted` bytes are not free.

    They are checked before they are allocated, in the memory of the backend's device, or without a backend in the host's.
    """
    available, source = backend.free_bytes() if backend is not None else None, "the GPU's memory are free"
    if available is None:
        available, source = limits.available()
    if wanted > available:
        raise OutOfMemoryError(f"{what} would take {size(wanted)}, but {size(available)} of {source}; {LESS}.")


def check_fits(wanted, backends, what):
    """check_memory for several devices.

    wanted: {name of a device: bytes}. backends: {name: backend}. Devices in the host's memory share it.
    """
    on_host = 0
    for name, n_bytes in wanted.items():
        if backends[name].free_bytes() is None:
            on_host += n_bytes
        else:
            check_memory(n_bytes, what if len(wanted) == 1 else f"{what} on {name}", backends[name])
    if on_host:
        check_memory(on_host, what)


class OnDevice:
    """What a Runner has on one device.

    That is the buffer of intermediate values, and weights and constants in the backend's form. empty(shape, dtype) makes arrays of values:
    the host's lie in pinned memory where GPUs copy from and to it. slots: {role: bytes} of the weights that are copied there for a step.
    """

    def __init__(self, backend, n_bytes, reproducible, empty, slots):
        self.backend, self._reproducible, self._empty = backend, reproducible, empty
        self.dtypes = {"float": np.dtype(backend.FLOAT), "int32": np.dtype(np.int32), "int64": np.dtype(np.int64)}
        self._buffer = empty((n_bytes,), np.uint8)
        self.weights, self._constants = {}, {}
        self.tensors = {}       # name -> the Tensor of a weight: its bytes in the mapped file, or copied from there to the process's memory
        self.slots = {name: backend.Slot(n) for name, n in slots.items()}
        self.outputs = {}       # name -> an array of one row, for all steps but those of Session.logits()

    def array(self, value, offset, n_rows):
        """The array of a value in the buffer."""
        dtype = self.dtypes[value.dtype]
        count = n_rows * int(np.prod(value.tail, dtype=np.int64))
        return self._buffer[offset:offset + count * dtype.itemsize].view(dtype).reshape(n_rows, *value.tail)

    def new_array(self, value, n_rows):
        """An array of a value with memory of its own."""
        return self._empty((n_rows, *value.tail), self.dtypes[value.dtype])

    def output_array(self, value, n_outputs):
        """An array for output rows, which lie outside of the buffer."""
        if n_outputs > 1:
            return self.new_array(value, n_outputs)
        if value.name not in self.outputs:
            self.outputs[value.name] = self.new_array(value, 1)
        return self.outputs[value.name]

    def weight(self, tensor):
        """A tensor in the backend's form, made once."""
        if tensor.name not in self.weights:
            self.read(tensor)
        return self.weights[tensor.name]

    def read(self, tensor):
        """Make a tensor in the backend's form, again if it was made before."""
        if tensor.make is None:         # bytes that are made on load are not kept beside the weight
            self.tensors[tensor.name] = tensor
        w = self.backend.weight(tensor.read())
        self.weights[tensor.name] = self.backend.reproducible(w) if self._reproducible else w

    def source(self, tensor):
        """A tensor with the bytes that its weight here is made of."""
        self.weight(tensor)
        return self.tensors[tensor.name]

    def constant(self, values):
        """A numpy array of the graph as an array of the backend, made once."""
        if id(values) not in self._constants:
            self._constants[id(values)] = values, self.backend.upload(values)       # kept alive, so that no other array gets its id
        return self._constants[id(values)][1]


class Runner:
    """Runs the graphs of one model on the backends of its devices.

    Sessions, batches and the engine use it, or in its place a stages.pipeline.Pipeline, which has the same methods. depth: the steps that
    may be under way at once. samples: whether steps of a Batch sample too. observes: whether hooks can look into steps.

    backends: {name of a device: backend}. reproducible: a token's products with the weights are the same in steps of any shape. streaming:
    the streaming.Streaming of steps of many tokens. files: the maps.Map of each file of which weights are read in place.
    """
    depth, samples, observes = 1, False, True

    def __init__(self, backends, layouts, threads, threads_batch, reproducible=False, streaming=NEVER, files=()):
        self.threads, self.threads_batch = threads, threads_batch
        self.layouts, self.streaming, self.files = layouts, streaming, files        # layouts: variant -> Layout
        every = [*layouts.values(), *streaming.layouts.values()]
        pinned = next((backend.host_empty for backend in backends.values() if hasattr(backend, "host_empty")), None)
        self.on = {}            # name of a device -> OnDevice
        for name, backend in backends.items():
            empty = pinned if pinned and backend.free_bytes() is None else backend.empty
            n_bytes = max(layout.ends.get(name, 0) for layout in every)
            self.on[name] = OnDevice(backend, n_bytes, reproducible, empty, streaming.slots.get(name, {}))
        self.steps = 0          # the number of steps started

    @property
    def error(self):
        """What keeps all steps from running: a LostFileError, or None.

        A Pipeline's is the StageError that has ended it.
        """
        return maps.error_of(self.files)

    @property
    def backends(self):
        """The backends of all devices, {name: backend}."""
        return {name: on.backend for name, on in self.on.items()}

    @property
    def backend(self):
        """The backend of the first device."""
        return next(iter(self.on.values())).backend

    @property
    def picks(self):
        """The most tokens that the device can sample from; 0: the host samples.

        With several devices it does: the next step would keep it from handing out the token.
        """
        return self.backend.PICKS if len(self.on) == 1 else 0

    def ahead(self):
        """What runs the steps that generate, ahead of their requests."""
        return Ahead(self)

    def make_caches(self, setup, n_ctx):
        """Empty caches of n_ctx rows, each on its device: {CacheRef: VectorCache}."""
        with limits.allocating("the caches of a session"):
            return {ref: VectorCache(self.on[setup.placement.of_cache(ref)].backend, n_ctx, widths, setup.cache_type(ref),
                                     setup.reproducible) for ref, widths in setup.cache_widths.items()}

    def check_room(self, setup, n, what):
        """Raise OutOfMemoryError if the caches of n sessions do not fit."""
        check_fits({name: n * memory.caches for name, memory in setup.memory.items()}, self.backends, what)

    def threads_for(self, n_tokens):
        """The number of threads of a step of n_tokens tokens."""
        return self.threads if n_tokens == 1 else self.threads_batch

    def cut(self, caches, start, stop):
        """Copies of the rows start to stop of each cache, a list."""
        return [np.array(cache.stored(stop, start)) for cache in caches.values()]

    def save(self, path, identity, tokens, caches):
        """Write a session of these tokens and caches (saved/parts.py)."""
        write_whole(path, identity, tokens, caches)

    def saved(self, path, identity, caches, n_vocab, n_ctx):
        """A context with the tokens of a saved session, and a function read().

        That overwrites the caches with its rows (saved.parts.opened).
        """
        return opened(path, identity, caches, [Keeper(caches)], n_vocab, n_ctx)

    def bind(self, variant, caches, n_tokens, n_outputs, again=False, late=(), streams=None, all_rows=False):
        """The Bound of a step of n_tokens tokens, n_outputs of them with logits.

        Its calls are [(node, function, args)], where every argument is an array of the backend or a number. again: the step repeats. late:
        hooks (hooks.Hook) that read values at the end of the step. streams: whether weights are copied for the step; None: as it pays.
        all_rows: whether all of the last layer is computed, also where logits of few tokens are wanted.
        """
        return self.bind_together(variant, [(caches, n_tokens)], n_outputs, again, late, streams, all_rows)

    def bind_together(self, variant, parts, n_outputs, again=False, late=(), streams=None, all_rows=False):
        """The Bound of a step of tokens of several sessions.

        parts: pairs of a session's caches and its number of tokens, in the order of the tokens. A session may have several parts. The last
        n_outputs tokens have logits. Weights are read once for all tokens; an op that needs the rows of one context is called for each
        part.
        """
        n_tokens, contexts = 0, []
        for caches, n in parts:
            contexts.append((caches, slice(n_tokens, n_tokens + n)))
            n_tokens += n
        layout = self._layout(variant, n_tokens, n_tokens if all_rows else n_outputs, streams)
        assert n_outputs <= n_tokens <= layout.max_tokens
        graph, calls, times, ends = layout.graph, [], [], []
        segments = [Segment(device, [(time, node) for time, node in nodes if n_outputs or not node.for_outputs])
                    for device, nodes in layout.segments]
        segments = [segment for segment in segments if segment.nodes]
        kept = {a.root for _, nodes in segments for _, node in nodes if any(hook.wants(node) for hook in late)
                for a in node.args[:node.n_out] if a.root.rows == "tokens"}
        arrays = {name: _Arrays(self.on[name], layout, n_tokens, n_outputs, kept) for name, _ in segments}
        for device, nodes in segments:
            backend, bound = self.on[device].backend, arrays[device]
            for time, node in nodes:
                for context in _contexts(contexts, node, n_tokens - n_outputs):
                    calls.append((node, getattr(backend, node.op), tuple(bound.argument(a, *context) for a in node.args)))
                    times.append(time)
            ends.append(len(calls))
        parts = _parts(segments, ends, arrays, (graph.input, graph.positions), n_outputs)
        self._add_weights(parts, segments, layout)
        inputs = [(on.backend, *(on.roots.get(value) for value in (graph.input, graph.positions))) for on in arrays.values()]
        output = arrays[layout.output_device] if n_outputs else None
        return Bound(self, inputs, calls, times, parts, output and output.argument(graph.output), output and output.backend, again,
                     tuple(late))

    def _layout(self, variant, n_tokens, n_rows, streams=None):
        """The Layout of a step. n_rows: those that the last layer computes."""
        if streams is None:
            streams = self.streaming.takes(n_tokens)
        layouts, early = self.streaming.layouts if streams else self.layouts, ending_early(variant)
        return layouts[early if early in layouts and ends_early(n_tokens, n_rows) else variant]     # a stage may not have the last layer

    def _add_weights(self, parts, segments, layout):
        """Give parts the deliveries of the weights that are copied for them."""
        needs = []      # (part, slot, tensor as it is in the host's memory), in the order of use
        for part, segment in zip(parts, segments):
            streamed = {a.name: a for _, node in segment.nodes for a in node.args if isinstance(a, Tensor) and a.name in layout.streamed}
            needs += [(part, self.on[segment.device].slots[role(name)], self.on[HOST].source(tensor)) for name, tensor in streamed.items()]
        for (part, *_), delivery in zip(needs, deliveries([need[1:] for need in needs])):
            part.weights.append(delivery)


def _contexts(contexts, node, first):
    """What a node is called for: (caches,), or (caches, their rows) for each.

    first: the first row whose logits are wanted.
    """
    if len(contexts) == 1 or not node.of_one_context:
        return [(contexts[0][0],)]
    if not node.for_outputs:
        return contexts
    return [(caches, slice(max(0, rows.start - first), rows.stop - first)) for caches, rows in contexts if rows.stop > first]


class _Arrays:
    """The arrays of a step on one device, by the arguments of its nodes."""

    def __init__(self, on, layout, n_tokens, n_outputs, kept):
        self.backend, self.roots = on.backend, {}       # root Value -> array
        self._streamed = layout.streamed
        self._offsets = layout.of_one if n_tokens == 1 and layout.of_one else layout.offsets
        self._on, self._n_tokens, self._n_outputs, self._kept = on, n_tokens, n_outputs, kept

    def _root(self, value):
        if value.rows == "outputs":
            return self._on.output_array(value, self._n_outputs)
        return self._on.new_array(value, self._n_tokens) if value in self._kept else self._on.array(
            value, self._offsets[value], self._n_tokens)

    def argument(self, a, caches=None, rows=slice(None)):
        """What an op takes for an argument of its node."""
        if isinstance(a, Value):
            if a.root not in self.roots:
                self.roots[a.root] = self._root(a.root)
            array = a.array(self.roots, self._n_outputs)
            return array if rows == slice(None) else array[rows]
        if isinstance(a, Tensor):
            return self._on.slots[role(a.name)].weight(a) if a.name in self._streamed else self._on.weight(a)
        if isinstance(a, np.ndarray):
            return self._on.constant(a)
        return caches[a].rows if isinstance(a, CacheRef) else a


def _parts(segments, ends, arrays, inputs, n_outputs):
    """The segments.Part of each segment. ends: of their calls."""
    parts = [Part(arrays[segment.device].backend, first, last, [], [], [], [])
             for segment, first, last in zip(segments, [0, *ends], ends)]
    crossing_values = crossings(segments, inputs) if len(segments) > 1 else []
    settled = settled_before(segments, crossing_values)
    for (value, source, target, only_outputs), before in zip(crossing_values, settled):
        pairs = []
        for i in (source, target):
            there = arrays[segments[i].device]
            array = there.argument(value)
            pairs += there.backend, array[len(array) - n_outputs:] if only_outputs else array
        crossing = transfer(*pairs)
        parts[source].departures.append(crossing)
        parts[target].arrivals.append(crossing)
        if before is not None:
            parts[before].settled.append(crossing)
    return parts


def _positions(ids, n_past):
    """The positions of a step's tokens, n_past on; or those that n_past has."""
    return np.asarray(n_past) if hasattr(n_past, "__len__") else np.arange(n_past, n_past + len(ids))


class Done:
    """A step that has run: what begin() returns.

    A Pipeline's has the same methods, and waits in them.
    """

    def finish(self):
        """Wait for the end of the step; its logits are where they belong.

        Returns None. With samplers a Pipeline returns for each output a sampling.Picked, or None where the logits were wanted.
        """

    def drop(self):
        """Wait for the end of a step that is not wanted any more, or failed."""


@dataclasses.dataclass
class Bound:
    """A graph bound to arrays of a backend.

    It holds for one session and one number of tokens.
    """
    runner: object
    inputs: list                # for each device (backend, ids or hidden rows, positions): arrays, or None where nothing reads them
    calls: list
    levels: list                # a number for each call; those of equal numbers may run at the same time
    parts: list                 # of segments.Part: where the device changes
    output: object              # the array of logits, or None
    output_backend: object      # the backend that has it
    again: bool                 # whether the step repeats
    late: tuple                 # hooks whose values are kept until the end of the step
    _recording: object = None
    _stops: object = None       # hooks.Stops of the late hooks

    @property
    def ids(self):
        """The array of the token ids, or hidden rows, on the first device."""
        return self.inputs[0][1]

    @property
    def positions(self):
        """The array of the positions on the first device."""
        return self.inputs[0][2]

    @property
    def recording(self):
        """The calls as the backends run them best, made once.

        functools.cached_property has a lock for all objects, which a process that is forked meanwhile would find taken for ever.
        """
        if self._recording is None:
            recordings = [part.backend.recorded(self.calls[part.first:part.last], self.levels[part.first:part.last], self.again)
                          for part in self.parts]
            self._recording = recordings[0] if len(recordings) == 1 else Chain(self.parts, recordings)
        return self._recording

    def run(self, ids, n_past, logits, hooks=()):
        """Run one step: tokens `ids` at positions n_past, n_past + 1, ...

        ids: those of the tokens; in a stage after the first their hidden rows, [n_tokens, n_embd]. n_past: an integer; for a step of
        several sessions the positions of all tokens. The logits of the last tokens are written to
        `logits`, [n_outputs, n_vocab]. hooks: a tuple of hooks.Hook. Raises DamagedWeightsError if a choice of keys or experts met a value
        that is not finite, and LostFileError.
        """
        with one_step():
            self._nan_met()       # of ops that ran by themselves
            self.put(ids, n_past)
            self.start(hooks, _positions(ids, n_past) if hooks else None)
            if self.output is not None:
                logits[:] = self.output_backend.fetch(self.output)
            if error := self.runner.error:
                raise error
            if self._nan_met():
                raise DamagedWeightsError("the scores of keys or experts are not finite: the weights are damaged, or a computation "
                                          "overflowed")

    def begin(self, ids, n_past, logits, hooks=(), samplers=None):
        """Run one step as run() does -> a Done; a Pipeline's steps go on."""
        self.run(ids, n_past, logits, hooks)
        return Done()

    def calls_of(self, backend):
        """The calls of a backend, pairs of an op and its arguments."""
        return [call[1:] for part in self.parts if part.backend is backend for call in self.calls[part.first:part.last]]

    def _nan_met(self):
        return any([backend.nan_met() for backend, _, _ in self.inputs])

    def timed(self, ids, n_past):
        """Run one step, without its logits -> [(node, seconds)].

        The transfers between devices, and copies of weights, are not in the times.
        """
        seconds, calls = [], [[call[1:] for call in self.calls[part.first:part.last]] for part in self.parts]
        with one_step():
            self.put(ids, n_past)
            in_turn(self.parts, lambda i: seconds.extend(self.parts[i].backend.timed(calls[i])))
        return list(zip([node for node, _, _ in self.calls], seconds))

    def put(self, ids, n_past):
        """Write the inputs of a step: ids, or hidden rows, and positions."""
        positions = _positions(ids, n_past)
        self.runner.steps += 1
        for backend, *arrays in self.inputs:
            backend.set_threads(self.runner.threads_for(len(ids)))
            for array, values in zip(arrays, (ids, positions)):
                if array is not None:
                    backend.store(array, values)

    def start(self, hooks=(), positions=None):
        """Launch all calls of a step; its inputs are written.

        positions: those of its tokens, int64 [n_tokens], for the hooks.
        """
        if not hooks:
            self.recording.run()
            return
        stops = self._stops
        if stops is None or stops.hooks != hooks:
            backends = [part.backend for part in self.parts for _ in range(part.first, part.last)]
            stops = Stops(backends, self.calls, hooks, self.late)
            self._stops = stops if hooks == self.late else None     # an observer is not kept alive
        stops.begin(positions)
        self.recording.run(stops.before, stops.after)
        stops.end()
