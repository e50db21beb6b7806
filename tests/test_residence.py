"""Where weights are: asked for from the file, copied to memory, locked there."""
import ctypes
import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
from helpers import random_ids

import pydsa
from pydsa import PydsaError
from pydsa.backends.cpu.team import fetching, reading_ahead
from pydsa.backends.devices import DEVICES
from pydsa.machine.residence import copied, lock
from pydsa.setup import Setup

IDS = random_ids(40)
asking = pytest.mark.skipif(not fetching.CAN_ASK, reason="the system cannot be asked")


def logits(model):
    session = model.session()
    return np.stack([session.prefill(IDS[:20]), *(session.decode(token) for token in IDS[20:])])


@asking
@pytest.mark.parametrize("spec", [{}, dict(type="Q4_K", n_embd=256, n_ff=256, n_ff_exp=256, n_expert=16), dict(arch="deepseek2")])
def test_asking_changes_no_result(small_model, load, spec, monkeypatch):
    model = load(small_model(**spec))
    expected, asked = logits(model), []
    monkeypatch.setattr(fetching.resource, "getrusage", lambda who: asked.append(who) or type("", (), {"ru_inblock": len(asked)}))
    assert np.array_equal(logits(model), expected) and len(asked) == 21 and fetching._wanted[0] == 1


@asking
def test_steps_ask_while_the_process_reads(monkeypatch):
    counts = iter([5, 9, 9, 9, 10, 11])
    monkeypatch.setattr(fetching.resource, "getrusage", lambda who: type("", (), {"ru_inblock": next(counts)}))
    monkeypatch.setattr(fetching, "_blocks_read", 5)
    found = []
    for _ in range(5):
        fetching.begin_step()
        found.append(int(fetching._wanted[0]))
    assert found == [0, 1, 0, 0, 1]
    fetching.allow(False)
    fetching.begin_step()
    assert fetching._wanted[0] == 0
    fetching.allow(True)


def resident(array):
    """For each page of an array, whether it is in memory."""
    library, pages = ctypes.CDLL(None), (ctypes.c_ubyte * (array.nbytes // mmap.PAGESIZE))()
    assert library.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), pages) == 0
    return np.frombuffer(pages, np.uint8) & 1 == 1


@asking
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="files cannot be evicted")
def test_chosen_experts_are_read_and_no_others(tmp_path):
    n_expert, pages = 32, 48
    path, size = tmp_path / "experts", n_expert * pages * mmap.PAGESIZE
    path.write_bytes(os.urandom(size))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
    if resident(data).any():
        pytest.skip("the file system keeps its files in memory")
    ids = np.array([[3, 30], [7, 3]], np.int32)
    part = [data.ctypes.data, pages * mmap.PAGESIZE, pages * mmap.PAGESIZE, n_expert]
    fetching.ask_for_experts(ids, np.array([0, 1]), np.array([part]))
    assert not resident(data).any()
    fetching.ask_for_experts(ids, np.array([1, 0]), np.array([part]))
    deadline = time.monotonic() + 10
    while not (found := resident(data).reshape(n_expert, pages))[[3, 7, 30]].all() and time.monotonic() < deadline:
        time.sleep(0.01)        # the drive works on it
    assert found[[3, 7, 30]].all() and not np.delete(found, [3, 7, 30], axis=0).any()


@asking
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="files cannot be evicted")
def test_other_weights_are_asked_for_where_they_are_missing(tmp_path, monkeypatch):
    """As after a start: not for each token of a file whose experts alone do not fit."""
    path, size = tmp_path / "weights", 64 * mmap.PAGESIZE
    path.write_bytes(os.urandom(size))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        data = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
        sample = [data.ctypes.data + i * mmap.PAGESIZE for i in (3, 9, 30, 63)]
        for evicted, expected in ((False, 0), (True, 1)):
            if evicted:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if resident(data).any():
                    pytest.skip("the file system keeps its files in memory")
            monkeypatch.setattr(fetching, "_blocks_read", -1)
            assert fetching.begin_step(sample) and fetching._wanted.tolist() == [1, expected]
    fetching.ask_for_weights(np.array([1, 0]), np.array([[data.ctypes.data, 8 * mmap.PAGESIZE]]))
    assert not resident(data).any()
    fetching.ask_for_weights(np.array([1, 1]), np.array([[data.ctypes.data, 8 * mmap.PAGESIZE]]))
    deadline = time.monotonic() + 10
    while not resident(data)[:8].all() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(data)[:8].all() and not resident(data)[8:].any()
    monkeypatch.setattr(fetching, "_allowed", False)
    assert not fetching.begin_step(sample) and not fetching._wanted.any()


