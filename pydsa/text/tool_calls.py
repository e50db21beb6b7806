"""The forms in which models write calls of tools, and how a call is read.

    form = find_form(template, texts)           # the form of a model, or None
    call = form.read(body, tools)               # what is between a call's marks -> the call in OpenAI's form, or None
    writing = Writing(form, tools)              # the same while it is written: writing.push(text) -> more of its arguments

answers.py finds the marks in the text as it arrives; this module says what they are and what stands between them.
"""
import json
import math
import re
import uuid
from collections.abc import Callable
from typing import NamedTuple

DSML, KIMI = "｜DSML｜", "<|tool_calls_section_begin|>"
_PARAMETER = re.compile(rf'\s*<{DSML}parameter name="(.+?)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_HEAD = re.compile(r'\s+name="(.+?)"\s*>')
_PARAMETER_HEAD = re.compile(rf'\s*<{DSML}parameter name="(.+?)" string="(true|false)">', re.DOTALL)
_PAIR_HEAD = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>")
_FENCE_HEAD = re.compile(r"\s*(\S+)\s*\n```json\n")
_FENCED = re.compile(r"\s*(\S+)\s*\n```json\n(.*)\n```\s*", re.DOTALL)
_TYPES = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None), "number": (int, float), "integer": int}


class Form(NamedTuple):
    """One form of calls.

    A block of calls begins with one of `opens` and ends with one of `closes`; without them each call stands alone in the text. A call is
    between `begins` and `ends`. Line breaks that the format puts before a block belong to its mark. `inside` are the marks in a call.
    """
    mark: str                       # a text that only templates and vocabularies of this form have
    opens: tuple
    closes: tuple
    begins: tuple
    ends: str
    inside: tuple
    parse: Callable                 # (body, types of arguments by function) -> (id or None, name, arguments as JSON text), or None
    write: Callable                 # (Writing, types of arguments by function) -> its steps (see Writing)
    is_none: re.Pattern | None = None       # what a call cannot begin with, where the mark of a call may stand in prose

    @property
    def marks(self):
        """All texts that belong to the form, not to an answer."""
        return (*self.opens, *self.closes, *self.begins, self.ends, *self.inside)

    def read(self, body, tools):
        """The call with this text between its marks, as a dict.

        None if the text is not a call in this form. tools: the tools that were offered, whose schemas give types where the form has none.
        """
        try:
            parsed = self.parse(body, _schemas(tools))
        except RecursionError:
            parsed = None
        if parsed is None:
            return None
        call_id, name, arguments = parsed
        return as_call(call_id or new_id(), name, arguments)


class Writing:
    """A call while it is written, valid by construction.

    name, id: of the call, None until the name is certain. broken: whether the text is no call in this form; nothing is added then.
    """

    def __init__(self, form, tools):
        self.name = self.id = None
        self.broken, self._parts = False, []
        self.text, self.ended = "", False       # for the steps: what they have not taken yet, and whether that is all
        self._steps = form.write(self, _schemas(tools))

    def push(self, text, end=False):
        """Add text -> what it adds to the arguments; end: the body is complete."""
        self.text += text
        self.ended |= end
        n = len(self._parts)
        try:
            for part in self._steps:        # a generator goes on where it waited for more text
                if part is None:
                    break
                self._parts.append(part)
        except (_Broken, ValueError, RecursionError):
            self.broken = True
        return "".join(self._parts[n:])

    @property
    def arguments(self):
        """The JSON text that is certain so far; at the end what Form.read() has."""
        return "".join(self._parts)

    def begin(self, name, call_id=None):
        """The name is certain."""
        self.name, self.id = name, call_id or new_id()


def as_call(call_id, name, arguments):
    """A call in OpenAI's form; arguments: JSON text."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def new_id():
    """An id for a call that has none."""
    return f"call_{uuid.uuid4().hex[:24]}"


def find_held(text, marks):
    """The length of the text's longest end that may become one of the marks."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)


def _schemas(tools):
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}


def find_form(template, texts):
    """The Form of a model, or None if it is none of those known.

    It is the one whose mark the template holds. A template that shows no call leaves it to the texts of the vocabulary's special tokens; so
    does template None, DeepSeek V3.2's own format.
    """
    for source in (template or "", texts):
        for form in FORMS:
            if form.mark in source:
                return form
    return None


def _loads(text):
    """The value of a JSON text; ValueError if it is none."""
    def finite(number):
        if not math.isfinite(float(number)):
            raise ValueError(number)
        return float(number)
    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _dumps(value):
    """The JSON text of a value, with every character that can be encoded."""
    text = json.dumps(value, ensure_ascii=False)
    return text if not re.search("[\ud800-\udfff]", text) else json.dumps(value)


def _dumps_all(values):
    """The JSON text of arguments, a dict."""
    return f"{{{', '.join(f'{_dumps(name)}: {_dumps(value)}' for name, value in values.items())}}}"


