"""Files that describe machines of several nodes, as Linux shows them."""
import os
import sys

import pytest
from helpers import write_files

from pydsa.machine import mempolicy
from pydsa.machine.mempolicy import DEFAULT, Policy
from pydsa.machine.nodes import read_nodes

CPUS = sorted(os.sched_getaffinity(0))[:2] if sys.platform == "linux" else []       # of this machine
MEMORY = tuple(node.number for node in read_nodes() if node.number < 2 and node.memory and node.allowed)       # those of its first nodes


def write_machine(root, nodes, siblings=None, mems=None):
    """Write the files of a machine: {number: (list of CPUs, GiB)}.

    siblings: {CPU: list of CPUs of its core}. mems: the list of nodes whose memory the process may take.
    """
    for number, (cpus, size) in nodes.items():
        meminfo = f"\nNode {number} MemTotal:  {size << 20} kB\nNode {number} MemFree:  {size << 18} kB"
        write_files(root / f"sys/devices/system/node/node{number}", {"cpulist": cpus, "meminfo": meminfo})
    write_files(root / "sys/devices/system/node", {"online": "0-1", "power/control": "auto", "nodes": "", "node": "", "node1x": ""})
    write_files(root / "sys/devices/system/cpu", {f"cpu{cpu}/topology/core_cpus_list": text for cpu, text in (siblings or {}).items()})
    if mems is not None:
        write_files(root, {"proc/self/status": f"Name:\tpydsa\nMems_allowed:\t3\nMems_allowed_list:\t{mems}"})
    return root


def big(root, **options):
    """Two nodes of eight cores, each of two hardware threads."""
    return write_machine(root, {0: ("0-7,16-23", 64), 1: ("8-15,24-31", 64)}, {cpu: f"{cpu % 16},{cpu % 16 + 16}" for cpu in range(32)},
                         **options)


def made_of_one(root):
    """Two nodes of one core, which are two CPUs of this machine."""
    return write_machine(root, {i: (str(cpu), 8) for i, cpu in enumerate(CPUS)}, {cpu: str(cpu) for cpu in CPUS})


two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="takes two CPUs of Linux")


def can_choose_memory():
    try:
        with mempolicy.applied(Policy(DEFAULT)):
            return True
    except OSError:
        return False


placing = pytest.mark.skipif(not can_choose_memory(), reason="the system does not let processes choose the nodes of memory")


def policy_at(array):
    """What /proc says of the policy of the memory around an array's middle."""
    middle = array.ctypes.data + array.nbytes // 2
    with open("/proc/self/numa_maps") as file:
        ranges = [(int(line.split()[0], 16), line.split()[1]) for line in file]
    return max(pair for pair in ranges if pair[0] <= middle)[1]
