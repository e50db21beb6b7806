"""The caches of a session whose model runs in stages: rows pass as bytes."""
import numpy as np

from pydsa.errors import StageError
from pydsa.stages.wire import MOST_PAYLOAD

PIECE = MOST_PAYLOAD // 2       # bytes of cache rows in a request


class Caches(dict):
    """The caches of a session on all stages: {CacheRef: Cache}.

    number: the session's, on all stages. They are released there when this is not used any more.
    """

    def __init__(self, pipeline, conversation):
        super().__init__()
        self._pipeline, self.conversation, self.number = pipeline, conversation, conversation.number

    def saved(self, n, source):
        """Say that all n tokens of the session are in a save.

        A stage that is started again takes its rows from there: source(ref, start, stop, ask) gives those of a cache, uint8 [stop - start,
        row_bytes], as long as the session lives. ask(stage, content, payload) asks a stage meanwhile.
        """
        pipeline = self._pipeline
        if pipeline.journal is not None:
            with pipeline.changed:
                pipeline.journal.saved(self.number, n, source)


class Cache:
    """A cache of a session, on one of the stages."""

    def __init__(self, pipeline, conversation, stage, ref, n_ctx, row_bytes):
        self._pipeline, self._conversation, self.stage, self.ref = pipeline, conversation, stage, ref
        self.n_ctx, self.row_bytes = n_ctx, row_bytes

    @property
    def nbytes(self):
        """Bytes of all n_ctx rows."""
        return self.n_ctx * self.row_bytes

    def pieces(self, start, stop):
        """Ranges of rows that fit a request: pairs of a first and a last."""
        n = max(1, PIECE // self.row_bytes)
        return [(first, min(first + n, stop)) for first in range(start, stop, n)]

    def request(self, do, start, stop):
        """A request for rows: `do` is "stored" or "restore"."""
        return {"do": do, "session": self._conversation.number, "kind": self.ref.kind, "layer": self.ref.layer, "start": start,
                "stop": stop}

    def stored(self, stop, start=0):
        """The rows from start up to stop as bytes, uint8 [n, row_bytes].

        Steps of the session that are under way end first.
        """
        self._pipeline.drain(self._conversation)
        rows = np.empty((stop - start, self.row_bytes), np.uint8)
        for first, last in self.pieces(start, stop):
            _, payload = self._pipeline.ask(self.stage, self.request("stored", first, last))
            if len(payload) != (last - first) * self.row_bytes:
                raise StageError(f"{self._pipeline.links.name(self.stage)} gives {len(payload)} bytes of cache rows, expected "
                                 f"{(last - first) * self.row_bytes}.")
            rows[first - start:last - start] = np.frombuffer(payload, np.uint8).reshape(-1, self.row_bytes)
        return rows

    def restore(self, rows, start=0):
        """Overwrite the rows from start on with rows as stored() returns them."""
        pipeline, self._conversation.started = self._pipeline, None
        pipeline.drain(self._conversation)
        if pipeline.journal is not None and len(rows):      # first: a stage may be started again between two pieces
            with pipeline.changed:
                pipeline.journal.restored(self._conversation.number, self.ref, start, rows)
        self.write(rows, start, pipeline.ask)

    def write(self, rows, start, ask):
        """Send rows to the stage, with ask(stage, content, payload)."""
        for first, last in self.pieces(start, start + len(rows)):
            ask(self.stage, self.request("restore", first, last), np.ascontiguousarray(rows[first - start:last - start], np.uint8))
