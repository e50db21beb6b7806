"""The team of threads that runs a step: its tasks, its records, its sleep.

Also what ops of a step may share: an interval, and scratch memory.
"""
import itertools
import os
import platform
import random
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from helpers import normal, tensor

from pydsa.backends import cpu
from pydsa.backends.cpu.jit import KernelCache, inner
from pydsa.backends.cpu.team import op as ops
from pydsa.backends.cpu.team import threads
from pydsa.backends.cpu.team import team
from pydsa.backends.cpu.team.op import Stage, Step, op
from pydsa.backends.cpu.team.records import kind_of, signature_of, words_of
from pydsa.executor.graph import CacheRef, Node, Value, levels_of, waits

MODELS = {
    "deepseek2": dict(arch="deepseek2"), "deepseek2 lite": dict(arch="deepseek2", n_lora_q=0, n_expert_groups=0, n_expert_shared=2),
    "deepseek2 without experts": dict(arch="deepseek2", n_expert=0, n_layer_dense=3, expert_gating_func="absent"),
    "deepseek32": dict(), "glm-dsa": dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS")}
FORMS = {"deepseek2": ("auto", "dense")}
MODES = [(name, attention) for name, spec in MODELS.items()
         for attention in FORMS.get(spec.get("arch"), ("auto", "dense", "sparse", "masked"))]
each_mode = pytest.mark.parametrize("name, attention", MODES)


# Ops of this test: each task adds one to a slot of its own, and reads what another task wrote in the interval before

@inner
def begin(out, x, counts, task):
    return len(out)


@inner
def follow(out, x, counts, task):
    out[task.index] = x[len(x) - 1 - task.index] + 1
    counts[0, task.index] += 1
    counts[1, task.index] |= 1 << task.thread


@op(Stage(begin, follow))
def heavy(out, x, counts):
    return 0


@op(Stage(begin, follow, light=True))
def light(out, x, counts):
    return 0


@inner
def begin_twice(out, x, counts, task):
    return len(out)


@inner
def to_scratch(out, x, counts, task):
    team.store(task.scratch, 8 * task.index, x[len(x) - 1 - task.index])


@inner
def from_scratch(out, x, counts, task):
    out[task.index] = team.i64_at(task.scratch, 8 * (len(x) - 1 - task.index)) + 1
    counts[0, task.index] += 1


@op(Stage(begin_twice, to_scratch, light=True), Stage(begin, from_scratch))
def twice(out, x, counts):
    return 8 * len(out)


@inner
def no_task(out, x, counts, task):
    return 0


@op(Stage(begin_twice, to_scratch), Stage(begin, from_scratch, light=True), Stage(no_task, follow))
def thrice(out, x, counts):
    return 8 * len(out)


SIZES = (0, 1, 2, 3, 17, 1000)


class Chains:
    """A step of chains: all ops of a size, each of which reads what the one before it wrote.

    pattern: lists of pairs (op, size), one for each group.
    """

    def __init__(self, pattern):
        self.arrays = {size: [np.zeros(shape, np.int64) for shape in (size, size, (2, size))] for size in SIZES}
        self.threads = 0        # a bit for each thread that was seen
        self.turns, groups = dict.fromkeys(SIZES, 0), []
        for group in pattern:
            groups.append([])
            for function, size in group:
                one, other, counts = self.arrays[size]
                groups[-1].append((function, (one, other, counts) if self.turns[size] % 2 else (other, one, counts)))
                self.turns[size] += 1
        self.step = Step(groups)

    def run(self, step=None):
        """Run the step, and check that each task was done once.

        It must have been done after those of the same size before it, which it reads.
        """
        for array in itertools.chain(*self.arrays.values()):
            array[:] = 0
        (step or self.step.run)()
        for size, (one, other, counts) in self.arrays.items():
            n = self.turns[size]
            assert (counts[0] == n).all() and ((other if n % 2 else one) == n).all()
            self.threads |= int(np.bitwise_or.reduce(counts[1], initial=0))


def pattern(seed, n_groups=200):
    """Random groups of ops of a few sizes, one of them with many tasks.

    At the end there are ops that are light, or have one task or none.
    """
    choose = random.Random(seed)
    groups = [[(choose.choice((heavy, light, twice, thrice)), size) for size in choose.sample(SIZES[:-1], choose.randint(1, 3))]
              for _ in range(n_groups)]
    groups[n_groups // 2].append((heavy, 1000))
    return groups + [[(light, 3)], [(heavy, 1)], [(light, 17), (heavy, 0)], [(light, 1)], [(thrice, 0)]]


@pytest.mark.parametrize("n_threads, end", [(1, None), (2, None), (2, -1), (2, -3), (2, -5), (3, None), (8, None), (8, -2)])
def test_every_task_is_done_once_and_in_time(n_threads, end):
    """... in steps of hundreds of intervals, some of which begin while threads sleep."""
    chains, choose = Chains(pattern(n_threads)[:end]), random.Random(n_threads)
    assert len(chains.step.intervals) > 300
    threads.set_threads(n_threads)
    for _ in range(1000):
        chains.run()
        if choose.random() < 0.02:
            time.sleep(choose.random() / 1000)
            if choose.random() < 0.5:
                threads.set_threads(n_threads)      # wakes those that sleep
    assert chains.threads < 1 << n_threads and (n_threads == 1) == (chains.threads == 1)


def step_of(a_team, step):
    """A function that runs a step by a team of a test's own."""
    return lambda: a_team.run(step.intervals.ctypes.data, len(step.intervals))


@pytest.mark.parametrize("start", [0xFFFFFFFF - 1000, 0x7FFFFFFF - 1000])
@pytest.mark.parametrize("n_threads", [1, 2, 8])
def test_the_number_of_the_interval_wraps(n_threads, start):
    """... at 2^32; at 2^31 the word becomes negative."""
    chains, a_team = Chains(pattern(5)), threads._Team(n_threads)
    chains.run()        # now there is scratch memory
    a_team._state.view(np.uint64)[team.TICKET // 8] = start << 32 | team.IDLE
    try:
        for _ in range(20):
            chains.run(step_of(a_team, chains.step))
        number = int(a_team._state.view(np.uint64)[team.TICKET // 8]) >> 32
        assert number == (start + 20 * (len(chains.step.intervals) + 1)) & 0xFFFFFFFF
    finally:
        a_team.close()
    assert not any(thread.is_alive() for thread in a_team.threads)


def test_pauses_are_counted_while_the_thread_is_interrupted(monkeypatch):
    """Others ran while they were counted: the team slept where it should have looked for work, and steps took a fifth longer."""
    alone, count, rounds = threads._pauses(), team.count_pauses, itertools.count()

    def interrupted(n):
        count(n)
        if next(rounds) < 3:
            time.sleep(0.005)
    monkeypatch.setattr(team, "count_pauses", interrupted)
    assert threads._pauses() > alone / 4


def test_sleepers_are_roused_before_a_step():
    """They look for it as long as before they slept, here until they are told."""
    threads.set_threads(2)
    Chains(pattern(2)).run()
    state, until = threads._teams[2]._state, time.monotonic() + 60
    pauses = state[team.PAUSES // 8]

    def wait_for(n):
        while state[team.SLEEPERS // 8] != n:
            assert time.monotonic() < until
            time.sleep(0.001)
    wait_for(1)
    try:
        state[team.PAUSES // 8] = 1 << 60
        threads.set_threads(2)
        wait_for(0)
    finally:
        state[team.PAUSES // 8] = pauses
    wait_for(1)


def test_teams_of_all_sizes_take_turns():
    """... and those of more threads than there are cores."""
    chains = Chains(pattern(6))
    for n_threads in (2, 40, 3, 1, 2, 40, 5):
        threads.set_threads(n_threads)
        for _ in range(10):
            chains.run()
    assert [len(threads._teams[n].threads) for n in (1, 2, 40)] == [0, 1, 39]


AS_ON_MACOS = """
import platform, sys
system = platform.system
platform.system = lambda: "Darwin" if sys._getframe(1).f_globals["__name__"].endswith(".waiting") else system()
from pydsa.backends.cpu.team import threads, waiting
import numpy as np
import test_team
assert not hasattr(waiting, "_syscall") and waiting._wait.symbol == "pthread_cond_wait"
for n_threads in (1, 2, 8):
    threads.set_threads(n_threads)
    chains = test_team.Chains(test_team.pattern(n_threads))
    for i in range(200):
        chains.run()
        if i % 10 == 0:
            test_team.time.sleep(0.001)
    assert chains.threads.bit_count() >= min(2, n_threads)
from pydsa.backends import cpu
from pydsa.backends.cpu.team.op import Step
x, out = np.arange(3e4, dtype=np.float32).reshape(100, 300), np.empty((100, 300), np.float32)
Step([[(cpu.add, (out, x, x))], [(cpu.add, (out, out, x))]]).run()
assert (out == 3 * x).all()
"""


@pytest.mark.skipif(platform.system() == "Windows", reason="there are no POSIX threads")
def test_condition_variables(tmp_path):
    """... which are for systems without futexes."""
    env = os.environ | {"PYDSA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", AS_ON_MACOS], capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_ops_of_others_are_not_kept():
    """... as the cache folder's name does not change with their sources."""
    Chains([[(heavy, 3)]]).run()
    entry, = heavy._entries.values()
    assert isinstance(entry.cache, KernelCache) and not entry.cache.path(entry.signature).exists() and not entry.wanted.holds()
    assert entry._compiled is not None and entry._compiled._cache is not entry.cache


# Records

class Pair(NamedTuple):
    matrix: np.ndarray
    n: int
    vector: np.ndarray


@inner
def one_task(ints, floats, flags, copies, line, matrix, cube, empty, pair, small, least, greatest, half, nothing, nan, far, yes, no, task):
    return 1


@inner
def append(copies, n, array):
    for value in array.flat:
        copies[n] = value
        n += 1
    return n


@inner
def copy_all(ints, floats, flags, copies, line, matrix, cube, empty, pair, small, least, greatest, half, nothing, nan, far, yes, no, task):
    ints[0], ints[1], ints[2], ints[3], ints[4] = small, least, greatest, pair.n, len(empty)
    ints[5], ints[6], ints[7] = empty.shape[1], matrix.strides[0], cube.strides[2]
    floats[0], floats[1], floats[2], floats[3] = half, nothing, nan, far
    flags[0], flags[1] = yes, no
    n = append(copies, append(copies, append(copies, 0, line), matrix), cube)
    append(copies, append(copies, append(copies, n, empty), pair.matrix), pair.vector)


@op(Stage(one_task, copy_all))
def copy(ints, floats, flags, copies, line, matrix, cube, empty, pair, small, least, greatest, half, nothing, nan, far, yes, no):
    return 0


def test_arguments_arrive_as_they_were_given():
    ints, floats, flags, copies = np.zeros(8, np.int64), np.zeros(4), np.zeros(2, bool), np.zeros(300, np.float32)
    x = normal(5, 6, 7)
    line, matrix, cube, empty = x[1, 2, ::-2], x[:, 3, 1:5], x[3:0:-1, ::2].transpose(2, 0, 1), x[:, :0, 0]
    vector = np.arange(3, dtype=np.uint8)
    matrix16 = x[0].astype(np.float16).astype(np.float64).T
    copy(ints, floats, flags, copies, line, matrix, cube, empty, Pair(matrix16, -7, vector), np.int32(-3), -2**63, np.int64(2**63 - 1), 0.5,
         np.float32(-0.0), float("nan"), np.float64("-inf"), np.bool_(True), False)
    assert ints.tolist() == [-3, -2**63, 2**63 - 1, -7, 5, 0, matrix.strides[0], cube.strides[2]]
    assert floats.tobytes() == np.array([0.5, -0.0, np.nan, -np.inf]).tobytes() and flags.tolist() == [True, False]
    expected = np.concatenate([a.astype(np.float32).ravel() for a in (line, matrix, cube, matrix16, vector)])
    assert np.array_equal(copies[:expected.size], expected) and not copies[expected.size:].any()


@pytest.mark.parametrize("value", [None, "2", 1j, [1], np.complex64(1)])
def test_what_is_no_argument_is_refused(value):
    with pytest.raises(TypeError):
        words_of(value)


# What may run at the same time

def arrays_in(argument):
    """The arrays of an argument: itself, or those of a weight or a cache."""
    if isinstance(argument, np.ndarray):
        return [argument]
    return [a for part in argument for a in arrays_in(part)] if isinstance(argument, tuple) else []


def is_at_odds(one, other):
    """Whether one of two calls writes what the other one uses.

    A call is what it uses: [(array, whether it is written)].
    """
    return any((mine or theirs) and np.shares_memory(a, b) for a, mine in one for b, theirs in other)


def uses(call):
    node, _, args = call
    return [(array, i in node.writes) for i, a in enumerate(args) for array in arrays_in(a) if array.size]


@each_mode
def test_calls_of_a_level_leave_each_other_alone(small_model, load, name, attention):
    """... in memory, where values that are not live at the same time share it."""
    model = load(small_model(**MODELS[name]), attention=attention, n_ubatch=64)
    for variant in model.setup.schedule.variants:
        for n_tokens, n_outputs in ((1, 1), (17, 0), (64, 2)):
            bound = model.runner.bind(variant, model.runner.make_caches(model.setup, 200), n_tokens, n_outputs)
            assert bound.levels == sorted(bound.levels) and len(set(bound.levels)) < 0.9 * len(bound.calls)
            for _, group in itertools.groupby(zip(bound.levels, bound.calls), lambda pair: pair[0]):
                for (_, one), (_, other) in itertools.combinations(group, 2):
                    assert not is_at_odds(uses(one), uses(other)), (one[0].name, other[0].name)


@each_mode
def test_no_node_runs_before_one_it_depends_on(small_model, load, name, attention):
    """... found by all pairs of nodes, with an array of its own for each value."""
    model = load(small_model(**MODELS[name]), attention=attention, n_ubatch=64)
    for layout in model.setup.layouts.values():
        memory, level_of = {}, {id(node): level for level, node in layout.nodes}

        def array(a):
            if isinstance(a, CacheRef):
                return memory.setdefault(a, np.empty(1))
            owner = a
            while owner.base is not None:
                owner = owner.base
            if owner not in memory:
                memory[owner] = np.empty((3, *owner.tail), np.int8)
            return a.array(memory, 2)

        used = [[(array(a), i in node.writes) for i, a in enumerate(node.args) if isinstance(a, (Value, CacheRef))]
                for node in layout.graph.nodes]
        assert len(level_of) == len(used) and max(level_of.values()) > 8
        for (i, one), (j, other) in itertools.combinations(enumerate(layout.graph.nodes), 2):
            if is_at_odds(used[i], used[j]):
                assert level_of[id(one)] < level_of[id(other)], (one.op, one.name, other.op, other.name)


@pytest.mark.parametrize("seed", range(20))
def test_levels_of_random_nodes(seed):
    """... are the longest ways through all pairs of which one writes what the other uses: read, write, or in place."""
    choose = random.Random(seed)
    values = [Value(f"v{i}", (4, 6)) for i in range(4)]
    views = [*values, *(v.slice(i, i + 3) for v in values for i in (0, 2, 3)), values[0].reshape(24), values[1].slice(1, 4).slice(1, 2),
             CacheRef("latents", 0), CacheRef("latents", 1)]
    nodes = [Node("op", str(i), tuple(choose.choices(views, k=choose.randint(1, 3))), choose.choice((0, 1, 1, 2))) for i in range(40)]
    memory = {v: np.empty((2, *v.tail), np.int8) for v in values} | {a: np.empty(1) for a in views if isinstance(a, CacheRef)}
    used = [[(memory[a] if isinstance(a, CacheRef) else a.array(memory, 2), i in node.writes) for i, a in enumerate(node.args)]
            for node in nodes]
    expected = []
    for j in range(len(nodes)):
        expected.append(max((expected[i] + 1 for i in range(j) if is_at_odds(used[i], used[j])), default=0))
    assert levels_of(waits(nodes)) == expected and 3 < max(expected) < 39


# What ops of a group share in scratch memory

def linears(*pairs):
    """Calls of linear for pairs (type of a weight, x)."""
    return [(cpu.linear, (np.empty((len(x), 40), np.float32), cpu.weight(tensor(kind, 40, x.shape[1])), x)) for kind, x in pairs]


X, Y = normal(20, 512), normal(21, 512)[1:]
SHARED = {      # whether the second one, or the last, uses what the first one packed, for one token and for many
    "one x": ([("Q8_0", X), ("Q8_0", X)], (True, True)), "types of one order": ([("IQ2_XS", X), ("IQ2_S", X)], (True, True)),
    "types of another order": ([("Q4_0", X), ("Q8_0", X)], (False, True)), "two floats": ([("F32", X), ("F16", X)], (True, True)),
    "another x": ([("Q8_0", X), ("Q8_0", Y)], (False, False)), "a copy": ([("Q8_0", X), ("Q8_0", X.copy())], (False, False)),
    "fewer rows": ([("Q8_0", X), ("Q8_0", X[:11])], (True, False)),
    "other strides": ([("Q8_0", X[::2]), ("Q8_0", X[:10])], (False, False)),
    "other columns": ([("Q8_0", X[:, :256]), ("Q8_0", X[:, 256:])], (False, False)),
    "fewer columns": ([("Q8_0", X), ("Q8_0", X[:, :256])], (False, False)),
    "another form of x": ([("Q8_0", X), ("F32", X)], (False, False)),
    "others between": ([("Q8_0", X), ("F32", X), ("Q8_0", X)], (True, True))}


@pytest.mark.parametrize("n_tokens", [1, 20])
@pytest.mark.parametrize("case", SHARED)
def test_packed_activations_are_shared_where_they_are_the_same(case, n_tokens):
    pairs, same = SHARED[case]
    calls = linears(*((kind, x[:n_tokens]) for kind, x in pairs))
    offsets, n_bytes = ops._share_scratch(calls)
    assert [again for _, again in offsets] == [False] * (len(calls) - 1) + [same[n_tokens > 1]]
    threads.set_threads(3)
    for function, args in calls:
        function(*args)
    alone = [args[0].copy() for _, args in calls]
    for _, args in calls:
        args[0][:] = np.nan
    step = Step([calls])
    assert len(step.stages) == 2 * len(calls) - sum(again for _, again in offsets)
    step.run()
    assert all(np.array_equal(args[0], expected) for (_, args), expected in zip(calls, alone))
    spaces = sorted({offset: function.scratch(*args) for (offset, _), (function, args) in zip(offsets, calls)}.items())
    assert all(start + size <= following for (start, size), (following, _) in zip(spaces, [*spaces[1:], (n_bytes, 0)]))


@each_mode
def test_matrices_of_one_activation_share_its_packed_form(small_model, load, name, attention):
    model, n_shared = load(small_model(**MODELS[name]), attention=attention, n_ubatch=64), []
    for variant in model.setup.schedule.variants:
        bound = model.runner.bind(variant, model.runner.make_caches(model.setup, 200), 17, 1)
        for _, group in itertools.groupby(zip(bound.levels, bound.calls), lambda pair: pair[0]):
            calls = [call[1:] for _, call in group]
            n_shared.append(sum(again for _, again in ops._share_scratch(calls)[0]))
    assert sum(n_shared) >= 3 * len(model.setup.schedule.variants)


def test_signatures():
    """One object for arguments of equal types, whatever their shapes."""
    first = np.zeros((3, 4), np.float32), 1, 2.0, True
    same = np.zeros((5, 8), np.float32)[::2, ::2], 7, 3.0, False
    assert signature_of(first) is signature_of(same) and signature_of(first) == tuple(map(kind_of, first))
    others = [(np.zeros(3, np.float32), *first[1:]), (np.zeros((3, 4)), *first[1:]), (first[0], 1.0, 2.0, True), (first[0], 1, 2.0, 1)]
    assert len({signature_of(args) for args in [first, same, *others]}) == 5
