"""VectorCache: rows of one width and one type, one a token, for one layer. Latents and index keys are two of them."""


class VectorCache:
    """n_ctx rows of `width` values, stored as kv_type says (quants.cache_storage); `rows` is what the backend's ops take."""

    def __init__(self, backend, n_ctx, width, kv_type):
        self.n_ctx, self.width, self.kv_type = n_ctx, width, kv_type
        self.rows = backend.cache_rows(n_ctx, width, kv_type)
        self._bytes = backend.cache_bytes(self.rows)

    @property
    def nbytes(self):
        """Bytes that the rows take when all are written."""
        return self._bytes.nbytes

    def stored(self, n):
        """The first n rows as bytes, uint8 [n, row_bytes], a view."""
        return self._bytes[:n]
