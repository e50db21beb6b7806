"""Ops, and steps: lists of ops.

An op is divided into stages, one after the other; a stage into tasks, which any thread may run in any order (team.py). The functions of a
stage are written for arrays and numbers, as those of numpy would be. They are compiled once for the types of an op's arguments, as one
function that reads the arguments from a record.
"""
import functools
from typing import NamedTuple

import numpy as np
from numba import types

from pydsa.backends.cpu.arrays import align
from pydsa.backends.cpu.jit import ByAddress, Wanted, code_size, inner
from pydsa.backends.cpu.team import threads
from pydsa.backends.cpu.team.coming import REGIONS
from pydsa.backends.cpu.team.records import reader, signature_of, words_of


class Stage(NamedTuple):
    """A part of an op that waits for the parts before it.

    begin(*args, task) prepares it and returns the number of its tasks: one thread calls it. run(*args, task) is task number task.index of
    them. What they share lies in task.scratch.
    """
    begin: object
    run: object
    light: bool = False     # whether one task takes less time than to hand it to another thread


class Op:
    """An op of the backend; called with its arguments, it runs by itself."""

    def __init__(self, scratch, stages, packed, grows, reads):
        functools.update_wrapper(self, scratch)
        self.py_func = self.scratch = scratch
        self.stages, self.packed, self.grows, self.reads = stages, packed, grows, reads
        self._entries = {}      # signature -> _Entry

    def __call__(self, *args):
        Step([[(self, args)]]).run()

    def entry(self, signature):
        """The compiled function for arguments of these types, by address."""
        if signature not in self._entries:
            self._entries[signature] = _Entry(self, signature)
        return self._entries[signature]

    def compile(self, signature):
        """Compile the op for arguments of these types."""
        self.entry(signature).compile()


def op(*stages, packed=lambda *args: None, grows=False, reads=lambda *args: None):
    """Make an Op of a Python function scratch(*args).

    It returns how many bytes of scratch memory the op needs, at most. Its name, parameters and docstring are the op's. packed(*args) is a
    Python function that names what the first stage makes of the arguments, all that is in the scratch memory, or None: ops of a group
    with the same name share it. grows: whether scratch() depends on the values of `positions`. reads(*args) is a Python function that
    returns the array that the tasks of the last stage read from memory, or None if that is not known before the step.
    """
    return lambda scratch: Op(scratch, stages, packed, grows, reads)


class _Entry(ByAddress):
    """An op's function f(record, part, task's fields), for one signature.

    Part 2 i begins the i-th stage and returns the number of its tasks; part 2 i + 1 runs a task.
    """

    def __init__(self, op, signature):
        read, call = reader(signature), _parts(op.stages)

        def entry(record, part, index, thread, n_threads, scratch, coming):
            return call(part, read(record, index, thread, n_threads, scratch, coming))

        entry.__module__, entry.__name__, entry.__qualname__ = op.__module__, op.__name__, f"{op.__qualname__}{signature}"
        super().__init__(entry, *[types.int64] * 7, result=types.int64)
        size = sum(code_size(f.py_func) for stage in op.stages for f in stage[:2])
        self.wanted = Wanted(op.__name__, op.__module__, signature, lambda: self.cache.holds(self.signature), self.compile, size)


def _parts(stages):
    """A function call(part, arguments) of all stages' functions."""
    (begin, run, _), *others = stages
    if not others:
        @inner
        def call(part, arguments):
            if part == 0:
                return np.int64(begin(*arguments))
            run(*arguments)
            return np.int64(0)
    else:
        following = _parts(others)

        @inner
        def call(part, arguments):
            if part == 0:
                return np.int64(begin(*arguments))
            if part == 1:
                run(*arguments)
                return np.int64(0)
            return following(part - 2, arguments)
    return call


