"""A Recording: the keys that each token attended to, and the experts that it ran.

    with session.record() as recording:
        session.prefill(ids)
    recording.selection[3]      # int32 [n, top_k]

It consists of chunks, dicts of arrays for a few tokens, in which choices are packed (packed.py). A file has the same (file.py).
"""
import collections
import os
from collections.abc import Mapping

import numpy as np

from pydsa.cards import shown
from pydsa.errors import RecordingFileError
from pydsa.executor.plan import check_memory
from pydsa.machine.limits import allocating
from pydsa.recordings import packed
from pydsa.recordings.file import CHUNK, Reader, Writer
from pydsa.words import card_of_a_recording


@shown(card_of_a_recording)
class Recording:
    """Which keys the tokens of a session attended to, and which experts ran.

    Session.record() makes it, Recording.open() reads a file. The n tokens are those of the context that were recorded, in its order.

    n: how many they are; len(recording) too. n_left: how many older tokens left, where memory was limited. n_bytes: its size.
    facts: what it tells of the model (file.Facts).
    layers: the numbers of the model's layers. indexed_layers: {layer: the layer whose choice it uses}, None without an indexer.
    top_k: the most keys of a choice, None without an indexer.
    selection: {layer: int32 [n, top_k]}, the keys that a token attended to, ascending, -1 at the end; scores: {layer: float32 [n, top_k]},
    the indexer's scores of them; mass: {layer: float32 [n]}, the share of dense attention that they hold. experts: {layer: int32 [n,
    n_expert_used]} and expert_weights: {layer: float32 [n, n_expert_used]}, of layers with experts. What was not recorded is None.
    Arrays are made each time that one is asked for: keep those that are used again.
    """

    def __init__(self, facts, chunks=()):
        self.facts, self._chunks, self._reader = facts, collections.deque(chunks), None
        self._settle = lambda: None     # puts what a session has just recorded into a chunk

    @classmethod
    def open(cls, path):
        """The Recording in a file, which stays open while it is used.

        Raises RecordingFileError if the file is not a valid recording, as do the arrays whose part of it is damaged.
        """
        return cls._of(Reader(path))

    @classmethod
    def _of(cls, reader):
        recording = cls(reader.facts)
        recording._adopt(reader)
        return recording

    def _adopt(self, reader):
        """Become the recording in a file."""
        self._chunks, self._reader, self._settle = reader.chunks, reader, lambda: None

    def save(self, path):
        """Write the recording to a file, for open().

        The file replaces an older one only when it is complete. Raises RecordingFileError if it cannot be written.
        """
        with Writer(path, self.facts) as writer:
            for chunk in self.chunks:
                writer.add(chunk)
            writer.close(self._of_rows("kept"))

    def __len__(self):
        return self.n

    @property
    def n(self):
        """The number of tokens."""
        return sum(int(np.count_nonzero(chunk["kept"])) for chunk in self.chunks)

    @property
    def chunks(self):
        """The chunks, a list of {name: array}."""
        self._settle()
        return list(self._chunks)

    @property
    def n_bytes(self):
        """Bytes of the recording, in memory or in its file."""
        if self._reader is not None:
            return os.path.getsize(self._reader.path)
        return sum(array.nbytes for chunk in self.chunks for array in chunk.values())

    @property
    def n_left(self):
        """How many older tokens left, as the memory was limited."""
        return self.facts.n_left

    @property
    def top_k(self):
        """The most keys of a choice; None without an indexer."""
        return self.facts.top_k

    @property
    def layers(self):
        """The numbers of the model's layers, a list."""
        return list(range(self.facts.n_layer))

    @property
    def indexed_layers(self):
        """{layer: the layer whose choice it uses}; None without an indexer."""
        return None if self.facts.indexed_layers is None else dict(enumerate(self.facts.indexed_layers))

    @property
    def positions(self):
        """The position of each token in the context, int64 [n], ascending."""
        return self._of_tokens("positions", np.int64)

    @property
    def tokens(self):
        """The id of each token, int32 [n]."""
        return self._of_tokens("tokens", np.int32)

    @property
    def all_keys(self):
        """Whether a token attended to all keys up to its own, bool [n].

        No choice was made then; its row of `selection` has all of them, and its row of `scores` NaN.
        """
        return self._of_tokens("all_keys", np.bool_)

    def _of_tokens(self, name, dtype):
        return np.concatenate([np.empty(0, dtype), *(chunk[name][chunk["kept"]] for chunk in self.chunks)])

    def _of_rows(self, name):
        return np.concatenate([np.empty(0, np.bool_), *(chunk[name] for chunk in self.chunks)])

    def _field(self, name, layers, read):
        return ByLayer(layers, read) if name in self.facts.fields else None

    @property
    def selection(self):
        """{layer: int32 [n, top_k]}, ascending, -1 at the end, or None."""
        return self._field("selection", () if self.indexed_layers is None else self.layers, self._selection)

    @property
    def scores(self):
        """{layer: float32 [n, top_k]}, the scores of `selection`, or None.

        There is NaN where there is no key, or no choice was made.
        """
        return self._field("scores", () if self.indexed_layers is None else self.layers, self._scores)

    @property
    def mass(self):
        """{layer: float32 [n]}, the share of dense attention, or None.

        That is how much of the attention to all keys the chosen ones hold, the mean over heads.
        """
        return self._field("mass", self.layers, lambda layer: self._array("mass", layer, (), np.float32))

    @property
    def experts(self):
        """{layer: int32 [n, n_expert_used]}, the greatest score first, or None."""
        return self._field("routing", self.facts.expert_layers, lambda layer: self._array(
            "experts", self.facts.expert_layers.index(layer), (self.facts.n_expert_used,), np.int32))

    @property
    def expert_weights(self):
        """{layer: float32 [n, n_expert_used]}, in the order of experts, or None."""
        return self._field("routing", self.facts.expert_layers, lambda layer: self._array(
            "expert_weights", self.facts.expert_layers.index(layer), (self.facts.n_expert_used,), np.float32))

    def _array(self, name, i, tail, dtype):
        return np.concatenate([np.empty((0, *tail), dtype), *(chunk[name][i][chunk["kept"]].astype(dtype) for chunk in self.chunks)])

    def _choices(self, chunk, layer):
        """A chunk's choices in a layer, and where the bits of it are.

        They are int32 [n, top_k], where rows of all keys are empty, and a slice of selection_bits.
        """
        i, maps, bits = self.facts.choosing_layers.index(self.facts.indexed_layers[layer]), chunk["selection_map"], chunk["selection_bits"]
        ends = np.concatenate([[0], np.cumsum(packed.n_bytes(maps))])
        try:
            rows = packed.unpack(maps[i], bits[ends[i]:ends[i + 1]], self.top_k)
            if (rows.max(axis=1, initial=-1) > chunk["positions"]).any():
                raise ValueError("a token has a key that comes after it")
        except ValueError as error:
            raise RecordingFileError(f"{self._reader.path}: the recording is damaged: {error}.") from error
        return rows, slice(ends[i], ends[i + 1])

    def _rows(self, dtype, fill, what):
        """An array [n, top_k], filled by fill(chunk) -> rows of all its tokens."""
        check_memory(4 * self.top_k * (self.n + 4 * CHUNK), what)       # and what is made for a chunk
        with allocating(what):
            found, at = np.empty((self.n, self.top_k), dtype), 0
        for chunk in self.chunks:
            rows = fill(chunk)[chunk["kept"]]
            found[at:at + len(rows)] = rows
            at += len(rows)
        return found

    def _selection(self, layer):
        keys = np.arange(self.top_k, dtype=np.int32)

        def fill(chunk):
            every = chunk["all_keys"][:, None]
            return np.where(every, np.where(keys <= chunk["positions"][:, None], keys, -1), self._choices(chunk, layer)[0])
        return self._rows(np.int32, fill, "The choices of a layer")

    def _scores(self, layer):
        def fill(chunk):
            chosen, place = self._choices(chunk, layer)
            sizes = [0, *np.cumsum(np.unpackbits(chunk["selection_bits"].reshape(-1, 1), axis=1).sum(1, np.int64))]
            rows = np.full(chosen.shape, np.nan, np.float32)
            rows[chosen >= 0] = chunk["scores"][sizes[place.start]:sizes[place.stop]]
            return rows
        return self._rows(np.float32, fill, "The scores of a layer")


class ByLayer(Mapping):
    """{layer: array}, where an array is made when it is asked for."""

    def __init__(self, layers, read):
        self._layers, self._read = tuple(layers), read

    def __getitem__(self, layer):
        if layer not in self._layers:
            raise KeyError(layer)
        return self._read(int(layer))

    def __iter__(self):
        return iter(self._layers)

    def __len__(self):
        return len(self._layers)

    def __repr__(self):
        return f"<arrays of layers {', '.join(map(str, self._layers))}>"
