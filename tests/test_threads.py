"""Steps of models by 1 to 8 threads: the same bits, one call a token, no memory allocated."""
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import random_ids

import pydsa
from pydsa.backends.cpu import attention
from pydsa.backends.cpu.team import team, threads
from pydsa.executor.schedule import VARIANTS
from pydsa.setup import Setup

THREADS = (2, 3, 5, 8)      # compared with 1; they may be more than there are cores
WIDE = dict(n_embd=256, n_lora_q=256, n_lora_kv=256, n_nope=64, n_v=64, n_rot=32, n_ff=256, n_ff_exp=256, n_layer=2, n_head=4)
MANY_HEADS = dict(n_head=72, n_nope=8, n_rot=4, n_v=8, n_layer=2)       # enough for tasks of some heads
SHARED_LAYERS = dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS")
# Models, options, and the numbers of tokens of the calls; prompts are cut into ubatches of 17 if nothing else is said
LENGTHS = (67, 1, 1, 2, 1, 5, 1, 9)
CASES = {
    "deepseek2": (dict(arch="deepseek2"), {}, LENGTHS),
    "deepseek2 lite": (dict(arch="deepseek2", n_lora_q=0, n_expert_groups=0, n_expert_shared=2), dict(kv_type="f16"), LENGTHS),
    "deepseek2 without experts": (dict(arch="deepseek2", n_expert=0, n_layer_dense=3, expert_gating_func="absent"), {}, LENGTHS),
    "deepseek2, Q4_K_M": (dict(arch="deepseek2", type="Q4_K_M", **WIDE), dict(kv_type="i16", n_ubatch=131), (131, 1, 70, 1, 3)),
    "deepseek32": (dict(), dict(attention="auto"), (5, 1, 2, *LENGTHS)),
    "deepseek32, sparse": (dict(), dict(attention="sparse", kv_type="i8"), LENGTHS),
    "deepseek32, masked": (dict(), dict(attention="masked", kv_type="bf16"), LENGTHS),
    "deepseek32, dense": (dict(), dict(attention="dense", kv_type="i16"), LENGTHS),
    "deepseek32, Q8_0": (dict(type="Q8_0", **WIDE), dict(kv_type="i16", n_ubatch=150), (150, 1, 90, 1, 4)),
    "deepseek32, Q4_K_M": (dict(type="Q4_K_M", quantize_indexer_proj=True, **WIDE), dict(kv_type="i8", n_ubatch=64), (200, 1, 1)),
    "deepseek32, 72 heads": (MANY_HEADS, dict(attention="sparse", kv_type="f16"), LENGTHS),
    "deepseek2, 72 heads": (dict(arch="deepseek2", **MANY_HEADS), dict(kv_type="i16"), LENGTHS),
    "glm-dsa": (SHARED_LAYERS, dict(attention="auto", n_ubatch=13), LENGTHS),
    "glm-dsa, IQ2_XS": (SHARED_LAYERS | WIDE | dict(type="IQ2_XS", n_layer=4), dict(kv_type="i16"), LENGTHS),
    # More keys than a split of attention has
    "deep, dense": (dict(arch="deepseek2"), dict(n_ubatch=256), (650, 1, 1, 4, 3, 1)),
    "deep, dense, 72 heads": (dict(arch="deepseek2", **MANY_HEADS), dict(n_ubatch=256, kv_type="i8"), (650, 1, 1, 4, 1)),
    "deep, masked": (dict(), dict(attention="masked", n_ubatch=256, kv_type="f16"), (650, 1, 1, 4, 1)),
    "deep, sparse": (dict(), dict(attention="sparse", dsa_top_k=600, n_ubatch=256, kv_type="i16"), (650, 1, 1, 4, 1)),
    "deep, plain": (dict(indexer_top_k=40), dict(attention="auto", n_ubatch=512, dsa_top_k=590), (570, 70, 1, 4, 1)),
}


def steps(model, lengths, n_threads, n_batch):
    """The logits of all tokens, [n, n_vocab]."""
    model.runner.threads, model.runner.threads_batch = n_threads, n_batch
    session, ids = model.session(), random_ids(sum(lengths))
    return np.concatenate([session.logits(ids[session.n_past:session.n_past + n]) for n in lengths])


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_threads(small_model, load, case):
    spec, options, lengths = CASES[case]
    model = load(small_model(**spec), **{"n_ctx": 1024, "n_ubatch": 17} | options)
    expected = steps(model, lengths, 1, 1)
    assert np.isfinite(expected).all() and (not case.startswith("deep,") or sum(lengths) > 2.5 * attention.SPLIT_KEYS)
    for n in THREADS:
        assert np.array_equal(steps(model, lengths, n, n), expected), n


def test_the_cases_have_steps_of_all_variants(small_model):
    met = set()
    for spec, options, lengths in CASES.values():
        setup, n_past = Setup(small_model(**spec), **{"n_ctx": 1024, "n_ubatch": 17} | options), 0
        for n in lengths:
            for start in range(n_past, n_past + n, setup.n_ubatch):
                met.add(setup.schedule.variant(start, min(setup.n_ubatch, n_past + n - start)))
            n_past += n
    assert met == set(VARIANTS)


