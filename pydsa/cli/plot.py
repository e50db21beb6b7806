"""Plot the results of `pydsa bench`: speed against depth, and what each op takes.

Prompts are drawn beside generation, which also has the limit that the memory's bandwidth sets.
"""
import functools
import os

from pydsa.cli.op_plot import OpPanels
from pydsa.drawing import figure_class
from pydsa.errors import PydsaError
from pydsa.words import count, threads

FORMATS = ("png", "svg", "pdf")     # file formats, by the extension of the name
GREY, MARKERS = "0.85", "osD^v"
APART = 0.07        # fraction of the axis: depths that are closer than this have one label


def check_plot(path):
    """Raise PydsaError if save_plot would fail, before an hour of timing.

    It checks the extension, that the file can be written, and that matplotlib is installed.
    """
    ending = os.path.splitext(path)[1][1:].lower()
    if ending not in FORMATS:
        raise PydsaError(f"{path}: the name of a picture must end in {', '.join('.' + name for name in FORMATS)}.")
    figure_class()
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise _cannot_write(path, error) from error


def save_plot(path, about, rows, ops=()):
    """Draw the rows of Bench.run and of Bench.ops into a file.

    The parameters are those of draw(); the extension of the path is the format.
    """
    try:
        draw(about, rows, ops).savefig(path, dpi=150)
    except OSError as error:
        raise _cannot_write(path, error) from error


def draw(about, rows, ops=()):
    """A matplotlib Figure of the rows of Bench.run and of Bench.ops.

    It has a column for prompts and one for generation: speeds with a line for each --attention mode; under them a bar for each step of the
    ops, and a table of their shares of the ceiling where it is known. about: the dict of bench.about(), for the title.
    """
    kinds = [(name, key) for name, key in (("prompt", "n_prompt"), ("generation", "n_gen")) if any(row[key] for row in [*rows, *ops])]
    parts = OpPanels(ops)
    panels = [(4.2, functools.partial(_speeds, rows))] * bool(rows) + [(3.6, parts.bars)] * bool(ops)
    panels += [(0.9 + 0.2 * len(parts.names), parts.ceilings)] * parts.has_ceilings
    width = max([5.2, *(0.5 * len(parts.steps(key)) for _, key in kinds)]) * len(kinds) + 0.6 + 1.6 * bool(ops)
    heights = [height for height, _ in panels]
    figure = figure_class()(figsize=(width, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title(about), parse_math=False)
    grid = figure.subplots(len(panels), len(kinds), squeeze=False, height_ratios=heights)
    for (_, panel), line in zip(panels, grid):
        for axes, (name, key) in zip(line, kinds):
            panel(axes, name, key)
    if ops:
        parts.legend(grid[1 if rows else 0][-1])
    return figure


def title(row):
    """The title: what was timed, and on how many threads, from bench.about()."""
    indexer = "" if row["top_k"] is None else f", {row['type_index']} index keys, top_k {row['top_k']}"
    place = threads(row["n_threads"], row["n_threads_batch"]) if row["n_threads"] else row["backend"]
    return (f"{row['model_name']}: {row['model_arch']} {row['model_type']}, {count(row['model_n_params'])} parameters\n"
            f"{place}, {row['type_k']} latents{indexer}")


def _speeds(rows, axes, name, key):
    """Draw one line for each --attention mode and number of tokens.

    The limit is dashed, in the same colour.
    """
    from matplotlib.lines import Line2D
    colours = {mode: f"C{i}" for i, mode in enumerate(dict.fromkeys(row["attention"] for row in rows))}
    rows = [row for row in rows if row[key]]
    lengths, handles, limits = sorted({row[key] for row in rows}), [], []
    for mode in colours:
        for i, length in enumerate(lengths):
            line = sorted((row for row in rows if row["attention"] == mode and row[key] == length), key=lambda row: row["n_depth"])
            depths, speeds = [row["n_depth"] for row in line], [row["avg_ts"] for row in line]
            label = mode if len(lengths) == 1 else f"{mode}, {length} tokens"
            handles += axes.plot(depths, speeds, color=colours[mode], marker=MARKERS[i % len(MARKERS)], label=label)
            axes.vlines(depths, [row["avg_ts"] - row["stddev_ts"] for row in line],
                        [row["avg_ts"] + row["stddev_ts"] for row in line], color=colours[mode], linewidth=1)
            if all(row["limit_ts"] is not None for row in line):
                limits += axes.plot(depths, [row["limit_ts"] for row in line], color=colours[mode], linestyle="--", linewidth=1,
                                    marker="_" if len(line) == 1 else None, markersize=24)      # a line of one depth has no length
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
    """The depths with room for a label, always the first and the last."""
    room, kept = APART * (depths[-1] - depths[0]), depths[:1]
    for depth in depths[1:-1]:
        if depth - kept[-1] >= room and depths[-1] - depth >= room:
            kept.append(depth)
    return kept + depths[1:][-1:]


def _cannot_write(path, error):
    return PydsaError(f"{path}: the picture cannot be written ({getattr(error, 'strerror', None) or error}).")
