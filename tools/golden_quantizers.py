"""The errors of llama.cpp's quantizers on a few rows, for tests.

    python tools/golden_quantizers.py LIBGGML_BASE_SO tests/data/quantizers.npz

The library is that of llama-cpp-python, or of a build of llama.cpp. For each statistic of weights there are rows, and for each type the
root of the summed squared errors, without and with importance (then weighted by it). Types that round without a choice also have a hash of
their blocks.
"""
import ctypes
import hashlib
from pathlib import Path

import click
import gguf
import numpy as np

TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
ROWS, COLUMNS = 8, 512


def statistics():
    """Rows by statistic: float32 [ROWS, COLUMNS] each."""
    rng = np.random.default_rng(24)
    shape = ROWS, COLUMNS
    outliers = rng.standard_normal(shape) * 0.02
    outliers[:, rng.integers(0, COLUMNS, 6)] *= 20
    mixed = rng.standard_normal(shape) * np.exp(rng.standard_normal((ROWS, 1)))
    mixed[::3] = 0
    found = {"normal": rng.standard_normal(shape) * 0.02, "heavy": rng.standard_t(4, shape) * 0.02, "outliers": outliers,
             "small": rng.standard_normal(shape) * 1e-5, "laplace": rng.laplace(size=shape) * 0.02, "mixed": mixed}
    return {name: rows.astype(np.float32) for name, rows in found.items()}


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


def llama_cpp(library):
    """A function (name, rows, importance or None) -> blocks, of a library."""
    library = ctypes.CDLL(library)
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]

    def quantize(name, rows, importance=None):
        kind = gguf.GGMLQuantizationType[name]
        library.ggml_quantize_init(int(kind))
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.empty((len(rows), rows.shape[1] // block * n_bytes), np.uint8)
        given = None if importance is None else importance.ctypes.data
        quantize_chunk(int(kind), rows.ctypes.data, blocks.ctypes.data, 0, *rows.shape, given)
        return blocks
    return quantize


@click.command(help=__doc__.split("\n")[0])
@click.argument("library", type=click.Path(exists=True, dir_okay=False))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def main(library, output):
    quantize, rows = llama_cpp(library), statistics()
    importance = np.exp(1.5 * np.random.default_rng(25).standard_normal(COLUMNS)).astype(np.float32)
    values = {f"rows.{name}": x for name, x in rows.items()} | {"importance": importance}
    for name in TYPES:
        for statistic, x in rows.items():
            blocks = quantize(name, x)
            values[f"{name}.{statistic}"] = np.array([error(x, blocks, name), error(x, quantize(name, x, importance), name, importance)])
            if name in ("F16", "BF16", "Q8_0"):
                values[f"{name}.{statistic}.sha256"] = np.frombuffer(hashlib.sha256(blocks.tobytes()).digest(), np.uint8)
    np.savez_compressed(output, **values)


if __name__ == "__main__":
    main()
