"""Bodies of Anthropic's API, as conversations and tools that pydsa reads.

    messages, prefill = conversation(body)
"""
import re
from collections import Counter
from itertools import groupby
from typing import Any

from pydantic import ConfigDict, Field

from pydsa.server.bodies import Fields, Listed, expected, shown, unreadable
from pydsa.server.constrained import Wanted
from pydsa.server.errors import NO_THREADS, ApiError
from pydsa.server.openai_forms import MAX_STOP, MAX_STOPS

BILLING = "x-anthropic-billing-header:"     # a line that some agents put into the system text, with another number each time
THINKING = ("enabled", "adaptive", "between_tools", "disabled")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def wrong(where, words):
    """The ApiError on a part of a body; words: "is ..., expected ..."."""
    return ApiError(400, f"{where} {words}.", where.split(".")[0], "invalid_value")


class CountRequest(Fields):
    """The body of /v1/messages/count_tokens; other fields are refused.

    Those that only tell Anthropic's servers what to keep, to charge or to route are taken and change nothing.
    """
    model_config = ConfigDict(extra="forbid")
    model: str = Field(description="the name of a model")
    messages: Listed[dict[str, Any]] = Field(description="a list of messages with role and content")
    system: str | list[Any] | None = expected("a text, or a list of blocks of text")
    tools: Listed[dict[str, Any]] = expected("a list of tools")
    tool_choice: dict[str, Any] | None = expected('an object like {"type": "auto"}')
    thinking: dict[str, Any] | None = expected('an object like {"type": "disabled"}')
    output_config: dict[str, Any] | None = expected("an object")
    output_format: dict[str, Any] | None = expected('an object like {"type": "json_schema", "schema": ...}')
    mcp_servers: list[Any] | None = expected("an empty list: this server connects to no others", max_length=0)
    betas: Any = None
    billing_policy: Any = None
    cache_control: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
    speed: Any = None
    user_profile_id: Any = None
    thread: Any = None

    def wants_thinking(self):
        """Whether the model shall reason first; None: as the server's settings say."""
        if self.thinking is None:
            return None
        kind = self.thinking.get("type")
        if kind not in THINKING:
            raise wrong("thinking", f"is {shown(self.thinking)}, expected an object whose type is one of {', '.join(THINKING)}")
        budget = self.thinking.get("budget_tokens")
        if kind == "enabled" and (type(budget) is not int or budget < 1024):
            raise wrong("thinking.budget_tokens", f"is {shown(budget)}, expected an integer from 1024 on")
        return kind != "disabled"

    def wanted(self):
        """What the answer shall be, a Wanted, or None."""
        form = (self.output_config or {}).get("format") or self.output_format
        if form is None:
            return None
        if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            raise wrong("output_config.format", f'is {shown(form)}, expected {{"type": "json_schema", "schema": ...}}')
        return Wanted("json_schema", form["schema"], "output_config")

    def choice(self):
        """What tool_choice asks for, and whether several calls may come.

        The first is in OpenAI's form. Raises ApiError.
        """
        given = self.tool_choice or {"type": "auto"}
        kind, single = given.get("type"), given.get("disable_parallel_tool_use")
        if single not in (None, True, False):
            raise wrong("tool_choice.disable_parallel_tool_use", f"is {shown(single)}, expected true or false")
        if kind in ("any", "tool") and not self.tools:
            raise wrong("tool_choice", f"is {shown(given)}, but there are no tools")
        if kind == "tool":
            if given.get("name") not in [tool.get("name") for tool in self.tools]:
                raise wrong("tool_choice.name", f"is {shown(given.get('name'))}, expected the name of one of the tools")
            return {"name": given["name"]}, not single
        if not isinstance(kind, str) or kind not in CHOICES:
            raise wrong("tool_choice", f"is {shown(given)}, expected an object whose type is auto, any, tool or none")
        return CHOICES[kind], not single

    def functions(self):
        """The tools in the form of chat.encode_chat, or None."""
        tools = [_function(f"tools.{i}", tool) for i, tool in enumerate(self.tools or ())]
        names = [tool["function"]["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise wrong("tools", "have a name twice, expected a name of its own for each")
        return tools or None


class MessagesRequest(CountRequest):
    """The body of /v1/messages."""
    max_tokens: int = Field(description="an integer from 0 on", ge=0)
    stream: bool | None = expected("true or false")
    stop_sequences: list[Any] | None = expected("a list of texts")
    temperature: float | None = expected("a number from 0 to 1", ge=0, le=1)
    top_p: float | None = expected("a number from 0 to 1", ge=0, le=1)
    top_k: int | None = expected("an integer from 0 on", ge=0)

    def stops(self):
        """The stop texts, a list."""
        stops = self.stop_sequences or []
        if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text.strip() and len(text) <= MAX_STOP for text in stops):
            raise wrong("stop_sequences", f"is {shown(stops)}, expected a list of up to {MAX_STOPS} texts of up to {MAX_STOP} characters, "
                                          "none of them blank")
        return stops


def _function(where, tool):
    """A tool as OpenAI's API has it."""
    kind, name, description = tool.get("type"), tool.get("name"), tool.get("description")
    if kind not in (None, "custom"):
        raise wrong(where, f"is of type {shown(kind)}, which this server does not run, expected tools with a name and an input_schema")
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,128}", name):
        raise wrong(f"{where}.name", f"is {shown(name)}, expected up to 128 letters, digits, _ and -")
    if not isinstance(tool.get("input_schema"), dict):
        raise wrong(f"{where}.input_schema", f"is {shown(tool.get('input_schema'))}, expected a JSON schema of an object")
    if not isinstance(description, str | None):
        raise wrong(f"{where}.description", f"is {shown(description)}, expected a text")
    described = ({} if description is None else {"description": description}) | ({"strict": True} if tool.get("strict") is True else {})
    return {"type": "function", "function": {"name": name, **described, "parameters": tool["input_schema"]}}


