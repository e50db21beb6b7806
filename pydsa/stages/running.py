"""Bring a model up in stages: nodes, division, comparisons, loading.

Nothing is loaded before all stages have been compared: their software, and the fingerprint of the file on their nodes.
"""
import collections
import os
import threading
import warnings
import weakref

from pydsa.backends.devices import AUTO as ANY_DEVICE
from pydsa.backends.devices import HOST, FormCosts, check_devices, device_of
from pydsa.errors import OutOfMemoryError, StageError
from pydsa.executor.streaming import ASSUMED
from pydsa.gguf.parts import described, is_complete, layers_here, merged
from pydsa.machine.cores import MOST_THREADS
from pydsa.model import Model
from pydsa.options import choose, counts
from pydsa.setup import Setup
from pydsa.stages.cluster import STARTING, cluster, compare
from pydsa.stages.division import AUTO, Node, Parts, check, check_number, divide, nowhere, parse
from pydsa.stages.pipeline import Pipeline
from pydsa.stages.saves import made
from pydsa.stages.times import CHUNK
from pydsa.stages.wire import WIRES, Limits
from pydsa.words import size

POLL = 0.2              # seconds between two looks at the progress of loading
OF_FITTING = ("device", "fit_margin", "n_sessions")     # options that hold on each node, and not for the whole model
OF_PLACES = ("tensor_split", "cpu_moe", "n_cpu_moe", "override_tensor", "n_gpu_layers", "stream_from", "numa", "mlock")


class Asked:
    """What is asked for: options of load(), checked as far as they can be.

    stages: as for division.parse(), None: auto; ray: a cluster's address, None: a Ray of this program's own. wire: one of wire.WIRES.
    settings: those of fitting.fitted(); an n_ctx of 0 is the model's own. Raises PydsaError for what is not valid.
    """

    def __init__(self, path, stages, ray, wire, threads, threads_batch, settings):
        self.path, self.ray, self.wire = os.path.abspath(os.path.expanduser(path)), ray, choose("wire", wire, WIRES)
        self.stages = AUTO if stages is None else parse(stages)
        self.threads, self.threads_batch = counts(MOST_THREADS, threads=threads, threads_batch=threads_batch)
        if ray is None and self.stages == AUTO:
            raise StageError("stages is 'auto', which divides a model over the nodes of a cluster: give its address (--ray), or a number "
                             "of stages on this machine.")
        n_ubatch, = counts(2**31 - 1, n_ubatch=settings.get("n_ubatch", CHUNK))
        self.settings = settings | {"n_ubatch": min(n_ubatch or CHUNK, CHUNK)}
        self.own_context = self.settings.get("n_ctx") == 0

    def whole(self, absent=None):
        """The Setup of the whole model, for the driver.

        It has no weights, and so no device but one whose numbers are those of the stages. absent: as for Setup.
        """
        if self.own_context:
            self.settings["n_ctx"] = self._whole(absent, n_ctx=1).config.n_ctx_train
        return self._whole(absent)

    def _whole(self, absent, **others):
        settings = {name: value for name, value in self.settings.items() if name not in (*OF_FITTING, *OF_PLACES)}
        device = HOST if self.may_use_gpus else self.settings["device"]
        return Setup(self.path, **settings | {"absent": absent, "device": device} | others)

    @property
    def may_use_gpus(self):
        """Whether stages may be on devices with memory of their own."""
        device = self.settings.get("device", ANY_DEVICE)
        if isinstance(device, str) and device.strip().lower() == ANY_DEVICE:
            return True
        return any(device_of(name).reserved for name in check_devices(device))


