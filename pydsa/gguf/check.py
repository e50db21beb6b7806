"""Look for damage in the weights of a file: NaN, infinities, and parts that were never written.

A download that stopped early can leave a file of the right size with zeros in it; a bad conversion leaves NaN. In quantized blocks these
can only be in the scales.
"""
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import threading
import warnings
from typing import NamedTuple

import numpy as np

from pydsa.errors import GGUFError
from pydsa.gguf.file import GGML_TYPES
from pydsa.options import size
from pydsa.quants import TYPES

CHUNK = 16 << 20        # bytes read at a time
STRETCH = 1 << 20       # bytes of zeros that no trained matrix has in a row
FILES = 4               # read at the same time, at most
END = 64                # bytes at an end that tell whether anything was written there
SCALES = ("d", "dmin", "m")         # the fields of blocks that are float16
# The bits of infinity, of which NaN has more, and all bits but the sign
BITS = {"F32": (0x7F800000, 0x7FFFFFFF), "F16": (0x7C00, 0x7FFF), "BF16": (0x7F80, 0x7FFF)}
VOCABULARY = ("token_embd.weight", "output.weight")     # their last rows may stand for no token
BLOCK_BYTES = {kind.name: kind.n_bytes for kind in GGML_TYPES.values()}


class Faults(NamedTuple):
    """What is wrong with a tensor; `checked` is False for unknown formats."""
    nan: int = 0            # values or scales that are NaN
    infinite: int = 0
    zeros: int = 0          # bytes in stretches of zeros
    checked: bool = True

    def __bool__(self):
        return bool(self.nan or self.infinite or self.zeros)

    def in_words(self):
        """What is wrong, as part of a sentence."""
        words = [f"{n} {name}" for n, name in ((self.nan, "NaN"), (self.infinite, "infinities")) if n]
        return " and ".join(words + [f"{size(self.zeros)} of zeros"] * bool(self.zeros))


def _not_finite(kind, data):
    """How many values, or scales of blocks, are NaN, and how many infinite.

    kind: a key of TYPES. data: uint8, whole blocks.
    """
    dtype = TYPES[kind].dtype
    if dtype.names is None:
        return _count(data.view(dtype).view(f"<u{dtype.itemsize}"), *BITS[kind])
    blocks = data.view(dtype)
    counts = [_count(blocks[name], *BITS["F16"]) for name in dtype.names if name in SCALES]
    counts += [(int(np.count_nonzero(blocks[name] == 255)), 0) for name in dtype.names if name == "e"]      # an exponent; 255 is NaN
    if kind == "IQ1_M":     # float16 in the highest four bits of four scales
        scales = blocks["scales"] >> np.array([12, 8, 4, 0], "<u2") & np.array([0xF, 0xF0, 0xF00, 0xF000], "<u2")
        counts.append(_count(np.bitwise_or.reduce(scales, axis=-1), *BITS["F16"]))
    return sum(nan for nan, _ in counts), sum(infinite for _, infinite in counts)       # none in NVFP4, whose scales have no NaN


def _count(values, infinity, magnitude):
    magnitudes = values & magnitude
    if magnitudes.max(initial=0) < infinity:
        return 0, 0
    return int(np.count_nonzero(magnitudes > infinity)), int(np.count_nonzero(magnitudes == infinity))


