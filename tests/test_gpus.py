"""Several GPUs: with the emulated driver (tests/ptx), and in Numba's simulator."""
import importlib.util
import os
import subprocess
import sys

import pytest
from helpers import TINY
from two_gpus import ROOT, SIMULATED, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")


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
from pydsa.backends.cuda.runtime.array import scratch
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
from pydsa.backends.cuda.runtime.launch import KERNELS, Kernel
asked = []
Kernel.cubin = lambda kernel, capability: asked.append(capability) or kernel.ptx(capability).encode()
for i in range(2):
    x = cuda.on(i).upload(np.ones((1, 8), np.float32))
    with cuda.on(i).selected():
        cuda.add(x, x, x)
assert set(asked) == {(8, 0), (9, 0)}
assert "GPU 1 has no room for 16 MiB more" in refused(OutOfMemoryError, lambda: cuda.on(1).empty((1 << 24,), np.uint8))
driver.fail["cuMemsetD8Async"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
assert refused(PydsaError, x.clear) == "The CUDA driver answers CUDA_ERROR_ILLEGAL_ADDRESS to cuMemsetD8Async on GPU 1."
driver.capabilities[1] = 7, 5
from pydsa.backends.cuda.runtime.current import Gpu, _gpus
_gpus[1] = cuda.on(1).gpu = Gpu(1)
assert "GPU 1, PTX in numpy (tests/ptx), has compute capability 7.5" in refused(PydsaError, lambda: cuda.on(1).check_threads(1))
assert [found.index for found in gpus.usable_gpus()] == [0]
""")


MODEL = """
import pydsa
path, ids = sys.argv[1], [5, 6, 7, 8, 9, 10]
def logits(device):
    session = pydsa.load(path, device=device, attention="sparse", n_ctx=16, n_ubatch=8).session()
    found = [session.prefill(ids[:4]), *map(session.decode, ids[4:])]
    sampled = session.generate([12], max_tokens=2, sampling=pydsa.Sampling(seed=1))       # by the GPU
    return [*found, np.array([*sampled])]
first = logits("cuda")
assert empty_arena(1) and not empty_arena(0)
driver.arenas[0].allocate = None       # nothing may be allocated there from now on
assert all(np.array_equal(a, b) for a, b in zip(first, logits("cuda1"), strict=True))
graphs = [driver.counts[name] for name in ("cuGraphInstantiate", "cuGraphLaunch")]
assert graphs[0] > 1 and graphs[1] > 4, graphs
"""


def test_a_model_on_the_second_gpu(small_model):
    """All steps give the same bits, and nothing of them is on the first GPU."""
    run(MODEL, str(small_model(**TINY | {"type": "Q8_0", "n_layer": 1, "n_layer_dense": 0})))


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


def test_usable_gpus():
    """They are found without a context where NVML knows the free memory."""
    run("""
class Nvml:
    def nvmlInit_v2(self):
        return 0
    nvmlShutdown = nvmlInit_v2
    def nvmlDeviceGetHandleByUUID(self, text, handle):
        handle._obj.value = text in (b"GPU-00000000-0000-0000-0000-000000000000", b"MIG-01010101-0101-0101-0101-010101010101")
        return 0 if handle._obj.value else 6
    def nvmlDeviceGetMemoryInfo(self, handle, sizes):
        sizes._obj[:] = 0, 12345, 0
        return 0

from tests.ptx.driver import OF_A_CONTEXT
name, size = "PTX in numpy (tests/ptx)", (1 << 22) + OF_A_CONTEXT
found = gpus.library
gpus.library = lambda name: Nvml() if name == gpus.LIBRARIES[1] else found(name)
assert gpus.usable_gpus() == [(i, name, size, 12345) for i in range(2)] and "cuDevicePrimaryCtxRetain" not in driver.counts
del Nvml.nvmlDeviceGetHandleByUUID
assert gpus.usable_gpus() == [(i, name, size, size) for i in range(2)] and driver.retained == [0, 0] and driver.device is None
driver.capability = 7, 5
driver.capabilities[1] = 12, 0
assert [gpu.index for gpu in gpus.usable_gpus()] == [1]
driver.version = 12080
assert gpus.usable_gpus() == []
driver.version, driver.fail["cuInit"] = 13000, CUresult.CUDA_ERROR_NO_DEVICE
assert gpus.usable_gpus() == [] and "finds no NVIDIA driver or no GPU" in refused(PydsaError, cuda.n_gpus)
driver.fail.clear()
import os
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        os._exit(gpus.usable_gpus() != [])
    assert os.waitpid(child, 0)[1] == 0
""")


@pytest.mark.parametrize("env, found", [({"CUDA_VISIBLE_DEVICES": "", "NUMBA_ENABLE_CUDASIM": "0"}, 0), (SIMULATED, 2),
                                        (SIMULATED | {"PYDSA_SIMULATED_GPUS": "many"}, 0)])
def test_usable_gpus_without_numba(env, found):
    code = "import sys; from pydsa.backends import gpus; assert 'numba' not in sys.modules; print(len(gpus.usable_gpus()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | env, check=True)
    assert (done.stdout, done.stderr) == (f"{found}\n", "")
