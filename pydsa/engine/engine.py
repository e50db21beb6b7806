"""Engine answers many requests with one model.

    engine = Engine(model, n_parallel=4)
    engine.submit(Request(ids, listener=print))
    engine.close()

One thread begins and finishes all steps: by turns a chunk of one prompt, and a token of all answers. Where the runner lets several be under
way, answers are in groups whose steps follow each other. Other threads submit requests and hear of events through each request's listener,
which is called on the engine's thread and must return at once.
"""
import collections
import concurrent.futures
import contextlib
import queue
import threading
import time
import traceback

from pydsa.engine.batch import Batch
from pydsa.engine.requests import (Cancelled, Failed, Finished, InternalError, Progress, QueueFullError, Request, SlotState, Started,
                                   Stats, Ticket, Timings, Token, Written)
from pydsa.engine.slots import NotBegun, Slot, UnderWay, may_join
from pydsa.errors import ContextFullError, PydsaError
from pydsa.options import counts
from pydsa.sampling import Sampler, log_probabilities
from pydsa.saved.prefixes import Prefixes
from pydsa.stepping import check_ids, check_max_tokens

CHUNK = 512         # tokens of a prompt that run together while others wait for theirs
MOST_PARALLEL = 256


def _told(error):
    """An exception as a request hears of it, always a PydsaError.

    A fault of this program is also printed.
    """
    if isinstance(error, PydsaError):
        return error
    traceback.print_exception(error)
    return InternalError(f"an internal error ended the answer ({type(error).__name__}: {error})")


