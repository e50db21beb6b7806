"""The errors of llama.cpp's i-quants, TQ1_0, TQ2_0, Q1_0 and NVFP4.

    python tools/golden_quantizers_iq.py LIBGGML_BASE_SO tests/data/quantizers.npz tests/data/quantizers_iq.npz

They are for tests. The rows and their importance are those of tools/golden_quantizers.py. For each type and statistic of rows: the root
of the summed squared errors, without and with importance (then weighted by it). Without means ones for the types that need importance:
llama.cpp refuses most of them then.
"""
import sys
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.golden_quantizers import error, llama_cpp  # noqa: E402

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "Q1_0", "NVFP4")
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")


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
