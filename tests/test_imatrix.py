"""Importance matrices: llama.cpp's sums, forms of files, runs that end early, tables."""
import contextlib
import hashlib
import json
import os
import shutil
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids
from rewritten import fused_experts, rewrite, whole_kv_b, with_factors
from test_stored_forms import old_keys

import pydsa
from pydsa import DamagedWeightsError, GGUFError, ImatrixError, PydsaError, imatrix
from pydsa.cli import main
from pydsa.gguf.file import open_gguf
from pydsa.imatrix import Imatrix, files
from pydsa.quality.distributions import Threads

THEIRS = Path(__file__).parent / "data/imatrix/ds32-f32.gguf"
NOTES = "pydsa/demo/notes.txt"
IDS = random_ids(96)        # top_k is 12


def collected(model, ids=IDS, **options):
    *_, last = imatrix.collect(model, ids, **options)
    return last


def agree(met, expected, names=None, bound=1e-5):
    """Whether counts are equal, and sums but for rounding."""
    return all(np.array_equal(met.counts[name], expected.counts[name]) and np.abs(met.sums[name] - expected.sums[name]).max()
               <= bound * expected.sums[name].max() for name in names or expected.sums)


def file_of(tmp_path, found, name="file.gguf", form="gguf"):
    imatrix.save(found, tmp_path / name, form)
    return tmp_path / name


# llama.cpp's tool

def test_sums_are_those_of_llama_cpp(golden, load):
    """Those of all matrices, the output's too, and each expert's count."""
    path, _ = golden("ds32-f32")
    model, expected = load(path, n_ctx=96, attention="sparse"), imatrix.read(THEIRS)
    ids = model.tokenize(Path(NOTES).read_text().removesuffix("\n"))
    with Threads(1) as threads:
        scores = imatrix.Scores(threads)
        met = collected(model, ids, n_chunks=3, process_output=True, dataset=NOTES, score=scores)
        assert re.fullmatch(r"perplexity 32090[78]\.\d+ ± 11816[56]\.\d+", str(scores))      # llama.cpp's: 320907.4387 +/- 118165.52907
    assert met.sums.keys() == expected.sums.keys() and agree(met, expected)
    assert (met.chunks, met.chunk_size, met.datasets) == (expected.chunks, expected.chunk_size, expected.datasets) == (3, 96, [NOTES])
    assert met.counts["blk.1.ffn_up_exps.weight"].size == 4 and "output.weight" in met.sums


def test_files_are_those_of_llama_cpp(tmp_path):
    theirs = imatrix.read(THEIRS)
    assert file_of(tmp_path, theirs).read_bytes() == THEIRS.read_bytes()
    dat = file_of(tmp_path, theirs, "file.dat", "dat")
    twice = file_of(tmp_path, theirs.merged(theirs), "twice.gguf")
    assert hashlib.sha256(dat.read_bytes()).hexdigest() == "f6e630f2217053badd9e98c413c87074ff04ae94f1a8241c3080e171691fa603"
    assert hashlib.sha256(twice.read_bytes()).hexdigest() == "7c6d1bf019ddda2e10a25422665a864b8e3d95e6c1825c6d64440b0ae7ec1658"
    back = imatrix.read(dat, 96)
    assert back.means.keys() == theirs.means.keys() and back.datasets == theirs.datasets and back.chunks == theirs.chunks
    assert all(np.allclose(back.means[name].ravel(), theirs.means[name].ravel(), rtol=1e-6) for name in theirs.means)


def test_gguf_py_reads_the_file(tmp_path):
    found = Imatrix({"blk.0.a.weight": np.arange(6.0)}, {"blk.0.a.weight": np.array([4, 0])}, ["text"], 4)
    reader = gguf.GGUFReader(file_of(tmp_path, found))
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {"general.type": "imatrix", "imatrix.datasets": ["text"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 4}
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        "blk.0.a.weight.in_sum2": [[0, 1, 2], [3, 4, 5]], "blk.0.a.weight.counts": [[4], [0]]}
    again = imatrix.read(file_of(tmp_path, Imatrix(found.sums, found.counts, (), 4)))       # llama-quantize wants the key all the same
    assert again.datasets == [] and again.mean("blk.0.a.weight").tolist() == [[0, 0.25, 0.5], [1, 1, 1]]


