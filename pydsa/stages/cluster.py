"""A Ray that runs stages: one of this program's own, or a cluster.

A process uses one Ray: the first model in stages brings it up, later ones find it, with processes that earlier models gave back.
"""
import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from typing import NamedTuple

from pydsa import errors
from pydsa.errors import PydsaError, StageError
from pydsa.stages.actors import COMPARED, StageActor, identity, kill
from pydsa.stages.local_ray import LocalRay, environment, first_line, handlers_kept, import_ray

STARTING = 60       # seconds in which the process of a stage must answer
REACHED = 5         # seconds in which a cluster's address must
QUICK = 5           # seconds for what takes no time
CALLS = 4           # of a StageActor that may run at the same time
ATTEMPTS = "RAY_gcs_server_port_wait_time_s"    # how often Ray tries to connect; by default 20 times, of which each may take 45 s


class RayNode(NamedTuple):
    """A machine of the cluster, or one of several nodes on one machine.

    name: as messages have it. id: Ray's. host: the address at which its stages listen. here: whether it is the one of this process.
    """
    name: str
    id: str
    host: str
    here: bool


class Process:
    """The process of a stage: a StageActor, on a RayNode.

    what: how errors name it. Raises StageError where it cannot be started.
    """

    def __init__(self, cluster, node, what):
        ray = cluster.ray
        self._ray, self.node, self.what, self.pid = ray, node, what, None
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        self._on = dict(num_cpus=0, scheduling_strategy=strategy)
        self.actor = ray.remote(StageActor).options(max_concurrency=CALLS, **self._on).remote()
        self._described = self.actor.describe.remote()

    def used_for(self, what):
        """Describe itself anew, for another stage."""
        self.what, self._described = what, self.actor.describe.remote()

    @property
    def name(self):
        """How a sentence begins that names it."""
        return self.what[:1].upper() + self.what[1:]

    def description(self):
        """What StageActor.describe() tells, once it has started."""
        found = self.result(self._described, STARTING)
        self.pid = found["pid"]
        return found

    def ask(self, method, *args, timeout=None):
        """Call a method that returns an Answer -> its value."""
        return self.value(self.result(self.begin(method, *args), timeout))

    def begin(self, method, *args):
        """Call a method -> what result() waits for."""
        return getattr(self.actor, method).remote(*args)

    def result(self, reference, timeout=None):
        """What a call returns; StageError if the process has none in time."""
        failed = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=timeout)
        except failed.GetTimeoutError as error:
            raise StageError(f"{self.name} does not answer within {timeout} s.") from error
        except failed.RayError as error:
            if "No module named 'pydsa" in str(error):
                raise StageError(f"{self.name} has no pydsa, or one without stages: install the same version there, in the Python that "
                                 "runs Ray.") from error
            if isinstance(error, failed.RayTaskError):
                raise StageError(f"{self.name} failed: {type(error.cause).__name__}: {first_line(error.cause)}.") from error
            raise StageError(f"{self.name} has ended, or its node is gone.") from error

    def patiently(self, reference):
        """What a call returns that can take long; a process that hangs does not."""
        while not self._ray.wait([reference], timeout=QUICK)[0]:
            self.result(self.begin("progress"), STARTING)
        return self.result(reference)

    def value(self, answer):
        """The value of an Answer; its warnings and errors name the stage."""
        for text in answer["warnings"]:
            warnings.warn(f"{self.what}: {text}", stacklevel=3)
        if "error" in answer:
            kind = getattr(errors, answer["error"], PydsaError)
            raise kind(f"{self.name}: {answer['text']}")
        return answer["value"]

    def alive(self):
        """Whether the process has not ended; one that hangs has not."""
        try:
            self._ray.get(self.actor.progress.remote(), timeout=1)
        except self._ray.exceptions.GetTimeoutError:
            return not (self.node.here and self.pid) or os.path.exists(f"/proc/{self.pid}") or not os.path.isdir("/proc")
        except self._ray.exceptions.RayError:
            return False
        return True

    def end(self):
        """End the process at once, whatever it does."""
        with contextlib.suppress(Exception):        # it may have ended, and so may its node and Ray
            if self.pid is not None and self.node.here:
                os.kill(self.pid, signal.SIGKILL)
            elif self.pid is not None:      # Ray asks a process to end, and one that is stopped does not
                self._ray.remote(kill).options(**self._on).remote(self.pid)
        with contextlib.suppress(Exception):
            self._ray.kill(self.actor)