def _zeros(data):
    """Bytes of the stretches that hold nothing."""
    whole = data[:len(data) // STRETCH * STRETCH].reshape(-1, STRETCH)
    return STRETCH * int(np.count_nonzero(~whole.any(axis=1)))


class _Look:
    """What is known of one tensor while its bytes come in."""

    def __init__(self, tensor):
        self.tensor, self.nan, self.infinite, self.zeros, self.written = tensor, 0, 0, 0, False

    def add(self, data):
        """Look at the next bytes, whole blocks."""
        if self.tensor.type in TYPES:
            nan, infinite = _not_finite(self.tensor.type, data)
            self.nan, self.infinite = self.nan + nan, self.infinite + infinite
        self.written = self.written or bool(data.any())
        self.zeros += _zeros(data)

    def faults(self):
        """The Faults. A vector of zeros can be a bias; a vocabulary can end in rows of zeros."""
        tensor, zeros = self.tensor, self.zeros if self.written else self.tensor.data.nbytes
        bias = len(tensor.shape) == 1 and not tensor.name.endswith("norm.weight")
        if bias or tensor.name in VOCABULARY and zeros < tensor.data.nbytes / 2:
            zeros = 0
        return Faults(self.nan, self.infinite, zeros, tensor.type in TYPES)


def faults(tensor):
    """The Faults of a mapped tensor; all of it is read."""
    look, data = _Look(tensor), tensor.read().data.reshape(-1)
    step = CHUNK // BLOCK_BYTES[tensor.type] * BLOCK_BYTES[tensor.type]
    for start in range(0, len(data), step):
        look.add(data[start:start + step])
    return look.faults()


def places(file):
    """[(path, [(offset in bytes, Tensor)])] of the parts that are here."""
    return [(path, [(tensor.data.ctypes.data - tensor.data.base.ctypes.data, tensor) for tensor in map(file.tensors.get, names)])
            for path, names in zip(file.paths, file.part_names) if path not in file.absent]


def _pieces(size, tensors):
    """(n bytes, a _Look or None) of a whole file from its start on."""
    position = 0
    for offset, tensor in tensors:
        look, end = _Look(tensor), offset + tensor.data.nbytes
        yield from ((n, None) for n in _split(offset - position, CHUNK))
        yield from ((n, look) for n in _split(end - offset, CHUNK // BLOCK_BYTES[tensor.type] * BLOCK_BYTES[tensor.type]))
        position = end
    yield from ((n, None) for n in _split(size - position, CHUNK))


def _split(n, most):
    return [most] * (n // most) + [n % most] * bool(n % most)


def _opened(path):
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise GGUFError(f"{path}: the file cannot be opened again ({error.strerror})") from error


def _read(path, file, buffer):
    n = 0
    while n < len(buffer):
        try:
            more = file.readinto(buffer[n:])
        except OSError as error:
            raise GGUFError(f"{path}: the file cannot be read at byte {file.tell()} ({error.strerror})") from error
        if not more:
            raise GGUFError(f"{path}: the file became shorter while it was read")
        n += more
    return buffer


def _check_part(path, tensors, report, stop):
    """Read one file once -> (bytes, SHA-256, {name: Faults}).

    The next piece is read, and this one is hashed, while this one is looked at.
    """
    digest, looks = hashlib.sha256(), {}
    with _opened(path) as file, concurrent.futures.ThreadPoolExecutor(2) as pool:
        size = os.fstat(file.fileno()).st_size
        buffers = itertools.cycle([memoryview(bytearray(min(size, CHUNK))) for _ in range(2)])
        pieces = list(_pieces(size, tensors))
        reading = pool.submit(_read, path, file, next(buffers)[:pieces[0][0]])
        for i, (n, look) in enumerate(pieces):
            if stop.is_set():
                break
            data = reading.result()
            if i + 1 < len(pieces):
                reading = pool.submit(_read, path, file, next(buffers)[:pieces[i + 1][0]])
            hashing = pool.submit(digest.update, data)
            if look is not None:
                look.add(np.frombuffer(data, np.uint8))
                looks[look.tensor.name] = look
            hashing.result()
            report(n)
    return size, digest.hexdigest(), {name: look.faults() for name, look in looks.items()}


def check_files(file, progress=lambda done, total, item="": None):
    """Read all files of a GGUFFile once -> a report, a dict of JSON types.

    "files" has the path, bytes and SHA-256 of each, and "tensors" those with faults; "n_unknown" is the number of tensors whose format is
    not known, and "sound" says whether there are no faults. progress(done, total, item) is called with MiB. Raises GGUFError if a file
    cannot be read.
    """
    total, done, lock, stop = file.n_bytes / 2**20, 0, threading.Lock(), threading.Event()

    def report(n):
        nonlocal done
        with lock:
            done += n / 2**20
    parts = places(file)
    pool = concurrent.futures.ThreadPoolExecutor(min(FILES, len(parts)))
    try:
        futures = [pool.submit(_check_part, *part, report, stop) for part in parts]
        going = futures
        while going:
            ended, going = concurrent.futures.wait(futures, 0.1, concurrent.futures.FIRST_EXCEPTION)
            for future in ended:
                future.result()         # raises what has ended it
            progress(done, total, "MiB")
        results = [future.result() for future in futures]
    finally:        # an error of one file, or Ctrl-C, ends the others after a piece
        stop.set()
        pool.shutdown(cancel_futures=True)
    return _report(file, parts, results)


def _report(file, parts, results):
    files = [{"path": str(path), "bytes": size, "sha256": digest} for (path, _), (size, digest, _) in zip(parts, results)]
    tensors = [{"name": name, "type": file.tensors[name].type, "file": str(path), **found._asdict()}
               for (path, _), (_, _, all_faults) in zip(parts, results) for name, found in all_faults.items() if found]
    n_unknown = sum(not found.checked for *_, all_faults in results for found in all_faults.values())
    return {"files": files, "n_tensors": len(file.tensors), "n_unknown": n_unknown, "tensors": tensors, "sound": not tensors}


def format_check(report):
    """The report of check_files() as lines of text; hashes as sha256sum's."""
    lines = [f"{entry['sha256']}  {entry['path']}" for entry in report["files"]]
    for entry in report["tensors"]:
        found = Faults(entry["nan"], entry["infinite"], entry["zeros"])
        lines.append(f"tensor {entry['name']} ({entry['type']}) has {found.in_words()}")
    if report["n_unknown"]:
        lines.append(f"{report['n_unknown']} tensors have formats that pydsa cannot look into")
    if report["sound"]:
        lines.append(f"{report['n_tensors']} tensors, and no fault was found")
    else:
        lines.append(f"{len(report['tensors'])} of {report['n_tensors']} tensors are damaged: compare the hashes with the publisher's, and "
                     "get the files again")
    return lines


def warn_of_gaps(file):
    """Warn of matrices that seem never to have been written.

    They have zeros at their end and in their middle, or at the end of all but a vocabulary. Two pages of each are read, past the map, which
    would read more.
    """
    empty = []
    for path, tensors in places(file):
        with _opened(path) as opened:
            with contextlib.suppress(AttributeError, OSError):      # a hint, that not all systems take
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for offset, tensor in tensors:
                n_bytes = tensor.data.nbytes
                at = [n_bytes - min(END, n_bytes), n_bytes // 2 // END * END]
                if len(tensor.shape) > 1 and n_bytes > 2 * END:
                    found = [_nothing_at(path, opened, offset + position) for position in at]
                    if all(found) if tensor.name in VOCABULARY else found[0]:
                        empty.append(tensor.name)
    if empty:
        what = f"tensor {empty[0]!r} ends" if len(empty) == 1 else f"{len(empty)} tensors, the first of them {empty[0]!r}, end"
        warnings.warn(f"{file.paths[0]}: {what} in zeros: the file may be incomplete though its size is right; "
                      "`pydsa info --check` reads all of it.", stacklevel=2)


def _nothing_at(path, file, position):
    file.seek(position)
    return not any(_read(path, file, memoryview(bytearray(END))))