def conversation(body):
    """A conversation -> (messages in the form of chat.encode_chat, prefill).

    prefill: the beginning of the answer that the last message gives, or None. Thinking becomes reasoning_content; what the model's format
    keeps of it is chat.py's matter. Thinking that is redacted cannot be read, and is left out. Raises ApiError.
    """
    if body.thread is not None:
        sentence = "thread is given, but this server keeps no conversations: send all messages, without thread."
        raise ApiError(400, sentence, "thread", NO_THREADS)
    if not body.messages:
        raise wrong("messages", "is an empty list, expected at least one message")
    system = _system(body.system)
    result, calls = [{"role": "system", "content": system}] if system else [], []
    turns = _turns(body.messages)
    prefill = _prefill(turns.pop()[1]) if turns[-1][0] == "assistant" else None
    if not turns:
        raise wrong("messages", "have only the beginning of the answer, expected a message of the user before it")
    for role, blocks in turns:
        if role == "system":
            result.append({"role": role, "content": _joined(blocks)})
        elif role == "user":
            n = next((i for i, (_, block) in enumerate(blocks) if block["type"] != "tool_result"), len(blocks))
            result += _results(blocks[:n], calls, blocks[0][0])
            result += [{"role": role, "content": _joined(blocks[n:])}] if blocks[n:] else []
            calls = []
        else:
            result.append(_assistant(blocks))
            calls = [call["id"] for call in result[-1].get("tool_calls", ())]
    if calls:
        raise wrong("messages", f"end with the tool_use {shown(calls[0])}, expected a tool_result for it")
    return result, prefill


def _system(given):
    """The text of the field system.

    A line for Anthropic's bills is left out: it differs from request to request, and nothing behind it could be reused.
    """
    if given is None or isinstance(given, str):
        return given
    return _joined([block for block in _blocks("system", given) if not str(block[1].get("text")).startswith(BILLING)])


