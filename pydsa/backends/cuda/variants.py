"""The table of variants: the number formats in which an op has kernels, and when each is chosen."""
from collections.abc import Callable
from typing import NamedTuple

from pydsa.backends.cuda import f16x2, f32, int8x2


class Linear(NamedTuple):
    """pack() makes of rows of float32 activations what matmul() multiplies weights with (linear.py)."""
    pack: Callable
    matmul: Callable


class Attention(NamedTuple):
    """attend() by blocks of so many heads and columns of the value, which go through keys a tile at a time (attention.py)."""
    attend: Callable
    heads: int
    columns: int
    tile: int


class Indexer(NamedTuple):
    """pack() makes of queries and the weights of heads what score() multiplies keys with (indexer.py)."""
    pack: Callable
    score: Callable


class Variant(NamedTuple):
    """Kernels of one number format, taken where takes() says so of an op's arguments."""
    takes: Callable
    kernels: object


def anything(*_):
    """Where no other variant was taken."""
    return True


# op -> number format -> Variant; the first one that takes the arguments is chosen
VARIANTS = {
    "linear": {         # of a Weight, and whether there is a single token
        "f32": Variant(f32.linear.takes, Linear(f32.linear.pack, f32.linear.matmul)),
        "int8x2": Variant(lambda w, single: single, Linear(int8x2.linear.pack, int8x2.linear.matmul)),
        "f16x2": Variant(anything, Linear(f16x2.linear.pack, f16x2.linear.matmul)),
    },
    "attention": {      # of CacheRows, the number of heads, the width of a value
        "int8x2": Variant(int8x2.attention.takes,
                          Attention(int8x2.attention.attend, int8x2.attention.HEADS, int8x2.attention.COLUMNS, int8x2.attention.SIDE)),
        "f32": Variant(anything, Attention(f32.attention.attend, f32.attention.HEADS, f32.attention.COLUMNS, f32.attention.KEYS)),
    },
    "indexer": {        # of CacheRows
        "int8x2": Variant(int8x2.indexer.takes, Indexer(int8x2.indexer.pack, int8x2.indexer.score)),
        "f32": Variant(anything, Indexer(f32.indexer.pack, f32.indexer.score)),
    },
}


def kernels(op, *args):
    """The kernels of the first variant of an op that takes these arguments."""
    return next(variant.kernels for variant in VARIANTS[op].values() if variant.takes(*args))
