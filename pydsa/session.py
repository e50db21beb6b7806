"""Session holds the caches and the tokens of one conversation.

Many sessions can use the weights and the buffer of one model.
"""
import collections
import contextlib
import math

import numpy as np

from pydsa.cards import shown
from pydsa.diagnosis import explained
from pydsa.errors import ContextFullError, DamagedWeightsError, PydsaError, SessionFileError
from pydsa.executor.hooks import Hook, Observer
from pydsa.executor.plan import check_memory
from pydsa.executor.schedule import VARIANTS
from pydsa.machine.limits import allocating
from pydsa.options import choose, counts
from pydsa.recordings.recorder import LIMIT, Recorder
from pydsa.sampling import Picked, Sampler
from pydsa.saved.prefixes import common_length
from pydsa.selections.selector import Selector, check_select
from pydsa.stepping import Layers, Step, check_ids, check_max_tokens, in_ubatches
from pydsa.words import card_of_a_session


@shown(lambda session: card_of_a_session(session, session._setup))
class Session:
    """One conversation, made by Model.session().

    tokens: the ids whose keys are in the caches, a list of int. n_past: their number. Methods that append tokens raise PydsaError for ids
    that are not in the vocabulary, and ContextFullError if the tokens do not fit; nothing is run then.

    caches: {CacheRef: VectorCache}. runner runs the steps. setup (setup.Setup) has the schedule and the limits. tokenizer: the model's;
    it knows the tokens that end a turn.
    """

    def __init__(self, runner, setup, tokenizer):
        runner.check_room(setup, 1, "the caches of a new session")
        self._runner, self._setup, self.tokenizer, self._eog_ids = runner, setup, tokenizer, tokenizer.eog_ids
        self.tokens = []
        self.caches = runner.make_caches(setup, setup.n_ctx)
        self._bound, self._hooks, self._recorders, self._all_hooks, self._variant = {}, (), (), (), None
        self._selector, self._selected = None, []       # [(first token, the `select` that ran it and those after it)]
        self._ahead = runner.ahead()
        self._under_way = collections.deque()       # Steps, in the order they were begun

    @property
    def n_past(self):
        """The number of tokens in the context."""
        return len(self.tokens)

    @property
    def setup(self):
        """The setup.Setup of the session's model."""
        return self._setup

    def prefill(self, ids, progress=None, observe=None):
        """Append tokens -> the logits after the last one, float32 [n_vocab].

        They run in ubatches of n_ubatch. progress(done, total) is called after each layer, with numbers of tokens; observe(node, arrays)
        after each op, with the arrays that it wrote. If the call is interrupted, the ubatches that are complete stay in the context.
        """
        return self._append(ids, 1, progress, observe)[0]

    def decode(self, token_id):
        """Append one token -> the logits after it, float32 [n_vocab]."""
        return self.prefill([token_id])

    def logits(self, ids, progress=None, last=None):
        """Append tokens -> the logits after each, float32 [len(ids), n_vocab].

        last: the number of tokens, at the end, after which logits are wanted, 1 to len(ids); None: all. Raises OutOfMemoryError if the
        logits do not fit in memory.
        """
        ids = check_ids(ids, self._setup.config.n_vocab)
        last, = counts(ids.size, last=last)
        return self._append(ids, last or ids.size, progress)

    def _append(self, ids, n_last, progress=None, observe=None):
        """Run ids in ubatches -> logits [n_last, n_vocab] of the last rows."""
        setup = self._setup
        ids, n_vocab = check_ids(ids, setup.config.n_vocab), setup.config.n_vocab
        self._check_fits(ids.size)
        if n_last > 1:
            check_memory((n_last + min(n_last, setup.n_ubatch)) * n_vocab * 4, f"The logits of {n_last} tokens")
        with allocating("the logits"):
            logits = np.empty((n_last, n_vocab), np.float32)
        hooks = self._all_hooks if observe is None else (*self._all_hooks, self._checked_hook(Observer(observe)))
        before, observes = ids.size - n_last, self._runner.observes     # tokens without logits

        def begin(start, ubatch):
            rows = logits[max(0, start - before):max(0, start + ubatch.size - before)]
            layers = () if progress is None or not observes else (self._reporting(progress, start, ubatch.size, ids.size),)
            return self._begin(ubatch, rows, (*layers, *hooks))

        in_ubatches(ids, setup.n_ubatch, self._runner.depth, begin, None if progress is None or observes else
                    lambda n: progress(n, ids.size))
        if progress is not None:
            progress(ids.size, ids.size)
        return logits

    def begin(self, ids, sampler=None, logits=None):
        """Begin the step that appends some tokens -> a Step.

        ids: a list of at most n_ubatch ids of the vocabulary. Steps are finished in the order they were begun. logits: where those after
        the last token belong, [1, n_vocab], unless the runner samples for `sampler`; [0, n_vocab]: nothing is wanted; None: a new array.
        Raises ContextFullError if the tokens do not fit.
        """
        self._check_fits(len(ids), self.n_begun)
        logits = np.empty((1, self._setup.config.n_vocab), np.float32) if logits is None else logits
        return self._begin(np.asarray(ids, np.int32), logits, self._all_hooks, [sampler] if sampler and len(logits) else None)

    @property
    def n_begun(self):
        """The number of tokens in the context, with those of the steps under way."""
        return self.n_past + sum(step.ids.size for step in self._under_way)

    def reuse(self, ids):
        """Keep the longest common prefix with ids -> its number of tokens.

        At least one token of ids is left to run. After prefill(ids[session.reuse(ids):]) the context is ids, and the prefix was not run
        again. Tokens for which another `select` chose keys are not kept.
        """
        ids = check_ids(ids, self._setup.config.n_vocab)
        n = common_length(np.array(self.tokens, np.int32), ids[:-1])
        self.truncate(min([n, *(start for start, select in self._selected if select is not self.select)]))
        return self.n_past

    def _check_fits(self, n, n_past=None):
        if (self.n_past if n_past is None else n_past) + n > self._setup.n_ctx:
            raise self.full(n)

    def full(self, n):
        """The ContextFullError of n tokens that do not fit."""
        return ContextFullError(f"The context holds {self._setup.n_ctx} tokens; {self.n_past} are in use and {n} more do not fit. "
                                "Load the model with a larger n_ctx (-c), or start a new context.")

    def cut(self, start, stop):
        """Copies of the cache rows of tokens start to stop.

        They are a list of uint8 [n, row_bytes], one for each cache. A session of the same model can append these tokens with paste().
        """
        return self._runner.cut(self.caches, start, stop)

    def paste(self, tokens, rows):
        """Append tokens with the cache rows that another session has for them.

        Both must have the same tokens before these. tokens: a list of ids. rows: as cut() returns them. Raises ContextFullError if
        they do not fit.
        """
        self._check_fits(len(tokens))
        self._ahead.forget()
        for cache, stored in zip(self.caches.values(), rows):
            cache.restore(stored, self.n_past)
        self.append(tokens)

    @property
    def hooks(self):
        """The hooks.Hook objects that are called in the session's steps, a tuple.

        They are called in this order. Steps of engine.Engine and Batch, which run several sessions together, refuse sessions with hooks.
        """
        return self._hooks

    @hooks.setter
    def hooks(self, hooks):
        hooks = tuple(hooks)
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise PydsaError(f"session.hooks has {hook!r}, expected objects of hooks.Hook.")
            self._checked_hook(hook)
        self._hooks = hooks
        self._change_hooks()

    @property
    def select(self):
        """A function that chooses keys in place of the indexers, or None.

        It gets a selections.selector.Choice, for each layer with an indexer in each step, and returns the keys of each token: integers
        [n, m], -1 for none, in any order; a mask, bool [n, n_keys]; or a list of lists. pydsa.selections has some. While it is set, all
        steps take the sparse form. Tokens that ran before keep their cache rows; reuse() takes only those that ran with the same function.
        Setting it raises PydsaError where no list of keys is used; steps raise it for keys that cannot be.
        """
        return None if self._selector is None else self._selector.select

    @select.setter
    def select(self, select):
        check_select(select, self._setup)
        self._checked_hook(select)
        self._check_takes_keys(self._variant, select)
        self._selector = None if select is None else Selector(select, self.caches, set(self._setup.config.indexed_layers))
        self._change_hooks()

    def append(self, tokens):
        """Note tokens, a list of int, whose cache rows have been written."""
        if not self._selected or self._selected[-1][1] is not self.select:
            self._selected.append((self.n_past, self.select))
        self.tokens.extend(tokens)

    @property
    def has_hooks(self):
        """Whether something is called in the session's steps."""
        return bool(self._all_hooks)

    @property
    def _late(self):
        """The hooks that need not be called before the end of a step."""
        return tuple(hook for hook in self._all_hooks if hook.late)

    def _change_hooks(self):
        self._all_hooks = *(() if self._selector is None else (self._selector,)), *self._hooks, *self._recorders
        self._bound = {key: bound for key, bound in self._bound.items() if bound.late in ((), self._late)}
        self._ahead.forget()

    @property
    def variant(self):
        """The name of the variant that all steps take (schedule.VARIANTS).

        It is one of the model's, setup.schedule.variants, for as long as `select` is set one that takes a list of keys; None: that of the
        schedule. Steps of several sessions together refuse those with one.
        """
        return self._variant

    @variant.setter
    def variant(self, name):
        if name is not None:
            self._check_takes_keys(choose("variant", name, self._setup.schedule.variants), self.select)
        self._variant = name
        self._ahead.forget()

    @staticmethod
    def _check_takes_keys(variant, select):
        if variant is not None and select is not None and VARIANTS[variant].indexer != "indices":
            raise PydsaError(f"The session's variant is {variant!r}, which takes no list of keys: set session.select to None, or "
                             "session.variant.")

    def record(self, selection=True, routing=True, scores=False, mass=False, path=None, limit=LIMIT):
        """A context in which the session's steps are recorded.

            with session.record() as recording: session.prefill(ids)

        Recorded are for each token and layer: with selection the keys that it attends to; with routing its experts and their weights; with
        scores also the indexer's scores of the selection; with mass the share of dense attention that the keys hold. Scores and mass are
        computed again by numpy from what is stored, which takes much longer than the step. The Recording takes up to `limit` bytes of
        memory, about: then the oldest tokens leave it. With a path everything goes to this file instead, which is complete after the
        context, and the Recording can be read then. It holds the tokens of the context: those that the session forgets (truncate(),
        reuse(), load()) leave it. Raises PydsaError for a selection where no keys are chosen, and RecordingFileError if the file cannot be
        written.
        """
        self._checked_hook("record")
        return self._recording(Recorder(self._setup, self.caches, selection, routing, scores, mass, path, limit))

    @contextlib.contextmanager
    def _recording(self, recorder):
        with recorder.running() as recording:
            self._recorders = *self._recorders, recorder
            self._change_hooks()
            try:
                yield recording
            finally:
                self._recorders = tuple(other for other in self._recorders if other is not recorder)
                self._change_hooks()

    def _reporting(self, progress, start, n_tokens, total):
        """A hook that reports the progress of a ubatch after each layer."""
        progress(start, total)
        n_layer = self._setup.config.n_layer
        return Layers(lambda layers: progress(start + n_tokens * layers / n_layer, total))

    def _begin(self, ubatch, logits, hooks, samplers=None):
        n_past = self.n_begun
        bound = self._bind(n_past, ubatch.size, len(logits), any(hook.all_rows for hook in hooks))
        self._ahead.forget()
        with self._explaining(lambda: (bound, ubatch, n_past)):
            step = Step(self, ubatch, n_past, bound, hooks, logits, bound.begin(ubatch, n_past, logits, hooks, samplers))
        self._under_way.append(step)
        return step

    @contextlib.contextmanager
    def _explaining(self, step):
        """A context whose DamagedWeightsError says where it comes from.

        step() -> (bound, ids, n_past), the step that is run again for this. Stages have looked for it themselves.
        """
        try:
            yield
        except DamagedWeightsError as error:
            if not self._runner.observes:
                raise
            raise explained(error, *step(), self._setup.weights.used) from error

    def _checked_hook(self, hook):
        """The hook; raises PydsaError where steps run in other processes."""
        if hook is None or self._runner.observes:
            return hook
        raise PydsaError("The model runs in stages, in other processes, where hooks, recordings and functions that choose keys cannot look "
                         "into its steps: load it without stages.")

    def timed(self, ids):
        """Append at most n_ubatch tokens -> the time of each op.

        Returns [(node, seconds)] of the step. Raises PydsaError for more tokens than n_ubatch.
        """
        ids = check_ids(ids, self._setup.config.n_vocab)
        if ids.size > self._setup.n_ubatch:
            raise PydsaError(f"There are {ids.size} tokens to time in one step, expected at most {self._setup.n_ubatch} (n_ubatch).")
        self._check_fits(ids.size)
        self._checked_hook("timed")
        if self._selector is not None:
            raise PydsaError("A step with session.select cannot be timed: its time would be that of the function.")
        times = self._bind(self.n_past, ids.size, 1).timed(ids, self.n_past)
        self.append(ids.tolist())
        return times

    def _bind(self, n_past, n_tokens, n_outputs, all_rows=False):
        """The Bound of a step; those of repeated steps are kept."""
        variant = self._variant or self._setup.schedule.variant(n_past, n_tokens, self._selector is not None)
        late = self._late if n_tokens == 1 else ()
        key = variant, n_tokens, n_outputs, late, all_rows and n_tokens > 1
        bound = self._bound.get(key)
        if bound is None:
            bound = self._runner.bind(variant, self.caches, n_tokens, n_outputs, again=n_tokens == 1, late=late, all_rows=all_rows)
            if n_tokens in (1, self._setup.n_ubatch) and n_outputs <= 1:
                self._bound[key] = bound
        return bound

    def generate(self, ids, max_tokens=None, sampling=None, progress=None, constraint=None):
        """Append ids, then yield sampled ids as sample() does.

        max_tokens, sampling, constraint: as for sample(). progress: as for prefill().
        """
        check_max_tokens(max_tokens)
        yield from self.sample(self.prefill(ids, progress), max_tokens, sampling, constraint)

    def sample(self, logits, max_tokens=None, sampling=None, constraint=None):
        """Yield sampled ids, int, until one ends the turn.

        The id that ends the turn is not yielded. Sampling also ends after max_tokens ids, or with ContextFullError. An id is appended to
        the context when the next one is asked for; the last of max_tokens is never appended.

        logits: after the last token of the context, [n_vocab]. max_tokens: an integer from 0 on; None: no limit. sampling: a Sampling;
        None: its defaults. constraint (constraint.Constraint): the ids follow it, and end where it is complete; None: any may come. Raises
        PydsaError for a max_tokens that is not valid, and DamagedWeightsError if logits are not finite.
        """
        check_max_tokens(max_tokens)
        sampler, state = Sampler(sampling), None if constraint is None else constraint.start()
        n, token = 0, None
        while n != max_tokens and not (state and state.finished):
            token = self.pick(logits, sampler, state) if n == 0 else self._next(token, sampler, state, n + 1 == max_tokens)
            if token in self._eog_ids:
                return
            if state:
                state.advance(token)
            yield token
            n += 1

    def _next(self, token, sampler, state, last):
        """Append a token -> the id sampled after it.

        The device samples it where it can (ahead.py); with hooks, or the state of a constraint, the host does.
        """
        settings = None if state or self._all_hooks else self._ahead.settings(sampler)
        if settings is None:
            return self.pick(self.decode(token), sampler, state)
        self._check_fits(1)
        n_past, full = self.n_past, self.n_past + 1 == self._setup.n_ctx
        bound = self._bind(n_past, 1, 1)
        following = bound if full else self._bind(n_past + 1, 1, 1)
        following_id, greatest = self._ahead.next(settings, token, n_past, bound, following,
                                                  ends=lambda following_id: last or full or following_id in self._eog_ids)
        self.append([token])
        with self._explaining_last():
            sampler.check(greatest)
        return following_id

    def pick(self, logits, sampler, state=None):
        """Sample from logits, all of which must be finite.

        logits: [n_vocab], or a Picked of this sampler. The least is looked at too: -inf would only be a token that never comes.
        """
        with self._explaining_last():
            if isinstance(logits, Picked):
                token, least = logits.token, logits.least
                sampler.check(logits.greatest)
            else:
                token = sampler.pick(logits, self.tokens, None if state is None else state.allowed())
                least = logits[logits.argmin()]      # faster than min()
            if not math.isfinite(least):
                raise DamagedWeightsError(f"the least of the logits is {least}, expected a finite number: the weights are damaged, or a "
                                          "computation overflowed")
            return token

    def _explaining_last(self):
        """_explaining() for the logits after the last token."""
        if not self.tokens:     # the logits are not of this session
            return contextlib.nullcontext()
        n_past = self.n_past - 1
        return self._explaining(lambda: (self._bind(n_past, 1, 1), self.tokens[-1:], n_past))

    def truncate(self, n):
        """Keep only the first n tokens.

        Later tokens overwrite the cache rows of the others. Raises PydsaError if n is not an integer from 0 to n_past.
        """
        if not isinstance(n, (int, np.integer)) or not 0 <= n <= self.n_past:
            raise PydsaError(f"The session has {self.n_past} tokens; it cannot be truncated to {n!r}.")
        del self.tokens[n:]
        self._forget(n)

    def _forget(self, n):
        """Tell the recorders that only the first n tokens remain."""
        self._selected = [(start, select) for start, select in self._selected if start < n]
        for recorder in self._recorders:
            recorder.cut(n)

    def _identity(self):
        """The settings that a saved session and this one must have in common."""
        setup = self._setup
        return {"model": setup.fingerprint, "kv_type": setup.kv_type, "index_type": setup.index_type,
                "attention": setup.attention, "top_k": setup.config.top_k, "reproducible": setup.reproducible,
                "caches": [[ref.kind, ref.layer, cache.row_bytes] for ref, cache in self.caches.items()]}

    def save(self, path):
        """Write tokens and caches to a file, or to one for each stage.

        The file replaces an older one only when it is complete. Raises SessionFileError if it cannot be written, or if `select` chose keys
        for a token: caches depend on that, and a file cannot hold a function.
        """
        for start, select in self._selected:
            if select is not None:
                raise SessionFileError(f"{path}: session.select chose the keys from token {start} on, which a session's file cannot tell; "
                                       "save a session without it.")
        self._runner.save(path, self._identity(), self.tokens, self.caches)

    def load(self, path):
        """Replace the context by that of a saved session.

        The session must be of the same model and cache types. Raises SessionFileError if the file is damaged or of another model, and
        ContextFullError if its tokens do not fit; the session then stays as it is. The file is read twice, once to check it: if the second
        read fails, the session is left empty.
        """
        setup = self._setup
        with self._runner.saved(path, self._identity(), self.caches, setup.config.n_vocab, setup.n_ctx) as (tokens, read):
            self._ahead.forget()
            self.tokens = []        # if the read fails, no mixture of two sessions remains
            self._forget(0)
            read()
        self.tokens = tokens
        self._selected = [(0, None)]
