"""Models over the CPU and GPUs that tests/ptx emulates: logits, and the order of launches, copies and waits."""
import importlib.util

import forked
import pytest
from helpers import TINY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

SETUP = """
import sys
import numpy as np
from tests.ptx.driver import install
driver = install(1 << 22, 2)
import pydsa
from pydsa.backends import cuda
path, ids = sys.argv[1], [5, 6, 7, 8, 9, 10, 11, 12]

def loaded(**options):
    return pydsa.load(path, n_ctx=16, n_ubatch=8, threads=1, kv_type="f32", precision="exact", **options)

def nmse(met, expected):
    met, expected = np.asarray(met, np.float64), np.asarray(expected, np.float64)
    return (((met - expected) ** 2).sum(-1) / (expected ** 2).sum(-1)).max()

def steps(model):
    session = model.session()
    found = [session.prefill(ids[:3]), *map(session.decode, ids[3:5])]     # the third token's launches are recorded
    driver.log.clear()
    return [*found, session.decode(ids[-1])], session

def step_log():
    words = {"cuGraphLaunch": "launch", "cuLaunchKernel": "kernel", "cuMemcpyDtoHAsync": "to host", "cuMemcpyHtoDAsync": "from host",
             "cuMemcpyPeerAsync": "across", "cuEventSynchronize": "wait", "cuStreamSynchronize": "whole stream"}
    found = [words[name] for name, _ in driver.log if name in words]
    return found[found.index("launch"):]        # ids and positions were written before
"""


def run(code, *args):
    forked.run(SETUP + code, *args)


def test_experts_on_the_cpu_and_layers_on_two_gpus(small_model):
    """Logits are those of one GPU, and launches come before waits.

    Each segment is one launch, and the shared expert's comes before the CPU waits for what the others need. The stream is waited for as a
    whole only to fetch the logits. A GPU may be as late as the driver allows.
    """
    run("""
alone, _ = steps(loaded(device="cuda", attention="sparse"))
experts = ["launch", "to host", "to host", "to host", "launch", "wait", "wait", "wait", "from host", "launch", "wait"]
logits = ["to host", "whole stream"]
for late, options, log in (("01", dict(device="cuda,cuda1", cpu_moe=True), ["launch", "across", "across", *experts, *logits]),
                           ("0", dict(device="cuda,cuda1"), ["launch", "across", "across", "launch", *logits])):
    driver.streams.late = lambda stream: str(stream.device) in late
    model = loaded(attention="sparse", **options)
    found, session = steps(model)
    assert np.array_equal(found, alone) if "cpu" not in model.setup.device_name else nmse(found, alone) < 1e-6, options
    assert step_log() == log, step_log()
    caches = {ref.layer: cache._bytes.gpu.index for ref, cache in session.caches.items() if ref.kind == "latents"}
    assert caches == {0: 0, 1: options["device"].count(",")}
""", str(small_model(**TINY | {"type": "Q8_0"})))


def test_batches_and_sessions(small_model, tmp_path):
    """Segments may begin with an op of one context, or with cache_write."""
    run("""
from pydsa.engine.batch import Batch
model = loaded(device="cuda,cuda1", attention="sparse", override_tensor=["0.attn_k_b=cpu", "1.attn_kv_a=cpu"])
results, caches = [], [(model.session().caches, 1), (model.session().caches, 1)]
one, two = model.runner.bind_together("sparse", caches[:1], 1, again=True), model.runner.bind_together("sparse", caches, 2, again=True)
assert {one.calls[part.first][0].op for part in one.parts} >= {"cache_write", "sparse_attention"}
kinds = [{type(recorded) for recorded in bound.recording._recordings if isinstance(recorded, cuda.Calls)} for bound in (one, two)]
assert kinds == [{cuda.Recording}, {cuda.Calls}]        # kernels are fused for one token alone
for model in (model, loaded(device="cuda", attention="sparse")):
    sessions, batch = [model.session(), model.session()], Batch(model.runner, model.setup)
    first = [session.prefill(some) for session, some in zip(sessions, (ids[:2], ids[2:4]))]
    results.append([first, batch.run(sessions, [[20], [21]])])
    if model.setup.placement.rules:
        sessions[0].save(sys.argv[2])
    else:
        sessions[0].load(sys.argv[2])
    results[-1].append(batch.run(sessions, [[22], [23]]))
assert nmse(*results) < 1e-6
""", str(small_model(**TINY | {"type": "Q8_0"})), str(tmp_path / "session"))


def test_stages(small_model):
    """Stages on a GPU each give what one gives; one token is recorded."""
    run("""
from pydsa.fitting import fitted
from pydsa.stages.stage import Stage
alone, _ = steps(loaded(device="cuda", attention="sparse"))
options = dict(n_ctx=16, n_ubatch=8, kv_type="f32", attention="sparse")
stages = [Stage(fitted(path, device=device, layers=layers, **options)) for device, layers in (("cuda", (0, 1)), ("cuda1", (1, 2)))]
for stage in stages:
    stage.open(1)
found, n_past = [], 0
for n in (3, 1, 1, 1):
    rows, positions = np.array(ids[n_past:n_past + n] if n_past < 5 else ids[-1:], np.int32), np.arange(n_past, n_past + n)
    for stage in stages:
        rows = stage.run([(1, n)], "sparse", rows, positions, 1)
    found, n_past = found + [rows[0]], n_past + n
assert np.array_equal(found, alone)
assert all(type(recorded) is cuda.Recording for stage in stages for recorded in [next(iter(stage._bound.values())).recording])
""", str(small_model(**TINY | {"type": "Q8_0"})))
