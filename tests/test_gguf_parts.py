"""Split files of which each machine has some parts: what they have together, what differs, and stages that run so."""
import copy
import json
import math
import shutil

import numpy as np
import pytest
from helpers import random_ids

from pydsa import GGUFError
from pydsa.gguf.file import open_gguf, open_parts
from pydsa.gguf.parts import absent_parts, check_here, described, merged
from pydsa.model import Model
from pydsa.models.stored import key_and_value_heads
from pydsa.models.weights import Weights
from pydsa.setup import Setup
from pydsa.stages.stage import Stage

FOUR = dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS")
IDS = random_ids(20)


@pytest.fixture(scope="module")
def split(small_model):
    """The first part of a model of several parts."""
    return small_model(**FOUR, split_max_tensors=12)


def parts_of(split):
    return sorted(split.parent.glob("model-*.gguf"))


def node(tmp_path, split, name, numbers):
    """A folder with some of the parts, by number -> the path of the first."""
    folder = tmp_path / name
    folder.mkdir()
    for number in numbers:
        shutil.copy(parts_of(split)[number - 1], folder)
    return folder / split.name


def layers_of(path):
    return {int(name.split(".")[1]) for name in open_gguf(path).tensors if name.startswith("blk.")}


@pytest.fixture
def nodes(tmp_path, split):
    """Two machines that have what the layers 0-1 and 2-3 need."""
    file = open_gguf(split)
    wanted = ("blk.0.", "blk.1.", "token_embd"), ("blk.2.", "blk.3.", "output")
    numbers = [{1, *(i + 1 for i, names in enumerate(file.part_names) if any(name.startswith(ends) for name in names))} for ends in wanted]
    assert numbers[0] | numbers[1] == set(range(1, len(file.paths) + 1)) and numbers[0] != numbers[1]
    return [node(tmp_path, split, name, some) for name, some in zip("ab", numbers)]


def together(paths):
    """What machines have together, as it comes over a wire."""
    return json.loads(json.dumps(merged({f"node {path.parent.name}": described(path) for path in paths})))


def test_all_know_the_whole_file(split, nodes):
    whole, parts = Setup(split), together(nodes)
    for path in nodes:
        file = open_gguf(path, absent_parts(path, parts))
        assert [(t.name, t.type, t.shape, t.data.shape, t.data.nbytes) for t in file.tensors.values()] == [
            (t.name, t.type, t.shape, t.data.shape, t.data.nbytes) for t in whole.file.tensors.values()]
        assert file.n_bytes == whole.file.n_bytes and len(file.absent) == len(parts_of(split)) - len(list(path.parent.iterdir())) > 0
        setup = Setup(path, absent=parts)
        assert setup.fingerprint == whole.fingerprint
        assert (setup.total_bytes, setup.mapped_bytes, setup.n_params, setup.n_bytes) == (
            whole.total_bytes, whole.mapped_bytes, whole.n_params, whole.n_bytes)


def test_the_fingerprint_of_a_whole_file_is_what_it_was(small_model):
    """Saved sessions have it."""
    import hashlib
    setup = Setup(small_model(type="Q8_0", n_embd=64, n_lora_q=32, n_lora_kv=32, n_v=32, n_ff=64, n_ff_exp=32, n_nope=32))
    digest = hashlib.sha256()
    for key in sorted(setup.file.metadata):
        if key.startswith("deepseek32."):
            digest.update(f"{key} {np.asarray(setup.file.metadata[key]).tolist()}".encode())
    for tensor in setup.file.tensors.values():
        data = tensor.data.tobytes()
        digest.update(f"{tensor.name} {tensor.type} {tensor.shape}".encode() + data[:64] + data[-64:])
    assert setup.fingerprint == digest.hexdigest()


