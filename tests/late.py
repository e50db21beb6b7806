"""Devices for tests that work late, as GPUs do: what they are given runs when a wait asks for it, or by chance before.

Memory that is read too early, or overwritten too early, then shows in the logits. The ops are the reference's.
"""
import collections
import importlib
import random
import sys
import types

import numpy as np

from pydsa.backends import devices, reference
from pydsa.executor import plan

NAMES = ("late", "later")


class Queue:
    """Work of one device, in the order it was given."""

    def __init__(self, seed):
        self._work, self._done, self._random, self.waits = collections.deque(), 0, random.Random(seed), 0

    def give(self, work):
        """Add a function without arguments; returns its number."""
        self._work.append(work)
        for _ in range(self._random.choice((0, 0, 0, 1, 3)) if self._work else 0):
            self._next()
        return self._done + len(self._work)

    def _next(self):
        if self._work:
            self._work.popleft()()
            self._done += 1

    def wait(self, number=None):
        """Work until the piece of this number is done; None: all."""
        self.waits += number is None and bool(self._work)
        while self._work and (number is None or self._done < number):
            self._next()


class Recorded:
    """Calls that are given to a queue; hooks wait for it."""

    def __init__(self, queue, calls):
        self._queue, self._calls = queue, calls

    def run(self, before=None, after=None):
        before, after = before or {}, after or {}
        for i, (_, op, args) in enumerate(self._calls):
            if i in before:
                before[i]()
            self._queue.give(lambda op=op, args=args: op(*args))
            if i in after:
                after[i]()


def module(name, queue):
    """A backend that is a module named `name`, with the reference's ops."""
    made = types.ModuleType(name)
    vars(made).update({key: value for key, value in vars(reference).items() if not key.startswith("__")})

    def waiting(function):
        def call(*args):
            queue.wait()
            return function(*args)
        return call

    def store(array, values):
        values = np.array(values)
        queue.give(lambda: reference.store(array, values))

    def empty(shape, dtype):
        array = reference.empty(shape, dtype)
        array.view(np.uint8)[...] = 255     # NaN, and -1 as an index
        return array
    vars(made).update(
        queue=queue, store=store, empty=empty, recorded=lambda calls, levels, again: Recorded(queue, calls),
        **{key: waiting(getattr(reference, key)) for key in ("fetch", "timed", "nan_met")})
    return made


class Transfer:
    """A copy between two devices, each the host or one that works late.

    A copy to the host, while it is under way, leaves NaN where it writes.
    """

    def __init__(self, source, x, target, y):
        self.source, self.target = source, target
        self._from, self._to = getattr(source, "queue", None), getattr(target, "queue", None)
        self._x, self._y, self._number = x, y, 0

    def _copy(self):
        with np.errstate(invalid="ignore", over="ignore"):
            self._y[...] = self._x

    def start(self):
        if self._from and self._to:
            free = self._to.give(lambda: None)
            self._from.give(lambda: self._to.wait(free))
        if self._from:
            if not self._to:
                self._from.give(lambda: self._y.view(np.uint8).fill(255))
            self._number = self._from.give(self._copy)
        elif self._to:
            self._number = self._to.give(self._copy)

    def finish(self):
        if self._from and self._to:
            number = self._number
            self._to.give(lambda: self._from.wait(number))
        elif self._from:
            self._from.wait(self._number)
        elif not self._to:
            self._copy()

    def settle(self):
        if self._to and not self._from:
            self._to.wait(self._number)


def install(monkeypatch, seed=0):
    """Add the devices NAMES to the table of devices -> their queues."""
    queues = []
    for i, name in enumerate(NAMES):
        queues.append(Queue(seed + i))
        monkeypatch.setitem(sys.modules, f"tests_{name}", module(f"tests_{name}", queues[-1]))
        monkeypatch.setitem(devices.DEVICES, name, devices.DEVICES["reference"]._replace(module=f"tests_{name}"))
        assert importlib.import_module(f"tests_{name}").queue is queues[-1]
    monkeypatch.setattr(plan, "transfer", Transfer)
    return queues
