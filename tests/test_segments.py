"""Segments and what crosses between them: each node on a device by chance gives the logits of one device.

Two of the devices work late (tests/late.py): what is read or overwritten too early is seen.
"""
import random

import late
import numpy as np
import pytest
from helpers import nmse, random_ids

import pydsa
from pydsa import setup
from pydsa.errors import DamagedWeightsError
from pydsa.executor.placement import Placement

CLOSE = 1e-10       # NMSE of float32 and float64 sums, which choose the same keys and experts
IDS = random_ids(40)
SPECS = {
    "deepseek32": dict(),
    "glm-dsa with shared layers": dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS", indexer_top_k=16, exp_probs_b=False, seed=3),
    "deepseek2 without groups": dict(arch="deepseek2", n_lora_q=0, expert_gating_func="softmax", n_expert_groups=0,
                                     expert_weights_norm=False, n_expert_shared=2, exp_probs_b=False, seed=5)}


class Random(Placement):
    """Each layer's caches, and each node without one, on a device by chance."""

    def __init__(self, names, n_layer, seed):
        self.random = random.Random(seed)
        super().__init__(self.random.choices(names, k=n_layer))
        self.names = names

    @property
    def devices(self):
        return tuple(dict.fromkeys((*self.layers, *self.names)))

    def of_nodes(self, nodes, streaming=False):
        often = self.random.random()        # how often the device changes
        found, last = [], self.random.choice(self.names)
        for node in nodes:
            last = self.random.choice(self.names) if self.random.random() < often else last
            found.append(super()._of_node(node, {}) if node.of_one_context else last)
        return found


def at_random(monkeypatch, seed, names=("cpu", *late.NAMES)):
    queues = late.install(monkeypatch, seed)
    monkeypatch.setattr(setup.Placing, "place", lambda placing, layers: Random(names, len(layers), seed))
    return queues


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("attention", ["auto", "masked", "dense"])
@pytest.mark.parametrize("seed", [2, 4])
def test_any_placement_gives_the_logits_of_one_device(small_model, load, monkeypatch, spec, attention, seed):
    """Steps of 1 to 17 tokens, with logits of none, of the last, of all."""
    if spec.get("arch") == "deepseek2" and attention == "masked":
        attention = "auto"
    path = small_model(**spec)
    expected = load(path, attention=attention, n_ctx=48).logits(IDS)
    at_random(monkeypatch, seed)
    model = pydsa.load(path, attention=attention, n_ctx=48, n_ubatch=17, threads=1, kv_type="f32")
    assert set(model.setup.placement.devices) == {"cpu", *late.NAMES}
    session, found = model.session(), {}
    with np.errstate(invalid="raise"):      # nothing computes with what has not arrived
        for n, wanted in ((17, 17), (1, 1), (2, 2), (4, 1), (1, 1), (3, 2)):
            start = session.n_past
            for i, row in enumerate(session.logits(IDS[start:start + n], last=wanted)):
                found[start + n - wanted + i] = row
        session.prefill(IDS[28:37])       # ubatches: 9
        session.truncate(19)
        found.update({39: session.prefill(IDS[19:])})      # 17 without logits, then 4
    assert nmse(list(found.values()), expected[list(found)]).max() < CLOSE


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("missing", ["finish", "settle"])
def test_late_devices_notice_what_is_too_early(small_model, load, monkeypatch, missing):
    """The test above can fail: without waiting for copies, logits are wrong."""
    path, wrong = small_model(), 0
    expected = load(path, n_ctx=48).logits(IDS)
    for seed in range(8):
        with monkeypatch.context() as patch:
            at_random(patch, seed, ("reference", *late.NAMES))      # compiled code would follow wild indices
            patch.setattr(late.Transfer, missing, lambda transfer: None)
            model = pydsa.load(path, n_ctx=48, n_ubatch=17, threads=1, kv_type="f32")
            try:
                wrong += not nmse(model.logits(IDS), expected).max() < CLOSE
            except (DamagedWeightsError, IndexError):       # NaN, or the index of no expert, was read
                wrong += 1
    assert wrong
