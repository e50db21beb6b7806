"""pydsa serve under load and faults: one sentence for each mistake, and nothing is lost."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from serving import TINY, address, call, events, exchange, post, serving, wait_for

from pydsa.server.protocol import Connection

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS = {"prompt": "a", "max_tokens": 16000, "logit_bias": {"1": False}, "cache_prompt": False}       # the end of a turn never comes


@pytest.fixture(scope="module")
def model(small_model, load):
    return load(small_model(**TINY), n_ctx=16384, device="reference", threads=None)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, n_queue=1, timeout=1.0) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_lost(server):
    """After each test all slots are idle, and the server answers."""
    yield
    wait_for(lambda: idle(server))
    assert post(server, TEXT, {"prompt": "a", "max_tokens": 1})[0] == 200


def idle(server):
    engine = server.service.engine
    return all(slot.state == "idle" for slot in engine.slots()) and engine._n_open == 0


def chat(**fields):
    return {"messages": HELLO, "max_tokens": 1} | fields


DEEP = "[" * 100_000 + "]" * 100_000
WRONG = [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[1]", "expected an object"), (b"null", "expected an object"), (b'"a"', "expected an object"),
    (b'{"messages": [], "messages": []}', "twice"), (b'{"messages": \xff}', "UTF-8"), (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": 1e999}', "1e999"), (b'{"seed": ' + b"9" * 5000 + b"}", "digits"), (DEEP.encode(), "deep"),
    (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "deep"), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    ({}, "'messages' is missing"), (chat(messages=[]), "messages"), (chat(messages="Hello"), "messages is"),
    (chat(messages=[1]), "messages"),
    (chat(messages=[{"role": "user"}]), "content"), (chat(messages=[{"role": 1, "content": "a"}]), "role"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "image_url"),
    (chat(max_tokens="5"), "max_tokens is"), (chat(max_tokens=-2), "max_tokens"), (chat(max_tokens=1.5), "max_tokens"),
    (chat(max_completion_tokens=True), "max_completion_tokens"), (chat(temperature="hot"), "temperature"),
    (chat(temperature=-1), "temperature"), (chat(top_p=2), "top_p"), (chat(min_p=-1), "min_p"), (chat(top_k=1.5), "top_k"),
    (chat(n=0), "n is"), (chat(n=1000), "n is"), (chat(n=True), "n is"), (chat(seed=2**70), "seed"), (chat(stop=[1]), "stop"),
    (chat(stop=["a" * 1001]), "stop"), (chat(stop=["a"] * 65), "stop"), (chat(stop={}), "stop"), (chat(logit_bias={"x": 1}), "logit_bias"),
    (chat(logit_bias={"999999": 1}), "logit_bias"),
    (chat(logit_bias={"5": "a"}), "logit_bias"), (chat(logit_bias={"5": True}), "logit_bias"), (chat(logit_bias=[1]), "logit_bias"),
    (chat(frequency_penalty=[]), "frequency_penalty"), (chat(stream="yes"), "stream"), (chat(stream_options=1), "stream_options"),
    (chat(logprobs=1), "logprobs"), (chat(top_logprobs=2), "top_logprobs"), (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(tools="f"), "tools"), (chat(tools=[{"type": "function"}]), "tools"), (chat(reasoning_effort="very"), "reasoning_effort"),
    (chat(chat_template_kwargs={"x": 1}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"thinking": True, "x": 1}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"thinking": True, "enable_thinking": False}), "chat_template_kwargs"), (chat(id_slot=9), "slot"),
    (chat(user=5), "user is"),
    (chat(thinking={"type": "maybe"}), "thinking"), (chat(model=5), "model is"),
    (chat(response_format="json"), "response_format"), (chat(response_format={"type": "xml"}), "xml"),
    (chat(response_format={"type": "json_schema"}), "no schema"), (chat(grammar="root ::= [a]", json_schema={}), "expected one of them"),
    (chat(tool_choice=5), "tool_choice is")]


@pytest.mark.parametrize("body, words", WRONG)
def test_wrong_bodies(server, body, words):
    status, answer = post(server, CHAT, body)
    error = answer["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert words in error["message"] and error["message"].endswith(".") and len(error["message"]) < 400


def kinds_of(kind):
    return [kind, *(one for child in kind.__subclasses__() for one in kinds_of(child))]


def test_every_field_says_what_it_should_be():
    """Without a description the sentence on a wrong field is pydantic's: "expected Input should be a valid list"."""
    import pydsa.server.app     # noqa: F401, all endpoints
    from pydsa.server.bodies import Fields
    from pydsa.server.openai_chat import ChatRequest
    kinds = kinds_of(Fields)
    assert ChatRequest in kinds
    assert not [f"{kind.__name__}.{name}" for kind in kinds for name, field in kind.model_fields.items()
                if field.annotation is not Any and not field.description]


