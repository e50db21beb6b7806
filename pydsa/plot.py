"""The picture of a bench: speed against depth, prompts beside generation, and the limit that the memory's bandwidth sets."""
import os

from pydsa.errors import PydsaError
from pydsa.report import count

FORMATS = ("png", "svg", "pdf")     # the endings that a file may have
GREY, MARKERS = "0.85", "osD^v"
APART = 0.07        # of the axis: depths that are closer share a label


def check_plot(path):
    """Refuse what save_plot could not do, before an hour of timing is spent: the ending, the place, the package."""
    ending = os.path.splitext(path)[1][1:].lower()
    if ending not in FORMATS:
        raise PydsaError(f"{path}: the name of a picture must end in {', '.join('.' + name for name in FORMATS)}.")
    _figure_class()
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except (OSError, ValueError) as error:      # ValueError: a zero in the path
        raise _cannot_write(path, error) from error


def save_plot(rows, path):
    """Draw the rows of Bench.run into a file, in the format that its ending names."""
    try:
        draw(rows).savefig(path, dpi=150)
    except OSError as error:
        raise _cannot_write(path, error) from error


def draw(rows):
    """A matplotlib Figure of the rows of Bench.run: a panel for prompts, one for generation, a line for each attention path in both."""
    kinds = [(name, key) for name, key in (("prompt", "n_prompt"), ("generation", "n_gen")) if any(row[key] for row in rows)]
    figure = _figure_class()(figsize=(5.2 * len(kinds) + 0.6, 4.6), layout="constrained")
    figure.suptitle(title(rows[0]), parse_math=False)
    colours = {path: f"C{i}" for i, path in enumerate(dict.fromkeys(row["attention"] for row in rows))}
    for axes, (name, key) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        _panel(axes, name, key, [row for row in rows if row[key]], colours)
    return figure


def title(row):
    """What was timed, and on how many threads."""
    indexer = "" if row["top_k"] is None else f", {row['type_index']} index keys, top_k {row['top_k']}"
    threads = f"{row['n_threads']} thread{'s' * (row['n_threads'] != 1)}" if row["n_threads"] else row["backend"]
    return (f"{row['model_name']}: {row['model_arch']} {row['model_type']}, {count(row['model_n_params'])} parameters\n"
            f"{threads}, {row['type_k']} latents{indexer}")


def _panel(axes, name, key, rows, colours):
    """One line for each attention path and number of tokens; dashed, in the same colour, the limit."""
    from matplotlib.lines import Line2D
    lengths, handles, limits = sorted({row[key] for row in rows}), [], []
    for path in colours:
        for i, length in enumerate(lengths):
            line = sorted((row for row in rows if row["attention"] == path and row[key] == length), key=lambda row: row["n_depth"])
            depths, speeds = [row["n_depth"] for row in line], [row["avg_ts"] for row in line]
            label = path if len(lengths) == 1 else f"{path}, {length} tokens"
            handles += axes.plot(depths, speeds, color=colours[path], marker=MARKERS[i % len(MARKERS)], label=label)
            axes.vlines(depths, [row["avg_ts"] - row["stddev_ts"] for row in line],
                        [row["avg_ts"] + row["stddev_ts"] for row in line], color=colours[path], linewidth=1)
            if all(row["limit_ts"] is not None for row in line):
                limits += axes.plot(depths, [row["limit_ts"] for row in line], color=colours[path], linestyle="--", linewidth=1)
    tokens = f" of {lengths[0]} tokens" if len(lengths) == 1 else ""
    axes.set(title=f"{name}{tokens}", xlabel="depth (tokens already in the context)", ylabel="speed (tokens per second)")
    axes.set_xticks(_labelled(sorted({row["n_depth"] for row in rows})))
    axes.set_ylim(bottom=0)
    axes.grid(color=GREY)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if limits:
        handles.append(Line2D([], [], color="grey", linestyle="--", linewidth=1, label="limit of the memory's bandwidth"))
    axes.legend(handles=handles, fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _labelled(depths):
    """The depths that have room for a label, the first and the last in any case."""
    room, kept = APART * (depths[-1] - depths[0]), depths[:1]
    for depth in depths[1:-1]:
        if depth - kept[-1] >= room and depths[-1] - depth >= room:
            kept.append(depth)
    return kept + depths[1:][-1:]


def _figure_class():
    """Without pyplot: no window, no state that others share."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PydsaError("To draw, pydsa needs matplotlib: pip install 'pydsa[plot]', then run this again.") from None
    return Figure


def _cannot_write(path, error):
    return PydsaError(f"{path}: the picture cannot be written ({getattr(error, 'strerror', None) or error}).")
