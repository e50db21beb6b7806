"""The time of a step with many threads, from times of its parts on one.

It follows pydsa/backends/cpu/team/team.py: the stages of an interval are begun one after the other by one thread, then threads draw
their tasks in order, and who completes the last one begins the next interval. Times are seconds.
"""
import heapq
from typing import NamedTuple

import numpy as np

# What a meeting of threads costs, on one socket. Atomic additions to a word that several threads change take 40 to 50 ns each, and one
# thread after the other reads a line that was written, 15 ns each: estimates from published measurements of servers. With them an interval
# of two empty tasks takes 0.27 us on two threads; 0.3 were measured, on two cores of a virtual Xeon.
DRAW = 45e-9            # a draw, and as much to count a task as done
DRAW_ALONE = 6e-9       # the same without other threads
HAND_OUT = 90e-9        # to reset the two words of an interval, which other threads have read
SEEN, READ = 100e-9, 15e-9      # until the first waiting thread sees the interval, and each further one
# A thread that found no work for SPIN sleeps. Measured there: a sleeper runs 20 us after it is woken. The thread that wakes it makes a
# system call, which takes about 2 us, and an estimated microsecond for each sleeper.
SPIN, WAKE, WAKE_CALL, WAKE_EACH = 100e-6, 20e-6, 2e-6, 1e-6


class Stage(NamedTuple):
    """A stage of an op, with the seconds that its parts take on one thread."""
    op: str
    name: str               # of the graph's node, with the number of the stage
    light: bool             # op.Stage.light: a single task is not handed out
    begin: float
    tasks: np.ndarray       # float64 [n_tasks], in the order in which they are drawn
    n_bytes: float = 0      # that must come from memory


class Times(NamedTuple):
    """Where the seconds of an interval go with n threads.

    Their sum is its time. at_once: tasks that the thread which began them runs, one after the other. work: the tasks that are handed out,
    divided by n. imbalance: how much longer n threads take that draw them in order, at no cost. hand_outs: what it costs to draw, to see
    and to wake up. bandwidth: how much longer the memory takes.
    """
    begins: float = 0.0
    at_once: float = 0.0
    work: float = 0.0
    imbalance: float = 0.0
    hand_outs: float = 0.0
    bandwidth: float = 0.0

    @property
    def seconds(self):
        """The time of the interval."""
        return sum(self)


LOSSES = [name for name in Times._fields if name != "work"]


def total(times):
    """The sum of several Times."""
    return Times(*map(sum, zip(*times))) if times else Times()


def is_handed_out(interval):
    """Whether other threads get tasks of an interval, a list of Stages."""
    return sum(len(s.tasks) for s in interval) > 1 and any(len(s.tasks) > 1 or not s.light and len(s.tasks) for s in interval)


def shortest(tasks, n_threads):
    """Seconds until all tasks are done if nothing else costs time.

    Each is taken, in order, by the thread that is free first.
    """
    free = [0.0] * min(n_threads, len(tasks))
    for task in tasks:
        heapq.heapreplace(free, free[0] + task)
    return max(free)


def hand_out(tasks, now, idle):
    """Let a thread that is free now, and others, take tasks.

    idle: since when each of the others has found nothing to do. Returns when the last task is done, and the list `idle` after that.
    """
    draw = DRAW if idle else DRAW_ALONE
    asleep = [t for t in idle if now - t > SPIN]
    n_woken = min(len(asleep), len(tasks) - 1)
    handed = now + (HAND_OUT if idle else 0.0)
    free = [handed + (WAKE_CALL + n_woken * WAKE_EACH if n_woken else 0.0)]
    free += [max(t, handed + SEEN + READ * k) for k, t in enumerate(sorted(idle)[len(asleep):])]
    free += [handed + WAKE_CALL + WAKE + k * WAKE_EACH for k in range(n_woken)]
    heapq.heapify(free)
    drawn = end = handed
    for task in tasks:
        drawn = max(drawn, free[0]) + draw          # draws come one after the other, whoever makes them
        done = drawn + task + draw
        heapq.heapreplace(free, done)
        end = max(end, done)
    free.remove(end)
    return end, free + sorted(asleep)[n_woken:]


def simulate(intervals, n_threads, bandwidth):
    """The Times of each interval of a step, with n threads.

    intervals: lists of Stages, measured for this number of threads. bandwidth: bytes a second that n threads get from memory.
    """
    now, idle, found = 0.0, [0.0] * (n_threads - 1), []
    for interval in intervals:
        begins, tasks = sum(s.begin for s in interval), [float(t) for s in interval for t in s.tasks]
        now += begins
        if not is_handed_out(interval):
            found.append(Times(begins, at_once=sum(tasks)))
            now += sum(tasks)
            continue
        least = shortest(tasks, n_threads)
        end, idle = hand_out(tasks, now, idle)
        more = max(0.0, sum(s.n_bytes for s in interval) / bandwidth - (end - now))
        work = sum(tasks) / n_threads
        found.append(Times(begins, 0.0, work, least - work, end - now - least, more))
        now, idle = end + more, [t + more for t in idle]
    return found


def serial_seconds(intervals):
    """The sum of all parts of a step."""
    return float(sum(s.begin + np.sum(s.tasks) for interval in intervals for s in interval))


def shares_lost(times, one, n_threads):
    """Shares of a step's time by what makes it longer than one / n_threads.

    times: the total Times with n threads; one: the seconds on one thread. "more work": what the parts take longer than those for one
    thread, as there are more of them. The efficiency, one / n_threads / seconds, is the rest to 1.
    """
    serial = times.begins + times.at_once
    seconds, losses = times.seconds, times._asdict() | {name: getattr(times, name) * (1 - 1 / n_threads) for name in ("begins", "at_once")}
    losses["more work"] = times.work + (serial - one) / n_threads
    return {name: losses[name] / seconds for name in (*LOSSES, "more work")}


def by_stage(interval, times):
    """The seconds of an interval for each of its stages.

    Each has its `begin`, and of the rest a part as large as that of its tasks in all tasks.
    """
    work = [float(np.sum(s.tasks)) for s in interval]
    rest, whole = times.seconds - times.begins, sum(work)
    return [s.begin + (rest * w / whole if whole else 0.0) for s, w in zip(interval, work)]
