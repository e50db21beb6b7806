"""Engine answers many requests with one model.

    engine = Engine(model, n_parallel=4)
    engine.submit(Request(ids, listener=print))
    engine.close()

One thread runs all steps. Others submit requests and hear of events through each request's listener, which is called on the engine's thread
and must return at once.
"""
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pydsa.answers import Layout, Reader
from pydsa.errors import ContextFullError, PydsaError
from pydsa.sampling import Sampler, Sampling


class Started(NamedTuple):
    """The prompt of a request begins to run."""
    n_prompt: int
    n_reused: int           # tokens that were in a cache
    slot: int               # the number of the conversation that took it


class Progress(NamedTuple):
    """A part of the prompt was run."""
    n_done: int             # tokens of the prompt, with those reused
    n_prompt: int


class Token(NamedTuple):
    """A sampled token, and the likeliest ones, with their log-probabilities."""
    id: int
    logprob: float
    top: list               # of (id, logprob), the likeliest first


class Written(NamedTuple):
    """A token was sampled; pieces may be empty, as a text can wait for more."""
    pieces: list            # of answers.Piece
    token: Token | None     # only where the request wants log-probabilities


class Timings(NamedTuple):
    """How long a request took, in seconds; and tokens."""
    n_prompt: int
    n_reused: int
    n_generated: int
    queued: float           # before its prompt began to run
    prompt: float
    generation: float       # from the first token to the last


class Finished(NamedTuple):
    """The answer is complete."""
    reply: object           # answers.Reply
    timings: Timings


class Failed(NamedTuple):
    """The request ended with an error: a PydsaError, or Cancelled."""
    error: Exception


class Cancelled(PydsaError):
    """The request was cancelled, or the engine closed."""


class QueueFullError(PydsaError):
    """So many requests wait already that no more are taken."""


@dataclass
class Request:
    """What an Engine shall answer.

    ids: the prompt, token ids. listener(event): called on the engine's thread with Started, Progress, Written, and at the end once with
    Finished or Failed. max_tokens, stop, layout: as for answers.Reader and Session.sample. constraint: restricts the tokens
    (constraint.Constraint), None: any may come. n_logprobs: how many of the likeliest tokens to tell beside each; None: no probabilities.
    owner: cached prefixes are shared only among requests of one owner. slot: the number of the conversation to use; None: any. reuse:
    whether a cached prefix may be used.
    """
    ids: list
    listener: Callable
    sampling: Sampling | None = None
    max_tokens: int | None = None
    stop: list | None = None
    layout: Layout | None = None
    constraint: object = None
    n_logprobs: int | None = None
    owner: str = ""
    slot: int | None = None
    reuse: bool = True


class Ticket:
    """A submitted request; made by Engine.submit()."""

    def __init__(self, request, reader):
        self.request, self.reader = request, reader
        self.submitted = time.monotonic()
        self.cancelled = False

    def cancel(self):
        """End the request; its listener hears Failed(Cancelled), unless it has ended."""
        self.cancelled = True


class Engine:
    """Runs the requests of many conversations with one model.

    n_parallel: conversations that run at the same time. n_queue: requests that may wait beside them.
    """

    def __init__(self, model, n_parallel=1, n_queue=64):
        self.model, self.n_parallel, self._n_queue = model, n_parallel, n_queue
        self._waiting, self._closed = queue.Queue(), False
        self._session = model.session()
        self._thread = threading.Thread(target=self._loop, name="pydsa engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Take a request.

        Raises PydsaError if its stop texts or sampling are not valid, ContextFullError if its prompt does not fit, and QueueFullError.
        """
        if len(request.ids) >= self.model.n_ctx:
            raise ContextFullError(f"The context holds {self.model.n_ctx} tokens; the prompt has {len(request.ids)}.")
        if self._waiting.qsize() >= self._n_queue:
            raise QueueFullError(f"{self._n_queue} requests wait already")
        ticket = Ticket(request, Reader(self.model.tokenizer, request.stop, request.layout))
        self._waiting.put(ticket)
        return ticket

    def close(self):
        """End all requests and the engine's thread."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _loop(self):
        while (ticket := self._waiting.get()) is not None:
            try:
                self._answer(ticket, ticket.request, time.monotonic())
            except PydsaError as error:
                ticket.request.listener(Failed(error))

    def _answer(self, ticket, request, start):
        session, reader, say = self._session, ticket.reader, request.listener
        n_reused = session.reuse(request.ids)
        say(Started(len(request.ids), n_reused, 0))
        reader.reply.n_prompt = len(request.ids)
        logits, sampler, first, full = session.prefill(request.ids[n_reused:]), Sampler(request.sampling), None, False
        while reader.reply.n_generated != request.max_tokens and not reader.stopped:
            if ticket.cancelled or self._closed:
                raise Cancelled("the request was cancelled")
            token = sampler.pick(logits, session.tokens)
            first = first or time.monotonic()
            if token in self.model.tokenizer.eog_ids:
                break
            say(Written(reader.push(token), None))
            if session.n_past == self.model.n_ctx:
                full = True
                break
            logits = session.decode(token)
        pieces = reader.end(full or reader.reply.n_generated == request.max_tokens)
        if pieces:
            say(Written(pieces, None))
        end, first = time.monotonic(), first or time.monotonic()
        say(Finished(reader.reply, Timings(len(request.ids), n_reused, reader.reply.n_generated, start - ticket.submitted, first - start,
                                           end - first)))