@pytest.mark.parametrize("n_threads, n_batch", [(2, 1), (1, 2), (3, 8), (40, 3)])
def test_prompts_and_generation_on_different_numbers_of_threads(small_model, load, n_threads, n_batch):
    path, lengths = small_model(), (40, 1, 1, 3, 1)
    model = pydsa.load(path, n_ctx=64, n_ubatch=17, threads=n_threads, threads_batch=n_batch)
    session, ids = model.session(), random_ids(46)
    met = np.concatenate([session.logits(ids[session.n_past:session.n_past + n]) for n in lengths])
    assert np.array_equal(met, steps(pydsa.load(path, n_ctx=64, n_ubatch=17, threads=1), lengths, 1, 1))
    assert {n_threads, n_batch} <= set(threads._teams)


# A step is one call

def watched(monkeypatch):
    """The numbers of intervals of all calls of team.run_step from now on."""
    numbers, run_step = [], team.run_step
    monkeypatch.setattr(team, "run_step", lambda at, intervals, n: numbers.append(n) or run_step(at, intervals, n))
    return numbers


INTERVALS = {       # of a generated token, at most: a stage that waits for others costs as much as a small op
    "deepseek2": (dict(arch="deepseek2"), "auto", 84), "deepseek32": (dict(), "sparse", 99), "masked": (dict(), "masked", 99),
    "glm-dsa": (SHARED_LAYERS, "sparse", 123)}


@pytest.mark.parametrize("case", INTERVALS)
def test_a_token_is_one_call(small_model, load, monkeypatch, case):
    spec, mode, most = INTERVALS[case]
    session = load(small_model(**spec), n_ubatch=17, attention=mode, n_ctx=256).session()
    session.prefill(random_ids(40))
    calls = watched(monkeypatch)
    for token in random_ids(5):
        session.decode(token)
    n = len(list(session.generate([5], 4)))     # fewer if one ends the turn; the last of four is not run
    assert len(calls) == 5 + 1 + min(n, 3) and len(set(calls)) == 1 and calls[0] <= most


def test_an_interrupt_is_heard_within_a_group_of_a_prompt(small_model, load, monkeypatch):
    """... which is a call; what comes while it runs is raised at its end. The ubatches before it are in the context."""
    model, ids = load(small_model(), n_ubatch=17), random_ids(60)
    session, calls, run_step = model.session(), watched(monkeypatch), team.run_step
    session.prefill(ids[:17])
    assert len(calls) == len(set(session._bind(0, 17, 1).levels)) > 20 and sum(calls) < 4 * len(calls)
    before = len(set(session._bind(0, 17, 0).levels))       # of a ubatch without logits

    def interrupted(*args):
        run_step(*args)
        if len(calls) == before + 30:
            signal.raise_signal(signal.SIGINT)

    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)
    session = model.session()
    try:
        monkeypatch.setattr(team, "run_step", interrupted)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            session.prefill(ids)
    finally:
        signal.signal(signal.SIGINT, theirs)
    assert len(calls) == before + 30 and session.n_past == 17
    assert np.array_equal(session.prefill(ids[17:]), model.session().prefill(ids))


# Memory

ALLOCATIONS = """
import sys
import numpy as np
import pydsa
from numba.core.runtime import rtsys
from pydsa.backends.cpu.scratch import BUFFERS
path, attention, n_threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = pydsa.load(path, n_ctx=2000, n_ubatch=32, attention=attention, threads=n_threads)
def run(session):
    session.prefill(ids[:170])
    for token in ids[170:210]:
        session.decode(token)
ids = np.random.default_rng(0).integers(0, 300, 300)
warm, session = model.session(), model.session()
run(warm)
buffers, before = BUFFERS.copy(), rtsys.get_allocation_stats()
assert before.alloc > 0
run(session)
session.truncate(0)
run(session)
after = rtsys.get_allocation_stats()
grown = int((BUFFERS[1:, 2] > buffers[1:, 2]).sum())
assert after.mi_alloc - before.mi_alloc == after.mi_free - before.mi_free
print(after.alloc - before.alloc, after.mi_alloc - before.mi_alloc, grown, int((BUFFERS[1:, 2] > 0).sum()))
"""


@pytest.mark.parametrize("arch, mode", [("deepseek2", "auto"), ("deepseek32", "auto"), ("deepseek32", "masked"), ("glm-dsa", "sparse")])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_warm_steps_allocate_nothing(small_model, arch, mode, n_threads):
    """... in kernels. Which of several threads first meets a task that needs more scratch memory is left to chance."""
    done = subprocess.run([sys.executable, "-c", ALLOCATIONS, small_model(arch=arch), mode, str(n_threads)], capture_output=True, text=True,
                          env=os.environ | {"NUMBA_NRT_STATS": "1"})
    assert done.returncode == 0, done.stderr
    n, n_arrays, n_grown, n_buffers = map(int, done.stdout.split())
    assert n_arrays == 0 and n <= 8 * n_grown and n_grown <= (n_buffers if n_threads > 1 else 0) <= 2 * n_threads


def test_a_token_costs_python_little(small_model, load):
    """Calls are made once: a token makes few objects, kilobytes of them."""
    session = load(small_model(), n_ctx=2000, n_ubatch=17).session()
    session.prefill(random_ids(40))
    for token in random_ids(20):
        session.decode(token)
    peaks = []
    tracemalloc.start()
    try:
        for token in random_ids(40):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            session.decode(token)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert np.median(peaks) < 6_000
