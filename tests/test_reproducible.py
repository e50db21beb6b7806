"""--reproducible: a token's logits are the same bits in steps of any shape."""
import queue

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import last_positions, normal, random_ids, tensor

import pydsa
from pydsa.backends import cpu
from pydsa.backends.cpu import attention
from pydsa.backends.cpu.team import threads
from pydsa.cli import main
from pydsa.engine.batch import Batch
from pydsa.engine.engine import Engine
from pydsa.engine.requests import Failed, Finished, Request
from pydsa.errors import PydsaError, SessionFileError
from pydsa.executor.schedule import VARIANTS
from pydsa.quants import CACHE_TYPES, TYPES
from pydsa.sampling import Sampling
from pydsa.setup import Setup

IDS = random_ids(200)
WIDE = dict(n_embd=256, n_lora_q=256, n_lora_kv=256, n_nope=64, n_v=64, n_rot=32, n_ff=256, n_ff_exp=256, n_layer=2, n_head=4)
SHARED_LAYERS = dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS")
MODELS = {      # models and options; top_k is 12 if nothing else is said, and a split of keys has at least 64
    "deepseek2": (dict(arch="deepseek2"), {}),
    "deepseek2, Q8_0": (dict(arch="deepseek2", type="Q8_0", **WIDE), dict(kv_type="i16")),
    "deepseek32": (dict(), dict(kv_type="f16")),
    "deepseek32, sparse": (dict(), dict(kv_type="i8", attention="sparse", dsa_top_k=150)),
    "deepseek32, masked": (dict(), dict(kv_type="bf16", attention="masked")),
    "deepseek32, 72 heads": (dict(n_head=72, n_nope=8, n_rot=4, n_v=8, n_layer=2), dict(kv_type="i16", dsa_top_k=150)),
    "deepseek32, F16": (dict(type="F16"), dict(index_type="f16", dsa_top_k=90)),
    "deepseek32, Q4_K_M": (dict(type="Q4_K_M", quantize_indexer_proj=True, **WIDE), dict(kv_type="i16", dsa_top_k=90)),
    "glm-dsa": (SHARED_LAYERS, dict(kv_type="i8")),
    "glm-dsa, IQ2_XS": (SHARED_LAYERS | WIDE | dict(type="IQ2_XS", n_layer=4), dict(kv_type="i16")),
}
STEPS = [(200, 1), (1, 2), (7, 1), (16, 3), (33, 2), (64, 1)]       # ubatches, and threads


@pytest.fixture
def opened(small_model, load):
    """opened(case, ...) -> a reproducible model, unless options say otherwise."""
    def open_model(case, **options):
        spec, more = MODELS[case]
        return load(small_model(**spec), **{"reproducible": True} | more | options)
    return open_model


def in_pieces(session, ids, seed):
    """Logits of ids, which come in pieces of random sizes, one by one at last."""
    sizes, logits = np.random.default_rng(seed).integers(1, 90, len(ids)).tolist(), []
    while session.n_past < len(ids):
        n = sizes.pop() if session.n_past < 180 else 1
        logits.append(session.logits(ids[session.n_past:session.n_past + n]))
    return np.concatenate(logits)


def ways(opened, case, **options):
    """Name the ways to run IDS whose logits differ from those of one by one."""
    expected = None
    for n_ubatch, n in [(1, 1), *STEPS]:
        met = opened(case, n_ubatch=n_ubatch, threads=n, **options).session().logits(IDS)
        expected = met if expected is None else expected
        if not np.array_equal(met, expected):
            yield f"{n_ubatch} tokens, {n} threads"
    model = opened(case, n_ubatch=200, **options)
    for seed in (0, 1):
        if not np.array_equal(in_pieces(model.session(), IDS, seed), expected):
            yield f"pieces {seed}"
    session = model.session()
    session.prefill(IDS[:90] + IDS[:60])
    n = session.reuse(IDS)
    assert n == 90
    if not np.array_equal(session.logits(IDS[n:]), expected[n:]):
        yield "reuse"
    assert np.isfinite(expected).all() and np.ptp(expected) > 0.1


@pytest.mark.parametrize("case", MODELS)
def test_logits_do_not_depend_on_steps(opened, case):
    assert list(ways(opened, case)) == []


@pytest.mark.parametrize("case", ["deepseek2", "deepseek32, sparse", "deepseek32, F16", "deepseek32, Q4_K_M"])
def test_without_it_they_do(opened, case):
    assert {"200 tokens, 1 threads", "64 tokens, 1 threads", "pieces 0"} <= set(ways(opened, case, reproducible=False))


@pytest.mark.parametrize("case", ["deepseek2, Q8_0", "deepseek32, masked", "glm-dsa, IQ2_XS"])
def test_logits_are_those_of_one_token_at_a_time(opened, case):
    expected = opened(case, n_ubatch=1, reproducible=False).session().logits(IDS)
    assert np.array_equal(opened(case).session().logits(IDS), expected)


