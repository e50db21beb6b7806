"""What another implementation computed: its file, and how it compares.

A file has a choice of keys, or logits, of some tokens (docs/faithful.md). A Recording's file is read as well.
"""
import re
import zipfile
import zlib

import numpy as np

from pydsa.errors import PydsaError
from pydsa.executor.hooks import Hook
from pydsa.faithful.choices import masks
from pydsa.machine.limits import allocating
from pydsa.recordings.recording import Recording

LAST = 2**62        # orders -1 behind all positions
SELECTION = re.compile(r"selection\.(0|[1-9]\d{0,5})")
OTHERS = "positions", "tokens", "logits"
FORMS = ("an .npz file with selection.LAYER [n, k] or logits [n, n_vocab], and positions [n] unless these begin at 0; an .npy file of "
         "logits; or a recording")


class Against:
    """Choices and logits of another implementation, for some tokens.

    path: the file. positions: int64 [n], ascending. tokens: int32 [n], or None. layers: the numbers of layers that have a choice. logits:
    [n, n_vocab], or None. select(layer) -> the choice [n, k].
    """

    def __init__(self, path, positions, tokens, layers, select, logits=None):
        self.path, self.positions, self.tokens, self.layers, self.logits = path, positions, tokens, list(layers), logits
        self._select, self._kept = select, {}

    def rows(self, positions):
        """Where tokens at some positions are: rows [n], -1 for those that are not."""
        if not self.positions.size:
            return np.full(len(positions), -1)
        at = np.minimum(np.searchsorted(self.positions, positions), self.positions.size - 1)
        return np.where(self.positions[at] == positions, at, -1)

    def choice(self, layer, positions):
        """The choices of a layer at those of some positions that the file has.

        Returns a mask [n] of these positions, and int64 [m, k]; None if the file has no choice of the layer. Rows are in order, whatever
        they were in the file.
        """
        if layer not in self.layers:
            return None
        if layer not in self._kept:
            stored = np.asarray(self._select(layer)).astype(np.int64)
            stored = np.sort(np.where(stored < 0, LAST, stored), axis=1)
            self._kept[layer] = np.where(stored == LAST, -1, stored)
        rows = self.rows(positions)
        return rows >= 0, self._kept[layer][rows[rows >= 0]]

    def check(self, ids, config):
        """Raise PydsaError if the file cannot belong to these tokens and model."""
        if self.tokens is not None:
            at = self.positions < len(ids)
            wrong = np.flatnonzero(np.asarray(ids)[self.positions[at]] != self.tokens[at])
            if wrong.size:
                i = wrong[0]
                raise PydsaError(f"{self.path}: the token at position {self.positions[at][i]} is {self.tokens[at][i]}, and "
                                 f"{ids[self.positions[at][i]]} in the text; give the text that the file was made from.")
        if (self.positions >= len(ids)).all():
            raise PydsaError(f"{self.path}: its positions begin at {self.positions.min()}, and the text has {len(ids)} tokens; give the "
                             "text that the file was made from.")
        if self.layers and max(self.layers) >= config.n_layer:
            raise PydsaError(f"{self.path}: there is a choice for layer {max(self.layers)}, expected layers 0 to {config.n_layer - 1}.")
        if self.logits is not None and self.logits.shape[1] != config.n_vocab:
            raise PydsaError(f"{self.path}: there are logits of {self.logits.shape[1]} tokens, expected {config.n_vocab}, the vocabulary.")


def read(path):
    """Read a file of another implementation -> an Against.

    Raises PydsaError if it is none of the forms that docs/faithful.md describes.
    """
    try:
        with allocating("the file of another implementation"):
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is neither .npz nor .npy"
        raise PydsaError(f"{path}: the file cannot be read ({reason}); expected {FORMS}.") from error
    if isinstance(loaded, np.ndarray):
        return _of_arrays(path, {"logits": loaded}, ())
    with loaded:
        if "recording" in loaded.files:
            return _of_recording(path, Recording.open(path))
        try:
            with allocating("the file of another implementation"):
                arrays = {name: loaded[name] for name in loaded.files if name in OTHERS or SELECTION.fullmatch(name)}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise PydsaError(f"{path}: the file is damaged; expected {FORMS}.") from error
        return _of_arrays(path, arrays, loaded.files)


def _of_recording(path, recording):
    """The Against of a Recording."""
    if recording.selection is None or recording.n == 0:
        raise PydsaError(f"{path}: this recording has no choice of keys; record with selection=True.")
    return Against(path, recording.positions, recording.tokens, recording.layers, recording.selection.__getitem__)


