"""Costs of a step against counts by hand, and measured ceilings."""
import inspect
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from helpers import random_ids

from pydsa import bench

from pydsa.backends import cpu, reference
from pydsa.backends.cpu import ceilings as measured
from pydsa.bench import Bench, _op_costs, bytes_per_token, format_rows
from pydsa.cli.op_plot import OpPanels
from pydsa.executor import costs
from pydsa.executor.costs import StepSize, node_cost, step_cost
from pydsa.executor.graph import Graph
from pydsa.setup import Setup

OPS = sorted(name for name in vars(Graph) if not name.startswith("_") and name not in ("value", "last_rows", "hidden"))

# Numbers of float32 weights of conftest.SMALL. It has 3 layers: 1 dense, 2 with 8 experts (2 used) and a shared one.
ATTENTION = 72 * 40 + 40 + 72 * 68 + 56 + 40 * 3 * 32 + 3 * 56 * 20 + 3 * 28 * 56 + 3 * 28 * 72 + 2 * 72
INDEXER_KEY = 72 * 32 + 2 * 32
INDEXER = INDEXER_KEY + 40 * 8 * 32 + 72 * 8
DENSE, EXPERT, ROUTER = 3 * 72 * 88, 3 * 72 * 36, 72 * 8 + 8
HEAD = 300 * 72 + 72
FLOATS = 72 + 3 * ATTENTION + DENSE + 2 * (ROUTER + 3 * EXPERT) + HEAD      # without indexers; the first 72: a row of the embedding
LATENT, KEY = 68 * 2, 32 + 4        # bytes of cache rows: float16; int8 and a scale


@pytest.mark.parametrize("attention, n_past, floats, cache", [
    ("dense", 50, FLOATS, 51 * LATENT),
    ("sparse", 50, FLOATS + 3 * INDEXER, 12 * LATENT + 51 * KEY),
    ("sparse", 5, FLOATS + 3 * INDEXER, 6 * LATENT + 6 * KEY),
    ("masked", 50, FLOATS + 3 * INDEXER, 51 * LATENT + 51 * KEY),
    ("auto", 11, FLOATS + 3 * INDEXER_KEY, 12 * LATENT),        # dense, but index keys are stored
    ("auto", 12, FLOATS + 3 * INDEXER, 12 * LATENT + 13 * KEY),
])
def test_bytes_of_a_token(small_model, load, attention, n_past, floats, cache):
    model = load(small_model(), device="reference", kv_type="f16", attention=attention)
    assert bytes_per_token(model, n_past) == 4 * floats + 3 * cache


def test_layers_that_share_a_choice_have_no_indexer(small_model, load):
    model = load(small_model(arch="glm-dsa", indexer_types="FSF"), device="reference", kv_type="f16", attention="sparse")
    assert bytes_per_token(model, 50) == 4 * (FLOATS + 2 * INDEXER) + 3 * 12 * LATENT + 2 * 51 * KEY


def test_a_matrix_that_is_embedding_and_output_is_read_once(small_model, load):
    model = load(small_model(tied_output=True), device="reference", kv_type="f16", attention="dense")
    assert bytes_per_token(model, 50) == 4 * (FLOATS - 72) + 3 * 51 * LATENT


def nodes_by_name(planned, path):
    return {node.name or node.args[0].name: node for node in planned.layouts[path].graph.nodes}


