"""What an engine is asked, and what it tells: requests and events."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pydsa.errors import PydsaError
from pydsa.sampling import Sampling
from pydsa.text.answers import Layout, Reader


class Started(NamedTuple):
    """The prompt of a request begins to run."""
    n_prompt: int
    n_reused: int           # tokens that were in a cache
    slot: int               # the number of the slot that took it
    why: str = ""           # why no more tokens were reused; "": only the last one is run, which must be


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


class InternalError(PydsaError):
    """A fault of this program ended the answer."""


class QueueFullError(PydsaError):
    """So many requests wait already that no more are taken."""


@dataclass
class Request:
    """What an Engine shall answer.

    ids: the prompt, token ids. listener(event): called on the engine's thread with Started, Progress, Written, and at the end once with
    Finished or Failed. max_tokens, stop, layout: as for answers.Reader and Session.sample. constraint: restricts the tokens
    (constraint.Constraint), None: any may come. n_logprobs: how many of the likeliest tokens to tell beside each; None: no probabilities.
    owner: cached prefixes are shared only among requests of one owner. slot: the number of the slot to use; None: any. reuse: whether a
    cached prefix may be used.
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
    """A submitted request; made by Engine.submit().

    ids: those of its prompt, checked, int32 [n].
    """

    def __init__(self, request, ids, tokenizer):
        self.request, self.ids, self.reader = request, ids, Reader(tokenizer, request.stop, request.layout)
        self.submitted, self.cancelled, self.ended = time.monotonic(), False, False

    def cancel(self):
        """End the request: its listener hears Failed(Cancelled)."""
        self.cancelled = True


class SlotState(NamedTuple):
    """What a slot does."""
    id: int
    state: str              # "idle", "prompt" or "generation"
    owner: str              # of the conversation in it
    n_ctx: int
    n_past: int             # tokens in its context
    n_prompt: int           # of the request that it runs
    n_generated: int


@dataclass
class Stats:
    """What an engine has done so far: requests, tokens, steps, seconds."""
    n_requests: int = 0
    n_finished: int = 0
    n_failed: int = 0
    n_cancelled: int = 0
    n_prompt: int = 0               # tokens of prompts that were run
    n_reused: int = 0               # tokens of prompts that were not
    n_generated: int = 0
    n_steps: int = 0                # of generation, each for one token of several requests
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    n_waiting: int = 0              # requests, at this moment
    n_busy: int = 0                 # slots, at this moment
    cache_bytes: int = 0            # of rows kept for later, in memory
    cache_file_bytes: int = 0
