"""Steps of asynchronous instructions: what starts, counts and waits.

Like those of machine.py they take a Batch and the threads that execute them (None: all).
"""
import numpy as np

from tests.ptx.memory import WARP
from tests.ptx.wgmma import Product


def nothing(batch, on):
    """The step of what changes nothing here: prefetches, numbers of registers."""


def step_of(kernel, op, operands):
    """The step of an instruction, or None if it is not one of these."""
    name = ".".join(op)
    if name.startswith("cp.async"):
        return _copy(kernel, name, operands)
    if op[0] == "mbarrier":
        return _mbarrier(kernel, name, operands)
    if op[0] == "wgmma":
        return _wgmma(kernel, op, operands)
    if op[0] == "fence":
        return lambda batch, on: batch.copies.fence(on, op[1] == "mbarrier_init") if op[1] in ("mbarrier_init", "proxy") else None
    if name == "griddepcontrol.wait":
        return lambda batch, on: batch.wait_for_earlier(on)
    if name == "griddepcontrol.launch_dependents":
        return lambda batch, on: batch.let_later_begin(on)
    if op[0] == "ldmatrix":
        return _matrices(kernel, op, operands)
    return nothing if op[0] in ("setmaxnreg", "prefetch") else None


def _sources(kernel, operands, kinds):
    return [kernel._source(operand.strip("[]"), kind) for operand, kind in zip(operands, kinds, strict=True)]


def _copy(kernel, name, operands):
    if name == "cp.async.commit_group":
        return lambda batch, on: batch.copies.close(on)
    if name == "cp.async.wait_all":
        return lambda batch, on: batch.copies.wait(None, on)
    if name == "cp.async.wait_group":
        left = int(operands[0])
        return lambda batch, on: batch.copies.wait(left, on)
    if name.startswith("cp.async.mbarrier.arrive.noinc"):
        bar, = _sources(kernel, operands, ["u32"])
        return lambda batch, on: batch.copies.arrive_after_copies(bar(batch, on), on)
    if name.startswith("cp.async.bulk.prefetch"):
        return nothing
    if name == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
        to, source, size, bar = _sources(kernel, operands, ["u32", "u64", "u32", "u32"])
        return lambda batch, on: batch.copies.bulk(to(batch, on), source(batch, on), size(batch, on), bar(batch, on), on)
    if not name.startswith(("cp.async.cg.shared.global", "cp.async.ca.shared.global")):
        raise KeyError(name)
    size = int(operands[2])
    if size not in ((16,) if ".cg." in name else (4, 8, 16)):
        raise KeyError(f"{size} bytes")
    to, source, used = _sources(kernel, (*operands, operands[2])[:2] + (operands[-1],), ["u32", "u64", "u32"])
    return lambda batch, on: batch.copies.start(to(batch, on), source(batch, on), used(batch, on).astype(np.int64), size, on)


def _mbarrier(kernel, name, operands):
    what = ".".join(name.split(".")[1:3])
    if what.startswith("try_wait"):
        target, (bar, parity) = kernel._target(operands[0]), _sources(kernel, operands[1:3], ["u32", "u32"])

        def step(batch, on):
            told, later = batch.copies.try_wait(bar(batch, on), parity(batch, on), on)
            target(batch, on, told)
            return later
        assert ".parity." in name
        return step
    if what.startswith("init"):
        bar, count = _sources(kernel, operands, ["u32", "u32"])
        return lambda batch, on: batch.copies.init(bar(batch, on), count(batch, on), on)
    operands = operands[1:] if operands[0] == "_" else operands
    if what in ("arrive.expect_tx", "expect_tx.relaxed"):
        bar, n = _sources(kernel, operands, ["u32", "u32"])
        if what.startswith("expect"):
            return lambda batch, on: batch.copies.expect(bar(batch, on), n(batch, on), on)
        return lambda batch, on: batch.copies.arrive(bar(batch, on), n(batch, on), on)
    if what.startswith("arrive.shared"):
        bar, = _sources(kernel, operands, ["u32"])
        return lambda batch, on: batch.copies.arrive(bar(batch, on), None, on)
    raise KeyError(name)


def _wgmma(kernel, op, operands):
    if op[1] == "mma_async":
        product = Product(kernel, op, operands)
        return lambda batch, on: batch.flight.multiply(product, on)
    if op[1] == "wait_group":
        left = int(operands[0])
        return lambda batch, on: batch.flight.wait(left, on)
    if op[1] == "fence":
        return lambda batch, on: batch.flight.fence(on)
    if op[1] != "commit_group":
        raise KeyError(op)
    return lambda batch, on: batch.flight.commit(on)


def _matrices(kernel, op, operands):
    """ldmatrix: matrices of 8 x 8 sixteen-bit elements, of which each lane names a row."""
    n, transposed = int(op[4][1]), "trans" in op
    if op[1:4] != ("sync", "aligned", "m8n8") or op[-2:] != ("shared", "b16"):
        raise KeyError(op)
    targets = [kernel._target(name.strip()) for name in operands[0].strip("{}").split(",")]
    address, = _sources(kernel, operands[1:], ["u32"])

    def step(batch, on):
        batch.whole_warps(on)
        used = np.flatnonzero(np.arange(batch.count(on)) % WARP < 8 * n)        # lanes 0 to 7 name the first matrix, and so on
        window = batch.window("shared", on)[used]
        rows = batch.shared.load(address(batch, on)[used], window, np.dtype("u2"), 8, batch.access(on).of(used))
        rows = rows.reshape(-1, n, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, n, WARP)
        for i, target in enumerate(targets):
            target(batch, on, np.ascontiguousarray(words[:, i]).ravel())
    return step
