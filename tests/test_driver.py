"""The CUDA backend's host side against a simulated driver (tests/ptx).

What it refuses, and what happens while a graph is recorded. The tests run in processes of their own, as the simulated driver replaces the
GPU's.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from helpers import TINY

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

SETUP = """
import gc
import sys
import numpy as np
from cuda.bindings.driver import CUresult
from numba import cuda as numba_cuda
import tests.ptx.driver as ptx
driver = ptx.install(1 << 22)
from pydsa.backends import cuda
from pydsa.backends.cuda.runtime.current import gpu
from pydsa.backends.cuda.runtime.launch import kernel
from pydsa.cli import main
from pydsa.errors import OutOfMemoryError, PydsaError

def command(*args):
    try:
        main(args)
    except SystemExit as end:
        return end.code
"""


def run(code):
    return forked.run(SETUP + forked.REFUSED + code)


@pytest.mark.parametrize("change, message", [
    ("driver.fail['cuInit'] = CUresult.CUDA_ERROR_NO_DEVICE", "finds no NVIDIA driver or no GPU"),
    ("driver.version = 12080", "knows CUDA 12.8, but the installed packages make kernels for CUDA 13"),
    ("driver.capability = 7, 5", "has compute capability 7.5; pydsa needs 8.0 or later"),
    ("driver.fail['cuMemAlloc'] = CUresult.CUDA_ERROR_OUT_OF_MEMORY", "The GPU has no room for"),
    ("driver.fail['cuModuleLoadData'] = CUresult.CUDA_ERROR_OUT_OF_MEMORY", "The GPU has no memory left (cuModuleLoadData)"),
    ("driver.fail['cuModuleLoadData'] = CUresult.CUDA_ERROR_INVALID_IMAGE", "answers CUDA_ERROR_INVALID_IMAGE to cuModuleLoadData"),
    ("driver.fail['cuLaunchKernel'] = CUresult.CUDA_ERROR_OUT_OF_MEMORY", "The GPU has no memory left (cuLaunchKernel)"),
    ("driver.fail['cuStreamSynchronize'] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS", "answers CUDA_ERROR_ILLEGAL_ADDRESS to cuStream"),
    ("driver.arena.size >>= 8\nptx.OF_A_CONTEXT = 0", "too few; --device cpu needs no GPU, or ask for a smaller context"),
])
def test_what_fails_is_one_sentence(small_model, change, message):
    """An error of the driver becomes one sentence and exit code 2."""
    path = small_model(type="Q8_0", n_layer=2, indexer_n_head=3)
    _, errors = run(f"{change}\nassert command('run', {str(path)!r}, '--device', 'cuda', '-p', 'a', '--raw', '-n', '2', '-c', '16') == 2")
    assert message in errors.splitlines()[-1] and "Traceback" not in errors


def test_refusals():
    run("""
