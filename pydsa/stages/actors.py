"""What a Ray actor does for a stage: tell what it is, open its part, load it.

Ray's processes import only this module until a file is opened. Methods that can meet a user's mistake return an Answer, a dict: nothing of
pydsa's classes is pickled, so that a node with another version can tell that it has one.
"""
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from pydsa.errors import PydsaError, StageError

COMPARED = ("pydsa", "sources", "Python", "numba", "llvmlite", "numpy")        # of identity(): what must be the same on all nodes
READ = 1 << 29      # bytes that are read to measure the memory's bandwidth: beyond most caches
PASSES = 5          # the shortest counts


@functools.cache
def identity():
    """What this process runs, {name: text}: versions, and a hash of pydsa's sources."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    found = {"pydsa": sys.modules["pydsa"].__version__, "sources": digest.hexdigest()[:12], "Python": platform.python_version()}
    for name in COMPARED[len(found):]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def read_bandwidth(n_threads, n_bytes=READ):
    """Bytes a second that threads read of this machine's memory, about.

    It takes a second or less, and at most a quarter of the free memory.
    """
    import numpy as np
    from pydsa.machine import limits
    n = max(1, min(n_bytes, limits.available().n_bytes // 4) // (8 * n_threads))
    parts = [None] * n_threads

    def make(i):        # pages are on the node of the machine where they are first written
        parts[i] = np.ones(n, np.uint64)

    def seconds(work):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start
    seconds(make)
    return 8 * n * n_threads / min(seconds(lambda i: np.bitwise_or.reduce(parts[i])) for _ in range(PASSES))


def answered(work):
    """An Answer of work(): {"value"} or {"error", "text"}, and {"warnings"}.

    error: the name of a PydsaError's class. Other exceptions are faults of pydsa, and raised.
    """
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        try:
            answer = {"value": work()}
        except PydsaError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except MemoryError:
            answer = {"error": "OutOfMemoryError", "text": "the system refuses the memory (ulimit -v, or vm.overcommit_memory)"}
    return answer | {"warnings": [str(warning.message) for warning in met if issubclass(warning.category, UserWarning)]}


class StageActor:
    """The process of one stage, or of one after another.

    Its methods may run at the same time, each in a thread.
    """

    def __init__(self):
        self._setup = self._worker = None
        self._progress = 0, 0, ""

    def describe(self):
        """What runs here, {"pid", "identity", "cores", "free"}.

        cores: physical ones that this process may use. free: bytes of memory, and in words what limits them.
        """
        from pydsa.machine import limits
        from pydsa.machine.cores import physical_cores
        return {"pid": os.getpid(), "identity": identity(), "cores": physical_cores(), "free": tuple(limits.available())}

    def measure(self, gpus, share):
        """Measure the node -> an Answer of (bytes a second, bytes free).

        They are those of the memory, and of the GPUs if these may be used: of `share` bytes of weights, what fits is read there.
        """
        return answered(lambda: _measured(gpus, share))

    def look(self, path):
        """What this node has of a file -> an Answer of gguf.parts.described()."""
        def work():
            from pydsa.gguf.parts import described
            return described(path)
        return answered(work)

    def open(self, path, settings, layers):
        """Open a file -> an Answer of (fingerprint, lines of a plan, costs).

        The plan is that of the devices of this node, where there is a choice. costs: its devices.FormCosts, as a tuple. settings: those of
        fitting.fitted(). layers: (first, stop). Nothing is read of the weights but what the fingerprint has of them.
        """
        self.leave()

        def work():
            from pydsa.backends.devices import backend_of
            from pydsa.fitting import fitted
            from pydsa.words import plan_in_words
            self._setup = setup = fitted(path, **settings, layers=tuple(layers))
            backends = [backend_of(name) for name in setup.placement.devices]     # here: stages are opened at once, and loaded in turn
            lines = plan_in_words(setup.plan) if setup.plan is not None else []
            return setup.fingerprint, lines, tuple(backends[0].form_costs(setup.kv_type))
        return answered(work)

    def load(self, threads, threads_batch, wire, host, limits):
        """Load the part that was opened -> an Answer of (host, port).

        There the stage listens, once it has joined. limits: the fields of wire.Limits.
        """
        def work():
            from pydsa.stages.stage import Stage
            from pydsa.stages.wire import Limits
            from pydsa.stages.worker import Worker
            setup = self._setup
            stage = Stage(setup, threads, threads_batch, self._note)
            worker = Worker(stage, Limits(*limits), host, wire, orphaned=False)     # Ray ends what has no driver any more
            if self._setup is not setup:
                worker.close()
                raise StageError("it was given back while it was loaded.")
            self._worker = worker
            return tuple(worker.address)
        return answered(work)

    def _note(self, done, total, name):
        self._progress = done, total, name

    def progress(self):
        """How far load() is: (done, total, name of what is done)."""
        return self._progress

    def join(self, next_address, first_address, key, epoch):
        """Take a place in the pipeline, as worker.Worker.join says."""
        return answered(lambda: self._worker.join(next_address, first_address, key, epoch))

    def leave(self):
        """Give the part back, for another file."""
        worker, self._worker, self._setup = self._worker, None, None
        self._progress = 0, 0, ""
        if worker is not None:
            worker.close()
        gc.collect()        # the weights that were copied, and caches


def _measured(gpus, share):
    """StageActor.measure()."""
    from pydsa.backends.devices import backend_of, usable_gpus
    from pydsa.machine import limits
    from pydsa.machine.cores import physical_cores
    rate, free = read_bandwidth(physical_cores()), limits.available().n_bytes
    found = usable_gpus(asked_for=False) if gpus else {}
    if not found:
        return rate, free
    there = sum(gpu.free for gpu in found.values())
    rates = []
    for name in found:
        with contextlib.suppress(PydsaError):
            ceilings = backend_of(name).measure_ceilings(1)
            rates += [ceilings.bandwidth] if ceilings else []
    on_gpus = min(there, share) if rates else 0
    return share / (on_gpus / min(rates, default=rate) + (share - on_gpus) / rate), free + there


def kill(pid):
    """End a process of this node at once.

    One that is stopped takes no request of Ray's.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
