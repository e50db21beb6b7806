"""Stages of small models for tests: workers in threads of this process, or in processes of their own, and launchers of both.

As a program it is the process of one stage: python tests/stage_processes.py MODEL OPTIONS FIRST STOP WIRE BEAT
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pydsa.errors import StageError  # noqa: E402
from pydsa.session import Session  # noqa: E402
from pydsa.setup import Setup  # noqa: E402
from pydsa.stages import worker as workers  # noqa: E402
from pydsa.stages.stage import Stage  # noqa: E402
from pydsa.stages.wire import Limits  # noqa: E402

OPTIONS = dict(device="reference", n_ctx=64, n_ubatch=8)


def session(pipeline):
    """A new session on a pipeline."""
    return Session(pipeline, pipeline.setup, pipeline.setup.tokenizer)


class Launcher:
    """Starts workers in threads of this process.

    stages: ranges of layers (first, stop). broken: stages that cannot be started again. head: the index of the stage with the head.
    """

    def __init__(self, path, stages, wire="f32", broken=(), head=0, **options):
        self.path, self.stages, self.wire, self.options = path, stages, wire, OPTIONS | options
        self.names = [f"stage {i + 1} of {len(stages)} (layers {first}-{stop - 1}, node 127.0.0.1)"
                      for i, (first, stop) in enumerate(stages)]
        self.workers, self.broken, self.n_starts, self.closed = {}, broken, [0] * len(stages), False
        self.head = head

    @property
    def setup(self):
        """The Setup of the whole model."""
        return Setup(self.path, **self.options)

    def start(self, i):
        """Start the worker of stage i."""
        self.n_starts[i] += 1
        if i in self.broken and self.n_starts[i] > 1:
            raise StageError(f"{self.names[i]}: the file is not there any more.")
        self.workers[i] = self.made(i)

    def made(self, i):
        """A worker."""
        setup = Setup(self.path, layers=self.stages[i], head=i == self.head, **self.options)
        return workers.Worker(Stage(setup), Limits.of(setup), wire=self.wire)

    def address(self, i):
        """Where a worker listens."""
        return self.workers[i].address

    def join(self, i, next_address, first_address, key, epoch):
        """Let a worker take its place."""
        self.workers[i].join(next_address, first_address, key, epoch)

    def alive(self, i):
        """Whether a worker is there."""
        return i in self.workers and not self.workers[i].wait(0)

    def kill(self, i):
        """End a worker."""
        if i in self.workers:
            self.workers[i].close()

    def close(self):
        """End all."""
        for i in list(self.workers):
            self.kill(i)
        self.closed = True


class Process:
    """A stage in a process, with the methods of a worker for launchers."""

    def __init__(self, path, options, layers, wire, beat):
        command = [sys.executable, __file__, str(path), json.dumps(options), *map(str, layers), wire, str(beat)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.address = tuple(json.loads(self.process.stdout.readline()))

    def join(self, next_address, first_address, key, epoch):
        """Let it take its place."""
        print(json.dumps([next_address, first_address, key.hex(), epoch]), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "joined\n"

    def wait(self, timeout):
        """Whether it has ended."""
        return self.process.poll() is not None

    def close(self):
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Processes(Launcher):
    """Starts workers in processes. beat: seconds between their heartbeats."""

    def __init__(self, *args, beat=0.1, **options):
        super().__init__(*args, **options)
        self.beat = beat

    def made(self, i):
        """A worker in a process."""
        return Process(self.path, self.options | {"head": i == self.head}, self.stages[i], self.wire, self.beat)

    def signal(self, i, number):
        """Send a signal to a stage."""
        os.kill(self.workers[i].process.pid, number)


def main(path, options, first, stop, wire, beat):
    """Run one stage, until stdin is at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers.BEAT = float(beat)
    setup = Setup(path, layers=(int(first), int(stop)), **json.loads(options))
    worker = workers.Worker(Stage(setup), Limits.of(setup), wire=wire)
    print(json.dumps(worker.address), flush=True)
    for line in sys.stdin:
        next_address, first_address, key, epoch = json.loads(line)
        worker.join(next_address, first_address, bytes.fromhex(key), epoch)
        print("joined", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
