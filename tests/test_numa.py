"""--numa: what models of this process have of it, what stays as it was, what is refused, and what is told.

Models run on two nodes of one core each, made of two CPUs of this machine.
"""
import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import click
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids
from machines import CPUS, MEMORY, made_of_one, placing, policy_at, two_cpus, write_machine

import pydsa
import pydsa.model
from pydsa import PydsaError
from pydsa.backends.cpu.team import reading_ahead, threads
from pydsa.backends.devices import DEVICES, check_numa, simulated_gpus
from pydsa.cli import main
from pydsa.fitting import MARGIN, fitted
from pydsa.machine import mempolicy, numa
from pydsa.machine.mempolicy import INTERLEAVE, Policy
from pydsa.machine.nodes import in_ranges

# What models are made of here lies on one node, and was read before
pytestmark = pytest.mark.filterwarnings("ignore:[0-9]+% of the weights that are in memory already")


# What the system refuses

def forget_threads():
    """End the threads, so that the next load chooses anew how they are placed."""
    for team in threads._teams.values():
        team.close()
    threads._teams.clear()
    numa._settled = False


@pytest.fixture
def fresh(monkeypatch):
    """A process that has no threads and no plan yet."""
    monkeypatch.setattr(threads, "_teams", {})
    monkeypatch.setattr(numa, "_plan", None)
    monkeypatch.setattr(numa, "_settled", False)
    yield
    forget_threads()


@pytest.fixture
def two_nodes(fresh, tmp_path, monkeypatch):
    """A machine of two nodes with a core each, on the first of which it runs.

    This machine need not have the memory of another one.
    """
    monkeypatch.setattr(numa, "ROOT", made_of_one(tmp_path))
    monkeypatch.setattr(numa, "of_this_thread", lambda nodes: nodes[0])


def refuse(code):
    def function(*args):
        raise OSError(code, os.strerror(code))
    return function


@two_cpus
@pytest.mark.parametrize("code, more", [(1, "docker run --cap-add SYS_NICE"), (38, "used first."), (22, "used first.")])
def test_refused_policies_are_one_warning(two_nodes, monkeypatch, code, more):
    monkeypatch.setattr(mempolicy, "_call", refuse(code))
    with pytest.warns(UserWarning) as met:
        numa.use_numa("distribute")
    assert [str(warning.message).startswith("The system refuses to choose the nodes of memory") for warning in met] == [True]
    assert more in str(met[0].message) and numa._plan.policy is None and numa._plan.pins
    array = np.zeros(numa.LEAST, np.uint8)
    with numa.memory_placed():
        numa.place_memory(array)


