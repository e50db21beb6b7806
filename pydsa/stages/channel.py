"""Channels: authenticated connections between stages and their driver.

Both ends prove that they have the same key, as multiprocessing's connections do, before anything else is read. What passes is not
encrypted.
"""
import contextlib
import queue
import socket
import struct
import threading
import time
from multiprocessing.connection import answer_challenge, deliver_challenge

import numpy as np

from pydsa.errors import StageError

KEY_BYTES = 32
HANDSHAKE = 5.0         # seconds that the other end may take to prove that it has the key
UNACKNOWLEDGED = 20     # seconds after which what the other end does not take ends the connection
MOST_STRANGERS = 64     # connections that may be in their handshake
SMALL = 1 << 16         # bytes of a frame that is sent at once, by the thread that has it
_LENGTH = struct.Struct("<Q")


class ChannelError(StageError):
    """A connection cannot be made, or has ended."""


class Channel:
    """A connection over which frames pass in both directions.

    Several threads may send; one may receive.
    """

    def __init__(self, connection):
        self._socket, self._lock = connection, threading.Lock()
        self.heard = time.monotonic()       # when anything came
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED * 1000)

    def send(self, head, rows=b""):
        """Send a frame: two bytes-like objects, as one.

        Raises ChannelError if the connection has ended.
        """
        rows = memoryview(rows).cast("B") if len(rows) else b""
        head = _LENGTH.pack(len(head) + len(rows)) + head
        if len(rows) < SMALL:
            head, rows = head + rows, b""
        try:
            with self._lock:
                self._socket.sendall(head)
                if rows:
                    self._socket.sendall(rows)
        except OSError as error:
            raise ChannelError(f"the connection has ended ({error.strerror or error})") from error

    def receive(self, most):
        """The next frame, a memoryview of at most `most` bytes; None at the end.

        Raises ChannelError if the connection ends inside a frame, or if a longer one is announced.
        """
        length = self._take(_LENGTH.size, may_end=True)
        if length is None:
            return None
        n, = _LENGTH.unpack(length)
        if n > most:
            raise ChannelError(f"a frame of {n} bytes is announced, expected at most {most}")
        return self._take(n)

    def _take(self, n, may_end=False):
        data = memoryview(np.empty(n, np.uint8))        # not written before it is received
        at = 0
        while at < n:
            try:
                taken = self._socket.recv_into(data[at:])
            except OSError as error:
                if may_end and at == 0 and not isinstance(error, TimeoutError):
                    return None
                raise ChannelError(f"the connection has ended ({error.strerror or error})") from error
            if taken == 0:
                if may_end and at == 0:
                    return None
                raise ChannelError("the connection ended inside a frame")
            at += taken
            self.heard = time.monotonic()
        return data

    def close(self):
        """End the connection; threads that send or receive return."""
        with contextlib.suppress(OSError):      # the other end may have closed it
            self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self):
        """Give the number back only now: a thread may be about to use it, and it would soon be another file's."""
        self._socket.close()

    # What multiprocessing's handshake takes for a connection

    def send_bytes(self, data):
        """Send a message of the handshake."""
        self.send(data)

    def recv_bytes(self, most):
        """Receive a message of the handshake."""
        data = self.receive(most)
        if data is None:
            raise ChannelError("the connection has ended")
        return bytes(data)


def _authenticated(connection, key, accepting):
    """The Channel of a socket whose other end has the key.

    Raises ChannelError if it has not, or does not prove it in time.
    """
    channel = Channel(connection)
    watch = threading.Timer(HANDSHAKE, channel.close)       # bytes one by one would pass a timeout of the socket
    watch.daemon = True
    watch.start()
    try:
        for prove in (deliver_challenge, answer_challenge) if accepting else (answer_challenge, deliver_challenge):
            prove(channel, key)
    except Exception as error:      # what a stranger sends can be anything
        channel.close()
        if isinstance(error, ChannelError):
            raise ChannelError(f"the other end does not prove that it has the key: {error}") from error
        raise ChannelError("the other end has not the key of this model's stages") from error
    finally:
        watch.cancel()
    return channel


def connect(address, key, timeout=10.0):
    """A Channel to (host, port).

    Raises ChannelError if nothing answers there within `timeout` seconds, or if what answers has another key.
    """
    try:
        connection = socket.create_connection(tuple(address), timeout)
        connection.settimeout(None)
        return _authenticated(connection, key, accepting=False)
    except OSError as error:
        raise ChannelError(f"nothing answers at {address[0]}:{address[1]} ({error.strerror or error})") from error


class Door:
    """Listens for connections, and serves those that have the key.

    serve(channel) is called for each, on a thread of its own. address: where it listens, (host, port); port 0 is any that is free.
    Nothing is accepted before open(key). Raises ChannelError if it cannot listen.
    """

    def __init__(self, address, serve):
        self._serve, self._key, self._strangers = serve, None, threading.BoundedSemaphore(MOST_STRANGERS)
        try:
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server(tuple(address), family=family)
        except OSError as error:
            raise ChannelError(f"a stage cannot listen at {address[0]}:{address[1]} ({error.strerror or error})") from error
        self.address = self._socket.getsockname()[:2]

    def open(self, key):
        """Accept connections that have this key, from now on; no other key."""
        first, self._key = self._key is None, key
        if first:
            threading.Thread(target=self._listen, name="pydsa door", daemon=True).start()

    def _listen(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:     # closed, or a connection that ended before it was accepted
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.05)        # no numbers of files are left, perhaps
                continue
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._welcome, args=(connection,), name="pydsa stage's connection", daemon=True).start()

    def _welcome(self, connection):
        try:
            channel = _authenticated(connection, self._key, accepting=True)
        except (ChannelError, OSError):     # a stranger, of whom there is nothing to tell
            return
        finally:
            self._strangers.release()
        self._serve(channel)

    def close(self):
        """Listen no more; connections stay."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)     # wakes the thread that accepts
        self._socket.close()


class Outbox:
    """Sends frames on a thread of its own, in order.

    A small frame goes at once where nothing waits. failed(error) is called once, if the connection ends.
    """

    def __init__(self, channel, failed, at_once=True):
        self.channel, self._failed, self._small = channel, failed, SMALL if at_once else 0
        self._frames, self._waiting, self._lock = queue.SimpleQueue(), 0, threading.Lock()
        threading.Thread(target=self._run, name="pydsa outbox", daemon=True).start()

    def send(self, head, rows=b""):
        """Send a frame; the second part must stay as it is."""
        with self._lock:
            if self._waiting or len(head) + memoryview(rows).nbytes >= self._small:
                self._waiting += 1
                self._frames.put((head, rows))
                return
            try:
                self.channel.send(head, rows)
            except ChannelError as error:
                self._fail(error)

    def _run(self):
        while (frame := self._frames.get()) is not None:
            try:
                self.channel.send(*frame)
            except ChannelError as error:
                self._fail(error)
            with self._lock:
                self._waiting -= 1

    def _fail(self, error):
        failed, self._failed = self._failed, lambda error: None
        failed(error)

    def close(self):
        """End the thread and the connection; what waits is not sent."""
        self.channel.close()
        self._frames.put(None)
