"""A Model runs a GGUF file on the devices of one process.

A Model holds the weights, the tokenizer and the bound backend; what it needs says its Setup (setup.py).
"""
import collections
import warnings

from pydsa.backends.devices import backend_of, device_of, watch_maps
from pydsa.cards import shown
from pydsa.chat import chat_prompt, thinking_note
from pydsa.diagnosis import refuse_hidden
from pydsa.errors import OutOfMemoryError
from pydsa.executor.memory import tensors_on
from pydsa.executor.plan import Runner, check_fits
from pydsa.executor.schedule import HEAD, VARIANTS
from pydsa.executor.streaming import bytes_for_slots, measure, no_room_for_slots, pays_from
from pydsa.gguf.check import warn_of_gaps
from pydsa.gguf.parts import check_here
from pydsa.machine.cores import MOST_THREADS
from pydsa.machine.numa import memory_placed, use_numa
from pydsa.machine.residence import copied, lock, warn_of_nodes
from pydsa.options import counts
from pydsa.recordings.recorder import record
from pydsa.sampling import sampling_of
from pydsa.session import Session
from pydsa.signals import interrupts_held
from pydsa.stepping import check_ids, check_max_tokens
from pydsa.text.answers import Reader
from pydsa.text.constraint import constraint_for
from pydsa.words import card_of_a_model


@shown(card_of_a_model)
class Model:
    """A model ready to run, made by load().

    config: the file's hyperparameters. metadata: its key-value pairs. tokenizer: the Tokenizer. setup: the Setup. n_ctx: tokens of a
    session's context. n_ubatch: tokens of a prompt that run together. kv_type, index_type: cache types. attention: as given to load().
    top_k: keys that a token attends to, None without an indexer. threads, threads_batch: the threads of steps of one token and of several,
    None if the backend chooses. stages: (first layer, one after the last) of each stage, None where all is in this process.
    """

    def __init__(self, setup, threads=None, threads_batch=None, progress=None):
        self._take(setup)
        one, several = counts(MOST_THREADS, threads=threads, threads_batch=threads_batch)
        with interrupts_held():
            backends = {name: backend_of(name, setup.precision) for name in setup.placement.devices}
            watch_maps(backends)
        self.backend = next(iter(backends.values()))
        self.setup.schedule.costs = self.backend.form_costs(setup.kv_type)
        if any(device_of(name).places for name in backends):
            use_numa(setup.numa)
        self.threads = _threads(backends, one)
        self.threads_batch = self.threads if several is None else _threads(backends, several)
        check_here(setup.file, setup.weights.used)
        self._check_fits(backends)
        setup = self.setup
        self.tokenizer = setup.tokenizer        # read now, so that load() raises its errors
        with memory_placed():       # a page of the file that is looked at brings its neighbours; pinned memory is there at once
            warn_of_gaps(setup.file)
            warn_of_nodes(_mapped(setup))
            self.runner = Runner(backends, setup.layouts, self.threads, self.threads_batch, setup.reproducible, setup.streaming,
                                 setup.file.maps)
        early = [on for on in self.runner.on.items() if on[1].backend.WEIGHTS_FIRST]
        late = [on for on in self.runner.on.items() if not on[1].backend.WEIGHTS_FIRST]
        self._read_weights(early, progress)
        self._compile(late, progress)
        self._read_weights(late, progress)
        self._compile(early, progress)

    def _take(self, setup):
        """Take what a Setup says, and what a model has wherever it runs."""
        self.setup, self.config, self.metadata = setup, setup.config, setup.file.metadata
        self.n_ctx, self.n_ubatch, self.kv_type, self.index_type = setup.n_ctx, setup.n_ubatch, setup.kv_type, setup.index_type
        self.attention, self.top_k, self.stages = setup.attention, setup.config.top_k, None
        self._chats = collections.deque(maxlen=1)       # the session of the last chat, while no answer is read from it

    def _check_fits(self, backends):
        """Check that the model fits, and settle whether experts are streamed.

        Where it was not said from how many tokens on, they are not if their slots do not fit, or if the CPU takes less time.
        """
        def check(setup):
            check_fits({name: memory.total for name, memory in setup.memory.items()}, backends,
                       f"The model with a context of {setup.n_ctx} tokens")

        setup = self.setup
        if setup.streaming.stream_from is not None:
            check(setup)
            return
        try:
            check(setup)
        except OutOfMemoryError:
            self.setup = setup.streamed_from(0)
            check(self.setup)
            warnings.warn(f"{self.metadata.path}: {no_room_for_slots(bytes_for_slots(setup, self.setup))}", stacklevel=5)
        else:
            rates = measure(setup.streaming, backends, self.threads_batch)
            self.setup = setup.streamed_from(pays_from(setup.streaming.arrivals, rates, setup.n_ubatch) if rates else 0)

    @memory_placed()
    def _read_weights(self, devices, progress):
        """Give their weights to backends; copies to a GPU report progress."""
        setup = self.setup
        for name, on in devices:
            device, tensors = device_of(name), list(tensors_on(setup, name).values())
            for i, tensor in enumerate(tensors):
                if progress is not None and (device.copies_blocks or not setup.mmap):
                    progress(i, len(tensors), tensor.name)
                if device.copies_blocks:
                    refuse_hidden(tensor, self.metadata.path)
                on.read(copied(tensor) if device.maps and not setup.mmap else tensor)
            if setup.mlock and device.maps:
                lock([on.weight(tensor).data for tensor in tensors if len(tensor.shape) > 1])

    def _compile(self, devices, progress):
        for _, on in devices:
            compile_for(self.runner, self.setup, on.backend, progress)
            if hasattr(on.backend, "reserve"):
                reserve_for(self.runner, self.setup, on.backend)

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

        The options, and the errors raised, are those of recordings.recorder.record().
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
        sampling, reader = sampling_of(self.tokenizer, sampling), Reader(self.tokenizer, stop)
        check_max_tokens(max_tokens)
        ids = check_ids(self.tokenize(prompt) if isinstance(prompt, str) else prompt, self.config.n_vocab)
        constraint = constraint_for(self.tokenizer, json_schema=json_schema, grammar=grammar)
        return reader.read(self.session().generate(ids, max_tokens, sampling, None, constraint), max_tokens, ids.size)

    def complete(self, prompt, max_tokens=None, stop=None, **options):
        """Continue a text, or token ids, as generate() does -> a whole Reply."""
        return self.generate(prompt, max_tokens, stop, **options).finish()

    def chat(self, messages, max_tokens=None, thinking=False, tools=None, template=None, progress=None, stop=None, tool_choice="auto",
             json_schema=None, grammar=None, template_kwargs=None, **sampling):
        """Answer a conversation, a list of {"role": ..., "content": ...}.

        Returns an iterator of str pieces, in whole characters, as they are sampled (an answers.Stream). A piece's `kind` tells the answer
        from reasoning and, with tools, from calls (answers.Piece); `reply` of the iterator is what they add up to so far (answers.Reply).
        The session of the last answer is kept: the common prefix of the two conversations is not run again. Answers that are read at the
        same time have sessions of their own.

        messages, thinking, tools, template, template_kwargs: as for chat.encode_chat; warns if the template takes no notice of `thinking`.
        max_tokens, stop, json_schema, grammar, sampling: as for generate(); stop is not looked for in reasoning. tool_choice:
        "auto", "none", "required" or {"name": ...}, by which calls follow the tools' schemas (tool_grammars.tools); None: nothing is
        restricted.
        progress(done, total) is called while the prompt runs, with tokens. Raises the errors of encode_chat and of generate().
        """
        sampling = sampling_of(self.tokenizer, sampling)
        check_max_tokens(max_tokens)
        prompt = chat_prompt(self.tokenizer, messages, thinking=thinking, tools=tools, template=template, template_kwargs=template_kwargs)
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

    def look(self, prompt, **options):
        """Answer a prompt, and show what the answer attended to -> a look.Look.

        In a notebook it is a page; .save(path) and .png(path) write files. The options, and the errors raised, are those of
        look.running.look().
        """
        from pydsa.look.running import look
        return look(self, prompt, **options)

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


