"""Models in stages on a Ray cluster of two nodes, both on this machine."""
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import pydsa
from pydsa.errors import StageError
from pydsa.stages import cluster
from pydsa.stages.local_ray import ENVIRONMENT, environment
from tests.test_rays import IN_TIME, OPTIONS, idle, running_still, wait_until

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
    start = time.monotonic()
    with pytest.raises(StageError, match=rf"(?i)stage \d of 2 \(layers? \S+, {NODE}\) has failed"):
        while time.monotonic() < start + 2 * IN_TIME:
            session.decode(4)
            session.truncate(3)
    assert time.monotonic() - start < IN_TIME
    wait_until(lambda: len([pid for pid in processes if running_still(pid)]) == 1 == len(idle()))       # the other node's is free


@pytest.mark.parametrize("address, said", [("ray://127.0.0.1:1", "expected a cluster's address"), (3, "expected a cluster's address"),
                                           ("127.0.0.1:1", "No Ray answers"), ("127.0.0.1", "No Ray answers")])
def test_wrong_addresses(golden, address, said):
    with pytest.raises(StageError, match=said):
        pydsa.load(golden("ds32-f32")[0], ray=address, stages=2)
