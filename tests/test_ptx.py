"""The PTX machine of tests/ptx: what it executes and what it refuses.

The tests run in processes of their own, as the machine replaces the GPU.
"""
import importlib.util
import json
import re

import forked
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

SETUP = """
import numpy as np
from numba import cuda
from tests.ptx.driver import install
from tests.ptx.machine import KernelError
install()
from pydsa.backends.cuda import upload, empty
from pydsa.backends.cuda.intrinsics.device import dp4a, load_four_u32, mma_s8, warp_prefix, warp_sum, warp_sync
from pydsa.backends.cuda.runtime.launch import kernel

def refused(function, grid, *args):
    try:
        function(grid, *args)
    except KernelError as error:
        return str(error)
"""


def run(code):
    return forked.run(SETUP + code)[0]


def test_tiles_are_products_of_matrices():
    """mma.m16n8k32 multiplies matrices.

    Fragments are filled by the formulas of the PTX ISA, with a different number in every place.
    """
    run("""
@kernel("i4[:,:], u4[:,:], u4[:,:], i4[:,:]", 32)
def multiply(out, a, b, c):
    i = cuda.threadIdx.x
    out[i, 0], out[i, 1], out[i, 2], out[i, 3] = mma_s8(a[i, 0], a[i, 1], a[i, 2], a[i, 3], b[i, 0], b[i, 1], c[i, 0], c[i, 1], c[i, 2],
                                                        c[i, 3])

rng = np.random.default_rng(0)
A, B, C = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (32, 8)), rng.integers(-1000, 1000, (16, 8))
a, b, c = np.zeros((32, 16), np.int8), np.zeros((32, 8), np.int8), np.zeros((32, 4), np.int32)
for lane in range(32):
    group, in_group = lane >> 2, lane % 4
    for i in range(16):
        row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
        a[lane, i] = A[row, in_group * 4 + (i & 3) + (16 if i >= 8 else 0)]
    for i in range(8):
        b[lane, i] = B[in_group * 4 + (i & 3) + (16 if i >= 4 else 0), group]
    for i in range(4):
        c[lane, i] = C[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
out = upload(np.zeros((32, 4), np.int32))
multiply(1, out, upload(a.view(np.uint32)), upload(b.view(np.uint32)), upload(c))
for lane in range(32):
    for i in range(4):
        row, column = (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)
        assert out.get()[lane, i] == (A @ B + C)[row, column]
""")


def test_lanes_sum():
    run("""
@kernel("f4[:], i4[:], u4[:], u4[:]", 64)
def sum_lanes(sums, prefixes, x, y):
    i = cuda.threadIdx.x
    sums[i] = warp_sum(np.float32(i))
    prefixes[i] = warp_prefix(dp4a(x[i], y[i], 1), i % 32)

rng = np.random.default_rng(0)
x, y = rng.integers(-128, 128, (2, 64, 4)).astype(np.int8)
sums, prefixes = upload(np.zeros(64, np.float32)), upload(np.zeros(64, np.int32))
sum_lanes(1, sums, prefixes, upload(x.view(np.uint32).ravel()), upload(y.view(np.uint32).ravel()))
assert (sums.get().reshape(2, 32) == np.arange(64).reshape(2, 32).sum(1)[:, None]).all()
dots = (x.astype(int) * y).sum(1) + 1
assert (prefixes.get().reshape(2, 32) == dots.reshape(2, 32).cumsum(1)).all()
""")


