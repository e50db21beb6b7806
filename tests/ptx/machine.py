"""PTX interpreter: it executes a kernel for many threads at once, in numpy.

It stops where the behaviour of a GPU would be undefined. All threads at the same instruction execute it together. The lowest program
counter goes first, so that diverged warps reconverge. Warp-synchronous instructions (shfl.sync, mma.sync) need all lanes. A barrier
releases a block's threads when all have arrived.
"""
import collections
import re
import struct

import numpy as np

from tests.ptx.instructions import (OPERANDS, PLAIN, WIDE, compare, convert, dot_int8, dot_uint8, dot_uint16, dtype_of, mma_float16,
                                    mma_int8, sub_f16x2)
from tests.ptx.memory import WARP, Access, Fault, Memory

THREADS = 1 << 14       # the most threads that are executed at a time, in whole blocks
# mma.sync modifiers -> its function, the type of its accumulators
TILES = {("aligned", "m16n8k32", "row", "col", "s32", "s8", "s8", "s32"): (mma_int8, "s32"),
         ("aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"): (mma_float16, "f32")}
COLUMN = {"x": 0, "y": 1, "z": 2}


class KernelError(Exception):
    """A kernel does something that is undefined on a GPU; what, and where."""


def _unknown(batch, on):
    raise Fault(None, "is not known to tests/ptx")