STATISTICS = {      # llama.cpp's, as it rounds them
    (1, "attn_v_b"): "628.12 0.2049 1.5272 0.61 0.19 1.0000 1024 9.9315 0.9931 0.1475 0.9094",
    (1, "ffn_down_exps"): "380.18 0.0381 2.6287 0.37 0.24 1.0000 1024 9.7556 0.9756 0.1318 -",
    (0, "indexer.proj"): "264.29 0.4470 2.3595 1.03 0.28 1.0000 256 7.9501 0.9938 0.1328 -",
    (None, "output"): "258.39 0.5310 1.6670 1.01 0.22 1.0000 256 7.9663 0.9958 0.1523 -"}


def test_statistics_are_those_of_llama_cpp():
    rows = imatrix.statistics(imatrix.read(THEIRS))
    met = {(row["layer"], row["tensor"]): "{sum:.2f} {min:.4f} {max:.4f} {mean:.2f} {stddev:.2f} {active:.4f} {n} {entropy:.4f} "
           "{entropy_norm:.4f} {zd:.4f} ".format(**row) + ("-" if row["cossim"] is None else f"{row['cossim']:.4f}") for row in rows}
    assert len(rows) == 45 and {key: met[key] for key in STATISTICS} == STATISTICS
    layers = [f"{row['sum']:.2f} {row['zd']:.6f} {row['cossim']:.4f}" for row in imatrix.layer_statistics(imatrix.read(THEIRS))]
    assert layers == ["381.45 0.142578 0.0000", "567.57 0.143973 0.4010", "568.24 0.150391 0.9125"]


# Models in several forms

