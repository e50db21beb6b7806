"""Read GGUF files: `open_gguf(path)` returns metadata and mapped tensors.

A GGUF is: magic, version, n_tensors, n_kv; the key-value pairs; the tensor infos; padding; the weights.
The file, or all parts of a split one, is mapped read-only. It is not trusted: every byte before the weights is checked
here, and any fault raises a GGUFError of one sentence. The weights are mapped, not read.
"""
import contextlib
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from pydsa.errors import GGUFError
from pydsa.machine.maps import Map, check

REQUIRED: Any = object()         # default value that marks a key as required
MAX_HEADER = 1 << 27             # bytes, twenty times the largest of the supported models; a hostile header must not fill the memory
MAX_KEY, MAX_NAME = 65535, 63    # bytes; ggml stores a tensor's name in 64 bytes with a final zero
ALIGNMENTS = [1 << n for n in range(3, 21)]     # the format requires multiples of 8; more than 1 MiB is taken as damage
SPLIT_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")
# What is often there in place of a model, by its first bytes.
INSTEAD = {b"vers": ", but a pointer of Git LFS to one: get the file itself, with `git lfs pull`"} | dict.fromkeys(
    (b"<!do", b"<!DO", b"<htm"), ", but a web page, perhaps with the reason why there is no download: look at it")

U32, BOOL, STRING, ARRAY, U64, I64 = 4, 7, 8, 9, 10, 11
SCALARS = {type_id: (struct.Struct("<" + code), np.dtype(dtype)) for type_id, code, dtype in (
    (0, "B", "<u1"), (1, "b", "<i1"), (2, "H", "<u2"), (3, "h", "<i2"), (U32, "I", "<u4"), (5, "i", "<i4"),
    (6, "f", "<f4"), (BOOL, "B", "<u1"), (U64, "Q", "<u8"), (I64, "q", "<i8"), (12, "d", "<f8"))}


class GGMLType(NamedTuple):
    """A tensor type of ggml.

    Rows are divided into blocks of `block` elements, stored in `n_bytes` bytes each.
    """

    name: str
    block: int
    n_bytes: int


