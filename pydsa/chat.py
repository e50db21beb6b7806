"""Encode a conversation as the token ids of a prompt.

    ids = encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])

The format is the chat template of the file, or else that of DeepSeek V3.2. A template is a program from an untrusted
file: it runs in jinja2's sandbox, with limits on time and on text (template.py). The texts of users and tools are
marked before they are inserted, so that the text of a special token in them stays plain text.
"""
import contextlib
import re
import weakref
from bisect import bisect_right
from typing import NamedTuple

from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.text.answers import END_THINK, THINK, Layout
from pydsa.text.messages import ROLES, Arguments, check_functions, checked, to_json
from pydsa.text.template import check_source, render
from pydsa.text.tool_calls import DSML, KIMI, find_form

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]     # Unicode reserves these 32 for internal use

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_VARIABLES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")     # of every template
_ASKS_FOR_NO_CONTENT = re.compile(r"""content['"]?[\])]?\s+is\s+(not\s+)?none""")
_SWITCHES = weakref.WeakKeyDictionary()       # tokenizer -> {template: whether `thinking` changes the prompt}


class Prompt(NamedTuple):
    """A conversation as ids, a list of int, and the Layout of the answer."""
    ids: list
    layout: Layout = Layout()


def encode_chat(tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, thinking: bool = False,
                tools: list[dict] | None = None, template: str | None = None, template_kwargs: dict | None = None) -> list[int]:
    """The token ids of a conversation, a list of int, with BOS once.

    messages: dicts with role and content: text, or a list of {"type": "text", "text": ...}. Those of the assistant may have
    reasoning_content and tool_calls, whose arguments are a dict or JSON text; their content may then be None or missing. The role
    "developer" is that of a system message, unless the template knows it.
    add_generation_prompt: end where the assistant's next turn begins.
    thinking: let the assistant reason before it answers, if the format supports it (see thinking_note).
    tools: the functions that may be called, each as {"type": "function", "function": {"name": ..., ...}}.
    template: a jinja2 template instead of the file's. Without either, the format is that of DeepSeek V3.2.
    template_kwargs: more variables of the template, {name: value}; it must read them.

    Raises PydsaError if the messages have another form or the template refuses them; UnsupportedModelError if the
    template fails, or if the V3.2 format is used and the vocabulary lacks its tokens.
    """
    return chat_prompt(tokenizer, messages, add_generation_prompt=add_generation_prompt, thinking=thinking, tools=tools,
                       template=template, template_kwargs=template_kwargs).ids


def chat_prompt(tokenizer, messages, *, add_generation_prompt=True, thinking=False, tools=None, template=None,
                template_kwargs=None) -> Prompt:
    """The Prompt of a conversation: its ids, and how the answer is laid out.

    The parameters, and the errors raised, are those of encode_chat.
    """
    tools = tools or None
    check_functions(tools, "the tools are")
    template = tokenizer.chat_template if template is None else template
    if template is not None:
        check_source(template, tokenizer)
    _check_kwargs(template_kwargs or {}, template or "")
    try:
        text, escape = _render(tokenizer, messages, tools, template, add_generation_prompt, thinking, template_kwargs)
    except RecursionError:
        raise PydsaError("the messages or the tools are nested too deeply, expected a few levels") from None
    special = (*tokenizer.control_texts, *tokenizer.user_defined_texts)
    # Texts of users are marked, so a <think> at the end is the format's own, or that of an assistant's message.
    layout = Layout(text.rstrip().endswith(THINK), _may_think(tokenizer, template), find_form(template, special) if tools else None, tools)
    return Prompt(tokenizer.encode(text, tokenizer.add_bos, parse_special=True, escape=escape), layout)


def _check_kwargs(given, template):
    """Raise PydsaError for variables that the template does not read."""
    for name in given:
        if name in _VARIABLES or not re.search(rf"\b{re.escape(name)}\b", template):
            raise PydsaError(f"a variable of the chat template is {name!r:.80}, expected one that it reads, other than "
                             f"{', '.join(_VARIABLES)}")


def begin_answer(tokenizer, prompt, text) -> Prompt:
    """The Prompt that goes on with the beginning of the answer.

    text: what the answer begins with. Special tokens in it stay plain text. Raises PydsaError if the prompt ends inside of reasoning.
    """
    if prompt.layout.opened:
        raise PydsaError("the beginning of the answer is given, but the model shall think before it answers: expected one of them")
    special = (*tokenizer.control_texts, *(text for text in tokenizer.user_defined_texts if len(text) > 1))
    escape = _unused_character(text)
    ids = tokenizer.encode(Guard(special, escape)(text), parse_special=True, escape=escape)
    return Prompt(prompt.ids + ids, prompt.layout._replace(thinks=False))


def _may_think(tokenizer, template):
    """Whether a model may reason between tags."""
    return THINK in (template or "") or THINK in tokenizer.control_texts + tokenizer.user_defined_texts


