"""The same results at every SIMD level: kernels compiled for other CPUs than this one, in processes of their own."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

LEVELS = {      # name: (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, floats in a register)
    "avx2": ("haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2,+ssse3", 8),
    "plain": ("x86-64", "+sse2", 4),
}

PROGRAM = """
import sys
import numpy as np
import pydsa
from pydsa.backends.cpu import microkernels
from pydsa.quants import SUPPORTED
gguf, npz, lanes = sys.argv[1:]
assert microkernels.LANES == int(lanes), microkernels.LANES
arrays = np.load(npz)
for attention in ("sparse", "masked", "auto"):
    logits = pydsa.load(gguf, attention=attention, kv_type="f32", n_ctx=256).logits(arrays["tokens"]).astype(np.float64)
    print(((logits - arrays["exact"]) ** 2).sum(-1).max() / (arrays["exact"] ** 2).sum(-1).max())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are those of x86")
@pytest.mark.parametrize("level", LEVELS)
def test_golden_logits_at_level(level, golden):
    name, features, lanes = LEVELS[level]
    path, _ = golden("ds32-q4_k_m")
    env = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(path.with_suffix(".npz")), str(lanes)],
                            env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    errors = np.array(result.stdout.split(), float)
    assert errors.size == 3 and errors.max() < 1e-8
