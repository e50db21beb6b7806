"""Anthropic's messages API: bodies, events, stop reasons, errors, in the formats of several models."""
import json

import pytest
from scripted import FORMATS, scripted
from serving import TINY, call, post, serving

from pydsa.engine.requests import Finished, Started, Timings, Written
from pydsa.server.anthropic import Message
from pydsa.server.anthropic_requests import MessagesRequest, conversation
from pydsa.server.bodies import check_fields
from pydsa.server.errors import ApiError
from pydsa.server.openai_chat import ChatForm
from pydsa.text.answers import Piece, Reply

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"model": "any", "max_tokens": 2000, "messages": HELLO}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}}}
TOOLS = [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA},
         {"name": "now", "input_schema": {"type": "object", "properties": {}}}]
INPUTS = [{"city": 'Köln </b>\n"x"', "days": [1, 2]}, {}]


@pytest.fixture(scope="module")
def servers(small_model):
    """servers(format) -> a Server with a scripted model, made once."""
    made = {}

    def server_of(name):
        if name not in made:
            context = serving(scripted(name, small_model(**TINY)), alias=name)
            made[name] = context.__enter__(), context
        return made[name][0]
    yield server_of
    for _, context in made.values():
        context.__exit__(None, None, None)


@pytest.fixture
def says(servers):
    """says(format, text) -> the server whose model writes the text."""
    def server_of(name, text):
        server = servers(name)
        server.service.model.writes, server.service.model.seconds = text, 0.0
        return server
    return server_of


