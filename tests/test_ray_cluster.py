"""Models in stages on a Ray cluster of two nodes, both on this machine."""
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pydsa
from pydsa.errors import OutOfMemoryError, StageError
from pydsa.stages import cluster
from pydsa.stages.local_ray import ENVIRONMENT, environment
from pydsa.stages.running import Launcher
from tests.test_rays import OPTIONS, fails_in_time, idle, running_still, wait_until

NODE = r"node 127\.0\.0\.1:\d+"


@pytest.fixture(scope="module")
def nodes():
    """The program tests/ray_nodes.py, and the cluster's address."""
    root = Path(__file__).parent
    path = os.pathsep.join([str(root.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with environment(ENVIRONMENT | {"PYTHONPATH": path}):
        program = subprocess.Popen([sys.executable, root / "ray_nodes.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        yield program, program.stdout.readline().strip()
        gc.collect()
        cluster.close()
    program.communicate()


def test_a_model_is_divided_over_the_nodes_until_one_leaves(golden, load, nodes):
    (program, address), (path, arrays) = nodes, golden("ds32-f32")
    model = pydsa.load(path, ray=address, **OPTIONS)
    assert len(model.plan) == len(model.stages) == 2
    for i, line in enumerate(model.plan):
        assert line.startswith(f"stage {i + 1} of 2 (layer") and " GB/s" in line
    tokens = arrays["tokens"]
    assert np.array_equal(model.logits(tokens), load(path, **OPTIONS).logits(tokens))
    session, processes = model.session(), [process.pid for process in model.runner.launcher._processes]
    session.prefill([1, 2, 3])
    print(file=program.stdin, flush=True)
    assert program.stdout.readline() == "removed\n"
    fails_in_time(session, rf"(?i)stage \d of 2 \(layers? \S+, {NODE}\) has failed")
    wait_until(lambda: len([pid for pid in processes if running_still(pid)]) == 1 == len(idle()))       # the other node's is free


@pytest.mark.parametrize("address, said", [("ray://127.0.0.1:1", "expected a cluster's address"), (3, "expected a cluster's address"),
                                           ("127.0.0.1:1", "No Ray answers"), ("127.0.0.1", "expected a cluster's address")])
def test_wrong_addresses(golden, address, said):
    with pytest.raises(StageError, match=said):
        pydsa.load(golden("ds32-f32")[0], ray=address, stages=2)


@pytest.mark.parametrize("address, cause, said", [
    ("auto", "InvalidAuthToken: token is missing", "has tokens, and this program has not the right one: set RAY_AUTH_MODE=token"),
    ("auto", "timed out", "does not answer .*; start one"), ("127.0.0.1:{port}", "timed out", "loopback address")])
def test_a_ray_that_is_not_reached(address, cause, said):
    def init(**options):
        assert os.environ[cluster.ATTEMPTS] == "1"
        raise ConnectionError("Failed to connect") from RuntimeError(cause)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(StageError, match=said):
        cluster.connect(SimpleNamespace(init=init), address.format(port=server.getsockname()[1]))
    assert cluster.ATTEMPTS not in os.environ


def test_stages_that_are_being_loaded_end_with_one_that_fails(monkeypatch):
    """They would go on, and keep what they load."""
    def loaded(launcher, i, begun):
        raise OutOfMemoryError("too large")
    for name, value in dict(_begin_to_load=lambda launcher, i: i, _report=lambda *args: None, _loaded=loaded).items():
        monkeypatch.setattr(Launcher, name, value)
    ended, nodes = [], [cluster.RayNode(name, name, name, True) for name in "ab"]
    ray = SimpleNamespace(wait=lambda begun, timeout: (begun[:1], begun[1:]))
    launcher = Launcher(SimpleNamespace(nodes=lambda: nodes, launchers=set(), ray=ray), SimpleNamespace(stages=2))
    launcher._processes = [SimpleNamespace(end=lambda i=i: ended.append(i)) for i in range(2)]
    with pytest.raises(OutOfMemoryError):
        launcher.load()
    assert ended == [1]
