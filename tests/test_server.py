"""pydsa serve: OpenAI's endpoints over HTTP, whole and streaming, and those beside them."""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from serving import TINY, call, events, post, serving, wait_for

import pydsa
from pydsa.engine.requests import Finished, Timings, Token, Written
from pydsa.sampling import Sampling
from pydsa.server.openai_chat import ChatForm
from pydsa.server.openai_completions import CompletionForm
from pydsa.text.answers import Piece, Reply

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"days": {"type": "integer", "maximum": 999}}, "required": ["days"]}}}
OTHER = {"type": "function", "function": TOOL["function"] | {"name": "g"}}
BODY = {"messages": HELLO, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(small_model, load, tmp_path_factory):
    model = load(small_model(**TINY), n_ctx=1024, device="reference", threads=None)
    with serving(model, slot_folder=str(tmp_path_factory.mktemp("slots")), alias="tiny") as server:
        yield server


@pytest.fixture(scope="module")
def model(server):
    return server.service.model


def stream(server, path, body):
    """The chunks of a stream."""
    status, headers, text = call(server, "POST", path, body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
    return events(text)


def test_chat(server, model):
    status, body = post(server, CHAT, BODY)
    reply = model.reply(HELLO, 8, temperature=0.0)
    assert status == 200 and body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "message": {"role": "assistant", "content": reply.text, "refusal": None}, "logprobs": None,
                                "finish_reason": "length"}]
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (reply.n_prompt, 8, reply.n_prompt + 8)
    assert body["timings"]["predicted_n"] == 8 and body["timings"]["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]


def test_chat_streams(server, model):
    chunks = stream(server, CHAT, BODY | {"stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == model.reply(HELLO, 8, temperature=0.0).text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    assert len({chunk["id"] for chunk in chunks}) == 1 and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and all("usage" not in chunk for chunk in stream(server, CHAT, BODY))


def test_progress_of_a_prompt(server):
    chunks = stream(server, CHAT, BODY | {"return_progress": True, "messages": [{"role": "user", "content": "word " * 50}]})
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert progress[-1]["processed"] == progress[-1]["total"] > 100


def test_choices_of_seeds(server, model):
    body = BODY | {"n": 3, "seed": 5, "temperature": 1}
    texts = [choice["message"]["content"] for choice in post(server, CHAT, body)[1]["choices"]]
    alone = [post(server, CHAT, body | {"n": 1, "seed": 5 + i})[1]["choices"][0]["message"]["content"] for i in range(3)]
    assert texts == alone and len(set(texts)) == 3
    chunks = stream(server, CHAT, body | {"stream_options": {"include_usage": True}})
    parts = ["", "", ""]
    for choice in (chunk["choices"][0] for chunk in chunks[:-1]):
        parts[choice["index"]] += choice["delta"].get("content", "")
    assert parts == texts and chunks[-1]["usage"]["completion_tokens"] == 24


def test_completions(server, model):
    expected = model.complete("Once upon", 16, temperature=0.0).text
    status, body = post(server, TEXT, {"prompt": "Once upon", "temperature": 0})
    assert status == 200 and body["object"] == "text_completion" and body["choices"][0]["text"] == expected
    assert body["usage"]["completion_tokens"] == 16      # OpenAI's default
    ids = model.tokenize("Once upon", parse_special=True)
    several = post(server, TEXT, {"prompt": [ids, ids[:-1]], "temperature": 0, "n": 2, "echo": True, "max_tokens": 4})[1]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [choice["text"].startswith(model.detokenize(ids)) for choice in several["choices"]] == [True, True, False, False]
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) - 1
    assert post(server, TEXT, {"prompt": ["Once upon", "a"], "temperature": 0})[1]["choices"][0]["text"] == expected
    chunks = stream(server, TEXT, {"prompt": "Once upon", "temperature": 0, "echo": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Once upon" + expected


def test_no_tokens_asked_for(server):
    body = post(server, TEXT, {"prompt": "a", "max_tokens": 0})[1]
    assert body["choices"][0]["text"] == "" and body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 0


def test_stop_texts_across_tokens(server, model):
    text = model.complete("Once upon", 40, temperature=0.0).text
    stop = text[9:13]
    body = {"prompt": "Once upon", "temperature": 0, "max_tokens": 40}
    for given in (stop, ["\n\n\n", stop]):
        choice = post(server, TEXT, body | {"stop": given})[1]["choices"][0]
        assert choice["text"] == text[:text.index(stop)] and choice["finish_reason"] == "stop"


def test_options_of_sampling_reach_the_engine(server, model):
    """Each changes the answer as it does in model.generate()."""
    for options in ({"logit_bias": {"65": 100}}, {"frequency_penalty": 2.0, "logit_bias": {"65": 20}}, {"presence_penalty": 1.5},
                    {"temperature": 1.5, "top_k": 3, "seed": 1}, {"temperature": 1.5, "top_p": 0.01}, {"temperature": 1.5, "min_p": 0.9}):
        body = post(server, TEXT, {"prompt": "Once", "temperature": 0} | options)[1]
        own = options | ({"logit_bias": {65: options["logit_bias"]["65"]}} if "logit_bias" in options else {})
        base = {"temperature": 0.0, "top_p": 1.0, "top_k": 40, "min_p": 0.05} | own
        if "seed" in options or base["temperature"] == 0 or "top_p" in options or "min_p" in options:
            assert body["choices"][0]["text"] == model.complete("Once", 16, **base).text, options


def test_developer_parts_and_tools_in_the_prompt(server, model):
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}, *HELLO]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    body = post(server, CHAT, BODY | {"messages": messages, "tools": tools})[1]
    assert body["usage"]["prompt_tokens"] == model.reply(messages, 1, tools=tools, temperature=0.0).n_prompt
    assert body["choices"][0]["message"]["content"] == model.reply(messages, 8, tools=tools, temperature=0.0).text


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
          "additionalProperties": False}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "ab", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize("field", [{"response_format": AS_SCHEMA}, {"response_format": {"type": "json_object", "schema": SCHEMA}},
                                   {"json_schema": SCHEMA}])
def test_answers_by_a_schema(server, field):
    """They are valid by construction, whatever is drawn, whole and streaming."""
    for seed, path in enumerate((CHAT, CHAT, TEXT)):
        body = field | {"messages": HELLO, "temperature": 1, "seed": seed, "max_tokens": 400, "prompt": "a"}
        choice = post(server, path, body)[1]["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        value = json.loads(text)
        assert set(value) == {"a", "b"} and value["a"] >= 0 and value["b"] in ("x", "y") and choice["finish_reason"] == "stop"
        if path == CHAT:
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream(server, path, body)) == text


@pytest.mark.parametrize("schema, reason", [
    ({"not": {}}, 'Unimplemented keys: ["not"].'), (False, "schema is false."), ({"type": "string", "pattern": "("}, "unclosed group."),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "or use anyOf.")])
