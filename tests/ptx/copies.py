"""Copies to shared memory that go on meanwhile, and mbarriers.

They are ordered as the PTX ISA 9.0 says. A copy may write its bytes at any time between the instruction that starts it and the wait that it
ends with. With EARLY all is written at the start, else as late as possible: at the wait, or, for those that an mbarrier counts, when no
thread can go on without. Meanwhile its bytes must not be touched. What is read after a wait must be ordered by what was waited for. So
clocks are kept: for each thread, up to which time accesses of each other thread, and of the copies that arrive at each mbarrier
("engines"), are before what it does.
"""
import numpy as np

from tests.ptx.memory import ARRIVING, BARRIER, WARP, Fault, engine, first

EARLY = False       # whether copies arrive as early as allowed, or as late
ENGINES = 64        # the most mbarriers of a block
ALL = np.iinfo(np.int64).max


class Mbarrier:
    """An mbarrier: its counts, and the clocks of those who arrived.

    column: of its engine in the clocks.
    """

    def __init__(self, count, column, n_columns, maker, made):
        self.count = self.pending = count
        self.tx, self.phase, self.column, self.maker, self.made, self.fenced = 0, 0, column, maker, made, False
        self.arriving, self.done = np.zeros((2, n_columns), np.int64)      # clocks, of the phase under way and of the last whole one

    def settle(self):
        """End the phase if all is there -> whether it ended."""
        if self.pending or self.tx:
            return False
        self.done, self.arriving = self.arriving, np.zeros_like(self.arriving)
        self.pending, self.phase = self.count, self.phase ^ 1
        return True


class Piece:
    """Copies of one instruction of several threads.

    places [n, size] in shared memory, sources [n, size] in global memory; in a row only the first `used` come from there, others are zeros.
    group: of each thread's groups, the one that it is in.
    """

    def __init__(self, threads, places, sources, used, group):
        self.threads, self.places, self.sources, self.used, self.group = threads, places, sources, used, group
        self.values, self.open = None, np.ones(len(threads), bool)

    def read(self, arena, which=slice(None)):
        """The values of some threads, read from global memory now."""
        inside = np.arange(self.places.shape[1]) < self.used[which, None]
        return np.where(inside, arena.data[np.where(inside, self.sources[which], 0)], 0).astype(np.uint8)


