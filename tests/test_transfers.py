"""Copies between the host and GPUs: values between segments, weights in slots.

With the emulated driver, whose streams may be late, and in Numba's simulator.
"""
import importlib.util

import pytest
from two_gpus import SIMULATED, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")


TRANSFERS = """
from pydsa.backends import reference
devices = [cuda.on(0), cuda.on(1)]
values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)

def doubled(backend, x):
    out = backend.empty(x.shape, x.dtype)
    with backend.selected():
        cuda.add(out, x, x)
    return out

def there_and_back():
    for pinned in (True, False):
        for dtype in (np.float32, np.float64):
            for backend in devices:
                x = (backend.host_empty if pinned else host.empty)((3, 8), dtype)
                x[...] = values
                y = backend.upload(np.zeros((3, 8), np.float32))
                there, back, outs = transfers.transfer(host, x, backend, y), transfers.transfer(backend, y, host, x), []
                for n in range(3):      # nothing waits for the kernels
                    x[...] = n * values
                    there.start()
                    there.finish()
                    outs.append(doubled(backend, y))
                    there.settle()
                assert all(np.array_equal(out.get(), 2 * n * values) for n, out in enumerate(outs))
                x[...] = values
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

def across_gpus():
    for source, target in itertools.product(devices, devices):
        x, y = source.upload(values), target.upload(np.zeros((3, 8), np.float32))
        across, olds = transfers.transfer(source, x, target, y), []
        for n in range(2):
            olds.append(doubled(target, y))     # of what y was before
            with source.selected():
                cuda.add(x, x, x)
            across.start()
            x.clear()
            across.finish()
            new = doubled(target, y)
            assert np.array_equal(new.get(), 4 * values * (n + 1)), (source, target, n)
            x.set(values * (n + 2))
        assert all(np.array_equal(old.get(), 4 * values * n) for n, old in enumerate(olds)), (source, target)

for late in ["", "0", "1", "01"] if not simulated else [""]:      # which GPUs are
    if not simulated:
        driver.streams.late = lambda stream: str(stream.device) in late
    there_and_back()
    across_gpus()
a, b = host.empty((4,), np.float64), host.empty((4,), np.float32)
a[...] = 1.5
plain = transfers.transfer(host, a, reference, b)
plain.start(), plain.finish(), plain.settle()
assert (b == 1.5).all()
"""


@pytest.mark.parametrize("env", [{}, SIMULATED])
def test_transfers(env):
    """Values arrive, and are read before they are overwritten.

    This holds whichever GPU is fast or slow.
    """
    run(TRANSFERS, **env)


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
from pydsa.backends.cuda.runtime.transfers import is_pinned
assert is_pinned(part) and not is_pinned(np.zeros(3)) and not is_pinned(host.empty((3,), np.float32))
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


