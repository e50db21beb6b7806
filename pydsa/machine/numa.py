"""--numa: on which nodes of the machine threads run, and memory lies.

A Plan holds for the whole process, as its models share their threads. Where there is one node there is no plan, and nothing is changed.
Whatever pages of the weights a thread reads for the first time, from the file or into a copy, and whatever it writes, lies as the plan
says; so any thread may take any task, and all of them read from all nodes at a time (docs/running.md).
"""
import contextlib
import errno
import os
import sys
import warnings
from typing import NamedTuple

from pydsa.errors import PydsaError
from pydsa.machine import mempolicy
from pydsa.machine.cores import cores_of, physical_cores
from pydsa.machine.mempolicy import INTERLEAVE, PREFERRED, Policy
from pydsa.machine.nodes import in_ranges, of_this_thread, read_nodes

WORDS = ("distribute", "isolate", "numactl")
ROOT = "/"              # where the files of Linux begin; another folder in tests
LEAST = 1 << 20         # bytes of an array that has a policy of its own


class Plan(NamedTuple):
    """Where threads and memory belong.

    groups: sets of CPUs, over which threads are spread evenly. policy: of memory; None: as the process has it. pins: whether threads are
    kept on their CPUs.
    """
    word: str
    groups: tuple
    policy: Policy = None
    pins: bool = True

    @property
    def cpus(self):
        """The CPUs on which threads run."""
        return frozenset().union(*self.groups)

    def places(self, n, allowed):
        """The CPUs of each of n threads, a list of sets; None: no place.

        Each has a core, all of its hardware threads, and no two have the same one before all are taken; those of a group, and the cores
        that they leave free, lie evenly. allowed: the CPUs that the process may use by now, of which there may be none in the plan.
        """
        cores = [cores_of(group & allowed, ROOT) for group in self.groups]
        cores = [group for group in cores if group]
        if not self.pins or not cores:
            return None
        counts = shares(n, [len(group) for group in cores])
        return [group[i * len(group) // m if m <= len(group) else i % len(group)] for group, m in zip(cores, counts) for i in range(m)]


def shares(n, sizes):
    """How many of n threads each group of so many cores gets.

    As equal numbers as there can be with no two on one core; beyond that, by the groups' sizes.
    """
    counts = [0] * len(sizes)
    for _ in range(n):
        i = min(range(len(sizes)), key=lambda i: (counts[i] >= sizes[i], counts[i] / (sizes[i] if counts[i] >= sizes[i] else 1)))
        counts[i] += 1
    return counts


def plan_for(word, nodes, here=None):
    """The Plan of an option's value; None where it has nothing to do.

    nodes: a list of nodes.Node. here: the node that the program runs on, None to ask the system.
    """
    near = [node for node in nodes if node.cpus]
    if word is None or len(near) < 2:
        return None
    if word == "numactl":
        return Plan(word, (frozenset().union(*(node.cpus for node in near)),))
    if word == "isolate":
        near = [here or of_this_thread(near)]
    giving = tuple(node.number for node in near if node.memory and node.allowed)
    policy = Policy(PREFERRED if word == "isolate" else INTERLEAVE, giving)
    return Plan(word, tuple(node.cpus for node in near), policy if len(giving) >= (1 if word == "isolate" else 2) else None)


_plan, _settled = None, False


def use_numa(word):
    """Let the models of this process run as an option's value says.

    word: one of WORDS, or None. Warns where the system does not allow it. Raises PydsaError if threads were placed in another way already.
    """
    global _plan
    if word is not None and sys.platform != "linux":
        warnings.warn("--numa is not available here, as it needs the files and system calls of Linux: threads and memory are the system's "
                      "to place.", stacklevel=2)
        return
    plan = plan_for(word, read_nodes(ROOT))
    if not _settled:
        _plan, troubles = permitted(plan)
        for trouble in troubles:
            warnings.warn(trouble, stacklevel=2)
    elif (plan and plan.word) != (_plan and _plan.word):
        was, now = (f"--numa {each.word}" if each else "no --numa" for each in (_plan, plan))
        raise PydsaError(f"This process runs models with {was}, and cannot run another one with {now}: load all of them in the same way, "
                         "or start a new process.")


def settled_plan():
    """The Plan of threads that are about to start, or None.

    From here on it is the only one of this process.
    """
    global _settled
    _settled = True
    return _plan


def planned_cpus():
    """The CPUs on which threads will run; None: all that are allowed."""
    return None if _plan is None else _plan.cpus


def permitted(plan):
    """What the system permits of a Plan, and a list of sentences on the rest."""
    troubles = []
    if plan is None:
        return None, troubles
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except OSError as error:
        troubles.append(f"The system refuses to keep threads on CPUs ({error.strerror}): it places them itself.")
        plan = plan._replace(pins=False)
    try:
        with contextlib.nullcontext() if plan.policy is None else mempolicy.applied(plan.policy):
            pass
    except OSError as error:
        troubles.append(_trouble_of_memory(error))
        plan = plan._replace(policy=None)
    return plan, troubles


def _trouble_of_memory(error):
    remedy = "; in a container, allow it (docker run --cap-add SYS_NICE)" if error.errno == errno.EPERM else ""
    return f"The system refuses to choose the nodes of memory ({error.strerror}): pages lie where they happen to be used first{remedy}."


def _lose_memory(error):
    """Go on without the plan's policy, which the system has come to refuse."""
    global _plan
    if _plan.policy is not None:
        warnings.warn(_trouble_of_memory(error), stacklevel=3)
    _plan = _plan._replace(policy=None)


@contextlib.contextmanager
def memory_placed():
    """A context in which the pages that this thread takes are placed."""
    with contextlib.ExitStack() as stack:
        if _plan is not None and _plan.policy is not None:
            try:
                stack.enter_context(mempolicy.applied(_plan.policy))
            except OSError as error:
                _lose_memory(error)
        yield


def place_memory(array):
    """Place the pages of a new array, whichever thread writes them first.

    Returns the array. Small ones are left alone.
    """
    if _plan is not None and _plan.policy is not None and array.nbytes >= LEAST:
        try:
            mempolicy.set_for(array, _plan.policy)
        except OSError as error:
            _lose_memory(error)
    return array


def planned_memory():
    """The Policy of memory, None without one, and the value of --numa."""
    return (None, None) if _plan is None else (_plan.policy, _plan.word)


def place_thread(thread, cpus):
    """Keep a thread, by its number (0: the calling one), on some CPUs.

    Where the system refuses, as the cpuset has changed, it stays where it is.
    """
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, cpus)


@contextlib.contextmanager
def visiting(cpus):
    """A context in which the calling thread is placed; then it is free again.

    cpus: where it runs, or None for anywhere. Nothing may interrupt it (signals.interrupts_held).
    """
    before = None if cpus is None else os.sched_getaffinity(0)
    if cpus is not None:
        place_thread(0, cpus)
    try:
        with memory_placed():
            yield
    finally:
        if before is not None:
            place_thread(0, before)


def describe_numa():
    """The nodes of this machine, and what --numa would do, as JSON types."""
    nodes, options = read_nodes(ROOT), {}
    for word in WORDS:
        plan, troubles = permitted(plan_for(word, nodes))
        if plan is not None:
            options[word] = _in_words(plan, nodes, troubles)
    return {"nodes": [{"node": node.number, "cpus": in_ranges(node.cpus), "cores": len(node.cores), "memory": node.memory,
                       "memory_allowed": node.allowed} for node in nodes], "options": options}


def _in_words(plan, nodes, troubles):
    """What a Plan does, with as many threads as there are by default."""
    n = physical_cores(ROOT, plan.cpus)
    places = plan.places(n, plan.cpus) or [plan.cpus] * n
    on = {node.number: sum(place <= node.cpus for place in places) for node in nodes}
    threads = ", ".join(f"{count} on node {number}" for number, count in on.items() if count) if plan.pins else "anywhere"
    memory = "as the process has it" if plan.policy is None else \
        f"of node {plan.policy.nodes[0]} first" if plan.policy.mode == PREFERRED else f"of nodes {in_ranges(plan.policy.nodes)} in turns"
    return " ".join([f"{n} thread{'s' * (n > 1)} ({threads}); memory {memory}.", *troubles])
