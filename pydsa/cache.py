"""VectorCache: rows of one width and one type, one a token, for one layer. Latents and index keys are two of them."""


class VectorCache:
    """n_ctx rows of sum(widths) values, stored as quants.CACHE_TYPES says; integers have a scale for each of the widths.

    `rows` is what the backend's ops take.
    """

    def __init__(self, backend, n_ctx, widths, storage):
        self.n_ctx, self.widths, self.storage, self._backend = n_ctx, widths, storage, backend
        self.rows = backend.cache_rows(n_ctx, widths, storage)
        self._bytes = backend.cache_bytes(self.rows)

    @property
    def nbytes(self):
        """Bytes that the rows take when all are written."""
        return self._bytes.nbytes

    @property
    def row_bytes(self):
        """Bytes of a row."""
        return self._bytes.shape[1]

    def stored(self, n):
        """The first n rows as bytes, uint8 [n, row_bytes]: the rows themselves, or from another device a copy."""
        return self._backend.fetch(self._bytes[:n])

    def restore(self, rows):
        """Make these the first rows: what stored() gave, perhaps changed since."""
        if len(rows):
            self._backend.store(self._bytes[:len(rows)], rows)
