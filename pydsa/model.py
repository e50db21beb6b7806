"""load(path) returns a Model, which runs a GGUF file on one backend.

A Setup says what running the file needs: configuration, schedule, graphs and memory. A Model holds the weights, the tokenizer and the bound
backend.
"""
import collections
import functools
import hashlib
import math
import os
import re
import warnings

import numpy as np

from pydsa.answers import Reader
from pydsa.backends.devices import DEVICES, check_reproducible, check_residence
from pydsa.cache import VectorCache, choose_cache_type
from pydsa.chat import chat_prompt, thinking_note
from pydsa.check import warn_of_gaps
from pydsa.constraint import constraint_for
from pydsa.cores import MOST_THREADS
from pydsa.diagnosis import refuse_hidden
from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.gguf_file import open_gguf
from pydsa.graph import CacheRef, Graph
from pydsa.limits import allocating
from pydsa.models import architecture
from pydsa.models.blocks import INDEXER, block_of, indexer_advice, settle_blocks
from pydsa.models.stored import made_bytes
from pydsa.models.weights import Weights
from pydsa.options import choose, counts
from pydsa.override import check_all_read, override
from pydsa.plan import Runner, check_memory, lay_out
from pydsa.quants import cache_row_bytes
from pydsa.recorder import record
from pydsa.residence import copied, lock
from pydsa.sampling import sampling_of
from pydsa.schedule import VARIANTS, Schedule
from pydsa.session import Session, check_ids, check_max_tokens
from pydsa.signals import interrupts_held
from pydsa.tokenizer import Tokenizer

ATTENTION = ("auto", "sparse", "masked", "dense")
DEFAULT_N_CTX, DEFAULT_N_UBATCH = 8192, 2048
BESIDE_HALVES, OF_INDEXERS = (".attn_kv_b.weight",), tuple(f".indexer.{part}" for part in INDEXER)      # ends of names
COMPANION, OF_ACTIVATIONS = re.compile(r"(\.weight)?\.(input_)?scale$"), ".input_scale"       # beside a matrix


