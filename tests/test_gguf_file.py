"""The GGUF reader against gguf-py's, and on malformed files."""
import mmap
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from gguf_cases import (EIGHT_FLOATS, MALFORMED, ONE, STRING, U8, alignment, array, gguf, info, kv, sample, split_kvs,
                        text, u32, u64)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pydsa.errors import GGUFError
from pydsa.gguf.file import GGML_TYPES, MAX_HEADER, Metadata, open_gguf

SAMPLE = sample()


def write(folder, data, name="model.gguf"):
    path = Path(folder) / name
    path.write_bytes(data)
    return path


def assert_fails(path, expected):
    """Opening a file fails with one short sentence that matches.

    The sentence begins with a file's name.
    """
    with pytest.raises(GGUFError, match=expected) as error:
        open_gguf(path)
    message = str(error.value)
    assert message.startswith(str(Path(path).parent)) and "\n" not in message
    assert len(message) < 400 + len(str(path)) * 2


# Sound files


def test_type_table_is_that_of_gguf_py():
    for ggml_type, (block, n_bytes) in GGML_QUANT_SIZES.items():
        if ggml_type <= 42 and ggml_type.name != "Q8_1":    # gguf-py has Q8_1's size from before its scales were f16
            assert GGML_TYPES[ggml_type] == (ggml_type.name, block, n_bytes)
    assert not GGML_TYPES.keys() & {4, 5, 31, 32, 33, 36, 37, 38}
    assert len({kind.name for kind in GGML_TYPES.values()}) == len(GGML_TYPES)