assert "has no room for 16 MiB more" in refused(OutOfMemoryError, lambda: cuda.empty((1 << 24,), np.uint8))
x = cuda.upload(np.arange(8, dtype=np.float32))
assert cuda.describe_device() == "PTX in numpy (tests/ptx), compute capability 8.0, 0.6 GiB of memory free of 0.6"
driver.fail["cuMemcpyDtoHAsync"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
assert refused(PydsaError, x.get) == "The CUDA driver answers CUDA_ERROR_ILLEGAL_ADDRESS to cuMemcpyDtoHAsync."
""")


def test_recorded_steps():
    """Recording a graph keeps memory and errors in order.

    What is freed meanwhile is freed afterwards. A forbidden call leaves nothing half recorded. A step's graph is freed with the step.
    """
    run("""
@kernel("f4[:], i4, f4, b1, i8", 32)
def change(x, n, factor, add, much):
    i = numba_cuda.threadIdx.x
    if i < n:
        x[i] = x[i] * factor + (np.float32(much) if add else np.float32(0))

x, expected = cuda.upload(np.arange(8, dtype=np.float32)), np.arange(8, dtype=np.float32)
change(1, x, 8, 1.0, False, 0)
garbage = [cuda.empty((8,), np.float32)]
before = driver.counts.get("cuMemFree", 0)

def work():
    change(1, x, np.int32(7), np.float32(0.5), True, 1 << 33)
    garbage.clear()
    gc.collect()
    assert driver.counts.get("cuMemFree", 0) == before
    change((1, 1), x[::2], 3, 2, np.bool_(False), 0)

step = gpu.record(work)
assert driver.counts["cuMemFree"] == before + 1 and np.array_equal(x.get(), expected)
for _ in range(2):
    gpu.replay(step)
    expected[:7] = expected[:7] * np.float32(0.5) + np.float32(1 << 33)
    expected[:6:2] *= 2
assert np.array_equal(x.get(), expected)

for what in (lambda: cuda.empty((8,), np.float32), x.get, x.clear, gpu.synchronize):
    assert refused(PydsaError, lambda: gpu.record(what))
    assert driver.recording is None and np.array_equal(x.get(), expected)
del step
assert driver.counts["cuGraphExecDestroy"] == 1
""")


def test_memory_is_given_back():
    run("""
whole = cuda.empty((8, 8), np.float32)
part = whole[2:, 1:]
del whole
gc.collect()
assert "cuMemFree" not in driver.counts
part.get()
del part
gc.collect()
assert driver.counts["cuMemFree"] == 1 and driver.counts["cuMemAlloc"] == 1
""")


KEPT = """
import sys
from pydsa.backends.cuda.runtime.launch import KERNELS, Kernel, kernel

@kernel("f4[:]", 32)
def other(x):
    x[0] = 1

assert b"other" in other.cubin((9, 0))
if "again" in sys.argv:
    del Kernel._compiled, Kernel._assembled
cubin, ptx = KERNELS["add_rows"].cubin((9, 0)), KERNELS["add_rows"].ptx((9, 0))
assert cubin.startswith(bytes([127]) + b"ELF") and ".entry add_rows(" in ptx and ".target sm_90" in ptx
"""


@pytest.mark.parametrize("attention", ["sparse", "masked", "auto"])
def test_ops_are_timed(small_model, attention):
    """A prompt's step is recorded with an event after each op.

    It writes what the step without events writes.
    """
    run(f"""
import pydsa
from pydsa.executor.schedule import ending_early
driver = ptx.install(1 << 26)
model = pydsa.load({str(small_model(**TINY | {"type": "Q4_0"}))!r}, device="cuda", attention={attention!r}, n_ctx=16, n_ubatch=8)
session, other = model.session(), model.session()
for ids in ([5, 6, 7, 8, 9, 10, 11, 12], [13]):
    times = session.timed(ids)
    other.prefill(ids)
    variant = model.setup.schedule.variant(session.n_past - len(ids), len(ids))
    graph = model.setup.layouts[variant if len(ids) == 1 else ending_early(variant)].graph
    assert [node for node, _ in times] == graph.nodes and all(seconds >= 0 for _, seconds in times)
    assert session.tokens == other.tokens
assert np.array_equal(session.decode(14), other.decode(14))
assert driver.counts["cuEventCreate"] == driver.counts["cuEventDestroy"] and driver.counts["cuGraphExecDestroy"] == 2
assert "in one step" in refused(PydsaError, lambda: session.timed([1] * 9))
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_is_refused_with_one_sentence():
    """Even where another thread of the parent is at the GPU."""
    _, errors = run("""
import os
import threading
x, entered, go = cuda.upload(np.arange(8, dtype=np.float32)), threading.Event(), threading.Event()
def busy():
    with gpu:
        entered.set()
        go.wait()
threading.Thread(target=busy, daemon=True).start()
entered.wait()
child = os.fork()
if child == 0:
    told = refused(PydsaError, x.get)
    del x
    gc.collect()
    os._exit(0 if "load the model after the fork" in told else 1)
go.set()
assert os.waitpid(child, 0)[1] == 0
""")
    assert errors == ""


def test_kernels_are_kept(tmp_path):
    """A second process compiles and assembles no kernel.

    A kernel that a user defines is not kept on disk.
    """
    def run_kept(*args):
        subprocess.run([sys.executable, "-c", KEPT, *args], cwd=ROOT, check=True, env=os.environ | {"PYDSA_CACHE_DIR": str(tmp_path)})
        return sorted(path.name for path in tmp_path.glob("*/*.sm_*"))

    names = run_kept()
    assert names == ["add_rows.sm_90.cubin", "add_rows.sm_90.ptx"] == run_kept("again")


@pytest.mark.parametrize("kv_type, capability, spec", [
    ("i16", (8, 0), {}), ("f32", (8, 0), {}), ("bf16", (9, 0), {"n_head": 16, "n_lora_kv": 512, "n_rot": 64, "indexer_head_size": 64})])
def test_scratch_memory_is_taken_once_and_as_counted(small_model, kv_type, capability, spec):
    """Steps of any number of tokens find their scratch memory there: a plan does not run out of memory later."""
    out, _ = run(f"""
from pydsa.backends.cuda.runtime import array
ptx.install(1 << 26).capability = {capability}
from pydsa.executor.memory import tensors_on
from pydsa.executor.plan import Runner
from pydsa.model import reserve_for
from pydsa.setup import Setup
setup = Setup({str(small_model(type="Q8_0", n_layer=2, **spec))!r}, n_ctx=200, n_ubatch=64, device="cuda", kv_type={kv_type!r})
runner, scratch = Runner({{"cuda": cuda}}, setup.layouts, None, None), array._scratch()
for tensor in tensors_on(setup, "cuda").values():
    runner.on["cuda"].read(tensor)
reserve_for(runner, setup, cuda)

def held():
    return sum(memory.nbytes for memory in [*scratch._memory.values(), *scratch._outgrown] if memory is not None)
first, caches, memory = held(), runner.make_caches(setup, 200), setup.memory["cuda"]
for n in (*range(1, 34), 50, 63, 64):
    for variant in setup.schedule.variants:
        cuda.reserve(runner.bind(variant, caches, n, n).calls_of(cuda))
print(first, held(), memory.scratch + memory.scores + memory.packed_latents)
""")
    first, last, counted = map(int, out.split())
    assert 0 < first <= last <= min(counted, 1.05 * first)
