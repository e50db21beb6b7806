"""Lay out a recorded graph in memory, bind it and run it.

Values share a buffer by liveness, and arguments are bound once: a step is then only a list of calls.
"""
import contextlib
import dataclasses
import os
import threading
from typing import NamedTuple

import numpy as np

from pydsa import limits
from pydsa.errors import LESS, DamagedWeightsError, OutOfMemoryError, PydsaError
from pydsa.gguf_file import Tensor
from pydsa.graph import CacheRef, Value, levels
from pydsa.hooks import Stops

ALIGN = 64      # bytes: a cache line, and the widest vector register

# One step at a time: kernels share the machine's threads, and the sessions of a model share its buffer.
_lock, _running_thread = threading.Lock(), None


def _after_fork():
    """A child has none of the threads that may have held the lock."""
    global _lock, _running_thread
    _lock, _running_thread = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def one_step():
    """A context in which a step runs; steps of other threads wait.

    This holds for all models. Raises PydsaError inside of a step of the same thread.
    """
    global _running_thread
    if _running_thread == threading.get_ident():
        raise PydsaError("A model cannot be run from inside a function that a step calls (observe, progress, select, a hook).")
    with _lock:
        _running_thread = threading.get_ident()
        try:
            yield
        finally:
            _running_thread = None


def check_memory(wanted, what, backend=None):
    """Raise OutOfMemoryError if `wanted` bytes are not free.

    They are checked before they are allocated, in the memory of the backend's device, or without a backend in the host's.
    """
    available, source = backend.free_bytes() if backend is not None else None, "the GPU's memory are free"
    if available is None:
        available, source = limits.available()
    if wanted > available:
        raise OutOfMemoryError(f"{what} would take {wanted / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of {source}; {LESS}.")


class Layout(NamedTuple):
    """The place of each value of a graph in the buffer.

    Offsets and sizes are bytes, for a step of up to max_tokens tokens.
    """
    graph: object
    nodes: list         # (level, Node) in the order they run; those of equal levels may run at the same time
    max_tokens: int
    float_size: int
    offsets: dict       # root Value -> offset
    n_bytes: int


def _row_bytes(value, float_size):
    return int(np.prod(value.tail, dtype=np.int64)) * {"float": float_size, "int32": 4, "int64": 8}[value.dtype]


