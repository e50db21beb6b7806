"""Kernels compiled by several processes, and what is kept of them.

Also what becomes of both when something breaks.
"""
import errno
import importlib.util
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest

from pydsa import compiling, kernel_cache
from pydsa.backends.cpu.team import steps
from pydsa.compiling import Job, compile_jobs
from pydsa.kernel_cache import KernelsNotKept
from pydsa.machine.cores import physical_cores
from pydsa.model import compile_for
from pydsa.signals import interrupts_held

ROOT = Path(__file__).parent.parent


def job(module, function, *args, size=1):
    return Job(f"{module}.{function}", size, module, function, pickle.dumps(args))


def folders(folder, n, first=0):
    """Jobs each of which makes a folder: what they leave behind shows that they were done."""
    return [job("os", "mkdir", str(folder / str(first + i)), size=n - i) for i in range(n)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(code, **env):
    """What a Python process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Processes

def test_jobs_are_done(tmp_path):
    begun = []
    compile_jobs(list(reversed(folders(tmp_path, 5))), tmp_path, 2, lambda done, name: begun.append(done))
    assert names(tmp_path) == list("01234")
    assert begun[0] == 0 and begun == sorted(begun) and len(begun) == 5


def test_the_largest_first(tmp_path):
    order = [j._replace(name=str(j.size)) for j in folders(tmp_path, 6)]
    met = []
    compile_jobs(order[3:] + order[:3], tmp_path, 2, lambda done, name: met.append(int(name)))
    assert met == sorted(met, reverse=True)


def test_what_fails_is_told_and_the_rest_is_done(tmp_path):
    with pytest.warns(UserWarning, match="math domain error|expected a nonnegative"):
        compile_jobs([job("math", "sqrt", -1, size=9), *folders(tmp_path, 3)], tmp_path, 2)
    assert names(tmp_path) == list("012")


def test_a_process_that_dies_is_survived(tmp_path):
    with pytest.warns(UserWarning, match="os._exit has ended"):
        compile_jobs([job("os", "_exit", 1, size=9), *folders(tmp_path, 5)], tmp_path, 2)
    assert names(tmp_path) == list("01234")


def test_all_processes_die(tmp_path):
    """Then the jobs are left to the program."""
    with pytest.warns(UserWarning, match="the rest is compiled here"):
        compile_jobs([job("os", "_exit", 1, size=9), job("os", "_exit", 1, size=9), *folders(tmp_path, 3)], tmp_path, 2)
    assert names(tmp_path) == []


@pytest.mark.parametrize("executable", [None, "", "/usr/sbin/uwsgi", "/no/such/python"])
def test_no_processes(tmp_path, monkeypatch, recwarn, executable):
    monkeypatch.setattr(sys, "executable", executable)
    compile_jobs(folders(tmp_path, 4), tmp_path, 2)
    assert names(tmp_path) == [] and len(recwarn) == (executable == "/no/such/python")


@pytest.mark.parametrize("n_jobs, n_processes", [(5, 1), (3, 2), (0, 2)])
def test_one_core_or_little_work_needs_no_process(tmp_path, monkeypatch, n_jobs, n_processes):
    monkeypatch.setattr(compiling, "_start", None)
    compile_jobs(folders(tmp_path, n_jobs), tmp_path, n_processes)


def test_printing_is_no_answer(tmp_path, capfd):
    compile_jobs([job("builtins", "print", "hello", size=9), *folders(tmp_path, 3)], tmp_path, 2)
    assert names(tmp_path) == list("012") and capfd.readouterr() == ("", "hello\n")


# Interrupts

def test_an_interrupt_ends_the_processes(tmp_path):
    before = set(psutil.Process().children())
    began, seen = time.monotonic(), []

    def check():
        seen[:] = set(psutil.Process().children()) - before
        if len(seen) == 2 and time.monotonic() - began > 1:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        compile_jobs([job("time", "sleep", 100)] * 4, tmp_path, 2, check=check)
    assert time.monotonic() - began < 20 and not any(process.is_running() for process in seen)


def test_a_program_that_is_killed_takes_them_along(tmp_path):
    code = "import pickle; from pydsa.compiling import *; compile_jobs([Job('', 1, 'time', 'sleep', pickle.dumps((100,)))] * 4, '/', 2)"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(children := psutil.Process(program.pid).children()) < 2:
        time.sleep(0.05)
    program.kill()
    program.wait()
    ended, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.fixture
def interruptible():
    """Set Python's own handler of Ctrl-C.

    A program in the background of a shell begins without it.
    """
    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, theirs)


def test_interrupts_are_held(interruptible):
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held() as check:
        signal.raise_signal(signal.SIGINT)
        done.append("went on")
        check()
        done.append("too far")
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        done.append("at the end")
    assert done == ["went on", "at the end"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_get_their_signal():
    met = []
    theirs = signal.signal(signal.SIGINT, lambda *args: met.append(args))
    try:
        with interrupts_held() as check:
            signal.raise_signal(signal.SIGINT)
            assert not met
            check()
            check()
        assert len(met) == 1
    finally:
        signal.signal(signal.SIGINT, theirs)


def test_only_the_main_thread_has_interrupts():
    def work():
        with interrupts_held() as check:
            check()
            done.append(True)
    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


# What is kept

DAMAGE = {"empty": lambda data: b"", "zeros": lambda data: bytes(len(data)), "cut": lambda data: data[:len(data) // 2],
          "garbage": lambda data: bytes(range(256)) * 8, "without its end": lambda data: data[:-1],
          "a bit": lambda data: data[:20] + bytes([data[20] ^ 4]) + data[21:], "longer": lambda data: data + b"\0"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    path, data = tmp_path / "file", np.random.default_rng(0).bytes(1000)
    assert kernel_cache.kept(path, lambda: data) == data
    whole = path.read_bytes()
    assert kernel_cache.kept(path, None) == data
    path.write_bytes(DAMAGE[damage](whole))
    assert kernel_cache.read(path) is None
    assert kernel_cache.kept(path, lambda: data) == data and path.read_bytes() == whole and names(tmp_path) == ["file"]


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(kernel_cache, "_warned", False)


def test_a_full_disk_is_one_warning(tmp_path, monkeypatch, unwarned):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(kernel_cache.os, "replace", full)
    with pytest.warns(KernelsNotKept, match=r"cannot hold compiled kernels \(No space left on device\)") as met:
        assert [kernel_cache.kept(tmp_path / "x" / name, lambda: b"code") for name in "ab"] == [b"code"] * 2
    assert len(met) == 1 and names(tmp_path / "x") == []


def test_a_folder_that_is_gone_is_made_again(tmp_path, recwarn):
    kernel_cache.write(tmp_path / "x" / "y" / "file", b"code")
    assert kernel_cache.read(tmp_path / "x" / "y" / "file") == b"code" and not recwarn


def test_an_interrupt_is_not_lost_with_the_folder(tmp_path, monkeypatch):
    def gone(*args):
        shutil.rmtree(tmp_path / "x")
        raise KeyboardInterrupt
    monkeypatch.setattr(kernel_cache.os, "replace", gone)
    with pytest.raises(KeyboardInterrupt):
        kernel_cache.write(tmp_path / "x" / "file", b"code")


def test_nothing_to_keep_in_ends_the_processes(tmp_path):
    """The program compiles the rest, and warns when it keeps nothing either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_jobs([job("warnings", "warn", "full", KernelsNotKept, size=9), *[job("time", "sleep", 100)] * 5], tmp_path, 2)


KERNELS = """
import sys
import numpy as np
from pydsa import compiling
from pydsa.backends.cpu import jit
from pydsa.backends.cpu.integer_rows import FUNCTIONS
from pydsa.backends.cpu.norm import add, silu_mul
from pydsa.backends.cpu.team.steps import compile_calls
if "serial" in sys.argv or jit.numba.config.NUMBA_NUM_THREADS == 1:
    compiling._start = None
x, out = np.arange(6, dtype=np.float32).reshape(2, 3), np.empty((2, 3), np.float32)
made, shown, save = [], [], jit.KernelCache.save_overload
jit.KernelCache.save_overload = lambda *args: (made.append(args[0].function.__name__), save(*args))
def calls():
    assert [f.address for f in FUNCTIONS["i8"]] == [0, 0]       # they are only listed
    return [(add, (out, x, x)), (silu_mul, (out, x, x)), (add, (out, x, x))]
compile_calls(calls, lambda *args: shown.append(args))
assert shown[0][:2] == (0 if "cold" in sys.argv else shown[0][0], 10) and shown[-1] == (10, 10, "")
n_made = len(made)
add(out, x, x)
assert (out == 2 * x).all() and FUNCTIONS["i8"][0].address and len(add._entries) == 1 and len(made) == n_made
print(n_made)
"""


def compiled(folder, *args, **env):
    """Compile nine functions into a folder.

    They are two ops, two functions by address and the five kernels of a team.
    Returns how many the program itself compiled, and the files.
    """
    done = subprocess.run([sys.executable, "-c", KERNELS, *args], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYDSA_CACHE_DIR": str(folder), "NUMBA_NUM_THREADS": "2"} | env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), sorted(folder.glob("*/*.kernel"))


two_cores = pytest.mark.skipif(physical_cores() < 2, reason="there is only one core")


@two_cores
def test_processes_make_what_one_makes(tmp_path):
    alone, files = compiled(tmp_path / "alone", "cold", NUMBA_NUM_THREADS="1")
    assert alone == 10 and len(files) == 10
    shared, others = compiled(tmp_path / "shared", "cold")
    assert shared == 0 and [path.name for path in others] == [path.name for path in files]
    assert compiled(tmp_path / "shared", "serial")[0] == 0      # nothing is left to compile, and no process is started
    for path, damage in zip(others, itertools.cycle(DAMAGE.values())):
        path.write_bytes(damage(path.read_bytes()))
    assert compiled(tmp_path / "shared", "cold") == (0, others) and all(kernel_cache.read(path) for path in others)


PACKED = """
import ctypes
import zlib
import numpy as np
from pydsa.backends.cpu.int16.linear import SUPERBLOCK, pack
from pydsa.backends.cpu.jit import IntpFunction
x, out = np.random.default_rng(0).standard_normal((8, 1024), np.float32), np.zeros(32 * SUPERBLOCK + 64, np.uint8)
rows, at = np.array([row.ctypes.data for row in x]), -out.ctypes.data % 64
ctypes.CFUNCTYPE(None, *5 * [ctypes.c_int64])(IntpFunction(pack).compile())(rows.ctypes.data, 0, 8, 1024, out.ctypes.data + at)
print(zlib.crc32(out[at:][:32 * SUPERBLOCK]))
"""


def test_code_that_was_kept_gives_the_same_bits(tmp_path):
    """As fresh code, in which numba may use other copies of what it calls."""
    first, second = (run(PACKED, PYDSA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == second and len(list(tmp_path.glob("*/*.kernel"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="there is no RLIMIT_FSIZE")
def test_no_file_can_be_written(tmp_path):
    """Neither in the cache folder nor in a temporary one: all is compiled, with one warning."""
    import resource
    done = subprocess.run([sys.executable, "-c", KERNELS, "cold"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYDSA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "2"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert (done.returncode, done.stdout) == (0, "10\n")
    assert done.stderr.count("cannot hold compiled kernels") == 1 and "Traceback" not in done.stderr


def test_kernels_of_others_are_not_kept():
    from pydsa.backends.cpu import jit
    assert not isinstance(jit.kernel(names)._cache, jit.KernelCache)


def test_parts_of_kernels_are_python_functions():
    """... where Python calls them: there is no machine code of their own."""
    from pydsa.backends.cpu.jit import inner
    from pydsa.backends.cpu.team.tasks import TASK_VALUES, rows_per_task
    assert [rows_per_task(n) for n in (100, 2 * TASK_VALUES, 0)] == [TASK_VALUES // 100, 1, TASK_VALUES]
    double = inner(lambda n: 2 * n)
    assert double(3) == 6 and not double.overloads


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
@two_cores
def test_cuda_kernels(tmp_path):
    """Two processes make PTX and cubin; damaged ones are made again."""
    code = """
from types import SimpleNamespace
from pydsa.backends.cuda.runtime import launch
from pydsa.backends.cuda.norm import add_rows, layer_norm_rows, rms_norm_rows, silu_mul_rows
here = SimpleNamespace(index=0, capability=(9, 0), load=lambda cubin, name: loaded.append(name))
launch.current = lambda: here
launch.Kernel._compiled = launch.Kernel._assembled = None       # not in this process
loaded = []
launch.compile_all([add_rows, layer_norm_rows, rms_norm_rows, silu_mul_rows])
assert loaded == ["add_rows", "layer_norm_rows", "rms_norm_rows", "silu_mul_rows"]
"""
    expected = [f"{name}.sm_90.{form}" for name in ("add_rows", "layer_norm_rows", "rms_norm_rows", "silu_mul_rows")
                for form in ("cubin", "ptx")]
    for damage in (None, "empty", "cut"):
        files = sorted(tmp_path.glob("*/*"))
        for path in files if damage else ():
            path.write_bytes(DAMAGE[damage](path.read_bytes()))
        run(code, PYDSA_CACHE_DIR=str(tmp_path), NUMBA_NUM_THREADS="2")
        assert [path.name for path in sorted(tmp_path.glob("*/*"))] == expected
        assert all(kernel_cache.read(path) for path in tmp_path.glob("*/*"))


# Where it is kept

def test_no_home(monkeypatch, unwarned):
    def nobody(*args):
        raise RuntimeError("could not determine the home directory")
    monkeypatch.delenv("PYDSA_CACHE_DIR", raising=False)
    monkeypatch.setattr(kernel_cache.platformdirs, "user_cache_dir", nobody)
    with pytest.warns(UserWarning, match="could not determine the home directory"):
        folder = kernel_cache.cache_folder("x", [])
    assert os.access(folder, os.W_OK)


def test_a_temporary_folder_goes_away(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    code = "from pydsa.kernel_cache import cache_folder; print(cache_folder('x', []).is_dir())"
    assert run(code, PYTHONWARNINGS="ignore", PYDSA_CACHE_DIR=str(tmp_path / "file"), TMPDIR=str(tmp_path / "tmp")) == "True\n"
    assert names(tmp_path / "tmp") == []


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes at once")
def test_a_temporary_folder_goes_away_with_sigterm(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    code = """
import time
from pydsa import signals
from pydsa.kernel_cache import cache_folder
signals.watch()
cache_folder("x", [])
with signals.interrupts_held() as check:
    print(flush=True)
    while True:
        time.sleep(0.01)
        check()
"""
    env = os.environ | {"PYTHONWARNINGS": "ignore", "PYDSA_CACHE_DIR": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env=env)
    program.stdout.readline()
    assert len(names(tmp_path / "tmp")) == 1
    program.terminate()
    assert program.wait(20) == 143 and names(tmp_path / "tmp") == []
    program.stdout.close()


def test_no_temporary_folder_either(tmp_path, monkeypatch, unwarned):
    def none(**options):
        raise FileNotFoundError("No usable temporary directory found")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYDSA_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache.tempfile, "mkdtemp", none)
    with pytest.warns(KernelsNotKept) as met:
        path = kernel_cache.cache_folder("x", []) / "kernel"
        assert kernel_cache.kept(path, lambda: b"code") == b"code" and kernel_cache.read(path) is None
    assert len(met) == 1


@pytest.mark.parametrize("attention", ["sparse", "masked"])
def test_all_that_a_model_needs_is_kept(small_model, load, attention, monkeypatch):
    """Code with an address of this process in it would not be."""
    model, seen = load(small_model(n_layer=2), attention=attention), []
    monkeypatch.setattr(steps, "compile_all", lambda wanted, progress=None: seen.extend(wanted))
    compile_for(model.runner, model.setup, model.backend)
    assert len(seen) > 20 and [w.name for w in seen if not w.holds()] == []
