"""Plans of what goes to GPUs: they fit, more memory never puts less there, and options are obeyed.

No GPU is needed: sizes are given. Where a planned model runs, the reference stands in for a GPU.
"""
import json
import re
import warnings

import numpy as np
import pytest
from helpers import nmse, random_ids
from test_cli import pydsa

from pydsa import fitting

from pydsa.backends import devices
from pydsa.backends.devices import DEVICES, HOST, device_of, simulated_gpus
from pydsa.backends.gpus import Usable
from pydsa.errors import OutOfMemoryError, PydsaError
from pydsa.executor.fit import balanced
from pydsa.fitting import MARGIN, Fitting, fitted, longest_context
from pydsa.loading import ready
from pydsa.machine import limits
from pydsa.options import size_in_bytes
from pydsa.words import plan_in_words

SPEC = dict(n_layer=5, n_layer_dense=1, n_ff_exp=144, n_ctx=8192)
RESERVED = DEVICES["cuda"].reserved
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_devices_of_the_environment(monkeypatch):
    monkeypatch.delenv("PYDSA_DEVICE", raising=False)


@pytest.fixture
def plan(small_model):
    """plan(1 << 20, ..., **options) -> the Setup for GPUs with such rooms.

    A room is bytes beside what is reserved and left free. There are no slots for experts, unless stream_from says so.
    """
    def make(*rooms, **options):
        gpus = simulated_gpus([RESERVED + MARGIN + room for room in rooms])
        return fitted(small_model(**SPEC), gpus=gpus, **dict(n_ctx=512, n_ubatch=64, stream_from=0) | options)
    return make


def on_gpus(setup):
    """Bytes of weights on GPUs."""
    return sum(share.weights for share in setup.plan.shares if device_of(share.device).reserved)


def needed(setup):
    """Bytes on each GPU beside what is reserved."""
    return {share.device: share.total - RESERVED for share in setup.plan.shares if device_of(share.device).reserved}


def fits(setup):
    return all(share.free is None or share.free >= MARGIN for share in setup.plan.shares)


