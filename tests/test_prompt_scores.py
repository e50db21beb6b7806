"""The indexer's scores of prompts in wgmma, on an emulated GPU."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

SCORES = """
import numpy as np
from tests.helpers import normal
from tests.ptx import copies
from pydsa.backends import cuda
from pydsa.backends.cuda import indexer, prompt_scores

def case(n_tokens, n_kv, n_head, width):
    cache = cuda.cache_rows(n_kv + 5, (width,), "i8")
    cuda.cache_write(cache, cuda.upload(normal(n_kv, width)), cuda.upload(np.arange(n_kv)))
    return cuda.upload(normal(n_tokens, n_head, width)), cuda.upload(normal(n_tokens, n_head)), cache

def scored(q, w, cache, positions, start=0, fill=False):
    out = cuda.upload(np.full((len(positions) - start, len(cache.data)), 77, np.float32))
    prompt_scores.score(out, prompt_scores.pack(q, w), cache, cuda.upload(positions), start, np.float32(0.1), fill)
    return out.get()

def as_rounded(q, w, cache):
    # float64: keys as stored, queries as 16 bits
    rows, width = cache.data.get(), cache.first
    keys = rows[:, :width].view(np.int8) * np.ascontiguousarray(rows[:, width:]).view(np.float32).astype(float)
    largest = np.abs(q.get()).max(-1, keepdims=True)
    dots = np.einsum("thd,sd->ths", np.rint(q.get() * (np.float32(32512) / largest)) * (largest / np.float32(32512)).astype(float), keys)
    return np.einsum("th,ths->ts", w.get().astype(float), np.maximum(dots, 0)) * np.float32(0.1)

# one token an image and two; more images than are under way, one too few of the last; keys of several tiles; narrow keys; a part of a batch
for early, n_tokens, n_kv, n_head, width, start, fill in (
        (False, 6, 140, 64, 128, 0, True), (True, 13, 100, 32, 128, 2, False), (False, 3, 30, 3, 16, 0, True)):
    copies.EARLY = early
    q, w, cache = case(n_tokens, n_kv, n_head, width)
    positions = np.arange(n_kv - n_tokens, n_kv)
    assert prompt_scores.takes(cache, n_tokens, n_head)
    found, expected = scored(q, w, cache, positions, start, fill), as_rounded(q, w, cache)[start:]
    there = np.arange(len(cache.data)) <= positions[start:, None]
    assert not fill or np.isneginf(found[~there]).all()
    nmse = ((found - expected)[there] ** 2).sum() / (expected[there] ** 2).sum()
    assert nmse < 1e-13, (n_tokens, n_kv, n_head, width, nmse)

# a context of which little is used; a query and a key that are not finite
q, w, cache = case(3, 300, 64, 128)
values = q.get()
values[2, 5, 9] = np.inf
q.set(values)
cuda.cache_write(cache, cuda.upload(np.full((1, 128), np.nan, np.float32)), cuda.upload(np.array([4])))
found = scored(q, w, cache, np.arange(50, 53))
assert (found[:, 53:] == 77).all() and np.isnan(found[2, :53]).all() and np.isnan(found[:, 4]).all()
assert np.isfinite(np.delete(found[:2, :53], 4, 1)).all()
# tokens that end before a tile of keys are left out there
found = scored(q, w, cache, np.array([0, 1, 200]))
assert (found[:2, 128:] == 77).all() and (found[2, 128:201] != 77).all()

# several batches give what one gives: the choice by the scores of all
q, w, cache = case(7, 90, 16, 128)
positions, chosen = cuda.upload(np.arange(83, 90)), []
for at_once in (264, 4):
    indexer.tokens_scored_by_gpu = lambda n_kv: at_once
    out = cuda.upload(np.full((7, 10), 77, np.int32))
    cuda.indexer_select(out, q, w, cache, positions, 0.1)
    chosen.append(out.get())
best = np.sort(np.argsort(-np.where(np.arange(95) <= np.arange(83, 90)[:, None], as_rounded(q, w, cache), -np.inf), 1)[:, :10], 1)
assert np.array_equal(chosen[0], best) and np.array_equal(chosen[1], best)
for n_tokens, n_head, storage in ((1, 16, "i8"), (2, 65, "i8"), (2, 16, "f16")):        # left to other kernels
    assert not prompt_scores.takes(cuda.cache_rows(4, (128,), storage), n_tokens, n_head)

from tools import time_kernels
from click.testing import CliRunner
time_kernels.REPEATS = 1
done = CliRunner().invoke(time_kernels.main, ["scores", "--tokens", "4", "--keys", "40", "--heads", "32", "--chosen", "8"])
lines = [line.split() for line in done.output.splitlines()]
assert done.exit_code == 0 and len(lines) == 5 and float(lines[2][-1]) < 1e-12 and float(lines[4][-1]) == 0, done.output
"""


def test_scores_of_prompts():
    """Queries of 16 bits lose nothing more, wherever tokens and keys end."""
    env = os.environ | {"PYDSA_TEST_DEVICE": "ptx", "PYDSA_TEST_CAPABILITY": "9.0", "NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run([sys.executable, "-c", SCORES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