class Kernel:
    """A Program compiled to Python functions, one per instruction.

    Each takes a Batch and the threads that execute it (None: all).
    """

    def __init__(self, program, arena):
        self.program, self.arena, self.place_of, self.sizes = program, arena, {}, {"shared": 0, "local": 0}
        for name, v in program.variables.items():
            if v.space in self.sizes:
                start = -(-self.sizes[v.space] // v.align) * v.align
                self.place_of[name], self.sizes[v.space] = start, start + v.size
            else:
                start = arena.allocate(v.size)
                arena.data[start:start + v.size] = np.frombuffer(v.values.ljust(v.size, b"\0"), np.uint8)
                arena.initialized[start:start + v.size] = True
                self.place_of[name] = arena.base + start
        self.steps = [self._step(instruction) for instruction in program.code]

    def launch(self, grid, n_threads, values):
        """Execute the kernel on a grid (x, y, z) of blocks of n_threads.

        values: the parameters in order, values or bits.
        """
        if n_threads % WARP:
            raise KernelError(f"blocks of {n_threads} threads are not whole warps")
        parameters, began = dict(zip(self.program.parameters, values, strict=True)), self.arena.clock
        n_blocks = int(np.prod(grid))
        for first in range(0, n_blocks, max(1, THREADS // n_threads)):
            blocks = np.arange(first, min(n_blocks, first + max(1, THREADS // n_threads)))
            Batch(self, grid, n_threads, blocks, parameters, began).run()

    def _step(self, instruction):
        op, kind = instruction.opcode, instruction.opcode[-1]
        name, operands = ".".join(op[:-1]), instruction.operands
        if op[0] in ("bra", "ret", "call") or op[:2] == ("bar", "sync"):
            return None
        if op[:3] == ("bar", "warp", "sync"):
            return Batch.pass_warp_barrier
        try:
            if op[0] == "mov" and "{" in operands[0] + operands[1]:
                return self._regroup(kind, operands)
            if op[0] == "mov" or op[0] == "cvta":
                return self._plain(lambda x: x.copy(), operands, [kind])
            if op[0] == "cvt":
                return self._plain(convert(op[1:]), operands, [kind])
            if op[0] == "setp":
                return self._plain(compare(op[1]), operands, [kind] * 2)
            if op[:2] == ("ld", "param"):
                return self._plain(lambda x: x, operands, [kind])
            if op[0] in ("ld", "st", "atom"):
                return self._memory(op, operands)
            if op[:3] in (("cp", "async", "cg"), ("cp", "async", "ca")):
                return self._copy(operands)
            if op[0] == "griddepcontrol" or op[:2] == ("cp", "async"):
                return lambda batch, on: None
            if op[0] == "shfl":
                return self._shuffle(op[2], operands)
            if op[0] == "mma":
                return self._tiles(op, operands)
            if op == ("sub", "f16x2"):
                return self._plain(sub_f16x2, operands, ["u32", "u32"])
            if op == ("dp2a", "lo", "u32", "u32"):
                return self._plain(dot_uint16, operands, ["u32"] * 3)
            if op == ("dp4a", "u32", "s32"):
                return self._plain(dot_uint8, operands, ["u32", "u32", "s32"])
            if op[0] == "dp4a":
                return self._plain(dot_int8, operands, ["u32", "u32", "s32"])
            if name in WIDE:
                wide = dtype_of(kind[0] + "64")
                return self._plain(lambda *xs: WIDE[name](*(x.astype(wide) for x in xs)), operands,
                                   [kind, kind, kind[0] + "64"][:len(operands) - 1])
            kinds = OPERANDS.get(name, (None,) * (len(operands) - 1))
            return self._plain(PLAIN[name], operands, [k or kind for k in kinds])
        except (KeyError, ValueError):      # most likely part of a call, which is not executed
            return _unknown

    def _plain(self, function, operands, kinds):
        target, sources = self._target(operands[0]), [self._source(o, k) for o, k in zip(operands[1:], kinds, strict=True)]

        def step(batch, on):
            target(batch, on, function(*(source(batch, on) for source in sources)))
        return step

    def _regroup(self, kind, operands):
        """mov that packs several registers into one, or unpacks one."""
        names = [[name.strip() for name in o.strip("{}").split(",")] for o in operands]
        parts = [f"u{int(kind[1:]) // len(part)}" for part in names]
        targets, sources = [self._target(name) for name in names[0]], [self._source(name, parts[1]) for name in names[1]]

        def step(batch, on):
            values = np.stack([source(batch, on) for source in sources], -1).view(dtype_of(parts[0]))
            for i, target in enumerate(targets):
                target(batch, on, np.ascontiguousarray(values[:, i]))
        return step

    def _memory(self, op, operands):
        space = "global" if op[1] not in ("shared", "local") else op[1]
        elements, kind = next((int(part[1]) for part in op if re.fullmatch(r"v\d", part)), 1), dtype_of(op[-1])
        place = operands[0 if op[0] == "st" else 1]
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", place).groups()
        address, offset = self._source(base, "u64"), np.int64(offset or 0)
        names = [name.strip() for name in operands[1 if op[0] == "st" else 0].strip("{}").split(",")]

        def where(batch, on):
            return address(batch, on).astype(np.int64) + offset
        if op[0] == "ld":
            targets = [self._target(name) for name in names]

            def step(batch, on):
                values = batch.memory(space).load(where(batch, on), batch.window(space, on), kind, elements, batch.access(on))
                for i, target in enumerate(targets):
                    target(batch, on, np.ascontiguousarray(values[:, i]))
        elif op[0] == "st":
            sources = [self._source(name, op[-1]) for name in names]

            def step(batch, on):
                values = np.stack([source(batch, on) for source in sources], -1)
                batch.memory(space).store(where(batch, on), batch.window(space, on), values, batch.access(on))
        else:
            assert op[2] == "add"
            target, source = self._target(operands[0]), self._source(operands[2], op[-1])

            def step(batch, on):
                target(batch, on, batch.memory(space).add(where(batch, on), batch.window(space, on), source(batch, on), batch.access(on)))
        return step

    def _copy(self, operands):
        """cp.async: for now the copy is done at once."""
        to, source = self._source(operands[0].strip("[]"), "u32"), self._source(operands[1].strip("[]"), "u64")
        n, n_from = int(operands[2]), self._source(operands[3] if len(operands) > 3 else operands[2], "u32")

        def step(batch, on):
            access, window = batch.access(on), batch.window("shared", on)
            values, given = np.zeros((batch.count(on), n), np.uint8), n_from(batch, on)
            at, places = source(batch, on).astype(np.int64), to(batch, on).astype(np.int64)
            for i in range(n):
                used = np.flatnonzero(given > i)
                part = access._replace(threads=access.threads[used], barriers=access.barriers[used],
                                       warp_barriers=access.warp_barriers[used])
                values[used, i] = batch.memory("global").load(at[used] + i, 0, "u1", 1, part)[:, 0]
            batch.memory("shared").store(places, window, values, access)
        return step

    def _shuffle(self, how, operands):
        target, _, inside = operands[0].partition("|")
        target, inside = self._target(target), self._target(inside) if inside else None
        source, by = self._source(operands[1], "b32"), self._source(operands[2], "u32")

        def step(batch, on):
            lanes, values = batch.whole_warps(on), source(batch, on).reshape(-1, WARP)
            step_by = by(batch, on).astype(np.int64).reshape(-1, WARP)
            lane = lanes ^ step_by if how == "bfly" else lanes - step_by if how == "up" else lanes + step_by
            valid = (lane >= 0) & (lane < WARP)
            target(batch, on, np.take_along_axis(values, np.where(valid, lane, lanes), 1).ravel())
            if inside is not None:
                inside(batch, on, valid.ravel())
        assert how in ("bfly", "up", "down")
        return step

    def _tiles(self, op, operands):
        multiply, kind = TILES[op[2:]]
        names = [[name.strip() for name in o.strip("{}").split(",")] for o in operands]
        targets = [self._target(name) for name in names[0]]
        sources = [[self._source(name, kind) for name in part] for part, kind in zip(names[1:], ("u32", "u32", kind))]

        def step(batch, on):
            batch.whole_warps(on)
            sums = multiply(*(np.stack([s(batch, on) for s in part], -1).reshape(-1, WARP, len(part)) for part in sources))
            for i, target in enumerate(targets):
                target(batch, on, sums[..., i].ravel())
        return step

    def _target(self, name):
        """A function that writes values to a register of some threads."""
        dtype = self._dtype(name)

        def write(batch, on, values):
            values = values.astype(dtype, copy=False) if (values.dtype.kind == "f") == (dtype.kind == "f") else values.view(dtype)
            if on is None:
                batch.registers[name] = values
            else:
                if name not in batch.registers:
                    batch.registers[name] = np.zeros(batch.n, dtype)
                batch.registers[name][on] = values
        return write

    def _dtype(self, register):
        return np.dtype(self.program.registers[re.match(r"%[a-z]+", register)[0]])

    def _source(self, text, kind):
        """A function that reads an operand's values [n] for some threads."""
        dtype = dtype_of(kind)
        if text.startswith("[") and text[1:-1] in self.program.parameters:
            text = text[1:-1]
            stored = dtype_of(self.program.parameters[text])
            return lambda batch, on: np.full(batch.count(on), np.array(batch.parameters[text], stored).view(dtype))
        found = re.fullmatch(r"%(tid|ntid|ctaid|nctaid|laneid)(?:\.([xyz]))?", text)
        if found:
            return lambda batch, on: batch.special(found[1], found[2], on).astype(dtype)
        if text.startswith("%"):
            def read(batch, on):
                if text not in batch.registers:
                    raise Fault(None, f"reads {text}, which has no value")
                values = batch.registers[text] if on is None else batch.registers[text][on]
                if values.dtype.kind in "fb" or dtype.kind == "f" or values.dtype.itemsize == dtype.itemsize:
                    return values.view(dtype)
                return values.astype(dtype)
            return read
        if text in self.place_of:
            value = np.array(self.place_of[text], np.uint64).astype(dtype)
        elif text[:2] in ("0f", "0d"):
            value = np.frombuffer(bytes.fromhex(text[2:])[::-1], "f4" if text[1] == "f" else "f8")[0]
        elif dtype.kind == "f":
            value = dtype.type(int(text))
        else:
            n = int(text, 0) & (1 << 8 * dtype.itemsize) - 1
            value = np.frombuffer(struct.pack("<Q", n), np.uint64).astype(f"u{dtype.itemsize}").view(dtype)[0]
        return lambda batch, on: np.full(batch.count(on), value)


class Batch:
    """Blocks of a launch that are executed together."""

    def __init__(self, kernel, grid, n_threads, blocks, parameters, began):
        self.kernel, self.grid, self.parameters, self.began = kernel, grid, parameters, began
        self.per_block, self.blocks, self.n = n_threads, blocks, len(blocks) * n_threads
        self.block = np.repeat(np.arange(len(blocks)), n_threads)       # of each thread, in the batch
        self.thread = np.tile(np.arange(n_threads), len(blocks))        # in its block
        self.global_block = blocks[self.block]
        self.global_thread = (self.global_block * n_threads + self.thread).astype(np.int32)
        self.registers, self.arena = {}, kernel.arena
        self.barriers, self.warp_barriers = np.zeros((2, self.n), np.int64)     # time of each thread's last one
        self.shared = Memory("shared", kernel.sizes["shared"], len(blocks))

    def count(self, on):
        return self.n if on is None else len(on)

    def special(self, name, axis, on):
        """The values of a special register for some threads."""
        if name == "laneid":
            values = self.thread % WARP
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
        return Access(self.global_thread[of], self.per_block, self.barriers[of], self.warp_barriers[of], self.began, self.arena.clock)

    def pass_warp_barrier(self, on):
        self.whole_warps(on)
        self.warp_barriers[slice(None) if on is None else on] = self.arena.clock

    def whole_warps(self, on):
        """The lanes [warps, 32] of threads. Fault unless they are whole warps."""
        threads = np.arange(self.n) if on is None else on
        if threads.size % WARP or (threads[::WARP] % WARP).any() or (np.diff(threads.reshape(-1, WARP), axis=1) != 1).any():
            raise Fault(None, "needs all lanes of a warp, of which some are elsewhere")
        return np.broadcast_to(np.arange(WARP), (threads.size // WARP, WARP))

    def run(self):
        """Execute until all threads have returned."""
        waiting = collections.defaultdict(list)         # program counter -> threads
        waiting[0].append(np.arange(self.n))
        at_barrier, alive = [], np.bincount(self.block, minlength=len(self.blocks))
        with np.errstate(all="ignore"):
            while waiting or at_barrier:
                if not waiting:
                    self._pass_barrier(at_barrier, alive, waiting)
                at = min(waiting)
                groups = waiting.pop(at)
                threads = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
                while not waiting or at < min(waiting):
                    at, threads = self._execute(at, threads, waiting, at_barrier, alive)
                    if threads is None:
                        break
                else:
                    waiting[at].append(threads)

    def _execute(self, at, threads, waiting, at_barrier, alive):
        """Execute one instruction for the threads at it.

        Returns the next program counter and its threads, or None for these if they have returned or wait at a barrier.
        """
        instruction, step = self.kernel.program.code[at], self.kernel.steps[at]
        self.arena.clock += 1
        taken = threads
        if instruction.predicate:
            flag = self.registers[instruction.predicate.lstrip("!")][threads] != instruction.predicate.startswith("!")
            taken = threads[flag]
        if step is not None:
            if len(taken):
                self._step(instruction, step, taken)
        elif instruction.opcode[0] == "bra":
            target = self.kernel.program.labels[instruction.operands[0]]
            if len(taken) == len(threads):
                return target, threads
            if len(taken):
                waiting[target].append(taken)
                threads = threads[~flag]
        elif instruction.opcode[0] == "ret":
            alive -= np.bincount(self.block[taken], minlength=len(self.blocks))
            return at, None
        elif instruction.opcode[0] == "bar":
            at_barrier.append((at, taken))
            return at, None
        else:
            raise KernelError(f"line {instruction.line}: calls a function, which tests/ptx cannot")
        return at + 1, threads

    def _step(self, instruction, step, threads):
        """Execute an instruction. A Fault becomes a KernelError.

        Its message names the line, the instruction and the thread.
        """
        try:
            step(self, None if len(threads) == self.n else threads)
        except Fault as fault:
            i, what = fault.args
            who = "" if i is None else f"thread {self.thread[threads[i]]} of block {self.global_block[threads[i]]} "
            raise KernelError(f"line {instruction.line}, {'.'.join(instruction.opcode)} {', '.join(instruction.operands)}: "
                              f"{who}{what}") from fault

    def _pass_barrier(self, at_barrier, alive, waiting):
        """Release the threads at barriers. All that still run are at one.

        The threads of a block must be at the same barrier.
        """
        where = np.full(len(self.blocks), -1)
        for at, threads in at_barrier:
            blocks = np.unique(self.block[threads])
            if ((where[blocks] >= 0) & (where[blocks] != at)).any():
                raise KernelError(f"line {self.kernel.program.code[at].line}: threads of a block wait at different barriers")
            where[blocks] = at
            waiting[at + 1].append(threads)
        arrived = sum(np.bincount(self.block[threads], minlength=len(self.blocks)) for _, threads in at_barrier)
        assert (arrived == alive).all()
        self.barriers[(arrived > 0)[self.block]] = self.arena.clock
        at_barrier.clear()