def _object(text):
    """The text, if it is JSON of an object, else None."""
    try:
        return text.strip() if isinstance(_loads(text), dict) else None
    except ValueError:
        return None


def _read_dsml(body, schemas):
    """DeepSeek V3.2: each parameter says whether it is a string or JSON."""
    head = _HEAD.match(body)
    parameters = _pairs(_PARAMETER, body[head.end():]) if head else None
    if parameters is None:
        return None
    try:
        values = {name: value if string == "true" else _loads(value) for name, string, value in parameters}
    except ValueError:
        return None
    return (None, head[1], _dumps_all(values)) if len(values) == len(parameters) else None


def _read_deepseek(body, schemas):
    """DeepSeek V3 and R1: type, name and fenced JSON; V3.1: name and JSON."""
    head, mark, rest = body.partition("<｜tool▁sep｜>")
    fenced = _FENCED.fullmatch(rest)
    name, arguments = fenced.groups() if fenced else (head.strip(), rest)
    arguments = _object(arguments)
    return (None, name, arguments) if mark and re.fullmatch(r"\S+", name) and arguments is not None else None


def _read_kimi(body, schemas):
    """Kimi K2: the call's id, which has the name in it, and JSON."""
    head, mark, rest = body.partition("<|tool_call_argument_begin|>")
    call_id, arguments = head.strip(), _object(rest)
    named = re.fullmatch(r"(?:functions\.)?(\S+):\d+", call_id)
    return (call_id, named[1], arguments) if mark and named and arguments is not None else None


def _read_glm(body, schemas):
    """GLM: the name, then keys and values; values have the schema's types."""
    name = body.split("<arg_key>", 1)[0]
    pairs = _pairs(_PAIR, body[len(name):])
    name = name.strip()
    if pairs is None or not re.fullmatch(r"[^\s<>]+", name):
        return None
    values = {key.strip(): _typed(value, _types_of(schemas.get(name), key.strip())) for key, value in pairs}
    return (None, name, _dumps_all(values)) if len(values) == len(pairs) else None


def _types_of(schema, key):
    """The JSON types of an argument; a text, where nothing is said of it."""
    declared = schema.get("properties") if isinstance(schema, dict) else None
    return _types(declared[key], schema) if isinstance(declared, dict) and key in declared else {"string"}


def _target(ref, root):
    """What a $ref into the root stands for; None if it leads nowhere."""
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return None
    for part in ref[2:].split("/"):
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root if isinstance(root, dict) else None


def _pairs(pattern, text):
    """The groups of each match, one after the other; None if text is left."""
    found, end = [], 0
    while match := pattern.match(text, end):
        found.append(match.groups())
        end = match.end()
    return None if text[end:].strip() else found


def _typed(text, types):
    """A value as its types say: text, unless it parses as one of them.

    Where text is among them too, text that parses as another one is taken for that.
    """
    try:
        value = _loads(text)
    except ValueError:
        return text
    for name in types - {"string"}:
        if isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool)):
            return value
    return text


def _types(schema, root):
    """The JSON types that a schema allows, as a set of names.

    Each $ref is followed once: alternatives may lead to themselves, and many to the same.
    """
    types, seen, left = set(), set(), [schema]
    while left:
        schema = left.pop()
        ref = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(schema, dict):
            types.add("string")
        elif (target := _target(ref, root)) is not None:
            left += [target] if ref not in seen else []
            seen.add(ref)
        else:
            given = schema.get("type")
            named = {name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str) and name in _TYPES}
            parts = [part for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list) for part in schema[key]]
            types |= named or (set() if parts else _types_of_values(schema))
            left += parts
    return types or set(_TYPES)


def _types_of_values(schema):
    """The types of what a schema lists; all, if it lists nothing."""
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    return set(_TYPES) if values is None else {
        name for name, kind in _TYPES.items() for value in values
        if isinstance(value, kind) and (name == "boolean" or not isinstance(value, bool))}


class _Broken(Exception):
    """The text is no call."""


# The steps of Writing: generators that yield parts of the JSON text, and None where they wait for more text.

def _match(writing, pattern):
    """Wait for a pattern at the beginning -> its match, or None at the end."""
    while (match := pattern.match(writing.text)) is None:
        if writing.ended:
            return None
        yield None
    writing.text = writing.text[match.end():]
    return match


def _upto(writing, mark):
    """Wait for a mark -> the text before it."""
    searched = 0
    while (at := writing.text.find(mark, searched)) < 0:
        if writing.ended:
            raise _Broken
        searched = max(0, len(writing.text) - len(mark) + 1)
        yield None
    taken, writing.text = writing.text[:at], writing.text[at + len(mark):]
    return taken