@pytest.mark.parametrize("fields", [
    {}, {"prompt": []}, {"prompt": [True]}, {"prompt": [[]]}, {"prompt": ["a", 1]}, {"prompt": {}}, {"prompt": [999999]}, {"prompt": [-1]},
    {"prompt": [10**30]}, {"prompt": "a", "suffix": "b"}, {"prompt": "a", "best_of": 2}, {"prompt": "a", "logprobs": True},
    {"prompt": "a", "echo": True, "logprobs": 1}, {"prompt": ["a"] * 100, "n": 2}, {"prompt": "a", "echo": 1}])
def test_wrong_completions(server, fields):
    status, answer = post(server, TEXT, fields)
    assert status == 400 and answer["error"]["message"].endswith(".")


def test_unknown_fields_are_ignored(server):
    assert post(server, CHAT, chat(store=True, service_tier="auto", metadata={"a": "b"}, user="me", seed=None, stop=None))[0] == 200


def test_many_wrong_items_are_refused_at_once(server):
    """Only the first is told of: errors on a million items would fill the memory."""
    start = time.monotonic()
    for body in (chat(messages=[1] * 1_000_000), chat(stop=[1] * 1_000_000), {"tokens": ["a"] * 1_000_000}):
        path = "/detokenize" if "tokens" in body else CHAT
        assert post(server, path, body)[0] == 400
    assert time.monotonic() - start < 10


