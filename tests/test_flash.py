"""Flash attention of prompts on emulated GPUs: in wgmma on one of 9.0, in mma.sync on one of 8.0."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

BEGIN = """
import numpy as np
from types import SimpleNamespace
from tests.helpers import Rows, kernels, last_positions, normal, reference, run, tensor
from tests.ptx import copies
from pydsa.backends import cuda, devices
from pydsa.backends.cuda import variants
from pydsa.backends.cuda.runtime import array
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import KERNELS
from pydsa.options import EXACT

V3, GLM, GOLDEN = (512, 128, 64, 128), (512, 192, 64, 256), (256, 64, 32, 64)

def inputs(n_tokens, n_kv, n_head, widths, kv_type, k_type, v_type):
    kv_lora, n_nope, n_rot, n_v = widths
    k_b, v_b = tensor(k_type, n_head, kv_lora, n_nope), tensor(v_type, n_head, n_v, kv_lora)
    scale = (reference.weight(k_b).std() ** 2 * kv_lora * n_nope + n_rot) ** -0.5
    return (normal(n_tokens, n_head, n_nope + n_rot), Rows(normal(n_kv, kv_lora + n_rot), kv_type, kv_lora), k_b, v_b,
            last_positions(n_tokens, n_kv), float(scale))

def nmse(found, expected):
    return ((found - expected) ** 2).sum() / (expected ** 2).sum()
"""

# More tokens than a block has, more keys than are in memory at a time, and ragged ends of both; images that two blocks make, tiles of fewer
# keys, a type of weights without kernels of its own
PROMPTS = BEGIN + """
most, wgmma, kinds = devices.FLASH_BYTES, current().capability == (9, 0), ("i16", "Q8_0", "F32")
for early, n_tokens, n_kv, n_head, widths, kinds, n_bytes in (
        (False, 130, 200, 2, V3 if wgmma else GOLDEN, kinds, 1), (True, 3, 70, 1, GLM, ("f32", "Q8_0", "IQ4_NL"), most)):
    copies.EARLY, devices.FLASH_BYTES = early, n_bytes
    args, out = inputs(n_tokens, n_kv, n_head, widths, *kinds), (n_tokens, n_head, widths[3])
    error = nmse(run(kernels, "mha_attention", [out], *args), run(reference, "mha_attention", [out], *args))
    assert error < 5e-7, (widths, kinds, error)
    assert KERNELS[f"flash_{'' if wgmma else 'mma_'}{widths[1] + widths[2]}_{widths[3]}"]._loaded
    if n_bytes == 1:        # nothing is left of others, and no weights became float32
        taken = sum(memory.nbytes for (name, _), memory in array._scratch()._memory.items() if name.startswith("images of"))
        config = SimpleNamespace(n_head=n_head, kv_lora=widths[0], n_nope=widths[1], n_rot=widths[2], n_v=widths[3])
        assert taken + 4 * widths[0] * n_head * max(widths[1], widths[3]) == devices.device_of("cuda").packed_latents(config, n_kv)
"""

# Parts of two sessions in a step, of which each has its own cache; rows that nobody sees, and a query that is not finite; a cache of
# greater numbers than float16 has, weights of smaller ones, queries of both
PARTS = BEGIN + """
q, _, k_b, v_b, _, scale = inputs(5, 12, 1, V3, "f32", "F32", "F32")
small = [w._replace(data=(w.data.view(np.float32) * np.float32(2e-7)).view(np.uint8)) for w in (k_b, v_b)]
q *= np.array([1e4, 1, 1e-5, 1, 1], np.float32)[:, None, None]
q[1, 0, 70] = np.nan
scale *= 3e-4            # scores of the first query are a few units
rows = [normal(n, 576) * np.float32(3e5) for n in (7, 12)]
for values in rows:
    values[:, 512:] *= np.float32(3e-7)
rows[0][5:], rows[1][:, 512:] = np.nan, 0
parts, positions = [slice(0, 3), slice(3, 5)], np.array([2, 3, 4, 10, 11])
there, at, out = cuda.upload(q), cuda.upload(positions), cuda.empty((5, 1, 128), np.float32)
assert at.greatest == at[parts[0]].greatest == 11 and cuda.empty((5,), np.int64).greatest is None
weights, expected = [cuda.weight(w) for w in small], []
for part, values in zip(parts, rows):
    cache = cuda.cache_rows(16, (512, 64), "f32")
    cuda.cache_write(cache, cuda.upload(values), cuda.upload(np.arange(len(values))))
    assert variants.kernels("mha", out[part], there[part], cache, *weights)
    cuda.mha_attention(out[part], there[part], cache, *weights, at[part], scale)
    expected.append(run(reference, "mha_attention", [(len(q[part]), 1, 128)], q[part], Rows(values[:positions[part][-1] + 1], "f32", 512),
                        *small, positions[part], scale))
found, expected, seen = out.get(), np.concatenate(expected), np.array([0, 2, 3, 4])
assert np.isnan(found[1]).all() and np.isfinite(found[seen]).all()
for t in seen:
    assert nmse(found[t], expected[t]) < 5e-7, (t, nmse(found[t], expected[t]))

