"""A team of threads runs a list of intervals, all in compiled code.

An interval holds stages of ops that do not depend on each other (op.py). A stage has two parts: `begin` prepares it and returns how many
tasks it has, `run` does one of them. Threads take tasks until the interval has none; whoever completes the last one begins the next. So no
thread waits for one that the system has taken off its core between two tasks.

TICKET is the word by which tasks are handed out. Its upper half is the number of the interval, over all steps; its lower half stands at
LAST - n for n tasks and is increased by each draw. The value before a draw says whether there was a task left, and of which interval, so a
thread that comes late, even steps later, does no harm: nothing is reset while others might still look at it.
"""
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner, kernel
from pydsa.backends.cpu.team.atomics import add_to_word, load_word, pause, store_word
from pydsa.backends.cpu.team.coming import MOST, PIECE, REGIONS_BYTES, fetch_share
from pydsa.backends.cpu.team.waiting import WATCHED_BYTES, prepare, sleep_while, upper_half, wake
from pydsa.backends.cpu.vectors.simd import INTP, i64_at, store

# The state of a team. Each word that changes while tasks are done has two cache lines for itself, as CPUs fetch lines in pairs.
# Regions that intervals after the present one read (coming.py) are in the line of TICKET, which changes with them.
TICKET, DONE, SLEEPERS, FIXED = 0, WATCHED_BYTES, WATCHED_BYTES + 128, WATCHED_BYTES + 256
COMING = TICKET + 8
LIST, N_INTERVALS, FIRST, N_THREADS, SCRATCH, STOP, PAUSES = range(FIXED, FIXED + 56, 8)
STATE_BYTES = FIXED + 64
LAST, IDLE, LOW = 1 << 31, 3 << 30, 0xFFFFFFFF

# A list: for each interval the address and the number of its stages, and the regions that come next. A stage: its op's function, which part
# of it begins the stage (the next one runs a task), the record of arguments, where the op's scratch memory begins, the number of tasks,
# once it was begun, and whether one task takes less time than to hand it to another thread.
INTERVAL_BYTES, STAGE_BYTES = 16 + REGIONS_BYTES, 48
FUNCTION, PART, RECORD, OFFSET, N_TASKS, LIGHT = range(0, STAGE_BYTES, 8)


class Task(NamedTuple):
    """What a stage's functions get beside the op's arguments."""
    index: int          # from 0 on; for `begin`: 0
    thread: int         # which thread runs it, from 0 on
    n_threads: int
    scratch: int        # address of the op's scratch memory, aligned to 64 bytes
    coming: int         # address of the regions that come next (coming.py)


@intrinsic
def call_part(typingctx, function, record, part, index, thread, n_threads, scratch, coming):
    """Call a part of an op by the op's address."""
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(INTP, [INTP] * 7).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), args[1:])
    return types.int64(*[types.int64] * 8), codegen


@inner
def call_stage(at, stage, part, index, thread):
    """Call a part of a stage: 0 begins it, 1 runs a task."""
    return call_part(i64_at(stage, FUNCTION), i64_at(stage, RECORD), i64_at(stage, PART) + part, index, thread, i64_at(at, N_THREADS),
                     i64_at(at, SCRATCH) + i64_at(stage, OFFSET), at + COMING)


@inner
def run_task(at, interval, index, thread):
    """Run a task of an interval: tasks of its first stage come first."""
    stage = i64_at(interval, 0)
    while index >= i64_at(stage, N_TASKS):
        index -= i64_at(stage, N_TASKS)
        stage += STAGE_BYTES
    call_stage(at, stage, 1, index, thread)


@inner
def begin_interval(at, interval, thread):
    """Begin the stages of an interval.

    Returns how many tasks they have, and how many of these are worth another thread.
    """
    total, heavy, stage = 0, 0, i64_at(interval, 0)
    for _ in range(i64_at(interval, 8)):
        n = call_stage(at, stage, 0, 0, thread)
        store(stage, N_TASKS, n)
        total += n
        heavy += n if n > 1 or not i64_at(stage, LIGHT) else 0
        stage += STAGE_BYTES
    return total, heavy


