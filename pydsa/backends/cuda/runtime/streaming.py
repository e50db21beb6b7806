"""Weights that are copied to a GPU while it computes.

A Slot is memory of the GPU that holds one tensor of the file at a time. Its bytes lie in mapped, pageable memory, from which a GPU copies
slowly and while the host waits. So a thread copies them to one of two pinned buffers, with the help of others, while the GPU copies the
other one, in a second stream. Two slots in turn keep the bus busy:

    filling = slot.fill(tensor)     # returns at once
    ...                             # launches that use the other slot
    w = filling.ready()             # what the GPU is given from now on sees the weights
    ...                             # launches that use w
    slot.release()                  # the next fill() may overwrite them after these launches
"""
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pydsa.backends import gpus
from pydsa.backends.cuda.rows import PADDING, Weight
from pydsa.backends.cuda.runtime.array import empty
from pydsa.backends.cuda.runtime.current import current, kept_per_gpu
from pydsa.backends.cuda.runtime.transfers import is_pinned
from pydsa.errors import PydsaError
from pydsa.gguf.file import Tensor
from pydsa.machine.cores import physical_cores

CHUNK = 1 << 25         # bytes of a pinned buffer
PIECE = 1 << 20         # bytes that a thread copies at a time, at least; fewer are not worth a thread
MOST_COPIERS = 8        # threads, of which each copies some 5 to 10 GB/s: what a bus of 16 lanes takes
REFUSED = "The system refuses a thread for copies of weights to the GPU ({}): raise the limit of processes (ulimit -u)."
POLL = 0.1              # seconds after which a wait looks whether Ctrl-C was pressed


class Bus(NamedTuple):
    """The measured rates of copies to a GPU, in bytes per second."""
    pinned: float       # from pinned memory
    streamed: float     # of weights in pageable memory, through a Slot


class Slot:
    """Memory of the current GPU for one tensor at a time, of up to n_bytes.

    Raises OutOfMemoryError if the GPU's memory, or that of the pinned buffers, which all slots of a GPU share, is refused.
    """

    def __init__(self, n_bytes):
        self.gpu, self._memory, self._engine = current(), empty((n_bytes + PADDING,), np.uint8), _engine()
        self._free, self._arrived = self.gpu.event(), self.gpu.event()
        self._in_use = False        # whether the GPU has been given launches that may read the memory

    def weight(self, tensor):
        """The Weight that a tensor will be in this slot, the same for each fill."""
        n = tensor.data.nbytes
        assert len(tensor.shape) > 1 and n + PADDING <= self._memory.nbytes, (tensor.name, tensor.shape, n, self._memory.nbytes)
        return Weight(self._memory[:n + PADDING], tensor.type, tensor.shape, tensor.data.shape[-1])

    def fill(self, tensor, experts=None):
        """Begin to copy a tensor, a matrix or several -> a Filling.

        tensor: a gguf.file.Tensor, whose memory must stay as it is until the copy has arrived. experts: which of the matrices along its
        first axis are copied, a sequence of indices; None: all. The others are undefined. The slot must have been released if its last
        tensor was used.
        """
        gpus.check_process()
        assert not self._in_use, "fill() before release()"
        filling = Filling(self, tensor, experts)
        self._engine.add(filling)
        return filling

    def release(self):
        """Let later fills wait for what the GPU has been given so far."""
        self.gpu.mark(self._free)
        self._in_use = False


