"""Tables of an imatrix: llama.cpp's statistics, and which experts the text reached.

Each is a list of rows, dicts with the same keys.
"""
import re

import numpy as np

BLOCK = re.compile(r"blk\.(\d+)\.(.*)\.weight")
ACTIVE = 1e-5       # mean squares above this are active, in llama.cpp
RARE = 0.1          # of the tokens that each expert would have if all had the same number


def _place(name):
    """(layer, kind) of a tensor: blk.3.attn_output.weight -> 3, attn_output.

    The layer is None outside of the blocks.
    """
    match = BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name.removesuffix(".weight"))


def statistics(imatrix):
    """llama.cpp's figures for each tensor, of its mean squares.

    A row has layer, tensor, their sum, min, max, mean, stddev, the share that is active (above 1e-5), their number n, entropy in bits,
    entropy_norm (its share of the greatest), zd, the share above the mean by more than a stddev, and cossim, the cosine similarity with the
    layer before, None without it. Experts without data do not count. Tensors of a kind stand together, those with the greatest sums first.
    """
    return [row for _, row in _statistics(imatrix)]


def _statistics(imatrix):
    """[(the name of the tensor, its row)]."""
    rows = []
    for name, sums in imatrix.sums.items():
        counts = imatrix.counts[name]
        values = (sums.reshape(counts.size, -1)[counts > 0] / counts[counts > 0, None]).reshape(-1)
        if not values.size:
            continue
        layer, kind = _place(name)
        before = None if layer is None else imatrix.sums.get(name.replace(f"blk.{layer}.", f"blk.{layer - 1}.", 1))
        total, mean, deviation = float(values.sum()), float(values.mean()), float(values.std())
        shares = values[values > 0] / total if total > 0 else np.ones(1)
        entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
        rows.append((name, {
            "layer": layer, "tensor": kind, "sum": total, "min": float(values.min()), "max": float(values.max()), "mean": mean,
            "stddev": deviation, "active": float((values > ACTIVE).mean()), "n": values.size, "entropy": entropy,
            "entropy_norm": entropy / np.log2(values.size).item() if values.size > 1 else None,
            "zd": float((values > mean + deviation).mean()) if deviation > 0 else 0.0,
            "cossim": _cosine(sums, before) if before is not None and before.size == sums.size else None}))
    return sorted(rows, key=lambda item: (item[1]["tensor"], -item[1]["sum"]))


def _cosine(a, b):
    """The cosine similarity of two vectors; None if one is zero."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else None


def layer_statistics(imatrix):
    """llama.cpp's figures for each layer: means of its tensors', by their sizes.

    A row has layer, sum, zd and cossim; a tensor without a cossim counts as 0, as in llama.cpp.
    """
    layers = {}
    for row in statistics(imatrix):
        if row["layer"] is not None:
            layers.setdefault(row["layer"], []).append(row)
    return [{"layer": layer} | {key: float(np.average([row[key] or 0.0 for row in rows], weights=[row["n"] for row in rows]))
                                for key in ("sum", "zd", "cossim")} for layer, rows in sorted(layers.items())]


def coverage(imatrix, tensors=None):
    """How many tokens reached each layer's experts, and what has no data.

    tensors: {name: gguf.file.Tensor} of the model, or None. A row has layer, tensor, experts (1 for a matrix without any), tokens (each
    counts for each of its experts), never and rarely, the numbers of experts without data and with less than a tenth of an equal share,
    least, median and most, in tokens, and never_ids, the ids of the former. Tensors of a layer with the same counts share a row. Other
    matrices have one only if they have no data.
    """
    missing = () if tensors is None else _without_entry(imatrix, tensors)
    rows = {}
    for name, counts in [*imatrix.counts.items(), *((name, np.zeros(1, np.int64)) for name in missing)]:
        if counts.size == 1 and counts.any():
            continue
        layer, kind = _place(name)
        row = rows.setdefault((layer, counts.tobytes()), {
            "layer": layer, "tensor": [], "experts": counts.size, "tokens": int(counts.sum()), "never": int((counts == 0).sum()),
            "rarely": int(((counts > 0) & (counts < RARE * counts.mean())).sum()), "least": int(counts.min()),
            "median": float(np.median(counts)), "most": int(counts.max()), "never_ids": " ".join(map(str, np.flatnonzero(counts == 0)))})
        row["tensor"].append(kind)
    return [row | {"tensor": ", ".join(sorted(row["tensor"]))}
            for row in sorted(rows.values(), key=lambda row: (row["layer"] is None, row["layer"] or 0))]


def _without_entry(imatrix, tensors):
    """The names of a model's matrices without an entry, a list.

    Left out are those that quantizers treat without one: the token embedding and the output.
    """
    return [name for name, tensor in tensors.items() if len(tensor.shape) > 1 and name.endswith(".weight")
            and name.startswith("blk.") and not name.endswith("_norm.weight") and imatrix.source(name) is None]
