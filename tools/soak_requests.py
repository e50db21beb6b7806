"""What tools/serve_soak.py asks: requests that have an answer, those that are wrong, and how answers are read."""
import json
import random
import re
from typing import NamedTuple

TEXT, CHAT, MESSAGES, COUNT = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"
WORDS = """the of and to in a is that for it as was with be by on not he this are or his from at which but have an they you were
kettle autumn code letter river seven window paper garden number answer question morning table green yellow lamp road stone music""".split()
KEYS = ("soak-key-one", "soak-key-two")       # of two users, whose caches are their own
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 22, 333]}},
          "required": ["name", "n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Look a word up.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string", "maxLength": 8}}, "required": ["word"], "additionalProperties": False}}}


class Ask(NamedTuple):
    """A request that has an answer."""
    path: str
    body: dict

    def __str__(self):
        return f"POST {self.path} {json.dumps(self.body):.600}"


# What only models can answer whose template shows a form of calls that is known.
CALL = Ask(CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"})


class Catalogue:
    """Requests that have an answer, made from a seed.

    calls: whether the model can be made to call tools. n_long: words of the longest prompts; from 100 on tools are described too, which
    takes a thousand tokens of some vocabularies.
    """

    def __init__(self, seed, n, calls, n_long):
        self._random, self._n_long = random.Random(f"catalogue {seed}"), n_long
        self._systems = [self._words(n_long // 3) for _ in range(4)]       # prompts begin alike
        kinds = [self._completion] * 5 + [self._chat] * 4 + [self._messages] * 2 + [self._tools] * calls
        kinds += [self._tokens, self._schema, self._grammar, self._logprobs]
        self.asks = [kinds[i % len(kinds)]() for i in range(n)]

    def _words(self, n):
        return " ".join(self._random.choices(WORDS, k=max(n, 1)))

    def _text(self):
        """A prompt: short, long, or with a beginning that others have too."""
        kind = self._random.random()
        if kind < 0.5:
            return self._words(self._random.randint(1, 12))
        if kind < 0.65:
            return self._words(self._random.randint(self._n_long // 2, self._n_long))
        return f"{self._random.choice(self._systems)} {self._words(self._random.randint(1, 8))}"

    def _options(self):
        """Fields of sampling, and of what ends an answer."""
        pick, seed = self._random, self._random.randrange(1 << 31)
        options = {"max_tokens": pick.choice((1, 4, 8, 12, 24))}
        options |= pick.choice(({"temperature": 0}, {"temperature": 1, "seed": seed}, {"temperature": 1.5, "seed": seed, "top_k": 20},
                                {"temperature": 0.8, "seed": seed, "min_p": 0.1}, {"temperature": 1, "seed": seed, "top_p": 0.7}))
        return options | pick.choice(({}, {}, {"stop": ["e", "the "]}, {"stop": "\n"}, {"frequency_penalty": 0.5}, {"presence_penalty": 1},
                                      {"repeat_penalty": 1.2}, {"logit_bias": {str(pick.randrange(3, 200)): 3}}))

    def _completion(self):
        more = self._random.choice(({}, {}, {}, {"n": 2}, {"echo": True}, {"cache_prompt": False}))
        ids = [self._random.randrange(3, 250) for _ in range(self._random.randint(1, 40))]
        prompt = self._random.choice((self._text(), self._text(), ids, [self._words(3), self._words(4)]))
        return Ask(TEXT, {"prompt": prompt} | self._options() | more)

    def _conversation(self):
        turns = [{"role": "user", "content": self._text()}]
        for _ in range(self._random.choice((0, 0, 1, 2))):
            turns += [{"role": "assistant", "content": self._words(4)}, {"role": "user", "content": self._words(5)}]
        return turns

    def _chat(self):
        system = [] if self._random.random() < 0.4 else [{"role": "system", "content": self._random.choice(self._systems)}]
        tools = {"tools": [TOOL]} if self._n_long >= 100 else {}
        more = self._random.choice(({}, {}, {"reasoning_effort": "high"}, {"n": 2}, tools))
        return Ask(CHAT, {"messages": system + self._conversation()} | self._options() | more)

    def _messages(self):
        if self._random.random() < 0.2:
            return Ask(COUNT, {"model": "m", "messages": self._conversation()})
        more = self._random.choice(({}, {"system": self._random.choice(self._systems)}, {"stop_sequences": ["e"]}))
        return Ask(MESSAGES, {"model": "m", "max_tokens": self._random.choice((1, 8, 16)), "messages": self._conversation(),
                              "temperature": 0} | more)

    def _tokens(self):
        return Ask("/tokenize", {"content": self._text()}) if self._random.random() < 0.5 else Ask(
            "/detokenize", {"tokens": [self._random.randrange(250) for _ in range(self._random.randint(1, 200))]})

    def _schema(self):
        return Ask(CHAT, {"messages": self._conversation(), "temperature": 1, "seed": self._random.randrange(1 << 31), "max_tokens": 60,
                          "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}})

    def _grammar(self):
        return Ask(TEXT, {"prompt": self._text(), "max_tokens": 8, "grammar": 'root ::= "yes" | "no"', "temperature": 1,
                          "seed": self._random.randrange(1 << 31)})

    def _tools(self):
        return Ask(CHAT, CALL.body | {"messages": self._conversation(), "temperature": 1,
                                      "seed": self._random.randrange(1 << 31)})

    def _logprobs(self):
        return Ask(TEXT, {"prompt": self._text(), "max_tokens": 6, "temperature": 0, "logprobs": 3})


def can_stream(path):
    """Whether answers of a path come as a stream, if that is asked for."""
    return path in (TEXT, CHAT, MESSAGES)


def whole_answer(path, body):
    """What an answer says, without ids and times: two can be compared."""
    if path == MESSAGES:
        names = ("type", "text", "thinking", "name", "input")
        blocks = [{name: block[name] for name in names if name in block} for block in body["content"]]
        return {"blocks": blocks, "ends": [body["stop_reason"], body["stop_sequence"]], "n": body["usage"]["output_tokens"]}
    if path not in (TEXT, CHAT):
        return body
    choices = [_choice(choice, choice.get("message", {"content": choice.get("text")})) for choice in body["choices"]]
    return {"choices": choices, "n": [body["usage"][name] for name in ("prompt_tokens", "completion_tokens")]}


def _choice(choice, message):
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or []]
    probabilities = (choice.get("logprobs") or {}).get("token_logprobs") or []
    return {"text": message.get("content") or "", "reasoning": message.get("reasoning_content") or "", "calls": calls,
            "ends": choice["finish_reason"], "logprobs": probabilities}


def streamed_answer(path, events):
    """The same of the events of a stream.

    Raises ValueError for one that has an error or no end.
    """
    for event in events:
        if "error" in event:
            raise ValueError(f"the stream has an error: {json.dumps(event['error']):.300}")
    return _streamed_message(events) if path == MESSAGES else _streamed_choices(events)


def _streamed_choices(events):
    choices, usage = {}, None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            delta = part.get("delta", {"content": part.get("text")})
            whole = choices.setdefault(part["index"], {"text": "", "reasoning": "", "calls": [], "ends": None, "logprobs": []})
            whole["text"] += delta.get("content") or ""
            whole["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(whole["calls"]):
                    whole["calls"].append(["", ""])
                for i, name in enumerate(("name", "arguments")):
                    whole["calls"][call["index"]][i] += call["function"].get(name) or ""
            whole["logprobs"] += (part.get("logprobs") or {}).get("token_logprobs") or []
            whole["ends"] = part.get("finish_reason") or whole["ends"]
    if usage is None or not choices or any(whole["ends"] is None for whole in choices.values()):
        raise ValueError("the stream ends in the middle")
    return {"choices": [choices[i] for i in sorted(choices)], "n": [usage[name] for name in ("prompt_tokens", "completion_tokens")]}


def _streamed_message(events):
    blocks, last = [], None
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            block = blocks[event["index"]]
            for name in ("text", "thinking"):
                if name in event["delta"]:
                    block[name] = block.get(name, "") + event["delta"][name]
            if "partial_json" in event["delta"]:
                block["written"] = block.get("written", "") + event["delta"]["partial_json"]
        elif event["type"] == "message_delta":
            last = event
    if last is None or events[-1]["type"] != "message_stop":
        raise ValueError("the stream ends in the middle")
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("written", "") or "{}")
    return whole_answer(MESSAGES, {"content": blocks, "usage": last["usage"], **last["delta"]})


def _wrong(path, body, status=400):
    return "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), {}, status


_HELLO = [{"role": "user", "content": "Hello"}]
# Requests that are refused: (method, path, body, headers, status).
WRONG = [
    *(_wrong(CHAT, data) for data in (b"", b"{", b"[1]", b"null", b'{"messages": \xff}', b'{"messages": [], "messages": []}',
                                      b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', b"[" * 50_000,
                                      b'{"messages": 1e999}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"messages": "\\ud800"}')),
    *(_wrong(CHAT, {"messages": _HELLO} | fields) for fields in (
        {"messages": []}, {"messages": "Hello"}, {"messages": [{"role": "user"}]}, {"max_tokens": "5"}, {"max_tokens": -2},
        {"temperature": "hot"}, {"temperature": -1}, {"top_p": 2}, {"n": 0}, {"n": 10_000}, {"seed": 2**70}, {"stop": [1]},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"99999999": 1}}, {"stream": "yes"}, {"top_logprobs": 2}, {"tools": "f"},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}}, {"tool_choice": "required"}, {"id_slot": 99},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "word " * 50_000}]})),
    *(_wrong(TEXT, fields) for fields in ({}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": [10**30]}, {"prompt": {}},
                                          {"prompt": "a", "suffix": "b"}, {"prompt": "a", "max_tokens": 1.5})),
    *(_wrong(path, {}) for path in ("/tokenize", "/detokenize")), _wrong("/detokenize", {"tokens": ["a"]}), _wrong("/nothing", {}, 404),
    ("GET", CHAT, None, {}, 405), ("BREW", "/", None, {}, 405), ("GET", "/v2/models", None, {}, 404),
    ("POST", "/tokenize", b"x", {"Content-Encoding": "gzip"}, 415), ("POST", "/slots/99?action=erase", b"", {}, 404),
    ("POST", "/slots/0?action=dance", b"", {}, 400), ("POST", "/slots/0?action=save", b'{"filename": "../x"}', {}, 400),
    ("POST", TEXT, b"{}", {"Content-Length": str(1 << 40)}, 413), ("GET", "/slots", None, {"Host": "example.org"}, 403),
    ("GET", "/slots", None, {"Origin": "https://example.org"}, 403), ("GET", "/slots", None, {"Authorization": "Bearer no"}, 401)]
# Bytes that are no request, or part of one: each is refused with 400.
_HEAD = f" HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEYS[0]}\r\n".encode()
GARBAGE = [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /hea",
           b"POST /tokenize" + _HEAD + b"content-length: 50\r\n\r\n{", b"POST /v1/completions" + _HEAD + b"content-length: 50\r\n\r\n",
           b"POST /tokenize" + _HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
           b"POST /tokenize" + _HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n"]


def why_not_refused(status, expected, body):
    """What is wrong with the refusal of a wrong request; "" if nothing."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {status} with a body that tells no error: {body[:200]!r}, expected {expected}"
    if status != expected:
        return f"status {status} ({message:.200}), expected {expected}"
    return "" if re.fullmatch(r"[^\n]{5,500}[.!?]", message) else f"the message is no sentence: {message!r:.300}"
