"""Post: from the engine's thread to the event loop, many events at once.

An event loop is woken by a system call. During one Python lets go of the interpreter's lock, and the loop takes it: the engine's thread
would wait for it after each token. Here the call keeps the lock. The loop gets it when the engine's thread is in its next step, and finds
what came of all answers.
"""
import collections
import contextlib
import ctypes
import os


class Post:
    """Calls of functions on the threads of event loops."""

    def __init__(self):
        self._boxes = {}        # loop -> _Box

    def send(self, loop, function, *args):
        """Call a function with arguments on an event loop's thread, in order.

        It is not called if the loop has ended.
        """
        box = self._boxes.get(loop)
        if box is None:
            box = self._boxes[loop] = _Box(loop)
        box.put(function, args)

    def close(self):
        """Bring what was sent; nothing is sent any more."""
        for box in self._boxes.values():
            box.close()


class _Box:
    """Calls that wait for one event loop, and a pipe that wakes it.

    Loops of Windows wait for no pipes, and are woken as asyncio does it.
    """

    def __init__(self, loop):
        self._loop, self._calls, self._woken, self._ends = loop, collections.deque(), False, ()
        if os.name == "posix":
            self._write, self._ends = ctypes.PyDLL(None).write, os.pipe()
            for end in self._ends:
                os.set_blocking(end, False)
            self._on_the_loop(loop.add_reader, self._ends[0], self._read)

    def put(self, function, args):
        """Add a call, and wake the loop if it does not know of any."""
        self._calls.append((function, args))
        if self._woken:
            return
        self._woken = True
        if self._ends:
            self._write(self._ends[1], b"x", ctypes.c_size_t(1))
        else:
            self._on_the_loop(self._run)

    def close(self):
        """Let the loop make the last calls, and close the pipe."""
        if not self._on_the_loop(self._end):
            self._close_ends()

    def _on_the_loop(self, function, *args):
        """Call a function on the loop's thread -> False if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)
            return True
        return False

    def _read(self):
        os.read(self._ends[0], 64)
        self._run()

    def _run(self):
        self._woken = False     # before they are looked at: what comes now wakes the loop again
        while self._calls:
            function, args = self._calls.popleft()
            function(*args)

    def _end(self):
        self._run()
        if self._ends:
            self._loop.remove_reader(self._ends[0])
            self._close_ends()

    def _close_ends(self):
        for end in self._ends:
            os.close(end)
