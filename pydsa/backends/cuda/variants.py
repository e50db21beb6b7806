"""The table of variants: each op's number formats, and when each is chosen.

PYDSA_CUDA_WITHOUT names variants that are not to be chosen, with commas between: to find out which one is wrong, or slow.
"""
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from pydsa.backends.cuda import f16, f16x2, f32, flash, int8x2, prompt_scores, top_k_one, top_k_rows
from pydsa.backends.cuda.chosen import attend_chosen, attend_one, mha_chosen
from pydsa.backends.cuda.int8x2.gemv_scores import GEMV_SCORES
from pydsa.backends.cuda.one_token import routing, rows_one
from pydsa.backends.cuda.runtime.current import precision
from pydsa.errors import PydsaError
from pydsa.options import FLOAT16

WITHOUT = "PYDSA_CUDA_WITHOUT"


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

    takes() gets the op's arguments that the table below names. precision: FLOAT16 for a variant that only models in this precision take
    (options.PRECISIONS); None: all.
    """
    takes: Callable
    kernels: object
    precision: str | None = None


def anything(*_):
    """Accept any arguments: the fallback."""
    return True


def _rows_in_wgmma(summed):
    """Products with weights of any type that has so many weights an offset."""
    products = f16x2.gemm_rows.PRODUCTS[summed]
    return Variant(lambda w, single: products.takes(w), Linear(products.pack, products.matmul))


def _made_by_products(mode):
    return Variant(lambda rows: rows.mode == mode and rows_one.takes(rows), True)


# op -> number format -> Variant; the first whose takes() accepts the arguments is chosen
VARIANTS = {
    "products of a few": {      # takes(number of tokens): whether each row is multiplied by itself
        "rows": Variant(int8x2.gemv.takes, True),
        "tiles of rows": Variant(anything, False),
    },
    "linear": {         # takes(Weight, whether each row is multiplied by itself)
        "f32": Variant(f32.linear.takes, Linear(f32.linear.pack, f32.linear.matmul)),
        "int8x2": Variant(lambda w, single: single, Linear(int8x2.linear.pack, int8x2.gemv.matmul)),
        "f16 in wgmma": Variant(lambda w, single: f16.gemm.takes(w), Linear(f16.panels.pack, f16.gemm.matmul), FLOAT16),
        "f16x2 in wgmma": Variant(lambda w, single: f16x2.gemm.takes(w), Linear(f16x2.gemm.pack, f16x2.gemm.matmul)),
        "f16x2 rows in wgmma": _rows_in_wgmma(0),
        "f16x2 rows and sums of 32 in wgmma": _rows_in_wgmma(32),       # for Q4_1 and Q5_1
        "f16x2 rows and sums of 16 in wgmma": _rows_in_wgmma(16),       # for Q2_K
        "f16": Variant(anything, Linear(f16x2.linear.pack_one, f16x2.linear.matmul), FLOAT16),
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
    "attention of many": {      # takes(out, two parts of queries, CacheRows, mode): several tokens'
        "rows in wgmma": Variant(attend_chosen.takes, attend_chosen.attend, FLOAT16),
        "tiles": Variant(anything, None),       # as "attention"
    },
    "top_k of one": {   # takes(scores, k): of one row
        "registers": Variant(top_k_one.takes, top_k_one.choose_one),
        "memory": Variant(anything, None),      # as of several rows
    },
    "mha": {            # takes(out, queries, CacheRows, k_b, v_b): a prompt's attention to all keys
        "flash in wgmma": Variant(flash.attention.WGMMA.takes, flash.attention.WGMMA.attention, FLOAT16),
        "flash in mma": Variant(flash.attention.MMA.takes, flash.attention.MMA.attention, FLOAT16),
        "absorbed": Variant(anything, None),    # as "attention" and "linear"
    },
    "mha of chosen rows": {     # takes(queries, CacheRows, k_b, v_b, what packs activations for v_b): a prompt's
        "halves in wgmma": Variant(mha_chosen.takes, mha_chosen.attention, FLOAT16),
        "float32": Variant(anything, None),     # as "attention of many" and "linear"
    },
    "top_k of many": {  # takes(scores, k): of several rows
        "lists": Variant(top_k_rows.takes, top_k_rows.choose_rows),
        "parts": Variant(anything, None),       # each row in parts: top_k.py
    },
    "indexer": {        # takes(CacheRows, number of tokens, number of heads)
        "int8x2 in wgmma": Variant(prompt_scores.takes, Indexer(prompt_scores.pack, prompt_scores.score)),
        "int8x2": Variant(lambda keys, *_: int8x2.indexer.takes(keys), Indexer(int8x2.indexer.pack, int8x2.indexer.score)),
        "f32": Variant(anything, Indexer(f32.indexer.pack, f32.indexer.score)),
    },
    # launches of one token's step (fuse.py): the kernels are whether one launch does what else several do
    "rows of products": {       # takes(rows_one.Rows): blocks of a product make the rows that they multiply with
        "joined": _made_by_products(rows_one.JOINED),
        "normed": _made_by_products(rows_one.NORMED),
        "gated": _made_by_products(rows_one.GATED),
        "launched before": Variant(anything, False),
    },
    "choice of experts": {      # takes(logits, number of groups): blocks of the experts' first products choose the experts
        "by products": Variant(routing.takes, True),
        "launched before": Variant(anything, False),
    },
    "scores of one": {          # takes(k_b, CacheRows): other blocks of the product with k_b score the index keys
        "beside k_b": Variant(lambda w, keys: w.type in GEMV_SCORES and kernels("indexer", keys, 1, 1).score is int8x2.indexer.score, True),
        "launched behind": Variant(anything, False),
    },
}


def kernels(op, *args):
    """The kernels of an op's first variant that accepts these arguments.

    It is for the thread's precision, and not switched off.
    """
    now, off = precision(), switched_off()
    return next(variant.kernels for name, variant in VARIANTS[op].items()
                if variant.precision in (None, now) and (op, name) not in off and variant.takes(*args))


@functools.cache
def switched_off():
    """What PYDSA_CUDA_WITHOUT switches off: see without(); read once."""
    return without(os.environ.get(WITHOUT, ""))


def without(text):
    """The variants that a text names, {(op, name)}.

    It has names of the table with commas between; a name is that of all ops, or of one: "linear: f16x2 in wgmma". Raises PydsaError for a
    name that is not there, and for the last of an op, which takes what all others leave.
    """
    off = set()
    for item in filter(None, map(str.strip, text.split(","))):
        op, _, name = map(str.strip, item.rpartition(":"))
        found = {(other, name) for other, variants in VARIANTS.items() if name in variants and op in ("", other)}
        needed = sorted(other for other, _ in found if name == list(VARIANTS[other])[-1])
        if not found or needed:
            problem = f"what {' and '.join(needed)} cannot do without" if needed else "no variant"
            can = ", ".join(f"{other}: {known}" for other, variants in VARIANTS.items() for known in list(variants)[:-1])
            raise PydsaError(f"{WITHOUT} has {item!r}, {problem}; expected names of these: {can}.")
        off |= found
    return off