def test_prompts_longer_than_the_context(server):
    for path, body in ((CHAT, chat(messages=[{"role": "user", "content": "word " * 5000}])), (TEXT, {"prompt": [5] * 16384})):
        status, answer = post(server, path, body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded" and "16384" in answer["error"]["message"]


def test_bodies_that_take_far_more_memory_than_their_text(server):
    status, answer = post(server, CHAT, b"[" + b"[]," * 4_000_000 + b"[]]")
    assert status == 413 and "values" in answer["error"]["message"]


def test_the_room_for_all_bodies_is_bounded(server, monkeypatch):
    monkeypatch.setattr("pydsa.server.bodies.MAX_BODIES", 100_000)
    assert post(server, "/tokenize", {"content": "a" * 90_000})[0] == 200
    status, answer = post(server, "/tokenize", {"content": "a" * 200_000})
    assert status == 503 and "room" in answer["error"]["message"] and server.service.body_bytes == 0


def test_large_bodies(server):
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    connection.putrequest("POST", CHAT)
    connection.putheader("content-length", str(1 << 40))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413 and "32 MiB" in json.loads(response.read())["error"]["message"]
    connection.close()
    parts = (b" " * (1 << 20) for _ in range(33))
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    connection.request("POST", CHAT, parts, encode_chunked=True, headers={"transfer-encoding": "chunked"})
    assert connection.getresponse().status == 413
    connection.close()


def test_other_paths_methods_and_encodings(server):
    assert call(server, "GET", "/v2/x")[0] == 404 and call(server, "GET", CHAT)[0] == 405 and call(server, "BREW", "/")[0] == 405
    assert post(server, CHAT, b"x", content_encoding="gzip")[0] == 415
    assert call(server, "GET", "/v1/messages/none")[2] == {
        "type": "error", "error": {"type": "not_found_error", "message": "There is nothing at /v1/messages/none."}}


@pytest.mark.parametrize("data, status, words", [
    (b"GARBAGE\r\n\r\n", 400, "not an HTTP request"), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, "not an HTTP request"),
    (b"GET / HTTP/1.1\r\n\r\n", 400, "not an HTTP request"),
    (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000, 431, "64 KiB"),
    (b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", 400, "not an HTTP request"),
    (b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400, "not an HTTP request"),
    (b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400, "not an HTTP request")])
def test_what_is_no_http(server, data, status, words):
    head, _, body = exchange(server, data).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and words in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("data", [b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{", b"GET /hea"])
def test_half_closed_connections(server, data):
    head, _, body = exchange(server, data, end=True).partition(b"\r\n\r\n")
    assert b" 400 " in head and "ends in the middle" in json.loads(body)["error"]["message"]
    assert exchange(server, b"", end=True) == b""


@pytest.mark.parametrize("data", [b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{", b"GET /hea", b""])
def test_slow_requests(server, data):
    head, _, body = exchange(server, data).partition(b"\r\n\r\n")
    assert b" 408 " in head and "after 1 s" in json.loads(body)["error"]["message"]


def test_idle_connections_are_kept(server):
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    for _ in range(2):
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
        time.sleep(1.2)     # longer than the timeout of a request that comes
    connection.close()


def begin(server, body, **options):
    """Send a request and return its socket, without reading."""
    data = json.dumps(body).encode()
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(20)
    connection.connect(address(server))
    connection.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (TEXT.encode(), len(data)) + data)
    return connection


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
def test_a_client_that_goes_away_frees_its_slot(server, fields):
    connection = begin(server, ENDLESS | fields)
    wait_for(lambda: any(slot.n_generated > 3 for slot in server.service.engine.slots()))
    cancelled = server.service.engine.stats.n_cancelled
    connection.close()
    wait_for(lambda: idle(server), 2)
    assert server.service.engine.stats.n_cancelled > cancelled


def test_a_stream_that_nobody_reads_ends(server):
    """The timeout ends it, once all buffers are full."""
    stats = server.service.engine.stats
    n_cancelled, n_finished = stats.n_cancelled, stats.n_finished
    server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = begin(server, ENDLESS | {"stream": True, "n": 3}, SO_RCVBUF=4096)
    wait_for(lambda: stats.n_cancelled >= n_cancelled + 3, what=lambda: (stats, server.service.engine.slots()))
    assert stats.n_finished == n_finished
    connection.close()


def test_events_that_nobody_reads_are_bounded(server, monkeypatch):
    """An answer that runs far ahead of a slow connection ends."""
    monkeypatch.setattr("pydsa.server.service.MOST_EVENTS", 20)
    monkeypatch.setattr("pydsa.server.protocol.Connection.takes_parts", False)
    monkeypatch.setattr("pydsa.server.openai_forms.Frame.sse", lambda *args, **more: time.sleep(0.02) or "")
    stats = server.service.engine.stats
    n_cancelled = stats.n_cancelled
    connection = begin(server, ENDLESS | {"stream": True})
    wait_for(lambda: stats.n_cancelled == n_cancelled + 1)
    connection.close()


def test_tokens_are_written_at_once_or_through_asgi(server, monkeypatch):
    """A client sees no difference; a fault is told in the stream."""
    def choices():
        return [chunk.get("choices") for chunk in events(call(server, "POST", TEXT, ENDLESS | {
            "max_tokens": 30, "temperature": 0, "stream": True})[2])]
    written, write = [], Connection.write_part
    monkeypatch.setattr(Connection, "write_part", lambda self, data: (written.append(data), write(self, data)))
    at_once, n = choices(), len(written)
    with monkeypatch.context() as patched:
        patched.setattr(Connection, "takes_parts", False)
        assert choices() == at_once and len(written) == n > 0
    monkeypatch.setattr("pydsa.server.openai_completions.CompletionForm.written", lambda *args: 1 / 0)
    assert choices() == [None]


def test_a_full_queue(server):
    connections = [begin(server, ENDLESS) for _ in range(3)]        # two run, one waits
    wait_for(lambda: server.service.engine._n_open == 3)
    status, headers, answer = call(server, "POST", TEXT, {"prompt": "a"})
    assert status == 429 and int(headers["retry-after"]) > 0 and answer["error"]["code"] == "queue_full"
    for connection in connections:
        connection.close()
    wait_for(lambda: idle(server))


def test_more_answers_than_can_ever_wait(server):
    """Not 429, after which clients would try again and again."""
    for path, body, n in ((TEXT, {"prompt": "a", "n": 4}, 4), (TEXT, {"prompt": ["a"] * 5}, 5), (CHAT, chat(n=128), 128)):
        status, answer = post(server, path, body)
        assert status == 400 and answer["error"]["param"] == "n"
        assert f"asks for {n} answers, expected at most 3" in answer["error"]["message"]


def test_without_a_queue_one_client_is_never_refused(model):
    """Once it has its answer, there is room for its next request."""
    with serving(model, n_parallel=1, n_queue=0) as server:
        assert all(post(server, TEXT, {"prompt": "a", "max_tokens": 1})[0] == 200 for _ in range(100))


def test_an_error_in_a_stream_is_its_last_event(server, monkeypatch):
    from pydsa.errors import DamagedWeightsError

    def pick(*args, **options):
        raise DamagedWeightsError("the greatest of the logits is nan")
    monkeypatch.setattr("pydsa.sampling.Sampler.pick", pick)
    chunks = events(call(server, "POST", TEXT, {"prompt": "a", "stream": True})[2])
    assert chunks[-1]["error"]["type"] == "server_error" and "logits" in chunks[-1]["error"]["message"]
    status, answer = post(server, TEXT, {"prompt": "a"})
    assert status == 500 and "logits" in answer["error"]["message"]
    monkeypatch.undo()


def test_a_fault_of_the_program_is_no_secret_and_no_end(server, monkeypatch, capfd):
    monkeypatch.setattr("pydsa.server.openai_completions.Frame", None)
    status, answer = post(server, TEXT, {"prompt": "a", "max_tokens": 1})
    assert status == 500 and answer["error"]["type"] == "server_error" and "NoneType" not in answer["error"]["message"]
    assert "TypeError" in capfd.readouterr().err
    monkeypatch.undo()


def test_the_end_lets_answers_finish(model):
    with serving(model, timeout=20.0) as server:
        connection = begin(server, ENDLESS | {"max_tokens": 300})
        wait_for(lambda: any(slot.n_generated > 3 for slot in server.service.engine.slots()))
        server.should_exit = True
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200 and json.loads(response.read())["usage"]["completion_tokens"] == 300
        wait_for(lambda: not listens(server))
        connection.close()


def test_the_end_tells_those_who_take_too_long(model):
    with serving(model, timeout=0.5) as server:
        connections = [begin(server, ENDLESS | {"stream": stream}) for stream in (False, True)]
        wait_for(lambda: sum(slot.n_generated > 3 for slot in server.service.engine.slots()) == 2)
        server.should_exit = True
        parts = []
        for connection in connections:
            response = http.client.HTTPResponse(connection)
            response.begin()
            parts.append((response.status, response.read().decode()))
            connection.close()
    assert parts[0][0] == 503 and "server stops" in parts[0][1]
    assert "server stops" in events(parts[1][1])[-1]["error"]["message"]


def listens(server):
    try:
        socket.create_connection(address(server), timeout=1).close()
    except OSError:
        return False
    return True


def started(tmp_path, *options):
    """A process of `pydsa serve` -> (process, the lines of its log so far)."""
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen([sys.executable, "-m", "pydsa", "serve", "--port", "0", *options], stderr=log, stdin=subprocess.DEVNULL)
    return process, lambda: (tmp_path / "log").read_text().split("\n")


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_signals_end_the_command(small_model, tmp_path):
    process, log = started(tmp_path, str(small_model(**TINY)), "--device", "reference", "--kv-type", "f32")
    wait_for(lambda: any("ready" in line for line in log()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and any("stopping" in line for line in log())


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_signal_while_the_model_is_loaded(tmp_path):
    code = "import time; from pydsa.server import running, settings; running.serve(settings.Settings(port=0), lambda: time.sleep(99))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    process.stderr.readline()
    time.sleep(0.3)     # until uvicorn has set its handlers
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_second_signal_ends_at_once(small_model, tmp_path):
    process, log = started(tmp_path, str(small_model(**TINY)), "--device", "reference", "--kv-type", "f32", "-c", "16384")
    line = wait_for(lambda: next((line for line in log() if "ready" in line), None))
    body = json.dumps(ENDLESS).encode()
    with socket.create_connection(("127.0.0.1", int(line.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (TEXT.encode(), len(body)) + body)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: any("stopping" in line for line in log()))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


def test_without_the_extra_there_is_a_sentence():
    code = "import sys; sys.modules['uvicorn'] = None; from pydsa.__main__ import main; sys.argv[1:] = ['serve']; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "uvicorn" in result.stderr and "pip install 'pydsa[serve]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("options, words", [
    (["/nonexistent.gguf"], "nonexistent"), (["--host", "203.0.113.1"], "cannot listen"), (["--api-key-file", "/nonexistent"], "API keys"),
    (["--timeout", "0"], "--timeout"), (["-np", "0"], "-np")])
def test_commands_that_fail(tmp_path, options, words):
    process, log = started(tmp_path, *options)
    assert process.wait(30) == 2
    assert any(words in line for line in log()) and not any("Traceback" in line for line in log())
