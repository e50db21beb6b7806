"""Instructions that Numba lacks: with the PTX machine, and in the simulator."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

PTX = """
from tests.ptx.driver import install
install()
"""
WIDE = """
import numpy as np
from numba import cuda
from pydsa.backends.cuda import empty, upload
from pydsa.backends.cuda.intrinsics.instructions import (all_copies, commit_copies, copy_sixteen_async, let_later_begin, load_eight,
                                                         read_sixteen, store_eight, store_sixteen, stream_four, stream_sixteen,
                                                         wait_for_earlier)
from pydsa.backends.cuda.runtime.launch import kernel

@kernel("u1[::1], u1[::1], u1[::1]", 32)
def wide(out, sums, x):
    i, s = cuda.threadIdx.x, cuda.shared.array(512, np.uint8, 16)
    copy_sixteen_async(s, 16 * i, x, 16 * i)
    commit_copies()
    a, b, c, d = stream_sixteen(x, 16 * i)
    e, _, _, _ = read_sixteen(x, 16 * i)
    all_copies()
    cuda.syncthreads()
    total, first = np.int32(0), 31 - i
    for j in range(16):
        total += np.int32(s[np.uint32(16 * first + j)])
    wait_for_earlier()
    let_later_begin()
    f, g = load_eight(x, 8 * i)
    store_sixteen(out, 16 * i, b ^ c, d, stream_four(x, 4 * i), e)
    store_eight(sums, 8 * i, np.uint32(total), f)

x = np.random.default_rng(0).integers(0, 256, (32, 16), np.uint8)
out, sums = empty((32, 16), np.uint8), empty((32, 8), np.uint8)
wide(1, out.flat, sums.flat, upload(x).flat)
words, got = x.view(np.uint32), out.get().view(np.uint32)
assert (got[:, 0] == words[:, 1] ^ words[:, 2]).all() and (got[:, 1] == words[:, 3]).all()
assert (got[:, 2] == words.ravel()[:32]).all() and (got[:, 3] == words[:, 0]).all()
got = sums.get().view(np.uint32)
assert (got[:, 0] == x.sum(1)[::-1]).all() and (got[:, 1] == words.ravel()[:64:2]).all()
"""

MATRICES = """
from pydsa.backends.cuda.intrinsics.shared_memory import load_fragments, load_transposed, shared_address

@kernel("u1[::1], u1[::1]", 32, shared=512)
def matrices(out, x):
    i, s = cuda.threadIdx.x, cuda.shared.array(0, np.uint8)
    copy_sixteen_async(s, 16 * i, x, 16 * i)
    commit_copies()
    all_copies()
    cuda.syncthreads()
    at = shared_address(s, np.uint32(16 * i))
    a, b, c, d = load_fragments(at)
    store_sixteen(out, 32 * i, a, b, c, d)
    a, b, c, d = load_transposed(at)
    store_sixteen(out, 32 * i + 16, a, b, c, d)

x = np.arange(256, dtype=np.uint16)
out = empty((32, 2, 4, 2), np.uint16)
matrices(1, out.view(np.uint8).flat, upload(x.view(np.uint8)))
got, x = out.get(), x.reshape(4, 8, 8)
for lane in range(32):
    row, at = lane // 4, 2 * (lane % 4)
    assert (got[lane, 0] == x[:, row, at:at + 2]).all() and (got[lane, 1] == x[:, at:at + 2, row]).all()
"""
READS = """
from pydsa.backends.cuda import ceilings
words = np.random.default_rng(0).integers(0, 1 << 32, (2, 8, 2 * 512, 4), np.uint32)
out = empty((2 * 512,), np.uint32)
ceilings.read_pieces(2, out, upload(words.view(np.uint8)).flat, 2)
assert (out.get() == np.bitwise_xor.reduce(words, (0, 1, 3))).all()
ceilings.READ_BLOCKS = 1
assert 0 < ceilings._bandwidth(1) < np.inf
"""
DIVISIONS = """
import numpy as np
from numba import cuda
from pydsa.backends.cuda import empty, upload
from pydsa.backends.cuda.intrinsics.division import divide, inverse_root
from pydsa.backends.cuda.runtime.launch import kernel

