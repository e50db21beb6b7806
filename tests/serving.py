"""Helpers of the server's tests: a tiny model, requests, streams, raw connections."""
import contextlib
import http.client
import json
import socket
import time

from pydsa.server.running import running
from pydsa.server.settings import Settings

# A model that the reference backend runs in a millisecond a token; nothing is compiled.
TINY = dict(n_layer=2, n_embd=32, n_head=2, n_lora_q=32, n_lora_kv=32, n_nope=32, n_rot=4, n_v=32, n_ff=32, n_expert=4, n_ff_exp=32,
            n_expert_groups=0, indexer_n_head=3, indexer_head_size=8, indexer_top_k=3, n_vocab=300, n_ctx=4096)


@contextlib.contextmanager
def serving(model=None, **settings):
    """A context with a Server on a free port; settings: fields of Settings."""
    with running(Settings(**{"port": 0, "n_parallel": 2, "timeout": 5.0} | settings), model) as server:
        yield server


def address(server):
    """The host and the port of a server."""
    return server.sockets[0].getsockname()[:2]


def call(server, method, path, body=None, **headers):
    """A request -> (status, headers, body): what its JSON stands for, or text.

    body: bytes, or a value that is sent as JSON. headers: with _ for -.
    """
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body if isinstance(body, (bytes, type(None))) else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status, response.headers, json.loads(text) if is_json else text


def post(server, path, body, **headers):
    """The (status, body) of a request with a body."""
    return call(server, "POST", path, body, **headers)[::2]


def wait_for(condition, seconds=20, what=lambda: ""):
    """What a function returns, as soon as that is true.

    what: tells more where it never is.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"it did not come {what()}"
        time.sleep(0.01)
    return value


def events(text):
    """The values of a stream, without its end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def exchange(server, data, end=False):
    """Send bytes -> all that comes back; end: close this side first."""
    with socket.create_connection(address(server), timeout=60) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                parts.append(part)
    return b"".join(parts)
