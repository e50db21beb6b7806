"""The page: page.html with its script, and a Look's numbers as JSON.

The page may load nothing; its own script and style are allowed by their hashes.
"""
import base64
import functools
import hashlib
import html
import os
import re

import numpy as np

from pydsa.look import pack
from pydsa.look.numbers import BLOCKS, shares

ENTRIES = 1 << 23       # chosen keys in a page
CELLS = 1 << 23         # sums in a page, for each group: layers times positions
COLUMNS = 1024          # of the heat map of overlaps
FOLDER = os.path.dirname(__file__)
HEADS = {       # column: its head, what it tells, and the greatest value, for a bar
    "overlap_prompt": ("overlap, prompt", "Overlap: the share of a token's keys that the token before it chose too, in the prompt and in "
                       "the steps of the answer.", 1),
    "overlap_answer": ("overlap, answer", "", 1),
    "keys_answer": ("keys of the answer", "Keys of the answer: how many all its steps chose together.", None),
    "mass_prompt": ("mass, prompt", "Mass: the share of dense attention that the chosen keys hold.", 1),
    "mass_answer": ("mass, answer", "", 1),
    "recall": ("recall", "Recall: the share of the keys that the choice it was compared with has too.", 1),
    **{f"union_{block}": (f"{block} together", "" if block > BLOCKS[0] else "Together: how many keys so many neighbouring tokens chose, in "
                          "multiples of what one of them chose; 1 if all chose the same.", block) for block in BLOCKS},
    "experts_prompt": ("experts, prompt", "Experts: the number in effective use (the exponential of the entropy of their use).", None),
    "experts_answer": ("experts, answer", "", None),
}


def make_page(look, entries=ENTRIES):
    """The page of a Look, a str."""
    page, script, style = _parts()
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    policy = f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    data = page_data(look, entries)
    values = {"policy": policy, "title": html.escape(data["title"]), "data": pack.json_for_html(data), "script": script[1:-1]}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], page)


@functools.cache
def _parts():
    """The page, the text of its script element, and that of its style."""
    texts = []
    for name in ("page.html", "page.js"):
        with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
            texts.append(file.read())
    page, script = texts
    return page, f"\n{script.rstrip()}\n", re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]


def page_data(look, entries=ENTRIES):
    """What page.js shows, as a dict for JSON."""
    figures = look.figures
    choices, left_out = _choices(figures, entries)
    bins = _bins(figures)
    shared = look.recording.indexed_layers or {}
    return {
        "title": "What the answer looked at" if look.n_prompt is not None else "What the tokens looked at",
        "about": about(look), "notes": [*_notes(look), *left_out, *_notes_of_bins(bins), *([look.note] if look.note else [])],
        "texts": look.texts, "control": np.flatnonzero(look.control).tolist(), "n_prompt": look.n_prompt, "far": figures.far,
        "chosen_layers": figures.chosen_layers, "weighed": figures.weighed,
        "shared": {str(layer): shared[layer] for layer in figures.chosen_layers if shared[layer] != layer},
        "groups": [_group(figures, group, bins) for group in figures.groups], "bin": bins,
        "choices": choices, "all_keys": pack.spans(figures.all_keys), "overlap": _overlap(figures), "table": _table(figures),
        "experts": _experts(figures),
    }


def about(look):
    """A line on the model and the text."""
    facts, n = look.recording.facts, len(look.ids)
    answer = "" if look.n_prompt is None else f", {n - look.n_prompt} of them the answer"
    chosen = f"; a token attends to at most {facts.top_k:,} keys in each" if look.figures.chosen_layers else ""
    return f"{facts.name} ({facts.architecture}): {n:,} tokens{answer}; {len(look.figures.layers)} layers{chosen}."