def test_more_memory_never_puts_less_on_the_gpu(plan):
    whole = needed(plan(GIB))["cuda"]
    before, options = -1, set()
    for room in range(0, whole + whole // 10, whole // 12):
        setup = plan(room)
        assert fits(setup) and on_gpus(setup) >= before
        before = on_gpus(setup)
        options.add(setup.plan.options)
    assert {"--device cpu", "--device cuda", "--device cuda --cpu-moe"} <= options
    assert any("-ngl" in text for text in options) and any("--n-cpu-moe" in text for text in options)


def test_a_byte_decides(plan):
    """The memory that a plan takes is enough for it, and a byte less is not."""
    for options in {}, dict(cpu_moe=True), dict(n_cpu_moe=3), dict(n_gpu_layers=2, cpu_moe=True):
        setup = plan(GIB, **options)
        room = needed(setup)["cuda"]
        assert plan(room).plan.options == setup.plan.options.replace("--n-cpu-moe 5", "--cpu-moe")
        assert on_gpus(plan(room - 1)) < on_gpus(setup)


def test_what_is_said_is_what_is_done(plan):
    """Its options give its placement; its figures are those of the Setup."""
    for room in 0, 1 << 21, 3 << 21, GIB:
        setup = plan(room)
        words = setup.plan.options.split()
        given = dict(zip(words[::2], words[1::2])) if len(words) % 2 == 0 else dict(zip(words[:-1:2], words[1:-1:2]))
        again = plan(GIB, device=given["--device"], n_gpu_layers=int(given["-ngl"]) if "-ngl" in given else None,
                     n_cpu_moe=int(given.get("--n-cpu-moe", 0)), cpu_moe="--cpu-moe" in words)
        assert again.placement.layers == setup.placement.layers and again.memory == setup.memory
        for share in setup.plan.shares:
            memory = setup.memory[share.device]
            assert (share.mapped, share.weights, share.caches) == (memory.mapped, memory.copied, memory.caches)
            assert share.total == memory.total + device_of(share.device).reserved


def test_gpus_of_different_sizes(plan):
    whole = needed(plan(GIB))["cuda"]
    before = 0
    for part in 0, 0.3, 0.7, 1.1:
        setup = plan(int(0.5 * whole), int(part * whole))
        assert fits(setup) and on_gpus(setup) >= before
        before = on_gpus(setup)
        homes = [name for name in setup.placement.layers if name != HOST]
        assert homes == sorted(homes)       # cuda, then cuda1: layers in ranges
    assert set(setup.placement.layers) == {"cuda", "cuda1"} and "-ts" in setup.plan.options
    assert plan(0, GIB).plan.options == "--device cuda1"


def test_layers_are_spread_by_what_is_free(plan):
    rooms = {share.device: share.weights for share in plan(3 * GIB, GIB, cpu_moe=True).plan.shares}
    assert rooms["cuda"] > 1.5 * rooms["cuda1"]
    setup = plan(GIB, GIB, tensor_split="4,1")
    assert setup.placement.layers == ("cuda",) * 4 + ("cuda1",)
    assert plan(GIB, GIB, tensor_split="1").placement.devices == ("cuda",)
    named = plan(GIB, GIB, device="cuda0,cuda1")
    assert set(named.placement.layers) == {"cuda", "cuda1"} and not named.plan.automatic


@pytest.mark.parametrize("sizes, rooms, ranges", [
    ([1, 1, 1, 1], [10, 10], [2, 2]), ([1, 1, 1, 1], [30, 10], [3, 1]), ([1, 1, 6, 6], [7, 13], [2, 2]), ([4, 1, 1], [0, 6], [0, 3]),
    ([1, 1], [5, 0], [2, 0]), ([5, 5, 1], [6, 5], [1, 2]), ([1], [0, 0], None), ([2, 2, 2], [float("inf"), 6], [2, 1])])
def test_ranges_of_layers(sizes, rooms, ranges):
    ratio, found = balanced(sizes, rooms)
    assert found == ranges and (found is None or sum(found) == len(sizes))
    if max(rooms) < float("inf") and found:
        ends = np.cumsum(found)
        filled = [sum(sizes[end - n:end]) / room for n, end, room in zip(found, ends, rooms) if room]
        assert ratio >= max(filled) * (1 - 1e-6) and ratio <= max(1.0, max(filled) * (1 + 1e-6))


def test_rules_of_the_user_are_obeyed(plan):
    setup = plan(1 << 22, override_tensor=[r"blk\.[12]\.ffn_(up|gate){1,2}_exps=CUDA0,ffn_down_exps=CPU"])
    assert setup.placement.of_weight("blk.2.ffn_up_exps.weight", 2) == "cuda"
    assert setup.placement.of_weight("blk.2.ffn_down_exps.weight", 2) == HOST and fits(setup)
    assert setup.plan.options.count("-ot ") == 2
    assert plan(3 << 20, n_gpu_layers=3).placement.layers.count("cuda") == 3
    assert plan(GIB, n_gpu_layers=99).placement.layers.count("cuda") == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(GIB, n_gpu_layers=0).plan is None
    assert plan(needed(plan(GIB, cpu_moe=True))["cuda"], n_gpu_layers="all").plan.options == "--device cuda -ngl all --cpu-moe"


def test_caches_of_all_conversations_are_counted(plan):
    one, four = (plan(GIB, n_sessions=n).plan.shares[0] for n in (1, 4))
    assert four.caches == 4 * one.caches and four.total - one.total == 3 * one.caches
    room = needed(plan(GIB))["cuda"]
    assert plan(room).plan.options == "--device cuda" != plan(room, n_sessions=4).plan.options


def test_models_that_share_a_gpu(plan):
    room = needed(plan(GIB))["cuda"]
    assert on_gpus(plan(room, n_models=2)) < on_gpus(plan(2 * room + RESERVED + MARGIN, n_models=2))


def test_the_longest_context_beside_all_layers(small_model):
    path = small_model(**SPEC | dict(n_ctx=65536))
    gpus = simulated_gpus([RESERVED + MARGIN + (24 << 20)])
    n_ctx, whole = longest_context(path, gpus=gpus, n_ubatch=64, stream_from=0)
    assert not whole and n_ctx % 256 == 0 and n_ctx >= fitting.LEAST
    setup = fitted(path, gpus=gpus, n_ctx=n_ctx, n_ubatch=64, stream_from=0)
    assert set(setup.placement.layers) == {"cuda"} and fits(setup)
    assert HOST in fitted(path, gpus=gpus, n_ctx=n_ctx + 512, n_ubatch=64, stream_from=0).placement.layers
    assert longest_context(path, gpus=gpus, n_ubatch=64, n_sessions=2)[0] < 0.6 * n_ctx
    small = simulated_gpus([RESERVED + MARGIN + (4 << 20)])
    assert longest_context(path, gpus=small, n_ubatch=64, stream_from=0) == (65536, True)      # some layers stay on the CPU
    assert longest_context(path, gpus=simulated_gpus([2 * GIB]), n_ubatch=64, stream_from=0) == (65536, True)
    filled = [gpu._replace(free=gpu.free - MARGIN) for gpu in gpus.values()]
    assert longest_context(path, gpus=dict(zip(gpus, filled)), n_ubatch=64, fit_margin=0, stream_from=0) == (n_ctx, False)


def test_what_does_not_fit_is_told_with_what_would(plan, small_model):
    room = needed(plan(GIB, cpu_moe=True))["cuda"]
    with pytest.raises(OutOfMemoryError) as error:
        plan(room - MARGIN, device="cuda")
    told = re.fullmatch(r"The model with a context of 512 tokens would take \S+ MiB on cuda, but \S+ MiB are free there, \S+ MiB too few; "
                        r"(--device .*) fits\.", str(error.value)) or re.search("(needs no GPU)", str(error.value))
    assert told
    with pytest.raises(OutOfMemoryError, match=r"are free there and 1.0 GiB shall stay so \(--fit-margin\), .* too few; "
                                               r"--device cuda --cpu-moe fits\.$"):
        plan(room, n_cpu_moe=2, n_gpu_layers="all")
    with pytest.raises(OutOfMemoryError, match="would take .* on cuda1, but 0 B are free there"):
        fitted(small_model(**SPEC), device="cuda,cuda1", tensor_split="1,1", gpus=simulated_gpus([GIB, 0]), n_ctx=512, n_ubatch=64)


def test_memory_of_the_host_is_counted(small_model, monkeypatch):
    monkeypatch.setattr(limits, "available", lambda: limits.Memory(1 << 20, "memory are free"))
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: simulated_gpus([0]))
    with pytest.raises(OutOfMemoryError, match="would take .* of memory, but 1.0 MiB are free, .* too few; ask for a smaller context"):
        fitted(small_model(**SPEC), n_ctx=8192)
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: simulated_gpus([8 * GIB]))
    plan = fitted(small_model(**SPEC), n_ctx=512, n_ubatch=16, cpu_moe=True).plan
    assert "more than the 1.0 MiB of memory that are free: what is not in memory comes from the drive" in plan.notes[0]


