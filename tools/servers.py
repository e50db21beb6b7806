"""Servers of pydsa and llama.cpp as child processes, and a client.

    with started(pydsa_command(load), load) as server:
        stream = server.ask("Once upon a time", 64)
"""

import contextlib
import http.client
import io
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
STARTS = 300        # seconds in which a server must be ready; the first start of pydsa compiles kernels
ANSWERS = 600       # seconds in which something must come from a server that was asked
ENDS = 30           # seconds in which a server must end after SIGTERM


class Load(NamedTuple):
    """What a server shall be ready for."""
    model: str
    threads: int
    n_parallel: int         # conversations at the same time
    n_ctx: int              # tokens that each of them may have
    ended: tuple = ()       # ids of the tokens that end an answer, which shall not come
    repack: bool = False    # whether llama.cpp may repack weights


class Stream(NamedTuple):
    """An answer as it came: seconds of time.perf_counter(), and tokens."""
    start: float
    times: list             # when each piece of its text came
    end: float
    n_prompt: int | None    # None: the server does not tell
    n_tokens: int


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.create_server((HOST, 0)) as one:
        return one.getsockname()[1]


def pydsa_command(load, *more):
    """How pydsa's server is started, but for its port."""
    return [sys.executable, "-m", "pydsa", "serve", str(load.model), "--device", "cpu", "-t", str(load.threads), "-tb", str(load.threads),
            "-np", str(load.n_parallel), "-c", str(load.n_ctx), *more]


def llama_server_command(load, path):
    """How llama.cpp's own server is started; path: the program llama-server."""
    return [str(path), "-m", str(load.model), "-t", str(load.threads), "-tb", str(load.threads), "-np", str(load.n_parallel),
            "-c", str(load.n_parallel * load.n_ctx), "-fa", "on", "-ngl", "0", "--no-webui", *([] if load.repack else ["--no-repack"])]


def llama_cpp_python_command(load, path):
    """How llama-cpp-python's server is started; path: the Python that has it.

    It answers one request after the other. By default a second one would end the first.
    """
    return [str(path), "-m", "llama_cpp.server", "--model", str(load.model), "--n_threads", str(load.threads),
            "--n_threads_batch", str(load.threads), "--n_ctx", str(load.n_ctx), "--flash_attn", "true", "--interrupt_requests", "false"]


PEERS = {"llama-server": llama_server_command, "llama-cpp-python": llama_cpp_python_command}