def _bins(figures):
    """How many neighbouring positions have one sum in each layer."""
    n = 1
    while len(figures.chosen_layers) * -(-figures.n_tokens // n) > CELLS:
        n *= 2
    return n


def _group(figures, group, bins):
    """A group: its sums in each layer [n_layers, n_bins], and in all of them."""
    def stored(values):
        if not figures.chosen_layers:
            return None
        layers = [np.add.reduceat(values[layer], np.arange(0, figures.n_tokens, bins)) for layer in figures.chosen_layers]
        return {"layers": pack.sums(np.stack(layers)), "all": pack.sums(sum(values.values())) if bins > 1 else None}
    return {"name": group.name, "rows": len(group.rows), "times": stored(group.times),
            "weights": stored(group.weights) if figures.weighed else None}


def _choices(figures, entries):
    """The choices of single tokens, and a note where some are left out.

    They are those of the answer and of the newest tokens before it, as many as there is room for in so many entries.
    """
    layers, recording, k = figures.chosen_layers, figures.recording, figures.recording.top_k
    if not layers or not len(figures.made):
        return None, []
    most = max(1, entries // (len(layers) * k))
    answer = figures.groups[0].rows
    rows = np.sort(np.concatenate([answer, np.setdiff1d(figures.made, answer)[::-1]])[:most])
    steps, levels = np.empty((len(rows), len(layers), k), np.uint32), np.empty((len(rows), len(layers), k), np.uint8)
    for i, layer in enumerate(layers):
        chosen = recording.selection[layer][rows]
        steps[:, i] = pack.steps(chosen)
        if figures.weighed:
            levels[:, i] = pack.share_levels(shares(recording.scores[layer][rows], chosen))
    stored = {"positions": pack.spans(figures.positions[rows]), "k": k, "planes": pack.planes(steps),
              "shares": pack.block(levels) if figures.weighed else None}
    left = len(figures.made) - len(rows)
    return stored, [f"Of {left:,} tokens the page has no choices of their own, as they would take too much room: the pointer shows "
                    "nothing for them. They count in all sums."] if left else []


def _overlap(figures):
    """Overlaps as a heat map: [layers, columns] of 0 to 254, 255 where there is none."""
    if not figures.chosen_layers or len(figures.made) < 2:
        return None
    at = figures.positions[figures.made]
    first, last = int(at[0]), int(at[-1])
    columns = min(COLUMNS, last - first + 1)
    column, cells = (at - first) * columns // (last - first + 1), np.full((len(figures.chosen_layers), columns), 255, np.uint8)
    for i, layer in enumerate(figures.chosen_layers):
        there = np.isfinite(figures.overlaps[layer])
        n = np.bincount(column[there], minlength=columns)
        total = np.bincount(column[there], figures.overlaps[layer][there], columns)
        cells[i, n > 0] = np.rint(254 * total[n > 0] / n[n > 0])
    return {"cells": pack.block(cells), "columns": columns, "first": first, "last": last} if (cells < 255).any() else None


def _table(figures):
    columns = [{"key": key, "head": head, "tells": tells, "most": most, "share": most == 1} for key, (head, tells, most) in HEADS.items()]
    return {"columns": columns, "rows": figures.layer_rows}


def _experts(figures):
    layers = figures.expert_layers
    if not layers:
        return None
    groups = [{"tokens": len(group.ran), "planes": pack.planes(np.stack([group.experts[layer] for layer in layers]))}
              for group in figures.groups]
    return {"layers": layers, "n": figures.recording.facts.n_expert, "groups": groups}


def _notes(look):
    """Sentences on what was recorded, and how to read it."""
    figures, recording, n = look.figures, look.recording, len(look.ids)
    if figures.weighed:
        yield ("A share of attention is the softmax of the indexer's scores over the keys that a token chose. Indexers are trained to make "
               "this the attention of their layer, so it tells what a token looked at; it is not the attention itself.")
    if figures.n_prompt is not None:
        yield "The answer's first token was written by the prompt's last, and so on: a token is written by the step of the one before it."
    if recording.selection is None:
        yield "Choices were not recorded: there is nothing to shade."
    elif not len(figures.made):
        yield (f"No choice was made: no token that was recorded had more than the {recording.top_k:,} keys that it may attend to, so each "
               "attended to all. A longer text shows choices; so does a smaller --dsa-top-k, with which the model is not what it was.")
    elif len(figures.all_keys):
        yield (f"{len(figures.all_keys):,} tokens attended to all tokens up to themselves, which is no choice; they do not count in what "
               "was looked at.")
    missing = n - len(figures.positions) - (figures.n_prompt is not None and n - 1 not in figures.positions)
    if missing > 0:
        yield f"{missing:,} tokens were not recorded, or had to leave, as the memory of a recording is limited; they count nowhere."


def _notes_of_bins(bins):
    return [f"The sums of single layers are for {bins} neighbouring positions together; those of all layers are exact."] if bins > 1 else []
