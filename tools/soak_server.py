"""Ask a server thousands of mixed requests: nothing may be lost.

    python tools/soak_server.py                     # 10,000 requests, a tiny model on the reference
    python tools/soak_server.py --model model.gguf --device cpu --requests 1000

Chats, completions, streams, several answers, errors, and clients that go away at random. Every answer must be the one that it has alone,
the resident memory must stop growing after the first tenth, and at the end all slots must be idle. Ends with exit code 1 if not.
"""
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pydsa  # noqa: E402
from pydsa.server.running import running  # noqa: E402
from pydsa.server.settings import Settings  # noqa: E402
from tools.make_model import ModelSpec, make_model  # noqa: E402

TINY = ModelSpec(n_layer=2, n_embd=32, n_head=2, n_lora_q=32, n_lora_kv=32, n_nope=32, n_rot=4, n_v=32, n_ff=32, n_expert=4, n_ff_exp=32,
                 n_expert_groups=0, indexer_n_head=3, indexer_head_size=8, indexer_top_k=3, n_vocab=300, n_ctx=1024)
SYSTEMS = ("You are a kettle.", "Answer in one word, and then explain it in a long sentence about kettles and autumn.", "")
GROWTH = 48 << 20       # bytes of memory that may come after the first tenth
LEAVE = 0.2             # the share of clients that go away


def kinds(seed):
    """The request with this seed: its path and body."""
    draw = random.Random(seed)
    body = {"seed": seed, "max_tokens": draw.randint(1, 24), "temperature": draw.choice([0, 0.7, 1.3]), "stream": draw.random() < 0.5}
    if draw.random() < 0.2:
        body["n"] = 2
    if draw.random() < 0.2:
        body["stop"] = ["e", "\n"]
    if draw.random() < 0.5:
        return "/v1/completions", body | {"prompt": "Once upon a time " * draw.randint(1, 8)}
    messages = [{"role": "system", "content": draw.choice(SYSTEMS)}, {"role": "user", "content": f"Question {draw.randint(1, 9)}?"}]
    return "/v1/chat/completions", body | {"messages": messages}


def ask(address, path, body, leave=None):
    """Send a request -> (status, the texts of its choices).

    leave: seconds after which the client goes away; the result is None then.
    """
    connection = http.client.HTTPConnection(*address, timeout=120)
    try:
        connection.request("POST", path, json.dumps(body))
        if leave is not None:
            time.sleep(leave)
            return None
        response = connection.getresponse()
        return response.status, read_texts(response.status, response.read().decode(), body)
    finally:
        connection.close()


def read_texts(status, text, body):
    """The texts of the choices of a response, whole or streamed."""
    if status != 200:
        return text
    if not body["stream"]:
        chunks = [json.loads(text)]
    else:
        chunks = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    texts = [""] * body.get("n", 1)
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
    return texts


class Soak:
    """The clients of one run, and what they found."""

    def __init__(self, server, n_requests, n_seeds, n_workers):
        self.address, self.engine = server.sockets[0].getsockname()[:2], server.service.engine
        self.numbers, self.lock = iter(range(n_requests)), threading.Lock()
        self.n_requests, self.n_seeds, self.n_workers = n_requests, n_seeds, n_workers
        self.counts, self.wrong, self.memory = {}, [], []
        self.alone = {seed: ask(self.address, *kinds(seed)) for seed in range(n_seeds)}

    def run(self):
        """Ask all, with several threads."""
        workers = [threading.Thread(target=self.work) for _ in range(self.n_workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def work(self):
        """Ask until no request is left."""
        while (number := self.next()) is not None:
            draw = random.Random(-number)
            path, body = kinds(number % self.n_seeds)
            if draw.random() < LEAVE:
                result, kind = ask(self.address, path, body, leave=draw.random() * 0.05), "left"
            elif draw.random() < 0.05:
                result, kind = ask(self.address, path, body | {"temperature": "hot"}), "refused"
                self.check(result[0] == 400, number, result)
            else:
                result = ask(self.address, path, body)
                kind = "busy" if result[0] == 429 else "answered"
                self.check(kind == "busy" or result == self.alone[number % self.n_seeds], number, result)
            with self.lock:
                self.counts[kind] = self.counts.get(kind, 0) + 1

    def next(self):
        """The number of the next request, or None."""
        with self.lock:
            number = next(self.numbers, None)
            if number is not None and number % max(1, self.n_requests // 20) == 0:
                self.memory.append(psutil.Process().memory_info().rss)
            return number

    def check(self, right, number, result):
        """Keep what is not as it should be."""
        if not right:
            with self.lock:
                self.wrong.append((number, kinds(number % self.n_seeds), result, self.alone[number % self.n_seeds]))

    def faults(self):
        """Sentences on what went wrong."""
        if self.wrong:
            yield f"{len(self.wrong)} answers are wrong, the first of them: {self.wrong[0]}"
        end = time.monotonic() + 10
        while (busy := [slot for slot in self.engine.slots() if slot.state != "idle"]) and time.monotonic() < end:
            time.sleep(0.05)
        if busy:
            yield f"slots are lost: {busy}"
        early = self.memory[:max(1, len(self.memory) // 10) + 1]
        growth = self.memory[-1] - max(early)
        if growth > GROWTH:
            yield f"memory grew by {growth / 2**20:.0f} MiB after the first tenth"


@click.command()
@click.option("--model", help="A GGUF file.  [default: a tiny random model]")
@click.option("--device", default="reference", show_default=True)
@click.option("--requests", "n_requests", default=10_000, show_default=True)
@click.option("--seeds", "n_seeds", default=200, show_default=True, help="Different requests.")
@click.option("--workers", "n_workers", default=8, show_default=True, help="Clients at the same time.")
@click.option("--parallel", "n_parallel", default=4, show_default=True)
@click.option("--cache-ram", default=8, show_default=True, help="MiB.")
def main(model, device, n_requests, n_seeds, n_workers, n_parallel, cache_ram):
    """Ask a server thousands of mixed requests."""
    with tempfile.TemporaryDirectory() as folder:
        path = model or make_model(Path(folder, "model.gguf"), TINY)
        settings = Settings(port=0, n_parallel=n_parallel, n_queue=6, cache_bytes=cache_ram << 20, slot_folder=folder)
        with running(settings, pydsa.load(path, device=device, kv_type="f32", n_ctx=1024)) as server:
            start = time.monotonic()
            soak = Soak(server, n_requests, n_seeds, n_workers)
            soak.run()
            faults = list(soak.faults())
            click.echo(f"{n_requests} requests in {time.monotonic() - start:.0f} s: {soak.counts}; {server.service.engine.stats}")
            click.echo("memory, MiB: " + " ".join(f"{n / 2**20:.0f}" for n in soak.memory))
    for fault in faults:
        click.echo(fault)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
