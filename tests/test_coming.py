"""What comes next in a step, and who fetches which part of it."""
import ctypes

import numpy as np
import pytest
from helpers import normal, tensor

from pydsa.backends import cpu
from pydsa.backends.cpu.team import coming
from pydsa.backends.cpu.team.op import Step

SIZES = 40 * 1024, 100, 3 * coming.PIECE


@pytest.fixture
def fetched(monkeypatch):
    """Regions of SIZES bytes, and the (region, offset) of each line fetched."""
    starts, found = [(k + 1) << 32 for k in range(len(SIZES))], []
    words = np.array([word for pair in zip(starts, SIZES) for word in pair], np.int64)

    def prefetch(address, offset):
        found.append(((address + offset >> 32) - 1, address + offset & 0xFFFFFFFF))

    monkeypatch.setattr(coming, "i64_at", lambda address, offset: ctypes.c_int64.from_address(address + offset).value)
    monkeypatch.setattr(coming, "prefetch", prefetch)
    return words, found


def test_tasks_fetch_all_regions_once(fetched):
    regions, found = fetched
    assert coming.regions_size(regions.ctypes.data) == sum(SIZES)
    for first in range(0, sum(SIZES), 64 * 7):
        coming.fetch(regions.ctypes.data, first, 64 * 7)
    assert len(set(found)) == len(found)
    for k, size in enumerate(SIZES):
        offsets = sorted(offset for region, offset in found if region == k)
        assert 0 <= offsets[0] < 64 and max(np.diff([*offsets, size])) <= 64 and offsets[-1] < size


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_threads_that_wait_fetch_shares_of_their_own(fetched, n_threads):
    """... all but the first one, which belongs to who begins the interval."""
    (regions, found), shares = fetched, {}
    for thread in range(1, n_threads):
        found.clear()
        done = 0
        while coming.fetch_share(regions.ctypes.data, thread, n_threads, done):
            done += coming.PIECE
        shares[thread] = set(found)
        assert len(found) == len(shares[thread]) == done // 64
    everything = set().union(*shares.values())
    assert len(everything) == sum(map(len, shares.values())) and all(offset < SIZES[k] for k, offset in everything)
    expected = SIZES[0] * (n_threads - 1) // n_threads
    assert expected - n_threads * coming.PIECE < 64 * sum(k == 0 for k, _ in everything) <= expected
    assert min(offset for k, offset in everything if k == 0) == SIZES[0] // (2 * n_threads) // 256 * 512
    found.clear()
    assert coming.fetch_share(regions.ctypes.data, 0, n_threads, 0) and set(found) <= shares[n_threads - 1]


def test_intervals_know_the_weights_that_come_next():
    """... of one token; a step of more tokens waits less for memory."""
    weights = [cpu.weight(tensor("Q8_0", 32, 32)) for _ in range(5)]

    def regions(n_tokens):
        x, out = normal(n_tokens, 32), np.empty((n_tokens, 32), np.float32)
        step = Step([[(cpu.linear, (out, weights[0], x)), (cpu.linear, (out.copy(), weights[1], x))], [(cpu.add, (out, x, x))],
                     *[[(cpu.linear, (out, w, x))] for w in weights[2:]]])
        return step.intervals[:, 2:].reshape(-1, coming.REGIONS, 2).tolist()

    places = [[w.data.ctypes.data, w.data.nbytes] for w in weights]
    # packing for 0 and 1, their rows, the sum, and for each of the others packing and rows
    expected = [places[:3], places[2:], places[2:], places[2:], places[3:], places[3:], places[4:], places[4:], []]
    assert regions(1) == [[*some, *[[0, 0]] * (coming.REGIONS - len(some))] for some in expected]
    assert not np.any(regions(2))
