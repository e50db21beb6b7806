"""Pipeline: the driver's side of a model in stages.

It stands where plan.Runner stands for a model in one process: sessions, batches and the engine use either. Steps are under way in all
stages at once, and run in each in the order in which they were begun.
"""
import itertools
import threading
import time
import weakref

import numpy as np

from pydsa.errors import PydsaError, StageError
from pydsa.options import choose
from pydsa.signals import interrupts_held
from pydsa.stages.caches import Cache, Caches
from pydsa.stages.faults import AT_ONCE, Watch, start_all
from pydsa.stages.journal import Journal, Ran
from pydsa.stages.keeping import cut, save, saved
from pydsa.stages.links import EFFECT, SEEN, Links, Lost, Trouble, raised
from pydsa.stages.saves import Saves
from pydsa.stages.under_way import AWAKE, Conversation, Pending, Ring, Samplers, follow_of, wait
from pydsa.stages.wire import DISCARD, WIRES, Close, Credit, FrameError, Limits, Message, Result, after

AGAIN = 0.1         # seconds after which a request is made again whose stage is gone


class Pipeline:
    """Runs the steps of a model in stages, which are other processes.

    launcher: starts them; what it has is in docs/stages.md. setup: the Setup of the whole model. wire: how hidden rows pass, one of
    wire.WIRES. resume: True, or a folder: a stage that fails is started again, and all goes on; rows that were restored are kept in memory,
    or in the folder, where stages also save all rows (saves.py). threads, threads_batch: as in Runner, for what tells of them. Raises
    StageError, or a stage's own error, if the stages cannot be started.

    depth: the steps that may be under way at once. steps: the number of steps begun.
    """
    samples, observes = True, False

    def __init__(self, launcher, setup, wire="f32", resume=None, threads=None, threads_batch=None):
        self.launcher, self.setup, self.wire = launcher, setup, choose("wire", wire, WIRES)
        self.threads, self.threads_batch, self.backends, self.on, self.steps = threads, threads_batch, {}, {}, 0
        self.depth = len(launcher.stages) + 1
        self.samplers = Samplers(setup.tokenizer.eog_ids)
        self.sending = threading.RLock()            # held while a frame is sent, and while stages are started again
        self.changed = threading.Condition()        # of what follows
        self.under_way = {}         # number -> Pending
        self._told = {}             # number -> Result, of those that wait for the step before
        self.n_finished = 0         # steps, without those that a fault has had run again
        self.error = None           # the StageError that has ended it
        self._numbers, self._sessions = itertools.count(1), itertools.count(1)
        self.conversations = {}     # number -> Conversation
        self._left = []             # conversations whose caches are gone
        self._closing, self._closed = threading.Lock(), False
        self._stage_of = {ref: next(i for i, part in enumerate(launcher.stages) if part[0] <= ref.layer < part[1])
                          for ref in setup.cache_widths}
        self.saves = Saves(self, resume if resume is not True and resume else None)
        self.journal = Journal(self.saves.folder) if resume else None
        self.watch = Watch(self)
        self.links = Links(launcher, Limits.of(setup), self.wire, self._take, self.watch.report)
        try:
            start_all(launcher)
            self.links.connect(self.watch.wait)
        except (Trouble, Lost) as trouble:
            error = self.watch.trouble(trouble)
            self.close()
            raise error from None
        except BaseException:
            self.close()
            raise
        self.watch.start()
        self.saves.start()

    def close(self):
        """End the pipeline and its stages; steps under way fail."""
        self.end(StageError("The model's stages were ended."))

    def end(self, error):
        """End with an error, which all that is under way and comes later gets."""
        with self.changed:
            self.error = self.error or error
            ended, self.under_way = self.under_way, {}
            for pending in ended.values():
                pending.fail(StageError(str(self.error)))
                for conversation in pending.conversations:
                    conversation.steps.clear()
            self.changed.notify_all()
        self.saves.stop()
        self.links.close()
        self.watch.stop()
        with self._closing:         # who closes it again waits until it is closed
            if not self._closed:
                self._closed = True
                self.launcher.close()

    # What sessions, batches and the engine use

    def threads_for(self, n_tokens):
        """The number of threads of a step of n_tokens tokens."""
        return self.threads if n_tokens == 1 else self.threads_batch

    def check_room(self, setup, n, what):
        """Raise OutOfMemoryError if the caches of n sessions do not fit."""
        self.ask_all({"do": "room", "n": n, "what": what})

    def make_caches(self, setup, n_ctx):
        """Empty caches of a new session on all stages: {CacheRef: cache}.

        They are as long as the setup's n_ctx. Raises OutOfMemoryError if they do not fit.
        """
        conversation = Conversation(next(self._sessions))
        with self.changed:
            self.conversations[conversation.number] = conversation
        caches = Caches(self, conversation)
        weakref.finalize(caches, self._left.append, conversation).atexit = False     # what happens at any moment: no lock is taken
        self.ask_all({"do": "open", "session": conversation.number})
        for ref in setup.cache_widths:
            caches[ref] = self._cache(conversation, ref)
        return caches

    def _cache(self, conversation, ref):
        return Cache(self, conversation, self._stage_of[ref], ref, self.setup.n_ctx, self.setup.cache_row_bytes[ref])

    cut, save, saved = cut, save, saved

    def ahead(self):
        """What runs the steps of a session that generate."""
        return Ring(self)

    def bind(self, variant, caches, n_tokens, n_outputs, again=False, late=(), streams=None, all_rows=False):
        """The Bound of a step of n_tokens tokens, n_outputs of them with logits."""
        return self.bind_together(variant, [(caches, n_tokens)], n_outputs, again, late, streams)

    def bind_together(self, variant, parts, n_outputs, again=False, late=(), streams=None):
        """The Bound of a step of tokens of several sessions, as in Runner.

        parts: pairs of a session's caches and its number of tokens. again, streams: of no account here.
        """
        assert n_outputs <= sum(n for _, n in parts) <= self.setup.n_ubatch
        return Bound(self, variant, [(caches.conversation, n) for caches, n in parts], n_outputs, late)

    # Steps

    def begin(self, variant, parts, ids, n_outputs, logits, samplers, follow=None):
        """Send a step -> its Pending.

        parts: tuples of a Conversation, n_past and n_tokens. samplers: for each output a Sampler or None. follow: the variant of the step
        that a stage may start by itself; None: none. It is not sent if a stage has started it. Raises StageError if the
        pipeline has ended.
        """
        started = self._started(variant, parts, ids, logits, samplers)
        if started is not None:
            if follow is not None:
                self._give_credit(started, follow)
            return started
        for conversation in {conversation for conversation, _, _ in parts}:
            self.drain(conversation, ring_only=True)
        with self.changed:
            while self.error is None and len(self.under_way) >= AT_ONCE * self.depth:
                self.changed.wait(AWAKE)
        with self.sending, interrupts_held():       # an interrupt after this leaves a step that ends by itself
            follow = follow_of(next(self._numbers), follow)
            pending = Pending(self, next(self._numbers), variant, parts, ids, n_outputs, logits, samplers, follow)
            self._register(pending)
            try:
                self.close_left()
                self.send(pending)
            except BaseException:       # it will never end
                with self.changed:
                    self.remove(pending)
                raise
        return pending

    def send(self, pending):
        """Send a registered step to the first stage, its samplers before it."""
        numbers, frames = self.samplers.prepare(pending.samplers)
        for frame in [*frames, pending.frame(numbers)]:
            self.links.send(frame)

    def replay(self, ran):
        """Run a journal.Ran again -> its Pending.

        Nothing is wanted of its outputs.
        """
        parts = [(self.conversations[session], n_past, n) for session, n_past, n in ran.parts]
        pending = Pending(self, next(self._numbers), ran.variant, parts, ran.ids, ran.n_outputs, None, [None] * ran.n_outputs,
                          discards=True)
        self._register(pending)
        self.links.send(pending.frame([DISCARD] * ran.n_outputs))
        return pending

    def write(self, session, ref, start, rows, ask):
        """Restore what Journal.replay() gives of rows.

        ask(stage, content, payload) asks a stage.
        """
        conversation = self.conversations[session]
        if ref is not None:
            self._cache(conversation, ref).write(rows, start, ask)
            return
        for cache in (self._cache(conversation, ref) for ref in self._stage_of):
            for first, last in cache.pieces(0, start):
                cache.write(rows(cache.ref, first, last, ask), first, ask)

    def drop_unwanted(self):
        """Drop steps under way that nobody waits for -> the others, in order."""
        with self.changed:
            self._told.clear()      # they are sent again
            for pending in list(self.under_way.values()):
                if not (pending.wanted and pending.asked):
                    pending.wanted = False
                    pending.fail(StageError("A step was not wanted any more."))
                    self.remove(pending)
            return [self.under_way[number] for number in sorted(self.under_way)]

    def _register(self, pending):
        with self.changed:
            self._raise_error()
            self.steps += 1
            self._enter(pending)

    def _raise_error(self):
        if self.error is not None:
            raise StageError(str(self.error))

    def _enter(self, pending):
        self.under_way[pending.number] = pending
        for conversation in pending.conversations:
            conversation.steps[pending.number] = pending

    def remove(self, pending):
        """Take a step from those under way; `changed` is held."""
        self.under_way.pop(pending.number, None)
        for conversation in pending.conversations:
            conversation.steps.pop(pending.number, None)
        self.changed.notify_all()

    def drain(self, conversation, ring_only=False):
        """Wait until no step of a session is under way.

        ring_only: only for those that a stage starts, or may start: they come to the first stage by another way than what is sent
        next, and could be there later.
        """
        with self.changed:
            while any(pending.ring or pending.follow or not ring_only for pending in conversation.steps.values()):
                self.changed.wait(AWAKE)

    def _started(self, variant, parts, ids, logits, samplers):
        """The Pending of a step that a stage has started; None if not.

        From now on it is asked for. Another step of its sessions makes it void: it has seen other rows then.
        """
        with self.changed:
            started = parts[0][0].started
            for conversation, _, _ in parts:
                conversation.started = None
            if started is None or not started.wanted or not started.is_that(variant, parts, ids, samplers):
                return None
            started.ask(logits)
            return started

    def _give_credit(self, pending, variant):
        """Let a stage start one more step, after one that is under way."""
        with self.changed:
            if pending.done.is_set():
                return
            pending.follow = follow_of(next(self._numbers), variant)
        self.links.tell(self.launcher.head, Credit(0, pending.number, pending.follow))

    # What stages send, on a thread of theirs

    def _take(self, i, frame):
        if isinstance(frame, Result) and (i == self.launcher.head or i == len(self.launcher.stages) - 1 and not frame.picked):
            self._finished(frame)
        elif isinstance(frame, Message) and frame.kind == "failed":
            self._failed(i, frame)
        else:
            raise FrameError(f"a {getattr(frame, 'kind', type(frame).__name__)!r}, which is not for the driver")

    def _finished(self, result):
        with self.changed:
            self._told[result.number] = result
            self._settle_all()

    def _settle_all(self):
        """Settle what was told, the steps of a session in their order.

        The last stage tells of those without outputs, the one with the head of others: these may be here first.
        """
        while (number := next((number for number in self._told if self._may_settle(number)), None)) is not None:
            self._settle(self._told.pop(number))

    def _may_settle(self, number):
        pending = self.under_way.get(number)
        return pending is None or pending.discards or all(next(iter(one.steps)) == number for one in pending.conversations)

    def _settle(self, result):
        pending = self.under_way.get(result.number)
        if pending is not None:
            pending.check(result)
            if result.followed:
                self._follow(pending, result)
            if self.journal is not None and not pending.discards:
                self.journal.add(Ran(pending.variant, pending.wire_parts, pending.ids, pending.n_outputs))
                self.n_finished += 1
            pending.settle(result)
            self.remove(pending)

    def _follow(self, pending, result):
        """Enter the step that a stage has started after another."""
        if pending.follow is None or len(result.picked) != len(pending.parts) or None in result.picked:
            raise FrameError("it has started a step that it may not start")
        pending.followed = Pending(self, pending.follow.number, pending.follow.variant, after(pending.parts),
                                   [one.token for one in result.picked], len(result.picked), None, pending.samplers, ring=True)
        self.steps += 1
        self._enter(pending.followed)
        for conversation in pending.conversations:
            conversation.started = pending.followed

    def _failed(self, i, message):
        if message.number == 0:
            self.watch.report(i, str(message.content.get("text")), SEEN if message.content.get("seen") else EFFECT)
            return
        with self.changed:
            pending = self.under_way.get(message.number)
            if pending is not None:
                pending.fail(raised(message.content, self.links.name(i)))
                self.remove(pending)
                self._settle_all()

    # Requests

    def ask(self, i, content, payload=b""):
        """Ask stage i for something -> (dict, payload).

        Raises the error that it tells of, and StageError if it has failed. With `resume` it is asked again where it was started again.
        """
        return self._asked(lambda: [self.links.ask(i, content, payload)])[0]

    def ask_all(self, content):
        """Ask all stages at once -> their answers."""
        return self._asked(lambda: [self.links.ask(i, content) for i in range(len(self.launcher.stages))])

    def ask_each(self, requests):
        """Ask for all of [(stage, content)] at once -> the answers."""
        return self._asked(lambda: [self.links.ask(i, content) for i, content in requests])

    def _asked(self, begin):
        while True:
            with self.sending:
                self._raise_error()
                waiters = begin()
            try:
                return [self.links.answered(waiter, wait) for waiter in waiters]
            except Lost:
                time.sleep(AGAIN)

    def close_left(self):
        """Close the sessions whose caches are gone.

        `sending` is held.
        """
        with self.changed:
            over = [conversation for conversation in list(self._left) if not conversation.steps]
            for conversation in over:
                self._left.remove(conversation)
                self.conversations.pop(conversation.number, None)
                if self.journal is not None:
                    self.journal.closed(conversation.number)
        for conversation in over:
            self.links.send(Close(0, conversation.number))

    def tidy(self):
        """Close what is left, if nothing else is being sent."""
        if self._left and self.sending.acquire(blocking=False):
            try:
                self.close_left()
            finally:
                self.sending.release()