def test_stages_run_with_the_parts_of_their_layers(split, nodes, load):
    parts, options = together(nodes), dict(n_ctx=64, kv_type="f32")
    first, last = (Stage(Setup(path, layers=layers, absent=parts, **options), threads=1) for path, layers in zip(nodes, ((0, 2), (2, 4))))
    for stage in (first, last):
        stage.open(7)
    positions = np.arange(20)
    rows = first.run([(7, 20)], "sparse", np.array(IDS, np.int32), positions, 20)
    logits = last.run([(7, 20)], "sparse", rows, positions, 20)
    session = load(split, n_ctx=64).session()
    session.variant = "sparse"
    np.testing.assert_array_equal(logits, session.logits(IDS))


def test_a_stage_without_its_parts_is_refused(nodes):
    parts = together(nodes)
    with pytest.raises(GGUFError, match=r"-of-00007.gguf: this part is not on this machine, but has \d+ tensors of the layers"):
        Stage(Setup(nodes[0], layers=(2, 4), absent=parts, n_ctx=64))
    with pytest.raises(GGUFError, match="is not on this machine"):
        Model(Setup(nodes[1], absent=parts, n_ctx=64))


def test_without_stages_a_missing_part_is_an_error(nodes):
    for path in nodes:
        with pytest.raises(GGUFError, match=r"model-0000\d-of-000\d\d.gguf: no such file, expected part \d of the \d of model-00001"):
            Setup(path)


def test_data_that_are_elsewhere_cannot_be_read(nodes):
    file = open_gguf(nodes[0], absent_parts(nodes[0], together(nodes)))
    data = next(t.data for t in file.tensors.values() if not isinstance(t.data, np.ndarray))
    assert len(data) == data.shape[0] and data[:1].nbytes == math.prod(data.shape[1:]) and data.reshape(-1).shape == (data.nbytes,)
    assert copy.copy(data).shape == data.shape
    for read in (np.asarray, np.array, bytes, list, lambda d: d.view("<f4"), lambda d: d.tobytes(), lambda d: d[0].ctypes,
                 lambda d: np.empty(d.shape, np.uint8).__setitem__(..., d), lambda d: np.ascontiguousarray(d[:1]),
                 lambda d: np.ones(1) + d, lambda d: d.flags, lambda d: d.reshape(-1).base):
        with pytest.raises(GGUFError, match="this part is not on this machine, expected it here for its tensors"):
            read(data)


def test_small_tensors_are_told_as_a_whole(nodes):
    """Factors of products are read where a graph is recorded."""
    file, whole = (open_gguf(path, absent_parts(path, together(nodes))) for path in nodes)
    name = "blk.3.attn_norm.weight"
    assert name not in open_parts(nodes[0], range(100))[1].tensors
    np.testing.assert_array_equal(file.tensors[name].data, whole.tensors[name].data)
    with pytest.raises(GGUFError, match="has 1 tensors of the layers"):       # but a stage reads what it runs from its own file
        check_here(file, {name: file.tensors[name]})


def test_made_tensors_need_their_source(nodes):
    """attn_kv_b is divided on load: its halves are elsewhere if it is."""
    name, shape = "blk.0.attn_kv_b.weight", (3 * (8 + 32), 2048)
    parts = {"2": {"n_bytes": 1, "keys": {}, "tensors": [[name, "Q8_0", shape, "00" * 128]]}}
    part = absent_parts(nodes[0], parts)[2]
    weights = Weights(part)
    for tensor in key_and_value_heads(weights.layer(0), 3, 2048, 8, 32):
        with pytest.raises(GGUFError, match="is not on this machine"):
            tensor.read()
        with pytest.raises(GGUFError, match="has 1 tensors of the layers"):
            check_here(part, {tensor.name: tensor})


