"""The errors of llama.cpp's i-quants, ternary, one bit and NVFP4, for tests.

    python tools/golden_quantizers_iq.py LIBGGML_BASE_SO tests/data/quantizers.npz tests/data/quantizers_iq.npz

The rows and their importance are those of tools/golden_quantizers.py. For each type and statistic of rows: the root of the summed squared
errors, without and with importance (then weighted by it). Types that llama.cpp refuses without importance get ones for none.
"""
import sys
from pathlib import Path

import click
import gguf
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.golden_quantizers import llama_cpp  # noqa: E402

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "Q1_0", "NVFP4")
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")


def values_of(blocks, name):
    """The weights of blocks: float32 [n, k].

    gguf-py's, but for Q1_0, which it does not read: d in float16, then a bit for each of 128 weights, that are d or -d.
    """
    if name != "Q1_0":
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    parts = np.ascontiguousarray(blocks).reshape(-1, 18)
    d = parts[:, :2].copy().view("<f2").astype(np.float32)
    return np.where(np.unpackbits(parts[:, 2:], axis=1, bitorder="little"), d, -d).reshape(len(blocks), -1)


def error(rows, blocks, name, importance=None):
    """The root of the sum of squared errors, weighted by importance."""
    off = values_of(blocks, name).astype(np.float64) - rows
    return np.sqrt((np.square(off) * (1 if importance is None else importance)).sum())


@click.command(help=__doc__.split("\n")[0])
@click.argument("library", type=click.Path(exists=True, dir_okay=False))
@click.argument("rows", type=click.Path(exists=True, dir_okay=False))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def main(library, rows, output):
    quantize, given, values = llama_cpp(library), np.load(rows), {}
    importance = given["importance"]
    for name in TYPES:
        none = np.ones_like(importance) if name in NEED_IMPORTANCE else None
        for key in given.files:
            if key.startswith("rows."):
                x = given[key]
                values[f"{name}.{key.removeprefix('rows.')}"] = np.array([
                    error(x, quantize(name, x, none), name), error(x, quantize(name, x, importance), name, importance)])
    np.savez_compressed(output, **values)


if __name__ == "__main__":
    main()
