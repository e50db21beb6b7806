"""The team's threads: started with the first step, asleep between steps, ended with the program.

They are Python threads inside compiled code. A team has a fixed number of them, the thread that runs a step included. There is a team for
each number of threads that is asked for; they share the scratch memory, as one step runs at a time.
"""
import atexit
import os
import sys
import threading
import time

import numba
import numpy as np
from numba import types

from pydsa.backends.cpu.arrays import LINE, align
from pydsa.backends.cpu.jit import wanted_kernel
from pydsa.backends.cpu.scratch import forget_buffers
from pydsa.backends.cpu.team import team
from pydsa.errors import PydsaError
from pydsa.machine.cores import MOST_THREADS, affinity, physical_cores
from pydsa.machine.limits import allocating
from pydsa.machine.numa import memory_placed, place_memory, place_thread, planned_cpus, settled_plan, visiting
from pydsa.signals import interrupts_held

LAST_STEP = 10      # seconds that the end of the program waits for a step
SPIN = 1e-4         # seconds that a thread looks for work before it sleeps: some of attention by one thread, and of Python before a step


def default_threads():
    """One thread for each physical core; fewer if NUMBA_NUM_THREADS says so.

    With --numa isolate only the cores of one node count.
    """
    return min(physical_cores(allowed=planned_cpus()), numba.config.NUMBA_NUM_THREADS)


def check_threads(n):
    """The number of threads to use: n, from 1 to MOST_THREADS, or the default for None.

    There may be more than cores. Raises PydsaError for other numbers.
    """
    if n is None:
        return default_threads()
    if not 1 <= n <= MOST_THREADS:
        raise PydsaError(f"threads is {n}, expected an integer from 1 to {MOST_THREADS}.")
    return n


class _Team:
    """n threads, the one that calls run() among them.

    With a numa.Plan each has its place; the one that calls run() has it while a step runs.
    """

    def __init__(self, n):
        self.n, self.threads, self._scratch = n, [], None
        self._plan = settled_plan()
        self._places = self._plan and self._plan.places(n, affinity() or self._plan.cpus)
        memory = np.zeros(team.STATE_BYTES + 128, np.uint8)
        self._state = memory[-memory.ctypes.data % 128:][:team.STATE_BYTES].view(np.int64)
        self.at = self._state.ctypes.data
        team.set_up(self.at)
        self._state[team.N_THREADS // 8] = n
        self._state[team.PAUSES // 8] = _pauses()

    def start(self):
        """Start the threads, if they do not run yet.

        Raises PydsaError if the system has no more threads.
        """
        if len(self.threads) < self.n - 1:
            team.stay.compile((types.int64, types.int64))
            with interrupts_held():     # no thread is started without being known
                for i in range(len(self.threads) + 1, self.n):
                    thread = threading.Thread(target=self._stay, args=(i,), name=f"pydsa-{i}", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:
                        raise PydsaError(f"The system refuses thread {i + 1} of {self.n} ({error}): use fewer (-t), or raise the limit of "
                                         "processes (ulimit -u).") from error
                    self.threads.append(thread)
                    if self._places:
                        place_thread(thread.native_id, self._places[i])

    def _stay(self, i):
        with memory_placed():
            team.stay(self.at, i)

    def run(self, intervals, n):
        self.start()
        if self._scratch != _scratch[1]:
            self._scratch = self._state[team.SCRATCH // 8] = _scratch[1]
        if self._plan is None:
            team.run_step(self.at, intervals, n)
            return
        with interrupts_held(), visiting(self._places and self._places[0]):     # the thread is free again, whatever happens
            team.run_step(self.at, intervals, n)

    def close(self):
        """End the threads: they would wait in memory that the interpreter frees."""
        team.let_go(self.at)
        for thread in self.threads:
            thread.join()


def _pauses():
    """How many pauses take SPIN seconds.

    The fastest of some rounds tells, in time of this thread alone where the system counts that to the nanosecond: after each round the
    thread may have to wait for the interpreter's lock.
    """
    n, clock, fastest = 2000, time.thread_time if sys.platform == "linux" else time.perf_counter, 1.0
    team.count_pauses(n)
    for _ in range(4):
        start = clock()
        team.count_pauses(n)
        fastest = min(fastest, clock() - start)
    return max(20, int(n * SPIN / fastest))


_n, _teams, _lock = 1, {}, threading.RLock()
_scratch = np.empty(0, np.uint8), 0       # memory, and where it is aligned; replaced as one, as Ctrl-C may come at any time
_ended = False      # whether the program is about to end


def set_threads(n):
    """Let the following steps use n threads.

    They wake up while Python prepares the first of these steps: that takes as long.
    """
    global _n
    _n, of_n = n, _teams.get(n)
    if of_n is not None:
        team.rouse(of_n.at)


def run(intervals, n, scratch_bytes):
    """Run n intervals at an address as one step.

    scratch_bytes: what they share, at most. Raises OutOfMemoryError if there is not as much.
    """
    global _scratch
    with _lock:
        if _scratch[0].size < scratch_bytes + LINE:
            with allocating("intermediate values"):
                memory = place_memory(np.empty(scratch_bytes + scratch_bytes // 4 + LINE, np.uint8))
            _scratch = memory, align(memory.ctypes.data)
        n_threads = 1 if _ended else _n
        if n_threads not in _teams:
            _teams[n_threads] = _Team(n_threads)
        _teams[n_threads].run(intervals, n)


def wanted():
    """The kernels of a team, to be compiled with the ops."""
    word = types.int64
    return [wanted_kernel(team.set_up, word), wanted_kernel(team.run_step, word, word, word), wanted_kernel(team.stay, word, word),
            wanted_kernel(team.rouse, word), wanted_kernel(team.let_go, word), wanted_kernel(team.count_pauses, word)]


def _close():
    """End all teams, at the end of the program.

    A thread that the program does not wait for may be within a step: that one ends first. After it only the thread that ends the program
    can run a step, by itself; memory that others would use is about to be freed.
    """
    global _ended
    if _lock.acquire(timeout=LAST_STEP):
        _ended = True
        for each in _teams.values():
            each.close()
        _teams.clear()


def _after_fork():
    """Let a child start threads of its own with its first step.

    Nor does it have a step that another thread was in, which may have left a buffer half replaced.
    """
    global _lock
    _lock = threading.RLock()
    _teams.clear()
    forget_buffers()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