def events_of(server, body):
    """The events of a stream, checked to have their type as name."""
    status, headers, text = call(server, "POST", PATH, body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
    pairs = [part.split("\n", 1) for part in text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    return [event for event in events if event["type"] != "ping"]


def deltas(events, kind):
    name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}[kind]
    return [event["delta"][name] for event in events if event["type"] == "content_block_delta" and event["delta"]["type"] == kind]


def test_a_message(says):
    status, headers, body = call(says("dsml", "Hi there."), "POST", PATH, BODY)
    assert status == 200 and headers["request-id"].startswith("req_")
    assert body.pop("id").startswith("msg_")
    n = body["usage"]["input_tokens"] + body["usage"]["cache_read_input_tokens"]
    assert body == {"type": "message", "role": "assistant", "model": "dsml", "content": [{"type": "text", "text": "Hi there."}],
                    "stop_reason": "end_turn", "stop_sequence": None, "usage": body["usage"]}
    assert set(body["usage"]) == {"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"}
    assert body["usage"]["output_tokens"] == len("Hi there.") and post(says("dsml", ""), f"{PATH}/count_tokens", {
        "model": "any", "messages": HELLO}) == (200, {"input_tokens": n})


def test_a_stream(says):
    events = events_of(says("dsml", "Hm.</think>Hi."), BODY | {"thinking": {"type": "enabled", "budget_tokens": 1024}})
    assert [event["type"] for event in events if event["type"] != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "content_block_start", "content_block_stop", "message_delta",
        "message_stop"]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["role"] == "assistant" and start["usage"]["output_tokens"] == 0
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}
    assert "".join(deltas(events, "thinking_delta")) == "Hm." and "".join(deltas(events, "text_delta")) == "Hi."
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
    signatures = [event for event in events if event.get("delta", {}).get("type") == "signature_delta"]
    assert len(signatures) == 1 and signatures[0]["delta"]["signature"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len("Hm.") + 1 + len("Hi.")


@pytest.mark.parametrize("name", FORMATS)
def test_calls(says, name):
    """Two calls, after thinking and text, whole and as a stream."""
    server = says(name, "Hm.</think>" + FORMATS[name][3])
    body = BODY | {"tools": TOOLS, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    whole = post(server, PATH, body)[1]
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"], whole
    assert whole["content"][0]["thinking"] == "Hm." and whole["content"][1]["text"] == "I look."
    assert [block["input"] for block in whole["content"][2:]] == INPUTS and whole["stop_reason"] == "tool_use"
    assert [block["name"] for block in whole["content"][2:]] == ["weather", "now"]
    events = events_of(server, body)
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert starts[2]["input"] == {} and starts[2]["name"] == "weather" and starts[2]["id"] != starts[3]["id"]
    by_block = ["".join(event["delta"].get("partial_json", "") for event in events
                        if event["type"] == "content_block_delta" and event["index"] == i) for i in (2, 3)]
    assert [json.loads(part) for part in by_block] == INPUTS and events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_put_back_is_reused(says, name):
    """The next turn begins with the tokens of the last one."""
    text = FORMATS[name][3].replace('"city":"', '"city": "').replace(',"days":[', ', "days": [')        # as JSON is written again
    server = says(name, lambda prompt: "Done." if "21 degrees" in prompt else text)
    body = BODY | {"tools": TOOLS, "messages": [{"role": "user", "content": f"Weather? {name}"}]}
    answer = post(server, PATH, body)[1]
    calls = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": calls[0], "content": [{"type": "text", "text": "21 degrees"}]},
               {"type": "tool_result", "tool_use_id": calls[1], "content": "noon"}]
    messages = [*body["messages"], {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": results}]
    last = post(server, PATH, body | {"messages": messages})[1]
    assert last["content"] == [{"type": "text", "text": "Done."}]
    n = sum(answer["usage"].values())
    assert n - 3 <= last["usage"]["cache_read_input_tokens"] <= n       # the turn's end is not in the caches


@pytest.mark.parametrize("stop, text, expected", [
    (["END"], "one END two", {"stop_reason": "stop_sequence", "stop_sequence": "END"}), (["x", "D t"], "one END two", {
        "stop_reason": "stop_sequence", "stop_sequence": "D t"}), (["x"], "one", {"stop_reason": "end_turn", "stop_sequence": None})])
def test_stop_sequences(says, stop, text, expected):
    body = BODY | {"stop_sequences": stop}
    whole = post(says("dsml", text), PATH, body)[1]
    assert {key: whole[key] for key in expected} == expected
    assert whole["content"][0]["text"] == text.partition(expected["stop_sequence"] or "\n")[0]
    assert events_of(says("dsml", text), body)[-2]["delta"] == expected


def test_limits_of_tokens(says):
    server = says("dsml", "abcdef" * 2000)
    assert post(server, PATH, BODY | {"max_tokens": 3})[1]["stop_reason"] == "max_tokens"
    whole = post(server, PATH, BODY | {"max_tokens": 10**6})[1]
    assert whole["stop_reason"] == "model_context_window_exceeded" and whole["usage"]["output_tokens"] > 4000
    whole = post(server, PATH, BODY | {"max_tokens": 0})[1]
    assert whole["content"] == [] and whole["stop_reason"] == "max_tokens"
    status, body = post(server, PATH, BODY | {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert status == 400 and body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_is_cut_off(says, name):
    """A whole message has it as text, and a stream has its beginning."""
    text = FORMATS[name][3]
    body = BODY | {"tools": TOOLS, "max_tokens": len(says(name, text[:text.index("Kö") + 1]).service.model.answer_ids(()))}
    whole = post(says(name, text), PATH, body)[1]
    assert [block["type"] for block in whole["content"]] == ["text"], whole
    assert whole["content"][0]["text"].startswith("I look.") and whole["stop_reason"] == "max_tokens"
    events = events_of(says(name, text), body)
    assert "".join(deltas(events, "input_json_delta")).replace(": ", ":") == '{"city":"K'
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_without_tools_no_calls_are_looked_for(says):
    for name in FORMATS:
        whole = post(says(name, FORMATS[name][3]), PATH, BODY)[1]
        assert all(block["type"] == "text" for block in whole["content"]) and whole["stop_reason"] == "end_turn"


def test_one_call_where_no_more_may_come(says):
    server = says("kimi", FORMATS["kimi"][3])
    body = BODY | {"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    whole = post(server, PATH, body)[1]
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"] and whole["stop_reason"] == "tool_use"
    assert [event["content_block"]["type"] for event in events_of(server, body) if event["type"] == "content_block_start"] == [
        "text", "tool_use"]


def test_no_tools_may_be_called(says):
    server = says("glm-4.7", FORMATS["glm-4.7"][3])
    whole = post(server, PATH, BODY | {"tools": TOOLS, "tool_choice": {"type": "none"}})[1]
    assert all(block["type"] == "text" for block in whole["content"]) and whole["stop_reason"] == "end_turn"


def test_the_beginning_of_the_answer(says):
    prompts = []
    server = says("dsml", lambda prompt: prompts.append(prompt) or " is 2.")
    whole = post(server, PATH, BODY | {"messages": [*HELLO, {"role": "assistant", "content": "It <think>"}]})[1]
    assert prompts[-1].endswith("Hello<｜Assistant｜></think>It <think>") and whole["content"] == [{"type": "text", "text": " is 2."}]
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    schema = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    for content, more in ("It ", {}), ("It", thinking), ("It", schema), ([{"type": "tool_use", "id": "a", "name": "f", "input": {}}], {}):
        assert post(server, PATH, BODY | more | {"messages": [*HELLO, {"role": "assistant", "content": content}]})[0] == 400


def test_white_space_alone_is_no_block():
    def kinds(*pieces):
        message, blocks = Message("m", 9), []
        for event in Started(1, 0, 0), Written(list(pieces), None), Finished(Reply(), Timings(1, 0, 1, 0, 0, 0)):
            for data in message.heard(event):
                if data["type"] == "content_block_start":
                    blocks.append((data["content_block"]["type"], ""))
                elif data["type"] == "content_block_delta":
                    blocks[-1] = blocks[-1][0], blocks[-1][1] + data["delta"].get("text", "")
        return blocks
    a_call = Piece("x", "tool_call", {"id": "1", "function": {"name": "f", "arguments": "{}"}})
    assert kinds(Piece("\n"), a_call, Piece("\n"), a_call) == [("tool_use", ""), ("tool_use", "")]
    assert kinds(Piece("\n"), Piece(" a"), Piece(" "), Piece("b")) == [("text", "\n a b")]
    assert kinds(Piece("a"), a_call, Piece(" "), Piece("b")) == [("text", "a"), ("tool_use", ""), ("text", " b")]


def test_calls_as_they_are_written():
    """Each API gives the name first, the arguments once, and no call twice."""
    def part(call_id, arguments, kind="call_delta"):
        return Piece("x", kind, {"id": call_id, "function": {"name": "f", "arguments": arguments}})
    pieces = [part("a", ""), part("a", '{"x'), part("a", '": 1}'), part("a", '{"x": 1}', "tool_call"), Piece("\n", "markup"),
              part("a", "{}"), part("a", "{}", "tool_call"), part("b", "[]", "tool_call")]
    message = Message("m", 9)
    heard = [data for event in (Started(1, 0, 0), Written(pieces, None)) for data in message.heard(event)][2:]
    assert [data["type"].removeprefix("content_block_") for data in heard] == [
        "start", "delta", "delta", "stop", "start", "delta", "stop", "start", "delta", "stop"]
    assert "".join(data["delta"]["partial_json"] for data in heard if "delta" in data) == '{"x": 1}{}[]'
    deltas = [choice["delta"]["tool_calls"][0] for choice in ChatForm(None, False).written(0, Written(pieces, None))]
    assert [delta["index"] for delta in deltas] == [0, 0, 0, 1, 1, 2, 2]
    assert [delta["id"] for delta in deltas if "id" in delta] == ["a", "a", "b"]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"x": 1}{}[]'


# Bodies

def read(**fields):
    """What conversation() makes of a body."""
    return conversation(check_fields(BODY | fields, MessagesRequest))


def test_roles_and_blocks():
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}
    one = {"type": "text", "text": "1", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [one, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"},
                                          {"type": "redacted_thinking", "data": "?"}, {"type": "text", "text": "I "},
                                          {"type": "text", "text": "look."}, use, use | {"id": "b", "name": "g"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "b", "is_error": True, "content": "no file"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}, {"type": "document"},
                                     {"type": "text", "text": "And?"}]},
        {"role": "system", "content": "Be quick."}, {"role": "user", "content": "Well?"}]
    system = [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    result, prefill = read(messages=messages, system=system)
    assert prefill is None and result == [
        {"role": "system", "content": "A\nB"}, {"role": "user", "content": "1\n2"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": {"x": 1}}}]},
        {"role": "tool", "tool_call_id": "a", "content": "[image: this model reads text only]"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no file"},
        {"role": "user", "content": "[document: this model reads text only]\nAnd?"}, {"role": "system", "content": "Be quick."},
        {"role": "user", "content": "Well?"}]
    assert read(system="S")[0][0] == {"role": "system", "content": "S"} and len(read(system=[])[0]) == 1


USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "r"}


@pytest.mark.parametrize("fields, words", [
    ({"messages": []}, "messages is an empty list"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"), ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content is an empty list"),
    ({"messages": [*HELLO, {"role": "assistant", "content": []}, *HELLO]}, "messages.1.content is an empty list"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages have only the beginning of the answer"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 'is of type "image", expected text'),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, 'is of type "document", expected text'),
    ({"messages": [*HELLO, USE, {"role": "user", "content": "x"}]}, 'messages.2.content comes after the tool_use "a"'),
    ({"messages": [*HELLO, USE, {"role": "user", "content": [RESULT, RESULT]}]}, "messages.2.content.1.tool_use_id"),
    ({"messages": [*HELLO, USE, {"role": "user", "content": [RESULT | {"tool_use_id": "b"}]}]}, "messages.2.content.0.tool_use_id"),
    ({"messages": [*HELLO, USE, {"role": "user", "content": [{"type": "text", "text": "x"}, RESULT]}]}, "comes after the tool_use"),
    ({"messages": [*HELLO, USE, {"role": "system", "content": "x"}]}, "end with the tool_use"),
    ({"messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "{}"}]}, *HELLO]},
     "messages.1.content.0.input"),
    ({"messages": "x"}, "messages"), ({"max_tokens": None}, "'max_tokens' is missing"), ({"max_tokens": -1}, "max_tokens is -1"),
    ({"model": None}, "'model' is missing"), ({"temperature": 1.5}, "temperature is 1.5"),
    ({"top_k": -1}, "top_k"), ({"seed": 1}, "'seed' is not one of this API"), ({"system": 1}, "system is 1"),
    ({"system": [{"type": "image"}]}, "system.0 is of type"), ({"stop_sequences": [" "]}, "stop_sequences"),
    ({"thinking": {"type": "on"}}, "thinking is"), ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens is 5"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"), ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "which this server does not run"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "a name twice"), ({"tools": TOOLS, "tool_choice": {"type": "x"}}, "tool_choice is"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"), ({"tool_choice": {"type": "any"}}, "no tools"),
    ({"mcp_servers": [{}]}, "mcp_servers"), ({"output_config": {"format": {"type": "x"}}}, "output_config.format")])
def test_bodies_that_are_refused(says, fields, words):
    only_messages = {"max_tokens", "temperature", "top_k", "stop_sequences", "output_config"} & set(fields)
    for path in (PATH,) if only_messages else (PATH, f"{PATH}/count_tokens"):
        body = {key: value for key, value in (BODY | fields).items() if path == PATH or key != "max_tokens"}
        status, result = post(says("dsml", "x"), path, body)
        assert status == 400 and result["type"] == "error" and result["error"]["type"] == "invalid_request_error", result
        assert words in result["error"]["message"] and result["error"]["message"].endswith(".")


def test_threads_are_refused_in_a_way_that_clients_understand(says):
    error = post(says("dsml", "x"), PATH, BODY | {"thread": {"type": "create"}})[1]["error"]
    assert error["type"] == "invalid_request_error" and error["details"] == {"error_code": "thread_unsupported_request"}


def test_fields_that_change_nothing(says):
    more = {"metadata": {"user_id": "u"}, "service_tier": "auto", "context_management": {"edits": []}, "betas": ["x"], "speed": "fast",
            "cache_control": {"type": "ephemeral"}, "mcp_servers": [], "output_config": {"effort": "high"}, "inference_geo": "eu"}
    assert post(says("dsml", "Hi."), PATH + "?beta=true", BODY | more)[1]["content"] == [{"type": "text", "text": "Hi."}]


def test_long_conversations_are_read_in_linear_time():
    use = [{"type": "tool_use", "id": str(i), "name": "f", "input": {}} for i in range(5000)]
    results = [{"type": "tool_result", "tool_use_id": str(i), "content": "r"} for i in reversed(range(5000))]
    messages = [*HELLO, {"role": "assistant", "content": use}, {"role": "user", "content": results}] + HELLO * 5000
    assert len(read(messages=messages)[0]) == 3 + 5000
    with pytest.raises(ApiError):
        read(messages=[*messages, {"role": "assistant", "content": use}, *HELLO])
