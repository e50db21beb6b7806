"""Stages: ranges of layers whose results together are those of the whole model, bit for bit."""
import itertools
import queue

import numpy as np
import pytest
from helpers import random_ids
from staged import in_stages

from pydsa import ContextFullError, PydsaError, Sampling
from pydsa.engine.engine import Engine
from pydsa.engine.requests import Failed, Finished, Request
from pydsa.fitting import fitted
from pydsa.models.blocks import begins_a_stage
from pydsa.sampling import Sampler
from pydsa.setup import Setup

IDS = random_ids(90, n_vocab=290)
SHARING = dict(arch="glm-dsa", n_layer=5, indexer_types="FFSFS")


@pytest.fixture
def model(small_model, load):
    return load(small_model(), n_ctx=100, n_ubatch=16)


@pytest.mark.parametrize("spec, borders", [({}, [1]), ({"n_layer": 4}, [1, 3]), (SHARING, [1, 3]), ({"arch": "deepseek2"}, [1])])
def test_stages_are_the_model(small_model, load, spec, borders):
    """Logits, and the caches that stay, are those of one process."""
    model = load(small_model(**spec), n_ctx=100, n_ubatch=16)
    whole, parts = model.session(), in_stages(model, borders, 3).session()
    assert np.array_equal(whole.logits(IDS[:50]), parts.logits(IDS[:50]))
    assert all(np.array_equal(whole.decode(token), parts.decode(token)) for token in IDS[50:53])
    assert all(np.array_equal(cache.stored(53), parts.caches[ref].stored(53)) for ref, cache in whole.caches.items())


def test_a_stage_has_its_own_weights_and_caches(small_model):
    path = small_model(n_layer=4)
    whole, parts = Setup(path), [Setup(path, layers=layers, head=layers[0] == 0) for layers in ((0, 1), (1, 3), (3, 4))]
    assert sum(part.n_bytes for part in parts) == whole.n_bytes and sum(part.cache_bytes for part in parts) == whole.cache_bytes
    assert {ref.layer for ref in parts[1].cache_widths} == {1, 2} and parts[1].ends == (False, False)
    ends = [{name for name in part.weights.used if not name.startswith("blk.")} for part in parts]
    assert ends == [{"token_embd.weight", "output_norm.weight", "output.weight"}, set(), set()]
    assert "output.weight" in Setup(path, layers=(3, 4)).weights.used       # with the last layer, unless it is elsewhere
    assert {part.fingerprint for part in parts} == {whole.fingerprint}


@pytest.mark.parametrize("layers, message", [((2, 3), "layer 2, which takes the choice of keys of layer 1"),
                                             ((0, 6), "expected some of 0 to 4"), ((3, 3), "some of"), ((-1, 2), "expected some of")])
def test_borders(small_model, layers, message):
    path = small_model(**SHARING)
    with pytest.raises(PydsaError, match=message):
        Setup(path, layers=layers)
    config = Setup(path).config
    assert [begins_a_stage(config, layer) for layer in range(5)] == [True, True, False, True, False]


def test_placement_in_a_stage(small_model):
    """Numbers of layers count from the ends of the stage."""
    path = small_model(n_layer=4)
    homes = fitted(path, layers=(1, 4), device="reference", n_gpu_layers=2).placement
    assert homes.layers == ("cpu", "reference", "reference") and homes.home(1) == "cpu" and homes.home(3) == homes.home(-1) == "reference"
    moved = fitted(path, layers=(2, 4), device="reference", n_cpu_moe=1)
    assert moved.placement.of_weight("blk.2.ffn_up_exps.weight", 2) == "cpu"
    assert moved.placement.of_weight("blk.3.ffn_up_exps.weight", 3) == "reference"


def test_steps_under_way(model):
    """Ubatches are under way together; those after one that fails are dropped."""
    staged = in_stages(model, [1], 3)
    session, whole = staged.session(), model.session()
    done = []
    assert np.array_equal(session.prefill(IDS[:60], lambda n, total: done.append(n)), whole.prefill(IDS[:60]))
    assert staged.runner.most == 3 and done == [16, 32, 48, 60] and session.tokens == whole.tokens == list(IDS[:60])
    stage, run, calls = staged.runner.stages[1], staged.runner.stages[1].run, itertools.count()

    def fail(*args):
        if next(calls) == 1:
            raise PydsaError("broken")
        return run(*args)
    stage.run = fail
    with pytest.raises(PydsaError, match="broken"):
        session.prefill(IDS[:35])
    assert session.n_past == 76 and session.n_begun == 76
    stage.run = run
    whole.prefill(IDS[:16])
    assert np.array_equal(session.prefill(IDS[16:30]), whole.prefill(IDS[16:30]))
    with pytest.raises(ContextFullError):
        session.prefill(IDS[:11])


@pytest.mark.parametrize("what", ["hooks", "select", "record", "observe", "timed"])
def test_what_looks_into_steps_is_refused(model, what):
    session = in_stages(model, [1], 3).session()
    with pytest.raises(PydsaError, match="runs in stages, in other processes"):
        if what == "hooks":
            from pydsa.executor.hooks import Observer
            session.hooks = [Observer(print)]
        elif what == "select":
            session.select = lambda choice: []
        elif what == "record":
            session.record()
        elif what == "observe":
            session.prefill([1], observe=print)
        else:
            session.timed([1])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=7), Sampling(seed=7, top_k=5, logit_bias={3: 1.5, 4: False})])
def test_a_sampler_goes_elsewhere(sampling):
    """Its state makes an equal one, and the first one follows it."""
    rng, here, alone = np.random.default_rng(1), Sampler(sampling), Sampler(sampling)
    for i in range(6):
        logits = rng.normal(size=50).astype(np.float32)
        there = Sampler.restored(here.state())
        here.follow()
        assert there.pick(logits) == alone.pick(logits)
    with pytest.raises(PydsaError, match="damaged"):
        Sampler.restored({"sampling": {}, "random": {}})


def answers(model, n_parallel, requests):
    """What an Engine answers to requests that come at once."""
    engine, heard = Engine(model, n_parallel=n_parallel), queue.Queue()
    try:
        for i, request in enumerate(requests):
            engine.submit(Request(listener=lambda event, i=i: heard.put((i, event)) if isinstance(event, (Finished, Failed)) else None,
                                  **request))
        return {i: event.reply.text for i, event in (heard.get(timeout=60) for _ in requests)}
    finally:
        engine.close()


def test_answers_of_an_engine(model):
    """Groups are under way together; each is that of the request alone."""
    requests = [dict(ids=IDS[i:i + n], max_tokens=6, sampling=Sampling(seed=i, temperature=0.0 if i % 2 else 1.0),
                     **({"n_logprobs": 2} if i == 3 else {})) for i, n in enumerate([40, 3, 70, 5, 9, 33, 2])]
    expected = {i: model.complete(request["ids"], 6, seed=i, temperature=request["sampling"].temperature).text
                for i, request in enumerate(requests)}
    staged = in_stages(model, [1], 3)
    assert answers(staged, 4, requests) == expected and staged.runner.most == 3
