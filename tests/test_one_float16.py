"""Products of prompts in wgmma with one float16 an activation.

How types are unpacked runs in Numba's simulator, whole products on the emulated driver of a GPU of capability 9.0.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")


def run(code, **others):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | others, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


EIGHTS = """
import numpy as np
from tests.helpers import dequantize, nmse, tensor
from pydsa.backends.cuda.blocks import GROUPED
from pydsa.backends.cuda.eights import EIGHTS
from pydsa.quants import TYPES

FACTOR = 64.        # a power of two, as kernels choose one


def values(pair, n=2):
    return np.array([int(pair) & 0xFFFFFFFF], np.uint32).view(np.float16 if n == 2 else np.uint8).astype(float)


def eights_of(eights, data, at, second, c):
    '''The eights of lane c in a period: [chunk, group, 8], and their bound.'''
    raw, found, most = np.zeros(3 + eights.n_words, np.uint32), [], 0
    for j in range(eights.n_chunks):
        eights.load(raw, 3, data, at, second, j, c)
        if j == 0:
            most = eights.most(raw, 3, at, second, c) if eights.most else 0
            for k, place in enumerate(eights.heads):
                x, y = eights.head(raw, 3 + place, at + (second if k else 0), c)
                most += abs(x) * eights.bounds[0] + abs(y) * eights.bounds[1]
                raw[3 + place] = np.array([x * FACTOR, y * FACTOR], np.float32).astype(np.float16).view(np.uint32)[0]
        *quads, scales, offsets = eights.unpack(raw, 3, at, second, j, c)
        assert eights.offsets or int(offsets) == 0
        whole = np.concatenate([values(quad, 4) for quad in quads]).reshape(2, 8) - eights.bias
        scales = values(scales) * (values(raw[3])[0] if eights.whole else 1)
        found.append((whole * scales[:, None] + values(offsets)[:, None]) / FACTOR)
    return np.array(found), most


assert EIGHTS.keys() == GROUPED.keys()
for kind, eights in EIGHTS.items():
    n = 64 * eights.n_chunks        # rows of an odd number of blocks begin at all distances from multiples of 4 that there are
    rows = tensor(kind, 4, n)
    data, expected = np.append(rows.data.reshape(-1), np.zeros(16, np.uint8)), dequantize(rows.data, kind).reshape(4, -1, 2, 4, 8)
    for row in range(4):
        for c in range(4):
            with np.errstate(over="ignore"):
                found, most = eights_of(eights, data, row * rows.data.shape[1], TYPES[kind].n_bytes, c)
            assert nmse(found.ravel(), expected[row, :, :, c].ravel()) < (3e-7 if eights.offsets else 1e-8), (kind, row, c)
            assert np.abs(found).max() <= 1.001 * most, (kind, row, c)
"""


def test_all_types_are_unpacked():
    """Lanes find the weights of each type, and no weight is above its bound."""
    run(EIGHTS, PYDSA_TEST_DEVICE="cuda", NUMBA_ENABLE_CUDASIM="1")


PRODUCTS = """
import numpy as np
from tests.helpers import kernels, nmse, normal, reference, rng, run, tensor
from tests.ptx import copies
from pydsa.backends.cuda.f16 import gemm
from pydsa.backends.cuda.runtime.launch import KERNELS
from pydsa.gguf.file import Tensor
from pydsa.quants import TYPES

NMSE = 3e-7


def both(op, shape, *args):
    return run(kernels, op, [shape], *args), run(reference, op, [shape], *args)


def check(op, shape, *args):
    found, expected = both(op, shape, *args)
    assert nmse(found.ravel(), expected.ravel()) < NMSE, (op, shape, nmse(found.ravel(), expected.ravel()))


# tails of tokens and of rows; rows of an odd number of blocks; less than a round of chunks
check("linear", (9, 130), tensor("Q4_K", 130, 768), normal(9, 768))
copies.EARLY = True
check("linear", (3, 10), tensor("Q8_0", 10, 288), normal(3, 288))
check("linear", (5, 10), tensor("Q8_0", 10, 32), normal(5, 32))
copies.EARLY = False
check("head_linear", (5, 3, 20), tensor("Q8_0", 3, 20, 96), normal(5, 3, 96))
ids = np.zeros((70, 2), np.int32)       # most use one expert, so that its tile has more than 64 tokens; one is used by nobody
ids[:, 1] = 1 + 2 * rng(3).integers(0, 2, 70)
check("moe_linear", (70, 2, 20), normal(70, 256), ids, tensor("Q4_K", 4, 20, 256))
assert {name for name in KERNELS if name.startswith("f16_") and KERNELS[name]._loaded} == {"f16_64_q4_k", "f16_128_q4_k", "f16_64_q8_0"}

