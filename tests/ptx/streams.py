"""Streams and events of the emulated driver: work that is done in order, at once or as late as allowed.

A GPU may do work at any time between the call that enqueues it and the call that waits for it. Code that forgets to wait is right on a
driver that does all at once, and wrong on one that is late, or early in one stream and late in another.
"""
import collections


class Stream:
    """Work of one device, done in order.

    number: 0 for the first stream of its device. recording: what is captured in place of being done, or None.
    """

    def __init__(self, device, number):
        self.device, self.number, self.recording = device, number, None
        self.ends_with_kernel = False           # the last piece of work: then a dependent launch need not wait for all of it
        self.n_pushed = self.n_done = 0
        self.queue = collections.deque()        # functions; and Points of other streams, to be waited for

    def __int__(self):
        """The handle, where a number is needed: in the record of a launch's attributes."""
        return id(self)


class Point:
    """The place in a stream after all that it has been given."""

    def __init__(self, stream):
        self.stream, self.n = stream, stream.n_pushed

    @property
    def reached(self):
        return self.stream.n_done >= self.n


class Event:
    """An event: the Point that it was recorded at last, and when it was reached."""

    def __init__(self, device):
        self.device, self.point, self.time = device, None, None


class Streams:
    """All streams.

    late: tells of a stream whether its work waits until something waits for it. Other streams do theirs at once, up to a Point that is not
    reached.
    """

    def __init__(self):
        self.all, self.late = [], lambda stream: False

    def new(self, device):
        stream = Stream(device, sum(other.device == device for other in self.all))
        self.all.append(stream)
        return stream

    def push(self, stream, work):
        """Enqueue a function, or a Point to wait for."""
        stream.queue.append(work)
        stream.n_pushed += 1
        stream.ends_with_kernel = False
        self._go_on()

    def finish(self, stream, n=None):
        """Do a stream's work, with what that waits for.

        n: how many pieces, of all that it was ever given; None: all.
        """
        while stream.n_done < (stream.n_pushed if n is None else n):
            if isinstance(stream.queue[0], Point):
                self.finish(stream.queue[0].stream, stream.queue[0].n)
            self._step(stream)
        self._go_on()

    def finish_all(self):
        for stream in self.all:
            self.finish(stream)

    def _go_on(self):
        while any([self._step(stream) for stream in self.all if not self.late(stream)]):
            pass

    def _step(self, stream):
        """Do the next piece of work -> whether there was one that could be done."""
        if not stream.queue or isinstance(stream.queue[0], Point) and not stream.queue[0].reached:
            return False
        work = stream.queue.popleft()
        stream.n_done += 1
        if not isinstance(work, Point):
            work()
        return True
