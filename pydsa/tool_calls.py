"""The forms in which models write calls of tools, and how a call is read.

    form = find_form(template, texts)           # the form of a model, or None
    call = form.read(body, tools)               # what is between a call's marks -> the call in OpenAI's form, or None

answers.py finds the marks in the text as it arrives; this module says what they are and what stands between them.
"""
import json
import math
import re
import uuid
from collections.abc import Callable
from typing import NamedTuple

DSML = "｜DSML｜"
_PARAMETER = re.compile(rf'\s*<{DSML}parameter name="(.+?)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
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
    is_none: re.Pattern | None = None       # what a call cannot begin with, where the mark of a call may stand in prose

    @property
    def marks(self):
        """All texts that belong to the form, not to an answer."""
        return (*self.opens, *self.closes, *self.begins, self.ends, *self.inside)

    def read(self, body, tools):
        """The call with this text between its marks, as a dict.

        None if the text is not a call in this form. tools: the tools that were offered, whose schemas give types where the form has none.
        """
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
        try:
            parsed = self.parse(body, schemas)
        except RecursionError:
            parsed = None
        if parsed is None:
            return None
        call_id, name, arguments = parsed
        return {"id": call_id or f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}


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


def _dumps(values):
    """The JSON text of arguments, with every character that can be encoded."""
    text = json.dumps(values, ensure_ascii=False)
    return text if not re.search("[\ud800-\udfff]", text) else json.dumps(values)


def _object(text):
    """The text, if it is JSON of an object, else None."""
    try:
        return text.strip() if isinstance(_loads(text), dict) else None
    except ValueError:
        return None


def _read_dsml(body, schemas):
    """DeepSeek V3.2: each parameter says whether it is a string or JSON."""
    head = re.match(r'\s+name="(.+?)"\s*>', body)
    parameters = _pairs(_PARAMETER, body[head.end():]) if head else None
    if parameters is None:
        return None
    try:
        values = {name: value if string == "true" else _loads(value) for name, string, value in parameters}
    except ValueError:
        return None
    return (None, head[1], _dumps(values)) if len(values) == len(parameters) else None


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
    schema = schemas.get(name)
    declared = schema.get("properties") if isinstance(schema, dict) else None
    values = {key.strip(): _typed(value, (declared or {}).get(key.strip(), {"type": "string"}) if isinstance(declared, dict) else None)
              for key, value in pairs}
    return (None, name, _dumps(values)) if len(values) == len(pairs) else None


def _pairs(pattern, text):
    """The groups of each match, one after the other; None if text is left."""
    found, end = [], 0
    while match := pattern.match(text, end):
        found.append(match.groups())
        end = match.end()
    return None if text[end:].strip() else found


def _typed(text, schema):
    """A value as its schema has it: text, unless it parses as a declared type.

    Where text is a declared type too, text that parses as another declared type is taken for that.
    """
    types = _types(schema)
    try:
        value = _loads(text)
    except ValueError:
        return text
    for name in types - {"string"}:
        if isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool)):
            return value
    return text


def _types(schema):
    """The JSON types that a schema allows, as a set of names."""
    if not isinstance(schema, dict):
        return {"string"}
    given = schema.get("type")
    types = {name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str) and name in _TYPES}
    for key in ("anyOf", "oneOf", "allOf"):
        alternatives = schema.get(key)
        types |= {name for part in (alternatives if isinstance(alternatives, list) else ()) for name in _types(part)}
    if types:
        return types
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    if values is not None:
        return {name for name, kind in _TYPES.items() for value in values
                if isinstance(value, kind) and (name == "boolean" or not isinstance(value, bool))}
    return set(_TYPES)      # a schema that names no type allows them all


# In this order: vocabularies of V3.2 also have the tokens of V3.
FORMS = (
    Form(DSML, *(tuple(f"{lead}<{slash}{DSML}{name}>" for lead in leads for name in ("function_calls", "tool_calls"))
                 for leads, slash in ((("\n\n", ""), ""), (("",), "/"))),
         (f"<{DSML}invoke",), f"</{DSML}invoke>", (f"<{DSML}parameter", f"</{DSML}parameter>"), _read_dsml),
    Form("<｜tool▁calls▁begin｜>", ("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁end｜>",),
         ("<｜tool▁call▁begin｜>",), "<｜tool▁call▁end｜>", ("<｜tool▁sep｜>",), _read_deepseek),
    Form("<|tool_calls_section_begin|>", ("<|tool_calls_section_begin|>",), ("<|tool_calls_section_end|>",),
         ("<|tool_call_begin|>",), "<|tool_call_end|>", ("<|tool_call_argument_begin|>",), _read_kimi),
    Form("<arg_key>", (), (), ("\n<tool_call>", "<tool_call>"), "</tool_call>",
         ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), _read_glm, re.compile(r"\s*[^\s<]+\s+[^\s<]")),
)
