"""Blocks of a launch that are executed together, and in which order.

All threads at the same instruction execute it together. The lowest program counter goes first, so that diverged warps reconverge.
Warp-synchronous instructions (shfl.sync, mma.sync) wait for all lanes, wgmma for four warps. A barrier releases a block's threads when all
have arrived. Threads at an mbarrier whose phase goes on are asked again when one ends; if nothing else can be done, a copy arrives.
"""
import collections

import numpy as np

from tests.ptx.copies import ENGINES, Copies
from tests.ptx.memory import WARP, Access, Fault, Memory
from tests.ptx.wgmma import GROUP, Flight

COLUMN = {"x": 0, "y": 1, "z": 2}
# instruction -> threads that execute it together
TOGETHER = {"shfl": WARP, "vote": WARP, "redux": WARP, "mma": WARP, "ldmatrix": WARP, "bar": WARP, "wgmma": GROUP}


class KernelError(Exception):
    """A kernel does something that is undefined on a GPU; what, and where."""


class Launch:
    """A launch of a kernel.

    since: from when on accesses of earlier launches are not ordered before this one, up to griddepcontrol.wait; `began` if it waits for
    them as a whole. hasty: whether some thread lets dependent launches begin before it has waited itself.
    """

    def __init__(self, grid, n_threads, parameters, n_shared, began, since):
        self.grid, self.n_threads, self.parameters, self.n_shared = grid, n_threads, parameters, n_shared
        self.began, self.since, self.hasty = began, since, False


