"""Folders of Hugging Face for tests: copies of those in data/checkpoints with other tensors and other fields."""
import json
import math
import struct
from pathlib import Path

import numpy as np

from pydsa.conversion.checkpoint import Checkpoint

DATA = Path(__file__).parent / "data" / "checkpoints"


def bf16(values):
    """The bits of the nearest bfloat16, of small exact numbers."""
    return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def save(path, tensors, header=None):
    """Write a safetensors file: {name: (dtype, array)}; header replaces its header."""
    entries, end = {}, 0
    for name, (dtype, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [end, end + data.nbytes]}
        end += data.nbytes
    text = json.dumps(entries).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data.tobytes() for _, data in tensors.values()))


def copy(name, folder, change=None, **fields):
    """Write data/checkpoints/NAME to a folder, in one safetensors file.

    change(tensors) changes {name: (dtype, array)} in place. fields: of config.json; None removes one. Returns the folder.
    """
    source = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {stored.name: (stored.dtype, stored.read()) for stored in Checkpoint(source).tensors.values()}
    if change is not None:
        change(tensors)
    save(folder / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for path in source.iterdir():
        if path.name.startswith("tok"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def add_mtp(tensors, n_layer=3, n_embd=64):
    """Add an MTP block: the last layer again, and what joins it."""
    last, new = f"model.layers.{n_layer - 1}.", f"model.layers.{n_layer}."
    tensors |= {name.replace(last, new): value for name, value in tensors.items() if name.startswith(last)}
    ones = bf16(np.ones(n_embd))
    tensors |= {f"{new}eh_proj.weight": ("BF16", bf16(np.eye(n_embd, 2 * n_embd) + 1)), f"{new}enorm.weight": ("BF16", ones),
                f"{new}hnorm.weight": ("BF16", ones), f"{new}shared_head.norm.weight": ("BF16", ones),
                f"{new}shared_head.head.weight": tensors["lm_head.weight"],
                f"{new}embed_tokens.weight": tensors["model.embed_tokens.weight"]}


def to_fp8(tensors, block=(32, 16)):
    """Store the matrices of the layers as FP8 with scales of blocks.

    Returns {name: float32 that the codes and scales stand for}, computed block by block.
    """
    values = np.array([(m * 2.0 ** -9 if e == 0 else (8 + m) * 2.0 ** (e - 10)) for e in range(16) for m in range(8)][:127])
    meant = {}
    for name in [name for name in tensors if "_proj" in name and "indexer" not in name]:
        matrix = (tensors[name][1].astype("<u4") << 16).view("<f4").astype(np.float64)
        n, k = matrix.shape
        codes, out = np.empty((n, k), "u1"), np.empty((n, k), "<f4")
        scales = np.empty((math.ceil(n / block[0]), math.ceil(k / block[1])), "<f4")
        for i, j in np.ndindex(scales.shape):
            part = np.s_[i * block[0]:(i + 1) * block[0], j * block[1]:(j + 1) * block[1]]
            scales[i, j] = np.abs(matrix[part]).max() / 448
            nearest = np.abs(np.abs(matrix[part])[..., None] / scales[i, j] - values).argmin(-1)
            codes[part] = nearest + 128 * (matrix[part] < 0)
            out[part] = np.sign(matrix[part]).astype("<f4") * values[nearest].astype("<f4") * scales[i, j]
        tensors[name] = "F8_E4M3", codes
        tensors[name + "_scale_inv"] = "F32", scales
        meant[name] = out
    return meant
