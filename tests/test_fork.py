"""Processes and threads around a model: forks, ends of programs, Ctrl-C, models in several Python threads."""
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import random_ids

import pydsa

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")

START = """
import atexit, multiprocessing, os, signal, sys, threading, time, warnings
import numpy as np
warnings.simplefilter("ignore", DeprecationWarning)     # of forks beside threads
import pydsa
from pydsa.backends.cpu.team import threads
model = pydsa.load(sys.argv[1], n_ctx=512, n_ubatch=16, threads=2, threads_batch=3)
ids = np.random.default_rng(0).integers(0, 300, 40)
def logits(session=None):
    session = session or model.session()
    return np.array([session.prefill(ids), *(session.decode(token) for token in (1, 2, 3))])
def last():
    print(flush=True)
def ends_well(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run(path, code, expected=0, seconds=60):
    """Run a program after START; nothing may be on its stderr.

    Returns what it prints, and the seconds from its last line to its end.
    """
    process = subprocess.Popen([sys.executable, "-c", START + code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    lines, end = [], time.monotonic()
    for line in process.stdout:
        lines.append(line)
        end = time.monotonic()
    stderr = process.stderr.read()
    met = process.wait()
    killer.cancel()
    process.stdout.close()
    process.stderr.close()
    assert (met, stderr) == (expected, "")
    return "".join(lines), time.monotonic() - end


# Forks

@needs_fork
def test_a_fork_after_use(small_model):
    """The child has threads of its own and gets the same logits.

    The parent goes on, and a child of the child is like it.
    """
    run(small_model(), """
expected = logits()
teams = dict(threads._teams)
def checked(depth):
    child = os.fork()
    if child == 0:
        assert not threads._teams and threading.active_count() == 1
        assert (logits() == expected).all() and len(threads._teams[3].threads) == 2
        if depth:
            checked(depth - 1)
        os._exit(0) if depth else sys.exit(0)       # with and without atexit
    assert (logits() == expected).all()
    ends_well(child)
checked(1)
assert threads._teams == teams and (logits() == expected).all()
""")


@needs_fork
def test_forks_while_another_thread_runs_steps(small_model):
    run(small_model(), """
expected, stop = logits(), threading.Event()
def work():
    while not stop.is_set():
        assert (logits() == expected).all()
thread = threading.Thread(target=work)
thread.start()
for i in range(12):
    time.sleep(0.003 * i)
    child = os.fork()
    if child == 0:
        os._exit(0 if (logits() == expected).all() else 1)
    ends_well(child)
stop.set()
thread.join()
assert (logits() == expected).all()
""")


@needs_fork
def test_a_fork_within_a_step(small_model):
    """... from a function that observes it: the step's lock is the child's, which goes on with the step."""
    run(small_model(), """
expected, children = logits(), []
def observe(node, arrays):
    if node.name == "l_out-1" and not children:
        children.append(os.fork())
session = model.session()
met = session.prefill(ids, observe=observe)
assert (met == expected[0]).all() and (session.decode(1) == expected[1]).all()
if children == [0]:
    os._exit(0)
ends_well(children[0])
""")


@needs_fork
def test_multiprocessing_with_fork(small_model):
    run(small_model(), """
expected = logits()
def one(i):
    return (logits() == expected).all() and os.getpid()
with multiprocessing.get_context("fork").Pool(2) as pool:
    met = pool.map(one, range(6), chunksize=1)
assert all(met) and os.getpid() not in met and (logits() == expected).all()
""")


@needs_fork
def test_a_fork_does_not_wait_for_a_step_of_its_parent(small_model):
    """... which another thread was in, so that nobody would end it in the child."""
    run(small_model(), """
from pydsa.executor import plan
entered, go = threading.Event(), threading.Event()
def step():
    with plan.one_step(), threads._lock:
        entered.set()
        go.wait()
thread = threading.Thread(target=step)
thread.start()
entered.wait()
child = os.fork()
if child == 0:
    logits()
    os._exit(0)
ends_well(child)
go.set()
thread.join()
""")


# Ends of programs

ENDS = {        # last() prints a line
    "by itself": ("logits(); last()", 0),
    "without a step": ("last()", 0),
    "with many teams": ("for n in range(1, 20):\n    model.runner.threads = n\n    logits()\nlast()", 0),
    "by sys.exit": ("logits(); last(); sys.exit(3)", 3),
    "by sys.exit in a thread": ("t = threading.Thread(target=lambda: (logits(), last(), sys.exit(3)))\nt.start()\nt.join()", 0),
    "before a thread that it waits for": ("threading.Thread(target=lambda: (time.sleep(0.2), logits(), last())).start()", 0),
    "beside steps of a thread": (
        "def work():\n    while True: logits()\nthreading.Thread(target=work, daemon=True).start()\ntime.sleep(0.3)\nlast()", 0),
    "with steps at the end": ("logits(); atexit.register(lambda: (logits(), last()))", 0),
    "with steps after its teams": (
        "atexit.unregister(threads._close)\natexit.register(lambda: (logits(), last()))\natexit.register(threads._close)\nlogits()", 0)}


@pytest.mark.parametrize("case", ENDS)
def test_a_program_ends(small_model, case):
    """... at once, with nothing on stderr, although threads sleep or run."""
    printed, seconds = run(small_model(), *ENDS[case])
    assert printed == "\n" and seconds < 10      # not the minute after which it would be killed


def test_a_program_ends_by_an_exception(small_model):
    done = subprocess.run([sys.executable, "-c", START + "logits()\nraise LookupError('its own')", small_model()], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("LookupError: its own\n") and done.stderr.count("Error") == 1


# Ctrl-C

@needs_signals
@pytest.mark.parametrize("what", ["while True: session.truncate(0); session.prefill(np.arange(300))",
                                  "while True:\n        for token in range(200): session.decode(token)\n        session.truncate(0)",
                                  "while True: list(session.generate([1], 300)); session.truncate(0)"])
def test_ctrl_c_ends_a_step(small_model, what):
    """... and the session goes on: it has the tokens that it says."""
    code = START + f"""
signal.signal(signal.SIGINT, signal.default_int_handler)
expected, session = logits(), model.session()
print(flush=True)
try:
    {what}
except KeyboardInterrupt:
    print("heard", flush=True)
    session.truncate(0)
    assert (logits(session) == expected).all()
"""
    process = subprocess.Popen([sys.executable, "-c", code, small_model()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "heard\n" and time.monotonic() - began < 5
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout, stderr) == (0, "", "")


# Python threads

def test_models_in_several_threads_with_other_numbers_of_threads(small_model):
    """Steps take turns, each with the number of threads of its model."""
    counts = [(2, 1), (1, 3), (40, 2), (5, 5)]
    models = [pydsa.load(small_model(arch=arch), n_ctx=64, n_ubatch=16, threads=n, threads_batch=n_batch)
              for arch, (n, n_batch) in zip(("deepseek32", "deepseek2") * 2, counts)]
    ids, met = random_ids(30), [None] * len(models)

    def logits(model):
        session = model.session()
        return np.array([session.prefill(ids), *(session.decode(token) for token in ids[:20])])

    def work(i):
        met[i] = [logits(models[i]) for _ in range(5)]

    expected, workers = [logits(model) for model in models], [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for several, one in zip(met, expected):
        assert all(np.array_equal(again, one) for again in several)
    assert np.array_equal(expected[0], expected[2]) and np.array_equal(expected[1], expected[3])
