"""A Setup says what running a GGUF file needs: configuration, schedule, graphs and memory."""
import collections
import copy
import functools
import hashlib
import math
import os
import re

import numpy as np

from pydsa.backends.devices import check_devices, check_numa, check_reproducible, check_residence, device_of
from pydsa.cards import shown
from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.executor.cache import choose_cache_type
from pydsa.executor.graph import CacheRef, Graph, waits
from pydsa.executor.layout import lay_out
from pydsa.executor.memory import Memory, memory_of
from pydsa.executor.placement import Placing
from pydsa.executor.schedule import HEAD, VARIANTS, Schedule, Variant, ending_early
from pydsa.executor.segments import cut
from pydsa.executor.streaming import NEVER, Streaming, check_stream_from, slots_of, worth_measuring
from pydsa.gguf.file import open_gguf
from pydsa.gguf.override import check_all_read, override
from pydsa.gguf.parts import absent_parts, ends_of
from pydsa.machine.numa import memory_placed
from pydsa.models import architecture
from pydsa.models.blocks import INDEXER, block_of, check_stage, indexer_advice, settle_blocks
from pydsa.models.stored import made_bytes
from pydsa.models.weights import Weights
from pydsa.options import FLOAT16, PRECISIONS, choose, counts
from pydsa.quants import cache_row_bytes
from pydsa.text.tokenizer import Tokenizer
from pydsa.words import card_of_a_setup, size

ATTENTION = ("auto", "sparse", "masked", "dense")
DEFAULT_N_CTX, DEFAULT_N_UBATCH = 8192, 2048
BESIDE_HALVES, OF_INDEXERS = (".attn_kv_b.weight",), tuple(f".indexer.{part}" for part in INDEXER)      # ends of names
COMPANION, OF_ACTIVATIONS = re.compile(r"(\.weight)?\.(input_)?scale$"), ".input_scale"       # beside a matrix


