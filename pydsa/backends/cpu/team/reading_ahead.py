"""Read the weights of a prompt's step before its ops need them.

The step of a long prompt uses nearly all weights, in the order of its ops. A thread of its own touches them in that order, some memory
ahead of the ops: the drive reads while the cores compute, and no core waits at each page.
"""
import ctypes
import mmap
import os
import threading

from pydsa.backends.cpu.team.fetching import CAN_ASK, ENOUGH, USERS, parts_of, pieces_of
from pydsa.machine import limits
from pydsa.machine.numa import memory_placed

MOST = 4 << 30          # bytes to be ahead of the ops, at most; and at most a quarter of the memory that is free
POPULATE_READ = 22      # madvise: read pages and map them, as if they were touched; from Linux 5.14 on


class ReadAhead:
    """Reads what the groups of a step need.

    groups: lists of pairs (op, args). Use it as a context; at(i) says that the i-th group is about to run.
    """

    def __init__(self, groups):
        self._groups = groups
        self._group, self._ended, self._most, self._thread = 0, False, 0, None
        self._condition = threading.Condition()

    def __enter__(self):
        self._group, self._ended, self._most = 0, False, min(MOST, limits.available()[0] // 4)
        self._thread = threading.Thread(target=self._read_placed, name="pydsa-read-ahead", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._tell(ended=True)
        self._thread.join()

    def at(self, group):
        """The ops of this group are about to run, and those before it have."""
        self._tell(group=group)

    def _tell(self, group=0, ended=False):
        with self._condition:
            self._group, self._ended = max(self._group, group), ended
            self._condition.notify()

    def _read_placed(self):
        with memory_placed():
            self._read()

    def _read(self):
        library, ahead, waiting = ctypes.CDLL(None), 0, []
        pieces = ((i, *piece) for i, group in enumerate(self._groups)
                  for piece in sorted({piece for op, args in group if not _chooses_few(op, args) for piece in pieces_of(args)}))
        for group, address, n in pieces:
            with self._condition:
                while not self._ended and group > self._group and ahead + n > self._most:
                    self._condition.wait()
                    ahead -= sum(size for at, size in waiting if at < self._group)
                    waiting = [(at, size) for at, size in waiting if at >= self._group]
                if self._ended:
                    return
            if group >= self._group:
                ask(library, address, n)
                waiting.append((group, n))
                ahead += n


def ask(library, address, n):
    """Read n bytes at an address, or have them read."""
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    arguments = ctypes.c_void_p(first), ctypes.c_size_t(address + n - first)
    if library.madvise(*arguments, POPULATE_READ):
        library.madvise(*arguments, mmap.MADV_WILLNEED)


def uses_nearly_all(groups):
    """Whether a step uses nearly all experts, and they can be read ahead.

    Those of the last layer need not be among them: it may end early (schedule.py).
    """
    chosen = [call for group in groups for call in group if call[0].__name__ in USERS]
    return CAN_ASK and os.name == "posix" and not (chosen and all(_chooses_few(*call) for call in chosen))


def _chooses_few(op, args):
    """Whether an op uses only some of its experts, for which it asks itself."""
    return op.__name__ in USERS and any(args[2].size < ENOUGH * n_expert for *_, n_expert in parts_of(args))
