"""From how many tokens on experts are copied to a device: rates, memory, plans, and what info and bench tell."""
import re

import pytest
from click.testing import CliRunner
from test_streaming import FROM, N, PLACEMENT

import pydsa
from pydsa.backends import devices, reference
from pydsa.backends.devices import simulated_gpus
from pydsa.bench import Bench
from pydsa.cli import main
from pydsa.cli.report import describe, format_report
from pydsa.errors import OutOfMemoryError
from pydsa.executor import plan, streaming
from pydsa.executor.streaming import ASSUMED, NEVER, bytes_for_slots, pays_from
from pydsa.fitting import MARGIN, fitted, longest_context
from pydsa.machine.limits import Memory
from pydsa.setup import Setup
from pydsa.words import size


@pytest.fixture(autouse=True)
def few_experts_are_worth_it(monkeypatch):
    monkeypatch.setattr(streaming, "WORTH", 0)


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
        monkeypatch.setattr(reference, "measure_bus", lambda n_bytes=0: rate and Bus(rate))
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
        with pytest.warns(UserWarning, match="slots and values for that, [0-9.]+ [KM]iB, do not fit there") as warned:
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
    n_bytes = 3 * 497664 // 2       # not those of the last layer
    assert [row["streamed_bytes"] for row in rows] == [n_bytes, None, None] and rows[0]["bus_gbs"] == 2
    assert rows[0]["limit_ts"] == pytest.approx(N / (n_bytes / 2e9))
    assert rows[0]["share_of_limit"] == pytest.approx(rows[0]["avg_ts"] / rows[0]["limit_ts"])
    assert rows[1]["limit_ts"] is None and len({tuple(row) for row in rows}) == 1


# Plans

def rooms(n_bytes):
    """GPUs with n_bytes beside what is reserved and left free."""
    return simulated_gpus([devices.DEVICES["cuda"].reserved + MARGIN + n_bytes])


def test_plans_have_room_for_slots(small_model):
    """Slots come before experts, and after layers.

    More memory never puts less on the GPU.
    """
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


def test_what_does_not_fit_is_told_without_slots(small_model):
    """They need not fit: neither what is missing counts them, nor what would fit instead."""
    path, options = small_model(n_layer=5, n_ff_exp=144, n_ctx=1024), dict(n_ctx=512, n_ubatch=64)
    least = fitted(path, gpus=rooms(1 << 30), cpu_moe=True, stream_from=0, **options).plan.shares[0].total
    with pytest.raises(OutOfMemoryError, match=rf"would take {re.escape(size(least))} on cuda, .* -ngl [1-4] --cpu-moe fits\.$"):
        fitted(path, gpus=rooms(least - devices.DEVICES["cuda"].reserved - 1), n_gpu_layers="all", **options)


def test_the_options_of_a_plan_without_slots_give_it_again(small_model):
    """Devices that are named keep no margin, and would have slots there."""
    path, options = small_model(n_layer=5, n_ff_exp=144, n_ctx=1024), dict(n_ctx=512, n_ubatch=64)
    least = fitted(path, gpus=rooms(1 << 30), cpu_moe=True, stream_from=0, **options).plan.shares[0].total
    gpus = rooms(least - devices.DEVICES["cuda"].reserved)
    found = fitted(path, gpus=gpus, cpu_moe=True, **options)
    assert found.plan.options == "--device cuda --cpu-moe --stream-from 0" and found.slot_bytes == 0
    assert fitted(path, gpus=gpus, device="cuda", cpu_moe=True, **options).slot_bytes
    assert fitted(path, gpus=gpus, device="cuda", cpu_moe=True, stream_from=0, **options).plan.shares == found.plan.shares


def test_slots_on_devices_that_are_named(small_model):
    """Without room for them there are none, unless they are asked for."""
    path, options = small_model(n_layer=5, n_ff_exp=144, n_ctx=1024), dict(n_ctx=512, n_ubatch=64, device="cuda", cpu_moe=True)
    taken = fitted(path, gpus=rooms(1 << 30), **options).plan.shares[0].total
    for n, streams in ((taken, True), (taken - 1, False)):
        setup = fitted(path, gpus=simulated_gpus([n]), **options)
        assert bool(setup.slot_bytes) == streams == ("do not fit" not in setup.plan.notes[-1])
        assert streams or bytes_for_slots(setup.streamed_from(None), setup) == taken - setup.plan.shares[0].total > 0
    note = fitted(path, gpus=rooms(1 << 30), stream_from=FROM, **options).plan.notes[-1]
    assert f"to the GPU from {FROM} tokens on, through slots of" in note
    with pytest.raises(OutOfMemoryError, match="too few"):
        fitted(path, gpus=simulated_gpus([taken - 1]), stream_from=FROM, **options)


def test_the_longest_context_without_slots(small_model):
    """Where they leave less than a useful one, they are left out."""
    path = small_model(n_layer=5, n_ff_exp=144, n_ctx=65536)
    lengths = [longest_context(path, gpus=rooms(n), n_ubatch=64)[0] for n in (4 << 20, 6 << 20, 8 << 20, 24 << 20)]
    plain = [longest_context(path, gpus=rooms(n), n_ubatch=64, stream_from=0)[0] for n in (4 << 20, 6 << 20, 8 << 20, 24 << 20)]
    assert lengths[-1] < plain[-1] and all(n >= min(4096, other) for n, other in zip(lengths, plain))