@pytest.mark.parametrize("options, words", [
    (dict(fit_margin="1 parsec"), "fit_margin is '1 parsec', expected a size such as 24GiB"), (dict(fit_margin=-1), "fit_margin is -1"),
    (dict(fit_margin="1024"), "fit_margin is '1024', which is 1024 bytes: give a unit"),
    (dict(fit_margin=True), "fit_margin is True"), (dict(fit_margin=None), "fit_margin is None"),
    (dict(n_gpu_layers=-2), "n_gpu_layers is -2, expected an integer from 0"), (dict(n_gpu_layers="some"), "n_gpu_layers is 'some'"),
    (dict(n_gpu_layers=True), "n_gpu_layers is True"), (dict(n_sessions=0), "n_sessions is 0"),
    (dict(device="cpu", n_gpu_layers=2), "cpu is among the devices"), (dict(tensor_split="1,1,1"), "tensor_split has 3 numbers"),
    (dict(tensor_split="x"), "tensor_split is 'x'"), (dict(tensor_split=3), "tensor_split is 3"),
    (dict(device="auto,cpu"), "device is 'auto,cpu'"), (dict(device="gpu"), "or 'auto'"), (dict(device=None), "device is None"),
    (dict(override_tensor=["exps=auto"]), "'auto', expected one of 'cpu', 'cuda', 'reference', or 'cuda1' for the second GPU."),
    (dict(override_tensor=["zz=cpu,exps=cpu"]), "matches 'zz'"),
    (dict(n_cpu_moe=1), "n_cpu_moe covers only layers without routed experts")])
