"""load(path) -> Model: the weights of a file, its configuration and tokenizer, and a planned graph on one backend."""
import dataclasses
import functools
import hashlib
import importlib
import math
import os
import re
from collections import Counter

import numpy as np
import psutil

from pydsa.cache import VectorCache
from pydsa.chat import encode_chat
from pydsa.costs import device_scratch, plain_form_pays, plain_form_until
from pydsa.errors import LESS, OutOfMemoryError, PydsaError, UnsupportedModelError
from pydsa.gguf_file import open_gguf
from pydsa.graph import CacheRef, Graph
from pydsa.models import architecture
from pydsa.models.weights import Weights
from pydsa.plan import Runner, plan
from pydsa.quants import KV_TYPES, cache_row_bytes
from pydsa.sampling import Sampling
from pydsa.session import Session
from pydsa.tokenizer import Tokenizer

DEVICES = {"cpu": "pydsa.backends.cpu", "cuda": "pydsa.backends.cuda", "reference": "pydsa.backends.reference"}
ATTENTION = ("auto", "sparse", "masked", "dense")
DEFAULT_N_CTX, DEFAULT_N_UBATCH = 8192, 2048
FLOAT_SIZE = {"cpu": 4, "cuda": 4, "reference": 8}     # bytes of an intermediate value
CUDA_MAX_UBATCH = 32768     # a grid has at most 65,535 blocks in y and z, where kernels have tokens
SCORED_TOGETHER = 32        # tokens whose rows of scores exist at a time (backends/*/indexer.py)


def choose(what, value, known):
    if value not in known:
        raise PydsaError(f"{what} is {value!r}; it must be one of {', '.join(known)}.")
    return value


