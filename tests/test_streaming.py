"""Experts that are copied to a device for prompts: what is copied and when, the same results, and what ends it.

The reference stands in for a GPU beside the CPU: its slots are filled by threads.
"""
import re
import threading

import numpy as np
import pytest
from helpers import nmse, random_ids
from rewritten import fused_experts, rewrite, with_factors

import pydsa
from pydsa.backends import host, reference
from pydsa.engine.batch import Batch
from pydsa.errors import OutOfMemoryError, PydsaError
from pydsa.executor import streaming
from pydsa.executor.segments import cut
from pydsa.executor.streaming import NEVER, Delivery, deliveries
from pydsa.setup import Setup

N = 53      # tokens: three ubatches of 16, and one of 5, which is shorter than FROM
FROM = 8
PLACEMENT = dict(device="reference", cpu_moe=True, n_ctx=100, n_ubatch=16)
IDS = random_ids(N)


@pytest.fixture(autouse=True)
def few_experts_are_worth_it(monkeypatch):
    monkeypatch.setattr(streaming, "WORTH", 0)


@pytest.fixture
def log(monkeypatch):
    """What is done with the slots, in order: (what, name of the tensor)."""
    events = []
    fill, ready, release = host.Slot.fill, host.Filling.ready, host.Slot.release

    def noted_fill(self, tensor):
        events.append(("fill", tensor.name))
        self.noted = tensor.name
        return fill(self, tensor)

    def noted_ready(self):
        events.append(("ready", self._tensor.name))
        ready(self)

    def noted_release(self):
        events.append(("release", self.noted))
        release(self)
    monkeypatch.setattr(host.Slot, "fill", noted_fill)
    monkeypatch.setattr(host.Filling, "ready", noted_ready)
    monkeypatch.setattr(host.Slot, "release", noted_release)
    return events


@pytest.mark.parametrize("options, streamed", [
    ({}, 6), (dict(n_cpu_moe=2, cpu_moe=False), 3), (dict(cpu_moe=False, override_tensor=["ffn_down_exps=cpu"]), 2),
    (dict(cpu_moe=False, override_tensor=["ffn_.*=cpu"]), 6), (dict(device="reference,cpu", tensor_split="2,1"), 3), (dict(mmap=False), 6),
    (dict(attention="dense"), 6), (dict(attention="masked"), 6)])
def test_logits_are_those_without(small_model, load, log, options, streamed):
    """Full ubatches copy each matrix once, the short one and tokens none.

    Those of the last layer only where its logits are wanted. The caches that both write fit together.
    """
    path, options = small_model(), PLACEMENT | options
    attention = {key: options[key] for key in ("attention",) if key in options}
    expected = load(path, n_ctx=100, n_ubatch=16, **attention).logits(random_ids(N + 3))
    model = load(path, stream_from=FROM, **options)
    assert nmse(model.logits(IDS), expected[:N]).max() < 1e-6
    assert sum(what == "fill" for what, _ in log) == 3 * streamed
    log.clear()
    session = model.session()
    session.prefill(IDS)
    of_last = len({a.name for device, _, a in model.setup.streaming.arrivals if a.name.startswith("blk.2.")})
    assert len(log) == 9 * (streamed - of_last)
    decoded = [session.decode(token) for token in random_ids(N + 3)[N:]]
    assert len(log) == 9 * (streamed - of_last) and nmse(np.array(decoded), expected[N:]).max() < 1e-6


def test_other_forms_of_experts(small_model, load, log, tmp_path):
    """Gate and up in one tensor; factors beside them.

    With factors gate and up are products of their own.
    """
    path = small_model()
    fused = rewrite(path, tmp_path / "fused.gguf", tensors=fused_experts(path))
    scaled = rewrite(path, tmp_path / "scaled.gguf", tensors=with_factors())
    for other in (fused, scaled):
        expected = load(other, n_ctx=100, n_ubatch=16).logits(IDS)
        log.clear()
        assert nmse(load(other, stream_from=FROM, **PLACEMENT).logits(IDS), expected).max() < 1e-6
        assert sum(what == "fill" for what, _ in log) == 18


def test_copies_are_in_the_order_of_use(small_model, load, log):
    """The first of each slot starts with the step, others as slots are free.

    A product waits only for its own weights.
    """
    model = load(small_model(), stream_from=FROM, **PLACEMENT)
    model.session().logits(IDS[:16])
    gate, up, down = ([f"blk.{il}.ffn_{part}_exps.weight" for il in (1, 2)] for part in ("gate", "up", "down"))
    expected = [("fill", gate[0]), ("fill", up[0]), ("fill", down[0])]
    for il in range(2):
        more = il == 0
        expected += [("ready", gate[il]), ("ready", up[il]), ("release", gate[il]), *[("fill", gate[1])] * more,
                     ("release", up[il]), *[("fill", up[1])] * more,
                     ("ready", down[il]), ("release", down[il]), *[("fill", down[1])] * more]
    assert log == expected


