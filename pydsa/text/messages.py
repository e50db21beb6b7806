"""The messages of a conversation: checked, and in one form for all formats.

    messages = checked([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])

Clients write the same message in several ways: a content as text or as parts, arguments of calls as JSON text or as a dict, keys that are
left out or None. What leaves this module has one form.
"""
import contextlib
import json
import re

from pydsa.errors import PydsaError

# Types of parts -> the names of their texts. An answer of OpenAI's models may be a refusal; its newer API names texts by who wrote them.
TEXTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
THOUGHTS = {"thinking": "thinking", "reasoning": "reasoning"}     # parts of an assistant's content
_TOKENS = re.compile(r'''"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*(?P<ended>"?)|[{}\[\],]''')
MAX_DEPTH = 200     # levels of the arguments of a call that was cut off
_UNCERTAIN = re.compile(r'''\s*,?\s*(?:"(?:[^"\\]|\\.)*(?:"\s*(?::\s*)?|\\?))?[\w.+-]*\s*''')      # a key, or a value, that has begun
ROLES = ("system", "developer", "user", "assistant", "tool")


class Arguments(dict):
    """The arguments of a call: a dict, whose text is JSON, maybe cut off.

    Some templates go through the arguments with .items(), others add them to a text or print them. Both find what they need, and the JSON
    is the one that the caller gave, so that a call put back into the conversation has the characters that the model wrote.
    """

    def __init__(self, values: dict, text: str):
        super().__init__(values)
        self._text = text       # the underscore keeps templates from it, and an argument may have any other name

    def __str__(self):
        return self._text

    def __add__(self, other):
        return self._text + str(other) if isinstance(other, (str, Arguments)) else NotImplemented

    def __radd__(self, other):
        return other + self._text if isinstance(other, str) else NotImplemented


def checked(messages):
    """Check the messages -> copies of them, each with a text as content.

    Parts of text are joined; the content is empty where an assistant or a tool has none. What an assistant thought is its
    reasoning_content, also where it came as a part or as `reasoning`. The calls have Arguments, and their results the order of the calls.
    Keys whose value is None, and empty lists of calls, are left out, as templates ask whether the key is there. Raises PydsaError.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PydsaError(f"the messages are {messages!r:.80}, expected a list of dicts with role and content")
    return _ordered([_checked(message, f"message {i}") for i, message in enumerate(messages)])


def _ordered(messages):
    """The messages, with results of calls in the order of the calls.

    Some formats tell results apart by nothing else.
    """
    result = list(messages)
    for i, message in enumerate(messages):
        ids = [call.get("id") for call in message.get("tool_calls", ()) if call.get("id") is not None]
        last = next((k for k in range(i + 1, len(messages)) if messages[k]["role"] != "tool"), len(messages))
        answered = [one.get("tool_call_id") for one in messages[i + 1:last]]
        if len(set(answered)) == len(answered) and len(set(map(str, ids))) == len(ids) and all(one in ids for one in answered):
            result[i + 1:last] = sorted(messages[i + 1:last], key=lambda one: ids.index(one["tool_call_id"]))
    return result


def _checked(message, what):
    """One message in the form that checked() describes."""
    if not isinstance(message, dict):
        raise PydsaError(f"{what} is of type {type(message).__name__}, expected a dict with role and content")
    role, calls = message.get("role"), message.get("tool_calls")
    if not isinstance(role, str) or not re.fullmatch("[A-Za-z_]+", role):
        raise PydsaError(f"{what} has the role {role!r:.80}, expected one of {', '.join(ROLES)}")
    check_functions(calls, f"{what} has the tool_calls")
    content, reasoning = message.get("content"), message.get("reasoning_content")
    own = role == "assistant" and isinstance(content, (list, tuple))
    thoughts = [part for part in content if isinstance(part, dict) and part.get("type") in THOUGHTS] if own else []
    if own:
        content = [part for part in content if part not in thoughts]
    if reasoning is None and role == "assistant":
        other = message.get("reasoning")
        reasoning = other if isinstance(other, str) else [part | {"type": "text", "text": part.get(THOUGHTS[part["type"]])}
                                                          for part in thoughts] or None
    if message.get("function_call") is not None:
        raise PydsaError(f"{what} has a function_call, the old form of OpenAI's API, expected tool_calls")
    if content is None and role in ("assistant", "tool"):       # of an answer that was stopped, and of what returns nothing
        content = message.get("refusal") or ""
    result = {key: value for key, value in message.items()
              if value is not None and key not in ("tool_calls", "refusal", *(("reasoning",) if role == "assistant" else ()))}
    result["content"] = _text(content, f"{what} has a content")
    if reasoning is not None:
        result["reasoning_content"] = _text(reasoning, f"{what} has a reasoning_content")
    if calls:
        result["tool_calls"] = [_call(call) for call in calls]
    return result


def _call(call):
    """A call, with the type that some templates print, and Arguments."""
    given = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **given, "function": {**call["function"], "arguments": _arguments(call["function"])}}


def _text(content, what):
    """A content as one text: a text, or the texts of its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        kind = "that is missing" if content is None else f"of type {type(content).__name__}"
        raise PydsaError(f"{what} {kind}, expected text, or a list of parts of text")
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in TEXTS:
            raise PydsaError(f"{what} with a part of type {kind!r:.80}, expected only parts of type 'text': the model reads nothing else")
        if not isinstance(part.get(TEXTS[kind]), str):
            raise PydsaError(f'{what} with a part {part!r:.80}, expected {{"type": "{kind}", "{TEXTS[kind]}": ...}} with a text')
    return "".join(part[TEXTS[part["type"]]] for part in content)


def check_functions(entries, what):
    """Check that tools, or calls of tools, each name a function."""
    listed = entries or [] if isinstance(entries, (list, tuple, type(None))) else [None]
    functions = [entry.get("function") if isinstance(entry, dict) else None for entry in listed]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise PydsaError(f"{what} {entries!r:.80}, expected a list of dicts with a function, which has a name")


def _arguments(function):
    """The Arguments of a call: of a dict, JSON of one, its beginning, or nothing.

    A call that max_tokens has cut off keeps its text, for templates that add that to theirs; others get what begun_object() finds.
    """
    given = function.get("arguments")
    values = {} if given is None else given
    if isinstance(given, str):
        try:
            values = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError):        # of a call that a limit cut off
            values = begun_object(given)
        else:
            values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise PydsaError(f"the arguments of the tool call {function['name']!r:.80} are {given!r:.80}, expected a dict, or JSON of one")
    return Arguments(values, given if isinstance(given, str) and given.strip() not in ("", "null") else to_json(values))


def begun_object(text):
    """The object whose JSON begins so, without what is not certain; or None."""
    if not text.lstrip().startswith("{"):
        return None
    closing, whole = "", text       # what closes all that is open
    certain = 0, ""                 # where the last value begins, and what closes all there
    for token in _TOKENS.finditer(text):
        mark = token[0]
        if mark in ("{", "["):
            closing = {"{": "}", "[": "]"}[mark] + closing
            certain = token.end(), closing
            if len(closing) > MAX_DEPTH:
                return None
        elif mark in ("}", "]"):
            closing = closing[1:]
        elif mark == ",":
            certain = token.start(), closing
        elif token["ended"] == "":
            whole = text[:token.end()] + '"'
            break
    for begun in (whole + closing, text[:certain[0]] + certain[1] if _UNCERTAIN.fullmatch(text, certain[0]) else ""):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(begun)
    return None


def to_json(value):
    """A value as JSON text, with every character as it is."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise PydsaError(f"tools or arguments hold {value!r:.80}, expected what JSON can hold") from None
