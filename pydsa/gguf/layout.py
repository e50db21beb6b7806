"""What is where in a GGUF file that is to be written.

It is known before the weights are: the header, the tensors' places and the parts of a split output follow from the metadata, and
from the names, types and shapes of tensors.
"""
import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pydsa.errors import PydsaError, TargetError
from pydsa.gguf.file import (ARRAY, BOOL, GGML_TYPES, I64, MAX_HEADER, MAX_NAME, SCALARS, SPLIT_NAME, STRING, U32, U64, Reader, map_file,
                             quote)
from pydsa.options import counts
from pydsa.targets import check_replaceable

VERSION = 3
U16, I32, F32 = 2, 5, 6
TYPE_IDS = {ggml_type.name: (type_id, ggml_type) for type_id, ggml_type in GGML_TYPES.items()}
MAX_PARTS = 99999           # the names have five digits
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}       # of llama.cpp's --split-max-size
SPACE = "free some, choose another disk, a smaller type or another OUT"


class Packed(NamedTuple):
    """A value of the metadata as the file stores it."""
    type_id: int
    data: bytes


def pack(value, kind=None):
    """A value of the metadata -> Packed.

    By default an int is u32, a float f32, a bool bool, a str string, a list of str an array of strings, a numpy array one of its dtype, and
    a Packed itself. kind: the type id of a number, where it is another (pydsa.gguf.file.SCALARS).
    """
    if isinstance(value, Packed):
        return value
    if isinstance(value, str):
        return Packed(STRING, _string(value))
    if isinstance(value, list):
        return Packed(ARRAY, SCALARS[U32][0].pack(STRING) + SCALARS[U64][0].pack(len(value)) + b"".join(map(_string, value)))
    if isinstance(value, np.ndarray):
        ids = {dtype.str: type_id for type_id, (_, dtype) in SCALARS.items() if type_id != BOOL}
        type_id = BOOL if value.dtype == bool else ids[value.dtype.newbyteorder("<").str]
        data = value.astype(SCALARS[type_id][1]).tobytes()
        return Packed(ARRAY, SCALARS[U32][0].pack(type_id) + SCALARS[U64][0].pack(len(value)) + data)
    if kind is None:
        kind = BOOL if isinstance(value, bool) else F32 if isinstance(value, float) else U32
    return Packed(kind, SCALARS[kind][0].pack(value))


def _string(text):
    data = text.encode()
    return SCALARS[U64][0].pack(len(data)) + data


def packed_metadata(path):
    """{key: Packed} of a GGUF file, for a copy with the same types of values.

    The keys split.* are left out. The file must be one that open_gguf has opened.
    """
    reader = Reader(Path(path), map_file(Path(path), "a GGUF file"))
    reader.take(4 + 4 + 8, "the magic, the version and the number of tensors")
    pairs = {}
    for i in range(reader.count("the number of key-value pairs", 14)):
        key = reader.string(f"key {i}", 1)
        type_id, start = reader.scalar(U32, f"the type of {quote(key)}"), reader.pos
        reader.value(type_id, quote(key))
        if not key.startswith("split."):
            pairs[key] = Packed(type_id, bytes(reader.data[start:reader.pos]))
    return pairs


def parse_size(text):
    """"2G" -> 2000000000: bytes, or K, M, G or T of them.

    The units are those of llama.cpp, powers of 1000. Raises PydsaError for other texts.
    """
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not (number.isascii() and number.isdigit() and 0 < int(number) < 10**15):
        raise PydsaError(f"The size is {quote(text)}, expected a number of bytes, or of K, M, G or T, such as 40G.")
    return int(number) * UNITS.get(unit, 1)


class TensorInfo(NamedTuple):
    """A tensor that is to be written: its name, type and numpy shape."""
    name: str
    type: str
    shape: tuple

    @property
    def n_bytes(self):
        """Bytes of its blocks."""
        kind = TYPE_IDS[self.type][1]
        return math.prod(self.shape) // kind.block * kind.n_bytes


class Part(NamedTuple):
    """One file: its header, and where its tensors begin in it."""
    path: Path
    header: bytes           # with the padding before the first tensor
    tensors: list           # of TensorInfo
    starts: list            # of their first bytes
    n_bytes: int

    @property
    def partial(self):
        """The name until all parts are complete."""
        return self.path.with_name(self.path.name + ".partial")


