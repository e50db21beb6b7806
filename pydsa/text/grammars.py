"""The texts of grammars: what a constrained answer may be.

    Rule = json_schema({"type": "object"}), grammar('root ::= "yes" | "no"'), tools(form, offered, "auto")

A Rule is a text in llguidance's variant of Lark; constraint.py runs it. Schemas and grammars come from whoever sends a request: their size
and depth are limited here, and what the library cannot serve is refused in words.
"""
import importlib
import json
import re
from typing import NamedTuple

from pydsa.errors import PydsaError

MAX_TEXT = 1 << 18              # characters of a schema as JSON
MAX_GRAMMAR = 1 << 15           # characters of a grammar, whose converter is slow
MAX_DEPTH, MAX_NODES = 64, 50_000
MAX_WAYS = 10_000               # ways to write the arguments of all tools, of which each $ref may stand for many
# One line break with its indentation, or a space: whitespace without end is the commonest way for a model to get lost in a grammar.
_SPACE = r" |\n[ \t]{0,40}"
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")     # others only describe
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")     # keys whose keys are names
_UNLISTED = ("anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "minProperties", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")      # keys whose values are no schemas


class ConstraintError(PydsaError):
    """A schema, a grammar or a choice of tools that cannot be served.

    of_choice: whether it is the choice.
    """

    def __init__(self, text, of_choice=False):
        super().__init__(text)
        self.of_choice = of_choice


class Rule(NamedTuple):
    """What an answer may be.

    text: Lark rules, of which `answer` is all of it, and `open` and `rest` are a block of calls, where there is one. begun: texts that open
    a block, so that calls may also end reasoning. free: text comes first, and the answer may end without calls. own: a grammar in a
    namespace of its own, which `answer` refers to. form: the Form of calls that a reader looks for. texts: {function: {argument: whether
    its value is bare text}}, for forms that have it.
    """
    text: str
    begun: tuple = ()
    free: bool = False
    own: str | None = None
    form: object = None
    texts: dict | None = None


def llguidance(part=""):
    """The library, or a part of it; else a sentence on how to install it."""
    try:
        return importlib.import_module("llguidance" + part)
    except ImportError as error:
        raise PydsaError(f"constrained output needs the package llguidance ({error}): install it with pip install 'pydsa[serve]', or ask "
                         "for no schema and no grammar, and with tools for tool_choice=None") from None


def json_object() -> Rule:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema) -> Rule:
    """JSON that is valid by a schema, a dict or a bool.

    Raises ConstraintError if the schema is none, or is too large or too deep.
    """
    return Rule(f"answer: {embedded(checked(schema, 'the JSON schema'))}")


def grammar(text) -> Rule:
    """Text by a grammar: llama.cpp's GBNF, or llguidance's Lark.

    It is Lark if it has a rule `start`, or says %llguidance. Raises ConstraintError if it cannot be read.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConstraintError(f"the grammar is {text!r:.80}, expected a text in GBNF, whose first rule is root ::= ..., or in Lark")
    if len(text) > MAX_GRAMMAR:
        raise ConstraintError(f"the grammar has {len(text)} characters, expected at most {MAX_GRAMMAR}")
    converter = llguidance(".gbnf_to_lark")
    try:
        return Rule("answer: @own", own=converter.any_to_lark(text))
    except Exception as error:      # the converter raises several, of which IndexError and RecursionError are for damaged texts
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise ConstraintError(f"the grammar cannot be read ({reason:.200}), expected GBNF, or Lark") from None


def checked(schema, what):
    """A schema as the library takes it, a copy.

    Formats that it does not know are left out, as they only describe; so are options of the library. Raises ConstraintError if it is not
    a dict or a bool, cannot be JSON, or is too large.
    """
    if not isinstance(schema, (dict, bool)):
        raise ConstraintError(f"{what} is of type {type(schema).__name__}, expected an object")
    try:
        n = len(json.dumps(schema, allow_nan=False))
    except RecursionError:
        raise ConstraintError(f"{what} is nested too deeply, expected at most {MAX_DEPTH} levels") from None
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"{what} is not JSON ({error})") from None
    if n > MAX_TEXT:
        raise ConstraintError(f"{what} has {n} characters, expected at most {MAX_TEXT}")
    return _cleaned(schema, what, [MAX_NODES], MAX_DEPTH)


def _cleaned(value, what, left, depth, names=False):
    """A copy of a part of a schema; left: [how many more parts may come]."""
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise ConstraintError(f"{what} is too large, expected at most {MAX_DEPTH} levels and {MAX_NODES} values")
    if isinstance(value, list):
        return [_cleaned(item, what, left, depth - 1) for item in value]
    if not isinstance(value, dict):
        return value
    if names:
        return {key: _cleaned(item, what, left, depth - 1) for key, item in value.items()}
    return {key: item if key in _VALUES else _cleaned(item, what, left, depth - 1, key in _NAMED) for key, item in value.items()
            if key != "x-guidance" and not (key == "format" and item not in _FORMATS)}


def embedded(schema):
    """A cleaned schema as a part of a Lark rule."""
    schema = schema if isinstance(schema, dict) else {"anyOf": [schema]}
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': _SPACE}})}"


def quoted(text):
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text):
    """A text as a part of a regex of Lark."""
    return "".join({"\n": r"\n"}.get(c, "\\" + c if c in r"\.+*?()|[]{}^$/-&~#" else c) for c in text)


# Schemas of single arguments, for forms that have a text for each

def named_arguments(schema, what):
    """The arguments of a function: [(name, schema, whether it is required)].

    schema: cleaned. Arguments that are not declared are not offered. Raises ConstraintError if the schema does not list its arguments.
    """
    root = dereferenced(schema, schema)
    if root is True:
        return []
    other = [key for key in _UNLISTED if key in root]
    declared, required = root.get("properties", {}), root.get("required", [])
    if other or root.get("type", "object") != "object" or not isinstance(declared, dict) or not isinstance(required, list):
        unlike = f"have {other[0]!r}" if other else "are no object with properties"
        raise ConstraintError(f"the parameters of {what} {unlike}, expected an object with properties, as this model writes each by itself")
    names = [*declared, *(name for name in required if isinstance(name, str) and name not in declared)]
    return [(name, declared.get(name, True), name in required) for name in names]


def dereferenced(schema, root):
    """The schema that a $ref to the root's definitions stands for."""
    for _ in range(MAX_DEPTH):
        if schema is True or schema is None:
            return True
        if not isinstance(schema, dict):
            raise ConstraintError(f"a schema is {json.dumps(schema):.80}, expected an object")
        if not isinstance(ref := schema.get("$ref"), str):
            return schema
        target = root if isinstance(root, dict) else {}
        for part in ref.removeprefix("#/").split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        if not re.match(r"#/(\$defs|definitions)/", ref) or target is None:
            raise ConstraintError(f"a schema has the $ref {ref!r:.80}, expected one into $defs of the same schema")
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}} if isinstance(target, dict) else target
    raise ConstraintError("a schema has a $ref that leads to itself, expected one that ends")


