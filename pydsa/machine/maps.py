"""Mapped files, and those of them whose pages were lost.

A page that the file has no more, as someone cut it off, or that the drive does not read, ends a process with SIGBUS. The handler of
backends/cpu/lost_pages.py puts zeros in its place and marks the file here; whoever used what it read looks here.
"""
import threading
import weakref

import numpy as np

from pydsa.errors import LostFileError

MOST = 4096         # files; of more, those that come last are not watched
N_LOST, N_ENTRIES, OLD, ENTRIES = 0, 1, 2, 66       # where the words of TABLE are; OLD: the handler that was there before
START, END, LOST, WORDS = 0, 1, 2, 3                # the words of an entry: addresses, and the number of losses

TABLE = np.zeros(ENTRIES + WORDS * MOST, np.int64)
_entries = TABLE[ENTRIES:].reshape(MOST, WORDS)
_lock = threading.RLock()       # a finalizer can run anywhere


class Map:
    """A mapped file that is watched.

    mapped: the mmap. path: what errors call the file. It is forgotten with the mmap.
    """

    def __init__(self, mapped, path):
        self.path, self._row = path, None
        with _lock:
            free = np.flatnonzero(_entries[:, START] == 0)
            if free.size:
                row = int(free[0])
                start = np.frombuffer(mapped, np.uint8).ctypes.data
                _entries[row, END], _entries[row, LOST], _entries[row, START] = start + len(mapped), 0, start
                TABLE[N_ENTRIES] = max(TABLE[N_ENTRIES], row + 1)
                self._row = row
                weakref.finalize(mapped, _forget, row).atexit = False

    @property
    def lost(self):
        """Whether something of the file could not be read."""
        return self._row is not None and bool(_entries[self._row, LOST])


def _forget(row):
    with _lock:
        _entries[row] = 0


def error_of(maps):
    """A LostFileError if something of these Maps was lost, else None.

    It takes no time as long as nothing was lost in this process.
    """
    lost = next((one for one in maps if one.lost), None) if TABLE[N_LOST] else None
    return None if lost is None else LostFileError(
        f"{lost.path}: a part of the file cannot be read any more: it was cut off or overwritten while in use, or its drive fails. Load it "
        "again; what was computed since then is lost.")


def check(maps):
    """Raise the error_of() these Maps, if there is one."""
    if error := error_of(maps):
        raise error