class Layout:
    """All bytes of a GGUF file but the weights: what will be where.

    path: the file, or the name from which those of the parts are made: model.gguf -> model-00001-of-00003.gguf.
    metadata: {key: a value, or Packed}; a key general.alignment is obeyed. tensors: of TensorInfo, in the order of the file.
    split_max_bytes: how many bytes of tensors a part may have; a larger tensor has a part of its own. split_max_tensors: how many tensors.

    parts: list of Part. n_bytes: of all parts. Raises TargetError for a name that readers would take for a part's, PydsaError for limits
    that are no integers from 1 on.
    """

    def __init__(self, path, metadata, tensors, split_max_bytes=None, split_max_tensors=None):
        self.path = _followed(path)
        if SPLIT_NAME.fullmatch(self.path.name):
            raise TargetError(f"{path}: this is the name of a part of a split model, expected a name without -00001-of-000NN, which is "
                              "added where the output is split.")
        self.tensors, self.metadata = list(tensors), {key: pack(value) for key, value in metadata.items()}
        self.alignment = SCALARS[U32][0].unpack(self.metadata["general.alignment"].data)[0] if "general.alignment" in metadata else 32
        _check_tensors(self.tensors)
        limits = counts(2**63, split_max_bytes=split_max_bytes, split_max_tensors=split_max_tensors)
        groups = _groups(self.tensors, *limits)
        if len(groups) > MAX_PARTS:
            raise TargetError(f"{path}: there would be {len(groups)} parts, expected at most {MAX_PARTS}: give a larger size of parts.")
        self.parts = [self._part(i, group, len(groups)) for i, group in enumerate(groups)]
        self.n_bytes = sum(part.n_bytes for part in self.parts)

    def _part(self, index, tensors, count):
        pairs = dict(self.metadata) if index == 0 else {
            key: value for key, value in self.metadata.items() if key == "general.alignment"}
        path = self.path
        if count > 1:
            pairs |= {"split.no": pack(index, U16), "split.count": pack(count, U16), "split.tensors.count": pack(len(self.tensors), I32)}
            path = path.with_name(f"{path.name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf")
        offsets, end = [], 0
        for info in tensors:
            offsets.append(end)
            end = pad(end + info.n_bytes, self.alignment)
        header = _header(pairs, tensors, offsets)
        if len(header) > MAX_HEADER:
            raise TargetError(f"{path}: the metadata take {len(header)} bytes, expected at most {MAX_HEADER}.")
        header += bytes(pad(len(header), self.alignment) - len(header))
        return Part(path, header, tensors, [len(header) + offset for offset in offsets], len(header) + end)

    @property
    def journal(self):
        """The path of the journal of an interrupted run."""
        return journal_of(self.path)

    def check(self, overwrite=False, inputs=()):
        """Raise TargetError if the files cannot be written.

        overwrite: whether they may replace others. inputs: paths of files that are read, and may not be replaced, nor serve as the
        partial files or the journal.
        """
        for path in (*(part.path for part in self.parts), *(part.partial for part in self.parts), self.journal):
            _check_target(path, inputs)
        try:
            existing = next((part.path for part in self.parts if part.path.exists()), None)
            if existing is not None and not overwrite:
                raise TargetError(f"{existing}: there is such a file already: give another name, or --force to replace it.")
            folder = self.path.parent
            if not folder.is_dir():
                raise TargetError(f"{folder}: there is no such folder, expected one for {self.path.name}.")
            if not os.access(folder, os.W_OK):
                raise TargetError(f"{folder}: this folder cannot be written to, expected one for {self.path.name}.")
            there = sum(part.partial.stat().st_size for part in self.parts if part.partial.exists())
            needed, free = max(0, self.n_bytes - there), shutil.disk_usage(folder).free
        except OSError as error:
            raise TargetError(f"{self.path}: the file cannot be written ({error.strerror or error}).") from error
        if needed > free:
            factor, unit = (10**9, "GB") if needed >= 10**9 else (10**6, "MB")
            raise TargetError(f"{self.path}: {needed / factor:.1f} {unit} are to be written, but {free / factor:.1f} {unit} are free: "
                              f"{SPACE}.")

    def fingerprint(self, source):
        """What a journal must begin with for its tensors to be those."""
        digest = hashlib.blake2b(source.encode(errors="surrogatepass"), digest_size=16)     # names of files may be no text
        for part in self.parts:
            digest.update(part.header)
        return digest.hexdigest()


def journal_of(path):
    """The path of the journal of an interrupted run that writes a file."""
    path = _followed(path)
    return path.with_name(path.name + ".journal")


def _followed(path):
    """The file that a path leads to."""
    if not os.fspath(path):
        raise TargetError("The name of the output is empty, expected that of a file.")
    path = Path(os.path.expanduser(path))
    if not path.name:
        raise TargetError(f"{path}: this is a directory, expected the name of a file.")
    try:
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    except (OSError, ValueError) as error:
        raise TargetError(f"{path}: the file cannot be written ({getattr(error, 'strerror', None) or error}).") from error


def _check_target(path, inputs):
    """Raise TargetError for what is at a path and may not be replaced."""
    try:
        check_replaceable(path)
        if path.exists() and any(os.path.exists(other) and os.path.samefile(path, other) for other in inputs):
            raise TargetError(f"{path}: the output would replace this file, which is read: give it another name.")
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise TargetError(f"{path}: the file cannot be written ({getattr(error, 'strerror', None) or error}).") from error


def _check_tensors(tensors):
    """Raise ValueError for what no caller may ask for."""
    if len({info.name for info in tensors}) != len(tensors):
        raise ValueError("tensors have the same name")
    for name, kind, shape in tensors:
        if not 0 < len(name.encode()) <= MAX_NAME or not 1 <= len(shape) <= 4 or min(shape) < 1 or shape[-1] % TYPE_IDS[kind][1].block:
            raise ValueError(f"{name}: {kind} {shape} is not possible in a GGUF file")


def _groups(tensors, max_bytes, max_tensors):
    """The tensors of each part."""
    groups, size = [[]], 0
    for info in tensors:
        if groups[-1] and (max_bytes and size + info.n_bytes > max_bytes or max_tensors and len(groups[-1]) >= max_tensors):
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.n_bytes
    return groups


def _header(pairs, tensors, offsets):
    """The bytes from the magic to the last tensor info."""
    u32, u64, i64 = (SCALARS[type_id][0].pack for type_id in (U32, U64, I64))
    parts = [b"GGUF", u32(VERSION), i64(len(tensors)), i64(len(pairs))]
    for key, (type_id, data) in pairs.items():
        parts += [_string(key), u32(type_id), data]
    for (name, kind, shape), offset in zip(tensors, offsets):
        parts += [_string(name), u32(len(shape)), *map(i64, reversed(shape)), u32(TYPE_IDS[kind][0]), u64(offset)]
    return b"".join(parts)


def pad(n, alignment):
    """The next multiple of the alignment, from n on."""
    return -(-n // alignment) * alignment