class Cluster:
    """The nodes of a Ray, and processes on them that are not in use.

    address: of a cluster, "host:port" or "auto"; None: a Ray of this program's own. Raises StageError if there is none, or if it cannot be
    used from here.
    """

    def __init__(self, address=None):
        self.address, self._lock, self._idle = address, threading.Lock(), []
        self.launchers = weakref.WeakSet()
        self._own = None if address is not None or _connected() else LocalRay()
        self.ray = import_ray()
        self._theirs = self._own is None and self.ray.is_initialized()      # the caller's, to be left as it is
        if self._own is None and not self._theirs:
            connect(self.ray, address)
        self.closed = False
        atexit.register(self.close)

    @property
    def local(self):
        """Whether this is a Ray of the program's own."""
        return self._own is not None

    @property
    def in_use(self):
        """Whether processes of it run stages."""
        return any(not launcher.closed for launcher in self.launchers)

    def nodes(self):
        """The RayNodes that can run stages, this process's own first.

        Those without CPUs for Ray are left out where others have some: they only manage a cluster.
        """
        found = [node for node in self.ray.nodes() if node["Alive"]]
        found = [node for node in found if node["Resources"].get("CPU")] or found
        hosts = [node["NodeManagerAddress"] for node in found]
        here = self.ray.get_runtime_context().get_node_id()
        named = [RayNode(host if hosts.count(host) == 1 else f"{host}:{node['NodeManagerPort']}", node["NodeID"], host,
                         node["NodeID"] == here) for node, host in zip(found, hosts)]
        return sorted(named, key=lambda node: (not node.here, _by_numbers(node.name)))

    def take(self, node, what):
        """A Process on a node: one that is not in use, or a new one."""
        with self._lock:
            found = next((process for process in self._idle if process.node.id == node.id), None)
            if found is not None:
                self._idle.remove(found)
        if found is None or not found.alive():
            return Process(self, node, what)
        found.used_for(what)
        return found

    def give_back(self, processes):
        """Let processes free their parts of a model and wait for another one.

        Those that do not do that at once are ended.
        """
        begun = [(process, process.begin("leave")) for process in processes]
        until = time.monotonic() + QUICK
        for process, leaving in begun:
            try:
                process.result(leaving, max(0, until - time.monotonic()))
            except StageError:
                process.end()
            else:
                with self._lock:
                    self._idle.append(process)

    def close(self):
        """End the processes, and Ray if it is the program's own."""
        atexit.unregister(self.close)
        if self.closed:
            return
        self.closed = True      # nobody gives processes back from here on
        for launcher in list(self.launchers):
            launcher.end()
        if self._own is not None:
            self._own.close()
        elif not self._theirs:
            with contextlib.suppress(Exception):
                self.ray.shutdown()
        else:
            for process in self._idle:      # by Ray, which complains of processes that are killed
                with contextlib.suppress(Exception):
                    self.ray.kill(process.actor)


_lock, _current = threading.Lock(), None


def cluster(address=None):
    """The Cluster of this process, started or connected where it is not yet.

    address: as for Cluster. Raises StageError if the process uses another one.
    """
    global _current
    with _lock:
        if _current is not None and not _current.closed and _current.address != address:
            if _current.in_use:
                raise StageError(f"This program runs a model on {_named(_current.address)}; it cannot use {_named(address)} too.")
            _current.close()
        if _current is None or _current.closed or not _current.ray.is_initialized():
            _current = Cluster(address)
        return _current


def close():
    """End what cluster() has started, or leave it."""
    with _lock:
        if _current is not None:
            _current.close()


def _by_numbers(name):
    """A key by which 10.0.0.9 comes before 10.0.0.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]


def _named(address):
    return "a Ray of its own" if address is None else f"the Ray at {address}"


def _connected():
    ray = sys.modules.get("ray")        # perhaps an import that was interrupted
    return hasattr(ray, "is_initialized") and ray.is_initialized()


def connect(ray, address):
    """Connect to a cluster.

    Raises StageError if nothing answers at its address, or if it cannot be used from here.
    """
    found = re.fullmatch(r"([^/]+):([0-9]{1,9})", address) if isinstance(address, str) else None
    if address != "auto" and not found:
        raise StageError(f"ray is {address!r}, expected a cluster's address, such as 10.0.0.1:6379, or 'auto' for the one on this machine.")
    if found:
        try:
            socket.create_connection((found[1].strip("[]"), int(found[2])), REACHED).close()
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise StageError(f"No Ray answers at {address} ({why}); start one there with `ray start --head`, and give its address "
                             "(host:port).") from error
    try:
        with handlers_kept(), environment({ATTEMPTS: os.environ.get(ATTEMPTS, "1")}):
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:
        if "Token" in f"{error} {error.__cause__}":
            raise StageError(f"The Ray at {address} has tokens, and this program has not the right one: set RAY_AUTH_MODE=token, with the "
                             "same ~/.ray/auth_token as on the cluster's nodes.") from error
        if isinstance(error, ConnectionError):
            local = "; Ray takes a loopback address for this machine's own" if re.match(r"127\.|localhost:|\[?::1\]?:", address) else ""
            raise StageError(f"The Ray at {address} does not answer ({first_line(error)}){local}; start one with `ray start`, or give its "
                             "address (host:port).") from error
        raise StageError(f"The Ray at {address} cannot be used from here ({first_line(error)}); this machine must be one of its "
                         f"nodes (`ray start --address={address}`).") from error


def compare(process, found):
    """Check that a process runs what this one does.

    found: its description. Raises StageError, which says what differs.
    """
    mine, theirs = identity(), found["identity"]
    differing = [name for name in COMPARED if theirs.get(name) != mine[name]]
    if differing:
        listed = ", ".join(f"{name} {theirs.get(name)}, not {mine[name]}" for name in differing)
        raise StageError(f"{process.name} runs other software than this process: {listed}; install the same versions on all nodes.")
