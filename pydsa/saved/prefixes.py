"""Prefixes keeps cache rows, for conversations that begin alike.

    prefixes.add(owner, session)            # a conversation, as far as it has come
    prefixes.extend(owner, session, ids)    # take the rows of as many of the next ids as are known

Token sequences form a radix tree, so conversations with a common beginning share its rows. What was used last stays in memory; the rest
moves to files, if there is a folder for them, or is forgotten.
"""
import collections
import contextlib
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np

from pydsa.machine import limits

SPARE = 0.1         # the share of the free memory that is left alone
MAX_FILE_BYTES = 1 << 36


class _Node:
    """A piece of token sequences, and its cache rows.

    tokens: int32 [n]. rows: a list of uint8 [n, row_bytes], one a cache, or None while they are in `file`. children: by their first token.
    """

    def __init__(self, parent, tokens, rows):
        self.parent, self.tokens, self.rows, self.file, self.children = parent, tokens, rows, None, {}
        self.n_bytes = sum(part.nbytes for part in rows)


def common_length(a, b):
    """How many elements two arrays have in common at their beginnings."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


class Prefixes:
    """The rows of conversations of one model, in up to max_bytes of memory.

    folder: the path of a folder for up to max_file_bytes of rows that do not fit; None: there are no files. Conversations of different
    owners share nothing. One thread at a time may use it.

    n_bytes, n_file_bytes: bytes of rows in memory and in files.
    """

    def __init__(self, max_bytes, folder=None, max_file_bytes=MAX_FILE_BYTES):
        self._max_bytes, self._folder, self._max_file_bytes = max_bytes, folder, max_file_bytes
        self._roots, self._numbers = {}, itertools.count()
        # Used last at the end. A node is used whenever one below it is, and counts as used after that: below the first there is no other.
        self._in_memory, self._in_files = collections.OrderedDict(), collections.OrderedDict()
        self.n_bytes = self.n_file_bytes = 0

    def match(self, owner, ids):
        """How many of the first ids have rows; ids: int32 [n]."""
        return sum(n for _, n in self._path(owner, ids))

    def add(self, owner, session):
        """Keep the rows of a session's tokens, if they fit."""
        if self._max_bytes > 0 and session.tokens:
            self._insert(owner, session)
            self._make_room(0)      # for what is larger than the memory, or came back from a file to be divided

    def _insert(self, owner, session):
        tokens, at = np.array(session.tokens, np.int32), 0
        node, path = self._roots.get(owner), self._path(owner, tokens)
        self._use(path)
        for node, n in path:
            at += n
            if n < len(node.tokens):
                node = self._split(node, n)
                if node is None:
                    return
        if at == len(tokens):
            return
        n_bytes = (len(tokens) - at) * sum(cache.row_bytes for cache in session.caches.values())
        fits = self._make_room(n_bytes)
        if not (fits or self._goes_to_a_file(n_bytes)) or path and node not in self._in_memory and node not in self._in_files:
            return
        node = node or self._roots.setdefault(owner, _Node(None, tokens[:0], []))
        new = _Node(node, tokens[at:], session.cut(at, len(tokens)))
        node.children[int(tokens[at])] = new
        self.n_bytes += new.n_bytes
        self._in_memory[new] = None
        self._use(self._path(owner, tokens))

    def extend(self, owner, session, ids):
        """Append to a session the ids whose rows are known -> their number.

        ids: int32 [n], of which the session has the first n_past already.
        """
        before, at, used = session.n_past, 0, []
        for node, n in self._path(owner, ids):
            if at + n > session.n_past:
                if not self._read(node):
                    break
                skip = session.n_past - at
                session.paste(node.tokens[skip:n].tolist(), [part[skip:n] for part in node.rows])
            used.append((node, n))
            at += n
        self._use(used)
        self._make_room(0)
        return session.n_past - before

    def close(self):
        """Forget everything, and remove the files."""
        for node in [*self._in_memory, *self._in_files]:
            self._forget(node)
        self._roots.clear()

    def _path(self, owner, ids):
        """The nodes that the ids go through: pairs (node, its tokens in common)."""
        node, at, path = self._roots.get(owner), 0, []
        while node is not None and at < len(ids):
            node = node.children.get(int(ids[at]))
            if node is not None:
                path.append((node, common_length(node.tokens, ids[at:at + len(node.tokens)])))
                at += path[-1][1]
                if path[-1][1] < len(node.tokens):
                    break
        return path

    def _use(self, path):
        for node, _ in reversed(path):
            (self._in_files if node.rows is None else self._in_memory).move_to_end(node)

    def _split(self, node, n):
        """Divide a node after n tokens -> the first part; None without its rows."""
        if not self._read(node):
            return None
        first = _Node(node.parent, node.tokens[:n], [part[:n].copy() for part in node.rows])
        node.parent.children[int(node.tokens[0])] = first
        node.parent, node.tokens, node.rows = first, node.tokens[n:], [part[n:].copy() for part in node.rows]
        node.n_bytes -= first.n_bytes
        first.children[int(node.tokens[0])] = node
        self._in_memory[first] = None
        return first

    def _make_room(self, n_bytes):
        """Move or forget what was used longest ago -> whether n_bytes fit."""
        while self._is_short(n_bytes):
            if not self._in_memory:
                return False
            node = next(iter(self._in_memory))
            if not self._write(node):
                self._forget(node)
        return True

    def _is_short(self, n_bytes):
        """Whether n_bytes more do not fit; the system is asked only if they might: that takes 0.25 ms."""
        return self.n_bytes + n_bytes > self._max_bytes or n_bytes > 0 and n_bytes > (1 - SPARE) * limits.available().n_bytes

    def _goes_to_a_file(self, n_bytes):
        """Whether rows of more than max_bytes can be put in a file."""
        return (self._folder is not None and self._max_bytes < n_bytes <= self._max_file_bytes
                and n_bytes <= (1 - SPARE) * limits.available().n_bytes)

    def _write(self, node):
        """Move a node's rows to a file -> whether that was done."""
        if self._folder is None or node.n_bytes > self._max_file_bytes:
            return False
        while self.n_file_bytes + node.n_bytes > self._max_file_bytes:
            self._forget(next(iter(self._in_files)))
        if node not in self._in_memory:     # it was below what was forgotten
            return True
        path = Path(self._folder, f"pydsa-{os.getpid()}-{next(self._numbers)}.rows")
        try:
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o600), "wb") as file:
                for part in node.rows:
                    file.write(np.ascontiguousarray(part))
        except OSError:     # the disk is full, or the folder is gone
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        node.file = path, [part.shape for part in node.rows], _digest(node.rows)
        node.rows = None
        del self._in_memory[node]
        self._in_files[node] = None
        self.n_bytes -= node.n_bytes
        self.n_file_bytes += node.n_bytes
        return True

    def _read(self, node):
        """Bring a node's rows back to memory -> whether they are there.

        A node whose file is gone or damaged is forgotten.
        """
        if node.rows is not None:
            return True
        path, shapes, digest = node.file
        try:
            data, at, rows = np.fromfile(path, np.uint8), 0, []
            for shape in shapes:
                rows.append(data[at:at + shape[0] * shape[1]].reshape(shape))
                at += shape[0] * shape[1]
        except (OSError, ValueError):
            rows = []
        if _digest(rows) != digest:
            self._forget(node)
            return False
        with contextlib.suppress(OSError):
            path.unlink()
        del self._in_files[node]
        node.rows, node.file = rows, None
        self._in_memory[node] = None
        self.n_file_bytes -= node.n_bytes
        self.n_bytes += node.n_bytes
        return True

    def _forget(self, node):
        """Remove a node, and all below it."""
        if node.parent is not None:
            node.parent.children.pop(int(node.tokens[0]), None)
        below = [node]
        while below:
            node = below.pop()
            below += node.children.values()
            if node in self._in_memory:
                del self._in_memory[node]
                self.n_bytes -= node.n_bytes
            elif node in self._in_files:
                del self._in_files[node]
                self.n_file_bytes -= node.n_bytes
                with contextlib.suppress(OSError):
                    node.file[0].unlink()


def _digest(rows):
    digest = hashlib.sha256()
    for part in rows:
        digest.update(np.ascontiguousarray(part))
    return digest.digest()
