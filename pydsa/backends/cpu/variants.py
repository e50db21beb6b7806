"""The table of variants: the number formats in which an op has kernels, and when each is chosen."""
from collections.abc import Callable
from typing import NamedTuple

from pydsa.backends.cpu import amx, bf16x2, f32, int8x2, int16
from pydsa.backends.cpu.blocks.block import CHUNK
from pydsa.backends.cpu.int8x2.panels import PREPARED
from pydsa.backends.cpu.jit import WordFunction


class Gemm(NamedTuple):
    """A product of many tokens: pack() lays out activations, matmul() multiplies rows of weights with them (linear.py)."""
    pack: WordFunction
    matmul: WordFunction
    packed_bytes: int       # that 256 activations of a token take


class Scores(NamedTuple):
    """Scores of index keys, for many tokens and for a few (indexer.py)."""
    gemm: WordFunction
    gemv: WordFunction


class Mha(NamedTuple):
    """Attention with keys and values for each head, made from packed latents (mha.py)."""
    tile_bytes: Callable
    pack_latents: WordFunction
    attend_head: WordFunction


class Variant(NamedTuple):
    """Kernels of one number format, taken where takes(BlockKernels of a weight, or a cache type) says so."""
    takes: Callable
    kernels: object


def anything(_):
    """Where no other variant was taken."""
    return True


# op -> number format -> Variant; the first one that takes a weight or a cache is its own. Up to GEMV_TOKENS tokens, quantized weights are
# multiplied as the file stores them instead, with activations in int16 (linear.py, blocks/).
VARIANTS = {
    "linear": {
        "f32": Variant(lambda w: not w.type.quantized, Gemm(WordFunction(f32.linear.pack), WordFunction(f32.linear.matmul), 4 * 256)),
        "int8x2": Variant(lambda w: amx.HERE,
                          Gemm(WordFunction(int8x2.linear.pack), WordFunction(int8x2.linear.matmul), PREPARED // 16)),
        "int16": Variant(anything, Gemm(WordFunction(int16.linear.pack), WordFunction(int16.linear.matmul), CHUNK)),
    },
    "attention": {
        "f32": Variant(lambda cache: not amx.HERE or cache == "f32", WordFunction(f32.attention.attend)),
        "bf16x2": Variant(lambda cache: cache in ("f16", "bf16"), WordFunction(bf16x2.attention.attend)),
        "int8x2": Variant(anything, WordFunction(int8x2.attention.attend)),
    },
    "mha": {
        "f32": Variant(lambda cache: not amx.HERE or cache == "f32",
                       Mha(f32.mha.tile_bytes, WordFunction(f32.mha.pack_latents), WordFunction(f32.mha.attend_head))),
        "int8x2": Variant(anything,
                          Mha(int8x2.mha.tile_bytes, WordFunction(int8x2.mha.pack_latents), WordFunction(int8x2.mha.attend_head))),
    },
    "indexer": {
        "int8x2": Variant(lambda cache: amx.HERE and cache == "i8", Scores(*[WordFunction(int8x2.indexer.score)] * 2)),
        "int16": Variant(lambda cache: cache == "i8", Scores(*[WordFunction(int16.indexer.score)] * 2)),
        "bf16x2": Variant(lambda cache: amx.HERE and cache in ("f16", "bf16"),
                          Scores(WordFunction(bf16x2.indexer.score), WordFunction(bf16x2.indexer.score_few))),
        "f32": Variant(anything, Scores(*[WordFunction(f32.indexer.score)] * 2)),
    },
}


def kernels(op, x):
    """The kernels of the first variant of an op that takes x, a weight's BlockKernels or a cache type."""
    return next(variant.kernels for variant in VARIANTS[op].values() if variant.takes(x))
