"""Thousands of mixed requests to pydsa's server, and clients that leave.

    python tools/serve_soak.py --requests 10000 --reproducible
    python tools/serve_soak.py model.gguf --requests 2000 --seed 7
    python tools/serve_soak.py --seed 7 --only 812

First a server with one slot and no cache answers each request of a catalogue alone. Then another one, which keeps caches and has several
slots, gets requests drawn from it, whole and as streams, beside wrong ones, bytes that are no HTTP, and clients that leave before, in and
after the first token. Each complete answer must equal the one given alone, each mistake must get its status and a sentence, and at the end
no slot may be lost, no file be open, and the memory be what it was after the first fifth. The request that failed is named by its number,
with which --only sends it again. Without --reproducible an answer may differ by rounding: then that is a failure too.
"""

import contextlib
import json
import os
import random
import re
import secrets
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

import click

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import soak_requests as asked  # noqa: E402
from tools.servers import HOST, Load, events, pydsa_command, started  # noqa: E402

ANSWERS = 120       # seconds in which a request must have its answer
MOST_TOLD = 20      # failures that are told in full
GROWTH = 8 << 20, 0.02      # bytes, and share of the memory, by which it may grow after the first fifth
ENOUGH = 1000       # requests, from which on memory is compared
PARTS = 5           # of a run: memory is compared between the second and the last


class Wrong(Exception):
    """Something came that should not."""


class Worker:
    """A client that sends one request after the other."""

    def __init__(self, soak):
        self._soak, self._kept = soak, None

    def exchange(self, method, path, body=None, headers=None, keep=False):
        """A request -> (status, headers, body); keep: by a connection that stays open."""
        for again in (True, False):
            reused = keep and self._kept is not None
            connection = self._kept if reused else HTTPConnection(HOST, self._soak.port, timeout=ANSWERS)
            try:
                connection.request(method, path, body, {"Authorization": f"Bearer {asked.KEYS[0]}"} | (headers or {}))
                response = connection.getresponse()
                data = response.read()
                self._kept = connection if keep else self._kept
                return response.status, response.headers, data
            except (OSError, HTTPException) as error:
                if keep:
                    self._kept = None
                if not (reused and again):      # the server may close a connection that stayed open
                    raise Wrong(f"no response ({type(error).__name__}: {error})") from None
            finally:
                if not keep or self._kept is None:
                    connection.close()
        raise AssertionError("the second try returns or raises")

    def close(self):
        """Close the connection that stayed open."""
        if self._kept is not None:
            self._kept.close()

    def answer(self, ask, key=asked.KEYS[0], stream=False, keep=False):
        """The answer to an Ask, as soak_requests reads it.

        While the queue is full it is asked again. Raises Wrong for all but an answer.
        """
        body = ask.body | ({"stream": True} if stream else {})
        if stream and ask.path != asked.MESSAGES:
            body["stream_options"] = {"include_usage": True}
        end = time.monotonic() + ANSWERS
        while True:
            status, headers, data = self.exchange("POST", ask.path, json.dumps(body), {"Authorization": f"Bearer {key}"}, keep)
            if status != 429 or time.monotonic() > end:
                break
            self._soak.count("refused for a full queue, and asked again")
            if not headers.get("retry-after", "").isdecimal():
                raise Wrong("a 429 has no Retry-After")
            time.sleep(0.1)
        if status != 200:
            raise Wrong(f"status {status}: {message_of(data):.300}")
        try:
            if stream:
                return asked.streamed_answer(ask.path, [event for _, event in events([(0, data)])])
            return asked.whole_answer(ask.path, json.loads(data))
        except (ValueError, KeyError, IndexError) as error:
            raise Wrong(f"the answer cannot be read ({type(error).__name__}: {error}): {data.decode(errors='replace'):.300}") from None

    def leave(self, source, ask, key):
        """Send a request, or a part, read some of its answer or none, and go."""
        body = json.dumps(ask.body | {"stream": source.random() < 0.7, "max_tokens": source.choice((8, 64, 400))}).encode()
        lines = [f"POST {ask.path} HTTP/1.1", f"host: {HOST}", f"authorization: Bearer {key}", f"content-length: {len(body)}",
                 "connection: close", "", ""]
        data = "\r\n".join(lines).encode() + body
        with socket.create_connection((HOST, self._soak.port), timeout=ANSWERS) as connection, contextlib.suppress(OSError):
            kind = source.choice(("in the request", "before the first byte", "in the answer", "in the answer"))
            connection.sendall(data[:source.randrange(len(data))] if kind == "in the request" else data)
            if kind == "in the answer":
                for _ in range(source.choice((1, 2, 5, 20))):
                    if not connection.recv(400):
                        break
            else:
                time.sleep(source.choice((0, 0, 0.005, 0.05)))
            if source.random() < 0.5:       # a reset instead of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return f"went away {kind}"

    def garbage(self, data):
        """Send bytes that are no request, and close this side."""
        with socket.create_connection((HOST, self._soak.port), timeout=ANSWERS) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            response = HTTPResponse(connection)
            try:
                response.begin()
                body = response.read()
            except (OSError, HTTPException) as error:
                raise Wrong(f"no response to {data[:60]!r} ({type(error).__name__}: {error})") from None
        if why := asked.why_not_refused(response.status, 400, body):
            raise Wrong(f"{data[:60]!r}: {why}")


