"""Recordings: what was chosen, in memory and in files."""
import numpy as np
import pytest
from helpers import random_ids

import pydsa
from pydsa.hooks import Hook

IDS = random_ids(60)       # top_k is 12


class Choices(Hook):
    """What the steps chose, by the names of nodes, in a plain way."""

    def __init__(self):
        self.seen = {}

    def wants(self, node):
        return node.op in ("indexer_select", "top_k", "moe_route")

    def after(self, call):
        for i in range(call.node.n_out):
            self.seen.setdefault((call.node.name, i), []).extend(call.read(i).copy())


def run(session):
    """A prompt in ubatches of 16, then tokens one by one."""
    session.prefill(IDS[:30])
    for token in IDS[30:40]:
        session.decode(token)


@pytest.mark.parametrize("device, attention, arch", [("cpu", "auto", "deepseek32"), ("cpu", "sparse", "glm-dsa"), ("cpu", "masked", "deepseek32"),
                                                     ("reference", "auto", "glm-dsa")])
def test_a_recording_has_what_was_chosen(small_model, load, device, attention, arch):
    model = load(small_model(arch=arch, n_layer=4), attention=attention, device=device, n_ubatch=16)
    session, seen = model.session(), Choices()
    session.hooks = seen,
    with session.record() as recording:
        run(session)
    assert recording.n == len(recording) == 40 and recording.n_left == 0 and recording.layers == [0, 1, 2, 3]
    assert recording.positions.tolist() == list(range(40)) and recording.tokens.tolist() == IDS[:40]
    assert recording.all_keys.tolist() == [False] * 40
