"""Time each part of a step on one thread, as it would be for many.

The number and the size of an op's tasks depend on the number of threads that it is told. Here one thread runs all of them, in the order of
a whole step: so weights come from memory, and values from the caches that they were left in.
"""
import itertools
import time

import numpy as np
from numba import types

from pydsa.backends.cpu.arrays import LINE, align
from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.team.op import Step
from pydsa.backends.cpu.team.steps import grouped
from pydsa.backends.cpu.team.team import FUNCTION, INTERVAL_BYTES, LIGHT, OFFSET, PART, RECORD, STAGE_BYTES, call_part
from pydsa.backends.cpu.team.threads import set_threads
from pydsa.backends.cpu.vectors.simd import i64_at
from pydsa.errors import PydsaError
from tools.team_model import Stage

# Of clock_gettime(2): the time, and the time that this thread had a core. To read the second takes ten times as long, so it is only looked
# at after parts of LONG nanoseconds: a thread that lost its core in between loses it for longer.
TIME, ON_CORE = (getattr(time, f"CLOCK_{name}", None) for name in ("MONOTONIC", "THREAD_CPUTIME_ID"))
LONG = 20_000
ENOUGH = 2          # seconds for which a step runs by the clock
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@inner
def nanoseconds(clock, at):
    """Read the clock, by memory of 16 bytes at an address."""
    _clock_gettime(clock, at)
    return i64_at(at, 0) * 1_000_000_000 + i64_at(at, 8)


@inner
def lap(last, clocks, at):
    """Return the nanoseconds since the last lap that this thread had a core.

    last: int64 [2], when that was, and how long the thread had been without a core.
    """
    now = nanoseconds(clocks[0], at)
    took = now - last[0]
    if took > LONG:
        on_core = nanoseconds(clocks[1], at)
        after = nanoseconds(clocks[0], at)
        while after - now > LONG:       # it lost its core between the two
            now, on_core = after, nanoseconds(clocks[1], at)
            after = nanoseconds(clocks[0], at)
        took = now - last[0] - (now - on_core - last[1])
        last[1] = now - on_core
        now = after
    last[0] = now
    return took


@kernel
def empty_parts(clocks, at, times):
    """Measure what it takes to time something, some times."""
    last = np.zeros(2, np.int64)
    for i in range(times.size):
        times[i] = lap(last, clocks, at)


@inner
def call(stage, part, index, n_threads, scratch, coming):
    """Call a part of a stage as thread 0 of n."""
    return call_part(i64_at(stage, FUNCTION), i64_at(stage, RECORD), i64_at(stage, PART) + part, index, 0, n_threads,
                     scratch + i64_at(stage, OFFSET), coming)


@kernel
def run_parts(intervals, n_intervals, n_threads, scratch, clocks, at, begins, counts, tasks):
    """Run a step on one thread, told that there are n.

    Writes for each stage the nanoseconds of `begin` and the number of its tasks, and the nanoseconds of all tasks, as many as there is
    place for. Returns how many tasks there are.
    """
    stage, n_done, last = 0, 0, np.zeros(2, np.int64)
    lap(last, clocks, at)
    for i in range(n_intervals):
        first, n = i64_at(intervals, INTERVAL_BYTES * i), i64_at(intervals, INTERVAL_BYTES * i + 8)
        coming = intervals + INTERVAL_BYTES * i + 16
        for j in range(n):
            counts[stage + j] = call(first + STAGE_BYTES * j, 0, 0, n_threads, scratch, coming)
            begins[stage + j] = lap(last, clocks, at)
        for j in range(n):
            for index in range(counts[stage + j]):
                call(first + STAGE_BYTES * j, 1, index, n_threads, scratch, coming)
                took = lap(last, clocks, at)
                if n_done < tasks.size:
                    tasks[n_done] = took
                n_done += 1
        stage += n
    return n_done


