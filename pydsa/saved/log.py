"""The log of a stage's rows, to which those of new tokens are appended.

    log = SessionLog(path, identity, caches)    # a new one, or what is there: log.tokens
    log.append(start, ids)                      # the rows of tokens start, start + 1, ... are in the caches
    log.restore()                               # into the caches of a stage that was started again

A file is: a magic, the length of the header, the header (JSON), its SHA-256; then records: a magic, the first token's place, the number of
tokens, their ids (int32), their rows cache by cache, and SHA-256 of the checksum before and all of the record. A record counts when it is
complete, so a process that is killed while it appends leaves what was complete before.
"""
import contextlib
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

from pydsa.errors import SessionFileError
from pydsa.saved.file import MAX_HEADER, chunks
from pydsa.targets import replacing

MAGIC, RECORD = b"pydsa session log 1\n", struct.Struct("<4sQQ")
ROWS = b"ROWS"
STEP = 4096             # tokens of a record, at most
SPARE = 1 << 26         # bytes of rows that count no more, from which on a log with more of them than of others is written again


def log_path(folder, run, number, layers):
    """The path of the log of a session's rows on one stage.

    run: hexadecimal digits of the process that has the sessions. number: the session's. layers: (first, stop).
    """
    return Path(folder) / f"pydsa-{run}-{number}.layers-{layers[0]}-{layers[1] - 1}.log"


