"""Nodes of machines of several kinds, plans for them, policies of memory."""
import mmap
import platform
import random
import sys

import numpy as np
import pytest
from helpers import write_files
from machines import big, placing, policy_at, write_machine

from pydsa.gguf.file import Tensor
from pydsa.machine import mempolicy, numa, residence
from pydsa.machine.mempolicy import INTERLEAVE, PREFERRED, Policy
from pydsa.machine.nodes import Node, in_ranges, of_this_thread, read_nodes
from pydsa.machine.numa import Plan, plan_for, shares


# Nodes

def seen(root, allowed):
    """What is read of a machine's nodes, in short."""
    return [(node.number, in_ranges(node.cpus), len(node.cores), node.memory >> 30, node.allowed) for node in read_nodes(root, allowed)]


def test_nodes_with_hardware_threads(tmp_path):
    assert seen(big(tmp_path), range(32)) == [(0, "0-7,16-23", 8, 64, True), (1, "8-15,24-31", 8, 64, True)]
    assert seen(tmp_path, {1, 3, 17, 8}) == [(0, "1,3,17", 2, 64, True), (1, "8", 1, 64, True)]     # a batch job's CPUs


def test_nodes_without_memory_or_cpus(tmp_path):
    write_machine(tmp_path, {0: ("0-1", 16), 1: ("2-3", 0), 2: ("", 256), 10: ("4-5", 16)}, mems="0-2")
    assert seen(tmp_path, range(6)) == [(0, "0-1", 2, 16, True), (1, "2-3", 2, 0, True), (2, "", 0, 256, True), (10, "4-5", 2, 16, False)]


def test_a_cpuset_that_excludes_a_node(tmp_path):
    assert seen(big(tmp_path, mems="1"), range(8, 16)) == [(0, "", 0, 64, False), (1, "8-15", 8, 64, True)]


def test_offline_cpus_are_on_no_node(tmp_path):
    write_machine(tmp_path, {0: ("0,2", 8), 1: ("4", 8)})
    assert seen(tmp_path, {0, 2, 4}) == [(0, "0,2", 2, 8, True), (1, "4", 1, 8, True)]


def test_containers_without_the_folder(tmp_path):
    assert read_nodes(tmp_path, {0, 1}) == [] and plan_for("distribute", []) is None


@pytest.mark.parametrize("text", ["", "many", "0-x", "-", "0,,1", "\ufffd", "1" * 5000])
def test_malformed_lists_are_empty(tmp_path, text):
    write_machine(tmp_path, {0: ("0-1", 8), 1: (text, 8)}, mems=text)
    assert seen(tmp_path, {0, 1, 2}) == [(0, "0-1", 2, 8, False), (1, "", 0, 8, False)]


@pytest.mark.parametrize("text", ["", "Node 0 MemTotal: much kB", "Node 0 MemTotal: -1 kB", f"Node 0 MemTotal: {'9' * 20} kB",
                                  "MemTotal: 4 kB", "Node 0 MemTotal: 4"])
def test_malformed_sizes_are_none(tmp_path, text):
    write_machine(tmp_path, {0: ("0-99999999999999", 8)})
    write_files(tmp_path / "sys/devices/system/node/node0", {"meminfo": text})
    assert seen(tmp_path, {0, 1}) == [(0, "0-1", 2, 0, True)]


def test_a_cpu_is_on_one_node_only(tmp_path):
    write_machine(tmp_path, {0: ("0-2", 8), 1: ("1-3", 8), 5000: ("0", 8)})
    assert seen(tmp_path, range(4)) == [(0, "0-2", 3, 8, True), (1, "3", 1, 8, True)]


def test_where_this_thread_runs():
    nodes = [Node(i, frozenset(cpus), (), 0, True) for i, cpus in enumerate(([], [10**6], range(4096)))]
    assert of_this_thread(nodes).number == (2 if sys.platform == "linux" else 1)
    assert of_this_thread(nodes[:2]).number == 1


# Plans

def test_plans(tmp_path):
    nodes = read_nodes(big(tmp_path), range(32))
    cpus = [node.cpus for node in nodes]
    assert plan_for("distribute", nodes) == Plan("distribute", tuple(cpus), Policy(INTERLEAVE, (0, 1)))
    assert plan_for("isolate", nodes, nodes[1]) == Plan("isolate", (cpus[1],), Policy(PREFERRED, (1,)))
    assert plan_for("numactl", nodes) == Plan("numactl", (cpus[0] | cpus[1],), None)
    assert plan_for(None, nodes) is None


@pytest.mark.parametrize("word", numa.WORDS)
@pytest.mark.parametrize("allowed", [range(8), [9], []])
def test_where_one_node_is_used_there_is_no_plan(tmp_path, word, allowed):
    assert plan_for(word, read_nodes(big(tmp_path), allowed)) is None


@pytest.mark.parametrize("nodes, mems, distributed, isolated", [
    ({0: ("0-1", 16), 1: ("2-3", 0), 2: ("", 256), 3: ("4-5", 16)}, "0-3", (0, 3), (3,)),
    ({0: ("0-1", 16), 1: ("2-3", 16)}, "0", None, None),        # threads on both, memory of one
    ({0: ("0-1", 0), 1: ("2-3", 16)}, "0-1", None, (1,))])
