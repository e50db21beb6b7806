"""OpenAI's chat completions: /v1/chat/completions."""
import asyncio
from typing import Any

from pydantic import Field

from pydsa.chat import begin_answer
from pydsa.server.bodies import Fields, Listed, expected, read_fields, shown, unreadable
from pydsa.server.constrained import constraint_of
from pydsa.server.errors import ApiError
from pydsa.server.openai_forms import Frame, Options, respond, token_text
from pydsa.text.messages import TEXTS, THOUGHTS, checked

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
NO_THINKING = ("none", "minimal")
CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
SWITCHES = ("thinking", "enable_thinking")      # what templates call it


class Thinking(Fields):
    """The field thinking, as DeepSeek's and GLM's own servers have it."""
    type: str | None = expected("'enabled' or 'disabled'", pattern="^(enabled|disabled)$")
    clear_thinking: bool | None = expected("true or false")


class ChatRequest(Options):
    """The body of a request."""
    messages: Listed[dict[str, Any]] = Field(description="a list of messages, objects with role and content")
    max_completion_tokens: int | None = expected("an integer from 0 on, or -1: no limit", ge=-1)
    logprobs: bool | None = expected("true or false")
    top_logprobs: int | None = expected("an integer from 0 to 20", ge=0, le=20)
    tools: Listed[dict[str, Any]] = expected("a list of tools")
    tool_choice: str | dict[str, Any] | None = expected("'auto', 'none', 'required', or an object that names a function")
    parallel_tool_calls: bool | None = expected("true or false")
    reasoning_effort: str | None = expected(f"one of {', '.join(EFFORTS)}", pattern=f"^({'|'.join(EFFORTS)})$")
    thinking: Thinking | None = expected('an object like {"type": "enabled"}')
    enable_thinking: bool | None = expected("true or false")
    chat_template_kwargs: dict[str, Any] | None = expected('an object like {"enable_thinking": true}')
    functions: list[Any] | None = expected("tools, which have replaced it")
    modalities: list[Any] | None = expected("['text']")
    web_search_options: dict[str, Any] | None = expected("an object")

    def check(self):
        """Refuse what no answer can be given for; raises ApiError."""
        if self.functions:
            raise ApiError(400, "functions is OpenAI's old form of tools; send tools and tool_choice.", "functions", "unsupported_value")
        if self.modalities and self.modalities != ["text"]:
            raise ApiError(400, f"modalities is {shown(self.modalities)}, but the model writes text only.", "modalities",
                           "unsupported_value")
        if self.web_search_options is not None:
            raise ApiError(400, "web_search_options is given, but this server searches no web; leave it out.", "web_search_options",
                           "unsupported_value")

    def wants_thinking(self):
        """Whether the model shall reason first; None: as the server's settings say."""
        switches = {name: value for name in SWITCHES if (value := (self.chat_template_kwargs or {}).get(name)) is not None}
        if not all(isinstance(value, bool) for value in switches.values()) or len(set(switches.values())) > 1:
            raise ApiError(400, f"chat_template_kwargs is {shown(self.chat_template_kwargs)}, expected 'thinking' or 'enable_thinking' "
                                "with true or false, the same for both.", "chat_template_kwargs", "invalid_value")
        if switches:
            return next(iter(switches.values()))
        if self.thinking is not None and self.thinking.type is not None:
            return self.thinking.type == "enabled"
        if self.enable_thinking is not None:
            return self.enable_thinking
        return None if self.reasoning_effort is None else self.reasoning_effort not in NO_THINKING

    def template_kwargs(self, template):
        """Variables of the chat template; raises ApiError for those it reads not."""
        given = {name: value for name, value in (self.chat_template_kwargs or {}).items() if name not in SWITCHES and value is not None}
        unread = next((name for name in given if name not in (template or "")), None)
        if unread is not None:
            raise ApiError(400, f"chat_template_kwargs has {unread!r:.80}, expected 'thinking', 'enable_thinking', or what the model's "
                                "chat template reads.", "chat_template_kwargs", "invalid_value")
        if self.thinking is not None and self.thinking.clear_thinking is not None and "clear_thinking" in (template or ""):
            given = {"clear_thinking": self.thinking.clear_thinking} | given
        return given

    def choice(self):
        """tool_choice as OpenAI's API has it: some clients write an object with a type, or "any"."""
        given = self.tool_choice
        kind = given.get("type") if isinstance(given, dict) and len(given) == 1 else given
        return CHOICES[kind] if isinstance(kind, str) and kind in CHOICES else given

    def n_logprobs(self):
        """How many of the likeliest tokens to tell beside each; None: no probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs, expected logprobs to be true.", "top_logprobs", "invalid_value")
        return (self.top_logprobs or 0) if self.logprobs else None


async def chat_completions(service, request):
    """Answer a conversation."""
    service.ready()
    body = await read_fields(request, ChatRequest)
    body.check()
    thinking = service.settings.thinking if (asked := body.wants_thinking()) is None else asked
    messages, prefill = begun_answer(readable(body.messages))
    if prefill and body.wanted() is not None:
        raise ApiError(400, "The last message begins the answer, and a format is asked for, expected one of them.", "messages")
    thinking = thinking and not prefill
    prompt = await service.chat_prompt(messages, thinking, body.tools, body.template_kwargs(service.template))
    if prefill:
        prompt = await asyncio.to_thread(begin_answer, service.model.tokenizer, prompt, prefill)
    choice = body.choice()
    constraint = await constraint_of(service, body.wanted(), prompt.layout, choice, body.parallel_tool_calls is not False, thinking)
    if choice == "none":      # what looks like a call is text then
        prompt = prompt._replace(layout=prompt.layout._replace(form=None, tools=None))
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    # A call that has begun is only sure to become one where a constraint completes it.
    layout = prompt.layout._replace(streams_calls=bool(body.stream) and constraint is not None)
    common = {"ids": prompt.ids, "layout": layout, "n_logprobs": body.n_logprobs(), "constraint": constraint,
              "max_tokens": body.limit(asked, service.settings.max_tokens)}
    requests = [common | body.engine_fields(service, i) for i in range(body.n or 1)]
    frame = Frame(service, "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion")
    return await respond(request, frame, service.answers(request.scope, requests), body, ChatForm(service, body.logprobs))


def readable(messages):
    """The messages, with texts in the place of older images, and of a tool's.

    A new image is refused. It stays in the client's conversation, which must be able to go on.
    """
    def read(part):
        kind = part.get("type") if isinstance(part, dict) else None
        known = kind in TEXTS or kind in THOUGHTS or not isinstance(kind, str)
        return part if known else {"type": "text", "text": unreadable(kind.removesuffix("_url").removeprefix("input_"))}
    return [message if i == len(messages) - 1 and message.get("role") != "tool" or not isinstance(message.get("content"), list) else
            message | {"content": [read(part) for part in message["content"]]} for i, message in enumerate(messages)]


def begun_answer(messages):
    """(the messages before the answer, the text that begins it or "").

    A last message of the assistant is the beginning of the answer, unless it calls tools.
    """
    last = messages[-1] if len(messages) > 1 else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return messages, ""
    return messages[:-1], checked(messages[-1:])[0]["content"]


class ChatForm:
    """Choices of chat completions, whole and as deltas."""

    def __init__(self, service, logprobs):
        self._service, self._logprobs = service, logprobs
        self._calls = {}        # choice -> the number of its last call, and its id while it is written

    def first(self, i):
        """What a stream of choice i begins with."""
        yield self._delta(i, {"role": "assistant", "content": ""})

    def written(self, i, event):
        """The deltas of a token; they bear no markup."""
        deltas = [delta for piece in event.pieces for delta in self._deltas(i, piece)]
        logprobs = self._entries([event.token]) if self._logprobs and event.token is not None else None
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._delta(i, delta, logprobs)
            logprobs = None

    def finished(self, i, event):
        """What a stream of choice i ends with."""
        yield self._delta(i, {}) | {"finish_reason": event.reply.finish_reason}

    def whole(self, i, end, tokens):
        """The choice of a body."""
        reply = end.reply
        message = {"role": "assistant", "content": None if reply.tool_calls and not reply.text else reply.text, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = reply.tool_calls
        return {"index": i, "message": message, "logprobs": self._entries(tokens) if self._logprobs else None,
                "finish_reason": reply.finish_reason}

    def _deltas(self, i, piece):
        if piece.kind == "answer":
            yield {"content": str(piece)}
        elif piece.kind == "reasoning":
            yield {"reasoning_content": str(piece)}
        elif piece.kind in ("call_delta", "tool_call"):
            yield from self._called(i, piece.call, complete=piece.kind == "tool_call")

    def _called(self, i, call, complete):
        """The deltas of a call, or of a part of it: what was not given of it before."""
        number, last = self._calls.get(i, (-1, None))
        function, begun = call["function"], last == call["id"]
        if not begun:
            number += 1
            yield {"tool_calls": [{"index": number, "id": call["id"], "type": "function",
                                   "function": {"name": function["name"], "arguments": ""}}]}
        if not (begun and complete) and function["arguments"]:
            yield {"tool_calls": [{"index": number, "function": {"arguments": function["arguments"]}}]}
        self._calls[i] = number, None if complete else call["id"]

    @staticmethod
    def _delta(i, delta, logprobs=None):
        return {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _entries(self, tokens):
        """The log-probabilities of tokens, with those of the likeliest."""
        def entry(token, logprob):
            text, data = token_text(self._service, token)
            return {"token": text, "logprob": logprob, "bytes": data}
        return {"content": [entry(token.id, token.logprob) | {"top_logprobs": [entry(*one) for one in token.top]} for token in tokens],
                "refusal": None}
