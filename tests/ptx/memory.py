"""Emulated GPU memory, with checks that a GPU does not make.

It checks bounds, alignment, initialization and races.
A race is a read of what another thread wrote, or a write to what another thread read or wrote, in the same launch and with no barrier of
their block between them. When several threads write the same location at once, it is a race only if the values differ.
"""
from typing import NamedTuple

import numpy as np

GUARD = 256         # bytes between two allocations, and their alignment


class Fault(Exception):
    """An undefined operation of a kernel: index of the accessing thread, message."""


WARP = 32
ATOMIC = -1         # in place of a thread: several threads, by atomics
ARRIVING, BARRIER = 1, 2        # states of bytes of shared memory: a copy under way will write them, they are of an mbarrier


def engine(i):
    """In place of a thread: the copies that arrive at a block's i-th mbarrier."""
    return -2 - i


class Access(NamedTuple):
    """Who accesses memory, and which earlier accesses are ordered before it.

    Ordered are accesses before the launch, or before the last barrier of the thread's own block or warp, or what an mbarrier has told of.
    """
    threads: np.ndarray     # indices in the whole grid
    per_block: int          # threads of a block, whole warps
    barriers: np.ndarray    # time of the last block barrier of each thread
    warp_barriers: np.ndarray       # and of the last warp barrier
    began: int              # time of the launch
    since: int              # since when this kernel could run, with those launched before
    early: np.ndarray       # the same for each thread, up to griddepcontrol.wait; then time of the launch
    now: int
    seen: np.ndarray = None         # times [threads, threads of a block and engines]: see copies.py
    rows: np.ndarray = None         # places of the threads in it

    def of(self, which):
        """The same for some threads, or for threads several times: indices."""
        return self._replace(threads=self.threads[which], barriers=self.barriers[which], warp_barriers=self.warp_barriers[which],
                             early=self.early[which], rows=None if self.rows is None else self.rows[which])

    def unordered(self, thread, time):
        """Mask of earlier accesses by other threads that no barrier orders."""
        late = (time >= self.began) & (thread != self.threads)
        if late.any():
            same_block = (thread < 0) | (thread // self.per_block == self.threads // self.per_block)
            late &= ~same_block | (time > self._ordered_up_to(thread))
        return late | (time >= self.early) & (time < self.began)

    def _ordered_up_to(self, thread):
        """Until when accesses by other threads of the block are ordered before."""
        if self.seen is None:
            return np.where(thread // WARP == self.threads // WARP, np.maximum(self.warp_barriers, self.barriers), self.barriers)
        column = np.where(thread < ATOMIC, self.per_block - 2 - thread, thread % self.per_block)
        return np.where(thread == ATOMIC, self.barriers, self.seen[self.rows, column])


def first(where):
    """The index of the first true element, or None."""
    return int(where.argmax()) if where.any() else None


class History:
    """Which thread wrote and read each byte last, and when.

    An access to several elements is noted at the first byte of each.
    """

    def __init__(self, size):
        self.writer, self.written = np.zeros(size, np.int32), np.zeros(size, np.int64)
        self.reader, self.read = np.zeros(size, np.int32), np.zeros(size, np.int64)
        self.other, self.read_by_other = np.zeros(size, np.int32), np.zeros(size, np.int64)     # one more thread that read it

    def reading(self, at, access):
        """Record a read. Returns the first access that races, or None."""
        bad = first(access.unordered(self.writer[at], self.written[at]))
        other = at[self.reader[at] != access.threads]
        self.other[other], self.read_by_other[other] = self.reader[other], self.read[other]
        self.reader[at], self.read[at] = access.threads, access.now
        other = self.reader[at] != access.threads           # of several threads that read it at once, one is kept
        self.other[at[other]], self.read_by_other[at[other]] = access.threads[other], access.now
        return bad

    def clear_to_write(self, at, access):
        """The first write that would race with an earlier access, or None."""
        return first(access.unordered(self.writer[at], self.written[at]) | self._still_read(at, access))

    def _still_read(self, at, access):
        return access.unordered(self.reader[at], self.read[at]) | access.unordered(self.other[at], self.read_by_other[at])

    def writing(self, at, access, values):
        """Record a write of values [n, k], or an atomic add if None.

        Returns the first access that races, or None.
        """
        late = access.unordered(self.writer[at], self.written[at])
        if values is None:
            late &= self.writer[at] != ATOMIC
        late |= self._still_read(at, access)
        self.writer[at], self.written[at] = ATOMIC if values is None else access.threads, access.now
        if values is not None and (self.writer[at] != access.threads).any():
            order = np.argsort(at, kind="stable")
            late[order[1:]] |= (at[order][1:] == at[order][:-1]) & (values[order][1:] != values[order][:-1]).any(-1)
        return first(late)


class Memory:
    """Bytes [n_windows, size]; addresses begin at `base`.

    Shared memory has one window per block, global memory a single one.
    """

    def __init__(self, name, size, n_windows=1, base=0, data=None):
        self.name, self.size, self.base = name, size, base
        size = -(-size // 16) * 16
        self.data = np.zeros(n_windows * size, np.uint8) if data is None else data
        self.pitch, self.initialized, self.history = size, np.zeros(self.data.size, bool), History(self.data.size)
        self.allowed = None         # mask of allocated bytes; None: all
        self.state = self.readers = self.by_threads = None      # of each byte, where there are copies: watch()

    def watch(self):
        """Begin to know what copies and products under way do with each byte."""
        self.state = np.zeros(self.data.size, np.int8)          # 0, ARRIVING or BARRIER
        self.readers = np.zeros(self.data.size, np.int16)       # products under way that read it
        self.by_threads = np.zeros(self.data.size, bool)        # written by threads, with no fence.proxy.async since

    def _places(self, address, window, n_bytes, n_elements):
        """Offsets in `data` of accesses. Fault if out of bounds or misaligned.

        An access must be aligned to its whole size, n_bytes * n_elements.
        """
        at, size = address.astype(np.int64) - self.base, n_bytes * n_elements
        bad = (at < 0) | (at + size > self.size)
        if self.allowed is not None and not bad.any():
            bad = ~self.allowed[at] | ~self.allowed[at + size - 1]
        self._refuse(first(bad), at, "accesses {}, where there is nothing")
        self._refuse(first(at % size != 0), at, f"accesses {size} bytes of {{}}, which is not aligned to them")
        return at + window * self.pitch

    def refuse_busy(self, at, n_bytes, writes):
        """Fault if what is under way has to do with n_bytes at offsets in `data`."""
        if self.state is not None:
            every = at[:, None] + np.arange(n_bytes)
            self._refuse(first((self.state[every] == ARRIVING).any(1)), at, "accesses {}, which a copy under way will write")
            self._refuse(first((self.state[every] == BARRIER).any(1)), at, "accesses {}, where an mbarrier is")
            if writes:
                self._refuse(first((self.readers[every] > 0).any(1)), at, "writes {}, which a product under way reads")

    def _note(self, at, n_bytes, access):
        """Note who writes each byte, where copies have to know."""
        if self.state is not None:
            every = at[:, None] + np.arange(n_bytes)
            self.by_threads[every], self.history.writer[every], self.history.written[every] = True, access.threads[:, None], access.now

    def load(self, address, window, dtype, n_elements, access, constant=False):
        """Load elements [n, n_elements] at the addresses of n threads.

        constant: as ld.global.nc does, of what nothing writes while the kernel runs.
        """
        n_bytes = np.dtype(dtype).itemsize
        at = self._places(address, window, n_bytes, n_elements)
        self.refuse_busy(at, n_bytes * n_elements, False)
        if constant:
            self._refuse(first(self.history.written[at] >= access.since), at,
                         "reads {} as a constant, but it was written since the kernel could begin")
        for i in range(n_elements):
            self._refuse(first(~self.initialized[at + i * n_bytes]), at, "reads {} that was never written")
            self._refuse(self.history.reading(at + i * n_bytes, access), at,
                         "reads {} that another thread has written, with no barrier between")
        return self.data.view(dtype)[(at // n_bytes)[:, None] + np.arange(n_elements)]

    def store(self, address, window, values, access):
        """Store values [n, n_elements] at the addresses of n threads."""
        n_bytes, n_elements = values.dtype.itemsize, values.shape[1]
        at = self._places(address, window, n_bytes, n_elements)
        self.refuse_busy(at, n_bytes * n_elements, True)
        for i in range(n_elements):
            self._refuse(self.history.writing(at + i * n_bytes, access, values[:, i:i + 1]), at,
                         "writes {} that another thread has accessed, with no barrier between")
        self._note(at, n_bytes * n_elements, access)
        self.data.view(values.dtype)[(at // n_bytes)[:, None] + np.arange(n_elements)] = values
        for i in range(n_bytes * n_elements):
            self.initialized[at + i] = True

    def add(self, address, window, values, access):
        """Atomic add of integers, one thread after the other. Returns the old values."""
        at = self._places(address, window, values.dtype.itemsize, 1)
        self._refuse(first(~self.initialized[at]), at, "adds to {} that was never written")
        self.refuse_busy(at, values.dtype.itemsize, True)
        if self.state is not None:
            self.by_threads[at[:, None] + np.arange(values.dtype.itemsize)] = True
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
    """Global memory, with gaps between allocations, and the clock.

    Addresses are those of the bytes of a numpy array.
    """

    def __init__(self, size):
        data = np.zeros(size + GUARD, np.uint8)
        data = data[-data.ctypes.data % GUARD:][:size]
        super().__init__("global", size, base=data.ctypes.data, data=data)
        self.allowed, self.clock, self._taken = np.zeros(size, bool), 1, [(0, 0)]
        self.last = 1       # since when work is not ordered before a dependent launch that comes next

    def allocate(self, n_bytes):
        """Allocate n bytes. Returns their offset."""
        size = -(-n_bytes // GUARD) * GUARD
        for i, (_, end) in enumerate(self._taken):
            after = self._taken[i + 1][0] if i + 1 < len(self._taken) else self.size
            if after - end >= size + 2 * GUARD:
                start = end + GUARD
                self._taken.insert(i + 1, (start, start + size))
                self.allowed[start:start + n_bytes], self.initialized[start:start + n_bytes] = True, False
                return start
        raise MemoryError("CUDA_ERROR_OUT_OF_MEMORY: the arena of tests/ptx is full")

    def free(self, start):
        """Free the allocation at an offset."""
        i = next(i for i, (first, _) in enumerate(self._taken) if first == start and i)
        self.allowed[slice(*self._taken.pop(i))] = False
