"""The slots of an Engine: sessions, and the requests that they run."""
from typing import NamedTuple

import numpy as np

from pydsa.sampling import Sampler
from pydsa.saved.prefixes import common_length

SHORT = 128         # tokens of the prompts that share a step
SAME = 16           # tokens at the beginning of two prompts that are not worth waiting for
ALIKE = 0.1         # the least share of a prompt that a slot must hold to be taken for that


class Slot:
    """A session, and the request that it runs, if any.

    token: the last one of the answer, whose step is to begin. n_under_way: steps with tokens of the session that have not been finished.
    """

    def __init__(self, number, session):
        self.number, self.session = number, session
        self.ticket, self.owner, self.used = None, "", 0.0
        self.ids, self.sampler, self.constraint, self.token, self.n_under_way = None, None, None, None, 0
        self.turn = 0       # those with the least go first
        self.n_begun = 0    # tokens of the request whose steps have begun, or that are in the context
        self.n_reused, self.begun, self.first = 0, None, None      # when the prompt began to run, and when the first token came

    @property
    def state(self):
        """What is shown of the slot: "idle", "prompt" or "generation"."""
        if self.ticket is None:
            return "idle"
        return "prompt" if self.begun is None or self.session.n_past < len(self.ids) else "generation"

    @property
    def is_free(self):
        """Whether it can take a request."""
        return self.ticket is None and self.n_under_way == 0

    @property
    def n_left(self):
        """The number of the prompt's tokens whose steps have not begun."""
        return 0 if self.ticket is None else max(0, len(self.ids) - self.n_begun)

    @property
    def goes_on(self):
        """Whether, as far as is known, the next token is not its answer's last."""
        most = self.ticket.request.max_tokens
        return most is None or self.ticket.reader.reply.n_generated + 1 < most

    @property
    def remote_sampler(self):
        """The sampler for a runner that samples; None: logits are wanted."""
        return self.sampler if self.constraint is None and self.ticket.request.n_logprobs is None else None

    def take(self, ticket):
        """Take a request; its prompt begins to run later."""
        request = ticket.request
        self.ticket, self.ids, self.sampler = ticket, ticket.ids, Sampler(request.sampling)
        self.constraint = None if request.constraint is None else request.constraint.start()
        self.n_reused, self.n_begun, self.begun, self.first, self.token = 0, 0, None, None, None
        if self.owner != request.owner:
            self.session.truncate(0)
            self.owner = request.owner
        ticket.reader.reply.n_prompt = len(self.ids)

    def in_common(self, ticket):
        """How many of a request's tokens are in the context already; 0 if few."""
        if self.owner != ticket.request.owner or not ticket.request.reuse:
            return 0
        n = common_length(np.array(self.session.tokens, np.int32), ticket.ids)
        return n if n >= ALIKE * len(ticket.ids) else 0


def may_join(a, b):
    """Whether the rest of two prompts may run in one step.

    They must be short. Where they begin alike one waits instead, and takes what the other has run.
    """
    rests = [slot.ids[slot.n_begun:] for slot in (a, b)]
    return max(map(len, rests)) <= SHORT and (a.owner != b.owner or common_length(*rests) < SAME)


class UnderWay(NamedTuple):
    """A step that has begun, with tokens of some slots."""
    is_prompt: bool
    slots: list
    tickets: list       # of the slots, when it began
    ids: list           # for each slot
    step: object        # of a Batch
    begun: float        # time.monotonic()


class NotBegun:
    """A step that could not begin."""

    def __init__(self, results):
        self._results = results

    def finish(self):
        """The results of all slots."""
        return self._results
