"""The last layer of a step computes only the rows whose logits are wanted."""
import numpy as np
import pytest
from helpers import nmse, random_ids

from pydsa.engine.batch import Batch
from pydsa.executor.hooks import Hook, layer_of
from pydsa.executor.schedule import MHA_TOKENS, ends_early

IDS = random_ids(150)
LAST = 3        # of the layers of the models here
MODELS = {"deepseek2": (dict(arch="deepseek2", n_layer=4), {}), "deepseek32": (dict(n_layer=4), {}),
          "sparse": (dict(n_layer=4), dict(attention="sparse")), "masked": (dict(n_layer=4), dict(attention="masked")),
          "a choice of an earlier layer": (dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS"), {}),
          "its mask": (dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS"), dict(attention="masked"))}
FOR_CACHES = {"inp_embd", "rope_table", "attn_norm", "kv_cmpr_pe", "kv_cmpr", "indexer_k_raw", "indexer_k"}     # all rows are needed


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("case", MODELS)
def test_logits_are_those_of_all_rows(small_model, load, case, device):
    """In prompts with and without the plain form, beyond top_k and below."""
    spec, options = MODELS[case]
    for n_ubatch in (16, 100):
        model = load(small_model(**spec), device=device, n_ubatch=n_ubatch, **options)
        session, expected = model.session(), model.logits(IDS)
        for start, stop in ((0, 9), (9, 120), (120, 150)):
            assert nmse(session.prefill(IDS[start:stop]), expected[stop - 1]) < 1e-9


def test_reproducible_logits_are_the_same_bits(small_model, load):
    """Also where something looks at all rows."""
    model = load(small_model(n_layer=4), n_ubatch=64, reproducible=True)
    expected, session = model.logits(IDS)[-1], model.session()
    with session.record():
        recorded = session.prefill(IDS)
    assert np.array_equal(model.session().prefill(IDS), expected) and np.array_equal(recorded, expected)


class Rows(Hook):
    """The rows that each op of the last layer and of the head writes."""

    def __init__(self, all_rows):
        self.all_rows, self.seen = all_rows, {}

    def wants(self, node):
        return layer_of(node) in (LAST, None) and bool(node.n_out)

    def after(self, call):
        self.seen[call.node.name.rpartition("-")[0] or call.node.name] = len(call.read(0))


@pytest.mark.parametrize("case", MODELS)
def test_rows_of_the_last_layer(small_model, load, case):
    """All for the caches, then those with logits; without any none follow."""
    spec, options = MODELS[case]
    model = load(small_model(**spec), n_ubatch=50, **options)
    session = model.session()
    for n_last, start in ((1, 0), (7, 50)):
        session.hooks = some, every = Rows(False), Rows(True)
        session.logits(IDS[start:start + 50], last=n_last)      # one of them needs all rows
        assert set(every.seen.values()) - {50} <= {n_last} and every.seen["ffn_out" if "ffn_out" in every.seen else "l_out"] == 50
        assert some.seen == every.seen and every.seen["result_output"] == n_last
    session.hooks = some = Rows(False),
    session.truncate(0)
    session.logits(IDS[:100], last=3)
    rows = some[0].seen
    assert {name: n for name, n in rows.items() if n != 3} == {name: 50 for name in FOR_CACHES & set(rows)}
    assert {"attn_out", "l_out", "result_output"} <= {name for name, n in rows.items() if n == 3}
    session.hooks = some = Rows(False),
    session.begin(IDS[:40], logits=np.empty((0, model.config.n_vocab), np.float32)).finish()
    assert set(some[0].seen) <= FOR_CACHES and set(some[0].seen.values()) == {40}


@pytest.mark.parametrize("case", ["deepseek32", "a choice of an earlier layer"])
def test_sessions_in_one_step(small_model, load, case):
    """Each attends to its own keys, whichever have several tokens."""
    spec, options = MODELS[case]
    model = load(small_model(**spec), n_ubatch=64, **options)
    parts = IDS[:20], IDS[50:51], IDS[90:120], IDS[3:5]
    alone, together = ([model.session() for _ in parts] for _ in range(2))
    for i, session in enumerate([*alone, *together]):
        session.prefill(random_ids(30, seed=i % 4))
    expected = [session.prefill(part) for session, part in zip(alone, parts)]
    assert nmse(np.array(Batch(model.runner, model.setup).run(together, parts)), np.array(expected)).max() < 1e-9


def test_when_it_pays():
    """With many logits the plain form can pay in the last layer too."""
    assert ends_early(2, 1) and ends_early(512, 0) and ends_early(512, MHA_TOKENS - 1)
    assert not ends_early(1, 1) and not ends_early(8, 8) and not ends_early(512, MHA_TOKENS)
