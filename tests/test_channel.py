"""Channels between processes: who gets in, what passes, and what ends them."""
import os
import socket
import struct
import threading
import time
import tracemalloc

import numpy as np
import pytest
from helpers import rng

from pydsa.stages import channel as channels
from pydsa.stages.channel import SMALL, Channel, ChannelError, Door, Outbox, connect

KEY = os.urandom(channels.KEY_BYTES)


@pytest.fixture
def door():
    """door.opened: channels of those that came in."""
    opened = []
    door = Door(("127.0.0.1", 0), opened.append)
    door.opened = opened
    yield door
    door.close()
    for channel in opened:
        channel.close()


@pytest.fixture
def pair(door):
    """Both ends of a connection."""
    door.open(KEY)
    mine = connect(door.address, KEY)
    until(lambda: door.opened)
    yield mine, door.opened[0]
    mine.close()


def until(true, seconds=5.0):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_frames_pass_whole_in_both_directions(pair):
    mine, theirs = pair
    rows = rng(1).integers(0, 256, (40, SMALL // 8)).astype(np.uint8)      # more than a socket takes at once
    sent = [(b"a", b""), (b"head", rows), (b"b" * SMALL, b"c" * (SMALL - 1)), (b"", b"d")]
    sender = threading.Thread(target=lambda: [mine.send(*frame) for frame in sent])
    sender.start()
    assert [bytes(theirs.receive(1 << 24)) for _ in sent] == [head + bytes(memoryview(rows).cast("B")) for head, rows in sent]
    sender.join()
    theirs.send(b"back")
    assert bytes(mine.receive(8)) == b"back"


def test_who_has_another_key_does_not_come_in(door):
    door.open(KEY)
    with pytest.raises(ChannelError, match="has not the key"):
        connect(door.address, bytes(32))
    connect(door.address, KEY).close()
    until(lambda: len(door.opened) == 1)


def test_a_door_that_has_another_key_is_not_trusted():
    """The end that connects wants a proof as well: what listens there may be anyone."""
    def answer(listening):
        connection, _ = listening.accept()
        stranger = Channel(connection)
        stranger.send(b"#CHALLENGE#" + bytes(20))
        stranger.receive(256)
        stranger.send(b"#WELCOME#")         # to anything
        stranger.receive(256)
        stranger.send(bytes(16))            # no answer to the other's challenge
        stranger.receive(256)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        with pytest.raises(ChannelError, match="has not the key"):
            connect(listening.getsockname(), KEY)
        thread.join()


def test_nobody_comes_in_before_there_is_a_key(door):
    """The connection waits; then it is served."""
    found = []
    thread = threading.Thread(target=lambda: found.append(connect(door.address, KEY)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and not door.opened
    door.open(KEY)
    thread.join()
    until(lambda: door.opened)
    found[0].close()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", struct.pack("<Q", 2**63), struct.pack("<Q", 16) + bytes(16),
                                  struct.pack("<Q", 10) + b"#WELCOME#\n"])
def test_strangers_are_turned_away(door, sent, monkeypatch):
    monkeypatch.setattr(channels, "HANDSHAKE", 0.1)
    door.open(KEY)
    tracemalloc.start()
    with socket.create_connection(door.address) as stranger:
        stranger.sendall(sent)
        stranger.settimeout(5)
        with pytest.raises(ConnectionError):       # it is closed: at its end, or with what was not read
            while stranger.recv(4096):
                pass
            raise ConnectionError
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not door.opened and peak < 1 << 20
    connect(door.address, KEY).close()      # others still come in


def test_many_silent_strangers_do_not_keep_others_out(monkeypatch):
    monkeypatch.setattr(channels, "HANDSHAKE", 0.2)
    monkeypatch.setattr(channels, "MOST_STRANGERS", 4)
    opened, before = [], threading.active_count()
    door = Door(("127.0.0.1", 0), opened.append)
    door.open(KEY)
    strangers = [socket.create_connection(door.address) for _ in range(20)]
    assert len([stranger for stranger in strangers if stranger.recv(1)]) == 4        # the others are turned away at once
    assert threading.active_count() - before <= 1 + 2 * 4       # of the door; a connection has one, and one for its time
    until(lambda: threading.active_count() - before <= 1)
    connect(door.address, KEY).close()
    until(lambda: opened)
    door.close()
    for stranger in strangers:
        stranger.close()


def test_a_frame_that_is_announced_too_long_is_not_allocated(pair):
    mine, theirs = pair
    mine._socket.sendall(struct.pack("<Q", 2**62) + b"x")
    tracemalloc.start()
    with pytest.raises(ChannelError, match=f"a frame of {2**62} bytes is announced, expected at most 1000"):
        theirs.receive(1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 16


def test_the_end_of_a_connection_is_told_from_a_cut(pair):
    mine, theirs = pair
    mine._socket.sendall(struct.pack("<Q", 100) + b"x" * 99)
    mine.close()
    with pytest.raises(ChannelError, match="ended inside a frame"):
        theirs.receive(1000)
    theirs.close()
    assert theirs.receive(1000) is None
    with pytest.raises(ChannelError, match="has ended"):
        for _ in range(2):
            theirs.send(bytes(1 << 20))


def test_close_wakes_who_receives(pair):
    mine, _ = pair
    found = []
    thread = threading.Thread(target=lambda: found.append(mine.receive(10)))
    thread.start()
    thread.join(0.05)
    mine.close()
    thread.join(5)
    assert found == [None]


@pytest.mark.parametrize("at_once", [True, False])
def test_an_outbox_keeps_the_order(pair, at_once):
    """Large frames wait, and small ones do not overtake them."""
    mine, theirs = pair
    failures = []
    box = Outbox(mine, failures.append, at_once)
    for i in range(60):
        box.send(bytes([i]), bytes(SMALL * 8 if i % 20 == 3 else 3))
    assert [theirs.receive(1 << 24)[0] for _ in range(60)] == list(range(60))
    theirs.close()
    until(lambda: box.send(b"x") or failures)
    box.send(b"y")
    assert len(failures) == 1 and isinstance(failures[0], ChannelError)
    box.close()


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    with pytest.raises(ChannelError, match=f"nothing answers at 127.0.0.1:{address[1]}"):
        connect(address, KEY)
    with pytest.raises(ChannelError, match="cannot listen at 192.0.2.1:0"):
        Door(("192.0.2.1", 0), None)
