"""Perplexity of a text, and what other settings do to it.

    result = pydsa.perplexity(model, text)
    dense, sparse = pydsa.perplexity([dense_model, sparse_model], text, n_ctx=4096)

The chunks, their second halves and the error are those of llama.cpp's llama-perplexity. Several models or settings run side by side: each
part of a chunk is compared with the first's before the next is run, so that no logits are kept.
"""
import contextlib
import os

import numpy as np

from pydsa.errors import LogitsFileError, PydsaError
from pydsa.executor.plan import check_memory
from pydsa.model import Model
from pydsa.options import counts
from pydsa.quality.distributions import Rows, Threads
from pydsa.quality.logits_file import LlamaCppWriter, OwnWriter, open_logits
from pydsa.quality.perplexities import Perplexity
from pydsa.signals import interrupts_held
from pydsa.stepping import check_ids

DEFAULT_N_CTX = 512
ROWS_BYTES = 256 << 20      # bytes of logits that one step gives at most


def perplexity(model, text, n_ctx=None, n_chunks=None, stride=None, base=None, progress=None, save=None, n_top=None):
    """The Perplexity of a text, or one for each of several models.

    model: a Model; a Session, which keeps its `hooks` and `select` and loses its tokens; or a list of them, of models with one vocabulary.
    With a list the others are compared with the first, or all with `base`, and the result is a list. text: a str, or token ids; None: the
    tokens of `base`.

    The text is cut into chunks of n_ctx tokens (512), of which each is run in an empty context. The first token is replaced by BOS where
    the model's prompts begin with BOS, and the predictions of the second half are scored. n_chunks: how many; None: all. stride: windows
    that begin every so many tokens instead, of which the last `stride` predictions are scored, without BOS. base: the path of a file of
    log-probabilities (logits_file.py), whose n_ctx holds. progress(done, results) is called after each chunk. save: the path of such a file
    to write, of the first model's: in llama.cpp's form, or with n_top the n_top likeliest tokens in pydsa's own.

    Raises PydsaError for a text that is too short, or options that are not valid, LogitsFileError for a base that does not fit or a file
    that cannot be written, and the errors of Session.logits().
    """
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    with contextlib.ExitStack() as stack:
        if base is not None:
            base = stack.enter_context(open_logits(base))
        measurement = Measurement(models, text, n_ctx, n_chunks, stride, base)
        for done in stack.enter_context(contextlib.closing(measurement.run(save, n_top))):
            if progress is not None:
                progress(done, measurement.results)
    return measurement.results if isinstance(model, (list, tuple)) else measurement.results[0]


