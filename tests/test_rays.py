"""Models in stages on a real Ray of this machine: the same bits, faults, and nothing is left."""
import gc
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

import pydsa
from pydsa.bench import Bench, format_rows
from pydsa.errors import OutOfMemoryError, StageError
from pydsa.setup import Setup
from pydsa.stages import cluster, running, worker
from pydsa.stages.actors import COMPARED, StageActor, identity
from pydsa.stages.division import borders
from pydsa.stages.wire import Limits

MODELS = ("ds32-f32", "ds32-q8_0", "ds32-q4_k_m", "glm-q8_0", "ds2-q4_0")
OPTIONS = dict(threads=1, n_ctx=256, n_ubatch=64, kv_type="f32", device="cpu")
IN_TIME = 10        # seconds in which an error must name the stage


@pytest.fixture(scope="module", autouse=True)
def ray():
    """A Ray for this module.

    It was started on a thread that has ended, as in a server: the system ends processes with the thread that started them, if told so.
    """
    thread = threading.Thread(target=cluster.cluster)
    thread.start()
    thread.join()
    yield
    gc.collect()
    cluster.close()


def in_stages(path, stages, **options):
    return pydsa.load(path, stages=stages, **OPTIONS | options)


def idle():
    """The processes that wait for a model."""
    return {process.pid for process in cluster._current._idle}


def pids(model):
    """The processes of a model's stages."""
    return [process.pid for process in model.runner.launcher._processes]


@pytest.mark.parametrize("name", MODELS)
def test_stages_give_the_same_bits(golden, load, name):
    """In two stages and in three; the same processes run one after another."""
    path, arrays = golden(name)
    whole = load(path, **OPTIONS)
    tokens = arrays["tokens"]
    expected, answer = whole.logits(tokens), whole.complete(tokens[:150].tolist(), 20, temperature=0.7, seed=3).text
    assert expected.shape[0] == len(tokens) > 2 * OPTIONS["n_ubatch"]
    most = len(borders(whole.config))
    assert most == (2 if name == "glm-q8_0" else 3)     # a layer without an indexer stays with the one whose choice it uses
    for n in range(2, most + 1):
        model = in_stages(path, n)
        assert len({*pids(model), os.getpid()}) == n + 1
        assert np.array_equal(model.logits(tokens), expected)
        assert model.complete(tokens[:150].tolist(), 20, temperature=0.7, seed=3).text == answer


def test_processes_are_used_again(golden):
    first = in_stages(golden("ds32-f32")[0], 2)
    there = {*pids(first), *idle()}
    session = first.session()
    del first
    gc.collect()
    assert len(session.prefill([1, 2, 3])) > 3      # the stages live as long as a session
    del session
    gc.collect()
    assert len(there) < 3 or {*pids(in_stages(golden("ds2-q4_0")[0], 3))} <= there


def test_bench_tells_the_stages(golden):
    model = in_stages(golden("ds32-f32")[0], "0-0,1-2")
    rows = list(Bench([16], [2], [0], 1).run(model))
    assert len(rows) == 2 and {(row["stages"], row["limit_ts"]) for row in rows} == {("0,1-2", None)}
    assert "| stages |" in format_rows(rows, "md") and "0,1-2" in repr(model)


