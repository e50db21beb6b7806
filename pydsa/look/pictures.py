"""Pictures of a Look, drawn by matplotlib."""
import contextlib
import io
import os
import unicodedata
import warnings

import numpy as np

from pydsa.drawing import figure_class
from pydsa.errors import PydsaError
from pydsa.look.files import check, replace
from pydsa.look.numbers import BLOCKS

STOPS = ((0, "#ffffff"), (.12, "#fff3d0"), (.4, "#ffc752"), (.66, "#ec7a12"), (.86, "#b2380a"), (1, "#641404"))     # as in page.js
INK, MUTED, ACCENT = "#1d2025", "#5a5e66", "#0b5e8a"
SIZE, ADVANCE, LINE = 9, 0.602, 1.75     # points; a letter's width and a line's height, in SIZE
COLUMNS, AROUND = 104, 70       # letters of a line; tokens before and after a place
NAMES = ("text", "layers", "changes", "mass", "experts")
PLAIN = {0xFF5C: "|", 0x2581: "_"}      # of control tokens' texts, which few fonts have


def check_folder(folder, names=NAMES):
    """Raise PydsaError if a picture cannot be written, before a long run."""
    try:
        os.makedirs(folder, exist_ok=True)
    except (OSError, ValueError) as error:
        raise PydsaError(f"{folder}: the folder cannot be made ({getattr(error, 'strerror', None) or error}).") from error
    for name in names:
        check(os.path.join(folder, f"{name}.png"), ".png")


def save_all(look, folder):
    """Draw all pictures into a folder -> their paths, a list of str."""
    figures = look.figures
    drawn = {"text": draw_text}
    if figures.chosen_layers:
        drawn |= {"layers": draw_layers, "changes": draw_changes}
    if any(row["mass_prompt"] is not None or row["mass_answer"] is not None for row in figures.layer_rows):
        drawn["mass"] = draw_mass
    if figures.expert_layers:
        drawn["experts"] = draw_experts
    check_folder(folder, drawn)
    paths = [os.path.join(folder, f"{name}.png") for name in drawn]
    for path, draw in zip(paths, drawn.values()):
        save(draw(look), path)
    return paths


def save(figure, path):
    """Write a figure to a PNG file, as files.replace() does."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    drawn, file, info = io.BytesIO(), io.BytesIO(), PngInfo()
    with _any_letters():
        figure.savefig(drawn, format="png", dpi=110)
    info.add_text("Software", "pydsa look")
    Image.open(drawn).convert("RGB").quantize(192).save(file, format="png", optimize=True, pnginfo=info)
    replace(path, ".png", file.getvalue())


@contextlib.contextmanager
def _any_letters():
    """Without a warning for each letter that a font has not: it is a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def draw_text(look):
    """A Figure of the text where the answer looked at it most, and the answer.

    Tokens are shaded. The end of the prompt, of which the newest tokens are always looked at, has no shade, unless there is nothing else.
    Below are the layers and positions.
    """
    figures, values = look.figures, look.figures.looked_at()
    ranges = excerpt(look, values)
    if len(ranges) > 1:
        values[ranges[1].start:] = 0
    lines, layers = _lines(look, ranges), len(figures.chosen_layers)
    top, below = 2.9, 1.05 + min(2.4, max(0.5, 0.16 * layers)) if layers else 0.1       # lines, inches
    height, width = (len(lines) + top) * LINE * SIZE / 72, COLUMNS * ADVANCE * SIZE / 72
    figure = figure_class()(figsize=(width + 0.5, height + below))
    axes = figure.add_axes((0.25 / (width + 0.5), below / (height + below), width / (width + 0.5), height / (height + below)))
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), -top))
    axes.axis("off")
    who = "the answer" if look.n_prompt is not None else "the last token"
    axes.text(0, 0.7 - top, f"What {who} looked at", size=13, weight="bold", color=INK, va="center")
    how = "the share of attention" if figures.weighed else "how often it was chosen"
    end = f", but for the last {len(look.ids) - ranges[1].start} tokens" if len(ranges) > 1 else ""
    underlined = "" if look.n_prompt is None else "; the answer is underlined"
    axes.text(0, 1.75 - top, f"{look.recording.facts.name}, {len(look.ids):,} tokens, shaded by {how}{end}{underlined}", size=8.5,
              color=MUTED, va="center", parse_math=False)
    for y, line in enumerate(lines):
        for x, token, text in line:
            _write(axes, look, x, y, token, text, values)
    if layers:
        room = (0.55 / (width + 0.5), 0.45 / (height + below), (width - 0.5) / (width + 0.5), (below - 0.6) / (height + below))
        _heat(figure.add_axes(room), look)
    return figure