GGML_TYPES = {type_id: GGMLType(*fields) for type_id, *fields in (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2), (28, "F64", 1, 8),
    (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
    (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 36), (41, "Q1_0", 128, 18), (42, "Q2_0", 64, 18),
    (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292), (19, "IQ1_S", 256, 50), (29, "IQ1_M", 256, 56),
    (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (22, "IQ2_S", 256, 82), (18, "IQ3_XXS", 256, 98),
    (21, "IQ3_S", 256, 110), (20, "IQ4_NL", 32, 18), (23, "IQ4_XS", 256, 136),
    (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36))}


class Tensor(NamedTuple):
    """A tensor of the file, as a read-only view of the mapped bytes.

    With `make`, a tensor that is made of others: make() returns its bytes, and `data` only has their shape.
    """

    name: str
    type: str                  # "Q4_K"
    shape: tuple[int, ...]     # numpy order, the reverse of ggml's ne
    data: np.ndarray           # uint8 [*shape[:-1], bytes of a row]
    make: Callable[[], np.ndarray] | None = None
    made_of: str | None = None      # the name in the file of the tensor whose bytes these are, if it has another

    def read(self) -> "Tensor":
        """The tensor with its bytes as data."""
        return self if self.make is None else self._replace(data=self.make(), make=None)


class Metadata(dict):
    """The key-value pairs of a file, a dict.

    Values are int, float, bool, str or list[str]; an array of numbers or bools is a read-only numpy array. The accessors
    return the value of a key, or `default` if the key is missing. They raise a GGUFError, which names the file, the key
    and what was expected, if a required key is missing, or if a value has another type or is out of range.
    """

    def __init__(self, pairs=(), path: str = "metadata", asked=()):
        super().__init__(pairs)
        self.path, self.asked = path, set(asked)        # the keys that accessors were asked for

    def integer(self, key: str, low: int = 0, high: int = 2**63 - 1, default: Any = REQUIRED) -> int:
        """The integer at key, of any width, low <= value <= high."""
        expected = f"an integer from {low}" + (f" to {high}" if high < 2**63 - 1 else " on")
        return self._get(key, default, expected, lambda value: type(value) is int and low <= value <= high)

    def number(self, key: str, low: float | None = None, high: float | None = None, default: Any = REQUIRED) -> float:
        """The finite number at key, low <= value <= high, as a float."""
        def accept(value):
            return (type(value) in (int, float) and math.isfinite(value)
                    and (low is None or low <= value) and (high is None or value <= high))
        bounds = (f", at least {low}" if low is not None else "") + (f", at most {high}" if high is not None else "")
        return self._get(key, default, "a finite number" + bounds, accept, float)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        """The bool at key; a number is not accepted."""
        return self._get(key, default, "a bool", lambda value: type(value) is bool)

    def string(self, key: str, default: Any = REQUIRED) -> str:
        """The string at key."""
        return self._get(key, default, "a string", lambda value: type(value) is str)

    def strings(self, key: str, default: Any = REQUIRED) -> list[str]:
        """The array of strings at key."""
        return self._get(key, default, "an array of strings", lambda value: type(value) is list)

    def integers(self, key: str, default: Any = REQUIRED) -> np.ndarray:
        """The array of integers or bools at key, as a new int64 array [n]."""
        def accept(value):
            return isinstance(value, np.ndarray) and value.dtype.kind in "iub" and not (value > 2**63 - 1).any()
        return self._get(key, default, "an array of integers below 2**63 or of bools", accept,
                         lambda value: value.astype(np.int64))

    def _get(self, key, default, expected, accept, convert=lambda value: value):
        self.asked.add(key)
        if key not in self:
            if default is REQUIRED:
                raise GGUFError(f"{self.path}: the key {quote(key)} is missing, expected {expected}")
            return default
        if not accept(self[key]):
            raise GGUFError(f"{self.path}: the key {quote(key)} is {_describe(self[key])}, expected {expected}")
        return convert(self[key])


class GGUFFile(NamedTuple):
    """An open GGUF, with all parts of a split one."""

    metadata: Metadata              # of the first part
    tensors: dict[str, Tensor]      # by name, those of all parts, in file order
    paths: list[Path]               # of the parts
    n_bytes: int                    # of all parts together
    version: int
    part_names: list[list[str]]     # the names of the tensors of each part, in file order
    absent: frozenset = frozenset()     # paths of the parts that are on other machines (parts.py)
    maps: tuple = ()                # machine.maps.Map of each part that is here


def open_gguf(path: str | os.PathLike, absent: dict[int, GGUFFile] | None = None) -> GGUFFile:
    """Map the GGUF at `path`, with all parts of a split one.

    `path` must be the first part. The other parts must be beside it, with the same NAME in NAME-00001-of-000NN.gguf. absent: what stands
    for parts that are not there, by number (gguf.parts.absent_parts). Raises GGUFError if the file cannot be read, is damaged or is not the
    first part.
    """
    parts = open_parts(path, absent or ())
    return _join([parts[number] if number in parts else absent[number] for number in sorted({*parts, *(absent or ())})])


def open_parts(path: str | os.PathLike, absent=()) -> dict[int, GGUFFile]:
    """Map each part of the GGUF at `path` -> {number from 1 on: the part}.

    absent: numbers of parts that may be missing, and are left out then. Raises GGUFError as open_gguf() does.
    """
    if not os.fspath(path):     # to Path it is the current folder
        raise GGUFError("The name of the model's file is empty, expected that of a GGUF file.")
    path = Path(path)
    if os.path.islink(path) and not SPLIT_NAME.fullmatch(path.name) and SPLIT_NAME.fullmatch(os.path.basename(os.path.realpath(path))):
        path = path.resolve()       # a part: the others are beside it, and not beside the link
    name = SPLIT_NAME.fullmatch(path.name)
    if name and int(name[2]) != 1:
        first_path = path.with_name(f"{name[1]}-00001-of-{name[3]}.gguf")
        raise GGUFError(f"{path}: this is not the first part of a split model, open {first_path} instead")
    first = open_part(path, "a GGUF file")
    index = first.metadata.integer("split.no", default=0)
    if index:
        raise GGUFError(f"{path}: split.no is {index}, expected 0: open the first part of this split model instead")
    count, named = first.metadata.integer("split.count", 0, default=1), int(name[3]) if name else 1
    if count == 0:      # llama-gguf-split has merged the parts; the other split keys are as they were in the first
        return {1: first}
    if count != named:
        raise GGUFError(f"{path}: this is one of {count} part(s) by its split.count, but one of {named} by its name: "
                        "give all parts the names they had, NAME-00001-of-000NN.gguf")
    paths = {number: path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf") for number in range(2, count + 1)}
    return {1: first} | {number: open_part(part, f"part {number} of the {count} of {path.name}") for number, part in paths.items()
                         if number not in absent or os.path.exists(part)}


def _join(parts: list[GGUFFile]) -> GGUFFile:
    """Combine the tensors of all parts into one GGUFFile."""
    _check_split(parts)
    first, tensors = parts[0], {}
    alignment = _alignment(first.metadata)
    for part in parts:
        # A part without the key has an alignment of 32, whatever the first part has; writers disagree, so a difference is refused.
        part_alignment = _alignment(part.metadata)
        if part_alignment != alignment:
            raise GGUFError(f"{part.paths[0]}: general.alignment is {part_alignment}, expected {alignment} as in the first part")
        repeated = tensors.keys() & part.tensors.keys()
        if repeated:
            raise GGUFError(f"{part.paths[0]}: tensor {quote(min(repeated))} is in an earlier part too, expected in one")
        tensors.update(part.tensors)
    return GGUFFile(first.metadata, tensors, [part.paths[0] for part in parts], sum(part.n_bytes for part in parts), first.version,
                    [list(part.tensors) for part in parts], frozenset().union(*(part.absent for part in parts)),
                    tuple(one for part in parts for one in part.maps))


def _check_split(parts: list[GGUFFile]) -> None:
    """Check the split.* keys of all parts; a file without them is complete."""
    keys = ("split.no", "split.count", "split.tensors.count")
    if not any(key in (first := parts[0].metadata) for key in keys):
        return
    n_tensors, merged = first.integer("split.tensors.count"), first.integer("split.count") == 0
    for i, part in enumerate(parts):
        for key, expected in zip(keys, (i, 0 if merged else len(parts), n_tensors)):
            value = part.metadata.integer(key)
            if value != expected:
                raise GGUFError(f"{part.paths[0]}: {key} is {value}, expected {expected}: "
                                "the parts are not those of one model, get them again")
    n_found = sum(len(part.tensors) for part in parts)
    if n_found != n_tensors:
        raise GGUFError(f"{first.path}: {len(parts)} part(s) have {n_found} tensors, expected the {n_tensors} of "
                        "split.tensors.count: the parts are not those of one model, get them again")


def open_part(path: Path, role: str) -> GGUFFile:
    """Map and read one file; `role` is what error messages call it."""
    reader = Reader(path, map_file(path, role))
    maps = (Map(reader.data, path),)
    reader.take(4, "the magic")
    magic = reader.data[:reader.pos]
    if magic != b"GGUF":
        reader.fail(f"the file starts with {magic}, expected b'GGUF': this is not a GGUF file{INSTEAD.get(magic, '')}")
    version = reader.scalar(U32, "the version")
    if version and version & 0xFFFF == 0:
        reader.fail("the file is byte-swapped (big-endian), expected little-endian: gguf-convert-endian converts it")
    if version not in (2, 3):
        reader.fail(f"the GGUF version is {version}, expected 2 or 3")
    n_tensors = reader.count("the number of tensors", 33)    # name, n_dims, one dimension, type, offset
    n_kv = reader.count("the number of key-value pairs", 14)    # key, type, one byte
    metadata = _read_metadata(reader, n_kv)
    tensors = _map_tensors(reader, n_tensors, _alignment(metadata))
    check(maps)
    return GGUFFile(metadata, tensors, [path], len(reader.data), version, [list(tensors)], maps=maps)


def map_file(path: Path, role: str) -> mmap.mmap:
    """Map a file; `role` is what messages call it. Raises GGUFError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):     # checked before open(), which never returns for a pipe
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            hint = ": pydsa convert makes one of a folder of Hugging Face" if (path / "config.json").is_file() else ""
            raise GGUFError(f"{path}: this is {kind}, expected {role}{hint}")
        if status.st_size == 0:
            raise GGUFError(f"{path}: the file is empty, expected {role}")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise GGUFError(f"{path}: no such file, expected {role}") from None
    except (OSError, ValueError) as error:       # ValueError: a zero byte in the path, or a file emptied since stat()
        reason = getattr(error, "strerror", error)
        raise GGUFError(f"{path}: the file cannot be opened ({reason}), expected {role}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):      # Linux, if the file system can: the file is read into pages of 2 MiB
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _read_metadata(reader: "Reader", n_kv: int) -> Metadata:
    metadata = Metadata(path=str(reader.path))
    for i in range(n_kv):
        key = reader.string(f"key {i}", 1, MAX_KEY)
        if key in metadata:
            reader.fail(f"the key {quote(key)} is there twice, expected it once")
        type_id = reader.scalar(U32, f"the type of {quote(key)}")
        if key == "general.alignment" and type_id != U32:
            reader.fail(f"general.alignment is of type {type_id}, expected {U32} (u32)")
        metadata[key] = reader.value(type_id, quote(key))
    return metadata


def _alignment(metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if alignment not in ALIGNMENTS:
        raise GGUFError(f"{metadata.path}: general.alignment is {alignment}, "
                        f"expected a power of two from {ALIGNMENTS[0]} to {ALIGNMENTS[-1]}")
    return alignment


def _read_tensor_info(reader: "Reader", i: int) -> tuple[str, GGMLType, tuple[int, ...], int]:
    """The name, type, numpy shape and offset of tensor i."""
    name = reader.string(f"the name of tensor {i}", 1, MAX_NAME)
    what = f"tensor {quote(name)}"
    n_dims = reader.scalar(U32, f"the number of dimensions of {what}")
    if not 1 <= n_dims <= 4:
        reader.fail(f"{what} has {n_dims} dimensions, expected 1 to 4")
    ne = [reader.scalar(I64, f"dimension {d} of {what}") for d in range(n_dims)]
    if min(ne) < 1:
        reader.fail(f"{what} has the dimensions {ne}, expected at least 1 in each")
    type_id = reader.scalar(U32, f"the type of {what}")
    if type_id not in GGML_TYPES:
        reader.fail(f"{what} has the type id {type_id}, which is unknown or was removed, expected one of GGUF's types")
    ggml_type = GGML_TYPES[type_id]
    if ne[0] % ggml_type.block:
        reader.fail(f"{what} of type {ggml_type.name} has rows of {ne[0]}, expected a multiple of {ggml_type.block}")
    return name, ggml_type, tuple(reversed(ne)), reader.scalar(U64, f"the offset of {what}")


def _map_tensors(reader: "Reader", n_tensors: int, alignment: int) -> dict[str, Tensor]:
    """Read the tensor infos -> views of the mapped file, by name.

    Offsets must be offset[i+1] = pad(offset[i] + bytes[i]), so that no tensor overlaps another.
    """
    infos = [_read_tensor_info(reader, i) for i in range(n_tensors)]
    file = np.frombuffer(reader.data, np.uint8)
    weights = _pad(reader.pos, alignment)
    tensors, expected = {}, 0
    for name, ggml_type, shape, offset in infos:
        what = f"tensor {quote(name)}"
        if name in tensors:
            reader.fail(f"{what} is there twice, expected it once")
        if offset != expected:
            reader.fail(f"{what} has the offset {offset}, expected {expected}: "
                        f"the end of the tensor before it, padded to {alignment}")
        row_bytes = shape[-1] // ggml_type.block * ggml_type.n_bytes
        start, end = weights + offset, weights + offset + math.prod(shape[:-1]) * row_bytes
        if end > len(file):
            reader.fail(f"{what} ends at byte {end}, but the file at {len(file)}: it is incomplete, get it again")
        tensors[name] = Tensor(name, ggml_type.name, shape, file[start:end].reshape(*shape[:-1], row_bytes))
        expected = _pad(end - weights, alignment)
    return tensors


class Reader:
    """A position in a mapped header, with checked reads.

    Every read is checked against the end; `what` is its name in the error.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.pos, self.end = path, data, 0, min(len(data), MAX_HEADER)

    def fail(self, sentence: str) -> NoReturn:
        """Raise a GGUFError that names the file."""
        raise GGUFError(f"{self.path}: {sentence}")

    def take(self, n: int, what: str) -> int:
        """Advance by n bytes -> the position where they start."""
        if n > self.end - self.pos:
            limit = "the file ends" if self.end == len(self.data) else "a header may go on"
            self.fail(f"{what} takes {n} bytes from byte {self.pos} on, but {limit} at byte {self.end}: "
                      "the file is incomplete or damaged")
        self.pos += n
        return self.pos - n

    def scalar(self, type_id: int, what: str) -> int | float | bool:
        """A number or a bool of the given type."""
        packed, _ = SCALARS[type_id]
        value, = packed.unpack_from(self.data, self.take(packed.size, what))
        if type_id != BOOL:
            return value
        if value > 1:
            self.fail(f"{what} is a bool with the value {value}, expected 0 or 1")
        return value == 1

    def count(self, what: str, n_bytes: int) -> int:
        """A number of items of at least n_bytes each, which must fit the rest."""
        n = self.scalar(I64, what)      # signed, so that the error shows -1
        left = self.end - self.pos
        if not 0 <= n <= left // n_bytes:
            self.fail(f"{what} is {n}, expected at most {left // n_bytes}, as {left} bytes remain")
        return n

    def string(self, what: str, low: int = 0, high: int = MAX_HEADER) -> str:
        """A string of low to high bytes, decoded from UTF-8."""
        n = self.scalar(U64, f"the length of {what}")
        if not low <= n <= high:
            self.fail(f"{what} is {n} bytes long, expected {low} to {high}")
        start = self.take(n, what)
        try:
            return self.data[start:self.pos].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} (at byte {start}) is not text, expected valid UTF-8")

    def strings(self, n: int, what: str) -> list[str]:
        """n strings, decoded from UTF-8.

        One tight loop reads them: a vocabulary has hundreds of thousands, and string() takes three times as long.
        """
        unpack, data, start, end, result = SCALARS[U64][0].unpack_from, self.data, self.pos, self.end, []
        try:
            for _ in range(n):
                stop = start + 8
                if stop <= end:
                    stop += unpack(data, start)[0]
                if stop > end:
                    self.fail(f"string {len(result)} of {what} goes on behind byte {end}, the end: "
                              "the file is incomplete or damaged")
                result.append(data[start + 8:stop].decode())
                start = stop
        except UnicodeDecodeError:
            self.fail(f"string {len(result)} of {what} (at byte {start}) is not text, expected valid UTF-8")
        self.pos = start
        return result

    def array(self, what: str) -> list[str] | np.ndarray:
        """An array: its element type, its length and its elements."""
        type_id = self.scalar(U32, f"the element type of {what}")
        if type_id == STRING:
            return self.strings(self.count(f"the length of {what}", 8), what)
        if type_id not in SCALARS:
            elements = "arrays" if type_id == ARRAY else f"the unknown type {type_id}"
            self.fail(f"{what} is an array of {elements}, expected one of numbers, bools or strings")
        _, dtype = SCALARS[type_id]
        n = self.count(f"the length of {what}", dtype.itemsize)
        start = self.take(n * dtype.itemsize, what)
        values = np.frombuffer(self.data[start:self.pos], dtype)   # the slice is a copy: it is aligned, and does not keep the map open
        if type_id != BOOL:
            return values
        if (values > 1).any():
            self.fail(f"{what} is an array of bools with the value {values.max()}, expected 0 or 1")
        return values.view(np.bool_)

    def value(self, type_id: int, what: str) -> Any:
        """A value of the given type."""
        if type_id == STRING:
            return self.string(what)
        if type_id == ARRAY:
            return self.array(what)
        if type_id not in SCALARS:
            self.fail(f"{what} is of the unknown type {type_id}, expected 0 to 12")
        return self.scalar(type_id, what)


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def quote(text: str) -> str:
    """The text as shown in messages: short, without control characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _describe(value) -> str:
    if isinstance(value, str):
        return f"the string {quote(value)}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    if isinstance(value, np.ndarray):
        return f"an array of {len(value)} {value.dtype} values"
    return f"the {type(value).__name__} {value}"