@kernel("f4[::1], f4[::1], f4[::1], f4[::1]", 256)
def divisions(quotients, roots, a, b):
    i = cuda.grid(1)
    quotients[i], roots[i] = divide(a[i], b[i]), inverse_root(abs(b[i]))

rng = np.random.default_rng(0)
a, b = (rng.standard_normal((2, 4096)) * 2.0 ** rng.integers(-60, 60, (2, 4096))).astype(np.float32)
special = np.array([0, -0.0, 1, -2, 32767, 1e-30, 1.5e-38, 2e38, -3e38, np.inf, -np.inf, np.nan], np.float32)
a[:144], b[:144] = np.repeat(special, 12), np.tile(special, 12)
quotients, roots = empty(a.shape, np.float32), empty(a.shape, np.float32)
with np.errstate(all="ignore"):
    expected, expected_roots = a / b, np.float32(1) / np.sqrt(abs(b))
    divisions(16, quotients, roots, upload(a), upload(b))
same = (abs(expected) >= np.finfo("f4").tiny) | (expected == 0) | np.isnan(expected)
assert same.sum() > 4000 and np.array_equal(quotients.get()[same], expected[same], equal_nan=True)
assert np.array_equal(roots.get(), expected_roots, equal_nan=True)
"""
LACKS = """
import pytest
from pydsa.backends.cuda.intrinsics.instructions import instruction
from pydsa.errors import PydsaError
with pytest.raises(PydsaError, match="cannot execute wgmma.fence"):
    instruction("wgmma.fence.sync.aligned;")()
"""
ROUTES = """
import re
from numba import cuda
from pydsa.backends.cuda.intrinsics.instructions import instruction, wait_for_earlier
from pydsa.backends.cuda.runtime.launch import kernel
registers = instruction("setmaxnreg.inc.sync.aligned.u32 240;", fixed=True)

@kernel("f4[::1]", 128, specific=(9, 0))
def by_lto(out):
    registers()
    out[cuda.threadIdx.x] = 0

@kernel("f4[::1]", 128, specific=(9, 0), lto=False)
def by_ptx(out):
    out[cuda.threadIdx.x] = 0

assert re.search(r"^[.]target sm_90a$", by_ptx.ptx((9, 0)), re.M)
assert by_ptx.cubin((9, 0))[:4] == by_lto.cubin((9, 0))[:4] == b"\\x7fELF"
assert by_ptx.entry(by_ptx.cubin((9, 0)), (9, 0)) == "by_ptx" and re.match("_Z.*by_lto", by_lto.entry(by_lto.cubin((9, 0)), (9, 0)))

@kernel("f4[::1]", 128, dependent=True)
def of_all(out):
    wait_for_earlier()      # which 8.0 does not know
    out[cuda.threadIdx.x] = 0

assert of_all.entry(of_all.cubin((9, 0)), (9, 0)) == "of_all" and re.match("_Z.*of_all", of_all.entry(of_all.cubin((8, 0)), (8, 0)))
"""
SERIALIZED = """
from pydsa.backends import cuda
from pydsa.backends.cuda.runtime.launch import KERNELS
keys, said = KERNELS["flash_keys"], []
assert all(kernel.lto for kernel in KERNELS.values() if kernel.specific)
for keys.lto in (True, False):      # by PTX it would be a division in 64 bits that is a call
    said.append("serialized" in keys.linked((9, 0), (9, 0))[1])
assert said == [False, False], said
"""


def run(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wide_loads_and_copies():
    """Loads, stores and copies of all widths move what they should.

    The kernel that measures bandwidth reads all bytes once.
    """
    run(PTX + WIDE + MATRICES + READS)


def test_division():
    """Quotients and inverse roots are rounded correctly.

    The approximations that they begin with are a unit off. Infinities and zeros are numpy's.
    """
    run(PTX + DIVISIONS)


def test_the_simulator():
    """It does the same, and says what it lacks."""
    run(WIDE + LACKS, NUMBA_ENABLE_CUDASIM="1")


def test_kernels_by_way_of_ptx_and_of_lto():
    """Machine code for sm_90a is made both ways; setmaxnreg needs LTO-IR."""
    run(ROUTES)


def test_products_of_wgmma_do_not_wait_for_each_other():
    """By way of PTX they would, as nvJitLink says in its log."""
    run(SERIALIZED)