@inner
def tasks_of(interval):
    """Return how many tasks an interval has that was begun."""
    total, stage = 0, i64_at(interval, 0)
    for i in range(i64_at(interval, 8)):
        total += i64_at(stage, STAGE_BYTES * i + N_TASKS)
    return total


@inner
def tell_coming(at, i):
    """Copy the regions of the i-th interval to where all threads find them.

    Nobody reads the list of a step that may have ended. Of no interval there are none.
    """
    for k in range(0, REGIONS_BYTES, 8):
        store(at, COMING + k, i64_at(i64_at(at, LIST) + INTERVAL_BYTES * i, INTERVAL_BYTES - REGIONS_BYTES + k) if i >= 0 else 0)


@inner
def go_on(at, i, thread):
    """Begin intervals from the i-th on, until one has tasks to hand out.

    Light tasks, and a single one, are done at once. After the last interval the step ends.
    """
    n_intervals, total = i64_at(at, N_INTERVALS), 0
    while i < n_intervals:
        interval = i64_at(at, LIST) + INTERVAL_BYTES * i
        total, heavy = begin_interval(at, interval, thread)
        if total > 1 and heavy:
            break
        for task in range(total):
            run_task(at, interval, task, thread)
        i += 1
    tell_coming(at, min(i, n_intervals - 1))
    store_word(at + DONE, 0)
    store_word(at + TICKET, ((i64_at(at, FIRST) + i) & LOW) << 32 | (LAST - total if i < n_intervals else IDLE))
    if load_word(at + SLEEPERS) > 0:
        wake(at + TICKET, total - 1 if i < n_intervals else LAST - 1)


@inner
def wait(at, interval, thread):
    """Until the interval is over: fetch what comes next, then sleep.

    Before it sleeps, a thread that has nothing to fetch looks at the word for a while.
    """
    looks, fetched = 0, 0
    while upper_half(load_word(at + TICKET)) == interval:
        if fetched < MOST and fetch_share(at + COMING, thread, i64_at(at, N_THREADS), fetched):
            fetched += PIECE
        elif looks < i64_at(at, PAUSES):
            pause()
            looks += 1
        else:
            add_to_word(at + SLEEPERS, 1)       # first say so, then look once more, as sleep_while does
            sleep_while(at + TICKET, interval)
            add_to_word(at + SLEEPERS, -1)
            looks = 0       # it may have been roused


@inner
def walk(at, thread, stays):
    """Take tasks until the step ends; who stays waits for the next one."""
    while True:
        word = load_word(at + TICKET)
        if word & LOW < LAST:
            word = add_to_word(at + TICKET, 1)
        left = word & LOW
        if left < LAST:         # a task that is not done keeps its interval from ending: the list is this step's
            i = (upper_half(word) - i64_at(at, FIRST)) & LOW
            interval = i64_at(at, LIST) + INTERVAL_BYTES * i
            n = tasks_of(interval)
            run_task(at, interval, n - (LAST - left), thread)
            if add_to_word(at + DONE, 1) == n - 1:
                go_on(at, i + 1, thread)
        elif left < IDLE or stays and not i64_at(at, STOP):
            wait(at, upper_half(word), thread)
        else:
            return


@inner
def begin_step(at, intervals, n):
    """Begin a step of n intervals."""
    store(at, FIRST, (upper_half(load_word(at + TICKET)) + 1) & LOW)
    store(at, LIST, intervals)
    store(at, N_INTERVALS, n)
    go_on(at, 0, 0)


@kernel
def set_up(at):
    """Make the state of a team whose step has ended."""
    prepare(at + TICKET)
    store(at, TICKET, IDLE)


@kernel
def run_step(at, intervals, n):
    """Run a step, as thread 0 of the team."""
    begin_step(at, intervals, n)
    walk(at, 0, False)


@kernel
def stay(at, thread):
    """What the other threads do until they are let go."""
    walk(at, thread, True)


@kernel
def rouse(at):
    """Wake those that sleep, to look for a step that is about to begin."""
    if load_word(at + SLEEPERS) > 0:
        wake(at + TICKET, LAST - 1)


@kernel
def let_go(at):
    """End the other threads."""
    store(at, STOP, 1)
    begin_step(at, 0, 0)


@kernel
def count_pauses(n):
    """Pause n times."""
    for _ in range(n):
        pause()
