"""The file of a saved session: a header with its tokens, its cache rows, and a checksum.

A file is: a magic, the length of the header, the header (JSON), rows, and SHA-256 of header and rows. parts.py has sessions in
several files, which have this form too.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from pydsa.errors import ContextFullError, SessionFileError
from pydsa.quants import CACHE_ALIASES
from pydsa.targets import check_replaceable, replacing

KIND = b"pydsa session"         # how all files of sessions begin
MAGIC = KIND + b" 1\n"
MAX_HEADER = 1 << 28    # bytes; the ids of a million tokens take seven million bytes
CHUNK = 1 << 24         # bytes of rows that are read, written or sent at a time
DAMAGED, INCOMPLETE, SHORTER = "the file is damaged", "the file is incomplete or damaged", "the file became shorter while it was read"
NAMES = {"model": "model file", "kv_type": "cache type (--kv-type)", "index_type": "--index-type", "attention": "--attention",
         "top_k": "--dsa-top-k", "reproducible": "setting of --reproducible", "caches": "set of caches"}


def write(path, identity, tokens, caches):
    """Write tokens and the rows of their caches, {CacheRef: cache}.

    identity: what a session that loads them must have in common. The file replaces an older one only when it is complete. Raises
    SessionFileError if it cannot be written.
    """
    with replaced(path) as partial:
        write_framed(partial, MAGIC, identity | {"tokens": tokens}, rows_of(caches.values(), len(tokens)))


@contextlib.contextmanager
def replaced(path):
    """A context with the Path of a file that becomes `path` at its end.

    Raises SessionFileError, also for an OSError of the context, and leaves no file then.
    """
    path = Path(path)
    try:
        check_replaceable(path, KIND)
        partial = path.with_name(path.name + ".part")
        with replacing(path, partial):
            yield partial
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise SessionFileError(f"{path}: the session cannot be written ({getattr(error, 'strerror', error)}).") from error


def rows_of(caches, n):
    """Yield the rows of the first n tokens of caches, some at a time.

    They are uint8 [some, row_bytes].
    """
    for cache in caches:
        for start, stop in chunks(n, cache.row_bytes):
            yield np.ascontiguousarray(cache.stored(stop, start))


def chunks(n, row_bytes):
    """Divide n rows -> pairs (start, stop) of at most CHUNK bytes, or one row."""
    step = max(1, CHUNK // row_bytes)
    return [(start, min(n, start + step)) for start in range(0, n, step)]


def write_framed(path, magic, fields, rows):
    """Write a file with a header of fields, and rows, an iterable of arrays.

    Returns its size in bytes and the hexadecimal SHA-256 at its end. Raises OSError.
    """
    header = json.dumps(fields).encode()
    with open(path, "wb") as file:
        file.write(magic + len(header).to_bytes(8, "little") + header)
        digest = hashlib.sha256(header)
        for part in rows:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        return file.tell(), digest.hexdigest()


class Framed:
    """An open file of that form, of which the header has been read.

    fields: a dict. start: where the rows begin. size: of the whole file. Raises SessionFileError, which begins with `path`, for a file that
    is none.
    """

    def __init__(self, path, file, magic, what="a session saved by this version of pydsa"):
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        if file.read(len(magic)) != magic:
            self.fail(f"this is not {what}")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, self.size):
            self.fail(INCOMPLETE)
        self._header = file.read(length)
        try:
            self.fields = json.loads(self._header)
        except (ValueError, RecursionError):
            self.fail(INCOMPLETE)
        if not isinstance(self.fields, dict):
            self.fail(DAMAGED)
        self.start = file.tell()

    def fail(self, text):
        """Raise a SessionFileError that names the file."""
        raise SessionFileError(f"{self.path}: {text}.")

    def check(self, n_bytes):
        """Check the number of bytes of rows, and the digest.

        Returns the digest, hexadecimal. The file's position is then at the first row.
        """
        if self.size != self.start + n_bytes + 32:
            self.fail(INCOMPLETE)
        digest = hashlib.sha256(self._header)
        while self.file.tell() < self.size - 32:
            data = self.file.read(min(CHUNK, self.size - 32 - self.file.tell()))
            if not data:
                self.fail(SHORTER)
            digest.update(data)
        if self.file.read(32) != digest.digest():
            self.fail(DAMAGED)
        self.file.seek(self.start)
        return digest.hexdigest()

    def tokens(self, identity, n_vocab, n_ctx):
        """The tokens of a session's header, which must have this identity.

        The order of its caches may be another. Raises ContextFullError for more than n_ctx.
        """
        fields = {"reproducible": False} | self.fields      # older files have none
        for key in ("kv_type", "index_type"):
            fields[key] = CACHE_ALIASES.get(str(fields.get(key)), fields.get(key))
        caches = fields.get("caches")
        if isinstance(caches, list) and sorted(map(str, caches)) == sorted(map(str, identity["caches"])):
            fields["caches"] = identity["caches"]
        for key, value in identity.items():
            if fields.get(key) != value:
                self.fail(f"the session was saved with another {NAMES[key]}")
        tokens = fields.get("tokens")
        if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < n_vocab for t in tokens):
            self.fail(DAMAGED)
        if len(tokens) > n_ctx:
            raise ContextFullError(f"{self.path}: the session has {len(tokens)} tokens; this context holds {n_ctx} (-c).")
        return tokens

    def rows(self, n, row_bytes, first=0):
        """Yield (start, rows) of the next n rows of the file, some at a time.

        rows: uint8 [some, row_bytes]. start counts from `first` on. Raises SessionFileError where they end.
        """
        for start, stop in chunks(n, row_bytes):
            rows = np.empty((stop - start, row_bytes), np.uint8)
            if self.file.readinto(rows.reshape(-1)) != rows.size:
                self.fail(f"{SHORTER}; the session is empty now")
            yield first + start, rows


@contextlib.contextmanager
def reading(path):
    """A context in which an OSError means that a session cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SessionFileError(f"{path}: the session cannot be read ({getattr(error, 'strerror', error)}).") from error


@contextlib.contextmanager
def checked(path, identity, caches, n_vocab, n_ctx):
    """A context with the tokens of a file, and a function read().

    That reads its rows into the caches. The file is checked before. Raises SessionFileError if it is damaged, or another session's, by
    identity; ContextFullError if it has more than n_ctx tokens.
    """
    with reading(path), open(path, "rb") as file:
        framed = Framed(path, file, MAGIC)
        tokens = framed.tokens(identity, n_vocab, n_ctx)
        framed.check(sum(len(tokens) * cache.row_bytes for cache in caches.values()))

        def read():
            by_ref = {tuple(ref): cache for ref, cache in caches.items()}
            for kind, layer, _ in framed.fields["caches"]:
                cache = by_ref[kind, layer]
                for start, rows in framed.rows(len(tokens), cache.row_bytes):
                    cache.restore(rows, start)
        yield tokens, read