class Parts:
    """The parts of a Bound (plan.py) whose inputs are written.

    costs: bytes of memory that each call reads, in their order. Raises PydsaError on a system without clock_gettime.
    """

    def __init__(self, bound, costs):
        if None in (TIME, ON_CORE):
            raise PydsaError("This system has no clock_gettime, by which parts of a step are timed: measure on Linux or macOS.")
        groups = grouped(bound.calls, bound.levels)
        self.step = Step(groups)
        places = {id(pair): i for i, pair in enumerate(itertools.chain(*groups))}
        order = [places[id(pair)] for pair in self.step.calls]
        self.nodes, self.costs = [bound.calls[i][0] for i in order], [costs[i] for i in order]
        self._scratch = np.zeros(self.step.scratch_bytes(0, len(self.step)) + LINE, np.uint8)
        self._at, self._tasks = np.zeros(2, np.int64), np.zeros(1 << 16, np.int64)
        empty = np.zeros(1000, np.int64)
        empty_parts((TIME, ON_CORE), self._at.ctypes.data, empty)
        self._empty = empty.min()

    def clock(self, n_threads, repetitions):
        """The shortest seconds of the whole step with a team of n threads.

        Long steps run three times, after one that wakes the team.
        """
        set_threads(n_threads)
        self.step.run()
        seconds = []
        while len(seconds) < min(3, repetitions) or len(seconds) < repetitions and sum(seconds) < ENOUGH:
            start = time.perf_counter()
            self.step.run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def measure(self, threads, repetitions, bandwidth):
        """Time the parts as they are for each number of threads.

        Returns {n: intervals, lists of Stages}, and by which share the slowest run took longer than the fastest one of the same number.

        All numbers take turns, and of each part the median counts: the shortest may be too short, as a system may subtract at any time what
        others have taken from this thread. bandwidth: bytes a second of one thread; a stage that took less
        time than its bytes would has found the others in a cache.
        """
        runs = {n: [] for n in threads}
        for _ in range(repetitions):
            for n, mine in runs.items():
                mine.append(self._run(n))
        intervals = {n: self._intervals(mine, bandwidth) for n, mine in runs.items()}
        whole = [[run[0].sum() + run[2].sum() for run in mine] for mine in runs.values()]
        return intervals, max(max(mine) / min(mine) for mine in whole) - 1

    def _intervals(self, runs, bandwidth):
        """The intervals of several runs for one number of threads."""
        begins, tasks = (np.maximum(0, np.median([run[i] for run in runs], axis=0) - self._empty) / 1e9 for i in (0, 2))
        ends = np.cumsum(runs[0][1])
        tasks = [tasks[end - n:end] for end, n in zip(ends, runs[0][1])]
        stages = [Stage(*name, bool(row[LIGHT // 8]), float(begin), some, min(n_bytes, float(some.sum()) * bandwidth))
                  for name, row, begin, some, n_bytes in zip(self._names(), self.step.stages, begins, tasks, self._bytes(tasks))]
        numbers = self.step.intervals[:, 1]
        return [stages[end - n:end] for end, n in zip(np.cumsum(numbers), numbers)]

    def _run(self, n_threads):
        """The times of one run: of begins, numbers of tasks, of tasks."""
        intervals, n = self.step.intervals, len(self.step.stages)
        begins, counts = np.zeros(n, np.int64), np.zeros(n, np.int64)
        scratch = align(self._scratch.ctypes.data)
        while True:
            n_tasks = run_parts(intervals.ctypes.data, len(intervals), n_threads, scratch, (TIME, ON_CORE), self._at.ctypes.data, begins,
                                counts, self._tasks)
            if n_tasks <= len(self._tasks):
                return begins, counts, self._tasks[:n_tasks].copy()
            self._tasks = np.zeros(2 * n_tasks, np.int64)

    def _owners(self):
        """The call of each stage, found by its record: they lie in one order."""
        return np.unique(self.step.stages[:, RECORD // 8], return_inverse=True)[1]

    def _names(self):
        """(op, name) of each stage: the node's name with the stage's number."""
        owners, parts = self._owners(), self.step.stages[:, PART // 8] // 2
        return [(self.nodes[i].op, f"{self.nodes[i].name}.{part}") for i, part in zip(owners, parts)]

    def _bytes(self, tasks):
        """The bytes of each stage: those of its op, for the stage that takes longest."""
        owners, found = self._owners(), np.zeros(len(tasks))
        for i, n_bytes in enumerate(self.costs):
            mine = np.flatnonzero(owners == i)
            found[max(mine, key=lambda stage: tasks[stage].sum())] = n_bytes
        return found
