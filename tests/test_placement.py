"""Models over several devices: where nodes go, how the graph is cut, and that the results are those of one device.

The reference stands in for a second device beside the CPU.
"""
import re

import numpy as np
import pytest
from helpers import nmse, random_ids

from pydsa.errors import PydsaError
from pydsa.executor.graph import Graph, waits
from pydsa.executor.placement import Placement
from pydsa.executor.segments import crossings, cut
from pydsa.fitting import fitted
from pydsa.machine.limits import Memory
from pydsa.setup import Setup
from pydsa.words import placement_in_words, plan_in_words, size

N = 60
PLACEMENTS = {
    "experts on the CPU": dict(device="reference", cpu_moe=True),
    "experts of a layer on the CPU": dict(device="reference", n_cpu_moe=2),
    "layers": dict(device="cpu,reference"),
    "layers, split unevenly": dict(device="reference,cpu", tensor_split="3,1"),
    "layers and experts": dict(device="reference,cpu", cpu_moe=True),
    "all feed-forward": dict(override_tensor=["ffn_.*=reference"]),
    "products of attention": dict(override_tensor=["attn_=reference"]),
    "single weights": dict(override_tensor=["attn_k_b=reference", "blk.1.ffn_gate_exps=reference", "norm=reference", "ffn_down=reference",
                                            "indexer.proj=reference"]),
    "ends": dict(override_tensor=["^(token_embd|output)=reference"])}


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
def test_logits_are_those_of_one_device(small_model, load, options):
    """Prompts and single tokens; top_k is far below the length."""
    path = small_model()
    expected = load(path, n_ctx=100, n_ubatch=16).logits(random_ids(N))
    model = load(path, n_ctx=100, n_ubatch=16, **options)
    assert len(model.setup.placement.devices) == 2 and nmse(model.logits(random_ids(N)), expected).max() < 1e-6
    session = model.session()
    session.prefill(random_ids(N)[:-10])
    decoded = [session.decode(token) for token in random_ids(N)[-10:]]
    assert nmse(np.array(decoded), expected[-10:]).max() < 1e-6


def cut_of(path, **options):
    """The segments of a model's sparse variant, as {device: names of nodes}."""
    layout = Setup(path, attention="sparse", **options).layouts["sparse"]
    return layout, [(segment.device, [node.name for _, node in segment.nodes]) for segment in layout.segments]


def test_the_shared_expert_runs_while_the_others_do(small_model):
    """What the CPU waits for comes first, then the rest, then the CPU."""
    _, segments = cut_of(small_model(), device="reference", cpu_moe=True)
    devices = [device for device, _ in segments]
    i = devices.index("cpu")
    assert devices[i - 2:i + 2] == ["reference", "reference", "cpu", "reference"]
    assert segments[i - 2][1][-1].startswith("ffn_moe_weights-") or "ffn_moe_topk" in segments[i - 2][1][-1]
    assert segments[i - 1][1] == [name for name in segments[i - 1][1] if "shexp" in name] != []
    assert all("ffn_moe" in name for name in segments[i][1])


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_node_comes_behind_what_it_waits_for(small_model, options):
    layout, _ = cut_of(small_model(), **options)
    nodes = layout.graph.nodes
    time = {id(node): (i, t) for i, segment in enumerate(layout.segments) for t, node in segment.nodes}
    assert len(time) == len(nodes)
    for node, others in zip(nodes, waits(nodes)):
        assert all(time[id(nodes[j])] < time[id(node)] for j in others)
    times = [t for segment in layout.segments for t, _ in segment.nodes]
    assert times == sorted(times)


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
def test_only_what_is_needed_crosses(small_model, options):
    """Nothing crosses twice, or to where it is; at the end only some rows."""
    layout, _ = cut_of(small_model(), **options)
    found = crossings(layout.segments, (layout.graph.input, layout.graph.positions))
    assert found and all(layout.segments[c.source].device != layout.segments[c.target].device and c.source < c.target for c in found)
    places = [(c.value, layout.segments[c.target].device, c.source, c.only_outputs) for c in found]
    assert len(set(places)) == len(places)
    if options.get("device") == "cpu,reference" and len(options) == 1:
        assert {re.sub(r"-\d+$", "", c.value.name) for c in found} <= {"rope_table", "l_out", "ffn_inp", "indexer_topk"}
    if "ends" == next(name for name, other in PLACEMENTS.items() if other is options):
        assert [c.only_outputs for c in found if c.target == len(layout.segments) - 1] == [True]


def test_a_value_written_on_two_devices_is_whole_on_both():
    """Parts of a value, written on two devices, are one value on both."""
    graph = Graph(16)
    x = graph.value("x-0", 8)
    parts = [graph.rms_norm(None, graph.value(f"y{i}-0", 4), np.ones(4), 1e-6, into=x.slice(4 * i, 4 * i + 4)) for i in range(2)]
    graph.scale(x, 2.0)
    segments = cut(graph.nodes, ["cpu", "reference", "cpu"])
    assert [segment.device for segment in segments] == ["cpu", "reference", "cpu"] and len(parts) == 2
    names = [(c.value.name, c.source, c.target) for c in crossings(segments, ())]
    assert names == [("x-0", 0, 1), ("x-0", 1, 2)]