class Engine:
    """Runs the requests of many conversations with one model.

    n_parallel: slots, each a session with a context of its own, whose requests run at the same time. n_queue: requests that may wait beside
    them. cache_bytes: memory for the caches of conversations, so that those that begin alike are not run again; 0: only what is in a slot
    is reused. cache_folder: where they go when that memory is full; None: they are forgotten. Raises OutOfMemoryError if the sessions do
    not fit in memory, and PydsaError for numbers out of range.
    """

    def __init__(self, model, n_parallel=1, n_queue=64, cache_bytes=1 << 33, cache_folder=None):
        counts(min(MOST_PARALLEL, model.n_ubatch), n_parallel=n_parallel)
        model.runner.check_room(model.setup, n_parallel, f"The caches of {n_parallel} sessions")
        self.model, self.n_parallel, self.stats = model, n_parallel, Stats()
        self._slots = [Slot(i, model.session()) for i in range(n_parallel)]
        self._batch, self._prefixes = Batch(model.runner, model.setup), Prefixes(cache_bytes, cache_folder)
        self._inbox, self._waiting, self._turn = queue.SimpleQueue(), collections.deque(), 0
        self._under_way, self._depth, self._last = collections.deque(), model.runner.depth, 0.0     # and when the last step was finished
        self._unsaid = []       # tickets and events
        self._lock, self._n_open, self._most_open = threading.Lock(), 0, n_parallel + n_queue
        self._accepts, self._closed, self._ended = True, False, False
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._loop, name="pydsa engine", daemon=True)
        self._thread.start()

    # For other threads

    def submit(self, request: Request) -> Ticket:
        """Take a request.

        Raises PydsaError if its ids, stop texts or sampling are not valid, ContextFullError if its prompt leaves no room for an answer, and
        QueueFullError if too many wait, or the engine is closing.
        """
        n_vocab = self.model.config.n_vocab
        ids = check_ids(request.ids, n_vocab)
        check_max_tokens(request.max_tokens)
        Sampler(request.sampling).sampling.check_vocabulary(n_vocab)
        if request.slot is not None and request.slot not in range(self.n_parallel):
            raise PydsaError(f"The slot is {request.slot!r}, expected 0 to {self.n_parallel - 1}.")
        if len(request.ids) >= self.model.n_ctx:
            raise ContextFullError(f"The context holds {self.model.n_ctx} tokens; the prompt has {len(request.ids)}, which leaves no room "
                                   "for an answer.")
        ticket = Ticket(request, ids, self.model.tokenizer)
        with self._lock:
            if not self._accepts:
                raise QueueFullError("the engine is closing, and takes no more requests")
            if self._n_open >= self._most_open:
                raise QueueFullError(f"{self._n_open} requests run or wait, and no more may")
            self._n_open += 1
            self._idle.clear()
        self._inbox.put(ticket)
        return ticket

    def slots(self) -> list[SlotState]:
        """What each slot does at this moment."""
        return [SlotState(slot.number, slot.state, slot.owner, self.model.n_ctx, slot.session.n_past,
                          0 if (ticket := slot.ticket) is None else len(ticket.request.ids),
                          0 if ticket is None else ticket.reader.reply.n_generated) for slot in self._slots]

    def save_slot(self, i, path, owner=""):
        """Write the conversation of a slot to a file -> its number of tokens.

        Raises PydsaError if the slot is another owner's, or does not exist; SessionFileError as Session.save does.
        """
        def save():
            session = self._slot_of(i, owner).session
            session.save(path)
            return session.n_past
        return self._call(save)

    def restore_slot(self, i, path, owner=""):
        """Replace the conversation of an idle slot -> its number of tokens.

        Raises PydsaError if the slot is busy or does not exist; SessionFileError and ContextFullError as Session.load does.
        """
        def restore():
            slot = self._idle_slot(i)
            slot.session.load(path)
            slot.owner = owner
            return slot.session.n_past
        return self._call(restore)

    def erase_slot(self, i, owner=""):
        """Empty an idle slot -> the number of tokens that it had.

        Raises PydsaError if the slot is busy, another owner's, or does not exist.
        """
        def erase():
            session = self._slot_of(i, owner, idle=True).session
            n = session.n_past
            session.truncate(0)
            return n
        return self._call(erase)

    def close(self, timeout=0.0):
        """End the engine, which takes nothing more from now on.

        What still runs after `timeout` seconds is cancelled.
        """
        with self._lock:
            self._accepts = False
        self._idle.wait(timeout)
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _call(self, function):
        """Run a function on the engine's thread, between steps -> its result."""
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        with self._lock:
            if self._ended:
                raise Cancelled("the engine is closed")
            self._inbox.put(run)
        return future.result()

    # On the engine's thread

    def _loop(self):
        while not self._closed:
            self._listen()
            self._admit()
            begun = [self._begin_chunk(), self._begin_tokens()]
            if not any(begun) and self._under_way:
                self._finish_first()
        while self._under_way:
            self._finish_first()
        with self._lock:        # after this nothing comes any more
            self._ended = True
        self._inbox.put(None)
        self._listen()
        for slot in self._slots:
            if slot.ticket is not None:
                self._end(slot, Failed(Cancelled("the engine was closed")))
        for ticket in self._waiting:
            self._fail(ticket, Cancelled("the engine was closed"))
        self._tell()
        self._prefixes.close()

    def _listen(self):
        """Take what came in; without anything to do, wait for it."""
        busy = self._waiting or self._under_way or any(slot.ticket for slot in self._slots)
        if not busy:        # else events are told as a step begins: who hears of them can run meanwhile
            self._count()
            self._tell()
        while not (busy and self._inbox.empty()):
            item = self._inbox.get()
            if callable(item):
                item()
            elif item is not None:
                self.stats.n_requests += 1
                self._waiting.append(item)
            busy = True

    def _admit(self):
        """Give waiting requests to idle slots, and end those that were cancelled."""
        for ticket in list(self._waiting):
            idle = [slot for slot in self._slots if slot.is_free and ticket.request.slot in (None, slot.number)]
            if ticket.cancelled:
                self._waiting.remove(ticket)
                self._fail(ticket, Cancelled("the request was cancelled"))
            elif idle:
                self._waiting.remove(ticket)
                slot = max(idle, key=lambda slot: (slot.in_common(ticket), -slot.used))
                with self._failing(slot, ticket):
                    slot.take(ticket)
        for slot in self._slots:
            if slot.ticket is not None and slot.ticket.cancelled:
                self._end(slot, Failed(Cancelled("the request was cancelled")))
        self._count()

    def _count(self):
        """Write down what there is at this moment."""
        stats = self.stats
        stats.n_waiting, stats.n_busy = len(self._waiting), self._n_busy
        stats.cache_bytes, stats.cache_file_bytes = self._prefixes.n_bytes, self._prefixes.n_file_bytes

    def _begin_chunk(self):
        """Begin a chunk of one prompt, or several short ones; they take turns.

        Returns whether there was any.
        """
        prompts = [slot for slot in self._slots if slot.n_left]
        if not prompts:
            return False
        prompts.sort(key=lambda slot: (slot.number - self._turn - 1) % self.n_parallel)
        most = min(CHUNK if self._n_busy > 1 else self.model.n_ubatch, self.model.n_ubatch)
        chosen = []
        for slot in prompts:
            with self._failing(slot, slot.ticket):
                if not slot.n_under_way:
                    self._take_prefix(slot)
                ids = slot.ids[slot.n_begun:][:most]
                alone = slot.n_under_way or any(other.n_under_way for other, _ in chosen)
                if not chosen or not alone and slot.n_left + sum(len(ids) for _, ids in chosen) <= most and all(
                        may_join(slot, other) for other, _ in chosen):
                    chosen.append((slot, ids.tolist()))
                    self._turn = slot.number
        if chosen:
            self._begin(True, [slot for slot, _ in chosen], [ids for _, ids in chosen])
        return True

    def _begin(self, is_prompt, slots, ids):
        """Begin a step, and finish the first ones where too many are under way."""
        ends = [not is_prompt or slot.n_left == len(mine) for slot, mine in zip(slots, ids)]
        samplers = [slot.remote_sampler if end else None for slot, end in zip(slots, ends)]
        self._tell()
        start = time.monotonic()
        try:
            step = self._batch.begin([slot.session for slot in slots], ids, samplers, any(ends),
                                     not is_prompt and all(slot.goes_on for slot in slots))
        except Exception as error:
            step = NotBegun([_told(error)] * len(slots))
        for slot, mine in zip(slots, ids):
            slot.n_under_way, slot.n_begun = slot.n_under_way + 1, slot.n_begun + len(mine)
        self._under_way.append(UnderWay(is_prompt, slots, [slot.ticket for slot in slots], ids, step, start))
        while len(self._under_way) >= self._depth:
            self._finish_first()

    def _finish_first(self):
        """Finish the step that began first, and tell what came of it."""
        of = self._under_way.popleft()
        self._tell()
        try:
            results = of.step.finish()
        except Exception as error:
            results = [_told(error)] * len(of.slots)
        begun, self._last = max(of.begun, self._last), time.monotonic()
        if of.is_prompt:
            self.stats.prompt_seconds += self._last - begun
        else:
            self.stats.n_steps += 1
            self.stats.generation_seconds += self._last - begun
        for slot, ticket, ids, result in zip(of.slots, of.tickets, of.ids, results):
            slot.n_under_way -= 1
            if slot.ticket is ticket:
                with self._failing(slot, ticket):
                    self._take_result(slot, of.is_prompt, len(ids), result)

    def _take_result(self, slot, is_prompt, n, result):
        """Go on with a request after a step of n of its tokens."""
        if not is_prompt and isinstance(result, ContextFullError):
            self._finish(slot, cut_off=True)
            return
        if isinstance(result, PydsaError):
            raise result
        if is_prompt:
            self.stats.n_prompt += n
            self._say(slot.ticket, Progress(slot.session.n_past, len(slot.ids)))
            self._prefixes.add(slot.owner, slot.session)     # others may begin alike, and wait already
            if slot.session.n_past < len(slot.ids):
                return
            slot.first = time.monotonic()
        self._take_token(slot, result)

    def _take_prefix(self, slot):
        """Take what is cached of a prompt, before each of its chunks."""
        request, session, begins = slot.ticket.request, slot.session, slot.begun is None
        n_before, n_in_slot = (0, session.n_past) if begins else (session.n_past, 0)
        if begins:
            slot.begun = time.monotonic()
            session.reuse(slot.ids) if request.reuse else session.truncate(0)
        if request.reuse:
            self._prefixes.extend(slot.owner, session, slot.ids[:-1])
        slot.n_begun = session.n_past
        slot.n_reused += session.n_past - n_before
        self.stats.n_reused += session.n_past - n_before
        if begins:
            self._say(slot.ticket, Started(len(slot.ids), slot.n_reused, slot.number, self._why(slot, n_in_slot)))

    def _why(self, slot, n_in_slot):
        """Why no more of a prompt was reused, in words."""
        n = slot.n_reused
        if n == len(slot.ids) - 1:
            return ""
        if not slot.ticket.request.reuse:
            return "the request asks for none"
        if n < n_in_slot:
            return f"it differs from the conversation of {n_in_slot} tokens in the slot from token {n} on"
        return "no cached conversation begins like it" if n == 0 else f"no cached conversation goes on like it after token {n}"

    def _begin_tokens(self):
        """Begin the step of the last tokens of all answers, or of a group.

        There are as many groups as steps can be under way while the results of another are handled. Returns whether there was any.
        """
        ready, under_way = [slot for slot in self._slots if slot.token is not None], [of for of in self._under_way if not of.is_prompt]
        n_groups = max(1, self._depth - 1)
        if not ready or len(under_way) >= n_groups:
            return False
        size = -(-(len(ready) + sum(len(of.slots) for of in under_way)) // n_groups)
        chosen = sorted(sorted(ready, key=lambda slot: slot.turn)[:size], key=lambda slot: slot.number)
        ids = [[slot.token] for slot in chosen]
        for slot in chosen:
            slot.token = None
        self._begin(False, chosen, ids)
        return True

    def _take_token(self, slot, logits):
        """Sample the next token of an answer, and tell it or end the answer."""
        request, reader = slot.ticket.request, slot.ticket.reader
        if request.max_tokens == 0:
            self._finish(slot, cut_off=True)
            return
        state, n = slot.constraint, request.n_logprobs
        token = slot.session.pick(logits, slot.sampler, state)
        if token in self.model.tokenizer.eog_ids:
            self._finish(slot)
            return
        if state is not None:
            state.advance(token)
        self.stats.n_generated += 1
        self._say(slot.ticket, Written(reader.push(token), None if n is None else Token(token, *log_probabilities(logits, token, n))))
        if reader.stopped or state is not None and state.finished:
            self._finish(slot)
        elif reader.reply.n_generated == request.max_tokens:
            self._finish(slot, cut_off=True)
        else:
            slot.token, slot.turn = token, self.stats.n_generated

    def _finish(self, slot, cut_off=False):
        """End an answer, and keep its conversation."""
        ticket, end = slot.ticket, time.monotonic()
        pieces = ticket.reader.end(cut_off)
        if pieces:
            self._say(ticket, Written(pieces, None))
        self.stats.n_finished += 1
        timings = Timings(len(slot.ids), slot.n_reused, ticket.reader.reply.n_generated, slot.begun - ticket.submitted,
                          slot.first - slot.begun, end - slot.first)
        self._end(slot, Finished(ticket.reader.reply, timings))
        self._prefixes.add(slot.owner, slot.session)

    @property
    def _n_busy(self):
        return sum(slot.ticket is not None for slot in self._slots)

    @contextlib.contextmanager
    def _failing(self, slot, ticket):
        """A context whose errors end the request, and only that."""
        try:
            yield
        except Exception as error:      # a fault of this program must not end the other answers
            self._end(slot, Failed(_told(error))) if slot.ticket is ticket else self._fail(ticket, _told(error))

    def _fail(self, ticket, error):
        if ticket.ended:
            return
        if isinstance(error, Cancelled):
            self.stats.n_cancelled += 1
        else:
            self.stats.n_failed += 1
        self._close_ticket(ticket)
        self._say(ticket, Failed(error))

    def _end(self, slot, event):
        """Free a slot, and tell the last event of its request."""
        ticket, slot.ticket, slot.token, slot.constraint = slot.ticket, None, None, None
        slot.used = time.monotonic()
        if isinstance(event, Failed):
            self._fail(ticket, event.error)
        else:
            self._close_ticket(ticket)      # first: who hears of the end may ask again, and finds room
            self._say(ticket, event)

    def _close_ticket(self, ticket):
        ticket.ended = True
        with self._lock:
            self._n_open -= 1
            if self._n_open == 0:
                self._idle.set()

    def _say(self, ticket, event):
        """Let an event be told, before anything else is waited for."""
        self._unsaid.append((ticket, event))

    def _tell(self):
        """Tell all events at once; a listener that fails has gone away."""
        events, self._unsaid = self._unsaid, []
        for ticket, event in events:
            try:
                ticket.request.listener(event)
            except Exception:
                traceback.print_exc()
                ticket.cancelled = True

    def _slot_of(self, i, owner, idle=False):
        slot = self._idle_slot(i) if idle else self._slot_at(i)
        if slot.session.n_past and slot.owner != owner:
            raise PydsaError(f"The conversation in slot {i} is another user's.")
        return slot

    def _idle_slot(self, i):
        slot = self._slot_at(i)
        if not slot.is_free:
            raise PydsaError(f"Slot {i} is busy.")
        return slot

    def _slot_at(self, i):
        if i not in range(self.n_parallel):
            raise PydsaError(f"The slot is {i!r}, expected 0 to {self.n_parallel - 1}.")
        return self._slots[i]