def _turns(messages):
    """(role, blocks) of each turn: messages of one role in a row are one."""
    parts = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise wrong(f"messages.{i}.role", f"is {shown(role)}, expected user, assistant or system")
        blocks = _blocks(f"messages.{i}.content", message.get("content"))
        if role == "user" and i < len(messages) - 1:        # it was refused when it was new
            blocks = [_noted(*block) if block[1]["type"] != "tool_result" else block for block in blocks]
        if not blocks and (role != "assistant" or i < len(messages) - 1):
            raise wrong(f"messages.{i}.content", "is an empty list, expected a block: only the beginning of the answer may be empty")
        parts.append((role, blocks))
    return [(role, [block for _, blocks in group for block in blocks]) for role, group in groupby(parts, lambda part: part[0])]


def _blocks(where, content):
    """The blocks of a content, each with its place: [(where, block)]."""
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise wrong(where, f"is {shown(content)}, expected a text or a list of blocks")
    for i, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise wrong(f"{where}.{i}", f"is {shown(block)}, expected a block with a type")
    return [(f"{where}.{i}", block) for i, block in enumerate(content)]


def _field(where, block, name, kind=str):
    """A field of a block, which must be of a kind."""
    value = block.get(name)
    if not isinstance(value, kind):
        raise wrong(f"{where}.{name}", f"is {shown(value)}, expected {'a text' if kind is str else 'an object'}")
    return value


def _text(where, block):
    """The text of a block of text, the only kind that the models read."""
    if block["type"] != "text":
        raise wrong(where, f"is of type {shown(block['type'])}, expected text here: the model reads nothing else")
    return _field(where, block, "text")


def _noted(where, block):
    """A block, or a text that says what it is, if it is no text."""
    return where, block if block["type"] == "text" else {"type": "text", "text": unreadable(block["type"])}


def _joined(blocks):
    """The texts of blocks, each on lines of its own."""
    return "\n".join(_text(where, block) for where, block in blocks)


def _assistant(blocks):
    """The blocks of the assistant's turn as one message.

    Texts are joined as they are, so that what the model wrote has the same tokens again.
    """
    texts, thoughts, calls = [], [], []
    for where, block in blocks:
        if block["type"] == "thinking":
            thoughts.append(_field(where, block, "thinking"))
        elif block["type"] == "tool_use":
            function = {"name": _field(where, block, "name"), "arguments": _field(where, block, "input", dict)}
            calls.append({"id": _field(where, block, "id"), "type": "function", "function": function})
        elif block["type"] != "redacted_thinking":
            texts.append(_text(where, block))
    message = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _results(blocks, calls, where):
    """Messages with the results of some calls, in the order of the calls.

    Some formats tell results apart by their order only.
    """
    found, n_calls = {}, Counter(calls)
    for place, block in blocks:
        found.setdefault(_field(place, block, "tool_use_id"), []).append((place, block))
        if len(found[block["tool_use_id"]]) > n_calls[block["tool_use_id"]]:
            raise wrong(f"{place}.tool_use_id", f"is {shown(block['tool_use_id'])}, expected the id of a tool_use in the message before, "
                                                "and one result for it")
    missing = next((call for call in n_calls if len(found.get(call, ())) < n_calls[call]), None)
    if missing is not None:
        raise wrong(where, f"comes after the tool_use {shown(missing)}, expected a tool_result for it first")
    return [{"role": "tool", "tool_call_id": call, "content": _result(*result)} for call in n_calls for result in found[call]]


def _result(where, block):
    """The text of a tool_result; that of an error says so.

    Who calls a tool cannot know whether it returns an image, which would stay in the conversation: the model is told of it.
    """
    content = block.get("content")
    text = "" if content is None else _joined(_noted(*one) for one in _blocks(f"{where}.content", content))
    return f"Error: {text}" if block.get("is_error") is True else text


def _prefill(blocks):
    """The text that begins the answer."""
    text = "".join(_text(where, block) for where, block in blocks)
    if text != text.rstrip():
        raise wrong(blocks[-1][0], "ends with white space, expected none at the end of the last message of the assistant")
    return text
