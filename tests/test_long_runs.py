"""Contexts of 16,384 tokens and more: choices and memory.

The size of the ubatch does not matter, and memory grows by what the caches take, not by the kernels' scratch.
"""
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import nmse, random_ids

LONG = dict(n_ctx=2**15, indexer_top_k=64)
N = 2**14


def run(load, path, kv_type, n_ubatch):
    """The keys that each layer chose, and the logits after N tokens."""
    chosen = {}

    def observe(node, written):
        if node.op == "indexer_select":
            chosen.setdefault(node.name, []).append(written[0].copy())
    model = load(path, kv_type=kv_type, n_ctx=N, n_ubatch=n_ubatch, attention="sparse")
    logits = model.session().prefill(random_ids(N), observe=observe)
    return {name: np.concatenate(parts) for name, parts in chosen.items()}, logits


@pytest.mark.parametrize("kv_type", ["f32", "i16"])
def test_ubatches_of_64_and_of_512_choose_the_same_keys(small_model, load, kv_type):
    (some, logits), (others, expected) = (run(load, small_model(**LONG), kv_type, n_ubatch) for n_ubatch in (64, 512))
    assert list(some) == ["indexer_top_k-0", "indexer_top_k-1", "indexer_top_k-2"]
    for name, keys in some.items():
        assert keys.shape == (N, 64) and np.array_equal(keys, others[name]), name
    assert nmse(logits, expected) < 1e-12


PROGRAM = """
import json, sys
import numpy as np
import psutil
import pydsa
process = psutil.Process()
model = pydsa.load(sys.argv[1], n_ctx=2**15, threads=1)
session, ids, resident = model.session(), np.random.default_rng(0).integers(0, 300, 2**15), []
for start in range(0, 2**15, 512):
    session.prefill(ids[start:start + 512])
    resident.append(process.memory_info().rss)
print(json.dumps(dict(resident=resident, caches=model.setup.cache_bytes, scratch=model.setup.scratch_bytes)))
"""


def test_resident_memory_grows_by_what_is_cached(small_model):
    """Resident memory grows only by cache rows, over 32,768 tokens.

    Growth is measured after four ubatches, when every kernel that works at top_k has run. Longer rows of scores are allowed for.
    """
    done = subprocess.run([sys.executable, "-c", PROGRAM, small_model(**LONG)], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    resident, growth = report["resident"], report["resident"][-1] - report["resident"][3]
    assert len(resident) == 64
    assert growth <= report["caches"] + 2**24, report       # rows of scores for 32 tokens, and the scratch of one top-k
    assert resident[3] - resident[0] <= 2**25, report