def test_the_reason_of_a_refused_schema_is_all_that_is_told(server, schema, reason):
    """Nothing of the grammar that was made of it."""
    message = post(server, CHAT, {"messages": HELLO, "json_schema": schema})[1]["error"]["message"]
    assert message.startswith("The schema or grammar cannot be served: ") and message.endswith(reason) and len(message) < 140


def test_answers_by_a_grammar(server):
    for path in (CHAT, TEXT):
        body = {"messages": HELLO, "prompt": "a", "grammar": 'root ::= "yes" | "no"'}
        choice = post(server, path, body)[1]["choices"][0]
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) in ("yes", "no")


def test_json_after_reasoning(server):
    """The schema holds for the answer only."""
    end = server.service.model.tokenize("</think>", add_bos=False, parse_special=True)[0]
    body = {"messages": HELLO, "response_format": AS_SCHEMA, "reasoning_effort": "high", "max_tokens": 600, "seed": 1,
            "logit_bias": {str(end): 2}}
    message = post(server, CHAT, body)[1]["choices"][0]["message"]
    assert set(json.loads(message["content"])) == {"a", "b"} and message["reasoning_content"]


def test_a_schema_beside_tools(with_tools):
    """An answer is a call, or follows the schema."""
    kinds = set()
    for seed in range(12):
        body = {"messages": HELLO, "tools": [TOOL], "response_format": AS_SCHEMA, "temperature": 1, "seed": seed, "max_tokens": 600}
        message = post(with_tools, CHAT, body)[1]["choices"][0]["message"]
        kinds.add("calls" if message.get("tool_calls") else "text")
        if message.get("tool_calls"):
            assert {call["function"]["name"] for call in message["tool_calls"]} == {TOOL["function"]["name"]}
        else:
            assert set(json.loads(message["content"])) == {"a", "b"}
    assert kinds == {"calls", "text"}


