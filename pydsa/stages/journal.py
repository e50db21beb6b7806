"""Journal: how the caches of sessions came to be, so that a stage that was started again gets the same ones.

It has the steps in the order and in the shapes in which they ran, and the rows that were restored, as long as a token of theirs is in a
context. What a save holds is left out.
"""
import tempfile
from typing import NamedTuple

import numpy as np

from pydsa.errors import SessionFileError
from pydsa.stages.wire import Part


class Ran(NamedTuple):
    """A step. parts: of wire.Part. ids: int32 [n_tokens]. n_outputs: tokens at the end that had logits."""
    variant: str
    parts: list
    ids: np.ndarray
    n_outputs: int


class Mark(NamedTuple):
    """A checkpoint that was begun.

    number: of the last entry in it. ends: {session: n tokens}. rows: {session: (start, ids)}, the rows that have changed since the last.
    """
    number: int
    ends: dict
    rows: dict


class _Entry:
    """A step or some rows; pieces: the number of its pieces of contexts."""

    def __init__(self, pieces):
        self.pieces = pieces


class _Steps(_Entry):
    """A step, or several of a token each, of one session, one after the other."""

    def __init__(self, ran):
        super().__init__(len(ran.parts))
        self.ran, self.tokens = ran, None
        if len(ran.ids) == 1:
            self.tokens = [int(ran.ids[0])]

    def continues(self, ran):
        """Whether another step is the next of the same kind."""
        return self.tokens is not None and len(ran.ids) == 1 and ran.variant == self.ran.variant and ran.n_outputs == self.ran.n_outputs

    def ids(self, session, first):
        """The ids of a session's piece that begins with token `first`."""
        if self.tokens is not None:
            return self.tokens
        at = 0
        for part in self.ran.parts:
            if (part.session, part.n_past) == (session, first):
                return self.ran.ids[at:at + part.n_tokens].tolist()
            at += part.n_tokens
        raise ValueError(f"the session {session} has no tokens from {first} on in this step")

    def each(self, sessions):
        """The steps, of these sessions only."""
        if self.tokens is None:
            ran = _only(self.ran, sessions)
            if ran is not None:
                yield ran
            return
        (session, n_past, _), = self.ran.parts
        if session in sessions:
            for i, token in enumerate(self.tokens):
                yield self.ran._replace(parts=[Part(session, n_past + i, 1)], ids=np.array([token], np.int32))


class _Rows(_Entry):
    """Rows that were restored, from one position on, in memory or in a file."""

    def __init__(self, session, start, folder):
        super().__init__(1)
        self.session, self.start, self.grows = session, start, True
        self._ends, self._rows = {}, []         # cache -> where its rows end; (cache, start, rows or their place in the file)
        self._folder, self._file = folder, None
        if folder is not None:
            try:
                self._file = tempfile.TemporaryFile(dir=folder)
            except OSError as error:
                raise _cannot_write(folder, error) from error

    def takes(self, ref, start):
        """Whether rows of a cache belong to these."""
        return self.grows and start == self._ends.get(ref, self.start)

    def add(self, ref, start, rows):
        self._ends[ref] = start + len(rows)
        if self._file is None:
            self._rows.append((ref, start, np.array(rows)))
        else:
            try:
                place = self._file.seek(0, 2)
                self._file.write(np.ascontiguousarray(rows))
                self._file.flush()
            except OSError as error:
                raise _cannot_write(self._folder, error) from error
            self._rows.append((ref, start, (place, rows.shape)))

    def each(self):
        """The rows: (cache, start, uint8 [n, row_bytes])."""
        for ref, start, rows in self._rows:
            if self._file is not None:
                place, (n, width) = rows
                self._file.seek(place)
                rows = np.frombuffer(self._file.read(n * width), np.uint8).reshape(n, width)
            yield ref, start, rows


class _Saved(_Entry):
    """Rows of all caches up to n, which are in a save."""

    def __init__(self, session, n, source):
        super().__init__(1)
        self.session, self.n, self.source = session, n, source

    def each(self):
        """The source as replay() gives it."""
        yield None, self.n, self.source


def _cannot_write(folder, error):
    return SessionFileError(f"{folder}: the rows of a conversation cannot be written there ({error.strerror or error}).")


def _only(ran, sessions):
    """A step without the parts of sessions that have ended; None: all have."""
    if all(part.session in sessions for part in ran.parts):
        return ran
    kept = np.concatenate([np.full(part.n_tokens, part.session in sessions) for part in ran.parts])
    if not kept.any():
        return None
    n_outputs = int(kept[len(kept) - ran.n_outputs:].sum())
    return Ran(ran.variant, [part for part in ran.parts if part.session in sessions], ran.ids[kept], n_outputs)


