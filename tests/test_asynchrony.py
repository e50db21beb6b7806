"""The PTX machine's model of what goes on while a kernel runs: each wait, fence and barrier that is left out is found.

Copies arrive as late as allowed in one run, as early as allowed in another. The kernels are those of asynchronous_kernels.py, which runs in
a process of its own.
"""
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

UNDER_WAY, NOT_ORDERED = "which a copy under way will write", "reads .* that another thread has written, with no barrier between"
ACCESSED, PRODUCT = "will write .* that another thread has accessed", "writes shared .* which a product under way reads"
# change -> what is said if copies are late, and if they are early (where that differs); None: nothing, and results are right
EXPECTED = {
    "groups": [None],
    "groups: no wait": [UNDER_WAY],
    "groups: wait for one less": [UNDER_WAY],
    "groups: no commit": [UNDER_WAY],
    "groups: no barrier after the wait": [NOT_ORDERED],
    "groups: no barrier after the reads": [ACCESSED],
    "ring": [None],
    "ring: no fence of mbarriers": ["no fence.mbarrier_init"],
    "ring: no barrier after init": ["which another thread has initialized, with no barrier"],
    "ring: no wait for what is read": [UNDER_WAY, NOT_ORDERED],
    "ring: no wait for those who read": [ACCESSED],
    "ring: wait asks once": [UNDER_WAY, None],          # the copy has come when it asks
    "ring: wrong parity": [UNDER_WAY, "waits for ever"],
    "ring: bytes are not expected": [UNDER_WAY, NOT_ORDERED],
    "ring: fewer bytes are expected": ["waits for ever"],
    "ring: readers do not tell": ["of which some are elsewhere"],       # they wait for ever for lane 0, and that for them
    "ring: lanes are not waited for": [ACCESSED],
    "product": [None],
    "product: no fence of shared memory": ["with no fence.proxy.async since"],
    "product: no barrier after the fence": [NOT_ORDERED],
    "product: no fence of registers": ["no wgmma.fence"],
    "product: no commit": [PRODUCT],
    "product: no wait": [PRODUCT],
    "product: one is under way": [PRODUCT],
    "product: registers are read before the wait": ["reads %.*, which a product under way has"],
    "dependent": [None],
    "dependent: no wait": [NOT_ORDERED],
    "dependent: does not wait at all": ["ends with no griddepcontrol.wait"],
    "dependent: writes before the wait": ["writes global memory .* that another thread has accessed"],
    "dependent: as a constant": ["as a constant, but it was written since"],
    "chain": [None],
    "chain: the middle is hasty": ["as a constant, but it was written since"],
    "recorded": [None],
    "recorded: no wait": [NOT_ORDERED],
    "recorded: no wait, an event between": [None],      # which makes it a plain launch
}


@functools.cache
def found():
    done = subprocess.run([sys.executable, "-m", "tests.asynchronous_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_left_out_is_found(name):
    for said, expected in zip(found()[name], EXPECTED[name] * 2):
        assert said is True if expected is None else isinstance(said, str) and re.search(expected, said), said


def test_all_changes_are_expected():
    assert list(found()) == list(EXPECTED)


IMAGES = 16384      # bytes of shared memory: A [64 rows of 128 bytes], then B
PRODUCT = """
.shared .align 1024 .b8 images[{size}];
.visible .entry product(
.param .u64 out,
.param .u64 given
)
{{
.reg .b32 %r<40>;
.reg .f32 %f<40>;
.reg .b64 %rd<9>;
ld.param.u64 %rd1, [out];
ld.param.u64 %rd2, [given];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.u64 %rd2, %rd2, %rd3;
shl.b32 %r2, %r1, 2;
{copies}
fence.proxy.async.shared::cta;
bar.sync 0;
wgmma.fence.sync.aligned;
mov.u64 %rd4, {a};
mov.u64 %rd5, {b};
wgmma.mma_async.sync.aligned.{shape} {{{sums}}}, %rd4, %rd5, 0{tail};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mul.wide.u32 %rd6, %r1, 32;
add.u64 %rd1, %rd1, %rd6;
{stores}
ret;
}}
"""


def swizzled(rows):
    """Rows [n, 128 bytes] as they lie in shared memory: 16-byte piece i of row r is at i ^ (r % 8)."""
    pieces = rows.reshape(len(rows), 8, 16)
    return np.concatenate([pieces[r, np.arange(8) ^ r % 8].ravel() for r in range(len(rows))])


@pytest.mark.parametrize("element, by_columns", [("s8", False), ("f16", False), ("f16", True)])
def test_products_of_shared_memory(element, by_columns):
    """wgmma of both matrices in shared memory, with B by rows and by columns."""
    from tests.ptx.machine import Kernel
    from tests.ptx.memory import Arena
    from tests.ptx.program import parse
    k, sums_of = (32, "s32") if element == "s8" else (16, "f32")
    dtype, name = (np.int8, "%r") if element == "s8" else (np.float16, "%f")
    a, b = (np.random.default_rng(0).integers(-9, 10, (n, k)).astype(dtype) for n in (64, 16))
    image = np.zeros(IMAGES, np.uint8)
    rows = np.zeros((64, 128), np.uint8)
    rows[:, :32] = a.view(np.uint8)
    image[:8192] = swizzled(rows)
    rows = np.zeros((16, 128), np.uint8)
    rows[:, :32] = np.ascontiguousarray(b.T).view(np.uint8) if by_columns else b.view(np.uint8)
    image[8192:8192 + 2048] = swizzled(rows)
    high = 1 << 62 | 64 << 32 | 1 << 16         # swizzle of 128 bytes; eight rows are 1,024 bytes
    registers = [f"{name}{10 + i}" for i in range(8)]
    text = PRODUCT.format(
        size=IMAGES, a=high, b=high | 8192 >> 4, shape=f"m64n16k{k}.{sums_of}.{element}.{element}", sums=", ".join(registers),
        tail="" if element == "s8" else f", 1, 1, 0, {int(by_columns)}",
        copies="\n".join(f"ld.global.u32 %r3, [%rd2+{i}];\nst.shared.u32 [%r2+{i}], %r3;" for i in range(0, IMAGES, 512)),
        stores="\n".join(f"st.global.{sums_of} [%rd1+{4 * i}], {register};" for i, register in enumerate(registers)))
    arena = Arena(1 << 16)
    given, out = arena.allocate(IMAGES), arena.allocate(128 * 32)
    arena.data[given:given + IMAGES], arena.initialized[given:given + IMAGES] = image, True
    Kernel(parse(text), arena).launch((1, 1, 1), 128, (arena.base + out, arena.base + given))
    found = arena.data[out:out + 128 * 32].view("i4" if element == "s8" else "f4").reshape(128, 8)
    expected = a.astype(int) @ b.astype(int).T
    for lane in range(128):
        for i in range(8):
            assert found[lane, i] == expected[16 * (lane // 32) + lane % 32 // 4 + 8 * (i >> 1 & 1), 8 * (i // 4) + 2 * (lane % 4) + i % 2]
