"""Constrain what is generated: to JSON, to a grammar, to calls of tools.

    constraint = compile_constraint(tokenizer, json_schema({"type": "object"}), layout, thinking)
    state = constraint.start()                      # of one answer
    token = sampler.pick(logits, history, state.allowed())
    state.advance(token)                            # until state.finished, or a token that ends the turn

The library llguidance runs the grammar. Reasoning comes before it and is free. What the library cannot know is added here: a text inside of
an argument never spells the mark that ends it, control tokens stay out of texts, and numbers are finite.
"""
import json
import re
import threading

import numpy as np

from pydsa.errors import PydsaError
from pydsa.text import grammars
from pydsa.text.answers import END_THINK, THINK, Layout
from pydsa.text.grammars import ConstraintError, Rule, escaped, llguidance, quoted
from pydsa.text.tool_calls import DSML
from pydsa.text.tool_grammars import tools
from pydsa.text.vocabulary import vocabulary_of

MOST_DIGITS = 40            # in a row, in a number; float64 has 17
TAIL = 64                   # bytes; no mark is longer
_NUMBER = re.compile(rb"(?:^|[\s:,\[>])-?([0-9][0-9.]*)([eE][+-]?([0-9]*))?$")
# Of the library's reasons: where in the text that was made here, and that text, which no user has seen.
_PLACE, _SOURCE = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?"), re.compile(r"\n *1 \| ")
# What opens the value of an argument, and what ends it, for forms with a text for each; the group tells the kind of the value.
_VALUES = {DSML: (re.compile(rb'string="(true|false)">'), f"</{DSML}parameter>"),
           "<arg_key>": (re.compile(rb"<arg_key>([^<]*)</arg_key>\s*<arg_value>"), "</arg_value>")}


def constraint_for(tokenizer, layout: Layout | None = None, thinking=False, *, json_schema=None, grammar=None, tool_choice=None,
                   parallel=True) -> "Constraint | None":
    """The Constraint of an answer by what a caller asks for; None: none.

    layout, thinking: as for compile_constraint. json_schema: a dict, by which the text is valid; grammar: a text, by which it is written.
    tool_choice, parallel: as for tool_grammars.tools, for the tools of the layout; None: calls are not restricted. With a schema or a
    grammar, "auto" is a call or such a text. Raises ConstraintError for what cannot be served, and for a schema together with a grammar.
    """
    if json_schema is not None and grammar is not None:
        raise ConstraintError("a JSON schema and a grammar are given, expected one of them")
    rule = None if json_schema is None else grammars.json_schema(json_schema)
    rule = rule if grammar is None else grammars.grammar(grammar)
    if layout is not None and layout.form is not None and rule is not None:
        rule = rule._replace(form=layout.form)
    if tool_choice is not None:
        rule = tools(layout or Layout(), tool_choice, parallel, rule)
    return None if rule is None else compile_constraint(tokenizer, rule, layout, thinking)


def compile_constraint(tokenizer, rule: Rule, layout: Layout | None = None, thinking=False) -> "Constraint":
    """The Constraint of answers by a rule.

    layout: of the answer (chat.Prompt); None: no reasoning. thinking: whether the model may open reasoning, where the prompt has not.
    Raises ConstraintError if the library cannot serve the rule, and PydsaError if it is not installed.
    """
    return Constraint(tokenizer, rule, layout or Layout(), thinking)


class Constraint:
    """A compiled rule; made by compile_constraint(). Threads may share it."""

    def __init__(self, tokenizer, rule, layout, thinking):
        library = llguidance()
        self.rule, self.layout = rule, layout
        self.vocabulary = vocabulary_of(tokenizer, layout.shown(tokenizer))
        text = _whole(rule, layout, thinking)
        if rule.own is None:
            compiled = library.LLMatcher.grammar_from_lark(text)
        else:
            compiled = json.dumps({"grammars": [{"name": "answer", "lark_grammar": text}, {"name": "own", "lark_grammar": rule.own}]})
        self._lock, self._matcher = threading.Lock(), library.LLMatcher(self.vocabulary.tree, compiled, log_level=0)
        if not self._matcher.is_error():
            self._matcher.compute_bitmask()         # some are only found to allow nothing here
        if self._matcher.is_error():
            raise ConstraintError(f"the schema or grammar cannot be served: {_reason(self._matcher)}")

    def start(self) -> "State":
        """The State of a new answer."""
        with self._lock:
            return State(self, self._matcher.deep_copy())


