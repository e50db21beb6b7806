"""Several GPUs, and copies between them and the host: with the emulated driver (tests/ptx), and in Numba's simulator.

The tests run in processes of their own, as the simulated driver replaces the GPUs'.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

SETUP = """
import gc
import itertools
import sys
import numpy as np
from pydsa.backends import gpus
simulated = gpus.SIMULATED
if not simulated:
    from cuda.bindings.driver import CUresult
    from tests.ptx.driver import install
    driver = install(1 << 22, 2)
from pydsa.backends import cuda, host, transfers
from pydsa.errors import OutOfMemoryError, PydsaError

def refused(kind, work):
    try:
        work()
    except PydsaError as error:
        assert type(error) is kind, error
        return str(error)
    raise AssertionError("nothing was refused")

def empty_arena(i):
    return not driver.arenas[i].allowed.any()
"""


def run(code, *args, **env):
    done = subprocess.run([sys.executable, "-c", SETUP + code, *args], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": str(ROOT)} | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SIMULATED = {"NUMBA_ENABLE_CUDASIM": "1", "PYDSA_SIMULATED_GPUS": "2"}


@pytest.mark.parametrize("env", [{}, SIMULATED])
def test_a_backend_for_each_gpu(env):
    """Arrays, scratch memory and kernels are those of the backend's GPU.

    The module is the backend of the first one.
    """
    run("""
first, second = cuda.on(0), cuda.on(1)
assert first is cuda.on(0) and second is cuda.on(1) and first is not second and cuda.n_gpus() == 2
assert second.linear is cuda.linear and second.FLOAT is np.float32 and second.VARIANTS is cuda.VARIANTS
x, y, z = first.upload(np.ones((2, 8), np.float32)), second.upload(np.ones((2, 8), np.float32)), cuda.empty((2, 8), np.float32)
assert x.gpu is z.gpu is not y.gpu and y[1:].rows.gpu is y.gpu
out = [backend.empty((2, 8), np.float32) for backend in (first, second)]
def step(backend, out, x):
    return backend.recorded([("node", backend.add, (out, x, x))], [0], again=False)
for backend, o, a in zip((first, second), out, (x, y)):
    step(backend, o, a).run()
    assert (backend.fetch(o) == 2).all()
    assert [seconds >= 0 for seconds in backend.timed([(backend.add, (o, a, a))])] == [True]
with second.selected():
    assert cuda.empty((1,), np.int32).gpu is y.gpu
    cuda.add(out[1], y, y)
    assert (step(first, out[0], x).run() or out[0].get() == 2).all()        # where it was made for, whatever is selected
for misplaced in (lambda: cuda.add(out[1], y, y), lambda: step(second, out[0], x).run()):
    try:
        misplaced()
    except AssertionError as error:
        assert "an array is on GPU" in str(error)
    else:
        raise SystemExit("a kernel got an array of another GPU")
from pydsa.backends.cuda.array import scratch
from pydsa.backends.cuda.linear import arange
buffers = [scratch("x", (4,), np.float32), arange(3)]
with second.selected():
    assert [buffer.gpu.index for buffer in (scratch("x", (4,), np.float32), arange(3), *buffers)] == [1, 1, 0, 0]
assert scratch("x", (4,), np.float32) is buffers[0] and arange(3) is buffers[1]
assert "GPU 1: " in second.describe_device() and second.free_bytes() > 0
assert refused(PydsaError, lambda: cuda.on(2).check_threads(1)).startswith("There is no GPU 2: there are only GPUs 0 to 1 (")
assert refused(PydsaError, lambda: cuda.on(-1)) == "The GPU is -1, expected its number: 0, 1, ..."
assert [found[:2] for found in gpus.usable_gpus()] == [(i, gpus.SIMULATOR if simulated else "PTX in numpy (tests/ptx)") for i in range(2)]
""", **env)


def test_gpus_may_differ():
    """Kernels are compiled for each one's capability; errors name the GPU."""
    run("""
driver.capabilities[1] = 9, 0
from pydsa.backends.cuda.launch import KERNELS, Kernel
asked = []
Kernel.cubin = lambda kernel, capability: asked.append(capability) or kernel.ptx(capability).encode()
for i in range(2):
    x = cuda.on(i).upload(np.ones((1, 8), np.float32))
    cuda.on(i).compile_calls(lambda: [(cuda.add, (x, x, x))], lambda done, total, name: None)
assert set(asked) == {(8, 0), (9, 0)}
assert "GPU 1 has no room for 16 MiB more" in refused(OutOfMemoryError, lambda: cuda.on(1).empty((1 << 24,), np.uint8))
driver.fail["cuMemsetD8Async"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
assert refused(PydsaError, x.clear) == "The CUDA driver answers CUDA_ERROR_ILLEGAL_ADDRESS to cuMemsetD8Async on GPU 1."
driver.capabilities[1] = 7, 5
from pydsa.backends.cuda.current import Gpu, _gpus
_gpus[1] = cuda.on(1).gpu = Gpu(1)
assert "GPU 1, PTX in numpy (tests/ptx), has compute capability 7.5" in refused(PydsaError, lambda: cuda.on(1).check_threads(1))
assert [found.index for found in gpus.usable_gpus()] == [0]
""")


