"""What OpenAI's two endpoints for text share: fields, usage, streams."""
import contextlib
import json
import re
import secrets
import time
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse

from pydsa.engine.requests import Finished, Progress, Written
from pydsa.errors import PydsaError
from pydsa.server.bodies import Fields, expected, shown
from pydsa.server.constrained import Constrained
from pydsa.server.errors import ApiError, as_api_error, error_body
from pydsa.server.service import unless_gone
from pydsa.server.settings import MAX_CHOICES

MAX_STOPS, MAX_STOP = 64, 1000      # stop texts, and characters of one
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")      # line feeds and carriage returns are always escaped
_encode_raw = json.JSONEncoder(ensure_ascii=False).encode
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def encode(value):
    """JSON on one line, whatever a client takes for the end of a line.

    Events end with line feeds, but readers that split text by all of Unicode's line ends are common.
    """
    text = _encode_raw(value)
    return text if text.isascii() else _LINE_ENDS.sub(lambda end: f"\\u{ord(end[0]):04x}", text)


class StreamOptions(Fields):
    """The field stream_options."""
    include_usage: bool | None = expected("true or false")


class Options(Constrained):
    """Fields of both endpoints: OpenAI's, and those that llama.cpp's server adds."""
    model: str | None = expected("the name of a model")
    stream: bool | None = expected("true or false")
    stream_options: StreamOptions | None = expected('an object like {"include_usage": true}')
    n: int | None = expected(f"an integer from 1 to {MAX_CHOICES}", ge=1, le=MAX_CHOICES)
    seed: int | None = expected("an integer of up to 64 bits", ge=-2**63, lt=2**64)
    stop: Any = None
    max_tokens: int | None = expected("an integer from 0 on, or -1: no limit", ge=-1)
    temperature: float | None = expected("a number from 0 on")
    top_p: float | None = expected("a number from 0 to 1")
    top_k: int | None = expected("an integer from -1 on; 0 and -1: all tokens")
    min_p: float | None = expected("a number from 0 to 1")
    frequency_penalty: float | None = expected("a number")
    presence_penalty: float | None = expected("a number")
    repeat_penalty: float | None = expected("a number above 0")
    repeat_last_n: int | None = expected("an integer from -1 on")
    logit_bias: dict[str, Any] | None = expected("an object of token ids and numbers")
    user: str | None = expected("a text")
    cache_prompt: bool | None = expected("true or false")
    id_slot: int | None = expected("the number of a slot, or -1")
    return_progress: bool | None = expected("true or false")

    def engine_fields(self, service, seed_offset=0):
        """Fields of requests.Request that all endpoints share.

        seed_offset: tells the choices of one request apart. Raises ApiError.
        """
        return {"sampling": self._sampling(service, seed_offset), "stop": self._stops(),
                "slot": None if self.id_slot in (None, -1) else self.id_slot, "reuse": self.cache_prompt is not False}

    @property
    def include_usage(self):
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, service, offset):
        names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repeat_penalty", "repeat_last_n")
        seed = service.settings.sampling.seed if self.seed is None else None if self.seed == -1 else self.seed % 2**64
        options = {name: getattr(self, name) for name in names} | {"logit_bias": self._biases()}
        try:
            sampling = service.sampling(**options, seed=None if seed is None else seed + offset)
            sampling.check_vocabulary(service.model.config.n_vocab)
            return sampling
        except PydsaError as error:
            raise ApiError(400, f"{error}.", str(error).split()[0], "invalid_value") from None

    def _biases(self):
        if self.logit_bias is None:
            return None
        if not all(key.isascii() and key.isdecimal() and len(key) < 12 for key in self.logit_bias):
            key = next(key for key in self.logit_bias if not (key.isascii() and key.isdecimal() and len(key) < 12))
            raise ApiError(400, f"logit_bias has the key {key!r:.80}, expected token ids.", "logit_bias", "invalid_value")
        return {int(key): bias for key, bias in self.logit_bias.items()}

    def limit(self, given, default):
        """The most tokens of an answer, or None; given: what the request says."""
        return default if given is None else None if given == -1 else given

    def _stops(self):
        stops = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(text, str) and len(text) <= MAX_STOP
                                                                            for text in stops):
            raise ApiError(400, f"stop is {shown(self.stop)}, expected a text, or a list of up to {MAX_STOPS} texts, each of up to "
                                f"{MAX_STOP} characters.", "stop", "invalid_value")
        return [text for text in stops if text]     # forms with an empty field send ""