class Soak:
    """A run of requests.

    port: where the server listens. asks: the catalogue, and expected: its answers. counts: how many requests ended in what way. failures:
    (number, words).
    """

    def __init__(self, port, seed, asks, expected, pid=None):
        self.port, self.seed, self.asks, self.expected, self.pid = port, seed, asks, expected, pid
        self.counts, self.failures, self.memory, self.n_done = {}, [], [], 0
        self._lock, self._numbers = threading.Lock(), None

    def count(self, what):
        """Count something that happened."""
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def run(self, numbers, n_workers, tell=lambda text: None):
        """Send the requests of some numbers, n_workers at the same time."""
        self._numbers, ended = iter(numbers), threading.Event()
        threads = [threading.Thread(target=self._work, args=(tell,)) for _ in range(n_workers)]
        watch = threading.Thread(target=self._watch, args=(ended,))
        for thread in [*threads, watch]:
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        watch.join()

    def _work(self, tell):
        worker = Worker(self)
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                worker.close()
                return
            try:
                self.count(self._send(worker, number))
            except Exception as error:      # of this program too: it must not look like an answer
                words = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
                with self._lock:
                    self.failures.append((number, words))
                    first = len(self.failures) <= MOST_TOLD
                if first:
                    tell(self.told(number, words))
            with self._lock:
                self.n_done += 1
                told = self.n_done % 1000 == 0
            if told:
                tell(f"{self.n_done} requests, {len(self.failures)} failed")

    def told(self, number, words):
        """A failure as a line."""
        return f"request {number} (--seed {self.seed} --only {number}): {words}"

    def _send(self, worker, number):
        """Send the request of a number -> how it ended; raises Wrong."""
        source = random.Random(f"{self.seed} {number}")
        kind, i = source.random(), source.randrange(len(self.asks))
        key, ask = source.choice(asked.KEYS), self.asks[i]
        if kind < 0.62:
            stream = asked.can_stream(ask.path) and source.random() < 0.5
            answer = worker.answer(ask, key, stream, keep=source.random() < 0.5)
            if answer != self.expected[i]:
                raise Wrong(f"{ask}, {'as a stream' if stream else 'whole'}: {difference(answer, self.expected[i])}")
            return "answered as alone"
        if kind < 0.8:
            asks = [ask for ask in self.asks if asked.can_stream(ask.path)]
            return worker.leave(source, asks[i % len(asks)], key)
        if kind < 0.9:
            method, path, body, headers, expected = source.choice(asked.WRONG)
            status, _, data = worker.exchange(method, path, body, headers)
            if why := asked.why_not_refused(status, expected, data):
                raise Wrong(f"{method} {path} {(body or b'')[:200]!r} {headers}: {why}")
            return "refused"
        if kind < 0.94:
            worker.garbage(source.choice(asked.GARBAGE))
            return "refused as no HTTP"
        return look(worker, source, key)

    def _watch(self, ended):
        """Note the memory of the server's process, twice a second."""
        if self.pid is None:
            return
        import psutil
        process = psutil.Process(self.pid)
        while not ended.wait(0.5):
            with contextlib.suppress(psutil.Error):
                self.memory.append((self.n_done, process.memory_info().rss))


def message_of(data):
    """The sentence in the body of an error, or the body as it is."""
    try:
        return json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace")


def difference(answer, expected):
    """Where two answers differ, in words."""
    a, b = (json.dumps(value, ensure_ascii=False) for value in (answer, expected))
    at = len(os.path.commonprefix([a, b]))
    return f"it answers ...{a[max(at - 40, 0):at + 80]}, alone it answered ...{b[max(at - 40, 0):at + 80]}"


