"""Folders with safetensors: which tensors they hold, checked, and their bytes.

    checkpoint = Checkpoint("DeepSeek-V3.2")
    checkpoint.config, checkpoint.tensors["model.norm.weight"].read()

A safetensors file is the length of its header, the header, which is JSON, and the tensors. Nothing in a folder is trusted: headers are
checked before a byte of weights is read, and pickle files are never opened. The safetensors package knows neither BF16 nor FP8 in numpy,
and copies whole tensors; here a piece of a tensor is read at a time, by reads rather than a map, so that a file that is cut off meanwhile
is an error and not a signal.
"""
import json
import math
import os
import re
import stat
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pydsa import __version__
from pydsa.conversion.fields import Fields, decode, kind_of, parse, read_json
from pydsa.errors import CheckpointError
from pydsa.gguf.file import quote

MAX_HEADER = 100_000_000    # bytes; the limit of the safetensors package
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# safetensors' dtype -> numpy's for the same bytes. Types that numpy lacks are as their bits.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "I64": "<i8",
          "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1"}
LFS = b"version https://git-lfs"


class ReadError(CheckpointError):
    """A file cannot be read just now: what was made of others is kept."""
    keeps_output = True


class Stored(NamedTuple):
    """A tensor of a checkpoint: where its bytes are."""
    name: str
    dtype: str              # "BF16", a key of DTYPES
    shape: tuple
    path: Path
    start: int              # its first byte in the file

    @property
    def row(self):
        """Values of a row: of all axes but the first."""
        return math.prod(self.shape[1:])

    @property
    def n_bytes(self):
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def read(self, first=0, last=None):
        """The rows from first to last, a new array of DTYPES.

        Raises CheckpointError if the file has become shorter, ReadError if it cannot be read.
        """
        shape = self.shape if not self.shape or last is None and first == 0 else (
            (self.shape[0] if last is None else last) - first, *self.shape[1:])
        dtype, n = np.dtype(DTYPES[self.dtype]), math.prod(shape)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start + first * self.row * dtype.itemsize)
                data = np.fromfile(file, dtype, n)
        except OSError as error:
            raise ReadError(f"{self.path}: the file cannot be read ({error.strerror}).") from error
        if data.size != n:
            raise CheckpointError(f"{self.path}: the file ends inside of {quote(self.name)}: it has changed since it was opened.")
        return data.reshape(shape)


class Checkpoint:
    """A folder with a model of Hugging Face.

    folder: Path. config: Fields of config.json. tensors: {name: Stored}. Raises CheckpointError for a folder that is damaged, incomplete
    or contradictory.
    """

    def __init__(self, folder):
        self.folder = Path(os.path.expanduser(folder))
        try:
            is_folder = self.folder.is_dir()
        except ValueError:      # a zero byte in the path
            is_folder = False
        if not is_folder:
            raise CheckpointError(f"{folder}: there is no such folder, expected one with config.json and safetensors files.")
        self.config = Fields(read_json(self.folder / "config.json", "the configuration of a model"), self.folder / "config.json")
        self.paths, weight_map = self._files()
        self.tensors = {}
        for path in self.paths:
            for stored in read_header(path):
                self._add(stored, weight_map)
        missing = next((name for name in weight_map or () if name not in self.tensors), None)
        if missing is not None:
            raise CheckpointError(f"{self.folder / weight_map[missing]}: there is no tensor {quote(missing)}, which {INDEX} expects in it: "
                                  "the index and the files are not of one model.")

    def _add(self, stored, weight_map):
        """Add a tensor that a file has, if the index knows it there."""
        name = stored.name
        if name in self.tensors:
            raise CheckpointError(f"{stored.path}: tensor {quote(name)} is in {self.tensors[name].path.name} too, expected in one file.")
        if weight_map is not None and weight_map.get(name) != stored.path.name:
            where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
            raise CheckpointError(f"{stored.path}: there is a tensor {quote(name)}, which {INDEX} expects {where}: the index and the files "
                                  "are not of one model.")
        self.tensors[name] = stored

    def _files(self):
        """The safetensors files, and the index's {tensor: file}, or None."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder))
        except OSError as error:
            raise CheckpointError(f"{self.folder}: the folder cannot be read ({error.strerror}).") from error
        if INDEX in names:
            weight_map = self._read_index()
            files = sorted(set(weight_map.values()))
        else:
            weight_map = None
            files = [SINGLE] if SINGLE in names else _numbered(self.folder, [name for name in names if SHARD.fullmatch(name)])
        if not files:
            pickles = [name for name in names if name.endswith(PICKLES)]
            raise CheckpointError(f"{self.folder}: there are no safetensors files" + (
                f", but {pickles[0]}: pickle files can run programs and are never opened; convert the model to safetensors first."
                if pickles else f", expected {SINGLE}, or parts with {INDEX}."))
        missing = [name for name in files if name not in names]
        if missing:
            raise CheckpointError(f"{self.folder}: {len(missing)} of {len(files)} files are missing, such as {missing[0]}, which {INDEX} "
                                  "names: get them too.")
        return [self.folder / name for name in files], weight_map

    def _read_index(self):
        path = self.folder / INDEX
        weight_map = Fields(read_json(path, "the index of the files"), path).fields("weight_map").values
        if not weight_map:
            raise CheckpointError(f"{path}: weight_map is empty, expected the file of each tensor.")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or file != os.path.basename(file) or "\\" in file:
                raise CheckpointError(f"{path}: the file of {quote(name)} is {kind_of(file)}, expected the name of a safetensors file in "
                                      "this folder.")
        return weight_map

    @property
    def inputs(self):
        """Paths of what an output may not replace: all files but outputs."""
        return [path for path in self.folder.iterdir() if path.suffix not in (".gguf", ".partial", ".journal")]

    def source(self):
        """A text that changes whenever the weights do, or pydsa's version."""
        files = [__version__]
        for path in self.paths:
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        return json.dumps([files, self.config.values], sort_keys=True)


