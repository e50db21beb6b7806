"""Experts that are copied to a device for prompts: what is copied and when, the same results, and what ends it.

The reference stands in for a GPU beside the CPU: its slots are filled by threads.
"""
import re
import threading

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import nmse, random_ids
from rewritten import fused_experts, rewrite, with_factors

import pydsa
from pydsa import plan
from pydsa.backends import devices, host, reference
from pydsa.backends.devices import simulated_gpus
from pydsa.batch import Batch
from pydsa.bench import Bench
from pydsa.cli import main
from pydsa.errors import OutOfMemoryError, PydsaError
from pydsa.fitting import MARGIN, fitted, longest_context
from pydsa.limits import Memory
from pydsa.report import describe, format_report
from pydsa.segments import cut
from pydsa.setup import Setup
from pydsa.streaming import ASSUMED, NEVER, Delivery, deliveries, pays_from

N = 53      # tokens: three ubatches of 16, and one of 5, which is shorter than FROM
FROM = 8
PLACEMENT = dict(device="reference", cpu_moe=True, n_ctx=100, n_ubatch=16)
IDS = random_ids(N)


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
    """Full ubatches copy each matrix once, the short one and single tokens none.

    The caches that both write fit together.
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
    assert len(log) == 9 * streamed
    decoded = [session.decode(token) for token in random_ids(N + 3)[N:]]
    assert len(log) == 9 * streamed and nmse(np.array(decoded), expected[N:]).max() < 1e-6


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
    model.session().prefill(IDS[:16])
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
        session.prefill(IDS)
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
    got = Batch(model.runner, model.setup).run(sessions, parts)        # 15 tokens
    assert sum(what == "fill" for what, _ in log) == 6 and nmse(np.array(got), np.array(expected)).max() < 1e-6
    log.clear()
    Batch(model.runner, model.setup).run(sessions, [[7], [8], [9]])
    assert not log


def test_timed_steps_copy_too(small_model, load, log):
    model = load(small_model(), stream_from=FROM, **PLACEMENT)
    session = model.session()
    times = session.timed(IDS[:16])
    assert sum(what == "fill" for what, _ in log) == 6 and {"moe_gate_up", "moe_down"} <= {node.op for node, _ in times}
    np.testing.assert_allclose(session.prefill(IDS[16:]), model.logits(IDS)[-1], rtol=1e-6)


# From how many tokens on, and whether the slots fit

def arrivals_of(path):
    return Setup(path, stream_from=FROM, **PLACEMENT).streaming.arrivals


def test_what_pays_follows_from_the_rates(small_model):
    """By hand: two layers of 8 experts, 2 a token, of 3 matrices of 72 x 36 float32."""
    arrivals, values = arrivals_of(small_model()), 3 * 72 * 36
    n_bytes = 2 * 8 * values * 4
    assert sum(tensor.data.nbytes for _, _, tensor in arrivals) == n_bytes
    seconds_a_token = 2 * 2 * 2 * values / (0.5 * 1e9)      # layers, experts, multiply and add; half of the peak is reached
    rates = ASSUMED._replace(bus={"reference": n_bytes / (20.5 * seconds_a_token)}, bandwidth=1e15, peak=1e9)
    assert pays_from(arrivals, rates, 100) == pays_from(arrivals, rates, 21) == 21
    assert pays_from(arrivals, rates, 20) == 0 == pays_from([], rates, 100)
    # where the host's memory is slow, copies pay as soon as half of the experts are chosen: 1 - (3/4)^n >= 1/2
    assert pays_from(arrivals, rates._replace(bandwidth=1e3, bus={"reference": 2e3}), 100) == 3


def test_what_pays_is_monotone(small_model):
    arrivals = arrivals_of(small_model())

    def found(bus=1.0, bandwidth=2.0, peak=1e9):
        n = pays_from(arrivals, ASSUMED._replace(bus={"reference": bus * 1e6}, bandwidth=bandwidth * 1e6, peak=peak), 4096)
        return n or 10_000
    for option, values in (("bus", (10, 1, 0.1, 0.01)), ("bandwidth", (0.1, 1, 10)), ("peak", (1e6, 1e7, 1e8, 1e10, 1e12))):
        tokens = [found(**{option: value}) for value in values]
        assert tokens == sorted(tokens) and len(set(tokens)) > 1, (option, tokens)


class Bus:
    """What a backend's measure_bus() tells."""

    def __init__(self, route):
        self.streamed, self.pinned = route, 2 * route