def taken(queries):
    return variants.kernels("mha", out, queries, cache, *weights) is not None
odd = cuda.empty((5 * 192 + 1,), np.float32)[1:].reshape(5, 1, 192)
assert taken(there) and not taken(odd) and not taken(cuda.empty((5, 1, 160), np.float32))
with cuda.on(0, EXACT).selected():
    assert not taken(there)
cache = cache._replace(first=576, second=0)
assert not taken(there)
"""


IMAGES = BEGIN + """
from pydsa.backends.cuda.flash import images

def rows_of(image, n_rows, n):
    pieces = image.get().view(np.float16).reshape(n // 64, n_rows, 8, 8)
    order = np.arange(8) ^ (np.arange(n_rows) % 8)[:, None]
    return np.take_along_axis(pieces, order[None, :, :, None], 2).transpose(1, 0, 2, 3).reshape(n_rows, n).astype(np.float64)

def power_of(x):
    return 2.0 ** (13 - np.floor(np.log2(abs(x).max())))

for kind in (*images.WEIGHTS, "TQ2_0"):
    w = tensor(kind, 2, 24, 256)
    made, powers = images.weights_of(cuda.weight(w), "test")
    for of_head, power, expected in zip(np.split(made.get(), 2), powers.get(), reference.weight(w).reshape(2, 24, 256)):
        assert power == power_of(expected), kind
        assert nmse(rows_of(cuda.upload(of_head), 24, 256) / power, expected) < 1e-7, kind
positions = cuda.upload(np.array([4, 6, 5]))
for storage, bound, kv_lora, n_rot in (("f32", 1e-7, 512, 64), ("f16", 1e-7, 512, 64), ("bf16", 1e-5, 512, 64), ("i16", 1e-7, 512, 64),
                                       ("i8", 1e-4, 512, 64), ("i8", 1e-4, 256, 32)):
    values = normal(8, kv_lora + n_rot) * np.float32(70)
    values[7] = np.nan      # nobody sees it
    cache = cuda.cache_rows(8, (kv_lora, n_rot), storage)
    cuda.cache_write(cache, cuda.upload(values), cuda.upload(np.arange(8)))
    maxima = cuda.empty((2, images.MAXIMA), np.float32)
    latents, rotated = (cuda.empty((2 * 128 * n,), np.uint8) for n in (kv_lora, 64))
    (find, make), data = images.ROWS[storage], (cache.data.flat, cache.data.shape[1], positions, kv_lora, n_rot)
    find(images.MAXIMA, maxima, *data)
    make(images.blocks_of_rows(1, kv_lora), latents, rotated, *data, maxima, 2)         # from the third row on
    for image, n, expected in ((latents, kv_lora, values[:7, :kv_lora]), (rotated, 64, values[:7, kv_lora:])):
        found, width = rows_of(image, 128, n), expected.shape[1]
        assert nmse(found[:5, :width] / power_of(expected), expected[2:]) < bound and not found[5:].any(), storage
        assert not found[:, width:].any()
"""

# A prompt, and one behind it, up to their attention, with no other kernels
POSITIONS = """
import sys
import pydsa
from pydsa.backends import cuda
from pydsa.backends.cuda.runtime.launch import Kernel, listing

class Met(Exception):
    pass

def attend(out, q, latents, k_b, v_b, positions, scale):
    if listing.kernels is None:
        raise Met(positions.greatest, latents.data.shape[0])
    assert positions.greatest is None       # memory is taken for a whole context

Kernel.__call__ = lambda *args: None
cuda.mha_attention = attend
session = pydsa.load(sys.argv[1], device="cuda", n_ctx=256, n_ubatch=64).session()
for n_past in (0, 60):
    session.tokens[:] = range(n_past)
    try:
        session.prefill(list(range(50)))
    except Met as met:
        assert met.args == (n_past + 49, 256), met
    else:
        raise AssertionError("no such attention")
"""


def run_python(code, *args, simulated=False, capability="8.0"):
    env = os.environ | {"PYDSA_TEST_DEVICE": "ptx", "PYDSA_TEST_CAPABILITY": capability, "NUMBA_ENABLE_CUDASIM": "1" if simulated else "0"}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", ["9.0", "8.0"])
def test_prompts(capability):
    """Attention is as exact as one float16, and takes the planned memory."""
    run_python(PROMPTS, capability=capability)


def test_images():
    """Weights of all types, and rows of all caches, as float16."""
    run_python(IMAGES)


def test_positions_are_known(small_model):
    """Launches are for keys that there are, not for the whole context."""
    run_python(POSITIONS, small_model(arch="deepseek2", **TINY | {"n_ctx": 256, "n_lora_kv": 64}), simulated=True)


def test_parts_and_magnitudes():
    """Parts of sessions; magnitudes that float16 has not; what it leaves.

    All that depends on them is the same in wgmma.
    """
    run_python(PARTS)