@pytest.mark.parametrize("case", ["deepseek32", "deepseek32, Q4_K_M", "glm-dsa"])
def test_logits_do_not_depend_on_the_length_of_the_context(opened, case):
    """... nor on whether attention is "sparse" from the beginning: all keys are the chosen ones there."""
    expected = opened(case).session().logits(IDS)
    assert np.array_equal(opened(case, attention="sparse").session().logits(IDS), expected)
    k = opened(case).top_k
    short = opened(case, n_ctx=k)
    assert "sparse" not in short.setup.schedule.variants
    assert np.array_equal(short.session().logits(IDS[:k]), expected[:k])


@pytest.mark.parametrize("case", MODELS)
def test_there_is_one_form_of_attention(opened, case):
    assert not any(VARIANTS[name].plain for name in opened(case).setup.schedule.variants)
    assert any(VARIANTS[name].plain for name in opened(case, reproducible=False).setup.schedule.variants) or "sparse" in case \
        or "masked" in case


# Other conversations

@pytest.mark.parametrize("case", ["deepseek2", "deepseek2, Q8_0", "deepseek32", "deepseek32, Q4_K_M", "glm-dsa, IQ2_XS"])
def test_logits_do_not_depend_on_other_sessions(opened, case):
    def differ(**options):
        """Name the sessions and steps where logits are others than alone."""
        model = opened(case, **options)
        sessions, alone = [model.session() for _ in range(9)], [model.session() for _ in range(9)]
        for i, session in enumerate(sessions + alone):
            session.prefill(IDS[i % 9:i % 9 + 5 + 9 * (i % 9)])     # below top_k and beyond it
        batch = Batch(model.runner, model.setup)
        for step in range(8):       # some sessions have a token, others a part of a prompt
            ids = [IDS[step + i:step + i + ((1, 1, 11)[(i + step) % 3] if step > 3 else 1)] for i in range(9)]
            for i, met in enumerate(batch.run(sessions, ids)):
                if not np.array_equal(met, alone[i].prefill(ids[i])):
                    yield i, step

    assert not list(differ())
    if "Q" in case:     # products of floats are the same anyway
        assert list(differ(reproducible=False))


@pytest.mark.parametrize("case", ["deepseek2, Q8_0", "deepseek32, Q4_K_M"])
def test_answers_of_an_engine(opened, case):
    """Requests that share steps and prefixes get the answers of each alone."""
    ends, model, engine = queue.Queue(), opened(case, n_ubatch=200), Engine(opened(case, n_ubatch=16, threads=2), n_parallel=3)
    prompts = [IDS[:n] + IDS[5 * i:5 * i + 9] for i, n in enumerate((60, 60, 120, 0, 60, 130, 120, 10))]
    sampling = [Sampling(temperature=1.5, seed=i) for i in range(len(prompts))]
    try:
        for i, ids in enumerate(prompts):
            engine.submit(Request(ids, lambda event, i=i: isinstance(event, (Finished, Failed)) and ends.put((i, event)), sampling[i],
                                  max_tokens=15))
        answers = dict(ends.get(timeout=60) for _ in prompts)
    finally:
        engine.close()
    assert any(answers[i].timings.n_reused for i in answers)
    for i, ids in enumerate(prompts):
        assert answers[i].reply.text == "".join(model.generate(ids, max_tokens=15, temperature=1.5, seed=i))


# Text

@pytest.mark.parametrize("case", ["deepseek2, Q8_0", "deepseek32, Q4_K_M"])
def test_generation_with_a_seed(opened, case):
    texts = {tuple(opened(case, n_ubatch=n_ubatch, threads=n).generate(IDS[:100], max_tokens=30, seed=5, temperature=1.5))
             for n_ubatch, n in STEPS}
    assert len(texts) == 1


def test_command_line(small_model):
    path = small_model(**MODELS["deepseek32, Q4_K_M"][0])
    common = ["run", str(path), "--raw", "-p", "Once upon a time there was a model", "-n", "20", "--temp", "1.5", "-s", "3", "-c", "200"]
    results = [CliRunner().invoke(main, [*common, "--reproducible", *more]) for more in (["-ub", "3", "-t", "2"], ["-t", "1"])]
    assert [result.exit_code for result in results] == [0, 0] and results[0].stdout == results[1].stdout != ""
    assert "reproducible" in CliRunner().invoke(main, ["info", str(path), "--reproducible"]).stdout
    rows = CliRunner().invoke(main, ["bench", str(path), "--reproducible", "-p", "8", "-n", "2", "-r", "1", "-t", "1"]).stdout
    assert "auto, reproducible" in rows


# Session files