class Setup:
    """What running a file needs.

    It has the configuration (config), the schedule of variants, a layout of each variant's graph, and the memory in bytes. No weights are
    read and nothing is compiled. `pydsa info` shows it. notes: sentences on what is unusual in the file. The parameters, and the errors
    raised, are those of load().
    """

    def __init__(self, path, n_ctx=None, device="cpu", kv_type="i16", attention="auto", dsa_top_k=None,
                 n_ubatch=DEFAULT_N_UBATCH, index_type=None, override_kv=None, reproducible=False, mmap=True, mlock=False):
        self.device_name = choose("device", device, DEVICES)
        self.device = DEVICES[device]
        self.reproducible = check_reproducible(device, reproducible)
        self.mmap, self.mlock = check_residence(device, mmap, mlock)
        self.kv_type = choose_cache_type("kv_type", kv_type)
        self.index_type = choose_cache_type("index_type", index_type or ("f32" if kv_type == "f32" else "i8"))
        self.attention = choose("attention", attention, ATTENTION)
        n_ctx, n_ubatch, dsa_top_k = counts(2**31 - 1, n_ctx=n_ctx, n_ubatch=n_ubatch, dsa_top_k=dsa_top_k)
        file = open_gguf(os.path.expanduser(path))
        metadata = override(file.metadata, override_kv or {})
        self.overrides = {key: (value, file.metadata.get(key)) for key, value in (override_kv or {}).items()}      # and the file's own
        arch = architecture(metadata)
        metadata, self.notes = settle_blocks(metadata, file.tensors)
        self.file = file._replace(metadata=metadata)
        self.config = self._read_config(arch, dsa_top_k)
        check_all_read(metadata, override_kv or {}, file.metadata)
        self.n_ctx = n_ctx or min(DEFAULT_N_CTX, self.config.n_ctx_train)
        self.n_ubatch = min(n_ubatch, self.n_ctx)
        if self.n_ubatch > self.device.max_ubatch:
            raise PydsaError(f"n_ubatch is {self.n_ubatch}, expected at most {self.device.max_ubatch} on {device} (-ub).")
        self.schedule = Schedule(self.config, self.attention, self.n_ctx, self.n_ubatch, one_form=self.reproducible)
        self.weights = Weights(self.file)
        self.layouts = {name: self._record(arch, VARIANTS[name]) for name in self.schedule.variants}
        self._refuse_unknown_tensors()
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

    def _record(self, arch, variant):
        graph = Graph(self.n_ctx)
        arch.build(graph, self.config, self.weights, variant)
        return lay_out(graph, self.n_ubatch, self.device.float_size, self.device.side_by_side)

    @property
    def _nodes(self):
        return [node for layout in self.layouts.values() for node in layout.graph.nodes]

    @functools.cached_property
    def trunk(self):
        """The tensors of the model, without its MTP blocks."""
        return [tensor for name, tensor in self.file.tensors.items() if block_of(name) < self.config.n_layer]

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
            yield (f"attn_kv_b is split in two on load, {types}, which takes {made_bytes(made) / 2**20:.1f} MiB beside the mapped file; a "
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
    def fingerprint(self):
        """A hash that identifies the model.

        It covers the architecture's keys, all tensors' names, types and shapes, and the first and last 64 bytes of every tensor.
        """
        digest, metadata = hashlib.sha256(), self.file.metadata
        for key in sorted(metadata):
            if key.startswith(f"{self.config.architecture}."):
                digest.update(f"{key} {np.asarray(metadata[key]).tolist()}".encode())
        for tensor in self.file.tensors.values():
            data = tensor.data.reshape(-1)
            digest.update(f"{tensor.name} {tensor.type} {tensor.shape}".encode() + data[:64].tobytes() + data[-64:].tobytes())
        return digest.hexdigest()

    def cache_type(self, ref):
        """The type of a cache's rows, a key of quants.CACHE_TYPES."""
        return {"latents": self.kv_type, "index_keys": self.index_type}[ref.kind]

    def make_caches(self, backend, n_ctx):
        """Empty caches of n_ctx rows: {CacheRef: VectorCache}."""
        with allocating("the caches of a session"):
            return {ref: VectorCache(backend, n_ctx, widths, self.cache_type(ref), self.reproducible)
                    for ref, widths in self.cache_widths.items()}

    @property
    def cache_row_bytes(self):
        """Bytes of one token's row in each cache: {CacheRef: bytes}."""
        return {ref: cache_row_bytes(self.cache_type(ref), widths) for ref, widths in self.cache_widths.items()}

    @property
    def cache_bytes(self):
        """Bytes of one session's caches with a full context."""
        return self.n_ctx * sum(self.cache_row_bytes.values())

    @property
    def scratch_bytes(self):
        """Bytes of the intermediate values of one ubatch, and a row of logits."""
        values = max(layout.n_bytes for layout in self.layouts.values())
        output = (self.config.n_vocab + self.config.n_embd) * self.device.float_size
        return values + output + self.device.scratch(self._nodes, self.n_ubatch)

    @property
    def score_bytes(self):
        """Bytes of the indexer's score rows with a full context.

        top-k takes 16 bytes more for each key and thread, which are not counted. Score rows and packed_latent_bytes are the only scratch
        memory that grows with the context.
        """
        if not any(node.op == "indexer_select" for node in self._nodes):
            return 0
        return min(self.device.scored_together, self.n_ubatch) * self.device.float_size * self.n_ctx

    @property
    def packed_latent_bytes(self):
        """Bytes of the packed latents, at most.

        Prompts in MLA's plain form pack them.
        """
        return self.device.packed_latents(self.config, self.schedule.plain_form_until)

    @property
    def mapped_bytes(self):
        """Bytes of the weights that are read from the mapped file."""
        return self.device.weights(self.weights.used.values())[0] if self.mmap else 0

    @property
    def copied_bytes(self):
        """Bytes of the weights that the backend copies.

        The CPU copies vectors, a GPU all blocks, and the reference everything, as float32. Without mmap matrices are copied too.
        """
        mapped, copies = self.device.weights(self.weights.used.values())
        return copies if self.mmap else mapped + copies

    @property
    def total_bytes(self):
        """Bytes of a model with one session, without the mapped file."""
        return self.cache_bytes + self.scratch_bytes + self.score_bytes + self.packed_latent_bytes + self.copied_bytes


class Model:
    """A model ready to run, made by load().

    config: the file's hyperparameters. metadata: its key-value pairs. setup: the Setup. n_ctx: tokens of a session's context. n_ubatch:
    tokens of a prompt that run together. kv_type, index_type: cache types. attention: as given to load(). top_k: keys that a token attends
    to, None without an indexer. threads, threads_batch: the threads of steps of one token and of several, None if the backend chooses.
    """

    def __init__(self, setup, threads=None, threads_batch=None, progress=None):
        self.setup, self.config, self.metadata = setup, setup.config, setup.file.metadata
        self.n_ctx, self.n_ubatch, self.kv_type, self.index_type = setup.n_ctx, setup.n_ubatch, setup.kv_type, setup.index_type
        self.attention, self.top_k = setup.attention, setup.config.top_k
        one, several = counts(MOST_THREADS, threads=threads, threads_batch=threads_batch)
        with interrupts_held():
            self.backend = setup.device.backend()
        self.threads = self.backend.check_threads(one)
        self.threads_batch = self.threads if several is None else self.backend.check_threads(several)
        check_memory(setup.total_bytes, f"The model with a context of {setup.n_ctx} tokens", self.backend)
        warn_of_gaps(setup.file)
        self.tokenizer      # read now, so that load() raises its errors
        self.runner = Runner(self.backend, setup.layouts, self.threads, self.threads_batch, setup.reproducible)
        self._chats = collections.deque(maxlen=1)       # the session of the last chat, while no answer is read from it
        steps = [self._read_weights, self._compile]
        for step in steps if self.backend.WEIGHTS_FIRST else reversed(steps):
            step(progress)

    def _read_weights(self, progress):
        """Give all weights to the backend; copies to a GPU report progress."""
        setup = self.setup
        tensors = list(setup.weights.used.values())
        for i, tensor in enumerate(tensors):
            if progress is not None and (setup.device.copies_blocks or not setup.mmap):
                progress(i, len(tensors), tensor.name)
            if setup.device.copies_blocks:
                refuse_hidden(tensor, self.metadata.path)
            self.runner.read(tensor if setup.mmap else copied(tensor))
        if setup.mlock:
            lock([self.runner.weight(tensor).data for tensor in tensors if len(tensor.shape) > 1])

    def _compile(self, progress):
        """Compile every kernel that a step can need."""
        self.backend.compile_calls(self._all_calls, progress)

    def _all_calls(self):
        """The calls of steps that together need every kernel.

        Steps of one row and of two are bound, as views of one row are contiguous where views of several are not. Steps of one token never
        take the plain form of attention.
        """
        caches, calls = self.setup.make_caches(self.backend, 1), []
        for name in self.setup.schedule.variants:
            for n in {2} if VARIANTS[name].plain else {1, min(2, self.n_ubatch)}:
                calls += [(function, args) for _, function, args in self.runner.bind(name, caches, n, n).calls]
        return calls

    @functools.cached_property
    def tokenizer(self):
        """The Tokenizer of the file."""
        return Tokenizer.from_metadata(self.metadata, self.config.n_vocab)

    def __repr__(self):
        return (f"<pydsa.Model {self.config.name!r}: {self.config.architecture} {self.setup.file_type}, "
                f"n_ctx={self.n_ctx}, on {self.setup.device_name}>")

    def session(self):
        """A new, empty Session.

        Raises OutOfMemoryError if its caches do not fit in memory.
        """
        return Session(self.runner, self.setup, self.tokenizer)

    def tokenize(self, text, add_bos=None, parse_special=False):
        """Text -> token ids, a list of int.

        add_bos: put BOS first; None: as the file says. parse_special: encode the texts of control tokens as these tokens. Raises PydsaError
        if the text cannot be encoded.
        """
        return self.tokenizer.encode(text, self.tokenizer.add_bos if add_bos is None else add_bos, parse_special)

    def detokenize(self, ids):
        """Token ids -> text, with the texts of control tokens.

        Raises PydsaError for an id that is not in the vocabulary.
        """
        return self.tokenizer.decode(ids)

    def logits(self, ids):
        """Logits after each token of a new context, float32 [len(ids), n_vocab].

        Raises PydsaError, ContextFullError and OutOfMemoryError as Session.logits does.
        """
        return self.session().logits(ids)

    def record(self, prompt, **options):
        """Run a prompt, and an answer to it, in a new context -> a Recording.

        The options, and the errors raised, are those of recorder.record().
        """
        return record(self, prompt, **options)

    def generate(self, prompt, max_tokens=None, stop=None, json_schema=None, grammar=None, **sampling):
        """Continue a text, or token ids, in a new context.

        Returns an iterator of str pieces, in whole characters, as they are sampled (an answers.Stream). max_tokens: tokens to sample at
        most; None: no limit. stop: a text, or a list of texts, of which the first to come ends the answer, and is no part of it.
        json_schema: a dict, by which the answer is valid JSON; grammar: a text in GBNF, by which it is written (constraint.constraint_for).
        sampling: fields of Sampling; logit_bias may also have texts as keys, and then holds for each of a text's tokens. Raises PydsaError
        for options or ids that are not valid, and ContextFullError when the context is full.
        """
        sampling, reader = sampling_of(sampling, self.tokenizer, self.config.n_vocab), Reader(self.tokenizer, stop)
        check_max_tokens(max_tokens)
        ids = check_ids(self.tokenize(prompt) if isinstance(prompt, str) else prompt, self.config.n_vocab)
        constraint = constraint_for(self.tokenizer, json_schema=json_schema, grammar=grammar)
        return reader.read(self.session().generate(ids, max_tokens, sampling, None, constraint), max_tokens, ids.size)

    def complete(self, prompt, max_tokens=None, stop=None, **options):
        """Continue a text, or token ids, as generate() does -> a whole Reply."""
        return self.generate(prompt, max_tokens, stop, **options).finish()

    def chat(self, messages, max_tokens=None, thinking=False, tools=None, template=None, progress=None, stop=None, tool_choice="auto",
             json_schema=None, grammar=None, **sampling):
        """Answer a conversation, a list of {"role": ..., "content": ...}.

        Returns an iterator of str pieces, in whole characters, as they are sampled (an answers.Stream). A piece's `kind` tells the answer
        from reasoning and, with tools, from calls (answers.Piece); `reply` of the iterator is what they add up to so far (answers.Reply).
        The session of the last answer is kept: the common prefix of the two conversations is not run again. Answers that are read at the
        same time have sessions of their own.

        messages, thinking, tools, template: as for chat.encode_chat; warns if the template takes no notice of `thinking`. max_tokens, stop,
        json_schema, grammar, sampling: as for generate(); stop is looked for in all that the model writes. tool_choice: "auto", "none",
        "required" or {"name": ...}, by which calls follow the tools' schemas (tool_grammars.tools); None: nothing is restricted.
        progress(done, total) is called while the prompt runs, with tokens. Raises the errors of encode_chat and of generate().
        """
        sampling = sampling_of(sampling, self.tokenizer, self.config.n_vocab)
        check_max_tokens(max_tokens)
        prompt = chat_prompt(self.tokenizer, messages, thinking=thinking, tools=tools, template=template)
        note = thinking_note(self.tokenizer, thinking, template)
        if note:
            warnings.warn(note, stacklevel=2)
        ids, reader = prompt.ids, Reader(self.tokenizer, stop, prompt.layout)
        constraint = constraint_for(self.tokenizer, prompt.layout, thinking, json_schema=json_schema, grammar=grammar,
                                    tool_choice=tool_choice)
        return reader.read(self._answer(ids, max_tokens, sampling, progress, constraint), max_tokens, len(ids))

    def reply(self, messages, max_tokens=None, **options):
        """Answer a conversation as chat() does, with its options -> a Reply.

        A Reply has text, reasoning, tool_calls, finish_reason, n_prompt, n_generated, and the message to put back (answers.Reply).
        """
        return self.chat(messages, max_tokens, **options).finish()

    def _answer(self, ids, max_tokens, sampling, progress, constraint):
        """Yield the ids after a whole context, with the last chat's session."""
        try:
            session = self._chats.pop()
        except IndexError:
            session = self.session()
        try:
            yield from session.generate(ids[session.reuse(ids):], max_tokens, sampling, progress, constraint)
        finally:
            self._chats.append(session)


def load(path, n_ctx=None, device="cpu", threads=None, kv_type="i16", attention="auto", dsa_top_k=None, n_ubatch=DEFAULT_N_UBATCH,
         progress=None, index_type=None, override_kv=None, threads_batch=None, reproducible=False, mmap=True, mlock=False):
    """Open a GGUF file and make it ready to run -> Model.

    path: the file, or its first part if it is split.
    n_ctx: tokens that the context can hold; None: 8192, or the model's own limit if that is less.
    device: "cpu", "cuda" (an NVIDIA GPU; needs the extra `cuda`), or "reference" for plain numpy.
    threads: CPU threads for steps of one token, which generate; None: one for each physical core that this process may use.
    kv_type: type of the cached latents: "f32", "f16", "bf16", "i16" (int16, with a scale for each of a row's two parts) or "i8" (int8,
        with the same scales; alias "q8_0").
    attention: "auto" (exact dense attention while the context is no longer than top_k, sparse beyond), "sparse", "masked", "dense".
    dsa_top_k: keys that a token attends to; None: the file's number.
    n_ubatch: tokens of a prompt that run together (2048); fewer take less memory.
    progress(done, total, name): called while kernels are compiled, and while weights are copied.
    index_type: type of the indexer's cached keys, as for kv_type; None: "i8", which is the fastest, or "f32" if kv_type is "f32".
    override_kv: values that replace those of the file's metadata, {key: int, float, bool or str}.
    threads_batch: CPU threads for steps of several tokens, which are those of prompts; None: as many as `threads`.
    reproducible: True: a token's logits are the same, bit for bit, whatever the steps are that run it: the number of threads, ubatches,
        other tokens in a step, prefixes that are used again. This takes longer (docs/running.md); on the CPU only.
    mmap: False: read the weights into memory of the process, instead of mapping the file; it must hold them all. mlock: True: keep the
        weights in memory, so that the system does not drop those that were not used for long. Both as in llama.cpp, on the CPU only.

    Warns (UserWarning) of what is unusual in the file. Raises GGUFError if the file is damaged, UnsupportedModelError if pydsa cannot run
    the model, OutOfMemoryError if memory is short, and PydsaError for options that are not valid.
    """
    setup = Setup(os.fspath(path), n_ctx, device, kv_type, attention, dsa_top_k, n_ubatch, index_type, override_kv, reproducible,
                  mmap, mlock)
    for note in setup.notes:
        warnings.warn(f"{setup.file.metadata.path}: {note}", stacklevel=2)
    return Model(setup, threads, threads_batch, progress)