class Launcher:
    """Starts the stages of a model as Ray actors, and ends them.

    cluster: a cluster.Cluster. asked: an Asked. setup: of the whole model, which divide() needs. stages: the Layers of each stage, once
    divide() has chosen them. head: the index of the one with the head: the first, or the last where no node has the parts of the file for
    that. names: how errors name the stages.
    """

    def __init__(self, cluster, asked):
        self._cluster, self._asked, self.setup = cluster, asked, None
        nodes, wanted = cluster.nodes(), asked.stages
        n = len(nodes) if wanted == AUTO else wanted if isinstance(wanted, int) else len(wanted)
        self._nodes = [nodes[i * min(n, len(nodes)) // n] for i in range(n)]     # neighbours share a node where there are too few
        self.stages, self.head = wanted if isinstance(wanted, tuple) else (None,) * n, 0
        self._parts, self._files = None, {}     # what gguf.parts.merged() and described() tell; {id of a node: the latter}
        self._processes, self._found, self._addresses = [None] * n, [None] * n, [None] * n
        self._lock, self._closing, self._started, self.closed = threading.Lock(), threading.Lock(), set(), False
        self.pipeline = None
        cluster.launchers.add(self)

    @property
    def names(self):
        """The stages in words: "stage 2 of 3 (layers 21-40, node 10.0.0.2)"."""
        return [self._name(i) for i in range(len(self.stages))]

    def _name(self, i):
        layers = f"{self.stages[i].words}, " if self.stages[i] is not None else ""
        return f"stage {i + 1} of {len(self.stages)} ({layers}node {self._nodes[i].name})"

    def begin(self):
        """Start a process for each stage, and compare their software.

        Raises StageError, which says what differs, or which one did not start.
        """
        for i, node in enumerate(self._nodes):
            self._processes[i] = self._cluster.take(node, self._name(i))
        for i in range(len(self._nodes)):
            self._compare(i)

    def _compare(self, i):
        self._found[i] = self._processes[i].description()
        compare(self._processes[i], self._found[i])

    def compare_files(self, here):
        """Compare what the nodes have of the file -> what they have together.

        here: what gguf.parts.described() tells of this machine. None: each node has all of it. Raises GGUFError for files that differ, and
        for parts that are on no node.
        """
        self._files = {node.id: here for node in self._nodes if node.here}
        begun = {node.id: (i, self._processes[i].begin("look", self._asked.path)) for i, node in enumerate(self._nodes) if not node.here}
        for id, (i, reference) in begun.items():
            self._files[id] = self._processes[i].value(self._processes[i].patiently(reference))
        names = {node.id: f"node {node.name}" for node in self._nodes}
        parts = merged({"this machine": here} | {names[id]: found for id, found in self._files.items() if found is not here})
        self._parts = None if is_complete(here) and all(map(is_complete, self._files.values())) else parts
        return self._parts

    def _layers_of(self, node):
        """The layers whose tensors are on a node; None: all."""
        if self._parts is None:
            return None
        n_layer = self.setup.config.n_layer
        return frozenset(layers_here(self._files[node.id], self._parts, n_layer, n_layer - 1 if self.head else 0))

    def _order_nodes(self):
        """Put the nodes in the order of the layers that they have.

        If none has the first layer and the head, this is with the last.
        """
        if not any(0 in self._layers_of(node) for node in self._nodes):
            self.head = len(self._nodes) - 1
        order = sorted(range(len(self._nodes)), key=lambda i: sorted(self._layers_of(self._nodes[i])))
        for each in (self._nodes, self._processes, self._found):
            each[:] = [each[i] for i in order]

    def divide(self):
        """Choose the layers of the stages, if they are not asked for -> lines.

        The lines say where each stage is, and what it takes there. Raises OutOfMemoryError if the model does not fit, PydsaError if it
        cannot be divided so.
        """
        if self._parts is not None:
            self._order_nodes()
        asked, shared = self._asked, collections.Counter(node.id for node in self._nodes)
        n_sessions = asked.settings.get("n_sessions", 1)
        measured = self._measured(shared)
        nodes = [Node(node.name, measured[node.id][0], measured[node.id][1] // shared[node.id], layers=self._layers_of(node))
                 for node in self._nodes]
        note, head = [], -1 if self.head else 0
        if self.stages[0] is None:
            try:
                self.stages = divide(self.setup, nodes, n_sessions, head=head)
            except OutOfMemoryError as error:
                try:
                    self.stages = divide(self.setup, nodes, n_sessions, mapped=False, head=head)
                except OutOfMemoryError:
                    raise error from None
                note = [f"not all weights fit in memory, and are read from the drive: {error}"]
        elif any(node.lacks(layers) for node, layers in zip(nodes, self.stages)):
            raise nowhere(nodes)
        parts = Parts(self.setup, n_sessions, head=head)
        return [self._words(i, parts.share(layers, nodes[i])) for i, layers in enumerate(self.stages)] + note

    def _words(self, i, share):
        rate = "" if self._cluster.local else f", {share.node.bandwidth / 1e9:.0f} GB/s"
        lacks = f", {size(-share.free)} too few: weights are read from the drive" if share.free < 0 else ""
        name = self._name(i)
        return f"{name}: {size(share.weights)} of weights, {size(share.caches)} of caches; {size(share.node.memory)} free{rate}{lacks}"

    def _measured(self, shared):
        """Bytes a second and free bytes of the nodes in use, {id: (rate, bytes)}.

        On one machine nothing is measured: its stages are all alike.
        """
        first = {node.id: i for i, node in reversed(list(enumerate(self._nodes)))}
        if self._cluster.local:
            return {id: (ASSUMED.bandwidth, self._found[i]["free"][0]) for id, i in first.items()}
        begun = {id: self._processes[i].begin("measure", self._asked.may_use_gpus, self.setup.n_bytes // len(self.stages))
                 for id, i in first.items()}
        return {id: self._processes[i].value(self._processes[i].patiently(begun[id])) for id, i in first.items()}

    def open(self):
        """Open the file on all nodes, compare its fingerprint -> lines.

        The lines are the plans of nodes on which there are several devices. The setup's schedule gets the costs of the stage whose pairs
        cost most, as all wait for it. Raises StageError if a node has another file, and the errors of a file that cannot be opened, each
        with the stage's name.
        """
        begun = [self._begin_to_open(i) for i in range(len(self.stages))]
        opened = [self._opened(i, one) for i, one in enumerate(begun)]
        self.setup.schedule.costs = max(FormCosts(*costs) for _, costs in opened)
        return [f"{self._name(i)}: {line}" for i, (lines, _) in enumerate(opened) for line in lines]

    def _begin_to_open(self, i):
        process, asked = self._processes[i], self._asked
        process.what = self._name(i)
        return process.begin("open", asked.path, asked.settings | {"absent": self._parts, "head": i == self.head}, tuple(self.stages[i]))

    def _opened(self, i, begun):
        """What a stage tells of the file that it has opened: lines, costs."""
        process = self._processes[i]
        fingerprint, lines, costs = process.value(process.patiently(begun))
        if fingerprint != self.setup.fingerprint:
            raise StageError(f"{process.name} has another file at {self._asked.path}: its metadata, its tensors or what they begin and end "
                             "with differ from this machine's; copy the same file to all nodes.")
        return lines, costs

    def load(self, progress=None):
        """Load all stages: those of one node in turn, nodes at the same time.

        progress(done, total, name) is called now and then; its name begins with the stage.
        """
        waiting = collections.defaultdict(list)
        for i, node in enumerate(self._nodes):
            waiting[node.id].append(i)
        under_way = {}
        try:
            while waiting or under_way:
                for id in [id for id in waiting if id not in under_way]:
                    i = waiting[id].pop(0)
                    under_way[id] = i, self._begin_to_load(i)
                    if not waiting[id]:
                        del waiting[id]
                finished, _ = self._cluster.ray.wait([begun for _, begun in under_way.values()], timeout=POLL)
                for id, (i, begun) in list(under_way.items()):
                    self._report(i, progress)
                    if begun in finished:
                        del under_way[id]
                        self._addresses[i] = self._loaded(i, begun)
        except Exception:
            for i, _ in under_way.values():     # they would go on, and keep what they load
                self.kill(i)
            raise

    def _report(self, i, progress):
        """Report how far a stage is; a process that hangs is an error."""
        process = self._processes[i]
        done, total, name = process.result(process.begin("progress"), STARTING)
        if progress is not None and total:
            progress(done, total, f"stage {i + 1}: {name}")

    def _begin_to_load(self, i):
        return self._processes[i].begin("load", self._threads(i), self._asked.threads_batch, self._asked.wire, self._nodes[i].host,
                                        tuple(Limits.of(self.setup)))

    def _threads(self, i):
        """The threads of a stage; stages of one node run at the same time."""
        n = sum(node.id == self._nodes[i].id for node in self._nodes)
        return max(1, self._found[i]["cores"] // n) if self._asked.threads is None and n > 1 else self._asked.threads

    @property
    def threads(self):
        """The threads of a stage for steps of one token and of several.

        None: all cores of its node.
        """
        found = {self._threads(i) for i in range(len(self._nodes))}
        one = found.pop() if len(found) == 1 else None
        return one, one if self._asked.threads_batch is None else self._asked.threads_batch

    def _loaded(self, i, begun):
        return tuple(self._processes[i].value(self._processes[i].patiently(begun)))

    # What a Pipeline asks for

    def start(self, i):
        """Start a stage again, on its node, or on another if that has left.

        The first time nothing is left to be done. Raises StageError, or the errors of loading.
        """
        with self._lock:
            first = self._processes[i] is not None and i not in self._started
            self._started.add(i)
        if first:
            return
        try:
            self._start(i)
        except StageError:
            if self._is_there(self._nodes[i]):
                raise
            self._start(i)      # Ray has noticed meanwhile that the node has left

    def _start(self, i):
        self.kill(i)
        self._nodes[i] = self._home(i)
        self._processes[i] = self._cluster.take(self._nodes[i], self._name(i))
        self._compare(i)
        self._opened(i, self._begin_to_open(i))
        self._addresses[i] = self._loaded(i, self._begin_to_load(i))

    def _is_there(self, node):
        return node.id in [other.id for other in self._cluster.nodes()]

    def _home(self, i):
        """The node of a stage, or one that has none if it has left."""
        if self._is_there(self._nodes[i]):
            return self._nodes[i]
        used = {node.id for node in self._nodes}
        spare = next((node for node in self._cluster.nodes() if node.id not in used), None)
        if spare is None:
            raise StageError(f"{self._name(i)} cannot be started again: its node has left the cluster, and there is no other that has no "
                             "stage.")
        return spare

    def address(self, i):
        """Where a stage listens, (host, port)."""
        return self._addresses[i]

    def join(self, i, next_address, first_address, key, epoch):
        """Give a stage its place in the pipeline, as worker.Worker.join says."""
        self._processes[i].ask("join", next_address, first_address, key, epoch, timeout=STARTING)

    def alive(self, i):
        """Whether the process of a stage has not ended; one that hangs has not."""
        return self._processes[i] is not None and self._processes[i].alive()

    def kill(self, i):
        """End the process of a stage at once, whatever it does."""
        with self._lock:
            process, self._processes[i] = self._processes[i], None
        if process is not None:
            process.end()

    def close(self):
        """Free all stages: their processes wait for another model."""
        with self._closing:
            if not self.closed:
                self.closed = True
                self._end(self._cluster.give_back)

    def end(self):
        """End the pipeline too, if there is one: its cluster is being closed."""
        if self.pipeline is not None and not self.closed:
            self.pipeline.close()
        if self._closing.acquire(timeout=STARTING):     # a thread may be about to
            self.closed = True
            self._closing.release()

    def abandon(self):
        """End all stages at once, whatever they do."""
        self.closed = True
        self._end(lambda processes: [process.end() for process in processes])

    def _end(self, end):
        with self._lock:
            processes, self._processes = self._processes, [None] * len(self._processes)
        if not self._cluster.closed:
            end(list(filter(None, processes)))


class StagedModel(Model):
    """A Model whose layers are in stages, in other processes.

    asked: an Asked. resume: as for pipeline.Pipeline. say(lines) is called with the plan, before anything is loaded. progress: as for
    loading.load(). The stages are freed when neither the model nor a session of it is used any more. Raises StageError, and the errors of
    load().
    """

    def __init__(self, asked, resume=None, say=None, progress=None):
        if resume and resume is not True:
            made(resume)
        here = described(asked.path)
        if is_complete(here):
            self._take_whole(asked)         # what is wrong is met before anything is started
        launcher = Launcher(cluster(asked.ray), asked)
        try:
            launcher.begin()
            parts = launcher.compare_files(here)
            if not is_complete(here):
                self._take_whole(asked, parts)
            launcher.setup = self.setup
            self.plan = launcher.divide()
            if say is not None:
                say(self.plan)
            placed = launcher.open()
            if say is not None and placed:
                say(placed)
            launcher.load(progress)
            self.threads, self.threads_batch = launcher.threads
            self.runner = Pipeline(launcher, self.setup, asked.wire, resume, *launcher.threads)
        except Exception:       # the processes are well
            launcher.close()
            raise
        except BaseException:       # nobody waits for them
            launcher.abandon()
            raise
        launcher.pipeline, self.stages = self.runner, launcher.stages
        weakref.finalize(self, self.runner.close).atexit = False      # then the cluster is closed, in an order of its own

    def _take_whole(self, asked, absent=None):
        """Take the Setup of the whole model, and check what is asked for."""
        self._take(asked.whole(absent))
        self.tokenizer = self.setup.tokenizer
        for note in self.setup.notes:
            warnings.warn(f"{self.metadata.path}: {note}", stacklevel=5)
        if isinstance(asked.stages, tuple):
            check(asked.stages, self.config)
        elif asked.stages != AUTO:
            check_number(asked.stages, self.config)

    def session(self):
        """A new, empty Session.

        Raises OutOfMemoryError if its caches do not fit a stage, and StageError if a stage has failed.
        """
        session = super().session()
        session.model = self        # the stages stay as long as it does
        return session