def test_memory_is_of_nodes_with_threads(tmp_path, nodes, mems, distributed, isolated):
    """... and is left to the system where that leaves no choice."""
    found = read_nodes(write_machine(tmp_path, nodes, mems=mems), range(6))
    assert plan_for("distribute", found).policy == (distributed and Policy(INTERLEAVE, distributed))
    assert plan_for("isolate", found, found[-1]).policy == (isolated and Policy(PREFERRED, isolated))


def test_threads_have_cores_of_their_own(tmp_path, monkeypatch):
    nodes = read_nodes(big(tmp_path), range(32))
    monkeypatch.setattr(numa, "ROOT", tmp_path)
    places = plan_for("distribute", nodes).places
    assert places(16, set(range(32))) == [{cpu, cpu + 16} for cpu in range(16)]
    assert places(4, set(range(32))) == [{0, 16}, {4, 20}, {8, 24}, {12, 28}]       # far apart: neighbours may share a cache
    assert places(3, set(range(32))) == [{0, 16}, {4, 20}, {8, 24}]
    assert places(5, {0, 1, 8, 9, 24}) == [{0}, {1}, {0}, {8, 24}, {9}]
    assert places(2, {40}) is None
    assert plan_for("isolate", nodes, nodes[1]).places(3, set(range(32))) == [{8, 24}, {10, 26}, {13, 29}]
    assert plan_for("numactl", nodes).places(2, {1, 2, 3, 17, 9}) == [{1, 17}, {3}]


@pytest.mark.parametrize("seed", range(20))
def test_threads_are_spread_evenly(seed):
    choose = random.Random(seed)
    sizes = [choose.randint(1, 9) for _ in range(choose.randint(1, 8))]
    for n in range(1, 3 * sum(sizes)):
        counts = shares(n, sizes)
        assert sum(counts) == n and (n > sum(sizes) or all(count <= size for count, size in zip(counts, sizes)))
        with_room = [count for count, size in zip(counts, sizes) if count < size]
        assert not with_room or max(with_room) - min(with_room) <= 1 and max(counts) - min(with_room) <= 1
        assert max(count / size for count, size in zip(counts, sizes)) <= max(1, n / sum(sizes) + 1)
    same = shares(n, [4] * 3)
    assert sorted(same, reverse=True) == sorted([[i * 3 // n for i in range(n)].count(node) for node in range(3)], reverse=True)


# Policies of memory

@placing
def test_a_policy_of_a_thread_is_undone():
    before = mempolicy.of_thread()
    with mempolicy.applied(Policy(PREFERRED, (0,))):
        assert mempolicy.of_thread() == Policy(PREFERRED, (0,))
        with pytest.raises(ZeroDivisionError), mempolicy.applied(Policy(INTERLEAVE, (0,))):
            assert mempolicy.of_thread() == Policy(INTERLEAVE, (0,)) and 1 // 0
        assert mempolicy.of_thread() == Policy(PREFERRED, (0,))
    assert mempolicy.of_thread() == before
    with pytest.raises(OSError), mempolicy.applied(Policy(INTERLEAVE, (1000,))):        # there is no such node
        pass
    assert mempolicy.of_thread() == before


@placing
def test_arrays_are_placed(monkeypatch):
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    array = np.frombuffer(mmap.mmap(-1, 8 << 20, flags=private), np.uint8)      # memory that nobody had before, whose policy would stay
    array[:4 << 20] = 1
    assert numa.place_memory(array) is array and policy_at(array) == "default"      # there is no plan
    monkeypatch.setattr(numa, "_plan", Plan("distribute", (), Policy(INTERLEAVE, (0,))))
    assert policy_at(numa.place_memory(array)) == "interleave:0" and array.sum() == 4 << 20
    for small_one in np.zeros(numa.LEAST - 1, np.uint8), np.zeros(0, np.uint8):
        numa.place_memory(small_one)


def test_numbers_of_system_calls():
    """... of asm/unistd_64.h and asm-generic/unistd.h."""
    assert mempolicy.X86 == (237, 238, 239, 279) and mempolicy.OTHERS == (235, 237, 236, 239)
    known = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64") and sys.maxsize > 2**32
    assert (mempolicy.NUMBERS is not None) == known


@placing
def test_where_pages_are(tmp_path):
    """... of a file in memory, once they have been touched."""
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 22))
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    small_one, weight = Tensor("v", "F32", (2,), data[:8]), Tensor("w", "F32", ((1 << 20) - 2,), data[8:])
    assert mempolicy.nodes_at([data.ctypes.data])[0] < 0
    found = residence._in_memory([small_one, weight, weight._replace(make=len)])
    assert len(set(found)) == residence.SAMPLES and min(mempolicy.nodes_at(found)) >= 0
    assert data.ctypes.data <= min(found) < data.ctypes.data + (1 << 16) and max(found) < data.ctypes.data + (1 << 22)
    assert residence._in_memory([]) == residence._in_memory([weight._replace(make=len)]) == []