SLOTS = """
import threading
from pydsa.backends.cuda.runtime import streaming
from pydsa.gguf.file import Tensor
streaming.CHUNK, streaming.PIECE = 640, 100
rng, backend = np.random.default_rng(0), cuda.on(1)

def tensor(i, *shape):
    values = rng.normal(size=shape).astype(np.float32)
    return Tensor(f"t{i}", "F32", shape, values.view(np.uint8)), values

made = [tensor(i, *shape) for i, shape in enumerate([(5, 32), (3, 64), (4, 5, 16), (1, 32), (12, 40), (6, 64)])]
slots = [backend.Slot(2000), backend.Slot(2000)]
assert all(slot.gpu is backend.gpu for slot in slots)

shapes = [values.reshape(-1, values.shape[-1]).shape for _, values in made]     # of all rows, as one matrix
ones, outs = ([backend.upload(np.ones((1, shape[i]), np.float32)) for shape in shapes] for i in (1, 0))

def stream():       # nothing in it waits for kernels: they may be late
    fillings = {0: slots[0].fill(made[0][0])}
    for i, (t, values) in enumerate(made):
        if i + 1 < len(made):
            fillings[i + 1] = slots[(i + 1) % 2].fill(made[i + 1][0])
        assert slots[i % 2].weight(t)[1:] == fillings[i].weight[1:]
        w = fillings[i].ready()._replace(shape=shapes[i])
        with backend.selected():
            cuda.linear(outs[i], w, ones[i])
        slots[i % 2].release()
    for out, (_, values) in zip(outs, made, strict=True):
        assert np.allclose(out.get()[0], values.sum(-1).reshape(-1), atol=1e-5), values.shape

for late in ["", "0", "1", "01"] if not simulated else [""]:        # of the streams of a GPU: 0, where kernels run, and 1, copies
    if not simulated:
        driver.streams.late = lambda stream: str(stream.number) in late
    stream()
    kept = [backend.register(t.data) for t, _ in made]              # copied from where they are
    stream()
    del kept
    gc.collect()
if not simulated:
    assert empty_arena(0) and [s.device for s in driver.streams.all] == [1, 1]
    assert driver.counts["cuMemHostRegister"] == driver.counts["cuMemHostUnregister"] == 4 * len(made)
t, values = tensor(9, 4, 5, 16)
before, w = backend.fetch(slots[0].weight(t).data)[:-16].copy(), slots[0].fill(t, experts=[3, 0, np.int64(1)]).ready()
there = backend.fetch(w.data)[:-16].reshape(4, -1)
assert np.array_equal(there[[0, 1, 3]], t.data.reshape(4, -1)[[0, 1, 3]]) and np.array_equal(there[2], before.reshape(4, -1)[2])
"""


@pytest.mark.parametrize("env", [{}, SIMULATED])
def test_slots(env):
    """Tensors stream through two slots, whichever stream is late."""
    run(SLOTS, **env)


def test_what_goes_wrong_in_a_copy():
    """It reaches the caller, as does Ctrl-C; the next copy works."""
    run("""
import os
import signal
import threading
from pydsa.backends.cuda.runtime import streaming
signal.signal(signal.SIGINT, signal.default_int_handler)        # which a shell lets programs in its background ignore
from pydsa.gguf.file import Tensor
streaming.CHUNK, streaming.PIECE = 64, 16
slot = cuda.on(1).Slot(1 << 12)
values = np.arange(1024, dtype=np.float32).reshape(8, -1)
good = Tensor("good", "F32", values.shape, values.view(np.uint8))
driver.fail["cuCtxSetCurrent"] = CUresult.CUDA_ERROR_INVALID_CONTEXT
assert "to cuCtxSetCurrent" in refused(PydsaError, slot.fill(good).ready)      # in the thread that copies
driver.fail = {"cuMemcpyHtoDAsync": CUresult.CUDA_ERROR_ILLEGAL_ADDRESS}
told = refused(PydsaError, slot.fill(good).ready)
assert told == "The CUDA driver answers CUDA_ERROR_ILLEGAL_ADDRESS to cuMemcpyHtoDAsync on GPU 1."
driver.fail.clear()
damaged = good._replace(make=lambda: 1 // 0)
try:
    slot.fill(damaged).ready()
except ZeroDivisionError:
    assert np.array_equal(slot.fill(good).ready().data.get()[:-16].view(np.float32), values.ravel())
else:
    raise SystemExit("the error was lost")
for misused, why in ((lambda: slot.fill(good), "before release"), (lambda: cuda.on(1).Slot(100).fill(good), "4096")):
    try:
        misused()
    except AssertionError as error:
        assert why in str(error), error
    else:
        raise SystemExit(why)
slot.release()
rates = cuda.on(1).measure_bus(1 << 10)
assert rates.pinned > 0 and rates.streamed > 0
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        os._exit("forked" not in refused(PydsaError, lambda: slot.fill(good)))
    assert os.waitpid(child, 0)[1] == 0
never = threading.Event()
filling = slot.fill(good._replace(make=never.wait))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    filling.ready()
except KeyboardInterrupt:
    sys.exit(0)         # with the copy still under way
sys.exit("Ctrl-C was not seen")
""")