def test_a_weight_in_use_is_not_overwritten(small_model):
    setup = Setup(small_model(), stream_from=FROM, **PLACEMENT)
    tensor = setup.weights.used["blk.1.ffn_up_exps.weight"]
    slot = reference.Slot(setup.streaming.slots["reference"]["ffn_up_exps.weight"])
    filling = slot.fill(tensor)
    filling.ready()
    np.testing.assert_array_equal(slot.weight(tensor), reference.weight(tensor))
    with pytest.raises(RuntimeError, match="in use"):
        slot.fill(tensor)
    slot.release()
    slot.fill(tensor).ready()


def test_deliveries_follow_one_another():
    slots = [object(), object()]
    first, second, third = deliveries([(slots[0], "a"), (slots[1], "b"), (slots[0], "c")])
    assert [d.first for d in (first, second, third)] == [True, True, False]
    assert first.following is third and second.following is third.following is None and isinstance(third, Delivery)


def test_streamed_nodes_have_segments_of_their_own(small_model):
    setup = Setup(small_model(), stream_from=FROM, attention="sparse", **PLACEMENT)
    segments = setup.streaming.layouts["sparse"].segments
    assert {segment.device for segment in segments} == {"reference"}
    alone = [segment.nodes[0][1].name for segment in segments
             if any(node.op in ("moe_gate_up", "moe_down") for _, node in segment.nodes)]
    assert alone == [f"ffn_moe_{part}-{il}" for il in (1, 2) for part in ("swiglu", "out")]
    times = [time for segment in segments for time, _ in segment.nodes]
    assert times == sorted(times) and len(times) == len(setup.layouts["sparse"].graph.nodes)
    shared = next(i for i, segment in enumerate(segments) if segment.nodes[0][1].name == "ffn_gate_shexp-1")
    assert segments[shared + 1].nodes[0][1].name == "ffn_moe_swiglu-1"       # it runs while the weights are on their way
    nodes = setup.layouts["sparse"].graph.nodes
    assert len(cut(nodes, ["reference"] * len(nodes))) == 1


def test_slots_are_counted(small_model, load):
    """Experts are not on the GPU but in its slots, each of the largest weight."""
    model = load(small_model(n_ff_exp=32, n_ff=88), stream_from=FROM, **PLACEMENT)
    memory, on = model.setup.memory, model.runner.on["reference"]
    assert memory["reference"].slots == model.setup.slot_bytes == sum(slot._memory.nbytes for slot in on.slots.values())
    assert model.setup.slot_bytes == 3 * 8 * 72 * 32 * 4
    assert memory["cpu"].slots == 0 and not model.runner.on["cpu"].slots
    assert not any("exps" in name for name in on.weights) and len(on.slots) == 3
    model.session().prefill(IDS)
    assert not any("exps" in name for name in on.weights)
    assert memory["reference"].values == on._buffer.nbytes + sum(array.nbytes for array in on.outputs.values())
    plain = Setup(model.metadata.path, **PLACEMENT).memory
    assert plain["reference"].total < memory["reference"].total and plain["reference"].copied == memory["reference"].copied


@pytest.mark.parametrize("options", [
    dict(stream_from=0), dict(stream_from=17), {}, dict(stream_from=4, device="cpu"), dict(stream_from=4, cpu_moe=False),
    dict(stream_from=4, cpu_moe=False, override_tensor=["attn_=cpu"])])
def test_nothing_is_streamed(small_model, options):
    """Not asked for, beyond the ubatch, or no bus to measure.

    Or there is no device to stream to, or no experts are on the CPU.
    """
    setup = Setup(small_model(), **PLACEMENT | options)
    assert setup.streaming == NEVER and setup.slot_bytes == 0


def test_few_experts_are_not_worth_it(small_model, monkeypatch):
    """Unless they are asked for."""
    few = dict(PLACEMENT, device="cuda")
    n_bytes = sum(tensor.data.nbytes for _, _, tensor in Setup(small_model(), **few).streaming.arrivals)
    for worth, slots in ((n_bytes, True), (n_bytes + 1, False)):
        monkeypatch.setattr(streaming, "WORTH", worth)
        assert bool(Setup(small_model(), **few).slot_bytes) == slots and Setup(small_model(), stream_from=4, **few).slot_bytes


@pytest.mark.parametrize("value", [-1, True, 3.0, "8"])
def test_bad_numbers_are_one_sentence(small_model, value):
    with pytest.raises(PydsaError, match=re.escape(f"stream_from is {value!r}, expected tokens")):
        Setup(small_model(), stream_from=value, **PLACEMENT)


# An interrupt, errors and damage

