"""The table of variants: number formats with kernels for each op.

It also says when each is chosen.
"""
from collections.abc import Callable
from typing import NamedTuple

from pydsa.backends.cpu import bf16x2, f32, int8x2, int16
from pydsa.backends.cpu.blocks.block import SUPERBLOCK
from pydsa.backends.cpu.int16.tiles import TILES_HERE
from pydsa.backends.cpu.int8x2.panels import SCALED_PANEL
from pydsa.backends.cpu.jit import IntpFunction
from pydsa.backends.cpu.vectors import amx
from pydsa.backends.devices import FORMS_BY_TILES, FormCosts


class Gemm(NamedTuple):
    """A matrix product for many tokens (linear.py).

    pack() packs activations, matmul() multiplies rows of weights with them.
    """
    pack: IntpFunction
    matmul: IntpFunction
    packed_bytes: int       # of 256 activations of a token
    one_scale: bool = False     # whether matmul() takes BlockKernels.unpack_scaled, of types that have it
    tiles: bool = False         # and BlockKernels.unpack_tile


class Scores(NamedTuple):
    """Scores of index keys, for many tokens and for a few (indexer.py)."""
    gemm: IntpFunction
    gemv: IntpFunction


class Mha(NamedTuple):
    """Attention with keys and values of each head, from latents (mha.py)."""
    tile_bytes: Callable
    pack_latents: IntpFunction
    attend_head: IntpFunction
    costs: FormCosts


class Variant(NamedTuple):
    """Kernels of one number format, and when they are used.

    takes(BlockKernels of a weight, or a cache type) says whether.
    """
    takes: Callable
    kernels: object


def anything(_):
    """Accept what no other variant took."""
    return True


# op -> number format -> Variant; the first one that takes a weight or a cache is used. Up to GEMV_TOKENS tokens, quantized weights are
# multiplied as stored in the file instead, with activations in int16 (linear.py, blocks/).
VARIANTS = {
    "linear": {
        "f32": Variant(lambda w: not w.type.quantized, Gemm(IntpFunction(f32.linear.pack), IntpFunction(f32.linear.matmul), 4 * 256)),
        "int8x2": Variant(lambda w: amx.HERE,
                          Gemm(IntpFunction(int8x2.linear.pack), IntpFunction(int8x2.linear.matmul), SCALED_PANEL // 16)),
        "int16": Variant(anything, Gemm(IntpFunction(int16.linear.pack), IntpFunction(int16.linear.matmul), SUPERBLOCK, True, TILES_HERE)),
    },
    "attention": {
        "f32": Variant(lambda cache: not amx.HERE or cache == "f32", IntpFunction(f32.attention.attend)),
        "bf16x2": Variant(lambda cache: cache in ("f16", "bf16"), IntpFunction(bf16x2.attention.attend)),
        "int8x2": Variant(anything, IntpFunction(int8x2.attention.attend)),
    },
    "mha": {
        "f32": Variant(lambda cache: cache == "f32",
                       Mha(f32.mha.tile_bytes, IntpFunction(f32.mha.pack_latents), IntpFunction(f32.mha.attend_head),
                           FormCosts(1.6, 8))),
        "int8x2": Variant(lambda cache: amx.HERE,
                          Mha(int8x2.mha.tile_bytes, IntpFunction(int8x2.mha.pack_latents), IntpFunction(int8x2.mha.attend_head),
                              FORMS_BY_TILES)),
        "int16": Variant(anything,
                         Mha(int16.mha.tile_bytes, IntpFunction(int16.mha.pack_latents), IntpFunction(int16.mha.attend_head),
                             FormCosts(0.7, 8))),
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
    """Return the kernels of the first variant of an op that takes x.

    x: a weight's BlockKernels or a cache type.
    """
    return next(variant.kernels for variant in VARIANTS[op].values() if variant.takes(x))
