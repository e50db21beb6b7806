"""The file of a recording: a zip of numpy arrays (.npz), as docs/recordings.md describes it.

A file may come from anywhere: nothing in it is believed before it is checked.
"""
import contextlib
import dataclasses
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pydsa.errors import RecordingFileError
from pydsa.machine.limits import allocating
from pydsa.recordings import packed
from pydsa.targets import check_replaceable

VERSION = 1
CHUNK = 256     # tokens of a chunk, at most
LEVEL = 1       # of the compression: what is packed already gains little from more
FIELDS = ("selection", "scores", "mass", "routing")
MOST_LAYERS, MOST_TOP_K, MOST_KEYS = 1024, 1 << 24, 2**31 - 1
MAX_HEADER = 1 << 20    # bytes
MARK = b"recording.npy"     # the name of the first array, near the beginning of each file
OF_TOKENS = {"positions": np.dtype(np.int64), "tokens": np.dtype(np.int32), "all_keys": np.dtype(np.bool_)}
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, TypeError, LookupError, OverflowError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a recording tells of the model and of itself.

    fields: what is recorded, of FIELDS. n_layer: layers of the model. top_k: keys that a token chose at most, None without an indexer.
    indexed_layers: for each layer, the layer whose choice it uses, None without an indexer. expert_layers: those with experts. n_expert,
    n_expert_used: experts of a layer, and of a token. n_vocab: ids of the vocabulary. model: the fingerprint of the file. name,
    architecture, attention, kv_type, index_type, device: as of the Model. n_left: tokens that left, where memory was limited.
    """
    fields: tuple
    n_layer: int
    top_k: int | None
    indexed_layers: tuple | None
    expert_layers: tuple
    n_expert: int
    n_expert_used: int
    n_vocab: int
    model: str
    name: str
    architecture: str
    attention: str
    kv_type: str
    index_type: str
    device: str
    n_left: int = 0

    @property
    def choosing_layers(self):
        """The layers with an indexer, a tuple."""
        return tuple(sorted(set(self.indexed_layers or ())))


def _numbers(values, low, high):
    return isinstance(values, list) and all(type(v) is int and low <= v <= high for v in values)


def _facts(fields):
    """The Facts of a file's header, a dict; ValueError if it is not valid."""
    names = {field.name for field in dataclasses.fields(Facts)}
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        raise ValueError(f"its version is {str(version)[:20]}, expected {VERSION}")
    fields = {key: value for key, value in fields.items() if key != "version"}
    if fields.keys() != names:
        raise ValueError("its header does not have the fields of this version")
    texts = ("model", "name", "architecture", "attention", "kv_type", "index_type", "device")
    n_layer, top_k, indexed, experts = (fields[key] for key in ("n_layer", "top_k", "indexed_layers", "expert_layers"))
    valid = (_numbers([n_layer], 1, MOST_LAYERS) and all(isinstance(fields[key], str) for key in texts)
             and _numbers([fields["n_vocab"]], 1, MOST_KEYS) and _numbers([fields["n_left"]], 0, 2**62)
             and fields["fields"] in [[name for name in FIELDS if name in some] for some in _subsets(top_k is not None, experts)]
             and (top_k is None and indexed is None or _numbers([top_k], 1, MOST_TOP_K) and _numbers(indexed, 0, n_layer - 1)
                  and len(indexed) == n_layer and all(owner <= i and indexed[owner] == owner for i, owner in enumerate(indexed)))
             and _numbers(experts, 0, n_layer - 1) and experts == sorted(set(experts))
             and _numbers([fields["n_expert"]], 0, 65536) and _numbers([fields["n_expert_used"]], 0, fields["n_expert"]))
    if not valid:
        raise ValueError("its header is not valid")
    return Facts(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def _subsets(chooses, experts):
    """What can be recorded together, of a model that chooses keys or not."""
    choices = ((), ("selection",), ("mass",), ("selection", "mass"), ("selection", "scores"), ("selection", "scores", "mass"))
    return [(*some, *routing) for some in (choices if chooses else choices[:1]) for routing in ((), ("routing",))[:2 if experts else 1]]


class Writer:
    """Writes a recording as its chunks come; it is complete when it is closed.

    Until then it is beside `path`, with the ending .part. Raises RecordingFileError if it cannot be written, or would replace a file that
    is not a recording.
    """

    def __init__(self, path, facts):
        self.path, self._n, self._zip, self.failed = Path(path), 0, None, False
        with self._writing():
            check_replaceable(self.path)
            self._check_own()
            self._partial = self.path.with_name(self.path.name + ".part")
            self._file = open(self._partial, "wb")
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, allowZip64=True, compresslevel=LEVEL)
        header = json.dumps({"version": VERSION} | dataclasses.asdict(facts)).encode()
        self._write("recording", np.frombuffer(header, np.uint8))

    def _check_own(self):
        """Raise RecordingFileError if a file is there that is no recording."""
        try:
            with open(self.path, "rb") as file:
                start = file.read(64)
        except FileNotFoundError:
            return
        if start and MARK not in start:
            raise RecordingFileError(f"{self.path}: this file is not a recording and would be lost, expected another name.")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self._file.closed:       # an error came before close()
            self._abandon()

    def _abandon(self):
        with contextlib.suppress(OSError, ValueError):
            self._zip.close()
        with contextlib.suppress(OSError, ValueError):
            self._file.close()
        with contextlib.suppress(OSError, ValueError):
            self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
            self.failed = True
            if self._zip is not None:
                self._abandon()
            reason = getattr(error, "strerror", None) or error
            raise RecordingFileError(f"{self.path}: the recording cannot be written ({reason}).") from error

    def _write(self, name, array):
        data = io.BytesIO()
        np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
        with self._writing():
            self._zip.writestr(f"{name}.npy", data.getbuffer())

    def add(self, chunk):
        """Append a chunk, without `kept`."""
        for name, array in chunk.items():
            if name != "kept":
                self._write(f"{self._n}/{name}", array)
        self._n += 1

    def close(self, kept):
        """Complete the file; kept: bool, for all rows of all chunks."""
        self._write("kept", kept)
        with self._writing():
            self._zip.close()
            self._file.close()
            os.replace(self._partial, self.path)


