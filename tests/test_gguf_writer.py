"""The GGUF writer: what readers find, parts, interruptions, and what is refused before anything is written."""
import json
import shutil

import gguf
import numpy as np
import pytest

from pydsa.errors import PydsaError, TargetError
from pydsa.gguf.file import open_gguf
from pydsa.gguf.layout import Layout, TensorInfo, pack, packed_metadata, parse_size
from pydsa.gguf.writer import GGUFWriter

TENSORS = [TensorInfo("a.weight", "F32", (3, 5)), TensorInfo("b.weight", "Q8_0", (2, 2, 64)), TensorInfo("c.weight", "F16", (7,)),
           TensorInfo("d.weight", "BF16", (4, 4))]
METADATA = {"general.architecture": "deepseek32", "general.name": "Ä", "x.count": 7, "x.scale": 0.5, "x.yes": True, "x.no": pack(-3, 5),
            "x.words": ["a", "", "ß"], "x.floats": np.float32([1, 2]), "x.bools": np.array([True, False]), "general.alignment": 64}


def data(info):
    return np.random.default_rng(len(info.name)).integers(0, 256, info.n_bytes, np.uint8) + np.uint8(ord(info.name[0]))


def write(path, stop=None, error=KeyboardInterrupt, source="", **options):
    """Write TENSORS, with an exception before the tensor `stop`."""
    with GGUFWriter(Layout(path, METADATA, TENSORS, **options), source) as writer:
        for info in list(writer.remaining):
            if info.name == stop:
                raise error
            bytes_ = data(info)
            writer.write(info, [bytes_[:10], bytes_[10:]])
    return writer


def check(path):
    file = open_gguf(path)
    assert {name: (t.type, t.shape, t.data.tobytes()) for name, t in file.tensors.items()} == {
        info.name: (info.type, info.shape, data(info).tobytes()) for info in TENSORS}
    return file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_gguf_py_reads_what_is_written(tmp_path):
    write(tmp_path / "m.gguf")
    file = check(tmp_path / "m.gguf")
    assert {key: getattr(value, "tolist", lambda: value)() for key, value in file.metadata.items()} == {
        **METADATA, "x.no": -3, "x.floats": [1, 2], "x.bools": [True, False]}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {key: reader.fields[key].contents() for key in METADATA} == {
        **METADATA, "x.no": -3, "x.floats": [1, 2], "x.bools": [True, False]}
    assert [(t.name, t.data.tobytes()) for t in reader.tensors] == [(info.name, data(info).tobytes()) for info in TENSORS]
    assert all(t.data_offset % 64 == 0 for t in reader.tensors)
    assert names(tmp_path) == ["m.gguf"]


def test_metadata_are_copied_with_their_types(tmp_path):
    write(tmp_path / "m.gguf", split_max_tensors=2)
    pairs = packed_metadata(tmp_path / "m-00001-of-00002.gguf")
    assert pairs == {key: pack(value) for key, value in METADATA.items()}


def test_parts_are_those_of_llama_cpp(tmp_path):
    write(tmp_path / "m.gguf", split_max_bytes=200)
    assert names(tmp_path) == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    file = check(tmp_path / "m-00001-of-00003.gguf")
    assert file.part_names == [["a.weight"], ["b.weight"], ["c.weight", "d.weight"]]       # b takes 272 bytes
    reader = gguf.GGUFReader(tmp_path / "m-00002-of-00003.gguf")
    assert {key: (field.contents(), field.types[0].name) for key, field in reader.fields.items() if key.startswith("split")} == {
        "split.no": (1, "UINT16"), "split.count": (3, "UINT16"), "split.tensors.count": (4, "INT32")}


@pytest.mark.parametrize("options", [{}, {"split_max_tensors": 1}])
def test_an_interrupted_run_goes_on(tmp_path, options):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.gguf", stop="c.weight", **options)
    assert not list(tmp_path.glob("*.gguf")) and (tmp_path / "m.gguf.journal").exists()
    writer = write(tmp_path / "m.gguf", **options)
    assert writer.resumed == sum(info.n_bytes for info in TENSORS[:2])
    check(sorted(tmp_path.glob("*.gguf"))[0])
    assert len(names(tmp_path)) == (4 if options else 1)