class Copies:
    """All copies and mbarriers of a Batch."""

    def __init__(self, batch):
        self.batch, self.pieces, self.waits, self.barriers = batch, [], [], {}
        self.closed = np.zeros(batch.n, np.int64)       # groups that each thread has closed
        self.polled = np.zeros(batch.n, bool)           # has been told once that its mbarrier's phase goes on

    # cp.async

    def start(self, to, sources, used, size, on):
        """cp.async of several threads: size bytes each, of which `used` are read, to addresses `to`."""
        batch, arena, access = self.batch, self.batch.arena, self.batch.access(on)
        at = batch.shared._places(to, batch.window("shared", on), size, 1)
        self._check_target(at, size, access)
        given = sources.astype(np.int64)
        reads = np.flatnonzero(used > 0)
        places = np.zeros(len(given), np.int64)
        places[reads] = arena._places(given[reads], 0, size, 1)
        self._check_source(places[reads], used[reads], access.of(reads))
        threads = np.arange(batch.n) if on is None else on
        piece = Piece(threads, at[:, None] + np.arange(size), places[:, None] + np.arange(size), used, self.closed[threads])
        if EARLY:
            piece.values = piece.read(arena)
        self.pieces.append(piece)

    def _check_target(self, at, size, access):
        shared = self.batch.shared
        shared.refuse_busy(at, size, True)
        every = (at[:, None] + np.arange(size)).ravel()
        if len(np.unique(every)) < len(every):
            raise Fault(None, "writes the same bytes by two copies")
        bad = shared.history.clear_to_write(every, access.of(np.repeat(np.arange(len(at)), size)))
        shared._refuse(None if bad is None else bad // size, at, "will write {} that another thread has accessed, with no barrier between")
        shared.state[every] = ARRIVING

    def _check_source(self, at, used, access):
        arena, n = self.batch.arena, (used + 3) // 4        # accesses are noted at the first byte of each number
        which = np.repeat(np.arange(len(at)), n)
        places = at[which] + 4 * (np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n))
        bad = first(~arena.initialized[places])
        if bad is not None:
            raise Fault(int(which[bad]), f"copies global memory at {int(places[bad]):#x} that was never written")
        bad = arena.history.reading(places, access.of(which))
        if bad is not None:
            raise Fault(int(which[bad]), f"copies global memory at {int(places[bad]):#x} that another thread has written, with no barrier "
                        "between")

    def close(self, on):
        """cp.async.commit_group."""
        self.closed[slice(None) if on is None else on] += 1

    def wait(self, left, on):
        """cp.async.wait_group: all but the last `left` groups of these threads arrive; None: all copies."""
        limit = np.full(self.batch.n, -1)
        some = slice(None) if on is None else on
        limit[some] = ALL if left is None else self.closed[some] - left
        for piece in self.pieces:
            self._arrive(piece, np.flatnonzero(piece.group < limit[piece.threads]), None)
        self.pieces = [piece for piece in self.pieces if piece.open.any()]

    def _arrive(self, piece, which, column):
        """Some copies of a Piece are there, written by an engine or a thread.

        which: their indices.
        """
        which = which[piece.open[which]]
        if len(which):
            values = piece.read(self.batch.arena, which) if piece.values is None else piece.values[which]
            writer = self.batch.global_thread[piece.threads[which]][:, None] if column is None else engine(column)
            self._write(piece.places[which], values, writer)
            self.batch.shared.by_threads[piece.places[which]] = True
            piece.open[which] = False

    def _write(self, places, values, writer):
        shared = self.batch.shared
        shared.data[places], shared.initialized[places], shared.state[places] = values, True, 0
        shared.history.writer[places], shared.history.written[places] = writer, self.batch.arena.clock

    # mbarriers

    def _each(self, on):
        return range(self.batch.n) if on is None else on

    def init(self, addresses, counts, on):
        """mbarrier.init."""
        batch, shared, access = self.batch, self.batch.shared, self.batch.access(on)
        at = shared._places(addresses, batch.window("shared", on), 8, 1)
        shared.refuse_busy(at, 8, True)
        shared._refuse(shared.history.writing(at, access, np.zeros((len(at), 8), np.uint8)), at,
                       "makes an mbarrier of {} that another thread has accessed, with no barrier between")
        for place, count, thread in zip(at, counts, self._each(on)):
            block = thread // batch.per_block
            column = sum(1 for _, b in self.barriers if b == block)
            if column >= ENGINES:
                raise Fault(None, "is one of more mbarriers than tests/ptx has room for")
            self.barriers[int(place), block] = Mbarrier(int(count), batch.per_block + column, batch.seen.shape[1], thread,
                                                        batch.arena.clock)
            shared.state[place:place + 8] = BARRIER

    def _barrier(self, address, thread, i):
        """The Mbarrier that the i-th of the threads of an instruction names."""
        batch, block = self.batch, thread // self.batch.per_block
        barrier = self.barriers.get((int(address) + block * batch.shared.pitch, block))
        if barrier is None:
            raise Fault(i, f"uses {int(address):#x}, where no mbarrier was initialized")
        if thread != barrier.maker and barrier.made > batch.seen[thread, barrier.maker % batch.per_block]:
            raise Fault(i, f"uses the mbarrier at {int(address):#x}, which another thread has initialized, with no barrier between")
        return barrier

    def arrive(self, addresses, bytes_expected, on):
        """mbarrier.arrive, with expect_tx where bytes are given."""
        batch = self.batch
        for i, (address, thread) in enumerate(zip(addresses, self._each(on))):
            barrier = self._barrier(address, thread, i)
            if bytes_expected is not None:
                barrier.tx += int(bytes_expected[i])
            self._arrive_at(barrier, thread, i)
            batch.seen[thread, thread % batch.per_block] = batch.arena.clock

    def expect(self, addresses, bytes_expected, on):
        """mbarrier.expect_tx, which does not arrive."""
        for i, (address, thread) in enumerate(zip(addresses, self._each(on))):
            self._barrier(address, thread, i).tx += int(bytes_expected[i])

    def _arrive_at(self, barrier, thread, i=None):
        if barrier.pending == 0:
            raise Fault(i, "arrives at an mbarrier once more than its phase expects")
        known = self.batch.seen[thread].copy()
        known[thread % self.batch.per_block] = self.batch.arena.clock
        np.maximum(barrier.arriving, known, out=barrier.arriving)
        barrier.pending -= 1
        self._settle(barrier)

    def _settle(self, barrier):
        if barrier.settle():
            self.batch.wake()

    def try_wait(self, addresses, parities, on):
        """mbarrier.try_wait.parity -> what it tells, threads to ask again later.

        The first time it tells that a phase goes on, as it may, so that a kernel which does not ask again is found.
        """
        told, later = np.zeros(len(addresses), bool), []
        for i, (address, parity, thread) in enumerate(zip(addresses, parities, self._each(on))):
            barrier = self._barrier(address, thread, i)
            told[i] = barrier.phase != (int(parity) & 1)
            if told[i]:
                np.maximum(self.batch.seen[thread], barrier.done, out=self.batch.seen[thread])
            elif self.polled[thread]:
                later.append(thread)
            self.polled[thread] = not told[i]
        return told, np.array(later, np.int64)

    def arrive_after_copies(self, addresses, on):
        """cp.async.mbarrier.arrive.noinc: arrive when the threads' copies up to here are there."""
        for i, (address, thread) in enumerate(zip(addresses, self._each(on))):
            barrier = self._barrier(address, thread, i)
            found = [(piece, np.searchsorted(piece.threads, thread)) for piece in self.pieces]      # threads ascend
            mine = [(piece, i) for piece, i in found if i < len(piece.threads) and piece.threads[i] == thread and piece.open[i]]
            self._later(lambda barrier=barrier, mine=mine: self._copies_arrived(barrier, mine))

    def _copies_arrived(self, barrier, mine):
        for piece, i in mine:
            self._arrive(piece, np.array([i]), barrier.column - self.batch.per_block)
        self.pieces = [piece for piece in self.pieces if piece.open.any()]
        barrier.arriving[barrier.column] = self.batch.arena.clock
        barrier.pending -= 1
        self._settle(barrier)

    # bulk copies

    def bulk(self, to, sources, sizes, bars, on):
        """cp.async.bulk from global to shared memory, which an mbarrier counts."""
        batch = self.batch
        for i, (target, source, size, bar, thread) in enumerate(zip(to, sources, sizes, bars, self._each(on))):
            size, barrier, access = int(size), self._barrier(bar, thread, i), batch.access(np.array([thread]))
            if not barrier.fenced:
                raise Fault(i, "uses an mbarrier for which no fence.mbarrier_init has come since it was initialized")
            if size % 16 or not size:
                raise Fault(i, f"copies {size} bytes, which is no multiple of 16")
            at = batch.shared._places(np.array([target]), batch.window("shared", np.array([thread])), 16, 1)
            batch.shared._places(np.array([int(target) + size - 16]), batch.window("shared", np.array([thread])), 16, 1)
            found = batch.arena._places(np.array([source]), 0, 16, 1)
            batch.arena._places(np.array([int(source) + size - 16]), 0, 16, 1)
            if batch.shared.by_threads[at[0]:at[0] + size].any():
                raise Fault(i, "copies to what threads have written, with no fence.proxy.async since")
            self._check_target(at, size, access)
            batch.shared.by_threads[at[0]:at[0] + size] = False
            words = np.arange(0, size, 4)
            self._check_source(found[0] + words, np.full(len(words), 4), access.of(np.zeros(len(words), int)))
            piece = Piece(np.array([thread]), at[:, None] + np.arange(size), found[:, None] + np.arange(size), np.array([size]), 0)
            self._later(lambda piece=piece, barrier=barrier, size=size: self._bulk_arrived(piece, barrier, size))

    def _bulk_arrived(self, piece, barrier, size):
        self._write(piece.places, piece.read(self.batch.arena), engine(barrier.column - self.batch.per_block))
        barrier.arriving[barrier.column] = self.batch.arena.clock
        barrier.tx -= size
        self._settle(barrier)

    def _later(self, arrive):
        if EARLY:
            arrive()
        else:
            self.waits.append(arrive)

    def advance(self):
        """Let the last copy arrive that mbarriers count -> whether there is one."""
        if not self.waits:
            return False
        self.waits.pop()()
        return True

    def fence(self, on, only_barriers):
        """fence.mbarrier_init and fence.proxy.async: what these threads know of is there for copies and products."""
        batch, shared = self.batch, self.batch.shared
        for thread in self._each(on):
            block = thread // batch.per_block
            for (_, of), barrier in self.barriers.items():
                known = thread == barrier.maker or barrier.made <= batch.seen[thread, barrier.maker % batch.per_block]
                barrier.fenced |= of == block and known
        if only_barriers:
            return
        threads = np.arange(batch.n) if on is None else on
        places = np.flatnonzero(shared.by_threads)
        shared.by_threads[places[np.isin(shared.history.writer[places], batch.global_thread[threads])]] = False
        for thread in np.unique(threads // WARP * WARP):        # what others have written before a barrier
            places = np.flatnonzero(shared.by_threads)
            access = batch.access(np.full(len(places), thread))
            known = ~access.unordered(shared.history.writer[places], shared.history.written[places])
            shared.by_threads[places[known & (places // shared.pitch == batch.block[thread])]] = False

    def check_end(self):
        """Fault if copies are under way when a kernel ends."""
        if self.pieces or self.waits:
            raise Fault(None, "ends while copies to its shared memory are under way")