class Journal:
    """What made the caches of all sessions. folder: for rows that were restored, which else are kept in memory; None: there is none."""

    def __init__(self, folder=None):
        self._folder, self._entries, self._n = folder, {}, 0        # number -> entry
        self._live = {}         # session -> [[start, stop, number of the entry]], each behind the one before
        self._mark, self._checkpoint = 0, (0, {})       # numbers of the last entries; sessions of the checkpoint and their tokens
        self._changed, self._low = {}, {}       # session -> where rows have changed since the mark, and since the checkpoint, first

    def add(self, ran):
        """A step, Ran, is over: its tokens replace those from their positions on."""
        if len(ran.parts) == 1 and len(ran.ids) == 1:
            session, n_past, _ = ran.parts[0]
            self._cut(session, n_past)
            last = self._last(session)
            if self._grows(last) and last[1] == n_past and isinstance(entry := self._entries[last[2]], _Steps) and entry.continues(ran):
                entry.tokens.append(int(ran.ids[0]))
                last[1] += 1
                self._change(session, n_past)
                return
        number = self._put(_Steps(ran))
        for session, n_past, n_tokens in ran.parts:
            self._cut(session, n_past)
            self._live.setdefault(session, []).append([n_past, n_past + n_tokens, number])
            self._change(session, n_past)

    def restored(self, session, ref, start, rows):
        """Rows were written to a cache, from a position on."""
        last = self._last(session)
        self._change(session, start)
        if self._grows(last) and isinstance(entry := self._entries[last[2]], _Rows) and entry.takes(ref, start):
            last[1] = max(last[1], start + len(rows))
        else:
            self._cut(session, start)
            entry = _Rows(session, start, self._folder)
            self._live.setdefault(session, []).append([start, start + len(rows), self._put(entry)])
        entry.add(ref, start, rows)

    def saved(self, session, n, source):
        """A session has n tokens, and all are saved.

        source(ref, start, stop, ask) gives the rows of a cache, uint8 [stop - start, row_bytes], for as long as the session lives.
        """
        self.closed(session)
        self._change(session, 0)
        if n:
            self._live[session] = [[0, n, self._put(_Saved(session, n, source))]]

    def closed(self, session):
        """A session has ended."""
        for _, _, number in self._live.pop(session, ()):
            self._release(number)
        self._changed.pop(session, None)

    # Checkpoints: of all sessions at once, as one that ran in a step with another needs its rows where the other's are made again

    @property
    def changed(self):
        """Whether rows have changed since the last mark."""
        return bool(self._changed)

    def mark(self):
        """Begin a checkpoint -> its Mark; what comes from now on is not in it."""
        starts, self._changed, self._mark = self._changed, {}, self._n
        ends = {session: live[-1][1] for session, live in self._live.items() if live}
        return Mark(self._n, ends, {session: (start, self._ids(session, start)) for session, start in starts.items() if session in ends})

    def commit(self, mark):
        """All stages have the rows of a Mark, the last one that mark() gave."""
        self._checkpoint, self._low = (mark.number, mark.ends), dict(self._changed)

    def give_up(self):
        """Not all stages have the rows of the last Mark: the next has all rows."""
        self._changed = dict.fromkeys(self._live, 0)

    def needed(self, sessions):
        """How many tokens' rows a checkpoint must have: {session: n}."""
        ends = self._checkpoint[1]
        return {session: min(ends[session], self._low.get(session, ends[session])) for session in sessions if session in ends}

    def _ids(self, session, start):
        """The ids of a session's tokens from start on.

        They are -1 where rows were restored.
        """
        found = []
        for first, stop, number in self._live[session]:
            entry = self._entries[number]
            ids = entry.ids(session, first) if isinstance(entry, _Steps) else [-1] * (stop - first)
            found += ids[max(0, start - first):stop - first]
        return found

    def _change(self, session, start):
        for lowest in (self._changed, self._low):
            lowest[session] = min(start, lowest.get(session, start))

    def _grows(self, last):
        """Whether a session's last piece is in no checkpoint yet."""
        return last is not None and last[2] > self._mark

    def replay(self, sessions, checkpoint=False):
        """What makes the caches of these sessions again, in order.

        checkpoint: whether they are as they were at the checkpoint already.

        Yields Ran, and (session, ref, start, rows) of rows to restore; with ref None (session, None, n, source) of a save of n tokens.
        Tokens that are in no context any more are among the steps, as parts of them: what comes later overwrites what they leave.
        """
        for number, entry in list(self._entries.items()):
            if checkpoint and number <= self._checkpoint[0]:
                continue
            if isinstance(entry, _Steps):
                yield from entry.each(sessions)
            elif entry.session in sessions:
                for ref, start, rows in entry.each():
                    yield entry.session, ref, start, rows

    def __len__(self):
        return len(self._entries)

    def _put(self, entry):
        self._n += 1
        self._entries[self._n] = entry
        return self._n

    def _last(self, session):
        live = self._live.get(session)
        return live[-1] if live else None

    def _release(self, number):
        entry = self._entries[number]
        entry.pieces -= 1
        if entry.pieces == 0:
            del self._entries[number]

    def _cut(self, session, n):
        """The tokens of a session from n on are gone."""
        live = self._live.get(session, [])
        while live and live[-1][0] >= n:
            self._release(live.pop()[2])
        if live and live[-1][1] > n:
            live[-1][1] = n
            entry = self._entries[live[-1][2]]
            if isinstance(entry, _Saved):
                entry.n = n
            elif isinstance(entry, _Rows):
                entry.grows = False
            elif entry.tokens is not None:
                del entry.tokens[n - live[-1][0]:]
