"""The nodes of this machine (NUMA): which CPUs, and how much memory, are near to each other.

They are read from the files of Linux, within what this process may use: its affinity mask, and the nodes whose memory its cpuset allows.
Elsewhere, and in containers without those files, there are no nodes to be seen. Nothing here raises an exception: what is malformed is as
if it were not there.
"""
import contextlib
import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

from pydsa.machine.control_groups import lines
from pydsa.machine.cores import affinity, cores_of, in_list
from pydsa.machine.mempolicy import MOST_NODES


class Node(NamedTuple):
    """A node, with those of its CPUs that this process may use."""
    number: int
    cpus: frozenset
    cores: tuple            # sets of these CPUs
    memory: int             # bytes; 0: none
    allowed: bool           # whether this process may take its memory


def read_nodes(root="/", allowed=None):
    """The nodes of the machine, a list of Node in the order of their numbers.

    A CPU belongs to the first node that claims it. root: where the files of Linux begin, and allowed: the numbers of the CPUs that the
    process may use, None for the affinity mask of the calling thread; both for tests.
    """
    root, nodes = Path(root), []
    folder = root / "sys/devices/system/node"
    left = set(affinity() or ()) if allowed is None else set(allowed)
    numbers = _numbers(folder)
    allowed_memory = _memory_allowed(root, numbers)
    for n in numbers:
        cpus = in_list(lines(folder / f"node{n}/cpulist"), left)
        left -= cpus
        cores = tuple(map(frozenset, cores_of(cpus, root)))
        nodes.append(Node(n, frozenset(cpus), cores, _memory(lines(folder / f"node{n}/meminfo")), n in allowed_memory))
    return nodes


def _numbers(folder):
    """The numbers of the folders node0, node1, ..."""
    names = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    return sorted({int(name[4:]) for name in names if re.fullmatch("node[0-9]{1,4}", name) and int(name[4:]) < MOST_NODES})


def _memory_allowed(root, numbers):
    """The nodes whose memory the process may take: all, if nobody says."""
    for line in lines(root / "proc/self/status"):
        name, _, text = line.partition(":")
        if name == "Mems_allowed_list":
            return in_list([text.strip()], numbers)
    return set(numbers)


def _memory(text):
    """The bytes of memory in a node's meminfo, "Node 0 MemTotal: 64 kB"."""
    for line in text:
        found = re.fullmatch("Node [0-9]+ MemTotal: +([0-9]{1,15}) kB", line.strip())
        if found:
            return int(found[1]) << 10
    return 0


def of_this_thread(nodes):
    """The node on which the calling thread runs.

    The first one with CPUs, if the system does not tell.
    """
    cpu = -1
    with contextlib.suppress(OSError, AttributeError, TypeError):       # Windows has no such library
        cpu = ctypes.CDLL(None).sched_getcpu()
    with_cpus = [node for node in nodes if node.cpus]
    return next((node for node in with_cpus if cpu in node.cpus), with_cpus[0])


def in_ranges(numbers):
    """Numbers as Linux writes them, "0-3,8"."""
    ranges = []
    for n in sorted(numbers):
        if ranges and ranges[-1][1] == n - 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)