def look(worker, source, key):
    """Ask what is no answer: lists, metrics, slots that are emptied, saved or restored."""
    path = source.choice(("/health", "/v1/models", "/metrics", "/slots", "erase", "save", "restore"))
    if path.startswith("/"):
        allowed, (status, _, data) = {200}, worker.exchange("GET", path)
    else:
        body = None if path == "erase" else json.dumps({"filename": f"saved-{source.randrange(3)}"})
        allowed, (status, _, data) = {200, 400, 404}, worker.exchange("POST", f"/slots/{source.randrange(2)}?action={path}", body,
                                                                      {"Authorization": f"Bearer {key}"})
    if status not in allowed:
        raise Wrong(f"{path}: status {status}, {message_of(data):.300}")
    return "looked, or changed a slot"


def can_call(worker):
    """Whether the model can be made to call tools.

    Raises Wrong for all answers but a call, and the refusal for want of a form of calls.
    """
    try:
        worker.answer(asked.CALL)
        return True
    except Wrong as error:
        if not str(error).startswith("status 400: tool_choice asks for a call, but the model's template"):
            raise
        return False


def answers_alone(port, asks):
    """The answer to each Ask by a server with one slot, emptied before each."""
    worker, answers = Worker(Soak(port, 0, [], [])), []
    for ask in asks:
        worker.exchange("POST", "/slots/0?action=erase")
        try:
            answers.append(worker.answer(ask))
        except Wrong as error:
            raise Wrong(f"alone, {ask}: {error}") from None
        if ask.body.get("logprobs") and not all(choice["logprobs"] for choice in answers[-1]["choices"]):
            raise Wrong(f"alone, {ask}: no log-probabilities come")
    return answers


def reused(worker, prompt, key):
    """The share of a prompt's tokens that a user's cache has."""
    body = json.dumps({"prompt": prompt, "max_tokens": 1})
    status, _, data = worker.exchange("POST", asked.TEXT, body, {"Authorization": f"Bearer {key}"})
    if status != 200:
        raise Wrong(f"at the end, status {status}: {message_of(data):.300}")
    usage = json.loads(data)["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"]


def at_the_end(soak, seconds=20):
    """Yield what is wrong with a server that all clients have left, in words."""
    worker, end = Worker(soak), time.monotonic() + seconds
    while True:
        slots = json.loads(worker.exchange("GET", "/slots")[2])
        metrics = worker.exchange("GET", "/metrics")[2].decode()
        busy = [slot["id"] for slot in slots if slot["is_processing"]]
        waiting = {name: float(n) for name, n in re.findall(r"^pydsa:(requests_processing|requests_deferred) (\S+)$", metrics, re.M)}
        if not busy and waiting == {"requests_processing": 0, "requests_deferred": 0} or time.monotonic() > end:
            break
        time.sleep(0.1)
    if busy:
        yield f"slots {busy} are busy, {seconds} s after the last client left"
    if waiting != {"requests_processing": 0, "requests_deferred": 0}:
        yield f"the metrics count {waiting} when nothing runs"
    prompt = secrets.token_hex(64)      # nothing is cached that begins so
    mine, others, again = (reused(worker, prompt, key) for key in (*asked.KEYS, asked.KEYS[0]))
    if others > 0.2 or again < 0.8:
        yield (f"a new prompt is reused to {mine:.0%}, for another key to {others:.0%}, and asked again to {again:.0%}, expected little, "
               "little, and most")
    for ask, expected in list(zip(soak.asks, soak.expected))[:5]:
        try:
            if (answer := worker.answer(ask)) != expected:
                yield f"at the end, {ask}: {difference(answer, expected)}"
        except Wrong as error:
            yield f"at the end, {ask}: {error}"


def grown(memory, n):
    """(bytes after the first fifth of n requests, bytes in the last fifth).

    None if that tells nothing: in hundreds of requests caches still grow.
    """
    if n < ENOUGH:
        return None
    parts = [[size for done, size in memory if i * n <= done * PARTS < (i + 1) * n] for i in range(PARTS)]
    return (statistics.median(parts[1]), statistics.median(parts[-1])) if parts[1] and parts[-1] else None


def too_much(before, after):
    """Whether memory that should stay as it is has grown."""
    return after - before > max(GROWTH[0], GROWTH[1] * before)


def open_files(pid):
    """How many files and sockets a process has open."""
    import psutil
    return psutil.Process(pid).num_fds()


def settled(pid, n, seconds=10):
    """The open files of a process, once they are n or fewer, or in the end."""
    end = time.monotonic() + seconds
    while (now := open_files(pid)) > n and time.monotonic() < end:
        time.sleep(0.1)
    return now