class Bound:
    """A step of some numbers of tokens of some sessions, as plan.Bound."""

    def __init__(self, pipeline, variant, parts, n_outputs, late=()):
        self.runner, self.variant, self.parts, self.n_outputs, self._late = pipeline, variant, parts, n_outputs, late

    def begin(self, ids, n_past, logits, hooks=(), samplers=None, follow=None):
        """Send the step -> its Pending.

        ids, n_past, logits: as for plan.Bound.run. samplers: for each output a Sampler or None; None: logits are wanted for all. follow:
        the variant of the step that a stage may start after it. Raises PydsaError if there are hooks: they cannot look into it.
        """
        if hooks or self._late:
            raise PydsaError("A step of a model in stages runs in other processes, where hooks cannot look into it: load the model without "
                             "stages.")
        n, parts = 0, []
        for conversation, n_tokens in self.parts:
            parts.append((conversation, int(n_past if np.ndim(n_past) == 0 else n_past[n]), n_tokens))
            n += n_tokens
        return self.runner.begin(self.variant, parts, ids, self.n_outputs, logits, samplers or [None] * self.n_outputs, follow)

    def run(self, ids, n_past, logits, hooks=()):
        """Run the step to its end: begin() and finish()."""
        self.begin(ids, n_past, logits, hooks).finish()
