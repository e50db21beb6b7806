"""A recorded graph gets a memory layout and is run.

Buffers are shared by liveness, arguments are bound once; a step is then only calls.
"""
import contextlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import psutil

from pydsa.errors import LESS, OutOfMemoryError, PydsaError
from pydsa.gguf_file import Tensor
from pydsa.graph import CacheRef, Value

ALIGN = 64      # bytes: a cache line, and the widest vector register

# One step of one model at a time: kernels share the machine's threads, and the sessions of a model share its buffers.
_lock, _running_thread = threading.Lock(), None


@contextlib.contextmanager
def one_step():
    """One step at a time, of all models: the others wait. PydsaError inside of a step of the same thread."""
    global _running_thread
    if _running_thread == threading.get_ident():
        raise PydsaError("A model cannot be run from inside the observe or progress function of a step that is not finished.")
    with _lock:
        _running_thread = threading.get_ident()
        try:
            yield
        finally:
            _running_thread = None


def check_memory(wanted, what, backend=None):
    """Refuse `wanted` bytes that the device of a backend, or without one the machine, cannot hold, before they are allocated."""
    available, whose = backend.free_bytes() if backend is not None else None, "the GPU's memory"
    if available is None:
        available, whose = psutil.virtual_memory().available, "memory"
    if wanted > available:
        raise OutOfMemoryError(f"{what} would take {wanted / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of {whose} are free; {LESS}.")


class Layout(NamedTuple):
    """Where each value of a graph is: bytes from the start of the buffer, for a step of max_tokens tokens."""
    graph: object
    max_tokens: int
    float_size: int
    offsets: dict       # root Value -> offset
    n_bytes: int


def _row_bytes(value, float_size):
    return int(np.prod(value.tail, dtype=np.int64)) * {"float": float_size, "int32": 4, "int64": 8}[value.dtype]