def lay_out(graph, max_tokens, float_size=4, side_by_side=False):
    """The Layout of a graph for steps of up to max_tokens tokens.

    Values that are not live at the same time share memory: first fit, in the order of their first use. side_by_side: nodes that do not
    depend on each other run at the same time, and are put together.
    """
    order = levels(graph.nodes) if side_by_side else range(len(graph.nodes))
    nodes = sorted(zip(order, graph.nodes), key=lambda pair: pair[0])
    inputs = (graph.ids, graph.positions)
    born, dies = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, len(nodes))
    for level, node in nodes:
        for value in (a.root for a in node.args if isinstance(a, Value)):
            if value.rows == "tokens":
                born.setdefault(value, level)
                dies[value] = max(level, dies.get(value, 0))
    offsets, live, total = {}, [], 0        # live: (offset, end, dies)
    for value in sorted(born, key=born.get):
        live = [space for space in live if space[2] >= born[value]]
        size = -(-max_tokens * _row_bytes(value, float_size) // ALIGN) * ALIGN
        offset = 0
        for start, end, _ in sorted(live):
            if start - offset >= size:
                break
            offset = max(offset, end)
        offsets[value] = offset
        live.append((offset, offset + size, dies[value]))
        total = max(total, offset + size)
    return Layout(graph, nodes, max_tokens, float_size, offsets, total)


class Runner:
    """Runs the graphs of one model on one backend.

    It owns the buffer of intermediate values, and the weights in the backend's form. reproducible: a token's products with them are the
    same in steps of any shape.
    """

    def __init__(self, backend, layouts, threads, threads_batch, reproducible=False):
        self.backend, self.threads, self.threads_batch, self._reproducible = backend, threads, threads_batch, reproducible
        self.layouts = layouts      # variant -> Layout
        self.dtypes = {"float": np.dtype(backend.FLOAT), "int32": np.dtype(np.int32), "int64": np.dtype(np.int64)}
        self._buffer = backend.empty((max(layout.n_bytes for layout in layouts.values()),), np.uint8)
        self._weights, self._constants = {}, {}
        self.steps = 0          # the number of steps started
        self._outputs = {}      # name -> an array of one row, for all steps but those of Session.logits()

    def threads_for(self, n_tokens):
        """The number of threads of a step of n_tokens tokens."""
        return self.threads if n_tokens == 1 else self.threads_batch

    def _array(self, value, offset, n_rows):
        dtype = self.dtypes[value.dtype]
        count = n_rows * int(np.prod(value.tail, dtype=np.int64))
        return self._buffer[offset:offset + count * dtype.itemsize].view(dtype).reshape(n_rows, *value.tail)

    def _output_array(self, value, n_outputs):
        """An array for output rows, which lie outside of the buffer."""
        if n_outputs > 1:
            return self.backend.empty((n_outputs, *value.tail), self.dtypes[value.dtype])
        if value.name not in self._outputs:
            self._outputs[value.name] = self.backend.empty((1, *value.tail), self.dtypes[value.dtype])
        return self._outputs[value.name]

    def weight(self, tensor):
        """A tensor in the backend's form, made once."""
        if tensor.name not in self._weights:
            self.read(tensor)
        return self._weights[tensor.name]

    def read(self, tensor):
        """Make a tensor in the backend's form, again if it was made before."""
        w = self.backend.weight(tensor.read())
        self._weights[tensor.name] = self.backend.reproducible(w) if self._reproducible else w

    def _constant(self, values):
        if id(values) not in self._constants:
            self._constants[id(values)] = values, self.backend.upload(values)       # kept alive, so that no other array gets its id
        return self._constants[id(values)][1]

    def bind(self, variant, caches, n_tokens, n_outputs, again=False, late=()):
        """The Bound of a step of n_tokens tokens, n_outputs of them with logits.

        Its calls are [(node, function, args)], where every argument is an array of the backend or a number. again: the step repeats. late:
        hooks (hooks.Hook) that read values at the end of the step.
        """
        return self.bind_together(variant, [(caches, n_tokens)], n_outputs, again, late)

    def bind_together(self, variant, parts, n_outputs, again=False, late=()):
        """The Bound of a step of tokens of several sessions.

        parts: pairs of a session's caches and its number of tokens, in the order of the tokens. A session may have several parts. The last
        n_outputs tokens have logits. Weights are read once for all tokens; an op that needs the rows of one context is called for each
        part.
        """
        layout, n_tokens, contexts = self.layouts[variant], 0, []
        for caches, n in parts:
            contexts.append((caches, slice(n_tokens, n_tokens + n)))
            n_tokens += n
        assert n_outputs <= n_tokens <= layout.max_tokens
        roots = {value: self._array(value, offset, n_tokens) for value, offset in layout.offsets.items()}
        for value in (a.root for _, node in layout.nodes if any(hook.wants(node) for hook in late) for a in node.args[:node.n_out]):
            if value.rows == "tokens":
                roots[value] = self.backend.empty((n_tokens, *value.tail), self.dtypes[value.dtype])

        def argument(a, caches, rows=slice(None)):
            if isinstance(a, Value):
                if a.root not in roots:
                    roots[a.root] = self._output_array(a.root, n_outputs)
                array = a.array(roots, n_outputs)
                return array if rows == slice(None) else array[rows]
            if isinstance(a, Tensor):
                return self.weight(a)
            if isinstance(a, np.ndarray):
                return self._constant(a)
            return caches[a].rows if isinstance(a, CacheRef) else a

        graph = layout.graph
        calls, levels = [], []
        for level, node in layout.nodes:
            if not n_outputs and node.for_outputs:
                continue
            for context in contexts if len(contexts) > 1 and node.of_one_context else [(contexts[0][0],)]:
                calls.append((node, getattr(self.backend, node.op), tuple(argument(a, *context) for a in node.args)))
                levels.append(level)
        output = argument(graph.output, None) if n_outputs else None
        return Bound(self, roots[graph.ids], roots[graph.positions], calls, levels, output, again, tuple(late))


@dataclasses.dataclass
class Bound:
    """A graph bound to arrays of a backend.

    It holds for one session and one number of tokens.
    """
    runner: object
    ids: object
    positions: object
    calls: list
    levels: list                # a number for each call; those of equal numbers may run at the same time
    output: object              # the array of logits, or None
    again: bool                 # whether the step repeats
    late: tuple                 # hooks whose values are kept until the end of the step
    _recording: object = None
    _stops: object = None       # hooks.Stops of the late hooks

    @property
    def recording(self):
        """The calls as the backend runs them best, made once.

        functools.cached_property has a lock for all objects, which a process that is forked meanwhile would find taken for ever.
        """
        if self._recording is None:
            self._recording = self.runner.backend.recorded(self.calls, self.levels, self.again)
        return self._recording

    def run(self, ids, n_past, logits, hooks=()):
        """Run one step: tokens `ids` at positions n_past, n_past + 1, ...

        n_past: an integer; for a step of several sessions the positions of all tokens. The logits of the last tokens are written to
        `logits`, [n_outputs, n_vocab]. hooks: a tuple of hooks.Hook. Raises DamagedWeightsError if a choice of keys or experts met a value
        that is not finite.
        """
        backend = self.runner.backend
        with one_step():
            backend.nan_met()       # of ops that ran by themselves
            self.put(ids, n_past)
            self.start(hooks, n_past + np.arange(len(ids)) if np.ndim(n_past) == 0 else np.asarray(n_past))
            if self.output is not None:
                logits[:] = backend.fetch(self.output)
            if backend.nan_met():
                raise DamagedWeightsError("the scores of keys or experts are not finite: the weights are damaged, or a computation "
                                          "overflowed")

    def timed(self, ids, n_past):
        """Run one step, without its logits -> [(node, seconds)]."""
        with one_step():
            self.put(ids, n_past)
            return list(zip([node for node, _, _ in self.calls], self.runner.backend.timed([call[1:] for call in self.calls])))

    def put(self, ids, n_past):
        """Write the inputs of a step: ids and positions."""
        self.runner.backend.set_threads(self.runner.threads_for(len(ids)))
        self.runner.steps += 1
        self.runner.backend.store(self.ids, ids)
        positions = np.arange(n_past, n_past + len(ids)) if np.ndim(n_past) == 0 else np.asarray(n_past)
        self.runner.backend.store(self.positions, positions)

    def start(self, hooks=(), positions=None):
        """Launch all calls of a step; its inputs are written.

        positions: those of its tokens, int64 [n_tokens], for the hooks.
        """
        if not hooks:
            self.recording.run()
            return
        stops = self._stops
        if stops is None or stops.hooks != hooks:
            stops = Stops(self.runner.backend, self.calls, hooks, self.late)
            self._stops = stops if hooks == self.late else None     # an observer is not kept alive
        stops.begin(positions)
        self.recording.run(stops.before, stops.after)
        stops.end()