@pytest.mark.parametrize("fields, words", [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?=a)b"}}}}, "look-a"),
    ({"grammar": "root ::= ["}, "grammar cannot be read"), ({"json_schema": {"type": "none"}}, "schema"),
    ({"tool_choice": "required"}, "no tools"),
    ({"tool_choice": "maybe"}, "tool_choice"), ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
    ({"tools": [TOOL], "tool_choice": {"function": 5}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "all", "tools": [TOOL]}}}, "tool_choice is"),
    ({"tool_choice": {"name": "g"}}, "names 'g', expected 'auto', 'none', 'required', or a function that is offered: there is none."),
    ({"functions": [{"name": "f"}]}, "send tools"), ({"modalities": ["text", "audio"]}, "text only"),
    ({"web_search_options": {}}, "searches no web")])
def test_constraints_that_cannot_be_served(with_tools, fields, words):
    status, answer = post(with_tools, CHAT, {"messages": HELLO} | fields)
    assert status == 400 and words in answer["error"]["message"] and answer["error"]["message"].endswith(".")
    assert answer["error"]["param"] == [*fields][-1]


@pytest.fixture(scope="module")
def with_tools(model):
    """A server whose template shows calls as GLM's does."""
    template = ("{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}"
                "<｜Assistant｜>{# <tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call> #}")
    with serving(model, template=template) as server:
        yield server


ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}}


@pytest.mark.parametrize("choice", ["required", {"type": "any"}, {"type": "function", "function": {"name": "f"}}, ALLOWED])
def test_calls_that_must_come(with_tools, choice):
    """A random model calls as it must; a stream gives the same call."""
    body = {"messages": HELLO, "tools": [TOOL, OTHER], "tool_choice": choice, "seed": 3, "max_tokens": 500, "parallel_tool_calls": False}
    chosen = post(with_tools, CHAT, body)[1]["choices"][0]
    call_of = chosen["message"]["tool_calls"]
    assert chosen["finish_reason"] == "tool_calls" and len(call_of) == 1 and chosen["message"]["content"] is None
    function = call_of[0]["function"]
    assert function["name"] in (("f", "g") if choice in ("required", {"type": "any"}) else ("f",))
    assert isinstance(json.loads(function["arguments"])["days"], int)
    parts = [part for chunk in stream(with_tools, CHAT, body) for part in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == function["name"] and {part["index"] for part in parts} == {0}
    assert "".join(part["function"]["arguments"] for part in parts) == function["arguments"]


def test_no_call_can_come(with_tools):
    """What opens a call is banned then, however likely it is."""
    bias = {str(i): 4 for i in with_tools.service.model.tokenize("<tool_call>", add_bos=False)}
    for seed in range(3):
        choice = post(with_tools, CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": "none", "seed": seed, "max_tokens": 100,
                                         "logit_bias": bias})[1]["choices"][0]
        assert "<tool_call>" not in choice["message"]["content"] and "tool_calls" not in choice["message"]


def test_what_looks_like_a_call_is_text_where_none_may_come(with_tools):
    written = "<tool_call>f<arg_key>days</arg_key><arg_value>1</arg_value></tool_call>"
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "none", "json_schema": {"enum": [written]}}
    choice = post(with_tools, CHAT, body)[1]["choices"][0]
    assert json.loads(choice["message"]["content"]) == written and "tool_calls" not in choice["message"]


