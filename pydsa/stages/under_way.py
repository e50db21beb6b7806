"""Steps under way in a pipeline, and samplers that stages have for them.

With the ring: steps that a stage starts by itself.
"""
import math
import threading
import weakref

import numpy as np

from pydsa.stages.wire import HOST, Drop, Follow, FrameError, Message, Part, Step

AWAKE = 1.0         # seconds after which a wait looks whether it was interrupted, where the system does not tell


def wait(event):
    """Wait for a threading.Event, so that Ctrl-C ends it on any system."""
    while not event.wait(AWAKE):
        pass


class Conversation:
    """What the driver keeps of a session.

    number: that on the stages. steps: those under way, by number. started: the Pending that a stage has begun by itself, and that
    may be asked for; None: there is none.
    """

    def __init__(self, number):
        self.number, self.steps, self.started = number, {}, None


class Pending:
    """A step that was begun, and its end.

    parts: tuples of a Conversation, n_past and n_tokens. samplers: for each output a Sampler or None. logits: float32 [n_outputs,
    n_vocab], or None where no caller has an array. follow: a wire.Follow where a stage may start the next step. ring: whether it
    has started this one. discards: whether nothing is wanted of its outputs.
    """

    def __init__(self, pipeline, number, variant, parts, ids, n_outputs, logits, samplers, follow=None, ring=False, discards=False):
        self.number, self.variant, self.parts, self.ids, self.n_outputs = number, variant, parts, np.asarray(ids, np.int32), n_outputs
        self.logits, self.samplers, self.follow, self.ring, self.discards = logits, samplers, follow, ring, discards
        self.wanted, self.asked = True, not ring        # asked: whether a caller waits, or will
        self.followed, self.error, self.picked = None, None, None       # followed: the Pending of the step that came next
        self.done, self._pipeline = threading.Event(), pipeline

    @property
    def conversations(self):
        """Those of its parts, each once."""
        return list(dict.fromkeys(conversation for conversation, _, _ in self.parts))

    @property
    def wire_parts(self):
        """Its parts, of wire.Part."""
        return [Part(conversation.number, n_past, n) for conversation, n_past, n in self.parts]

    def frame(self, samplers):
        """The wire.Step; samplers: their numbers."""
        return Step(0, self.number, self.variant, self.wire_parts, samplers, self.ids, None, self.follow)

    def finish(self):
        """Wait for the end of the step -> for each output a Picked or None.

        None: its logits are in their row. Without samplers: None, and all logits are. Raises the PydsaError that a stage has met, and
        StageError if a stage has failed.
        """
        try:
            wait(self.done)
        except BaseException:
            self.wanted = False
            raise
        if self.error is not None:
            raise self.error
        for sampler, picked in zip(self.samplers, self.picked):
            if picked is not None:
                self._pipeline.samplers.follow(sampler, self.followed is None)
        return self.picked if any(self.samplers) else None

    def is_that(self, variant, parts, ids, samplers):
        """Whether it is a step with these arguments of Pipeline.begin()."""
        return variant == self.variant and parts == self.parts and np.array_equal(ids, self.ids) and len(samplers) == len(
            self.samplers) and all(mine is other for mine, other in zip(samplers, self.samplers))

    def ask(self, logits):
        """Want a step that a stage has started; `changed` is held.

        logits: as above.
        """
        self.asked = True
        if self.logits is None:
            self.logits = logits
        elif logits is not None:        # it has ended, and could not pick
            logits[:] = self.logits

    def drop(self):
        """Wait for the end of a step that is not wanted any more."""
        self.wanted = False
        wait(self.done)

    def check(self, result):
        """Raise FrameError if a wire.Result is not one of this step."""
        without = 0 if self.discards else sum(one is None for one in result.picked)
        if len(result.picked) != self.n_outputs or len(result.logits) != without:
            raise FrameError(f"a result has {len(result.picked)} outputs and {len(result.logits)} rows of logits, expected "
                             f"{self.n_outputs} and {without}")

    def settle(self, result):
        """Take a wire.Result: logits into their rows, and what was picked."""
        if self.logits is None and len(result.logits):
            self.logits = np.empty((self.n_outputs, result.logits.shape[1]), np.float32)
        rows = iter(result.logits)
        for i, one in enumerate(result.picked):
            if one is None and not self.discards:
                self.logits[i] = next(rows)
        self.picked = result.picked
        self.done.set()

    def fail(self, error):
        """End with an error."""
        self.error = error
        self.done.set()


class Samplers:
    """The driver's Samplers that the stage with the head has as well.

    Both draw the same numbers: the driver's follow()s each pick. While a step is under way the stage's state is not known; only where it is
    known again, and the same, it is not sent before the next step.
    """

    def __init__(self, ends):
        self._ends = sorted(int(token) for token in ends)       # ids after which a stage starts no step
        self._known, self._lock, self._n = weakref.WeakKeyDictionary(), threading.Lock(), HOST     # Sampler -> [number, state or None]
        self._dropped = []

    def prepare(self, samplers):
        """For each Sampler or None its number -> (numbers, frames to send first).

        Samplers whose picks depend on the text so far have none, as its first tokens may be unknown here: the logits come to the driver.
        """
        numbers, frames = [], []
        with self._lock:
            while self._dropped:        # others may come meanwhile
                frames.append(Drop(0, self._dropped.pop()))
            for sampler in samplers:
                if sampler is None or sampler.sampling.penalizes:
                    numbers.append(HOST)
                    continue
                known = self._known.get(sampler)
                if known is None:
                    self._n += 1
                    known = self._known[sampler] = [self._n, None]
                    weakref.finalize(sampler, self._dropped.append, self._n).atexit = False
                if known[1] != sampler.random:
                    frames.append(Message("sampler", 0, known[0], {"state": sampler.state(), "ends": self._ends}))
                known[1] = None
                numbers.append(known[0])
        return numbers, frames

    def follow(self, sampler, rests):
        """A token was picked with it at the stage with the head.

        rests: whether no other is: the step after it was not started.
        """
        sampler.follow()
        if rests:
            with self._lock:
                self._known[sampler][1] = sampler.random

    def forget(self):
        """The states that the stage has are not known any more."""
        with self._lock:
            for known in self._known.values():
                known[1] = None


class Ring:
    """What a Session has as `_ahead` where its model runs in stages.

    The stage with the head samples and starts the next step, while the token is on its way to the caller. At most one step runs that nobody
    has asked for; it does no harm, as cache rows from n_past on are overwritten.
    """

    def __init__(self, pipeline):
        self._pipeline = pipeline

    def forget(self):
        """Nothing: another step of the session makes what was started void."""

    def settings(self, sampler):
        """The sampler, if the stage with the head can pick with it; else None."""
        return None if sampler.sampling.penalizes else sampler

    def next(self, sampler, token, n_past, bound, following, ends):
        """Append a token at position n_past -> the next id and the greatest logit.

        bound, following: the Bounds of the step of this token and of the one after it. ends(id): whether nothing comes after an id; None
        stands for any that ends no answer.
        """
        pending = bound.begin([token], n_past, None, samplers=[sampler], follow=None if ends(None) else following.variant)
        picked, = pending.finish()
        if picked is None:      # the pick has failed there, and tells of it here; or the stage was started again, and has no such sampler
            greatest = float(np.max(pending.logits[0]))
            return (sampler.pick(pending.logits[0]) if math.isfinite(greatest) else 0), greatest
        return picked.token, picked.greatest


def follow_of(number, variant):
    """The wire.Follow of the step that may come next; None for no variant."""
    return None if variant is None else Follow(number, variant)
