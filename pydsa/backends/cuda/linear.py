"""Matrix products with GGUF weights: one matrix for all tokens, or one per head."""
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.f16x2.linear import TOKENS
from pydsa.backends.cuda.runtime.array import upload
from pydsa.backends.cuda.runtime.current import kept_per_gpu
from pydsa.backends.cuda.runtime.launch import lists_many
from pydsa.backends.cuda.variants import kernels


class Tiles(NamedTuple):
    """Tiles of a grouped product: which rows of activations each matrix multiplies.

    All arrays are int32 on the device; matrix, first and end have an entry per tile.
    """
    matrix: object  # the matrix of a tile, or -1: no tile
    first: object   # where the rows of a tile begin in `order`
    end: object     # where they end
    order: object   # rows of the output, grouped by tile
    x_div: int      # output row i takes row i // x_div of the activations
    single: bool    # each tile has one row, and `order` is 0, 1, 2, ...: one token, or a few

    chosen = False  # whether an earlier kernel writes `matrix`


class ChosenTiles(Tiles):
    """Tiles of the experts that a kernel chooses for one token."""
    chosen = True


def multiply(out, w, x, tiles):
    """out[i] = a matrix of w times row i // x_div of x, for all tiles.

    The activations x and out are views of any strides.
    """
    pack, matmul = kernels("linear", w, tiles.single)
    matmul(out.rows, w, pack(x.rows), tiles)


@kept_per_gpu()
def arange(n):
    """0, 1, ..., n - 1 on the device."""
    return upload(np.arange(n, dtype=np.int32))


def head_tiles(n_tokens, n_head):
    """Tiles for one matrix per head.

    Matrix h multiplies rows t * n_head + h of the activations.
    """
    return _tiles_of_rows(n_tokens, n_head) if by_rows(n_tokens) else _tiles(n_tokens, n_head)


def by_rows(n_tokens):
    """Whether each row of activations is multiplied by itself.

    With few tokens that takes less time than tiles, which mostly would be padding.
    """
    return n_tokens == 1 or not lists_many() and kernels("products of a few", n_tokens)


@kept_per_gpu()
def _tiles_of_rows(n_tokens, n_head):   # never evicted: recorded one-token steps refer to them
    n = arange(n_tokens * n_head + 1)
    return Tiles(upload(np.tile(np.arange(n_head, dtype=np.int32), n_tokens)), n[:-1], n[1:], n[:-1], 1, True)


@kept_per_gpu(maxsize=16)
def _tiles(n_tokens, n_head):
    starts = range(0, n_tokens, TOKENS)
    tiles = [(h, h * n_tokens + t, h * n_tokens + min(t + TOKENS, n_tokens)) for h in range(n_head) for t in starts]
    order = np.arange(n_tokens * n_head, dtype=np.int32).reshape(n_tokens, n_head).T
    return Tiles(*(upload(column.copy()) for column in np.array(tiles, np.int32).T), upload(order.reshape(-1)), 1, n_tokens == 1)


def linear(out, w, x):
    """out = x w^T."""
    multiply(out, w, x, head_tiles(x.shape[0], 1))


def head_linear(out, w, x):
    """One matrix per head: out[t, h] = w[h] x[t, h]."""
    multiply(out, w, x, head_tiles(*x.shape[:2]))
