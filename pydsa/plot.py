"""Rows of `pydsa bench` -> a picture of speed against depth, a line for each attention path, and for generation the bandwidth's limit."""
import os
from pathlib import Path

from pydsa.errors import PydsaError

FORMATS = ("png", "svg", "pdf")


def check_target(path):
    """Refuse what could not be written in the end: a benchmark takes minutes."""
    path = Path(path)
    if path.suffix[1:].lower() not in FORMATS:
        raise PydsaError(f"--plot {path}: the file's name must end in .{', .'.join(FORMATS)}.")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PydsaError(f"--plot {path}: the file cannot be written there.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise PydsaError("--plot needs matplotlib: pip install 'pydsa[plot]'.") from None


def figure(rows):
    """A matplotlib Figure with one panel for prompts and one for generation, of those that the rows have."""
    from matplotlib.figure import Figure
    kinds = {"prompt": [row for row in rows if row["n_prompt"]], "generation": [row for row in rows if row["n_gen"]]}
    kinds = {name: part for name, part in kinds.items() if part}
    drawing = Figure(figsize=(5.5 * len(kinds), 4.2), layout="constrained")
    first = rows[0]
    drawing.suptitle(f"{first['model_arch']} {first['model_type']}, {first['model_n_params'] / 1e9:.3g} B parameters, "
                     f"{first['n_threads']} threads, {first['type_k']} caches")
    for axes, (name, part) in zip(drawing.subplots(1, len(kinds), squeeze=False)[0], kinds.items()):
        for (n, attention), line in _lines(part).items():
            depths = [row["n_depth"] for row in line]
            drawn, = axes.plot(depths, [row["avg_ts"] for row in line], marker="o", label=f"{attention}, {n}")
            if all(row["limit_ts"] for row in line):
                axes.plot(depths, [row["limit_ts"] for row in line], linestyle="--", color=drawn.get_color(), alpha=0.6,
                          label=f"{attention}: the bandwidth's limit")
        axes.set(title=name, xlabel="tokens in the context", ylabel="tokens a second")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return drawing


def _lines(rows):
    """(test without its depth, attention) -> its rows by depth."""
    lines = {}
    for row in sorted(rows, key=lambda row: row["n_depth"]):
        test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        lines.setdefault((test, row["attention"]), []).append(row)
    return lines


def save(rows, path):
    figure(rows).savefig(path, dpi=150)