class Filling:
    """One tensor on its way to a Slot. `weight` is what it will be there."""

    def __init__(self, slot, tensor, experts):
        self._slot, self.weight, self._tensor, self._experts = slot, slot.weight(tensor), tensor, experts
        self._enqueued, self._error = threading.Event(), None

    def ready(self):
        """Let the GPU's later work wait for the copy -> the Weight.

        The host waits until the last bytes have left the mapped memory. Raises the error that the copy met, a PydsaError if it is one of
        the driver.
        """
        while not self._enqueued.wait(POLL):
            pass
        if self._error is not None:
            raise self._error
        self._slot.gpu.follow(self._slot._arrived)
        self._slot._in_use = True
        return self.weight

    def run(self, engine):
        """Copy the tensor: in the engine's thread."""
        slot, data = self._slot, self._tensor.read().data
        address, stream = self.weight.data.span[0], engine.stream
        stream.follow(slot._free)
        for first, last in _ranges(data, self._experts):
            engine.copy(address + first * (data.nbytes // len(data)), data[first:last].reshape(-1))
        stream.clear(address + data.nbytes, PADDING)
        stream.mark(slot._arrived)

    def done(self, error=None):
        """Let ready() go on: the copy is enqueued, or has failed."""
        self._error, self._tensor = error, None
        self._enqueued.set()


def _ranges(data, experts):
    """The matrices (first, last) that are copied, those side by side together.

    Where something lies between them, as where an expert's gate and up are one tensor of the file, each is copied by itself.
    """
    whole = data.flags.c_contiguous
    if experts is None and whole:
        return [(0, len(data))]
    ranges = []
    for i in range(len(data)) if experts is None else sorted(set(map(int, experts))):
        assert 0 <= i < len(data), (i, len(data))
        if whole and ranges and ranges[-1][1] == i:
            ranges[-1][1] += 1
        else:
            ranges.append([i, i + 1])
    return ranges


class Engine:
    """The thread that fills the slots of one GPU.

    It does so in the order of the requests. It has a stream, two pinned buffers, and threads that copy to them.
    """

    def __init__(self):
        self._gpu = current()
        self.stream = self._gpu.copy_stream()
        self._buffers = [(self._gpu.host_empty((CHUNK,), np.uint8), self._gpu.event()) for _ in range(2)]
        self.buffer = self._buffers[0][0]
        self._n = max(1, min(MOST_COPIERS, physical_cores() - 1))
        self._copiers, self._requests, self._turn = ThreadPoolExecutor(self._n, "copies"), queue.SimpleQueue(), 0
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError as error:
            raise PydsaError(REFUSED.format(error)) from error

    def add(self, filling):
        """Let the thread run a Filling."""
        self._requests.put(filling)

    def _work(self):
        at_home = False
        while True:
            filling = self._requests.get()
            try:
                if not at_home:
                    self._gpu.settle_in()
                    at_home = True
                filling.run(self)
            except BaseException as error:      # of any kind: it belongs to the one who waits for the copy
                filling.done(error)
            else:
                filling.done()
            del filling         # or its slot would live until the next one

    def copy(self, address, source):
        """Enqueue the copy of bytes of the host, uint8 [n], to an address."""
        if is_pinned(source):
            self.stream.send(address, source.ctypes.data, source.nbytes)
            return
        for start in range(0, source.size, CHUNK):
            part = source[start:start + CHUNK]
            buffer, left = self._buffers[self._turn]
            self._turn = 1 - self._turn
            self.stream.wait(left)      # until the GPU has copied what it held
            self._gather(buffer[:part.size], part)
            self.stream.send(address + start, buffer.ctypes.data, part.size)
            self.stream.mark(left)

    def _gather(self, target, source):
        """Copy with several threads; numpy lets them run at once."""
        step = max(PIECE, -(-source.size // self._n))
        pieces = [slice(start, start + step) for start in range(0, source.size, step)]
        if len(pieces) == 1:
            np.copyto(target, source)
        else:
            copies = []
            try:
                for piece in pieces:
                    copies.append(self._copiers.submit(np.copyto, target[piece], source[piece]))
            except RuntimeError as error:
                raise PydsaError(REFUSED.format(error)) from error
            finally:
                for copy in copies:
                    copy.result()


@kept_per_gpu()
def _engine():
    return Engine()


def measure_bus(n_bytes=1 << 26):
    """Measure the Bus to the current GPU with copies of n_bytes.

    None in the simulator, which has no bus.
    """
    gpu = current()
    if not gpu.has_bus:
        return None
    slot, tensor = Slot(n_bytes), Tensor("bytes", "I8", (1, n_bytes), np.ones((1, n_bytes), np.uint8))
    seconds = _best_seconds(lambda: _send_all(gpu, slot, n_bytes)), _best_seconds(lambda: _fill_all(gpu, slot, tensor))
    return Bus(*(n_bytes / s for s in seconds))


def _send_all(gpu, slot, n_bytes):
    event, pinned = gpu.event(), slot._engine.buffer        # whatever it holds
    for start in range(0, n_bytes, pinned.nbytes):
        gpu.send(slot._memory.span[0] + start, pinned.ctypes.data, min(pinned.nbytes, n_bytes - start), event)
    gpu.wait(event)


def _fill_all(gpu, slot, tensor):
    slot.fill(tensor).ready()
    slot.release()
    gpu.synchronize()


def _best_seconds(work):
    seconds = []
    for _ in range(4):      # the first one meets fresh memory
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