class Client:
    """Asks a server that listens at a port of this machine.

    pid: of its process; log(): what that has written; code: with what it ended; all None if it was not started by started().
    """

    def __init__(self, port, load):
        self.port, self.load = port, load
        self.pid, self.log, self.code = None, None, None

    def get(self, path):
        """The status of a GET; 0 while nobody listens."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWERS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def ready(self):
        """Whether the model is loaded; not all servers have /health."""
        status = self.get("/health")
        return status == 200 or status == 404 and self.get("/v1/models") == 200

    def ask(self, prompt, n):
        """Continue a text by n tokens -> a Stream; see ask_all()."""
        return self.ask_all([prompt], n)[0]

    def ask_all(self, prompts, n):
        """Continue some texts at once, each by n tokens -> their Streams.

        One thread only notes bytes as they come, and reads them later, so that this process takes little time from the server. Raises
        RuntimeError if an answer is an error, or no count of its tokens came.
        """
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            asked = [(stack.enter_context(socket.create_connection((HOST, self.port), ANSWERS)), []) for _ in prompts]
            try:
                starts = []
                for (connection, parts), prompt in zip(asked, prompts):
                    starts.append(time.perf_counter())
                    connection.sendall(self._request(prompt, n))
                    selector.register(connection, selectors.EVENT_READ, parts)
                while selector.get_map():
                    _note(selector)
            except OSError as error:
                raise broken_off(error) from None
        return [read_stream(start, body_parts(parts), n) for start, (_, parts) in zip(starts, asked)]

    def _request(self, prompt, n):
        """The bytes of a request; the server closes the connection after it."""
        body = json.dumps({"prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
                           "logit_bias": {str(token): -100 for token in self.load.ended}}).encode()
        return (f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{self.port}\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body


def _note(selector):
    """Wait for bytes, and note them with their time; forget what has ended."""
    ready = selector.select(ANSWERS)
    if not ready:
        raise TimeoutError(f"nothing came for {ANSWERS} s")
    for key, _ in ready:
        data = key.fileobj.recv(1 << 16)
        if data:
            key.data.append((time.perf_counter(), data))
        else:
            selector.unregister(key.fileobj)


def broken_off(error):
    """The RuntimeError of a connection that ended too early."""
    return RuntimeError(f"the server broke off ({type(error).__name__}: {error})")


def body_parts(parts):
    """What a response has beside its head and its frame: (seconds, bytes).

    parts: all that came, (seconds, bytes). Raises RuntimeError for a status other than 200, and if the end is missing.
    """
    whole = io.BytesIO(b"".join(data for _, data in parts))
    status, headers = whole.readline().split(None, 2), http.client.parse_headers(whole)
    if len(status) < 2:
        raise broken_off(EOFError("there is no response"))
    head, found = whole.tell(), []
    for when, data in parts:
        skipped = min(head, len(data))
        head -= skipped
        if data[skipped:]:
            found.append((when, data[skipped:]))
    if headers.get("Transfer-Encoding", "").lower() == "chunked":
        found = list(_without_sizes(found))
    if status[1] != b"200":
        raise RuntimeError(f"the server answered {status[1].decode()}: {b''.join(data for _, data in found).decode(errors='replace'):.300}")
    return found


def _without_sizes(parts):
    """Yield the chunks of a body in chunks, each when its last byte has come."""
    rest = b""
    for when, data in parts:
        rest += data
        while (size := rest.partition(b"\r\n"))[1] and len(size[2]) >= int(size[0], 16) + 2:
            n = int(size[0], 16)
            if n == 0:
                return
            yield when, size[2][:n]
            rest = size[2][n + 2:]
    raise broken_off(EOFError("the last chunk is missing"))


def read_stream(start, parts, n):
    """The Stream in parts of a response: (seconds, bytes); n: tokens asked for."""
    times, usage, reason = [], {}, None
    for when, event in events(parts):
        if "error" in event:
            raise RuntimeError(f"the server ended the answer: {json.dumps(event['error']):.300}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            if choice.get("text"):
                times.append(when)
            reason = choice.get("finish_reason") or reason
    counted = usage.get("completion_tokens", n if reason == "length" else None)
    if counted is None:
        raise RuntimeError(f"an answer ended ({reason}) before it had {n} tokens, and the server does not tell how many it had")
    return Stream(start, times, parts[-1][0] if parts else start, usage.get("prompt_tokens"), counted)


def events(parts):
    """Yield (seconds, value) for each event of a stream of server-sent events."""
    rest = b""
    for when, data in parts:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            text = line.strip()
            if text.startswith(b"data:") and text != b"data: [DONE]":
                yield when, json.loads(text[5:])


@contextlib.contextmanager
def started(command, load):
    """A context with a server's process, and a Client of it.

    It begins when the server is ready. Raises RuntimeError, with the last line that the server wrote, if it ends before, or is not ready in
    time.
    """
    client, environment = Client(free_port(), load), dict(os.environ)
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen([*command, "--port", str(client.port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        client.pid, client.log = child.pid, lambda: _text(log)
        try:
            end = time.monotonic() + STARTS
            while not client.ready():
                if child.poll() is not None or time.monotonic() > end:
                    state = "is not ready" if child.returncode is None else f"ended with {child.returncode}"
                    raise RuntimeError(f"{Path(command[0]).name} {state}; {_last_line(log)}")
                time.sleep(0.1)
            yield client
        finally:
            child.terminate()
            try:
                client.code = child.wait(ENDS)
            except subprocess.TimeoutExpired:
                child.kill()
                client.code = child.wait()


def _text(log):
    """All that is in a file, to whose end a process writes."""
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")


def _last_line(log):
    lines = [line.strip() for line in _text(log).split("\n") if line.strip()]
    return f"it wrote: {lines[-1]:.300}" if lines else "it wrote nothing"
