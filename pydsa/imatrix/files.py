"""Files with an imatrix: llama.cpp's GGUF, and its older .dat.

GGUF: two F32 tensors for each tensor NAME of the model, NAME.in_sum2 and NAME.counts, and the keys imatrix.datasets, imatrix.chunk_count
and imatrix.chunk_size. A .dat has int32 and float32 numbers only: its values are means times a number of chunks, and experts have no
counts.
"""
import os
import stat
from pathlib import Path

import numpy as np

from pydsa.errors import GGUFError, ImatrixError
from pydsa.gguf.file import GGUFFile, open_gguf, quote
from pydsa.imatrix.matrix import Imatrix
from pydsa.targets import check_replaceable, replacing

SUMS, COUNTS = ".in_sum2", ".counts"
FORMS = ("gguf", "dat")
CHUNK = 512         # tokens of a chunk where a file does not say
MOST_CHUNKS = 2**31 - 2     # a .dat has one more where the last is begun, in an int32


def read(path, chunk_size=CHUNK):
    """Read an imatrix of llama.cpp or of pydsa, GGUF or .dat -> Imatrix.

    chunk_size: tokens of a chunk, which a .dat does not say. Raises ImatrixError or GGUFError if the file is damaged or something else.
    """
    path = Path(os.path.expanduser(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImatrixError(f"{path}: this is not a regular file, expected an imatrix.")
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        data = None if is_gguf else np.fromfile(path, np.uint8)
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise ImatrixError(f"{path}: the imatrix cannot be read ({getattr(error, 'strerror', error)}).") from error
    return _from_gguf(open_gguf(path)) if is_gguf else _Legacy(path, data).read(chunk_size)


def _from_gguf(file: GGUFFile):
    """The Imatrix of an open GGUF file."""
    metadata, sums, counts = file.metadata, {}, {}
    for name, tensor in file.tensors.items():
        for end, parts in ((SUMS, sums), (COUNTS, counts)):
            if name.endswith(end):
                parts[name.removesuffix(end)] = tensor
    if not sums:
        raise ImatrixError(f"{metadata.path}: there is no tensor *{SUMS}, expected those of an imatrix: this is another GGUF file.")
    if sums.keys() != counts.keys():
        name = min(sums.keys() ^ counts.keys())
        raise ImatrixError(f"{metadata.path}: {quote(name)} has only one of {SUMS} and {COUNTS}, expected both.")
    found = Imatrix({}, {}, filter(None, metadata.strings("imatrix.datasets", default=[])),
                    metadata.integer("imatrix.chunk_size", 1, 2**31 - 1))
    for name in sums:
        if {sums[name].type, counts[name].type} != {"F32"}:
            raise ImatrixError(f"{metadata.path}: {quote(name)} has {sums[name].type} and {counts[name].type} values, expected F32.")
        found.sums[name] = _float64(sums[name].data)
        n = _float64(counts[name].data)
        if not (n >= 0).all() or not (n < 2**53).all():
            raise ImatrixError(f"{metadata.path}: {quote(name)} has counts that are not numbers from 0 on: the file is damaged.")
        found.counts[name] = np.rint(n).astype(np.int64)
        _check(metadata.path, name, found.sums[name], found.counts[name])
    return found


def _float64(data):
    """The float32 numbers that bytes are, as float64."""
    with np.errstate(invalid="ignore"):     # a signalling NaN
        return data.reshape(-1).view("<f4").astype(np.float64)


def _check(path, name, sums, counts):
    """Raise ImatrixError unless these can be sums of squares."""
    if sums.size % counts.size:
        raise ImatrixError(f"{path}: {quote(name)} has {sums.size} sums and {counts.size} counts, expected a multiple of them.")
    if not np.isfinite(sums).all() or sums.min() < 0:
        raise ImatrixError(f"{path}: {quote(name)} has sums that are not finite numbers from 0 on, expected sums of squares: the file is "
                           "damaged, or it was made with damaged weights.")


class _Legacy:
    """A .dat file that is read: numbers and texts, one after the other."""

    def __init__(self, path, data):
        self._path, self._data, self._pos = path, data, 0

    def _take(self, n, what):
        if not 0 <= n <= self._data.size - self._pos:
            raise ImatrixError(f"{self._path}: {what} takes {n} bytes, but {self._data.size - self._pos} are left: this is no imatrix, "
                               "or it is incomplete.")
        self._pos += n
        return self._data[self._pos - n:self._pos]

    def _number(self, what, low):
        value = int.from_bytes(self._take(4, what), "little", signed=True)
        if value < low:
            raise ImatrixError(f"{self._path}: {what} is {value}, expected at least {low}: this is no imatrix, or it is damaged.")
        return value

    def _text(self, what, low):
        text = self._take(self._number(f"the length of {what}", low), what).tobytes().rstrip(b"\0")
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ImatrixError(f"{self._path}: {what} is not text, expected UTF-8: this is no imatrix, or it is damaged.") from None

    def read(self, chunk_size):
        """The Imatrix; the sums are those of whole chunks."""
        found = Imatrix({}, {}, (), chunk_size)
        for i in range(self._number("the number of entries", 1)):
            name = self._text(f"the name of entry {i}", 1)
            calls = self._number(f"the number of chunks of {quote(name)}", 1)
            n = self._number(f"the number of values of {quote(name)}", 1)
            values = _float64(self._take(4 * n, f"the values of {quote(name)}").copy())
            if name in found.sums:
                raise ImatrixError(f"{self._path}: {quote(name)} is there twice, expected it once.")
            found.sums[name], found.counts[name] = values * chunk_size, np.array([calls * chunk_size])
            _check(self._path, name, values, found.counts[name])
        if self._pos < self._data.size:     # older files end here
            self._number("the number of chunks", 0)
            found.datasets = list(filter(None, [self._text("the name of the text", 0)]))
        return found


def check_target(path, inputs=()):
    """Raise ImatrixError if a file cannot be written, before a long run.

    inputs: paths that it must not replace.
    """
    try:
        path, partial = _target(path)
        for other in inputs:
            if path.exists() and os.path.exists(other) and os.path.samefile(path, other):
                raise ImatrixError(f"{path}: the imatrix would replace {other}, which is read: give it another name.")
        _check_own(path)
        open(partial, "wb").close()
        partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise ImatrixError(f"{path}: the imatrix cannot be written ({getattr(error, 'strerror', error)}).") from error


def _target(path):
    """The file that a path leads to, and its name until it is complete.

    Raises ImatrixError for an empty path, and OSError if something else is there, such as a pipe, which a file would replace.
    """
    if not os.fspath(path):
        raise ImatrixError("The name of the imatrix is empty, expected that of a file.")
    path = Path(os.path.expanduser(path))
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    check_replaceable(path)
    return path, path.with_name(f"{path.name}.{os.getpid()}.part")      # another run may write to the same path


def _check_own(path):
    """Raise ImatrixError if another file is there, such as a model."""
    if path.exists() and path.stat().st_size and not _may_be_imatrix(path):
        raise ImatrixError(f"{path}: another file is there, and would be lost, expected an imatrix or none.")


def _may_be_imatrix(path):
    """Whether a file is an imatrix, perhaps a damaged one."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":        # a .dat: the number of entries, and the length of a name
        return len(start) == 8 and 0 < int.from_bytes(start[:4], "little") < 1 << 20 and 0 < int.from_bytes(start[4:], "little") < 1 << 10
    try:
        return any(name.endswith(SUMS) for name in open_gguf(path).tensors)
    except GGUFError:
        return False


def save(imatrix, path, form="gguf"):
    """Write an Imatrix as llama.cpp does: the same bytes.

    The file replaces an older one only when it is complete. form: "gguf", or "dat", which leaves out entries without any data, and in which
    experts without data have ones. Raises ImatrixError if it cannot be written.
    """
    if form not in FORMS:
        raise ImatrixError(f"The form of the imatrix is {form!r}, expected one of {', '.join(FORMS)}.")
    if imatrix.chunks > MOST_CHUNKS:
        raise ImatrixError(f"The imatrix has {imatrix.chunks} chunks of {imatrix.chunk_size} tokens, expected at most "
                           f"{MOST_CHUNKS}, the most that a file can say.")
    try:
        path, partial = _target(path)
        _check_own(path)
        with replacing(path, partial), np.errstate(over="raise"):
            {"gguf": _write_gguf, "dat": _write_legacy}[form](imatrix, partial)
    except FloatingPointError:
        raise ImatrixError(f"{path}: the imatrix has sums that are not finite in float32, the numbers of its file.") from None
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise ImatrixError(f"{path}: the imatrix cannot be written ({getattr(error, 'strerror', error)}).") from error


def _write_gguf(imatrix, path):
    """Write the GGUF form, in the order in which llama.cpp writes it."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self):
            """An imatrix has none."""

    writer = Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", imatrix.datasets or [""])      # gguf-py writes no empty array, and llama-quantize wants the key
    writer.add_uint32("imatrix.chunk_count", imatrix.chunks)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for name in sorted(imatrix.sums):
        sums, counts = imatrix.sums[name].astype(np.float32), imatrix.counts[name].astype(np.float32)
        several = counts.size > 1       # ggml leaves out leading dimensions of 1
        writer.add_tensor(name + SUMS, sums.reshape(counts.size, -1) if several else sums)
        writer.add_tensor(name + COUNTS, counts[:, None] if several else counts)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_legacy(imatrix, path):
    """Write the .dat form."""
    def number(value):
        return int(value).to_bytes(4, "little", signed=True)

    def text(value):
        return number(len(value.encode())) + value.encode()

    names = sorted(name for name, counts in imatrix.counts.items() if counts.any())
    with open(path, "wb") as file:
        file.write(number(len(names)))
        for name in names:
            counts = imatrix.counts[name]
            calls = -(-counts.max() // imatrix.chunk_size)
            sums = imatrix.sums[name].astype(np.float32).reshape(counts.size, -1)
            values = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1).astype(np.float32)[:, None], np.float32(1))
            file.write(text(name) + number(calls) + number(values.size) + (values * np.float32(calls)).astype("<f4").tobytes())
        file.write(number(imatrix.chunks) + text((imatrix.datasets or [""])[-1]))