class Measurement:
    """A run over the chunks of a text, under one or several settings.

    models, text, n_ctx, n_chunks, stride: as for perplexity(); base: an open reader, or None. chunks: int32 [n_chunks, n_ctx]. results: a
    list of Perplexity, which have the chunks that are complete. kept: the number of chunks in the file that run() wrote.
    """

    def __init__(self, models, text, n_ctx=None, n_chunks=None, stride=None, base=None):
        for model in models:
            if not hasattr(model, "setup"):
                raise PydsaError(f"The model is {model!r:.80}, expected a Model, a Session, or a list of them.")
        self._sessions = [model.session() if isinstance(model, Model) else model for model in models]
        self.kept = 0
        if not self._sessions or len(set(map(id, self._sessions))) < len(self._sessions):
            raise PydsaError("There must be one or several models to measure, and a session only once.")
        setup = self._sessions[0].setup
        self.n_vocab, self._base = setup.config.n_vocab, base
        if any(session.setup.config.n_vocab != self.n_vocab for session in self._sessions):
            raise PydsaError("The models have vocabularies of different sizes, expected models with one vocabulary.")
        n_ctx, n_chunks, stride = counts(2**31 - 1, n_ctx=n_ctx, n_chunks=n_chunks, stride=stride)
        self.n_ctx = self._length(n_ctx, stride)
        self.first = self.n_ctx // 2 if stride is None else self.n_ctx - 1 - stride     # the first token whose prediction is scored
        if text is None and base is None:
            raise PydsaError("There is no text, and no base whose tokens could be taken.")
        chunks = None if text is None else cut(self._ids(text), self.n_ctx, stride)
        self.chunks = (chunks if base is None else self._of_base(chunks))[:n_chunks]
        tokenizer = self._sessions[0].tokenizer
        self._bos = tokenizer.bos_id if tokenizer.add_bos and stride is None else None
        for session in self._sessions:
            if session.setup.n_ctx < self.n_ctx - 1:
                raise PydsaError(f"A chunk has {self.n_ctx} tokens, but the context of a model holds {session.setup.n_ctx}; load it with "
                                 f"n_ctx={self.n_ctx} (-c).")
        kept = len(self._sessions) > 1 or base is not None
        check_memory(self._rows_of_a_step * self.n_vocab * 4 * (3 + kept), f"The logits of {self._rows_of_a_step} tokens")
        self.results = [Perplexity(session, self.chunks, self.first, stride, self._base_of(i))
                        for i, session in enumerate(self._sessions)]

    def _length(self, n_ctx, stride):
        """The tokens of a chunk, checked."""
        if self._base is not None and stride is not None:
            raise PydsaError("A stride has no base: files of log-probabilities are of chunks.")
        if self._base is not None and n_ctx not in (None, self._base.n_ctx):
            raise LogitsFileError(f"{self._base.path}: it was made with chunks of {self._base.n_ctx} tokens, not {n_ctx}; leave out -c.")
        n_ctx = self._base.n_ctx if self._base is not None else n_ctx or DEFAULT_N_CTX
        if n_ctx < 3:
            raise PydsaError(f"A chunk has {n_ctx} tokens, expected at least 3 (-c).")
        if stride is not None and stride >= n_ctx:
            raise PydsaError(f"The stride is {stride} tokens, expected fewer than the {n_ctx} of a window (--ppl-stride, -c).")
        return n_ctx

    def _ids(self, text):
        """The tokens of the text, as a prompt of the first model."""
        tokenizer = self._sessions[0].tokenizer
        if not isinstance(text, str):
            return check_ids(text, self.n_vocab)
        return np.array(tokenizer.encode(text, tokenizer.add_bos), np.int32)

    def _of_base(self, chunks):
        """The chunks of the base, which must be those of the text, if any."""
        base = self._base
        if base.n_vocab != self.n_vocab:
            raise LogitsFileError(f"{base.path}: it is of a vocabulary of {base.n_vocab} tokens, the model's has {self.n_vocab}.")
        if chunks is not None:
            n = min(len(chunks), len(base.tokens))
            if not np.array_equal(chunks[:n], base.tokens[:n]):
                raise LogitsFileError(f"{base.path}: it is of another text, or of another tokenizer; leave out -f to take its tokens.")
            return chunks[:n]
        return base.tokens

    def _base_of(self, i):
        """What the i-th result is compared with, in words; None: nothing."""
        return str(self._base.path) if self._base is not None else "the first row" if i else None

    @property
    def note(self):
        """A sentence on choices of keys that no token makes, or None."""
        most = self.n_ctx - 1       # keys of the last token that is run
        idle = sorted({result.settings["top_k"] for result in self.results
                       if result.settings["select"] is None and (result.settings["top_k"] or 0) >= most})
        if not idle:
            return None
        return (f"In chunks of {self.n_ctx} tokens none has more keys than the top_k of {' or '.join(map(str, idle))}: it attends to all "
                "of them, as dense attention does; take longer chunks (-c), or a smaller top_k (--dsa-top-k).")

    @property
    def _rows_of_a_step(self):
        return max(1, min(ROWS_BYTES // (4 * self.n_vocab), self.n_ctx - 1 - self.first, self._n_ubatch))

    @property
    def _n_ubatch(self):
        return min(session.setup.n_ubatch for session in self._sessions)

    def run(self, save=None, n_top=None):
        """Run the chunks, and yield the number of those that are complete.

        save, n_top: as for perplexity(). The file is complete, as far as it can be, when the run ends, also where that is early.
        """
        with contextlib.ExitStack() as stack:
            writer = None if save is None else stack.enter_context(self._writing(save, n_top))
            threads = stack.enter_context(Threads())
            for i in range(len(self.chunks)):
                columns = self._run_chunk(i, threads, writer)
                with interrupts_held():     # all results have the same chunks
                    for result, parts in zip(self.results, columns):
                        result.add(*(np.concatenate(arrays) for arrays in zip(*parts)))
                    if writer is not None:
                        writer.end_chunk()
                yield i + 1

    @contextlib.contextmanager
    def _writing(self, path, n_top):
        """A context with a writer of the first model's log-probabilities."""
        first, (n_top,) = self.results[0], counts(2**31 - 1, n_top=n_top)
        if first.stride is not None:
            raise PydsaError("With a stride no log-probabilities are saved: files of them are of chunks.")
        writer = LlamaCppWriter(path, self.chunks, self.n_vocab) if n_top is None else OwnWriter(
            path, self.chunks, self.n_vocab, n_top, first.settings | {"model": os.path.basename(first.settings["model"])})
        try:
            yield writer
        finally:
            writer.close()
            self.kept = writer.kept

    def _run_chunk(self, i, threads, writer):
        """Run a chunk -> for each session a list of tuples of arrays.

        They are what Perplexity.add() takes, in parts.
        """
        ids = self.chunks[i].copy()
        if self._bos is not None:
            ids[0] = self._bos
        for session in self._sessions:
            session.truncate(0)
        parts = [[] for _ in self._sessions]
        for start, stop in self._steps():
            n = stop - max(start, self.first)
            if n <= 0:
                for session in self._sessions:
                    session.prefill(ids[start:stop])
                continue
            at, came = stop - n - self.first, self.chunks[i][stop - n + 1:stop + 1].astype(np.int64)
            base = None if self._base is None else self._base.rows(i, at, at + n, threads)
            for j, session in enumerate(self._sessions):
                rows = Rows(session.logits(ids[start:stop], last=n), threads)
                if writer is not None and j == 0:
                    writer.add(rows, came, at)
                parts[j].append((rows.of(came),) if base is None else (rows.of(came), *base.compared(rows, came)))
                base = rows if base is None else base
        return parts

    def _steps(self):
        """(start, stop) of the steps of a chunk; its last token is only predicted."""
        start, n = 0, self.n_ctx - 1
        while start < n:
            stop = min(start + self._n_ubatch, max(start, self.first) + self._rows_of_a_step, n)
            yield start, stop
            start = stop


def cut(ids, n_ctx, stride=None):
    """Chunks of a text's tokens, int32 [n_chunks, n_ctx].

    With a stride they overlap. Raises PydsaError for fewer than two chunks' tokens.
    """
    if ids.size < 2 * n_ctx:
        raise PydsaError(f"The text has {ids.size} tokens, expected at least {2 * n_ctx}, two chunks of {n_ctx} (-c); take a longer text, "
                         "or shorter chunks.")
    if stride is None:
        return ids[:ids.size // n_ctx * n_ctx].reshape(-1, n_ctx)
    return np.lib.stride_tricks.sliding_window_view(ids, n_ctx)[:ids.size - n_ctx:stride]
