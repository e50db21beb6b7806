"""The memory that a model takes on each of its devices."""
from typing import NamedTuple

from pydsa.backends.devices import device_of
from pydsa.executor.graph import Value
from pydsa.executor.layout import row_bytes
from pydsa.gguf.file import Tensor
from pydsa.options import FLOAT16


class Memory(NamedTuple):
    """Bytes on one device, for a model with one session and a full context.

    mapped: weights that are read from the mapped file, which are not in `total`. copied: weights that the backend copies: the CPU copies
    vectors, a GPU all blocks, the reference everything, as float32; without mmap matrices are copied too. values: intermediate values of a
    ubatch, and a row of logits. scratch: that of the kernels. slots: for weights that are copied to the device for a step (streaming.py).
    scores: the indexer's score rows; top-k takes 16 bytes more for each key and thread, which are not counted. packed_latents: those that
    prompts in MLA's plain form pack, at most, and rows that prompts take as float16. Only caches, scores and packed_latents grow with the
    context.
    """
    mapped: int = 0
    copied: int = 0
    caches: int = 0
    values: int = 0
    scratch: int = 0
    slots: int = 0
    scores: int = 0
    packed_latents: int = 0

    @property
    def total(self):
        """All but the mapped file."""
        return sum(self) - self.mapped

    def __add__(self, other):
        return Memory(*map(sum, zip(self, other)))


def memory_of(setup):
    """{name of a device: Memory} of a setup.Setup."""
    return {name: _on_device(setup, name) for name in setup.placement.devices}


def tensors_on(setup, name):
    """The weights that are always on a device: {name: Tensor}."""
    return {a.name: a for layout in _layouts(setup) for segment in layout.segments if segment.device == name
            for _, node in segment.nodes for a in node.args if isinstance(a, Tensor) and a.name not in layout.streamed}


def _layouts(setup):
    return [*setup.layouts.values(), *setup.streaming.layouts.values()]


def _nodes_on(setup, name):
    return [node for layout in _layouts(setup) for segment in layout.segments if segment.device == name for _, node in segment.nodes]


def _on_device(setup, name):
    device, nodes, tensors = device_of(name), _nodes_on(setup, name), tensors_on(setup, name).values()
    mapped, copied = device.weights(tensors)
    caches = sum(n for ref, n in setup.cache_row_bytes.items() if setup.placement.of_cache(ref) == name)
    ops = {node.op for node in nodes}
    outputs = {a.root.name: row_bytes(a.root, device.float_size) for node in nodes for a in node.args
               if isinstance(a, Value) and a.root.rows == "outputs"}
    scored = min(device.scored_together(setup.n_ctx), setup.n_ubatch) * device.float_size * setup.n_ctx
    return Memory(
        mapped if setup.mmap else 0, copied if setup.mmap else mapped + copied, setup.n_ctx * caches,
        max(layout.ends.get(name, 0) for layout in _layouts(setup)) + sum(outputs.values()),
        device.scratch(nodes, setup.n_ubatch), sum(setup.streaming.slots.get(name, {}).values()),
        scored if "indexer_select" in ops else 0,
        _latents(setup, device, nodes, ops))


def _latents(setup, device, nodes, ops):
    """Bytes of latents in the form in which prompts' attention takes them."""
    packed = device.packed_latents(setup.config, setup.schedule.plain_form_until) if ops & {"mha_attention", "mha_sparse_attention"} else 0
    makes_halves = setup.precision == FLOAT16 and setup.n_ubatch > 1 and setup.kv_type != "f16"
    return packed + (device.half_rows(nodes, setup.n_ctx) if makes_halves else 0)
