"""Anthropic's messages: /v1/messages, whole and as a stream, and their count of tokens."""
import asyncio
import contextlib
import json
import secrets

from starlette.responses import JSONResponse, StreamingResponse

from pydsa.chat import begin_answer
from pydsa.engine.requests import Finished, Progress, Started, Written
from pydsa.server.anthropic_requests import CountRequest, MessagesRequest, conversation
from pydsa.server.bodies import read_fields
from pydsa.server.constrained import constraint_of
from pydsa.server.errors import ApiError, as_api_error, error_body
from pydsa.server.openai_forms import SSE_HEADERS, encode
from pydsa.server.service import unless_gone

# Clients keep a signature with thinking and send it back; this server takes thinking as it comes, and needs none.
SIGNATURE = "cHlkc2E="


async def messages(service, request):
    """Answer a conversation."""
    service.ready()
    body = await read_fields(request, MessagesRequest)
    stops, sampling = body.stops(), service.sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    choice, parallel = body.choice()
    wanted = body.wanted()
    prompt, thinking = await _prompt(service, body, wanted)
    constraint = await constraint_of(service, wanted, prompt.layout, choice, parallel, thinking)
    layout = prompt.layout if choice != "none" else prompt.layout._replace(form=None, tools=None)   # what looks like a call is text then
    # A call that has begun is only sure to become one where a constraint completes it.
    layout = layout._replace(single_call=not parallel, streams_calls=bool(body.stream) and constraint is not None)
    answers = service.answers(request.scope, [{"ids": prompt.ids, "layout": layout, "stop": stops, "sampling": sampling,
                                               "max_tokens": body.max_tokens, "constraint": constraint}])
    headers = {"request-id": f"req_{secrets.token_hex(12)}"}
    message = Message(service.name, body.max_tokens)
    if body.stream:
        return StreamingResponse(_stream(request.url.path, answers, message), media_type="text/event-stream", headers=SSE_HEADERS | headers)
    return JSONResponse(await unless_gone(request, _whole(answers, message)), headers=headers)


async def count_tokens(service, request):
    """The number of tokens of a conversation's prompt."""
    service.ready()
    body = await read_fields(request, CountRequest)
    body.choice()       # refused here too, although no token depends on it
    prompt, _ = await _prompt(service, body)
    return JSONResponse({"input_tokens": len(prompt.ids)})


async def _prompt(service, body, wanted=None):
    """The chat.Prompt of a body, and whether the model may think."""
    given, prefill = await asyncio.to_thread(conversation, body)
    thinking = service.settings.thinking if (asked := body.wants_thinking()) is None else asked
    prompt = await service.chat_prompt(given, thinking, body.functions())
    if prefill is not None and wanted is not None:
        raise ApiError(400, "The last message begins the answer, and a format is asked for, expected one of them.", "messages")
    if prefill is not None:
        prompt = await asyncio.to_thread(begin_answer, service.model.tokenizer, prompt, prefill)
    return prompt, thinking


async def _stream(path, answers, message):
    """Yield the texts of a stream of events.

    An error that comes after the stream has begun is its last event.
    """
    def text_of(_, event):
        return "".join(map(_sse, message.heard(event)))
    try:
        answers.stream(text_of)
        async with contextlib.aclosing(answers.events()) as events:
            async for i, event in events:
                if text := text_of(i, event):
                    yield text
    except Exception as error:
        yield _sse(error_body(path, as_api_error(error)))


def _sse(data):
    return f"event: {data['type']}\ndata: {encode(data)}\n\n"


async def _whole(answers, message):
    """The message that the events of a stream add up to."""
    result, parts = {}, []
    async with contextlib.aclosing(answers.events()) as events:
        async for _, event in events:
            for data in message.heard(event):
                _add(result, parts, data)
    return result