def thinking_note(tokenizer, thinking, template=None) -> str | None:
    """A sentence if the format takes no notice of `thinking`, else None.

    That is so where a short conversation has the same prompt with it and without it, and the model thinks always or never, other than
    asked. Nothing is said of a template that refuses the short conversation.
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        return None
    switches = _SWITCHES.setdefault(tokenizer, {})
    if template not in switches:
        with contextlib.suppress(PydsaError):
            without, with_it = (_render(tokenizer, [{"role": "user", "content": "?"}], None, template, True, value)[0]
                                for value in (False, True))
            switches[template] = without != with_it
    if switches.get(template, True) or thinking == (THINK in template):
        return None
    if thinking:
        return "the chat template of this model knows no thinking: it answers as without it"
    return "the chat template of this model has no switch for thinking: it may reason although it was not asked to"


def _render(tokenizer, messages, tools, template, add_generation_prompt, thinking, more=None):
    """The text of the prompt, and the mark that keeps texts in it plain."""
    given, messages = messages, checked(messages)
    # A user-defined token of one character, like "ö" in DeepSeek's vocabularies, is the only way to encode that character.
    special = (*tokenizer.control_texts, *(text for text in tokenizer.user_defined_texts if len(text) > 1))
    escape = _unused_character(given, messages, tools, template, special, more)
    plain = Guard(special, escape)
    own = Guard(tuple(text for text in tokenizer.control_texts if text not in (THINK, END_THINK)), escape)
    if not re.search("""['"]developer['"]""", template or ""):
        messages = [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]
    if KIMI in (template or ""):
        messages = _with_own_ids(messages)
    if template is None:
        _check_v32(tokenizer, special)
        return _render_v32(messages, tools, thinking, add_generation_prompt, plain, own), escape
    guarded = [(own if message["role"] == "assistant" else plain)(message) | {"role": message["role"]}
               for message in messages]
    variables = {"tools": plain(tools), "add_generation_prompt": add_generation_prompt, "thinking": thinking, "enable_thinking": thinking,
                 **plain(more or {})}
    _check_roles(template, guarded, lambda messages: render(template, tokenizer, plain, variables | {"messages": messages}))
    silent = [i for i, message in enumerate(messages) if "tool_calls" in message and not message["content"]]
    if silent and _ASKS_FOR_NO_CONTENT.search(template):
        as_none = [message | {"content": None} if i in silent else message for i, message in enumerate(guarded)]
        with contextlib.suppress(UnsupportedModelError):        # one that asks in one place may take a text for granted in another
            return render(template, tokenizer, plain, variables | {"messages": as_none}), escape
    return render(template, tokenizer, plain, variables | {"messages": guarded}), escape


def _with_own_ids(messages):
    """Messages whose calls have the ids that Kimi's models write.

    They have the function's name. After other ids the model would write such, too, from which nobody can tell what it calls.
    """
    ids, n, result = {}, 0, []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            name, given = call["function"]["name"], call.get("id")
            is_own = isinstance(given, str) and re.fullmatch(rf"functions\.{re.escape(name)}:\d+", given)
            ids[given] = given if is_own else f"functions.{name}:{n}"
            calls.append(call | {"id": ids[given]})
            n += 1
        answered = message.get("tool_call_id") if message["role"] == "tool" else None
        result.append(message | ({"tool_calls": calls} if calls else {}) | ({"tool_call_id": ids[answered]} if answered in ids else {}))
    return result


def _check_roles(template, messages, write):
    """Raise PydsaError for a role that the template passes over.

    write(messages) -> the text of the prompt with these messages. Most templates name their roles, others write whatever role there is.
    """
    def is_named(role):
        return re.search(f"""['"]{role}['"]""", template)

    def is_lost(i):
        with contextlib.suppress(PydsaError):       # what the template makes of fewer messages is another question
            return write(messages[:i + 1]) == write(messages[:i])
    first = {message["role"]: i for i, message in reversed(list(enumerate(messages))) if message["content"]}
    for role, i in first.items():
        if role != "user" and not is_named(role) and is_lost(i):
            raise PydsaError(f"message {i} has the role {role!r:.80}, which the chat template passes over, expected one of "
                             f"{', '.join(filter(is_named, ROLES)) or 'those that it writes'}")


def _unused_character(*values):
    """The first noncharacter that occurs in none of the values, at any depth."""
    used = repr(values)     # noncharacters are not printable, so repr writes them as escapes
    free = [character for character in NONCHARACTERS if repr(character)[1:-1] not in used]
    if not free:
        raise PydsaError("the messages hold all 32 noncharacters from U+FDD0 on, expected one of them to be free")
    return free[0]


