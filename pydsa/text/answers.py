"""Read an answer as it is generated: text, reasoning and calls of tools, apart.

    stream = Reader(tokenizer, stop=["\\n\\n"]).read(ids)
    for piece in stream: print(piece.kind, piece)
    stream.reply                                # what the pieces add up to

The pieces joined are what the model wrote. Nothing is stripped: a reply that is put back into the conversation gives the same tokens, and a
session does not run them again.
"""
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pydsa.cards import card_of_a_reply, card_of_a_stream, shown
from pydsa.errors import ContextFullError, PydsaError
from pydsa.text.tokenizer import CONTROL, UNKNOWN
from pydsa.text.tool_calls import Form, Writing, as_call, find_held

THINK, END_THINK = "<think>", "</think>"


class Piece(str):
    """A piece of an answer: a str with a kind.

    kind: "answer"; "reasoning"; "tool_call", the text of one complete call, with the call in OpenAI's form in `call`; or "markup", the tags
    around reasoning and blocks of calls. Where the Layout streams calls: "call_delta", a part of a call, whose `call` has only the
    arguments that it adds; a "tool_call" with the rest of the text, maybe none, and the complete call follows.
    """

    def __new__(cls, text, kind="answer", call=None):
        piece = super().__new__(cls, text)
        piece.kind, piece.call = kind, call
        return piece


@shown(card_of_a_reply)
@dataclass
class Reply:
    """A whole answer.

    text, reasoning: str. tool_calls: a list of {"id", "type": "function", "function": {"name", "arguments": JSON text}}.
    finish_reason: "stop" (the model ended its turn, or a stop text came), "tool_calls" (the same, after calls), "length" (max_tokens, or
    the context was full), or None until then. n_prompt, n_generated: tokens; n_prompt counts those that were not run again too. stop: the
    stop text that ended it, or None. prompt_seconds, seconds: the time that was waited for the first token, and for all that came after it;
    None where the tokens were not waited for one by one, as in an Engine.
    """
    text: str = ""
    reasoning: str = ""
    tool_calls: list = field(default_factory=list)
    finish_reason: str | None = None
    n_prompt: int = 0
    n_generated: int = 0
    stop: str | None = None
    prompt_seconds: float | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)

    @property
    def message(self) -> dict:
        """The assistant's message, to put back into the conversation."""
        message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    def add(self, piece):
        """Add a piece of the answer."""
        if piece.kind == "answer":
            self.text += piece
        elif piece.kind == "reasoning":
            self.reasoning += piece
        elif piece.kind == "tool_call":
            self.tool_calls.append(piece.call)


class Layout(NamedTuple):
    """How an answer to a prompt is laid out.

    opened: the prompt ends inside of reasoning. thinks: the model may begin with <think>. form: the Form of calls to look for, or None.
    tools: those that were offered. single_call: the answer ends after its first call. streams_calls: calls are given as they are written;
    this needs a constraint that completes a call once it has begun. One that a limit cuts off is given as far as it came.
    """
    opened: bool = False
    thinks: bool = False
    form: Form | None = None
    tools: list | None = None
    single_call: bool = False
    streams_calls: bool = False

    def shown(self, tokenizer):
        """The ids of control tokens that are part of the layout's marks."""
        marks = (*((THINK, END_THINK) if self.thinks or self.opened else ()), *(self.form.marks if self.form else ()))
        control = np.flatnonzero(np.isin(tokenizer.token_type, (UNKNOWN, CONTROL))).tolist() if marks else ()
        return frozenset(i for i in control if len(tokenizer.tokens[i]) > 1 and any(tokenizer.tokens[i] in mark for mark in marks))


@shown(card_of_a_stream)
class Stream:
    """The pieces of an answer, an iterator of Piece; made by Reader.read().

    reply: the Reply so far; complete when the iterator ends. close() ends the generation.
    """

    def __init__(self, pieces, reply):
        self._pieces, self.reply = pieces, reply

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self):
        """End the generation; what came so far stays in the reply."""
        self._pieces.close()

    def finish(self) -> Reply:
        """Read the rest -> the whole Reply.

        An answer that fills the context ends there, with finish_reason "length". Raises ContextFullError if there was no room for any.
        """
        try:
            for _ in self:
                pass
        except ContextFullError:
            if not self.reply.n_generated:
                raise
        return self.reply