def test_bad_options_are_one_sentence(plan, options, words):
    with pytest.raises(PydsaError, match=re.escape(words)) as error:
        plan(GIB, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_experts(small_model):
    """--cpu-moe moves nothing there; plans leave layers on the CPU."""
    path = small_model(arch="deepseek2", n_expert=0, n_expert_used=0, n_expert_shared=0, n_layer=3, n_layer_dense=3)
    with pytest.raises(PydsaError, match="The model has no routed experts: leave out --cpu-moe"):
        fitted(path, device="cpu", cpu_moe=True)
    whole = fitted(path, gpus=simulated_gpus([2 * GIB]), n_ctx=64, n_ubatch=16).plan.shares[0].total
    options = fitted(path, gpus=simulated_gpus([whole + MARGIN - 1]), n_ctx=64, n_ubatch=16).plan.options
    assert options.startswith("--device cuda -ngl ") and "moe" not in options


@pytest.mark.parametrize("text, n", [
    ("24GiB", 24 << 30), ("1.5g", 3 << 29), ("512 MiB", 512 << 20), ("1048576", 1 << 20), ("7B", 7), ("2GB", 2 * 10**9),
    (12, 12), ("0", 0), ("1TiB", 1 << 40)])
def test_sizes(text, n):
    assert size_in_bytes("x", text) == n


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "24 Gi B", "1_0", "\u0664GiB", "9" * 30, 1.5, None, False, "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(PydsaError, match="expected a size such as"):
        size_in_bytes("gpu_memory", text)


def test_gpus_are_looked_for_only_where_it_matters(small_model, monkeypatch):
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: 1 / 0)
    assert fitted(small_model(**SPEC), n_ctx=64, device=HOST, n_gpu_layers=0).placement.devices == (HOST,)
    monkeypatch.setenv("PYDSA_DEVICE", "reference")
    assert fitted(small_model(**SPEC), n_ctx=64).placement.devices == ("reference",)


def test_without_a_gpu_all_is_on_the_cpu(small_model, monkeypatch):
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: {})
    setup = fitted(small_model(**SPEC), n_ctx=64)
    assert setup.placement.devices == (HOST,) and setup.plan is None
    with pytest.warns(UserWarning, match="There is no GPU to use: n_gpu_layers and tensor_split without effect"):
        fitted(small_model(**SPEC), n_ctx=64, n_gpu_layers=99, tensor_split="3,1")
    with pytest.warns(UserWarning, match="There is no GPU to use: tensor_split without effect"):
        fitted(small_model(**SPEC), n_ctx=64, tensor_split=np.array([3.0, 1.0]))
    for options in dict(tensor_split="a,b"), dict(n_gpu_layers="3"), dict(n_gpu_layers=-1):     # what is wrong with a GPU is wrong without
        with pytest.raises(PydsaError, match=f"{[*options][0]} is .*, expected"):
            fitted(small_model(**SPEC), n_ctx=64, **options)


@pytest.mark.parametrize("options", [dict(reproducible=True), dict(mmap=False), dict(mlock=True)])
def test_options_that_keep_all_on_the_cpu(small_model, monkeypatch, options):
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: simulated_gpus([8 * GIB]))
    with pytest.warns(UserWarning, match="all runs on the CPU, and no GPU is used unless --device names one"):
        assert fitted(small_model(**SPEC), n_ctx=64, **options).placement.devices == (HOST,)
    if "reproducible" not in options:
        assert fitted(small_model(**SPEC), n_ctx=64, cpu_moe=True, **options).placement.devices == ("cuda", HOST)


def test_the_environment_says_what_auto_is(small_model, monkeypatch):
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: simulated_gpus([8 * GIB]))
    assert fitted(small_model(**SPEC), n_ctx=64).placement.devices == ("cuda",)
    monkeypatch.setenv("PYDSA_DEVICE", "reference")
    assert fitted(small_model(**SPEC), n_ctx=64).placement.devices == ("reference",)
    assert fitted(small_model(**SPEC), n_ctx=64, device=HOST).placement.devices == (HOST,)
    assert Fitting(small_model(**SPEC), gpus=simulated_gpus([GIB])).automatic
    monkeypatch.setenv("PYDSA_DEVICE", "tpu")
    with pytest.raises(PydsaError, match="PYDSA_DEVICE is 'tpu', expected one of"):
        fitted(small_model(**SPEC), n_ctx=64)