def _of_arrays(path, arrays, names):
    """The Against of arrays by name, which are checked; names: all in the file."""
    def fail(text):
        raise PydsaError(f"{path}: {text}; expected {FORMS}.")

    chosen = {int(match[1]): arrays[name] for name in arrays if (match := SELECTION.fullmatch(name))}
    logits, tokens = arrays.get("logits"), arrays.get("tokens")
    if not chosen and logits is None:
        fail(f"there is neither a selection nor logits, only {', '.join(sorted(names)) or 'nothing'}")
    n = next(iter([*chosen.values(), *([] if logits is None else [logits])])).shape[:1]
    n = n[0] if n else 0
    positions = arrays.get("positions", np.arange(n))
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or len(positions) != n or n == 0:
        fail(f"positions is {positions.dtype} {list(positions.shape)}, with {n} tokens")
    positions = positions.astype(np.int64)
    if positions[0] < 0 or (np.diff(positions) <= 0).any():
        fail("positions do not ascend from 0 on")
    for layer, array in chosen.items():
        if array.ndim != 2 or array.dtype.kind not in "iu" or len(array) != n:
            fail(f"selection.{layer} is {array.dtype} {list(array.shape)}, with {n} tokens")
    if tokens is not None and (tokens.shape != (n,) or tokens.dtype.kind not in "iu"):
        fail(f"tokens is {tokens.dtype} {list(tokens.shape)}, with {n} tokens")
    if logits is not None and (logits.ndim != 2 or logits.dtype.kind != "f" or len(logits) != n):
        fail(f"logits is {logits.dtype} {list(logits.shape)}, with {n} tokens")
    return Against(path, positions, tokens, sorted(chosen), chosen.__getitem__, logits)


class Versus(Hook):
    """Compare the choices of a session with those of a file, token by token.

    shares: {layer: (keys that both have, keys of the session)}. differs: {layer: the first position with other keys}.
    """

    def __init__(self, against):
        self._against, self.shares, self.differs = against, {}, {}

    def wants(self, node):
        return node.op in ("sparse_attention", "mha_sparse_attention")

    def after(self, call):
        layer, ours = int(call.node.name.rpartition("-")[2]), call.read(3)
        many = call.positions >= ours.shape[1]      # the others read all keys
        ours, positions = ours[many], call.positions[many]
        found = self._against.choice(layer, positions)
        if found is None or not found[0].any():
            return
        there, theirs = found
        ours, positions = ours[there], positions[there]
        n_keys = int(positions[-1]) + 1
        mine, other = masks(ours, n_keys), masks(theirs, n_keys)
        both, keys = self.shares.get(layer, (0, 0))
        self.shares[layer] = both + int((mine & other).sum()), keys + int(mine.sum())
        differing = (mine != other).any(axis=1)
        if differing.any() and layer not in self.differs:
            self.differs[layer] = int(positions[differing.argmax()])


class LogitsAgainst:
    """Compare logits with those of a file, step by step.

    agree: {0, 1, -1: how often the likeliest token is that of the file's row so many later}. errors: the normalised squared error of each
    token, where rows have a mean of 0, {position: error}.
    """

    def __init__(self, against):
        self._against, self.errors, self.agree, self.n = against, {}, {0: 0, 1: 0, -1: 0}, 0
        self._best = None if against.logits is None else np.full(len(against.positions), -1)

    def add(self, positions, logits):
        """Compare the logits [n, n_vocab] of tokens at some positions."""
        rows = self._against.rows(positions)
        for row, ours, position in zip(rows[rows >= 0], logits[rows >= 0], positions[rows >= 0]):
            theirs = np.asarray(self._against.logits[row], np.float64)
            mine = ours.astype(np.float64) - ours.mean(dtype=np.float64)
            with np.errstate(invalid="ignore"):     # theirs may not be finite
                centred = theirs - theirs.mean()
                self.errors[int(position)] = float(((centred - mine) ** 2).sum() / (mine ** 2).sum())
            for by in self.agree:
                other = row + by
                if 0 <= other < len(self._best):
                    if self._best[other] < 0:
                        self._best[other] = int(np.argmax(self._against.logits[other]))
                    self.agree[by] += int(self._best[other] == ours.argmax())
            self.n += 1

    def figures(self, top_k):
        """What was found, as a dict."""
        def median(errors):
            return float(np.median(errors)) if errors else None
        return {"tokens": self.n, "same_top": self.agree[0] / self.n, "same_top_shifted": {by: self.agree[by] / self.n for by in (1, -1)},
                "error": median(list(self.errors.values())),
                "error_up_to_top_k": median([error for position, error in self.errors.items() if position < top_k]),
                "error_beyond": median([error for position, error in self.errors.items() if position >= top_k])}
