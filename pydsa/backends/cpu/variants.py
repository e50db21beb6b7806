"""The table of variants: the number formats in which an op has kernels, and when each is chosen."""
from collections.abc import Callable
from typing import NamedTuple

from pydsa.backends.cpu import amx, bf16x2, f32, int8x2, int16
from pydsa.backends.cpu.blocks.block import SUPERBLOCK
from pydsa.backends.cpu.int8x2.panels import SCALED_PANEL
from pydsa.backends.cpu.jit import IntpFunction


class Gemm(NamedTuple):
    """A product of many tokens: pack() lays out activations, matmul() multiplies rows of weights with them (linear.py)."""
    pack: IntpFunction
    matmul: IntpFunction
    packed_bytes: int       # that 256 activations of a token take


class Scores(NamedTuple):
    """Scores of index keys, for many tokens and for a few (indexer.py)."""
    gemm: IntpFunction
    gemv: IntpFunction


class Mha(NamedTuple):
    """Attention with keys and values for each head, made from packed latents (mha.py)."""
    tile_bytes: Callable
    pack_latents: IntpFunction
    attend_head: IntpFunction


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
        "f32": Variant(lambda w: not w.type.quantized, Gemm(IntpFunction(f32.linear.pack), IntpFunction(f32.linear.matmul), 4 * 256)),
        "int8x2": Variant(lambda w: amx.HERE,
                          Gemm(IntpFunction(int8x2.linear.pack), IntpFunction(int8x2.linear.matmul), SCALED_PANEL // 16)),
        "int16": Variant(anything, Gemm(IntpFunction(int16.linear.pack), IntpFunction(int16.linear.matmul), SUPERBLOCK)),
    },
    "attention": {
        "f32": Variant(lambda cache: not amx.HERE or cache == "f32", IntpFunction(f32.attention.attend)),
        "bf16x2": Variant(lambda cache: cache in ("f16", "bf16"), IntpFunction(bf16x2.attention.attend)),
        "int8x2": Variant(anything, IntpFunction(int8x2.attention.attend)),
    },
    "mha": {
        "f32": Variant(lambda cache: not amx.HERE or cache == "f32",
                       Mha(f32.mha.tile_bytes, IntpFunction(f32.mha.pack_latents), IntpFunction(f32.mha.attend_head))),
        "int8x2": Variant(anything,
                          Mha(int8x2.mha.tile_bytes, IntpFunction(int8x2.mha.pack_latents), IntpFunction(int8x2.mha.attend_head))),
    },
    "indexer": {
        "int8x2": Variant(lambda cache: amx.HERE and cache == "i8", Scores(*[IntpFunction(int8x2.indexer.score)] * 2)),
        "int16": Variant(lambda cache: cache == "i8", Scores(*[IntpFunction(int16.indexer.score)] * 2)),
        "bf16x2": Variant(lambda cache: amx.HERE and cache in ("f16", "bf16"),
                          Scores(IntpFunction(bf16x2.indexer.score), IntpFunction(bf16x2.indexer.score_gemv))),
        "f32": Variant(anything, Scores(*[IntpFunction(f32.indexer.score)] * 2)),
    },
}


def kernels(op, x):
    """The kernels of the first variant of an op that takes x, a weight's BlockKernels or a cache type."""
    return next(variant.kernels for variant in VARIANTS[op].values() if variant.takes(x))