def _numbered(folder, names):
    """The shards of a folder without an index, if none is missing."""
    totals = {SHARD.fullmatch(name)[2] for name in names}
    if not names:
        return []
    wanted = [f"model-{i:05d}-of-{min(totals)}.safetensors" for i in range(1, int(min(totals)) + 1)] if len(names) < 10**4 else []
    if names != wanted:
        absent = next((name for name in wanted if name not in names), "others")
        raise CheckpointError(f"{folder}: of {len(wanted)} parts {absent} is missing, and there is no {INDEX}: get all files.")
    return names


def read_header(path):
    """The tensors of a safetensors file, a list of Stored.

    Tensors must follow each other and fill the file, so that none overlaps another. Raises CheckpointError.
    """
    start, entries, size = _read_entries(path)
    found = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        what = f"tensor {quote(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{path}: {what} is {kind_of(entry)}, expected its dtype, shape and data_offsets.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{path}: {what} has the dtype {kind_of(dtype)}, expected one of {', '.join(DTYPES)}.")
        for part, numbers, most in ("shape", shape, 8), ("data_offsets", offsets, 2):
            if not isinstance(numbers, list) or len(numbers) > most or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                raise CheckpointError(f"{path}: the {part} of {what} is {kind_of(numbers)}, expected at most {most} integers from 0 on.")
        stored = Stored(name, dtype, tuple(shape), path, start + (offsets[0] if offsets else 0))
        if len(offsets) != 2 or offsets[1] - offsets[0] != stored.n_bytes:
            raise CheckpointError(f"{path}: {what} has the data_offsets {offsets}, expected {stored.n_bytes} bytes between them, for "
                                  f"the shape {shape} in {dtype}.")
        found.append(stored)
    _check_places(path, found, start, size)
    return found


def _check_places(path, found, start, size):
    """Raise CheckpointError unless tensors follow each other to the end."""
    end, before = start, "the header"
    for stored in sorted(found, key=lambda stored: (stored.start, stored.n_bytes)):
        if stored.start != end:
            raise CheckpointError(f"{path}: tensor {quote(stored.name)} begins at byte {stored.start}, expected {end}, the end of "
                                  f"{before}: the header is wrong.")
        end, before = stored.start + stored.n_bytes, quote(stored.name)
    if end > size:
        raise CheckpointError(f"{path}: the tensors end at byte {end}, but the file at {size}: it is incomplete, get it again.")
    if end < size:
        raise CheckpointError(f"{path}: the tensors end at byte {end}, but the file at {size}: there are bytes that belong to none.")


def _read_entries(path):
    """(where the tensors begin, the header as a dict, bytes of the file)."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):    # before open(), which never returns for a pipe
            raise CheckpointError(f"{path}: this is not a regular file, expected a safetensors file.")
        size = status.st_size
        with open(path, "rb") as file:
            head = file.read(len(LFS))
            if head == LFS:
                raise CheckpointError(f"{path}: this is only a pointer of Git LFS: get the file itself (git lfs pull).")
            if len(head) < 8:
                raise CheckpointError(f"{path}: the file has {size} bytes, expected a safetensors file: it is incomplete, get it again.")
            length, = struct.unpack("<Q", head[:8])
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: the header takes {length} bytes, expected at most {min(MAX_HEADER, size - 8)}: this is no "
                                      "safetensors file, or it is incomplete.")
            file.seek(8)
            data = file.read(length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    return 8 + length, parse(decode(data, path), path, "the header"), size
