"""Nodes of machines of several kinds, and plans for threads and memory."""
import random
import sys

import pytest
from helpers import write_files
from machines import big, write_machine

from pydsa import numa
from pydsa.mempolicy import INTERLEAVE, PREFERRED, Policy
from pydsa.nodes import Node, in_ranges, of_this_thread, read_nodes
from pydsa.numa import Plan, plan_for, shares


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
