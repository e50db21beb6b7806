"""The types that llama-quantize gives tensors of models, for tests.

    python tools/golden_mixes.py path/to/llama-quantize tests/data/mixes.json.gz

It runs `llama-quantize --dry-run` for small models of each architecture, for every file type, without and with an imatrix.
"""
import gzip
import json
import re
import subprocess
import tempfile
from pathlib import Path

import click
import numpy as np

from pydsa.gguf.file import open_gguf
from pydsa.imatrix import Imatrix, save
from pydsa.quantization.mixes import MIXES
from tools.make_model import ModelSpec, make_model

SMALL = dict(n_embd=256, n_ff_exp=256, n_ff=256, n_vocab=512)
MODELS = {
    "v3.2": dict(type="BF16", n_layer=17, n_expert=4, **SMALL),
    "old, 8 experts": dict(type="F16", arch="deepseek2", n_layer=16, n_expert=8, legacy_kv_b=True, n_v=64, **SMALL),
    "old, tied": dict(type="F32", arch="deepseek2", n_layer=12, n_expert=16, legacy_kv_b=True, tied_output=True, **SMALL),
    "glm, tied": dict(type="F16", arch="glm-dsa", n_layer=11, n_expert=2, n_expert_used=1, nextn=1, tied_output=True, n_expert_groups=1,
                      n_group_used=1, **SMALL),
    "ragged": dict(type="F16", n_layer=9, n_expert=8, nextn=1, **SMALL | dict(n_embd=320, n_ff_exp=96)),
    "dense": dict(type="F16", arch="deepseek2", n_layer=17, n_expert=0, n_layer_dense=17, legacy_kv_b=True, **SMALL),
}
LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = +(\S+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\S+)\))?")


def types(program, model, mix, imatrix):
    """{tensor: type} that llama-quantize prints for a file.

    It is empty where there is no type for rows that do not fill blocks.
    """
    options = ["--imatrix", imatrix] if imatrix else []
    output = subprocess.run([program, "--dry-run", *options, model, mix], capture_output=True, text=True, errors="replace")
    if output.returncode and "no tensor type fallback is defined" in output.stderr + output.stdout:
        return {}
    text = re.sub(r"warning: .*?-> falling back to +\S+\n", "", output.stderr + output.stdout, flags=re.DOTALL)
    return {name: (new or old).upper() for name, old, new in LINE.findall(text)}


@click.command(help=__doc__.split("\n")[0])
@click.argument("program", type=click.Path(exists=True, dir_okay=False))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def main(program, output):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, options in MODELS.items():
            path = make_model(Path(folder) / "model.gguf", ModelSpec(**options))
            tensors = open_gguf(path).tensors
            sizes = {name: (int(np.prod(t.shape[:-2])), t.shape[-1]) for name, t in tensors.items() if len(t.shape) > 1}
            imatrix = Imatrix({name: np.ones(n * k) for name, (n, k) in sizes.items()},
                              {name: np.full(n, 512) for name, (n, _) in sizes.items()}, ["text.txt"])
            save(imatrix, Path(folder) / "imatrix.gguf")
            for mix in MIXES:
                for given in (None, Path(folder) / "imatrix.gguf"):
                    kinds = types(program, path, mix, given)
                    if not kinds:
                        continue
                    if kinds.keys() != tensors.keys():
                        raise click.ClickException(f"{title} {mix}: {len(kinds)} lines for {len(tensors)} tensors")
                    found.setdefault(title, {})[f"{mix}{' imatrix' * (given is not None)}"] = [kinds[name] for name in tensors]
            path.unlink()
    output.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


if __name__ == "__main__":
    main()