@pytest.fixture
def with_a_bus(monkeypatch):
    """with_a_bus(rate): the reference as a device behind a bus of so many bytes a second, and the CPU of known rates."""
    def make(rate):
        monkeypatch.setitem(devices.DEVICES, "reference", devices.DEVICES["reference"]._replace(bus=True))
        monkeypatch.setattr(reference, "measure_bus", lambda: rate and Bus(rate))
        cpu = devices.backend_of("cpu")
        monkeypatch.setattr(cpu, "measure_ceilings", lambda threads: type(
            "Ceilings", (), {"bandwidth": 1e15, "peaks": dict.fromkeys(("f32", "int16", "int8x2", "bf16x2"), 1e9)}))
    return make


@pytest.mark.parametrize("rate, stream_from", [(3.9e8, 11), (9.5e8, 5), (1e6, 0), (None, 0)])
def test_the_rates_are_measured_on_load(small_model, with_a_bus, rate, stream_from):
    with_a_bus(rate)
    path = small_model()
    assert Setup(path, **PLACEMENT).slot_bytes
    model = pydsa.load(path, threads=1, **PLACEMENT)
    assert model.setup.streaming.stream_from == stream_from == model.runner.streaming.stream_from
    assert bool(model.setup.slot_bytes) == bool(model.runner.on["reference"].slots) == bool(stream_from)


def test_slots_that_do_not_fit(small_model, with_a_bus, monkeypatch):
    """The model is loaded without, and says so; asked for, it is refused. -c 0 finds a context then too."""
    with_a_bus(1e9)
    path = small_model()
    whole = Setup(path, **PLACEMENT)
    for missing, streams in ((0, True), (1, False)):
        monkeypatch.setattr(plan.limits, "available", lambda: Memory(whole.total_bytes - missing, "memory are free"))
        if streams:
            assert pydsa.load(path, threads=1, **PLACEMENT).setup.streaming.stream_from
            continue
        with pytest.warns(UserWarning, match="the slots for that, 0.0 GiB, do not fit there") as warned:
            model = pydsa.load(path, threads=1, **PLACEMENT)
        assert model.setup.streaming == NEVER and warned[0].filename == __file__
        with pytest.raises(OutOfMemoryError, match="would take"):
            pydsa.load(path, threads=1, stream_from=FROM, **PLACEMENT)
    settings = {key: value for key, value in PLACEMENT.items() if key != "n_ctx"}
    with pytest.raises(OutOfMemoryError):
        longest_context(path, stream_from=FROM, **settings)
    assert longest_context(path, **settings) == longest_context(path, stream_from=0, **settings)


# The command line: what info and bench tell

def test_info_tells_from_where_on(small_model, with_a_bus):
    with_a_bus(9.5e8)
    path = small_model()
    report = describe(Setup(path, **PLACEMENT))
    assert report["memory"]["slots"] == Setup(path, **PLACEMENT).slot_bytes
    assert report["streaming"] == {"stream_from": 5, "rates": "measured", "bytes": {"reference": 497664}, "bus_gbs": {"reference": 0.95},
                                   "bandwidth_gbs": 1e6, "peak_gops": 1.0}
    text = format_report(report)
    assert "experts on cpu: copied for ubatches of 5 tokens or more, 486.0 KiB to reference, and multiplied there\n" in text
    assert "  measured: 1 GB/s to reference; cpu reads 1000000 GB/s and does 1 GOP/s of products\n" in text
    assert "  slots              243.0 KiB  (for experts" in text
    with_a_bus(None)
    assert "  assumed: 55 GB/s to reference; cpu reads 106 GB/s" in format_report(describe(Setup(path, **PLACEMENT)))
    given = describe(Setup(path, stream_from=9, **PLACEMENT))
    assert given["streaming"]["stream_from"] == 9 and given["streaming"]["rates"] is None and "of 9 tokens or more" in format_report(given)
    with_a_bus(1e6)
    assert "never copied to the GPU, as cpu takes less time for ubatches of 16\n" in format_report(describe(Setup(path, **PLACEMENT)))
    assert describe(Setup(path, stream_from=0, **PLACEMENT))["streaming"] is None


def test_options_of_the_command_line(small_model):
    def run(*args):
        return CliRunner().invoke(main, ["info", str(small_model()), *args])
    assert run("--stream-from", "8").exit_code == run("--no-op-offload").exit_code == 0
    done = run("--stream-from", "-8")
    assert done.exit_code == 2 and "stream_from is -8, expected tokens" in done.output and "Traceback" not in done.output


