"""Stages: texts of --stages, borders, and the division by bytes and bandwidth against all there are."""
import itertools

import numpy as np
import pytest

from pydsa import PydsaError
from pydsa.cli.report import token_bytes
from pydsa.errors import OutOfMemoryError
from pydsa.executor.costs import StepSize, step_cost
from pydsa.executor.schedule import HEAD
from pydsa.models.blocks import begins_a_stage
from pydsa.setup import Setup
from pydsa.stages.division import AUTO, Layers, Node, Parts, borders, check, divide, divided, parse
from pydsa.stages.forecast import Times

SHARED = dict(arch="glm-dsa", n_layer=10, indexer_types="FFFSSSFSSS")       # layers that share a choice of keys


@pytest.fixture(scope="module")
def setup(small_model):
    return Setup(small_model(n_layer=7))


@pytest.mark.parametrize("text, expected", [
    ("3", 3), (2, 2), (np.int64(2), 2), (" Auto ", AUTO), ("0-20,21-40, 41-60", ((0, 21), (21, 41), (41, 61))), ("0,1-2", ((0, 1), (1, 3))),
    ("4-4", ((4, 5),))])
def test_texts(text, expected):
    assert parse(text) == expected
    if isinstance(expected, tuple):
        assert [str(layers) for layers in parse(text)] == [part.strip() for part in str(text).replace("4-4", "4").split(",")]


@pytest.mark.parametrize("text, error", [
    ("", "stages is '', expected a number of stages such as 2, 'auto', or ranges"), (None, "stages is None"), (True, "stages is True"),
    ("0", "expected 1 to 1024"), (-1, "stages is '-1', expected a number"), ("2048", "a stage of the layer 2048 alone is 2048-2048"),
    ("0-3;4-6", "expected a number"), ("0-3,", "expected a number"), ("3-1,4-6", "stages has 3-1, expected a range whose first layer"),
    ("0-99999999999", "expected a number"), (2.0, "stages is 2.0"), ("٣", "expected a number")])
def test_texts_that_are_none(text, error):
    with pytest.raises(PydsaError, match=error):
        parse(text)


@pytest.mark.parametrize("text, error", [
    ("0-2,4-6", "stages has 4-6 after 0-2, expected a range that begins with layer 3"), ("1-6", "stages has 1-6, expected .* layer 0"),
    ("0-3,3-6", "begins with layer 4"), ("4-6,0-3", "begins with layer 0"), ("0-5", "ends with layer 5, expected 6, the model's last"),
    ("0-3,4-7", "ends with layer 7, expected 6")])
def test_ranges_that_are_no_stages_of_a_model(setup, text, error):
    check(parse("0-2,3-6"), setup.config)
    with pytest.raises(PydsaError, match=error):
        check(parse(text), setup.config)


def test_a_stage_begins_with_an_indexer_of_its_own(small_model):
    config = Setup(small_model(**SHARED)).config
    assert borders(config) == [0, 1, 2, 6] == [il for il in range(10) if begins_a_stage(config, il)]
    check(parse("0-1,2-5,6-9"), config)
    with pytest.raises(PydsaError, match="stage 2 begins with layer 4, which uses the keys that layer 2 chooses: .* with layer 2 or 6"):
        check(parse("0-3,4-9"), config)
    with pytest.raises(PydsaError, match="stage 3 begins with layer 8, which uses the keys that layer 6 chooses: .* with layer 6."):
        check(parse("0-1,2-7,8-9"), config)


def test_a_model_without_indexers_has_borders_everywhere(small_model):
    assert borders(Setup(small_model(arch="deepseek2", n_layer=4)).config) == [0, 1, 2, 3]


@pytest.mark.parametrize("spec", [dict(n_layer=7), dict(n_layer=7, tied_output=True), SHARED])
def test_parts_are_those_of_the_model(small_model, spec):
    setup = Setup(small_model(**spec))
    parts, n = Parts(setup, n_sessions=3), setup.config.n_layer
    whole = parts.share(Layers(0, n), Node("one", 1e9))
    assert whole.weights == setup.mapped_bytes + setup.copied_bytes and whole.caches == 3 * setup.cache_bytes
    assert whole.scratch == setup.total_bytes - setup.copied_bytes - setup.cache_bytes
    row = setup.file.tensors["token_embd.weight"].data.shape[1]
    assert whole.token == token_bytes(setup)["cpu"]
    twice = Parts(setup, head=-1).share(Layers(0, n), Node("", 1)).token - whole.token
    assert twice == ("output.weight" not in setup.file.tensors) * row       # a token reads a row of the embedding beside the head
    for layers, head in itertools.product((Layers(0, 2), Layers(2, n)), (0, -1)):
        half = Parts(setup, n_sessions=3, head=head).share(layers, Node("", 1))
        stage = Setup(small_model(**spec), layers=layers, head=head == (0 if layers.first == 0 else -1))
        assert half.weights == stage.mapped_bytes + stage.copied_bytes and half.caches == 3 * stage.cache_bytes
        nodes = [node for name in (setup.schedule.variant(setup.n_ctx - 1, 1), HEAD) if name in stage.graphs
                 for node in stage.graphs[name].nodes]
        cost = step_cost(nodes, StepSize(1, setup.n_ctx - 1, stage.cache_row_bytes))
        assert half.token == cost.weights + cost.cache
        assert half.scratch >= stage.total_bytes - stage.copied_bytes - stage.cache_bytes >= half.scratch / 2


