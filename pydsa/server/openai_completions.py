"""OpenAI's older endpoint, which continues a text: /v1/completions."""
import asyncio
from typing import Any

from pydsa.server.bodies import expected, read_fields, shown
from pydsa.server.constrained import constraint_of
from pydsa.server.errors import ApiError
from pydsa.server.openai_forms import Frame, Options, respond, token_text
from pydsa.server.settings import MAX_CHOICES

MAX_TOKENS = 16         # where a request does not say, as OpenAI has it


class CompletionRequest(Options):
    """The body of a request."""
    prompt: Any
    echo: bool | None = expected("true or false")
    suffix: str | None = expected("a text")
    best_of: int | None = expected("an integer from 1 on", ge=1)
    logprobs: int | None = expected("an integer from 0 to 20", ge=0, le=20)

    def check(self):
        """Refuse what no answer can be given for; raises ApiError."""
        if self.suffix:
            raise ApiError(400, "suffix is given, but text is only continued, not filled in; leave it out.", "suffix", "unsupported_value")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of differs from n, but answers are not chosen among; leave it out.", "best_of", "unsupported_value")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs asks for the probabilities of the prompt, which are not kept; leave out one of them.",
                           "logprobs", "unsupported_value")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"prompt and n ask for {len(self.prompts) * (self.n or 1)} answers, expected at most {MAX_CHOICES}.", "n",
                           "invalid_value")

    @property
    def prompts(self):
        """The prompts, a list of texts or of lists of ids; raises ApiError."""
        prompt = self.prompt
        if isinstance(prompt, str) or _are(int, prompt):
            return [prompt]
        if _are(str, prompt) or isinstance(prompt, list) and prompt and all(_are(int, item) for item in prompt):
            return prompt
        raise ApiError(400, f"prompt is {shown(prompt)}, expected a text, a list of texts, token ids, or a list of lists of them.",
                       "prompt", "invalid_type")


def _are(kind, items):
    """Whether something is a list of items of this type, and not empty."""
    return isinstance(items, list) and len(items) > 0 and all(type(item) is kind for item in items)


async def completions(service, request):
    """Continue one or more texts."""
    service.ready()
    body = await read_fields(request, CompletionRequest)
    body.check()
    prompts = [await service.tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    default = MAX_TOKENS if service.settings.max_tokens is None else service.settings.max_tokens
    common = {"constraint": await constraint_of(service, body.wanted()), "n_logprobs": body.logprobs,
              "max_tokens": body.limit(body.max_tokens, default)}
    requests = [common | {"ids": ids} | body.engine_fields(service, i) for ids in prompts for i in range(body.n or 1)]
    answers = service.answers(request.scope, requests)
    echoes = [await _text(service, prompt) for prompt in body.prompts for _ in range(body.n or 1)] if body.echo else None
    return await respond(request, Frame(service, "cmpl", "text_completion"), answers, body,
                         CompletionForm(service, echoes, body.logprobs is not None))


async def _text(service, prompt):
    return prompt if isinstance(prompt, str) else await asyncio.to_thread(service.model.detokenize, prompt)


class CompletionForm:
    """Choices of completions, whole and in parts.

    echoes: the text that comes before each choice, or None.
    """

    def __init__(self, service, echoes, logprobs):
        self._service, self._echoes, self._logprobs, self._offsets = service, echoes, logprobs, {}

    def first(self, i):
        """What a stream of choice i begins with."""
        if self._echoes:
            yield self._choice(i, self._echoes[i])

    def written(self, i, event):
        """The text of a token."""
        text = "".join(event.pieces)
        logprobs = self._entries(i, [event.token]) if self._logprobs and event.token is not None else None
        if text or logprobs:
            yield self._choice(i, text, logprobs)

    def finished(self, i, event):
        """What a stream of choice i ends with."""
        yield self._choice(i, "") | {"finish_reason": event.reply.finish_reason}

    def whole(self, i, end, tokens):
        """The choice of a body."""
        text = (self._echoes[i] if self._echoes else "") + end.reply.text
        return self._choice(i, text, self._entries(i, tokens) if self._logprobs else None) | {"finish_reason": end.reply.finish_reason}

    @staticmethod
    def _choice(i, text, logprobs=None):
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _entries(self, i, tokens):
        """The log-probabilities of tokens, in lists of the same length."""
        entries = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = token_text(self._service, token.id)[0]
            entries["tokens"].append(text)
            entries["token_logprobs"].append(token.logprob)
            entries["top_logprobs"].append({token_text(self._service, other)[0]: logprob for other, logprob in token.top})
            entries["text_offset"].append(self._offsets.get(i, 0))
            self._offsets[i] = self._offsets.get(i, 0) + len(text)
        return entries
