"""Grammars of calls of tools, for each form in which models write them.

    rule = tools(form, offered, choice="auto")      # a grammars.Rule

A call that has begun is completed by the schema of its function. What a grammar lets through, tool_calls.py reads.
"""
import functools
import json
import re
import time
import warnings

from pydsa.text.answers import Layout
from pydsa.text.grammars import MAX_WAYS, ConstraintError, Rule, checked, embedded, escaped, llguidance, named_arguments, quoted, values
from pydsa.text.tool_calls import DSML, KIMI
from pydsa.text.tool_schemas import PLAIN_NAME, held, key_of

MAX_TOOLS = 512
MAX_SECONDS = 5.0       # to find what can be held of all schemas of a request; after that, they are taken whole
_NL = "NL?"
_CHOICES = "expected 'auto', 'none', 'required', or a function that is offered"


def tools(layout: Layout, choice="auto", parallel=True, said: Rule | None = None) -> Rule | None:
    """The Rule of an answer with tools; None: any text may come.

    layout: with the form of the model, and the tools in OpenAI's form. choice: "auto": text, and calls; "none": text; "required": at
    least one call; {"type": "function", "function": {"name": ...}}, {"name": ...} or (name,): a call of that function; {"type":
    "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}: as the mode says, of these. parallel: whether there
    may be several calls. said: a Rule that texts follow; None: they are free. Raises ConstraintError for a choice, a name or a schema that
    cannot be served.
    """
    form, offered = layout.form, layout.tools or []
    names = [tool["function"]["name"] for tool in offered]
    kind, allowed = _kind(choice, names)
    if form is None or not offered:
        if kind not in ("auto", "none"):
            missing = "the model's template shows no form of calls that is known here" if offered else "no tools are given"
            raise ConstraintError(f"tool_choice asks for a call, but {missing}, expected the choice to be left to the model",
                                  of_choice=True)
        return said
    marks = _shortest(form.opens or form.begins)
    if kind == "none" and said is not None:
        return said
    if kind == "none":
        any_mark = "|".join(map(escaped, _shortest((*form.opens, *form.begins))))
        return Rule(f"answer: FREE\nFREE: /(?s:.*)/ & ~/(?s:.*)({any_mark})(?s:.*)/", free=True)
    if len(offered) > MAX_TOOLS or len(set(names)) != len(names):
        raise ConstraintError(f"{len(offered)} tools are given, expected at most {MAX_TOOLS}, each with a name of its own")
    called = [tool for tool in offered if tool["function"]["name"] in allowed]
    until = time.monotonic() + MAX_SECONDS
    text, texts = _BODIES[form.mark](form, [_function(form, tool, time.monotonic() > until) for tool in called], parallel)
    opened = "(" + " | ".join(map(quoted, marks)) + ")"
    free = kind == "auto" and said is None
    answer, own = "open rest | TEXT" if free else f"(NL NL?)? {opened} rest", None
    if kind == "auto" and said is not None:
        answer, own, text = f"{answer} | said", said.own, [*text, said.text.replace("answer:", "said:", 1)]
    lines = [f"answer: {answer}", "TEXT: /(?s:.*)/", r"NL: /\n/", f"open[lazy]: TEXT {opened}", *text]
    return Rule("\n".join(lines), begun=marks if form.opens else (), free=free, own=own, form=form, texts=texts)


def _kind(choice, names):
    """The choice as "auto", "none" or "required", and which may be called."""
    if choice in ("auto", "none", "required"):
        return choice, names
    kind, named = "required", [choice[0] if isinstance(choice, tuple) and len(choice) == 1 else _name(choice)]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        given = choice.get("allowed_tools") if isinstance(choice.get("allowed_tools"), dict) else {}
        kind, listed = given.get("mode"), given.get("tools")
        named = list(map(_name, listed)) if isinstance(listed, list) and kind in ("auto", "required") else []
    if not named or not all(isinstance(name, str) for name in named):
        raise ConstraintError(f"tool_choice is {choice!r:.80}, {_CHOICES}", of_choice=True)
    missing = next((name for name in named if name not in names), None)
    if missing is not None:
        raise ConstraintError(f"tool_choice names {missing!r:.80}, {_CHOICES}: {', '.join(names) or 'there is none':.200}", of_choice=True)
    return kind, named


