"""Kernels with asynchronous instructions, of which some are left out.

Run as a program it prints, as JSON, what the PTX machine says of each: tests/test_asynchrony.py looks at that. A kernel is compiled once;
instructions are left out of its PTX.
"""
import json

import numpy as np
from cuda.bindings.driver import CUevent_record_flags
from numba import cuda

from tests.ptx import copies
from tests.ptx.driver import install

driver = install()
driver.capability = 9, 0

from pydsa.backends.cuda import empty, upload  # noqa: E402
from pydsa.backends.cuda.intrinsics.hopper import (arrive, copy_bulk, expect_bytes, fence_async, fence_mbarriers,  # noqa: E402
                                                   init_mbarrier, make_wgmma, make_wgmma_wait, wait_phase)
from pydsa.backends.cuda.intrinsics.instructions import (commit_copies, copies_left, copy_sixteen_async, let_later_begin,  # noqa: E402
                                                         load_four, store_four, stream_four, wait_for_earlier)
from pydsa.backends.cuda.intrinsics.shared_memory import shared_address  # noqa: E402
from pydsa.backends.cuda.runtime.current import current  # noqa: E402
from pydsa.backends.cuda.runtime.launch import kernel  # noqa: E402
from tests.ptx.machine import Kernel, KernelError  # noqa: E402
from tests.ptx.program import Instruction  # noqa: E402

