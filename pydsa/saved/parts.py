"""Saved sessions in several files: a head, and for each stage a part with its rows.

The head has the place that a session's file has otherwise, and lists the parts: their layers, caches, sizes and checksums. A part lies
beside the head's place on the machine of its stage, with a name that tells the layers and the save: talk.layers-0-20.0123456789abcdef.
A Keeper writes and reads the parts of one machine; whoever runs the stages calls those of all machines.
"""
import concurrent.futures
import contextlib
import os
import re
import secrets

import numpy as np

from pydsa.errors import PydsaError, SessionFileError
from pydsa.saved import file as session_file
from pydsa.saved.file import DAMAGED, Framed, chunks, reading, replaced, rows_of, write_framed

HEAD, PART = b"pydsa session head 1\n", b"pydsa session part 1\n"
IN_PART = ("file", "layers", "n_tokens", "caches")      # of an entry in the head, also in the part itself
PART_NAME = re.compile(r"[^/\0]+\.layers-[0-9]{1,4}-[0-9]{1,4}\.[0-9a-f]{16}")


class Keeper:
    """Writes and reads the parts of a session on one machine.

    caches: {CacheRef: cache} of the session there. layers: the range of its layers, (first, stop). name: what errors call the stage; "":
    the only one. All arguments and results of the methods are of JSON's types, but for rows, uint8 [n, row_bytes]. `path` is the head's,
    absolute. ref: [kind, layer]. part: an entry of the head's "parts". Methods raise SessionFileError, which names the part without its
    folder.
    """

    METHODS = ("write", "remove", "find", "check", "read", "take", "restore")      # that a stage answers for others

    def __init__(self, caches, layers=None, name=""):
        self._caches, self.layers, self.name = {tuple(ref): cache for ref, cache in caches.items()}, layers, name

    @property
    def refs(self):
        """The refs of the caches here, a list."""
        return [list(ref) for ref in self._caches]

    def write(self, path, file, n_tokens):
        """Write a part, the rows of n_tokens tokens -> its entry.

        file: its name. A folder that is not there is made.
        """
        place = _place(path, file)
        entry = {"file": file, "layers": list(self.layers), "n_tokens": n_tokens,
                 "caches": [[*ref, cache.row_bytes] for ref, cache in self._caches.items()]}
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            n_bytes, digest = write_framed(place, PART, entry, rows_of(self._caches.values(), n_tokens))
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                os.unlink(place)
            raise SessionFileError(f"{file}: the part cannot be written ({getattr(error, 'strerror', error)})") from error
        return entry | {"bytes": n_bytes, "sha256": digest}

    def remove(self, path, files):
        """Remove parts that no head needs any more; what is no part stays."""
        for file in filter(is_part_name, files):
            with contextlib.suppress(OSError):
                with open(_place(path, file), "rb") as opened:
                    is_part = opened.read(len(PART)) == PART
                if is_part:
                    os.unlink(_place(path, file))

    def find(self, path, files):
        """For each name of a part, whether it is here."""
        return [os.path.isfile(_place(path, file)) for file in files]

    def check(self, path, part):
        """Read a whole part; it must be the one that the head lists."""
        with self._opened(path, part) as framed:
            if framed.check(_n_bytes(part)) != part["sha256"]:
                framed.fail("this is not the part that was saved with the session")

    def read(self, path, part, ref, start, stop):
        """Rows start to stop of a cache in a part, uint8 [n, row_bytes]."""
        with self._opened(path, part) as framed:
            row_bytes = _seek(framed, part, ref, start)
            return np.concatenate([rows for _, rows in framed.rows(stop - start, row_bytes)])

    def take(self, path, part, refs):
        """Overwrite caches here with their rows in a part."""
        with self._opened(path, part) as framed:
            for ref in refs:
                for start, rows in framed.rows(part["n_tokens"], _seek(framed, part, ref, 0)):
                    self.restore(ref, start, rows)

    def restore(self, ref, start, rows):
        """Overwrite the rows of a cache here from start on."""
        self._caches[tuple(ref)].restore(rows, start)

    @contextlib.contextmanager
    def _opened(self, path, part):
        """A context with the session_file.Framed of a part."""
        with reading(part["file"]), open(_place(path, part["file"]), "rb") as file:
            framed = Framed(part["file"], file, PART, "a part of a saved session")
            if any(framed.fields.get(key) != part[key] for key in IN_PART) or framed.size != part["bytes"]:
                framed.fail("this is not the part that was saved with the session")
            yield framed


