"""PTX interpreter: it executes a kernel for many threads at once, in numpy.

It stops where the behaviour of a GPU would be undefined. batch.py says in which order threads are executed, asynchronous.py what goes on
meanwhile.
"""
import re
import struct

import numpy as np

from tests.ptx.asynchronous import step_of
from tests.ptx.batch import Batch, KernelError, Launch
from tests.ptx.instructions import (OPERANDS, PACK, PAIRS, PLAIN, WIDE, compare, convert, dot_int8, dot_uint8, dot_uint16, dtype_of,
                                    mma_bfloat16, mma_float16, mma_int8, mma_tf32)
from tests.ptx.memory import WARP, Fault

MOST_SHARED = 48 << 10
THREADS = 1 << 14       # the most threads that are executed at a time, in whole blocks
# mma.sync modifiers -> its function, the type of its accumulators
TILES = {("aligned", "m16n8k32", "row", "col", "s32", "s8", "s8", "s32"): (mma_int8, "s32"),
         ("aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"): (mma_float16, "f32"),
         ("aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"): (mma_bfloat16, "f32"),
         ("aligned", "m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"): (mma_tf32, "f32")}


def _unknown(batch, on):
    raise Fault(None, "is not known to tests/ptx")


class Kernel:
    """A Program compiled to Python functions, one per instruction.

    Each takes a Batch and the threads that execute it (None: all).
    """

    def __init__(self, program, arena):
        self.program, self.arena, self.place_of, self.sizes = program, arena, {}, {"shared": 0, "local": 0}
        used = {instruction.opcode[0] for instruction in program.code}
        self.has_products, self.has_mbarriers = "wgmma" in used, "mbarrier" in used
        self.has_copies = self.has_mbarriers or self.has_products or bool(used & {"cp", "fence"})
        self.has_clocks = self.has_mbarriers or any(i.opcode[:2] == ("bar", "sync") and len(i.operands) > 1 for i in program.code)
        dynamic = {name: v for name, v in program.variables.items() if v.space == "shared" and not v.size}
        for name, v in program.variables.items():
            if name in dynamic:
                continue
            if v.space in self.sizes:
                start = -(-self.sizes[v.space] // v.align) * v.align
                self.place_of[name], self.sizes[v.space] = start, start + v.size
            else:
                start = arena.allocate(v.size)
                arena.data[start:start + v.size] = np.frombuffer(v.values.ljust(v.size, b"\0"), np.uint8)
                arena.initialized[start:start + v.size] = True
                self.place_of[name] = arena.base + start
        self.most_shared = max(MOST_SHARED, self.sizes["shared"])       # bytes of a block, unless the driver is told otherwise
        align = max((v.align for v in dynamic.values()), default=1)
        self.sizes["shared"] = -(-self.sizes["shared"] // align) * align if dynamic else self.sizes["shared"]
        self.place_of.update(dict.fromkeys(dynamic, self.sizes["shared"]))      # all dynamic arrays begin behind the others
        self.steps = [self._step(instruction) for instruction in program.code]

    def launch(self, grid, n_threads, values, n_shared=0, dependent=False):
        """Execute the kernel on a grid (x, y, z) of blocks of n_threads.

        values: the parameters in order, values or bits. n_shared: bytes of dynamic shared memory. dependent: it may have begun before the
        launch before it has ended.
        """
        if n_threads % WARP:
            raise KernelError(f"blocks of {n_threads} threads are not whole warps")
        self.arena.clock += 1       # later than all that an earlier launch did, one that failed too
        launch = Launch(grid, n_threads, dict(zip(self.program.parameters, values, strict=True)), n_shared, self.arena.clock,
                        self.arena.last if dependent else self.arena.clock)
        n_blocks = int(np.prod(grid))
        for first in range(0, n_blocks, max(1, THREADS // n_threads)):
            Batch(self, launch, np.arange(first, min(n_blocks, first + max(1, THREADS // n_threads)))).run()
        self.arena.last = launch.since if launch.hasty else launch.began

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
            found = step_of(self, op, operands)
            if found is not None:
                return found
            if op[0] == "mov" and self.has_products and operands[1].startswith("%"):
                return self._move(kind, operands)
            if op[0] == "mov" or op[0] == "cvta":
                return self._plain(lambda x: x.copy(), operands, [kind])
            if op[:2] == ("cvt", "rn") and op[3:] == ("f32",) and op[2] in PACK:
                return self._plain(PACK[op[2]], operands, ["f32", "f32"])
            if op[0] == "cvt":
                return self._plain(convert(op[1:]), operands, [kind])
            if op[0] == "setp":
                return self._plain(compare(op[1]), operands, [kind] * 2)
            if op[:2] == ("ld", "param"):
                return self._plain(lambda x: x, operands, [kind])
            if op[0] in ("ld", "st", "atom", "red"):
                return self._memory(op, operands)
            if op[0] == "shfl":
                return self._shuffle(op[2], operands)
            if op in (("vote", "sync", "any", "pred"), ("redux", "sync", "max", "s32")):
                return self._of_warps(op, operands)
            if op[0] == "mma":
                return self._tiles(op, operands)
            if kind == "f16x2":
                return self._plain(PAIRS[name], operands, ["u32"] * (len(operands) - 1))
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

    def _move(self, kind, operands):
        """mov in a kernel with products: a register that one has under way gets another name."""
        target, source = self._target(operands[0], True), self._source(operands[1], kind, True)

        def step(batch, on):
            batch.flight.move(*operands, on)
            target(batch, on, source(batch, on).copy())
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
        place = operands[0 if op[0] in ("st", "red") else 1]
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", place).groups()
        address, offset = self._source(base, "u64"), np.int64(offset or 0)
        names = [name.strip() for name in operands[1 if op[0] == "st" else 0].strip("{}").split(",")]

        def where(batch, on):
            return address(batch, on).astype(np.int64) + offset
        if op[0] == "ld":
            targets = [self._target(name) for name in names]

            constant = op[1:3] == ("global", "nc")

            def step(batch, on):
                values = batch.memory(space).load(where(batch, on), batch.window(space, on), kind, elements, batch.access(on), constant)
                for i, target in enumerate(targets):
                    target(batch, on, np.ascontiguousarray(values[:, i]))
        elif op[0] == "st":
            sources = [self._source(name, op[-1]) for name in names]

            def step(batch, on):
                values = np.stack([source(batch, on) for source in sources], -1)
                batch.memory(space).store(where(batch, on), batch.window(space, on), values, batch.access(on))
        else:
            assert op[2] == "add"       # red is an atom whose result nobody wants
            target = self._target(operands[0]) if op[0] == "atom" else lambda batch, on, before: None
            source = self._source(operands[-1], op[-1])

            def step(batch, on):
                target(batch, on, batch.memory(space).add(where(batch, on), batch.window(space, on), source(batch, on), batch.access(on)))
        return step

    def _shuffle(self, how, operands):
        target, _, inside = operands[0].partition("|")
        target, inside = self._target(target), self._target(inside) if inside else None
        source, by = self._source(operands[1], "b32"), self._source(operands[2], "u32")

        def step(batch, on):
            lanes, values = batch.whole_warps(on), source(batch, on).reshape(-1, WARP)
            step_by = by(batch, on).astype(np.int64).reshape(-1, WARP)
            lane = {"bfly": lanes ^ step_by, "up": lanes - step_by, "down": lanes + step_by, "idx": step_by & WARP - 1}[how]
            valid = (lane >= 0) & (lane < WARP)
            target(batch, on, np.take_along_axis(values, np.where(valid, lane, lanes), 1).ravel())
            if inside is not None:
                inside(batch, on, valid.ravel())
        assert how in ("bfly", "up", "down", "idx")
        return step

    def _of_warps(self, op, operands):
        """vote.sync.any and redux.sync.max of whole warps."""
        target, source, combine = self._target(operands[0]), self._source(operands[1], op[3]), {"any": np.any, "max": np.max}[op[2]]

        def step(batch, on):
            batch.whole_warps(on)
            target(batch, on, np.repeat(combine(source(batch, on).reshape(-1, WARP), 1), WARP))
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

    def _target(self, name, of_product=False):
        """A function that writes values to a register of some threads.

        of_product: for an instruction that may have registers which are under way.
        """
        dtype, checked = self._dtype(name), self.has_products and not of_product

        def write(batch, on, values):
            if checked:
                batch.flight.note_write(name, on)
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

    def _source(self, text, kind, of_product=False):
        """A function that reads an operand's values [n] for some threads.

        of_product: for an instruction that may have registers which are under way.
        """
        dtype, checked = dtype_of(kind), self.has_products and not of_product
        if text.startswith("[") and text[1:-1] in self.program.parameters:
            text = text[1:-1]
            stored = dtype_of(self.program.parameters[text])
            return lambda batch, on: np.full(batch.count(on), np.array(batch.parameters[text], stored).view(dtype))
        found = re.fullmatch(r"%(tid|ntid|ctaid|nctaid|laneid|dynamic_smem_size)(?:\.([xyz]))?", text)
        if found:
            return lambda batch, on: batch.special(found[1], found[2], on).astype(dtype)
        if text.startswith("%"):
            def read(batch, on):
                if checked:
                    batch.flight.check_read(text, on)
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