def values(schema, root, left, depth=MAX_DEPTH):
    """The ways in which a value may be written, a list of pairs.

    ("text", a regex of bare text or None for any), ("literal", a text), or ("json", a schema). left: [how many more ways there may be].
    """
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise ConstraintError(f"the arguments of the tools have too many alternatives, or some that lead to themselves, expected at most "
                              f"{MAX_WAYS}, nested up to {MAX_DEPTH} levels deep")
    schema = dereferenced(schema, root)
    if schema is True:
        return [("text", None), ("json", True)]
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            rest = {name: value for name, value in schema.items() if name != key}
            branches = [dereferenced(branch, root) for branch in schema[key]]
            return [way for branch in branches for way in values(rest if branch is True else rest | branch, root, left, depth - 1)]
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
        rest = {name: value for name, value in schema.items() if name != "allOf"}
        only = dereferenced(schema["allOf"][0], root)
        return values(rest if only is True else rest | only, root, left, depth - 1)
    for key in ("not", "if", "allOf"):
        if key in schema and schema.get("type") not in ("object", "array", "number", "integer", "boolean", "null"):
            raise ConstraintError(f"the schema of an argument has {key!r}, expected none where it may be text, as this model writes it")
    listed = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    if listed is not None:
        others = [value for value in listed if not isinstance(value, str)]
        return [*(("literal", value) for value in listed if isinstance(value, str)), *([("json", {"enum": others})] if others else [])]
    kind = schema.get("type")
    if isinstance(kind, list):
        return [way for one in kind for way in values(schema | {"type": one}, root, left, depth - 1)]
    if kind == "string":
        return [("text", bare(schema))]
    plain = kind is None and not schema.keys() & {"properties", "items", "required", "minimum", "maximum", "additionalProperties"}
    return [*([("text", bare(schema))] if plain else []), ("json", _whole(schema, root))]


def _whole(schema, root):
    """A part of a schema by itself, with the root's definitions."""
    if '"$ref"' not in json.dumps(schema):
        return schema
    outside = [ref for ref in re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema)) if not re.match(r"#/(\$defs|definitions)/", ref)]
    if outside:
        raise ConstraintError(f"a schema has the $ref {outside[0]!r:.80}, expected one into $defs of the same schema")
    return schema | {key: root[key] for key in ("$defs", "definitions") if key in root}


def bare(schema):
    """The regex of a bare text by a schema of strings; None: any text."""
    parts = []
    if "pattern" in schema:
        parts.append(_whole_match(schema["pattern"]))
    least, most = (schema.get(key) for key in ("minLength", "maxLength"))
    if least is not None or most is not None:
        if not all(type(n) is int and 0 <= n <= 1 << 20 for n in (least, most) if n is not None):
            raise ConstraintError(f"a schema has the lengths {least!r:.40} and {most!r:.40}, expected integers from 0 to {1 << 20}")
        parts.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
    return " & ".join(parts) or None


def _whole_match(pattern):
    """A pattern, which is searched for, as a regex of the whole text."""
    if not isinstance(pattern, str):
        raise ConstraintError(f"a schema has the pattern {pattern!r:.80}, expected a text")
    inner = pattern.removeprefix("^")
    begins, ends = inner != pattern, inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[:-1] if ends else inner
    unescaped = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", inner, flags=re.DOTALL)
    if "^" in unescaped or "$" in unescaped or "|" in re.sub(r"\([^()]*\)", "", unescaped) and (begins or ends):
        raise ConstraintError(f"a schema has the pattern {pattern!r:.80}, expected one with ^ and $ only around all of it")
    anything = "(?s:.*)"
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner).replace("\n", r"\n")
    return f"/{'' if begins else anything}(?:{inner}){'' if ends else anything}/"