def test_operations_and_bytes_of_nodes(small_model):
    """Costs of single nodes, for five tokens after ten.

    top_k, 12, leaves out keys of the last three tokens. Caches are float32, with rows of 68 and 32 values.
    """
    planned = Setup(small_model(), attention="sparse", kv_type="f32", n_ctx=100)
    step, nodes = StepSize(5, 10, planned.cache_row_bytes), nodes_by_name(planned, "sparse")
    pairs, chosen = 11 + 12 + 13 + 14 + 15, 11 + 12 + 12 + 12 + 12
    expected = {        # weights, cache, values, operations
        "inp_embd": (5 * 72 * 4, 0, 5 * 72 * 4, 0),
        "q_a-0": (72 * 40 * 4, 0, 0, 2 * 5 * 72 * 40),
        "kqv_out-1": (3 * 28 * 56 * 4, 0, 0, 2 * 5 * 3 * 28 * 56),
        "result_output": (300 * 72 * 4, 0, 0, 2 * 300 * 72),        # for the last token only
        "result_norm": (72 * 4, 0, 2 * 72 * 4, 0),
        "attn_norm-0": (72 * 4, 0, 2 * 5 * 72 * 4, 0),
        "l_out-0": (0, 0, 3 * 5 * 72 * 4, 0),
        "indexer_top_k-0": (0, 15 * 32 * 4, 0, 2 * pairs * 8 * 33),
        "kqv-0": (0, 12 * 68 * 4, 0, 2 * chosen * 3 * (68 + 56)),
        "ffn_moe_weights-1": (8 * 4, 0, 5 * (2 + 2 + 8) * 4, 0),
        "ffn_moe_swiglu-1": (2 * 2 * 72 * 36 * 4, 0, 0, 2 * 5 * 2 * 2 * 72 * 36),       # a lower bound: the experts of one token
        "ffn_moe_out-1": (2 * 72 * 36 * 4, 0, 0, 2 * 5 * 2 * 72 * 36),
    }
    assert {name: tuple(node_cost(nodes[name], step)) for name in expected} == expected
    write = next(n for n in planned.layouts["sparse"].graph.nodes if n.op == "cache_write")
    assert node_cost(write, step).values == 5 * (68 + 68) * 4 + 5 * 8      # the 8 bytes are a position


def test_masked_attention_reads_every_key(small_model):
    planned = Setup(small_model(), attention="masked", kv_type="f32", n_ctx=100)
    step, nodes = StepSize(5, 10, planned.cache_row_bytes), nodes_by_name(planned, "masked")
    pairs = 11 + 12 + 13 + 14 + 15
    assert node_cost(nodes["kqv-0"], step) == (0, 15 * 68 * 4, 0, 2 * pairs * 3 * (68 + 56))
    assert node_cost(nodes["indexer_score-0"], step) == (0, 15 * 32 * 4, 0, 2 * pairs * 8 * 33)
    assert node_cost(nodes["indexer_top_k-0"], step).values == 5 * 100 * 4 + 5 * 12 * 4


@pytest.mark.parametrize("n_tokens, n_past", [(1, 0), (1, 99), (7, 0), (7, 5), (30, 3), (30, 50)])
def test_pairs(n_tokens, n_past):
    step = StepSize(n_tokens, n_past, {})
    for most in (1, 6, 12, step.n_kv, 1000):
        assert step.pairs(most) == sum(min(most, n_past + t + 1) for t in range(n_tokens))


def test_experts_are_counted_from_the_ids(small_model, load):
    """Many tokens use all eight experts; one token uses two.

    So does the last of many in the last layer, which computes no other.
    """
    model = load(small_model(), kv_type="f32")
    session, expert = model.session(), EXPERT * 4 // 3        # bytes of one matrix of an expert
    for n, in_first in ((60, 8), (1, 2)):
        found, quantized = _op_costs(model, session, np.array(random_ids(n)))
        assert not quantized        # the model is F32
        assert found["moe_gate_up", "cpu"].weights == 2 * (in_first + 2) * expert
        assert found["moe_down", "cpu"].weights == (in_first + 2) * expert
        assert found["moe_down", "cpu"].operations == 2 * (n + 1) * 2 * 72 * 36


def test_a_step_is_the_sum_of_its_nodes(small_model):
    planned = Setup(small_model(), attention="sparse")
    nodes, step = planned.layouts["sparse"].graph.nodes, StepSize(5, 10, planned.cache_row_bytes)
    assert step_cost(nodes, step) == tuple(map(sum, zip(*(node_cost(node, step) for node in nodes))))


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_cost(op):
    mine, theirs = (list(inspect.signature(getattr(module, op)).parameters) for module in (costs, reference))
    assert mine == ["s", "args"] or mine == ["s", *theirs]