def test_what_is_damaged_meanwhile_is_written_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.gguf", stop="d.weight")
    partial = tmp_path / "m.gguf.partial"
    bytes_ = bytearray(partial.read_bytes())
    bytes_[Layout(tmp_path / "m.gguf", METADATA, TENSORS).parts[0].starts[1]] ^= 1
    partial.write_bytes(bytes_)
    with open(tmp_path / "m.gguf.journal", "a") as journal:
        journal.write('["d.wei')
    assert write(tmp_path / "m.gguf").resumed == TENSORS[0].n_bytes
    check(tmp_path / "m.gguf")


@pytest.mark.parametrize("damage", ["no part", "other header", "other source"])
def test_another_run_starts_again(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.gguf", stop="d.weight", split_max_tensors=1)
    if damage == "no part":
        (tmp_path / "m-00001-of-00004.gguf.partial").unlink()
    if damage == "other header":
        (tmp_path / "m-00001-of-00004.gguf.partial").write_bytes(b"")
    writer = write(tmp_path / "m.gguf", source="another" if damage == "other source" else "")
    assert writer.resumed == 0 and "starts again" in writer.restarted
    check(tmp_path / "m.gguf")
    assert names(tmp_path) == ["m.gguf"]


def test_a_refusal_leaves_nothing(tmp_path):
    with pytest.raises(PydsaError):
        write(tmp_path / "m.gguf", stop="c.weight", error=PydsaError("the source is damaged"))
    assert names(tmp_path) == []


def test_a_full_disk_keeps_what_is_written(tmp_path):
    layout = Layout(tmp_path / "m.gguf", METADATA, TENSORS)
    with pytest.raises(TargetError, match="No space left.*the same command goes on"), GGUFWriter(layout) as writer:
        writer.write(TENSORS[0], [data(TENSORS[0])])
        file, writer._file = writer._file, open("/dev/full", "wb", buffering=0)
        with file:
            writer.write(TENSORS[1], [data(TENSORS[1])])
    assert write(tmp_path / "m.gguf").resumed == TENSORS[0].n_bytes
    check(tmp_path / "m.gguf")


def test_what_cannot_be_written_is_refused_before(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    for name, match in {"": "empty", "m-00001-of-00002.gguf": "name of a part", "no/m.gguf": "no such folder", "a\0b": "cannot be written",
                        ".": "Is a directory"}.items():
        with pytest.raises(TargetError, match=match):
            Layout(name and tmp_path / name, METADATA, TENSORS).check()
    layout = Layout(path, METADATA, TENSORS)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(TargetError, match="MB are to be written, but 0.0 MB are free"):
        GGUFWriter(layout)
    monkeypatch.undo()
    path.write_bytes(b"mine")
    with pytest.raises(TargetError, match="--force"):
        layout.check()
    layout.check(overwrite=True)
    with pytest.raises(TargetError, match="which is read"):
        layout.check(overwrite=True, inputs=[path])
    assert names(tmp_path) == ["m.gguf"] and path.read_bytes() == b"mine"
    for other in layout.parts[0].partial, layout.journal:
        path.rename(other)
        with pytest.raises(TargetError, match=f"{other.name}: the output would replace this file, which is read"):
            GGUFWriter(layout, inputs=[other])
        assert names(tmp_path) == [other.name] and other.read_bytes() == b"mine"
        other.rename(path)
    layout.journal.mkdir()
    with pytest.raises(TargetError, match="m.gguf.journal: the file cannot be written .Is a directory"):
        GGUFWriter(layout, overwrite=True)


def test_two_runs_at_a_time_are_refused(tmp_path):
    layout = Layout(tmp_path / "m.gguf", METADATA, TENSORS)
    with pytest.raises(KeyboardInterrupt), GGUFWriter(layout) as writer:
        writer.write(TENSORS[0], [data(TENSORS[0])])
        with pytest.raises(TargetError, match="another process"), GGUFWriter(layout):
            pass
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "m.gguf.journal").read_text().splitlines()[-1])[0] == "a.weight"


def test_sizes():
    assert [parse_size(text) for text in ("5", "3K", "40G", "1t")] == [5, 3000, 40 * 10**9, 10**12]
    for text in ("", "0", "-1", "1.5G", "G", "5GB", "٣"):
        with pytest.raises(PydsaError, match="expected a number of bytes"):
            parse_size(text)