def _name(tool):
    """The name of a tool in OpenAI's form, or of {"name": ...}; None: it has none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _shortest(marks):
    """Marks without those that only add something before another."""
    return tuple(mark for mark in marks if not any(mark != other and mark.endswith(other) for other in marks))


def _function(form, tool, whole):
    """(name, cleaned schema of its parameters) of a tool.

    Calls are held to what a grammar can hold; of a tool with "strict": true, and with `whole`, to all of its schema, or it is refused.
    """
    function = tool["function"]
    name, schema = function["name"], function.get("parameters")
    if not re.fullmatch(r"""[^\s<>"'`|｜]{1,256}""", name):
        raise ConstraintError(f"a tool has the name {name!r:.80}, expected up to 256 characters without spaces, quotes and brackets")
    schema = {"type": "object", "properties": {}} if schema is None else schema
    if not whole and function.get("strict") is not True:
        schema = _held(form, name, key_of(schema))
    return name, checked(schema, f"the schema of the parameters of {name}")


@functools.lru_cache(maxsize=128)
def _held(form, name, schema):
    """The part of a schema that calls are held to.

    schema: as JSON text. Warns, once, if the part is not all of it.
    """
    schema, reason = held(json.loads(schema), functools.partial(_problem, form, name))
    if reason is not None:
        warnings.warn(f"Calls of the tool {name} are held to a part of its schema only: {reason}.", stacklevel=2)
    return schema


def _problem(form, name, schema):
    """Why a grammar cannot hold calls to the schema of a tool, or None."""
    library = llguidance().LLMatcher
    try:
        lines, _ = _BODIES[form.mark](form, [(name, checked(schema, f"the schema of the parameters of {name}"))], True)
    except ConstraintError as error:
        return str(error)
    found = library.validate_grammar(library.grammar_from_lark("\n".join(["start: rest", r"NL: /\n/", *lines])))
    found = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", re.split(r"\n +\d+ \| ", found)[0])
    return " ".join(found.split())[:200] or None


def _many(call, between, parallel):
    """Rules for one call, or several."""
    return f"{call} ({between} {call})*" if parallel else call


def _deepseek(form, functions, parallel):
    """DeepSeek V3.1: a name and JSON; V3 and R1: fenced JSON after the name."""
    begin, end, separator = form.begins[0], form.ends, form.inside[0]
    lines = [f"rest: {_NL} {_many('call', _NL, parallel)} {_NL} {quoted(form.closes[0])}",
             f"call: {quoted(begin)} (" + " | ".join(f"call_{i}" for i in range(len(functions))) + f") {quoted(end)}"]
    for i, (name, schema) in enumerate(functions):
        fenced = quoted(f"function{separator}{name}\n```json\n") + f" value_{i} " + quoted("\n```")
        lines += [f"call_{i}: {quoted(name + separator)} value_{i} | {fenced}", f"value_{i}: {embedded(_object(schema))}"]
    return lines, None


def _kimi(form, functions, parallel):
    """Kimi K2: the call's id, which has the name in it, and JSON."""
    begin, end, separator = form.begins[0], form.ends, form.inside[0]
    lines = [f"rest: {_NL} {_many('call', _NL, parallel)} {_NL} {quoted(form.closes[0])}", "NUMBER: /[0-9]{1,4}/",
             f"call: {quoted(begin)} (" + " | ".join(f"call_{i}" for i in range(len(functions))) + f") {quoted(end)}"]
    for i, (name, schema) in enumerate(functions):
        lines.append(f"call_{i}: {quoted(f'functions.{name}:')} NUMBER {quoted(separator)} {embedded(_object(schema))}")
    return lines, None