MODEL = """
import pydsa
from pydsa.backends.devices import Device
path, ids = sys.argv[1], [5, 6, 7, 8, 9, 10, 11]
def logits(backend):
    Device.backend = lambda device: backend
    session = pydsa.load(path, device="cuda", attention="sparse", n_ctx=16, n_ubatch=8).session()
    found = [session.prefill(ids[:4]), *map(session.decode, ids[4:])]
    sampled = session.generate([12], max_tokens=3, sampling=pydsa.Sampling(seed=1))       # by the GPU
    return [*found, np.array([*sampled])]
first = logits(cuda.on(0))
assert empty_arena(1) and not empty_arena(0)
driver.arenas[0].allocate = None       # nothing may be allocated there from now on
assert all(np.array_equal(a, b) for a, b in zip(first, logits(cuda.on(1)), strict=True))
graphs = [driver.counts[name] for name in ("cuGraphInstantiate", "cuGraphLaunch")]
assert graphs[0] > 1 and graphs[1] > 4, graphs
"""


def test_a_model_on_the_second_gpu(small_model):
    """All steps give the same bits, and nothing of them is on the first GPU."""
    run(MODEL, str(small_model(**TINY | {"type": "Q8_0", "n_layer": 1, "n_layer_dense": 0})))


# Each order in which streams may run: (what is late, of GPU 0 and of GPU 1)
LATE = ["", "0", "1", "01"]

TRANSFERS = """
from pydsa.backends import reference
devices = [cuda.on(0), cuda.on(1)]
late = sys.argv[1]
if not simulated:
    driver.streams.late = lambda stream: str(stream.device) in late
    streams_of = lambda backend: [s for s in driver.streams.all if s.device == backend.index]
values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)

def doubled(backend, x):
    out = backend.empty(x.shape, x.dtype)
    with backend.selected():
        cuda.add(out, x, x)
    return out

for pinned in (True, False):
    for dtype in (np.float32, np.float64):
        for backend in devices:
            x = (backend.host_empty if pinned else host.empty)((3, 8), dtype)
            x[...] = values
            y = backend.upload(np.zeros((3, 8), np.float32))
            there, back = transfers.transfer(host, x, backend, y), transfers.transfer(backend, y, host, x)
            for n in range(3):      # the same objects, for each step
                there.start()
                there.finish()
                two = doubled(backend, y)
                there.settle()
                x[...] = -1         # what has been read already
                with backend.selected():
                    cuda.add(y, two, two)
                back.start()
                y.clear()           # behind the copy
                back.finish()
                assert np.array_equal(x, 4 ** (n + 1) * values.astype(dtype)), (pinned, dtype, n)
for source, target in itertools.product(devices, devices):
    x, y = source.upload(values), target.upload(np.zeros((3, 8), np.float32))
    across = transfers.transfer(source, x, target, y)
    for n in range(2):
        old = doubled(target, y)        # of what y was before
        with source.selected():
            cuda.add(x, x, x)
        across.start()
        x.clear()
        across.finish()
        new = doubled(target, y)
        assert np.array_equal(new.get(), 4 * values * (n + 1)) and np.array_equal(old.get(), 4 * values * n), (source, target, n)
        x.set(values * (n + 2))
a, b = host.empty((4,), np.float64), host.empty((4,), np.float32)
a[...] = 1.5
plain = transfers.transfer(host, a, reference, b)
plain.start(), plain.finish(), plain.settle()
assert (b == 1.5).all()
"""


