"""VectorCache holds one row a token for one layer.

All rows of a cache have one width and one type. Latents and index keys are two kinds of caches.
"""
from pydsa.options import choose
from pydsa.quants import CACHE_ALIASES, CACHE_TYPES


def choose_cache_type(what, value):
    """The cache type with this name or alias.

    Raises PydsaError for another name; `what` is the option that it belongs to.
    """
    return choose(what, CACHE_ALIASES.get(value, value), CACHE_TYPES)


class VectorCache:
    """A cache of n_ctx rows, each of sum(widths) values.

    storage is a key of quants.CACHE_TYPES. Integer types have a scale for each of the widths. `rows` is the argument that the backend's ops
    take. reproducible: a token's results are the same in steps of any shape.
    """

    def __init__(self, backend, n_ctx, widths, storage, reproducible=False):
        self.n_ctx, self.widths, self.storage, self._backend = n_ctx, widths, storage, backend
        self.rows = backend.cache_rows(n_ctx, widths, storage)
        if reproducible:
            self.rows = backend.reproducible(self.rows)
        self._bytes = backend.cache_bytes(self.rows)

    @property
    def nbytes(self):
        """Bytes of all n_ctx rows."""
        return self._bytes.nbytes

    @property
    def row_bytes(self):
        """Bytes of one row."""
        return self._bytes.shape[1]

    def stored(self, stop, start=0):
        """The rows from start up to stop as bytes, uint8 [n, row_bytes].

        They are the rows themselves, or a copy if the backend's arrays are on another device.
        """
        return self._backend.fetch(self._bytes[start:stop])

    def restore(self, rows, start=0):
        """Overwrite the rows from start on with rows as stored() returns them."""
        if len(rows):
            self._backend.store(self._bytes[start:start + len(rows)], rows)