@two_cpus
def test_refused_places_are_one_warning(two_nodes, monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", refuse(1))
    with pytest.warns(UserWarning, match="refuses to keep threads on CPUs") as met:
        numa.use_numa("numactl")
    assert len(met) == 1 and numa._plan.places(2, set(CPUS)) is None


@two_cpus
@placing
def test_a_policy_that_is_refused_later(two_nodes, monkeypatch):
    """... as a cpuset has changed: a warning, and threads keep their places."""
    numa.use_numa("distribute")
    monkeypatch.setattr(mempolicy, "_call", refuse(22))
    with pytest.warns(UserWarning, match="Invalid argument"), numa.memory_placed():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with numa.memory_placed():
            numa.place_memory(np.zeros(numa.LEAST, np.uint8))
    assert numa._plan.places(2, set(CPUS)) == [{cpu} for cpu in CPUS]


def test_other_systems_say_so(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(UserWarning, match="--numa is not available here") as met:
        numa.use_numa("isolate")
    assert len(met) == 1 and numa.planned_cpus() is None


# One setting for a process

@two_cpus
@pytest.mark.parametrize("first, second", [("distribute", "numactl"), (None, "distribute"), ("numactl", None)])
def test_another_setting_is_refused(two_nodes, first, second):
    numa.use_numa(second)       # a load that failed before there were threads
    numa.use_numa(first)
    numa.settled_plan()
    numa.use_numa(first)
    with pytest.raises(PydsaError, match=f"runs models with .*{first or 'no --numa'}.* another one with .*{second or 'no --numa'}"):
        numa.use_numa(second)


@pytest.mark.parametrize("word", numa.WORDS)
def test_one_node_changes_nothing(fresh, tmp_path, monkeypatch, small_model, word):
    """... and two settings are none."""
    monkeypatch.setattr(numa, "ROOT", write_machine(tmp_path, {0: ("0-4095", 8)}))
    monkeypatch.setattr(os, "sched_setaffinity", refuse(1), raising=False)
    monkeypatch.setattr(mempolicy, "_call", refuse(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for setting in None, word:
            model = pydsa.load(small_model(), n_ctx=64, kv_type="f32", threads=2, numa=setting)
            model.session().prefill([1, 2, 3])
    assert threads._teams[2]._places is None and numa.planned_cpus() is None


# Models

def places(team):
    """The CPUs of a team's threads, and the policy of memory that each has."""
    for thread in team.threads:
        with open(f"/proc/self/task/{thread.native_id}/numa_maps") as file:
            policies = collections.Counter(line.split()[1] for line in file)        # parts of the system's own have others
        yield os.sched_getaffinity(thread.native_id), policies.most_common(1)[0][0]


@two_cpus
@placing
@pytest.mark.parametrize("options", [dict(), dict(mmap=False), dict(threads=5, threads_batch=3)])
def test_the_same_logits_on_two_nodes(two_nodes, small_model, load, options, monkeypatch):
    ids, mine, policy = random_ids(30), os.sched_getaffinity(0), mempolicy.of_thread()

    def logits(model, **observer):
        session = model.session()
        return np.stack([session.prefill(ids, **observer), *(session.decode(token) for token in ids[:4])])
    expected = logits(pydsa.load(small_model(), n_ctx=64, kv_type="f32", threads=1))
    forget_threads()
    model = pydsa.load(small_model(), n_ctx=64, kv_type="f32", numa="distribute", **options)
    assert model.threads == options.get("threads", 2)
    visits, outside, run_step = [], [], threads.team.run_step
    monkeypatch.setattr(threads.team, "run_step", lambda *args: (
        visits.append((os.sched_getaffinity(0), mempolicy.of_thread())), run_step(*args)))
    met = logits(model, observe=lambda node, arrays: outside.append((os.sched_getaffinity(0), mempolicy.of_thread())))
    assert np.array_equal(met, expected)
    assert set(map(str, outside)) == {str((mine, policy))} and (os.sched_getaffinity(0), mempolicy.of_thread()) == (mine, policy)
    assert {(tuple(cpus), found) for cpus, found in visits} == {((CPUS[0],), Policy(INTERLEAVE, MEMORY))}
    team = threads._teams[model.threads_batch]
    wanted = [({CPUS[i * 2 // team.n]}, f"interleave:{in_ranges(MEMORY)}") for i in range(1, team.n)]
    deadline = time.monotonic() + 20
    while list(places(team)) != wanted:         # on a busy machine a thread may not have run yet
        assert time.monotonic() < deadline, list(places(team))
        time.sleep(0.01)


@two_cpus
@placing
@pytest.mark.parametrize("mmap", [True, False])
def test_what_reads_weights_has_a_policy(two_nodes, small_model, monkeypatch, mmap):
    """... the thread that loads, and the one that reads ahead; afterwards it has none."""
    met, before = [], mempolicy.of_thread()

    def noted(function):
        def call(*args):
            met.append((function.__name__, mempolicy.of_thread()))
            return function(*args)
        return call
    for module, name in (pydsa.model, "warn_of_gaps"), (pydsa.model, "copied"), (reading_ahead, "pieces_of"):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    pydsa.load(small_model(), n_ctx=64, kv_type="f32", numa="distribute", mmap=mmap)
    with reading_ahead.ReadAhead([[(len, ())]]):        # of any op
        pass
    assert {name for name, _ in met} == {"warn_of_gaps", "pieces_of"} | ({"copied"} if not mmap else set())
    assert {policy for _, policy in met} == {Policy(INTERLEAVE, MEMORY)} and mempolicy.of_thread() == before


@two_cpus
@placing
@pytest.mark.parametrize("word, on_nodes, share", [
    ("distribute", [1] * 60 + [0] * 4, "94% .* node 1"), ("distribute", [0] * 40 + [1] * 24, None),
    ("distribute", [0] * 15 + [-2] * 49, None), ("isolate", [0] * 40 + [1] * 24, None),
    ("isolate", [0] * 9 + [1] * 11 + [-14] * 44, "55% .* node 1"), ("numactl", [1] * 64, None)])
def test_weights_that_lie_elsewhere_already(two_nodes, small_model, monkeypatch, word, on_nodes, share):
    monkeypatch.setattr(mempolicy, "nodes_at", lambda addresses: on_nodes if addresses else [])
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        pydsa.load(small_model(), n_ctx=64, kv_type="f32", numa=word)
        pydsa.load(small_model(), n_ctx=64, kv_type="f32", numa=word, mmap=False)
    assert len(met) == (share is not None) and all(re.search(f"^{share}.*without --numa {word}: drop", str(each.message)) for each in met)


@two_cpus
@placing
def test_isolated_threads_and_memory(two_nodes, small_model, monkeypatch):
    monkeypatch.setattr(threads, "_scratch", (np.empty(0, np.uint8), 0))
    model = pydsa.load(small_model(n_ff=5000), n_ctx=8192, kv_type="f32", mmap=False, numa="isolate")
    assert (model.threads, model.threads_batch) == (1, 1)       # the cores of a node
    copies = [w.data for w in model.runner.on["cpu"].weights.values() if hasattr(w, "data") and w.data.nbytes > numa.LEAST + 8192]
    caches = [cache._bytes for cache in model.runner.make_caches(model.setup, 8192).values() if cache.nbytes > numa.LEAST]
    buffers = [model.runner.on["cpu"]._buffer]
    model.session().prefill(np.arange(600) % 300)
    buffers.append(threads._scratch[0])
    assert copies and caches and min(buffer.nbytes for buffer in buffers) > numa.LEAST
    assert {policy_at(array) for array in copies + caches + buffers} == {"prefer:0"}


PROCESSES = """
import os, signal, sys, threading, time
import numpy as np
import pydsa
from pydsa.backends.cpu.team import threads
from pydsa.machine import mempolicy, numa
numa.ROOT = sys.argv[2]
mine, ids = os.sched_getaffinity(0), np.arange(40)
def state():
    return os.sched_getaffinity(0), mempolicy.of_thread()
before = state()
model = pydsa.load(sys.argv[1], n_ctx=512, n_ubatch=16, threads=2, threads_batch=3, numa="distribute")
def logits(session=None):
    session = session or model.session()
    return np.array([session.prefill(ids), *(session.decode(token) for token in (1, 2, 3))])
expected = logits()
assert state() == before
child = os.fork()
if child == 0:
    assert state() == before and (logits() == expected).all() and state() == before
    assert [os.sched_getaffinity(thread.native_id) for thread in threads._teams[2].threads] == [{max(sorted(mine)[:2])}]
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
child = os.fork()
if child == 0:          # one that was given a CPU of its own
    os.sched_setaffinity(0, {min(mine)})
    assert (logits() == expected).all()
    assert [os.sched_getaffinity(thread.native_id) for thread in threads._teams[2].threads] == [{min(mine)}]
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
try:
    pydsa.load(sys.argv[1], n_ctx=64)
except pydsa.PydsaError as error:
    print(error)
results = []
def work():
    results.append(((logits() == expected).all(), state() == before))
workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert results == [(True, True)] * 3
signal.signal(signal.SIGINT, signal.default_int_handler)
session = model.session()
for i in range(8):
    timer = threading.Timer(0.01 + 0.003 * i, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        while True:
            session.truncate(0)
            session.prefill(ids)
            session.decode(1)
    except KeyboardInterrupt:
        assert state() == before
    timer.join()
session.truncate(0)
assert (logits(session) == expected).all() and state() == before
print("done")
"""


@two_cpus
@placing
def test_forks_threads_and_ctrl_c(small_model, tmp_path):
    """The threads that run steps are free after them, whatever happens."""
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES, small_model(), made_of_one(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.returncode == 0
    refusal, last = done.stdout.splitlines()
    assert refusal.startswith("This process runs models with --numa distribute") and last == "done"


@two_cpus
@placing
def test_ctrl_c_while_a_thread_is_placed(two_nodes, small_model, monkeypatch):
    """... or about to be free: it takes effect when the thread is free."""
    mine, policy, theirs = os.sched_getaffinity(0), mempolicy.of_thread(), signal.getsignal(signal.SIGINT)
    session = pydsa.load(small_model(), n_ctx=64, kv_type="f32", numa="distribute").session()

    def after(function):
        def call(*args):
            function(*args)
            signal.raise_signal(signal.SIGINT)
        return call
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for module, name in (numa, "place_thread"), (mempolicy, "set_for_thread"), (threads.team, "run_step"):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(module, name, after(getattr(module, name)))
                session.decode(1)
            assert (os.sched_getaffinity(0), mempolicy.of_thread()) == (mine, policy)
    finally:
        signal.signal(signal.SIGINT, theirs)


# The command line

def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_every_command_that_runs_a_model_has_the_option():
    with click.Context(main) as context:
        commands = [main.get_command(context, name) for name in main.list_commands(context)]
    options = {command.name: {param.name for param in command.params} for command in commands}
    running, able = ({name for name, names in options.items() if what in names} for what in ("threads_batch", "numa"))
    assert running == able and len(able) > 6


@pytest.mark.parametrize("args, message", [
    (["--numa", "mirror"], "'mirror' is not one of 'distribute', 'isolate', 'numactl'"),
    (["--numa", "isolate", "--device", "cuda"], "--numa is for the threads and the memory of cpu, and cuda has its own"),
    (["--numa", "numactl", "--device", "reference"], "--numa is for the threads and the memory of cpu, and reference has its own")])
def test_refusals(small_model, args, message):
    result = run("run", "-p", "x", *args, "-m", small_model())
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.parametrize("word", ["mirror", "", 1, True])
def test_unknown_words(small_model, word):
    with pytest.raises(PydsaError, match=f"^numa is {word!r}, expected one of distribute, isolate, numactl.$"):
        pydsa.load(small_model(), numa=word)


def test_a_model_on_several_devices():
    """... has the option, if one of them has threads that can be placed."""
    assert check_numa(("reference", "cpu"), "isolate") == check_numa(("cpu",), "isolate") == "isolate"
    with pytest.raises(PydsaError, match="cuda has its own"):
        check_numa(("cuda", "cuda1"), "isolate")


@pytest.mark.parametrize("room, where, sentence", [(1 << 30, ("cuda",), "--numa isolate is without effect: all runs on cuda"),
                                                   (1_000_000, ("cpu", "cuda"), None), (None, ("cpu",), None)])
def test_plans_place_what_is_left_on_the_host(small_model, room, where, sentence):
    """... and search for it as without the option."""
    gpus = {} if room is None else simulated_gpus([DEVICES["cuda"].reserved + MARGIN + room])
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        setup = fitted(small_model(), gpus=gpus, n_ctx=64, n_ubatch=8, numa="isolate")
    assert setup.placement.devices == where and setup.numa == ("isolate" if "cpu" in where else None)
    assert [sentence in str(each.message) for each in met] == [True] * (sentence is not None)
    with pytest.raises(PydsaError, match="numa is 'mirror', expected one of"):
        fitted(small_model(), gpus=gpus, n_ctx=64, numa="mirror")


@two_cpus
def test_bench_tells_the_setting(two_nodes, small_model):
    common = ("bench", "-m", small_model(), "--kv-type", "f32", "-p", 2, "-n", 0, "-r", 1)
    assert "numa" not in run(*common, "-t", 1).stdout
    assert [row["numa"] for row in json.loads(run(*common, "-t", 1, "-o", "json").stdout)] == [None]
    forget_threads()
    assert [row["numa"] for row in json.loads(run(*common, "-o", "json", "--numa", "numactl").stdout)] == ["numactl"]
    assert "| numactl |" in run(*common, "--numa", "numactl").stdout
    result = run(*common)
    assert result.exit_code == 2 and "This process runs models with --numa numactl" in result.stderr


def test_trace_keeps_what_is_not_for_the_reference_from_it(small_model):
    """... which is no fault of the device that is compared with it."""
    result = run("trace", "-m", small_model(), "-p", "ab", "-c", 64, "--kv-type", "f32", "--numa", "numactl", "--no-mmap")
    assert result.exit_code == 0, result.stderr


@two_cpus
def test_info_shows_the_nodes(two_nodes, small_model, monkeypatch):
    monkeypatch.setattr(numa, "permitted", lambda plan: (plan, []))
    text = run("info", small_model()).stdout
    for line in (f"  node 0       1 core (CPUs {CPUS[0]}); 8.0 GiB",
                 "  distribute   2 threads (1 on node 0, 1 on node 1); memory of nodes 0-1 in turns.",
                 "  isolate      1 thread (1 on node 0); memory of node 0 first.",
                 "  numactl      2 threads (1 on node 0, 1 on node 1); memory as the process has it."):
        assert line + "\n" in text
    assert run("info", small_model(), "--device", "reference").stdout.count("NUMA") == 0
    monkeypatch.undo()
    report = json.loads(run("info", small_model(), "-o", "json").stdout)["numa"]
    assert {"nodes", "options"} == set(report) and (len(report["nodes"]) > 1 or report["options"] == {})


@two_cpus
def test_info_shows_what_is_refused(two_nodes, small_model, monkeypatch):
    monkeypatch.setattr(mempolicy, "_call", refuse(1))
    monkeypatch.setattr(os, "sched_setaffinity", refuse(1))
    report = numa.describe_numa()["options"]
    assert report["distribute"].startswith("2 threads (anywhere); memory as the process has it. The system refuses to keep threads")
    assert "SYS_NICE" in report["isolate"] and "SYS_NICE" not in report["numactl"]
