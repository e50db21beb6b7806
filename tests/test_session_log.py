"""Logs of sessions: what a process that is killed leaves, other sessions, rows that are replaced, disks that are full."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pydsa import SessionFileError
from pydsa.saved import log as session_log
from pydsa.saved.log import SessionLog, log_path

IDENTITY = {"model": "0" * 64, "kv_type": "i16"}


class Rows:
    """A cache of 64 rows, or more, each of row_bytes bytes."""

    def __init__(self, row_bytes, n=64):
        self.row_bytes, self.n_ctx, self.values = row_bytes, n, np.zeros((n, row_bytes), np.uint8)

    def stored(self, stop, start=0):
        return self.values[start:stop]

    def restore(self, rows, start=0):
        self.values[start:start + len(rows)] = rows


def some_caches(seed=None, n=64):
    """Three caches; seed: of their rows; None: they are empty."""
    caches = {("latents", 3): Rows(24, n), ("latents", 4): Rows(24, n), ("index_keys", 3): Rows(10, n)}
    if seed is not None:
        for cache in caches.values():
            cache.values[:] = np.random.default_rng(seed).integers(0, 256, cache.values.shape)
    return caches


def rows(caches, n):
    return [cache.stored(n).tobytes() for cache in caches.values()]


@pytest.fixture
def path(tmp_path):
    return log_path(tmp_path / "saves", "ab12", 7, (3, 5))


@pytest.fixture
def caches():
    return some_caches(0)


def restored(path):
    """The tokens of a log, and the rows that a new stage gets."""
    caches = some_caches()
    log = SessionLog(path, IDENTITY, caches)
    log.restore()
    log.close()
    return log.tokens, rows(caches, len(log.tokens))


def test_what_was_appended_is_there(path, caches):
    log = SessionLog(path, IDENTITY, caches)
    assert path.name == "pydsa-ab12-7.layers-3-4.log" and restored(path) == ([], [b"", b"", b""])
    for start, stop in ((0, 5), (5, 6), (6, 6), (6, 30)):
        log.append(start, list(range(start, stop)))
        assert restored(path) == (list(range(stop)), rows(caches, stop))
    log.close()
    log = SessionLog(path, IDENTITY, caches)       # it goes on
    log.append(30, [1, 2])
    assert log.tokens == restored(path)[0] == [*range(30), 1, 2]
    log.remove()
    assert os.listdir(path.parent) == []


def test_some_of_the_rows_are_restored(path, caches):
    log, other = SessionLog(path, IDENTITY, caches), some_caches()
    log.append(0, list(range(10)))
    log.append(10, list(range(10)))
    again = SessionLog(path, IDENTITY, other)
    again.restore(13)
    assert rows(other, 13) == rows(caches, 13)
    assert not any(cache.values[13:].any() for cache in other.values())


def test_tokens_that_a_session_forgot_are_replaced(path, caches):
    log = SessionLog(path, IDENTITY, caches)
    log.append(0, list(range(20)))
    for cache in caches.values():
        cache.values[8:] = cache.values[8:][::-1].copy()
    log.append(8, [100, 101])
    assert restored(path) == ([*range(8), 100, 101], rows(caches, 10))
    log.append(3, [])
    assert restored(path) == ([0, 1, 2], rows(caches, 3))


def test_a_gap_is_refused(path, caches):
    log = SessionLog(path, IDENTITY, caches)
    log.append(0, [1, 2])
    with pytest.raises(SessionFileError, match="rows from token 3 on do not go on from the 2 that were saved"):
        log.append(3, [4])
    assert restored(path)[0] == [1, 2]


def test_wherever_a_file_ends_complete_saves_count(path, caches):
    log, ends = SessionLog(path, IDENTITY, caches), []
    for start in (0, 3, 4):
        log.append(start, list(range(start, start + 3 - start // 2)))
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for size in sorted({*range(0, len(data), 7), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}):
        path.write_bytes(data[:size])
        try:
            tokens, found = restored(path)
        except SessionFileError:
            assert size < len(log._head)
            continue
        n = (0, 3, 5, 5)[sum(size >= end for end in ends)]
        assert tokens == list(range(n)) and found == rows(caches, n)


def test_damage_ends_what_counts(path, caches):
    log = SessionLog(path, IDENTITY, caches)
    log.append(0, list(range(4)))
    end = path.stat().st_size
    log.append(4, list(range(4, 9)))
    data = path.read_bytes()
    for at in range(len(log._head), len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        tokens, found = restored(path)
        n = 4 if at >= end else 0
        assert tokens == list(range(n)) and found == rows(caches, n)


def test_a_log_goes_on_after_what_counts(path, caches):
    log = SessionLog(path, IDENTITY, caches)
    log.append(0, [0, 1, 2])
    with open(path, "ab") as file:
        file.write(b"ROWS" + bytes(50))
    log = SessionLog(path, IDENTITY, caches)
    log.append(3, [3])
    assert restored(path) == ([0, 1, 2, 3], rows(caches, 4))


OTHERS = {
    "another model": (IDENTITY | {"model": "1" * 64}, {}, "of another session, model, cache type"),
    "other caches": (IDENTITY, {("latents", 5): Rows(24)}, "of another session, model, cache type"),
}


@pytest.mark.parametrize("identity, more, message", OTHERS.values(), ids=OTHERS)
def test_logs_of_others_are_refused(path, caches, identity, more, message):
    SessionLog(path, IDENTITY, caches).append(0, [1])
    before = path.read_bytes()
    with pytest.raises(SessionFileError, match=message):
        SessionLog(path, identity, caches | more)
    assert path.read_bytes() == before


@pytest.mark.parametrize("at, message", [(0, "not a log of a session"), (24, "beginning of the session's log is damaged"),
                                         (40, "beginning of the session's log is damaged")])
def test_files_that_are_no_logs_are_refused(path, caches, at, message):
    SessionLog(path, IDENTITY, caches).append(0, [1])
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(SessionFileError, match=message):
        SessionLog(path, IDENTITY, caches)
    assert path.read_bytes() == data


def test_places_that_cannot_be_written(tmp_path, caches):
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file" / "log", tmp_path):
        with pytest.raises(SessionFileError, match="the session's log cannot be read"):
            SessionLog(place, IDENTITY, caches)


def test_a_full_disk_leaves_what_was_complete(path, caches, monkeypatch):
    log = SessionLog(path, IDENTITY, caches)
    log.append(0, [0, 1, 2])
    whole = Rows.stored

    def full(self, stop, start=0):
        if self.row_bytes == 10:
            raise OSError(28, "No space left on device")
        return whole(self, stop, start)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "stored", full)
        with pytest.raises(SessionFileError, match="log cannot be written .No space left on device"):
            log.append(3, [3, 4])
    assert log.tokens == [0, 1, 2] and restored(path)[0] == [0, 1, 2]
    log.append(3, [9])
    assert restored(path) == ([0, 1, 2, 9], rows(caches, 4))


@pytest.mark.parametrize("fails", [False, True])
def test_rows_that_count_no_more_are_left_out_some_time(path, caches, monkeypatch, fails):
    monkeypatch.setattr(session_log, "SPARE", 1000)
    monkeypatch.setattr(session_log, "STEP", 7)
    log, sizes = SessionLog(path, IDENTITY, caches), []
    log.append(0, list(range(20)))
    if fails:
        monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for i in range(60):
        before = log.tokens[:]
        try:
            log.append(10, list(range(100 + i, 110 + i)))
        except SessionFileError:
            assert fails and restored(path)[0] == before
            return
        sizes.append(path.stat().st_size)
    assert not fails and max(sizes) < 1000 + 3 * 20 * 58 + 2000 and min(sizes[1:]) < sizes[0]
    assert restored(path) == ([*range(10), *range(159, 169)], rows(caches, 20)) and os.listdir(path.parent) == [path.name]
    log.append(20, [5])
    assert restored(path) == ([*range(10), *range(159, 169), 5], rows(caches, 21))


CHILD = """
import sys
sys.path.insert(0, "tests")
from test_session_log import IDENTITY, SessionLog, some_caches
caches = some_caches(0, 4096)
log = SessionLog(sys.argv[1], IDENTITY, caches)
while True:
    log = SessionLog(sys.argv[1] + "2", IDENTITY, caches) if len(log.tokens) == 4096 else log
    n = len(log.tokens)
    log.append(n, list(range(n, n + 256)))
    print(n + 256, flush=True)
"""


def test_a_process_that_is_killed_while_it_appends(path):
    for delay in (0, 0.01):
        child = subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, text=True)
        try:
            told = int(child.stdout.readline())
            time.sleep(delay)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        expected, caches = some_caches(0, 4096), some_caches(None, 4096)
        log = SessionLog(path, IDENTITY, caches)
        assert told <= len(log.tokens) and log.tokens == list(range(len(log.tokens)))
        log.restore()
        assert rows(caches, len(log.tokens)) == rows(expected, len(log.tokens))
        log.remove()