def compile_for(runner, setup, backend, progress=None):
    """Compile every kernel of a backend that the steps of a setup can need.

    Steps of one row and of two are bound, as views of one row are contiguous where views of several are not. Steps of one token never take
    the plain form of attention, and those whose weights are copied for them have many. progress(done, total, name) is called before each
    kernel.
    """
    def bind():
        caches, calls = runner.make_caches(setup, 1), []
        for name in setup.schedule.variants:
            for n in {2} if VARIANTS[name].plain else {1, min(2, setup.n_ubatch)}:
                calls += runner.bind(name, caches, n, n, streams=False).calls_of(backend)
            for streams in {False, name in setup.streaming.layouts}:
                calls += runner.bind(name, caches, min(2, setup.n_ubatch), 1, streams=streams).calls_of(backend)
        for n in {1, min(2, setup.n_ubatch)} if HEAD in setup.graphs else ():
            calls += runner.bind(HEAD, caches, n, n).calls_of(backend)
        return calls
    backend.compile_calls(bind, progress)


def reserve_for(runner, setup, backend):
    """Let a backend take the scratch memory of large steps, once for all.

    Its caches are full contexts: scores have a place for each key.
    """
    caches = runner.make_caches(setup, setup.n_ctx)
    for name in (*setup.schedule.variants, *({HEAD} & setup.graphs.keys())):
        for n in sorted({setup.n_ubatch, *(min(n, setup.n_ubatch) for n in backend.FEW)}, reverse=True):
            for all_rows in True, False:
                backend.reserve(runner.bind(name, caches, n, 1, all_rows=all_rows).calls_of(backend))


def _mapped(setup):
    """The weights that ops read where the file is mapped, a list."""
    names = [name for name in setup.placement.devices if setup.mmap and device_of(name).maps]
    return [tensor for name in names for tensor in tensors_on(setup, name).values()]


def _threads(backends, n):
    """The threads that the backends take for n; None if all choose their own."""
    return next((found for found in [backend.check_threads(n) for backend in backends.values()] if found is not None), None)