class Guard:
    """Marks strings so that `Tokenizer.encode` finds no special text in them.

    It finds none of `texts` inside of a string, nor across one of its ends. The mark is inserted after the first
    character of each occurrence; after the string's first character, if the string may begin with the end of an
    occurrence; and after its last character, if the string may end with the beginning of one.
    """

    def __init__(self, texts: tuple[str, ...], mark: str):
        self.texts, self.mark = texts, mark
        self.forward, self.backward = sorted(texts), sorted(text[::-1] for text in texts)
        self.longest = max(map(len, texts), default=0)

    def __call__(self, value):
        """The value, with all strings at any depth marked."""
        if isinstance(value, str):
            return self._mark_string(value)
        if isinstance(value, Arguments):
            return Arguments({self(key): self(item) for key, item in value.items()}, self._mark_string(str(value)))
        if isinstance(value, dict):
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item) for item in value]
        return value

    def _mark_string(self, text):
        present = "|".join(re.escape(special) for special in self.texts if special in text)
        cuts = {match.start() + 1 for match in re.finditer(f"(?={present})", text)} if present else set()
        if self._begins_one(text[:self.longest][::-1], self.backward):
            cuts.add(1)
        if self._begins_one(text[-self.longest:], self.forward):
            cuts.add(len(text))
        edges = [0, *sorted(cuts), len(text)]
        return self.mark.join(text[start:end] for start, end in zip(edges, edges[1:]))

    def _begins_one(self, text, ordered):
        """Whether a suffix of `text` is a proper prefix of one of the texts.

        ordered: the texts, sorted.
        """
        for start in range(len(text)):
            successor = bisect_right(ordered, text[start:])
            if successor < len(ordered) and ordered[successor].startswith(text[start:]):
                return True
        return False


# DeepSeek V3.2: the official encoding is a program, not a template, and its files have no template.

_TOOLS = """## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml}function_calls>" block like the following as part of your reply to the \
user:
<{dsml}function_calls>
<{dsml}invoke name="$FUNCTION_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$FUNCTION_NAME2">
...
</{dsml}invoke>
</{dsml}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{dsml}function_calls>
...
</{dsml}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{functions}
</functions>
"""


def _check_v32(tokenizer, special):
    missing = [text for text in (BOS, EOS, USER, ASSISTANT, THINK, END_THINK) if text not in special]
    if missing:
        raise UnsupportedModelError(f"{tokenizer.path}: there is no chat template, and the vocabulary has no token "
                                    f"{missing[0]}, expected those of DeepSeek V3.2: use a template or a plain prompt")


def _render_v32(messages, tools, thinking, add_generation_prompt, plain, own):
    """The conversation in the official format of DeepSeek V3.2.

    Source: encoding/encoding_dsv32.py of its repository. The reasoning of turns before the last question is left out,
    whether it is a message's reasoning_content or the part of its content before `</think>`.
    """
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    parts, n_calls, n_results = [BOS], 0, 0
    for i, message in enumerate(messages):
        role, content, opening = message["role"], plain(message["content"]), ""
        think = THINK if thinking and i >= last_user else END_THINK
        n_calls, n_results = (n_calls, n_results + 1) if role == "tool" else (len(message.get("tool_calls") or ()), 0)
        if role == "system":
            parts += [content, _describe_tools(tools, plain) if tools and i == 0 else ""]
        elif role == "user":
            parts.append(USER + content)
            opening = ASSISTANT + think
        elif role == "assistant":
            parts.append(_render_answer(message, own, with_reasoning=thinking and i > last_user))
        elif role == "tool" and n_results <= n_calls:
            parts += ["\n\n<function_results>" if n_results == 1 else "", f"\n<result>{content}</result>"]
            if n_results == n_calls or messages[i + 1:] and messages[i + 1]["role"] != "tool":      # the other calls were cancelled
                parts.append("\n</function_results>")
                opening = f"\n\n{think}"
        elif role == "tool":
            raise PydsaError(f"message {i} is tool result {n_results} after {n_calls} tool calls, expected one each")
        else:
            raise PydsaError(f"message {i} has the role {role!r:.80}, expected one of {', '.join(ROLES)}")
        parts.append(opening)
    return "".join(parts if add_generation_prompt else parts[:-1])


def _describe_tools(tools, plain):
    """The part of the system text that describes the tools."""
    functions = "\n".join(to_json(plain(tool["function"])) for tool in tools)
    return "\n\n" + _TOOLS.format(dsml=DSML, functions=functions)


def _render_answer(message, own, with_reasoning):
    """A turn of the assistant: reasoning, answer and tool calls.

    Tool calls are in DeepSeek's markup language.
    """
    reasoning, _, answer = message["content"].rpartition(END_THINK)
    reasoning = message.get("reasoning_content") or reasoning.removeprefix(THINK)
    lines = []
    for call in message.get("tool_calls") or ():
        lines.append(f'<{DSML}invoke name="{own(call["function"]["name"])}">')
        parameters = [f'<{DSML}parameter name="{own(name)}" string="{to_json(isinstance(value, str))}">'
                      f"{own(value) if isinstance(value, str) else to_json(own(value))}</{DSML}parameter>"
                      for name, value in call["function"]["arguments"].items()]
        lines += [*(parameters or [""]), f"</{DSML}invoke>"]
    if lines:
        lines = ["\n", f"<{DSML}function_calls>", *lines, f"</{DSML}function_calls>"]
    return (own(reasoning) + END_THINK if with_reasoning else "") + own(answer) + "\n".join(lines) + EOS
