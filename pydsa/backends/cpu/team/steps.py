"""The calls of a step, as the list of intervals that a team runs."""
import itertools
import time

from pydsa.backends.cpu.attention import together
from pydsa.backends.cpu.jit import compile_all, listing, wanted_function
from pydsa.backends.cpu.team import threads
from pydsa.backends.cpu.team.fetching import ASKING, begin_step, sample_of, with_requests
from pydsa.backends.cpu.team.op import Step
from pydsa.backends.cpu.team.reading_ahead import ReadAhead, uses_nearly_all
from pydsa.backends.cpu.team.records import signature_of


def compile_calls(bind, progress=None):
    """Compile the ops of bind()'s calls, and what they call by address.

    bind() makes pairs of an op and its arguments; what it makes of weights and caches has no addresses yet. progress(done, total, name) is
    called before each.
    """
    with listing() as functions:
        calls = bind()
    entries = dict.fromkeys(op.entry(signature_of(args)) for group in with_requests([calls]) for op, args in group)
    compile_all([*threads.wanted(), *map(wanted_function, dict.fromkeys(functions)), *(entry.wanted for entry in entries)], progress)


def grouped(calls, levels):
    """The groups of a step: lists of pairs (op, args) of equal levels.

    calls: [(node, op, args)].
    """
    return [together([(op, args) for _, (_, op, args) in group]) for _, group in itertools.groupby(zip(levels, calls), lambda x: x[0])]


class Recording:
    """The calls of a step, [(node, op, args)], in groups.

    A step that repeats runs as a whole; others run group by group, so that Ctrl-C is heard in between.
    """

    def __init__(self, calls, levels, again):
        groups = list(with_requests(grouped(calls, levels)))
        self._sample = sample_of(groups)
        self._step, self._whole = Step(groups), again
        self._ahead = ReadAhead(groups) if uses_nearly_all(groups) and not again else None
        self._group_of = [i for i, group in enumerate(groups) for op, _ in group if op not in ASKING]

    def run(self, before=None, after=None):
        """Run the step; before, after: {i: function} of the i-th call.

        They are called before and after its group.
        """
        asks = begin_step(self._sample)
        if asks and self._ahead:
            with self._ahead:
                self._run_to_stops(before, after)
        elif before or after:
            self._run_to_stops(before, after)
        else:       # with as little of Python as can be: a token finds it in memory, not in caches
            self._run(0, len(self._step))

    def _run_to_stops(self, before, after):
        stops = [(self._group_of[i] + 1, 0, i, function) for i, function in (after or {}).items()]
        stops += [(self._group_of[i], 1, i, function) for i, function in (before or {}).items()]
        done = 0
        for end, _, _, function in sorted(stops, key=lambda stop: stop[:3]):
            self._run(done, end)
            done = end
            function()
        self._run(done, len(self._step))

    def _run(self, first, last):
        """Run the groups from the first up to, not including, the last."""
        if self._whole and first < last:
            self._step.run(first, last)
            return
        for i in range(first, last):
            if self._ahead:
                self._ahead.at(i)
            self._step.run(i, i + 1)


def recorded(calls, levels, again):
    """The Recording of a step's calls.

    levels: a number for each call; neighbours of equal numbers do not depend on each other.
    """
    return Recording(calls, levels, again)


def timed(calls):
    """Run calls, pairs (op, args), one by one -> the seconds of each."""
    step, times = Step([[call] for call in calls]), []
    for i in range(len(step)):
        start = time.perf_counter()
        step.run(i, i + 1)
        times.append(time.perf_counter() - start)
    return times