def test_all_ports_are_on_loopback(golden):
    model = in_stages(golden("ds32-f32")[0], 2)
    processes = [process for process in psutil.Process().children(recursive=True)]
    assert {*pids(model)} <= {process.pid for process in processes}
    listening = [c.laddr.ip for process in processes for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 4
    ips = [ipaddress.ip_address(ip) for ip in listening]
    assert all((getattr(ip, "ipv4_mapped", None) or ip).is_loopback for ip in ips)


def fails_in_time(session, words):
    """The steps of a session of three tokens end with the error of a stage."""
    start = time.monotonic()
    with pytest.raises(StageError, match=words):
        while time.monotonic() < start + 2 * IN_TIME:
            session.decode(4)
            session.truncate(3)
    assert time.monotonic() - start < IN_TIME


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_that_ends_or_hangs_is_named(golden, number):
    path, arrays = golden("ds32-f32")
    model = in_stages(path, 2)
    session, (first, second) = model.session(), pids(model)
    session.prefill([1, 2, 3])
    os.kill(second, number)
    fails_in_time(session, r"(?i)stage 2 of 2 \(layers? \d+(-\d+)?, node 127\.0\.0\.1\)")
    wait_until(lambda: not running_still(second))
    with pytest.raises(StageError):
        session.decode(4)
    wait_until(lambda: first in idle())     # the other stage is free
    assert second not in idle()


def wait_until(found):
    deadline = time.monotonic() + IN_TIME
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running_still(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stage_is_started_again(golden, load):
    path, arrays = golden("ds32-f32")
    model, tokens = in_stages(path, 2, resume=True), arrays["tokens"]
    expected = load(path, **OPTIONS).logits(tokens[:101])[-1]
    session = model.session()
    session.prefill(tokens[:100])
    os.kill(pids(model)[0], signal.SIGKILL)
    with pytest.warns(UserWarning, match="Stage 1 of 2 .* is started again"):
        assert np.array_equal(session.decode(int(tokens[100])), expected)


@pytest.mark.parametrize("name", COMPARED)
def test_other_software_is_named(golden, monkeypatch, name):
    mine = identity() | {name: "9.9"}
    monkeypatch.setattr(cluster, "identity", lambda: mine)
    with pytest.raises(StageError, match=rf"Stage 1 of 2 .*: {name} \S+, not 9\.9; install the same versions"):
        in_stages(golden("ds32-f32")[0], 2)


def test_another_file_is_named(golden, monkeypatch):
    monkeypatch.setattr(running.Asked, "whole", lambda asked, absent, whole=running.Asked.whole: changed(whole(asked)))

    def changed(setup):
        setup.fingerprint = "another"
        return setup
    with pytest.raises(StageError, match="Stage 1 of 2 .* has another file at .*ds32-f32.gguf"):
        in_stages(golden("ds32-f32")[0], 2)


def test_a_file_that_a_node_lacks_is_named(golden, monkeypatch, tmp_path):
    monkeypatch.setattr(running.Launcher, "_begin_to_open", lambda launcher, i: launcher._processes[i].begin(
        "open", str(tmp_path / "none.gguf"), {}, tuple(launcher.stages[i])))
    with pytest.raises(pydsa.GGUFError, match="Stage 1 of 2 .*none.gguf"):
        in_stages(golden("ds32-f32")[0], 2)


def test_a_stage_that_cannot_hold_its_part_says_so(golden):
    with pytest.raises(OutOfMemoryError, match="Stage 1 of 2 .* would take"):
        in_stages(golden("ds32-f32")[0], "0-0,1-2", n_ctx=2**31 - 1)


def test_nothing_is_left_of_a_program_that_is_killed():
    code = ("from pydsa.stages.cluster import cluster; ray = cluster(); process = ray.take(ray.nodes()[0], 'a stage'); "
            "print(ray._own._folder, process.description()['pid'], flush=True); input()")
    program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder, stage = program.stdout.readline().split()
    there = [process.pid for process in psutil.Process(program.pid).children(recursive=True)]
    assert os.path.isdir(folder) and int(stage) in there
    os.kill(int(stage), signal.SIGSTOP)         # one that hangs, too
    program.kill()
    program.communicate()
    wait_until(lambda: not any(map(running_still, there)) and not os.path.exists(folder))


def test_a_stage_waits_while_others_are_loaded(golden, monkeypatch):
    """That may take many minutes, in which it has no driver."""
    monkeypatch.setattr(worker, "ORPHANED", 0.01)
    monkeypatch.setattr(worker, "BEAT", 0.01)
    path, _ = golden("ds32-f32")
    actor, limits = StageActor(), Limits.of(Setup(path, n_ctx=64))
    assert actor.open(str(path), dict(n_ctx=64, kv_type="f32", device="cpu"), (0, 1))["value"][:2] == (Setup(path).fingerprint, [])
    host, port = actor.load(1, None, "f32", "127.0.0.1", limits)["value"]
    there = actor._worker
    assert not there.wait(0.3) and host == "127.0.0.1" and port > 0
    actor.leave()
    assert there.wait(IN_TIME)
