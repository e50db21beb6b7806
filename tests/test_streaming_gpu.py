"""Experts that are copied to GPUs for prompts.

The slots are those of the CUDA backend. The PTX machine stands in for two GPUs, whose streams do their work as late as they may.
"""
import importlib.util

import pytest
from helpers import TINY
from two_gpus import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

CODE = """
import pydsa
from pydsa.backends.cuda.runtime import streaming
from pydsa.model import Model
from pydsa.setup import Setup
options = dict(n_ctx=16, n_ubatch=4, kv_type="f32", attention="sparse", precision="exact")
ids, path = [5, 250, 17, 101, 33, 8], sys.argv[1]
expected = pydsa.load(path, device="cpu", threads=1, **options).logits(ids)
fills, fill, ready = [], streaming.Slot.fill, streaming.Filling.ready
streaming.Slot.fill = lambda self, tensor: fills.append(tensor.name) or fill(self, tensor)

def nmse(a):
    return ((a - expected) ** 2).sum() / (expected ** 2).sum()

def slots():
    return [slot for on in model.runner.on.values() for slot in on.slots.values()]

driver.streams.late = lambda stream: True
for devices in (["cuda1"], ["cuda", "cuda1"]):
    model = Model(Setup(path, device=devices, cpu_moe=True, stream_from=4, **options), threads=1)      # a plan wants more memory
    assert {name: len(on.slots) for name, on in model.runner.on.items()} == dict.fromkeys(devices, 3) | {"cpu": 0}
    fills.clear()
    assert nmse(model.logits(ids)) < 1e-6
    assert fills == [f"blk.{il}.ffn_{part}_exps.weight" for il in range(2) for part in ("gate", "up", "down")]      # of four tokens
    assert not any(slot._in_use for slot in slots())

calls = []
def interrupted(self):
    calls.append(self)
    if len(calls) == 5:
        raise KeyboardInterrupt
    return ready(self)
streaming.Filling.ready, session = interrupted, model.session()
try:
    session.logits(ids)
except KeyboardInterrupt:
    calls.append(None)
assert calls[-1] is None and session.n_past == 0 and not any(slot._in_use for slot in slots())
assert nmse(session.logits(ids)) < 1e-6
"""


def test_streaming_to_one_gpu_and_to_two(small_model):
    """Logits are the CPU's, also after an interrupt; a matrix is copied once."""
    run(CODE, str(small_model(**TINY | {"type": "Q4_0", "n_layer_dense": 0})))


def test_matrices_that_do_not_lie_side_by_side():
    """An expert's gate and up in one tensor: no copy of all of them is made."""
    run("""
from pydsa.backends.cuda.runtime import streaming
from pydsa.gguf.file import Tensor
both = np.random.default_rng(0).integers(0, 256, (5, 8, 36), np.uint8)
for data in (both[:, :4], both[:, 4:], both):
    tensor, copied, copy = Tensor("w", "Q4_0", (5, data.shape[1], 64), data), [], streaming.Engine.copy
    streaming.Engine.copy = lambda self, address, source: (copied.append(np.shares_memory(source, both)), copy(self, address, source))
    slot = cuda.Slot(data.nbytes)
    for experts in (None, [3, 4, 0]):
        w = slot.fill(tensor, experts).ready()
        there = w.data.get()[:data.nbytes].reshape(data.shape)
        assert np.array_equal(there if experts is None else there[experts], data if experts is None else data[experts])
        slot.release()
    streaming.Engine.copy = copy
    assert copied == [True] * (1 + 2 if data is both else 5 + 3), copied
""")