@asking
def test_all_weights_but_the_experts_are_asked_for_a_choice_ahead(small_model, load):
    model = load(small_model())
    bound = model.runner.bind("sparse", model.session().caches, 1, 1)
    groups = [[call[1:]] for call in bound.calls]
    asked, needed, ahead = [], [], set()
    for group in fetching.with_requests(groups):
        for op, args in group:
            if op is fetching.ask_for_weights:
                ahead |= set(map(tuple, args[1].tolist()))
                asked.append(len(args[1]))
            elif op is not fetching.ask_for_experts and op.__name__ not in (*fetching.USERS, "get_rows"):
                pieces = set(fetching.pieces_of(args))
                assert pieces <= ahead
                needed += pieces
    assert len(asked) == 1 + sum(op.__name__ == "moe_route" for _, op, _ in bound.calls) and set(needed) == ahead != set()


def test_where_nearly_all_experts_are_chosen_nothing_is_asked(monkeypatch):
    ids = np.zeros((36, 2), np.int32)
    begin = fetching.begin_asking.py_func if hasattr(fetching.begin_asking, "py_func") else fetching.begin_asking
    for n_expert, expected in ((36, 0), (37, 37)):
        assert begin(ids, np.ones(1, np.int64), np.array([[0, 0, 0, n_expert]]), None) == expected


def test_each_choice_is_followed_by_its_request(small_model, load):
    model = load(small_model())
    bound = model.runner.bind("sparse", model.session().caches, 1, 1)
    if not fetching.CAN_ASK:
        return
    asked = [args for group in fetching.with_requests([[call[1:] for call in bound.calls]]) for op, args in group
             if op is fetching.ask_for_experts]
    routes = [args for _, op, args in bound.calls if op.__name__ == "moe_route"]
    assert len(asked) == len(routes) >= 2
    for (ids, _, parts), (chosen, *_) in zip(asked, routes):
        assert ids is chosen and parts.shape == (3, 4) and (np.diff(parts[:, 0]) > 0).all()


@pytest.mark.parametrize("spec", [{}, dict(type="Q4_K", n_embd=256, n_ff=256, n_ff_exp=256), dict(arch="deepseek2")])
def test_weights_in_memory_give_the_same_logits(small_model, load, spec):
    model = load(small_model(**spec), mmap=False)
    assert np.array_equal(logits(model), logits(load(small_model(**spec))))
    setup = model.setup
    assert setup.mapped_bytes == 0 and setup.copied_bytes == sum(DEVICES["cpu"].weights(setup.weights.used.values()))


def test_copying_tells_how_far_it_is(small_model):
    told = []
    pydsa.load(small_model(), mmap=False, kv_type="f32", progress=lambda done, total, name: told.append(name))
    assert "token_embd.weight" in told


def test_a_copy_does_not_need_the_file(tmp_path, small_model):
    tensor = next(iter(Setup(small_model()).weights.used.values()))
    copy = copied(tensor)
    assert np.array_equal(copy.data, tensor.data) and not np.shares_memory(copy.data, tensor.data) and copy.data.ctypes.data % 64 == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_are_locked(small_model):
    code = ("import resource, sys, pydsa\n"
            "locked = lambda: int([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmLck')][0])\n"
            "model = pydsa.load(sys.argv[1], mlock=True)\n"
            "print(1024 * locked() >= model.setup.mapped_bytes)\n"
            "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\n"
            "on, tensors = model.runner.on['cpu'], model.setup.weights.used.values()\n"
            "try:\n    pydsa.machine.residence.lock([on.weight(t).data for t in tensors if len(t.shape) > 1])\n"
            "except pydsa.PydsaError as error:\n    print(error)\n")
    result = subprocess.run([sys.executable, "-c", code, small_model()], capture_output=True, text=True, check=True)
    first, *rest = result.stdout.splitlines()
    assert first == "True" and (rest == [] or "ulimit -l" in rest[0])       # a process with CAP_IPC_LOCK has no limit