DIFFERENT = {
    "another part": (lambda a: a.update(count=9), "has 9 parts on node b, and 7 parts on node a"),
    "a file that is not split": (lambda a: a.update(count=1), "has 1 part on node b"),
    "metadata": (lambda a: a["metadata"].update({"glm-dsa.rope.freq_base": "00"}), "'glm-dsa.rope.freq_base' is another on node b than on"),
    "a key more": (lambda a: a["metadata"].update({"x\n": "00"}), r"'x\\n' is another on node b than on node a"),
    "a tensor more": (lambda a: a["parts"]["1"]["tensors"].append(["extra", "F32", [1], ""]), "'extra' is on node b, but not on node a"),
    "a tensor less": (lambda a: a["parts"]["1"]["tensors"].pop(0), "tensor 'token_embd.weight' is on node a, but not on node b"),
    "a type": (lambda a: a["parts"]["1"]["tensors"][0].__setitem__(1, "F16"), "'token_embd.weight' has the type F16 on node b, and F32 on"),
    "a shape": (lambda a: a["parts"]["1"]["tensors"][0].__setitem__(2, [1, 2]), r"the shape \[1, 2\] on node b, and \[300, 72\] on node a"),
    "bytes": (lambda a: a["parts"]["1"]["tensors"][0].__setitem__(3, "00"), "'token_embd.weight' has other bytes on node b than on node a"),
    "the order": (lambda a: a["parts"]["1"]["tensors"].reverse(), "part 1 of the model is another on node b"),
    "the length": (lambda a: a["parts"]["1"].update(n_bytes=5), r"part 1 of the model is another on node b \(5 bytes\) than on node a"),
}


@pytest.mark.parametrize("change, message", DIFFERENT.values(), ids=DIFFERENT)
def test_files_that_differ_are_refused(nodes, change, message):
    a, b = map(described, nodes)
    changed = copy.deepcopy(b)
    change(changed)
    merged({"node a": a, "node b": b})
    with pytest.raises(GGUFError, match=message):
        merged({"node a": a, "node b": changed})


def test_models_of_other_weights_are_refused(small_model, split, nodes):
    other = described(small_model(**FOUR, split_max_tensors=12, seed=1))
    other["metadata"] = described(nodes[0])["metadata"]
    with pytest.raises(GGUFError, match=r"in part \d of the model tensor '.*' has other bytes on b than on a"):
        merged({"a": described(nodes[0]), "b": other})


def test_a_part_that_no_machine_has(tmp_path, split):
    a, b = node(tmp_path, split, "a", [1, 2, 3]), node(tmp_path, split, "b", [1, 3, 6])
    with pytest.raises(GGUFError, match=r"Part 4, 5, 7 of the 7 parts of the model is on none of the nodes \(a, b\): copy each part"):
        merged({"a": described(a), "b": described(b)})


def test_the_first_part_is_needed(tmp_path, split):
    with pytest.raises(GGUFError, match="model-00001-of-00007.gguf: no such file"):
        described(tmp_path / split.name)


def test_a_damaged_part_is_met_where_it_is(tmp_path, split):
    path = node(tmp_path, split, "a", [1, 2])
    second = path.with_name(parts_of(split)[1].name)
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(GGUFError, match="model-00002-of-00007.gguf: .* it is incomplete, get it again"):
        described(path)


def test_a_file_that_is_not_split_is_the_same_everywhere(small_model, tmp_path):
    path = small_model(**FOUR)
    (tmp_path / "b").mkdir()
    other = shutil.copy(path, tmp_path / "b")
    parts = merged({"a": described(path), "b": described(other)})
    assert Setup(other, absent=parts).fingerprint == Setup(path).fingerprint and not Setup(other, absent=parts).file.absent


@pytest.mark.parametrize("tensor", [["t", "F32", [8], "00"], ["t", "Q9", [8], ""], ["t", "F32", [], ""], ["t", "F32", [0], ""],
                                    ["t", "Q8_0", [2, 33], ""], ["t", "F32", [2000], "00"]])
def test_infos_that_no_file_has_are_refused(split, tensor):
    parts = {"2": {"n_bytes": 1, "keys": {}, "tensors": [tensor]}}
    with pytest.raises(GGUFError, match="00002-of-00007.gguf: tensor 't' is told"):
        absent_parts(split, parts)