def test_an_interrupt_while_weights_are_copied(small_model, load, monkeypatch):
    """The session is as before; the next step's weights are its own."""
    model, calls = load(small_model(), stream_from=FROM, **PLACEMENT), []
    expected, ready = model.logits(IDS), host.Filling.ready

    def interrupted(self):
        calls.append(self._tensor.name)
        if len(calls) == 8:     # in the second ubatch, with one weight of the product there
            raise KeyboardInterrupt
        ready(self)
    monkeypatch.setattr(host.Filling, "ready", interrupted)
    session = model.session()
    with pytest.raises(KeyboardInterrupt):
        session.logits(IDS)
    assert session.n_past == 16 and not any(slot._in_use for slot in model.runner.on["reference"].slots.values())
    np.testing.assert_allclose(session.prefill(IDS[16:]), expected[-1], rtol=1e-6)


def test_an_interrupt_by_a_hook_in_a_product(small_model, load):
    model = load(small_model(), stream_from=FROM, **PLACEMENT)
    session, expected = model.session(), model.logits(IDS)[-1]

    def stop(node, arrays):
        if node.name == "ffn_moe_out-2":
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        session.prefill(IDS, observe=stop)
    assert not any(slot._in_use for slot in model.runner.on["reference"].slots.values())
    np.testing.assert_allclose(session.prefill(IDS), expected, rtol=1e-6)


def test_errors_of_the_copy_reach_the_caller(small_model, load, monkeypatch):
    model, threads = load(small_model(), stream_from=FROM, **PLACEMENT), []
    expected, session = model.logits(IDS)[-1], model.session()

    def fails(tensor):
        threads.append(threading.current_thread())
        raise OutOfMemoryError("no memory for the copy")
    for slot in model.runner.on["reference"].slots.values():
        monkeypatch.setattr(slot, "_make", fails)
    with pytest.raises(OutOfMemoryError, match="for the copy"):
        session.prefill(IDS)
    assert session.n_past == 0 and threading.current_thread() not in threads
    monkeypatch.undo()
    np.testing.assert_allclose(session.prefill(IDS), expected, rtol=1e-6)


def test_damaged_experts_are_named(small_model, load, tmp_path):
    def damage(tensor):
        data = tensor.data.copy()
        if tensor.name == "blk.2.ffn_down_exps.weight":
            data[:] = np.nan
        return [(tensor.name, data, tensor.tensor_type)]
    model = load(rewrite(small_model(), tmp_path / "damaged.gguf", tensors=damage), stream_from=FROM, **PLACEMENT)
    session = model.session()
    with pytest.raises(pydsa.DamagedWeightsError, match="'blk.2.ffn_down_exps.weight' has"):
        session.pick(session.prefill(IDS[:16]), pydsa.sampling.Sampler(None))
    assert not any(slot._in_use for slot in model.runner.on["reference"].slots.values())


# What looks into steps, and steps of several sessions

def test_recordings_and_hooks_see_the_same(small_model, load):
    path = small_model()
    routes = []
    for options in ({}, dict(stream_from=FROM)):
        session = load(path, **PLACEMENT | options).session()
        seen = []
        with session.record() as recording:
            session.prefill(IDS[:40], observe=lambda node, arrays: seen.append((node.name, node.op)))
        routes.append(([recording.experts[il] for il in (1, 2)], sorted(seen)))
    np.testing.assert_array_equal(*(found[0] for found in routes))
    assert routes[0][1] == routes[1][1]


def test_steps_of_several_sessions(small_model, load, log):
    model = load(small_model(), stream_from=FROM, **PLACEMENT)
    parts = IDS[:5], IDS[5:12], IDS[20:23]
    expected = [load(small_model(), n_ctx=100, n_ubatch=16).session().prefill(part) for part in parts]
    sessions = [model.session() for _ in parts]
    got = Batch(model.runner, model.setup).run(sessions, parts)        # 15 tokens; the last layer has three
    assert sum(what == "fill" for what, _ in log) == 3 and nmse(np.array(got), np.array(expected)).max() < 1e-6
    log.clear()
    Batch(model.runner, model.setup).run(sessions, [[7], [8], [9]])
    assert not log


def test_timed_steps_copy_too(small_model, load, log):
    model = load(small_model(), stream_from=FROM, **PLACEMENT)
    session = model.session()
    times = session.timed(IDS[:16])
    assert sum(what == "fill" for what, _ in log) == 3 and {"moe_gate_up", "moe_down"} <= {node.op for node, _ in times}
    np.testing.assert_allclose(session.prefill(IDS[16:]), model.logits(IDS)[-1], rtol=1e-6)


def test_copies_come_from_memory_of_the_process(small_model, load, monkeypatch):
    """Without mmap: not from the file."""
    model, filled, fill = load(small_model(), stream_from=FROM, mmap=False, **PLACEMENT), [], host.Slot.fill
    monkeypatch.setattr(host.Slot, "fill", lambda self, tensor: filled.append(tensor) or fill(self, tensor))
    model.session().logits(IDS[:16])
    mapped = model.setup.weights.used
    assert len(filled) == 6 and not any(np.shares_memory(tensor.data, mapped[tensor.name].data) for tensor in filled)
    assert all(np.shares_memory(tensor.data, model.runner.on["cpu"].weights[tensor.name].data) for tensor in filled)
