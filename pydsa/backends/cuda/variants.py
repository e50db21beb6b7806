"""The table of variants: each op's number formats, and when each is chosen."""
from collections.abc import Callable
from typing import NamedTuple

from pydsa.backends.cuda import attend_one, f16x2, f32, int8x2, top_k_one


class Linear(NamedTuple):
    """pack() converts float32 activations for matmul(). See linear.py."""
    pack: Callable
    matmul: Callable


class Attention(NamedTuple):
    """attend(), and the tile sizes of its blocks (attention.py).

    A block has `heads` heads and `columns` columns of the value. It walks the keys in tiles of `tile`.
    """
    attend: Callable
    heads: int
    columns: int
    tile: int


class Indexer(NamedTuple):
    """pack() converts queries and head weights for score(). See indexer.py."""
    pack: Callable
    score: Callable


class Variant(NamedTuple):
    """Kernels of one number format, and the predicate that selects them.

    takes() gets the op's arguments that the table below names.
    """
    takes: Callable
    kernels: object


def anything(*_):
    """Accept any arguments: the fallback."""
    return True


# op -> number format -> Variant; the first whose takes() accepts the arguments is chosen
VARIANTS = {
    "products of a few": {      # takes(number of tokens): whether each row is multiplied by itself
        "rows": Variant(int8x2.gemv.takes, True),
        "tiles of rows": Variant(anything, False),
    },
    "linear": {         # takes(Weight, whether each row is multiplied by itself)
        "f32": Variant(f32.linear.takes, Linear(f32.linear.pack, f32.linear.matmul)),
        "int8x2": Variant(lambda w, single: single, Linear(int8x2.linear.pack, int8x2.gemv.matmul)),
        "f16x2 in wgmma": Variant(lambda w, single: f16x2.gemm.takes(w), Linear(f16x2.gemm.pack, f16x2.gemm.matmul)),
        "f16x2": Variant(anything, Linear(f16x2.linear.pack, f16x2.linear.matmul)),
    },
    "attention": {      # takes(CacheRows, number of heads, width of a value)
        "int8x2": Variant(int8x2.attention.takes,
                          Attention(int8x2.attention.attend, int8x2.attention.HEADS, int8x2.attention.COLUMNS, int8x2.attention.SIDE)),
        "f32": Variant(anything, Attention(f32.attention.attend, f32.attention.HEADS, f32.attention.COLUMNS, f32.attention.KEYS)),
    },
    "attention of a few": {     # takes(out, queries, CacheRows, mode, number of keys): few tokens'
        "whole rows": Variant(attend_one.takes, attend_one.attend),
        "tiles": Variant(anything, None),       # as "attention"
    },
    "top_k of one": {   # takes(scores, k): of one row
        "registers": Variant(top_k_one.takes, top_k_one.choose_one),
        "memory": Variant(anything, None),      # as of several rows: top_k.py
    },
    "indexer": {        # takes(CacheRows)
        "int8x2": Variant(int8x2.indexer.takes, Indexer(int8x2.indexer.pack, int8x2.indexer.score)),
        "f32": Variant(anything, Indexer(f32.indexer.pack, f32.indexer.score)),
    },
}


def kernels(op, *args):
    """The kernels of an op's first variant that accepts these arguments."""
    return next(variant.kernels for variant in VARIANTS[op].values() if variant.takes(*args))