class Reader:
    """Turns the ids of one answer into pieces, each as soon as it is certain.

    stop: a text, or a list of texts, of which the first to come ends the answer, and is no part of it. Reasoning is not searched, as it
    often says what shall not come: only for those with a tag of reasoning in them. layout: the Layout; None: all is the answer. Raises
    PydsaError if stop is something else.

    read() takes the ids from an iterator. Who has them one at a time calls push() for each until `stopped`, and then end().
    """

    def __init__(self, tokenizer, stop=None, layout=None):
        layout = layout or Layout()
        self.reply, self.stopped, self._single_call = Reply(), False, layout.single_call
        self._decoder = tokenizer.decoder(layout.shown(tokenizer))
        self._thought, self._stops, self._splitter = Thought(layout), Stops(stop), Splitter(layout)
        self._tagged = Stops([text for text in self._stops.texts if THINK in text or END_THINK in text])

    def push(self, token) -> list[Piece]:
        """Add an id -> the pieces that are certain now.

        `stopped` tells whether a stop text came, or the only call that may: the answer then ends.
        """
        self.reply.n_generated += 1
        return self._add(self._splitter.push(self._cut(self._decoder.push(token))))

    def _cut(self, text, last=False):
        """The text that is certain now, up to a stop text; last: no more comes."""
        text, self.stopped = self._tagged.push(text)
        last |= self.stopped
        thought, text = self._thought.push(text + self._tagged.flush() if last else text)
        if last:
            rest = self._thought.flush()
            thought, text = thought + rest[0], text + rest[1]
        said, found = self._stops.push(text)
        self.stopped |= found
        return thought + said + (self._stops.flush() if last else "")

    def end(self, cut_off=False) -> list[Piece]:
        """End the answer -> the pieces of what was held back.

        cut_off: the answer was not ended by the model, but by a limit.
        """
        text = ""
        if not self.stopped:
            text = self._cut(self._decoder.flush(), last=True)
        pieces = self._add([*self._splitter.push(text), *self._splitter.flush()])
        self.reply.stop = self._stops.found or self._tagged.found
        self.reply.finish_reason = "length" if cut_off and not self.stopped else "tool_calls" if self.reply.tool_calls else "stop"
        return pieces

    def _add(self, pieces):
        """Add pieces to the reply -> those added: none after a single call."""
        added = []
        for piece in pieces:
            if self._single_call and self.reply.tool_calls:
                break
            self.reply.add(piece)
            added.append(piece)
        self.stopped |= self._single_call and bool(self.reply.tool_calls)
        return added

    def read(self, ids: Iterable[int], max_tokens=None, n_prompt=0) -> Stream:
        """The Stream of an answer with these ids.

        ids: an iterator, which may end with ContextFullError; it is closed where a stop text comes. max_tokens: the limit that it has.
        n_prompt: the tokens of the prompt, for the reply.
        """
        self.reply.n_prompt = n_prompt
        return Stream(_pieces(ids, max_tokens, self), self.reply)


def _pieces(ids, max_tokens, reader):
    """Yield the pieces, each after it was added to the reply.

    It is no method, so that a stream that nobody holds any more ends at once: its session is then free.
    """
    full = None
    try:
        for token in _timed(ids, reader.reply):
            yield from reader.push(token)
            if reader.stopped:
                break
    except ContextFullError as error:
        full = error
    yield from reader.end(full is not None or reader.reply.n_generated == max_tokens)
    if full:
        raise full


def _timed(ids, reply):
    """Yield ids, and add the time that each is waited for to the reply.

    What is done with an id until the next one is asked for does not count.
    """
    start = time.perf_counter()
    for token in ids:
        waited = time.perf_counter() - start
        if reply.prompt_seconds is None:
            reply.prompt_seconds, reply.seconds = waited, 0.0
        else:
            reply.seconds += waited
        yield token
        start = time.perf_counter()