def test_the_simulator_is_used_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("pydsa.backends.gpus.SIMULATED", True)
    assert devices.usable_gpus(asked_for=False) == {} and list(devices.usable_gpus()) == ["cuda"]
    monkeypatch.setenv("PYDSA_SIMULATED_GPUS", "2")
    assert list(devices.usable_gpus(asked_for=False)) == ["cuda", "cuda1"]


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(room): the reference as a GPU of so many bytes."""
    monkeypatch.setitem(DEVICES, "reference", DEVICES["reference"]._replace(reserved=1 << 20))
    return lambda room: {"reference": Usable(0, "a stand-in", room, room)}


def test_planned_models_give_the_logits_of_one_device(small_model, load, stand_in):
    """All plans that there are for one model, as they come with more memory."""
    path, ids = small_model(**SPEC), random_ids(30)
    expected, seen = load(path, n_ctx=64, n_ubatch=16).logits(ids), {}
    for room in range(0, 9 << 20, 3 << 18):
        setup = fitted(path, gpus=stand_in(room), fit_margin=0, n_ctx=64, n_ubatch=16, kv_type="f32")
        if setup.plan.options not in seen:
            model = ready(setup, threads=1)
            seen[setup.plan.options] = nmse(model.logits(ids), expected).max()
            assert len(setup.plan.where) == 1 or all(f">{what}<" in model._repr_html_() for what in setup.plan.where.values())
    assert len(seen) >= 4 and max(seen.values()) < 1e-6


def test_a_gpu_that_is_gone_when_the_model_is_loaded(small_model, monkeypatch):
    monkeypatch.setattr("pydsa.backends.gpus.SIMULATED", True)
    setup = fitted(small_model(**SPEC), gpus={"cuda7": Usable(7, "gone", 8 * GIB, 8 * GIB)}, n_ctx=64)
    with pytest.raises(PydsaError, match="--device cuda|There is no GPU 7"):
        ready(setup)


def test_info_shows_the_plan_of_gpus_that_are_not_there(small_model):
    path = small_model(**SPEC)
    text = pydsa("info", path, "-c", "512", "--gpu-memory", "2GiB,1.7GiB", "--bandwidth", "50,500", "--fit-margin", "900MiB").stdout
    assert "as --device cuda" in text and "at 500 GB/s" in text and "tokens a second" in text and "assumed" not in text
    report = json.loads(pydsa("info", path, "-c", "512", "--gpu-memory", "2GiB", "-cmoe", "-o", "json").stdout)["plan"]
    assert [(device["device"], device["bandwidth"]) for device in report["devices"]] == [("cuda", 1e12), (HOST, 1e11)]
    assert report["bound_ts"] == pytest.approx(1 / sum(d["token_bytes"] / d["bandwidth"] for d in report["devices"]))
    assert report["options"] == "--device cuda --cpu-moe" and report["where"]["cpu"] == "experts of layers 1-4"
    assert "layers" in pydsa("info", path, "-c", "0", "--gpu-memory", "2GiB").stdout
    assert "memory on cpu," in pydsa("info", path, "-dev", "none").stdout


@pytest.mark.parametrize("args, words", [
    (["--gpu-memory", "2 apples"], "gpu_memory is '2 apples'"), (["--gpu-memory", "2GiB", "--device", "cpu"], "--gpu-memory is for plans"),
    (["--gpu-memory", "2GiB", "--bandwidth", "1"], "--bandwidth is '1'"), (["--bandwidth", "0,nan"], "--bandwidth is '0,nan'"),
    (["--gpu-memory", "24"], "which is 24 bytes: give a unit"), (["--bandwidth", "1,2"], "--bandwidth is for plans"),
    (["--gpu-memory", "2GiB", "--device", "cuda1"], "--gpu-memory has sizes for cuda, but not for cuda1"),
    (["--gpu-memory", "2GiB", "-ngl", "x"], "-ngl is 'x'"), (["--device", "tpu"], "device is 'tpu'"),
    (["--gpu-memory", "640MiB", "--device", "cuda"], "too few; "), (["-ot", "x"], "override_tensor has 'x'"),
    (["--gpu-memory", "2GiB", "-ts", "1,2"], "tensor_split has 2 numbers"), (["-mg", "0"], "-mg is an option of llama.cpp")])
def test_mistakes_end_with_a_sentence(small_model, args, words):
    result = pydsa("info", small_model(**SPEC), *args)
    assert result.exit_code == 2 and words in result.stderr and result.stdout == "" and "Traceback" not in result.stderr


def test_the_plan_is_printed_before_anything_is_loaded(small_model, monkeypatch):
    monkeypatch.setattr(fitting, "usable_gpus", lambda asked_for: simulated_gpus([0]))
    monkeypatch.setattr("pydsa.model.Model.__init__", lambda *args: 1 / 0)
    result = pydsa("bench", small_model(**SPEC), "-p", "1", "-n", "0")
    lines = result.stderr.splitlines()
    assert lines[1].split() == ["device", "weights", "caches", "scratch", "free"] and "as --device cpu (cpu: layers 0-4)" in lines
    assert isinstance(result.exception, ZeroDivisionError)


def test_lines_of_a_plan_are_aligned(plan):
    setup = plan(GIB, GIB, cpu_moe=True)
    table = plan_in_words(setup.plan)[:4]
    assert len({len(line) for line in table}) == 1 and setup.plan.where.keys() == {"cuda", "cuda1", HOST}
