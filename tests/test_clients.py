"""The packages openai and anthropic against a running server."""
import json
import time
from typing import Literal

import anthropic
import openai
import pydantic
import pytest
from scripted import FORMATS, ScriptedSession, scripted
from serving import TINY, serving, wait_for

from pydsa.errors import PydsaError

KEY, OTHER = "secret", "other"
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}}}
FUNCTIONS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
             {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
TOOLS = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in FUNCTIONS]
INPUTS = [("weather", {"city": 'Köln </b>\n"x"', "days": [1, 2]}), ("now", {})]
THINKING = {"type": "enabled", "budget_tokens": 1024}
LOOKS = 'I write tool_call, "function_calls" and {"name": "now"} in prose.'


@pytest.fixture(scope="module")
def servers(small_model):
    """servers(format) -> a Server with a scripted model, made once.

    All need a key.
    """
    made = {}

    def server_of(name):
        if name not in made:
            context = serving(scripted(name, small_model(**TINY)), alias=name, keys=(KEY, OTHER))
            made[name] = context.__enter__(), context
        return made[name][0]
    yield server_of
    for _, context in made.values():
        context.__exit__(None, None, None)


class Clients:
    """Both clients of a server, and what its model writes."""

    def __init__(self, server, key=KEY):
        self.server, self.model = server, server.service.model
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)
        self.model.writes, self.model.seconds = "", 0.0

    def chat(self, messages=HELLO, **fields):
        return self.openai.chat.completions.create(**{"model": "any", "messages": messages} | fields)

    def message(self, messages=HELLO, **fields):
        return self.anthropic.messages.create(**{"model": "any", "max_tokens": 3000, "messages": messages} | fields)

    def busy(self):
        return [slot for slot in self.server.service.engine.slots() if slot.state != "idle"]

    def close(self):
        self.openai.close()
        self.anthropic.close()


@pytest.fixture
def clients(servers):
    """clients(format, text) -> Clients of a server whose model writes it."""
    made = []

    def make(name="dsml", text="", key=KEY):
        made.append(Clients(servers(name), key))
        made[-1].model.writes = text
        return made[-1]
    yield make
    for one in made:
        one.model.seconds = 0.0
        one.close()


def read_chat(chunks):
    """The parts of OpenAI's stream: text, reasoning, [(name, arguments)], finish_reason, usage."""
    text, reasoning, calls, reason, usage = "", "", {}, None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
                call["arguments"] += part.function.arguments or ""
            reason = choice.finish_reason or reason
    return text, reasoning, [(call["name"], json.loads(call["arguments"])) for call in calls.values()], reason, usage


def read_message(message):
    """The parts of a message of Anthropic's: text, thinking, [(name, input)], stop_reason."""
    texts = {kind: "".join(getattr(block, kind) for block in message.content if block.type == kind) for kind in ("text", "thinking")}
    return texts["text"], texts["thinking"], [(block.name, block.input) for block in message.content if block.type == "tool_use"], \
        message.stop_reason


def stream_message(clients, messages=HELLO, **fields):
    """The final message of a stream, as the client puts it together."""
    fields = {"model": "any", "max_tokens": 3000, "messages": messages} | fields
    with clients.anthropic.messages.stream(**fields) as stream:
        return stream.get_final_message()


# Chat