@pytest.mark.parametrize("align", [None, 8, 32, 64, 4096])
def test_equals_gguf_py(tmp_path, align):
    rng = np.random.default_rng(1)
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "deepseek32")
    if align:
        writer.add_custom_alignment(align)
    for kind, value in (("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768), ("uint32", 2**32 - 1),
                        ("int32", -2**31), ("uint64", 2**64 - 1), ("int64", -2**63), ("float32", 1.5),
                        ("float64", 1e-300), ("bool", True), ("string", "Grüße, 世界\0\n")):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    for element, values in (("UINT8", [0, 255]), ("INT8", [-1]), ("UINT16", [1, 65535]), ("INT16", [-1, 1]),
                            ("UINT32", [2**32 - 1]), ("INT32", [-5, 5]), ("UINT64", [2**64 - 1]),
                            ("INT64", [-2**63, 0]), ("FLOAT32", [0.5, -0.0]), ("FLOAT64", [1e300]),
                            ("BOOL", [True, False, True])):
        writer.add_key_value(f"a.{element}", values, GGUFValueType.ARRAY, sub_type=GGUFValueType[element])
    writer.add_array("a.STRING", ["one", "", "zwölf", "\U0001f600"])
    written = {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32), "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.integers(-9, 9, (2, 3, 1, 2)).astype(np.int32)}
    for name, values in written.items():
        writer.add_tensor(name, values)
    for name, kind in (("q8", "Q8_0"), ("q4", "Q4_0")):
        written[name] = quantize(rng.standard_normal((2, 3, 64)).astype(np.float32), GGMLQuantizationType[kind])
        writer.add_tensor(name, written[name], raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader, file = GGUFReader(path), open_gguf(str(path))
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    ours = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    assert ours == theirs
    assert file.metadata["a.FLOAT64"].dtype == np.float64 and file.metadata["a.BOOL"].dtype == np.bool_
    assert [(t.name, t.tensor_type.name, tuple(map(int, reversed(t.shape)))) for t in reader.tensors] == [
        (t.name, t.type, t.shape) for t in file.tensors.values()]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.data.dtype == np.uint8 and ours.data.shape[:-1] == ours.shape[:-1]
        assert ours.data.tobytes() == theirs.data.tobytes() == written[ours.name].tobytes()
    assert (file.version, file.paths, file.n_bytes) == (3, [path], path.stat().st_size)


def test_sample_is_sound(tmp_path):
    file = open_gguf(write(tmp_path, SAMPLE))
    assert file.metadata["tokens"] == ["a", "", "世界"] and file.metadata["u64"] == 2**64 - 1
    assert file.metadata["yes"] is True and file.metadata["no"] is False and len(file.metadata["none"]) == 0
    assert file.tensors["a"].data.view(np.float32).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert file.tensors["b"].shape == (1,) and file.tensors["b"].data.tolist() == [5]
    assert file.tensors["c.weight"].data.tolist() == np.arange(102).reshape(3, 34).tolist()


def test_version_2(tmp_path):
    assert open_gguf(write(tmp_path, gguf([kv("x", U8, b"\3")], version=2))).version == 2


def test_vocabulary_without_tensors(tmp_path):
    file = open_gguf(write(tmp_path, gguf([array("tokens", STRING, 2, text("a") + text("b"))])))
    assert file.tensors == {} and file.metadata.strings("tokens") == ["a", "b"]


def test_nothing_in_it(tmp_path):
    file = open_gguf(write(tmp_path, gguf()))
    assert (file.metadata, file.tensors) == ({}, {})


def test_views_are_read_only_and_keep_the_map(tmp_path):
    path = write(tmp_path, SAMPLE)
    data = open_gguf(path).tensors["c.weight"].data
    base = data
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(getattr(base, "obj", base), mmap.mmap)     # numpy keeps the mmap, or a memoryview of it
    path.unlink()
    assert data.tolist() == np.arange(102).reshape(3, 34).tolist()
    with pytest.raises(ValueError):
        data[0, 0] = 1
    with pytest.raises(ValueError):
        data.setflags(write=True)


def test_metadata_arrays_are_read_only(tmp_path):
    metadata = open_gguf(write(tmp_path, SAMPLE)).metadata
    for key in ("types", "flags", "scores"):
        assert metadata[key].flags.aligned
        with pytest.raises(ValueError):
            metadata[key][0] = 0


def test_weights_are_not_read(tmp_path):
    n_rows = 1 << 20
    path = write(tmp_path, gguf([], [info("big", [1024, n_rows])]))
    os.truncate(path, path.stat().st_size + 4096 * n_rows)       # a sparse file of 4 GiB
    tensor = open_gguf(path).tensors["big"]
    assert tensor.data.shape == (n_rows, 4096) and not tensor.data[-1].any()
    assert path.stat().st_blocks * 512 < 1 << 20


def test_header_of_any_size_is_bounded(tmp_path):
    path = write(tmp_path, gguf([array("x", U8, 2 * MAX_HEADER, b"")]))
    os.truncate(path, 4 * MAX_HEADER)
    assert_fails(path, r"length of 'x' is \d+, expected at most \d+")
    write(tmp_path, gguf([kv("x", STRING, u64(MAX_HEADER))]))
    os.truncate(path, 4 * MAX_HEADER)
    assert_fails(path, "a header may go on at byte")


# Malformed files

@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path, name):
    data, expected = MALFORMED[name]
    assert_fails(write(tmp_path, data), expected)


def test_malformed_cases_break_one_thing(tmp_path):
    """The parts that the malformed files are made of are sound."""
    open_gguf(write(tmp_path, gguf(infos=ONE, data=EIGHT_FLOATS)))
    open_gguf(write(tmp_path, gguf([kv("k" * 65535, U8, b"\1"), kv("x", STRING, text("abc"))])))
    open_gguf(write(tmp_path, gguf(infos=[info("n" * 63, [1] * 4)], data=u32(0))))
    open_gguf(write(tmp_path, gguf([alignment(64)], [info("a", [8]), info("b", [8], offset=64)], bytes(96), align=64)))


def test_every_truncation_fails(tmp_path):
    for size in range(len(SAMPLE)):
        assert_fails(write(tmp_path, SAMPLE[:size]), "empty" if size == 0 else "expected|incomplete")


def test_bytes_after_the_last_tensor_are_no_fault(tmp_path):
    assert list(open_gguf(write(tmp_path, SAMPLE + bytes(100))).tensors) == ["a", "b", "c.weight"]


def assert_only_gguf_errors(data):
    """Reading gives a GGUFError, or a file whose every byte can be read."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, data)
        try:
            file = open_gguf(path)
        except GGUFError as error:
            assert str(error).startswith(str(path))
        else:
            assert sum(tensor.data.size for tensor in file.tensors.values()) <= len(data)
            assert sum(int(tensor.data.sum()) for tensor in file.tensors.values()) >= 0


mutation = st.one_of(
    st.tuples(st.just("set"), st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("insert"), st.integers(0, len(SAMPLE)), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("delete"), st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("set"), st.integers(0, len(SAMPLE) - 1),
              st.sampled_from([u64(-1), u64(2**63), u64(2**63 - 1), u64(2**32), u64(0), u32(2**31), u32(9)])),
    st.tuples(st.just("truncate"), st.integers(0, len(SAMPLE)), st.just(b"")))


def mutate(data, mutations):
    for kind, at, change in mutations:
        if kind == "set":
            data = data[:at] + change + data[at + len(change):]
        elif kind == "insert":
            data = data[:at] + change + data[at:]
        else:
            data = data[:at] + (data[at + len(change):] if kind == "delete" else b"")
    return data


@settings(max_examples=600, deadline=None)
@given(st.lists(mutation, min_size=1, max_size=3))
@example([("set", 8, u64(2**63))])
def test_mutated_files_raise_only_gguf_errors(mutations):
    assert_only_gguf_errors(mutate(SAMPLE, mutations))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_raises_only_gguf_errors(noise):
    assert_only_gguf_errors(b"GGUF" + u32(3) + u64(1) + u64(1) + noise)


def test_paths_that_are_no_file(tmp_path):
    assert_fails(tmp_path / "absent.gguf", "absent.gguf: no such file, expected a GGUF file")
    assert_fails(tmp_path / "absent" / "model.gguf", "no such file")
    assert_fails(write(tmp_path, b"", "empty.gguf"), "the file is empty, expected a GGUF file")
    (tmp_path / "folder.gguf").mkdir()
    assert_fails(tmp_path / "folder.gguf", "this is a directory, expected a GGUF file")
    assert_fails(tmp_path / "empty.gguf" / "model.gguf", "cannot be opened")
    assert_fails(tmp_path / "a\0b.gguf", "cannot be opened")
    assert_fails(tmp_path / ("n" * 300), "cannot be opened")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert_fails(tmp_path / "pipe.gguf", "not a regular file")


def test_file_without_permission(tmp_path, monkeypatch):
    """A missing permission is simulated, as root may read every file."""
    def refuse(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    path = tmp_path / "model.gguf"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.truncate(path, 100)
    assert_fails(path, r"cannot be opened \(Permission denied\)")


# Split files


def part_name(number, count=3):
    return f"model-{number:05d}-of-{count:05d}.gguf"


def write_parts(folder, count=3):
    """Write parts with one F32 tensor each, and return the first's path.

    Each tensor is [8] times its part's number.
    """
    for i in range(count):
        kvs = split_kvs(i, count, count) + ([kv("general.name", STRING, text("split"))] if i == 0 else [])
        write(folder, gguf(kvs, [info(f"t{i}", [8])], struct.pack("<8f", *[i + 1.0] * 8)), part_name(i + 1, count))
    return Path(folder) / part_name(1, count)


def test_split_file(tmp_path):
    first = write_parts(tmp_path)
    file = open_gguf(first)
    assert file.paths == [tmp_path / part_name(i) for i in (1, 2, 3)]
    assert file.n_bytes == sum(path.stat().st_size for path in file.paths)
    assert file.metadata.string("general.name") == "split" and file.metadata.path == str(first)
    assert [float(file.tensors[f"t{i}"].data.view(np.float32)[0]) for i in range(3)] == [1, 2, 3]


def test_split_file_of_gguf_py(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "glm-dsa", split_max_tensors=2, small_first_shard=True)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "m-00001-of-00004.gguf")
    assert len(file.paths) == 4 and file.metadata.string("general.architecture") == "glm-dsa"
    values = [tensor.data.view(np.float32).tolist() for tensor in file.tensors.values()]
    assert values == [[[i] * 3] * 2 for i in range(5)]


def test_one_part_of_one(tmp_path):
    data = gguf(split_kvs(0, 1, 1), ONE, EIGHT_FLOATS)
    assert len(open_gguf(write(tmp_path, data, part_name(1, 1))).tensors) == 1
    assert len(open_gguf(write(tmp_path, data)).tensors) == 1
    assert len(open_gguf(write(tmp_path, gguf(infos=ONE, data=EIGHT_FLOATS), part_name(1, 1))).tensors) == 1


@pytest.mark.parametrize("name", ["merged.gguf", part_name(1, 3)])
def test_merged_parts(tmp_path, name):
    """llama-gguf-split sets split.count to 0 and leaves the other keys."""
    file = open_gguf(write(tmp_path, gguf(split_kvs(0, 0, 1), ONE, EIGHT_FLOATS), name))
    assert len(file.tensors) == len(file.paths) == 1


def test_a_link_to_the_first_part(tmp_path):
    """The other parts are beside what it leads to, and not beside the link."""
    first, links = write_parts(tmp_path), tmp_path / "links"
    links.mkdir()
    for name, target in (("latest.gguf", first), ("again.gguf", links / "latest.gguf")):
        (links / name).symlink_to(target)
        assert open_gguf(links / name).paths[1].parent == tmp_path
    second = part_name(2, 3)        # as in a cache of downloads, where parts are links to names without meaning
    first.rename(tmp_path / "blob")
    (tmp_path / first.name).symlink_to("blob")
    assert len(open_gguf(tmp_path / first.name).paths) == 3
    (links / "second.gguf").symlink_to(tmp_path / second)
    with pytest.raises(GGUFError, match=f"not the first part of a split model, open {tmp_path / first.name} instead"):
        open_gguf(links / "second.gguf")


@pytest.mark.parametrize("number", [0, 2, 3, 99999])
def test_only_the_first_part_opens(tmp_path, number):
    first = write_parts(tmp_path)
    assert_fails(tmp_path / part_name(number), f"not the first part of a split model, open {first} instead")


def part(number, count=3, total=3, name="t1", kvs=()):
    return gguf([*split_kvs(number, count, total), *kvs], [info(name, [8])], EIGHT_FLOATS)


SPLIT_ERRORS = {
    "missing part": (2, None, "no such file, expected part 2 of the 3 of model-00001-of-00003.gguf"),
    "empty part": (2, b"", "the file is empty, expected part 2 of the 3"),
    "part is no GGUF": (3, b"GGML" + bytes(99), "this is not a GGUF file"),
    "part cut": (2, part(1)[:-1], "tensor 't1' ends at byte"),
    "wrong split.no": (2, part(2), "00002-of-00003.gguf: split.no is 2, expected 1"),
    "first is not 0": (1, part(1, name="t0"), "split.no is 1, expected 0: open the first part"),
    "split.count of a part": (3, part(2, count=4, name="t2"), "split.count is 4, expected 3"),
    "split.count of the first": (1, part(0, count=2, name="t0"), r"one of 2 part\(s\) by its split.count, but one of 3 by"),
    "split.count 0": (1, part(0, count=0, name="t0"), r"1 part\(s\) have 1 tensors, expected the 3 of"),
    "split.count of a part 0": (2, part(1, count=0), "split.count is 0, expected 3"),
    "no keys in the first": (1, gguf(infos=ONE, data=EIGHT_FLOATS), r"one of 1 part\(s\) by its split.count"),
    "no keys in a part": (2, gguf(infos=ONE, data=EIGHT_FLOATS), "the key 'split.no' is missing"),
    "key of another type": (2, gguf([kv("split.no", STRING, text("1"))]), "'split.no' is the string '1'"),
    "split.tensors.count": (1, part(0, total=4, name="t0"), "00002-of-.*: split.tensors.count is 3, expected 4"),
    "split.tensors.count of a part": (2, part(1, total=7), "00002-of-00003.gguf: split.tensors.count is 7, expected 3"),
    "split.tensors.count -1": (1, part(0, total=-1, name="t0"), "'split.tensors.count' is the int -1"),
    "part with too few tensors": (2, gguf(split_kvs(1, 3, 3)), r"3 part\(s\) have 2 tensors, expected the 3 of"),
    "tensor in two parts": (3, part(2, name="t1"), "00003-of-00003.gguf: tensor 't1' is in an earlier part too"),
    "another alignment": (2, part(1, kvs=[alignment(64)]), "general.alignment is 64, expected 32 as in the first part"),
    "another model's part": (2, part(1, total=9), "the parts are not those of one model"),
    "another model": (2, gguf([kv("general.name", STRING, text("other"))], ONE, EIGHT_FLOATS), "'split.no' is missing"),
}


@pytest.mark.parametrize("name", SPLIT_ERRORS)
def test_split_errors(tmp_path, name):
    number, data, expected = SPLIT_ERRORS[name]
    first = write_parts(tmp_path)
    if data is None:
        (tmp_path / part_name(number)).unlink()
    else:
        write(tmp_path, data, part_name(number))
    assert_fails(first, expected)


@pytest.mark.parametrize("name", ["model.gguf", part_name(1, 2), "model-1-of-3.gguf", "model-00001-of-00003.gguf.part",
                                  "model-0000١-of-00003.gguf"])
def test_renamed_first_part(tmp_path, name):
    """A file name that contradicts the split keys is an error.

    Parts are found by their names alone.
    """
    first = write_parts(tmp_path)
    assert_fails(first.rename(tmp_path / name), r"one of 3 part\(s\) by its split.count, but one of . by its name")


# Metadata


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    return open_gguf(write(tmp_path_factory.mktemp("metadata"), SAMPLE)).metadata


def test_accessors(metadata):
    assert [metadata.integer(key, -9) for key in ("u8", "i8", "u16", "i16", "i32", "i64")] == [255, -1, 65534, -2, -7, -1]
    assert metadata.integer("u64", high=2**64) == 2**64 - 1 and metadata.integer("u8", 255, 255) == 255
    assert metadata.number("f32") == 0.5 and metadata.number("f64", 1e-6, 1e-6) == 1e-6
    assert metadata.number("i32") == -7 and type(metadata.number("i32")) is float
    assert metadata.boolean("yes") is True and metadata.boolean("no") is False
    assert metadata.string("general.architecture") == "deepseek32"
    assert metadata.strings("tokens") == ["a", "", "世界"]
    for key, values in (("types", [1, -2, 3]), ("flags", [1, 0, 1]), ("none", [])):
        assert metadata.integers(key).dtype == np.int64 and metadata.integers(key).tolist() == values


@pytest.mark.parametrize("accessor", ["integer", "number", "boolean", "string", "strings", "integers"])
def test_missing_key(metadata, accessor):
    get = getattr(metadata, accessor)
    with pytest.raises(GGUFError, match=r"model.gguf: the key 'absent' is missing, expected a"):
        get("absent")
    assert get("absent", default=None) is None and get("absent", default="x") == "x"


@pytest.mark.parametrize("accessor, key, arguments, expected", [
    ("integer", "f32", {}, "'f32' is the float 0.5, expected an integer from 0 on"),
    ("integer", "yes", {}, "is the bool True, expected an integer"),
    ("integer", "tokens", {}, "is an array of 3 strings, expected an integer"),
    ("integer", "i32", {}, "'i32' is the int -7, expected an integer from 0 on"),
    ("integer", "u8", {"low": 1, "high": 254}, "is the int 255, expected an integer from 1 to 254"),
    ("integer", "u64", {}, "is the int 18446744073709551615, expected an integer from 0"),
    ("number", "nan", {}, "is the float nan, expected a finite number"),
    ("number", "yes", {}, "is the bool True, expected a finite number"),
    ("number", "f32", {"low": 0.6}, "is the float 0.5, expected a finite number, at least 0.6"),
    ("number", "f32", {"low": 0, "high": 0.4}, "expected a finite number, at least 0, at most 0.4"),
    ("boolean", "u8", {}, "is the int 255, expected a bool"),
    ("string", "u8", {}, "is the int 255, expected a string"),
    ("string", "tokens", {}, "is an array of 3 strings, expected a string"),
    ("strings", "general.architecture", {}, "is the string 'deepseek32', expected an array of strings"),
    ("strings", "types", {}, "is an array of 3 int32 values, expected an array of strings"),
    ("integers", "scores", {}, "is an array of 2 float32 values, expected an array of integers"),
    ("integers", "tokens", {}, "is an array of 3 strings, expected an array of integers"),
    ("integers", "i32", {}, "is the int -7, expected an array of integers"),
    ("integers", "big", {}, "is an array of 1 uint64 values, expected an array of integers below"),
])
def test_wrong_value(metadata, accessor, key, arguments, expected):
    with pytest.raises(GGUFError, match=expected) as error:
        getattr(metadata, accessor)(key, **arguments)
    assert str(error.value).startswith(metadata.path)


def test_a_present_key_is_checked_in_spite_of_a_default(metadata):
    with pytest.raises(GGUFError, match="expected a string"):
        metadata.string("u8", default="x")


def test_metadata_made_by_hand():
    metadata = Metadata({"a.b": 3}, path="x.gguf")
    assert metadata.integer("a.b") == 3 and metadata == {"a.b": 3} and metadata.path == "x.gguf"