def test_bench_shows_the_bound_of_the_bus(small_model, with_a_bus):
    """The bound: the tokens a second if the copies took all of the time."""
    with_a_bus(1e9)
    model = pydsa.load(small_model(), threads=1, stream_from=FROM, **PLACEMENT)
    bench = Bench([N, 5], [2], [0], 1)
    rows = list(bench.run(model))
    n_bytes = 3 * 497664
    assert [row["streamed_bytes"] for row in rows] == [n_bytes, None, None] and rows[0]["bus_gbs"] == 2
    assert rows[0]["limit_ts"] == pytest.approx(N / (n_bytes / 2e9))
    assert rows[0]["share_of_limit"] == pytest.approx(rows[0]["avg_ts"] / rows[0]["limit_ts"])
    assert rows[1]["limit_ts"] is None and len({tuple(row) for row in rows}) == 1


# Plans

def rooms(n_bytes):
    """GPUs with n_bytes beside what is reserved and left free."""
    return simulated_gpus([devices.DEVICES["cuda"].reserved + MARGIN + n_bytes])


def test_plans_have_room_for_slots(small_model):
    """Slots come before experts, and after layers; more memory never puts less on the GPU."""
    path, options = small_model(n_layer=5, n_ff_exp=144, n_ctx=1024), dict(n_ctx=512, n_ubatch=64)
    whole = fitted(path, gpus=rooms(1 << 30), **options)
    assert whole.slot_bytes == 0 and not whole.plan.notes
    slots = fitted(path, gpus=rooms(1 << 30), cpu_moe=True, **options)
    plain = fitted(path, gpus=rooms(1 << 30), cpu_moe=True, stream_from=0, **options)
    assert 0 < slots.slot_bytes == slots.memory["cuda"].slots < slots.plan.shares[0].scratch and "slots of" in slots.plan.notes[-1]
    assert plain.slot_bytes == 0 and not plain.plan.notes

    def needed(setup):
        return setup.plan.shares[0].total - devices.DEVICES["cuda"].reserved
    before = -1
    at = sorted({needed(whole), needed(slots), needed(plain), *range(0, needed(whole), needed(whole) // 8)})
    for n in [n + d for n in at for d in (-1, 0)]:
        setup = fitted(path, gpus=rooms(max(0, n)), **options)
        on_gpu = sum(share.weights for share in setup.plan.shares if share.device == "cuda") if setup.plan else 0
        assert on_gpu >= before, (n, setup.plan)
        before = on_gpu
        if needed(plain) <= n < needed(slots):
            assert setup.placing.cpu_moe and setup.stream_from == 0 and "do not fit there" in setup.plan.notes[-1]
            assert set(setup.placement.layers) == {"cuda"}
        if needed(slots) <= n < needed(whole):
            assert setup.slot_bytes and set(setup.placement.layers) == {"cuda"}


def test_slots_on_devices_that_are_named(small_model):
    """Without room for them a model is placed without, unless they are asked for."""
    path, options = small_model(n_layer=5, n_ff_exp=144, n_ctx=1024), dict(n_ctx=512, n_ubatch=64, device="cuda", cpu_moe=True)
    taken = fitted(path, gpus=rooms(1 << 30), **options).plan.shares[0].total
    for n, streams in ((taken, True), (taken - 1, False)):
        setup = fitted(path, gpus=simulated_gpus([n]), **options)
        assert bool(setup.slot_bytes) == streams == ("do not fit" not in setup.plan.notes[-1])
    with pytest.raises(OutOfMemoryError, match="too few"):
        fitted(path, gpus=simulated_gpus([taken - 1]), stream_from=FROM, **options)


def test_the_longest_context_without_slots(small_model):
    """Where they leave less than a useful one, they are left out."""
    path = small_model(n_layer=5, n_ff_exp=144, n_ctx=65536)
    lengths = [longest_context(path, gpus=rooms(n), n_ubatch=64)[0] for n in (4 << 20, 6 << 20, 8 << 20, 24 << 20)]
    plain = [longest_context(path, gpus=rooms(n), n_ubatch=64, stream_from=0)[0] for n in (4 << 20, 6 << 20, 8 << 20, 24 << 20)]
    assert lengths[-1] < plain[-1] and all(n >= min(4096, other) for n, other in zip(lengths, plain))