def whole_number(what, value, low, high):
    """An option as an int, be it numpy's or Python's; a clear error for anything else."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        raise PydsaError(f"{what} is {value!r}; it must be a whole number from {low} to {high}.")
    return int(value)


class ModelPlan:
    """What running a file would need, worked out without touching weights or compiling: configuration, graphs, memory in bytes."""

    def __init__(self, path, n_ctx=None, device="cpu", kv_type="i16", attention="auto", dsa_top_k=None,
                 n_ubatch=DEFAULT_N_UBATCH, index_type=None):
        self.device, self.kv_type = choose("device", device, DEVICES), choose("kv_type", kv_type, KV_TYPES)
        self.index_type = choose("index_type", index_type or ("f32" if kv_type == "f32" else "q8_0"), KV_TYPES)
        self.storage = {"latents": KV_TYPES[self.kv_type], "index_keys": KV_TYPES[self.index_type]}      # of each CacheRef.kind
        self.attention = choose("attention", attention, ATTENTION)
        n_ctx, n_ubatch, dsa_top_k = (value if value is None else whole_number(name, value, 1, 2**31 - 1) for name, value in
                                      (("n_ctx", n_ctx), ("n_ubatch", n_ubatch), ("dsa_top_k", dsa_top_k)))
        self.file = open_gguf(os.path.expanduser(path))
        metadata = self.file.metadata
        arch = architecture(metadata)
        table = self.file.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise UnsupportedModelError(f"{metadata.path}: there is no matrix 'token_embd.weight': this is a vocabulary, not a model.")
        self.config = arch.Config.from_metadata(metadata, table.shape[0])
        if self.attention not in self.config.PATHS:
            raise UnsupportedModelError(f"{metadata.path}: {self.config.architecture} has no indexer to choose keys for --attention "
                                        f"{attention}; use auto or dense.")
        if dsa_top_k is not None:
            if not hasattr(self.config, "indexer_top_k"):
                raise UnsupportedModelError(f"{metadata.path}: {self.config.architecture} has no indexer; leave out --dsa-top-k.")
            self.config = dataclasses.replace(self.config, indexer_top_k=dsa_top_k)
        self.n_ctx = n_ctx or min(DEFAULT_N_CTX, self.config.n_ctx_train)
        self.n_ubatch = min(n_ubatch, self.n_ctx)
        if self.device == "cuda" and self.n_ubatch > CUDA_MAX_UBATCH:
            raise PydsaError(f"n_ubatch is {self.n_ubatch}; on cuda it must be at most {CUDA_MAX_UBATCH} (-ub).")
        self.top_k = getattr(self.config, "indexer_top_k", None)
        self.weights = Weights(self.file)
        paths = [path for path in self.config.PATHS[attention] if self._has_use_of(path)]
        beyond = [path for path in paths if self.attention == "auto" and path in ("mha+choice", "sparse")]
        self.stages = [path for path in paths if path not in beyond], beyond        # of contexts up to top_k tokens, and of longer ones
        self.paths = [*self.stages[0], *beyond]
        self.plans = {path: self._record(arch, path) for path in self.paths}
        self._refuse_unknown_tensors()
        used = {a for p in self.plans.values() for node in p.graph.nodes for a in node.args if isinstance(a, CacheRef)}
        self.cache_widths = {ref: widths for ref, widths in self.config.cache_widths.items() if ref in used}

    def _has_use_of(self, path):
        """Whether any step would take this path."""
        if path.startswith("mha"):
            return self.plain_until(path) > (self.top_k if path == "mha+choice" else 0)
        return path != "sparse" or self.attention != "auto" or self.n_ctx > self.top_k

    def plain_until(self, path):
        """In how long a context chunks of a prompt can take a path of MLA's plain form: "mha", "mha+keys" or "mha+choice"."""
        if path == "mha+choice":
            return plain_form_until(self.config, self.n_ubatch, self.n_ctx, self.top_k)
        longest = min(self.n_ctx, self.top_k) if path == "mha+keys" else self.n_ctx
        return plain_form_until(self.config, min(self.n_ubatch, longest), longest)

    def _record(self, arch, path):
        graph = Graph(self.n_ctx)
        arch.build(graph, self.config, self.weights, path)
        return plan(graph, self.n_ubatch, FLOAT_SIZE[self.device])

    @functools.cached_property
    def trunk(self):
        """The tensors of the model, without its MTP blocks."""
        def layer(name):
            return int(name.split(".")[1]) if re.match(r"blk\.[0-9]{1,9}\.", name) else -1
        return [tensor for name, tensor in self.file.tensors.items() if layer(name) < self.config.n_layer]

    def _refuse_unknown_tensors(self):
        """What the model was trained with must not be left out in silence: only an indexer that is not asked for may be."""
        for tensor in self.trunk:
            if tensor.name not in self.weights.used and ".indexer." not in tensor.name and not tensor.name.endswith(".attn_kv_b.weight"):
                raise UnsupportedModelError(f"{self.file.metadata.path}: pydsa does not know what tensor {tensor.name!r} does in "
                                            f"{self.config.architecture}, and would leave it out.")

    @property
    def n_params(self):
        """Parameters of the model."""
        return sum(math.prod(tensor.shape) for tensor in self.trunk)

    @property
    def n_bytes(self):
        """Bytes of the model's tensors in the file."""
        return sum(tensor.data.nbytes for tensor in self.trunk)

    @property
    def file_type(self):
        """The type that most bytes of the model have, e.g. "Q4_K"."""
        sizes = Counter()
        for tensor in self.trunk:
            sizes[tensor.type] += tensor.data.nbytes
        return max(sizes, key=sizes.get)

    @property
    def cache_row_bytes(self):
        """Bytes that a token takes in each cache."""
        return {ref: cache_row_bytes(self.storage[ref.kind], widths) for ref, widths in self.cache_widths.items()}

    @property
    def cache_bytes(self):
        """Bytes of one session's caches when its context is full."""
        return self.n_ctx * sum(self.cache_row_bytes.values())

    @property
    def scratch_bytes(self):
        """Bytes of the intermediate values, for one chunk of n_ubatch tokens, and one row of logits."""
        nodes = [node for p in self.plans.values() for node in p.graph.nodes]
        beside = device_scratch(nodes, self.n_ubatch) if self.device == "cuda" else 0
        values = max(p.n_bytes for p in self.plans.values()) + (self.config.n_vocab + self.config.n_embd) * FLOAT_SIZE[self.device]
        return values + beside

    @property
    def score_bytes(self):
        """Bytes of the indexer's rows of scores when the context is full; beside them top-k works with 16 bytes a key and thread.

        These and laid_bytes are all that grows with the context of what kernels work with.
        """
        if not any(node.op == "indexer_select" for p in self.plans.values() for node in p.graph.nodes):
            return 0
        together = self.n_ubatch if self.device == "reference" else min(SCORED_TOGETHER, self.n_ubatch)
        return together * FLOAT_SIZE[self.device] * self.n_ctx

    @property
    def plain_form_until(self):
        """In how long a context, in tokens, chunks of n_ubatch take MLA's plain form; 0 if they do not."""
        return max((self.plain_until(path) for path in self.paths if path.startswith("mha")), default=0)

    @property
    def laid_bytes(self):
        """Bytes that latents take at most where the CPU's plain form of attention lays them out (backends/cpu/byte_mha.py)."""
        c, n_kv = self.config, self.plain_form_until
        a_key = 4 * (258 * -(-c.kv_lora // 256) + 64 * -(-c.n_rot // 64) + 1)
        return -(-n_kv // 256) * 256 * a_key if self.device == "cpu" else 0

    @property
    def mapped_bytes(self):
        """Bytes of the weights that stay in the file and are read from there."""
        return 0 if self.device == "cuda" else sum(t.data.nbytes for t in self.weights.used.values())

    @property
    def copied_bytes(self):
        """Bytes of weights that the backend copies: vectors on the CPU, all blocks to a GPU, everything, as float32, in the reference."""
        used = self.weights.used.values()
        if self.device == "cuda":
            return sum(t.data.nbytes for t in used)
        return sum(4 * math.prod(t.shape) for t in used if self.device == "reference" or len(t.shape) == 1)


class Model:
    """A model ready to run. Made by load()."""

    def __init__(self, plan, threads=None, progress=None):
        self.plan, self.config, self.metadata = plan, plan.config, plan.file.metadata
        self.n_ctx, self.n_ubatch, self.kv_type, self.index_type = plan.n_ctx, plan.n_ubatch, plan.kv_type, plan.index_type
        self.attention, self.top_k = plan.attention, plan.top_k
        self.backend = importlib.import_module(DEVICES[plan.device])
        self.threads = self.backend.check_threads(None if threads is None else whole_number("threads", threads, 1, 2**31 - 1))
        self.check_memory(plan.cache_bytes + plan.scratch_bytes + plan.score_bytes + plan.laid_bytes + plan.copied_bytes,
                          f"The model with a context of {plan.n_ctx} tokens")
        self.tokenizer      # its faults belong to loading
        self.runner = Runner(self.backend, plan.plans)
        steps = [self._read_weights, self._compile]
        for step in steps if self.backend.WEIGHTS_FIRST else reversed(steps):
            step(progress)

    def check_memory(self, wanted, what, of_device=True):
        """Refuse what the machine, or its GPU, cannot hold before it is allocated."""
        available, whose = self.backend.free_bytes() if of_device else None, "the GPU's memory"
        if available is None:
            available, whose = psutil.virtual_memory().available, "memory"
        if wanted > available:
            raise OutOfMemoryError(f"{what} would take {wanted / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of {whose} are free; "
                                   f"{LESS}.")

    def _read_weights(self, progress):
        """Give the backend all weights: a GPU gets copies, which takes a while."""
        tensors = list(self.plan.weights.used.values())
        for i, tensor in enumerate(tensors):
            if progress is not None and self.plan.device == "cuda":
                progress(i, len(tensors), tensor.name)
            self.runner.read(tensor)

    def _compile(self, progress):
        """Compile every kernel that any step can need."""
        self.backend.compile_calls(self._all_calls, progress)

    def _all_calls(self):
        """The calls of steps that need different kernels.

        A row alone is contiguous where several are not, so both are bound. One token never takes the plain form of attention.
        """
        caches, calls = self.caches(1), []
        for path in self.plan.paths:
            for n in {2} if path.startswith("mha") else {1, min(2, self.n_ubatch)}:
                calls += [(function, args) for _, function, args in self.runner.bind(path, caches, n, n).calls]
        return calls

    def caches(self, n_ctx):
        """Empty caches of n_ctx rows, one for each (kind, layer) that the graphs use."""
        return {ref: VectorCache(self.backend, n_ctx, widths, self.plan.storage[ref.kind])
                for ref, widths in self.plan.cache_widths.items()}

    @functools.cached_property
    def tokenizer(self):
        """The file's Tokenizer."""
        return Tokenizer.from_metadata(self.metadata, self.config.n_vocab)

    @functools.cached_property
    def fingerprint(self):
        """A hash that tells models apart: the architecture's keys, all names, types and shapes, and the ends of every tensor."""
        digest = hashlib.sha256()
        for key in sorted(self.metadata):
            if key.startswith(f"{self.config.architecture}."):
                digest.update(f"{key} {np.asarray(self.metadata[key]).tolist()}".encode())
        for tensor in self.plan.file.tensors.values():
            data = tensor.data.reshape(-1)
            digest.update(f"{tensor.name} {tensor.type} {tensor.shape}".encode() + data[:64].tobytes() + data[-64:].tobytes())
        return digest.hexdigest()

    def path(self, n_past, n_tokens):
        """Which of the plan's graphs runs a step of n_tokens after n_past others."""
        up_to_top_k, beyond = self.plan.stages
        paths = beyond if beyond and n_past + n_tokens > self.top_k else up_to_top_k
        if len(paths) > 1 and plain_form_pays(self.config, n_past, n_tokens, self.top_k if paths is beyond else None):
            return paths[0]
        return paths[-1]

    def check_ids(self, ids):
        """Token ids as an int32 array [n], n > 0, each in the vocabulary."""
        try:
            ids = np.asarray(ids)
        except ValueError:      # lists of different lengths
            ids = np.empty(0)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise PydsaError("Token ids must be a list of at least one whole number.")
        if ids.min() < 0 or ids.max() >= self.config.n_vocab:
            bad = ids[(ids < 0) | (ids >= self.config.n_vocab)][0]
            raise PydsaError(f"Token id {bad} is not in the vocabulary, which has the ids 0 to {self.config.n_vocab - 1}.")
        return ids.astype(np.int32)

    def __repr__(self):
        return (f"<pydsa.Model {self.config.name!r}: {self.config.architecture} {self.plan.file_type}, "
                f"n_ctx={self.n_ctx}, on {self.plan.device}>")

    def session(self):
        """A new, empty Session."""
        return Session(self)

    def tokenize(self, text, add_bos=None, parse_special=False):
        """Text -> ids. add_bos: as the file says, if None."""
        return self.tokenizer.encode(text, self.tokenizer.add_bos if add_bos is None else add_bos, parse_special)

    def detokenize(self, ids):
        """Ids -> text, special tokens included."""
        return self.tokenizer.decode(ids)

    def logits(self, ids):
        """Logits at every position of a fresh context, float32 [len(ids), n_vocab]."""
        return self.session().logits(ids)

    def generate(self, prompt, max_tokens=None, **sampling):
        """Continue a text (or token ids) in a fresh context -> str pieces as they are sampled. Options: the fields of Sampling."""
        sampling = Sampling(**sampling)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        return self.decode_stream(self.session().generate(ids, max_tokens, sampling))

    def chat(self, messages, max_tokens=None, thinking=False, tools=None, template=None, **sampling):
        """Answer a list of {"role": ..., "content": ...} in a fresh context -> str pieces as they are sampled."""
        sampling = Sampling(**sampling)
        ids = encode_chat(self.tokenizer, messages, thinking=thinking, tools=tools, template=template)
        return self.decode_stream(self.session().generate(ids, max_tokens, sampling))

    def decode_stream(self, ids):
        """Yield the text of ids as they come, whole characters only."""
        decoder = self.tokenizer.decoder()
        for token in ids:
            piece = decoder.push(token)
            if piece:
                yield piece
        rest = decoder.flush()
        if rest:
            yield rest


def load(path, n_ctx=None, device="cpu", threads=None, kv_type="i16", attention="auto", dsa_top_k=None, n_ubatch=DEFAULT_N_UBATCH,
         progress=None, index_type=None):
    """Open a GGUF (the first part, if it is split) and make it ready to run.

    n_ctx: tokens the context can hold (8192, or the model's own limit if that is less). device: "cpu", "cuda" (an NVIDIA GPU; needs the
    extra `cuda`), or "reference" for plain numpy.
    threads: all cores if None. kv_type, of cached latents: "f32", "f16", "bf16", "i16" (whole numbers of
    16 bits, with a scale for each of a row's two parts), "q8_0" (the same with 8 bits). index_type, of the indexer's cached keys: the
    same names; if None "q8_0", int8 with which it is fastest, but "f32" if kv_type is. attention: "auto" (exact dense attention while
    the context is no longer than top_k, sparse beyond), "sparse", "masked", "dense". dsa_top_k: keys to attend to, instead of the
    file's own number. n_ubatch: tokens of a prompt that run together (2048); fewer take less memory. progress(done, total, kernel name) is
    called while kernels are compiled.

    Raises GGUFError, UnsupportedModelError, OutOfMemoryError, PydsaError.
    """
    return Model(ModelPlan(os.fspath(path), n_ctx, device, kv_type, attention, dsa_top_k, n_ubatch, index_type), threads, progress)
