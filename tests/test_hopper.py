"""Products in wgmma, on the emulated driver of a GPU of capability 9.0."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

PRODUCTS = """
import numpy as np
from tests.helpers import kernels, normal, reference, rng, run, tensor
from tests.ptx import copies
from pydsa.backends.cuda.f16x2.gemm import GEMM

def error(op, shape, *args):
    found, expected = run(kernels, op, [shape], *args), run(reference, op, [shape], *args)
    return found, ((found - expected) ** 2).sum() / (expected ** 2).sum()

# tails of tokens and of rows; numbers of blocks that fill no stage of sums, or one and a part
for early, kind, n_tokens, n_out, n in ((False, "Q4_K", 130, 137, 768), (False, "Q5_K", 2, 1, 256), (False, "Q5_K", 17, 30, 1280),
                                        (True, "Q4_K", 9, 20, 768)):
    copies.EARLY = early
    nmse = error("linear", (n_tokens, n_out), tensor(kind, n_out, n), normal(n_tokens, n))[1]
    assert nmse < 1e-11, (kind, n_tokens, n_out, n, nmse)
assert all(function._loaded for function in GEMM.values())
ids = np.zeros((40, 2), np.int32)           # most use one expert, one is used by nobody
ids[:, 1] = 1 + 2 * rng(3).integers(0, 2, 40)
assert error("moe_linear", (40, 2, 140), normal(40, 256), ids, tensor("Q4_K", 4, 140, 256))[1] < 1e-11
x = normal(3, 256)
x[1, 7], x[2] = np.inf, 0
found, _ = error("linear", (3, 5), tensor("Q4_K", 5, 256), x)
assert np.isnan(found[1]).all() and (found[2] == 0).all() and np.isfinite(found[0]).all()
from tools import time_products
times = list(time_products.time_shape("3*40x256", 12))
assert {"f16x2 in wgmma", "f16x2", "f16"} <= {row[0] for row in times} and not any(row[4] for row in times), times
"""


def test_products():
    """Products with many tokens are as exact as activations of 22 bits."""
    env = os.environ | {"PYDSA_TEST_DEVICE": "ptx", "PYDSA_TEST_CAPABILITY": "9.0", "PYDSA_TEST_PRECISION": "exact",
                        "NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