@pytest.mark.filterwarnings("ignore:.* are not used", "ignore:.* split in two on load")
@pytest.mark.parametrize("arch, device", [("deepseek32", "cpu"), ("deepseek2", "reference")])
def test_factors_and_fused_experts_change_nothing(small_model, load, tmp_path, arch, device):
    """Factors are powers of two.

    With them gate and up, one matrix in the file, are two products.
    """
    path, options = small_model(arch=arch, n_layer=2), dict(device=device, n_ctx=48, attention="sparse" if arch == "deepseek32" else "auto")
    plain = collected(load(path, **options))
    fused = rewrite(path, tmp_path / "fused.gguf", tensors=fused_experts(path))
    scaled = rewrite(fused, tmp_path / "scaled.gguf", tensors=with_factors())
    whole, parts = "blk.1.ffn_gate_up_exps.weight", [f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up")]
    for form in (fused, scaled):
        met = collected(load(form, **options))
        assert met.sums.keys() == plain.sums.keys() - set(parts) | {whole} and agree(met, plain, plain.sums.keys() - set(parts))
        assert all(np.allclose(met.sums[whole], plain.sums[name]) and (met.counts[whole] == plain.counts[name]).all() for name in parts)
        assert np.array_equal(met.for_model(open_gguf(path).tensors)[parts[1]], met.mean(whole))
    assert plain.for_model(open_gguf(fused).tensors).keys() >= {whole} and not imatrix.coverage(plain, open_gguf(fused).tensors)[1:]


@pytest.mark.filterwarnings("ignore:.* split in two on load")
def test_files_with_attn_kv_b_have_its_inputs(small_model, load, tmp_path):
    """They are the latents. Its halves, which pydsa makes, are not in the file."""
    path, latents = small_model(arch="deepseek2", n_layer=2), []
    old = rewrite(path, tmp_path / "old.gguf", **old_keys("deepseek2"), tensors=whole_kv_b(path))
    plain, model = collected(load(path, n_ctx=48)), load(old, n_ctx=48)
    met = collected(model)
    halves = {name for name in plain.sums if name.endswith(("attn_k_b.weight", "attn_v_b.weight"))}
    assert met.sums.keys() == plain.sums.keys() - halves | {f"blk.{layer}.attn_kv_b.weight" for layer in (0, 1)}
    assert agree(met, plain, plain.sums.keys() - halves)
    for start in (0, 48):
        model.session().prefill([model.tokenizer.bos_id, *IDS[start + 1:start + 48]], observe=lambda node, arrays: latents.append(
            arrays[0].copy()) if (node.op, node.name) == ("rms_norm", "kv_cmpr_pe-1") else None)
    assert np.allclose(met.sums["blk.1.attn_kv_b.weight"], (np.concatenate(latents) ** 2).sum(0), rtol=1e-4)
    assert met.for_model(model.setup.file.tensors)["blk.1.attn_kv_b.weight"].shape == (1, 56)


def test_heads_in_one_axis_share_their_columns(small_model, load, tmp_path):
    path = small_model(arch="deepseek2", n_layer=2)

    def flat(tensor):
        whole = tensor.data.ndim == 3 and "_b.weight" in tensor.name
        return [(tensor.name, tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.tensor_type) if whole else tensor]

    plain, met = (collected(load(file, n_ctx=48)) for file in (path, rewrite(path, tmp_path / "flat.gguf", tensors=flat)))
    name = "blk.1.attn_v_b.weight"
    assert np.allclose(met.sums[name], plain.sums[name].reshape(3, 56).sum(0)) and met.counts[name] == 3 * 96
    assert met.for_model(open_gguf(tmp_path / "flat.gguf").tensors)[name].shape == (1, 56)
    assert plain.for_model(open_gguf(path).tensors)[name].shape == (3, 56)


def test_layers_that_share_a_choice_have_no_indexer(small_model, load):
    model = load(small_model(arch="glm-dsa", n_layer=2, indexer_types="FS", tied_output=True), n_ctx=48, attention="sparse")
    met = collected(model, process_output=True)
    assert {name for name in met.sums if "indexer" in name} == {f"blk.0.indexer.{part}.weight" for part in ("attn_k", "attn_q_b", "proj")}
    assert "token_embd.weight" in met.sums      # the matrix that the file has
    assert met.counts["blk.1.ffn_up_exps.weight"].sum() == 96 * model.config.n_expert_used


def test_what_no_chunk_has(small_model, load):
    model = load(small_model(n_layer=2), n_ctx=12)
    with pytest.raises(PydsaError, match="attention='auto' and n_ctx=12, where its indexer never runs, expected attention='sparse'"):
        imatrix.collect(model, IDS)
    model = load(small_model(n_layer=2), n_ctx=48, attention="sparse")
    with pytest.raises(PydsaError, match="text has 47 tokens, expected at least 48 for one chunk of 48: give a longer text, or a smaller"):
        imatrix.collect(model, IDS[:47])
    with pytest.raises(PydsaError, match="has 96 tokens, expected at least 144 for one chunk of 48 after the first 2"):
        imatrix.collect(model, IDS, first=2)
    for wrong in (dict(chunk_size=0), dict(first=-1), dict(n_chunks=True)):
        with pytest.raises(PydsaError, match=f"{next(iter(wrong))} is .*, expected an integer from 1"):
            imatrix.collect(model, IDS, **wrong)
    with pytest.raises(PydsaError, match="A chunk has 49 tokens, expected at most 48"):
        imatrix.collect(model, IDS, chunk_size=49)


def test_values_that_are_not_finite(small_model, load, tmp_path):
    path = small_model(arch="deepseek2", n_layer=2)
    nan = np.full((88, 72), np.nan, np.float32)
    broken = rewrite(path, tmp_path / "nan.gguf",
                     tensors=lambda t: [(t.name, nan, t.tensor_type) if t.name == "blk.0.ffn_up.weight" else t])
    with pytest.raises(DamagedWeightsError, match="'blk.0.ffn_down.weight' is multiplied with is not finite|scores"):
        collected(load(broken, n_ctx=48))


# Adding up, and ends of runs

def test_parts_add_up(small_model, load):
    model = load(small_model(n_layer=2), n_ctx=32, attention="sparse")
    whole = collected(model, dataset="a")
    assert whole.chunks == 3
    parts = [collected(model, first=first, n_chunks=most, dataset=name) for first, most, name in ((0, 1, "a"), (1, 5, "b"))]
    both = parts[0].merged(parts[1])
    assert agree(both, whole, bound=1e-12) and both.datasets == ["a", "b"] and both.chunks == 3
    ubatches = load(small_model(n_layer=2), n_ctx=32, n_ubatch=20, attention="sparse")
    assert agree(collected(ubatches), whole, bound=1e-5)


def test_counts_of_whole_tensors_hold_for_each_expert():
    def one(counts, sums=(1, 2, 3, 4)):
        return Imatrix({"a": np.array(sums, float)}, {"a": np.array(counts)})
    for a, b, expected in (([2], [1, 0], [3, 2]), ([1, 0], [2], [3, 2]), ([1, 3], [2, 2], [3, 5]), ([4, 4], [1], [5])):
        both = one(a).merged(one(b))
        assert both.counts["a"].tolist() == expected and both.sums["a"].tolist() == [2, 4, 6, 8]
    for other in (one([1], (1, 2, 3)), one([1, 2, 3, 4])):
        with pytest.raises(ImatrixError, match="'a' has . sums and . counts, expected 4 and 2 as in the imatrix that it is added to"):
            one([1, 2]).merged(other)


class Stopped(Exception):
    """What ends a run in a test."""


@pytest.mark.parametrize("end", ["close", "raise"])
def test_the_file_has_the_chunks_that_are_complete(small_model, load, tmp_path, end):
    model, path = load(small_model(n_layer=2), n_ctx=32, attention="sparse"), tmp_path / "part.gguf"

    def progress(done, total):
        if end == "raise" and done > 80:     # in the middle of the third chunk
            raise Stopped

    before = collected(model, n_chunks=1)
    run = imatrix.collect_to_file(model, IDS, path, every=10, before=before, progress=progress)
    with pytest.raises(Stopped) if end == "raise" else contextlib.nullcontext(), contextlib.closing(run):
        for i, _ in enumerate(run):
            assert not path.exists()
            if end == "close" and i == 1:
                break
    assert os.listdir(tmp_path) == ["part.gguf"] and imatrix.read(path).chunks == 3
    assert agree(imatrix.read(path), before.merged(collected(model, n_chunks=2)), bound=1e-6)


# Files of others

def gguf_of(tmp_path, tensors, chunk_size=4):
    writer = gguf.GGUFWriter(tmp_path / "made.gguf", "imatrix")
    if chunk_size is not None:
        writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, np.float32 if not isinstance(values, np.ndarray) else values.dtype))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return tmp_path / "made.gguf"