def _dsml(form, functions, parallel):
    """DeepSeek V3.2: a parameter is bare text or JSON, and says which."""
    closes, end, left = form.closes, f"</{DSML}parameter>", [MAX_WAYS]
    lines = [f"rest: NL {_many('call', 'NL', parallel)} NL (" + " | ".join(map(quoted, closes)) + ")",
             f"call: {quoted(form.begins[0])} (" + " | ".join(f"call_{i}" for i in range(len(functions))) + f") {_NL} {quoted(form.ends)}"]
    for i, (name, schema) in enumerate(functions):
        parts = []
        for j, (key, way, required) in enumerate(_arguments(name, schema, left)):
            rule = f"argument_{i}_{j}"
            opened = f'<{DSML}parameter name="{key}" string="'
            ways = [f"{quoted(opened + 'true' + chr(34) + '>')} {_bare(way, rule, end, lines)}"] if _texts(way) else []
            ways += [f"{quoted(opened + 'false' + chr(34) + '>')} {embedded(part)} {quoted(end)}" for kind, part in way if kind == "json"]
            lines.append(f"{rule}: " + " | ".join(ways))
            parts.append(f"{rule} NL" if required else f"({rule} NL)?")
        lines.append(f"call_{i}: " + " ".join([quoted(f' name="{name}">'), "NL", *parts]))
    return lines, None


def _glm(form, functions, parallel):
    """GLM: the name, then keys and values; texts are bare, the others JSON."""
    begin, end, value_end, left = "<tool_call>", form.ends, "</arg_value>", [MAX_WAYS]
    lines = [f"rest: call ({_NL} {_NL} {quoted(begin)} call)*" if parallel else "rest: call",
             "call: (" + " | ".join(f"call_{i}" for i in range(len(functions))) + f") {_NL} {quoted(end)}"]
    texts = {}
    for i, (name, schema) in enumerate(functions):
        parts, texts[name] = [], {}
        for j, (key, way, required) in enumerate(_arguments(name, schema, left)):
            rule = f"argument_{i}_{j}"
            texts[name][key] = bool(_texts(way))
            free = ("text", None) in way        # a text that is JSON of another type is read as that
            ways = [_bare(way, rule, value_end, lines)] if _texts(way) else []
            ways += [f"{embedded(part)} {quoted(value_end)}" for kind, part in way if kind == "json" and not free]
            lines.append(f"{rule}: {_NL} {quoted(f'<arg_key>{key}</arg_key>')} {_NL} {quoted('<arg_value>')} ({' | '.join(ways)})")
            parts.append(rule if required else f"{rule}?")
        lines.append(f"call_{i}: " + " ".join([quoted(name), *parts]))
    return lines, texts


def _arguments(function, schema, left):
    """(name, ways to write its value, is it required) of each argument.

    left: [how many more ways there may be].
    """
    for name, part, required in named_arguments(schema, function):
        if not PLAIN_NAME.fullmatch(name):
            raise ConstraintError(f"{function} has the parameter {name!r:.80}, expected a name without quotes, brackets and line breaks")
        yield name, values(part, schema, left), required


def _texts(way):
    """The ways that are bare text."""
    return [part for kind, part in way if kind in ("text", "literal")]


def _bare(way, rule, end, lines):
    """The rule of a bare text up to its end, and the end itself."""
    literals = [f"{quoted(part + end)}" for kind, part in way if kind == "literal" and end not in part]
    for n, part in enumerate(part for kind, part in way if kind == "text"):
        body = f"{rule}_{n}".upper()
        lines += [f"{rule}_text_{n}[lazy]: {body} {quoted(end)}",
                  f"{body}: {'/(?s:.*)/' if part is None else f'{part} & ~/(?s:.*){escaped(end)}(?s:.*)/'}"]
        literals.append(f"{rule}_text_{n}")
    if not literals:
        raise ConstraintError(f"a parameter may only be a text with {end} in it, which this model cannot write")
    return f"({' | '.join(literals)})"


def _object(schema):
    """A schema of arguments, which are an object even where it says nothing."""
    return {"type": "object", "properties": {}} if schema is True else schema if "$ref" in schema else {"type": "object"} | schema


_BODIES = {DSML: _dsml, "<｜tool▁calls▁begin｜>": _deepseek, KIMI: _kimi, "<arg_key>": _glm}
