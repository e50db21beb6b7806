"""Compile kernels in several processes at once.

Each process writes its kernels to the shared cache folder. The processes are started with `python -c`: they run nothing of the program that
uses pydsa, whether it is a script, a notebook or a server. A kernel that no process could compile is compiled by the program when it needs
it.
"""
import contextlib
import gc
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

from pydsa.kernel_cache import KernelsNotKept
from pydsa.machine import limits

FEWEST = 4      # jobs for which it pays: a process takes as long to start as one or two of them to be done
MOST = 8        # processes
EACH = 1 << 29      # bytes of memory of a process, at most
START = "import sys; sys.path[:] = sys.argv[1:]; from pydsa.compiling import work; work()"
POLL = 0.1      # seconds after which a wait looks whether Ctrl-C was pressed


class Job(NamedTuple):
    """A call module.function(*args) that compiles a kernel into the cache."""
    name: str       # of what it compiles
    size: int       # about how much that is: the order of work
    module: str
    function: str
    args: bytes     # pickled, as they may need the modules of what is compiled


def compile_jobs(jobs, folder, n_processes, report=lambda done, name: None, check=lambda: None):
    """Do jobs in processes that keep kernels in `folder`, the largest first.

    It returns when no job is left, or no process, or when nothing can be kept: the caller compiles what is still missing. report(done,
    name) is called as jobs are handed out, check() all the time, and what that raises ends all processes.
    """
    n = min(n_processes, MOST, len(jobs), limits.available().n_bytes // EACH)
    if n < 2 or len(jobs) < FEWEST or not _python():
        return
    waiting, events = queue.SimpleQueue(), queue.SimpleQueue()
    for job in sorted(jobs, key=lambda job: -job.size):
        waiting.put(job)
    processes, threads, troubles, done = [], [], [], 0
    try:
        with _noting(troubles):     # or as many as there may be
            for _ in range(n):
                processes.append(_start(folder))
        for process in processes:
            threads.append(threading.Thread(target=_attend, args=(process, waiting, events), daemon=True))
            threads[-1].start()
        working = len(threads)
        while working:
            check()
            with contextlib.suppress(queue.Empty):
                what, text = events.get(timeout=POLL)
                done += what == "done"
                working -= what == "ended"
                if what == "unkept":        # the caller compiles, meets the same and warns
                    troubles.clear()
                    break
                if what == "begun":
                    report(done, text)
                elif text:
                    troubles.append(text)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
    if troubles:
        warnings.warn(f"Not all kernels could be compiled in processes of their own ({troubles[0]}); the rest is compiled here.",
                      stacklevel=3)


@contextlib.contextmanager
def _noting(troubles):
    """Add what the system refuses to a list, and go on."""
    try:
        yield
    except OSError as error:
        troubles.append(str(error))


def _python():
    """The Python to start processes with, or None.

    None where sys.executable is another program, which has Python built in.
    """
    here = sys.executable and "python" in Path(sys.executable).name.lower() and not getattr(sys, "frozen", False)
    return sys.executable if here else None


def _start(folder):
    """A process that runs work().

    Ctrl-C in the terminal is not for it: it ends when its input does, which is when the program ends, or when it is killed.
    """
    env = os.environ | {"PYDSA_CACHE_DIR": str(Path(folder).parent), "NUMBA_NUM_THREADS": "1"}
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    command = [_python(), "-c", START, *(entry for entry in sys.path if isinstance(entry, str))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, **apart)


def _attend(process, waiting, events):
    """Give a process jobs until there are none, in a thread of its own.

    Events: ("begun", name), ("done", what went wrong or ""), ("unkept", why), and at last ("ended", what went wrong or "").
    """
    trouble = ""
    with contextlib.suppress(queue.Empty), process.stdout:
        while not trouble:
            job = waiting.get_nowait()
            events.put(("begun", job.name))
            try:
                pickle.dump(job, process.stdin)
                process.stdin.flush()
                events.put(pickle.load(process.stdout))
            except (OSError, EOFError, pickle.UnpicklingError):
                trouble = f"the one that was to compile {job.name} has ended"
    with contextlib.suppress(OSError):
        process.stdin.close()
    events.put(("ended", trouble))


def work():
    """What a process does: jobs from stdin, to stdout an event for each.

    They are those of _attend().
    """
    jobs, source = queue.SimpleQueue(), sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)       # what is printed meanwhile is no answer

    def read():
        while True:
            try:
                jobs.put(pickle.load(source))
            except BaseException:       # the program is gone, or done
                os._exit(0)
    threading.Thread(target=read, daemon=True).start()
    warnings.simplefilter("error", KernelsNotKept)
    gc.disable()        # compiling makes millions of objects and few cycles
    while True:
        pickle.dump(_outcome(jobs.get()), answers)
        answers.flush()


def _outcome(job):
    try:
        getattr(importlib.import_module(job.module), job.function)(*pickle.loads(job.args))
    except KernelsNotKept as error:
        return "unkept", str(error)
    except Exception as error:
        return "done", f"{job.name}: {type(error).__name__}: {error}"
    return "done", ""


def counted(progress, total, n_kept):
    """report(done, name) for compile_jobs() and for the loading after it.

    progress(done, total, name) never goes back. n_kept of all were kept on disk.
    """
    highest = 0

    def report(done, name):
        nonlocal highest
        highest = max(highest, n_kept + done)
        if progress is not None:
            progress(highest, total, name)
    return report


@contextlib.contextmanager
def collecting_paused():
    """A context without the garbage collector.

    It takes a sixth of the time to compile.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