def _whole(rule, layout, thinking):
    """The Lark text of a rule and of the reasoning before it."""
    after = "answer" if rule.free else "GAP? answer"
    lines, starts = [rule.text, "GAP: /\\n{1,2}/"], ["answer"]
    may_open = layout.thinks and (thinking or rule.free) and not layout.opened
    if layout.opened or may_open:
        lines.append(f"thought[lazy]: /(?s:.*){escaped(END_THINK)}/")
        ways = [f"thought {after}"]
        if rule.begun:          # some models forget the end of reasoning
            lines.append("begun[lazy]: /(?s:.*)/ (" + " | ".join(map(quoted, rule.begun)) + ")")
            ways.append("begun rest")
        if rule.free:
            ways.append("UNENDED")
            lines.append("UNENDED: /(?s:.*)/")
        starts = [f"({' | '.join(ways)})"]
    if may_open:
        lines.append(f"opening[lazy]: /\\s*{escaped(THINK)}/")
        starts = ["answer", f"opening {starts[0]}"]
    # Forced texts would only come as the tokens that encode() gives them, and never as a control token that is shown.
    return "\n".join(['%llguidance {"no_forcing": true}', f"start: {' | '.join(starts)}", *lines]) + "\n"


def _reason(matcher):
    """The library's reason of an error, on one line."""
    reason = matcher.get_error().split("\n<state>")[0].strip()
    if reason.startswith("NoExtension"):
        return "nothing can fulfil it"
    reason = _PLACE.sub("", _SOURCE.split(reason)[0])
    if "coerce_one_of" in reason:
        return "no value may fit two alternatives of a oneOf, as where each has a constant; or use anyOf"
    return " ".join(reason.split())[:300] or "its reason is not known"