def test_chat(clients):
    both = clients("dsml", "Hi, Köln.")
    n = len(both.model.tokenize("Hi, Köln.", add_bos=False))
    answer = both.chat()
    assert answer.choices[0].message.content == "Hi, Köln." and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == n
    text, _, _, reason, usage = read_chat(both.chat(stream=True, stream_options={"include_usage": True}))
    assert (text, reason, usage.completion_tokens) == ("Hi, Köln.", "stop", n)
    message = both.message(system="Be brief.", stop_sequences=["ln"])
    assert read_message(message) == ("Hi, Kö", "", [], "stop_sequence") and message.stop_sequence == "ln"
    cached = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    message = stream_message(both, [{"role": "user", "content": [cached]}])
    assert read_message(message) == ("Hi, Köln.", "", [], "end_turn") and message.usage.output_tokens == n
    with both.openai.chat.completions.stream(model="any", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hi, Köln."
    assert [model.id for model in both.openai.models.list()] == ["dsml"]
    assert both.openai.completions.create(model="any", prompt="1, 2", max_tokens=4).choices[0].text == "Hi, "


@pytest.mark.parametrize("name", FORMATS)
def test_tools(clients, name):
    """Two calls, after thinking and text, whole and as deltas."""
    both = clients(name, "Hm.</think>" + FORMATS[name][3])
    expected = ("I look.", "Hm.", INPUTS)
    choice = both.chat(tools=FUNCTIONS, reasoning_effort="high").choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert (choice.message.content, choice.message.reasoning_content, calls) == expected and choice.finish_reason == "tool_calls"
    assert read_chat(both.chat(tools=FUNCTIONS, reasoning_effort="high", stream=True))[:4] == (*expected, "tool_calls")
    assert read_message(both.message(tools=TOOLS, thinking=THINKING)) == (*expected, "tool_use")
    assert read_message(stream_message(both, tools=TOOLS, thinking=THINKING)) == (*expected, "tool_use")


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_and_its_result(clients, name):
    """An agent's loop: call, result, answer; what each client sends back is understood."""
    text = FORMATS[name][3]
    second = text.rindex(INPUTS[1][0])
    starts = [text.rfind(mark, 0, second) for mark in ("<｜DSML｜invoke", "<｜tool▁call▁begin｜>", "<|tool_call_begin|>", "<tool_call>")]
    closes = [mark for mark in ("</｜DSML｜function_calls>", "<｜tool▁calls▁end｜>", "<|tool_calls_section_end|>") if mark in text]
    one = text[:max(starts)] + "".join(closes)
    both = clients(name, lambda prompt: "It is mild." if "21 degrees" in prompt else one)
    question = [{"role": "user", "content": "The weather?"}]
    answer = both.chat(question, tools=FUNCTIONS).choices[0].message
    assert len(answer.tool_calls) == 1
    turns = [*question, answer, {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "21 degrees"}]
    assert both.chat(turns, tools=FUNCTIONS).choices[0].message.content == "It is mild."
    message = both.message(question, tools=TOOLS)
    (use,) = (block for block in message.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"}
    turns = [*question, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert read_message(stream_message(both, turns, tools=TOOLS)) == ("It is mild.", "", [], "end_turn")


@pytest.mark.parametrize("name", FORMATS)
def test_text_that_looks_like_a_call(clients, name):
    both = clients(name, LOOKS)
    assert read_chat(both.chat(tools=FUNCTIONS, stream=True))[:4] == (LOOKS, "", [], "stop")
    assert read_message(both.message(tools=TOOLS)) == (LOOKS, "", [], "end_turn")
    assert read_message(stream_message(both, tools=TOOLS)) == (LOOKS, "", [], "end_turn")


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_max_tokens_cuts_off(clients, name):
    """Streams have its beginning, as calls are given as they are written."""
    text = FORMATS[name][3]
    both = clients(name, text[:text.index("Kö") + 1])
    limit, both.model.writes = len(both.model.answer_ids(())), text
    choice = both.chat(tools=FUNCTIONS, max_tokens=limit).choices[0]
    assert not choice.message.tool_calls and choice.finish_reason == "length" and choice.message.content.startswith("I look.")
    chunks = [chunk.choices[0] for chunk in both.chat(tools=FUNCTIONS, max_tokens=limit, stream=True)]
    parts = [part.function for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert parts[0].name == "weather" and "".join(part.arguments for part in parts).replace(": ", ":") == '{"city":"K'
    assert chunks[-1].finish_reason == "length"
    message = stream_message(both, tools=TOOLS, max_tokens=limit)       # the client leaves out a text that has no end
    assert read_message(message) == ("I look.", "", [("weather", {})], "max_tokens")


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_comes_as_it_is_written(clients, name):
    """Arguments of calls come with the tokens that they are written in."""
    content = "line of a file " * 20
    both = clients(name, FORMATS[name][3].replace('Köln </b>\\n\\"x\\"', content).replace('Köln </b>\n"x"', content))
    chunks = [chunk.choices[0].delta for chunk in both.chat(tools=FUNCTIONS, stream=True)]
    parts = [part.function.arguments for chunk in chunks for part in chunk.tool_calls or ()]
    assert max(map(len, parts)) < 20 and sum(map(len, parts)) > len(content)
    fields = {"model": "any", "max_tokens": 3000, "messages": HELLO, "tools": TOOLS}
    with both.anthropic.messages.stream(**fields) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        assert read_message(stream.get_final_message())[2] == [("weather", {"city": content, "days": [1, 2]}), ("now", {})]
    assert max(map(len, parts)) < 20


class Weather(pydantic.BaseModel):
    """An answer that a schema describes."""
    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Köln", "Bonn"]
    n: Literal[1, 2]


@pytest.mark.parametrize("written", ['{"city": "Bonn", "n": 2}', "It is mild in Bonn."])
def test_a_schema(clients, written):
    """The answer is of the schema, whatever the model would write."""
    both = clients("dsml", written)
    openai_s = both.openai.chat.completions.parse(model="any", messages=HELLO, response_format=Weather, max_tokens=200)
    anthropic_s = both.anthropic.messages.parse(model="any", messages=HELLO, output_format=Weather, max_tokens=200)
    for parsed in openai_s.choices[0].message.parsed, anthropic_s.parsed_output:
        assert isinstance(parsed, Weather) and (written[0] != "{" or parsed == Weather(city="Bonn", n=2))
    if written[0] == "{":
        assert both.chat(response_format={"type": "json_object"}).choices[0].message.content == written
    with pytest.raises(openai.BadRequestError, match="schema"):
        both.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}})
    with pytest.raises(anthropic.BadRequestError, match="schema"):
        both.message(output_config={"format": {"type": "json_schema", "schema": {"type": "no such type"}}})


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_must_come_or_must_not(clients, name):
    """The model would write prose, and then calls."""
    both = clients(name, "I say.")
    now = {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
    function = {"type": "function", "function": {"name": "now", "parameters": now["input_schema"]}}
    single = {"disable_parallel_tool_use": True}
    for choice in {"type": "any"} | single, {"type": "tool", "name": "now"} | single:
        assert read_message(both.message(tools=[now], tool_choice=choice))[1:] == ("", [("now", {})], "tool_use")
    for choice in "required", {"type": "function", "function": {"name": "now"}}:
        answer = both.chat(tools=[function], tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert [call.function.name for call in answer.message.tool_calls] == ["now"] and answer.finish_reason == "tool_calls"
    both.model.writes = FORMATS[name][3]
    assert read_message(both.message(tools=TOOLS, tool_choice={"type": "none"}))[2:] == ([], "end_turn")
    assert not both.chat(tools=FUNCTIONS, tool_choice="none").choices[0].message.tool_calls
    one = both.message(tools=TOOLS, tool_choice={"type": "auto"} | single)
    assert read_message(one) == ("I look.", "", INPUTS[:1], "tool_use")
    assert len(both.chat(tools=FUNCTIONS, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_tool_runner(clients):
    """The package anthropic calls a Python function itself."""
    called = []

    @anthropic.beta_tool
    def now() -> str:
        """The time."""
        called.append("now")
        return "It is noon."
    call = ("<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>")
    both = clients("kimi", lambda prompt: "Noon." if "It is noon." in prompt else call)
    runner = both.anthropic.beta.messages.tool_runner(model="any", max_tokens=999, tools=[now], messages=HELLO)
    assert read_message(runner.until_done()) == ("Noon.", "", [], "end_turn") and called == ["now"]


# Counts, errors, ends

def test_count_tokens(clients):
    both = clients("glm-4.7", "Hi.")
    for fields in {}, {"system": "Be brief."}, {"tools": TOOLS}, {"thinking": THINKING}:
        n = both.anthropic.messages.count_tokens(model="any", messages=HELLO, **fields).input_tokens
        usage = both.message(**fields).usage
        assert n == usage.input_tokens + usage.cache_read_input_tokens > 0


def test_errors_are_the_classes_of_the_clients(clients):
    both = clients("dsml", "Hi.")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        both.chat(temperature=-1)
    with pytest.raises(anthropic.BadRequestError, match="temperature") as caught:
        both.message(extra_body={"temperature": 7})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="no_such_field"):
        both.message(extra_body={"no_such_field": 1})
    with pytest.raises(openai.BadRequestError) as caught:
        both.chat([{"role": "user", "content": "long " * 2000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="context holds 4096 tokens"):
        stream_message(both, [{"role": "user", "content": "long " * 2000}])
    with pytest.raises(openai.NotFoundError):
        both.openai.models.retrieve("none")
    with pytest.raises(anthropic.NotFoundError):
        both.anthropic.messages.batches.list()
    with pytest.raises(anthropic.RequestTooLargeError):
        both.message([{"role": "user", "content": "x" * (33 << 20)}])
    stranger = clients("dsml", "Hi.", key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.chat()
    with pytest.raises(anthropic.AuthenticationError) as caught:
        stranger.message()
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_full_queue(small_model):
    with serving(scripted("dsml", small_model(**TINY)), n_parallel=1, n_queue=0) as server:
        both = Clients(server)
        both.model.writes, both.model.seconds = "abc" * 1000, 0.01
        with both.anthropic.messages.stream(model="any", max_tokens=3000, messages=HELLO) as stream:
            next(iter(stream.text_stream))
            with pytest.raises(anthropic.RateLimitError) as caught:
                both.message()
            assert caught.value.body["error"]["type"] == "rate_limit_error" and caught.value.response.headers["retry-after"]
            with pytest.raises(openai.RateLimitError):
                both.chat()
        both.close()


def test_a_model_that_is_being_loaded():
    with serving() as server:
        both = Clients.__new__(Clients)
        both.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        both.anthropic = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError):
            both.chat()
        with pytest.raises(anthropic.APIStatusError) as caught:
            both.message()
        assert caught.value.status_code == 503 and caught.value.body["error"]["type"] == "overloaded_error"
        both.close()


@pytest.mark.parametrize("kind", ["chat", "message"])
def test_a_stream_that_is_closed_ends_the_answer(clients, kind):
    both = clients("dsml", "abc" * 1200)
    both.model.seconds = 0.005
    if kind == "chat":
        stream = both.chat(stream=True)
        next(iter(stream))
        wait_for(both.busy)
        stream.close()
    else:
        with both.anthropic.messages.stream(model="any", max_tokens=3000, messages=HELLO) as stream:
            next(iter(stream.text_stream))
            assert both.busy()
    start = time.monotonic()
    wait_for(lambda: not both.busy())
    assert time.monotonic() - start < 5       # all of it would take 18 s
    both.model.seconds, both.model.writes = 0.0, "Hi."
    assert both.chat().choices[0].message.content == "Hi."      # the slot is free


def test_an_answer_that_fails_in_the_middle_of_a_stream(clients, monkeypatch):
    """It comes to each client as an error, not as a complete answer."""
    both, prefill = clients("glm-4.7", "abc"), ScriptedSession.prefill

    def fails_after_the_prompt(session, ids, **options):
        if len(ids) == 1 and session.answers:
            raise PydsaError("the disk is gone")
        return prefill(session, ids, **options)
    monkeypatch.setattr(ScriptedSession, "prefill", fails_after_the_prompt)
    with pytest.raises(openai.APIError, match="The disk is gone"):
        read_chat(both.chat(stream=True))
    with pytest.raises(anthropic.APIError, match="The disk is gone"):
        stream_message(both)
    with pytest.raises(openai.BadRequestError, match="The disk is gone"):
        both.chat()
    with pytest.raises(anthropic.BadRequestError, match="The disk is gone"):
        both.message()