def is_part_name(name):
    """Whether a name is one that parts have: of a file, in no other folder."""
    return PART_NAME.fullmatch(name) is not None and os.path.basename(name) == name


def _place(path, file):
    """Where a part is: in the folder of the head's path."""
    return os.path.join(os.path.dirname(path), file)


def _n_bytes(part, until=None):
    """Bytes of the rows of a part, or of those before its cache `until`."""
    total = 0
    for kind, layer, row_bytes in part["caches"]:
        if [kind, layer] == until:
            break
        total += part["n_tokens"] * row_bytes
    return total


def _seek(framed, part, ref, start):
    """Go to a row of a cache -> bytes of a row."""
    row_bytes = next(n for *other, n in part["caches"] if other == list(ref))
    framed.file.seek(framed.start + _n_bytes(part, list(ref)) + start * row_bytes)
    return row_bytes


def write_whole(path, identity, tokens, caches):
    """Write one file, as session_file.write(), in place also of a head.

    The parts of the head that are on this machine are removed.
    """
    old = _names(path)
    session_file.write(path, identity, tokens, caches)
    Keeper({}).remove(os.path.abspath(path), old)


def write_parts(path, identity, tokens, keepers):
    """Write a head, and the parts of all stages.

    identity, tokens: as for session_file.write(). keepers: one for each stage. The save counts when the head has replaced the older file;
    parts of older saves are removed then. Raises SessionFileError if something cannot be written; the older save counts then.
    """
    where, save, base = os.path.abspath(path), secrets.token_hex(8), os.path.basename(path)
    files = [f"{base}.layers-{first}-{stop - 1}.{save}" for first, stop in (keeper.layers for keeper in keepers)]
    old, left = _names(path), _names(f"{path}.part")         # left: by a save that was killed
    try:
        with replaced(path) as partial:
            # What keeps the head from being written is met before gigabytes are, and if this process is killed, the next save knows them.
            write_framed(partial, HEAD, {"parts": [{"file": file} for file in files]}, ())
            parts = _all(path, [(keeper, "write", where, file, len(tokens)) for keeper, file in zip(keepers, files)])
            write_framed(partial, HEAD, identity | {"tokens": tokens, "parts": parts}, ())
    except BaseException:
        _remove(keepers, where, files)
        raise
    _remove(keepers, where, [file for file in old + left if file not in files])


def _remove(keepers, where, files):
    """Remove parts wherever they are; a stage that cannot keeps them."""
    for keeper in (*keepers, Keeper({})) if files else ():
        with contextlib.suppress(PydsaError, OSError):
            keeper.remove(where, files)


@contextlib.contextmanager
def opened(path, identity, caches, keepers, n_vocab, n_ctx):
    """A context with the tokens of a saved session, and a function read().

    path: a session's file, or a head. caches: {CacheRef: cache} of the whole session, and keepers of all stages, which have them; read()
    overwrites their rows, and tells of a head where each cache's are: {ref: (keeper, path of the head, entry of the part)}, else None.
    Everything is checked before. Raises the errors of session_file.checked().
    """
    magic = _magic(os.fspath(path))     # open() would take, and close, the number of an open file
    if magic.startswith(PART):
        raise SessionFileError(f"{path}: this is the part of a saved session that one stage wrote, expected the session's own file, whose "
                               "name is that before '.layers-'.")
    if not magic.startswith(HEAD):
        with session_file.checked(path, identity, caches, n_vocab, n_ctx) as found:
            yield found
        return
    tokens, parts = _read_head(path, identity, n_vocab, n_ctx)
    where = os.path.abspath(path)
    moves = _moves(path, where, parts, keepers)
    checks = list({(id(reader), part["file"]): (reader, "check", where, part) for reader, part, _, _ in moves}.values())
    _all(path, checks)

    def read():
        _all(path, [(reader, "take", where, part, refs) for reader, part, target, refs in moves if reader is target])
        for reader, part, target, refs in moves:
            for ref in refs if reader is not target else ():
                row_bytes = next(n for *other, n in part["caches"] if other == ref)
                for start, stop in chunks(len(tokens), row_bytes):
                    rows, = _all(path, [(reader, "read", where, part, ref, start, stop)])
                    _all(path, [(target, "restore", ref, start, rows)])
        return {tuple(ref): (reader, where, part) for reader, part, _, refs in moves for ref in refs}
    yield tokens, read


