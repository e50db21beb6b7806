"""Memory as a GPU's threads see it, with the checks that a GPU does not make: bounds, alignment, first use, and races.

A race is an access to what another thread wrote, or a write to what another thread read or wrote, in the same launch and with no barrier
of their block between them; of a word that several threads write at once, only different values count.
"""
from typing import NamedTuple

import numpy as np

GUARD = 256         # bytes between two allocations, and their alignment


class Fault(Exception):
    """What a kernel did wrong: which of the accessing threads, and what."""


WARP = 32
ATOMIC = -1         # stands for a thread


class Access(NamedTuple):
    """Who accesses memory now, and what came before for certain: what was before the launch, or a barrier of one's own block or warp."""
    threads: np.ndarray     # of the whole grid
    per_block: int          # threads of a block, whole warps
    barriers: np.ndarray    # when the block of each of these threads met its last one
    warp_barriers: np.ndarray
    began: int
    now: int

    def unordered(self, thread, time):
        """Where an earlier access, by another thread, is not known to have come first."""
        late = (time >= self.began) & (thread != self.threads)
        if late.any():
            same_block = (thread == ATOMIC) | (thread // self.per_block == self.threads // self.per_block)
            late &= ~same_block | (time > self.barriers)
            late &= (thread // WARP != self.threads // WARP) | (time > self.warp_barriers)
        return late


def first(where):
    """The first place that is true, or None."""
    return int(where.argmax()) if where.any() else None


class History:
    """Who wrote and read each byte last, and when. Of an access to several bytes the first stands for all."""

    def __init__(self, size):
        self.writer, self.written = np.zeros(size, np.int32), np.zeros(size, np.int64)
        self.reader, self.read = np.zeros(size, np.int32), np.zeros(size, np.int64)
        self.other, self.read_by_other = np.zeros(size, np.int32), np.zeros(size, np.int64)     # one more thread that read it

    def reading(self, at, access):
        """Note a read -> the first access that races, or None."""
        bad = first(access.unordered(self.writer[at], self.written[at]))
        other = at[self.reader[at] != access.threads]
        self.other[other], self.read_by_other[other] = self.reader[other], self.read[other]
        self.reader[at], self.read[at] = access.threads, access.now
        other = self.reader[at] != access.threads           # of several that read it at once one is kept
        self.other[at[other]], self.read_by_other[at[other]] = access.threads[other], access.now
        return bad

    def writing(self, at, access, values):
        """Note a write of values [n, k]; None: of sums, one thread after the other -> the first access that races, or None."""
        late = access.unordered(self.writer[at], self.written[at])
        if values is None:
            late &= self.writer[at] != ATOMIC
        late |= access.unordered(self.reader[at], self.read[at]) | access.unordered(self.other[at], self.read_by_other[at])
        self.writer[at], self.written[at] = ATOMIC if values is None else access.threads, access.now
        if values is not None and (self.writer[at] != access.threads).any():
            order = np.argsort(at, kind="stable")
            late[order[1:]] |= (at[order][1:] == at[order][:-1]) & (values[order][1:] != values[order][:-1]).any(-1)
        return first(late)


class Memory:
    """Bytes [n_windows, size], one window for each block's shared memory or a single one for all; addresses begin at `base`."""

    def __init__(self, name, size, n_windows=1, base=0, data=None):
        self.name, self.size, self.base = name, size, base
        size = -(-size // 16) * 16
        self.data = np.zeros(n_windows * size, np.uint8) if data is None else data
        self.pitch, self.known, self.history = size, np.zeros(self.data.size, bool), History(self.data.size)
        self.allowed = None         # where there is something, if not everywhere

    def _places(self, address, window, n_bytes, n_elements):
        """Where the bytes lie in `data`; Fault if they are not there, or not aligned to all that is accessed."""
        at, size = address.astype(np.int64) - self.base, n_bytes * n_elements
        bad = (at < 0) | (at + size > self.size)
        if self.allowed is not None and not bad.any():
            bad = ~self.allowed[at] | ~self.allowed[at + size - 1]
        self._refuse(first(bad), at, "accesses {}, where there is nothing")
        self._refuse(first(at % size != 0), at, f"accesses {size} bytes of {{}}, which is not aligned to them")
        return at + window * self.pitch

    def load(self, address, window, dtype, n_elements, access):
        """Elements [n, n_elements] at the addresses of n threads."""
        n_bytes = np.dtype(dtype).itemsize
        at = self._places(address, window, n_bytes, n_elements)
        self._refuse(first(~self.known[at]), at, "reads {} that was never written")
        self._refuse(self.history.reading(at, access), at, "reads {} that another thread has written, with no barrier between")
        return self.data.view(dtype)[(at // n_bytes)[:, None] + np.arange(n_elements)]

    def store(self, address, window, values, access):
        """Write values [n, n_elements]."""
        n_bytes, n_elements = values.dtype.itemsize, values.shape[1]
        at = self._places(address, window, n_bytes, n_elements)
        self._refuse(self.history.writing(at, access, values), at, "writes {} that another thread has accessed, with no barrier between")
        self.data.view(values.dtype)[(at // n_bytes)[:, None] + np.arange(n_elements)] = values
        for i in range(n_bytes * n_elements):
            self.known[at + i] = True

    def add(self, address, window, values, access):
        """Add to whole numbers, one thread after the other -> what each found."""
        at = self._places(address, window, values.dtype.itemsize, 1)
        self._refuse(first(~self.known[at]), at, "adds to {} that was never written")
        self._refuse(self.history.writing(at, access, None), at, "adds to {} that another thread has accessed, with no barrier between")
        cells, found = self.data.view(values.dtype), np.empty_like(values)
        for i, (cell, value) in enumerate(zip(at // values.dtype.itemsize, values)):
            found[i] = cells[cell]
            cells[cell] += value
        return found

    def _refuse(self, i, at, what):
        if i is not None:
            raise Fault(i, what.format(f"{self.name} memory at {int(at[i]) % self.pitch:#x}"))


class Arena(Memory):
    """The memory of the device: allocations with gaps between them, at the addresses of the bytes of a numpy array; and its clock."""

    def __init__(self, size):
        data = np.zeros(size + GUARD, np.uint8)
        data = data[-data.ctypes.data % GUARD:][:size]
        super().__init__("global", size, base=data.ctypes.data, data=data)
        self.allowed, self.clock, self._taken = np.zeros(size, bool), 1, [(0, 0)]

    def allocate(self, n_bytes):
        """Where n bytes begin, from now on allowed."""
        size = -(-n_bytes // GUARD) * GUARD
        for i, (_, end) in enumerate(self._taken):
            after = self._taken[i + 1][0] if i + 1 < len(self._taken) else self.size
            if after - end >= size + 2 * GUARD:
                start = end + GUARD
                self._taken.insert(i + 1, (start, start + size))
                self.allowed[start:start + n_bytes], self.known[start:start + n_bytes] = True, False
                return start
        raise MemoryError("CUDA_ERROR_OUT_OF_MEMORY: the arena of tests/ptx is full")

    def give_back(self, start):
        """What was allocated there is no longer allowed."""
        i = next(i for i, (first, _) in enumerate(self._taken) if first == start and i)
        self.allowed[slice(*self._taken.pop(i))] = False
