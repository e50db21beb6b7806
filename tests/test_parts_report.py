"""`pydsa info` of a folder with some parts of a model: which are missing, which layers can run."""
import json
import shutil

import pytest
from click.testing import CliRunner

from pydsa import GGUFError
from pydsa.cli import main
from pydsa.cli.parts_report import describe_parts, format_parts
from pydsa.gguf.file import open_gguf


@pytest.fixture(scope="module")
def split(small_model):
    return small_model(arch="glm-dsa", n_layer=6, indexer_types="FSFSFF", split_max_tensors=15)


@pytest.fixture
def folder(tmp_path, split):
    """folder(numbers) -> a folder with these parts, of nine."""
    def make(numbers):
        for number in numbers:
            shutil.copy(split.with_name(split.name.replace("00001-of", f"{number:05d}-of")), tmp_path)
        return tmp_path
    return make


def whole_layers(split, numbers):
    """The layers all of whose tensors are in some of the parts."""
    file = open_gguf(split)
    here = {name for number in numbers for name in file.part_names[number - 1]}
    return [il for il in range(6) if all(name in here for name in file.tensors if name.startswith(f"blk.{il}."))]


@pytest.mark.parametrize("numbers", [[1], [1, 2], [1, 2, 3], [1, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 5, 6, 7], [1, 2, 3, 4, 8, 9],
                                     [1, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 8, 9]])
def test_no_layer_is_taken_for_whole_that_is_not(split, folder, numbers):
    report, = describe_parts(folder(numbers))
    assert report["missing"] == [n for n in range(1, 10) if n not in numbers]
    expected = whole_layers(split, numbers)
    assert set(report["layers"]) <= set(expected) <= {*report["layers"], *report["open"]}
    assert report["n_layer"] == 6 and report["embedding"] and report["output"]
    if len(numbers) > 5:        # layers of each kind are here to compare with
        assert report["layers"] == expected


def test_some_layers_may_not_begin_a_stage(folder):
    report, = describe_parts(folder([1, 2, 3, 4, 5, 6]))
    assert report["layers"] == [0, 1, 2, 3] and report["first"] == [0, 2]
    assert "a stage may begin with layers 0, 2: the others share the choice" in format_parts([report])


def test_the_command_line_tells_it(folder):
    run = CliRunner().invoke(main, ["info", str(folder([1, 2, 3, 4, 7]))])
    assert run.exit_code == 0, run.output
    for line in ("model: 5 of 9 parts are in this folder; missing: 5-6, 8-9", "layers that a stage can run here: 0-1 of 6",
                 "  the embedding is here, the output is here (the first stage needs the embedding, and it or the last the output)",
                 "  layers 2, 4-5: a part that is not here may have more of their tensors"):
        assert line in run.output.splitlines()
    report, = json.loads(CliRunner().invoke(main, ["info", str(folder([])), "-o", "json"]).output)
    assert report["layers"] == [0, 1] and report["parts"][1]["layers"] == [0, 1]


def test_without_the_first_part(folder):
    report, = describe_parts(folder([5, 6]))
    assert report["layers"] == [3] and report["n_layer"] is None and not report["embedding"] and not report["output"]
    assert "the first part is not here: it has the metadata, and each node needs it" in format_parts([report])


def test_all_parts_are_here(folder):
    path = folder(range(1, 10))
    report, = describe_parts(path)
    assert f"all of the model is here: pydsa info {path}/model-00001-of-00009.gguf" in format_parts([report])


def test_two_models_in_a_folder(folder, split):
    path = folder([1, 2])
    shutil.copy(path / split.name, path / "other-00001-of-00003.gguf")
    assert [(report["model"], report["missing"]) for report in describe_parts(path)] == [
        ("model", [3, 4, 5, 6, 7, 8, 9]), ("other", [2, 3])]


def test_a_part_that_is_damaged(folder):
    path = folder([1, 2])
    (path / "model-00002-of-00009.gguf").write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match="model-00002-of-00009.gguf: "):
        describe_parts(path)


def test_options_that_a_folder_does_not_take(folder):
    run = CliRunner().invoke(main, ["info", str(folder([1])), "-c", "100"])
    assert run.exit_code == 2 and "is a folder with parts of a model, of which `info` takes -o only, not --n-ctx." in run.output


def test_a_folder_without_parts_is_taken_for_one_of_hugging_face(tmp_path):
    (tmp_path / "model-00004-of-00003.gguf").write_bytes(b"")
    run = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert run.exit_code and "config.json: there is no such file" in f"{run.output} {run.exception}"