class Reader:
    """An open file: its facts, and the arrays of its chunks as they are asked for.

    Raises RecordingFileError if the file cannot be read or is not a valid recording.
    """

    def __init__(self, path):
        self.path = path
        with self._reading():
            self._zip = zipfile.ZipFile(path)
            self._entries = {info.filename: info for info in self._zip.infolist()}
            header = self._array("recording", np.dtype(np.uint8), (None,), MAX_HEADER)
            self.facts = _facts(json.loads(header.tobytes()))
            self.chunks, first = [], 0
            kept = self._array("kept", np.dtype(np.bool_), (None,), len(self._entries) * CHUNK)
            while f"{len(self.chunks)}/positions.npy" in self._entries:
                self.chunks.append(StoredChunk(self, len(self.chunks), kept[first:]))
                first += self.chunks[-1].n
            names = {"recording", "kept"} | {f"{i}/{name}" for i in range(len(self.chunks)) for name in (*OF_TOKENS, *self.names)}
            if {f"{name}.npy" for name in names} != self._entries.keys() or len(self._zip.infolist()) != len(names):
                raise ValueError("it does not have the arrays that its header tells of")
            positions = np.concatenate([np.empty(0, np.int64), *(chunk["positions"][chunk["kept"]] for chunk in self.chunks)])
            if first != kept.size or (np.diff(positions) <= 0).any():
                raise ValueError("its tokens are not in the order of their positions")

    @property
    def names(self):
        """The names of a chunk's arrays, beside those of each token."""
        names = {"selection": ("selection_map", "selection_bits"), "scores": ("scores",), "mass": ("mass",),
                 "routing": ("experts", "expert_weights")}
        return [name for field in FIELDS if field in self.facts.fields for name in names[field]]

    @contextlib.contextmanager
    def _reading(self):
        try:
            with allocating("the recording"):
                yield
        except OSError as error:
            raise RecordingFileError(f"{self.path}: the recording cannot be read ({error.strerror or error}).") from error
        except BROKEN as error:
            text = str(error) if type(error) is ValueError else "it is incomplete or damaged"
            raise RecordingFileError(f"{self.path}: this is not a recording that this version of pydsa can read: {text}.") from error

    def _array(self, name, dtype, shape, most=None):
        """An array of the file, whose shape is as expected.

        shape: with None for a length that is not known, but at most `most`. Nothing is read before dtype, shape and size are right.
        """
        info = self._entries.get(f"{name}.npy")
        if info is None:
            raise ValueError(f"the array {name} is missing")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"the array {name} is compressed in another way than expected")
        with self._zip.open(info) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise EOFError
            met, fortran, met_dtype = np.lib.format.read_array_header_1_0(file, max_header_size=1000)
            expected = tuple(n if n is not None else m for n, m in zip(shape, met)) if len(met) == len(shape) else None
            size = dtype.itemsize * int(np.prod(met, dtype=object))
            if met != expected or met_dtype != dtype or fortran or info.file_size - file.tell() != size:
                raise ValueError(f"the array {name} has another shape or type than expected")
            if most is not None and any(m > most for n, m in zip(shape, met) if n is None):
                raise ValueError(f"the array {name} is larger than it can be")
            data = file.read(size)
            if len(data) != size or file.read(1):       # the end, where the checksum is compared
                raise EOFError
        return np.frombuffer(data, dtype).reshape(met)

    def read(self, chunk, name):
        """An array of a chunk, checked."""
        f, n = self.facts, chunk.n
        with self._reading():
            def array(dtype, *shape, most=None):
                return self._array(f"{chunk.i}/{name}", np.dtype(dtype), shape, most)
            if name == "selection_map":
                return array(np.uint8, len(f.choosing_layers), n, None, most=int(chunk["positions"].max(initial=0)) // 64 + 1)
            if name == "selection_bits":
                return array(np.uint8, int(packed.n_bytes(chunk["selection_map"]).sum()))
            if name == "scores":
                return array(np.float32, int(np.unpackbits(chunk["selection_bits"]).sum(dtype=np.int64)))
            if name == "mass":
                mass = array(np.float32, f.n_layer, n)
                if not ((0 <= mass) & (mass <= 1)).all():
                    raise ValueError("it has a mass that is not from 0 to 1")
                return mass
            found = array(np.uint16 if name == "experts" else np.float32, len(f.expert_layers), n, f.n_expert_used)
            if name == "experts" and found.size and found.max() >= f.n_expert:
                raise ValueError(f"it has an expert {found.max()}, but there are {f.n_expert}")
            return found


class StoredChunk(Mapping):
    """A chunk in a file; what is not of each token is read each time."""

    def __init__(self, reader, i, kept):
        self._reader, self.i = reader, i
        positions = reader._array(f"{i}/positions", OF_TOKENS["positions"], (None,), CHUNK)
        self.n = len(positions)
        self._small = {"positions": positions, "kept": kept[:self.n]} | {
            name: reader._array(f"{i}/{name}", OF_TOKENS[name], (self.n,)) for name in ("tokens", "all_keys")}
        tokens, top_k = self._small["tokens"], reader.facts.top_k
        if len(self["kept"]) != self.n or positions.min(initial=0) < 0 or positions.max(initial=0) > MOST_KEYS:
            raise ValueError("it has positions that cannot be")
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= reader.facts.n_vocab:
            raise ValueError("it has ids that are not in the vocabulary")
        if "selection" in reader.facts.fields and (positions[self["all_keys"]] >= top_k).any():
            raise ValueError("it has a token with more keys than it can have")

    def __getitem__(self, name):
        return self._small[name] if name in self._small else self._reader.read(self, name)

    def __iter__(self):
        return iter([*self._small, *self._reader.names])

    def __len__(self):
        return len(self._small) + len(self._reader.names)