@pytest.mark.parametrize("tensors, message", [
    ({"a.in_sum2": [1, 2]}, "'a' has only one of .in_sum2 and .counts"), ({"a.counts": [1]}, r"no tensor \*.in_sum2"),
    ({"a.weight": [1]}, "expected those of an imatrix"), ({"a.in_sum2": [1, 2, 3], "a.counts": [1, 1]}, "3 sums and 2 counts"),
    ({"a.in_sum2": [1, np.nan], "a.counts": [1]}, "not finite numbers"), ({"a.in_sum2": [1, -1], "a.counts": [1]}, "from 0 on"),
    ({"a.in_sum2": [1, 1], "a.counts": [-1]}, "counts that are not"), ({"a.in_sum2": [1, 1], "a.counts": [np.inf]}, "counts that are not"),
    ({"a.in_sum2": np.float16([1]), "a.counts": [1]}, "F16 and F32 values, expected F32")])
def test_damaged_files(tmp_path, tensors, message):
    with pytest.raises(ImatrixError, match=message):
        imatrix.read(gguf_of(tmp_path, tensors))


def test_what_a_file_cannot_hold(tmp_path):
    for total, count, message in ((1.0, 2**52, "chunks of 512 tokens, expected at most"), (1e39, 512, "not finite in float32")):
        for form in ("gguf", "dat"):
            with pytest.raises(ImatrixError, match=message):
                imatrix.save(Imatrix({"a": np.array([total])}, {"a": np.array([count])}), tmp_path / "made", form)
    assert not os.listdir(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["in_sum2", "counts"])
def test_signalling_nan(tmp_path, part):
    """It is no number, as NaN of the other kind, and no reason for a warning."""
    nan = np.array([0x7f800001], np.uint32).view(np.float32)
    with pytest.raises(ImatrixError, match="not finite numbers|counts that are not"):
        imatrix.read(gguf_of(tmp_path, {"a.in_sum2": [1], "a.counts": [1]} | {f"a.{part}": nan}))


