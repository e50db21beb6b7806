"""Requests as programs really write them, beside what APIs document."""
import json

import pytest
from serving import TINY, exchange, post, serving

from pydsa.chat import encode_chat
from pydsa.server.anthropic import _sse as anthropic_sse
from pydsa.server.openai_chat import readable
from pydsa.server.openai_forms import sse

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"messages": HELLO, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(small_model, load):
    with serving(load(small_model(**TINY), n_ctx=1024, device="reference", threads=None)) as server:
        yield server


@pytest.fixture(scope="module")
def model(server):
    return server.service.model


def chat(**fields):
    return {"messages": HELLO, "max_tokens": 1} | fields


@pytest.mark.parametrize("fields", [
    {"max_tokens": 1.0, "n": 1.0, "seed": 7.0, "top_k": 40.0}, {"max_tokens": None, "max_completion_tokens": 1}, {"stop": [""]},
    {"stop": ""}, {"top_k": -1}, {"tools": [], "tool_choice": "auto"}, {"logit_bias": {}}, {"response_format": {"type": "text"}},
    {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": []}, *HELLO]}])
def test_other_ways_to_say_the_same(server, fields):
    """Languages may have only floats, and forms have empty fields."""
    assert post(server, CHAT, chat() | fields)[0] == 200


def test_no_limit_of_tokens(server):
    for path, body in ((CHAT, chat(max_tokens=-1, grammar='root ::= "a"')), (CHAT, chat(max_completion_tokens=-1, grammar='root ::= "a"')),
                       (TEXT, {"prompt": "a", "max_tokens": -1, "grammar": 'root ::= "' + "a" * 40 + '"'})):
        assert post(server, path, body)[1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/v1//models", "//v1/models/", "/v1/v1/models", "http://127.0.0.1:1/v1/models", "/models/", "//health/"])
def test_paths_as_clients_put_them_together(server, path):
    assert exchange(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()).startswith(b"HTTP/1.1 200")


def test_more_variables_of_a_template(model):
    """GLM's templates keep earlier thoughts if clear_thinking is false."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '' if clear_thinking | default(true) else 'kept' }}"
    with serving(model, template=template) as server:
        counts = [post(server, CHAT, BODY | field)[1]["usage"]["prompt_tokens"] for field in (
            {}, {"chat_template_kwargs": {"clear_thinking": True}}, {"chat_template_kwargs": {"clear_thinking": False, "thinking": False}},
            {"thinking": {"type": "disabled", "clear_thinking": False}})]
        assert counts[0] == counts[1] and counts[2] == counts[3] == counts[0] + 4
        for name in "x", "messages":
            status, answer = post(server, CHAT, BODY | {"chat_template_kwargs": {name: []}})
            assert status == 400 and f"'{name}'" in answer["error"]["message"]


@pytest.mark.parametrize("content, thinking", [("It is", False), (["It is"], True), (None, False)])
def test_a_last_message_of_the_assistant_begins_the_answer(server, model, content, thinking):
    switch = {"thinking": {"type": "enabled" if thinking else "disabled"}}
    body = BODY | switch | {"messages": [*HELLO, {"role": "assistant", "content": content}]}
    begun = model.tokenize("It is", add_bos=False) if content else []
    expected = model.complete(encode_chat(model.tokenizer, HELLO) + begun, 8, temperature=0.0)
    choice = post(server, CHAT, body)[1]["choices"][0]
    assert choice["message"]["content"] == expected.text and "reasoning_content" not in choice["message"]
    assert not content or post(server, CHAT, body | {"json_schema": {}})[0] == 400


def test_events_are_one_line_for_every_reader():
    """Many readers end lines where Unicode does: at U+0085, U+2028 and U+2029 too."""
    value = {"type": "x", "text": "a\u2028b\u2029c\x85d\v\f\x1cé"}
    for text, n in (sse(value), 2), (anthropic_sse(value), 3):
        lines = text.splitlines()
        assert len(lines) == n and json.loads(lines[-2].removeprefix("data: ")) == value and "é" in text


def test_images_end_no_conversation(server):
    """A new one is refused; the model is told of older ones, and of a tool's."""
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    called = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}
    result = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "r"}, {"type": "input_audio"}]}
    for messages, status in ([*HELLO, image], 400), ([image, *HELLO], 200), ([*HELLO, called, result], 200):
        assert post(server, CHAT, BODY | {"messages": messages})[0] == status
    read = readable([image, *HELLO, called, result])
    assert read[0]["content"] == [{"type": "text", "text": "[image: this model reads text only]"}] and read[1:3] == [*HELLO, called]
    assert read[3]["content"] == [{"type": "text", "text": "r"}, {"type": "text", "text": "[audio: this model reads text only]"}]