class Step:
    """A list of ops that a team of threads runs.

    groups: lists of pairs (op, arguments). Ops of a group do not depend on each other: their last stages share an interval, those before
    the last another one, and so on.

    intervals, stages: int64 [n, .], the list that the team runs (team.py), with addresses in them. calls: the pairs in the order of their
    records.
    """

    def __init__(self, groups):
        self._groups, self.calls = groups, []       # their arrays must live
        self._scratch_bytes, self._growing = [], {}     # of each group; its op whose scratch memory grows, if there is one
        records, stages, intervals, self._starts, arrays = [], [], [], [0], []
        for group in groups:
            group = sorted(group, key=lambda call: call[0].grows)       # behind whose scratch memory there is no other's
            self.calls += group
            offsets, scratch_bytes = _share_scratch(group)
            if group[-1][0].grows:
                self._growing[len(self._scratch_bytes)] = group[-1]
            self._scratch_bytes.append(scratch_bytes)
            listed = [[] for _ in range(max(len(op.stages) for op, _ in group))]
            for (op, args), (offset, is_packed) in zip(group, offsets):
                address = op.entry(signature_of(args)).address
                for i in range(is_packed, len(op.stages)):
                    listed[i - len(op.stages)].append((address, 2 * i, len(records), offset, 0, op.stages[i].light))
                records += [word for a in args for word in words_of(a)]
            for interval in listed:
                intervals.append((len(stages), len(interval)))
                stages += sorted(interval, key=lambda row: row[-1])     # what takes longest first
            arrays += [[] for _ in listed[1:]] + [[array for op, args in group if (array := op.reads(*args)) is not None]]
            self._starts.append(len(intervals))
        self._records, self.stages = np.array(records, np.int64), np.array(stages, np.int64)
        self.stages[:, 2] = self._records.ctypes.data + 8 * self.stages[:, 2]
        self.intervals = np.array([(*interval, *regions) for interval, regions in zip(intervals, _coming(arrays))], np.int64)
        self.intervals[:, 0] = self.stages.ctypes.data + self.stages.strides[0] * self.intervals[:, 0]
        self._most_scratch, self._at = max(self._scratch_bytes, default=0), self.intervals.ctypes.data

    def __len__(self):
        return len(self._groups)

    def run(self, first=0, last=None):
        """Run the groups from the first up to, not including, the last; all."""
        last = len(self) if last is None else last
        start, end = self._starts[first], self._starts[last]
        threads.run(self._at + start * self.intervals.strides[0], end - start, self.scratch_bytes(first, last))

    def scratch_bytes(self, first, last):
        """Count the bytes that the ops of some groups share, at most."""
        n_bytes = self._most_scratch if last - first == len(self) else max(self._scratch_bytes[first:last])
        for i, (op, args) in self._growing.items():
            if first <= i < last:
                n_bytes = max(n_bytes, self._scratch_bytes[i] + op.scratch(*args))
        return n_bytes


def _coming(arrays):
    """The regions that come after each interval (coming.py), as numbers.

    arrays: lists of those that each interval reads. Nothing comes after the last interval: what Python does between two steps is slower if
    memory is busy meanwhile.
    """
    coming, found = [], []
    for some in reversed(arrays):
        words = [word for array in coming for word in (array.ctypes.data, array.nbytes)]
        found.append(words + [0] * (2 * REGIONS - len(words)))
        coming = [*some, *coming][:REGIONS]
    return found[::-1]


def _share_scratch(group):
    """Divide scratch memory among the ops of a group.

    Returns for each op where its part begins, and whether another op packs its arguments there; and the bytes of all but the last one's, if
    that grows.
    """
    packed, offsets, n_bytes = {}, [], 0
    for i, (op, args) in enumerate(group):
        name = op.packed(*args)
        offsets.append((packed.get(name, n_bytes), name in packed))
        if name is not None and name not in packed:
            packed[name] = n_bytes
        if op.grows:
            assert i == len(group) - 1, "two ops of a group grow"
        elif not offsets[-1][1]:
            n_bytes += align(op.scratch(*args))
    return offsets, n_bytes