def test_only_files_are_replaced(tmp_path):
    """Not a pipe or a device; and the file that a link leads to."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    found = Imatrix({"a": np.ones(2)}, {"a": np.array([512])})
    shutil.copy(pydsa.DEMO, tmp_path / "model")
    for path, message in ((tmp_path / "pipe", "no regular file"), (os.devnull, "no regular file"), ("", "is empty"), (".", "a directory"),
                          (tmp_path / "model", "another file is there, and would be lost")):
        for write in (imatrix.check_target, lambda path: imatrix.save(found, path)):
            with pytest.raises(ImatrixError, match=message):
                write(path)
    (tmp_path / "file.part").write_text("another's")
    for _ in range(2):
        imatrix.check_target(tmp_path / "file")
        imatrix.save(found, tmp_path / "link")
    assert (tmp_path / "file.part").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.part", "link", "model", "pipe"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()
    assert imatrix.read(tmp_path / "file").chunks == 1


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no imatrix, but a text which is long enough")
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "not a regular file"), (tmp_path / "text", "no imatrix"),
                          (tmp_path / "empty", "takes 4 bytes, but 0"), (pydsa.DEMO, "expected those of an imatrix: this is another GGUF"),
                          ("\0", "null")):
        with pytest.raises(ImatrixError, match=message):
            imatrix.read(path)
    with pytest.raises(GGUFError, match="imatrix.chunk_size is missing|'imatrix.chunk_size' is missing"):
        imatrix.read(gguf_of(tmp_path, {"a.in_sum2": [1], "a.counts": [1]}, chunk_size=None))


def test_dat_files_that_end_early(tmp_path):
    """Only the last fields may be missing, as in older files."""
    found = Imatrix({"a": np.ones(2), "b": np.ones(4)}, {"a": np.array([4]), "b": np.array([4, 0])}, ["text"], 4)
    data, read = file_of(tmp_path, found, "whole.dat", "dat").read_bytes(), {}
    for n in range(len(data) + 1):
        (tmp_path / "cut.dat").write_bytes(data[:n])
        with contextlib.suppress(ImatrixError):
            read[n] = imatrix.read(tmp_path / "cut.dat", 4)
    assert list(read) == [len(data) - 12, len(data)] and read[len(data)].datasets == ["text"]
    assert read[len(data)].mean("b").tolist() == [[0.25, 0.25, 1, 1]]       # experts have no counts there
    for start, word, message in ((0, -1, "entries is -1"), (4, 1 << 30, "takes 1073741824 bytes"), (9, 0, "chunks of 'a' is 0"),
                                 (13, -5, "values of 'a' is -5"), (17, -1, "not finite numbers")):
        (tmp_path / "wrong.dat").write_bytes(data[:start] + word.to_bytes(4, "little", signed=True) + data[start + 4:])
        with pytest.raises(ImatrixError, match=message):
            imatrix.read(tmp_path / "wrong.dat", 4)


def test_an_imatrix_of_another_model(small_model):
    tensors = open_gguf(small_model()).tensors
    with pytest.raises(ImatrixError, match=r"has no tensor of the model"):
        Imatrix({"a": np.ones(2)}, {"a": np.array([1])}).for_model(tensors)
    name = "blk.1.ffn_up_exps.weight"
    for n, counts in ((72, [1]), (576, [1] * 9), (576, [1] * 4)):
        with pytest.raises(ImatrixError, match=rf"of '{name}', expected those of 8 x 72 columns in m.gguf: it is that of another"):
            Imatrix({name: np.ones(n)}, {name: np.array(counts)}).for_model(tensors, "m.gguf")


def test_coverage():
    counts = {"blk.1.ffn_up_exps.weight": [0, 2, 90, 0], "blk.1.ffn_down_exps.weight": [0, 2, 90, 0], "blk.1.attn_output.weight": [9],
              "blk.0.attn_output.weight": [0]}
    found = Imatrix({name: np.ones(8) for name in counts}, {name: np.array(n) for name, n in counts.items()})
    tensors = open_gguf(pydsa.DEMO).tensors
    first, second = imatrix.coverage(found)
    assert (first["layer"], first["tensor"], first["tokens"], first["never_ids"]) == (0, "attn_output", 0, "0")
    assert second == {"layer": 1, "tensor": "ffn_down_exps, ffn_up_exps", "experts": 4, "tokens": 92, "never": 2, "rarely": 1,
                      "least": 0, "median": 1.0, "most": 90, "never_ids": "0 3"}
    missing = {(row["layer"], row["tensor"]) for row in imatrix.coverage(found, tensors) if row["experts"] == 1}
    assert len(missing) == 4 and (3, "attn_k_b, attn_kv_a_mqa, attn_output, attn_q_a, attn_q_b, attn_v_b, ffn_down_exps, ffn_down_shexp, "
                                     "ffn_gate_exps, ffn_gate_inp, ffn_gate_shexp, ffn_up_exps, ffn_up_shexp, indexer.attn_k, "
                                     "indexer.attn_q_b, indexer.proj") in missing


# The command

def run(*args):
    return CliRunner().invoke(main, ["imatrix", "-t", "1", *map(str, args)])


def test_the_command_goes_on_where_it_was(tmp_path):
    options = "-f", NOTES, "-c", "128", "--table", "json"
    whole = run(*options, "--chunks", 3, "-o", tmp_path / "whole.gguf")
    assert whole.exit_code == 0 and {row["tokens"] for row in json.loads(whole.stdout)} == {3 * 128 * 2}
    first = run(*options, "--chunks", 1, "-o", tmp_path / "part.gguf", "--no-ppl")
    assert "perplexity" not in first.stderr
    rest = run(*options, "--chunks", 2, "--from-chunk", 1, "--in-file", tmp_path / "part.gguf", "-o", tmp_path / "part.gguf",
               "--save-frequency", 2)
    assert first.exit_code == 0 and rest.stdout == whole.stdout and re.search(r"perplexity \d+\.\d{4} ± ", whole.stderr)
    assert f"wrote {tmp_path / 'part.gguf'}: 60 tensors, 3 chunks" in rest.stderr
    assert agree(imatrix.read(tmp_path / "part.gguf"), imatrix.read(tmp_path / "whole.gguf"), bound=1e-6)
    assert (tmp_path / "part.gguf.at_3").read_bytes() == (tmp_path / "part.gguf").read_bytes()


def test_an_interrupt_leaves_what_is_complete(tmp_path, monkeypatch):
    def interrupted(model, ids, score, **options):
        yield imatrix.read(THEIRS)
        raise KeyboardInterrupt
    monkeypatch.setattr(imatrix.running, "collect", interrupted)
    result = run("-f", NOTES, "-c", 96, "--from-chunk", 4, "-o", tmp_path / "a.gguf")
    assert (result.exit_code, result.stdout) == (130, "") and (tmp_path / "a.gguf").read_bytes() == THEIRS.read_bytes()
    assert f"has 1 chunks of the text; to go on: --in-file {tmp_path / 'a.gguf'} --from-chunk 5" in result.stderr


def test_the_command_adds_files_and_shows_them(tmp_path):
    result = run("--in-file", f"{THEIRS},{THEIRS}", "-c", 96, "-o", tmp_path / "sum.dat", "--output-format", "dat")
    assert result.exit_code == 0 and "6 chunks of 96 tokens" in result.stderr
    shown = run("--in-file", tmp_path / "sum.dat", "-c", 96, "--show-statistics")
    rows = run("--in-file", tmp_path / "sum.dat", "-c", 96, "--show-statistics", "--table", "jsonl").stdout.splitlines()
    assert shown.exit_code == 0 and shown.stdout.count("\n") == 2 + 45 + 1 + 2 + 3 and len(rows) == 45
    met = {(row["layer"], row["tensor"]): row for row in map(json.loads, rows)}
    assert f"{met[0, 'indexer.proj']['sum']:.2f}" == "264.29"       # means do not change where a file is added to itself


@pytest.mark.parametrize("args, message", [
    ([], "There is nothing to do: give a text with -f, or files to add up with --in-file"),
    (["-f", NOTES, "-c", "9999"], "text has 3011 tokens, expected at least 9999"), (["-f", NOTES, "--chunks", "0"], "--chunks is 0"),
    (["-f", NOTES, "-o", pydsa.DEMO], "would replace .*, which is read"), (["-f", NOTES, "-o", NOTES], "would replace .*notes.txt"),
    (["-f", NOTES, "-o", "tests"], "cannot be written .Is a directory"),
    (["-f", NOTES, "-o", "none/a.gguf"], "cannot be written .No such file"),
    (["-f", NOTES, "--in-file", str(THEIRS)], "it is that of another model"), (["--show-statistics"], "for one imatrix"),
    ([pydsa.DEMO, "--in-file", str(THEIRS)], "it is that of another model"), (["--in-file", "none"], "none: the imatrix cannot be read"),
    (["-f", os.devnull], "The text is empty")])
def test_mistakes(tmp_path, args, message):
    result = run(*([] if "-o" in args else ["-o", tmp_path / "a.gguf"]), *args)
    assert result.exit_code == 2 and result.stdout == "" and not os.listdir(tmp_path)
    assert re.search(message, result.stderr)


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: files.check_target(path), lambda path: files.save(Imatrix({}, {}), path)):
        with pytest.raises(ImatrixError, match="no regular file"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1