def usage(ends, n):
    """The field usage, from the Finished of all choices, n for each prompt."""
    prompt, written = (sum(counts) for counts in ((end.timings.n_prompt for end in ends[::n]), (end.timings.n_generated for end in ends)))
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(end.timings.n_reused for end in ends[::n])}}


def timings(end):
    """Speeds of an answer, in the form of llama.cpp's server."""
    t = end.timings
    result = {"cache_n": t.n_reused}
    # the first token comes from the prompt's own step
    for name, n, seconds in (("prompt", t.n_prompt - t.n_reused, t.prompt), ("predicted", t.n_generated, t.generation)):
        steps = n if name == "prompt" else max(n - 1, 0)
        result |= {f"{name}_n": n, f"{name}_ms": seconds * 1e3, f"{name}_per_token_ms": seconds * 1e3 / steps if steps else 0.0,
                   f"{name}_per_second": steps / seconds if seconds > 0 else 0.0}
    return result


def token_text(service, token):
    """The text of a token, and its bytes as a list."""
    data = service.model.tokenizer.token_bytes(token)
    return data.decode(errors="replace"), list(data)


class Frame:
    """The fields that all chunks of a response have."""

    def __init__(self, service, prefix, kind):
        self.fields = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": service.name,
                       "system_fingerprint": service.fingerprint}
        self._head = f"data: {encode(self.fields)[:-1]}, "

    def __call__(self, choices, **more):
        return self.fields | {"choices": choices} | more

    def sse(self, choices, **more):
        """sse() of a chunk, of which the fields that all have are text already."""
        return f"{self._head}{encode({'choices': choices} | more)[1:]}\n\n"


def sse(value):
    """An event of a stream: a line of JSON."""
    return f"data: {encode(value)}\n\n"


async def stream_events(path, frame, answers, options, form):
    """Yield the texts of a stream of server-sent events.

    form: has first(i), written(i, event) and finished(i, event), each a list of choices of chunks. An error that comes after the stream has
    begun is its last event.
    """
    ends, more = [None] * answers.n, {"usage": None} if options.include_usage else {}

    def text_of(i, event):
        return "".join(frame.sse([choice], **more) for choice in form.written(i, event))

    def chunks_of(i, event):
        if isinstance(event, Written):
            yield text_of(i, event)
        elif isinstance(event, Finished):
            for choice in form.finished(i, event):
                yield frame.sse([choice], **more, timings=timings(event))
        elif isinstance(event, Progress) and options.return_progress:
            yield frame.sse([], **more, prompt_progress={"processed": event.n_done, "total": event.n_prompt})
        elif isinstance(event, Progress):       # a comment, so that nobody on the way takes a long prompt for a dead connection
            yield f": {event.n_done} of {event.n_prompt} tokens of the prompt\n\n"
    try:
        for i in range(answers.n):
            for choice in form.first(i):
                yield frame.sse([choice], **more)
        answers.stream(text_of)
        async with contextlib.aclosing(answers.batches()) as batches:
            async for batch in batches:
                for i, event in batch:
                    if isinstance(event, Finished):
                        ends[i] = event
                if text := "".join(chunk for i, event in batch for chunk in chunks_of(i, event)):
                    yield text
        if options.include_usage:
            yield frame.sse([], usage=usage(ends, options.n or 1), timings=timings(ends[0]))
    except Exception as error:
        yield sse(error_body(path, as_api_error(error)))
    yield "data: [DONE]\n\n"


async def respond(request, frame, answers, options, form):
    """The response to a request: a stream, or one body.

    form: as for stream_events(), and whole(i, end, tokens) -> the choice of a body.
    """
    if options.stream:
        stream = stream_events(request.url.path, frame, answers, options, form)
        return StreamingResponse(stream, media_type="text/event-stream", headers=SSE_HEADERS)
    results = await unless_gone(request, answers.finish())
    ends = [end for end, _ in results]
    choices = [form.whole(i, end, tokens) for i, (end, tokens) in enumerate(results)]
    return JSONResponse(frame(choices, usage=usage(ends, options.n or 1), timings=timings(ends[0])))
