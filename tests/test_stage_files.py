"""Models in stages whose nodes have parts of the file: what they need, in which order, and what is refused.

The processes of stages are threads of this one, and each node is a folder.
"""
import os
import shutil
import types
import weakref

import numpy as np
import pytest
from helpers import random_ids
from stage_processes import OPTIONS

import pydsa
from pydsa import GGUFError, PydsaError
from pydsa.errors import StageError
from pydsa.gguf.file import open_gguf
from pydsa.gguf.parts import layers_here
from pydsa.stages import running
from pydsa.stages.actors import StageActor
from pydsa.stages.cluster import RayNode
from pydsa.stages.division import Layers, Node, divide, nowhere

FOUR = dict(arch="glm-dsa", n_layer=4, indexer_types="FSFF")
IDS = random_ids(20)


class Process:
    """A StageActor in this process, on a node whose files are in a folder."""

    def __init__(self, node, what, root):
        self.node, self.what, self._root, self.actor = node, what, root, StageActor()

    @property
    def name(self):
        return self.what

    def begin(self, method, *args):
        if method in ("look", "open"):
            args = str(self._root / self.node.name / os.path.basename(args[0])), *args[1:]
        return getattr(self.actor, method)(*args)

    def patiently(self, reference):
        return reference

    def result(self, reference, timeout=None):
        return reference

    def value(self, answer):
        if "error" in answer:
            raise getattr(pydsa.errors, answer["error"])(f"{self.what}: {answer['text']}")
        return answer["value"]

    def ask(self, method, *args, timeout=None):
        return self.value(self.begin(method, *args))

    def description(self):
        return self.actor.describe()

    def alive(self):
        return True

    def end(self):
        self.actor.leave()


class Cluster:
    """Nodes a, b, ..., the first of which may be this machine."""
    closed, local = False, False

    def __init__(self, root, names, here=None):
        self._root, self.launchers = root, weakref.WeakSet()
        self._nodes = [RayNode(name, name, "127.0.0.1", name == here) for name in names]
        self.ray = types.SimpleNamespace(wait=lambda references, timeout: (references, []))

    def nodes(self):
        return self._nodes

    def take(self, node, what):
        return Process(node, what, self._root)

    def give_back(self, processes):
        for process in processes:
            process.end()


@pytest.fixture(scope="module")
def split(small_model):
    return small_model(**FOUR, split_max_tensors=12)


@pytest.fixture
def staged(tmp_path, split, monkeypatch):
    """staged({"a": numbers of parts, ...}, stages, here) -> the model, with this machine's file in the folder `here`."""
    made = []

    def make(nodes, stages="auto", here="a"):
        for name, numbers in nodes.items():
            (tmp_path / name).mkdir()
            for number in numbers:
                shutil.copy(split.with_name(split.name.replace("00001-of", f"{number:05d}-of")), tmp_path / name)
        monkeypatch.setattr(running, "cluster", lambda address: Cluster(tmp_path, [name for name in nodes if name != "driver"], here))
        monkeypatch.setattr(StageActor, "measure", lambda actor, *args: {"value": (1e9, 1 << 40), "warnings": []})
        made.append(pydsa.load(tmp_path / here / split.name, stages=stages, ray="fake", **OPTIONS))
        return made[-1]
    yield make
    for model in made:
        model.runner.close()


def parts_with(split, *begins):
    """The numbers of the first part, and of those with tensors that begin so."""
    names = open_gguf(split).part_names
    return sorted({1, *(i + 1 for i, part in enumerate(names) if any(name.startswith(begins) for name in part))})


@pytest.fixture(scope="module")
def halves(split):
    """The parts for the layers 0-1, and those for 2-3."""
    return parts_with(split, "blk.0.", "blk.1.", "token_embd"), parts_with(split, "blk.2.", "blk.3.", "output")


@pytest.fixture(scope="module")
def expected(split):
    return pydsa.load(split, **OPTIONS).logits(IDS)


def ranges(model):
    return [str(layers) for layers in model.runner.launcher.stages]


def test_each_node_has_the_parts_of_its_layers(staged, halves, expected):
    model = staged(dict(zip("ab", halves)), "0-1,2-3")
    assert model.setup.file.absent and np.array_equal(model.logits(IDS), expected)
    assert model.runner.launcher.head == 0