@shown(card_of_a_setup)
class Setup:
    """What running a file needs.

    It has the configuration (config), the schedule of variants, a layout of each variant's graph, and the memory in bytes. No weights are
    read and nothing is compiled. `pydsa info` shows it. notes: sentences on what is unusual in the file. The parameters, and the errors
    raised, are those of load(), but for what a plan chooses (fitting.py), `layers`: those of a stage, (first, stop), None: all; `head`:
    whether it has the head, the last norm and the output matrix, None: if it has the last layer; and `absent`: what parts of the file
    hold that may be missing here, as gguf.parts.merged() returns it.
    """

    def __init__(self, path, n_ctx=None, device="cpu", kv_type="i16", attention="auto", dsa_top_k=None,
                 n_ubatch=DEFAULT_N_UBATCH, index_type=None, override_kv=None, reproducible=False, mmap=True, mlock=False,
                 tensor_split=None, cpu_moe=False, n_cpu_moe=0, override_tensor=(), n_gpu_layers=None, numa=None, stream_from=None,
                 precision=FLOAT16, layers=None, head=None, absent=None):
        self.stream_from = check_stream_from(stream_from)
        placing = Placing(check_devices(device), tensor_split, n_gpu_layers, cpu_moe, n_cpu_moe, override_tensor)
        self.kv_type = choose_cache_type("kv_type", kv_type)
        self.index_type = choose_cache_type("index_type", index_type or ("f32" if kv_type == "f32" else "i8"))
        self.attention = choose("attention", attention, ATTENTION)
        self.precision = choose("precision", precision, PRECISIONS)
        n_ctx, n_ubatch, dsa_top_k = counts(2**31 - 1, n_ctx=n_ctx, n_ubatch=n_ubatch, dsa_top_k=dsa_top_k)
        file = open_gguf(os.path.expanduser(path), absent_parts(path, absent or {}))
        metadata = override(file.metadata, override_kv or {})
        self.overrides = {key: (value, file.metadata.get(key)) for key, value in (override_kv or {}).items()}      # and the file's own
        arch = architecture(metadata)
        metadata, self.notes = settle_blocks(metadata, file.tensors)
        self.file = file._replace(metadata=metadata)
        self.config = self._read_config(arch, dsa_top_k)
        check_all_read(metadata, override_kv or {}, file.metadata)
        self.layers = check_stage(self.config, layers)
        self.has_head = self.ends[1] if head is None else head
        self.n_ctx = n_ctx or min(DEFAULT_N_CTX, self.config.n_ctx_train)
        self.n_ubatch = min(n_ubatch, self.n_ctx)
        self._wanted, self.plan = (reproducible, mmap, mlock, numa), None
        self._place(placing)
        self.schedule = Schedule(self.config, self.attention, self.n_ctx, self.n_ubatch, one_form=self.reproducible)
        self.weights = Weights(self.file)
        variants = {name: VARIANTS[name]._replace(head=self.has_head) for name in self.schedule.variants}
        if self.ends[1]:
            variants |= {ending_early(name): variant._replace(ends_early=True) for name, variant in variants.items()}
        self.graphs = {name: self._record(arch, variant, self.layers) for name, variant in variants.items()}
        if self.has_head and not self.ends[1]:
            self.graphs[HEAD] = self._record(arch, Variant(plain=False), range(self.config.n_layer, self.config.n_layer))
        self._refuse_unknown_tensors()
        if self.is_whole:
            self.placement.check_rules(self.weights.used)
        self.notes += self._notes()
        used = {a for node in self._nodes for a in node.args if isinstance(a, CacheRef)}
        self.cache_widths = {ref: widths for ref, widths in self.config.cache_widths.items() if ref in used}

    def _read_config(self, arch, dsa_top_k):
        """The architecture's Config, with the user's top_k."""
        metadata, table = self.file.metadata, self.file.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise UnsupportedModelError(f"{metadata.path}: there is no matrix 'token_embd.weight': this is a vocabulary, not a model.")
        config = arch.Config.from_metadata(metadata, table.shape[0])
        if self.attention not in config.VARIANTS:
            raise UnsupportedModelError(f"{metadata.path}: {config.architecture} has no indexer to choose keys for --attention "
                                        f"{self.attention}; use auto or dense." + (f" But {self._advice}." if self._advice else ""))
        if dsa_top_k is None:
            return config
        if config.top_k is None:
            raise UnsupportedModelError(f"{metadata.path}: {config.architecture} has no indexer; leave out --dsa-top-k.")
        return config.with_top_k(dsa_top_k)

    def _record(self, arch, variant, layers):
        graph = Graph(self.n_ctx)
        arch.build(graph, self.config, self.weights, variant, layers)
        return graph

    @functools.cached_property
    def _waits(self):
        """For each variant, what the nodes of its graph wait for."""
        return {name: waits(graph.nodes) for name, graph in self.graphs.items()}

    @functools.cached_property
    def layouts(self):
        """The Layout of each variant, {name: layout.Layout}."""
        return {name: self._lay_out(name) for name in self.graphs}

    @functools.cached_property
    def streaming(self):
        """How experts that a rule keeps on the CPU run in steps of many tokens.

        A streaming.Streaming: what was asked for, or NEVER. Where it was not said from how many tokens on, it is never if a device has no
        bus to be measured, or if there are few experts.
        """
        n, weights = self.stream_from, {w.name: w for node in self._nodes for w in self.placement.streamed(node)}
        if not weights or n == 0 or (n or 0) > self.n_ubatch or n is None and not worth_measuring(weights.values()):
            return NEVER
        layouts = {name: self._lay_out(name, streaming=True) for name in self.graphs}
        slots = slots_of(layouts.values())
        return NEVER if n is None and not all(device_of(name).bus for name in slots) else Streaming(layouts, slots, n)

    def _lay_out(self, name, streaming=False):
        graph, before = self.graphs[name], self._waits[name]
        nodes, side_by_side = graph.nodes, [device_name for device_name, device in self._devices if device.side_by_side]
        weights = [self.placement.streamed(node) if streaming else () for node in nodes]
        segments = cut(nodes, self.placement.of_nodes(nodes, streaming), side_by_side, before, list(map(bool, weights)))
        float_size, apart = (max(getattr(device, name) for _, device in self._devices) for name in ("float_size", "apart"))
        if name not in self.schedule.variants:      # its steps have several tokens
            apart = 0
        layout = lay_out(graph, segments, self.n_ubatch, float_size, apart)
        return layout._replace(streamed=frozenset(w.name for some in weights for w in some))

    def streamed_from(self, n_tokens):
        """This Setup with experts streamed for steps of n_tokens tokens or more.

        0, or more than a ubatch has: never, and `memory` has no slots for them. None: as it pays.
        """
        other = self._copy("streaming", "memory", "_whole")
        other.stream_from = n_tokens
        if self.streaming.layouts and 0 < (n_tokens or 0) <= self.n_ubatch:        # they are as before
            other.streaming = self.streaming._replace(stream_from=n_tokens)
        return other

    def placed(self, placing):
        """This Setup with another placement, that of a placement.Placing.

        The graphs are not recorded again.
        """
        self._waits         # once for all
        other = self._copy("layouts", "streaming", "memory", "_whole")
        other._place(placing)
        return other

    def _copy(self, *but):
        """A copy without some of the properties that were computed."""
        other = copy.copy(self)
        for name in but:
            other.__dict__.pop(name, None)
        return other

    def _place(self, placing):
        """Take a Placing, and check what its devices must be able to do."""
        self.placing, self.placement = placing, placing.place(self.layers)
        reproducible, mmap, mlock, numa = self._wanted
        self.reproducible = check_reproducible(self.placement.devices, reproducible)
        self.mmap, self.mlock = check_residence(self.placement.devices, mmap, mlock)
        self.numa = check_numa(self.placement.devices, numa)
        for name, device in self._devices:
            if self.n_ubatch > device.max_ubatch:
                raise PydsaError(f"n_ubatch is {self.n_ubatch}, expected at most {device.max_ubatch} on {name} (-ub).")

    @property
    def _devices(self):
        return [(name, device_of(name)) for name in self.placement.devices]

    @property
    def device_name(self):
        """The names of the devices, with + between several."""
        return "+".join(self.placement.devices)

    @functools.cached_property
    def tokenizer(self):
        """The Tokenizer of the file."""
        return Tokenizer.from_metadata(self.file.metadata, self.config.n_vocab)

    @property
    def _nodes(self):
        return [node for graph in self.graphs.values() for node in graph.nodes]

    @functools.cached_property
    def trunk(self):
        """The tensors of the model, without its MTP blocks; a stage's are its own."""
        return [tensor for name, tensor in self.file.tensors.items()
                if block_of(name) in self.layers or block_of(name) < 0 and (self.is_whole or name in self.weights.read)]

    @property
    def is_whole(self):
        """Whether this is the whole model, and no stage of it."""
        return len(self.layers) == self.config.n_layer

    @property
    def ends(self):
        """Whether a stage has the first layer, and whether it has the last."""
        return self.layers.start == 0, self.layers.stop == self.config.n_layer

    def _refuse_unknown_tensors(self):
        """Refuse tensors that no variant uses.

        Everything that the model was trained with must be used. Only an indexer that was not asked for, an attn_kv_b beside its two
        halves, and scales for activations of four bits may be left out.
        """
        left_out = BESIDE_HALVES if self.config.top_k is None and not self._advice else BESIDE_HALVES + OF_INDEXERS
        for tensor in self.trunk:
            matrix = COMPANION.sub(".weight", tensor.name)
            idle = matrix.endswith(left_out) or tensor.name.endswith(OF_ACTIVATIONS) and matrix in self.file.tensors
            if tensor.name not in self.weights.read and not idle:
                raise UnsupportedModelError(f"{self.file.metadata.path}: pydsa does not know what tensor {tensor.name!r} does in "
                                            f"{self.config.architecture}, and would leave it out.")

    def _notes(self):
        """Sentences on how the tensors of the file are used."""
        made = [tensor for tensor in self.weights.used.values() if tensor.make is not None]
        if made:
            types = " and ".join(f"{part} in {', '.join(sorted({t.type for t in made if t.name.endswith(end)}))}" for part, end in
                                 (("keys", "attn_k_b.weight"), ("values", "attn_v_b.weight")))
            yield (f"attn_kv_b is split in two on load, {types}, which takes {size(made_bytes(made))} beside the mapped file; a "
                   "current conversion of the model has both halves.")
        if self._advice:
            yield self._advice + "."
        n = sum(tensor.name.endswith(OF_ACTIVATIONS) for tensor in self.trunk)
        if n:
            yield f"{n} tensors *{OF_ACTIVATIONS} are not used: they are for activations of four bits, and pydsa's have more."

    @property
    def _advice(self):
        """How to run the file's indexer, where the architecture has none."""
        return indexer_advice(self.file.metadata, self.file.tensors)

    @property
    def n_params(self):
        """The number of parameters of the model."""
        return sum(math.prod(tensor.shape) for tensor in self.trunk)

    @property
    def n_bytes(self):
        """Bytes of the model's tensors as stored in the file."""
        return sum(tensor.data.nbytes for tensor in self.trunk)

    @property
    def file_type(self):
        """The tensor type with the most bytes in the model, such as "Q4_K"."""
        sizes = collections.Counter()
        for tensor in self.trunk:
            sizes[tensor.type] += tensor.data.nbytes
        return max(sizes, key=sizes.get)

    @functools.cached_property
    @memory_placed()
    def fingerprint(self):
        """A hash that identifies the model.

        It covers the architecture's keys, all tensors' names, types and shapes, and the first and last 64 bytes of every tensor.
        """
        digest, metadata = hashlib.sha256(), self.file.metadata
        for key in sorted(metadata):
            if key.startswith(f"{self.config.architecture}."):
                digest.update(f"{key} {np.asarray(metadata[key]).tolist()}".encode())
        for tensor in self.file.tensors.values():
            digest.update(f"{tensor.name} {tensor.type} {tensor.shape}".encode() + ends_of(tensor))
        return digest.hexdigest()

    def cache_type(self, ref):
        """The type of a cache's rows, a key of quants.CACHE_TYPES."""
        return {"latents": self.kv_type, "index_keys": self.index_type}[ref.kind]

    @property
    def cache_row_bytes(self):
        """Bytes of one token's row in each cache: {CacheRef: bytes}."""
        return {ref: cache_row_bytes(self.cache_type(ref), widths) for ref, widths in self.cache_widths.items()}

    @functools.cached_property
    def memory(self):
        """The memory on each device, {name: memory.Memory}."""
        return memory_of(self)

    @functools.cached_property
    def _whole(self):
        return functools.reduce(Memory.__add__, self.memory.values())

    @property
    def cache_bytes(self):
        """Bytes of one session's caches with a full context."""
        return self._whole.caches

    @property
    def scratch_bytes(self):
        """Bytes of the intermediate values of one ubatch, and of scratch memory."""
        return self._whole.values + self._whole.scratch

    @property
    def slot_bytes(self):
        """Bytes of the slots for experts that are copied to a GPU for a step."""
        return self._whole.slots

    @property
    def score_bytes(self):
        """Bytes of the indexer's score rows with a full context."""
        return self._whole.scores

    @property
    def packed_latent_bytes(self):
        """Bytes of the packed latents, at most."""
        return self._whole.packed_latents

    @property
    def mapped_bytes(self):
        """Bytes of the weights that are read from the mapped file."""
        return self._whole.mapped

    @property
    def copied_bytes(self):
        """Bytes of the weights that the backends copy."""
        return self._whole.copied

    @property
    def total_bytes(self):
        """Bytes of a model with one session, without the mapped file."""
        return self._whole.total
