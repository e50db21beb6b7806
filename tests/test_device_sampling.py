"""Sampling on a GPU picks the tokens that pydsa.sampling picks.

Steps that are launched before they are asked for change nothing. The tests run as PTX (tests/ptx) and in Numba's simulator, in processes of
their own.
"""
import importlib.util

import forked
import pytest
from helpers import TINY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")

SETUP = """
import os
import sys
import numpy as np
as_ptx = os.environ["NUMBA_ENABLE_CUDASIM"] == "0"
if as_ptx:
    from tests.ptx.driver import install
    driver = install()
from pydsa.backends import cuda
from pydsa.sampling import Sampler, Sampling
"""
PICKS = """
rng = np.random.default_rng(0)
ids, positions = cuda.empty((1,), np.int32), cuda.empty((1,), np.int64)

def compare(logits, **options):
    here, there = Sampler(Sampling(**options)), Sampler(Sampling(**options))
    on_device = cuda.upload(logits[None])
    for position in range(2 if as_ptx and logits.size < 4000 else 1):
        token, greatest = cuda.pick(ids, positions, position, on_device, *there.settings(cuda.PICKS))
        assert token == here.pick(logits) and greatest == logits.max(), (options, token)
        assert ids.get() == token and positions.get() == position

if as_ptx:
    compare(3 * rng.normal(size=129280).astype(np.float32), seed=0)
for n in (1, 5, 40, 3000 if as_ptx else 70):
    logits = (3 * rng.normal(size=n)).astype(np.float32)
    for options in (dict(temperature=0), dict(), dict(top_k=3, top_p=0.5), dict(top_k=30, top_p=1, min_p=0, temperature=1.3),
                    dict(top_k=7, min_p=0.9, temperature=1e-6), dict(top_k=1)):
        for seed in range(2 if as_ptx else 1):
            compare(logits, seed=seed, **options)
ties = np.repeat(np.float32([1, 2, -0.0, 0.0, 2, -np.inf]), 9)
for options in (dict(temperature=0), dict(top_k=12, top_p=0.8, min_p=0), dict(top_k=20, top_p=1, min_p=0, temperature=5)):
    for seed in range(5 if as_ptx else 1):
        compare(ties, seed=seed, **options)
compare(np.float32([-np.inf, -3, -np.inf]), top_k=2, seed=0)
for bad in (np.nan, np.inf):
    for top_k in (0, 3):
        logits = np.arange(60, dtype=np.float32)
        logits[17] = bad
        token, greatest = cuda.pick(ids, positions, 0, cuda.upload(logits[None]), top_k, 0.9, 0.1, 1.0, 0.5)
        assert np.array_equal(greatest, bad, equal_nan=True)
assert np.isneginf(cuda.pick(ids, positions, 0, cuda.upload(np.full((1, 60), -np.inf, np.float32)), 3, 0.9, 0.1, 1.0, 0.5)[1])
if as_ptx:
    compare(3 * rng.normal(size=5000).astype(np.float32), seed=0, top_k=cuda.PICKS, top_p=0.999, min_p=0, temperature=2)
"""
SESSIONS = """
import pydsa
model = pydsa.load(sys.argv[1], device="cuda", attention="auto", n_ctx=10, n_ubatch=4)
prompt = [5, 6, 7]

def on_host(n, ids=prompt, **options):
    session, sampler, tokens = model.session(), Sampler(Sampling(**options)), []
    logits = session.prefill(ids)
    for _ in range(n):
        tokens.append(sampler.pick(logits, session.tokens))
        logits = session.decode(tokens[-1])
    return tokens

settings = dict(top_k=20, temperature=1.5, seed=3)
expected = on_host(6, **settings)
fetched = driver.counts["cuMemcpyDtoHAsync"]
assert list(model.session().generate(prompt, 6, Sampling(**settings))) == expected and len(set(expected)) > 3
assert driver.counts["cuMemcpyDtoHAsync"] == fetched + 6        # the first logits, then one token at a time
assert list(model.session().generate(prompt, 4, Sampling(temperature=0))) == on_host(4, temperature=0)
penalized = dict(repeat_penalty=1.3, temperature=0)
assert list(model.session().generate(prompt, 4, Sampling(**penalized))) == on_host(4, **penalized)
biased = dict(logit_bias={expected[0]: False, 9: 1.5}, temperature=0)
assert list(model.session().generate(prompt, 4, Sampling(**biased))) == on_host(4, **biased)

# two alternating conversations: each invalidates the step that the other has started
mine, other = (model.session().generate(p, 5, Sampling(**settings)) for p in (prompt, [9, 10]))
together = [(next(mine), next(other)) for _ in range(5)]
assert [a for a, _ in together] == expected[:5] and [b for _, b in together] == on_host(5, [9, 10], **settings)

# between two tokens the caller reads, saves, loads and truncates
session = model.session()
tokens = session.generate(prompt, 6, Sampling(**settings))
begun = [next(tokens) for _ in range(3)]
assert begun == expected[:3] and session.tokens == prompt + expected[:2]
session.save(sys.argv[1] + ".session")
session.load(sys.argv[1] + ".session")
assert next(tokens) == expected[3]
session.truncate(3)
assert session.tokens == prompt
again = next(tokens)        # appended to the truncated context
assert session.tokens == [*prompt, expected[3]]
session.truncate(3)
logits = session.prefill([expected[3]])
sampler = Sampler(Sampling(**settings))
drawn = [sampler._random.random() for _ in range(4)]
assert again == sampler.pick(logits)

# the context is full: every token that fits, then an error
session, steps = model.session(), model.runner.steps
tokens = session.generate(prompt, None, Sampling(**settings))
met = []
try:
    for token in tokens:
        met.append(token)
except pydsa.ContextFullError:
    pass
assert len(met) == 8 and session.n_past == 10 and met[:6] == expected
assert model.runner.steps == steps + 1 + 7

# a token that ends a turn is not run
model.tokenizer.eog_ids = frozenset([expected[4]])
steps = model.runner.steps
assert list(model.session().generate(prompt, None, Sampling(**settings))) == expected[:expected.index(expected[4])]
assert model.runner.steps == steps + 1 + expected.index(expected[4])
"""


def run(code, *args, simulated=False):
    forked.run(SETUP + code, *args, NUMBA_ENABLE_CUDASIM="1" if simulated else "0")


@pytest.mark.parametrize("simulated", [False, True])
def test_the_same_tokens(simulated):
    run(PICKS, simulated=simulated)


def test_sessions(small_model):
    run(SESSIONS, str(small_model(**TINY | {"type": "Q8_0", "n_layer": 1, "indexer_top_k": 6})))