def test_a_saved_session_goes_on(opened, tmp_path):
    for case in ("deepseek2, Q8_0", "deepseek32, sparse", "glm-dsa"):
        expected = opened(case).session().logits(IDS)
        session, again = opened(case, n_ubatch=33).session(), opened(case, n_ubatch=7, threads=2).session()
        session.prefill(IDS[:101])
        session.save(tmp_path / "a.session")
        again.load(tmp_path / "a.session")
        assert np.array_equal(again.logits(IDS[101:]), expected[101:])


def test_sessions_of_the_other_mode_are_refused(opened, tmp_path):
    sessions = [opened("glm-dsa", reproducible=mode).session() for mode in (True, False)]
    for session, other in (sessions, sessions[::-1]):
        session.prefill(IDS[:20])
        session.save(tmp_path / "a.session")
        with pytest.raises(SessionFileError, match="saved with another setting of --reproducible"):
            other.load(tmp_path / "a.session")


# Ops: rows of many tokens are those of each alone

def rows_differ(op, tails, n_tokens, *args):
    """Name the steps of an op in which a row differs from its own step's.

    tails: those of its outputs. args(tokens): its arguments for a slice of tokens.
    """
    def run(tokens):
        outs = [np.zeros((tokens.stop - tokens.start, *tail), np.int32 if op == "indexer_select" else np.float32) for tail in tails]
        getattr(cpu, op)(*outs, *args[0](tokens))
        return outs

    threads.set_threads(2)
    alone = [run(slice(t, t + 1)) for t in range(n_tokens)]
    for n in (2, 3, 4, 5, 8, 9, 17, n_tokens):
        for start in range(0, n_tokens - n + 1, n):
            for i, out in enumerate(run(slice(start, start + n))):
                if not all(np.array_equal(row, alone[start + t][i][0]) for t, row in enumerate(out)):
                    yield f"{start} to {start + n}"


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ2_XXS", "F16"])      # of all types: test_few_tokens.py
def test_linear(kind):
    n_in = 512 if TYPES[kind].quantized else 83
    x, w = normal(40, n_in), tensor(kind, 37, n_in)
    assert list(rows_differ("linear", [(37,)], 40, lambda t: (cpu.reproducible(cpu.weight(w)), x[t]))) == []


def cache(kv_type, n, widths):
    """Reproducible cache rows of n normal tokens, of very different sizes."""
    rows = cpu.cache_rows(n, widths, kv_type)
    cpu.cache_write(rows, normal(n, sum(widths)) * np.exp(normal(n, 1)), np.arange(n))
    return cpu.reproducible(rows)


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
@pytest.mark.parametrize("n_head, n_kv", [(3, 40), (16, 90), (72, 700), (16, 2500)])
def test_attention(kv_type, n_head, n_kv):
    n_tokens, q = 24, normal(24, n_head, 68)
    latents, positions = cache(kv_type, n_kv, (56, 12)), last_positions(n_tokens, n_kv)
    indices = np.full((n_tokens, n_kv + 5), -1, np.int32)
    for t, position in enumerate(positions):
        indices[t, :position + 1] = np.arange(position + 1)
    assert list(rows_differ("dense_attention", [(n_head, 56)], n_tokens, lambda t: (q[t], latents, positions[t], 0.2))) == []
    assert list(rows_differ("sparse_attention", [(n_head, 56)], n_tokens, lambda t: (q[t], latents, indices[t], 0.2))) == []
    dense, sparse = np.empty((2, n_tokens, n_head, 56), np.float32)
    cpu.dense_attention(dense, q, latents, positions, 0.2)
    cpu.sparse_attention(sparse, q, latents, indices, 0.2)
    assert np.array_equal(dense, sparse)
    assert n_kv < 700 or attention.count_splits.py_func(latents, positions[-1:], n_head, 1) > 4


@pytest.mark.parametrize("index_type", CACHE_TYPES)
@pytest.mark.parametrize("n_kv, k", [(60, 70), (300, 20), (3000, 100)])
def test_choice_of_keys(index_type, n_kv, k):
    n_tokens, q, w = 24, normal(24, 9, 32), normal(24, 9)
    keys, positions = cache(index_type, n_kv, (32,)), last_positions(n_tokens, n_kv)
    assert list(rows_differ("indexer_scores", [(n_kv,)], n_tokens, lambda t: (q[t], w[t], keys, positions[t], 0.1))) == []
    assert list(rows_differ("indexer_select", [(k,)], n_tokens, lambda t: (q[t], w[t], keys, positions[t], 0.1))) == []


# What is refused

@pytest.mark.parametrize("device", ["cuda", "reference"])
def test_other_devices_refuse_it(small_model, device):
    with pytest.raises(PydsaError, match=f"^{device} cannot promise .* use --device cpu, or leave out --reproducible"):
        Setup(small_model(), device=device, reproducible=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_what_is_no_bool(small_model, value):
    with pytest.raises(PydsaError, match="reproducible is .*, expected True or False"):
        pydsa.load(small_model(), reproducible=value)