def test_the_head_is_in_the_last_stage_if_the_first_has_no_output_matrix(staged, halves, expected, monkeypatch):
    monkeypatch.setattr(running, "layers_here", lambda *args: layers_here(*args) - ({0} if args[-1] == 0 else set()))
    model = staged(dict(zip("ab", halves)))
    assert model.runner.launcher.head == 1 and np.array_equal(model.logits(IDS), expected)


@pytest.mark.parametrize("output, head, expected", [("output.weight", 0, {1}), ("output.weight", 2, {0, 1}), ("blk.2.x", 0, {0, 1})])
def test_the_layer_of_the_output_matrix(output, head, expected):
    """Without a matrix of its own it is the embedding, which is here."""
    parts = {"1": {"tensors": [["token_embd.weight"], ["blk.0.x"], ["blk.1.x"]]}, "2": {"tensors": [["blk.2.x"], [output]]}}
    assert layers_here({"parts": ["1"]}, parts, 3, head) == expected


def test_auto_gives_nodes_the_layers_that_they_have(staged, halves, expected):
    """The one with the first layers comes first, wherever the user is."""
    model = staged({"a": halves[1], "b": halves[0]})
    assert ranges(model) == ["0-1", "2-3"] and [node.name for node in model.runner.launcher._nodes] == ["b", "a"]
    assert np.array_equal(model.logits(IDS), expected)


def test_the_users_machine_needs_the_first_part_only(staged, halves, expected):
    model = staged({"driver": [1], "a": halves[0], "b": halves[1]}, here="driver")
    assert ranges(model) == ["0-1", "2-3"] and np.array_equal(model.logits(IDS), expected)


def test_ranges_for_which_a_node_lacks_parts(staged, halves):
    with pytest.raises(PydsaError, match="have not the parts of the file for a division: layers on a: 0-1; b: .*2-3. Copy the parts that"):
        staged(dict(zip("ab", halves)), "0-2,3-3")


def test_no_division_fits_the_parts(staged, halves):
    with pytest.raises(PydsaError, match="have not the parts of the file for a division"):
        staged({"a": halves[0], "b": halves[0], "c": halves[1]})


def test_a_part_that_is_on_no_node(staged, halves):
    with pytest.raises(GGUFError, match="of the 8 parts of the model is on none of the nodes"):
        staged({"a": halves[0], "b": halves[0]})


def test_a_file_that_differs_is_named(staged, halves, tmp_path, small_model, split):
    """The tensor and the node are named before anything is loaded."""
    other = small_model(**FOUR, split_max_tensors=12, expert_weights_scale=1.5)
    real = shutil.copy

    def copy(source, target):
        real(other.with_name(source.name) if target.name == "b" else source, target)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(GGUFError, match="'glm-dsa.expert_weights_scale' is another on node b"):
        patch.setattr(shutil, "copy", copy)
        staged(dict(zip("ab", halves)))


def test_a_node_without_the_first_part(staged, halves):
    with pytest.raises(GGUFError, match="stage 2 of 2 .node b.: .*model-00001-of-00008.gguf: no such file"):
        staged({"a": halves[0], "b": halves[1][1:]})


def test_whole_files_need_nothing_of_each_other(staged, expected):
    model = staged({"a": range(1, 9), "b": range(1, 9)})
    assert not model.setup.file.absent and model.runner.launcher._parts is None and model.runner.launcher.head == 0
    assert np.array_equal(model.logits(IDS), expected)


def test_a_file_that_changes_after_it_was_compared(staged, halves, monkeypatch):
    monkeypatch.setattr(StageActor, "open", lambda actor, *args: {"value": ("another", [], (0, 55)), "warnings": []})
    with pytest.raises(StageError, match="has another file at"):
        staged(dict(zip("ab", halves)))


def test_division_is_the_best_of_those_that_parts_allow(split):
    setup = pydsa.load(split, **OPTIONS).setup
    fast, slow = Node("a", 1e10), Node("b", 1e9)
    assert divide(setup, [fast, slow]) == (Layers(0, 3), Layers(3, 4))
    assert divide(setup, [fast._replace(layers=frozenset([0, 1])), slow]) == (Layers(0, 2), Layers(2, 4))
    with pytest.raises(PydsaError, match="layers on a: 0-1; b: 3"):
        divide(setup, [fast._replace(layers=frozenset([0, 1])), slow._replace(layers=frozenset([3]))])
    assert "layers on a: none; b: all" in str(nowhere([fast._replace(layers=frozenset()), slow]))
