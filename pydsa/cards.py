"""Cards: what notebooks and interpreters show of an object that a cell ends with.

    @shown(card_of_a_model)
    class Model: ...

A class that is decorated has a __repr__ of one line, and a _repr_html_ that notebooks show instead. Names and texts in cards may come from
files and models: they are escaped, and what would be obeyed or not be seen is shown.
"""
import html
from typing import NamedTuple

from pydsa.terminal import harmless, visible

BREAKS = "white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; margin: 0"
CELL = 'style="text-align: left; vertical-align: top"'


class Card(NamedTuple):
    """What is shown of an object.

    kind: of what, such as "Model". line: texts of the one line. texts: [(label, text, open)] of long texts, which can be folded, and are
    not at first if `open`. rows: [(label, text)] of the table under them.
    """
    kind: str
    line: list
    rows: list = []
    texts: list = []

    def __str__(self):
        return f"<pydsa.{self.kind}: {visible(', '.join(self.line))}>"

    def html(self):
        """The card as HTML that needs no style sheet, no script and no network."""
        rows = "".join(f"<tr><th scope='row' {CELL}>{escaped(label)}</th><td {CELL}>{escaped(text)}</td></tr>" for label, text in self.rows)
        texts = "".join(f"<details{' open' * opened}><summary>{escaped(label)}</summary><pre style='{BREAKS}'>"
                        f"{html.escape(harmless(text))}</pre></details>" for label, text, opened in self.texts)
        return f"<div><b>{escaped(self.kind)}</b>{texts}{f'<table><tbody>{rows}</tbody></table>' * bool(rows)}</div>"


def escaped(text):
    """A text of one line for HTML, with all that cannot be seen shown."""
    return html.escape(visible(text))


def shown(card):
    """A decorator of classes: card(object) -> the Card that is shown of it."""
    def decorate(kind):
        kind.__repr__ = lambda self: str(card(self))
        kind._repr_html_ = lambda self: card(self).html()
        return kind
    return decorate


def shortened(text, most=60, end=False, more=False):
    """A text in quotes with `most` characters, the first or the last.

    more: whether it is itself a part of a longer one.
    """
    cut = "…" * (more or len(text) > most)
    return f"{cut}{text[-most:]!r}" if end else f"{text[:most]!r}{cut}"


def card_of_a_reply(reply):
    """The Card of an answers.Reply: its texts apart, and how it ended."""
    ended = {None: "not ended yet", "length": "cut off: max_tokens, or the context is full", "stop": "the model ended its turn",
             "tool_calls": "the model called tools"}.get(reply.finish_reason, str(reply.finish_reason))
    if reply.stop is not None:
        ended = f"the stop text {shortened(reply.stop)} came"
    line = [shortened(reply.text)] if reply.text or not reply.tool_calls else []
    line += [f"{len(reply.reasoning)} characters of reasoning"] if reply.reasoning else []
    line += [f"calls {', '.join(call['function']['name'] for call in reply.tool_calls)}"] if reply.tool_calls else []
    line += [tokens_in_words(reply.n_generated), f"finish_reason={reply.finish_reason!r}"]
    speed = f", {(reply.n_generated - 1) / reply.seconds:.1f} t/s from then on" if reply.seconds else ""
    waited = "" if reply.prompt_seconds is None else f", the first after {reply.prompt_seconds:.2f} s"
    generated = tokens_in_words(reply.n_generated) + waited + speed
    rows = [("prompt", tokens_in_words(reply.n_prompt)), ("generated", generated), ("ended", ended)]
    texts = [("reasoning", reply.reasoning, False)] * bool(reply.reasoning) + [("text", reply.text, True)] * bool(reply.text)
    texts += [(f"call of {call['function']['name']}", call["function"]["arguments"], True) for call in reply.tool_calls]
    return Card("Reply", line, rows, texts)


def card_of_a_stream(stream):
    """The Card of an answers.Stream: what came so far; nothing is read."""
    card = card_of_a_reply(stream.reply)
    if stream.reply.finish_reason is None and not stream.reply.n_generated:
        hint = "nothing was generated yet: loop over its pieces, or call finish() for the whole reply"
        return Card("Stream", [hint], [("state", hint)])
    return card._replace(kind="Stream")


def tokens_in_words(n):
    """A number of tokens: "1 token", "7 tokens"."""
    return f"{n} token{'s' * (n != 1)}"