U = np.uint32
STAGES, BYTES = 2, 512
ALL, BARS, EMPTY = STAGES * BYTES, 2 * STAGES, 8 * STAGES
N, K = 16, 64                   # of the product: columns of B, numbers of each
IMAGE = N * 2 * K               # bytes of B
SUMS, WORDS = N // 2, K // 4   # of a lane: of the product, of A
DESCRIPTOR = np.uint64(1 << 62 | 64 << 32 | 1 << 16)    # swizzle of 128 bytes, groups of eight columns 1,024 bytes apart
one_left = copies_left(1)
more, done = make_wgmma(N, K // 16), make_wgmma_wait(N, K // 4)


@kernel("f4[::1], u1[::1], i4", 64)
def pipeline(out, x, n):
    """Sum n pieces that groups of copies bring, one while the other is read."""
    i, s = cuda.threadIdx.x, cuda.shared.array(ALL, np.uint8, 16)
    total = np.float32(0)
    if i < 32:
        copy_sixteen_async(s, 16 * i, x, 16 * i)
    commit_copies()
    for k in range(n):
        if k + 1 < n and i < 32:
            copy_sixteen_async(s, BYTES * (k + 1 & 1) + 16 * i, x, BYTES * (k + 1) + 16 * i)
        commit_copies()
        one_left()
        cuda.syncthreads()
        for j in range(8):
            total += np.float32(s[U(BYTES * (k & 1) + 8 * (63 - i) + j)])
        cuda.syncthreads()
    out[i] = total


@kernel("f4[::1], u1[::1], i4", 64)
def ring(out, x, n):
    """The same with bulk copies.

    An mbarrier tells that a piece is there, another one that it has been read.
    """
    i, s = cuda.threadIdx.x, cuda.shared.array(ALL, np.uint8, 128)
    bars = cuda.shared.array(BARS, np.uint64, 8)
    if i == 0:
        for k in range(STAGES):
            init_mbarrier(bars, 8 * k, U(1))
            init_mbarrier(bars, EMPTY + 8 * k, U(2))
        fence_mbarriers()
    cuda.syncthreads()
    total = np.float32(0)
    for k in range(-STAGES, n):
        if k >= 0:
            wait_phase(bars, 8 * (k & 1), U(k >> 1 & 1))
            for j in range(8):
                total += np.float32(s[U(BYTES * (k & 1) + 8 * (63 - i) + j)])
            cuda.syncwarp()
            if i & 31 == 0:
                arrive(bars, EMPTY + 8 * (k & 1))
        if i == 0 and k + STAGES < n:
            if k >= 0:
                wait_phase(bars, EMPTY + 8 * (k & 1), U(k >> 1 & 1))
            expect_bytes(bars, 8 * (k & 1), U(BYTES))
            copy_bulk(s, BYTES * (k & 1), x, BYTES * (k + STAGES), U(BYTES), bars, 8 * (k & 1))
    out[i] = total


@kernel("f4[:,::1], u4[:,::1], u4[:,::1]", 128, shared=IMAGE, specific=(9, 0))
def product(out, a, b):
    """The sum of two products of a warpgroup.

    Threads lay B in shared memory, twice in the same place.
    """
    i, image = cuda.threadIdx.x, cuda.shared.array(0, np.uint32, 1024)
    sums, words = cuda.local.array(SUMS, np.float32), cuda.local.array(WORDS, np.uint32)
    for j in range(N // 2):
        sums[j] = np.float32(1)
    for part in range(2):
        for j in range(i, IMAGE // 4, 128):
            image[U(j)] = b[part, j]
        fence_async()
        cuda.syncthreads()
        for j in range(K // 4):
            words[j] = a[part * 128 + i, j]
        more(sums, words, np.uint64(shared_address(image, 0) >> U(4)) | DESCRIPTOR)
        done(sums, words)
        cuda.syncthreads()
    for j in range(N // 2):
        out[i, j] = sums[j]


@kernel("u4[::1], u4[::1]", 64, dependent=True)
def earlier(out, x):
    i = cuda.threadIdx.x
    wait_for_earlier()
    let_later_begin()
    store_four(out, 4 * i, load_four(x, 4 * i) + U(1))


@kernel("u4[::1], u4[::1], u4[::1]", 64, dependent=True)
def later(out, x, weights):
    """Weights, read before the wait, plus what the launch before has written."""
    i = cuda.threadIdx.x
    weight = stream_four(weights, 4 * i)
    wait_for_earlier()
    store_four(out, 4 * i, load_four(x, 4 * (63 - i)) + weight)


@kernel("u4[::1], u4[::1]", 64, dependent=True)
def hasty(out, weights):
    """It lets others begin, and writes, before it has waited."""
    i = cuda.threadIdx.x
    let_later_begin()
    store_four(out, 4 * i, stream_four(weights, 4 * i))
    wait_for_earlier()


def run_pieces(function):
    x = np.random.default_rng(0).integers(0, 256, (5, BYTES), np.uint8)
    out = empty((64,), np.float32)
    function(1, out, upload(x).flat, len(x))
    return (out.get() == x.reshape(5, 64, 8).sum((0, 2), dtype=int)[::-1]).all()


def run_product():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (2, 64, K)).astype(np.float16), rng.integers(-8, 9, (2, N, K)).astype(np.float16)
    words = np.zeros((2, 128, K // 4, 2), np.float16)
    image = np.zeros((2, N, K), np.float16)
    for part in range(2):
        for lane in range(128):         # by the ISA's formulas
            for i in range(4 * K // 16):
                row, k = 16 * (lane // 32) + lane % 32 // 4 + 8 * (i & 1), 16 * (i // 4) + 8 * (i >> 1 & 1) + 2 * (lane % 4)
                words[part, lane, i] = a[part, row, k:k + 2]
        for r in range(N):
            for piece in range(K // 8):
                at = (r * 8 + (piece ^ r % 8)) * 8
                image[part].reshape(-1)[at:at + 8] = b[part, r, 8 * piece:8 * piece + 8]
    out = empty((128, N // 2), np.float32)
    product(1, out, upload(words.view(np.uint32).reshape(256, K // 4)), upload(image.view(np.uint32).reshape(2, -1)))
    want, got = 1 + sum(x.astype(int) @ y.astype(int).T for x, y in zip(a, b)), out.get()
    return all(got[lane, i] == want[16 * (lane // 32) + lane % 32 // 4 + 8 * (i >> 1 & 1), 8 * (i // 4) + 2 * (lane % 4) + i % 2]
               for lane in range(128) for i in range(N // 2))


def run_dependent():
    """x + 2, backwards, plus weights. Launches but the first may begin early."""
    x, w = np.arange(64, dtype=np.uint32), np.arange(64, dtype=np.uint32) * 1000
    y, z, out, first, weights = map(upload, (x, x, x, x, w))
    earlier(1, y, first)
    earlier(1, z, y)
    later(1, out, z, weights)
    return (out.get() == (x + 2)[::-1] + w).all()


def run_chain(middle):
    """later() reads early what the launch before the last has written."""
    x, y, z, other, out = (upload(np.arange(64, dtype=np.uint32)) for _ in range(5))
    earlier(1, y, x)
    middle(1, z, other)
    later(1, out, z, y)
    return (out.get() >= 64).all()


def run_overwriting():
    """A launch writes before its wait what the one before reads."""
    x, y, other = (upload(np.arange(64, dtype=np.uint32)) for _ in range(3))
    earlier(1, y, x)
    hasty(1, x, other)
    return True


def run_recorded(between=lambda: None):
    x, y, out = (upload(np.arange(64, dtype=np.uint32)) for _ in range(3))

    def step():
        earlier(1, y, x)
        between()
        later(1, out, y, x)
    current().replay(current().record(step))
    return (out.get() == 64).all()


class Changed:
    """A context in which instructions of a kernel are changed.

    opcode: how it begins. which: the index of one of those that begin so, or a function that tells; None: all. by: a function of an
    Instruction; None: they are left out.
    """

    def __init__(self, kernel, opcode, which=None, by=None):
        self.kernel, (self.whole, self.parameters) = kernel, kernel._loaded[0]
        code = list(self.whole.program.code)
        found = [i for i, instruction in enumerate(code) if ".".join(instruction.opcode).startswith(opcode)]
        chosen = found if which is None else [i for i in found if which(code[i])] if callable(which) else [found[which]]
        assert chosen, (kernel.__name__, opcode)
        for i in chosen:
            code[i] = by(code[i]) if by else code[i]._replace(opcode=("setmaxnreg",))
        self.changed = Kernel(self.whole.program._replace(code=code), self.whole.arena)

    def __enter__(self):
        self.kernel._loaded[0] = self.changed, self.parameters

    def __exit__(self, *error):
        self.kernel._loaded[0] = self.whole, self.parameters


def passes(instruction):
    """In place of a try_wait: it tells that the phase has ended."""
    return Instruction(("setp", "eq", "u32"), (instruction.operands[0], "0", "0"), instruction.predicate, instruction.line)


def operands(*new):
    return lambda instruction: instruction._replace(operands=tuple(o or old for o, old in zip(new, instruction.operands)))


def arrives(instruction):
    """In place of arrive.expect_tx: no bytes are expected."""
    return instruction._replace(opcode=("mbarrier", "arrive", "shared::cta", "b64"), operands=instruction.operands[:2])


def as_constant(instruction):
    return instruction._replace(opcode=("ld", "global", "nc", "u32"))


PIPELINE, RING = (lambda: run_pieces(pipeline)), (lambda: run_pieces(ring))
# name -> (what is run, what is changed)
CHANGES = {
    "groups": (PIPELINE, None),
    "groups: no wait": (PIPELINE, (pipeline, "cp.async.wait_group")),
    "groups: wait for one less": (PIPELINE, (pipeline, "cp.async.wait_group", None, operands("2"))),
    "groups: no commit": (PIPELINE, (pipeline, "cp.async.commit_group")),
    "groups: no barrier after the wait": (PIPELINE, (pipeline, "bar.sync", 0)),
    "groups: no barrier after the reads": (PIPELINE, (pipeline, "bar.sync", 1)),
    "ring": (RING, None),
    "ring: no fence of mbarriers": (RING, (ring, "fence.mbarrier_init")),
    "ring: no barrier after init": (RING, (ring, "bar.sync")),
    "ring: no wait for what is read": (RING, (ring, "mbarrier.try_wait", 0, passes)),
    "ring: no wait for those who read": (RING, (ring, "mbarrier.try_wait", 1, passes)),
    "ring: wait asks once": (RING, (ring, "bra", lambda i: i.operands[0].startswith("again"))),
    "ring: wrong parity": (RING, (ring, "mbarrier.try_wait", 0, operands("", "", "1"))),
    "ring: bytes are not expected": (RING, (ring, "mbarrier.arrive.expect_tx", None, arrives)),
    "ring: fewer bytes are expected": (RING, (ring, "mbarrier.arrive.expect_tx", None, operands("", "", "496"))),
    "ring: readers do not tell": (RING, (ring, "mbarrier.arrive.shared")),
    "ring: lanes are not waited for": (RING, (ring, "bar.warp.sync")),
    "product": (run_product, None),
    "product: no fence of shared memory": (run_product, (product, "fence.proxy")),
    "product: no barrier after the fence": (run_product, (product, "bar.sync", 0)),
    "product: no fence of registers": (run_product, (product, "wgmma.fence")),
    "product: no commit": (run_product, (product, "wgmma.commit_group")),
    "product: no wait": (run_product, (product, "wgmma.wait_group")),
    "product: one is under way": (run_product, (product, "wgmma.wait_group", None, operands("1"))),
    "product: registers are read before the wait": (run_product, (product, "wgmma.wait_group", 1)),
    "dependent": (run_dependent, None),
    "dependent: no wait": (run_dependent, (later, "griddepcontrol.wait")),
    "dependent: does not wait at all": (lambda: run_chain(earlier), (earlier, "griddepcontrol.wait")),
    "dependent: writes before the wait": (run_overwriting, None),
    "dependent: as a constant": (run_dependent, (later, "ld.global.u32", None, as_constant)),
    "chain": (lambda: run_chain(earlier), None),
    "chain: the middle is hasty": (lambda: run_chain(hasty), None),
    "recorded": (run_recorded, None),
    "recorded: no wait": (run_recorded, (later, "griddepcontrol.wait")),
    "recorded: no wait, an event between": (lambda: run_recorded(timed), (later, "griddepcontrol.wait")),
}


def timed():
    """Record an event of the stream that is captured, as time_each() does."""
    gpu = current()
    gpu._do("cuEventRecordWithFlags", gpu._do("cuEventCreate", 0), gpu._stream, CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)


def said(run, change, early):
    """Whether the results of a run are right, or what the machine says."""
    copies.EARLY = early
    try:
        if change is None:
            return bool(run())
        with Changed(*change):
            return bool(run())
    except KernelError as error:
        return str(error)


def main():
    for function in (pipeline, ring, product, earlier, later, hasty):
        function.load()
    found = {name: [said(*change, early) for early in (False, True)] for name, change in CHANGES.items()}
    counts = driver.counts["cuLaunchKernelEx"]
    current().__dict__["capability"] = 8, 0         # a GPU that cannot do it
    assert run_dependent() and driver.counts["cuLaunchKernelEx"] == counts
    assert "griddepcontrol" in later.ptx((9, 0)) and "griddepcontrol" not in later.ptx((8, 0))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