class Batch:
    """Blocks of a launch that are executed together."""

    def __init__(self, kernel, launch, blocks):
        self.kernel, self.launch, self.grid, self.parameters, n_threads = kernel, launch, launch.grid, launch.parameters, launch.n_threads
        self.per_block, self.blocks, self.n = n_threads, blocks, len(blocks) * n_threads
        self.block = np.repeat(np.arange(len(blocks)), n_threads)       # of each thread, in the batch
        self.thread = np.tile(np.arange(n_threads), len(blocks))        # in its block
        self.global_block = blocks[self.block]
        self.global_thread = (self.global_block * n_threads + self.thread).astype(np.int32)
        self.registers, self.arena = {}, kernel.arena
        self.barriers, self.warp_barriers = np.zeros((2, self.n), np.int64)     # time of each thread's last one
        self.early = np.full(self.n, launch.since)      # until it has waited for earlier launches, then when this one began
        self.shared = Memory("shared", kernel.sizes["shared"] + launch.n_shared, len(blocks))
        self.seen = np.zeros((self.n, n_threads + ENGINES), np.int64) if kernel.has_clocks else None
        self.copies, self.flight = Copies(self) if kernel.has_copies else None, Flight(self) if kernel.has_products else None
        if kernel.has_copies:
            self.shared.watch()
        self.waiting = collections.defaultdict(list)        # program counter -> threads
        self.at_barrier, self.parked = [], []       # threads at barriers, and at mbarriers whose phase goes on
        self.gathering = {}         # program counter -> threads that wait for others of their warp or warpgroup
        self.alive = np.bincount(self.block, minlength=len(self.blocks))

    def count(self, on):
        return self.n if on is None else len(on)

    def special(self, name, axis, on):
        """The values of a special register for some threads."""
        if name == "laneid":
            values = self.thread % WARP
        elif name == "dynamic_smem_size":
            values = np.full(self.n, self.launch.n_shared)
        elif name in ("ntid", "nctaid"):
            values = np.full(self.n, ((self.per_block, 1, 1) if name == "ntid" else self.grid)[COLUMN[axis]])
        elif name == "tid":
            values = self.thread if axis == "x" else np.zeros(self.n, np.int64)
        else:
            x, y = self.global_block % self.grid[0], self.global_block // self.grid[0]
            values = (x, y % self.grid[1], y // self.grid[1])[COLUMN[axis]]
        return values if on is None else values[on]

    def memory(self, space):
        if space == "local":
            raise Fault(None, "uses local memory, which tests/ptx has not")
        return self.arena if space == "global" else self.shared

    def window(self, space, on):
        if space == "global":
            return 0
        return self.block if on is None else self.block[on]

    def access(self, on):
        of = slice(None) if on is None else on
        rows = None if self.seen is None else np.arange(self.n)[of]
        return Access(self.global_thread[of], self.per_block, self.barriers[of], self.warp_barriers[of], self.launch.began,
                      self.launch.since, self.early[of], self.arena.clock, self.seen, rows)

    def pass_warp_barrier(self, on):
        self.whole_warps(on)
        self.warp_barriers[slice(None) if on is None else on] = self.arena.clock
        if self.seen is not None:
            self.meet((np.arange(self.n) if on is None else on).reshape(-1, WARP))

    def meet(self, groups):
        """Threads [groups, n] meet: each knows then what one of its group knew, and all that they did."""
        for group in groups:
            known = self.seen[group].max(0)
            known[group % self.per_block] = self.arena.clock
            self.seen[group] = known

    def wait_for_earlier(self, on):
        """griddepcontrol.wait."""
        self.early[slice(None) if on is None else on] = self.launch.began

    def let_later_begin(self, on):
        """griddepcontrol.launch_dependents."""
        self.launch.hasty |= bool((self.early[slice(None) if on is None else on] < self.launch.began).any())

    def whole_warps(self, on):
        """The lanes [warps, 32] of threads. Fault unless they are whole warps."""
        threads = np.arange(self.n) if on is None else on
        if threads.size % WARP or (threads[::WARP] % WARP).any() or (np.diff(threads.reshape(-1, WARP), axis=1) != 1).any():
            raise Fault(None, "needs all lanes of a warp, of which some are elsewhere")
        return np.broadcast_to(np.arange(WARP), (threads.size // WARP, WARP))

    def run(self):
        """Execute until all threads have returned."""
        waiting = self.waiting
        waiting[0].append(np.arange(self.n))
        with np.errstate(all="ignore"):
            while waiting or self.at_barrier or self.parked or self.gathering:
                if not waiting:
                    if not self._pass_barriers() and not (self.copies and self.copies.advance()):
                        self._refuse_to_wait()
                    continue
                at = min(waiting)
                groups = waiting.pop(at)
                threads = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
                while not waiting or at < min(waiting):
                    at, threads = self._execute(at, threads)
                    if threads is None:
                        break
                else:
                    waiting[at].append(threads)
        self._check_end()

    def _check_end(self):
        try:
            self._refuse_unfinished()
        except Fault as fault:
            raise KernelError(f"the kernel {fault.args[1]}") from fault
        if self.launch.since < self.launch.began and not (self.early == self.launch.began).reshape(-1, self.per_block).any(1).all():
            raise KernelError("a block of a dependent launch ends with no griddepcontrol.wait: what follows it is not ordered after what "
                              "came before")

    def _refuse_unfinished(self):
        for work in (self.copies, self.flight):
            if work is not None:
                work.check_end()

    def _execute(self, at, threads):
        """Execute one instruction for the threads at it.

        Returns the next program counter and its threads, or None for these if they have returned or wait.
        """
        instruction, step = self.kernel.program.code[at], self.kernel.steps[at]
        self.arena.clock += 1
        if step is not None and instruction.opcode[0] in TOGETHER:
            threads = self._gathered(at, threads, TOGETHER[instruction.opcode[0]])
            if threads is None:
                return at, None
        taken = threads
        if instruction.predicate:
            flag = self.registers[instruction.predicate.lstrip("!")][threads] != instruction.predicate.startswith("!")
            taken = threads[flag]
        if step is not None:
            parked = self._step(instruction, step, taken) if len(taken) else None
            if parked is not None and len(parked):
                self.parked.append((at, parked))
                threads = np.setdiff1d(threads, parked)
                return at + 1, threads if len(threads) else None
        elif instruction.opcode[0] == "bra":
            target = self.kernel.program.labels[instruction.operands[0]]
            if len(taken) == len(threads):
                return target, threads
            if len(taken):
                self.waiting[target].append(taken)
                threads = threads[~flag]
        elif instruction.opcode[0] == "ret":
            self.alive -= np.bincount(self.block[taken], minlength=len(self.blocks))
            return at + 1, threads[~flag] if len(taken) < len(threads) else None
        elif instruction.opcode[0] == "bar":
            number, *count = instruction.operands
            self.at_barrier.append((at, taken, number, int(count[0]) if count else None))
            return at + 1, threads[~flag] if len(taken) < len(threads) else None
        else:
            raise KernelError(f"line {instruction.line}: calls a function, which tests/ptx cannot")
        return at + 1, threads

    def _step(self, instruction, step, threads):
        """Execute an instruction. A Fault becomes a KernelError.

        Its message names the line, the instruction and the thread.
        """
        try:
            return step(self, None if len(threads) == self.n else threads)
        except Fault as fault:
            i, what = fault.args
            who = "" if i is None else f"thread {self.thread[threads[i]]} of block {self.global_block[threads[i]]} "
            raise KernelError(f"line {instruction.line}, {'.'.join(instruction.opcode)} {', '.join(instruction.operands)}: "
                              f"{who}{what}") from fault

    def _gathered(self, at, threads, size):
        """The threads whose warps, or larger groups, are whole now, or None.

        The others wait.
        """
        if at in self.gathering:
            threads = np.sort(np.concatenate([threads, self.gathering.pop(at)]))
        elif len(threads) == self.n:
            return threads
        whole = np.bincount(threads // size, minlength=-(-self.n // size))[threads // size] == size
        if not whole.all():
            self.gathering[at] = threads[~whole]
        return threads[whole] if whole.any() else None

    def wake(self):
        """Let all that wait at mbarriers look again."""
        for at, threads in self.parked:
            self.waiting[at].append(threads)
        self.parked.clear()

    def _pass_barriers(self):
        """Release threads at barriers where all are -> whether there were any.

        The threads of a block that all must come must be at the same barrier.
        """
        groups, where, passed = collections.defaultdict(list), np.full(len(self.blocks), -1), False
        for at, threads, number, count in self.at_barrier:
            for block in np.unique(self.block[threads]):
                if count is None:
                    if where[block] not in (-1, at):
                        raise KernelError(f"line {self.kernel.program.code[at].line}: threads of a block wait at different barriers")
                    where[block] = at
                groups[block, number, count].append((at, threads[self.block[threads] == block]))
        self.at_barrier.clear()
        for (block, number, count), entries in groups.items():
            threads = np.concatenate([part for _, part in entries])
            if len(threads) == (self.alive[block] if count is None else count):
                passed = True
                self.barriers[threads] = self.arena.clock
                if self.seen is not None:
                    self.meet([threads])
                for at, part in entries:
                    self.waiting[at + 1].append(part)
            else:
                self.at_barrier += [(at, part, number, count) for at, part in entries]
        return passed

    def _refuse_to_wait(self):
        """No thread can go on: a KernelError that tells where one waits."""
        at = min(self.gathering) if self.gathering else (self.at_barrier or self.parked)[0][0]
        what = ("needs all lanes of a warp, or all warps of a warpgroup, of which some are elsewhere" if self.gathering else
                "waits for ever, for threads or copies that do not come")
        instruction = self.kernel.program.code[at]
        raise KernelError(f"line {instruction.line}, {'.'.join(instruction.opcode)} {', '.join(instruction.operands)}: {what}")