# Ceilings

def test_ceilings_are_numbers():
    found = cpu.measure_ceilings(1)
    assert found.bandwidth > 0 and found.peaks.keys() == measured.PEAKS.keys() and min(found.peaks.values()) > 0


def test_ceilings_take_half_of_a_small_memory(monkeypatch):
    seen = []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 24))
    monkeypatch.setattr(measured, "_best_seconds", lambda function, *args: seen.append(args) or 1.0)
    assert cpu.measure_ceilings(1).bandwidth == seen[0][1].nbytes == 1 << 23


def test_the_limit_of_several_devices(small_model, load, monkeypatch):
    """It is the sum of their times; an op has a row for each device.

    The rates of each row are of the device that runs it.
    """
    model = load(small_model(), kv_type="f16", device="reference", cpu_moe=True, override_tensor=["ffn_gate_inp=cpu"])
    unknown = list(Bench([4], [2], [0], 1).run(model))
    assert [[row[key] for key in ("limit_ts", "device_bytes", "device_bandwidth_gbs")] for row in unknown] == [[None] * 3] * 2
    rates = {"cpu": 2e9, "reference": 5e9}
    monkeypatch.setattr(reference, "product_format", cpu.product_format, raising=False)
    monkeypatch.setattr(bench, "_ceilings", lambda backend, threads: measured.Ceilings(
        rates[backend.__name__.rpartition(".")[2]], dict.fromkeys(measured.PEAKS, 1e12)))
    ops = []
    row = list(Bench([], [1], [50], 1).run(model, ops=ops))[0]
    on_cpu = 4 * 2 * (2 * EXPERT + ROUTER - 8)      # the vector of 8 is of moe_route, which follows no weight's rule
    assert row["backend"] == "reference+cpu" and row["device_bytes"]["cpu"] == on_cpu
    assert sum(row["device_bytes"].values()) == row["bytes_per_token"] == bytes_per_token(model, 50)
    seconds = on_cpu / 2e9 + row["device_bytes"]["reference"] / 5e9
    assert row["limit_ts"] == pytest.approx(1 / seconds) and row["share_of_limit"] == pytest.approx(row["avg_ts"] * seconds)
    assert row["bandwidth_gbs"] == pytest.approx(row["bytes_per_token"] / seconds / 1e9)
    linear = {found["device"]: found for found in ops if found["op"] == "linear"}
    assert linear["cpu"]["bytes"] == 4 * 2 * 72 * 8 and linear.keys() == rates.keys()
    assert all(found["bandwidth_gbs"] == rates[found["device"]] / 1e9 for found in ops) and len(ops) == len({*map(str, ops)})
    assert sum(found["share"] for found in ops) == pytest.approx(1)
    panels = OpPanels(ops)
    assert panels.share(panels.steps("n_gen")[0][1], "linear") == pytest.approx(sum(found["share"] for found in linear.values()))
    first, second = (f"{row['device_bytes'][name] / 1e6:.3g}" for name in ("reference", "cpu"))
    assert f"| {first} + {second} |" in format_rows([row], "md") and "device" in format_rows(ops, "md")


@pytest.mark.parametrize("n_threads", [1, 3])
def test_what_is_timed_is_done(n_threads):
    cpu.set_threads(n_threads)
    words, sums = np.empty(3 * measured.BLOCK, np.uint64), np.empty(3, np.uint64)
    measured.fill(sums, words)
    measured.read(sums, words)
    assert sums.tolist() == [0, measured.BLOCK, 2 * measured.BLOCK]
    sums = np.zeros(2, np.float32)
    products = measured.ROWS * measured.VECTORS * measured.WIDTH
    measured.f32_peak(sums, 3)
    assert sums.tolist() == [3 * products] * 2
