"""wgmma: products of a warpgroup that go on while its warps run.

They are those of the PTX ISA 9.0. Values are computed when an instruction is issued, which makes no difference: until the wait for its
group neither its registers nor the shared memory that it reads may be touched by others, and that is checked. Registers are virtual, so
moves of one that is under way are names for the same one.
"""
import re

import numpy as np

from tests.ptx.instructions import dtype_of
from tests.ptx.memory import ARRIVING, WARP, Fault

GROUP = 128         # threads of a warpgroup
SWIZZLE_128 = 1     # layout of a descriptor


def places_of(descriptor, n, n_bytes, by_columns):
    """Offsets in shared memory [n, n_bytes] of a descriptor's matrix.

    It has the swizzle of 128 bytes. by_columns: float16 [n, n_bytes / 2] of which n is contiguous.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 62 != SWIZZLE_128 or descriptor >> 49 & 7:
        raise Fault(None, f"has the descriptor {descriptor:#x}, of a layout that tests/ptx has not")
    row = np.arange(n)[:, None]
    if by_columns:
        k = np.arange(n_bytes // 2)[None, :, None]
        row = row[..., None]
        at = (start + row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * 2 + np.arange(2)).reshape(n, n_bytes)
    else:
        at = start + row // 8 * stride + row % 8 * 128 + np.arange(n_bytes)
    return at ^ (at >> 7 & 7) << 4


def fragments(words, width):
    """A [64, 32 / width] of four words [128, 4] of a warpgroup: elements of `width` bytes, as bytes [64, ., width]."""
    n = 4 // width
    parts = np.ascontiguousarray(words).view(np.uint8).reshape(4, 8, 4, 2, 2, n, width)     # warp, g, c, half of k, half of rows, element
    return parts.transpose(0, 4, 1, 3, 2, 5, 6).reshape(64, 8 * n, width)


class Product:
    """One wgmma.mma_async, parsed: its shape, its operands, and how they are read."""

    def __init__(self, kernel, op, operands):
        shape = next(part for part in op if re.fullmatch(r"m64n\d+k\d+", part))
        self.n = int(re.match(r"m64n(\d+)", shape)[1])
        self.kind, self.element = op[-3], op[-1]
        if (self.kind, op[-2], self.element) not in (("f32", "f16", "f16"), ("s32", "s8", "s8")):
            raise KeyError(op)
        self.names = [name.strip() for name in operands[0].strip("{}").split(",")]
        if len(self.names) != self.n // 2:
            raise KeyError(f"{len(self.names)} accumulators of {shape}")
        self.a_names = [name.strip() for name in operands[1].strip("{}").split(",")] if operands[1].startswith("{") else []
        self.a = [kernel._source(name, "u32", True) for name in self.a_names] or kernel._source(operands[1], "u64")
        self.b, self.anew = kernel._source(operands[2], "u64"), operands[3] == "0"
        if operands[3] not in ("0", "1") or operands[4:6] not in ((), ("1", "1")):
            raise KeyError(operands)
        transposed = operands[6:]       # of A, where it is in shared memory, and of B
        self.by_columns = transposed[-1:] == ("1",)
        if not self.a_names and transposed[:1] == ("1",):
            raise KeyError(operands)
        self.targets = [kernel._target(name, True) for name in self.names]
        self.sources = [kernel._source(name, self.kind, True) for name in self.names]

    def numbers(self, raw):
        """Numbers of bytes [..., n]: those of the elements, in float64."""
        return np.ascontiguousarray(raw).view("f2" if self.element == "f16" else "i1").astype("f8")


class Flight:
    """The products of a Batch that are under way."""

    def __init__(self, batch):
        self.batch, self.open = batch, []       # [(threads of a warpgroup, group, places in shared memory, names of registers)]
        self.closed = np.zeros(batch.n, np.int64)
        self.fenced = np.zeros(batch.n, np.int64)       # time of each thread's last wgmma.fence
        self.ids, self.touched, self.next_id = {}, {}, 1      # register -> [threads]: what it is under way as, or 0; when it was written

    def groups(self, on):
        """The threads of an instruction as warpgroups [groups, 128]. Fault unless they are whole ones."""
        threads = np.arange(self.batch.n) if on is None else on
        whole = threads.size % GROUP == 0 and not (threads[::GROUP] % GROUP).any()
        if not whole or (np.diff(threads.reshape(-1, GROUP), axis=1) != 1).any() or self.batch.per_block % GROUP:
            raise Fault(None, "needs all warps of a warpgroup, of which some are elsewhere")
        return threads.reshape(-1, GROUP)

    def fence(self, on):
        """wgmma.fence."""
        self.fenced[self.groups(on)] = self.batch.arena.clock

    def commit(self, on):
        """wgmma.commit_group."""
        self.closed[self.groups(on)] += 1

    def wait(self, left, on):
        """wgmma.wait_group: all but the last `left` groups are done."""
        for threads in self.groups(on):
            limit, kept = self.closed[threads[0]] - left, []
            for product in self.open:
                of, group, places, names = product
                if of[0] != threads[0] or group >= limit:
                    kept.append(product)
                    continue
                for part in places:
                    self.batch.shared.readers[part] -= 1
            self.open = kept
            going = set().union(*(names for of, _, _, names in kept if of[0] == threads[0]))
            still = {int(self.ids[name][threads[0]]) for name in going} - {0}
            for name, ids in self.ids.items():
                if ids[threads[0]] not in still:
                    ids[threads] = 0

    def note_write(self, name, on):
        """An instruction other than a product writes a register: Fault if that is under way."""
        some = slice(None) if on is None else on
        if name not in self.touched:
            self.touched[name] = np.zeros(self.batch.n, np.int64)
        self.touched[name][some] = self.batch.arena.clock
        ids = self.ids.get(name)
        if ids is not None and ids[some].any():
            raise Fault(int(ids[some].argmax()), f"writes {name}, which a product under way has, with no wgmma.wait_group before")

    def check_read(self, name, on):
        """Fault if a register that an instruction reads is under way."""
        ids = self.ids.get(name)
        if ids is not None and ids[slice(None) if on is None else on].any():
            raise Fault(None, f"reads {name}, which a product under way has, with no wgmma.wait_group before")

    def move(self, target, source, on):
        """mov of a register: the target is another name for what the source is under way as."""
        some, ids = slice(None) if on is None else on, self.ids.get(source)
        mine = self.ids.get(target)
        given = np.zeros(self.batch.n, np.int64) if ids is None else ids
        if mine is not None and ((mine[some] != 0) & (given[some] == 0)).any():
            raise Fault(None, f"writes {target}, which a product under way has, with no wgmma.wait_group before")
        if mine is not None or given[some].any():
            self.ids.setdefault(target, np.zeros(self.batch.n, np.int64))[some] = given[some]
        stamp = self.touched.get(source)
        self.touched.setdefault(target, np.zeros(self.batch.n, np.int64))[some] = (
            self.batch.arena.clock if stamp is None or not given[some].any() else stamp[some])

    def multiply(self, product, on):
        """wgmma.mma_async of whole warpgroups."""
        batch, groups = self.batch, self.groups(on)
        sums = np.zeros((batch.count(on), product.n // 2), dtype_of(product.kind))
        if not product.anew:
            sums = np.stack([source(batch, on) for source in product.sources], -1)
        a = np.stack([s(batch, on) for s in product.a], -1) if product.a_names else product.a(batch, on)
        b, results = product.b(batch, on), []
        for i, threads in enumerate(groups):
            rows = slice(GROUP * i, GROUP * (i + 1))
            self._check_registers(product, threads)
            results.append(self._one(product, threads, a[rows], b[rows], sums[rows]))
        values = np.concatenate(results)
        for i, target in enumerate(product.targets):
            target(batch, on, np.ascontiguousarray(values[:, i]))

    def _one(self, product, threads, a, b, sums):
        shared, window = self.batch.shared, self.batch.block[threads[0]] * self.batch.shared.pitch
        if (b != b[0]).any() or not product.a_names and (a != a[0]).any():
            raise Fault(None, "has different descriptors in threads of a warpgroup")
        places = [places_of(int(b[0]), product.n, 32, product.by_columns)]
        if not product.a_names:
            places.append(places_of(int(a[0]), 64, 32, False))
        for part in places:
            if part.max() >= shared.size:
                raise Fault(None, f"reads shared memory at {part.max():#x}, where there is nothing")
            part += window
            self._check_shared(part, threads)
            shared.readers[part] += 1
        self.open.append((threads, self.closed[threads[0]], places, {*product.names, *product.a_names}))
        right = product.numbers(shared.data[places[0]])
        if product.a_names:
            width = 2 if product.element == "f16" else 1
            left = product.numbers(fragments(a, width)).reshape(64, -1)
        else:
            left = product.numbers(shared.data[places[1]])
        made = (left @ right.T).reshape(4, 2, 8, product.n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(GROUP, product.n // 2)
        return (sums.astype("f8") + made).astype(dtype_of(product.kind))

    def _check_registers(self, product, threads):
        """Mark registers as under way. A Fault if they were written since a fence."""
        batch = self.batch
        if not self.fenced[threads].all():
            raise Fault(None, "comes with no wgmma.fence before")
        for name in product.names + product.a_names:
            written = self.touched.get(name)
            if written is not None and (written[threads] > self.fenced[threads]).any():
                raise Fault(None, f"uses {name}, which was written since the last wgmma.fence")
            ids = self.ids.setdefault(name, np.zeros(batch.n, np.int64))
            if not ids[threads[0]]:
                ids[threads], self.next_id = self.next_id, self.next_id + 1

    def _check_shared(self, places, threads):
        """Fault unless what a product reads in shared memory is there for it."""
        shared, places = self.batch.shared, places.ravel()

        def refuse(bad, what):
            if bad.any():
                raise Fault(None, what.format(f"shared memory at {int(places[bad.argmax()]) % shared.pitch:#x}"))
        refuse(shared.state[places] == ARRIVING, "reads {}, which a copy under way will write")
        refuse(~shared.initialized[places], "reads {} that was never written")
        for thread in threads[::WARP]:
            access = self.batch.access(np.full(len(places), thread))
            refuse(access.unordered(shared.history.writer[places], shared.history.written[places]),
                   "reads {} that another thread has written, with no barrier between")
            shared.history.reading(places, access)
        refuse(shared.by_threads[places], "reads {} that threads have written, with no fence.proxy.async since")

    def check_end(self):
        """Fault if products are under way when a kernel ends."""
        if self.open:
            raise Fault(None, "ends while products are under way")