class Thought:
    """Tells the text of reasoning from the rest, as Splitter does."""

    def __init__(self, layout):
        self._marks = (END_THINK, *(layout.form.opens if layout.form else ()))
        self._state, self._held = "reasoning" if layout.opened else "start" if layout.thinks else "rest", ""

    def push(self, text):
        """Add text -> (that of reasoning, that of the rest)."""
        if self._state == "rest":
            return "", text
        text, self._held, begun = self._held + text, "", 0
        if self._state == "start":
            rest = text.lstrip()
            if not rest.startswith(THINK):
                self._state, self._held = ("start", text) if THINK.startswith(rest) else ("rest", "")
                return "", "" if self._held else text
            self._state, begun = "reasoning", len(text) - len(rest) + len(THINK)
        found = [(text.index(mark, begun), -len(mark), mark) for mark in self._marks if mark in text[begun:]]
        if not found:
            n = len(text) - find_held(text[begun:], self._marks)
            self._held = text[n:]
            return text[:n], ""
        at, _, mark = min(found)
        self._state, at = "rest", at + (len(mark) if mark == END_THINK else 0)
        return text[:at], text[at:]

    def flush(self):
        """What was held back at the end, as push() gives it."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "reasoning" else ("", held)


class Stops:
    """Cuts a text at the first of some stop texts, whatever its pieces are.

    stop: a str, a list of str, or None. What may be the beginning of a stop text is held back. found: the stop text that came, or None.
    """

    def __init__(self, stop=None):
        listed = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(listed, (list, tuple)) or not all(isinstance(text, str) and text for text in listed):
            raise PydsaError(f"stop is {stop!r:.80}, expected a text or a list of texts, none of them empty")
        self.texts, self._held, self.found = list(listed), "", None

    def push(self, text):
        """Add a piece -> (the text that is certain now, whether a stop came)."""
        if not self.texts:
            return text, False
        text = self._held + text
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.texts if stop in text]
        if found:       # the first that is complete, so that the result does not depend on the pieces
            end, start = min(found)
            self._held, self.found = "", text[start:end]
            return text[:start], True
        n = len(text) - find_held(text, self.texts)
        self._held = text[n:]
        return text[:n], False

    def flush(self):
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


class Splitter:
    """Splits the text of an answer into pieces of each kind (see Piece).

    Reasoning is only looked for at the beginning, and calls after it; a block of calls also ends reasoning. A call that cannot be
    read, or is not complete at the end, is given as answer.
    """

    def __init__(self, layout: Layout):
        self._form, self._tools, self._streams = layout.form, layout.tools, layout.streams_calls
        self._state = "reasoning" if layout.opened else "start" if layout.thinks else "text"
        self._pending = self._mark = ""     # text that is not certain yet; the mark of the call that has begun
        self._searched = 0                  # characters of the call in which its end was looked for
        self._writing = None                # the Writing of a call that is streamed
        self._read = self._given = 0        # characters of the call that it has, and of its text that pieces have

    def push(self, text):
        """Add text -> the list of Pieces that are certain now."""
        if self._form is None and self._state == "text" and not self._pending:
            return [Piece(text)] if text else []
        self._pending += text
        pieces = []
        while (step := getattr(self, f"_{self._state}")()) is not None:
            pieces += step
        return [piece for piece in pieces if piece or piece.call]

    def flush(self):
        """The pieces of the text that was held back, at the end."""
        if self._given:     # what is held back may be a part of the call's end
            last, self._pending = self._end_stream(self._mark + self._pending), ""
            return [last]
        rest, self._pending, self._mark = self._mark + self._pending, "", ""
        blank = self._state == "section" and not rest.strip()
        kind = "reasoning" if self._state == "reasoning" else "markup" if blank else "answer"
        return [Piece(rest, kind)] if rest else []

    # Each state takes its part from self._pending -> the pieces before the next state, or None if it must wait for more.

    def _start(self):
        """Before the first character that is not white space."""
        begun = self._pending.lstrip()
        if not begun or THINK.startswith(begun) and begun != THINK:
            return None
        if not begun.startswith(THINK):
            self._state = "text"
            return []
        end = len(self._pending) - len(begun) + len(THINK)
        return [Piece(self._take(end, "reasoning"), "markup")]

    def _reasoning(self):
        """Up to its end, or to a block of calls, as some models forget the end."""
        opens = self._form.opens if self._form else ()
        return self._until((END_THINK, *opens), "reasoning", lambda mark: "section" if mark in opens else "text")

    def _text(self):
        """The answer, up to a block of calls, or to a call without a block."""
        form = self._form
        if form is None:
            return [Piece(self._take(len(self._pending), "text"))] if self._pending else None
        return self._until(form.opens or form.begins, "answer", lambda mark: "section" if form.opens else "call")

    def _section(self):
        """Between the calls of a block: white space belongs to the block."""
        form, begun = self._form, self._pending.lstrip()
        marks = form.begins + form.closes
        if any(mark.startswith(begun) for mark in marks if mark != begun):
            return None
        if begun.startswith(marks):
            return self._until(marks, "markup", self._after_section)
        self._state = "stray"
        return []

    def _stray(self):
        """Text in a block that is no call: it is answer."""
        return self._until(self._form.begins + self._form.closes, "answer", self._after_section)

    def _after_section(self, mark):
        return "call" if mark in self._form.begins else "text"

    def _call(self):
        form = self._form
        # Prose is not held back until an end that may never come.
        if form.is_none and not self._given and form.is_none.match(self._pending):
            mark, self._mark, self._state, self._searched = self._mark, "", "text", 0
            self._writing, self._read = None, 0
            return [Piece(mark)]
        end = self._pending.find(form.ends, max(0, self._searched - len(form.ends)))
        self._searched = 0 if end >= 0 else len(self._pending)
        deltas = self._stream(len(self._pending) - find_held(self._pending, (form.ends,)) if end < 0 else end, end >= 0)
        if end < 0:
            return deltas or None
        raw = self._mark + self._pending[:end + len(form.ends)]
        if self._given:
            last = self._end_stream(raw)
        else:
            call = form.read(self._pending[:end], self._tools)
            last = Piece(raw, "answer" if call is None else "tool_call", call)
        self._mark, self._writing, self._read = "", None, 0
        self._take(end + len(form.ends), "section" if form.opens else "text")
        return [*deltas, last]

    def _stream(self, n, end=False):
        """The pieces of the first n characters of a streamed call, or none."""
        if not self._streams or n <= self._read and not end:
            return []
        self._writing = writing = self._writing or Writing(self._form, self._tools)
        added, self._read = writing.push(self._pending[self._read:n], end), n
        if writing.name is None or writing.broken and not self._given:
            return []
        text = self._pending[self._given - len(self._mark):n] if self._given else self._mark + self._pending[:n]
        self._given = len(self._mark) + n
        return [Piece(text, "call_delta", as_call(writing.id, writing.name, added))]

    def _end_stream(self, raw):
        """The last piece of a streamed call, whose arguments were given before."""
        text, writing = raw[self._given:], self._writing
        self._writing, self._read, self._given = None, 0, 0
        return Piece(text, "tool_call", as_call(writing.id, writing.name, writing.arguments))

    def _until(self, marks, kind, after):
        """Pieces of a kind up to the first mark; after(mark): the next state."""
        pending, state = self._pending, self._state
        found = [(pending.index(mark), -len(mark), mark) for mark in marks if mark in pending]
        start, _, mark = min(found) if found else (len(pending) - find_held(pending, marks), 0, "")
        if found:
            state = after(mark)
        elif start == 0:
            return None
        text = self._take(start + len(mark), state)[:start]
        if state == "call":     # its mark is part of its text
            self._mark, mark = mark, ""
        return [Piece(text, kind), Piece(mark, "markup")]

    def _take(self, n, state):
        """Cut the first n characters off, and go on in another state."""
        taken, self._pending, self._state = self._pending[:n], self._pending[n:], state
        return taken
