"""Files of log-probabilities, for comparisons with models and settings.

There are two forms. llama.cpp's (`--kl-divergence-base` of llama-perplexity) has every token of the vocabulary in 16 bits, in steps of a
row's own size. pydsa's own has the likeliest tokens alone, and the token that came, in float32 (docs/perplexity.md describes it).
"""
import contextlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

from pydsa.errors import LogitsFileError
from pydsa.quality.distributions import LikeliestRows, SteppedRows
from pydsa.targets import check_replaceable
from pydsa.words import size

LLAMA_CPP, OWN = b"_logits_", b"pydsa log-probabilities 1\n"
MAX_HEADER = 1 << 16        # bytes
MAX_CONTEXT = 1 << 28       # tokens


def scored(n_ctx):
    """The predictions of a chunk that are scored, those of its second half."""
    return n_ctx - 1 - n_ctx // 2


def open_logits(path):
    """Open a file of log-probabilities, in one of the two forms.

    Returns a LlamaCppReader or an OwnReader, both contexts. Raises LogitsFileError if it cannot be read, is no such file, or is damaged.
    """
    with _system_errors(path):
        file = open(path, "rb")
    try:
        with _system_errors(path):
            start = file.read(len(OWN))
            file.seek(0)
        for magic, reader in ((LLAMA_CPP, LlamaCppReader), (OWN, OwnReader)):
            if start.startswith(magic):
                return reader(path, file)
        raise LogitsFileError(f"{path}: this is not a file of log-probabilities, expected one that --kl-divergence-base wrote, here or in "
                              "llama-perplexity.")
    except BaseException:
        file.close()
        raise


@contextlib.contextmanager
def _system_errors(path, what="read"):
    """A context in which an error of the system is a LogitsFileError."""
    try:
        yield
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise LogitsFileError(f"{path}: the log-probabilities cannot be {what} ({getattr(error, 'strerror', None) or error}).") from error


