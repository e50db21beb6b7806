"""pydsa serve: endpoints over real HTTP, with the demo model."""
import http.client
import json

import pytest

import pydsa
from pydsa.server.running import running
from pydsa.server.settings import Settings


@pytest.fixture(scope="module")
def server(load):
    model = load(pydsa.DEMO, n_ctx=512)
    with running(Settings(port=0, n_parallel=2, timeout=5), model) as server:
        yield server


def call(server, method, path, body=None, **headers):
    """A request -> (status, headers, body): what its JSON stands for, or text."""
    connection = http.client.HTTPConnection(*server.sockets[0].getsockname()[:2], timeout=60)
    connection.request(method, path, body if isinstance(body, (bytes, type(None))) else json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status, response.headers, json.loads(text) if is_json else text


def events(text):
    """The values of a stream, without its end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}


def test_chat(server):
    assert call(server, "GET", "/health")[::2] == (200, {"status": "ok"})
    status, _, body = call(server, "POST", "/v1/chat/completions", CHAT)
    assert status == 200 and body["object"] == "chat.completion"
    text = body["choices"][0]["message"]["content"]
    reply = server.service.model.reply(CHAT["messages"], 8, temperature=0.0)
    assert text == reply.text and body["usage"]["completion_tokens"] == reply.n_generated
    chunks = events(call(server, "POST", "/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}})[2])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]) == text
    assert chunks[-1]["usage"]["completion_tokens"] == reply.n_generated