def test_log_probabilities(server, model):
    """They are those of the model's logits."""
    ids = model.tokenize("Once", parse_special=True)
    choice = post(server, TEXT, {"prompt": ids, "temperature": 0, "max_tokens": 3, "logprobs": 2})[1]["choices"][0]["logprobs"]
    logits = model.logits(ids)[-1].astype(float)
    logits -= logits.max() + math.log(np.exp(logits - logits.max()).sum())
    best = np.argsort(-logits)[:2]
    assert choice["token_logprobs"][0] == pytest.approx(logits[best[0]]) and len(choice["tokens"]) == 3
    assert sorted(choice["top_logprobs"][0].values()) == pytest.approx(sorted(logits[best]))
    body = BODY | {"logprobs": True, "top_logprobs": 3}
    whole = post(server, CHAT, body)[1]["choices"][0]["logprobs"]["content"]
    streamed = [entry for chunk in stream(server, CHAT, body) for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert streamed == whole and len(whole) == 8 and all(len(entry["top_logprobs"]) == 3 for entry in whole)
    assert [entry["logprob"] for entry in whole] == [entry["top_logprobs"][0]["logprob"] for entry in whole]


@pytest.mark.parametrize("field, thinks", [
    ({"reasoning_effort": "high"}, True), ({"reasoning_effort": "none"}, False), ({}, False), ({"thinking": {"type": "enabled"}}, True),
    ({"chat_template_kwargs": {"thinking": True}}, True), ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ({"enable_thinking": True}, True)])
def test_thinking_is_switched(server, model, field, thinks):
    message = post(server, CHAT, BODY | field)[1]["choices"][0]["message"]
    reply = model.reply(HELLO, 8, thinking=thinks, temperature=0.0)
    assert (message["content"], message.get("reasoning_content", "")) == (reply.text, reply.reasoning)
    assert bool(reply.reasoning) == thinks


def test_calls_and_reasoning_as_deltas(server):
    """Markup is in no delta, and a call's name comes before its arguments."""
    call_of = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    pieces = [Piece("hm", "reasoning"), Piece("</think>", "markup"), Piece("Hi"), Piece("<call>", "tool_call", call_of),
              Piece("<call>", "tool_call", call_of | {"id": "call_2"})]
    form = ChatForm(server.service, False)
    deltas = [choice["delta"] for choice in form.written(0, Written(pieces, None))]
    assert deltas[:2] == [{"reasoning_content": "hm"}, {"content": "Hi"}]
    calls = [delta["tool_calls"][0] for delta in deltas[2:]]
    assert calls[0] == {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert calls[1] == {"index": 0, "function": {"arguments": '{"a": 1}'}} and [call["index"] for call in calls] == [0, 0, 1, 1]
    reply = Reply()
    for piece in pieces:
        reply.add(piece)
    end = Finished(reply, Timings(1, 0, 5, 0, 1, 1))
    assert form.whole(0, end, [])["message"] == {"role": "assistant", "content": "Hi", "refusal": None, "reasoning_content": "hm",
                                                 "tool_calls": [call_of, call_of | {"id": "call_2"}]}


def test_forms_of_log_probabilities(server):
    token = Token(65, -0.5, [(65, -0.5), (66, -1.5)])
    a, b = (server.service.model.detokenize([i]) for i in (65, 66))
    chat = list(ChatForm(server.service, True).written(0, Written([], token)))
    assert [choice["delta"] for choice in chat] == [{"content": ""}]
    entry = chat[0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == (a, list(a.encode()), -0.5)
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [(a, -0.5), (b, -1.5)]
    form = CompletionForm(server.service, None, True)
    entries = [list(form.written(0, Written([Piece("A")], token)))[0]["logprobs"] for _ in range(2)]
    assert entries[0] == {"tokens": [a], "token_logprobs": [-0.5], "top_logprobs": [{a: -0.5, b: -1.5}], "text_offset": [0]}
    assert entries[1]["text_offset"] == [len(a)]


def test_tokens(server, model):
    ids = model.tokenize("Hé <think>", add_bos=False, parse_special=True)
    assert post(server, "/tokenize", {"content": "Hé <think>"}) == (200, {"tokens": ids})
    with_bos = post(server, "/tokenize", {"content": "H", "add_special": True, "parse_special": False})[1]["tokens"]
    assert with_bos == model.tokenize("H", parse_special=False)
    pieces = post(server, "/tokenize", {"content": "é", "with_pieces": True})[1]["tokens"]
    data = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert data.decode() == "é"
    assert post(server, "/detokenize", {"tokens": ids}) == (200, {"content": model.detokenize(ids)})
    for wrong in ([10**30], [-1], [300], [1.5], "a"):
        assert post(server, "/detokenize", {"tokens": wrong})[0] == 400


def test_models(server, model):
    [listed] = call(server, "GET", "/v1/models")[2]["data"]
    assert listed["id"] == "tiny" and listed["meta"]["n_ctx"] == listed["context_length"] == listed["max_model_len"] == 1024
    assert call(server, "GET", "/v1/models/tiny")[2] == listed and call(server, "GET", "/v1/models/gpt-4")[0] == 404


def test_prefixes_are_reused(server):
    messages = [{"role": "user", "content": "A long question about " + "kettles " * 30}]
    first = post(server, CHAT, BODY | {"messages": messages})[1]
    again = post(server, CHAT, BODY | {"messages": messages})[1]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
    assert again["choices"] == first["choices"]
    none = post(server, CHAT, BODY | {"messages": messages, "cache_prompt": False})[1]
    assert none["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_slots(server):
    body = BODY | {"id_slot": 1, "messages": [{"role": "user", "content": "Remember me"}]}
    first = post(server, CHAT, body)[1]
    n = call(server, "GET", "/slots")[2][1]["n_past"]
    assert n >= 20
    status, saved = post(server, "/slots/1?action=save", {"filename": "one.bin"})
    assert status == 200 and saved["n_saved"] == n and saved["n_written"] > 0
    assert call(server, "POST", "/slots/1?action=erase")[2] == {"id_slot": 1, "n_erased": n}
    assert call(server, "GET", "/slots")[2][1]["n_past"] == 0
    assert post(server, "/slots/1?action=restore", {"filename": "one.bin"})[1]["n_restored"] == n
    assert post(server, CHAT, body)[1]["choices"] == first["choices"]


def test_saved_slots_that_are_damaged(server, monkeypatch):
    """The error tells no more of the file than its name."""
    folder = Path(server.service.settings.slot_folder)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(server.service, "settings", dataclasses.replace(server.service.settings, slot_folder=folder.name))
    (folder / "torn.bin").write_bytes(b"pydsa")
    (folder / "dir").mkdir()
    for action, name, status in (("restore", "torn.bin", 400), ("save", "dir", 500)):
        met, answer = post(server, f"/slots/1?action={action}", {"filename": name})
        message = answer["error"]["message"]
        assert met == status and message.startswith(f"The saved slot '{name}'") and folder.name not in message


def test_a_folder_for_slots_is_made(model, tmp_path):
    with serving(model, slot_folder=str(tmp_path / "new" / "slots")) as server:
        post(server, CHAT, BODY | {"id_slot": 0})
        assert post(server, "/slots/0?action=save", {"filename": "a"})[0] == 200
    (tmp_path / "file").touch()
    with serving(slot_folder=str(tmp_path / "file")) as server:
        server.load(lambda: model)
        assert "--slot-save-path" in str(server.failure)


@pytest.mark.parametrize("path, body, status", [
    ("/slots/1?action=save", {"filename": "../x"}, 400), ("/slots/1?action=save", {"filename": "/etc/x"}, 400),
    ("/slots/1?action=save", {"filename": ".hidden"}, 400), ("/slots/1?action=save", {"filename": "a\x00b"}, 400),
    ("/slots/1?action=save", {}, 400), ("/slots/1?action=save", {"filename": "a/b"}, 400),
    ("/slots/1?action=save", {"filename": "a\n"}, 400), ("/slots/1?action=save", {"filename": "a.rows"}, 400),
    ("/slots/1?action=restore", {"filename": "absent"}, 404), ("/slots/2?action=erase", {}, 404), ("/slots/1?action=x", {}, 400),
    ("/slots/-1?action=erase", {}, 404), ("/slots/1", {}, 400), ("/slots/%D9%A1?action=erase", {}, 404)])
def test_slots_that_are_refused(server, path, body, status):
    met, answer = post(server, path, body)
    assert met == status and answer["error"]["message"].endswith(".")


def test_metrics(server):
    post(server, CHAT, BODY)
    text = call(server, "GET", "/metrics")[2]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.split("\n") if line and line[0] != "#"}
    stats = server.service.engine.stats
    assert values["pydsa:tokens_predicted_total"] == stats.n_generated > 0
    assert values["pydsa:slots"] == 2 and values["pydsa:requests_processing"] == 0
    assert values['pydsa:http_requests_total{method="POST",path="/v1/chat/completions",status="200"}'] > 0
    assert values["pydsa:time_to_first_token_seconds_count"] > 0 and not math.isnan(values["pydsa:queue_seconds_sum"])


@pytest.fixture
def logged(monkeypatch):
    """The lines of the log."""
    lines = []
    monkeypatch.setattr("pydsa.server.guard.log", lines.append)
    return lines


def test_the_log_tells_of_each_request(server, logged):
    post(server, CHAT, BODY)
    post(server, CHAT, {})
    lines = wait_for(lambda: lines if len(lines := [line for line in logged if CHAT in line]) == 2 else None)
    assert f"POST {CHAT} 200" in lines[0] and "reused" in lines[0] and "generated 8" in lines[0]
    assert "400" in lines[1] and "'messages' is missing" in lines[1]


def test_the_log_as_json(server, model, logged):
    with serving(model, json_log=True) as other:
        post(other, CHAT, BODY)
    entry = json.loads(logged[-1])
    assert entry["status"] == 200 and entry["n_generated"] == 8 and entry["path"] == CHAT


def test_defaults_of_the_settings(load, small_model):
    model = load(small_model(**TINY), n_ctx=1024, device="reference", threads=None)
    with serving(model, max_tokens=5, sampling=Sampling(temperature=0.0), thinking=True) as server:
        body = post(server, CHAT, {"messages": HELLO})[1]
        assert body["usage"]["completion_tokens"] == 5 and body["choices"][0]["message"]["reasoning_content"]
        assert body["model"].startswith("model")


def test_it_listens_before_the_model_is_loaded(load, small_model):
    with serving() as server:
        for path in ("/health", "/v1/models", "/slots"):
            status, headers, body = call(server, "GET", path)
            assert status == 503 and headers["retry-after"] and body["error"]["code"] == "loading"
        assert post(server, CHAT, BODY)[0] == 503 and call(server, "GET", "/metrics")[0] == 200
        server.load(lambda: load(small_model(**TINY), n_ctx=1024, device="reference", threads=None))
        assert call(server, "GET", "/health")[0] == 200 and post(server, CHAT, BODY)[0] == 200


@pytest.mark.parametrize("template, fails", [("{% broken", True), ("{{ messages[0].x.y }}", True), ("{{ messages[0].content }}", False),
                                             ("{{ raise_exception('a system message comes first') }}", False)])
def test_a_template_is_tried_at_the_start(model, template, fails):
    with serving(template=template) as server:
        server.load(lambda: model)
        assert isinstance(server.failure, pydsa.PydsaError) == fails == (server.service.engine is None)


def test_a_model_that_cannot_be_loaded_ends_the_server():
    with serving() as server:
        server.load(lambda: pydsa.load("/nonexistent.gguf"))
        assert isinstance(server.failure, pydsa.PydsaError) and server.should_exit