class _Reader:
    """What the readers of both forms share.

    n_ctx: tokens of a chunk. n_vocab: those of the vocabulary. n_chunks: complete chunks. tokens: int32 [n_chunks, n_ctx].
    """

    def __init__(self, path, file):
        self.path, self._file = path, file
        with _system_errors(path):
            self._size = os.fstat(file.fileno()).st_size
        self._read_header()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def _fail(self, text):
        raise LogitsFileError(f"{self.path}: {text}.")

    def _array(self, offset, dtype, *shape):
        """An array of the file, at a byte offset."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        with _system_errors(self.path):
            self._file.seek(offset)
            data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            self._fail("the file is incomplete, or became shorter while it was read")
        return np.frombuffer(data, dtype).reshape(shape)

    def _check(self, good):
        """Fail where not all of what was read can be."""
        if not np.all(good):
            self._fail("the file is damaged: it has log-probabilities or tokens that cannot be")


class LlamaCppReader(_Reader):
    """Reads llama.cpp's form: a header, the tokens of all chunks, and a row for each token that is scored.

    A row has float32 scale, float32 log-probability of step 0, and a uint16 for each token of the vocabulary, of which there is one more
    where their number is odd.
    """
    form = "llama.cpp"

    def _read_header(self):
        if self._size < 20:
            self._fail("the file is incomplete")
        self.n_ctx, self.n_vocab, n_chunks = (int(n) for n in self._array(8, "<i4", 3))
        if self.n_ctx < 3 or self.n_vocab < 1 or n_chunks < 1 or self.n_ctx > MAX_CONTEXT:
            self._fail("the file is damaged")
        self._row = 8 + 4 * ((self.n_vocab + 1) // 2)
        self._rows_at = 20 + 4 * self.n_ctx * n_chunks
        per_chunk = scored(self.n_ctx) * self._row
        self.n_chunks = min(n_chunks, max(0, self._size - self._rows_at) // per_chunk)
        if not self.n_chunks:
            self._fail(f"the file is incomplete: it has no whole chunk of the {n_chunks} that it began")
        if self._size > self._rows_at + per_chunk * n_chunks:
            self._fail("the file is damaged: it is longer than its header says")
        self.incomplete_of = n_chunks if self.n_chunks < n_chunks else None
        self.tokens = self._array(20, "<i4", n_chunks, self.n_ctx)[:self.n_chunks].astype(np.int32)
        self._check((self.tokens >= 0) & (self.tokens < self.n_vocab))

    def rows(self, chunk, start, stop, threads):
        """The SteppedRows of predictions start to stop of a chunk."""
        first = chunk * scored(self.n_ctx) + start
        data = self._array(self._rows_at + first * self._row, np.uint8, stop - start, self._row)
        numbers = np.ascontiguousarray(data[:, :8]).view("<f4").astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            greatest = 65535 * numbers[:, 0].astype(np.float64) + numbers[:, 1]
        self._check(np.isfinite(numbers).all(1) & (numbers[:, 0] >= 0) & (greatest < 1e-2))
        return SteppedRows(numbers[:, 0], numbers[:, 1], data[:, 8:].view("<u2")[:, :self.n_vocab], threads)


class OwnReader(_Reader):
    """Reads pydsa's own form: a header in JSON, and a record for each chunk.

    A record has the chunk's tokens, int32 [n_ctx], and a row for each token that is scored: its log-probability, float32, and of the n_top
    likeliest tokens the ids, uint32 [n_top], and the log-probabilities, float32 [n_top].
    """
    form, incomplete_of = "pydsa", None

    def _read_header(self):
        length = int(self._array(len(OWN), "<u8")) if self._size >= len(OWN) + 8 else MAX_HEADER + 1
        if length > min(MAX_HEADER, self._size):
            self._fail("the file is incomplete or damaged")
        try:
            fields = json.loads(self._array(len(OWN) + 8, np.uint8, length).tobytes())
            self.n_ctx, self.n_vocab, self.n_top = (fields[name] for name in ("n_ctx", "n_vocab", "n_top"))
        except (ValueError, KeyError, TypeError, RecursionError):
            self._fail("the file is damaged")
        if any(type(n) is not int for n in (self.n_ctx, self.n_vocab, self.n_top)) or not (
                3 <= self.n_ctx <= MAX_CONTEXT and 1 <= self.n_top <= self.n_vocab < 2**31):
            self._fail("the file is damaged")
        self._start, self._row = len(OWN) + 8 + length, 4 + 8 * self.n_top
        self._record = 4 * self.n_ctx + scored(self.n_ctx) * self._row
        self.n_chunks, left = divmod(self._size - self._start, self._record)
        if left or not self.n_chunks:
            self._fail("the file is incomplete or damaged")
        self.tokens = np.stack([self._array(self._start + i * self._record, "<i4", self.n_ctx) for i in range(self.n_chunks)])
        self.tokens = self.tokens.astype(np.int32)
        self._check((self.tokens >= 0) & (self.tokens < self.n_vocab))

    def rows(self, chunk, start, stop, threads):
        """The LikeliestRows of predictions start to stop of a chunk."""
        at = self._start + chunk * self._record + 4 * self.n_ctx + start * self._row
        data, k = self._array(at, "<u4", stop - start, self._row // 4), self.n_top
        floats, ids = data.view("<f4"), data[:, 1:1 + k]
        came, likeliest = floats[:, 0], floats[:, 1 + k:]
        self._check(np.isfinite(came) & (came < 1e-2))
        self._check(np.isfinite(likeliest) & (likeliest < 1e-2) & (ids < self.n_vocab))
        return LikeliestRows(came.astype(np.float64), ids.astype(np.int64), likeliest.astype(np.float32))


class _Writer:
    """What the writers of both forms share: a file that appears when it is complete."""

    def __init__(self, path, chunks, n_vocab):
        """Begin a file for chunks of tokens, int32 [n_chunks, n_ctx]."""
        self.path, self._partial = Path(path), Path(f"{path}.{os.getpid()}.part")       # another run may write to the same path
        self._chunks, self._n_vocab, self._n_complete, self.kept = chunks, n_vocab, 0, 0
        with _system_errors(path, "written"):
            check_replaceable(self.path)
            wanted, free = len(chunks) * self._chunk_bytes(), shutil.disk_usage(self._partial.parent).free
        if wanted > free:
            raise LogitsFileError(f"{path}: the log-probabilities take {size(wanted)}, but {size(free)} of the disk are free; take fewer "
                                  "--chunks, or --top-logits.")
        with _system_errors(path, "written"):
            self._file = open(self._partial, "wb")
            self._file.write(self._header())

    def add(self, rows, ids, start):
        """Write predictions of a chunk, from number `start` on.

        rows: distributions.Rows. ids: the tokens that came.
        """
        with _system_errors(self.path, "written"):
            self._add(rows, ids, start)

    def end_chunk(self):
        """All predictions of a chunk have been added."""
        with _system_errors(self.path, "written"):
            self._end_chunk()
        self._n_complete += 1

    def _end_chunk(self):
        pass

    def close(self):
        """End the file; without a chunk that can be kept it is removed.

        `kept` becomes the number of chunks in it.
        """
        try:
            with _system_errors(self.path, "written"), self._file:
                self.kept = self._keep()
            if self.kept:
                with _system_errors(self.path, "written"):
                    os.replace(self._partial, self.path)
        finally:
            with contextlib.suppress(OSError):      # it is still there if it is not to be kept, or something failed
                self._partial.unlink()


class LlamaCppWriter(_Writer):
    """Writes llama.cpp's form (LlamaCppReader), as llama-perplexity does.

    Without all of its chunks the file is of no use there, and is removed.
    """

    def _chunk_bytes(self):
        return scored(self._chunks.shape[1]) * (8 + 4 * ((self._n_vocab + 1) // 2))

    def _header(self):
        n_chunks, n_ctx = self._chunks.shape
        return b"".join([LLAMA_CPP, np.array([n_ctx, self._n_vocab, n_chunks], "<i4").tobytes(), self._chunks.astype("<i4").tobytes()])

    def _add(self, rows, ids, start):
        data = np.zeros((len(rows.logits), 8 + 4 * ((self._n_vocab + 1) // 2)), np.uint8)

        def fill(part):
            tops, log_sums, logits = rows.tops[part], rows.log_sums[part].astype(np.float32), rows.logits[part]
            least = np.maximum(rows.least[part], tops - np.float32(16))
            scale = (tops - least) / np.float32(65535)
            inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
            steps = np.rint(inverse * (np.maximum(logits, least) - least)).astype("<u2")
            data[part, :8] = np.concatenate([scale, least - tops - log_sums], axis=1).astype("<f4").view(np.uint8)
            data[part, 8:8 + 2 * self._n_vocab] = steps.view(np.uint8)
        rows.threads.each_block(fill, len(rows.logits), self._n_vocab)
        self._file.write(data)

    def _keep(self):
        return self._n_complete if self._n_complete == len(self._chunks) else 0


class OwnWriter(_Writer):
    """Writes pydsa's own form (OwnReader), with the n_top likeliest tokens.

    The chunks that are complete are kept when a run ends early. settings: what the header says of the model, beside what is read again.
    """

    def __init__(self, path, chunks, n_vocab, n_top, settings):
        self._fields = dict(n_ctx=chunks.shape[1], n_vocab=n_vocab, n_top=min(n_top, n_vocab), **settings)
        super().__init__(path, chunks, n_vocab)
        self._end = None        # where the last complete chunk ends

    def _chunk_bytes(self):
        return scored(self._chunks.shape[1]) * (4 + 8 * self._fields["n_top"])

    def _header(self):
        header = json.dumps(self._fields).encode()
        return OWN + len(header).to_bytes(8, "little") + header

    def _add(self, rows, ids, start):
        if start == 0:
            self._file.write(self._chunks[self._n_complete].astype("<i4").tobytes())
        likeliest = rows.likeliest(self._fields["n_top"])
        parts = rows.of(ids).astype("<f4")[:, None], likeliest.astype("<u4"), rows.of_several(likeliest).astype("<f4")
        self._file.write(np.concatenate([part.view("<u4") for part in parts], axis=1).tobytes())

    def _end_chunk(self):
        self._end = self._file.tell()

    def _keep(self):
        if self._n_complete:
            self._file.truncate(self._end)
        return self._n_complete
