"""Saved sessions of a Pipeline: the stages write and read their parts, where they are (saved/parts.py)."""
import contextlib
import copy

import numpy as np

from pydsa.executor.graph import CacheRef
from pydsa.saved.parts import Keeper, opened, write_parts
from pydsa.stages.wire import FrameError


class StageKeeper:
    """The Keeper of a stage, as the driver calls it.

    caches: caches.Caches of the session. stage: its index. ask: Pipeline.ask, or what else asks stages.
    """
    name = ""       # errors of a stage begin with its name already

    def __init__(self, caches, stage, layers, ask):
        self._caches, self._stage, self._ask, self.layers = caches, stage, ask, tuple(layers)
        self.refs = [list(ref) for ref, cache in caches.items() if cache.stage == stage]

    def asking(self, ask):
        """The same, which asks in another way."""
        other = copy.copy(self)
        other._ask = ask
        return other

    def _call(self, method, *args):
        return self._ask(self._stage, {"do": "part", "session": self._caches.number, "method": method, "args": args}, b"")

    def write(self, path, file, n_tokens):
        """Write its part -> the entry."""
        return self._call("write", path, file, n_tokens)[0]["result"]

    def remove(self, path, files):
        """Remove parts."""
        self._call("remove", path, files)

    def find(self, path, files):
        """For each name of a part, whether it is there."""
        return self._call("find", path, files)[0]["result"]

    def check(self, path, part):
        """Read a whole part."""
        self._call("check", path, part)

    def take(self, path, part, refs):
        """Overwrite caches there with their rows in a part."""
        self._call("take", path, part, refs)

    def read(self, path, part, ref, start, stop):
        """Rows of a cache in a part there."""
        return np.frombuffer(self._call("read", path, part, ref, start, stop)[1], np.uint8).reshape(stop - start, -1)

    def restore(self, ref, start, rows):
        """Overwrite rows of a cache there."""
        self._caches[CacheRef(*ref)].restore(rows, start)


def answered(stage, number, content):
    """What a stage answers a StageKeeper -> (dict, rows or bytes)."""
    method, args = content.get("method"), content.get("args")
    if method not in Keeper.METHODS or method == "restore" or not isinstance(args, list):
        raise FrameError(f"a stage is asked to {method!r:.40} a part of a session, which it cannot do")
    layers = stage.setup.layers
    result = getattr(Keeper(stage.caches(number), (layers.start, layers.stop)), method)(*args)
    return ({}, result) if method == "read" else ({"result": result}, b"")


def _keepers(pipeline, caches):
    pipeline.drain(caches.conversation)
    return [StageKeeper(caches, i, layers, pipeline.ask) for i, layers in enumerate(pipeline.launcher.stages)]


def cut(pipeline, caches, start, stop):
    """Copies of the rows start to stop of each cache, a list.

    All stages are asked at once.
    """
    pipeline.drain(caches.conversation)
    pieces = [(cache, *piece) for cache in caches.values() for piece in cache.pieces(start, stop)]
    answers = pipeline.ask_each([(cache.stage, cache.request("stored", first, last)) for cache, first, last in pieces])
    rows = {cache.ref: np.empty((stop - start, cache.row_bytes), np.uint8) for cache in caches.values()}
    for (cache, first, last), (_, payload) in zip(pieces, answers):
        rows[cache.ref][first - start:last - start] = np.frombuffer(payload, np.uint8).reshape(last - first, -1)
    return list(rows.values())


def save(pipeline, path, identity, tokens, caches):
    """Write a session: a head here, and a part on each stage's machine."""
    write_parts(path, identity, tokens, _keepers(pipeline, caches))


@contextlib.contextmanager
def saved(pipeline, path, identity, caches, n_vocab, n_ctx):
    """A context with the tokens of a saved session, and a function read().

    As saved.parts.opened(). A stage that is started again later reads the rows from the parts once more.
    """
    with opened(path, identity, caches, _keepers(pipeline, caches), n_vocab, n_ctx) as (tokens, read):
        def read_and_note():
            places = read()
            if places is not None:
                caches.saved(len(tokens), lambda ref, start, stop, ask: _read(places, ref, start, stop, ask))
        yield tokens, read_and_note


def _read(places, ref, start, stop, ask):
    """Rows of a cache from the part that has them."""
    reader, where, part = places[tuple(ref)]
    reader = reader.asking(ask) if isinstance(reader, StageKeeper) else reader
    return reader.read(where, part, list(ref), start, stop)