def excerpt(look, values):
    """The tokens to show -> a list of ranges.

    They are around what was looked at most, apart from the end, which is always looked at; and the end, with the answer.
    """
    n, end = len(look.ids), len(look.ids) if look.n_prompt is None else look.n_prompt
    if n <= 4 * AROUND:
        return [range(n)]
    ending = range(_line_start(look, look.figures.far, 2 * AROUND), min(n, end + 2 * AROUND))
    if ending.start == 0 or not values[:ending.start].any():
        return [ending]
    best = int(np.argmax(values[:ending.start]))
    around = range(_line_start(look, max(0, best - AROUND)), min(ending.start, best + AROUND))
    return [around, ending]


def _line_start(look, token, far=AROUND):
    """The first token of a token's line, or itself if that is far."""
    starts = (i for i in range(token, max(-1, token - far), -1) if i == 0 or look.texts[i - 1].endswith("\n"))
    return next(starts, token)


def _lines(look, ranges):
    """Lines of [(column, token, text)], broken between words.

    They have at most COLUMNS letters.
    """
    lines, before = [], 0
    for part in ranges:
        if part.start > before:
            lines.append([(0, None, f"\u2026 {part.start - before:,} tokens \u2026")])
        lines.append([])
        for token in part:
            text = look.texts[token].translate(PLAIN) if look.control[token] else look.texts[token]
            for i, piece in enumerate(text.split("\n")):
                if i:
                    lines.append([])
                _put(lines, token, piece)
        before = part.stop
    if before < len(look.ids):
        lines.append([(0, None, f"\u2026 {len(look.ids) - before:,} tokens \u2026")])
    return lines


def _put(lines, token, text):
    """Put a token's text, without a line break, at the end of the lines.

    Where it does not fit, it takes the parts of its word before it to a new line, or is cut, if the word has no room in a line.
    """
    line = lines[-1]
    if line and _end(line) + _letters(text) > COLUMNS:
        first = len(line)
        while first and not (text if first == len(line) else line[first][2]).startswith(" "):
            first -= 1
        moved = [*((other, piece) for _, other, piece in line[first:]), (token, text)]
        if first and sum(_letters(piece) for _, piece in moved) <= COLUMNS:
            del line[first:]
            lines.append([])
            for other, piece in moved:
                lines[-1].append((_end(lines[-1]), other, piece if lines[-1] else piece.lstrip(" ")))
            return
    while text:
        room = COLUMNS - _end(lines[-1])
        if room < 2:
            lines.append([])
            continue
        part = text[:room] if _letters(text[:room]) <= room else text[:room // 2]
        lines[-1].append((_end(lines[-1]), token, part))
        text = text[len(part):]


def _end(line):
    """The column after a line's last letter."""
    return line[-1][0] + _letters(line[-1][2]) if line else 0


def _letters(text):
    """The columns that a text takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _write(axes, look, x, y, token, text, values):
    """Draw a token's text, on its shade."""
    from matplotlib.patches import Rectangle
    shade = 0 if token is None or not values.any() else float(np.sqrt(values[token] / values.max()))
    if shade:
        axes.add_patch(Rectangle((x, y - 0.42), _letters(text), 0.84, color=_colours()(shade), linewidth=0))
    answer = token is not None and look.n_prompt is not None and token >= look.n_prompt
    if answer:
        axes.plot([x, x + _letters(text)], [y + 0.46] * 2, color=ACCENT, linewidth=1.5, solid_capstyle="butt")
    colour = MUTED if token is None or look.control[token] and shade < 0.7 else "white" if shade > 0.72 else INK
    axes.text(x, y, text.replace("\t", " "), size=SIZE, family=_families(), color=colour, va="center_baseline",
              weight="bold" if answer else "normal", parse_math=False)


def _families():
    """The font of the text, and installed ones that have more letters."""
    from matplotlib.font_manager import fontManager
    more = {font.name for font in fontManager.ttflist if "CJK" in font.name or "Emoji" in font.name and font.fname.endswith(".ttf")}
    return ["DejaVu Sans Mono", *sorted(name for name in more if "Mono" in name)[:1]]


def _colours():
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("look", STOPS)


def _image(axes, values, extent, label, gamma=0.5, **limits):
    """A heat map of values [rows, columns]; NaN is left empty."""
    from matplotlib.colors import PowerNorm
    image = axes.imshow(values, cmap=_colours(), aspect="auto", interpolation="nearest", extent=extent,
                        norm=PowerNorm(gamma, clip=True, **limits))
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, format=lambda value, _: f"{100 * value:.3g} %")
    bar.ax.locator_params(nbins=4)
    bar.set_label(label, size=8)
    bar.ax.tick_params(labelsize=7)
    axes.tick_params(labelsize=8)
    return image