def _add(result, parts, data):
    """Add an event to a message; parts: the texts of its last block."""
    kind = data["type"]
    if kind == "message_start":
        result.update(data["message"])
    elif kind == "content_block_start":
        result["content"].append(data["content_block"])
        parts.clear()
    elif kind == "content_block_delta":
        delta = data["delta"]
        if delta["type"] == "signature_delta":
            result["content"][-1]["signature"] = delta["signature"]
        else:
            parts.append(delta[FIELDS[delta["type"]]])
    elif kind == "content_block_stop":
        block, text = result["content"][-1], "".join(parts)
        block |= {"input": json.loads(text)} if block["type"] == "tool_use" else {block["type"]: text}
    elif kind == "message_delta":
        result.update(data["delta"], usage=data["usage"])


FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}      # where a delta has its text


class Message:
    """Turns the events of the engine into those of one streamed message.

    model: its name. max_tokens: the limit of the request.
    """

    def __init__(self, model, max_tokens):
        self._model, self._max_tokens = model, max_tokens
        self._kind, self._index, self._call = None, -1, None        # of the block that is open; the id of the call in it
        self._blank = ""                        # white space before a text, which may belong to no text

    def heard(self, event):
        """The events of the stream that an event of the engine brings, dicts."""
        if isinstance(event, Started):
            yield {"type": "message_start", "message": self._begun(event)}
            yield {"type": "ping"}
        elif isinstance(event, Progress):       # nobody on the way shall take a long prompt for a dead connection
            yield {"type": "ping"}
        elif isinstance(event, Written):
            for piece in event.pieces:
                yield from self._piece(piece)
        elif isinstance(event, Finished):
            yield from self._close()
            yield {"type": "message_delta", "delta": {"stop_reason": self._reason(event.reply), "stop_sequence": event.reply.stop},
                   "usage": _usage(event.timings, event.timings.n_generated)}
            yield {"type": "message_stop"}

    def _begun(self, started):
        return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": self._model, "content": [],
                "stop_reason": None, "stop_sequence": None, "usage": _usage(started, 0)}

    def _reason(self, reply):
        if reply.stop is not None:
            return "stop_sequence"
        if reply.finish_reason == "length":
            return "max_tokens" if reply.n_generated >= self._max_tokens else "model_context_window_exceeded"
        return "tool_use" if reply.tool_calls else "end_turn"

    def _piece(self, piece):
        """The events of a piece of the answer; markup has none."""
        if piece.kind == "answer":
            text = self._blank + piece
            self._blank = "" if self._kind == "text" or text.strip() else text
            if not self._blank:
                yield from self._open("text", text="")
                yield self._delta("text_delta", text)
        elif piece.kind == "reasoning":
            yield from self._open("thinking", thinking="", signature="")
            yield self._delta("thinking_delta", str(piece))
        elif piece.kind in ("call_delta", "tool_call"):
            yield from self._called(piece.call, complete=piece.kind == "tool_call")

    def _called(self, call, complete):
        """The events of a call, or of a part of it: what was not given of it before."""
        function, begun = call["function"], self._call == call["id"]
        if not begun:
            yield from self._close()
            yield from self._open("tool_use", id=call["id"], name=function["name"], input={})
        if not (begun and complete) and function["arguments"]:
            yield self._delta("input_json_delta", function["arguments"])
        self._call = call["id"]
        if complete:
            yield from self._close()

    def _open(self, kind, **fields):
        """Begin a block, unless it is open; the block before it ends."""
        if self._kind != kind:
            yield from self._close()
            self._kind, self._index = kind, self._index + 1
            yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **fields}}

    def _close(self):
        """End the block that is open, if one is."""
        self._blank = ""
        if self._kind == "thinking":
            yield {"type": "content_block_delta", "index": self._index, "delta": {"type": "signature_delta", "signature": SIGNATURE}}
        if self._kind is not None:
            self._kind = self._call = None
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, kind, text):
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, FIELDS[kind]: text}}


def _usage(counts, n_written):
    """The field usage; counts: n_prompt and n_reused.

    input_tokens are those that were run, beside those that were read from a cache.
    """
    return {"input_tokens": counts.n_prompt - counts.n_reused, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.n_reused, "output_tokens": n_written}