def _flow(writing, mark):
    """Yield the text before a mark as it comes, and None between."""
    while (at := writing.text.find(mark)) < 0:
        n = len(writing.text) - find_held(writing.text, (mark,))
        part, writing.text = writing.text[:n], writing.text[n:]
        yield part
        if writing.ended:
            raise _Broken
        yield None
    part, writing.text = writing.text[:at], writing.text[at + len(mark):]
    yield part


def _end(writing):
    """Raise _Broken if more than white space is left."""
    if writing.text.strip():
        raise _Broken


def _flow_string(writing, mark):
    """Yield the text before a mark as a JSON string."""
    yield '"'
    for part in _flow(writing, mark):
        yield part if part is None else _dumps(part)[1:-1]
    yield '"'


def _flow_json(writing, mark=None):
    """Yield JSON text without white space around it.

    mark: what ends it; None: the end of the call.
    """
    held, begun = "", False
    for part in _flow(writing, mark) if mark else _flow_all(writing):
        if part is None:
            yield None
            continue
        text = held + part if begun else part.lstrip()
        begun |= bool(text)
        held = text[len(text.rstrip()):]
        yield text.rstrip()


def _flow_all(writing):
    """Yield the text as it comes up to the end."""
    while True:
        part, writing.text = writing.text, ""
        yield part
        if writing.ended:
            return
        yield None


def _write_members(writing, heads, write):
    """Yield the members of an object; heads: the pattern of what begins one. write(match): yields key and value."""
    names = set()
    yield "{"
    while (match := (yield from _match(writing, heads))) is not None:
        name = match[1].strip() if heads is _PAIR_HEAD else match[1]
        if name in names:
            raise _Broken
        yield f"{', ' if names else ''}{_dumps(name)}: "
        names.add(name)
        yield from write(name, match)
    _end(writing)
    yield "}"


def _write_dsml(writing, schemas):
    head = yield from _match(writing, _HEAD)
    if head is None:
        raise _Broken
    writing.begin(head[1])
    end = f"</{DSML}parameter>"

    def write(name, match):
        if match[2] == "true":
            yield from _flow_string(writing, end)
        else:
            yield _dumps(_loads((yield from _upto(writing, end))))
    yield from _write_members(writing, _PARAMETER_HEAD, write)


def _write_glm(writing, schemas):
    while "<arg_key>" not in writing.text and not writing.ended:
        yield None
    name, mark, rest = writing.text.partition("<arg_key>")
    writing.text, name = mark + rest, name.strip()
    if not re.fullmatch(r"[^\s<>]+", name):
        raise _Broken
    writing.begin(name)

    def write(key, match):
        types = _types_of(schemas.get(name), key)
        if types == {"string"}:
            yield from _flow_string(writing, "</arg_value>")
        else:
            yield _dumps(_typed((yield from _upto(writing, "</arg_value>")), types))
    yield from _write_members(writing, _PAIR_HEAD, write)


def _write_deepseek(writing, schemas):
    name = (yield from _upto(writing, "<｜tool▁sep｜>")).strip()
    while not writing.text.strip() and not writing.ended:
        yield None
    fenced = None if writing.text.lstrip().startswith("{") else (yield from _match(writing, _FENCE_HEAD))
    name = name if fenced is None else fenced[1]
    if not re.fullmatch(r"\S+", name) or fenced is None and not writing.text.lstrip().startswith("{"):
        raise _Broken
    writing.begin(name)
    yield from _flow_json(writing, None if fenced is None else "\n```")


def _write_kimi(writing, schemas):
    call_id = (yield from _upto(writing, "<|tool_call_argument_begin|>")).strip()
    named = re.fullmatch(r"(?:functions\.)?(\S+):\d+", call_id)
    if named is None:
        raise _Broken
    writing.begin(named[1], call_id)
    yield from _flow_json(writing)


# In this order: vocabularies of V3.2 also have the tokens of V3.
FORMS = (
    Form(DSML, *(tuple(f"{lead}<{slash}{DSML}{name}>" for lead in leads for name in ("function_calls", "tool_calls"))
                 for leads, slash in ((("\n\n", ""), ""), (("",), "/"))),
         (f"<{DSML}invoke",), f"</{DSML}invoke>", (f"<{DSML}parameter", f"</{DSML}parameter>"), _read_dsml, _write_dsml),
    Form("<｜tool▁calls▁begin｜>", ("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁end｜>",),
         ("<｜tool▁call▁begin｜>",), "<｜tool▁call▁end｜>", ("<｜tool▁sep｜>",), _read_deepseek, _write_deepseek),
    Form(KIMI, (KIMI,), ("<|tool_calls_section_end|>",),
         ("<|tool_call_begin|>",), "<|tool_call_end|>", ("<|tool_call_argument_begin|>",), _read_kimi, _write_kimi),
    Form("<arg_key>", (), (), ("\n<tool_call>", "<tool_call>"), "</tool_call>",
         ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), _read_glm, _write_glm, re.compile(r"\s*[^\s<]+\s+[^\s<]")),
)