class SessionLog:
    """The tokens of a session whose rows are in a file, and these rows.

    path: the file, which is made if there is none. identity: JSON's types; a file that is there must have the same. caches: {CacheRef:
    cache}, in the same order. tokens: the ids, a list of int. Raises SessionFileError if the file is another session's or no log, or cannot
    be read or written.
    """

    def __init__(self, path, identity, caches):
        self.path, self.tokens, self._caches = Path(path), [], list(caches.values())
        self._records = []          # (start, n, position of the first row)
        self._row_bytes = sum(cache.row_bytes for cache in self._caches)
        fields = identity | {"caches": [[*ref, cache.row_bytes] for ref, cache in caches.items()]}
        header = json.dumps(fields).encode()
        self._head = MAGIC + len(header).to_bytes(8, "little") + header + hashlib.sha256(header).digest()
        with self._explained("read"):
            self._file = self._open() if self.path.exists() else self._begin(self.path)

    def append(self, start, ids):
        """Write the rows of tokens from start on; later ones count no more.

        ids: the tokens start, start + 1, ..., a list of int, whose rows are in the caches, as those of all tokens before. If it fails, what
        was written before counts.
        """
        if start > len(self.tokens):
            raise SessionFileError(f"{self.path}: rows from token {start} on do not go on from the {len(self.tokens)} that were saved.")
        with self._explained("written"):
            if self._is_mostly_spare(start + len(ids)):
                self._write_again(start, ids)
            else:
                before = self._end, self._digest, list(self._records)
                try:
                    self._add(self._file, start, ids)
                except BaseException:
                    self._end, self._digest, self._records = before
                    self._file.truncate(self._end)
                    raise
        self.tokens[start:] = ids

    def restore(self, n=None):
        """Overwrite the caches' rows of the first n tokens; None: of all."""
        n = len(self.tokens) if n is None else n
        with self._explained("read"):
            for start, count, position in self._records:
                for cache in self._caches:
                    self._file.seek(position)
                    for first, stop in chunks(max(0, min(count, n - start)), cache.row_bytes):
                        rows = np.empty((stop - first, cache.row_bytes), np.uint8)
                        if self._file.readinto(rows.reshape(-1)) != rows.size:
                            raise OSError("it became shorter while it was read")
                        cache.restore(rows, start + first)
                    position += count * cache.row_bytes

    def close(self):
        """Close the file, which stays."""
        self._file.close()

    def remove(self):
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, what):
        try:
            yield
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SessionFileError(f"{self.path}: the session's log cannot be {what} ({reason}).") from error

    def _begin(self, path):
        """Make a file without records; its header is complete, or it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        with replacing(path, partial):
            partial.write_bytes(self._head)
        self._end, self._digest, self._records = len(self._head), self._head[-32:], []
        return open(path, "r+b", buffering=0)      # nothing stays in a buffer where the disk is full

    def _open(self):
        """Open a file, read its records, and cut off what is not complete."""
        file = open(self.path, "r+b", buffering=0)
        try:
            self._check_head(file)
            self._end, self._digest, tokens = len(self._head), self._head[-32:], []
            while (ids := self._read_record(file, len(tokens))) is not None:
                tokens[self._records[-1][0]:] = ids
            file.truncate(self._end)
            self.tokens = tokens
        except BaseException:
            file.close()
            raise
        return file

    def _check_head(self, file):
        if file.read(len(MAGIC)) != MAGIC:
            raise SessionFileError(f"{self.path}: this is not a log of a session, expected one by its name; remove it.")
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MAX_HEADER))
        if file.read(32) != hashlib.sha256(header).digest():
            raise SessionFileError(f"{self.path}: the beginning of the session's log is damaged; remove it.")
        if header != self._head[len(MAGIC) + 8:-32]:
            raise SessionFileError(f"{self.path}: this log is of another session, model, cache type or range of layers.")

    def _read_record(self, file, n_before):
        """The ids of the next record; None if there is no complete one."""
        head = file.read(RECORD.size)
        magic, start, n = RECORD.unpack(head) if len(head) == RECORD.size else (b"", 0, 0)
        size = os.fstat(file.fileno()).st_size
        if magic != ROWS or start > n_before or n > (size - file.tell()) // (4 + self._row_bytes):
            return None
        ids = file.read(4 * n)
        digest, position, left = hashlib.sha256(self._digest + head + ids), file.tell(), n * self._row_bytes
        while left:
            data = file.read(min(left, 1 << 24))
            if not data:
                return None
            digest.update(data)
            left -= len(data)
        if file.read(32) != digest.digest():
            return None
        self._records.append((start, n, position))
        self._end, self._digest = file.tell(), digest.digest()
        return np.frombuffer(ids, "<i4").tolist()

    def _add(self, file, start, ids):
        """Append the rows of ids, in records of at most STEP tokens."""
        file.seek(self._end)
        for first in range(0, len(ids), STEP) if ids else (0,):
            some = ids[first:first + STEP]
            at = start + first
            head = RECORD.pack(ROWS, at, len(some)) + np.array(some, "<i4").tobytes()
            digest = hashlib.sha256(self._digest + head)
            _write(file, head)
            position = file.tell()
            for cache in self._caches:
                for low, high in chunks(len(some), cache.row_bytes):
                    rows = np.ascontiguousarray(cache.stored(at + high, at + low))
                    digest.update(rows)
                    _write(file, rows)
            _write(file, digest.digest())
            self._records.append((at, len(some), position))
            self._end, self._digest = file.tell(), digest.digest()

    def _is_mostly_spare(self, n_tokens):
        """Whether the rows that count no more take much of the file."""
        spare = self._end - len(self._head) - n_tokens * self._row_bytes
        return spare > SPARE + n_tokens * self._row_bytes

    def _write_again(self, start, ids):
        """Write a file with the rows that count, which then replaces this one."""
        old, partial = self._file, self.path.with_name(self.path.name + ".part")
        before = self._end, self._digest, self._records
        file = open(partial, "w+b", buffering=0)
        try:
            with replacing(self.path, partial):
                self._end, self._digest, self._records = len(self._head), self._head[-32:], []
                _write(file, self._head)
                self._add(file, 0, self.tokens[:start] + ids)
        except BaseException:
            self._end, self._digest, self._records = before
            file.close()
            raise
        self._file = file
        old.close()


def _write(file, data):
    """Write all bytes of an array or of bytes to an unbuffered file."""
    data = memoryview(data).cast("B") if len(data) else b""
    while data:
        data = data[file.write(data):]