def every_division(setup, n):
    """All divisions of a model into n stages."""
    for inner in itertools.combinations(borders(setup.config)[1:], n - 1):
        ends = [0, *inner, setup.config.n_layer]
        yield tuple(map(Layers, ends, ends[1:]))


@pytest.mark.parametrize("seed", range(12))
def test_the_division_is_the_best_of_all(small_model, seed):
    rng = np.random.default_rng(seed)
    setup = Setup(small_model(**SHARED) if seed % 3 == 0 else small_model(n_layer=7))
    n = int(rng.integers(1, 5))
    parts, whole = Parts(setup, 2), Parts(setup, 2).share(Layers(0, setup.config.n_layer), Node("", 1))
    room = rng.uniform(0.5, 1.8, n) * whole.total / n + parts.scratch
    nodes = [Node(f"node {i}", rate * 1e9, int(memory), products * 1e11) for i, (rate, products, memory) in enumerate(
        zip(rng.choice([1, 2, 5], n), rng.choice([1, 3], n), room))]
    fitting, n_past = {}, min(2048, setup.n_ctx - min(512, setup.n_ubatch))
    for ranges in every_division(setup, n):
        shares = [parts.share(*pair) for pair in zip(ranges, nodes)]
        if all(share.free >= 0 for share in shares):
            tokens, chunks = [share.seconds for share in shares], Times(setup, ranges, nodes).prompt(min(512, setup.n_ubatch), n_past)
            fitting[ranges] = max(tokens), max(chunks), sum(tokens), sum(chunks)
    if not fitting:
        with pytest.raises(OutOfMemoryError, match=rf"in {n} stages?, and the nodes? ha(s|ve) .* at best layers? \S+ would need"):
            divide(setup, nodes, 2)
    else:
        least = np.array(list(fitting.values()))[:, :2].min(0)
        costs = {ranges: (sum(np.array(times[:2]) / least), sum(np.array(times[2:]) / least)) for ranges, times in fitting.items()}
        found, best = costs[divide(setup, nodes, 2)], min(costs.values())
        assert found[0] == pytest.approx(best[0], rel=1e-5)
        assert found[1] == pytest.approx(min(whole for slowest, whole in costs.values() if slowest <= best[0] * (1 + 1e-5)), rel=1e-4)


def test_memory_and_the_file(setup):
    """Weights in the mapped file may be left to the drive; the rest may not."""
    parts, n = Parts(setup), setup.config.n_layer
    whole = parts.share(Layers(0, n), Node("", 1))
    small = [Node(f"node {i}", 1e9, (whole.total + parts.scratch) // 2 + parts.passing - whole.weights // 4) for i in (1, 2)]
    with pytest.raises(OutOfMemoryError, match="would need .* more on node [12]; take more or larger nodes"):
        divide(setup, small)
    assert len(divide(setup, small, mapped=False)) == 2
    with pytest.raises(OutOfMemoryError):
        divide(setup, [node._replace(memory=parts.scratch) for node in small], mapped=False)
    assert len(divide(setup, [node._replace(memory=None) for node in small])) == 2


def test_stages_that_are_asked_for(setup):
    nodes = [Node("a", 1e9), Node("b", 3e9)]
    assert divided(AUTO, setup, nodes) == divided(2, setup, nodes) == divide(setup, nodes)
    assert divided(parse("0-4,5-6"), setup, nodes) == ((0, 5), (5, 7))
    first, second = divide(setup, nodes)
    assert first.stop - first.first < second.stop - second.first       # the second node reads faster
    for stages, error in ((3, "There are 2 nodes for 3 stages"), (parse("0-6"), "There are 2 nodes for the stages 0-6, expected one"),
                          (parse("0-2,4-6"), "begins with layer 3")):
        with pytest.raises(PydsaError, match=error):
            divided(stages, setup, nodes)
    with pytest.raises(PydsaError, match="There are 8 stages, expected at most 7: so many layers of the model"):
        divide(setup, nodes * 4)