@pytest.mark.parametrize("late", LATE)
def test_transfers(late):
    """Values arrive, and are read before they are overwritten.

    This holds whichever stream is fast or slow.
    """
    run(TRANSFERS, late)


def test_transfers_in_the_simulator():
    run(TRANSFERS, "", **SIMULATED)


def test_what_is_forgotten_is_caught():
    """The emulated driver shows each missing step of a transfer."""
    run("""
first, second = cuda.on(0), cuda.on(1)
values = np.arange(8, dtype=np.float32)[None]
x, out = first.host_empty((1, 8), np.float32), first.host_empty((1, 8), np.float32)
y, z = first.upload(np.zeros((1, 8), np.float32)), second.empty((1, 8), np.float32)
there, back = transfers.transfer(host, x, first, y), transfers.transfer(first, y, host, out)
across = transfers.transfer(first, y, second, z)
driver.streams.late = lambda stream: True
x[...], out[...] = values, 0
there.start(), there.finish()
x[...] = 0                      # before settle()
assert (y.get() == 0).all()
y.set(values)
back.start()
assert (out == 0).all()         # before finish()
back.finish()
assert np.array_equal(out, values)
across.start()
from tests.ptx.machine import KernelError
def read():
    with second.selected():
        cuda.add(z, z, z)
    second.gpu.synchronize()
try:
    read()                      # before finish()
except KernelError as error:
    assert "reads global memory" in str(error) and "never written" in str(error)
else:
    raise SystemExit("a read before the copy has arrived")
across.finish()
read()
assert np.array_equal(z.get(), 2 * values)
""")


def test_pinned_memory():
    """It is aligned, and lives as long as its arrays."""
    run("""
x = cuda.on(1).host_empty((3, 5), np.float64)
assert x.shape == (3, 5) and x.dtype == np.float64 and x.ctypes.data % 64 == 0 and x.flags.writeable
part = x[1:].view(np.int64).reshape(-1)
from pydsa.backends.cuda.transfers import in_pinned_memory
assert in_pinned_memory(part) and not in_pinned_memory(np.zeros(3)) and not in_pinned_memory(host.empty((3,), np.float32))
del x
gc.collect()
assert part.size == 10 and "cuMemFreeHost" not in driver.counts
del part
gc.collect()
assert driver.counts["cuMemFreeHost"] == 1 and not driver.pinned
assert cuda.host_empty((0, 4), np.float32).shape == (0, 4)
driver.fail["cuMemHostAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
told = refused(OutOfMemoryError, lambda: cuda.host_empty((1 << 20,), np.float32))
assert told.startswith("The system refuses 4 MiB of pinned memory") and told.count(". ") == 0
""")


def test_a_finalizer_waits_for_no_lock():
    """Memory of a GPU that another thread has is freed by that thread."""
    run("""
import threading
first, second = cuda.on(0).gpu, cuda.on(1).gpu
x, y = cuda.on(0).empty((8,), np.float32), cuda.on(1).empty((8,), np.float32)
meet, leave = threading.Barrier(2), threading.Event()
def other():
    global y
    with second:
        meet.wait()
        del y
        leave.wait()
thread = threading.Thread(target=other)
thread.start()
held = [cuda.on(1).gpu]
meet.wait()
with first:
    del x                           # of the GPU that this thread has
    z = None
    assert driver.counts["cuMemFree"] in (1, 2)
    assert driver.device == 0       # whatever was freed
leave.set()
thread.join()
a, b = cuda.on(0).empty((8,), np.float32), cuda.on(1).empty((8,), np.float32)
with first:
    with second:
        del a                       # a lock of both
        assert driver.device == 1
    del b
    assert driver.device == 0
entered, go = threading.Event(), threading.Event()
def busy():
    with second:
        entered.set()
        go.wait()
c, before = cuda.on(1).empty((8,), np.float32), driver.counts["cuMemFree"]
thread = threading.Thread(target=busy)
thread.start()
entered.wait()
del c                               # does not wait for the other thread
assert driver.counts["cuMemFree"] == before
go.set()
thread.join()
assert driver.counts["cuMemFree"] == before + 1 and empty_arena(0) and empty_arena(1)
""")
