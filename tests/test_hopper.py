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
import re
import numpy as np
from pydsa.quants import TYPES
from tests.helpers import WGMMA, kernels, normal, reference, rng, run, set_scales, tensor
from tests.ptx import copies
from pydsa.backends.cuda.runtime.launch import KERNELS

def error(op, shape, *args):
    found, expected = run(kernels, op, [shape], *args), run(reference, op, [shape], *args)
    return found, ((found - expected) ** 2).sum() / (expected ** 2).sum()

# Tails of tokens, of rows and of columns; numbers of blocks that fill no stage of sums, or one and a part. Types: words in registers;
# a factor for each 32, and offsets of them; a factor for 256, weights that are two float16, sixteen offsets, a grid.
for early, kind, n_tokens, n_out, n in ((False, "Q4_K", 70, 137, 768), (False, "Q5_K", 2, 1, 256), (True, "Q5_K", 17, 30, 2304),
                                        (True, "Q8_0", 65, 30, 224), (False, "Q8_0", 64, 9, 32), (False, "Q4_1", 2, 20, 2144),
                                        (False, "Q6_K", 9, 20, 512), (True, "Q2_K", 3, 20, 1280), (False, "IQ2_XS", 5, 16, 256)):
    copies.EARLY = early
    nmse = error("linear", (n_tokens, n_out), tensor(kind, n_out, n), normal(n_tokens, n))[1]
    assert nmse < 1e-12, (kind, n_tokens, n_out, n, nmse)
ids = np.zeros((70, 2), np.int32)           # all use one expert, others have few tokens, one is used by nobody
ids[:, 1] = 1 + 2 * rng(3).integers(0, 2, 70)
assert error("moe_linear", (70, 2, 20), normal(70, 96), ids, tensor("Q8_0", 4, 20, 96))[1] < 1e-12
small = tensor("Q5_K", 20, 512)             # weights of 1e-5: d and dmin have a bit or two
small = small._replace(data=small.data.copy())
set_scales(small.data.view(TYPES["Q5_K"].dtype).reshape(-1), "Q5_K", np.full(40, 1e-6))
assert error("linear", (5, 20), small, normal(5, 512))[1] < 1e-12
x = normal(3, 256)
x[1, 7], x[2] = np.inf, 0
found, _ = error("linear", (3, 5), tensor("Q5_K", 5, 256), x)
assert np.isnan(found[1]).all() and (found[2] == 0).all() and np.isfinite(found[0]).all()
wgmma = {name for name, kernel in KERNELS.items() if name.startswith("wgmma_") and kernel._loaded}
assert wgmma == set(filter(re.compile(WGMMA).fullmatch, KERNELS)), wgmma
from tools import time_kernels
time_kernels.REPEATS = 1
times = list(time_kernels.product_of_tokens("3*40x256", 12, "Q8_0"))
assert {"f16x2 rows in wgmma", "f16x2", "f16"} <= {line.how for line in times} and not any(line.is_wrong for line in times), times
"""


def test_products():
    """Products with many tokens are as exact as activations of 22 bits."""
    env = os.environ | {"PYDSA_TEST_DEVICE": "ptx", "PYDSA_TEST_CAPABILITY": "9.0", "PYDSA_TEST_PRECISION": "exact",
                        "NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