@pytest.mark.parametrize("options, words", [
    (dict(device="gpu"), "device is 'gpu', expected one of 'cpu', 'cuda'"),
    (dict(device="cpu1"), "device is 'cpu1'"), (dict(device=""), "device is ''"), (dict(device="cuda1000"), "device is 'cuda1000'"),
    (dict(device="cpu,cpu"), "expected different devices"), (dict(device="cuda,cuda0"), "expected different devices"),
    (dict(device=3), "device is 3"), (dict(device=[]), "device is []"),
    (dict(override_tensor=["exps"]), "override_tensor has 'exps', expected REGEX=DEVICE"),
    (dict(override_tensor=["(=reference"]), "'(' is no regular expression"),
    (dict(override_tensor=["exps=gpu"]), "the device of override_tensor is 'gpu', expected one of"),
    (dict(override_tensor=["exps=cpu,reference"]), "the device of override_tensor is 'cpu,reference', expected one of"),
    (dict(override_tensor=3), "override_tensor is 3, expected a list"), (dict(override_tensor=[3]), "override_tensor has 3, expected"),
    (dict(override_tensor=[("exps",)]), "override_tensor has ('exps',), expected"), (dict(override_tensor={"a": "cpu"}), "expected a list"),
    (dict(override_tensor=[("a", "cpu", "cpu")]), "override_tensor has ("),
    (dict(override_tensor=["no_such=reference"]), "No weight of the model has a name that matches 'no_such'"),
    (dict(tensor_split="1"), None), (dict(tensor_split="1,1"), "tensor_split has 2 numbers, expected 1"),
    (dict(device="cpu,reference", tensor_split="0,0"), "not all 0"),
    (dict(device="cpu,reference", tensor_split="a,1"), "tensor_split is 'a,1'"),
    (dict(device="cpu,reference", tensor_split=[-1, 1]), "tensor_split is"),
    (dict(device="cpu,reference", tensor_split="nan,1"), "tensor_"),
    (dict(n_cpu_moe=999), None), (dict(n_cpu_moe=-1), "n_cpu_moe is -1"),
    (dict(n_cpu_moe=True), "n_cpu_moe is True"), (dict(cpu_moe="yes"), "cpu_moe is 'yes'"),
    (dict(device="reference", cpu_moe=True, reproducible=True), "reference cannot promise"),
    (dict(device="reference", mlock=True), "reference has its own copy"), (dict(device="reference", cpu_moe=True, mlock=True), None)])
def test_bad_options_are_one_sentence(small_model, options, words):
    if words is None:
        Setup(small_model(n_layer=3), **options)
        return
    with pytest.raises(PydsaError, match=re.escape(words)):
        Setup(small_model(n_layer=3), **options)


def test_more_layers_than_there_are(small_model):
    """As with -ngl 999, all are meant."""
    path, options = small_model(n_layer=3), dict(device="reference")
    many, every = (Setup(path, n_cpu_moe=999, **options), Setup(path, cpu_moe=True, **options))
    assert many.memory == every.memory and set(many.memory) == {"reference", "cpu"}
    assert Setup(path, n_cpu_moe=10**6, n_gpu_layers=10**6, **options).memory == every.memory


def test_devices_in_one_memory_have_one_free(small_model, monkeypatch):
    """Each of them would tell too much, were only its own part taken off."""
    monkeypatch.setattr("pydsa.machine.limits.available", lambda: Memory(1 << 40, "memory are free"))
    shares = fitted(small_model(n_layer=3), device="cpu,reference").plan.shares
    assert len(shares) == 2 and {share.free for share in shares} == {(1 << 40) - sum(share.total for share in shares)}


def test_what_is_mapped_and_what_is_copied(small_model):
    """The reference maps the file too, and has it all as floats."""
    plan = fitted(small_model(n_layer=3), device="cpu,reference").plan
    lines, reference = plan_in_words(plan), plan.shares[1]
    assert " mapped  " in lines[1] and "+" not in lines[1]
    assert f" {size(reference.mapped)} mapped + {size(reference.weights)}  " in lines[2]


def test_one_weight_elsewhere(small_model):
    words = placement_in_words(Setup(small_model(n_layer=3), override_tensor="blk.1.attn_norm=reference"))
    assert words["reference"] == "1 other weight"


def test_the_first_rule_counts():
    place = Placement(["reference"] * 2, [(re.compile("up_exps"), "cpu"), (re.compile("exps"), "reference")])
    assert place.devices == ("reference", "cpu")
    assert [place._by_rule(f"blk.1.ffn_{part}_exps.weight") for part in ("up", "down")] == ["cpu", "reference"]
    assert place._by_rule("blk.1.ffn_norm.weight") is None


def test_memory_is_counted_for_each_device(small_model, load):
    """What is counted for a device is what is allocated there."""
    model = load(small_model(), n_ctx=100, n_ubatch=16, device="reference", cpu_moe=True)
    model.session().prefill(random_ids(20))
    for name, memory in model.setup.memory.items():
        on = model.runner.on[name]
        assert memory.mapped == sum(model.setup.file.tensors[tensor].data.nbytes for tensor in on.weights)
        assert memory.values == on._buffer.nbytes + sum(array.nbytes for array in on.outputs.values())
        assert memory.caches == sum(cache.nbytes for cache in model.session().caches.values()
                                    if cache._backend is on.backend)
    assert all("_exps" in name for name in model.runner.on["cpu"].weights) and model.setup.memory["cpu"].caches == 0
    assert model.setup.total_bytes == sum(memory.total for memory in model.setup.memory.values())