# scales of all sizes, in a row too: each of its blocks is 2^8 times the one before, or rows are, in turns; some are subnormal
blocks = tensor("Q4_K", 12, 1024).data.copy().view(TYPES["Q4_K"].dtype).reshape(12, 4)
powers = np.float16(2.0) ** np.array([-22, -14, -6, 2])
d = np.array([powers, powers[::-1], np.full(4, 1e-6), np.full(4, 100), np.full(4, 60000), [0, 0, 1e-6, 100], np.full(4, -100)] + [
    np.full(4, p) for p in powers] + [np.zeros(4)], np.float64).astype(np.float16)
blocks["d"], blocks["dmin"] = d.view(np.uint16), (d / 2).view(np.uint16)
w = Tensor("w", "Q4_K", (12, 1024), blocks.view(np.uint8).reshape(12, -1))
found, expected = both("linear", (6, 12), w, normal(6, 1024))
assert (nmse(found.T[:11], expected.T[:11]) < 2 * NMSE).all() and (found.T[11] == 0).all(), nmse(found.T, expected.T)

x = normal(3, 256)
x[1, 7], x[2] = np.inf, 0
found, expected = both("linear", (3, 60), tensor("Q4_K", 60, 256), x)
assert np.isnan(found[1]).all() and (found[2] == 0).all() and nmse(found[0], expected[0]) < NMSE
small = normal(2, 256) * np.float32([[1e-30], [1e30]])
found, expected = both("linear", (2, 60), tensor("Q4_K", 60, 256), small)
assert (nmse(found, expected) < NMSE).all()
"""


def test_products():
    """Products are as exact as float16, whatever the weights' scales.

    All kinds of tails are among them.
    """
    run(PRODUCTS, PYDSA_TEST_DEVICE="ptx", PYDSA_TEST_CAPABILITY="9.0", NUMBA_ENABLE_CUDASIM="0")


WIDE = """
import numpy as np
from pydsa.backends.cuda.f16 import gemm
from tests.helpers import kernels, nmse, normal, reference, run, tensor
gemm.launches = lambda *_: [(256, 2, 0)]
args = [(270, 20)], tensor("Q4_K", 20, 512), normal(270, 512)
assert nmse(*(run(backend, "linear", *args).ravel() for backend in (kernels, reference))) < 3e-7
"""


def test_blocks_of_256_tokens():
    """Two tiles of 128 tokens are one block's, and the last block has one."""
    run(WIDE, PYDSA_TEST_DEVICE="ptx", PYDSA_TEST_CAPABILITY="9.0", NUMBA_ENABLE_CUDASIM="0")


def test_launches():
    """Blocks have as many tokens as take the least time on an H100."""
    run("""
from pydsa.backends.cuda.f16.gemm import are_heads, launches
assert launches(18432, 16, 2048, True, True) == [(256, 8, 0)]
assert launches(18432, 1, 17, True, True) == [(64, 1, 2)]
assert launches(1536, 16, 2048, True, True)[0][0] != 64
assert launches(576, 1, 100, True, True) == [(64, 2, 2)]                # few rows: more blocks
assert launches(512, 128 * 16, 2048, True, False) == [(128, 2048, 0)] and launches(512, 128, 50, True, False) == [(64, 128, 1)]
assert launches(2048, 384, 16384, False, False) == [(64, 384, 1), (128, 384, 64)]       # experts
assert launches(2048, 60, 60, False, False) == [(64, 60, 1)]
assert all(are_heads(heads, heads * -(-n // 128), heads * n) for heads in (1, 2, 3, 128) for n in (2, 127, 128, 129, 300))
assert not any(are_heads(experts, -(-pairs // 128) + min(experts, pairs), pairs) for experts in range(1, 300) for pairs in range(2, 600))
""")
