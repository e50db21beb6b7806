"""pydsa quantize: files, errors, metadata, refusals, and what a run leaves behind."""
import json

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, quants

import pydsa
from pydsa import imatrix
from pydsa.cli import main
from pydsa.errors import PydsaError
from pydsa.gguf.file import open_gguf
from pydsa.gguf.layout import packed_metadata
from pydsa.quantization import tensors as tensors_module
from tools.make_model import ModelSpec, make_model

TINY = dict(n_embd=256, n_layer=2, n_head=2, n_expert=2, n_expert_used=1, n_ff=256, n_ff_exp=256, n_lora_q=64, n_expert_groups=1,
            n_group_used=1, indexer_n_head=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{type: path} of one small model, stored unquantized and as Q8_0."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / f"{kind}.gguf", ModelSpec(type=kind, **TINY)) for kind in ("BF16", "Q8_0")}


def values(tensor):
    return quants.dequantize(tensor.data, GGMLQuantizationType[tensor.type]).astype(np.float64)


def run(*args, code=0):
    result = CliRunner().invoke(main, ["quantize", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_file_has_the_types_and_the_errors_of_the_report(models, tmp_path):
    out = tmp_path / "out.gguf"
    report = pydsa.quantize(models["BF16"], out, "Q4_K_M")
    source, made = open_gguf(models["BF16"]), open_gguf(out)
    assert list(made.tensors) == list(source.tensors) == [row.tensor for row in report.rows]
    for row in report.rows:
        x, y = values(source.tensors[row.tensor]), values(made.tensors[row.tensor])
        assert (row.source, row.type) == (source.tensors[row.tensor].type, made.tensors[row.tensor].type)
        assert row.nmse == pytest.approx(np.square(y - x).sum() / np.square(x).sum(), rel=1e-4) and row.weighted is None
        assert row.nmse < {"F32": 1e-12, "BF16": 1e-12, "Q8_0": 1e-4}.get(row.type, 0.01)
    assert {row.type for row in report.rows} >= {"Q4_K", "Q6_K", "Q8_0", "F32"}
    assert report.bytes_out == sum(tensor.data.size for tensor in made.tensors.values()) and report.paths == [out]
    changed = {"general.file_type": 15, "general.quantization_version": 2}
    assert {key: made.metadata[key] for key in changed} == changed
    for key, value in source.metadata.items():
        assert key in changed or np.array_equal(made.metadata[key], value), key
    pydsa.load(out, n_ctx=64).session().prefill([3, 4, 5])


def test_importance_lowers_the_weighted_error(models, tmp_path):
    source = open_gguf(models["Q8_0"])
    rng, names = np.random.default_rng(0), [name for name, t in source.tensors.items() if len(t.shape) > 1 and "embd" not in name]
    sums = {name: np.exp(2 * rng.standard_normal(int(np.prod(source.tensors[name].shape[:-2])) * source.tensors[name].shape[-1]))
            for name in names}
    counts = {name: np.full(int(np.prod(source.tensors[name].shape[:-2])), 512) for name in names}
    path = tmp_path / "imatrix.gguf"
    imatrix.save(imatrix.Imatrix(sums, counts, ["a text"]), path)
    with_it = pydsa.quantize(models["Q8_0"], tmp_path / "with.gguf", "Q4_K_S", imatrix=path)
    without = pydsa.quantize(models["Q8_0"], tmp_path / "without.gguf", "Q4_K_S")
    assert with_it.without_data == ["token_embd.weight"] and not without.without_data
    a, b = open_gguf(tmp_path / "with.gguf"), open_gguf(tmp_path / "without.gguf")
    n = 0
    for row in with_it.rows:
        if row.type != row.source and row.tensor in sums:
            x, w = values(source.tensors[row.tensor]), sums[row.tensor].reshape(-1, 1, row.shape[-1]).reshape(
                *row.shape[:-2], 1, row.shape[-1])
            error, other = (float((np.square(values(file.tensors[row.tensor]) - x) * w).sum() / (x * x * w).sum()) for file in (a, b))
            assert error < other and row.weighted == pytest.approx(error, rel=1e-3)
            n += 1
    assert n > 10 and all(row.weighted is None for row in without.rows)
    keys = {key: a.metadata[key] for key in a.metadata if key.startswith("quantize.")}
    assert keys == {"quantize.imatrix.file": str(path), "quantize.imatrix.dataset": "a text",
                    "quantize.imatrix.entries_count": len(sums), "quantize.imatrix.chunks_count": 1}


def test_command_line(models, tmp_path):
    out = tmp_path / "out.gguf"
    dry = run(models["BF16"], out, "iq4_xs", "--dry-run", "-o", "json", "-t", "2")
    assert not list(tmp_path.iterdir()) and "would write" in dry.stderr
    done = run(models["BF16"], out, "iq4_xs", "-o", "json", "--override-kv", "general.name=str:small")
    rows, planned = json.loads(done.stdout), json.loads(dry.stdout)
    assert [row | {"nmse": None} for row in rows] == [row | {"nmse": None} for row in planned]
    assert all(row["nmse"] >= 0 for row in rows) and open_gguf(out).metadata["general.name"] == "small"
    assert "BF16 -> IQ4_XS" in done.stderr and "bits a weight" in done.stderr
    assert run(models["BF16"], out, "Q8_0", code=2).output.count("\n") < 5
    dry = run(models["BF16"], out, "Q8_0", "--dry-run")
    assert "would be refused" in dry.stderr and "--force" in dry.stderr and "would write" not in dry.stderr and "Q8_0" in dry.stdout
    assert "would write" in run(models["BF16"], out, "Q8_0", "--dry-run", "--force").stderr
    table = run(models["BF16"], out, "Q8_0", "--force", "--split-max-size", "200K").stdout
    assert "| blk.1.ffn_up_exps.weight" in table
    parts = sorted(path.name for path in tmp_path.glob("out-*"))
    assert parts[0] == f"out-00001-of-{len(parts):05d}.gguf" and len(parts) > 3
    again = run(tmp_path / parts[0], tmp_path / "joined.gguf", "COPY", "-o", "jsonl")
    assert all(json.loads(line)["nmse"] == 0 for line in again.stdout.splitlines())
    joined, first = open_gguf(tmp_path / "joined.gguf"), open_gguf(tmp_path / parts[0])
    assert all(np.array_equal(joined.tensors[name].data, tensor.data) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("options, message", [
    (["Q5_9"], "expected one of"), (["IQ2_XS"], "of no use without an imatrix, and there is none: make one with pydsa imatrix"),
    (["Q4_0", "--tensor-type", "ffn_down"], "expected REGEX=TYPE"), (["Q4_0", "--tensor-type", "xyz=Q8_0"], "in no name of a tensor"),
    (["Q4_0", "--output-tensor-type", "Q9"], "--output-tensor-type has the type 'Q9'"), (["Q4_0", "--imatrix", "none"], "cannot be read"),
    (["Q4_0", "--split-max-size", "x"], "The size is 'x'"), (["Q4_0", "--override-kv", "a"], "expected KEY=TYPE:VALUE"),
    (["COPY", "--pure"], "COPY leaves all tensors as they are, but --pure is given"),
    (["COPY", "--tensor-type", "ffn=Q8_0"], "but --tensor-type is given"), (["COPY", "--imatrix", "none"], "but --imatrix is given"),
])
def test_refusals_of_options(models, tmp_path, options, message):
    result = run(models["BF16"], tmp_path / "out.gguf", *options, code=2)
    assert message in result.output.replace("\n", " ") and not list(tmp_path.iterdir())


def test_refusals_of_files(models, tmp_path):
    source, out = models["BF16"], tmp_path / "out.gguf"
    before = source.read_bytes()
    assert "would replace this file, which is read" in run(source, source, "Q8_0", "--force", code=2).output.replace("\n", " ")
    assert source.read_bytes() == before
    pydsa.quantize(source, out, "Q4_0")
    said = run(out, tmp_path / "again.gguf", "Q4_1", code=2).output
    assert "--allow-requantize" in said and "Q4_0" in said and not (tmp_path / "again.gguf").exists()
    run(out, tmp_path / "again.gguf", "Q4_1", "--allow-requantize")
    run(models["Q8_0"], tmp_path / "smaller.gguf", "Q4_1")      # Q8_0 may be a source without being asked
    for path, message in ((tmp_path / "none.gguf", "no such file"), (tmp_path, "this is a directory")):
        assert message in run(path, tmp_path / "x.gguf", "Q4_0", code=2).output
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(before)
    tensor = open_gguf(source).tensors["blk.1.ffn_up_exps.weight"]
    at = before.index(tensor.data.tobytes())
    damaged.write_bytes(before[:at] + b"\xff\xff" + before[at + 2:])
    names = set(tmp_path.iterdir())
    said = run(damaged, tmp_path / "x.gguf", "Q4_0", code=2).output.replace("\n", " ")
    assert "'blk.1.ffn_up_exps.weight' cannot be stored as Q4_0" in said and "not finite" in said and set(tmp_path.iterdir()) == names


def test_an_interrupted_run_goes_on(models, tmp_path, monkeypatch):
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    pydsa.quantize(models["BF16"], whole, "Q4_1")
    pieces, n = tensors_module.Requantized.pieces, []

    def interrupted(self):
        n.append(self.tensor.name)
        if len(n) == 9:
            raise KeyboardInterrupt
        return pieces(self)
    monkeypatch.setattr(tensors_module.Requantized, "pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pydsa.quantize(models["BF16"], out, "Q4_1")
    assert not out.exists()
    report = pydsa.quantize(models["BF16"], out, "Q4_1")
    assert report.resumed > 0 and report.rows[-1].nmse is not None and any(row.nmse is None for row in report.rows)
    assert out.read_bytes() == whole.read_bytes() and len(n) == len(set(n)) + 1
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "whole.gguf"}


def test_an_interrupted_run_says_how_to_go_on(models, tmp_path, monkeypatch):
    out, pieces, n = tmp_path / "out.gguf", tensors_module.Requantized.pieces, []

    def interrupted(self):
        n.append(self.tensor.name)
        if len(n) == 9:
            raise KeyboardInterrupt
        return pieces(self)
    monkeypatch.setattr(tensors_module.Requantized, "pieces", interrupted)
    assert "the same command goes on with it" in run(models["BF16"], out, "Q4_1", code=130).stderr
    assert "were there from an interrupted run" in run(models["BF16"], out, "Q4_1").stderr


def test_inputs_are_not_replaced(models, tmp_path):
    """The names of partial files and of the journal may be those of inputs."""
    for name in "out.gguf.partial", "out.gguf.journal":
        source = tmp_path / name
        source.write_bytes(models["Q8_0"].read_bytes())
        assert "which is read" in run(source, tmp_path / "out.gguf", "Q4_0", code=2).output.replace("\n", " ")
        assert source.read_bytes() == models["Q8_0"].read_bytes()
        source.unlink()
    matrix = tmp_path / "imatrix.gguf"
    imatrix.save(imatrix.Imatrix({"output.weight": np.ones((1, 256))}, {"output.weight": np.array([512])}, ("text",), 512), matrix)
    before = matrix.read_bytes()
    said = run(models["BF16"], matrix, "Q4_0", "--imatrix", matrix, "--force", code=2).output.replace("\n", " ")
    assert "which is read" in said and matrix.read_bytes() == before


def test_names_of_files_that_are_no_text(models, tmp_path):
    """A source and an imatrix; and an output that is a folder."""
    source, matrix = tmp_path / "bf\udcff16.gguf", tmp_path / "im\udcff.gguf"
    source.write_bytes(models["BF16"].read_bytes())
    imatrix.save(imatrix.Imatrix({"output.weight": np.ones((1, 256))}, {"output.weight": np.array([512])}, ("text",), 512), matrix)
    run(source, tmp_path / "out\udcff.gguf", "Q4_0", "--imatrix", matrix)
    assert open_gguf(tmp_path / "out\udcff.gguf").metadata["quantize.imatrix.file"].endswith("im?.gguf")
    assert "this is a directory, expected the name of a file" in run(source, ".", "Q4_0", code=2).output.replace("\n", " ")


def test_numbers_of_types(models, tmp_path):
    """llama-quantize takes the numbers of file types too."""
    assert pydsa.quantize(models["BF16"], tmp_path / "out.gguf", "15", dry_run=True).type == "Q4_K_M"
    assert pydsa.quantize(models["BF16"], tmp_path / "out.gguf", "0", dry_run=True).type == "F32"


def test_pieces_and_threads_do_not_change_a_file(models, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    reports = [pydsa.quantize(models["BF16"], paths[0], "Q5_K_M", threads=1)]
    monkeypatch.setattr(tensors_module, "PIECE", 1 << 12)
    reports.append(pydsa.quantize(models["BF16"], paths[1], "Q5_K_M", threads=3))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [row.nmse for row in reports[0].rows] == pytest.approx([row.nmse for row in reports[1].rows], rel=1e-6)


@pytest.mark.parametrize("options, message", [
    (dict(override_kv={"deepseek32.block_count": 2**40}), "cannot hold"), (dict(threads=0), "threads is 0"),
    (dict(override_kv={"split.no": 1}), "cannot be overridden"), (dict(tensor_types={"(": "Q8_0"}), "no regular expression"),
    (dict(tensor_types=["ffn=Q4_K"]), "expected a dict, or pairs"), (dict(tensor_types="ffn"), "expected a dict, or pairs"),
    (dict(split_max_bytes="2G"), "split_max_bytes is '2G', expected an integer"), (dict(split_max_bytes=-5), "split_max_bytes is -5"),
])
def test_refusals_in_python(models, tmp_path, options, message):
    with pytest.raises(PydsaError, match=message):
        pydsa.quantize(models["BF16"], tmp_path / "out.gguf", "Q8_0", **options)
    assert not list(tmp_path.iterdir())


def test_overrides_keep_the_types_of_numbers(models, tmp_path):
    values = {"deepseek32.context_length": 64, "deepseek32.rope.freq_base": 5000.0, "a.number": -1, "general.file_type": 1}
    pydsa.quantize(models["BF16"], tmp_path / "out.gguf", "COPY", override_kv=values)
    old, new = (packed_metadata(path) for path in (models["BF16"], tmp_path / "out.gguf"))
    assert {key: open_gguf(tmp_path / "out.gguf").metadata[key] for key in values} == values
    assert all(new[key].type_id == value.type_id for key, value in old.items())


def test_types_that_cannot_be_made_are_named(models, tmp_path, monkeypatch):
    monkeypatch.delitem(tensors_module.QUANTIZERS, "Q4_1")
    with pytest.raises(PydsaError, match="no quantizer to Q4_1"):
        pydsa.quantize(models["BF16"], tmp_path / "out.gguf", "Q4_1")
    assert not list(tmp_path.iterdir())