def test_a_refused_lock_is_one_sentence(monkeypatch):
    released = []

    class Library:
        def mlock(self, address, n):
            ctypes.set_errno(12)
            return int(n.value > mmap.PAGESIZE * 2)

        def munlock(self, address, n):
            released.append(n.value)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: Library())
    if os.name == "nt":
        pytest.skip("there is no mlock()")
    with pytest.raises(PydsaError, match="does not lock [0-9.]+ MiB .*ulimit -l"):
        lock([np.zeros(8, np.uint8), np.zeros(1 << 20, np.uint8)])
    assert len(released) == 1


@pytest.mark.parametrize("options, sentence", [
    (dict(mmap=1), "mmap is 1"), (dict(mlock="yes"), "mlock is 'yes'"),
    (dict(device="reference", mlock=True), "reference has its own copy.*--mlock"), (dict(device="cuda", mmap=False), "cuda .*--no-mmap")])
def test_bad_options(small_model, options, sentence):
    with pytest.raises(PydsaError, match=sentence):
        pydsa.load(small_model(), **options)


class Matrix(NamedTuple):
    """What reading ahead looks at of a weight."""
    data: np.ndarray
    block: int = 32


def test_reading_ahead_keeps_its_distance(monkeypatch):
    asked, progress = [], threading.Event()
    monkeypatch.setattr(fetching, "PIECE", 100)
    monkeypatch.setattr(reading_ahead, "MOST", 430)

    def ask(library, address, n):
        asked.append((address, n))
        progress.set()
    monkeypatch.setattr(reading_ahead, "ask", ask)
    weights = [Matrix(np.zeros((2, 100), np.uint8)) for _ in range(6)]       # two pieces each
    halves = Matrix(np.zeros((3, 4, 25), np.uint8)[:, :2])                # experts' matrices that do not lie side by side
    groups = [[(len, (1.5, w))] for w in weights] + [[(len, (halves, weights[0]))]]      # of any op

    def wait_for(n):
        deadline = time.monotonic() + 10
        while len(asked) < n and time.monotonic() < deadline:
            progress.wait(0.05)
            progress.clear()
        time.sleep(0.05)        # more would come now
        return len(asked)
    with reading_ahead.ReadAhead(groups) as ahead:
        assert wait_for(4) == 4         # 400 bytes of the 430
        ahead.at(1)
        assert wait_for(6) == 6
        ahead.at(4)
        assert wait_for(10) == 10       # without the group that has passed
        ahead.at(6)
        assert wait_for(15) == 15
    first = [(w.data.ctypes.data + 100 * i, 100) for w in weights for i in range(2)]
    assert asked[:10] == first[:6] + first[8:]
    with reading_ahead.ReadAhead(groups):       # ends in the middle
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "pydsa-read-ahead"]


@asking
def test_prompts_that_read_ahead_give_the_same_logits(small_model, load, monkeypatch):
    """They read all weights but experts of the last layer, which has one row."""
    model = load(small_model())
    expected, asked, reads = model.session().prefill(IDS), [], itertools.count(1 << 40)     # blocks: more than were read so far
    monkeypatch.setattr(fetching.resource, "getrusage", lambda who: type("", (), {"ru_inblock": next(reads)}))
    ask = reading_ahead.ask
    monkeypatch.setattr(reading_ahead, "ask", lambda library, address, n: (asked.append(address), ask(library, address, n)))
    at = reading_ahead.ReadAhead.at        # the step waits until all is read, which it would overtake
    monkeypatch.setattr(reading_ahead.ReadAhead, "at", lambda ahead, group: (ahead._thread.join(10), at(ahead, group)))
    assert np.array_equal(model.session().prefill(IDS), expected)
    met = {name for name, w in model.setup.weights.used.items() if w.data.ctypes.data in asked}
    experts = {f"blk.{il}.ffn_{part}_exps.weight" for il in (1, 2) for part in ("gate", "up", "down")}
    assert met & experts == {name for name in experts if name.startswith("blk.1")} and "blk.2.attn_output.weight" in met
    asked.clear()
    model.session().prefill(IDS[:3])        # too few to need all experts
    assert not asked
