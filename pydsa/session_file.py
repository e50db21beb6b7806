"""The file of a saved session: a header with its tokens, its cache rows, and a checksum."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from pydsa.errors import ContextFullError, SessionFileError
from pydsa.quants import CACHE_ALIASES
from pydsa.targets import check_replaceable, replacing

MAGIC = b"pydsa session 1\n"
MAX_HEADER = 1 << 28    # bytes; the ids of a million tokens take seven million bytes


def write(path, identity, tokens, caches):
    """Write tokens and the rows of their caches, {CacheRef: VectorCache}.

    identity: what a session that loads them must have in common. The file replaces an older one only when it is complete. Raises
    SessionFileError if it cannot be written.
    """
    header = json.dumps(identity | {"tokens": tokens}).encode()
    path = Path(path)
    try:
        check_replaceable(path)
        partial = path.with_name(path.name + ".part")
        with replacing(path, partial):
            _write(partial, header, (np.ascontiguousarray(cache.stored(len(tokens))) for cache in caches.values()))
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise SessionFileError(f"{path}: the session cannot be written ({getattr(error, 'strerror', error)}).") from error


def _write(path, header, rows):
    with open(path, "wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        digest = hashlib.sha256(header)
        for part in rows:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


@contextlib.contextmanager
def checked(path, identity, caches, n_vocab, n_ctx):
    """A context with the tokens of a file, and a function read().

    That reads its rows into the caches. The file is checked before. Raises SessionFileError if it is damaged, or another session's, by
    identity; ContextFullError if it has more than n_ctx tokens.
    """
    try:
        with open(path, "rb") as file:
            tokens = _check(path, file, os.fstat(file.fileno()).st_size, identity, caches, n_vocab, n_ctx)

            def read():
                for cache in caches.values():
                    rows = cache.stored(len(tokens))
                    if file.readinto(rows.reshape(-1)) != rows.size:
                        raise SessionFileError(f"{path}: the file became shorter while it was read; the session is empty now.")
                    cache.restore(rows)
            yield tokens, read
    except (OSError, ValueError) as error:
        raise SessionFileError(f"{path}: the session cannot be read ({getattr(error, 'strerror', error)}).") from error


def _check(path, file, size, identity, caches, n_vocab, n_ctx):
    """Check an open session file -> its tokens.

    The file's position is then where its caches begin.
    """
    def fail(text):
        raise SessionFileError(f"{path}: {text}.")

    if file.read(len(MAGIC)) != MAGIC:
        fail("this is not a session saved by this version of pydsa")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size):
        fail("the file is incomplete or damaged")
    header = file.read(length)
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        fail("the file is incomplete or damaged")
    names = {"model": "model file", "kv_type": "cache type (--kv-type)", "index_type": "--index-type", "attention": "--attention",
             "top_k": "--dsa-top-k", "reproducible": "setting of --reproducible", "caches": "set of caches"}
    if not isinstance(fields, dict):
        fail("the file is damaged")
    fields.setdefault("reproducible", False)        # older files have none
    for key in ("kv_type", "index_type"):
        fields[key] = CACHE_ALIASES.get(str(fields.get(key)), fields.get(key))
    for key, value in identity.items():
        if fields.get(key) != value:
            fail(f"the session was saved with another {names[key]}")
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < n_vocab for t in tokens):
        fail("the file is damaged")
    if len(tokens) > n_ctx:
        raise ContextFullError(f"{path}: the session has {len(tokens)} tokens; this context holds {n_ctx} (-c).")
    if size != file.tell() + sum(len(tokens) * cache.row_bytes for cache in caches.values()) + 32:
        fail("the file is incomplete or damaged")
    start, digest = file.tell(), hashlib.sha256(header)
    while file.tell() < size - 32:
        data = file.read(min(1 << 24, size - 32 - file.tell()))
        if not data:
            fail("the file became shorter while it was read")
        digest.update(data)
    if file.read(32) != digest.digest():
        fail("the file is damaged")
    file.seek(start)
    return tokens