def curve(memory, n, points=20):
    """The memory of a run of n requests, in MiB, at equal distances."""
    sizes = [[size for done, size in memory if i * n <= done * points < (i + 1) * n] for i in range(points)]
    return " ".join(f"{max(part) / 2**20:.0f}" if part else "-" for part in sizes)


def soak_server(server, asks, expected, numbers, seed, workers, tell):
    """Run the requests of some numbers on a server -> (Soak, problems).

    problems: what is wrong beside the failures of the Soak, in words.
    """
    soak = Soak(server.port, seed, asks, expected, server.pid)
    if len(numbers) > 1:
        soak.run(range(20), workers)        # compiles, and opens what stays open
    soak.counts.clear()
    soak.memory.clear()
    soak.n_done, n_files = 0, settled(server.pid, 0, seconds=2)
    soak.run(numbers, workers, tell)
    problems = list(at_the_end(soak))
    left = settled(server.pid, n_files + 2)
    if left > n_files + 2:
        problems.append(f"{left} files are open, {n_files} were before")
    sizes = grown(soak.memory, len(numbers))
    if sizes and too_much(*sizes):
        problems.append(f"the memory grew from {sizes[0] / 2**20:.0f} to {sizes[1] / 2**20:.0f} MiB after the first fifth")
    if "Traceback" in (log := server.log()):
        problems.append(f"the log has a traceback: {log[log.index('Traceback'):][:2000]}")
    return soak, problems


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="[MODEL]", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--requests", type=click.IntRange(1), default=10_000, help="how many  [10000]")
@click.option("--seed", type=int, default=1, help="of the catalogue and of what is drawn from it  [1]")
@click.option("--only", type=click.IntRange(0), help="send only the request of this number")
@click.option("--catalogue", type=click.IntRange(1), default=300, help="different requests that have an answer  [300]")
@click.option("--workers", type=click.IntRange(1), default=12, help="clients at the same time  [12]")
@click.option("-np", "--parallel", type=click.IntRange(1), default=4, help="slots of the server  [4]")
@click.option("-c", "--ctx-size", type=click.IntRange(2048), default=2048, help="tokens that each slot holds  [2048]")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads of the server  [physical cores]")
@click.option("--device", default="cpu", help="where the model runs  [cpu]")
@click.option("--reproducible", is_flag=True, help="start the servers with --reproducible")
def main(model_path, requests, seed, only, catalogue, workers, parallel, ctx_size, threads, device, reproducible):
    import pydsa
    from pydsa.machine.cores import physical_cores

    def tell(text):
        click.echo(text, err=True)
    load = Load(os.path.abspath(model_path or pydsa.DEMO), threads or physical_cores(), 1, ctx_size)
    options = [option for key in asked.KEYS for option in ("--api-key", key)] + ["--device", device]
    options += ["--reproducible"] if reproducible else []
    try:
        with started(pydsa_command(load, *options, "--cache-ram", "0"), load) as alone:
            calls = can_call(Worker(Soak(alone.port, seed, [], [])))
            asks = asked.Catalogue(seed, catalogue, calls, ctx_size // 8).asks
            expected = answers_alone(alone.port, asks)
            tell(f"{len(asks)} answers alone, {'with' if calls else 'without'} calls of tools")
        options += ["--cache-ram", "32", "--queue", str(max(workers - parallel - 1, 0)), "--timeout", "20"]
        numbers = range(requests) if only is None else [only]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            with started(pydsa_command(load._replace(n_parallel=parallel), *options, "--slot-save-path", folder), load) as server:
                soak, problems = soak_server(server, asks, expected, numbers, seed, workers, tell)
        if server.code != 0:
            problems.append(f"the server ended with {server.code} at SIGTERM, expected 0")
    except (pydsa.PydsaError, RuntimeError, Wrong) as error:
        fail(str(error))
    click.echo("\n".join(report(soak, problems, len(numbers), time.monotonic() - start)))
    sys.exit(1 if problems or soak.failures else 0)


def report(soak, problems, n, seconds):
    """The lines that a run ends with."""
    yield f"{n} requests in {seconds:.0f} s: " + "; ".join(f"{count} {what}" for what, count in sorted(soak.counts.items()))
    yield f"memory in MiB, over the run: {curve(soak.memory, n)}"
    yield from problems
    if soak.failures:
        yield f"{len(soak.failures)} failed, of which the first is {soak.told(*soak.failures[0])}"
    yield "failed" if problems or soak.failures else "all as expected"


if __name__ == "__main__":
    main()