def lay_out(graph, max_tokens, float_size=4):
    """The Layout of a graph. Values whose lives do not overlap share memory: first fit, in the order of birth."""
    inputs = (graph.ids, graph.positions)
    born, dies = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, len(graph.nodes))
    for i, node in enumerate(graph.nodes):
        for value in (a.root for a in node.args if isinstance(a, Value)):
            if value.rows == "tokens":
                born.setdefault(value, i)
                dies[value] = max(i, dies.get(value, 0))
    offsets, living, total = {}, [], 0      # living: (offset, end, dies)
    for value in sorted(born, key=born.get):
        living = [space for space in living if space[2] >= born[value]]
        size = -(-max_tokens * _row_bytes(value, float_size) // ALIGN) * ALIGN
        offset = 0
        for start, end, _ in sorted(living):
            if start - offset >= size:
                break
            offset = max(offset, end)
        offsets[value] = offset
        living.append((offset, offset + size, dies[value]))
        total = max(total, offset + size)
    return Layout(graph, max_tokens, float_size, offsets, total)


class Runner:
    """Runs the graphs of one model on one backend: owns the buffer, and the weights as the backend takes them."""

    def __init__(self, backend, layouts, threads):
        self.backend, self.threads = backend, threads
        self.layouts = layouts      # variant -> Layout
        self.dtypes = {"float": np.dtype(backend.FLOAT), "int32": np.dtype(np.int32), "int64": np.dtype(np.int64)}
        self._buffer = backend.empty((max(layout.n_bytes for layout in layouts.values()),), np.uint8)
        self._weights, self._constants = {}, {}
        self.steps = 0          # how many were started
        self._outputs = {}      # name -> one row, which is what every step but those of logits() needs
        self._entry_points = {}

    def _array(self, value, offset, n_rows):
        dtype = self.dtypes[value.dtype]
        count = n_rows * int(np.prod(value.tail, dtype=np.int64))
        return self._buffer[offset:offset + count * dtype.itemsize].view(dtype).reshape(n_rows, *value.tail)

    def _output_array(self, value, n_outputs):
        """Values of output rows lie outside of the buffer."""
        if n_outputs > 1:
            return self.backend.empty((n_outputs, *value.tail), self.dtypes[value.dtype])
        if value.name not in self._outputs:
            self._outputs[value.name] = self.backend.empty((1, *value.tail), self.dtypes[value.dtype])
        return self._outputs[value.name]

    def weight(self, tensor):
        """A tensor as the backend takes it, made once."""
        if tensor.name not in self._weights:
            self._weights[tensor.name] = self.backend.weight(tensor)
        return self._weights[tensor.name]

    def read(self, tensor):
        """Make a tensor as the backend takes it, anew if it was made before."""
        self._weights[tensor.name] = self.backend.weight(tensor)

    def _constant(self, values):
        if id(values) not in self._constants:
            self._constants[id(values)] = values, self.backend.upload(values)       # kept, so that no other array gets its id
        return self._constants[id(values)][1]

    def bind(self, variant, caches, n_tokens, n_outputs):
        """The calls of one step: [(node, function, args)], with every argument an array or a number."""
        layout = self.layouts[variant]
        assert n_outputs <= n_tokens <= layout.max_tokens
        roots = {value: self._array(value, offset, n_tokens) for value, offset in layout.offsets.items()}

        def argument(a):
            if isinstance(a, Value):
                if a.root not in roots:
                    roots[a.root] = self._output_array(a.root, n_outputs)
                return a.array(roots, n_outputs)
            if isinstance(a, Tensor):
                return self.weight(a)
            if isinstance(a, np.ndarray):
                return self._constant(a)
            return caches[a].rows if isinstance(a, CacheRef) else a

        graph = layout.graph
        nodes = graph.nodes if n_outputs else [node for node in graph.nodes if not node.for_outputs]
        calls = [(node, getattr(self.backend, node.op), tuple(argument(a) for a in node.args)) for node in nodes]
        output = argument(graph.output) if n_outputs else None
        return Bound(self, roots[graph.ids], roots[graph.positions], calls, output)

    def compiled(self, variant, caches, n_tokens, n_outputs, again):
        """bind() with functions that take these arguments without a look at their types; `again`: this step comes again and again.

        That look takes longer than a short prompt's work, and types only depend on whether there is one row or several.
        """
        bound, key = self.bind(variant, caches, n_tokens, n_outputs), (variant, n_tokens == 1, min(n_outputs, 2))
        if key not in self._entry_points:
            self._entry_points[key] = [self.backend.entry_point(function, args) for _, function, args in bound.calls]
        calls = [(node, function, args) for (node, _, args), function in zip(bound.calls, self._entry_points[key], strict=True)]
        return bound._replace(calls=calls, recording=self.backend.recorded(calls) if again else None)


class Written(Sequence):
    """What a node wrote, as numpy arrays, which a backend fetches when they are looked at."""

    def __init__(self, backend, arrays):
        self._backend, self._arrays = backend, arrays

    def __len__(self):
        return len(self._arrays)

    def __getitem__(self, i):
        return self._backend.fetch(self._arrays[i])


class Bound(NamedTuple):
    """A graph with all its arguments, arrays of a backend, for one session and one number of tokens."""
    runner: object
    ids: object
    positions: object
    calls: list
    output: object      # or None
    recording: object = None

    def run(self, ids, n_past, logits, observe=None):
        """One step: tokens ids at positions n_past, n_past + 1, ...; the last of their logits go to `logits` [n_outputs, n_vocab].

        observe(node, arrays) is called after each op with what it wrote.
        """
        with one_step():
            self.put(ids, n_past)
            self.start(observe)
            if self.output is not None:
                logits[:] = self.runner.backend.fetch(self.output)

    def timed(self, ids, n_past):
        """One step, without its logits -> [(node, seconds)]."""
        with one_step():
            self.put(ids, n_past)
            return list(zip([node for node, _, _ in self.calls], self.runner.backend.timed([call[1:] for call in self.calls])))

    def put(self, ids, n_past):
        """Begin a step with these tokens."""
        self.runner.backend.set_threads(self.runner.threads)
        self.runner.steps += 1
        self.runner.backend.store(self.ids, ids)
        self.runner.backend.store(self.positions, np.arange(n_past, n_past + len(ids)))

    def start(self, observe=None):
        """Launch all that a step does; ids and positions are there."""
        if self.recording is not None and observe is None:
            self.recording.run()
            return
        for node, function, args in self.calls:
            function(*args)
            if observe is not None:
                observe(node, Written(self.runner.backend, args[:node.n_out]))