BROKEN = {
    "out[i] = x[i + 1]": "accesses global memory",
    "out[i + 1] = 0": "accesses global memory",
    "out[i] = unwritten[i]": "reads global memory at .* never written",
    "out[i] = load_four_u32(words, i)[0]": "which is not aligned",
    "out[0] = i": "writes global memory .* no barrier between",
    "s[i] = i; out[i] = s[63 - i]": "reads shared memory .* that another thread has written",
    "s[i] = i; cuda.syncwarp(); out[i] = s[63 - i]": "reads shared memory .* that another thread has written",
    "s[i] = i; cuda.syncthreads(); out[i] = s[63 - i]; s[i] = 0": "writes shared memory .* that another thread has accessed",
    "out[i] = s[i]": "reads shared memory at .* never written",
    "if i % 2:\n        out[i] = warp_sum(np.float32(i))": "needs all lanes of a warp",
    "if i < 32:\n        cuda.syncthreads()\n    else:\n        cuda.syncthreads()\n        out[i] = 0": "wait at different barriers",
}
SOUND = [
    "out[i] = x[i]",
    "s[i] = i; cuda.syncthreads(); out[i] = s[63 - i]; cuda.syncthreads(); s[i] = 0",
    "s[i] = i; cuda.syncwarp(); out[i] = s[i ^ 1]",
    "s[0] = 5; cuda.syncthreads(); out[i] = s[0]",
]
KERNEL = """
def body_{number}(out, x, unwritten, words):
    i, s = cuda.threadIdx.x, cuda.shared.array(64, np.float32)
    {body}
"""


@pytest.fixture(scope="module")
def messages():
    """Body of a kernel -> the message with which it is refused, or None.

    All run in one process, as most of what one does is to import.
    """
    bodies = [*BROKEN, *SOUND]
    sources = [KERNEL.format(number=i, body=body) for i, body in enumerate(bodies)]
    return dict(zip(bodies, json.loads(run(f"""
import json
met = []
for i, source in enumerate({sources!r}):
    exec(source)
    x = np.arange(64, dtype=np.float32)
    function = kernel("f4[:], f4[:], f4[:], u4[::1]", 64)(globals()[f"body_{{i}}"])
    met.append(refused(function, 1, upload(x), upload(x), empty((64,), np.float32), upload(np.zeros(256, np.uint32))))
print(json.dumps(met))
""")), strict=True))


@pytest.mark.parametrize("body", BROKEN)
def test_what_is_undefined_is_refused(messages, body):
    assert messages[body] and re.search(BROKEN[body], messages[body]), messages[body]


@pytest.mark.parametrize("body", SOUND)
def test_what_is_in_order_is_not(messages, body):
    assert messages[body] is None


def test_blocks_are_not_ordered():
    """A block may read what another wrote only in the next launch."""
    run("""
@kernel("f4[:], f4[:]", 32)
def shift(out, x):
    out[cuda.grid(1)] = x[(cuda.grid(1) + 32) % 64]

x, y = upload(np.arange(64, dtype=np.float32)), upload(np.zeros(64, np.float32))
assert refused(shift, 2, y, x) is None and refused(shift, 2, x, y) is None
assert "another thread" in refused(shift, 2, x, x)
""")


def test_votes_and_pairs_of_halves():
    """vote.sync.any and redux.sync.max are each warp's, and need all lanes.

    cvt.rn.f16x2 rounds as numpy does.
    """
    run("""
from pydsa.backends.cuda.intrinsics.instructions import pack_halves
from pydsa.backends.cuda.intrinsics.shared_memory import any_lane, greatest_integer

@kernel("u4[:], f4[:], i4", 64)
def vote(out, x, first):
    i = cuda.threadIdx.x
    if i >= first:
        out[i] = any_lane(np.uint32(i == 40)) << np.uint32(31) ^ pack_halves(x[i + 1], x[i])

x, out = np.random.default_rng(0).standard_normal(65).astype(np.float32) * 1000, upload(np.zeros(64, np.uint32))
vote(1, out, upload(x), 0)
half, found = x.astype(np.float16).view(np.uint16).astype(np.uint32), out.get()
assert np.array_equal(found, half[:-1] | half[1:] << np.uint32(16) ^ (np.arange(64) >= 32).astype(np.uint32) << np.uint32(31))
assert "needs all lanes of a warp" in refused(vote, 1, out, upload(x), 1)

@kernel("i4[:], i4", 64)
def greatest(out, first):
    i = cuda.threadIdx.x
    if i >= first:
        out[i] = greatest_integer(np.int32(i - 70))

out = upload(np.zeros(64, np.int32))
greatest(1, out, 0)
assert np.array_equal(out.get(), np.where(np.arange(64) < 32, 31 - 70, 63 - 70))
assert "needs all lanes of a warp" in refused(greatest, 1, out, 1)
""")