def _moves(path, where, parts, keepers):
    """Which rows go from where to where: [(reader, part, target, refs)].

    A keeper takes what its own machine has. Otherwise another one, or this machine, reads it.
    """
    readers, moves, files = [*keepers, Keeper({})], [], [part["file"] for part in parts]
    found = [dict(zip(files, here)) for here in _all(path, [(one, "find", where, files) for one in readers])]
    for part in parts:
        here = [reader for reader, there in zip(readers, found) if there[part["file"]]]
        for target in keepers:
            refs = [ref for *ref, _ in part["caches"] if ref in target.refs]
            if refs and not here:
                first, stop = part["layers"]
                raise SessionFileError(f"{path}: the part of the session with layers {first} to {stop - 1}, {part['file']}, is on none of "
                                       "the machines, expected it beside the session's file, or at its place on a stage's machine.")
            if refs:
                moves.append((target if target in here else here[0], part, target, refs))
    return moves


def _all(path, calls):
    """Call methods of keepers at once -> their results.

    calls: tuples (keeper, method, *args). The error of the first that failed is raised when all have ended.
    """
    def call(keeper, method, *args):
        try:
            return getattr(keeper, method)(*args)
        except SessionFileError as error:
            raise SessionFileError(f"{path}: {keeper.name + ': ' if keeper.name else ''}{str(error).removesuffix('.')}.") from error

    if len(calls) < 2:
        return [call(*one) for one in calls]
    groups = {}         # calls of one keeper stay one after the other
    for i, one in enumerate(calls):
        groups.setdefault(id(one[0]), []).append((i, one))
    results = [None] * len(calls)

    def run(group):
        for i, one in group:
            results[i] = call(*one)
    with concurrent.futures.ThreadPoolExecutor(len(groups)) as pool:
        futures = [pool.submit(run, group) for group in groups.values()]
    for future in futures:
        future.result()
    return results


def _magic(path):
    with reading(path), open(path, "rb") as file:
        return file.read(max(len(HEAD), len(PART)))


def _read_head(path, identity, n_vocab, n_ctx):
    """Check a head -> its tokens and the entries of its parts."""
    with reading(path), open(path, "rb") as file:
        framed = Framed(path, file, HEAD)
        framed.check(0)
        tokens, parts = framed.tokens(identity, n_vocab, n_ctx), framed.fields.get("parts")
    if not isinstance(parts, list) or not all(_is_entry(part, len(tokens)) for part in parts):
        framed.fail(DAMAGED)
    caches = [cache for part in parts for cache in part["caches"]]
    if sorted(map(str, caches)) != sorted(map(str, identity["caches"])):
        framed.fail("the parts have other layers than the session, expected each layer once")
    return tokens, parts


def _is_entry(part, n_tokens):
    """Whether a value from a head describes a part of n_tokens tokens."""
    kinds = {"file": str, "layers": list, "caches": list, "n_tokens": int, "bytes": int, "sha256": str}
    return (isinstance(part, dict) and all(type(part.get(key)) is kind for key, kind in kinds.items())
            and part["n_tokens"] == n_tokens and is_part_name(part["file"])
            and [type(n) for n in part["layers"]] == [int, int]
            and all(type(cache) is list and [type(field) for field in cache] == [str, int, int] for cache in part["caches"]))


def _names(path):
    """The names of the parts of the head at a path; none if there is no head."""
    with contextlib.suppress(SessionFileError, OSError, ValueError, KeyError, TypeError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return [str(part["file"]) for part in Framed(path, file, HEAD).fields["parts"]]
    return []


def saved_bytes(path):
    """Bytes of a saved session: of its file, or of a head and all its parts."""
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(len(HEAD)) == HEAD:
            file.seek(0)
            total += sum(part["bytes"] for part in Framed(path, file, HEAD).fields["parts"])
    return total
