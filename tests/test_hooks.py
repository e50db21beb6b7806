"""Hooks see and change what a step computes; looking changes nothing."""
import numpy as np
import pytest
from helpers import random_ids

from pydsa import PydsaError, selections
from pydsa.engine.batch import Batch
from pydsa.executor.hooks import Hook

IDS = random_ids(40)       # top_k is 12


class Choices(Hook):
    """Copy what the indexers and routers choose: {name: arrays}, in the order of the steps."""

    def __init__(self, late):
        self.late, self.seen = late, {}

    def wants(self, node):
        return node.op in ("indexer_select", "moe_route")

    def after(self, call):
        self.seen.setdefault(call.node.name, []).append((call.positions.copy(), *(call.read(i).copy() for i in range(call.node.n_out))))


def run(session, hooks):
    session.hooks = hooks
    return np.stack([session.prefill(IDS[:30]), *(session.decode(token) for token in IDS[30:34])])


def observed(session):
    """What an observer of all ops sees of them."""
    seen = {}

    def observe(node, arrays):
        if node.op in ("indexer_select", "moe_route"):
            seen.setdefault(node.name, []).append([a.copy() for a in arrays])
    for ids in (IDS[:30], *([token] for token in IDS[30:34])):
        session.prefill(ids, observe=observe)
    return seen


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("late", [False, True])
def test_choices_are_seen_as_they_were_made(small_model, load, device, late):
    model = load(small_model(n_layer=2), attention="sparse", device=device)
    expected, hook, session = run(model.session(), ()), Choices(late), model.session()
    assert np.array_equal(run(session, (hook,)), expected)
    every = observed(model.session())
    assert every.keys() == hook.seen.keys() and len(every) >= 3
    for name, steps in hook.seen.items():
        assert [positions.tolist() for positions, *_ in steps] == [list(range(30)), [30], [31], [32], [33]]
        for (_, *mine), theirs in zip(steps, every[name], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    session.hooks = ()
    session.decode(IDS[34])
    assert all(len(steps) == 5 for steps in hook.seen.values())


class Recent(Hook):
    """Let tokens attend to the newest keys, in place of the chosen ones."""

    def wants(self, node):
        return node.op == "sparse_attention"

    def before(self, call):
        first = np.maximum(call.positions + 1 - call.read(3).shape[1], 0)
        keys = first[:, None] + np.arange(call.read(3).shape[1])
        call.write(3, np.where(keys > call.positions[:, None], -1, keys).astype(np.int32))      # -1 fills the end of a row


class Seen(Hook):
    def __init__(self):
        self.keys = []

    def wants(self, node):
        return node.op == "sparse_attention"

    def before(self, call):
        self.keys.append(call.read(3).copy())


def test_a_choice_can_be_replaced(small_model, load):
    model, seen = load(small_model(n_layer=2), attention="sparse"), Seen()
    changed = run(model.session(), (Recent(), seen))
    assert (seen.keys[-1] == np.arange(22, 34)).all()
    assert not np.array_equal(changed[-1], run(model.session(), ())[-1])
    reference = run(load(small_model(n_layer=2), attention="sparse", device="reference").session(), (Recent(),))
    assert ((changed - reference) ** 2).sum() < 1e-6 * (reference ** 2).sum()


class Order(Hook):
    """Note when after() comes."""

    def __init__(self, name, notes, late):
        self._name, self._notes, self.late = name, notes, late

    def wants(self, node):
        return node.name == self._name

    def after(self, call):
        self._notes.append(self._name)


def test_late_hooks_wait_in_sessions_that_have_run(small_model, load):
    """The step of one token that ran without them does not serve again."""
    session, notes = load(small_model(n_layer=2), attention="sparse").session(), []
    session.prefill(IDS[:20])
    session.decode(IDS[20])
    session.hooks = Order("indexer_top_k-0", notes, True), Order("result_output", notes, False)
    session.decode(IDS[21])
    assert notes == ["result_output", "indexer_top_k-0"]


def test_progress_comes_beside_hooks(small_model, load):
    session, hook, done = load(small_model(n_layer=2), attention="sparse").session(), Choices(True), []
    session.hooks = hook,
    session.prefill(IDS[:20], lambda *numbers: done.append(numbers))
    assert done == [(0, 20), (10, 20), (20, 20), (20, 20)] and hook.seen


def test_what_is_no_hook_is_refused(small_model, load):
    session = load(small_model(n_layer=2)).session()
    for wrong in (3, Recent):
        with pytest.raises(PydsaError, match="session.hooks has .*, expected objects of hooks.Hook"):
            session.hooks = [wrong]
    assert session.hooks == () and session.decode(1).size


def test_batches_refuse_hooks(small_model, load):
    model = load(small_model(n_layer=2), attention="sparse")
    sessions, other = [model.session(), model.session()], model.session()
    sessions[1].hooks = Choices(False),
    other.variant = "sparse"
    for together in (sessions, [sessions[0], other]):
        with pytest.raises(PydsaError, match="with hooks or a variant of its own"):
            Batch(model.runner, model.setup).run(together, [[1], [2]])


def test_a_session_with_a_variant_of_its_own(small_model, load):
    model, seen = load(small_model(n_layer=2)), Seen()
    session = model.session()
    session.hooks, session.variant = (seen,), "sparse"
    session.prefill(IDS[:5])        # fewer tokens than top_k, of which the schedule lets no indexer choose
    assert [keys[-1].tolist() for keys in seen.keys] == [[0, 1, 2, 3, 4] + [-1] * 7] * 2
    session.variant = None
    session.prefill(IDS[5:7])
    assert session.variant is None and len(seen.keys) == 2
    with pytest.raises(PydsaError, match="variant is 'mask', expected one of "):
        session.variant = "mask"
    session.variant = "dense+keys"
    with pytest.raises(PydsaError, match="variant is 'dense.keys', which takes no list of keys"):
        session.select = selections.sliding_window(3)
    session.variant, session.select = "sparse", selections.sliding_window(3)
    with pytest.raises(PydsaError, match="takes no list of keys"):
        session.variant = "dense+keys"
    session.prefill(IDS[7:9])
    assert session.variant == "sparse" and seen.keys[-1][-1].tolist() == [6, 7, 8] + [-1] * 9