class State:
    """How far one answer has come; made by Constraint.start()."""

    def __init__(self, constraint, matcher):
        rule, vocabulary, layout = constraint.rule, constraint.vocabulary, constraint.layout
        self._vocabulary, self._matcher = vocabulary, matcher
        self._bits = self._mask = None      # the last mask of the library, as it gave it and as bool
        self._tail, self._phase = b"", "thought" if layout.opened else "start" if layout.thinks else "answer"
        self._ends = tuple(mark.encode() for mark in (END_THINK, *rule.begun))
        self._of_thought = [i for i in vocabulary.shown if vocabulary.texts[i] in (THINK.encode(), END_THINK.encode())]
        self._call = Call(rule) if rule.form else None

    @property
    def finished(self):
        """Whether the answer is complete, and only its end may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, bool [n_vocab], not to be changed.

        Those that end the turn are among them where the answer may end. Raises PydsaError if a limit of the library is met.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise PydsaError(f"the constrained answer cannot go on: {_reason(self._matcher)}")
        if bits != self._bits:
            self._bits = bits
            self._mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._vocabulary.n_vocab, bitorder="little").view(np.bool_)
        banned = self._banned(self._mask)
        if not banned:
            return self._mask
        mask = self._mask.copy()
        mask[np.concatenate(banned)] = False
        return mask

    def _banned(self, mask):
        """Arrays of ids that the library allows, but that must not come."""
        vocabulary, banned = self._vocabulary, []
        free = bool(vocabulary.probes) and all(mask[vocabulary.probes])
        if self._phase == "answer":
            banned.append(self._of_thought)
        n = None if free or mask[vocabulary.letters].any() else _more_digits(self._tail)
        if n is not None and (mask & (vocabulary.digits == 0)).any():
            banned += [np.flatnonzero(vocabulary.digits > n), vocabulary.exponents]
        if free and self._call is not None and self._phase != "thought":
            banned += self._call.banned(vocabulary)
        return [np.asarray(ids, np.int64) for ids in banned if len(ids)]

    def advance(self, token):
        """Add the token that was picked.

        Raises PydsaError if it is not allowed.
        """
        if not self._matcher.consume_token(int(token)):
            raise PydsaError(f"the constraint does not allow the token {token}: {_reason(self._matcher)}")
        if token in self._vocabulary.eog_ids:
            return
        text = self._vocabulary.texts[token]
        self._tail = (self._tail + text)[-TAIL - len(text):]
        if self._phase == "start":
            begun, think = self._tail.lstrip(), THINK.encode()
            self._phase = "thought" if begun.startswith(think) else "start" if think.startswith(begun) else "answer"
        if self._phase == "thought" and any(mark in self._tail for mark in self._ends):
            self._phase = "answer"
        if self._call is not None and self._phase != "thought":
            self._call.add(text)


def _more_digits(tail):
    """How many digits may follow in the JSON number that ends a text.

    None if it does not end with one. Exponents have two digits, so that all numbers are finite.
    """
    number = _NUMBER.search(tail)
    if number is None:
        return None
    digits, exponent, of_exponent = number.groups()
    return max(0, MOST_DIGITS - len(digits)) if exponent is None else max(0, 2 - len(of_exponent))


class Call:
    """The call of a tool that is being written.

    As answers.Splitter reads it, a call ends with the first text that is its end, wherever that is. Where content is free, the end and
    control tokens are hence banned, but for the end of a bare text.
    """

    def __init__(self, rule):
        form = rule.form
        self._before = [] if rule.free else [mark.encode() for mark in form.opens or form.begins]       # no text before a call has them
        self._begins, self._end = [mark.encode() for mark in form.begins], form.ends.encode()
        self._opener, closer = _VALUES.get(form.mark, (None, None))
        self._closer = closer and closer.encode()
        self._texts = rule.texts
        self._inside, self._name, self._value = False, None, None       # value: None, "text" or "json"
        self._held, self._searched = bytearray(), 0     # what came since the last mark, and where the next one was looked for

    def add(self, text):
        """Add the bytes of a token."""
        self._held += text
        while self._step():
            pass
        self._searched = max(0, len(self._held) - TAIL)
        if not self._inside:
            del self._held[:self._searched]
            self._searched = 0

    def _step(self):
        """Go over the next mark; False if there is none yet."""
        if not self._inside:
            found = min(((at, len(mark)) for mark in self._begins if (at := self._held.find(mark)) >= 0), default=None)
            if found is None:
                return False
            self._inside, self._name, self._value = True, None, None
            return self._cut(sum(found))
        if self._value is not None:
            end = self._held.find(self._closer, self._searched)
            if end < 0:
                return False
            self._value = None
            return self._cut(end + len(self._closer))
        end = self._held.find(self._end, self._searched)
        opened = self._opener and self._opener.search(self._held)
        if opened and not 0 <= end < opened.start():
            self._name = self._name or re.match(rb"\s*([^\s<]*)", self._held)[1].decode(errors="replace")
            self._value = self._kind(opened[1].decode(errors="replace"))
            return self._cut(opened.end())
        if end < 0:
            return False
        self._inside = False
        return self._cut(end + len(self._end))

    def _cut(self, n):
        del self._held[:n]
        self._searched = 0
        return True

    def _kind(self, told):
        """Whether a value is bare text: DSML tells; GLM's key has a schema."""
        text = told == "true" if self._texts is None else self._texts.get(self._name, {}).get(told, False)
        return "text" if text else "json"

    def banned(self, vocabulary):
        """Arrays of ids that must not come where content is free."""
        closes = self._inside and self._value == "text"
        marks = [self._end, *([self._closer] if self._closer and not closes else [])] if self._inside else self._before
        if not marks:
            return []
        banned = [ids for mark in marks for ids in (vocabulary.holding(mark), *(vocabulary.beginning(rest) for rest in self._rests(mark)))]
        rests = self._rests(self._closer) if closes else []
        banned.append([i for i in vocabulary.shown if not any(rest.startswith(vocabulary.texts[i]) for rest in rests)])
        return banned

    def _rests(self, mark):
        """What would complete a mark, from each beginning of it that was written."""
        return [mark[n:] for n in range(len(mark)) if self._held.endswith(mark[:n])]
