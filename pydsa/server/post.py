"""Post: from the engine's thread to the event loop, many events at once.

To wake an event loop is a system call, after which that takes the interpreter's lock: the engine's thread would wait for it after each
token. A queue does not let go of the lock. The thread that takes from it runs once the engine's is in its next step, and finds what came of
all answers.
"""
import contextlib
import queue
import threading


class Post:
    """A thread between other threads and event loops."""

    def __init__(self):
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="pydsa post", daemon=True).start()

    def send(self, loop, function, *args):
        """Call a function with arguments on an event loop's thread, in order.

        It is not called if the loop has ended.
        """
        self._queue.put((loop, function, args))

    def close(self):
        """End the thread; what was sent is brought first."""
        self._queue.put(None)

    def _run(self):
        ended = False
        while not ended:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._queue.get_nowait())
            calls = {}
            for item in items:
                if item is None:
                    ended = True
                else:
                    calls.setdefault(item[0], []).append(item[1:])
            for loop, of in calls.items():
                with contextlib.suppress(RuntimeError):     # the server has ended
                    loop.call_soon_threadsafe(_call, of)


def _call(calls):
    for function, args in calls:
        function(*args)