def _rows_of_layers(axes, layers):
    """Name the rows of a heat map, as many as have room."""
    step = -(-len(layers) // 16)
    axes.set_yticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer", size=8)


def _heat(axes, look):
    """Draw layers and positions; of neighbours the most looked at counts.

    The newest tokens before the answer, and the answer, do not decide what is dark.
    """
    figures, n = look.figures, len(look.ids)
    columns = min(n, 700)
    starts = np.arange(columns) * n // columns
    values = np.stack([np.maximum.reduceat(figures.looked_at(layer=layer), starts) for layer in figures.chosen_layers])
    most = values[:, starts < figures.far].max(initial=0) or values.max(initial=0)
    _image(axes, values, (0, n, len(values), 0), "share" if figures.weighed else "chosen by", vmin=0, vmax=most or 1)
    _rows_of_layers(axes, figures.chosen_layers)
    axes.set_xlabel("position in the text", size=8)


def draw_layers(look):
    """A Figure of layers and positions: what the answer looked at."""
    figure = figure_class()(figsize=(11, 1.6 + 0.16 * max(6, len(look.figures.chosen_layers))), layout="constrained")
    axes = figure.subplots()
    _heat(axes, look)
    axes.set_title(f"What {look.figures.groups[0].name} looked at", size=10)
    return figure


def draw_changes(look):
    """A Figure of overlaps and unions of neighbouring tokens' choices."""
    figures = look.figures
    figure = figure_class()(figsize=(12, 1.6 + 0.16 * max(12, len(figures.chosen_layers))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    at = figures.positions[figures.made]
    if len(at) > 1:
        columns = min(700, int(at[-1] - at[0]) + 1)
        column = (at - at[0]) * columns // int(at[-1] - at[0] + 1)
        values = np.full((len(figures.chosen_layers), columns), np.nan)
        for row, layer in zip(values, figures.chosen_layers):
            there = np.isfinite(figures.overlaps[layer])
            n = np.bincount(column[there], minlength=columns)
            row[n > 0] = (np.bincount(column[there], figures.overlaps[layer][there], columns) / np.maximum(n, 1))[n > 0]
        _image(left, values, (at[0], at[-1] + 1, len(values), 0), "keys chosen before too", 1, vmin=0, vmax=1)
    _rows_of_layers(left, figures.chosen_layers)
    left.set_title("Overlap of each token's choice with the one before", size=10)
    left.set_xlabel("position in the text", size=8)
    rows = [row for row in figures.layer_rows if row[f"union_{BLOCKS[0]}"] is not None]
    for i, row in enumerate(rows):
        blocks = [block for block in BLOCKS if row[f"union_{block}"] is not None]
        colour = _colours()(0.35 + 0.6 * i / max(1, len(rows) - 1))
        right.plot([1, *blocks], [1, *(row[f"union_{block}"] for block in blocks)], color=colour,
                   marker="o", markersize=3, label=f"layer {row['layer']}" if len(rows) < 9 or i in (0, len(rows) - 1) else None)
    right.set_title("Keys that neighbouring tokens choose together", size=10)
    right.set_xlabel("tokens", size=8)
    right.set_ylabel("multiples of one's choice", size=8)
    right.set_xscale("log", base=2)
    right.set_xticks([1, *BLOCKS], [1, *BLOCKS])
    right.tick_params(labelsize=8)
    right.grid(color="0.85")
    if rows:
        right.legend(fontsize=8, frameon=False)
    return figure


def draw_mass(look):
    """A Figure of the share of dense attention that the chosen keys hold."""
    figure = figure_class()(figsize=(9, 3.2), layout="constrained")
    axes, rows = figure.subplots(), look.figures.layer_rows
    for key, label, colour in ("mass_prompt", "prompt", "#ec7a12"), ("mass_answer", "answer", ACCENT):
        values = [np.nan if row[key] is None else row[key] for row in rows]
        axes.plot([row["layer"] for row in rows], values, "o-", markersize=4, color=colour, label=label)
    axes.set(ylim=(0, 1.02), xlabel="layer", ylabel="share")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Share of dense attention that the chosen keys hold", size=10)
    axes.grid(color="0.85")
    axes.legend(frameon=False)
    return figure


def draw_experts(look):
    """A Figure of how often each expert worked, for the answer and before."""
    figures = look.figures
    figure = figure_class()(figsize=(12, 1.6 + 0.16 * max(6, len(figures.expert_layers))), layout="constrained")
    for axes, group in zip(figure.subplots(1, 2), figures.groups):
        values = np.stack([group.experts[layer] for layer in figures.expert_layers]) / max(1, len(group.ran))
        _image(axes, values, (0, values.shape[1], len(values), 0), "share of the tokens", vmin=0)
        _rows_of_layers(axes, figures.expert_layers)
        axes.set_title(f"Experts of {group.name} ({len(group.ran):,} tokens)", size=10)
        axes.set_xlabel("expert", size=8)
    return figure
